"""Documents out of files of text, in a fixed order: .txt, .jsonl, .json and parquet, compressed or not, from a folder
or from the Hugging Face hub, read by `datasets`.

A .txt file is one document, every character of it kept; a line of JSON, or a row of parquet, is one, in its `text_key`
column.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import orjson

from ...errors import DataError

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".xz", ".bz2")
EXPANSION = {"text": 1.0, "json": 1.0, "parquet": 1.7}  # bytes of text per byte of file, for estimates alone
FILES_AT_ONCE = 1000  # of one document each


@dataclass(frozen=True)
class Source:
    """One file, or a run of .txt files."""

    files: tuple[str, ...]
    builder: str
    size: int  # bytes on disk; 0 where unknown

    @property
    def expected(self) -> float:
        """Bytes of text, roughly."""
        return self.size * EXPANSION[self.builder] * (2.7 if self.files[0].endswith(COMPRESSED) else 1)


def local_sources(folder: Path, pattern: str | None, but: Path | None = None) -> list[Source]:
    """The files of text below a folder, sorted by their paths; pattern: of the file name (None: every known suffix).

    Hidden files and folders, and those below `but`, are left out. Raises DataError when nothing is left.
    """
    if not folder.is_dir():
        raise DataError(f"folder of text {folder} does not exist; type dataset.path=FOLDER")
    files: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        apart = but is not None and but.exists()
        folders[:] = [
            f for f in folders if f[0] not in "._" and not (apart and os.path.samefile(f"{place}/{f}", str(but)))
        ]
        files += [Path(place, n) for n in names if n[0] != "." and (pattern is None or fnmatch(n, pattern))]
    files = sorted((f for f in files if builder_of(f.name) and f.is_file()), key=lambda p: p.parts)
    if not files:
        raise DataError(
            f"no files {pattern or ', '.join('*' + s for s in BUILDERS)} in {folder}; type dataset.path=FOLDER"
        )
    sources: list[Source] = []
    for path in files:
        builder, size = str(builder_of(path.name)), path.stat().st_size
        last = sources[-1] if sources else None
        if builder == "text" and last and last.builder == "text" and len(last.files) < FILES_AT_ONCE:
            sources[-1] = Source((*last.files, str(path)), "text", last.size + size)
        else:
            sources.append(Source((str(path),), builder, size))
    return sources


def hub_sources(repo: str, pattern: str) -> list[Source]:
    """The files of a dataset repository of the hub, at the commit that it has now."""
    from .fetch import list_files

    return [Source((file,), str(builder_of(file)), 0) for file in list_files(repo, pattern)]


def builder_of(name: str) -> str | None:
    """Which kind of file it is by its name."""
    name = name.lower()
    stem = next((name.removesuffix(c) for c in COMPRESSED if name.endswith(c)), name)
    return next((builder for suffix, builder in BUILDERS.items() if stem.endswith(suffix)), None)


def digest(items: list[tuple[Source, str]]) -> str:
    """Of the files' paths below their common folder, sizes and splits: whether the text is the one that a preparation
    began with."""
    local = [f for source, _ in items for f in source.files if not f.startswith("hf://")]
    base = os.path.commonpath([os.path.dirname(f) for f in local]) if local else ""
    names = [[f.removeprefix(base) for f in source.files] + [source.size, split] for source, split in items]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def read(source: Source, text_key: str, skip: int = 0, batch: int = 500) -> Iterator[list[str]]:
    """The documents of a source, a list of at most `batch` at a time, without the first `skip`.

    Raises DataError for what cannot be read, or holds no text under that key.
    """
    with _one_line(source, text_key):
        documents = _texts if source.builder == "text" else _lines if source.builder == "json" else _rows
        yield from documents(source, text_key, skip, batch)


def _texts(source: Source, key: str, skip: int, batch: int) -> Iterator[list[str]]:
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    def document(file: str) -> str:
        files, path = url_to_fs(file) if file.startswith("hf://") else (LocalFileSystem(), file)
        with files.open(path, "rb", compression="infer") as f:
            return f.read().decode("utf-8-sig")  # datasets would turn other newlines into \n

    for i in range(skip, len(source.files), batch):
        yield [document(file) for file in source.files[i : i + batch]]


def _lines(source: Source, key: str, skip: int, batch: int) -> Iterator[list[str]]:
    """JSON line by line: read as columns, what stands beside the text would have to be of one type throughout."""
    from datasets import StreamingDownloadManager
    from datasets.utils.file_utils import xopen

    texts, seen = [], 0
    with xopen(StreamingDownloadManager().extract(source.files[0]), "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            seen += 1
            if seen > skip:
                texts.append(_text_of(line, key, f"line {number} of {source.files[0]}"))
            if len(texts) == batch:
                yield texts
                texts = []
    if texts:
        yield texts


def _text_of(line: bytes, key: str, place: str) -> str:
    line = line.removeprefix(codecs.BOM_UTF8)
    try:
        record = orjson.loads(line)
    except ValueError:
        try:
            record = json.loads(line)  # takes NaN, too
        except ValueError as e:
            raise DataError(
                f"{place} is no JSON ({e}); a document a line is wanted: mend it or take the file away"
            ) from None
    if not isinstance(record, dict) or key not in record:
        holds = f"columns {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{place} has no column {key}, but {holds}; type dataset.text_key=COLUMN")
    if not isinstance(record[key], str):
        raise DataError(f"{place} holds no text under {key}; mend it, or type dataset.text_key=COLUMN")
    return record[key]


def _rows(source: Source, key: str, skip: int, batch: int) -> Iterator[list[str]]:
    columns = _parquet(source, batch_size=batch).column_names or []
    if key not in columns:
        raise DataError(
            f"{source.files[0]} has no column {key}, but {', '.join(columns)}; type dataset.text_key=COLUMN"
        )
    for table in _parquet(source, columns=[key], batch_size=batch).iter(batch_size=batch):
        if skip >= len(table):
            skip -= len(table)
            continue
        texts = table[key].to_pylist()[skip:]
        skip = 0
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{source.files[0]} holds no text under {key} in some row; type dataset.text_key=COLUMN")
        yield texts


def _parquet(source: Source, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs, it also raises
    files = [f if f.startswith("hf://") else glob.escape(os.path.abspath(f)) for f in source.files]
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, **options).with_format(
        "arrow"
    )


@contextmanager
def _one_line(source: Source, key: str) -> Iterator[None]:
    name = source.files[0] if len(source.files) == 1 else f"{source.files[0]}, or one of {len(source.files) - 1} more,"
    try:
        yield
    except (GeneratorExit, KeyboardInterrupt, DataError):
        raise
    except Exception as e:  # datasets and pyarrow raise many kinds
        cause = e.__cause__ or e
        reason = str(cause).splitlines()[0][:200] if str(cause) else ""
        raise DataError(f"{name} cannot be read ({type(cause).__name__}: {reason}); mend it or take it away") from None
