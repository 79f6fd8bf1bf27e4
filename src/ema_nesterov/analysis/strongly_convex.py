"""Theorem 1, measured and predicted rates: python scripts/analysis.py strongly_convex [output=FOLDER] [KEY=VALUE ...]

kappas=[A,B]  condition numbers, above 1
gammas=[A,B]  EMA rates of the updates
efolds        a run lasts until its predicted distance has fallen to exp(-efolds)
seed          of the starts and of the log-cosh problem

f is mu-strongly convex, its gradient L-Lipschitz, the base is gradient descent with step 1/L, kappa = L / mu. With

    u = sqrt(kappa (1-gamma))    theta = sqrt((1-gamma) / kappa)    alpha = (u-1)^2 / ((1-gamma) (kappa-1))    eq. (11)

f(x_T) - f* = O((1-theta)^T), which beats gradient descent's (1-1/kappa)^T where gamma < 1 - 1/kappa    eq. (12).
The proof (B.1) has V_{t+1} <= (1-theta) V_t for

    V = f(x) - f* + mu/2 ||z - x*||^2    z = x + c m    c = (u-1) / (1-gamma)    eqs. (27), (40)

On a quadratic each eigenvalue l moves by itself; with s = l / L and b = (1-gamma) alpha, (x, m) is multiplied by

    [[1-s, alpha (1-s)], [-(1-gamma) s, gamma + b (1-s)]]    trace gamma + (1-s)(1+b)    determinant (1-s)(gamma+b)

Its larger root is largest at an end of [mu, L]. At L it is gamma, whatever alpha: past gamma = 1 - 1/kappa no alpha
beats gradient descent. At mu, alpha above makes both roots 1 - theta, the least that any alpha gives.
Rates below are of the distance ||x - x*||, per step; that of f - f* is the square. So the theorem allows a distance
sqrt(1-theta), and a quadratic, with 1-theta, is faster than it says, as it is for gradient descent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path as FilePath

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..lookahead import EMANesterov, Nesterov
from .descent import Make, Path, around, descend
from .output import figure, folder_for, table
from .problems import Problem, quadratic, random_log_cosh

DIMENSIONS = 20
PAPER = ((0.5, 0.99), (0.7, 0.99), (0.5, 0.995))  # its alpha and gamma in training
KAPPAS = (100, 1000, 3000, 10000, 100000)


@dataclass
class Arguments:
    output: str = "analysis/strongly_convex"
    kappas: list[float] = field(default_factory=lambda: [10.0, 100.0, 1000.0])
    gammas: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.9, 0.99])
    efolds: float = 12.0
    seed: int = 0


# --- the theorem ----------------------------------------------------------------------------------


def theorem_alpha(kappa: float, gamma: float) -> float:
    """(sqrt(kappa(1-gamma)) - 1)^2 / ((1-gamma)(kappa-1)), eq. (11); meant for gamma <= 1 - 1/kappa, where it is 0."""
    return (math.sqrt(kappa * (1 - gamma)) - 1) ** 2 / ((1 - gamma) * (kappa - 1))


def theta(kappa: float, gamma: float) -> float:
    """sqrt((1-gamma)/kappa), eq. (40): what the theorem takes off V at each step."""
    return math.sqrt((1 - gamma) / kappa)


def theorem_kappa(alpha: float, gamma: float) -> float:
    """The kappa for which a given alpha < 1 is the theorem's: eq. (11) solved for u, kappa = u^2 / (1-gamma)."""
    u = (1 + math.sqrt(1 - (1 - alpha) * (1 + alpha * (1 - gamma)))) / (1 - alpha)
    return u**2 / (1 - gamma)


def spectral_radius(s: float | np.ndarray, alpha: float, gamma: float) -> np.ndarray:
    """Larger root of the iteration at the eigenvalue s L; elementwise in s."""
    b = (1 - gamma) * alpha
    trace, determinant = gamma + (1 - np.asarray(s)) * (1 + b), (1 - np.asarray(s)) * (gamma + b)
    root = np.sqrt(trace**2 - 4 * determinant + 0j)
    return np.maximum(abs(trace + root), abs(trace - root)) / 2


def quadratic_rate(kappa: float, alpha: float, gamma: float) -> float:
    """Exact rate of the distance over all quadratics with eigenvalues in [mu, L]: the worst is at an end."""
    return float(spectral_radius(np.array([1 / kappa, 1.0]), alpha, gamma).max())


def heavy_ball(kappa: float) -> tuple[float, float, float]:
    """(step size times L, momentum, rate of the distance), the best on quadratics (Polyak 1964)."""
    root = math.sqrt(kappa)
    rate = (root - 1) / (root + 1)
    return 4 * kappa / (root + 1) ** 2, rate**2, rate


# --- what a run shows -----------------------------------------------------------------------------


def problems(kappa: float, seed: int) -> dict[str, Problem]:
    """L = 1 and mu = 1 / kappa."""
    eigenvalues = torch.logspace(-math.log10(kappa), 0, DIMENSIONS, dtype=torch.float64)
    return {"quadratic": quadratic(eigenvalues), "log-cosh": random_log_cosh(kappa, DIMENSIONS, seed)}


def lyapunov(problem: Problem, path: Path, kappa: float, gamma: float) -> Tensor:
    """V_t of eq. (27) along a path of EMA-Nesterov, (steps + 1, ...); for gamma <= 1 - 1/kappa."""
    assert path.d.numel(), "descend(..., directions=True)"  # m_t
    c = (math.sqrt(kappa * (1 - gamma)) - 1) / (1 - gamma)
    return problem.value(path.x) + ((path.x + c * path.d) ** 2).sum(-1) / (2 * kappa)


def measured_rate(distances: Tensor) -> float:
    """rho of distance_t ~ C t^p rho^t: least squares of log distance on 1, log t and t, over the last half.

    A double root gives (a + b t) rho^t, which a plain slope would read as too slow a rate; so p is fitted too, within
    [0, 1]. Complex roots oscillate through 0; so each distance first becomes the largest from there on.
    """
    envelope = distances.flip(0).cummax(0).values.flip(0).numpy()
    half = len(envelope) // 2
    t, logs = np.arange(half, len(envelope)), np.log(envelope[half:])
    p, slope, _ = np.linalg.lstsq(np.stack([np.log(t), t, np.ones(len(t))], axis=1), logs)[0]
    if not 0 <= p <= 1:
        slope = np.polyfit(t, logs - np.clip(p, 0, 1) * np.log(t), 1)[0]
    return math.exp(slope)


def methods(kappa: float, gammas: list[float]) -> dict[str, tuple[Make, float, float, float]]:
    """name: (how to make it, gamma, alpha, exact rate on quadratics); 1 - 1/kappa for gradient descent."""
    lr, momentum, rate = heavy_ball(kappa)
    made: dict[str, tuple[Make, float, float, float]] = {
        "gradient descent": (around(1.0), math.nan, math.nan, 1 - 1 / kappa),
        "heavy ball": (around(lr, momentum=momentum), math.nan, math.nan, rate),
    }
    for gamma in gammas:
        alpha = theorem_alpha(kappa, gamma)
        make = around(1.0, EMANesterov, alpha, gamma) if gamma else around(1.0, Nesterov, alpha)
        made[f"gamma {gamma:g}" if gamma else "Nesterov"] = make, gamma, alpha, quadratic_rate(kappa, alpha, gamma)
    return made


def run(args: Arguments) -> str:
    if not all(k > 1 for k in args.kappas) or not all(0 <= g < 1 for g in args.gammas):
        raise ConfigError("kappas must be above 1 and gammas in [0, 1); type kappas=[10,100] gammas=[0,0.9]")
    if not (args.kappas and args.gammas and 1 <= args.efolds <= 500):
        raise ConfigError("kappas and gammas must not be empty, efolds must be from 1 to 500")
    folder = folder_for(args.output)
    start = torch.randn(DIMENSIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(args.seed)) * 3
    rows, runs = [], {}
    for kappa in args.kappas:
        for name, problem in problems(kappa, args.seed).items():
            for method, (make, gamma, alpha, exact) in methods(kappa, args.gammas).items():
                efolds = args.efolds if method != "gradient descent" else args.efolds / 2  # no double root
                steps = max(40, math.ceil(efolds / (1 - exact)))
                path = descend(make, problem.gradient, start, steps, directions=True)
                distance, v, allowed, slowest = path.x.norm(dim=-1), None, math.nan, math.nan
                if gamma <= 1 - 1 / kappa:
                    v = lyapunov(problem, path, kappa, gamma)
                    allowed, slowest = 1 - theta(kappa, gamma), (v[1:] / v[:-1]).max().item()
                runs[kappa, name, method] = distance, v
                rows.append(
                    (name, kappa, method, gamma, alpha, exact, measured_rate(distance), allowed, slowest, steps)
                )
    columns = ("problem", "kappa", "method", "gamma", "alpha", "exact_rate", "measured_rate", "theorem_v", "slowest_v")
    table(folder, "rates", (*columns, "steps"), rows)
    draw(folder, args, rows, runs)
    return summary(rows)


def summary(rows: list[tuple]) -> str:
    lines = []
    inside = [row for row in rows if not math.isnan(row[7])]
    if inside:
        off = max(abs((1 - row[6]) / (1 - row[5]) - 1) for row in inside if row[0] == "quadratic")
        lines += [
            f"gamma <= 1 - 1/kappa: 1 - rate measured on quadratics is within {100 * off:.1f}% of theta",
            f"gamma <= 1 - 1/kappa: V_(t+1) / V_t is at most {max(row[8] / row[7] for row in inside):.4f} (1 - theta)",
        ]
    for name, kappa in dict.fromkeys(row[:2] for row in rows):
        rates = ", ".join(f"{row[2]} {1 - row[6]:.5f}" for row in rows if row[:2] == (name, kappa))
        lines.append(f"{name}, kappa {kappa:g}, measured 1 - rate: {rates}")
    for alpha, gamma in PAPER:
        gains = ", ".join(f"{k:g}: {k * (1 - quadratic_rate(k, alpha, gamma)):.2f}" for k in KAPPAS)
        lines.append(
            f"alpha {alpha}, gamma {gamma}: the theorem's at kappa {theorem_kappa(alpha, gamma):.0f}; "
            f"1 - rate over gradient descent's on quadratics, by kappa: {gains}"
        )
    return "\n".join(lines)


def draw(folder: FilePath, args: Arguments, rows: list[tuple], runs: dict) -> None:
    kappa = max(args.kappas)
    with figure(folder, "strongly_convex", columns=3, size=(4.0, 3.3)) as (_, (distances, rates, falls)):
        shown = {method: runs[kappa, "quadratic", method][0] for method in methods(kappa, args.gammas)}
        end = sorted(len(d) for d in shown.values())[-2] // 2
        for method, d in shown.items():
            color = "black" if method == "gradient descent" else None
            distances.semilogy((d / d[0])[:end], label=method, color=color)
        distances.set(xlabel="step t", ylim=(1e-8, 3))
        distances.set_title(f"||x_t - x*||, quadratic, kappa {kappa:g}", fontsize=9)
        distances.legend(fontsize=7)
        one_minus = np.logspace(0, min(-3.0, math.log10(1 - max(args.gammas))), 200)
        for i, k in enumerate(args.kappas):
            exact = [1 - quadratic_rate(k, theorem_alpha(k, 1 - w), 1 - w) for w in one_minus]
            rates.loglog(one_minus, exact, color=f"C{i}", label=f"exact, kappa {k:g}")
            label = None if i else "gradient descent"
            rates.axhline(1 / k, color=f"C{i}", linestyle=":", linewidth=1, label=label)
            for name, marker in (("quadratic", "o"), ("log-cosh", "x")):
                points = [(1 - row[3], 1 - row[6]) for row in rows if row[:2] == (name, k) and row[3] >= 0]
                label = None if i else f"measured, {name}"
                rates.plot(*zip(*points, strict=True), marker, color=f"C{i}", markersize=4, label=label)
        rates.invert_xaxis()
        rates.set(xlabel="1 - gamma", ylim=(min(1 / kappa, one_minus[-1]) / 500, 2))
        rates.set_title("1 - rate of ||x_t - x*||", fontsize=9)
        rates.legend(loc="lower left", fontsize=7)
        for i, gamma in enumerate(g for g in args.gammas if g <= 1 - 1 / kappa):
            v = runs[kappa, "log-cosh", f"gamma {gamma:g}" if gamma else "Nesterov"][1]
            falls.semilogy((v / v[0])[:end], color=f"C{i + 1}", label=f"gamma {gamma:g}")
            theorem = (1 - theta(kappa, gamma)) ** np.arange(min(end, len(v)))
            falls.semilogy(theorem, color=f"C{i + 1}", linestyle="--", linewidth=1)
        falls.set(xlabel="step t", ylim=(1e-6, 3))
        falls.set_title(f"V_t / V_0 (dashed: theorem), log-cosh, kappa {kappa:g}", fontsize=9)
        if falls.lines:
            falls.legend(fontsize=7)
