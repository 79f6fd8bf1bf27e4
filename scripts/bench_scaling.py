"""What ranks send each other in a step, and what that leaves of their speed.

    python scripts/bench.py scaling [experiment=...] [KEY=VALUE ...] [ranks=[8,64,512]] [mfu=0.5]
    torchrun --standalone --nproc-per-node=2 scripts/bench.py scaling ...      counts what the ranks do send (Linux)

KEY=VALUE is what train.py takes. In a step each of n ranks sends

    gradients      2 (n - 1) / n x their bytes: one all-reduce in buckets, begun while the backward pass of the last
                   micro-batch goes on, and done a bucket (25 MB) after it
    new weights    (n - 1) x the bytes of the rank that owns most: each steps its share of the matrices, and one
                   all-gather hands them round, after the step
    the rest       the counts of targets, and the check of loss, stop and norm: some tens of bytes, three times

The time of a collective is its bytes over the bandwidth of a rank, and `latency` for each of its 2 (n - 1) or (n - 1)
messages, of which a tree needs log2 n. Within a node of `node` ranks the bandwidth is `nvlink`; beyond it is the least
of that and of what the network cards of a node carry together, `network` for each rank. Both are in GB/s one way, from
datasheets (NVLink 4: 450; one 400 Gb/s card a GPU: 50), and nothing here was measured on several GPUs. The arithmetic
takes mfu of the datasheet's peak, or of rate=TOKENS_PER_SECOND of one GPU; the matrices' step is not counted in it.

    efficiency     the time that the arithmetic alone would take, over that of the step
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from bench_train import setting, started
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from ema_nesterov.cli import composed, key_of, parse
from ema_nesterov.errors import ConfigError
from ema_nesterov.models import build_model
from ema_nesterov.optim.build import parameter_roles
from ema_nesterov.training.distributed import Ranks, ranks, world_size
from ema_nesterov.training.speed import flops_per_token

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BUCKET = 25 * 2**20  # bytes, of DDP
PEAK = 989e12


@dataclass
class Arguments:
    ranks: list[int] = field(default_factory=lambda: [1, 8, 64, 512])
    mfu: float = 0.5
    rate: float | None = None  # tokens/s of one GPU
    node: int = 8
    nvlink: float = 450.0
    network: float = 50.0
    latency: float = 10e-6  # s, of a message


@dataclass
class Sent:
    """Bytes that a rank sends in a step."""

    gradients: float
    weights: float
    rest: float

    @property
    def all(self) -> float:
        return self.gradients + self.weights + self.rest


def sent(model: nn.Module, cfg: DictConfig, n: int) -> Sent:
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    check = 2 * (n - 1) / n * 4 * ((n + 2) + 1)
    return Sent(2 * (n - 1) / n * gradients, (n - 1) * largest_share(model, cfg, n), check)


def largest_share(model: nn.Module, cfg: DictConfig, n: int) -> float:
    """Bytes of the parameters that the rank with most of them steps for all."""
    if cfg.optimizer.name == "adamw" or "_target_" in cfg.optimizer or n == 1:
        return 0.0
    roles = parameter_roles(model)
    shared = [p for role, params in roles.items() if cfg.optimizer.name == "soap" or role == "matrix" for p in params]
    loads = [0] * n
    for p in sorted(shared, key=torch.Tensor.numel, reverse=True):
        loads[loads.index(min(loads))] += p.numel()
    return 4.0 * max(loads)


@dataclass
class Prediction:
    compute: float  # s of a step
    backward: float  # s of the last micro-batch's
    gradients: float
    weights: float

    @property
    def step(self) -> float:
        hidden = min(self.gradients, self.backward)
        return self.compute + self.gradients - hidden + self.weights

    @property
    def efficiency(self) -> float:
        return self.compute / self.step


def predict(model: nn.Module, cfg: DictConfig, n: int, a: Arguments) -> Prediction:
    d = cfg.model
    per_token = flops_per_token(model, d.get("layers", 0), d.get("width", 0), cfg.seq_len)
    rate = a.rate if a.rate is not None else a.mfu * PEAK / per_token
    rows = cfg.batch_size / n
    micro = min(rows, cfg.micro_batch_size or 64)
    compute = rows * cfg.seq_len / rate
    moved, width = sent(model, cfg, n), (min(a.nvlink, a.network * a.node) if n > a.node else a.nvlink) * 1e9
    hops = math.ceil(math.log2(n)) * a.latency if n > 1 else 0.0
    buckets = math.ceil(moved.gradients / (2 * BUCKET)) if n > 1 else 0
    # the last bucket is full only when the backward pass is over
    backward = max(0.0, 2 / 3 * compute * micro / rows - (2 * BUCKET / width if n > 1 else 0.0))
    return Prediction(compute, backward, moved.gradients / width + 2 * buckets * hops, moved.weights / width + hops)


def bytes_sent() -> int:
    """By this machine to itself, since it was started."""
    for line in Path("/proc/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, counters = line.strip().partition(":")
        if name == "lo":
            return int(counters.split()[8])
    raise ConfigError("there is no loopback interface to count on")


def measure(overrides: list[str], group: Ranks, steps: int = 10) -> tuple[float, float]:
    """Bytes that a rank sends in a step, and the seconds of it."""
    with TemporaryDirectory() as folder:
        s = setting("", overrides, group, Path(folder))
        with started([s], group, warmup=3) as [(runner, _)]:
            group.barrier()
            before = bytes_sent()
            seconds = runner.take(steps)
            group.barrier()
            return (bytes_sent() - before) / group.size / steps, seconds / steps


def run(arguments: list[str]) -> None:
    own = [a for a in arguments if key_of(a) in {f.name for f in fields(Arguments)}]
    args, overrides = parse(Arguments, own), [a for a in arguments if a not in own]
    cfg = composed(CONFIGS, overrides)
    with torch.device("meta"):
        model = build_model(cfg.model, cfg.plugins)
    console = Console(width=120, highlight=False)
    if world_size() > 1:
        with ranks(cfg.trainer.device) as group:
            measured, seconds = measure(overrides, group)
            expected = sent(model, cfg, group.size)
            group.barrier()
            if group.is_first:
                console.print(
                    f"each of {group.size} ranks sends {measured / 1e6:.2f} MB in a step of {1000 * seconds:.0f} ms; "
                    f"by the model {expected.all / 1e6:.2f} MB (gradients {expected.gradients / 1e6:.2f}, new weights "
                    f"{expected.weights / 1e6:.2f}): measured / model = {measured / expected.all:.3f}"
                )
        return
    table = Table(box=SIMPLE_HEAD)
    console.print("MB that a rank sends in a step, and ms of a step by the model")
    columns = ("GPUs", "MB", "gradients", "weights", "arithmetic", "sum", "hidden", "weights", "step")
    for column in (*columns, "efficiency", "tokens/s"):
        table.add_column(column, justify="right")
    for n in args.ranks:
        if cfg.batch_size % n:
            raise ConfigError(f"batch_size={cfg.batch_size} does not divide over {n} GPUs; type another ranks=[...]")
        moved, p = sent(model, cfg, n), predict(model, cfg, n, args)
        megabytes = [f"{x / 1e6:.1f}" for x in (moved.all, moved.gradients, moved.weights)]
        times = [p.compute, p.gradients, min(p.gradients, p.backward), p.weights, p.step]
        rate = cfg.batch_size * cfg.seq_len / p.step
        table.add_row(str(n), *megabytes, *(f"{1000 * x:.2f}" for x in times), f"{p.efficiency:.1%}", f"{rate:,.0f}")
    console.print(table)
