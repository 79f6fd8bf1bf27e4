"""Where a run's numbers go: metrics.jsonl (the truth), W&B (its mirror) and the terminal."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# What the mirror or the terminal raises must never stop a training run.
MirrorError = Exception


class Logs:
    """Writes one line of metrics at a time to every place. Rank 0 has one; `Silence` is the others'."""

    def __init__(self, file: TextIO, mirror: Mirror, progress: Progress | None, total_steps: int):
        self.file, self.mirror, self.progress = file, mirror, progress
        self.total_steps = total_steps
        self.task = progress.add_task("", total=total_steps) if progress else None
        self.printed = 0.0
        self.step = 0  # of the last line

    def write(self, line: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl and mirror it. `line` has "step", "tokens" and "time"."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.step = line["step"]
        self.mirror.log(line)
        if "val/loss" in line:
            self.say(f"step {line['step']}/{self.total_steps}  " + describe_validation(line))
        elif "train/loss" in line:
            self._advance(line)

    def _advance(self, line: dict[str, Any]) -> None:
        text = f"loss {line['train/loss']:.4f}  {line['perf/tokens_per_second']:,.0f} tokens/s"
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=line["step"], description=text)
        elif time.monotonic() - self.printed > 15:
            self.printed = time.monotonic()
            left = (self.total_steps - line["step"]) * line["perf/step_ms"] / 1000
            self.say(f"step {line['step']}/{self.total_steps}  {text}  {left:.0f} s left")

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self.progress is not None:
            self.progress.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def sync(self) -> None:
        """Put metrics.jsonl on the disk, so that a checkpoint never knows more than it."""
        os.fsync(self.file.fileno())


class Silence:
    """The logs of every rank but the first."""

    step = 0

    def write(self, line: dict[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def sync(self) -> None: ...


def describe_validation(line: dict[str, Any]) -> str:
    parts = [f"val loss {line['val/loss']:.4f} (perplexity {line['val/perplexity']:.2f})"]
    parts += [
        f"{name} {line[key]:.4f}"
        for key, name in (("val/lookahead_loss", "lookahead"), ("val/ema_loss", "weight EMA"))
        if key in line
    ]
    return "  ".join(parts)


@contextmanager
def open_logs(cfg: DictConfig, folder: Path, identity: str, step: int) -> Iterator[Logs]:
    """The logs of a run that starts, or resumes, at `step`."""
    metrics = folder / "metrics.jsonl"
    keep_until(metrics, step)
    terminal = Console(file=sys.stdout)
    columns = (
        TextColumn(cfg.name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with open(metrics, "a") as file, mirror(cfg, folder, identity) as wandb_mirror:
        if not terminal.is_terminal:
            yield Logs(file, wandb_mirror, None, cfg.steps)
            return
        with Progress(*columns, console=terminal) as progress:
            logs = Logs(file, wandb_mirror, progress, cfg.steps)
            progress.update(logs.task, completed=step)  # type: ignore[arg-type]
            yield logs


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; a last line cut by a crash is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`: the resumed run writes them again, so none stands twice."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
    aside.rename(path)


class Mirror:
    """A W&B run, or none. Whatever it raises is said once and ends the mirroring, not the training."""

    def __init__(self, run: Any = None):
        self.run = run

    def log(self, line: dict[str, Any]) -> None:
        if self.run is None:
            return
        if "probe/loss" in line:  # one curve per direction and position
            key = f"probe/{line['probe/direction']}/{line['probe/position']:+.2f}"
            line = {"step": line["step"], "tokens": line["tokens"], key: line["probe/loss"]}
        self._try(lambda: self.run.log(line, step=line["step"]))

    def finish(self, failed: bool) -> None:
        if self.run is not None:
            self._try(lambda: self.run.finish(exit_code=int(failed)))

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except MirrorError as e:
            print(f"W&B mirroring ends: {e}; metrics.jsonl goes on", file=sys.stderr)
            self.run = None


@contextmanager
def mirror(cfg: DictConfig, folder: Path, identity: str) -> Iterator[Mirror]:
    """The W&B run of this run folder: the same id at every restart, offline without a key."""
    if cfg.logger.name != "wandb" or cfg.logger.mode == "disabled":
        yield Mirror()
        return
    try:
        mirrored = Mirror(_wandb_run(cfg, folder, identity))
    except MirrorError as e:
        print(f"W&B cannot start ({type(e).__name__}: {e}): metrics.jsonl alone", file=sys.stderr)
        mirrored = Mirror()
    try:
        yield mirrored
    finally:
        mirrored.finish(failed=sys.exc_info()[0] is not None)


def _wandb_run(cfg: DictConfig, folder: Path, identity: str) -> Any:
    import wandb

    mode: Any = os.environ.get("WANDB_MODE", cfg.logger.mode)
    if mode == "online" and (reason := _why_offline()):
        print(f"W&B {reason}: logging offline in {folder / 'wandb'}; wandb login and wandb sync upload it", flush=True)
        mode = "offline"
    arguments: dict[str, Any] = dict(
        project=cfg.logger.project,
        entity=cfg.logger.entity,
        dir=str(folder),
        id=re.sub(r"[^A-Za-z0-9_-]", "-", f"{identity}-seed{cfg.seed}"),
        name=f"{identity}/seed{cfg.seed}",
        group=identity,
        job_type="train",
        tags=[cfg.model.name, cfg.dataset.name, cfg.optimizer.name, cfg.lookahead.name, *cfg.logger.tags],
        config=OmegaConf.to_container(cfg, resolve=True),
        resume="allow",
        settings=wandb.Settings(silent=True, init_timeout=60),
    )
    run = wandb.init(mode=mode, **arguments)
    run.define_metric("*", step_metric=cfg.logger.x_axis)
    return run


def _why_offline() -> str | None:
    """None when W&B can be reached with a key, else what is missing."""
    import wandb

    try:
        return None if wandb.login(prompt=False) else "has no key"
    except MirrorError as e:
        return f"cannot be reached ({type(e).__name__})"
