"""manifest.json beside the shards: what they hold, and that they are what was written.

    format, complete, source, tokenizer {name, sha256, vocab_size, file}, layout, row_len, pad_id,
    shards [{file, tokens, largest, sha256}], options (of the preparation), cursor (where it goes on)

`token_bytes.npy` beside it, where the ids spell out their text exactly: the UTF-8 bytes of each id.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from omegaconf import DictConfig

from ..errors import DataError
from .shards import find_shards, open_shard, read_header, sha256

FORMAT = 1
LAYOUTS = (("stream", False, False), ("rows", True, True))  # and whether they have a row_len and a pad_id
NAME, TOKEN_BYTES = "manifest.json", "token_bytes.npy"


@dataclass
class Shard:
    file: str
    tokens: int
    largest: int  # id of a token
    sha256: str

    @property
    def split(self) -> str:
        return "val" if "_val_" in self.file else "train"


@dataclass
class Manifest:
    source: str
    tokenizer: dict[str, Any]  # name, sha256, vocab_size, file
    layout: str = "stream"
    row_len: int | None = None
    pad_id: int | None = None
    shards: list[Shard] = field(default_factory=list)
    complete: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    cursor: dict[str, Any] | None = None
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        """Complete or absent, whatever stops the writing."""
        aside = folder / f".{NAME}.writing"
        with open(aside, "w", encoding="utf-8") as f:
            f.write(json.dumps(asdict(self), indent=1) + "\n")
            f.flush()
            os.fsync(f.fileno())
        aside.rename(folder / NAME)

    def of(self, split: str) -> list[Shard]:
        return [s for s in self.shards if s.split == split]

    def fingerprint(self) -> str:
        """Of the tokens and their order."""
        text = json.dumps([[s.file, s.tokens, s.sha256] for s in self.shards] + [self.layout, self.row_len])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_manifest(folder: Path) -> Manifest | None:
    """None where there is none. Raises DataError when it cannot be read or is of another version."""
    path = folder / NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise DataError(f"{path} has format {values['format']}, this code reads {FORMAT}; prepare the data again")
        values = {f.name: values[f.name] for f in fields(Manifest)}
        manifest = Manifest(**{**values, "shards": [Shard(**s) for s in values["shards"]]})
        _require_types(manifest)
        _require_sense(manifest)
        return manifest
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise DataError(f"{folder} is no folder; type dataset.path=FOLDER") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise DataError(
            f"{path} cannot be read ({type(e).__name__}: {e}); delete the folder and prepare the data again"
        ) from None


def _require_types(manifest: Manifest) -> None:
    """Raise TypeError for a value that none of our writers writes."""
    known = {key: manifest.tokenizer[key] for key in ("name", "sha256", "vocab_size", "file")}
    number, text = (int, type(None)), (str, type(None))
    expected: list[tuple[Any, Any]] = [
        *((known[key], text) for key in ("name", "sha256", "file")),
        *((value, number) for value in (known["vocab_size"], manifest.row_len, manifest.pad_id)),
        *((value, str) for value in (manifest.source, manifest.layout)),
        *((value, int) for s in manifest.shards for value in (s.tokens, s.largest)),
        *((value, str) for s in manifest.shards for value in (s.file, s.sha256)),
        *((manifest.complete, bool), (manifest.options, dict), (manifest.cursor, (dict, type(None)))),
    ]
    for value, kind in expected:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"unexpected value {value!r}")
        if isinstance(value, int) and value < 0:
            raise TypeError(f"unexpected value {value}")


def _require_sense(manifest: Manifest) -> None:
    """Raise ValueError for values of the right types that none of our writers writes; a name leads nowhere but into
    the folder."""
    files = [s.file for s in manifest.shards]
    if strange := [name for name in files if not re.fullmatch(r"[^/\\\0]*_(train|val)_[^/\\\0]*\.bin", name)]:
        raise ValueError(f"{strange[0]!r} is no name of a shard")
    if len(set(files)) < len(files):
        raise ValueError("it lists a shard twice")
    file, vocab_size, cursor = manifest.tokenizer["file"], manifest.tokenizer["vocab_size"], manifest.cursor
    if file is not None and (Path(file).name != file or "\0" in file):
        raise ValueError(f"{file!r} is no name of a tokenizer's file")
    if vocab_size is not None and not 0 < vocab_size <= 2**32:
        raise ValueError(f"no tokenizer has {vocab_size} tokens")
    if (manifest.layout, (manifest.row_len or 0) > 1, manifest.pad_id is not None) not in LAYOUTS:
        raise ValueError(f"layout {manifest.layout}, row_len {manifest.row_len} and pad_id {manifest.pad_id}")
    if cursor is not None:
        for key in ("source", "documents", "before"):
            if type(cursor[key]) is not int or cursor[key] < 0:
                raise ValueError(f"{key} {cursor[key]!r} of the cursor")
        if not re.fullmatch(r"\.pending_\d+\.npz", str(cursor["pending"])):
            raise ValueError(f"{cursor['pending']!r} is no name of a file of pending tokens")
        if cursor["short"] not in (None, *files):
            raise ValueError(f"{cursor['short']!r} is not among its shards")


def adopt(folder: Path, d: DictConfig, hub_sha256: dict[str, str] | None = None) -> Manifest:
    """The manifest of a folder; shards that came without one get one, once, however many processes ask.

    Every such shard is read. Raises DataError for a damaged one, and for one that is not what the hub has.
    """
    manifest = load_manifest(folder)
    if manifest is not None and (hub_sha256 is None or _agrees(folder, manifest, hub_sha256)):
        return manifest
    paths = find_shards(folder, "train") + find_shards(folder, "val")
    if not os.access(folder, os.W_OK):  # a shared folder: what is found out is not kept
        return _describe(folder, paths, d)
    try:
        return _write_manifest(folder, paths, d, hub_sha256 or {})
    except OSError as e:
        raise DataError(
            f"cannot write {folder / NAME}: {e.strerror}; make room, or let {folder} be read-only"
        ) from None


def _write_manifest(folder: Path, paths: list[Path], d: DictConfig, hub_sha256: dict[str, str]) -> Manifest:
    with FileLock(folder / f".{NAME}.lock"):
        manifest = load_manifest(folder)
        if manifest is None or not _agrees(folder, manifest, hub_sha256):
            manifest = _describe(folder, paths, d)
            for shard in manifest.shards:
                if hub_sha256.get(shard.file, "") not in ("", shard.sha256):
                    raise DataError(f"{folder / shard.file} is not what the hub has; delete it and type the same again")
            _write_token_bytes(folder, d.tokenizer)
            manifest.save(folder)
    return manifest


def _agrees(folder: Path, manifest: Manifest, hub_sha256: dict[str, str]) -> bool:
    wrong = (s for s in manifest.shards if hub_sha256.get(s.file, "") not in ("", s.sha256))
    return listed(folder, manifest) and not any(wrong)


def listed(folder: Path, manifest: Manifest) -> bool:
    """Whether the manifest lists every shard of the folder."""
    return {p.name for p in folder.glob("*.bin")} <= {s.file for s in manifest.shards}


def _describe(folder: Path, paths: list[Path], d: DictConfig) -> Manifest:
    print(f"{folder} has no manifest: reading its {len(paths)} shards once", flush=True)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        shards = list(pool.map(describe_shard, paths))
    tokenizer = {"name": d.tokenizer, "sha256": None, "vocab_size": d.vocab_size, "file": None}
    row_len, pad_id = (d.row_len, d.pad_id) if d.layout == "rows" else (None, None)
    return Manifest(f"shards found in {folder.name}", tokenizer, d.layout, row_len, pad_id, shards)


def describe_shard(path: Path) -> Shard:
    tokens = open_shard(path)
    largest = max((int(tokens[i : i + 2**24].max()) for i in range(0, len(tokens), 2**24)), default=0)
    return Shard(path.name, len(tokens), largest, sha256(path))


def _write_token_bytes(folder: Path, tokenizer: str | None) -> None:
    """For GPT-2's, where the vocabulary is at hand: nothing but bits per byte depends on it."""
    if tokenizer != "gpt2":
        return
    try:
        from .tokenizers import open_tokenizer

        save_token_bytes(folder, open_tokenizer(tokenizer).token_bytes)
    except (DataError, ImportError):
        return


def save_token_bytes(folder: Path, token_bytes: list[int] | None) -> None:
    if token_bytes is not None and not (folder / TOKEN_BYTES).exists():
        aside = folder / f".{TOKEN_BYTES}.writing.npy"
        np.save(aside, np.array(token_bytes, np.uint16))
        aside.rename(folder / TOKEN_BYTES)


def load_token_bytes(folder: Path) -> np.ndarray | None:
    path = folder / TOKEN_BYTES
    if not path.exists():
        return None
    try:
        lengths = np.load(path, allow_pickle=False)
        if not isinstance(lengths, np.ndarray) or lengths.ndim != 1 or lengths.dtype.kind not in "iu":
            raise ValueError
        return lengths
    except (OSError, ValueError, EOFError):
        raise DataError(f"{path} is damaged; delete it (no bits per byte then), or prepare the data again") from None


# --- does it fit ----------------------------------------------------------------------------------


def require_fit(folder: Path, manifest: Manifest, d: DictConfig, vocab_size: int, seq_len: int) -> None:
    """Raise DataError, in one line, when the shards do not fit the model, the run or their manifest.

    Files' sizes and headers are read here; their content, when a shard is first opened.
    """
    name = manifest.tokenizer["name"]
    if not manifest.complete:
        raise DataError(
            f"the preparation of {folder} was stopped after {len(manifest.shards)} shards; type the same "
            "scripts/prepare_data.py command again, it goes on from there"
        )
    if d.tokenizer not in (None, name) and not _is_file_of(d.tokenizer, manifest):
        raise DataError(
            f"{folder} holds tokens of {name}, dataset {d.name} is of {d.tokenizer}; "
            f"type dataset.path=FOLDER or dataset.tokenizer={_written(name)}"
        )
    if (manifest.tokenizer["vocab_size"] or 0) > vocab_size:
        raise DataError(
            f"{folder} holds tokens of {name}, {manifest.tokenizer['vocab_size']} of them, the model knows only "
            f"{vocab_size}; type model.vocab_size={manifest.tokenizer['vocab_size']}"
        )
    if d.layout != manifest.layout:
        raise DataError(
            f"{folder} is laid out as {manifest.layout}, dataset {d.name} reads {d.layout}; type "
            f"dataset.layout={manifest.layout} dataset.row_len={_written(manifest.row_len)} "
            f"dataset.pad_id={_written(manifest.pad_id)}"
        )
    if manifest.layout == "rows" and (manifest.row_len != seq_len or manifest.pad_id != d.pad_id):
        raise DataError(
            f"{folder} holds rows of {manifest.row_len} padded with {manifest.pad_id}, the run reads {seq_len} padded "
            f"with {d.pad_id}; type seq_len={manifest.row_len} dataset.row_len={manifest.row_len} "
            f"dataset.pad_id={manifest.pad_id}"
        )
    for shard in manifest.shards:
        tokens, _ = read_header(folder / shard.file)
        if tokens != shard.tokens:
            raise DataError(
                f"{folder / shard.file} holds {tokens} tokens, its manifest says {shard.tokens}; "
                "delete it, then fetch or prepare it again"
            )
        if shard.largest >= vocab_size:
            raise DataError(
                f"token {shard.largest} in {folder / shard.file} is beyond the model's vocabulary of {vocab_size}; "
                f"type model.vocab_size={shard.largest + 1} or choose the dataset that fits the model"
            )
    if not listed(folder, manifest):
        extra = sorted({p.name for p in folder.glob("*.bin")} - {s.file for s in manifest.shards})
        raise DataError(
            f"{folder} holds {extra[0]}, which its manifest does not list; move it away, or delete {NAME}, "
            "which is then made anew"
        )


def _written(value: object) -> str:
    """As it is typed."""
    return "null" if value is None else str(value)


def _is_file_of(spec: str, manifest: Manifest) -> bool:
    """Whether a tokenizer named by its path is the manifest's."""
    path = Path(spec)
    files = [path] if path.is_file() else [path / n for n in ("tokenizer.json", "spiece.model", "tokenizer.model")]
    return any(f.is_file() and sha256(f) == manifest.tokenizer["sha256"] for f in files)


def require_sha256(folder: Path, shard: Shard) -> None:
    """Raise DataError for a shard whose content is not what was written."""
    if sha256(folder / shard.file) != shard.sha256:
        raise DataError(
            f"{folder / shard.file} is not what was written (its checksum differs from the manifest's); "
            "delete it, then fetch or prepare it again"
        )
