"""Runs of a sweep on this machine: one after another, or side by side, each on GPUs of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..training.folder import DIVERGED, FAILED, FINISHED, PREEMPTED
from .manifest import Entry, Sweep
from .state import State, state_of

POLL = 0.5  # seconds
NEWS = 60.0  # seconds between lines that tell how far the runs are


@dataclass
class Child:
    entry: Entry
    process: subprocess.Popen[bytes]
    slot: int
    began: float


class Asked:
    """Whether this process was asked to stop, and by how many Ctrl-C: SLURM may repeat its signals."""

    def __init__(self) -> None:
        self.stop, self.interrupts = False, 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.stop = True
        self.interrupts += number == signal.SIGINT


@contextmanager
def listening() -> Iterator[Asked]:
    asked = Asked()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.signal(number, asked) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launch(script: Path, sweep: Sweep, entries: list[Entry], slots: list[list[str]], say: Callable[[str], None]) -> int:
    """Train these runs, one in each slot at a time; returns an exit code: 0, 85 when asked to stop, 86 when runs
    diverged, 1 when some failed.

    script: its command `train` takes one run.
    slots: the GPUs of each, as CUDA_VISIBLE_DEVICES names them; an empty list leaves that variable alone. The cores are
    parted among them: threads of two runs on one core slow both tenfold.
    When asked to stop, by a signal, the runs save and end, and none begins; a second Ctrl-C kills them.
    """
    logs = sweep.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    waiting, free, children = list(entries), list(range(len(slots))), list[Child]()
    threads = max(1, len(os.sched_getaffinity(0)) // len(slots))
    ended: dict[int, State] = {}
    news = time.monotonic()
    with listening() as asked:
        while children or (waiting and not asked.stop):
            while waiting and free and not asked.stop:
                entry, slot = waiting.pop(0), free.pop(0)
                process = start(script, sweep, entry, slots[slot], threads, logs)
                children.append(Child(entry, process, slot, time.monotonic()))
                say(f"{entry.index}: started {entry.id}" + (f" on GPU {','.join(slots[slot])}" if slots[slot] else ""))
            for child in [child for child in children if child.process.poll() is not None]:
                children.remove(child)
                free.append(child.slot)
                state = ended[child.entry.index] = state_of(child.entry.folder)
                seconds = time.monotonic() - child.began
                how = f"{state.name} at step {state.step} after {seconds:.0f} s {state.message}"
                say(f"{child.entry.index}: {how.strip()}")
                if child.process.returncode and state.name not in ("finished", "preempted", "diverged"):
                    say(f"   {last_line(logs / f'{child.entry.index}.log')}")
            for child in children if asked.stop else []:
                if asked.interrupts > 1:
                    os.killpg(child.process.pid, signal.SIGKILL)
                elif child.entry.folder.exists():
                    (child.entry.folder / "STOP").touch()  # again and again: a start takes the first for one left over
            if children and time.monotonic() - news > NEWS:
                news = time.monotonic()
                say(progress(children, len(waiting)))
            time.sleep(POLL)
    for entry in entries if asked.stop else []:
        (entry.folder / "STOP").unlink(missing_ok=True)
    names = {state.name for state in ended.values()}
    if asked.stop and (waiting or names - {"finished", "diverged"}):
        return PREEMPTED
    if names - {"finished", "diverged"}:
        return FAILED
    return DIVERGED if "diverged" in names else FINISHED


def start(
    script: Path, sweep: Sweep, entry: Entry, gpus: list[str], threads: int, logs: Path
) -> subprocess.Popen[bytes]:
    """A process, or torchrun with one for each GPU, in a group of its own: Ctrl-C reaches this process alone."""
    train = [str(script), "train", f"sweep={sweep.folder}", f"index={entry.index}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(gpus)}"]
    command = [sys.executable, *(torchrun if len(gpus) > 1 else []), *train]
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    with open(logs / f"{entry.index}.log", "ab") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )


def progress(children: list[Child], waiting: int) -> str:
    parts = []
    for child in children:
        state = state_of(child.entry.folder)
        parts.append(f"{child.entry.index} at step {state.step}/{child.entry.plain['steps']}")
    return f"{', '.join(parts)}; {waiting} wait"


def last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them, or would."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [gpu for gpu in given.split(",") if gpu.strip()]
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, encoding="utf-8", timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in told.splitlines()))]
