"""Validation at the iterate, at the lookahead point, at the weight EMA, and along the line between.

Nothing here changes a bit of the training: parameters are restored from copies, and no random number
is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.loader import MicroBatch
from ..lookahead import EMANesterov, Wrapper
from .distributed import Ranks

PROBE_POSITIONS = [i / 4 for i in range(-4, 9)]  # a = -1, -0.75, ..., 2: the paper's Figures 2 and 8

Evaluate = Callable[[], float]


@torch.no_grad()
def mean_loss(
    model: nn.Module, batches: Iterable[MicroBatch], ranks: Ranks, precision: AbstractContextManager
) -> float:
    """The mean loss per target over all ranks' batches, in nats, for the weights the model holds."""
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, targets
    for inputs, targets in batches:
        inputs, targets = inputs.to(ranks.device), targets.to(ranks.device)
        with precision:
            loss = model(inputs, targets)
        count = (targets != -100).sum()
        total += torch.stack([torch.where(count > 0, loss.double() * count, 0.0), count.double()])
    loss, count = ranks.sum(total).tolist()
    return loss / count


def at_iterate(optimizer: Optimizer) -> AbstractContextManager:
    """Hold x_t: a bare base optimizer's parameters are x_t already."""
    return optimizer.at_iterate() if isinstance(optimizer, Wrapper) else nullcontext()


def weight_ema(optimizer: Optimizer) -> EMANesterov | None:
    """The wrapper, this one or one inside it, whose anchor is the EMA of the weights, once it has one."""
    while isinstance(optimizer, Wrapper):
        if isinstance(optimizer, EMANesterov) and optimizer.ema_decay > 0 and optimizer.taken > 0:
            return optimizer
        optimizer = optimizer.base
    return None


def validate(optimizer: Optimizer, alpha: float | None, evaluate: Evaluate) -> dict[str, float]:
    """`val/loss` at x_t, `val/lookahead_loss` at x_t + alpha d_t, `val/ema_loss` at e_t, where they exist."""
    losses = {}
    with at_iterate(optimizer):
        losses["val/loss"] = evaluate()
    if alpha is not None and isinstance(optimizer, Wrapper):
        with optimizer.at_position(alpha):
            losses["val/lookahead_loss"] = evaluate()
    if (tracker := weight_ema(optimizer)) is not None:
        with holding(parameters(optimizer), tracker.average()):
            losses["val/ema_loss"] = evaluate()
    return losses


def copy_iterate(optimizer: Optimizer) -> list[Tensor]:
    """A copy of x_t."""
    with at_iterate(optimizer):
        return [p.detach().clone() for p in parameters(optimizer)]


def probe(optimizer: Optimizer, previous: list[Tensor], evaluate: Evaluate) -> Iterator[tuple[str, float, float]]:
    """(direction, position a, loss at x_t + a d) for d the EMA of the updates ("ema") and the last
    update x_t - x_{t-1} ("step"); `previous` is x_{t-1}."""
    x, held = copy_iterate(optimizer), parameters(optimizer)
    lines = [("step", previous, 1.0)]
    if (tracker := weight_ema(optimizer)) is not None:
        lines.insert(0, ("ema", tracker.average(), tracker.k))
    for direction, origin, k in lines:  # d = k (x - origin)
        wide = [p.to(o.dtype) for p, o in zip(x, origin, strict=True)]
        for position in PROBE_POSITIONS:
            with holding(held, list(torch._foreach_lerp(origin, wide, 1 + position * k))):
                yield direction, position, evaluate()


def parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@contextmanager
def holding(held: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """Put other values into the parameters for a while; restore the old ones bit for bit."""
    with torch.no_grad():
        before = [p.detach().clone() for p in held]
        torch._foreach_copy_(held, values)
        try:
            yield
        finally:
            torch._foreach_copy_(held, before)
