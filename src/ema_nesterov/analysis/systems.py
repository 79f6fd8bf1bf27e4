"""Wrappers around SGD as small linear recursions, under noise: rates, stationary variances, and how they come about.

The model is Zhang et al.'s (2019, section 3.1 and Appendix A): L(x) = 1/2 (x - c)^T A (x - c), c ~ N(0, Sigma) drawn
at every step, A and Sigma diagonal. In one direction of curvature a SGD is p <- (1 - h) p + h c with h = lr a.
Variances are in units of that direction's sigma^2. All functions take arrays of h and broadcast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Number = Any  # a float or an array of them


@dataclass(frozen=True)
class System:
    """s <- T s + noise of covariance Q, once in k steps; x, y and e are rows of `reads` times s.

    T and Q: (..., n, n), one for each h. start: the state at x = 1 before the first step.
    """

    T: Array
    Q: Array
    start: tuple[float, ...]
    reads: dict[str, Array]
    k: int = 1


def matrix(rows: Sequence[Sequence[Number]]) -> Array:
    """(..., rows, columns) of cells that are broadcast."""
    cells = np.broadcast_arrays(*(np.asarray(cell, dtype=float) for row in rows for cell in row))
    return np.stack(cells, -1).reshape(*cells[0].shape, len(rows), len(rows[0]))


def ema_nesterov(h: Number, alpha: Number, gamma: Number) -> System:
    """State (x, m), for gamma = 0 Nesterov: y = x + alpha m, x' = (1 - h) y + h c, m' = gamma m + (1 - gamma)(x' - x).

    trace T = (1 - h)(1 + (1 - gamma) alpha) + gamma, det T = (1 - h)(gamma + (1 - gamma) alpha).
    e = x - gamma / (1 - gamma) m is the average of the weights. With r = 1 - eigenvalue and d = 1 - gamma the small r
    solve r^2 - (h + d (1 - alpha)) r + d h = 0: rate h / (1 - alpha) for h far below d, a double root
    d (1 - sqrt alpha) at h = d (1 - sqrt alpha)^2, and no slower direction above that.
    """
    u, share = 1 - h, 1 - gamma
    noise = matrix([[h], [share * h]])
    reads = {"x": matrix([[1, 0]]), "y": matrix([[1, alpha]]), "e": matrix([[1, -gamma / share]])}
    T = matrix([[u, alpha * u], [-share * h, gamma + share * alpha * u]])
    return System(T, noise @ noise.swapaxes(-1, -2), (1.0, 0.0), reads)


def gpa(h: Number, mu_x: Number, mu_y: Number) -> System:
    """State (x, z): y = mu_y x + (1 - mu_y) z, z' = z - h (y - c), x' = mu_x x + (1 - mu_x) z'."""
    own = 1 - h * (1 - mu_y)
    T = matrix([[mu_x - (1 - mu_x) * h * mu_y, (1 - mu_x) * own], [-h * mu_y, own]])
    noise = matrix([[(1 - mu_x) * h], [h]])
    reads = {"x": matrix([[1, 0]]), "y": matrix([[mu_y, 1 - mu_y]])}
    return System(T, noise @ noise.swapaxes(-1, -2), (1.0, 1.0), reads)


def inner_variance(h: Number, k: Number) -> Number:
    """h^2 sum_{i<k} (1 - h)^{2i}: what k steps of SGD add to the variance (Lemma 1)."""
    return h / (2 - h) * (1 - (1 - h) ** (2 * k))


def lookahead(h: Number, alpha: Number, k: int) -> System:
    """State (slow,), per period: slow' = (1 - alpha + alpha (1 - h)^k) slow + alpha noise (Lemma 1)."""
    T = matrix([[1 - alpha + alpha * (1 - h) ** k]])
    return System(T, matrix([[alpha**2 * inner_variance(h, k)]]), (1.0,), {"x": matrix([[1]])}, k)


def snoo(h: Number, lr: Number, momentum: Number, k: int) -> System:
    """State (slow, b), per period: s = (1 - (1 - h)^k) slow - noise, b' = mu b + s, slow' = slow - lr (mu b' + s)."""
    q = 1 - (1 - h) ** k
    T = matrix([[1 - lr * (1 + momentum) * q, -lr * momentum**2], [q, momentum]])
    noise = matrix([[lr * (1 + momentum)], [-1]])
    Q = noise @ noise.swapaxes(-1, -2) * np.asarray(inner_variance(h, k))[..., None, None]
    return System(T, Q, (1.0, 0.0), {"x": matrix([[1, 0]])}, k)


def rate(T: Array, k: int = 1) -> Array:
    """1 - rho per step, where T is what k steps do; negative: it diverges."""
    return 1 - np.abs(np.linalg.eigvals(T)).max(-1) ** (1 / k)


def stationary(system: System) -> Array:
    """V = T V T^T + Q, the discrete Lyapunov equation, by (I - T (x) T) vec V = vec Q; without meaning if unstable."""
    n = system.T.shape[-1]
    shape = np.broadcast_shapes(system.T.shape, system.Q.shape)
    T = np.broadcast_to(system.T, shape)
    kron = np.einsum("...ij,...kl->...ikjl", T, T).reshape(*shape[:-2], n * n, n * n)
    vec = np.broadcast_to(system.Q, shape).reshape(*shape[:-2], n * n, 1)
    return np.linalg.solve(np.eye(n * n) - kron, vec).reshape(shape)


def variance(system: System, covariance: Array, of: str = "x") -> Array:
    """Of x, y or e, given the covariance of the state."""
    row = system.reads[of]
    return (row @ covariance @ row.swapaxes(-1, -2))[..., 0, 0]


def fast_variance(slow: Number, h: Number, k: int) -> Number:
    """Of y in a wrapper with syncs, over the k points where a period takes its gradients:
    the mean over i < k of (1 - h)^{2i} V_slow + inner_variance(h, i)."""
    i = np.arange(k)
    h = np.asarray(h)[..., None]
    return ((1 - h) ** (2 * i) * np.asarray(slow)[..., None] + inner_variance(h, i)).mean(-1)


def after(system: System, doublings: int) -> Iterator[tuple[Array, Array]]:
    """Mean (from x = 1) and covariance of the state after k 2^j steps, j = 0 ... doublings."""
    T, Q = system.T, system.Q
    for _ in range(doublings + 1):
        yield T @ np.asarray(system.start)[:, None], Q
        T, Q = T @ T, T @ Q @ T.swapaxes(-1, -2) + Q


def repeated(system: System, times: int) -> System:
    """Several periods as one."""
    T, Q = system.T, system.Q
    for _ in range(times - 1):
        T, Q = system.T @ T, system.T @ Q @ system.T.swapaxes(-1, -2) + system.Q
    return System(T, Q, system.start, system.reads, system.k * times)


def decayed(lr: Number, alpha: Number, gamma: Number, curvatures: Array, steps: int) -> tuple[System, Array, Array]:
    """EMA-Nesterov while lr and alpha fall linearly to 0: the last system, mean (from x = 1) and covariance."""
    system = ema_nesterov(lr * curvatures, alpha, gamma)
    mean, covariance = np.asarray(system.start)[:, None], np.zeros((2, 2))
    for t in range(steps):
        left = 1 - t / steps
        system = ema_nesterov(lr * left * curvatures, alpha * left, gamma)
        mean, covariance = system.T @ mean, system.T @ covariance @ system.T.swapaxes(-1, -2) + system.Q
    return system, mean, covariance


# --- Zhang et al.'s closed forms ------------------------------------------------------------------


def sgd_variance(h: Number) -> Number:
    """V* = h^2 / (1 - (1 - h)^2) (equation 6; in units of sigma^2)."""
    return h / (2 - h)


def proposition_2(h: Number, alpha: Number, k: int) -> Number:
    """Stationary variance of Lookahead's slow weights as a fraction of SGD's (equation 7)."""
    own = alpha**2 * (1 - (1 - h) ** (2 * k))
    return own / (own + 2 * alpha * (1 - alpha) * (1 - (1 - h) ** k))


def lemma_1(h: Number, alpha: Number, k: int, periods: Number) -> tuple[Number, Number]:
    """Mean (from 1) and variance of Lookahead's slow weights after some periods: equations 10 and 11 unrolled,
    r^n and V* (1 - r^{2n}) with r = 1 - alpha + alpha (1 - h)^k. alpha = k = 1 is SGD."""
    r = 1 - alpha + alpha * (1 - h) ** k
    return r**periods, proposition_2(h, alpha, k) * sgd_variance(h) * (1 - r ** (2 * periods))
