"""Rate and variance of the wrappers under noise: python scripts/analysis.py noisy_quadratic [KEY=VALUE ...]

The model of Zhang et al. (2019, section 3.1): L(x) = 1/2 (x - c)^T A (x - c), where every step draws a new
c ~ N(0, Sigma); A and Sigma are diagonal. Around SGD every wrapper is then a small linear recursion in each direction:
its rate is a spectral radius, its stationary variance the solution of a linear equation. Both are held against
simulations of the real wrappers; then follow the paper's Figures 3, 11 and 12 in the small, and what each wrapper
pays in stationary loss for its rate.

output=analysis/noisy_quadratic   folder of the figures and CSV files
dimensions=100    eigenvalues 1, 1/2, ..., 1/dimensions of A; Sigma = A^-1
lr=0.1            of SGD within the wrappers, in the comparison with SGD at lr / (1 - alpha)
alpha=0.5         of EMA-Nesterov and of Lookahead; outer momentum of SNOO (whose outer lr is 1 - alpha); mu_y of GPA
ema_decay=0.99    gamma of EMA-Nesterov; GPA's mu_x is alpha + (1 - alpha) gamma
k=5               steps to a sync of Lookahead and SNOO
chains=2000       of each simulation
seed=0            of the noise
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError
from ..lookahead import GPA, SNOO, EMANesterov, Lookahead, Nesterov
from .descent import Make, Path, around, descend
from .output import figure, folder_for, table
from .systems import (
    Array,
    Number,
    System,
    after,
    decayed,
    ema_nesterov,
    fast_variance,
    gpa,
    lookahead,
    rate,
    repeated,
    sgd_variance,
    snoo,
    stationary,
    variance,
)
from .zhang_2019 import figures


@dataclass
class Arguments:
    output: str = "analysis/noisy_quadratic"
    dimensions: int = 100
    lr: float = 0.1
    alpha: float = 0.5
    ema_decay: float = 0.99
    k: int = 5
    chains: int = 2000
    seed: int = 0


# --- simulation -----------------------------------------------------------------------------------


def noisy(make: Make, curvatures: Sequence[float], chains: int, steps: int, seed: int = 0, start: float = 0.0) -> Path:
    """Independent chains of a real optimizer with gradients a (y - c), c ~ N(0, 1)."""
    draws, a = torch.Generator().manual_seed(seed), torch.tensor(curvatures, dtype=torch.float64)
    shape = (chains, len(curvatures))

    def gradient(y: torch.Tensor) -> torch.Tensor:
        return a * (y - torch.randn(shape, generator=draws, dtype=torch.float64))

    return descend(make, gradient, torch.full(shape, start), steps)


def measured(values: torch.Tensor) -> tuple[Array, Array]:
    """Second moment over time and chains, (time, chains, dimensions) -> (dimensions,), and its standard error."""
    each = values.square().mean(0)
    return each.mean(0).numpy(), (each.std(0) / len(each) ** 0.5).numpy()


# --- the script -----------------------------------------------------------------------------------

SIMULATED = (1.0, 0.3, 0.1, 0.03)  # curvatures, with lr 0.5
DIRECTIONS = 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0  # h of the table of settings
RATES = 0.05, 0.1, 0.2, 0.5  # over the least curvature: SGD has them at these lr
ALPHAS, GAMMAS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95), 1 - np.geomspace(0.002, 0.5, 16)
LOWERED = np.array([0.9, 0.99])[:, None, None, None]  # gammas
PERIOD, DOUBLINGS, DECAY = 20, 6, 640  # horizons 20 * 2^j; steps of the runs whose lr falls to 0
LABELS = ("SGD", "SGD, averaged", "Lookahead", "SNOO", "Nesterov", "EMA-Nesterov", "GPA")


def wrappers(lr: float, a: Number, alpha: float, gamma: float, k: int) -> dict[str, tuple[Make, System]]:
    """Each wrapper twice: around a real SGD, and as a system. GPA is given EMA-Nesterov's gradients (see `gpa.py`)."""
    h, mu_x, wide = lr * a, alpha + (1 - alpha) * gamma, lr / (1 - alpha)
    return {
        "SGD": (around(lr), lookahead(h, 1.0, 1)),
        "Lookahead": (around(lr, Lookahead, alpha, k), lookahead(h, alpha, k)),
        "SNOO": (around(lr, SNOO, 1 - alpha, alpha, k), snoo(h, 1 - alpha, alpha, k)),
        "Nesterov": (around(lr, Nesterov, alpha), ema_nesterov(h, alpha, 0.0)),
        "EMA-Nesterov": (around(lr, EMANesterov, alpha, gamma), ema_nesterov(h, alpha, gamma)),
        "GPA": (around(wide, GPA, mu_x, alpha), gpa(wide * a, mu_x, alpha)),
    }


def simulated(args: Arguments) -> list[tuple[Any, ...]]:
    """Rows of wrapper, point, h, closed form, measured variance, its standard error."""
    rows: list[tuple[Any, ...]] = []
    h = 0.5 * np.array(SIMULATED)
    cases = wrappers(0.5, np.array(SIMULATED), args.alpha, args.ema_decay, args.k)
    slowest = {name: float(rate(system.T, system.k).min()) for name, (_, system) in cases.items()}
    if min(slowest.values()) < 1e-3:
        name = min(slowest, key=lambda name: slowest[name])
        raise ConfigError(f"{name} would take too long to settle; type a smaller ema_decay, or alpha nearer to 0.5")
    for name, (make, system) in cases.items():
        k, V = system.k, stationary(system)
        settled = k * int(np.ceil(4 / slowest[name] / k))
        path = noisy(make, SIMULATED, args.chains, settled + k * (400 // k + 1), args.seed)
        x, y = path.x[settled:], path.y[settled:-1]
        points = {"x": (variance(system, V), x[::k])}
        points["y"] = (variance(system, V, "y") if "y" in system.reads else fast_variance(points["x"][0], h, k), y)
        if name == "EMA-Nesterov":  # e is on the line from x through y
            beyond = args.ema_decay / (1 - args.ema_decay) / args.alpha
            points["e"] = (variance(system, V, "e"), x[:-1] - beyond * (y - x[:-1]))
        for point, (exact, values) in points.items():
            rows += [(name, point, *map(float, row)) for row in zip(h, exact, *measured(values), strict=True)]
    return rows


def grid(h: Array) -> Iterator[tuple[dict[str, str], str, System]]:
    """What is searched: the point to report by label, the settings, the system for all h."""
    yield {"SGD": "x"}, "", lookahead(h, 1.0, 1)
    for gamma in GAMMAS:
        yield {"SGD, averaged": "e"}, f"gamma={gamma:.3f}", ema_nesterov(h, 0.0, gamma)
    for alpha in ALPHAS:
        yield {"Nesterov": "x"}, f"alpha={alpha}", ema_nesterov(h, alpha, 0.0)
        for gamma in GAMMAS:  # GPA's x is EMA-Nesterov's e
            yield {"EMA-Nesterov": "x", "GPA": "e"}, f"alpha={alpha} gamma={gamma:.3f}", ema_nesterov(h, alpha, gamma)
        for k in (5, 10, 20):
            yield {"Lookahead": "x"}, f"alpha={alpha} k={k}", lookahead(h, alpha, k)
            for lr in (0.4, 0.7, 1.0):
                yield {"SNOO": "x"}, f"lr={lr} momentum={alpha} k={k}", snoo(h, lr, alpha, k)


def search(a: Array, targets: Array) -> tuple[dict[str, list[tuple[float, str]]], dict[str, Array]]:
    """Over `grid` and lr, by label: the least stationary loss 1/2 sum_i V_i at each rate (of the slowest direction)
    with its settings, and the least loss after 20 2^j steps from x = 1."""
    lrs = np.geomspace(1e-3, 1.95, 40)
    rates = {label: [(np.inf, "")] * len(targets) for label in LABELS}
    horizons = {label: np.full(DOUBLINGS + 1, np.inf) for label in LABELS}
    for reported, settings, whole in grid(lrs[:, None] * a):
        speed = rate(whole.T, whole.k).min(-1)
        n = int(np.argmax(speed)) + 1  # a larger lr is no faster
        speed = np.maximum.accumulate(speed[:n])
        system = System(whole.T[:n], whole.Q[:n], whole.start, whole.reads, whole.k)
        V, states = stationary(system), list(after(repeated(system, PERIOD // system.k), DOUBLINGS))
        for label, of in reported.items():
            losses = np.interp(targets, speed, variance(system, V, of).sum(-1) / 2, np.inf, np.inf)
            rates[label] = [min(old, (new, settings)) for old, new in zip(rates[label], losses.tolist(), strict=True)]
            now = [
                (variance(system, C, of) + a * (system.reads[of] @ s)[..., 0, 0] ** 2).sum(-1) / 2 for s, C in states
            ]
            horizons[label] = np.minimum(horizons[label], np.min(now, axis=-1))
    return rates, horizons


def lowered(a: Array) -> dict[str, float]:
    """Least loss after DECAY steps from x = 1 with lr and alpha falling to 0."""
    lrs, alphas = np.geomspace(0.08, 1.5, 20)[:, None], np.array([0.3, 0.6, 0.8])[:, None, None]
    best = {}
    for name, alpha, gamma in (("SGD", 0.0, 0.0), ("Nesterov", alphas, 0.0), ("EMA-Nesterov", alphas, LOWERED)):
        system, mean, C = decayed(lrs, alpha, gamma, a, DECAY)
        best[name] = float(((variance(system, C) + a * mean[..., 0, 0] ** 2).sum(-1) / 2).min())
    return best


def matched(args: Arguments, a: Array) -> list[tuple[Any, ...]]:
    """Rows of optimizer, lr, rate of the flattest direction, rate of the slowest, stationary loss at x, at y, at e.
    The last is SGD as fast as EMA-Nesterov, where there is such an lr."""
    rows: list[tuple[Any, ...]] = []

    def add(name: str, lr: float) -> None:
        system = wrappers(lr, a, args.alpha, args.ema_decay, args.k)[name][1]
        speed, V = rate(system.T), stationary(system)
        losses = [float(variance(system, V, of).sum() / 2) if of in system.reads else "" for of in ("x", "y", "e")]
        rows.append((name, lr, float(speed[-1]), float(speed.min()), *losses))

    add("SGD", args.lr)
    add("SGD", args.lr / (1 - args.alpha))
    add("EMA-Nesterov", args.lr)
    if (lr := rows[-1][3] / float(a[-1])) < 1:
        add("SGD", lr)
    return rows


def run(args: Arguments) -> str:
    if args.dimensions < 2 or args.chains < 2 or args.k < 1:
        raise ConfigError("dimensions and chains must be at least 2, k at least 1")
    if not (0 < args.alpha < 1 and 0 < args.ema_decay < 1):
        raise ConfigError("alpha and ema_decay must be above 0 and below 1")
    if not 0 < args.lr < 2 * (1 - args.alpha):
        raise ConfigError("lr must be above 0 and lr / (1 - alpha) below 2, where SGD diverges")
    folder, a = folder_for(args.output), 1 / np.arange(1, args.dimensions + 1)
    rows, pairs, targets = simulated(args), matched(args, a), np.geomspace(0.01, 10, 60) * a[-1]
    rates, horizons = search(a, np.concatenate([targets, a[-1] * np.array(RATES)]))
    steps, final = [PERIOD * 2**j for j in range(DOUBLINGS + 1)], lowered(a)

    table(folder, "simulation", ("optimizer", "point", "h", "exact", "measured", "error"), rows)
    table(folder, "matched", ("optimizer", "lr", "rate_flattest", "rate_slowest", "x", "y", "e"), pairs)
    both = [(t, label, *pair) for label in LABELS for t, pair in zip(targets.tolist(), rates[label], strict=False)]
    table(folder, "frontier", ("rate", "optimizer", "stationary", "settings"), both)
    each = [(t, label, float(b)) for label in LABELS for t, b in zip(steps, horizons[label], strict=True)]
    table(folder, "horizon", ("steps", "optimizer", "best"), each)
    h = np.array(DIRECTIONS)
    settings = (
        (label, typed, *map(float, row))
        for reported, typed, system in grid(h)
        for label, of in reported.items()
        for row in zip(h, rate(system.T, system.k), variance(system, stationary(system), of), strict=True)
    )
    table(folder, "settings", ("optimizer", "settings", "h", "rate", "variance"), settings)
    draw(args, folder, rows, targets, rates, steps, horizons)

    off = max(abs(measured - exact) / error for *_, exact, measured, error in rows)
    relative = max(abs(measured / exact - 1) for *_, exact, measured, _ in rows)
    lines = [f"{len(rows)} variances: simulation within {off:.1f} standard errors, {100 * relative:.1f} % of the exact"]
    lines += figures(a, folder)
    for name, lr, flat, slow, *losses in pairs:
        named = ", ".join(f"{of} {v:.4f}" for of, v in zip("xye", losses, strict=True) if v != "")
        lines.append(f"{name}, lr {lr:g}: rate {flat:.6f} (slowest {slow:.6f}), stationary loss {named}")
    for i, target in enumerate(RATES, start=len(targets)):
        found = (f"{label} {rates[label][i][0]:.4f} ({rates[label][i][1]})" for label in LABELS)
        lines.append(f"least stationary loss at rate {target * a[-1]:g}: {', '.join(found)}".replace(" ()", ""))
    for j in (DOUBLINGS - 3, DOUBLINGS - 1):
        found = (f"{label} {horizons[label][j]:.4f}" for label in LABELS)
        lines.append(f"least loss after {steps[j]} steps: {', '.join(found)}")
    found = (f"{label} {value:.4f}" for label, value in final.items())
    lines.append(f"least loss after {DECAY} steps, lr falling to 0: {', '.join(found)}")
    return "\n".join([*lines, f"figures and tables in {folder}"])


def draw(
    args: Arguments, folder: Any, rows: list[Any], targets: Array, rates: Any, steps: list[int], horizons: Any
) -> None:
    colours = dict(
        zip(LABELS, ("black", "gray", "tab:red", "tab:purple", "tab:green", "tab:blue", "tab:cyan"), strict=True)
    )
    h = np.geomspace(1e-4, 1, 200)
    with figure(folder, "noisy_quadratic", 2, 2, (4.0, 3.0)) as (_, (left, right, below, last)):
        for name, (_, system) in wrappers(1.0, h, args.alpha, args.ema_decay, args.k).items():
            share = variance(system, stationary(system)) / sgd_variance(h)
            left.plot(h, share, color=colours[name], label=name)
            right.plot(h, rate(system.T, system.k) / h, color=colours[name], label=name)
            dots = [(row[2], row[4] / sgd_variance(row[2])) for row in rows if row[:2] == (name, "x")]
            left.plot(*zip(*dots, strict=True), "o", color=colours[name], ms=4)
        left.set(xscale="log", xlabel="lr times curvature", ylabel="variance of x over SGD's", title="Variance")
        right.set(xscale="log", xlabel="lr times curvature", ylabel="rate over SGD's", title="Rate", yscale="log")
        for label in LABELS:
            losses = np.array([loss for loss, _ in rates[label]])[: len(targets)]
            below.plot(targets, losses, color=colours[label], label=label)
            last.plot(steps, horizons[label] / horizons["SGD"], color=colours[label], label=label)
        below.set(xscale="log", yscale="log", xlabel="rate of the slowest direction", title="Best settings for a rate")
        below.set(ylabel="stationary loss", xlim=(targets[0], None), ylim=(None, 5))
        last.set(xscale="log", xlabel="steps", ylabel="best loss over SGD's", title="Best settings for some steps")
        for ax in (left, right, below, last):
            ax.minorticks_off()
        right.legend()
        below.legend()
