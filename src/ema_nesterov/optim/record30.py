"""The stack of modded-nanogpt's optimization record 30, which the paper calls Aurora.

For a matrix W (m x n) with gradient G and momentum M, at the step t = 0, 1, ...; |X| is the Schatten-4
norm, which stands in for the spectral one, ||X|| Frobenius':

    M <- mu M + (1 - mu) G,   U = (1 - mu) G + mu M      mu ramps up and down, see schedules.momentum_ramp
    U <- soap(U) |U| / |soap(U)|                         for matrices with a soap_blend, from t = 1 on
    O  = polar(U)                                        if m < n with rows evened out as in `aurora`
    O <- C |O| / |C|,   C = O + c_t U / |U|              Contra-Muon: c_t = -0.2 (1 - t / 2500), then 0
    O <- sqrt(max(1, m / n)) O
    O <- O - (1 - brake) R  if <O, W> < 0                radial brake; R = W <O, W> / ||W||^2: outward, since W - lr O
    O <- O max(1, floor ||W|| / ||O||)                   update floor
    r  = ||W|| - lr <O, W> / ||W||                       the norm that the radial part alone would lead to
    W <- r X / ||X||,   X = W - lr O

SOAP turns the momentum into slowly moving eigenbases Q of the gradients' covariances (see `soap`):

    P = Q_L^T U Q_R,   V <- beta V + (1 - beta) P^2,   D = max(sqrt(V), soap_floor rms(sqrt(V)))
    soap(U) = blend Q_L (P / D) Q_R^T + (1 - blend) U

The covariances and bases follow after W has moved. In the record the MLP has blend 1, the value projection
0.95 with floor 0.55, and the rest no SOAP.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .aurora import even_polar
from .matrix import MatrixOptimizer, gradients, wide
from .newton_schulz import frobenius, newton_schulz, schatten4
from .ranges import AT_LEAST_0, COUNT, FRACTION, NUMBER, SHARE, STEPS, require
from .soap import SIDES, eigenbasis, rotate, rotate_back, turn_bases


class Record30(MatrixOptimizer):
    """The record-30 stack for 2-D parameters; same-shape matrices are worked on as one batch.

    soap_blend, soap_floor: as above, meant for param groups; 0 is no SOAP. contra, contra_steps: -c_0 and
    the step from which c_t is 0. update_floor, brake: as above. soap_beta, precondition_frequency: of
    SOAP. iterations, exponent: of Aurora's polar factor. gradient_scale multiplies the gradients, whose size only
    the guards against division by 0 notice: the record sums its loss over the tokens of a step. group:
    shares work and state over ranks, see `MatrixOptimizer`, whose errors are this one's too.

    Raises ValueError for a setting outside of `RANGES`.
    """

    ENTRIES = ("step", "momentum")
    INTERPOLATES = False  # its moments lie in bases that turn
    RANGES = MatrixOptimizer.RANGES | {"momentum": FRACTION, "soap_blend": SHARE, "soap_floor": AT_LEAST_0}
    OWN: ClassVar = {  # the same in all groups
        "contra": NUMBER,
        "contra_steps": STEPS,
        "update_floor": AT_LEAST_0,
        "brake": NUMBER,
        "soap_beta": FRACTION,
        "precondition_frequency": COUNT,
        "iterations": COUNT,
        "exponent": NUMBER,
        "gradient_scale": NUMBER,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        soap_blend: float = 0.0,
        soap_floor: float = 0.0,
        contra: float = 0.2,
        contra_steps: int = 2500,
        update_floor: float = 0.3825,
        brake: float = 0.5,
        soap_beta: float = 0.9,
        precondition_frequency: int = 10,
        iterations: int = 3,
        exponent: float = 0.25,
        gradient_scale: float = 1.0,
        ns_dtype: torch.dtype | None = None,
        group: ProcessGroup | None = None,
    ):
        require(self.OWN, locals())
        defaults: dict[str, Any] = dict(lr=lr, momentum=momentum, soap_blend=soap_blend, soap_floor=soap_floor)
        self.contra, self.contra_steps, self.update_floor, self.brake = contra, contra_steps, update_floor, brake
        self.soap_beta, self.precondition_frequency = soap_beta, precondition_frequency
        self.iterations, self.exponent = iterations, exponent
        self.gradient_scale, self.ns_dtype = gradient_scale, ns_dtype
        super().__init__(params, defaults, group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for alike in self._alike(params):
            g = torch.stack(gradients(alike, self.gradient_scale))
            t = self.state[alike[0]].get("step", 0)
            if t == 0:
                self._start(alike, g, group)
            s = self._batch(alike, *g.shape[1:])
            s["momentum"].lerp_(g, 1 - group["momentum"])
            u = g.lerp(s["momentum"], group["momentum"])
            if group["soap_blend"] and t > 0:
                u = self._precondition(u, s, group)
            w = self._move(torch.stack(wide(alike)), self._orthogonalize(u, t), group["lr"])
            torch._foreach_copy_(alike, list(w.unbind()))
            if group["soap_blend"]:
                self._follow(g, s, t)
            for p in alike:
                self.state[p]["step"] = t + 1

    def _start(self, params: list[Tensor], g: Tensor, group: dict[str, Any]) -> None:
        for p in params:
            self.state[p]["momentum"] = g.new_zeros(p.shape)
            if group["soap_blend"]:
                self.state[p]["rotated_avg_sq"] = g.new_zeros(p.shape)
                for side, dim in SIDES.items():
                    for name in (side, f"{side}_basis"):
                        self.state[p][name] = g.new_zeros(1, g.size(dim), g.size(dim))

    def _precondition(self, u: Tensor, s: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """soap(U), at the Schatten-4 norm of U."""
        left, right, blend = s["rows_basis"], s["columns_basis"], group["soap_blend"]
        turned = rotate(u, left, right)
        s["rotated_avg_sq"].lerp_(turned.square(), 1 - self.soap_beta)
        d = s["rotated_avg_sq"].clamp_min(1e-16).sqrt()
        if group["soap_floor"]:
            d = torch.maximum(d, group["soap_floor"] * d.square().mean((-2, -1), keepdim=True).sqrt())
        soap = rotate_back(turned / d, left, right)
        return at_size(blend * soap + (1 - blend) * u if blend < 1 else soap, u)

    def _orthogonalize(self, u: Tensor, t: int) -> Tensor:
        """O, up to Contra-Muon and the scale."""
        if u.size(-2) < u.size(-1):
            o = even_polar(u, self.iterations, self.exponent, self.ns_dtype, schatten4)
        else:
            o = newton_schulz(u, "polar12", self.ns_dtype, schatten4)
        o = o.to(u.dtype)
        c = -self.contra * max(0.0, 1 - t / self.contra_steps) if self.contra_steps else 0.0
        o = at_size(o + c * u / size(u), o)
        return o * max(1.0, u.size(-2) / u.size(-1)) ** 0.5

    def _move(self, w: Tensor, o: Tensor, lr: float) -> Tensor:
        """W after the step: brake, floor, and the norm that the radial part alone leads to."""
        along = dot(o, w) / dot(w, w).clamp_min(1e-12)  # negative: W - lr O moves outward
        o = o - torch.where(along < 0, (1 - self.brake) * along, 0.0) * w
        radius = frobenius(w).clamp_min(1e-8)
        o = o * (self.update_floor * radius / frobenius(o).clamp_min(1e-8)).clamp_min(1.0)
        target = (radius - lr * dot(o, w) / radius).clamp_min(1e-8)
        x = w - lr * o
        return x * (target / frobenius(x).clamp_min(1e-8))

    def _follow(self, g: Tensor, s: dict[str, Tensor], t: int) -> None:
        """The covariances take this gradient in, and the bases start or turn."""
        s["rows"].lerp_(g @ g.mT, 1 - self.soap_beta)
        s["columns"].lerp_(g.mT @ g, 1 - self.soap_beta)
        if t == 0:
            for side in SIDES:
                s[f"{side}_basis"].copy_(eigenbasis(s[side]))
        elif t % self.precondition_frequency == 0:
            turn_bases(s, "rotated_avg_sq")


def size(x: Tensor) -> Tensor:
    return schatten4(x).clamp_min(1e-10)


def at_size(x: Tensor, other: Tensor) -> Tensor:
    """x rescaled to the Schatten-4 norm of the other."""
    return x * (size(other) / size(x))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of two batches of matrices, (n, 1, 1)."""
    return (a * b).sum((-2, -1), keepdim=True)
