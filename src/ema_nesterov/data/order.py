"""Which tokens a step reads: pure functions of the shards' sizes, the seed and the step.

An example is seq_len tokens and the one behind them (a row: the row), named by the position of its first
token in all shards end to end.

`Windows`, the default: token i T begins example i, so every token but the last few is read once an epoch.
Shuffled, an epoch permutes the shards, and in each the examples that begin there. The order is one for all
numbers of ranks and micro-batches; a rank takes its slice of a step's batch.

The authors' orders, for exact comparison, never shuffled:

`nanogpt_124m`: each rank walks the shards on its own. It reads B T + 1 tokens at rank B T, moves on by
B T ranks, and goes to the next shard where another such move would not fit, so the ranks drift apart by a
batch a shard and the order depends on their number and on the micro-batch B. What does not fill a batch is
dropped at each shard's end; the first micro-batch is read twice, because theirs is fetched before the loader
is reset.
`nanogpt_162m`: whole batches of a shard, cut into the ranks' slices; the rest of each shard is dropped.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


class Windows:
    """Examples of `length` tokens, every `length` tokens; spare: tokens that an example needs beyond that."""

    def __init__(self, shards: list[int], length: int, spare: int, seed: int | None):
        ends = np.cumsum(shards)
        self.length, self.seed = length, seed
        self.count = max(0, int(ends[-1]) - spare) // length  # examples of an epoch
        first = -(-np.concatenate([[0], ends[:-1]]) // length)  # the first example that begins in each shard
        self.first = np.minimum(first, self.count)
        self.sizes = np.diff(np.append(self.first, self.count))
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        self.permuted = lru_cache(maxsize=4)(self._permuted)  # a batch may reach into the next shard

    def starts(self, positions: np.ndarray) -> np.ndarray:
        """Where the examples at these positions of the endless order begin."""
        epochs, places = np.divmod(positions, self.count)
        if self.seed is None:
            return places * self.length
        examples = np.empty_like(places)
        for epoch in set(epochs.tolist()):
            shards, ends = self.epoch(epoch)
            turns = np.where(epochs == epoch, np.searchsorted(ends, places, side="right"), -1)
            for turn in set(turns.tolist()) - {-1}:
                here, shard = turns == turn, int(shards[turn])
                inside = places[here] - (ends[turn] - self.sizes[shard])
                examples[here] = self.first[shard] + self.permuted(epoch, shard)[inside]
        return examples * self.length

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the shards, and where the examples of each end in it."""
        shards = _generator(self.seed, epoch, 2**32 - 1).permutation(len(self.sizes))
        return shards, np.cumsum(self.sizes[shards])

    def _permuted(self, epoch: int, shard: int) -> np.ndarray:
        return _generator(self.seed, epoch, shard).permutation(int(self.sizes[shard]))


def _generator(*key: int | None) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([int(k or 0) for k in key]))


def nanogpt_124m(shards: list[int], length: int, micro_batch: int, rank: int, ranks: int, fetch: int) -> np.ndarray:
    """Where the examples begin that a rank reads at its `fetch`-th call (from 0) of the authors' loader."""
    per_shard = nanogpt_124m_counts(shards, length, micro_batch, rank, ranks)
    ends = np.cumsum(per_shard)
    place = max(fetch - 1, 0) % int(ends[-1])
    shard = int(np.searchsorted(ends, place, side="right"))
    inside = place - int(ends[shard] - per_shard[shard])
    begin = sum(shards[:shard]) + (rank + inside * ranks) * micro_batch * length
    return begin + np.arange(micro_batch) * length


def nanogpt_124m_counts(shards: list[int], length: int, micro_batch: int, rank: int, ranks: int) -> np.ndarray:
    """Micro-batches that a rank reads of each shard: it moves on when position + batch + 1 > tokens."""
    share, batch = micro_batch * length, micro_batch * length * ranks
    return np.maximum((np.array(shards) - 1 - rank * share) // batch, 1)


def nanogpt_162m(shards: list[int], length: int, batch_size: int, step: int) -> np.ndarray:
    """Where the examples of a step's global batch begin."""
    per_shard = nanogpt_162m_counts(shards, length, batch_size)
    ends = np.cumsum(per_shard)
    place = step % int(ends[-1])
    shard = int(np.searchsorted(ends, place, side="right"))
    inside = place - int(ends[shard] - per_shard[shard])
    return sum(shards[:shard]) + (inside * batch_size + np.arange(batch_size)) * length


def nanogpt_162m_counts(shards: list[int], length: int, batch_size: int) -> np.ndarray:
    """Batches of each shard: it moves on when position + batch + 1 >= tokens."""
    return -(-(np.array(shards) - 1) // (batch_size * length)) - 1
