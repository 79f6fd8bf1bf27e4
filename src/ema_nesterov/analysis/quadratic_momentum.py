"""Rates of the wrappers around momentum on quadratics: python scripts/analysis.py quadratic_momentum [KEY=VALUE ...]

Figure 4 of Zhang et al. (2019): how fast heavy ball and Lookahead around it (its momentum maintained) converge on a
quadratic without noise, against the condition number, at a fixed momentum and the best learning rate of a grid; and
the same of Nesterov, EMA-Nesterov and GPA. The eigenvalues of the quadratic are the whole interval [1 / condition, 1],
or its two ends. The rates are spectral radii; some, at the first momentum, are held against runs of the real wrappers.

output=analysis/quadratic_momentum   folder of the figure and CSV files
momenta=[0.9,0.99]   of heavy ball, alone and within the wrappers; of Nesterov (around gradient descent)
alpha=0.5         of Lookahead and EMA-Nesterov
k=20              steps to a sync of Lookahead
ema_decay=0.99    gamma of EMA-Nesterov
mu_x=0.9967       of GPA (its authors' default, as is mu_y)
mu_y=0.7          of GPA
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError
from ..lookahead import GPA, EMANesterov, Lookahead, Nesterov
from .descent import Make, around, descend
from .output import figure, folder_for, table
from .systems import Array, Number, matrix, rate


@dataclass
class Arguments:
    output: str = "analysis/quadratic_momentum"
    momenta: list[float] = field(default_factory=lambda: [0.9, 0.99])
    alpha: float = 0.5
    k: int = 20
    ema_decay: float = 0.99
    mu_x: float = 0.9967
    mu_y: float = 0.7


# --- what one step, or one period, does to one direction of curvature a; h = lr a --------------------
# v below is lr times torch's momentum buffer: v' = momentum v + h p, p' = p - v'. With momentum 0 the base is
# gradient descent.


def heavy_ball(h: Number, momentum: Number) -> Array:
    """State (p, v)."""
    return matrix([[1 - h, -momentum], [h, momentum]])


def lookahead(h: Number, momentum: Number, alpha: Number, k: int) -> Array:
    """State (slow, v) per period, momentum maintained: slow' = (1 - alpha) slow + alpha p_k, v' = v_k."""
    synced = matrix([[alpha, 0], [0, 1]]) @ np.linalg.matrix_power(heavy_ball(h, momentum), k)
    return synced + matrix([[1 - alpha, 0], [0, 0]])


def stacked(h: float, momentum: float, alpha: float, k: int) -> Array:
    """Lookahead as Zhang et al. write it (their Appendix B.1), for k of at least 2: L B^(k-1) T on the stack
    (p_{t,0}, p_{t-1,k}, ..., p_{t-1,1}), one direction. T begins the period, with the momentum
    p_{t-1,k} - p_{t-1,k-1} of the last one; L interpolates. All shift the stack by one."""
    shift = np.eye(k + 1, k=-1)
    T, B, L = shift.copy(), shift.copy(), shift.copy()
    T[0, :3] = 1 - h, momentum, -momentum
    B[0, :2] = 1 - h + momentum, -momentum
    L[0, 0], L[0, k] = alpha, 1 - alpha
    return L @ np.linalg.matrix_power(B, k - 1) @ T


def ema_nesterov(h: Number, momentum: Number, alpha: Number, gamma: Number) -> Array:
    """State (x, m, v): y = x + alpha m, v' = momentum v + h y, x' = y - v', m' = gamma m + (1 - gamma) (x' - x).
    gamma = 0 is Nesterov."""
    x = [1 - h, alpha * (1 - h), -momentum]
    m = [-(1 - gamma) * h, gamma + (1 - gamma) * alpha * (1 - h), -(1 - gamma) * momentum]
    return matrix([x, m, [h, h * alpha, momentum]])


def gpa(h: Number, momentum: Number, mu_x: Number, mu_y: Number) -> Array:
    """State (x, z, v): y = mu_y x + (1 - mu_y) z, v' = momentum v + h y, z' = z - v', x' = mu_x x + (1 - mu_x) z'."""
    v = [h * mu_y, h * (1 - mu_y), momentum]
    z = [-h * mu_y, 1 - h * (1 - mu_y), -momentum]
    return matrix([[mu_x + (1 - mu_x) * z[0], (1 - mu_x) * z[1], (1 - mu_x) * z[2]], z, v])


# --- over a spectrum --------------------------------------------------------------------------------


def best_rate(h: Array, rates: Array, condition: float, only_ends: bool = False) -> tuple[float, float]:
    """(rate, lr): the learning rate at which the slowest direction is fastest, of all eigenvalues in [1 / condition, 1]
    or of its two ends only.

    rates[i] is the rate of one direction at h[i], h on a logarithmic grid: an lr takes the window [lr / condition, lr].
    """
    width = 1 + round(float(np.log(condition) / np.log(h[1] / h[0])))
    slowest, covered = rates, 1
    while not only_ends and 2 * covered <= width:  # the minimum over windows of `covered` points
        slowest, covered = np.minimum(slowest[:-covered], slowest[covered:]), 2 * covered
    count = len(h) - width + 1
    slowest = np.minimum(slowest[:count], slowest[width - covered :][:count])
    best = int(np.argmax(slowest))
    return float(slowest[best]), float(h[best + width - 1])


def contraction(make: Make, eigenvalues: Array, steps: int) -> float:
    """1 - rho measured: a real optimizer from x = 1, between the largest |x| in the middle of the run and at its end.

    Each direction oscillates within an envelope rho^t; the slowest direction counts.
    """
    a = torch.from_numpy(eigenvalues)
    size = descend(make, lambda y: a * y, torch.ones_like(a), steps).x.abs()
    window = steps // 4
    middle, end = size[steps // 2 - window + 1 : steps // 2 + 1].amax(0), size[-window:].amax(0)
    ratios = (end.log() - middle.log()) / (steps - steps // 2)
    return 1 - float(ratios[end > 1e-280].amax().exp())  # what has vanished is not the slowest


# --- the script -------------------------------------------------------------------------------------

CONDITIONS, CHECKED, STEPS = np.geomspace(10, 1e7, 49), (0, 16), 1600
SPECTRA = {"interval": "all of an interval", "ends": "its two ends"}
COLOURS = {
    "heavy ball": "black",
    "Lookahead": "tab:red",
    "Nesterov": "tab:green",
    "EMA-Nesterov": "tab:blue",
    "GPA": "tab:cyan",
}


def optimizers(
    args: Arguments, beta: float
) -> dict[str, tuple[Callable[[Number], Array], int, Callable[[float], Make]]]:
    """By name: the matrix of a period as a function of h, its steps, and the real optimizer of an lr."""
    k, alpha, gamma, mu_x, mu_y = args.k, args.alpha, args.ema_decay, args.mu_x, args.mu_y
    return {
        "heavy ball": (lambda h: heavy_ball(h, beta), 1, lambda lr: around(lr, momentum=beta)),
        "Lookahead": (
            lambda h: lookahead(h, beta, alpha, k),
            k,
            lambda lr: around(lr, Lookahead, alpha, k, momentum=beta),
        ),
        "Nesterov": (lambda h: ema_nesterov(h, 0.0, beta, 0.0), 1, lambda lr: around(lr, Nesterov, beta)),
        "EMA-Nesterov": (
            lambda h: ema_nesterov(h, beta, alpha, gamma),
            1,
            lambda lr: around(lr, EMANesterov, alpha, gamma, momentum=beta),
        ),
        "GPA": (lambda h: gpa(h, beta, mu_x, mu_y), 1, lambda lr: around(lr, GPA, mu_x, mu_y, momentum=beta)),
    }


def check(args: Arguments) -> None:
    if not args.momenta or not all(0 <= value < 1 for value in (*args.momenta, args.ema_decay, args.mu_x)):
        raise ConfigError("momenta (at least one), ema_decay and mu_x must be at least 0 and below 1")
    if not (0 < args.alpha <= 1 and 0 < args.mu_y <= 1):
        raise ConfigError("alpha and mu_y must be above 0 and at most 1")
    if args.k < 1:
        raise ConfigError("k must be at least 1")


def run(args: Arguments) -> str:
    check(args)
    folder, h, k = folder_for(args.output), np.geomspace(1e-8, 40, 6000), args.k
    rows: list[tuple[Any, ...]] = []
    checks: list[tuple[Any, ...]] = []
    found = {}
    for beta in args.momenta:
        for name, (step, period, make) in optimizers(args, beta).items():
            rates = rate(step(h), period)
            for spectrum in SPECTRA:
                pairs = found[beta, spectrum, name] = [best_rate(h, rates, c, spectrum == "ends") for c in CONDITIONS]
                rows += [(beta, spectrum, float(c), name, *pair) for c, pair in zip(CONDITIONS, pairs, strict=True)]
            for i in CHECKED if beta == args.momenta[0] else ():
                lr, a = found[beta, "interval", name][i][1], np.geomspace(1 / CONDITIONS[i], 1, 50)
                exact, steps = float(rate(step(lr * a), period).min()), 4 * k * -(-STEPS // 4 // k)
                checks.append((beta, float(CONDITIONS[i]), name, lr, exact, contraction(make(lr), a, steps)))
    table(folder, "rates", ("momentum", "spectrum", "condition", "optimizer", "rate", "lr"), rows)
    table(folder, "checked", ("momentum", "condition", "optimizer", "lr", "rate", "measured"), checks)

    off = max(abs(measured - exact) / exact for *_, exact, measured in checks)
    lines = [f"{len(checks)} rates: contraction of the real optimizers within {100 * off:.1f} % of 1 - rho"]
    with figure(folder, "quadratic_momentum", len(args.momenta), 2, size=(4.0, 3.0)) as (_, axes):
        for ax, (spectrum, beta) in zip(axes, product(SPECTRA, args.momenta), strict=True):
            for name, colour in COLOURS.items():
                ax.plot(CONDITIONS, [pair[0] for pair in found[beta, spectrum, name]], color=colour, label=name)
            ax.set(xscale="log", yscale="log", ylim=(1e-5, 0.3), title=f"momentum {beta:g}, {SPECTRA[spectrum]}")
            ax.set(xlabel="condition number", ylabel="rate 1 - rho")
            ax.minorticks_off()
            for momentum, condition, name, *_, measured in checks:
                if (spectrum, beta) == ("interval", momentum):
                    ax.plot(condition, measured, "o", color=COLOURS[name], ms=4)
            for i in range(0, len(CONDITIONS), 8):
                each = (f"{name} {found[beta, spectrum, name][i][0]:.6f}" for name in COLOURS)
                lines.append(f"momentum {beta:g}, {spectrum}, condition {CONDITIONS[i]:g}: {', '.join(each)}")
        axes[0].legend(loc="lower left")
    return "\n".join([*lines, f"figure and tables in {folder}"])
