"""What the optimizers of whole matrices share: what they refuse, and how ranks share their work.

Under data parallelism every rank holds every gradient, and each could take the whole step. Given a
process `group`, every parameter has one owner instead: that rank alone keeps its state and steps it, and
an all-gather hands the new values round. Work and state shrink with the ranks, and all of them end the
step with the owner's bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .match import require_match

State = dict[str, Any]


class MatrixOptimizer(Optimizer):
    """Base of Muon, SOAP and their kin; a subclass is `_update`, one step of some of its parameters.

    group: None, and every rank holds and does everything, or a process group that shares both. All its
    ranks must then call `step`, `state_dict` and `load_state_dict` together; state dicts are complete on
    every rank (on the CPU), so they load on any number of ranks.

    Raises ValueError for a parameter whose number of dimensions is not in `DIMENSIONS`, TypeError for a
    complex one or a DTensor: what these algorithms do to a shard is not what they do to its matrix.
    """

    DIMENSIONS: tuple[int, ...] = (2,)
    ENTRY = "momentum"  # of the state of a parameter that has been stepped

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], group: dist.ProcessGroup | None = None):
        self.group = group
        self._rank = 0 if group is None else dist.get_rank(group)
        if self._rank < 0:
            raise ValueError(f"this rank is not in the process group that {type(self).__name__} shall share work over")
        self._shards: list[list[Tensor]] = [[] for _ in range(1 if group is None else dist.get_world_size(group))]
        self._batches: dict[tuple[int, ...], dict[str, Tensor]] = {}
        if not defaults["lr"] >= 0:
            raise ValueError(f"lr must be at least 0, got {defaults['lr']}")
        super().__init__(params, defaults)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """One step of parameters of one group, all of which have gradients."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        mine = self._mine()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and id(p) in mine]
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError(
                    f"{type(self).__name__} does not take sparse gradients; build the table with sparse=False"
                )
            if params:
                self._update(params, group)
        if self.group is not None:
            self._hand_round()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        try:
            for p in params:
                self._require_matrix(p)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        for p in sorted(params, key=Tensor.numel, reverse=True):  # the largest first, to the rank with the least
            min(self._shards, key=lambda shard: sum(q.numel() for q in shard)).append(p)

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
        """The ids of the parameters that this rank steps."""
        held = {id(p) for group in self.param_groups for p in group["params"]}
        if self.group is None:
            return held
        if held != {id(p) for shard in self._shards for p in shard}:
            raise RuntimeError("parameters were exchanged after their owners had been chosen; build the optimizer anew")
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

    def gather(self, states: Mapping[Tensor, State]) -> dict[Tensor, State]:
        """What every rank holds about its own parameters, complete on every rank. A collective."""
        if self.group is None:
            return dict(states)
        params = [p for group in self.param_groups for p in group["params"]]
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

    def state_dict(self) -> dict[str, Any]:
        held = self.state
        self.state = self.gather(held)  # type: ignore[assignment]
        try:
            return super().state_dict()
        finally:
            self.state = held

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict()`, saved on any number of ranks.

        Raises ValueError, naming the first mismatch, when it is another optimizer's or of other parameters.
        """
        name = type(self).__name__
        if "param_groups" not in state_dict:
            raise ValueError(f"state of a wrapper or a chain cannot be loaded into {name}")
        require_match(self, name, state_dict)
        for i, state in state_dict["state"].items():
            if self.ENTRY not in state:
                raise ValueError(f"{name}: the state of parameter {i} has no {self.ENTRY}; it is another optimizer's")
        # torch would round float32 state to the dtype of a bfloat16 parameter: it gets the groups alone
        super().load_state_dict({**state_dict, "state": {}})
        self._batches.clear()
        params, mine = [p for group in self.param_groups for p in group["params"]], self._mine()
        for i, state in state_dict["state"].items():
            p = params[i]
            if id(p) in mine:
                self.state[p] = {k: v.to(p.device, copy=True) if isinstance(v, Tensor) else v for k, v in state.items()}

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise RuntimeError(f"a {type(self).__name__} over a process group cannot be copied: use its state_dict()")
        # a learning-rate scheduler leaves a patched step() on the instance, which cannot be pickled
        return {**{k: v for k, v in self.__dict__.items() if k != "step"}, "_batches": {}}


def views(flat: Tensor, shapes: list[Tensor]) -> list[Tensor]:
    """The beginning of a flat tensor as tensors of the given ones' shapes, one after another."""
    sizes = [t.numel() for t in shapes]
    return [part.view(t.shape) for part, t in zip(flat[: sum(sizes)].split(sizes), shapes, strict=True)]


def wide(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors in the dtype of optimizer state: float32, or float64 for float64."""
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]


def by_shape(tensors: list[Tensor], key: Callable[[torch.Size], Any] = tuple) -> Iterable[tuple[Any, list[int]]]:
    """The indices of the tensors by (a function of) their shape."""
    shapes: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        shapes.setdefault(key(tensor.shape), []).append(i)
    return shapes.items()
