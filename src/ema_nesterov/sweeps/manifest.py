"""A sweep that has begun: frozen, so that what is queued does not follow later edits.

RUNS_DIR/sweeps/NAME/sweep.json       title, git revision, date, GPUs of a run, figures
RUNS_DIR/sweeps/NAME/manifest.jsonl   a line for each run: id, overrides, resolved config
RUNS_DIR/sweeps/NAME/submissions/     what was handed to SLURM: K.json
RUNS_DIR/sweeps/NAME/logs/            what the runs print
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..config import typed
from ..errors import ConfigError, one_line
from ..training.folder import cannot_write, provenance
from ..training.logs import write_atomically
from .plan import Planned, SweepFile


@dataclass
class Entry:
    """A run of the manifest."""

    index: int
    id: str  # its folder, below runs_dir
    overrides: list[str]
    plain: dict[str, Any]  # the resolved config
    runs_dir: Path

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.id

    @cached_property
    def cfg(self) -> DictConfig:
        return typed({**self.plain, "runs_dir": str(self.runs_dir)})


@dataclass
class Sweep:
    folder: Path
    about: dict[str, Any]
    entries: list[Entry]

    @property
    def name(self) -> str:
        return self.about["name"]

    @property
    def runs_dir(self) -> Path:
        return self.folder.parents[len(Path(self.name).parts)]


def sweep_folder(runs_dir: Path, name: str) -> Path:
    return runs_dir / "sweeps" / name


def is_frozen(folder: Path) -> bool:
    return (folder / "manifest.jsonl").is_file()


def freeze(folder: Path, name: str, file: SweepFile, runs: list[Planned]) -> Sweep:
    """Write the manifest. Raises ConfigError where it cannot be written."""
    about = {
        "name": name,
        "title": file.title,
        "gpus": file.gpus,
        "figures": file.figures,
        "git": provenance()["git"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    lines = []
    for run in runs:
        run.cfg.logger.tags = [*run.cfg.logger.tags, f"sweep:{name}"]
        config = OmegaConf.to_container(run.cfg, resolve=True)
        lines.append(json.dumps({"id": run.id, "overrides": run.overrides, "config": config}) + "\n")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "sweep.json", json.dumps(about, indent=1) + "\n")
        write_atomically(folder / "manifest.jsonl", "".join(lines))  # last: with it the sweep is frozen
    except OSError as e:
        raise cannot_write(folder, e) from None
    return open_sweep(folder)


def open_sweep(folder: Path) -> Sweep:
    """Raises ConfigError where the folder holds no sweep that `freeze` wrote, or lies elsewhere than that put it."""
    try:
        about = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        if missing := [key for key in ("name", "title", "gpus", "figures", "git", "date") if key not in about]:
            raise ValueError(f"sweep.json has no {missing[0]}")
        place = ("sweeps", *Path(about["name"]).parts)
        if folder.resolve().parts[-len(place) :] != place:
            raise ConfigError(f"{folder} must lie at RUNS_DIR/{'/'.join(place)}, as its runs lie in RUNS_DIR; move it")
        folder = folder if len(folder.parts) >= len(place) else folder.resolve()
        lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
        runs_dir = Sweep(folder, about, []).runs_dir
        entries = [Entry(i, line["id"], line["overrides"], line["config"], runs_dir) for i, line in enumerate(lines)]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{folder} holds no sweep ({one_line(e)}); type sweep=NAME, or take it away") from None
    return Sweep(folder, about, entries)


def same(sweep: Sweep, runs: list[Planned]) -> bool:
    return [entry.id for entry in sweep.entries] == [run.id for run in runs]
