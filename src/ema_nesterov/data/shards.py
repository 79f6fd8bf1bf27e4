"""Token shards: the public FineWeb format, read through memory maps.

A shard is `<name>_train_<index>.bin` or `<name>_val_<index>.bin`: a header of 256 little-endian int32
(magic, version, number of tokens, zeros), then the tokens. Magic 20240520, version 1: uint16. Magic
20240801, version 7: uint32, for vocabularies beyond 65,536, as llm.c writes them.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError

HEADER_BYTES = 1024
# magic: version, type of a token
FORMATS: dict[int, tuple[int, np.dtype[Any]]] = {
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
}


def write_shard(path: Path, tokens: np.ndarray, vocab_size: int = 2**16) -> str:
    """Write tokens (any integer dtype, values below vocab_size) as one shard; returns its SHA-256.

    The file is complete or absent. Raises DataError for a token that is not below vocab_size.
    """
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise DataError(f"{path}: tokens must be below {vocab_size}, got {tokens.min()} to {tokens.max()}")
    magic, (version, dtype) = list(FORMATS.items())[vocab_size > 2**16]
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, tokens.size
    content = np.ascontiguousarray(tokens, dtype=dtype)
    aside = path.with_name(f".{path.name}.writing")
    with open(aside, "wb") as f:
        f.write(header.data)
        f.write(content.data)
        f.flush()
        os.fsync(f.fileno())
    aside.rename(path)
    digest = hashlib.sha256(header.data)
    digest.update(content.data)
    return digest.hexdigest()


def read_header(path: Path) -> tuple[int, np.dtype]:
    """The number of tokens of a shard and their type. Raises DataError when header or size is wrong."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=3)
    except OSError as e:
        raise DataError(f"cannot read shard {path}: {e.strerror}; fetch or prepare it again") from None
    if len(header) < 3 or int(header[0]) not in FORMATS:
        raise DataError(f"{path} is not a token shard (no magic number); delete it, then fetch or prepare it again")
    version, dtype = FORMATS[int(header[0])]
    if header[1] != version:
        raise DataError(f"{path} has shard version {header[1]}, this code reads {version}; prepare the data again")
    tokens = int(header[2])
    if size != HEADER_BYTES + dtype.itemsize * tokens:
        raise DataError(
            f"{path} is cut short or damaged: its header says {tokens} tokens, its size "
            f"{(size - HEADER_BYTES) / dtype.itemsize:g}; delete it, then fetch or prepare it again"
        )
    return tokens, dtype


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard as a read-only memory map (uint16 or uint32).

    Raises DataError when the header or the file's size is wrong.
    """
    tokens, dtype = read_header(path)
    if tokens == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(tokens,))


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split ("train" or "val") in the order of their names; raises DataError when there are none."""
    if not folder.is_dir():
        raise DataError(
            f"dataset folder {folder} does not exist; make it with scripts/prepare_data.py (see data/README.md), or "
            "type dataset.path=FOLDER"
        )
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    if not paths:
        raise DataError(
            f"no shards *_{split}_*.bin in {folder}; scripts/prepare_data.py makes them (see data/README.md)"
        )
    return paths


def sha256(path: Path) -> str:
    """Of a file's content, read in pieces."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}; fetch or prepare it again") from None
