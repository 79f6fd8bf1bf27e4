"""Documents out of files of text, in a fixed order: .txt, .jsonl, .json and parquet, compressed or not, read by
`datasets` from a folder or from the Hugging Face hub.

A .txt file is one document; a line of JSON, or a row of parquet, is one, in its `text_key` column.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ...errors import DataError

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".lz4")
EXPANSION = {"text": 1.0, "json": 1.0, "parquet": 1.7}  # bytes of text per byte of file, for estimates alone
FILES_AT_ONCE = 1000  # of one document each


@dataclass(frozen=True)
class Source:
    """One file, or a run of .txt files, which are opened together."""

    files: tuple[str, ...]
    builder: str
    size: int  # bytes on disk; 0 where unknown

    @property
    def expected(self) -> float:
        """Bytes of text, roughly."""
        return self.size * EXPANSION[self.builder] * (2.7 if self.files[0].endswith(COMPRESSED) else 1)


def local_sources(folder: Path, pattern: str | None) -> list[Source]:
    """The files of text below a folder, sorted by their paths; pattern: of the file name (None: every known suffix).

    Raises DataError when there are none.
    """
    if not folder.is_dir():
        raise DataError(f"folder of text {folder} does not exist; type dataset.path=FOLDER")
    paths = (p for p in folder.rglob("*") if builder_of(p.name) and (pattern is None or fnmatch(p.name, pattern)))
    files = sorted((p for p in paths if p.is_file() and not p.name.startswith(".")), key=lambda p: p.parts)
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
    """Which reader of `datasets` a file is for."""
    stem = next((name.removesuffix(c) for c in COMPRESSED if name.endswith(c)), name)
    return next((builder for suffix, builder in BUILDERS.items() if stem.endswith(suffix)), None)


def digest(items: list[tuple[Source, str]]) -> str:
    """Of the files' names, sizes and splits: whether the text is the one that a preparation began with."""
    names = [[os.path.basename(f) for f in source.files] + [source.size, split] for source, split in items]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def read(source: Source, text_key: str, skip: int = 0, batch: int = 500) -> Iterator[list[str]]:
    """The documents of a source, a list of at most `batch` at a time, without the first `skip`.

    Raises DataError for what cannot be read, or holds no text under that key.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    files, key, options = source.files, text_key, {}
    if source.builder == "text":
        # one document a file, its newlines kept; what is skipped is not opened
        files, skip, key, options = files[skip:], 0, "text", {"sample_by": "document", "keep_linebreaks": True}
        if not files:
            return
    elif source.builder == "parquet":
        options = {"columns": [text_key]}
    with _plain_errors(source, text_key):
        stream = datasets.load_dataset(source.builder, data_files=list(files), split="train", streaming=True, **options)
        for table in stream.with_format("arrow").iter(batch_size=batch):
            if key not in table.column_names:
                columns = ", ".join(table.column_names)
                raise DataError(f"{source.files[0]} has no column {key}, but {columns}; type dataset.text_key=COLUMN")
            if skip >= len(table):
                skip -= len(table)
                continue
            texts = table[key].to_pylist()[skip:]
            skip = 0
            if not all(isinstance(text, str) for text in texts):
                raise DataError(
                    f"{source.files[0]} holds no text under {key} in some row; type dataset.text_key=COLUMN"
                )
            yield texts


@contextmanager
def _plain_errors(source: Source, key: str) -> Iterator[None]:
    name = source.files[0] if len(source.files) == 1 else f"{source.files[0]} and {len(source.files) - 1} more"
    try:
        yield
    except (GeneratorExit, KeyboardInterrupt, DataError):
        raise
    except Exception as e:  # datasets and pyarrow raise many kinds
        cause = e.__cause__ or e
        reason = str(cause).splitlines()[0][:200] if str(cause) else ""
        raise DataError(
            f"{name} cannot be read for its {key} ({type(cause).__name__}: {reason}); mend it, take it away, or type "
            "dataset.text_key=COLUMN"
        ) from None
