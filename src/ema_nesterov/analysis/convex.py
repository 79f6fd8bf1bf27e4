"""Theorem 2, O(1/T^2) on convex functions: python scripts/analysis.py convex [output=FOLDER] [KEY=VALUE ...]

gammas=[A,B]  EMA rates of the updates
k             slope of c_t below, at most 0.43
steps         from 100 to 5000, which takes 1.7 GB of memory; it grows with the square
seed          of the logistic regression

f is convex, its gradient L-Lipschitz, the base is gradient descent with step 1/L. With, for k <= 0.43,

    alpha_t = (1-gamma) t / ((1-gamma) t + 1 + 1/k)        c_t = k (t + gamma / (1-gamma))        z_t = x_t + c_t m_t
    eta_t = (1 + k (1 + (1-gamma) t)) / L                  A_t = eta_t (c_t / alpha_t - 1)        A_0 see below

V_t = A_t (f(x_t) - f*) + 1/2 ||z_t - x*||^2 never grows, so f(x_T) - f* <= V_0 / A_T; A_T ~ (1-gamma) (k T)^2 / L.
The paper (Theorem 2, Appendix B.2) leaves its constants to its proof; these are ours, of the same form. Why they do:

    z_{t+1} = z_t - eta_t grad f(y_t)    and    A_t (y_t - x_t) = eta_t (z_t - y_t)    by the choice of alpha_t, A_t
    V_{t+1} <= V_t + 1/2 (eta_t^2 - (A_t + eta_t) / L) ||grad f(y_t)||^2               where A_{t+1} <= A_t + eta_t

The bracket is <= 0 for t >= 1, as eta_t <= c_t / (L alpha_t). Let w = 1-gamma. A_{t+1} <= A_t + eta_t, times L, is

    gamma k^2 <= (1-2k) (1 + k + k w t) + k (1-k) w + gamma (1+k)^2 / (w^2 t (t+1)),

which holds for every t and gamma if k^2 <= (1-2k)(1+k): k <= (sqrt(13)-1)/6 = 0.434. Step 0, where m_0 = 0, needs both
too, which is A_0 = max(A_1, L eta_0^2) - eta_0. gamma = 0 and k = 1/2 is Nesterov's t / (t+3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as FilePath

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..lookahead import EMANesterov, Nesterov
from .descent import Make, Path, around, descend
from .output import figure, folder_for, table
from .problems import Problem, chain, chain_distance, chain_minimum, random_logistic


@dataclass
class Arguments:
    output: str = "analysis/convex"
    gammas: list[float] = field(default_factory=lambda: [0.5, 0.9, 0.99])
    k: float = 0.4
    steps: int = 2000
    seed: int = 0


# --- the theorem ----------------------------------------------------------------------------------


def theorem_alpha(step: int, gamma: float, k: float) -> float:
    """alpha_t of y_t, t the number of completed steps, as a wrapper asks for it."""
    return (1 - gamma) * step / ((1 - gamma) * step + 1 + 1 / k)


def weights(steps: int, gamma: float, k: float) -> Tensor:
    """L A_t for t = 0 .. steps, (steps + 1,)."""
    w, t = 1 - gamma, torch.arange(1, steps + 1, dtype=torch.float64)
    eta = 1 + k * (1 + w * t)
    after = eta * ((w * t + gamma) * eta / (w * w * t) - 1)
    first = max(after[0].item(), (1 + k) ** 2) - (1 + k)
    return torch.cat([torch.tensor([first], dtype=torch.float64), after])


# --- what a run shows -----------------------------------------------------------------------------


def lyapunov(problem: Problem, path: Path, gamma: float, k: float) -> Tensor:
    """V_t of eq. (94) along a path of EMA-Nesterov, (steps + 1,)."""
    assert path.d is not None, "descend(..., directions=True)"  # m_t
    steps = len(path.x) - 1
    c = k * (torch.arange(steps + 1, dtype=torch.float64) + gamma / (1 - gamma))
    z = path.x + c[:, None] * path.d
    gap = problem.value(path.x) - problem.minimum
    return weights(steps, gamma, k) / problem.L * gap + ((z - problem.minimiser) ** 2).sum(-1) / 2


def bound(gap: Tensor, distance: Tensor, L: float, gamma: float, k: float) -> Tensor:
    """V_0 / A_t for t = 0 .. steps, from f(x_0) - f* and ||x_0 - x*||^2, both (steps + 1,)."""
    A = weights(len(gap) - 1, gamma, k)
    return (A[0] * gap + L * distance / 2) / A


def slope(gaps: Tensor) -> float:
    """Least-squares slope of log gap_t on log t over the last decade, with steps evenly spaced in log t."""
    end = len(gaps) - 1
    t = np.unique(np.geomspace(max(1, end / 10), end, 200).astype(int))
    return float(np.polyfit(np.log(t), np.log(gaps.numpy()[t].clip(1e-300)), 1)[0])


def methods(L: float, gammas: list[float], k: float) -> dict[str, tuple[Make, float, float]]:
    """name: (how to make it, gamma, k)."""
    made: dict[str, tuple[Make, float, float]] = {
        "gradient descent": (around(1 / L), math.nan, math.nan),
        "Nesterov": (around(1 / L, Nesterov, partial(theorem_alpha, gamma=0.0, k=0.5)), 0.0, 0.5),
    }
    for g in gammas:
        made[f"gamma {g:g}"] = around(1 / L, EMANesterov, partial(theorem_alpha, gamma=g, k=k), g), g, k
    return made


@dataclass(frozen=True)
class Measured:
    gamma: float
    k: float
    gap: Tensor  # f(x_t) - f*
    bound: Tensor
    start: Tensor  # f(x_0) - f*
    v: Tensor | None


def measure(args: Arguments) -> dict[tuple[str, str], Measured]:
    """By (problem, method), for t = 0 .. steps.

    The chain's numbers are those of the chain of 2t+1 links, the worst for t steps, over L ||x_0 - x*||^2: t steps
    reach t coordinates, and so f(x_t) is the same on every longer chain.
    """
    t = torch.arange(args.steps + 1, dtype=torch.float64)
    measured = {}
    for name, problem in {"chain": chain(args.steps + 1), "logistic": random_logistic(200, 60, args.seed)}.items():
        minimum, distance = torch.full_like(t, problem.minimum), (problem.minimiser**2).sum().expand_as(t)
        scale = torch.ones_like(t)
        if name == "chain":
            minimum, distance = chain_minimum(2 * t + 1), chain_distance(2 * t + 1)
            scale = problem.L * distance
        for method, (make, gamma, k) in methods(problem.L, args.gammas, args.k).items():
            watched = name == "logistic" and not math.isnan(gamma)
            path = descend(make, problem.gradient, torch.zeros_like(problem.minimiser), args.steps, directions=watched)
            gap = problem.value(path.x) - minimum
            start = problem.value(path.x[0]) - minimum
            above = problem.L * distance / (2 * t)  # gradient descent's (Beck and Teboulle 2009, Theorem 3.1)
            if not math.isnan(gamma):
                above = bound(start, distance, problem.L, gamma, k)
            v = lyapunov(problem, path, gamma, k) if watched else None
            measured[name, method] = Measured(gamma, k, gap / scale, above / scale, start / scale, v)
    return measured


def first(holds: Tensor) -> int | None:
    """The first t from which on it holds, None where it does not at the end."""
    fails = (~holds).nonzero()
    t = int(fails[-1]) + 1 if len(fails) else 0
    return t if t < len(holds) else None


def run(args: Arguments) -> str:
    if not (args.gammas and all(0 <= g < 1 for g in args.gammas)):
        raise ConfigError("gammas must be in [0, 1), at least one; type gammas=[0.5,0.9]")
    if not 0 < args.k <= 0.43 or not 100 <= args.steps <= 5000:
        raise ConfigError("k must be above 0 and at most 0.43, steps from 100 to 5000")
    folder = folder_for(args.output)
    measured, rows, lines = measure(args), [], []
    for (name, method), m in measured.items():
        slopes, ends = (slope(m.gap), slope(m.bound)), (m.gap[-1].item(), m.bound[-1].item())
        worst = (m.gap / m.bound)[1:].max().item()
        reached = first(m.gap <= measured[name, "gradient descent"].gap[-1])
        says = first(m.bound < m.start)
        grown = (m.v[1:] / m.v[:-1]).max().item() if m.v is not None else math.nan
        rows.append((name, method, m.gamma, m.k, *slopes, *ends, worst, grown, reached, says))
        lines.append(
            f"{name}, {method}: slope {slopes[0]:.2f}, gap {ends[0]:.2e}, bound {ends[1]:.2e}, "
            f"gradient descent's last gap at step {reached or 'none'}, bound below the start's from {says or 'none'}"
        )
    columns = ("problem", "method", "gamma", "k", "slope", "bound_slope", "gap", "bound", "largest_gap_over_bound")
    more = ("largest_v_ratio", "gradient_descents_last_gap_at", "bound_below_start_from")
    table(folder, "rates", (*columns, *more), rows)
    times = [int(t) for t in np.unique(np.geomspace(1, args.steps, 60).astype(int))]
    curves = [(*key, t, m.gap[t].item(), m.bound[t].item()) for key, m in measured.items() for t in times]
    table(folder, "curves", ("problem", "method", "t", "gap", "bound"), curves)
    draw(folder, measured, args.steps)
    grown = max(row[9] for row in rows if row[9] == row[9])
    return "\n".join([*lines, f"logistic: V_(t+1) / V_t is at most {grown:.6f}"])


def draw(folder: FilePath, measured: dict[tuple[str, str], Measured], steps: int) -> None:
    t = np.unique(np.geomspace(1, steps, 400).astype(int))
    titles = {
        "chain": "worst-case quadratic, f(x_t) - f* (dashed: bound)",
        "logistic": "logistic regression, f(x_t) - f* (dashed: bound)",
    }
    with figure(folder, "convex", columns=3, size=(4.0, 3.3)) as (_, axes):
        for ax, (name, title) in zip(axes, titles.items(), strict=False):
            for i, (method, m) in enumerate((key[1], m) for key, m in measured.items() if key[0] == name):
                color = f"C{i - 1}" if i else "black"
                ax.loglog(t, m.gap[t], color=color, label=method)
                ax.loglog(t, m.bound[t], color=color, linestyle="--", linewidth=1)
            ax.set_xlabel("step t")
            ax.set_title(title, fontsize=9)
        axes[0].loglog(t, 3 / (32 * (t + 1.0) ** 2), color="grey", linestyle=":", label="no method is lower")
        axes[0].legend(fontsize=7)
        for i, (m, v) in enumerate((m, m.v) for m in measured.values() if m.v is not None):
            axes[2].loglog(t, v[t] / v[0], color=f"C{i}", label=f"gamma {m.gamma:g}, k {m.k:g}")
        axes[2].set_xlabel("step t")
        axes[2].set_title("V_t / V_0, logistic regression", fontsize=9)
        axes[2].legend(fontsize=7)
