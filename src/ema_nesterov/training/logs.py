"""Where a run's numbers go: metrics.jsonl, which W&B mirrors, and the terminal."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import ConfigError
from .mirror import mirror


class Logs:
    """Writes one line of metrics at a time, and tells the person who watches. Rank 0 has one; `Silence` is the others'.

    file: unbuffered. What a full disk does not take waits in memory.
    """

    def __init__(self, file: BinaryIO, progress: Progress | None, total_steps: int, step: int = 0):
        self.file, self.progress = file, progress
        self.total_steps = total_steps
        self.task = progress.add_task("", total=total_steps, completed=step) if progress else None
        self.printed = 0.0
        self.step = 0  # of the last line
        self.waiting = b""
        self.told = False  # that the disk takes nothing

    def write(self, line: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl. `line` has "step", "tokens" and "time"; a number that is
        not finite becomes null."""
        finite = self.repeat(line)
        if "val/loss" in finite:
            self.say(f"step {line['step']}/{self.total_steps}  " + describe_validation(finite))
        elif "perf/step_ms" in finite:
            self._advance(finite)

    def repeat(self, line: dict[str, Any]) -> dict[str, Any]:
        """The same without a word; returns what of the line is finite."""
        finite = {k: v for k, v in line.items() if not isinstance(v, float) or math.isfinite(v)}
        self.waiting += json.dumps({**dict.fromkeys(line), **finite}).encode() + b"\n"
        self._flush()
        self.step = line["step"]
        return finite

    def _flush(self) -> None:
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) or 0 :]
            self.told = False
        except OSError as e:
            if not self.told:
                self.warn(f"metrics.jsonl takes no line ({e.strerror}): they wait in memory; make room")
            self.told = True

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

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def sync(self) -> None:
        """Put metrics.jsonl on the disk, so that a checkpoint never knows more than it. Raises OSError."""
        self._flush()
        if self.waiting:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self.file.fileno())


class Silence:
    """The logs of every rank but the first."""

    step = 0

    def write(self, line: dict[str, Any]) -> None: ...
    def repeat(self, line: dict[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def sync(self) -> None: ...


def describe_validation(line: dict[str, Any]) -> str:
    parts = [f"val loss {line['val/loss']:.4f} (perplexity {line.get('val/perplexity', math.inf):.2f})"]
    parts += [
        f"{name} {line[key]:.4f}"
        for key, name in (("val/lookahead_loss", "lookahead"), ("val/ema_loss", "weight EMA"))
        if key in line
    ]
    return "  ".join(parts)


@contextmanager
def open_logs(cfg: DictConfig, folder: Path, step: int) -> Iterator[Logs]:
    """The logs of a run that starts, or resumes, at `step`."""
    metrics = folder / "metrics.jsonl"
    terminal = Console(file=sys.stdout)
    columns = (
        TextColumn(cfg.name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with ExitStack() as stack:
        try:
            last = keep_until(metrics, step)
            file = stack.enter_context(open(metrics, "ab", buffering=0))
        except OSError as e:
            raise ConfigError(f"{metrics} cannot be written ({e.strerror}); make room, or mend it") from None
        stack.enter_context(mirror(cfg, folder))
        shown = Progress(*columns, console=terminal) if terminal.is_terminal else None
        logs = Logs(file, stack.enter_context(shown) if shown else None, cfg.steps, step)
        if cfg.log_every and last < step - step % cfg.log_every:
            logs.warn(f"{metrics} holds no line of steps {last + 1} to {step}: it was cut, or taken away")
        yield logs


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl, without what is null."""
    return [{k: v for k, v in line.items() if v is not None} for line in read_lines(path)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl as they are."""
    return [line for _, line in _lines(path)]


def keep_until(path: Path, step: int) -> int:
    """Drop the lines after `step`, which the resumed run writes again, and any that stands twice; returns the step of
    the last one that is left, or 0."""
    kept = {text: line["step"] for text, line in _lines(path) if line["step"] <= step} if step else {}
    text = "".join(f"{line}\n" for line in kept)
    if path.exists() and path.read_bytes() != text.encode():
        write_atomically(path, text)
    return max(kept.values(), default=0)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Up to the first that a crash cut short or spoilt: a checkpoint never knows more than what lies before it."""
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            return
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            return
        yield text, line


def write_atomically(path: Path, text: str) -> None:
    """All of the new text or all of the old, whatever happens meanwhile."""
    aside = path.with_name(f".{path.name}.writing")
    try:
        with open(aside, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)  # the room is needed
        raise
