"""Batches as a pure function of (dataset, seed, step), the same for every number of ranks.

Examples have one global order. The batch of a step is its next `batch_size` examples; a rank takes its
slice of them and cuts it into micro-batches. Nothing has to be saved to resume: the step is the position.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from ..errors import DataError
from .shards import Windows, find_shards


class MicroBatch(NamedTuple):
    inputs: Tensor  # (micro-batch, seq_len) int64
    targets: Tensor  # the same, -100 where no loss is taken


class TokenDataset:
    """A folder of shards as training batches and a fixed validation set.

    Raises DataError when the folder, a shard or the number of tokens does not do for the run.
    """

    def __init__(self, cfg: DictConfig, vocab_size: int, seq_len: int, seed: int):
        self.cfg, self.vocab_size, self.seq_len, self.seed = cfg, vocab_size, seq_len, seed
        folder = Path(cfg.path)
        self.train = Windows(find_shards(folder, "train"), seq_len, cfg.layout, cfg.pad_id)
        self.val = Windows(find_shards(folder, "val"), seq_len, cfg.layout, cfg.pad_id)
        self.manifest = self._read_manifest(folder / "manifest.json")
        self._epoch: tuple[int, np.ndarray] | None = None
        for windows in (self.train, self.val):
            windows.require_below(vocab_size)
        if cfg.val_tokens > len(self.val) * seq_len:
            raise DataError(
                f"dataset.val_tokens={cfg.val_tokens}, but {folder} holds {len(self.val) * seq_len} validation tokens "
                f"in whole examples; type dataset.val_tokens={len(self.val) * seq_len}"
            )

    def require(self, steps: int, batch_size: int) -> None:
        """Raise DataError when the run needs more tokens than max_epochs passes hold."""
        need, have = steps * batch_size, len(self.train) * self.cfg.max_epochs
        if need > have:
            epochs = -(-need // len(self.train))
            tokens = len(self.train) * self.seq_len
            raise DataError(
                f"the run needs {need * self.seq_len} training tokens, {self.cfg.path} holds {tokens} "
                f"x dataset.max_epochs={self.cfg.max_epochs}; "
                f"type steps={have // batch_size} or dataset.max_epochs={epochs}"
            )

    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per target of the validation set, where a manifest tells the tokens' bytes."""
        if "token_bytes" not in self.manifest:
            return None
        lengths = torch.tensor(self.manifest["token_bytes"])
        targets = torch.cat([t.flatten() for _, t in self.validation(self.cfg.val_tokens, 0, 1, 64)])
        targets = targets[targets != -100]
        return lengths[targets].sum().item() / targets.numel()

    def batch(self, step: int, batch_size: int, rank: int, ranks: int, micro_batch_size: int) -> list[MicroBatch]:
        """This rank's micro-batches of the global batch of a step (counted from 0)."""
        share = batch_size // ranks
        first = step * batch_size + rank * share
        return self._read(self.train, self._order(np.arange(first, first + share)), micro_batch_size)

    def validation(self, tokens: int, rank: int, ranks: int, micro_batch_size: int) -> Iterator[MicroBatch]:
        """This rank's share of the first `tokens` validation tokens (in whole examples)."""
        mine = np.arange(rank, tokens // self.seq_len, ranks)
        for start in range(0, len(mine), micro_batch_size):
            yield from self._read(self.val, mine[start : start + micro_batch_size], micro_batch_size)

    def _read_manifest(self, path: Path) -> dict[str, Any]:
        manifest = json.loads(path.read_text()) if path.exists() else {}
        if manifest.get("tokenizer", self.cfg.tokenizer) != self.cfg.tokenizer:
            raise DataError(
                f"{path.parent} holds tokens of {manifest['tokenizer']}, dataset {self.cfg.name} is of "
                f"{self.cfg.tokenizer}; type dataset.path=FOLDER"
            )
        return manifest

    def _order(self, positions: np.ndarray) -> np.ndarray:
        """The examples at these positions of the global order: epoch after epoch, each permuted by the seed."""
        epochs, indices = np.divmod(positions, len(self.train))
        if not self.cfg.shuffle:
            return indices
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._permutation(int(epoch))[indices[here]]
        return indices

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._epoch = (epoch, generator.permutation(len(self.train)))
        return self._epoch[1]

    def _read(self, windows: Windows, indices: np.ndarray, micro_batch_size: int) -> list[MicroBatch]:
        inputs, targets = (torch.from_numpy(a) for a in windows.read(indices, self.vocab_size))
        return [
            MicroBatch(i, t)
            for i, t in zip(inputs.split(micro_batch_size), targets.split(micro_batch_size), strict=True)
        ]


def prefetch(
    read: Callable[[int], list[MicroBatch]], steps: range, device: torch.device, threads: int = 1
) -> Iterator[list[MicroBatch]]:
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
