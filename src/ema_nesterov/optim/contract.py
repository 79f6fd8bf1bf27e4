"""torch's contract of an optimizer, kept by every optimizer and wrapper here.

A state dict has torch's own form, which torch.distributed.checkpoint and everybody else can carry:

    {"state": {id: {name: value}}, "param_groups": [{"params": [id, ...], ...}, ...]}

with everything about a parameter, its wrapper's entries and its base's, under one id. ids are labels, which
`param_groups` orders; an empty entry is no entry. `Contract` is what all share, `Composite` what optimizers
made of other optimizers do: chains and wrappers.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

State = dict[str, Any]
# torch.compile(optimizer.step) runs a step as it is: dynamo loses entries that a graph makes in a state
eager = torch._disable_dynamo
FRESH, ALLOCATED, STEPPED = range(3)
UNSTEPPED = -1  # as a counter: the state was allocated and no step was taken

# entries of a state that have their parameter's shape, in torch's optimizers and in ours
SHAPED = ("momentum", "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "rotated_avg", "rotated_avg_sq")


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, in the order of the groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def with_gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """Those that a step may move: one whose gradient is None is left alone."""
    return [p for p in params if p.grad is not None]


class Entries(defaultdict):
    """A state by parameter, which is true once something has been entered: reading makes empty entries."""

    def __bool__(self) -> bool:
        return any(self.values())


class Contract(Optimizer):
    """Hooks, copies, and a state dict made of `_pack`, `_check` and `_unpack`.

    Raises, in `step()`, RuntimeError for a parameter that was cast or moved since the last step: its state is
    of another dtype or device. `load_state_dict(state_dict())` brings the state along.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]):
        self._stage = FRESH
        self._homes: dict[Tensor, tuple[torch.dtype, torch.device]] = {}  # of each parameter, in its last step
        super().__init__(params, defaults)

    def _pack(self) -> dict[str, Any]:
        """The state dict."""
        raise NotImplementedError

    def _check(self, saved: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the first mismatch, unless `saved` is the state of such an optimizer."""
        raise NotImplementedError

    def _unpack(self, saved: Mapping[str, Any]) -> None:
        """Take in a state that was checked; it stays the caller's."""
        raise NotImplementedError

    def _allocate(self) -> None:
        """Make the state that a step would make. Nothing that it does to the weights will stay."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Drop all state."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """In torch's form; the tensors are the optimizer's own. Hooks fire as torch's do."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        saved = self._pack()
        for changed in self._optimizer_state_dict_post_hooks.values():
            result = changed(self, saved)
            saved = saved if result is None else result
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict()`; the parameters themselves are restored with the model.

        Raises ValueError, naming the first mismatch and before anything has changed, for the state of another
        optimizer, wrapper or model.
        """
        saved: Any = state_dict.copy()  # hooks may change it, as torch's may
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, saved)
            saved = saved if result is None else result
        self._check(saved)
        self._unpack(saved)
        self._stage = STEPPED if any(self.state.values()) else FRESH
        self._homes.clear()
        for done in self._optimizer_load_state_dict_post_hooks.values():
            done(self)

    def _only_allocates(self) -> bool:
        """To be asked first in a step: whether this one only makes a fresh optimizer allocate its state.

        torch.distributed.checkpoint steps a fresh optimizer at lr 0, with zero gradients, so that there is a state
        to load into. That step is not counted and moves nothing, and the first real one begins without it.
        """
        if self._stage == FRESH and self._asks_for_state():
            params = parameters_of(self)
            before = [p.detach().clone() for p in params]
            self._allocate()
            for p, value in zip(params, before, strict=True):
                p.copy_(value)
            self._stage = ALLOCATED
            return True
        return False

    def _start_step(self) -> None:
        """To be called before anything moves in a step that is taken."""
        self._require_same_home()
        if self._stage == ALLOCATED:
            self._forget()
        self._stage = STEPPED

    def _asks_for_state(self) -> bool:
        groups, grads = self.param_groups, [p.grad for p in with_gradients(parameters_of(self))]
        if not grads or any("lr" not in group or float(group["lr"]) for group in groups):
            return False
        return not any(bool(local(g).any()) for g in grads if g is not None)

    def _require_same_home(self) -> None:
        for p in parameters_of(self):
            home = (p.dtype, p.device)
            if self._homes.setdefault(p, home) != home:
                was = " on ".join(str(part).removeprefix("torch.") for part in self._homes[p])
                raise RuntimeError(
                    f"{type(self).__name__}: a parameter of shape {tuple(p.shape)} was {was} in the last step, and is "
                    f"{str(p.dtype).removeprefix('torch.')} on {p.device} now; type "
                    "optimizer.load_state_dict(optimizer.state_dict()) to bring its state along"
                )

    def __getstate__(self) -> dict[str, Any]:
        # as torch's: without hooks, and without the step() that a learning-rate scheduler patches on the instance
        return {k: v for k, v in self.__dict__.items() if k != "step" and not k.startswith("_optimizer_")}


class Composite(Contract):
    """An optimizer made of others: their groups and states, as one.

    `param_groups` is one list of the members' own dicts, so a learning-rate scheduler on any of them moves all.
    Members may get, lose and exchange parameters at any time: a state belongs to its parameter.

    Raises ValueError when a parameter belongs to two members.
    """

    def __init__(self, members: Sequence[Optimizer]):
        self._members = list(members)
        self._groups: list[dict[str, Any]] = []
        # members that are not ours and whose state was only allocated, and what that changed in their groups
        self._lent: list[tuple[Optimizer, list[tuple[dict[str, Any], dict[str, Any]]]]] = []
        held = parameters_of(self)
        if len(set(held)) < len(held):
            raise ValueError("some parameters appear in more than one parameter group")
        super().__init__(self.param_groups, {})

    # --- groups and state, which the members hold ----------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        self._groups[:] = [group for member in self._members for group in member.param_groups]
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Nothing: Optimizer.__init__ assigns an empty list, and the members' own are what counts."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if any(param_group is group for group in self.param_groups):  # from Optimizer.__init__
            return
        if len(self._members) > 1:
            raise RuntimeError("add the group to the member that shall train it")
        self._members[0].add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self._members:
            member.zero_grad(set_to_none)

    @property  # type: ignore[override]
    def state(self) -> MutableMapping[Tensor, Any]:
        return Joined(self)

    @state.setter
    def state(self, entries: Mapping[Tensor, Any]) -> None:
        for p, values in entries.items():
            self._put(p, values)

    def _entries(self, p: Tensor) -> State:
        """Everything about a parameter."""
        member = self._member_of(p)
        return dict(member.state.get(p) or {}) if member else {}

    def _put(self, p: Tensor, entries: Mapping[str, Any]) -> None:
        if member := self._member_of(p):
            member.state[p] = dict(entries)

    def _member_of(self, p: Tensor) -> Optimizer | None:
        return next((m for m in self._members if any(p is q for q in parameters_of(m))), None)

    # --- saving and loading --------------------------------------------------------------------

    def _pack(self) -> dict[str, Any]:
        groups: list[dict[str, Any]] = []
        state: dict[int, State] = {}
        for member in self._members:
            saved = member.state_dict()
            labels = [label for group in saved["param_groups"] for label in group["params"]]
            ids = {label: len(state) + i for i, label in enumerate(labels)}
            groups += [{**group, "params": [ids[p] for p in group["params"]]} for group in saved["param_groups"]]
            state |= {i: dict(saved["state"].get(label) or {}) for label, i in ids.items()}
        # once there is a state every parameter has an entry, be it empty: torch.distributed.checkpoint asks for one
        return {"state": state if any(state.values()) else {}, "param_groups": groups}

    def _parts(self, saved: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The state of each member, out of the whole."""
        require_groups(self, saved)
        parts, first = [], 0
        for member in self._members:
            groups = saved["param_groups"][first : first + len(member.param_groups)]
            labels = {label for group in groups for label in group["params"]}
            state = {label: its for label, its in saved["state"].items() if label in labels and is_entered(its)}
            parts.append({"state": state, "param_groups": groups})
            first += len(groups)
        return parts

    def _check(self, saved: Mapping[str, Any]) -> None:
        for member, part in zip(self._members, self._parts(saved), strict=True):
            if isinstance(member, Contract):
                member._check(part)
            else:
                require_torchs(member, part)

    def _unpack(self, saved: Mapping[str, Any]) -> None:
        self._lent.clear()
        for member, part in zip(self._members, self._parts(saved), strict=True):
            # torch's own optimizers would step the very tensors that they are given
            member.load_state_dict(part if isinstance(member, Contract) else copy.deepcopy(part))

    def _allocate(self) -> None:
        for member in self._members:
            if isinstance(member, Contract):
                member.step()
            elif not member.state:
                before = [(group, dict(group)) for group in member.param_groups]
                member.step()
                changed = [(g, {k: was.get(k) for k in g if g[k] is not was.get(k)}) for g, was in before]
                self._lent.append((member, changed))
                for state in member.state.values():  # torch's count this step
                    if isinstance(state.get("step"), Tensor):
                        state["step"].fill_(UNSTEPPED)

    def _forget(self) -> None:
        for member, changed in self._lent:  # ours forget by themselves
            member.state.clear()
            for group, before in changed:  # where some count their steps
                group.update((key, value) for key, value in before.items() if value is not None)
                for key in [key for key, value in before.items() if value is None]:
                    del group[key]
        self._lent.clear()


class Joined(MutableMapping):
    """The state of a composite: what is about a parameter in any of its parts. A parameter's entries are read-only
    as a dict, and assigned as a whole."""

    def __init__(self, of: Composite):
        self.of = of

    def __getitem__(self, p: Tensor) -> Mapping[str, Any]:
        return MappingProxyType(self.of._entries(p))

    def __setitem__(self, p: Tensor, entries: Mapping[str, Any]) -> None:
        self.of._put(p, entries)

    def __delitem__(self, p: Tensor) -> None:
        self.of._put(p, {})

    def __iter__(self) -> Iterator[Tensor]:
        return (p for p in parameters_of(self.of) if self.of._entries(p))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return self.of._stage != FRESH  # some of torch's optimizers have a state before their first step

    def __repr__(self) -> str:
        return repr({p: dict(self[p]) for p in self})


# --- what a saved state must be -------------------------------------------------------------------


def require_groups(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Raise ValueError unless `saved` has torch's form and groups of as many parameters."""
    name = type(optimizer).__name__
    if "param_groups" not in saved or "state" not in saved:
        raise ValueError(
            f"{name}: this is no optimizer's state dict, or one of ema-nesterov before 0.2, whose form was another; "
            "begin anew from the weights, or go on with the version that saved it"
        )
    theirs, ours = saved["param_groups"], optimizer.param_groups
    if len(theirs) != len(ours):
        raise ValueError(f"{name}: {len(theirs)} parameter groups in the state, {len(ours)} here")
    for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if len(a["params"]) != len(b["params"]):
            sizes = f"{len(a['params'])} parameters in the state, {len(b['params'])} here"
            raise ValueError(f"{name}: group {i} has {sizes}")
    labels = {label for group in theirs for label in group["params"]}
    if strangers := [label for label in saved["state"] if label not in labels]:
        raise ValueError(f"{name}: the state has an entry of {strangers[0]!r}, which is in no parameter group")


def by_parameter(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[Tensor, State]:
    """The saved state by parameter. Raises ValueError where the groups differ."""
    require_groups(optimizer, saved)
    labels = [label for group in saved["param_groups"] for label in group["params"]]
    return {p: saved["state"].get(i) or {} for p, i in zip(parameters_of(optimizer), labels, strict=True)}


def entries_of(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[Tensor, State]:
    """The same, without what is no entry."""
    return {p: entries for p, entries in by_parameter(optimizer, saved).items() if is_entered(entries)}


def is_entered(entries: Mapping[str, Any] | None) -> bool:
    """Whether a step has made these entries of a parameter: not where there are none, or they were only allocated."""
    return bool(entries) and entries.get("step") != UNSTEPPED  # type: ignore[union-attr]


def require_torchs(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Raise ValueError where the groups or the shapes are not those of this optimizer, one of torch's or a user's."""
    name, entries = type(optimizer).__name__, entries_of(optimizer, saved)
    # switches, as `foreach`, come and go between versions of torch
    wanted = [key for key, value in optimizer.defaults.items() if value is not None and not isinstance(value, bool)]
    for group in saved["param_groups"]:
        if missing := [key for key in wanted if key not in group]:
            raise ValueError(f"{name}: a group of the state has no {missing[0]}; it is another optimizer's")
    for i, p in enumerate(parameters_of(optimizer)):
        for key, value in entries.get(p, {}).items():
            if key.endswith(".steps"):
                raise ValueError(f"state of {key.removesuffix('.steps')} cannot be loaded into {name}")
            if key in SHAPED:
                require_shape(name, f"{key} of parameter {i}", value, p)


def require_shape(name: str, what: str, value: Any, p: Tensor) -> None:
    if isinstance(value, Tensor) and value.shape != p.shape:
        raise ValueError(f"{name}: {what} is {tuple(value.shape)}, the parameter is {tuple(p.shape)}")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, in the same memory; what is done to each number may be done to it."""
    return tensor.to_local() if hasattr(tensor, "placements") else tensor  # type: ignore[attr-defined]
