"""The EMA and the K-step average as low-pass filters (Figure 3): python scripts/analysis.py filter [KEY=VALUE ...]

Section 3.1: what the direction m_t keeps of the updates x_{t+1} - x_t, by frequency, and how it follows a turn; beside
it the updates of a real run, and the m_t that EMANesterov makes of them. The run has the model, the data and the Muon
of experiment=quickstart/muon at a smaller size and a constant learning rate; its first third is left out.

output        folder of filter.png and .svg, filters.csv, spectrum.csv, energy.csv
gamma         of the EMA; the average beside it has K = (1 + gamma) / (1 - gamma), the same mean age and noise
data          folder of dataset sample, which is prepared when it is missing
coordinates   how many weights are followed, of the matrices and of the table each
steps, batch_size, seq_len, layers, width, seed    of the run
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..lookahead import EMANesterov
from .descent import Make, around, descend
from .output import figure, folder_for, table
from .updates import config, energy, follow, persistent_share, slow_share, spectrum

Array = np.ndarray
SHORT = 0.9  # a second gamma, whose memory is short beside the run
SLOW = 20  # steps: the horizon of the momentum of 0.95 that Muon has itself
LASTING = 50  # steps: beyond the reach of that momentum
ARROWS: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.008, "zorder": 3}
ROLES = {"matrix": "matrices (Muon)", "embedding": "table (Adam)"}


@dataclass
class Arguments:
    output: str = "analysis/filter"
    gamma: float = 0.99
    data: str = "data/sample"
    coordinates: int = 2048
    steps: int = 300
    batch_size: int = 16
    seq_len: int = 32
    layers: int = 2
    width: int = 64
    seed: int = 0


# --- the filters; w in radians per step -----------------------------------------------------------


def ema_power(gamma: float, w: Array) -> Array:
    """|H(e^jw)|^2 = (1 - gamma)^2 / (1 - 2 gamma cos w + gamma^2) (section 3.1)."""
    return (1 - gamma) ** 2 / (1 - 2 * gamma * np.cos(w) + gamma**2)


def average_power(k: int, w: Array) -> Array:
    """|sin(K w / 2) / (K sin(w / 2))|^2, of the mean of K updates (equation 7): the Dirichlet kernel."""
    half = np.where(w == 0, 1e-9, w) / 2
    return (np.sin(k * half) / (k * np.sin(half))) ** 2


def closed_loop(gamma: float, alpha: float) -> tuple[float, float]:
    """(rate, gain): m is an EMA at this rate, times this gain, of the steps u = A(y) - y that the base itself takes.

    The updates that m averages hold the lookahead, x' - x = alpha m + u, hence
    m' = (gamma + (1 - gamma) alpha) m + (1 - gamma) u, and the gain is 1 / (1 - alpha)."""
    return gamma + (1 - gamma) * alpha, 1 / (1 - alpha)


def gpa_loop(mu_x: float) -> tuple[float, float]:
    """(rate, gain) of GPA's direction d = z - x: z' = z + u and x' = mu_x x + (1 - mu_x) z' give d' = mu_x (d + u).

    With mu_x = gamma + (1 - gamma) alpha it has the rate of EMA-Nesterov's m: they differ in the gain alone."""
    return mu_x, mu_x / (1 - mu_x)


def ema_delay(gamma: float, w: Array) -> Array:
    """Group delay, gamma (cos w - gamma) / (1 - 2 gamma cos w + gamma^2) steps; at w = 0 the mean age of what is
    averaged, gamma / (1 - gamma). The K-step average has (K - 1) / 2 at all w."""
    return gamma * (np.cos(w) - gamma) / (1 - 2 * gamma * np.cos(w) + gamma**2)


def ema_noise(gamma: float, rho: float = 0.0) -> float:
    """Variance of the EMA over that of its input, where this has correlations rho^lag (0: white noise):
    (1 - gamma) / (1 + gamma) (1 + gamma rho) / (1 - gamma rho). For the K-step average of white noise it is 1 / K."""
    return (1 - gamma) / (1 + gamma) * (1 + gamma * rho) / (1 - gamma * rho)


def matched_k(gamma: float) -> int:
    """K = (1 + gamma) / (1 - gamma): of the same mean age, (K - 1) / 2 = gamma / (1 - gamma), and the same noise."""
    return round((1 + gamma) / (1 - gamma))


def moving_average(updates: Tensor, k: int) -> Tensor:
    """The mean of the last k updates (equation 7), with zeros before the first."""
    total = torch.cat([torch.zeros(k, *updates.shape[1:], dtype=updates.dtype), updates]).cumsum(0)
    return (total[k:] - total[:-k]) / k


def replay(make: Make, updates: Tensor) -> Tensor:
    """The wrapper's direction after each step, where its base takes these steps. make: around(1.0, ...)."""
    steps = iter(-updates)
    return descend(make, lambda _: next(steps), torch.zeros_like(updates[0]), len(updates), directions=True).d[1:]


# --- a turn ---------------------------------------------------------------------------------------


def turning(steps: int, turn: float, noise: float, copies: int, seed: int) -> tuple[Tensor, Tensor]:
    """(updates, heading), (steps, copies, 2) and (steps, 1, 2): unit steps that turn by so many radians in the middle
    third, with noise of this standard deviation on each coordinate."""
    t = torch.arange(steps, dtype=torch.float64)
    angle = turn * ((t - steps / 3) / (steps / 3)).clamp(0, 1)
    heading = torch.stack([angle.cos(), angle.sin()], dim=1)[:, None]
    generator = torch.Generator().manual_seed(seed)
    return heading + noise * torch.randn(steps, copies, 2, generator=generator, dtype=torch.float64), heading


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Degrees, 0 to 180, along the last dimension."""
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    return torch.rad2deg(cosine.clamp(-1, 1).acos())


def run(args: Arguments) -> str:
    _check(args)
    folder, k = folder_for(args.output), matched_k(args.gamma)
    gammas, first = sorted({SHORT, args.gamma}), args.steps // 3
    sizes = (args.steps, args.batch_size, args.seq_len, args.layers, args.width, args.seed)
    whole = follow(config(args.data, *sizes), gammas, args.coordinates)
    updates = {role: whole.updates[role][first:] for role in ROLES}
    kept = {(g, role): whole.directions[g][role][first:] for g in gammas for role in ROLES}

    shares: list[list[Any]] = []
    lags = range(LASTING, min(2 * LASTING, len(updates["matrix"]) - 1))
    for role, u in updates.items():
        lasting, average = persistent_share(u, lags), energy(moving_average(whole.updates[role], k)[first:])
        emas = [energy(kept[g, role]) / energy(u) for g in gammas]
        shares.append([ROLES[role], slow_share(u, SLOW), lasting, *emas, average / energy(u)])
    shares.append(["white noise", 2 / SLOW, 0.0, *(ema_noise(g) for g in gammas), 1 / k])
    names = [f"at periods over {SLOW} steps", f"lasting over {LASTING}", *(f"in the EMA, {g:g}" for g in gammas)]
    names.append(f"in the mean of {k}")
    table(folder, "energy", ["share of the energy of the updates", *names], shares)

    spectra: dict[tuple[float, str], Array] = {}  # rows: w, updates, m, measured ratio, |H|^2
    for (g, role), m in kept.items():
        (w, of_updates), (_, of_m) = spectrum(updates[role]), spectrum(m)
        spectra[g, role] = np.stack([w, of_updates, of_m, of_m / of_updates, ema_power(g, w)])
    columns = ["gamma", "role", "w", "updates", "m", "ratio", "transfer"]
    table(folder, "spectrum", columns, [[g, r, *row] for (g, r), s in spectra.items() for row in s.T.tolist()])
    grid = np.linspace(0, np.pi, 1025)
    values = [ema_power(args.gamma, grid), average_power(k, grid), ema_delay(args.gamma, grid)]
    table(folder, "filters", ["w", "ema", "average", "ema_delay"], np.stack([grid, *values]).T.tolist())

    path, heading = turning(8 * k, 2.0, 3.0, 32, args.seed)
    directions = {
        "last update": path,
        f"mean of {k}": moving_average(path, k),
        f"EMA, {args.gamma:g}": replay(around(1.0, EMANesterov, 0.0, args.gamma), path),
    }
    draw(folder, args.gamma, path, directions, spectra)

    errors = np.concatenate([np.abs(s[3] / s[4] - 1) for s in spectra.values()])
    turn = slice(len(path) // 3, 2 * len(path) // 3)
    angles = {n: angle_between(d, heading)[turn].mean().item() for n, d in directions.items()}
    lines = [
        f"EMA {args.gamma:g} and mean of {k}: mean age {ema_delay(args.gamma, np.zeros(1))[0]:.4g} and "
        f"{(k - 1) / 2:.4g} steps, variance of white noise times {ema_noise(args.gamma):.4g} and {1 / k:.4g}",
        "degrees off a noisy path while it turns: " + ", ".join(f"{n} {a:.0f}" for n, a in angles.items()),
        f"spectrum of m over that of the updates, against |H|^2: off by {np.median(errors):.2%} in the median, "
        f"{np.quantile(errors, 0.95):.1%} in the 95th percentile of frequencies",
        "share of the energy of the updates:",
        *(f"  {row[0]}: " + ", ".join(f"{v:.1%} {n}" for v, n in zip(row[1:], names, strict=True)) for row in shares),
        "  noise with correlations 0.95^lag, as of Muon's momentum: "
        + ", ".join(f"{ema_noise(g, 0.95):.1%} in the EMA, {g:g}" for g in gammas),
        "alpha, and the rate of the EMA of the base's own steps that m is: "
        + ", ".join(f"{a:g} {closed_loop(args.gamma, a)[0]:.4g}" for a in (0.0, 0.5, 0.7)),
    ]
    return "\n".join(lines)


def _check(args: Arguments) -> None:
    if not 0 < args.gamma < 1:
        raise ConfigError(f"gamma={args.gamma} must be between 0 and 1")
    if args.steps < 3 * LASTING or args.coordinates < 1:
        raise ConfigError(f"steps must be at least {3 * LASTING} and coordinates at least 1")
    if args.width < 8 or args.width % 8 or min(args.layers, args.batch_size, args.seq_len) < 1:
        raise ConfigError("width must be a multiple of 8, and layers, batch_size and seq_len at least 1")


def draw(
    folder: Path,
    gamma: float,
    path: Tensor,
    directions: dict[str, Tensor],
    spectra: dict[tuple[float, str], Array],
) -> None:
    """directions, in this order: the last update, the K-step average, the EMA."""
    k, colors = matched_k(gamma), dict(zip(directions, ("C3", "C1", "C0"), strict=True))
    _, of_average, of_ema = colors
    with figure(folder, "filter", 3, 2, (3.5, 2.8)) as (_, (impulse, power, corner, turn, measured, ratio)):
        age = np.arange(round(1.6 * k))
        impulse.plot(age, (1 - gamma) * gamma**age, color="C0", label=of_ema)
        impulse.plot(age, (age < k) / k, color="C1", label=of_average)
        impulse.set(title="weight of an update", xlabel="its age in steps")

        w = np.geomspace(0.1 / k, min(40 / k * np.pi / 2, np.pi), 2000)
        power.loglog(w / (2 * np.pi), average_power(k, w), color="C1", lw=1, label=of_average)
        power.loglog(w / (2 * np.pi), ema_power(gamma, w), color="C0", label=of_ema)
        power.set(title="what is kept of the energy", xlabel="cycles per step", ylim=(1e-5, 2))

        step = torch.zeros(3 * k, 2, dtype=torch.float64)
        step[: 3 * k // 2, 0] = step[3 * k // 2 :, 1] = 1.0
        for name, d in (
            (of_average, moving_average(step, k)),
            (of_ema, replay(around(1.0, EMANesterov, 0.0, gamma), step)),
        ):
            corner.plot(np.arange(-k // 2, 3 * k // 2), angle_between(d, step)[k:], color=colors[name], label=name)
        corner.set(title="degrees off, at a corner", xlabel="steps after the corner")

        x = path[:, 0].cumsum(0)
        turn.plot(*x.T, color="0.7", lw=0.5)
        for name, d in directions.items():
            at = slice(2 * k, 7 * k, 5 * k // 4)
            arrows = 1.2 * k * torch.nn.functional.normalize(d[at, 0], dim=-1)
            turn.quiver(*x[at].T, *arrows.T, color=colors[name], label=name, **ARROWS)
        turn.set(title="directions on a noisy path that turns")
        turn.margins(0.2)
        turn.set_aspect("equal", adjustable="datalim")

        for (g, role), (w, of_updates, of_m, quotient, transfer) in spectra.items():
            style, cycles = "-" if role == "matrix" else "--", w / (2 * np.pi)
            if g == gamma:
                measured.loglog(cycles, of_updates, style, color="0.35", label=f"updates, {ROLES[role]}")
                measured.loglog(cycles, of_m, style, color="C0", label="their EMA")
            if role == "matrix":
                ratio.loglog(cycles, quotient, ".", ms=3, color="0.35", label="measured" if g == gamma else None)
                ratio.loglog(cycles, transfer, color="C0" if g == gamma else "C2", label=f"$|H|^2$, {g:g}")
        measured.set(title="power of a real run's updates", xlabel="cycles per step")
        measured.set_ylim(bottom=1e-3 * measured.get_ylim()[0])  # room for the legend
        ratio.set(title="power of m over the updates'", xlabel="cycles per step")
        for axes in (impulse, power, corner, turn, measured, ratio):
            axes.legend()
