"""How fast a run trains, and where its time goes.

    python scripts/bench.py train [experiment=...] [KEY=VALUE ...] [turns=4] [timed=10] [profile=FOLDER]
    python scripts/bench.py compare a="KEY=VALUE ..." b=released [KEY=VALUE ...]
    torchrun --standalone --nproc-per-node=8 scripts/bench.py train ...

KEY=VALUE is what train.py takes. The training loop itself runs, with its reading, checking and logging of every
step, but neither evaluates nor saves; without the dataset it reads random tokens. `timed` steps are a turn, after
`warmup` steps, and a figure is the median of `turns` turns. `compare` lets two settings take turns, A B A B, in
one process: a and b add overrides to the common ones, or name a peer (scripts/peers.py): released, the authors'
trainer in plain PyTorch; eager, the same model and optimizer in a bare loop; trainer, under transformers' Trainer.

    MFU       (6 x weights of matrix products + 12 layers width seq_len) x tokens/s, over the peak of the datasheet
              and over what a large product reaches here
    parts     each part of a step alone, waiting for the device; their sum may exceed the step where they overlap
    profile   a folder for a trace of three steps, for chrome://tracing or Perfetto

record=true adds the figures to docs/benchmarks.json and writes them into docs/benchmarks.md.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from bench_optimizers import Still
from floors import measure_machine, ns_dtype, timed
from omegaconf import DictConfig, OmegaConf, open_dict
from peers import PEERS
from records import Record, about, write
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from runner import Runner

import ema_nesterov.config  # noqa: F401  (registers the schemas)
from ema_nesterov.cli import composed, key_of, parse
from ema_nesterov.data.loader import TokenDataset
from ema_nesterov.data.preparation.recipes import shards_folder
from ema_nesterov.data.shards import write_shard
from ema_nesterov.errors import ConfigError
from ema_nesterov.lookahead import Wrapper
from ema_nesterov.models import build_model
from ema_nesterov.optim.build import build_optimizer, wrap
from ema_nesterov.training.distributed import Ranks, ranks
from ema_nesterov.training.execution import autocast, compiles, determinism, model_on
from ema_nesterov.training.health import examine
from ema_nesterov.training.logs import Logs
from ema_nesterov.training.loop import forward_backward, gradient_norm, train
from ema_nesterov.training.run import split_batch
from ema_nesterov.training.speed import PEAK_FLOPS, flops_per_token

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
QUIET = ("eval_every=0", "probe_every=0", "noise_every=0", "checkpoint_every=0", "log_every=1", "logger=local")


@dataclass
class Arguments:
    a: str = ""  # nothing but the common overrides
    b: str = "released"
    warmup: int = 5  # steps before the first turn
    timed: int = 10  # steps of a turn
    turns: int = 4
    profile: str | None = None  # a folder
    record: bool = False


# --- the loop, timed as it is ----------------------------------------------------------------------


class Lines(Logs):
    """The logs of a run, whose every line ends a step."""

    done: Callable[[], None]

    def write(self, line: dict[str, Any]) -> None:
        super().write(line)
        self.done()

    def say(self, text: str) -> None:
        pass


class Ignored:
    """Status and stop requests of a run that has neither."""

    def update(self, *args: Any, **kwargs: Any) -> None: ...

    def wanted(self) -> bool:
        return False


def loop(cfg: DictConfig, dataset: Any, ranks: Ranks, micro: int, folder: Path, done: Callable[[], None]) -> None:
    """The training loop itself. Every rank logs, into a file of its own."""
    with open(folder / "metrics.jsonl", "ab", buffering=0) as file:
        logs = Lines(file, None, cfg.steps)
        logs.done = done
        nothing: Any = Ignored()
        train(cfg, folder, dataset, ranks, micro, None, None, logs, nothing, nothing)


# --- settings -------------------------------------------------------------------------------------


@dataclass
class Setting:
    name: str
    cfg: DictConfig
    dataset: TokenDataset
    micro: int
    peer: str | None = None

    def runner(self, ranks: Ranks, folder: Path) -> Runner:
        if self.peer is not None:
            body = partial(PEERS[self.peer], self.cfg, self.read(ranks), ranks)
        else:
            folder.mkdir()
            body = partial(loop, self.cfg, self.dataset, ranks, self.micro, folder)
        return Runner(body, ranks.device)

    def read(self, ranks: Ranks) -> Callable[[int], Any]:
        return lambda step: self.dataset.batch(step, self.cfg.batch_size, ranks.rank, ranks.size, self.micro)

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks."""
        return self.cfg.batch_size * self.cfg.seq_len


def setting(name: str, overrides: list[str], ranks: Ranks, folder: Path) -> Setting:
    """Raises ConfigError for what cannot be run."""
    peer = name if name in PEERS else None
    extra = [] if peer else name.split()
    cfg = composed(CONFIGS, [*overrides, *QUIET, *extra])
    micro = split_batch(cfg, ranks.size)
    with open_dict(cfg):
        cfg.steps = 10**6 if cfg.schedule.decay != "power" else cfg.steps
    return Setting(name or "as configured", cfg, open_tokens(cfg, folder), micro, peer)


def open_tokens(cfg: DictConfig, folder: Path) -> TokenDataset:
    """The dataset of a config, or random tokens in the same form where it is not there."""
    d = cfg.dataset.copy()
    if "buffer" in d or "_target_" in d:
        raise ConfigError(
            "streams and datasets of your own are not timed here; type dataset=sample, or another of shards"
        )
    OmegaConf.update(d, "max_epochs", 10**6)
    if not shards_folder(d).exists():
        d.path, d.output, d.prepare = str(folder / "random"), None, None
        d.val_tokens = d.probe_tokens = cfg.seq_len
        if not Path(d.path).exists():
            write_random(Path(d.path), cfg)
    return TokenDataset(d, cfg.model.vocab_size, cfg.seq_len, cfg.seed)


def write_random(path: Path, cfg: DictConfig) -> None:
    path.mkdir()
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, 2**24, dtype=np.uint16)
    for split, part in (("train", tokens), ("val", tokens[: 2 * cfg.seq_len + 2])):
        write_shard(path / f"random_{split}_000000.bin", part, cfg.model.vocab_size)


@contextmanager
def started(settings: list[Setting], ranks: Ranks, warmup: int) -> Iterator[list[tuple[Runner, float]]]:
    """A runner of each after its first steps, and the seconds until the first was done."""
    with ExitStack() as stack:
        stack.enter_context(determinism(settings[0].cfg, ranks.device))
        folder = Path(stack.enter_context(TemporaryDirectory()))
        runners = []
        for i, s in enumerate(settings):
            runner = s.runner(ranks, folder / str(i))
            stack.callback(runner.close)
            first = runner.take(1)
            runner.take(max(1, warmup - 1))
            runners.append((runner, first))
        yield runners


# --- where the time goes --------------------------------------------------------------------------


def parts(s: Setting, ranks: Ranks) -> dict[str, float]:
    """ms that each part of a step takes alone."""
    cfg, device = s.cfg, ranks.device
    model = model_on(cfg, device)
    optimizer = build_optimizer(model, cfg, ranks.group)
    compiled: Any = torch.compile(model, dynamic=False) if compiles(cfg, device) else model
    replica: Any = torch.nn.parallel.DistributedDataParallel(compiled) if ranks.size > 1 else compiled
    precision = autocast(cfg, device)
    batch = [type(b)(*(t.to(device) for t in b)) for b in s.read(ranks)(0)]
    base = optimizer
    while isinstance(base, Wrapper):
        base = base.base

    def forward() -> None:
        for inputs, targets in batch:
            with precision:
                compiled(inputs, targets)

    def whole() -> None:
        model.zero_grad()
        forward_backward(replica, batch, ranks, precision)

    whole()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    loss = torch.zeros((), device=device)
    ms = partial(median_ms, device=device)
    took = {"forward": ms(forward)}
    took["backward"] = ms(whole) - took["forward"]
    if ranks.size > 1:
        took["sum of gradients"] = ms(partial(ranks.sum, gradients))
    took["norm and check"] = ms(lambda: examine(loss, gradient_norm(model, cfg.trainer.grad_clip), False, ranks))
    took["optimizer"] = ms(base.step)
    if isinstance(optimizer, Wrapper):
        around = wrap(Still([p for p in model.parameters() if p.requires_grad]), cfg)
        took["wrapper"] = ms(around.step)
    took["reading"] = ms(partial(s.read(ranks), 1))
    with TemporaryDirectory() as folder, open(Path(folder) / "metrics.jsonl", "ab", buffering=0) as file:
        logs = Lines(file, None, 1)
        line = {"step": 1, "tokens": 1, "time": 0.0, "train/loss": 1.0, "train/grad_norm": 1.0, "optim/lr": 1.0}
        took["logging"] = ms(partial(Logs.write, logs, line))
    return took


def median_ms(work: Callable[[], Any], device: torch.device) -> float:
    for _ in range(3):
        work()
    return statistics.median(timed(work, 1, device) for _ in range(9))


def trace(runner: Runner, folder: Path) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    folder.mkdir(parents=True, exist_ok=True)
    profiler = torch.profiler.profile(activities=activities)
    runner.take(3, profiler)
    profiler.export_chrome_trace(str(folder / "trace.json"))


# --- the commands ---------------------------------------------------------------------------------


def read_arguments(arguments: list[str]) -> tuple[Arguments, list[str]]:
    """The benchmark's own, and what train.py would be given."""
    own = {f.name for f in fields(Arguments)}
    mine = [a for a in arguments if key_of(a) in own]
    args = parse(Arguments, mine)
    for key in ("warmup", "timed", "turns"):
        if getattr(args, key) < 1:
            raise ConfigError(f"{key}={getattr(args, key)} must be at least 1")
    return args, [a for a in arguments if a not in mine]


def run(arguments: list[str]) -> None:
    args, overrides = read_arguments(arguments)
    with TemporaryDirectory() as folder, ranks(device_of(overrides)) as group:
        s = setting("", overrides, group, Path(folder))
        device, console = group.device, Console(width=120, quiet=not group.is_first, highlight=False)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with started([s], group, args.warmup) as [(runner, first)]:
            turns = [1000 * runner.take(args.timed) / args.timed for _ in range(args.turns)]
            memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
            if args.profile and group.is_first:
                trace(runner, Path(args.profile))
            elif args.profile:
                runner.take(3)
        gc.collect()
        torch._dynamo.reset()
        took = parts(s, group)
        machine = measure_machine(device)
        step = statistics.median(turns)
        with torch.device("meta"):
            model = build_model(s.cfg.model, s.cfg.plugins)
        per_token = flops_per_token(model, s.cfg.model.get("layers", 0), s.cfg.model.get("width", 0), s.cfg.seq_len)
        rate = s.tokens / step * 1000
        flops, reached = rate * per_token / group.size, machine.matmul[ns_dtype(device)] * 1000
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
        record = Record("train", about(arguments, group, machine), {
            "ms/step": step, "spread": (max(turns) - min(turns)) / step, "tokens/s": rate,
            "tokens/s per device": rate / group.size, "GFLOP/token": per_token / 1e9,
            "MFU of the datasheet's peak": None if peak is None else flops / peak,
            "MFU of a large product here": flops / reached,
            "peak memory, GB": None if memory is None else memory / 1e9, "s to the first step": first,
            **{f"ms: {part}": value for part, value in took.items()},
        })  # fmt: skip
        console.print(record.heading())
        console.print(show_train(record, step, took))
        if group.is_first and args.record:
            write(record)


def show_train(record: Record, step: float, took: dict[str, float]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for key, value in record.figures.items():
        if value is not None and not key.startswith("ms: "):
            table.add_row(key, show(key, value))
    for part, value in took.items():
        table.add_row(f"  {part}", f"{value:.2f} ms  {value / step:6.1%}")
    table.add_row("  all parts", f"{sum(took.values()):.2f} ms  {sum(took.values()) / step:6.1%}")
    return table


def show(key: str, value: float) -> str:
    if key.startswith("MFU") or key == "spread":
        return f"{value:.1%}"
    return f"{value:,.0f}" if key.startswith("tokens") else f"{value:.2f}"


def run_compare(arguments: list[str]) -> None:
    args, overrides = read_arguments(arguments)
    with TemporaryDirectory() as folder, ranks(device_of(overrides)) as group:
        both = [setting(name, overrides, group, Path(folder)) for name in (args.a, args.b)]
        console = Console(width=120, quiet=not group.is_first, highlight=False)
        with started(both, group, args.warmup) as runners:
            rates: list[list[float]] = [[], []]
            for _ in range(args.turns):
                for s, (runner, _), held in zip(both, runners, rates, strict=True):
                    held.append(s.tokens * args.timed / runner.take(args.timed))
        ratios = [a / b for a, b in zip(*rates, strict=True)]
        figures: dict[str, float | None] = {}
        for letter, s, held, (_, first) in zip("AB", both, rates, runners, strict=True):
            figures[f"{letter}: {s.name}, tokens/s"] = statistics.median(held)
            figures[f"{letter}: s to the first step"] = first
        figures |= {"A over B": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        record = Record("compare", about(arguments, group, measure_machine(group.device)), figures)
        console.print(record.heading())
        table = Table(box=SIMPLE_HEAD, show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for key, value in figures.items():
            table.add_row(key, f"{value:,.0f}" if key.endswith("tokens/s") else f"{value:.2f}")
        console.print(table)
        if group.is_first and args.record:
            write(record)


def device_of(overrides: list[str]) -> str:
    """What the config says, before it is composed: ranks are joined first."""
    return composed(CONFIGS, [*overrides, *QUIET]).trainer.device
