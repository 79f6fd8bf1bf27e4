"""How far a preparation is, and when it will be done: a bar on a terminal, a line a shard elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Meter:
    """Context manager. expected: bytes of text of each source, roughly, 0 where unknown; tokens: to be written, where
    that is the measure."""

    def __init__(self, name: str, expected: list[float], tokens: int | None):
        self.expected, self.wanted = expected, tokens
        self.ratio = 1.0  # of text read to text expected, over the sources done
        self.source, self.in_source, self.bytes, self.tokens, self.documents = 0, 0, 0, 0, 0
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            refresh_per_second=2,
        )
        self.task = self.progress.add_task(name, total=1.0, rate="")
        self.start, self.began_at = time.monotonic(), 0.0

    def __enter__(self) -> Meter:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if kind is None:
            self.console.print(f"{self.documents:,} documents, {self.tokens:,} tokens, {self._rate()}")

    def advance(self, source: int, text: int, tokens: int, documents: int) -> None:
        """Documents of a source are done: bytes of text, tokens and documents."""
        if source != self.source:
            before, expected = self.in_source, self.expected[self.source]
            self.ratio = before / expected if before and expected else self.ratio
            self.source, self.in_source = source, 0
        self.in_source += text
        self.bytes += text
        self.tokens += tokens
        self.documents += documents
        self.progress.update(self.task, completed=self.fraction(), rate=self._rate())

    def say(self, line: str) -> None:
        """Above the bar; where there is none, with the time that is left."""
        if not self.console.is_terminal and 0 < (fraction := self.fraction()) < 1:
            left = (time.monotonic() - self.start) * (1 - fraction) / fraction
            line += f", {self._rate()}, about {left / 60:.0f} min left"
        self.progress.console.print(line)

    def fraction(self) -> float:
        """Of the work that is done."""
        if self.wanted:
            return min(1.0, self.tokens / self.wanted)
        if not all(self.expected):
            return self.source / len(self.expected)
        done = sum(self.expected[: self.source]) + min(self.in_source / self.ratio, self.expected[self.source])
        return min(1.0, done / sum(self.expected))

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self.start, 1e-9)
        return f"{self.bytes / seconds / 1e6:.1f} MB/s, {self.tokens / seconds / 1e6:.2f}M tokens/s"
