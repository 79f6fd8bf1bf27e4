"""Several optimizers as one: each takes its own parameters, one step moves them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from .contract import Composite, eager


class Chain(Composite):
    """Joins optimizers over disjoint parameters, e.g. `Chain([AdamW(embeddings), Muon(matrices)])`.

    Its `param_groups` are the members' own dicts, in order, so a learning-rate scheduler on the chain moves every
    member. Members may be wrappers: `eval`, `train`, `at_iterate`, `at_position` and `skip` reach those, and leave
    the weights of the others, which have no lookahead, as they are.

    Raises ValueError when a parameter belongs to two members.
    """

    def __init__(self, optimizers: Sequence[Optimizer]):
        super().__init__(optimizers)
        shared = set.intersection(*(set(o.defaults) for o in self.optimizers))
        self.defaults = {k: v for k, v in self.optimizers[0].defaults.items() if k in shared}  # some schedulers look

    @property
    def optimizers(self) -> list[Optimizer]:
        return self._members

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._only_allocates():
            return loss
        self._start_step()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    # --- lookahead, where a member has one -----------------------------------------------------

    def _wrappers(self) -> list[Any]:
        return [o for o in self.optimizers if hasattr(o, "at_position")]

    def eval(self) -> None:
        """Put the iterate into the parameters of every wrapper until `train()`."""
        for wrapper in self._wrappers():
            wrapper.eval()

    def train(self) -> None:
        """Put the lookahead point back into the parameters of every wrapper."""
        for wrapper in self._wrappers():
            wrapper.train()

    @contextmanager
    def at_position(self, position: float) -> Iterator[None]:
        """Hold x_t + position d_t in the parameters of every wrapper."""
        with ExitStack() as stack:
            for wrapper in self._wrappers():
                stack.enter_context(wrapper.at_position(position))
            yield

    def at_iterate(self):
        """Hold the iterate x_t in the parameters: the weights to evaluate, report and export."""
        return self.at_position(0.0)

    def skip(self, steps: int = 1) -> None:
        """Count steps that are not taken, in every wrapper."""
        for wrapper in self._wrappers():
            wrapper.skip(steps)

    def restart(self) -> None:
        """Begin anew from the weights as they are, in every wrapper."""
        for wrapper in self._wrappers():
            wrapper.restart()

    def __repr__(self) -> str:
        return f"Chain({self.optimizers})"
