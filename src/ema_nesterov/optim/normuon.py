"""NorMuon: Muon with the rows of its update normalised by their running second moment (Li et al. 2025).

With O the orthogonalized momentum of Muon, for each row i of the parameter (of the whole fused QKV):

    v_i <- beta2 v_i + (1 - beta2) mean_j O_ij^2          from 0, without bias correction
    N   <- O_i / (sqrt(v_i) + 1e-10)
    W   <- (1 - lr wd) W - lr s N ||O||_F / (||N||_F + 1e-10)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .matrix import MatrixOptimizer, by_shape
from .muon import Muon
from .newton_schulz import frobenius
from .ranges import FRACTION


class NorMuon(Muon):
    """NorMuon for 2-D parameters. The state is Muon's momentum and one number per row.

    Arguments and errors are Muon's; beta2 is the rate of the rows' second moment.
    """

    ENTRIES = ("momentum", "row_moments")
    RANGES = Muon.RANGES | {"beta2": FRACTION}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.0,
        scale: str = "spectral",
        ns: str = "quintic5",
        split_qkv: bool = False,
        ns_dtype: torch.dtype | None = None,
        group: ProcessGroup | None = None,
    ):
        defaults = dict(lr=lr, momentum=momentum, beta2=beta2, weight_decay=weight_decay)
        self.ns_dtype = ns_dtype
        MatrixOptimizer.__init__(self, params, defaults | dict(scale=scale, ns=ns, split_qkv=split_qkv), group)

    def _directions(self, params: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        directions = super()._directions(params, updates, group)
        for _, members in by_shape(directions):
            o = torch.stack([directions[i] for i in members])  # (n, rows, columns), s included: it cancels in N
            moments = [self._row_moments(params[i], directions[i]) for i in members]
            v = torch.stack(moments).lerp_(o.square().mean(-1, keepdim=True), 1 - group["beta2"])
            torch._foreach_copy_(moments, list(v.unbind()))
            n = o / (v.sqrt() + 1e-10)
            n *= frobenius(o) / (frobenius(n) + 1e-10)
            for i, direction in zip(members, n.unbind(), strict=True):
                directions[i] = direction
        return directions

    def _row_moments(self, p: Tensor, direction: Tensor) -> Tensor:
        state = self.state[p]
        if "row_moments" not in state:
            state["row_moments"] = direction.new_zeros(p.size(0), 1)
        return state["row_moments"]
