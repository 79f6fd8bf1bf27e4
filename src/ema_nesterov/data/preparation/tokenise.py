"""Documents into tokens, by several processes, in the order of the documents."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...errors import DataError, one_line
from ..tokenizers import Tokenizer, open_tokenizer
from .processes import begin_worker, spawn
from .sources import Source, read

AHEAD = 4  # batches that wait for each process


@dataclass(frozen=True)
class Layout:
    """How documents become tokens, and which of them are held out for validation."""

    tokenizer: str
    vocab_size: int | None = None  # no token may reach it; None: the tokenizer's own
    layout: str = "stream"  # stream: end to end; rows: cut and padded to row_len, one a row
    row_len: int | None = None
    pad_id: int | None = None
    text_key: str = "text"
    val_every: int | None = None  # documents 0, val_every, 2 val_every, ... of what is split "every"


class Batch(NamedTuple):
    """Some consecutive documents of a source."""

    source: int
    first: int  # number of the first of them in the source
    documents: int
    before: int  # documents before it, in all the sources of its split
    file: str | tuple[str, ...]  # of all of them, or of each; "": a stream
    split: str  # train, val, every (val_every tells) or first

    def place(self, index: int, text: str) -> str:
        """Where a document of the batch is found."""
        if not self.file:
            return f"the document of the stream that begins {text[:40]!a}"
        each = isinstance(self.file, tuple)
        place = self.file[index] if each else f"document {self.first + index + 1} of {self.file}"
        return f"{place}, which begins {text[:40]!a},"


class Tokens(NamedTuple):
    train: np.ndarray
    val: np.ndarray
    bytes: int


def tokenise(
    items: list[tuple[Source, str]], at: dict[str, int], layout: Layout, processes: int
) -> Generator[tuple[Batch, Tokens]]:
    """Every batch of documents from `at` (source, documents, before) on, with its tokens, in order.

    Batches are cut at the same documents wherever one begins at the end of another.
    """
    waiting: deque[tuple[Batch, Future[Tokens]]] = deque()
    pool = ProcessPoolExecutor(processes, spawn(), begin_tokenising, (layout,))
    try:
        for batch, texts in _batches(items, at, layout.text_key):
            waiting.append((batch, pool.submit(tokenise_batch, texts, batch)))
            while waiting and (len(waiting) >= AHEAD * processes or waiting[0][1].done()):
                batch, future = waiting.popleft()
                yield batch, future.result()
        while waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(items: list[tuple[Source, str]], at: dict[str, int], text_key: str) -> Iterator[tuple[Batch, list[str]]]:
    before = at["before"]
    for index in range(at["source"], len(items)):
        source, split = items[index]
        first = at["documents"] if index == at["source"] else 0
        for texts in read(source, text_key, first):
            file = source.files[first : first + len(texts)] if source.builder == "text" else source.files[0]
            yield Batch(index, first, len(texts), before, file, split), texts
            first += len(texts)
            before += len(texts)


# --- in a worker process --------------------------------------------------------------------------

_tokenizer: Tokenizer
_layout: Layout


def begin_tokenising(layout: Layout) -> None:
    global _tokenizer, _layout
    begin_worker()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _tokenizer, _layout = open_tokenizer(layout.tokenizer), layout


def tokenise_batch(texts: list[str], batch: Batch) -> Tokens:
    held_out = [batch.split == "val"] * len(texts)
    if batch.split == "every":
        held_out = [(batch.before + i) % (_layout.val_every or 1) == 0 for i in range(len(texts))]
    documents = encode(texts, batch)
    train, val = (
        lay_out([ids for ids, held in zip(documents, held_out, strict=True) if held == v], _tokenizer, _layout)
        for v in (False, True)
    )
    limit = _layout.vocab_size or _tokenizer.vocab_size
    if (largest := int(max(train.max(initial=0), val.max(initial=0)))) >= limit:
        first = next(i for i, ids in enumerate(documents) if ids.max(initial=0) >= limit)
        raise DataError(
            f"{batch.place(first, texts[first])} holds token {largest} of tokenizer {_tokenizer.name}, the dataset is "
            f"of {limit}; type dataset.vocab_size={_tokenizer.vocab_size}"
        )
    dtype = np.uint16 if limit <= 2**16 else np.uint32
    return Tokens(train.astype(dtype), val.astype(dtype), sum(len(text.encode()) for text in texts))


def encode(texts: list[str], batch: Batch) -> list[np.ndarray]:
    """The ids of each text. Raises DataError, naming it, for one that the tokenizer does not take."""
    try:
        return _tokenizer.encode(texts)
    except BaseException as e:  # each library raises its own; a panic in Rust is no Exception
        if isinstance(e, KeyboardInterrupt | SystemExit):
            raise
    return [encode_one(text, batch.place(i, text)) for i, text in enumerate(texts)]


def encode_one(text: str, place: str) -> np.ndarray:
    try:
        text.encode()
        return _tokenizer.encode([text])[0]
    except UnicodeEncodeError as e:
        raise DataError(f"{place} holds {e.object[e.start]!a}, which is no character; mend it") from None
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt | SystemExit):
            raise
        raise DataError(
            f"{place} is not taken by tokenizer {_tokenizer.name} ({one_line(e)}); take the document away, or type "
            "another dataset.tokenizer"
        ) from None


def lay_out(documents: list[np.ndarray], tokenizer: Tokenizer, layout: Layout) -> np.ndarray:
    """The documents' tokens, each between its marks, end to end; as rows: cut, so that the marks stay, and padded."""
    kind = documents[0].dtype if documents else np.dtype(np.int64)
    before, after = np.array(tokenizer.before, kind), np.array(tokenizer.after, kind)
    if layout.layout == "stream":
        marked = [part for ids in documents for part in (before, ids, after) if part.size]
        return np.concatenate(marked or [np.empty(0, kind)])
    assert layout.row_len is not None
    assert layout.pad_id is not None
    rows, room = (
        np.full((len(documents), layout.row_len), layout.pad_id, kind),
        layout.row_len - len(before) - len(after),
    )
    for row, ids in zip(rows, documents, strict=True):
        document = np.concatenate([before, ids[:room], after])
        row[: len(document)] = document
    return rows.ravel()
