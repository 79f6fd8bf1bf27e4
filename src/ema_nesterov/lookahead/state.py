"""What a wrapper remembers: by parameter, in the wrapper's own state, and its counters; how both are saved.

In a state dict a wrapper's entries stand under a parameter's id, beside the base's, as "EMANesterov.anchor". The
counters stand there too, with every parameter, since checkpoints carry what has a parameter and nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from ..optim.contract import (
    ALLOCATED,
    UNSTEPPED,
    Composite,
    State,
    by_parameter,
    parameters_of,
    require_shape,
    with_gradients,
)
from ..optim.matrix import wide_dtype


@dataclass
class Now:
    """What moves with the steps and the modes: one object, since proxies of an optimizer copy its attributes."""

    steps: int = 0  # completed
    skipped: int = 0  # of them, not taken
    alpha_t: float = 0.0  # the alpha that made y_t
    position: float | None = None  # where the parameters are; None: at y_t


class Remembering(Composite):
    """The state of a wrapper around `base`, to which nothing is ever written."""

    NAME: ClassVar[str]  # under which the state is saved; subclasses of an algorithm keep it
    LINE: ClassVar[tuple[str, ...]] = ()  # settings that decide where on the line y_t lies: a state fits no others
    BUFFERS: ClassVar[tuple[str, ...]] = ("anchor",)

    def __init__(self, base: Optimizer):
        level = 1 + sum(name.rpartition(".")[0].startswith(self.NAME) for name in _counters(base))
        self._prefix = f"{self.NAME}{level if level > 1 else ''}."
        self._own: defaultdict[Tensor, State] = defaultdict(dict)  # by parameter: anchor; y, x while they are kept
        self._now = Now()
        super().__init__([base])
        self.defaults = base.defaults  # some of torch's schedulers look into it

    @property
    def base(self) -> Any:
        """The optimizer that takes the steps."""
        return self._members[0]

    def _buffers_for(self, p: Tensor) -> State:
        """The buffers of a parameter that is about to take its first step, in float32 or float64."""
        return {"anchor": p.detach().to(wide_dtype(p), copy=True)}

    def _add_buffers(self, params: list[Tensor]) -> None:
        if any(p.is_complex() for p in params):
            raise TypeError(f"{type(self).__name__} does not take complex parameters")
        for p in params:
            self._own[p] = self._buffers_for(p)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if groups:  # Optimizer.__init__ assigns an empty list
            self.base.param_groups = groups

    def _entries(self, p: Tensor) -> State:
        return super()._entries(p) | self._own_entries(p) if self._member_of(p) else {}

    def _own_entries(self, p: Tensor) -> State:
        """What is saved of the wrapper with a parameter; counters too, as checkpoints carry what has a parameter."""
        now, buffers = self._now, self._own.get(p) or {}
        if not (now.steps or self._own or any(self.base.state.values())):
            return {}
        counters: State = {
            "steps": UNSTEPPED if self._stage == ALLOCATED else now.steps,
            "skipped": now.skipped,
            "alpha": now.alpha_t,
            "training": int(now.position is None),
            "position": now.position or 0.0,
            **{name: getattr(self, name) for name in self.LINE},
        }
        return {self._prefix + name: value for name, value in (buffers | counters).items()}

    def _put(self, p: Tensor, entries: Mapping[str, Any]) -> None:
        own, rest = self._parted(entries)
        if p in self._own:
            self._own[p].update({name: value for name, value in own.items() if name in self._own[p]})
        if isinstance(self.base, Composite):
            self.base._put(p, rest)
        elif rest or p in self.base.state:
            self.base.state[p] = rest

    def _parted(self, entries: Mapping[str, Any]) -> tuple[State, State]:
        """The wrapper's entries, under their short names, and the base's."""
        own = {k.removeprefix(self._prefix): v for k, v in entries.items() if k.startswith(self._prefix)}
        return own, {k: v for k, v in entries.items() if not k.startswith(self._prefix)}

    def _pack(self) -> dict[str, Any]:
        saved = super()._pack()
        own = [self._own_entries(p) for p in parameters_of(self)]
        if any(own):
            saved["state"] = {i: saved["state"].get(i, {}) | entries for i, entries in enumerate(own)}
        return saved

    def _parts(self, saved: Mapping[str, Any]) -> list[dict[str, Any]]:
        bases = {label: self._parted(entries)[1] for label, entries in saved["state"].items()}
        return super()._parts({**saved, "state": bases})

    def _own_saved(self, saved: Mapping[str, Any]) -> dict[Tensor, State]:
        pairs = ((p, self._parted(entries)[0]) for p, entries in by_parameter(self, saved).items())
        return {p: own for p, own in pairs if own}

    def _allocated_only(self, saved: Mapping[str, Any]) -> bool:
        return any(entries.get(self._prefix + "steps") == UNSTEPPED for entries in saved["state"].values())

    def _check(self, saved: Mapping[str, Any]) -> None:
        name, own = type(self).__name__, self._own_saved(saved)
        if not own and any(saved["state"].values()):
            raise ValueError(f"state of {wrapper_in(saved) or 'a base alone'} cannot be loaded into {name}")
        for i, p in enumerate(parameters_of(self)):
            entries = own.get(p, {})
            for setting in self.LINE:
                if entries and entries.get(setting) != getattr(self, setting):
                    raise ValueError(f"{setting} is {entries.get(setting)} in the state, {getattr(self, setting)} here")
            for buffer in (*self.BUFFERS, "x", "y"):
                require_shape(name, f"{buffer} of parameter {i}", entries.get(buffer), p)
            if "anchor" in entries and not entries["training"] and "y" not in entries:
                raise ValueError(
                    f"{name}: the state was saved at the iterate (eval mode) and its lookahead point is not in it; "
                    "call eval() on the optimizer that loads before its state_dict() is taken to load into"
                )
        super()._check(saved)

    def _unpack(self, saved: Mapping[str, Any]) -> None:
        super()._unpack(saved)
        self._own.clear()
        saved_now = {} if self._allocated_only(saved) else self._own_saved(saved)
        counters = next(iter(saved_now.values()), {})
        self._now.steps, self._now.skipped = int(counters.get("steps", 0)), int(counters.get("skipped", 0))
        self._now.alpha_t = float(counters.get("alpha", 0.0))
        self._now.position = None if counters.get("training", 1) else float(counters["position"])
        for p, entries in saved_now.items():
            for name, value in entries.items():
                if isinstance(value, Tensor) and value.ndim:
                    dtype = wide_dtype(p) if name in (*self.BUFFERS, "x") else p.dtype if name == "y" else value.dtype
                    self._own[p][name] = value.to(p.device, dtype, copy=True)

    def _allocate(self) -> None:
        super()._allocate()
        params = with_gradients(parameters_of(self))
        self._add_buffers(params)
        if self._now.position is not None:
            for p in params:
                self._own[p]["y"] = p.detach().clone()

    def _forget(self) -> None:
        super()._forget()
        self._own.clear()


def _counters(optimizer: Any) -> list[str]:
    """The names of the step counters of the wrappers in an optimizer, inner ones first."""
    names = [name for member in getattr(optimizer, "_members", []) for name in _counters(member)]
    return [*names, f"{optimizer._prefix}steps"] if isinstance(optimizer, Remembering) else names


def wrapper_in(saved: Mapping[str, Any]) -> str | None:
    """The name of the outermost wrapper whose state this is, if it is one's."""
    counters = [name for entries in saved["state"].values() for name in entries if name.endswith(".steps")]
    return counters[-1].removesuffix(".steps") if counters else None
