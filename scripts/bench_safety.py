"""What it costs never to lose a run.

    python scripts/bench.py safety [model=tiny] [micro_batch_size=4] [seq_len=256] [steps=2] [repeats=20]
                                   [folder=FOLDER] [output=FILE]

A training step of EMA-Nesterov around Muon, with and without

    check     the gradient's norm and the agreement of all ranks that loss and norm are finite and that nobody
              asked to stop: one all-reduce and one read of the device
    save      a checkpoint, written before training goes on (sync) or beside it (async): seconds that it costs
              the training, MB a second with fsync and checksums, and its share at one in 1,000 steps

and the size of a checkpoint of Llama 1B, with the seconds that it takes at that rate: the least time that must
be left between a signal and the kill.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from ema_nesterov.cli import composed, parse
from ema_nesterov.data.loader import MicroBatch
from ema_nesterov.optim.build import build_optimizer
from ema_nesterov.training.checkpoint import Saver
from ema_nesterov.training.distributed import ranks
from ema_nesterov.training.execution import autocast, model_on
from ema_nesterov.training.health import examine
from ema_nesterov.training.loop import forward_backward, gradient_norm
from ema_nesterov.training.memory import checkpoint_bytes

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EVERY = 1000  # steps from checkpoint to checkpoint


@dataclass
class Arguments:
    model: str = "tiny"
    micro_batch_size: int = 4
    seq_len: int = 256
    steps: int = 2  # of a turn
    repeats: int = 20
    folder: str | None = None  # where checkpoints are written for a while
    output: str | None = None  # a JSON file


def compose(model: str, seq_len: int) -> DictConfig:
    return composed(CONFIGS, [f"model={model}", "optimizer=muon", "lookahead=ema_nesterov", f"seq_len={seq_len}"])


def run(arguments: list[str]) -> None:
    args = parse(Arguments, arguments)
    cfg = compose(args.model, args.seq_len)
    with ranks("auto") as group, TemporaryDirectory(dir=args.folder) as folder:
        if not group.is_first:
            folder = ""
        result = measure(cfg, args, group, Path(folder))
    if group.is_first:
        show(result, args)


def measure(cfg: DictConfig, args: Arguments, group: Any, folder: Path) -> dict[str, float]:
    device = group.device
    model = model_on(cfg, device)
    optimizer = build_optimizer(model, cfg, group.group)
    replica: Any = torch.nn.parallel.DistributedDataParallel(model) if group.size > 1 else model
    tokens = torch.randint(cfg.model.vocab_size, (args.micro_batch_size, args.seq_len), device=device)
    batch = [MicroBatch(tokens, tokens.roll(-1, 1))]
    precision = autocast(cfg, device)

    def train(check: bool) -> None:
        for _ in range(args.steps):
            loss = forward_backward(replica, batch, group, precision)
            if check and not examine(loss, gradient_norm(model, 0.0), False, group).finite:
                raise AssertionError("the benchmark diverged")
            optimizer.step()
            optimizer.zero_grad()

    def seconds(work: Callable[[], Any]) -> float:
        wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext
        wait()
        begun = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - begun

    train(True)
    plain, checked = [], []
    for _ in range(args.repeats):  # in turns, for the machine's speed moves
        plain.append(seconds(lambda: train(False)) / args.steps)
        checked.append(seconds(lambda: train(True)) / args.steps)
    step, with_check = statistics.median(plain), statistics.median(checked)
    differences = [b - a for a, b in zip(plain, checked, strict=True)]
    result = {"step_ms": step * 1e3, "check_ms": statistics.median(differences) * 1e3}
    result["check_share"] = result["check_ms"] / 1e3 / with_check
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    for name, asynchronous in (("sync", False), ("async", True)) if group.is_first else ():
        saver, costs, writes = Saver(folder / name, 1, asynchronous=asynchronous), [], []
        for i in range(args.repeats + 1):
            alone = seconds(lambda: train(False)) if group.size == 1 else 0.0
            begun = time.perf_counter()

            def work(i: int = i, saver: Saver = saver) -> None:
                saver.save(i, state)
                if group.size == 1:
                    train(False)

            costs.append(seconds(work) - alone)
            saver.wait()
            writes.append(time.perf_counter() - begun)
        saver.close()
        assert saver.failed is None
        (path,) = (folder / name).glob("step_*/tensors.safetensors")
        result[f"{name}_s"] = statistics.median(costs[1:])  # the first pins its copies
        result[f"{name}_share"] = result[f"{name}_s"] / (EVERY * with_check)
        if not asynchronous:
            result |= {"checkpoint_mb": path.stat().st_size / 1e6}
            result["mb_per_s"] = result["checkpoint_mb"] / result["sync_s"]
    result["llama_1b_gb"] = checkpoint_bytes(compose("llama_1b", 256)) / 1e9
    return result


def show(r: dict[str, float], args: Arguments) -> None:
    console = Console(highlight=False, width=120)
    console.print(
        f"{args.model}: a step of {args.micro_batch_size} x {args.seq_len} tokens takes {r['step_ms']:.1f} ms, the "
        f"check {r['check_ms']:.2f} ms of it ({r['check_share']:.1%})"
    )
    for name in ("sync", "async"):
        console.print(
            f"a checkpoint of {r['checkpoint_mb']:.0f} MB, {name}: costs the training {r[name + '_s']:.2f} s, "
            f"{r[name + '_share']:.2%} at one in {EVERY} steps"
        )
    console.print(
        f"{r['mb_per_s']:.0f} MB/s with fsync and checksums: Llama 1B's {r['llama_1b_gb']:.1f} GB take "
        f"{r['llama_1b_gb'] * 1e3 / r['mb_per_s']:.0f} s there"
    )
    if args.output:
        Path(args.output).write_text(json.dumps(r, indent=1) + "\n", encoding="utf-8")
