"""One run: what happens around the training loop."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ..config import check
from ..data.loader import TokenDataset
from ..data.preparation.recipes import prepare_dataset, shards_folder
from ..data.stream import StreamDataset
from ..errors import ConfigError
from ..plugins import instantiate
from .checkpoint import list_checkpoints, step_of, whole
from .distributed import Ranks, lost_rank, ranks, world_size
from .execution import determinism
from .folder import DIVERGED, FAILED, FINISHED, FULL, PREEMPTED, begin, claimed, read_status, status
from .fork import Fork, open_fork
from .identity import run_folder
from .logs import Silence, open_logs
from .loop import Diverged, Preempted, train
from .stop import stop_requests


def run(cfg: DictConfig) -> int:
    """Train the composed config, or go on where its folder stands; returns the exit code.

    Raises UserError before anything is written when the config or the data cannot be run.
    """
    check(cfg)
    folder = run_folder(cfg)
    micro_batch_size = split_batch(cfg, world_size())
    with (
        closing(open_dataset(cfg, micro_batch_size, world_size())) as dataset,
        ranks(cfg.trainer.device) as group,
        determinism(cfg, group.device),
    ):
        if is_finished(folder, group):
            return FINISHED
        begins = not list_checkpoints(folder / "checkpoints")  # once it has its own, that of the other run may go
        fork = open_fork(cfg) if cfg.fork_from is not None and begins else None
        with (
            claimed(folder) if group.is_first else nullcontext(),
            stop_requests(folder / "STOP" if group.is_first else None) as stop,
        ):
            if is_finished(folder, group):  # by a process that was here just before
                return FINISHED
            checkpoint, warnings = choose_checkpoint(folder, group)
            step = step_of(checkpoint) if checkpoint else fork.step if fork else 0
            if group.is_first:
                warnings += begin(cfg, folder, step, group.hardware)
            group.barrier()
            with (
                open_logs(cfg, folder, step if checkpoint else 0) if group.is_first else silence() as logs,
                status(folder, group.is_first, step if checkpoint else None) as state,
            ):
                if fork and not checkpoint:
                    for line in fork.metrics():
                        logs.repeat(line)
                logs.say(describe(cfg, folder, group, micro_batch_size, step, fork))
                for warning in warnings:
                    logs.warn(warning)
                try:
                    train(cfg, folder, dataset, group, micro_batch_size, checkpoint, fork, logs, state, stop)
                    state.update(FINISHED, step=cfg.steps)
                except Preempted as e:
                    state.update(PREEMPTED, step=e.step, message=f"stopped by {stop.asked or 'another rank'}")
                    logs.say(f"preempted at step {e.step}; type the same command to go on")
                except Diverged as e:
                    state.update(DIVERGED, step=e.step, message=str(e), ranks=e.ranks, data=e.data)
                    logs.say(f"diverged: {e}")
                except torch.OutOfMemoryError:
                    fits = [m for m in range(1, micro_batch_size // 2 + 1) if micro_batch_size % m == 0]
                    advice = f"micro_batch_size={fits[-1]}" if fits else "a smaller seq_len or model"
                    fail(state, f"out of memory with micro_batch_size={micro_batch_size}; type {advice}")
                except OSError as e:
                    if e.errno not in FULL:
                        raise
                    fail(state, f"{folder}: {e.strerror}; make room, then type the same command to go on")
                except RuntimeError as e:
                    if not lost_rank(e):
                        raise
                    fail(state, "another rank ended; its own message tells why; type the same command to go on")
        gc.unfreeze()
        if stop.asked and state.exit_code == PREEMPTED and group.is_first:
            print(f"{time.monotonic() - stop.at:.1f} s from {stop.asked} to the end", flush=True)
        assert state.exit_code is not None
        return state.exit_code


def is_finished(folder: Path, group: Ranks) -> bool:
    """As the first rank sees it, and says."""
    finished = read_status(folder).get("status") == "finished"
    if finished and group.is_first:
        print(f"{folder} is finished already; delete it, or change the seed, to train again")
    return group.gather(finished)[0]


def fail(state: Any, message: str) -> None:
    """One line instead of a traceback, from whichever rank it happened to."""
    state.writes = True
    state.update(FAILED, message=message)
    print(f"error: {message}", file=sys.stderr, flush=True)


def choose_checkpoint(folder: Path, group: Ranks) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose checksums hold, as the first rank finds it, and a line for each that it passed over.

    Raises ConfigError when there are some and none is whole.
    """
    found: list[Any] = [None, []]
    if group.is_first:
        checkpoints = list_checkpoints(folder / "checkpoints")
        found[0] = next((path for path in reversed(checkpoints) if whole(path)), None)
        passed = [path for path in checkpoints if found[0] is None or step_of(path) > step_of(found[0])]
        found[1] = [f"{path} is damaged; going on from the one before it" for path in reversed(passed)]
        if passed and found[0] is None:
            raise ConfigError(
                f"{', '.join(path.name for path in passed)} in {folder / 'checkpoints'} are damaged and there is no "
                f"other; delete {folder} to begin anew"
            )
    path, warnings = group.gather(found)[0]
    return path, warnings


def split_batch(cfg: DictConfig, size: int) -> int:
    """The micro-batch of a rank, in sequences. Raises ConfigError when the batch does not divide."""
    if cfg.batch_size % size:
        near = max(size, round(cfg.batch_size / size) * size)
        raise ConfigError(f"batch_size={cfg.batch_size} does not divide over {size} ranks; type batch_size={near}")
    share = cfg.batch_size // size
    if cfg.micro_batch_size is None:
        return max(m for m in range(1, min(share, 64) + 1) if share % m == 0)
    micro = min(cfg.micro_batch_size, share)
    if share % micro:
        near = max(m for m in range(1, micro + 1) if share % m == 0)
        raise ConfigError(
            f"micro_batch_size={micro} does not divide the {share} sequences that each of {size} ranks gets of "
            f"batch_size={cfg.batch_size}; type micro_batch_size={near}"
        )
    return micro


def open_dataset(cfg: DictConfig, micro_batch_size: int, ranks: int) -> Any:
    """The dataset of the config, prepared first where it can be; raises DataError when it does not do."""
    d = cfg.dataset
    vocab_size = cfg.model.get("vocab_size", 2**16)
    if "_target_" in d:
        dataset = instantiate(d, list(cfg.plugins), vocab_size=vocab_size, seq_len=cfg.seq_len, seed=cfg.seed)
    elif "buffer" in d:
        dataset = StreamDataset(d, vocab_size, cfg.seed)
    else:
        if d.prepare == "sample" and not shards_folder(d).exists():
            prepare_dataset(d)
        dataset = TokenDataset(d, vocab_size, cfg.seq_len, cfg.seed)
    dataset.require(cfg.steps, cfg.batch_size, micro_batch_size, ranks)
    return dataset


def describe(
    cfg: DictConfig, folder: Path, group: Ranks, micro_batch_size: int, step: int, fork: Fork | None = None
) -> str:
    micro_steps = cfg.batch_size // (micro_batch_size * group.size)
    begins = "training" if not step else f"{'forking' if fork and step == fork.step else 'resuming'} at step {step}"
    return (
        f"{begins}: {folder}\n"
        f"{group.size} x {group.device.type}, {cfg.steps} steps of {cfg.batch_size} x {cfg.seq_len} tokens "
        f"({micro_steps} micro-batches of {micro_batch_size} per rank)"
    )


@contextmanager
def silence() -> Iterator[Silence]:
    yield Silence()
