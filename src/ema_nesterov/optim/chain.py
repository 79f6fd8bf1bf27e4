"""Several optimizers as one: each takes its own parameters, one step moves them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from .match import load_own, require_match


class Chain(Optimizer):
    """Joins optimizers over disjoint parameters, e.g. `Chain([AdamW(embeddings), Muon(matrices)])`.

    Its `param_groups` are the members' own dicts, in order, so a learning-rate scheduler on the chain
    moves every member.

    Raises ValueError when a parameter belongs to two members.
    """

    def __init__(self, optimizers: Sequence[Optimizer]):
        self.optimizers = list(optimizers)
        super().__init__([group for o in self.optimizers for group in o.param_groups], {})
        shared = set.intersection(*(set(o.defaults) for o in self.optimizers))
        self.defaults = {k: v for k, v in self.optimizers[0].defaults.items() if k in shared}  # some schedulers look

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share_groups()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if any(param_group is group for o in self.optimizers for group in o.param_groups):
            return super().add_param_group(param_group)  # a member's own group, from __init__
        raise RuntimeError("add the group to the member that shall train it, then build the Chain anew")

    def state_dict(self) -> dict[str, Any]:
        return {
            "types": [type(o).__name__ for o in self.optimizers],
            "optimizers": [o.state_dict() for o in self.optimizers],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError, naming the first mismatch, when a member or its parameters differ."""
        states = state_dict.get("optimizers", [])
        if len(states) != len(self.optimizers):
            raise ValueError(f"state of {len(states)} optimizers, the chain has {len(self.optimizers)}")
        for optimizer, saved_type, state in zip(self.optimizers, state_dict["types"], states, strict=True):
            require_match(optimizer, saved_type, state)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            load_own(optimizer, state)
        self._share_groups()

    def _share_groups(self) -> None:
        """A member's load_state_dict makes new dicts: take them into the one list that others hold."""
        self.param_groups[:] = [group for o in self.optimizers for group in o.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        # a learning-rate scheduler leaves a patched step() on the instance, which cannot be pickled
        return {key: value for key, value in self.__dict__.items() if key != "step"}

    def __repr__(self) -> str:
        return f"Chain({self.optimizers})"
