"""The optimizers.

    python scripts/bench.py optimizers [shapes=nanogpt_124m] [layers=N] [parts=[wrappers]] [output=FILE]
    torchrun --standalone --nproc-per-node=8 scripts/bench.py optimizers     the ranks share the matrices' work

shapes: a model of configs/model, or a list; layers: of it (default: all on a GPU, 1 on a CPU). parts: of
wrappers, matrices, soap and record30 (default: all on a GPU, on a CPU all but the last). Contenders take turns,
and each figure is the median over `repeats` turns; a turn is a whole period of what does not happen at every
step. Newton-Schulz runs in bfloat16 on a GPU and in float32 on a CPU.

    ms/step   of the wrapper alone, around a base that does nothing; of the whole step for a base optimizer
    floor     what the bytes or the products alone take, at the copy bandwidth and matmul rate of this machine
    x floor   ms/step over the floor
    B/param   held beyond weights and gradients, in bytes per parameter that the optimizer trains (rank 0's)
    peak      the most that was allocated beyond that during a step (GPU)
    faster    than the peer named, by that factor
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from floors import Machine, measure_machine, ns_dtype, ns_operations, soap_operations, timed
from peers import LoopMuon, TwoBuffers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import AdamW, Optimizer

from ema_nesterov.cli import composed, parse
from ema_nesterov.errors import ConfigError
from ema_nesterov.lookahead import GPA, NALA, SNOO, EMANesterov, Lookahead, Nesterov
from ema_nesterov.models import build_model
from ema_nesterov.optim import SOAP, Aurora, Muon, NorMuon, Record30
from ema_nesterov.optim.build import parameter_roles
from ema_nesterov.training.distributed import Ranks, ranks

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PARTS = ("wrappers", "matrices", "soap", "record30")
K = 5  # steps from sync to sync, of the wrappers that have one


@dataclass
class Arguments:
    shapes: list[str] = field(default_factory=lambda: ["nanogpt_124m", "llama_350m"])
    layers: int | None = None
    parts: list[str] | None = None
    repeats: int = 3
    device: str = "auto"
    max_dim: int = 10_000  # of SOAP
    output: str | None = None  # a JSON file


@dataclass
class Row:
    """One line of the table; times in ms."""

    name: str
    ms: float = 0.0
    floor: float | None = None
    held: float | None = None  # bytes per parameter
    peak: float | None = None
    peer: str | None = None
    faster: float | None = None


@dataclass
class Contender:
    row: Row
    step: Callable[[], Any]
    calls: int  # steps of a turn
    times: list[float] = field(default_factory=list)


class Still(Optimizer):
    """A base that does nothing: a step of its wrapper is the wrapper's own."""

    def __init__(self, params: list[Tensor]):
        super().__init__(params, {"lr": 0.0})

    def step(self, closure: Any = None) -> Any:
        return None


# --- the contenders ---------------------------------------------------------------------------------


def compare(contenders: list[Contender], repeats: int, device: torch.device) -> list[Row]:
    """Every contender's median over turns that they take one after another."""
    for c in contenders:
        c.step()  # starts the state, and compiles what is compiled
        if device.type == "cuda":
            c.step()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            c.step()
            c.row.peak = float(torch.cuda.max_memory_allocated(device) - before)
    for _ in range(repeats):
        for c in contenders:
            c.times.append(timed(c.step, c.calls, device))
    for c in contenders:
        c.row.ms = statistics.median(c.times)
    rows = {c.row.name: c.row for c in contenders}
    for row in rows.values():
        if row.peer is not None:
            row.faster = rows[row.peer].ms / row.ms
    return list(rows.values())


def held_bytes(optimizer: Any) -> int:
    """What an optimizer keeps, wherever it keeps it; every storage once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value not in parameters:
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif isinstance(value, Optimizer):
            visit(vars(value))

    groups = getattr(optimizer, "param_groups", None)
    parameters = set(optimizer.params if groups is None else [p for g in groups for p in g["params"]])
    visit(vars(optimizer))
    return sum(storages.values())


# --- the three parts ------------------------------------------------------------------------------


def wrappers(params: list[Tensor], machine: Machine, repeats: int, device: torch.device) -> list[Row]:
    """Each wrapper around a base that does nothing. `tensors`: how many of the weights' size a step must move."""
    import pytorch_optimizer as peers

    numel = sum(p.numel() for p in params)
    sync = 1 / K
    entries: list[tuple[str, Any, float | None, str | None]] = [
        ("EMANesterov", EMANesterov(Still(params), 0.5, 0.99), 4, "two buffers, literal"),
        ("two buffers, literal", TwoBuffers(params, 0.5, 0.99), 11, None),
        ("Nesterov", Nesterov(Still(params), 0.5), 6, None),
        (f"NALA k={K}", NALA(Still(params), 0.5, K), 6 * sync, None),
        (f"Lookahead k={K}", Lookahead(Still(params), 0.5, K), 4 * sync, "pytorch_optimizer Lookahead"),
        ("pytorch_optimizer Lookahead", peers.Lookahead(Still(params), k=K, alpha=0.5), None, None),
        (f"SNOO k={K}", SNOO(Still(params), 0.8, 0.5, K), 6 * sync, None),
        ("GPA", GPA(Still(params), 0.99, 0.7), 5, "pytorch_optimizer ScheduleFree"),
        ("pytorch_optimizer ScheduleFree", peers.ScheduleFreeWrapper(Still(params), momentum=0.9), None, None),
    ]
    contenders = []
    for name, optimizer, tensors, peer in entries:
        if hasattr(optimizer, "train"):
            optimizer.train()
        floor = None if tensors is None else machine.traffic(tensors, numel)
        contenders.append(Contender(Row(name, floor=floor, peer=peer), optimizer.step, 2 * K))
    rows = compare(contenders, repeats, device)
    return finish(rows, [optimizer for _, optimizer, *_ in entries], numel)


def matrices(params: list[Tensor], split: bool, machine: Machine, repeats: int, ranks: Ranks) -> list[Row]:
    """The optimizers of the hidden matrices, and AdamW on the same."""
    import pytorch_optimizer as peers
    from pytorch_optimizer.optimizer.muon import base as peer_muon

    group, device = ranks.group, ranks.device
    numel, shapes = sum(p.numel() for p in params), [p.shape for p in params]
    polar = ns_operations(shapes, "polar12", split)
    quintic = ns_operations(shapes, "quintic5", split)
    uneven = [s for s in shapes if s[0] != s[1]]
    aurora = ns_operations(shapes, "polar12") + ns_operations(uneven, "polar12")
    loop, theirs = "Muon, matrix by matrix", [dict(params=params, use_muon=True)]
    if device.type == "cpu":  # where products in bfloat16, which the packages know alone, take a minute
        in_float32 = partial(peer_muon.zero_power_via_newton_schulz_5, dtype=torch.float32)
        peer_muon.zero_power_via_newton_schulz_5 = in_float32
    entries: list[tuple[str, Any, float | None, str | None]] = [
        ("Muon", Muon(params, 1e-5, split_qkv=split, group=group), quintic, loop),
        (loop, LoopMuon(params, 1e-5, split), quintic, None),
        ("pytorch_optimizer Muon", peers.Muon(theirs, lr=1e-5), ns_operations(shapes, "quintic5"), None),
        ("Muon, 12 steps", Muon(params, 1e-5, ns="polar12", split_qkv=split, group=group), polar, None),
        ("NorMuon", NorMuon(params, 1e-5, split_qkv=split, group=group), quintic, "pytorch_optimizer NorMuon"),
        ("pytorch_optimizer NorMuon", peers.NorMuon(theirs, lr=1e-5), ns_operations(shapes, "quintic5"), None),
        ("Aurora", Aurora(params, 1e-5, group=group), aurora, None),
        ("AdamW, fused", AdamW(params, 1e-5, fused=True), None, None),
    ]
    if device.type == "cuda":
        entries.append(("torch.optim.Muon", torch.optim.Muon(params, 1e-5), ns_operations(shapes, "quintic5"), None))
    contenders = []
    for name, optimizer, operations, peer in entries:
        floor = machine.traffic(7 if operations is None else 5, numel)
        if operations is not None:
            shares = ranks.size if getattr(optimizer, "group", None) is not None else 1
            floor = max(floor, operations / machine.matmul[ns_dtype(device)] / shares)
        contenders.append(
            Contender(Row(name, floor=floor, peer=peer), optimizer.step, 4 if device.type == "cuda" else 1)
        )
    return finish(compare(contenders, repeats, device), [optimizer for _, optimizer, *_ in entries], numel)


def soap(params: list[Tensor], split: bool, max_dim: int, machine: Machine, repeats: int, ranks: Ranks) -> list[Row]:
    """SOAP on all parameters, over whole periods of 10 steps."""
    import pytorch_optimizer as peers

    period = 10
    options: dict[str, Any] = dict(lr=1e-5, betas=(0.9, 0.95), precondition_frequency=period)
    ours = SOAP(params, split_qkv=split, max_dim=max_dim, group=ranks.group, **options)
    theirs = peers.SOAP(params, weight_decay=0.0, max_precondition_dim=max_dim, **options)
    numel, shares = sum(p.numel() for p in params), 1 if ranks.group is None else ranks.size
    operations = soap_operations([p.shape for p in params], period, max_dim, split)
    floor = max(machine.traffic(7, numel), operations / machine.matmul[torch.float32] / shares)
    contenders = [
        Contender(Row("SOAP", floor=floor, peer="pytorch_optimizer SOAP"), ours.step, period),
        Contender(Row("pytorch_optimizer SOAP"), theirs.step, period),
    ]
    return finish(compare(contenders, repeats, ranks.device), [ours, theirs], numel)


def record30(params: list[Tensor], repeats: int, ranks: Ranks) -> list[Row]:
    """The record-30 stack on the hidden matrices, SOAP on those that are not square, over whole periods."""
    mlp, rest = ([p for p in params if (p.size(0) == p.size(1)) == square] for square in (False, True))
    stack = Record30([{"params": mlp, "soap_blend": 1.0}, {"params": rest}], 1e-5, group=ranks.group)
    rows = compare([Contender(Row("Record30"), stack.step, 10)], repeats, ranks.device)
    return finish(rows, [stack], sum(p.numel() for p in params))


def finish(rows: list[Row], optimizers: list[Any], numel: int) -> list[Row]:
    for row, optimizer in zip(rows, optimizers, strict=True):
        row.held = held_bytes(optimizer) / numel
        row.peak = None if row.peak is None else row.peak / numel
    return rows


def training_step(name: str, device: torch.device) -> float:
    """ms of forward and backward on what one of eight GPUs gets of the paper's batch."""
    batch, length = (128, 256) if name.startswith("llama") else (64, 1024)
    cfg = compose_model(name, None)
    with device:
        model = build_model(cfg, dtype=torch.bfloat16)
        tokens = torch.randint(0, 30_000, (batch, length))
    compiled = torch.compile(model, dynamic=False)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=cfg.autocast):
            loss = compiled(tokens, tokens)
        loss.backward()
        model.zero_grad()

    for _ in range(3):
        step()
    return statistics.median(timed(step, 3, device) for _ in range(3))


# --- the command ----------------------------------------------------------------------------------


def compose_model(name: str, layers: int | None) -> Any:
    if not (CONFIGS / "model" / f"{name}.yaml").exists():
        raise ConfigError(f"no model {name} in configs/model; type shapes=nanogpt_124m")
    return composed(CONFIGS, [f"model={name}", *([] if layers is None else [f"model.layers={layers}"])]).model


def make_parameters(name: str, layers: int | None, device: torch.device) -> dict[str, list[Tensor]]:
    """Random weights with gradients, by role, in the shapes of a model."""
    with torch.device("meta"):
        model = build_model(compose_model(name, layers))
    torch.manual_seed(0)

    def fill(p: Tensor) -> Tensor:
        weight = (0.02 * torch.randn(p.shape, device=device)).requires_grad_()
        weight.grad = 1e-3 * torch.randn(p.shape, device=device)
        return weight

    return {role: [fill(p) for p in params] for role, params in parameter_roles(model).items()}


def run_parts(args: Arguments, name: str, ranks: Ranks, machine: Machine) -> Iterator[tuple[str, list[Row]]]:
    device = ranks.device
    layers = args.layers if args.layers is not None else (1 if device.type == "cpu" else None)
    roles = make_parameters(name, layers, device)
    everything, split = [p for params in roles.values() for p in params], name == "nanogpt_124m"
    count = sum(p.numel() for p in everything)
    title = f"{name}, {'all' if layers is None else layers} layers, {count:,} parameters"
    parts = args.parts or [part for part in PARTS if device.type == "cuda" or part != "record30"]
    slow = args.repeats if device.type == "cuda" else 1
    if "wrappers" in parts:
        yield f"{title}: wrappers", wrappers(everything, machine, args.repeats, device)
    if "matrices" in parts:
        yield f"{title}: hidden matrices", matrices(roles["matrix"], split, machine, args.repeats, ranks)
    if "soap" in parts:
        yield f"{title}: SOAP", soap(everything, split, args.max_dim, machine, slow, ranks)
    if "record30" in parts:
        yield f"{title}: record 30", record30(roles["matrix"], slow, ranks)


def show(title: str, rows: list[Row]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for column in ("", "ms/step", "floor", "x floor", "B/param", "peak", "faster", "than"):
        table.add_column(column, justify="left" if column in ("", "than") else "right", no_wrap=True)
    for r in rows:
        over = None if r.floor is None else r.ms / r.floor
        numbers = [r.ms, r.floor, over, r.held, r.peak, r.faster]
        table.add_row(r.name, *("-" if n is None else f"{n:.2f}" for n in numbers), r.peer or "")
    return table


def run(arguments: list[str]) -> None:
    args = parse(Arguments, arguments)
    for part in args.parts or []:
        if part not in PARTS:
            raise ConfigError(f"parts={part} must be of {', '.join(PARTS)}")
    for name in args.shapes:
        compose_model(name, args.layers)
    with ranks(args.device) as group:
        device = group.device
        console = Console(width=130, quiet=not group.is_first, highlight=False)
        machine = measure_machine(device)
        kind = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        rates = ", ".join(f"{rate / 1e9:.2f} TFLOP/s {str(dtype)[6:]}" for dtype, rate in machine.matmul.items())
        about = (
            f"{group.size} x {kind}, torch {torch.__version__}: copies {machine.copy / 1e6:.0f} GB/s, products {rates}"
        )
        console.print(about)
        results: dict[str, Any] = {"machine": about}
        for name in args.shapes:
            for title, rows in run_parts(args, name, group, machine):
                console.print(show(title, rows))
                results[title] = [asdict(row) for row in rows]
            if device.type == "cuda":
                results[f"{name}: training step"] = ms = training_step(name, device)
                console.print(f"{name}: forward and backward on an eighth of the paper's batch: {ms:.1f} ms\n")
        if args.output and group.is_first:
            Path(args.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
