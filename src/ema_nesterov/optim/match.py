"""Whether a saved state belongs to an optimizer; if not, the first difference in one line."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# entries of a state that have their parameter's shape, in torch's optimizers and in ours
SHAPED = ("momentum", "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "rotated_avg", "rotated_avg_sq")


def require_match(optimizer: Optimizer, saved_type: str | None, state: dict[str, Any]) -> None:
    """Raise ValueError, naming the first mismatch, unless `state` comes from such an optimizer over such parameters."""
    name = type(optimizer).__name__
    if saved_type != name:
        raise ValueError(f"state of {saved_type} cannot be loaded into {name}")
    if "param_groups" not in state:  # a chain or a wrapper, which compares its members itself
        return
    saved, groups = state["param_groups"], optimizer.param_groups
    if len(saved) != len(groups):
        raise ValueError(f"{name}: {len(saved)} parameter groups in the state, {len(groups)} here")
    for i, (theirs, ours) in enumerate(zip(saved, groups, strict=True)):
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(
                f"{name}: group {i} has {len(theirs['params'])} parameters in the state, {len(ours['params'])} here"
            )
    params = [p for group in groups for p in group["params"]]
    for i, values in state["state"].items():
        for key in SHAPED:
            tensor = values.get(key)
            if isinstance(tensor, Tensor) and tensor.shape != params[i].shape:
                shapes = f"{tuple(tensor.shape)}, the parameter is {tuple(params[i].shape)}"
                raise ValueError(f"{name}: {key} of parameter {i} is {shapes}")


def load_own(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state that stays the caller's: torch's own optimizers would step the very tensors they are given."""
    is_torchs = type(optimizer).load_state_dict is Optimizer.load_state_dict
    optimizer.load_state_dict(copy.deepcopy(state) if is_torchs else state)
