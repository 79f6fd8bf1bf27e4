"""Runs of a W&B project as run folders, for somebody who has none: find_runs and all behind it read them unchanged."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress

from ..config import typed
from ..errors import ConfigError, DataError, UserError, one_line
from ..training.folder import read_status
from ..training.logs import write_atomically

GROUP = r"\w[^/\\]*(/\w[^/\\]*)*"  # a relative folder without ..
PROBE = r"probe/(\w+)/([+-]\d+\.\d\d)"  # what wandb_run.rows makes of a direction and a position


def fetch(project: str, sweep: str | None, output: Path) -> list[Path]:
    """The folders, below output/wandb, of the training runs of ENTITY/PROJECT, of the sweep alone where one is named.

    Metrics of finished runs alone are fetched, and not again while W&B has the same run. Runs that train.py did not
    make are named and passed over. Raises ConfigError, DataError or UserError.
    """
    if not re.fullmatch(r"[^/\s]+/[^/]+", project):
        raise ConfigError(f"wandb={project} is not ENTITY/PROJECT, as in the address of the project's page")
    if sweep is not None and not re.fullmatch(r"[\w./-]{1,58}", sweep):  # a tag has 64 characters at most
        raise ConfigError(f"sweep={sweep} is no name of a sweep: 1 to 58 letters, digits, _ . / or -")
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    held: dict[Path, str] = {}
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            for run in progress.track(listed(project, sweep), description="runs"):
                try:
                    cfg = config_of(run)
                    folder = output / "wandb" / run.group / f"seed{cfg.seed}"
                except ConfigError as e:
                    console.print(f"passed over: {run.url}: {e}")
                    continue
                if folder in held:  # the same numbers would count as two seeds
                    console.print(f"passed over: {run.url}: the config and seed of {held[folder]}")
                    continue
                held[folder] = run.url
                write(run, cfg, folder)
    except UserError:
        raise
    except Exception as e:  # wandb's are of many kinds
        if isinstance(e, OSError) and e.strerror and not isinstance(e, ConnectionError | TimeoutError):
            raise ConfigError(f"cannot write {output}: {e.strerror}; type output=FOLDER") from None
        advice = "mend wandb=ENTITY/PROJECT, or type the same later, which goes on"
        raise UserError(f"W&B does not give the runs of {project} ({one_line(e)}); {advice}") from None
    if not any(read_status(folder)["status"] == "finished" for folder in held):
        tagged = f" with the tag sweep:{sweep}" if sweep else ""
        raise DataError(f"none of {len(held)} runs of {project}{tagged} is finished; W&B's page tells how they stand")
    return list(held)


def listed(project: str, sweep: str | None) -> list[Any]:
    """W&B's runs with config and summary, finished ones first."""
    os.environ.pop("WANDB_MODE", None)  # offline is said of runs that are sent
    import wandb  # here, so that a typo is answered before it is loaded

    from ..training.wandb_run import has_key

    if not has_key():
        raise UserError("W&B has no key; type wandb login")
    tagged = {"tags": {"$in": [f"sweep:{sweep}"]}} if sweep else {}
    runs = wandb.Api().runs(project, filters={"jobType": "train", **tagged}, lazy=False)
    return sorted(runs, key=lambda run: status_of(run) != "finished")


def config_of(run: Any) -> DictConfig:
    """As train.py composed it. Raises ConfigError for a run that it did not make."""
    # `wandb agent` adds what it drew, under dotted keys
    plain = {key: value for key, value in run.config.items() if key != "provenance" and "." not in key}
    if "${" in json.dumps(plain) or not re.fullmatch(GROUP, run.group or ""):
        raise ConfigError("train.py did not make it")
    try:
        cfg = typed(plain)
    except (TypeError, AttributeError):  # a group that is none
        raise ConfigError("train.py did not make it") from None
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError(f"train.py did not make it: {missing[0]} has no value")
    return cfg


def status_of(run: Any) -> str:
    """The summary's is of the last end, and stands there still when the run goes on."""
    return run.state if run.state == "running" else run.summary_metrics.get("status", run.state)


def write(run: Any, cfg: DictConfig, folder: Path) -> None:
    """The run folder as far as reports read it; status.json last, which says that the rest is there."""
    step = run.summary_metrics.get("step", 0)
    status = {"status": status_of(run), "step": step, "message": "", "run": run.url, "created": run.created_at}
    if read_status(folder) == status:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", OmegaConf.to_yaml(cfg))
    if status["status"] == "finished":
        lines = taken_apart(run.scan_history(use_cache=False))  # wandb's cache does not ask whether it is of this run
        if not lines or lines[-1]["step"] != cfg.steps:
            status |= {"status": "incomplete", "message": f"of {cfg.steps}: W&B gives no more"}
        write_atomically(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_atomically(folder / "status.json", json.dumps(status) + "\n")


def taken_apart(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl whose numbers stand in these rows, by step."""
    steps = {int(row["step"]): row for row in rows if "step" in row}  # where W&B's pages meet a row may come twice
    lines = []
    for step, row in sorted(steps.items()):
        place = {"step": step, "tokens": int(row["tokens"])}  # from W&B's files numbers may come as floats
        numbers = {
            key: value
            for key, value in row.items()
            if key not in place and key[0] != "_" and isinstance(value, int | float) and math.isfinite(value)
        }
        probes = {(match[1], float(match[2])): key for key in numbers if (match := re.fullmatch(PROBE, key))}
        for (direction, position), key in sorted(probes.items()):
            probe = {"probe/direction": direction, "probe/position": position, "probe/loss": numbers.pop(key)}
            lines.append({**place, **probe})
        if numbers:
            lines.append({**place, **numbers})
    return lines
