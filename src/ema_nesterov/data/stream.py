"""Rows tokenised while training: documents from their files through a shuffle buffer, one a row.

There is one stream, whatever the number of ranks. In each rank a process reads all of it, and a pool of
others tokenises the rank's share of a step. The step is the position: a run that resumes, on any number of
ranks, reads the very next document (see shuffle.py).
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from ..errors import DataError
from .loader import MicroBatch, Validation, to_micro_batches
from .manifest import adopt, require_fit
from .preparation.processes import cores, spawn
from .preparation.recipes import prepare_validation, text_sources
from .preparation.sources import Source, digest
from .preparation.tokenise import Layout
from .serve import Share, serve


class StreamDataset:
    """The interface of TokenDataset, without shards for training.

    Raises DataError when the text, the tokenizer or the validation shards do not do.
    """

    def __init__(self, cfg: DictConfig, vocab_size: int, seed: int):
        self.cfg, self.seed = cfg, seed
        self.sources = text_sources(cfg, cfg.files)
        folder = Path(cfg.output)
        prepare_validation(cfg)
        manifest = adopt(folder, cfg)
        require_fit(folder, manifest, cfg, vocab_size, cfg.row_len)
        self.val = Validation(folder, cfg, vocab_size, cfg.row_len)
        self.counts: dict[int, int] = {}  # documents of each source, as they are learned
        self.reader: Reader | None = None

    def require(self, steps: int, batch_size: int, micro_batch_size: int, ranks: int) -> None:
        """How much the stream holds is known when it ends: `batch` raises then."""
        self.needed = steps * batch_size

    def batch(self, step: int, batch_size: int, rank: int, ranks: int, micro_batch_size: int) -> list[MicroBatch]:
        """This rank's micro-batches of the global batch of a step (counted from 0).

        Steps in sequence are read on from each other; another one is sought first. Raises DataError when the stream
        has ended max_epochs times.
        """
        share = Share(batch_size, rank, ranks)
        if self.reader is None or (self.reader.share, self.reader.step) != (share, step):
            self.close()
            per_rank = max(1, (cores() - ranks) // ranks) if self.cfg.processes is None else self.cfg.processes
            self.reader = Reader(self.cfg, self.sources, self.counts, self.seed, share, step, per_rank)
        rows, counts = self.reader.read()
        self.counts.update(counts)
        if rows is None:
            total = sum(self.counts.values())
            raise DataError(
                f"the run needs {self.needed} documents, {self.cfg.path or self.cfg.hub} holds {total} "
                f"x dataset.max_epochs={self.cfg.max_epochs}; "
                f"type steps={total * self.cfg.max_epochs // batch_size} or "
                f"dataset.max_epochs={-(-self.needed // max(1, total))}"
            )
        return list(to_micro_batches(rows, self.cfg.pad_id, micro_batch_size))

    def validation(self, tokens: int | None, rank: int, ranks: int, micro_batch_size: int) -> Iterator[MicroBatch]:
        """This rank's share of the first validation examples that hold `tokens` targets."""
        return self.val.batches(tokens, rank, ranks, micro_batch_size)

    def bytes_per_token(self) -> float | None:
        return self.val.bytes_per_token()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: which text this is, and how many documents each file read so far has."""
        return {
            "fingerprint": digest([(s, "train") for s in self.sources]),
            "counts": sorted(map(list, self.counts.items())),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Raise DataError when a run that began with other text would go on with this."""
        if state["fingerprint"] != self.state()["fingerprint"]:
            raise DataError(
                f"{self.cfg.path or self.cfg.hub} does not hold the files that this run began with; put them back, or "
                "type another seed or runs_dir to begin anew"
            )
        self.counts = dict(state["counts"])

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()
            self.reader = None


class Reader:
    """The process that reads the stream from a step on, seen from the one that trains."""

    def __init__(
        self,
        cfg: DictConfig,
        sources: list[Source],
        counts: dict[int, int],
        seed: int,
        share: Share,
        step: int,
        processes: int,
    ):
        self.share, self.step = share, step
        layout = Layout(cfg.tokenizer, cfg.vocab_size, "rows", cfg.row_len, cfg.pad_id, cfg.text_key)
        self.pipe, theirs = spawn().Pipe(duplex=False)
        arguments = (theirs, sources, dict(counts), cfg.buffer, cfg.max_epochs, seed, share, step, layout, processes)
        self.process = spawn().Process(target=serve, args=arguments)
        self.process.start()
        theirs.close()
        atexit.register(self.close)  # before multiprocessing waits for it

    def read(self) -> tuple[np.ndarray | None, dict[int, int]]:
        """The rank's rows of the next step (None: the stream has ended), and what was learned of the sources.

        Raises what the process raised.
        """
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise DataError("the process that reads the text was killed (out of memory?)") from None
        if isinstance(answer, Exception):
            raise answer
        self.step += 1
        return answer

    def close(self) -> None:
        self.pipe.close()  # it ends when it finds that out, and ends its own processes first
        self.process.join(timeout=5)
        self.process.kill()
        self.process.join()
        atexit.unregister(self.close)
