"""How the runs of a sweep stand, as their folders and SLURM's queue tell."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import ConfigError, one_line
from ..training.folder import read_status
from ..training.logs import read_metrics
from .manifest import Sweep

OVER = ("finished", "exported", "diverged")  # nothing remains to be done
BUSY = ("running", "queued")


@dataclass(frozen=True)
class State:
    """finished, diverged, failed, preempted: as in status.json. running: a process trains in the folder. killed: none
    does, though status.json says running. queued: SLURM has it. exported: its results are elsewhere. missing: nothing
    has begun."""

    name: str
    step: int = 0
    message: str = ""

    @property
    def remains(self) -> bool:
        return self.name not in (*OVER, *BUSY)


def state_of(folder: Path, queued: bool = False, exported: bool = False) -> State:
    """Of the run in this folder; queued: whether SLURM has it; exported: whether its results stand elsewhere."""
    status = read_status(folder)
    name = status.get("status", "missing")
    if name != "finished" and is_locked(folder):
        name = "running"
    elif name != "finished" and exported:
        return State("exported")
    elif name not in OVER and queued:
        name = "queued"
    elif name == "running":
        name = "killed"
    step, message = status.get("step", 0), str(status.get("message", ""))
    if name == "running":
        step = last_step(folder / "metrics.jsonl", step)
    return State(name, step, message)


def is_locked(folder: Path) -> bool:
    """Whether a process trains there."""
    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def last_step(metrics: Path, default: int) -> int:
    lines = read_metrics(metrics)
    return lines[-1]["step"] if lines else default


def states(sweep: Sweep, exported: Container[str] = ()) -> list[State]:
    """Of all runs, in the manifest's order; exported: ids of runs whose results stand elsewhere."""
    waiting = in_queue(sweep)
    return [state_of(entry.folder, entry.index in waiting, entry.id in exported) for entry in sweep.entries]


# --- SLURM ----------------------------------------------------------------------------------------


def submissions(sweep: Sweep) -> list[Path]:
    return sorted((sweep.folder / "submissions").glob("*.json"), key=lambda path: int(path.stem))


def in_queue(sweep: Sweep) -> set[int]:
    """The runs whose array task is queued or runs. Raises ConfigError for a submission that cannot be read."""
    held: set[int] = set()
    for path in submissions(sweep):
        try:
            submission = json.loads(path.read_text(encoding="utf-8"))
            for task in tasks_in_queue(submission["job"]):
                held.update(submission["tasks"][task])
        except (OSError, ValueError, LookupError, TypeError) as e:
            raise ConfigError(f"{path} is damaged ({one_line(e)}); take it away once its job has ended") from None
    return held


def array_limit() -> int | None:
    """How many tasks the cluster lets an array have; None where there is no SLURM to ask."""
    try:
        told = subprocess.run(["scontrol", "show", "config"], capture_output=True, timeout=60).stdout.decode(
            errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    limits = re.findall(r"^MaxArraySize *= *(\d+)|\bmax_array_tasks=(\d+)", told, re.MULTILINE)
    return min((int(size or tasks) for size, tasks in limits), default=None)


def tasks_in_queue(job: str | None) -> list[int]:
    """Of an array; none where the job has left the queue, or there is no SLURM."""
    if job is None:
        return []
    try:
        command = ["squeue", "--noheader", "--array", "--format=%K", f"--jobs={job}"]
        told = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [int(task) for task in told.stdout.split() if task.isdigit()]
