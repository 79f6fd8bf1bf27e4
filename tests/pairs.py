"""Every wrapper and every base over a small problem, for tests of what must hold for all pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_optimizer import Lion
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import SGD, Adagrad, AdamW, Optimizer

from ema_nesterov.lookahead import GPA, NALA, SNOO, EMANesterov, Lookahead, Nesterov
from ema_nesterov.optim import SOAP, Aurora, Chain, Muon, NorMuon, Record30
from ema_nesterov.schedules import lookahead_alpha, wsd

SHAPES = [(8, 8), (24, 8), (6, 10), (8, 8), (5,)]

WRAPPERS: dict[str, Callable[[Optimizer], Any]] = {
    "ema_nesterov": lambda base: EMANesterov(base, lookahead_alpha(0.9, wsd(10, 4, 3), 10, 1, 1), 0.9),
    "nesterov": lambda base: Nesterov(base, 0.7),
    "nala": lambda base: NALA(base, 0.7, 3),
    "lookahead": lambda base: Lookahead(base, 0.5, 3),
    "lookahead_reset": lambda base: Lookahead(base, 0.5, 3, inner_state="reset"),
    "lookahead_interpolate": lambda base: Lookahead(base, 0.5, 3, inner_state="interpolate"),
    "snoo": lambda base: SNOO(base, 0.8, 0.5, 3),
    "gpa": lambda base: GPA(base, 0.9, 0.6),
}

MATRIX_BASES: dict[str, Callable[..., Optimizer]] = {
    "muon_nanogpt": lambda ps, **group: Muon(ps, 0.05, scale="max_dim", split_qkv=True, **group),
    "muon_llama": lambda ps, **group: Muon(ps, 0.05, weight_decay=0.1, **group),
    "muon_track3": lambda ps, **group: Muon(ps, 0.05, ns="polar12", **group),
    "normuon": lambda ps, **group: NorMuon(ps, 0.05, split_qkv=True, **group),
    "aurora": lambda ps, **group: Aurora(ps, 0.05, **group),
    "record30": lambda ps, **group: Record30(
        [{"params": ps[:2], "soap_blend": 0.95, "soap_floor": 0.5}, {"params": ps[2:]}],
        0.05,
        precondition_frequency=2,
        **group,
    ),
}


def build_base(name: str, params: list[Tensor], group: ProcessGroup | None = None) -> Optimizer:
    if name == "sgd":
        return SGD(params, lr=0.1, momentum=0.9)
    if name == "adamw":
        return AdamW(params, lr=0.05)
    if name == "soap":
        return SOAP(params, lr=0.05, precondition_frequency=2, split_qkv=True, group=group)
    matrices = [p for p in params if p.ndim == 2]
    return Chain([AdamW([p for p in params if p.ndim < 2], lr=0.05), MATRIX_BASES[name](matrices, group=group)])


BASES = ["sgd", "adamw", "soap", *MATRIX_BASES]
PAIRS = [
    (wrapper, base)
    for wrapper in WRAPPERS
    for base in BASES
    if not (wrapper == "lookahead_interpolate" and base in ("soap", "record30"))  # refused: their moments turn
]


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]


def take_step(optimizer: Optimizer, params: list[Tensor], step: int) -> None:
    """One step on a noisy quadratic; after the sixth the learning rate is another, set from outside."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (p.detach() + 0.3 * torch.randn(p.shape, generator=generator)).to(p.dtype)
    if step == 6:
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
    optimizer.step()


def anchors(wrapper: Any) -> list[Tensor]:
    """The buffers of the parameters that have been stepped, out of the state that everybody sees."""
    return [
        entries[f"{wrapper.NAME}.anchor"] for entries in wrapper.state.values() if f"{wrapper.NAME}.anchor" in entries
    ]


def values(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def set_values(params: list[Tensor], new: list[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(params, new, strict=True):
            p.copy_(value)


# --- every optimizer and wrapper, and what can be made of them: the rows of the contract ----------


def wrapped(wrapper: str, base: str) -> Callable[[list[Tensor]], Any]:
    return lambda params: WRAPPERS[wrapper](build_base(base, params))


def _vectors(params: list[Tensor]) -> list[Tensor]:
    return [p for p in params if p.ndim < 2]


def _matrices(params: list[Tensor]) -> list[Tensor]:
    return [p for p in params if p.ndim == 2]


KINDS = ("sgd", "adamw", "muon_nanogpt", "soap", "record30")  # of bases, where Muon's kin do not differ

ROWS: dict[str, Callable[[list[Tensor]], Any]] = {
    **{name: (lambda params, name=name: build_base(name, params)) for name in BASES if name not in ("sgd", "adamw")},
    **{f"{wrapper} of {base}": wrapped(wrapper, base) for wrapper, base in PAIRS if base in KINDS},
    "backward": lambda params: EMANesterov(SGD(params, lr=0.1), -0.2, 0.9),
    "warm": lambda params: EMANesterov(SGD(params, lr=0.1), 0.5, 0.9, warm_start=True),
    "adaptive": lambda params: Lookahead(AdamW(params, lr=0.05), 0.5, 3, adaptive=True),
    "wrapper of its own kind": lambda params: EMANesterov(EMANesterov(AdamW(params, lr=0.05), 0.3, 0.9), 0.5, 0.8),
    "chain of wrappers": lambda params: Chain(
        [SNOO(AdamW(_vectors(params), lr=0.05), 0.8, 0.5, 3), EMANesterov(Muon(_matrices(params), lr=0.05), 0.5, 0.9)]
    ),
    # some have a state before their first step, some count steps in their groups
    "chain with state": lambda params: Chain([Adagrad(_vectors(params), lr=0.05), Muon(_matrices(params), lr=0.05)]),
    "ema_nesterov of another's": lambda params: EMANesterov(Lion(params, lr=0.01), 0.5, 0.9),
    "chain without memory": lambda params: Chain([SGD(_vectors(params), lr=0.05), SGD(_matrices(params), lr=0.05)]),
}
