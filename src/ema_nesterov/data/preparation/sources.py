"""Documents out of files of text, in a fixed order: plain text, JSON and parquet, compressed or not, from a folder or
from the Hugging Face hub.

A file of plain text is one document, every character of it kept; a line of JSON, an element of a JSON array, or a row
of parquet, is one, in its `text_key` column.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import orjson

from ...errors import DataError

TEXT, JSON = (".txt", ".text", ".md", ".markdown"), (".json", ".jsonl", ".ndjson")
COMPRESSED = {"": None, ".gz": "gzip", ".xz": "xz", ".bz2": "bz2", ".zst": "zstd"}  # as fsspec calls them
BUILDERS = {
    **{stem + suffix: "text" for stem in TEXT for suffix in COMPRESSED},
    **{stem + suffix: "json" for stem in JSON for suffix in COMPRESSED},
    ".parquet": "parquet",  # which compresses its columns itself
}
READABLE = f"*{', *'.join(TEXT + JSON)}, plain or with {', '.join(filter(None, COMPRESSED))} behind, and *.parquet"
EXPANSION = {"text": 1.0, "json": 1.0, "parquet": 1.7}  # bytes of text per byte of file, for estimates alone
FILES_AT_ONCE = 1000  # of one document each


@dataclass(frozen=True)
class Source:
    """One file, or a run of files of plain text."""

    files: tuple[str, ...]
    builder: str
    size: int  # bytes on disk; 0 where unknown

    @property
    def expected(self) -> float:
        """Bytes of text, roughly."""
        return self.size * EXPANSION[self.builder] * (2.7 if compression_of(self.files[0]) else 1)


def local_files(folder: Path, but: Path | None = None) -> list[Path]:
    """All files below a folder, hidden ones last, each part sorted by path; those below `but` are left out.

    Links to folders are followed, but not back into a folder that leads to them. Raises DataError for a folder that is
    none or cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"folder of text {folder} does not exist; type dataset.path=FOLDER")

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}; type dataset.path=FOLDER")

    files: list[Path] = []
    left_out = os.path.realpath(but) if but is not None else None
    leads = {str(folder): {os.path.realpath(folder)}}  # to each folder, itself included
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        for name in list(folders):
            path = os.path.join(place, name)
            if (real := os.path.realpath(path)) == left_out or real in leads[place]:
                folders.remove(name)
            else:
                leads[path] = {*leads[place], real}
        files += [Path(place, name) for name in names]
    return sorted(files, key=lambda path: (hidden(path, folder), path.parts))


def hidden(path: Path, folder: Path) -> bool:
    """Whether a file below a folder is, or lies in a folder that is."""
    *folders, name = path.relative_to(folder).parts
    return name[0] == "." or any(part[0] in "._" for part in folders)


def local_sources(folder: Path, pattern: str | None, but: Path | None = None) -> list[Source]:
    """The files of text below a folder, sorted by their paths; pattern: of the file name (None: every known suffix).

    Hidden files and folders, and those below `but`, are left out. Raises DataError when nothing is left.
    """
    every = local_files(folder, but)
    files = [
        path
        for path in every
        if (pattern is None or fnmatch(path.name, pattern))
        and builder_of(path.name)
        and path.is_file()
        and not hidden(path, folder)
    ]
    if not files:
        others = f", but {number_of(every, folder)}" if every else ""
        advice = ", or dataset=text, which takes all" if pattern else "; rename plain text to *.txt" if every else ""
        raise DataError(f"no files {pattern or READABLE} in {folder}{others}; type dataset.path=FOLDER{advice}")
    sources: list[Source] = []
    for path in files:
        builder, size = str(builder_of(path.name)), path.stat().st_size
        last = sources[-1] if sources else None
        if builder == "text" and last and last.builder == "text" and len(last.files) < FILES_AT_ONCE:
            sources[-1] = Source((*last.files, str(path)), "text", last.size + size)
        else:
            sources.append(Source((str(path),), builder, size))
    return sources


def number_of(files: list[Path], folder: Path) -> str:
    first = files[0].relative_to(folder)
    return f"{len(files):,} others, the first {first}" if len(files) > 1 else f"1 other, {first}"


def account(folder: Path, sources: Sequence[Source], wanted: str, but: Path | None = None) -> str:
    """One line: how many files below the folder are read as these sources, and how many are not."""
    read = {file for source in sources for file in source.files}
    kinds = Counter("*" + suffix_of(file) for file in read)
    line = f"{folder}: {', '.join(f'{count:,} {kind}' for kind, count in sorted(kinds.items()))}"
    if others := [path for path in local_files(folder, but) if str(path) not in read]:
        line += f"; passed over: {number_of(others, folder)} (read are {wanted}; hidden files never)"
    return line


def hub_sources(repo: str, pattern: str) -> list[Source]:
    """The files of a dataset repository of the hub, at the commit that it has now."""
    from .fetch import list_files

    files = list_files(repo, pattern)
    if other := next((file for file in files if not builder_of(file)), None):
        raise DataError(f"{other} is none of {READABLE}; type a narrower pattern than {pattern}")
    return [Source((file,), str(builder_of(file)), 0) for file in files]


def builder_of(name: str) -> str | None:
    """Which kind of file it is by its name."""
    return BUILDERS.get(suffix_of(name))


def suffix_of(name: str) -> str:
    """In lower case, with that of the compression."""
    stem, suffix = os.path.splitext(os.path.basename(name).lower())
    return os.path.splitext(stem)[1] + suffix if suffix in COMPRESSED else suffix


def compression_of(name: str) -> str | None:
    return COMPRESSED.get(os.path.splitext(name.lower())[1])


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
    with _one_line(source.files[0]):
        documents = _texts if source.builder == "text" else _lines if source.builder == "json" else _rows
        yield from documents(source, text_key, skip, batch)


@contextmanager
def _opened(file: str) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed; of the hub, `datasets` reads on where a connection drops."""
    from datasets.utils.file_utils import xopen
    from fsspec.compression import compr

    with xopen(file, "rb") if file.startswith("hf://") else open(file, "rb") as raw:
        if (compression := compression_of(file)) is None:
            yield raw
        else:
            with compr[compression](raw, mode="rb") as content:
                yield content


def _texts(source: Source, key: str, skip: int, batch: int) -> Iterator[list[str]]:
    def document(file: str) -> str:
        with _one_line(file), _opened(file) as content:
            return content.read().decode("utf-8-sig")

    for i in range(skip, len(source.files), batch):
        yield [document(file) for file in source.files[i : i + batch]]


def _lines(source: Source, key: str, skip: int, batch: int) -> Iterator[list[str]]:
    """JSON line by line: read as columns, what stands beside the text would have to be of one type throughout."""
    file = source.files[0]
    with _opened(file) as content:
        lines = ((f"line {number} of {file}", line) for number, line in enumerate(content, 1) if line.strip())
        if (first := next(lines, None)) is None:
            return
        if (whole := _whole(*first, file, content)) is None:
            records: Iterator[tuple[str, Any]] = chain([first], lines)
        else:
            records = ((f"element {number} of {file}", record) for number, record in enumerate(whole, 1))
        texts = (_text_of(record, key, place) for place, record in islice(records, skip, None))
        while some := list(islice(texts, batch)):
            yield some


def _whole(place: str, line: bytes, file: str, rest: IO[bytes]) -> list[Any] | None:
    """The records of a file that is one JSON value over any number of lines, an array of records or one alone; None
    where each line is a record, as the first is."""
    if line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return _parsed(line + rest.read(), file)
    try:
        _parsed(line, place)
        return None
    except DataError as e:
        with suppress(DataError):
            value = _parsed(line + rest.read(), file)
            return value if isinstance(value, list) else [value]
        raise e


def _parsed(content: bytes, place: str) -> Any:
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return orjson.loads(content)
    except ValueError:
        try:
            return json.loads(content)  # takes NaN, too
        except ValueError as e:
            raise DataError(
                f"{place} is no JSON ({e}); an object a line, or one array of objects, is wanted: mend it or take the "
                "file away"
            ) from None


def _text_of(record: Any, key: str, place: str) -> str:
    if isinstance(record, bytes):  # a line
        record = _parsed(record, place)
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise DataError(f'{place} has no column {key}, but is a {kind}; write it as {{"{key}": ...}}')
    if key not in record:
        raise DataError(f"{place} has no column {key}, but columns {', '.join(record)}; type dataset.text_key=COLUMN")
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
def _one_line(file: str) -> Iterator[None]:
    try:
        yield
    except (GeneratorExit, KeyboardInterrupt, DataError):
        raise
    except Exception as e:  # datasets and pyarrow raise many kinds
        cause = e.__cause__ or e
        reason = str(cause).splitlines()[0][:200] if str(cause) else ""
        raise DataError(f"{file} cannot be read ({type(cause).__name__}: {reason}); mend it or take it away") from None
