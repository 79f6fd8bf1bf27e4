"""Figures 3, 11 and 12 of Zhang et al. (2019) in the small: Lookahead and SGD on the noisy quadratic, by Lemma 1.

Sigma = A^-1 and k = 5 as there; their start is not stated, here it is x = 1. Losses are without the constant that
no optimizer can lower.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .output import figure, table
from .systems import Array, lemma_1


def figures(a: Array, folder: Path) -> list[str]:
    """Draws and tabulates them for eigenvalues a as zhang_2019; what to say of them."""

    def loss(lr: Array, alpha: float, k: int, steps: int) -> tuple[Array, Array]:
        """(stationary, excess over it after some steps)"""
        h = lr[:, None] * a
        mean, final = lemma_1(h, alpha, k, steps // k)[0], lemma_1(h, alpha, k, np.inf)[1]
        return final.sum(-1) / 2, (mean**2 * (a - final)).sum(-1) / 2  # the variance falls short by mean^2 of it

    def log(excess: Array) -> Array:
        return np.log(np.maximum(excess, 1e-300))

    lrs, rows, shares, best = np.linspace(0.01, 0.99, 99), [], [], {}
    horizons, middle = [5 * 2**j for j in range(10)], 49  # lr 0.5
    with figure(folder, "zhang_2019", 3) as (_, axes):
        for ax, steps, title in zip(axes, (1000, 50), ("Figures 3 and 11 (a)", "Figure 11 (b)"), strict=False):
            base, better = loss(lrs, 1.0, 1, steps), []
            for alpha in np.linspace(0.05, 0.95, 19).round(2):
                own = loss(lrs, alpha, 5, steps)
                gain = np.interp(base[0], own[0], log(own[1]), np.nan, np.nan) - log(base[1])
                better.append((np.exp(gain[middle]), alpha, *(gain[np.isfinite(gain)] < 0)))
                style = dict(lw=2, label="Lookahead, alpha=0.4") if alpha == 0.4 else dict(lw=0.5, alpha=0.4)
                ax.plot(*own, color="tab:red", **style)
                rows += [(steps, "Lookahead", float(alpha), *map(float, row)) for row in zip(lrs, *own, strict=True)]
            ax.plot(*base, color="black", lw=2, label="SGD")
            rows += [(steps, "SGD", 1.0, *map(float, row)) for row in zip(lrs, *base, strict=True)]
            ax.set(yscale="log", xlabel="stationary loss", ylabel=f"excess after {steps} steps", title=title)
            ax.legend()
            least, which = min(row[:2] for row in better if np.isfinite(row[0]))
            share = 100 * np.mean([flag for row in better for flag in row[2:]])
            shares.append(
                f"{steps} steps: in {share:.0f} % of cases, at SGD's lr 0.5 {least:.2f} times (alpha {which})"
            )
        for top, line in ((0.1, "-"), (1.9, "--")):
            for name, k, tried in (("SGD", 1, [1.0]), ("Lookahead", 5, np.geomspace(1e-4, 1, 50))):
                tops = np.geomspace(1e-4, top, 100)
                found = [min(float(np.add(*loss(tops, alpha, k, t)).min()) for alpha in tried) for t in horizons]
                label = f"{name}, lr to {top}"
                axes[2].plot(horizons, found, line, color="black" if k == 1 else "tab:red", label=label)
                rows += [(t, f"{label}: best", "", "", "", value) for t, value in zip(horizons, found, strict=True)]
                best[label] = f"{label} {found[-2]:.4f}"
        axes[2].set(xscale="log", yscale="log", xlabel="steps", ylabel="best loss", title="Figure 12")
        axes[2].legend()
        for ax in axes:
            ax.minorticks_off()
    table(folder, "zhang_2019", ("steps", "optimizer", "alpha", "lr", "stationary", "excess"), rows)
    return [
        f"Figure 3: Lookahead has less excess loss than SGD at equal stationary loss; after {'; after '.join(shares)}",
        f"Figure 12: least loss after {horizons[-2]} steps: {', '.join(best.values())}",
    ]
