"""Convex test functions with a known smoothness constant and a known minimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A convex function whose gradient is L-Lipschitz, with a minimiser x* and f* = f(x*)."""

    value: Callable[[Tensor], Tensor]  # (..., dimensions) -> (...)
    gradient: Callable[[Tensor], Tensor]  # (..., dimensions) -> the same
    L: float
    minimiser: Tensor  # (dimensions,)
    minimum: float


# --- strongly convex: x* = 0 and f* = 0 ---------------------------------------------------------------


def quadratic(eigenvalues: Tensor) -> Problem:
    """1/2 sum_i l_i x_i^2; every quadratic is one, as all the methods commute with rotations."""
    minimiser = torch.zeros_like(eigenvalues)
    return Problem(
        lambda x: (eigenvalues * x**2).sum(-1) / 2, lambda x: eigenvalues * x, eigenvalues.max().item(), minimiser, 0.0
    )


def log_cosh(matrix: Tensor, mu: float) -> Problem:
    """sum_i log cosh (A x)_i + mu/2 ||x||^2 for A (rows, dimensions): L is mu + the largest eigenvalue of A'A.

    Near 0 it has all of A'A for curvature, far out almost none. log cosh z = log(1 + 2 sinh^2(z/2)) keeps its digits
    around 0.
    """

    def value(x: Tensor) -> Tensor:
        return torch.log1p(2 * torch.sinh(x @ matrix.T / 2) ** 2).sum(-1) + mu / 2 * (x**2).sum(-1)

    L = mu + torch.linalg.matrix_norm(matrix, 2).item() ** 2
    minimiser = torch.zeros(matrix.shape[1], dtype=torch.float64)
    return Problem(value, lambda x: torch.tanh(x @ matrix.T) @ matrix + mu * x, L, minimiser, 0.0)


def random_log_cosh(kappa: float, dimensions: int, seed: int) -> Problem:
    """A'A has eigenvalues from mu (or L - mu, if less) to L - mu, evenly on a log scale, in a random basis; L = 1."""
    generator = torch.Generator().manual_seed(seed)
    bases = torch.randn(2, dimensions, dimensions, dtype=torch.float64, generator=generator)
    left, right = torch.linalg.qr(bases).Q
    least, most = math.log10(min(1 / kappa, 1 - 1 / kappa)), math.log10(1 - 1 / kappa)
    scales = torch.logspace(most, least, dimensions, dtype=torch.float64)
    return log_cosh(left * scales.sqrt() @ right, 1 / kappa)


# --- convex -------------------------------------------------------------------------------------------


def logistic(features: Tensor, shares: Tensor) -> Problem:
    """Mean logistic loss; row i of features (n, dimensions) has the answer 1 in the share 0 < p_i < 1 of its trials.

    As every row has both answers no plane separates them, and a minimiser exists. Newton's method finds it.
    """

    def value(x: Tensor) -> Tensor:
        z = x @ features.T
        return (torch.nn.functional.softplus(z) - shares * z).mean(-1)

    def gradient(x: Tensor) -> Tensor:
        return (torch.sigmoid(x @ features.T) - shares) @ features / len(features)

    x = torch.zeros(features.shape[1], dtype=torch.float64)
    for _ in range(100):
        p = torch.sigmoid(features @ x)
        newton = torch.linalg.solve(features.T * (p * (1 - p)) @ features / len(features), gradient(x))
        decrement, size = newton @ gradient(x), 1.0
        if decrement < 1e-28:  # f(x) - f* is about half of it
            break
        while size > 1e-4 and value(x - size * newton) > value(x) - size * decrement / 4 + 1e-15:
            size /= 2
        x = x - size * newton
    L = torch.linalg.matrix_norm(features, 2).item() ** 2 / (4 * len(features))
    return Problem(value, gradient, L, x, value(x).item())


def random_logistic(rows: int, dimensions: int, seed: int, trials: int = 10) -> Problem:
    """Feature i has the standard deviation 1/i: curvatures from 1 to dimensions^-2."""
    generator = torch.Generator().manual_seed(seed)
    features, truth, noise = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((rows, dimensions), (dimensions,), (rows,))
    )
    features = features / torch.arange(1, dimensions + 1)
    ones = (trials * torch.sigmoid(features @ truth * 3 + noise)).round().clamp(1, trials - 1)
    return logistic(features, ones / trials)


def chain(links: int) -> Problem:
    """Nesterov's worst case (Introductory Lectures, 2.1.2), L = 1:

    f(x) = 1/4 (1/2 (x_1^2 + sum_i (x_i - x_{i+1})^2 + x_n^2) - x_1)    x*_i = 1 - i / (n+1)
    """

    def value(x: Tensor) -> Tensor:
        bends = (x.diff(dim=-1) ** 2).sum(-1) + x[..., 0] ** 2 + x[..., -1] ** 2
        return (bends / 2 - x[..., 0]) / 4

    def gradient(x: Tensor) -> Tensor:
        g = x / 2
        g[..., 1:] -= x[..., :-1] / 4
        g[..., :-1] -= x[..., 1:] / 4
        g[..., 0] -= 0.25
        return g

    minimiser = 1 - torch.arange(1, links + 1, dtype=torch.float64) / (links + 1)
    return Problem(value, gradient, 1.0, minimiser, float(chain_minimum(links)))


def chain_minimum(links: int | Tensor) -> Any:
    """f*."""
    return (1 / (links + 1) - 1) / 8


def chain_distance(links: int | Tensor) -> Any:
    """||x*||^2, with x_0 = 0."""
    return links * (2 * links + 1) / (6 * (links + 1))
