"""The tokens of a list of shards as one sequence, read by position through memory maps."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..errors import DataError
from .manifest import Shard, require_sha256
from .shards import open_shard

OPEN = 2  # shards at a time: what lies behind is unmapped, so that memory does not grow


class Tokens:
    """Positions count through the shards end to end.

    A shard's checksum is compared when it is first opened, or before, where it is expected; that it stays so, by its
    time and size at every reading.
    """

    def __init__(self, folder: Path, shards: list[Shard], vocab_size: int):
        self.folder, self.shards, self.vocab_size = folder, shards, vocab_size
        self.ends = np.cumsum([s.tokens for s in shards])
        self.begins = self.ends - [s.tokens for s in shards]
        self.maps: dict[int, np.ndarray] = {}
        self.checks: dict[int, Future[None]] = {}
        self.stamps: dict[int, tuple[int, ...] | None] = {}  # of the files, when they were checked
        self.pool = ThreadPoolExecutor(1, "checksum")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """`length` tokens from each position on: (len(starts), length), as the shards hold them.

        Raises DataError for an altered shard, and for a token that is not below vocab_size.
        """
        which = np.searchsorted(self.ends, starts, side="right")
        rows: np.ndarray | None = None
        for shard in dict.fromkeys(which.tolist()):
            here = np.flatnonzero(which == shard)
            tokens, local = self._open(shard), starts[here] - self.begins[shard]
            if rows is None:
                rows = np.empty((len(starts), length), tokens.dtype)
            inside = local + length <= len(tokens)
            if inside.any():
                rows[here[inside]] = sliding_window_view(tokens, length)[local[inside]]  # ten times a loop's speed
            for row, start in zip(here[~inside], local[~inside], strict=True):
                rows[row] = self._across(shard, int(start), length)
        assert rows is not None
        if int(rows.max()) >= self.vocab_size:
            row = int(rows.max(axis=1).argmax())
            raise DataError(
                f"token {rows.max()} in {self.folder / self.shards[which[row]].file} is beyond the model's vocabulary "
                f"of {self.vocab_size}; type model.vocab_size={int(rows.max()) + 1} or choose the dataset that fits"
            )
        return rows

    def expect(self, start: int) -> Future[None]:
        """The shard of this position will be read soon: compare its checksum meanwhile."""
        return self._check(int(np.searchsorted(self.ends, start, side="right")))

    def place(self, start: int) -> str:
        """Where a position is, for a person."""
        shard = int(np.searchsorted(self.ends, start, side="right"))
        return f"token {start - self.begins[shard]} of {self.folder / self.shards[shard].file}"

    def _across(self, shard: int, start: int, length: int) -> np.ndarray:
        """An example that begins in one shard and ends in a later one."""
        parts = [self._open(shard)[start:]]
        while (missing := length - sum(map(len, parts))) > 0:
            shard += 1
            parts.append(self._open(shard)[:missing])
        return np.concatenate(parts)

    def _open(self, shard: int) -> np.ndarray:
        path = self.folder / self.shards[shard].file
        if shard not in self.maps:
            self._check(shard).result()
            while len(self.maps) >= OPEN:
                del self.maps[next(iter(self.maps))]
            self.maps[shard] = open_shard(path)
        if stamp(path) != self.stamps[shard]:
            raise DataError(
                f"{path} was altered or taken away while it was read; put it back and type the same command"
            )
        return self.maps[shard]

    def _check(self, shard: int) -> Future[None]:
        if shard not in self.checks:
            self.stamps[shard] = stamp(self.folder / self.shards[shard].file)
            self.checks[shard] = self.pool.submit(require_sha256, self.folder, self.shards[shard])
        return self.checks[shard]


def stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file does; None: there is none."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino
