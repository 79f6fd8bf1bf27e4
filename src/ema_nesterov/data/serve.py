"""The process that reads a stream of text for one rank and tokenises its share of each step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from ..errors import DataError
from .preparation.processes import begin_worker, spawn
from .preparation.sources import Source, read
from .preparation.tokenise import Batch, Layout, Tokens, begin_tokenising, tokenise_batch
from .shuffle import ShuffledStream

AT_ONCE = 250  # documents that a tokenising process takes
STEPS_AHEAD = 2


@dataclass(frozen=True)
class Share:
    """What one rank takes of the stream."""

    batch_size: int
    rank: int
    ranks: int

    def holds(self, position: int) -> bool:
        return position % self.batch_size * self.ranks // self.batch_size == self.rank


def serve(
    pipe: Connection,
    sources: list[Source],
    counts: dict[int, int],
    buffer: int,
    max_epochs: int,
    seed: int,
    share: Share,
    step: int,
    layout: Layout,
    processes: int,
) -> None:
    """Send (rows, documents of each source as far as known) of every step, rows None at the end, or what went wrong."""
    begin_worker()
    stream = ShuffledStream(len(sources), lambda s, skip: read(sources[s], layout.text_key, skip), buffer, seed, counts)
    waiting: deque[list[Future[Tokens]]] = deque()
    try:
        with ProcessPoolExecutor(processes, spawn(), begin_tokenising, (layout,)) as pool:
            for texts in _shares(stream, share, step, max_epochs):
                parts = [texts[i : i + AT_ONCE] for i in range(0, len(texts), AT_ONCE)]
                batches = [Batch(0, 0, len(part), 0, "", "train") for part in parts]
                waiting.append([pool.submit(tokenise_batch, p, b) for p, b in zip(parts, batches, strict=True)])
                if len(waiting) > STEPS_AHEAD:
                    pipe.send((_rows(waiting.popleft(), layout), dict(counts)))
            while waiting:
                pipe.send((_rows(waiting.popleft(), layout), dict(counts)))
        pipe.send((None, dict(counts)))
    except (BrokenPipeError, KeyboardInterrupt):
        pass
    except BrokenProcessPool:
        pipe.send(DataError("a tokenising process was killed (out of memory?); type dataset.processes=1"))
    except Exception as e:
        pipe.send(e)


def _shares(stream: ShuffledStream, share: Share, step: int, max_epochs: int) -> Iterator[list[str]]:
    """The rank's documents of each step, until fewer than a step's are left."""
    mine: list[str] = []
    position = step * share.batch_size
    for epoch, text in stream.documents(position):
        if epoch >= max_epochs:
            return
        if share.holds(position):
            mine.append(text)
        position += 1
        if position % share.batch_size == 0:
            yield mine
            mine = []


def _rows(parts: list[Future[Tokens]], layout: Layout) -> np.ndarray:
    return np.concatenate([part.result().train for part in parts]).reshape(-1, layout.row_len or 1)
