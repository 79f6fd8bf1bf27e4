"""Token shards: the public FineWeb format, read through memory maps.

A shard is `<name>_train_<index>.bin` or `<name>_val_<index>.bin`: a header of 256 little-endian int32
(magic 20240520, version 1, number of tokens, zeros), then the tokens as uint16.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import DataError

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens (any integer dtype, values below 65,536) as one shard."""
    if tokens.size and (tokens.min() < 0 or tokens.max() >= 2**16):
        raise DataError(f"{path}: a shard holds tokens below 65536, got {tokens.min()} to {tokens.max()}")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    with open(path, "wb") as f:
        f.write(header.tobytes())
        f.write(tokens.astype("<u2").tobytes())


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard as a read-only memory map (uint16).

    Raises DataError when the header or the file's size is wrong.
    """
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=3)
    except OSError as e:
        raise DataError(f"cannot read shard {path}: {e.strerror}") from None
    if len(header) < 3 or header[0] != MAGIC:
        raise DataError(f"{path} is not a token shard (no magic number {MAGIC}); delete it or prepare the data again")
    if header[1] != VERSION:
        raise DataError(f"{path} has shard version {header[1]}, this code reads {VERSION}; prepare the data again")
    tokens = int(header[2])
    if size != HEADER_BYTES + 2 * tokens:
        raise DataError(
            f"{path} is cut short or damaged: its header says {tokens} tokens, its size {(size - HEADER_BYTES) / 2:g}; "
            "fetch or prepare it again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(tokens,))


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split ("train" or "val") in the order of their names."""
    if not folder.is_dir():
        raise DataError(
            f"dataset folder {folder} does not exist; type dataset.path=FOLDER, or fetch the data (data/README.md)"
        )
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    if not paths:
        raise DataError(f"no shards *_{split}_*.bin in {folder}; see data/README.md for how they get there")
    return paths


class Windows:
    """Fixed-length training examples over a list of shards, numbered 0 to len - 1.

    stream: example i of a shard is tokens [i T, i T + T], so that consecutive examples share one token
    and every token but a shard's first is a target once. rows: tokens [i T, i T + T), a row each, whose
    last target, and every target equal to pad_id, is -100.

    Raises DataError when a shard is too short for one example.
    """

    def __init__(self, paths: Iterable[Path], seq_len: int, layout: str = "stream", pad_id: int | None = None):
        self.paths = list(paths)
        self.seq_len, self.layout, self.pad_id = seq_len, layout, pad_id
        self.shards = [open_shard(path) for path in self.paths]
        spare = 1 if layout == "stream" else 0
        counts = [(len(tokens) - spare) // seq_len for tokens in self.shards]
        for path, tokens, count in zip(self.paths, self.shards, counts, strict=True):
            if count < 1:
                raise DataError(f"{path} holds {len(tokens)} tokens, fewer than one example of seq_len={seq_len}")
            if layout == "rows" and len(tokens) % seq_len:
                raise DataError(f"{path} holds {len(tokens)} tokens, not whole rows of {seq_len}")
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def require_below(self, vocab_size: int) -> None:
        """Raise DataError at once, not in mid-run, when the first shard is of another tokenizer."""
        _require_below(self.shards[0], vocab_size, self.paths[0])

    def read(self, indices: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 (len(indices), seq_len).

        Raises DataError, naming the shard, for a token that is not below vocab_size.
        """
        stream = self.layout == "stream"
        rows = np.zeros((len(indices), self.seq_len + 1), dtype=np.int64)
        which = np.searchsorted(self.ends, indices, side="right")
        for row, index, s in zip(rows, indices, which, strict=True):
            start = int(index - (self.ends[s - 1] if s else 0)) * self.seq_len
            tokens = self.shards[s][start : start + self.seq_len + stream]
            row[: len(tokens)] = tokens
            _require_below(tokens, vocab_size, self.paths[s])
        inputs, targets = rows[:, :-1], rows[:, 1:].copy()
        if not stream:
            targets[:, -1] = -100
            targets[targets == self.pad_id] = -100
        return inputs, targets


def _require_below(tokens: np.ndarray, vocab_size: int, path: Path) -> None:
    if (largest := int(tokens.max())) >= vocab_size:
        raise DataError(
            f"token {largest} in {path} is beyond the model's vocabulary of {vocab_size}; "
            f"type model.vocab_size={largest + 1} or choose the dataset that fits the model"
        )
