"""Batches as a pure function of (dataset, seed, step), the same for every number of ranks.

Examples have one global order. The batch of a step is its next `batch_size` examples; a rank takes its
slice of them and cuts it into micro-batches. Nothing has to be saved to resume: the step is the position.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from ..errors import DataError
from . import order
from .manifest import adopt, load_token_bytes, require_fit
from .preparation.recipes import shards_folder
from .reader import Tokens

VAL_TOKENS = 10_485_760  # of a large validation split, where nothing else is said
SOON = 32  # steps ahead, when the checksum of a shard is begun


class MicroBatch(NamedTuple):
    inputs: Tensor  # (micro-batch, seq_len) int64
    targets: Tensor  # the same, -100 where no loss is taken


class TokenDataset:
    """A folder of shards as training batches and a fixed validation set.

    Its public methods are what training asks of a dataset, also of a user's own. Raises DataError when the folder,
    its manifest, a shard or the number of tokens does not do for the run.
    """

    def __init__(self, cfg: DictConfig, vocab_size: int, seq_len: int, seed: int):
        self.cfg, self.seq_len, self.reading = cfg, seq_len, [0, 0]
        self.order, self.pad_id = cfg.order, cfg.pad_id if cfg.layout == "rows" else None  # a config is slow to ask
        self.folder = shards_folder(cfg)
        self.manifest = adopt(self.folder, cfg)
        require_fit(self.folder, self.manifest, cfg, vocab_size, seq_len)
        shards = self.manifest.of("train")
        if not shards:
            raise DataError(f"{self.folder} holds no training shards; type dataset.path=FOLDER of another")
        self.train = Tokens(self.folder, shards, vocab_size)
        self.sizes = [s.tokens for s in shards]
        spare = int(cfg.layout == "stream")
        self.windows = order.Windows(self.sizes, seq_len, spare, seed if cfg.shuffle else None)
        self.val = Validation(self.folder, cfg, vocab_size, seq_len)
        if self.windows.count < 1:
            raise DataError(
                f"{self.folder} holds {sum(self.sizes)} training tokens, fewer than seq_len={seq_len}; type a smaller "
                "seq_len or dataset.path=FOLDER"
            )

    def require(self, steps: int, batch_size: int, micro_batch_size: int, ranks: int) -> None:
        """Raise DataError when the run needs more tokens than max_epochs passes hold, or what it reads first was
        altered."""
        if self.order == "nanogpt_124m":  # what is read depends on them
            self.reading = [ranks, micro_batch_size]

        def held(epochs: int) -> int:
            return self._steps(epochs, batch_size, micro_batch_size, ranks)

        most = held(self.cfg.max_epochs)
        if steps <= most:
            self.train.expect(int(self._starts(0, batch_size, 0, ranks, micro_batch_size)[0])).result()
            return
        epochs = self.cfg.max_epochs
        while held(epochs) < steps and epochs < 1_000_000:
            epochs = max(epochs + 1, epochs * steps // max(1, held(epochs)))
        advice = [f"steps={most}"] * (most > 0) + [f"dataset.max_epochs={epochs}"] * (held(epochs) >= steps)
        advice = advice or ["a smaller batch_size"]
        shards = ""
        if (self.cfg.prepare in ("shards", "text") and self.cfg.shards is not None) or self.manifest.cursor is not None:
            shards = ", or bring more with scripts/prepare_data.py dataset.shards=N"
        raise DataError(
            f"the run needs {steps * batch_size * self.seq_len} training tokens, {self.folder} holds {sum(self.sizes)} "
            f"x dataset.max_epochs={self.cfg.max_epochs}; type {' or '.join(advice)}{shards}"
        )

    def batch(self, step: int, batch_size: int, rank: int, ranks: int, micro_batch_size: int) -> list[MicroBatch]:
        """This rank's micro-batches of the global batch of a step (counted from 0)."""
        if step % (SOON // 2) == 0:
            self.train.expect(int(self._starts(step + SOON, batch_size, rank, ranks, micro_batch_size)[-1]))
        starts = self._starts(step, batch_size, rank, ranks, micro_batch_size)
        return list(micro_batches(self.train, starts, self.seq_len, self.pad_id, micro_batch_size))

    def where(self, step: int, batch_size: int, rank: int, ranks: int, micro_batch_size: int) -> str:
        """What a rank reads in a step, for a person."""
        starts = self._starts(step, batch_size, rank, ranks, micro_batch_size)
        return f"{len(starts)} sequences, the first at {self.train.place(int(starts[0]))}"

    def validation(self, tokens: int | None, rank: int, ranks: int, micro_batch_size: int) -> Iterator[MicroBatch]:
        """This rank's share of the first validation examples that hold `tokens` targets."""
        return self.val.batches(tokens, rank, ranks, micro_batch_size)

    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per target of the validation set, where the tokens spell out their text."""
        return self.val.bytes_per_token()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: which data these are, for `resume`."""
        return {"fingerprint": self.manifest.fingerprint(), "reading": self.reading}

    def resume(self, state: dict[str, Any]) -> None:
        """Raise DataError when a run that began with other data would go on with these."""
        if state["fingerprint"] != self.manifest.fingerprint():
            raise DataError(
                f"{self.folder} does not hold the data that this run began with; put them back, or type another seed "
                "or runs_dir to begin anew"
            )
        if state["reading"] != self.reading:
            ranks, micro_batch_size = state["reading"]
            raise DataError(
                f"dataset.order=nanogpt_124m reads by ranks and micro-batches: go on with the {ranks} ranks and "
                f"micro_batch_size={micro_batch_size} that this run began with"
            )

    def close(self) -> None:
        """Nothing is left to end."""

    def _starts(self, step: int, batch_size: int, rank: int, ranks: int, micro_batch_size: int) -> np.ndarray:
        share = batch_size // ranks
        if self.order == "nanogpt_124m":
            micro_steps = share // micro_batch_size
            fetches = range(step * micro_steps, (step + 1) * micro_steps)
            place = (self.sizes, self.seq_len, micro_batch_size, rank, ranks)
            return np.concatenate([order.nanogpt_124m(*place, fetch) for fetch in fetches])
        mine = slice(rank * share, (rank + 1) * share)
        if self.order == "nanogpt_162m":
            return order.nanogpt_162m(self.sizes, self.seq_len, batch_size, step)[mine]
        return self.windows.starts(step * batch_size + np.arange(batch_size)[mine])

    def _steps(self, epochs: int, batch_size: int, micro_batch_size: int, ranks: int) -> int:
        """How many steps so many epochs hold; raises DataError where a shard does not hold what the authors' loaders
        read at a time."""
        if self.order == "windows":
            return self.windows.count * epochs // batch_size
        tokens = batch_size * self.seq_len
        if self.order == "nanogpt_124m":
            tokens = micro_batch_size * ranks * self.seq_len
        if min(self.sizes) <= tokens + 1:
            raise DataError(
                f"dataset.order={self.cfg.order} reads {tokens} tokens of a shard at a time, {self.folder} has a shard "
                f"of {min(self.sizes)}; type dataset.order=windows"
            )
        if self.order == "nanogpt_162m":
            return epochs * int(order.nanogpt_162m_counts(self.sizes, self.seq_len, batch_size).sum())
        counts = [order.nanogpt_124m_counts(self.sizes, self.seq_len, micro_batch_size, r, ranks) for r in range(ranks)]
        fetches = epochs * int(min(c.sum() for c in counts)) + 1  # the first is read twice
        return fetches // (batch_size // ranks // micro_batch_size)


class Validation:
    """The validation shards of a folder: always its first examples, in order.

    Raises DataError when they hold fewer targets than dataset.val_tokens.
    """

    def __init__(self, folder: Path, cfg: DictConfig, vocab_size: int, seq_len: int):
        manifest = adopt(folder, cfg)
        self.cfg, self.folder, self.seq_len = cfg, folder, seq_len
        self.largest = max((s.largest for s in manifest.of("val")), default=0)
        self.pad_id = cfg.pad_id if cfg.layout == "rows" else None
        if not manifest.of("val"):
            raise DataError(f"{folder} holds no validation shards; prepare it again, or type dataset.path=FOLDER")
        self.tokens = Tokens(folder, manifest.of("val"), vocab_size)
        self.count = (len(self.tokens) - int(cfg.layout == "stream")) // seq_len
        self.ends = self._targets()  # targets in the first 1, 2, ... examples, as far as any evaluation reads
        held = int(self.ends[-1]) if len(self.ends) else 0
        self.lengths = load_token_bytes(folder)
        if held < seq_len and cfg.layout == "stream":
            raise DataError(
                f"{folder} holds {len(self.tokens)} validation tokens, fewer than seq_len={seq_len}; type a smaller "
                "seq_len, or prepare more"
            )
        if held < (cfg.val_tokens or 1):
            raise DataError(
                f"dataset.val_tokens={cfg.val_tokens}, but {folder} holds {held} validation targets in whole examples; "
                f"type dataset.val_tokens={held}"
            )
        self.tokens.expect(0).result()  # an altered shard is told now, not when the run has begun

    def batches(self, tokens: int | None, rank: int, ranks: int, micro_batch_size: int) -> Iterator[MicroBatch]:
        """A rank's share of the first examples that hold `tokens` targets (None: those of dataset.val_tokens)."""
        mine = np.arange(rank, self.examples(tokens), ranks)
        for start in range(0, len(mine), micro_batch_size):
            starts = mine[start : start + micro_batch_size] * self.seq_len
            yield from micro_batches(self.tokens, starts, self.seq_len, self.pad_id, micro_batch_size)

    def examples(self, tokens: int | None) -> int:
        """All where there are fewer."""
        if tokens is None:
            return len(self.ends)
        whole = tokens // self.seq_len if self.cfg.layout == "stream" else int(np.searchsorted(self.ends, tokens)) + 1
        return min(whole, len(self.ends))

    def bytes_per_token(self) -> float | None:
        lengths = self.lengths
        if lengths is None or len(lengths) <= int(self.largest):
            return None
        total = count = 0
        for _, targets in self.batches(self.cfg.val_tokens, 0, 1, 64):
            held = targets[targets != -100].numpy()
            total, count = total + int(lengths[held].sum()), count + held.size
        return total / count

    def _targets(self) -> np.ndarray:
        most = VAL_TOKENS if self.cfg.val_tokens is None else max(self.cfg.val_tokens, self.cfg.probe_tokens)
        if self.cfg.layout == "stream":
            return np.arange(1, min(self.count, max(1, most // self.seq_len)) + 1) * self.seq_len
        ends: list[int] = []
        for first in range(0, self.count, 1024):
            starts = np.arange(first, min(first + 1024, self.count)) * self.seq_len
            counts = (self.tokens.read(starts, self.seq_len)[:, 1:] != self.cfg.pad_id).sum(axis=1)
            ends += (np.cumsum(counts) + (ends[-1] if ends else 0)).tolist()
            if ends[-1] >= most:
                break
        return np.array(ends[: int(np.searchsorted(ends, most)) + 1])


def micro_batches(
    tokens: Tokens, starts: np.ndarray, seq_len: int, pad_id: int | None, micro_batch_size: int
) -> Iterator[MicroBatch]:
    """The examples that begin at these positions; pad_id: they are rows."""
    return to_micro_batches(tokens.read(starts, seq_len + (pad_id is None)), pad_id, micro_batch_size)


def to_micro_batches(rows: np.ndarray, pad_id: int | None, micro_batch_size: int) -> Iterator[MicroBatch]:
    """rows: seq_len + 1 tokens each, or, with pad_id, seq_len, whose last target, and every one that is pad_id, is
    -100."""
    if pad_id is None:
        inputs, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
    else:
        inputs = rows.astype(np.int64)
        targets = np.empty_like(inputs)
        targets[:, :-1], targets[:, -1] = inputs[:, 1:], pad_id
        targets[targets == pad_id] = -100
    parts = (torch.from_numpy(a).split(micro_batch_size) for a in (inputs, targets))
    return map(MicroBatch, *parts)


def prefetch(
    read: Callable[[int], list[MicroBatch]], steps: range, device: torch.device, threads: int = 1
) -> Generator[list[MicroBatch]]:
    """`read(step)` for each step, on the device, one step ahead in a thread (threads=0: when needed)."""

    def load(step: int) -> list[MicroBatch]:
        if device.type == "cpu":
            return read(step)
        torch.cuda.set_device(device)  # a new thread starts on the first GPU
        pinned = [(b.inputs.pin_memory(), b.targets.pin_memory()) for b in read(step)]
        return [MicroBatch(*(t.to(device, non_blocking=True) for t in pair)) for pair in pinned]

    if threads == 0:
        yield from map(load, steps)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(load, steps[0]) if steps else None
        for step in steps:
            assert ahead is not None
            batch = ahead.result()
            ahead = pool.submit(load, step + 1) if step + 1 in steps else None
            yield batch
