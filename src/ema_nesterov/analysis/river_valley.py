"""Lookahead directions in a noisy river valley (Figure 1): python scripts/analysis.py river_valley [KEY=VALUE ...]

Two dimensions after Wen et al. 2024: f(p) = sharpness / 2 (p_2 - r(p_1))^2 - slope p_1, with the bed of the river at
r(p_1) = bend sin(p_1 / length), steep walls and noise on the gradient. SGD alone, inside Nesterov and inside
EMANesterov, and the control of a lookahead, SGD with its learning rate times 1 / (1 - alpha_t). The rate is constant,
then falls to 0.

output        folder of river_valley.png and .svg, runs.csv, positions.csv, rates.csv
alpha, gamma  of the lookaheads; alpha_t follows the rate from a tenth of the run to a third of the decay before its end
lr            learning rate; the sharpness is 1, so that SGD leaves the valley above 2
steps, decay  of a run, and the share of it over which the rate falls
slope, bend, length, noise    of the bed, and of the gradient
seeds, seed   how many independent runs, and of their noise
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..lookahead import EMANesterov, Nesterov
from ..schedules import Schedule, lookahead_alpha, lr_matched, wsd
from .descent import Path, around, descend
from .output import figure, folder_for, table

POSITIONS = np.linspace(-1, 2, 13).tolist()
RATES = [0.6, 0.9, 1.2, 1.4, 1.6, 1.8]
LOST = 10.0  # mean height on the walls; above it a run has left the valley
COLORS = {"SGD": "0.35", "SGD, lr matched": "C1", "Nesterov": "C3", "EMA-Nesterov": "C0"}


@dataclass
class Arguments:
    output: str = "analysis/river_valley"
    alpha: float = 0.5
    gamma: float = 0.99
    lr: float = 0.6
    steps: int = 1200
    decay: float = 0.3
    slope: float = 0.05
    noise: float = 0.3
    bend: float = 2.0
    length: float = 5.0
    seeds: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Valley:
    """Points are (..., 2); the bed is p_2 = bend sin(p_1 / length)."""

    slope: float
    bend: float
    length: float
    sharpness: float = 1.0

    def bed(self, along: Tensor) -> Tensor:
        return self.bend * torch.sin(along / self.length)

    def _incline(self, along: Tensor) -> Tensor:
        return self.bend / self.length * torch.cos(along / self.length)

    def loss(self, p: Tensor) -> Tensor:
        """sharpness / 2 (p_2 - r(p_1))^2 - slope p_1."""
        return self.walls(p) - self.slope * p[..., 0]

    def walls(self, p: Tensor) -> Tensor:
        return 0.5 * self.sharpness * (p[..., 1] - self.bed(p[..., 0])) ** 2

    def gradient(self, p: Tensor) -> Tensor:
        across = self.sharpness * (p[..., 1] - self.bed(p[..., 0]))
        return torch.stack([-across * self._incline(p[..., 0]) - self.slope, across], dim=-1)

    def downstream(self, p: Tensor) -> Tensor:
        """The unit vector along the bed at p_1, downhill: (1, r'(p_1)), normalised."""
        incline = self._incline(p[..., 0])
        return torch.stack([torch.ones_like(incline), incline], dim=-1) / (1 + incline**2).sqrt()[..., None]


def noisy(valley: Valley, noise: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Its gradient plus noise N(0, noise^2) in each coordinate; the same noise at every step for every optimizer."""
    generator = torch.Generator().manual_seed(seed)
    return lambda p: valley.gradient(p) + noise * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def angle_to_river(valley: Valley, x: Tensor, d: Tensor) -> Tensor:
    """Degrees between a direction and the river's at x: 90 where it knows nothing of the river."""
    cosine = torch.nn.functional.cosine_similarity(d, valley.downstream(x), dim=-1)
    return torch.rad2deg(cosine.clamp(-1, 1).acos())


def loss_along(valley: Valley, x: Tensor, d: Tensor) -> list[float]:
    """The mean of f(x + a d) - f(x) over points, for each position a (the paper's Figures 2 and 8)."""
    return [(valley.loss(x + a * d) - valley.loss(x)).mean().item() for a in POSITIONS]


def largest_rate(alpha: float, gamma: float) -> float:
    """The largest lr times sharpness at which EMA-Nesterov around gradient descent stays between the walls.

    There an eigenvalue of x' = (1 - q)(x + alpha m), m' = gamma m + (1 - gamma)(x' - x) is -1:
    q = 2 (1 + gamma + alpha (1 - gamma)) / (1 + gamma + 2 alpha (1 - gamma)); 2 without a lookahead,
    2 (1 + alpha) / (1 + 2 alpha) for Nesterov (gamma = 0)."""
    return 2 * (1 + gamma + alpha * (1 - gamma)) / (1 + gamma + 2 * alpha * (1 - gamma))


@dataclass(frozen=True)
class Outcome:
    """Means over the runs and, but for the first four, over the second half of a phase."""

    progress: float  # p_1 at the end
    final: float  # loss at x at the end
    walls: float  # of it, sharpness / 2 times the squared distance to the bed
    highest: float  # the largest that this was at any step
    stable: float  # loss at x while the rate is constant
    angle: float  # between direction and river, degrees, while the rate is constant
    angle_late: float  # and while it falls


def outcome(valley: Valley, path: Path, stable: slice, late: slice) -> Outcome:
    end = path.x[-1]
    walls = valley.walls(path.x).mean(1)
    ends = end[:, 0].mean(), valley.loss(end).mean(), walls[-1], walls.nan_to_num(torch.inf).max()
    angles = [float("nan")] * 2
    if len(path.d) > 1:
        angles = [angle_to_river(valley, path.x[s], path.d[s]).mean().item() for s in (stable, late)]
    return Outcome(*(v.item() for v in (*ends, valley.loss(path.x[stable]).mean())), *angles)


def run(args: Arguments) -> str:
    _check(args)
    folder, valley = folder_for(args.output), Valley(args.slope, args.bend, args.length)
    falling = round(args.decay * args.steps)
    constant, warmup = args.steps - falling, args.steps // 10
    stable, late = slice(constant // 2, constant), slice(args.steps - falling // 2, args.steps)
    lr = wsd(args.steps, 0, falling)

    def alpha(rest: int, follows: bool = True) -> Schedule:
        return lookahead_alpha(args.alpha, lr if follows else lambda step: 1.0, args.steps, warmup, rest)

    def walk(rate: float, schedule: Schedule, wrapper: Any = None, *settings: Any, directions: bool = False) -> Path:
        make, start = around(rate, wrapper, *settings), torch.zeros(args.seeds, 2)
        return descend(make, noisy(valley, args.noise, args.seed), start, args.steps, schedule, directions)

    alpha_t = alpha(falling // 3)
    four: dict[str, Any] = {
        "SGD": (lr,),
        "SGD, lr matched": (lr_matched(lr, alpha_t),),
        "Nesterov": (lr, Nesterov, alpha_t),
        "EMA-Nesterov": (lr, EMANesterov, alpha_t, args.gamma),
    }
    windows: dict[str, Any] = {
        "EMA-Nesterov, alpha constant to the end": (lr, EMANesterov, alpha(0, follows=False), args.gamma),
        "EMA-Nesterov, alpha off in the decay": (lr, EMANesterov, alpha(falling), args.gamma),
    }
    paths = {n: walk(args.lr, *how, directions=len(how) > 1) for n, how in {**four, **windows}.items()}
    outcomes = {name: outcome(valley, path, stable, late) for name, path in paths.items()}
    table(folder, "runs", ["run", *Outcome.__annotations__], [[n, *astuple(o)] for n, o in outcomes.items()])

    # both directions at the same x: with alpha = 0 the wrappers only watch
    watched = {
        "Nesterov": walk(args.lr, lr, Nesterov, 0.0, directions=True),
        "EMA-Nesterov": walk(args.lr, lr, EMANesterov, 0.0, args.gamma, directions=True),
    }
    phases = {"constant rate": stable, "decay": late}
    along = {(n, at): loss_along(valley, p.x[s], p.d[s]) for n, p in watched.items() for at, s in phases.items()}
    columns = [f"{n}, {at}" for n, at in along]
    table(folder, "positions", ["a", *columns], zip(POSITIONS, *along.values(), strict=True))
    sweep = {n: [outcome(valley, walk(rate, *how), stable, late) for rate in RATES] for n, how in four.items()}
    finals = {n: [o.final if o.highest < LOST else float("inf") for o in results] for n, results in sweep.items()}
    table(folder, "rates", ["lr", *finals], zip(RATES, *finals.values(), strict=True))
    draw(folder, args, valley, paths, watched, along, finals)

    best = {name: min(zip(values, RATES, strict=True)) for name, values in finals.items()}
    angles = {n: angle_to_river(valley, p.x[stable], p.d[stable]).mean() for n, p in watched.items()}
    one = POSITIONS.index(1.0)
    lines = [
        f"angle to the river: last update {angles['Nesterov']:.0f} degrees, EMA {angles['EMA-Nesterov']:.0f}",
        *(f"loss at x + d less that at x, {n}, {at}: {v[one]:+.5f}" for (n, at), v in along.items()),
        *(
            f"{n}: progress {o.progress:.1f}, final loss {o.final:.3f}, of it walls {o.walls:.5f}"
            for n, o in outcomes.items()
        ),
        f"largest lr: SGD 2, its control {2 * (1 - args.alpha):.3g}, Nesterov {largest_rate(args.alpha, 0):.3g}, "
        f"EMA-Nesterov {largest_rate(args.alpha, args.gamma):.4g}",
        "best final loss over lr: " + ", ".join(f"{n} {loss:.2f} (lr {rate:g})" for n, (loss, rate) in best.items()),
    ]
    return "\n".join(lines)


def _check(args: Arguments) -> None:
    if not (0 <= args.alpha < 1 and 0 < args.gamma < 1):
        raise ConfigError(f"alpha={args.alpha} must be in [0, 1) and gamma={args.gamma} between 0 and 1")
    if not 0.01 <= args.decay <= 0.9 or not 200 <= args.steps <= 100_000 or args.seeds < 1:
        raise ConfigError("decay must be between 0.01 and 0.9, steps between 200 and 100000, seeds at least 1")
    if not (0 < args.lr < largest_rate(args.alpha, 0) and min(args.slope, args.length) > 0 and args.noise >= 0):
        limit = largest_rate(args.alpha, 0)
        raise ConfigError(f"lr must be above 0 and below {limit:.3g}, slope and length above 0, noise at least 0")


def draw(
    folder: Any,
    args: Arguments,
    valley: Valley,
    paths: dict[str, Path],
    watched: dict[str, Path],
    along: dict[tuple[str, str], list[float]],
    finals: dict[str, list[float]],
) -> None:
    with figure(folder, "river_valley", 2, 2, (4.2, 3.1)) as (_, (here, line, time, rates)):
        first = args.steps // 2
        x = watched["Nesterov"].x[first : first + 60, 0]
        (left, low), (right, high) = x.min(0).values.tolist(), x.max(0).values.tolist()
        ps = torch.stack(
            torch.meshgrid(
                torch.linspace(left - 1, right + 2, 80), torch.linspace(low - 1, high + 1, 80), indexing="xy"
            ),
            -1,
        )
        here.contourf(ps[..., 0], ps[..., 1], valley.loss(ps), 12, cmap="Greys", alpha=0.5)
        here.plot(ps[0, :, 0], valley.bed(ps[0, :, 0]), color="C2", label="bed of the river")
        here.plot(*x.T, color="0.35", lw=0.7, marker=".", ms=3, label="SGD")
        for name, scale in (("Nesterov", 1), ("EMA-Nesterov", 15)):
            d = watched[name].d[first : first + 60 : 12, 0] * scale
            size = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.006, "zorder": 3}
            here.quiver(
                *x[::12].T,
                *d.T,
                color=COLORS[name],
                label=f"{name}'s d" + (f", {scale} times" if scale > 1 else ""),
                **size,
            )
        here.set(title="60 steps and the lookahead directions", xlabel="p1", ylabel="p2")
        for (name, at), values in along.items():
            line.plot(
                POSITIONS, values, "-" if at == "constant rate" else "--", color=COLORS[name], label=f"{name}, {at}"
            )
        line.set(title="loss at x + a d less that at x", xlabel="a")
        for name in COLORS:
            time.plot(valley.loss(paths[name].x).mean(1), color=COLORS[name], label=name)
        time.set(title=f"loss at x, lr {args.lr:g}", xlabel="step")
        for name, values in finals.items():  # what is infinite is left out
            rates.plot(RATES, values, marker=".", color=COLORS[name], label=name)
        rates.set(title="final loss over the learning rate", xlabel="lr, times sharpness")
        for axes in (here, line, time, rates):
            axes.legend()
