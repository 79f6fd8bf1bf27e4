"""A folder of shards, checked whole, or looked into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from ...errors import DataError
from ..manifest import NAME, Manifest, Shard, describe_shard, listed, load_manifest
from ..shards import open_shard
from ..tokenizers import Tokenizer, open_tokenizer

ROWS, SHOWN = 3, 128  # of each split; tokens of each, where the shards are not rows


def verify(folder: Path) -> None:
    """Read every shard and compare it with the manifest; raises DataError, after naming each fault on its line."""
    manifest = _manifest(folder)
    faults = [] if manifest.complete else ["its preparation was stopped; type the same command again"]
    console = Console(stderr=True)
    for shard in track(manifest.shards, f"reading {folder}", console=console, disable=not console.is_terminal):
        try:
            found = describe_shard(folder / shard.file)
        except DataError as e:
            faults.append(str(e))
            continue
        faults += _faults(folder, manifest, shard, found)
    if not listed(folder, manifest):
        extra = {p.name for p in folder.glob("*.bin")} - {s.file for s in manifest.shards}
        faults.append(f"shards that {NAME} does not list: {', '.join(sorted(extra))}")
    if faults:
        print("\n".join(faults))
        raise DataError(f"{folder} has {len(faults)} faults, listed above; delete what is damaged and prepare it again")
    print(f"{folder}: {len(manifest.shards)} shards, {sum(s.tokens for s in manifest.shards):,} tokens, all as written")


def _faults(folder: Path, manifest: Manifest, shard: Shard, found: Shard) -> list[str]:
    path, vocab_size = folder / shard.file, manifest.tokenizer["vocab_size"]
    faults = []
    if found.tokens != shard.tokens:
        faults.append(f"{path} holds {found.tokens} tokens, its manifest says {shard.tokens}")
    elif found != shard:
        faults.append(f"{path} is not what was written: its checksum differs from the manifest's")
    if vocab_size is not None and found.largest >= vocab_size:
        faults.append(f"{path} holds token {found.largest}, its tokenizer knows only {vocab_size}")
    if manifest.row_len and found.tokens % manifest.row_len:
        faults.append(f"{path} holds {found.tokens} tokens, not whole rows of {manifest.row_len}")
    return faults


def show(folder: Path) -> None:
    """Print what the folder is, and the first rows of each split, decoded."""
    manifest = _manifest(folder)
    name = manifest.tokenizer["name"]
    if name is None:
        raise DataError(f"{folder / NAME} does not say which tokenizer made these shards, so they cannot be decoded")
    tokenizer = open_tokenizer(str(folder / manifest.tokenizer["file"]) if manifest.tokenizer["file"] else name)
    print(f"{folder}: {manifest.source}, tokenizer {name}, {manifest.layout}")
    for split in ("train", "val"):
        shards = manifest.of(split)
        print(f"{split}: {sum(s.tokens for s in shards):,} tokens in {len(shards)} shards")
        for shard in shards[:1]:
            tokens, length = open_shard(folder / shard.file), manifest.row_len or SHOWN
            for row in range(min(ROWS, len(tokens) // length)):
                _show_row(tokenizer, manifest, shard.file, row, tokens[row * length : (row + 1) * length])


def _show_row(tokenizer: Tokenizer, manifest: Manifest, file: str, row: int, tokens: np.ndarray) -> None:
    padding = 0
    if manifest.pad_id is not None and (filled := np.flatnonzero(tokens != manifest.pad_id)).size:
        padding = len(tokens) - int(filled[-1]) - 1
    text = tokenizer.decode(tokens[: len(tokens) - padding].tolist())
    print(f"\n[{file}, row {row}: {len(tokens) - padding} tokens, {padding} of padding]\n{text}\n")


def _manifest(folder: Path) -> Manifest:
    manifest = load_manifest(folder)
    if manifest is None:
        raise DataError(
            f"{folder} has no {NAME}; type python scripts/prepare_data.py dataset=NAME dataset.path={folder}"
        )
    return manifest
