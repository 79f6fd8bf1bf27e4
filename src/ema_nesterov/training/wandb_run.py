"""The W&B run of a run folder, brought up to what metrics.jsonl holds: live, by a process beside the training
(`python -m ema_nesterov.training.wandb_run FOLDER`), or later, by scripts/sync_wandb.py.

W&B appends: a step it has is never sent again, online, so that none stands twice. After a crash a resumed run repeats
the steps since its checkpoint; those that W&B has already stay as they are. An offline run cannot know what W&B has, so
it holds the whole run from the first step on, and sync_wandb, which asks, is the way to upload one that was resumed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import wandb
from filelock import FileLock
from omegaconf import OmegaConf

from ..errors import one_line
from .folder import load_config, read_status
from .mirror import catch_up

LOCK = ".wandb.lock"  # in the run folder: one process at a time sends it
RETRY = 60.0  # seconds until W&B that could not be reached is tried again
LAST = 25  # seconds that wandb has for the rest when the training is over; less than the training waits


def open_run(
    folder: Path, mode: str, scratch: Path, project: str | None = None, entity: str | None = None, **settings: Any
) -> Any:
    """The W&B run of this folder: under the same id whenever and wherever it is opened.

    scratch: where wandb keeps its files, and an offline run.  project, entity: others than the config names. Below
    `wandb agent` it is the agent's run.
    """
    cfg: Any = load_config(folder)
    header = [
        line for line in (folder / "config.yaml").read_text(encoding="utf-8").splitlines() if line.startswith("# ")
    ]
    provenance = dict(line.removeprefix("# ").split(": ", 1) for line in header if ": " in line)
    identity = f"{cfg.name}-{folder.resolve().parent.name.rpartition('-')[2]}"
    tags = [cfg[group].get("name") for group in ("model", "dataset", "optimizer", "lookahead")]
    chosen: dict[str, Any] = dict(
        project=project or cfg.logger.project,
        entity=entity or cfg.logger.entity,
        id=re.sub(r"[^A-Za-z0-9_-]", "-", f"{identity}-seed{cfg.seed}"),
    )
    if "WANDB_SWEEP_ID" in os.environ:  # the agent's WANDB_RUN_ID and so on; wandb takes no other, and would warn
        chosen = {}
    quiet()
    run = wandb.init(
        **chosen,
        mode=mode,  # type: ignore[arg-type]
        dir=str(scratch),
        name=f"{identity}/seed{cfg.seed}",
        group=identity,
        job_type="train",
        tags=[tag for tag in (*tags, *cfg.logger.get("tags", [])) if tag],
        config={**OmegaConf.to_container(cfg), "provenance": provenance},  # type: ignore[dict-item]
        resume="allow",
        reinit="create_new",
        settings=wandb.Settings(
            init_timeout=60,
            console="off",
            # what may hold a secret: git's URLs, code, arguments, SLURM's environment
            program="",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_save_requirements=False,
            finish_timeout_raises=True,
            **settings,
        ),
    )
    run.define_metric("*", step_metric=cfg.logger.x_axis)
    return run


def rows(lines: Iterable[dict[str, Any]], ended: Callable[[], bool] = lambda: True) -> Iterator[dict[str, Any]]:
    """One row per step, for W&B takes a step once: training, validation and probes of it together.

    ended: asked after the last line, whether its step is complete; if not, it is left for later.
    """
    row: dict[str, Any] = {}
    for line in lines:
        if row and line["step"] > row["step"]:
            yield row
            row = {}
        if "probe/loss" in line:  # one curve per direction and position
            key = f"probe/{line['probe/direction']}/{line['probe/position']:+.2f}"
            line = {"step": line["step"], "tokens": line["tokens"], key: line["probe/loss"]}
        row |= {k: v for k, v in line.items() if v is not None}
    if row and ended():
        yield row


def send(run: Any, rows: Iterable[dict[str, Any]]) -> int:
    """Log what the run does not have; returns how many steps that was."""
    sent, first = 0, run.starting_step
    for row in rows:
        if row["step"] >= first:
            run.log(row, step=row["step"], commit=True)
            sent += 1
    return sent


def finish(run: Any, status: str) -> None:
    run.summary["status"] = status  # W&B's own state tells no diverged run from a failed one
    if status == "preempted":
        run.mark_preempting()
    run.finish(exit_code=int(status != "finished"))


# --- live -----------------------------------------------------------------------------------------


def follow(path: Path, over: Event) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl as they come, until the training is over."""
    rest = ""
    with open(path, encoding="utf-8") as file:
        while True:
            last = over.is_set()
            *lines, rest = (rest + file.read()).split("\n")
            yield from map(json.loads, lines)
            if last:
                return
            over.wait(1)


def connect(folder: Path, over: Event) -> Any:
    """The run: offline without a key, and as soon as W&B can be reached with one."""
    mode = os.environ.get("WANDB_MODE", load_config(folder).logger.mode)
    told = False
    while True:
        try:
            if mode == "online" and not has_key():
                print(f"W&B has no key: logging offline in {folder / 'wandb'}; type wandb login, then "
                      f"python scripts/sync_wandb.py {folder}", flush=True)  # fmt: skip
                mode = "offline"
            return open_run(folder, mode, folder, finish_timeout=LAST, x_stats_pid=os.getppid())
        except Exception as e:
            if not told:
                print(f"no W&B yet ({one_line(e)}); tried again every {RETRY:.0f} s", flush=True)
            told = True
            if over.wait(RETRY):
                raise


def quiet() -> None:
    """Let wandb print warnings alone."""
    wandb.setup(wandb.Settings(show_info=False))


def has_key() -> bool:
    """Whether there is one. Raises an Exception where W&B cannot be reached, or does not take it."""
    quiet()
    return wandb.login(prompt=False)


def main(folder: Path) -> None:
    """Mirror the folder until stdin is closed: the training has ended, however it did."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # schedulers send them to all processes
    over = Event()

    def listen() -> None:
        sys.stdin.read()
        over.set()

    def ended() -> bool:  # a run that crashed or failed may be resumed before its last step
        return read_status(folder).get("status") not in ("running", "failed")

    Thread(target=listen, daemon=True).start()
    try:
        with FileLock(folder / LOCK):
            run = connect(folder, over)
            if run.url:
                has = f", which has steps up to {run.starting_step - 1}" if run.starting_step else ""
                print(f"mirrored by W&B: {run.url}{has}", flush=True)
            send(run, rows(follow(folder / "metrics.jsonl", over), ended))
            finish(run, read_status(folder).get("status", "failed"))
    except Exception as e:
        print(f"the W&B mirror ends ({one_line(e)}); {catch_up(folder)}", flush=True)
        os._exit(1)  # wandb's own end would wait for a service that is gone


if __name__ == "__main__":
    main(Path(sys.argv[1]))
