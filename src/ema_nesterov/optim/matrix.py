"""What the optimizers of whole matrices share: what they refuse, and how ranks share their work.

Under data parallelism every rank holds every gradient, and each could take the whole step. Given a
process `group`, every parameter has one owner instead: that rank alone keeps its state and steps it, and
an all-gather hands the new values round. Work and state shrink with the ranks, and all of them end the
step with the owner's bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from .contract import (
    ALLOCATED,
    SHAPED,
    UNSTEPPED,
    Contract,
    Entries,
    State,
    eager,
    entries_of,
    parameters_of,
    require_shape,
    with_gradients,
)
from .ranges import AT_LEAST_0, Range, require

LARGEST = 1e9  # norm of a gradient: its Gram matrix has a norm whose square float32 can hold


class MatrixOptimizer(Contract):
    """Base of Muon, SOAP and their kin; a subclass is `_update`, one step of some of its parameters.

    group: None, and every rank holds and does everything, or a process group that shares both. All its
    ranks must then call `step`, `state_dict` and `load_state_dict` together; state dicts are complete on
    every rank (on the CPU), so they load on any number of ranks. On the others `state[p]` names the owner.

    A gradient is scaled to a norm of at most 1e9 (that of one parameter; one too large for its norm in
    float32 counts as 0), so that no product of it overflows.

    Raises ValueError for a setting outside of `RANGES`, or a parameter whose number of dimensions is not in
    `DIMENSIONS`; TypeError for a complex parameter or a DTensor: what these algorithms do to a shard is not
    what they do to its matrix.
    """

    DIMENSIONS: tuple[int, ...] = (2,)
    ENTRIES: tuple[str, ...] = ("momentum",)  # of the state of a parameter that has been stepped; no others are its own
    INTERPOLATES = True  # whether the mean of two states is a state
    RANGES: ClassVar[dict[str, Range]] = {"lr": AT_LEAST_0}

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], group: dist.ProcessGroup | None = None):
        self.group = group
        self._rank = 0 if group is None else dist.get_rank(group)
        if self._rank < 0:
            raise ValueError(f"this rank is not in the process group that {type(self).__name__} shall share work over")
        self._shards: list[list[Tensor]] = [[] for _ in range(1 if group is None else dist.get_world_size(group))]
        self._batches: dict[tuple[int, ...], dict[str, Tensor]] = {}
        require(self.RANGES, defaults)
        super().__init__(params, defaults)
        self.state = Entries(dict)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """One step of parameters of one group, all of which have gradients."""
        raise NotImplementedError

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._only_allocates():
            self._start_step()
            self._update_all()
        return loss

    def _update_all(self) -> None:
        mine = self._mine()
        for group in self.param_groups:
            params = with_gradients(p for p in group["params"] if id(p) in mine)
            if any(p.grad is not None and p.grad.is_sparse for p in params):
                raise RuntimeError(
                    f"{type(self).__name__} does not take sparse gradients; build the table with sparse=False"
                )
            if params:
                self._update(params, group)
        if self.group is not None:
            self._hand_round()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            require(self.RANGES, self.param_groups[-1])
            for p in self.param_groups[-1]["params"]:
                self._require_matrix(p)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._mine()

    def _require_matrix(self, p: Tensor) -> None:
        name = type(self).__name__
        if hasattr(p, "placements"):
            raise TypeError(f"{name} does not take DTensors: its update of a shard is not that of the matrix")
        if p.is_complex():
            raise TypeError(f"{name} does not take complex parameters")
        if p.ndim not in self.DIMENSIONS or not p.numel():
            wanted = " or ".join(f"{n}-D" for n in self.DIMENSIONS)
            raise ValueError(f"{name} takes {wanted} parameters, got shape {tuple(p.shape)}")

    # --- sharing ------------------------------------------------------------------------------

    def _mine(self) -> set[int]:
        """The ids of the parameters that this rank steps. Parameters may come and go: each new one gets an owner."""
        held = {id(p): p for p in parameters_of(self)}
        if self.group is None:
            return set(held)
        owned = {id(p) for shard in self._shards for p in shard}
        if held.keys() != owned:
            self._shards = [[p for p in shard if id(p) in held] for shard in self._shards]
            new = [p for i, p in held.items() if i not in owned]
            for p in sorted(new, key=Tensor.numel, reverse=True):  # the largest first, to the rank with the least
                min(self._shards, key=lambda shard: sum(q.numel() for q in shard)).append(p)
        return {id(p) for p in self._shards[self._rank]}

    def _hand_round(self) -> None:
        """Every rank gets the parameters that the others have stepped: one all-gather per dtype."""
        for dtype in sorted({p.dtype for shard in self._shards for p in shard}, key=str):
            shards = [[p for p in shard if p.dtype == dtype] for shard in self._shards]
            length = max(sum(p.numel() for p in shard) for shard in shards)
            device = next(p.device for shard in shards for p in shard)
            own = torch.empty(length, dtype=dtype, device=device)
            everyones = list(torch.empty(len(shards), length, dtype=dtype, device=device).unbind())
            if shards[self._rank]:
                torch._foreach_copy_(views(own, shards[self._rank]), shards[self._rank])
            dist.all_gather(everyones, own, group=self.group)
            for rank, (shard, theirs) in enumerate(zip(shards, everyones, strict=True)):
                if shard and rank != self._rank:
                    torch._foreach_copy_(shard, views(theirs, shard))
                    self.state.update((p, {"owner": rank}) for p in shard if not self.state.get(p))

    def gather(self, states: Mapping[Tensor, State]) -> dict[Tensor, State]:
        """What every rank holds about its own parameters, complete on every rank. A collective."""
        if self.group is None:
            return {p: states[p] for p in parameters_of(self) if p in states}
        self._mine()
        params = parameters_of(self)
        owner = {id(p): rank for rank, shard in enumerate(self._shards) for p in shard}
        held = {
            i: {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in states[p].items()}
            for i, p in enumerate(params)
            if p in states and owner[id(p)] == self._rank
        }
        everyones: list[Any] = [None] * len(self._shards)
        dist.all_gather_object(everyones, held, group=self.group)
        complete: dict[Tensor, State] = {}
        for i, p in enumerate(params):
            rank = owner[id(p)]
            if i not in everyones[rank]:
                continue
            complete[p] = {}
            for key, value in everyones[rank][i].items():
                if isinstance(value, Tensor):
                    own = rank == self._rank
                    value = states[p][key].contiguous() if own else torch.empty_like(value, device=p.device)
                    dist.broadcast(value, group_src=rank, group=self.group)
                    value = value.to("cpu", copy=own)
                complete[p][key] = value
        return complete

    # --- state --------------------------------------------------------------------------------

    def _batch(self, params: list[Tensor], rows: int, columns: int) -> dict[str, Tensor]:
        """The states of same-shape parameters, each entry as one batch of blocks, of which theirs are views.

        An entry in the parameter's shape becomes (blocks, rows, columns); others are batches of blocks
        already. Plain numbers are left out.
        """
        key, states = tuple(map(id, params)), [self.state[p] for p in params]
        held = self._batches.get(key)
        if held is not None and all(  # unless others have moved or replaced a state since
            name in state and state[name].data_ptr() == part.data_ptr()
            for name, batch in held.items()
            for state, part in zip(states, batch.chunk(len(states)), strict=True)
        ):
            return held
        self._batches = {k: b for k, b in self._batches.items() if not set(k) & set(key)}
        batches: dict[str, Tensor] = {}
        for name, value in list(states[0].items()):
            if isinstance(value, Tensor):
                shape = (-1, rows, columns) if value.ndim < 3 else value.shape
                batches[name] = torch.cat([state[name].view(shape) for state in states])
                for state, part in zip(states, batches[name].chunk(len(states)), strict=True):
                    state[name] = part.view(value.shape)
        self._batches[key] = batches
        return batches

    def _alike(self, params: list[Tensor]) -> Iterable[list[Tensor]]:
        """The parameters by shape and number of steps: what can be worked on as one batch."""
        alike: dict[Any, list[Tensor]] = {}
        for p in params:
            alike.setdefault((p.shape, self.state[p].get("step")), []).append(p)
        return alike.values()

    def _pack(self) -> dict[str, Any]:
        ids = {p: i for i, p in enumerate(parameters_of(self))}
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        params = [[ids[p] for p in group["params"]] for group in self.param_groups]
        groups = [{**its, "params": held} for its, held in zip(settings, params, strict=True)]
        state = {ids[p]: entries for p, entries in self.gather(self.state).items() if entries}
        if self._stage == ALLOCATED:
            state = {i: {k: UNSTEPPED if k == "step" else v for k, v in its.items()} for i, its in state.items()}
        return {"state": state, "param_groups": groups}

    def _check(self, saved: Mapping[str, Any]) -> None:
        name, entries = type(self).__name__, entries_of(self, saved)
        for group in saved["param_groups"]:
            if missing := [key for key in self.RANGES if key not in group]:
                raise ValueError(f"{name}: a group of the state has no {missing[0]}; it is another optimizer's")
            if foreign := [key for key in all_settings(MatrixOptimizer) - self.RANGES.keys() if key in group]:
                raise ValueError(f"{name}: a group of the state has {foreign[0]}; it is another optimizer's")
        for i, p in enumerate(parameters_of(self)):
            if p not in entries:
                continue
            if "owner" in entries[p]:
                raise ValueError(
                    f"{name}: a flattened state dict does not carry what ranks share: leave out "
                    "flatten_optimizer_state_dict"
                )
            for key in self.ENTRIES:
                if key not in entries[p]:
                    raise ValueError(f"{name}: the state of parameter {i} has no {key}; it is another optimizer's")
            for key, value in entries[p].items():
                if key.endswith(".steps"):
                    raise ValueError(f"state of {key.removesuffix('.steps')} cannot be loaded into {name}")
                if key in SHAPED:
                    require_shape(name, f"{key} of parameter {i}", value, p)

    def _unpack(self, saved: Mapping[str, Any]) -> None:
        for group, theirs in zip(self.param_groups, saved["param_groups"], strict=True):
            params = group["params"]
            group.clear()
            group.update({k: copy.deepcopy(v) for k, v in theirs.items() if k != "params"}, params=params)
        self._forget()
        mine, ranks = self._mine(), {id(p): rank for rank, shard in enumerate(self._shards) for p in shard}
        for p, entries in entries_of(self, saved).items():
            if id(p) not in mine:
                self.state[p] = {"owner": ranks[id(p)]}
            else:  # state keeps its own dtype: torch would round it to bfloat16's
                dtype = wide_dtype(p)
                self.state[p] = {
                    k: v.to(p.device, dtype, copy=True) if isinstance(v, Tensor) else v for k, v in entries.items()
                }

    def _allocate(self) -> None:
        self._update_all()

    def _forget(self) -> None:
        self._batches.clear()
        self.state.clear()

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise RuntimeError(f"a {type(self).__name__} over a process group cannot be copied: use its state_dict()")
        return {**super().__getstate__(), "_batches": {}}


def all_settings(kind: type[MatrixOptimizer]) -> set[str]:
    """The names of the settings of this optimizer and of all that are derived from it."""
    return set(kind.RANGES).union(*(all_settings(derived) for derived in kind.__subclasses__()))


def views(flat: Tensor, shapes: list[Tensor]) -> list[Tensor]:
    """The beginning of a flat tensor as tensors of the given ones' shapes, one after another."""
    sizes = [t.numel() for t in shapes]
    return [part.view(t.shape) for part, t in zip(flat[: sum(sizes)].split(sizes), shapes, strict=True)]


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of optimizer state: float32, or float64 for float64. bfloat16 would lose the small updates."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def wide(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors in the dtype of optimizer state."""
    return [t.to(wide_dtype(t)) for t in tensors]


def gradients(params: list[Tensor], scale: float = 1.0) -> list[Tensor]:
    """The gradients times `scale` in the dtype of optimizer state, each of a norm of at most LARGEST."""
    grads = wide(p.grad for p in params if p.grad is not None)
    factors = torch._foreach_reciprocal(torch._foreach_norm(grads))
    torch._foreach_mul_(factors, LARGEST)
    torch._foreach_clamp_max_(factors, scale)
    return list(torch._foreach_mul(grads, factors))


def by_shape(tensors: list[Tensor], key: Callable[[torch.Size], Any] = tuple) -> Iterable[tuple[Any, list[int]]]:
    """The indices of the tensors by (a function of) their shape."""
    shapes: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        shapes.setdefault(key(tensor.shape), []).append(i)
    return shapes.items()
