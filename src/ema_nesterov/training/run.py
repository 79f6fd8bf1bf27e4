"""One run: its folder, its status, and what happens around the training loop."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ..config import check
from ..data.loader import TokenDataset
from ..data.preparation.recipes import prepare_dataset, shards_folder
from ..data.stream import StreamDataset
from ..errors import ConfigError, UserError
from ..plugins import instantiate
from .checkpoint import list_checkpoints
from .distributed import Ranks, ranks, world_size
from .identity import run_hash
from .logs import Silence, open_logs
from .loop import Diverged, train

FINISHED, FAILED, BAD_INPUT, DIVERGED = 0, 1, 2, 86  # exit codes
STATUS = {FINISHED: "finished", DIVERGED: "diverged", FAILED: "failed"}


def run(cfg: DictConfig) -> int:
    """Train the composed config, or go on where its folder stands; returns the exit code.

    Raises UserError before anything is written when the config or the data cannot be run.
    """
    check(cfg)
    identity = f"{cfg.name}-{run_hash(cfg)}"
    folder = Path(cfg.runs_dir) / identity / f"seed{cfg.seed}"
    micro_batch_size = split_batch(cfg, world_size())
    with (
        closing(open_dataset(cfg, micro_batch_size, world_size())) as dataset,
        ranks(cfg.trainer.device) as group,
    ):
        if read_status(folder).get("status") == "finished":
            if group.is_first:
                print(f"{folder} is finished already; delete it, or change the seed, to train again")
            return FINISHED
        if group.is_first:
            begin(cfg, folder)
        group.barrier()
        checkpoints = list_checkpoints(folder / "checkpoints")
        step = int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0
        with (
            status(folder, group, resumed_from=step if checkpoints else None) as outcome,
            open_logs(cfg, folder, identity, step) if group.is_first else silence() as logs,
        ):
            logs.say(describe(cfg, folder, group, micro_batch_size, step))
            try:
                train(cfg, folder, dataset, group, micro_batch_size, checkpoints, logs)
            except Diverged as e:
                outcome.update(exit_code=DIVERGED, message=str(e))
                logs.say(f"diverged: {e}")
            except torch.OutOfMemoryError:
                fits = [m for m in range(1, micro_batch_size // 2 + 1) if micro_batch_size % m == 0]
                advice = f"micro_batch_size={fits[-1]}" if fits else "a smaller seq_len or model"
                message = f"out of memory with micro_batch_size={micro_batch_size}; type {advice}"
                outcome.update(exit_code=FAILED, message=message)
                print(f"error: {message}", file=sys.stderr, flush=True)
            finally:
                outcome["step"] = max(outcome["step"], logs.step)
        return outcome["exit_code"]


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


def describe(cfg: DictConfig, folder: Path, group: Ranks, micro_batch_size: int, step: int) -> str:
    micro_steps = cfg.batch_size // (micro_batch_size * group.size)
    return (
        f"{'resuming at step ' + str(step) if step else 'training'}: {folder}\n"
        f"{group.size} x {group.device.type}, {cfg.steps} steps of {cfg.batch_size} x {cfg.seq_len} tokens "
        f"({micro_steps} micro-batches of {micro_batch_size} per rank)"
    )


# --- the folder -----------------------------------------------------------------------------------


def begin(cfg: DictConfig, folder: Path) -> None:
    """Make the folder and write config.yaml. Raises ConfigError when that is not possible."""
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        resolved = OmegaConf.to_yaml(cfg, resolve=True)
        header = "".join(f"# {key}: {value}\n" for key, value in provenance().items())
        write_atomically(folder / "config.yaml", header + resolved)
    except OSError as e:
        raise ConfigError(f"cannot write run folder {folder}: {e.strerror}; type runs_dir=FOLDER") from None


def provenance() -> dict[str, str]:
    """The git revision of this code and the versions of the packages that decide the numbers."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        revision = ""
    packages = {}
    for name in ("ema-nesterov", "torch", "numpy", "transformers", "tokenizers", "omegaconf"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {"git": revision or "unknown", "python": sys.version.split()[0], **packages}


def write_atomically(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text)
    aside.rename(path)


def read_status(folder: Path) -> dict[str, Any]:
    path = folder / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


@contextmanager
def status(folder: Path, group: Ranks, resumed_from: int | None) -> Iterator[dict[str, Any]]:
    """Keep status.json true: running now, and what came out at the end, also when the run raises."""
    outcome: dict[str, Any] = {"step": resumed_from or 0, "message": "", "exit_code": FINISHED}

    def write(name: str, **values: Any) -> None:
        state = {"status": name, **outcome, **values, "resumed_from": resumed_from}
        write_atomically(folder / "status.json", json.dumps(state) + "\n")

    if group.is_first:
        write("running", exit_code=None)
    try:
        yield outcome
    except UserError as e:
        write("failed", message=str(e), exit_code=BAD_INPUT)
        raise
    except BaseException as e:
        write("failed", message=f"{type(e).__name__}: {e}".removesuffix(": "), exit_code=FAILED)
        raise
    if group.is_first or outcome["exit_code"] == FAILED:
        write(STATUS[outcome["exit_code"]])


@contextmanager
def silence() -> Iterator[Silence]:
    yield Silence()
