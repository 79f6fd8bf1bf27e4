"""The noisy quadratic model: the closed forms are what the real wrappers do."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ema_nesterov.analysis import noisy_quadratic as nq
from ema_nesterov.analysis import systems as s
from ema_nesterov.analysis.descent import around, descend
from ema_nesterov.lookahead import GPA, SNOO, EMANesterov, Lookahead, Nesterov

from ..conftest import Refused

A = np.array([1.0, 0.4, 0.1, 0.01])  # curvatures
LR, ALPHA, GAMMA, K = 0.7, 0.6, 0.9, 5
H = LR * A
CASES = {  # the real wrapper and the system
    "sgd": (around(LR), s.lookahead(H, 1.0, 1)),
    "lookahead": (around(LR, Lookahead, ALPHA, K), s.lookahead(H, ALPHA, K)),
    "snoo": (around(LR, SNOO, 0.7, 0.5, K), s.snoo(H, 0.7, 0.5, K)),
    "nesterov": (around(LR, Nesterov, ALPHA), s.ema_nesterov(H, ALPHA, 0.0)),
    "ema_nesterov": (around(LR, EMANesterov, ALPHA, GAMMA), s.ema_nesterov(H, ALPHA, GAMMA)),
    "gpa": (around(LR, GPA, 0.95, 0.7), s.gpa(H, 0.95, 0.7)),
}


@pytest.mark.parametrize("name", CASES)
def test_without_noise_the_matrix_is_what_the_wrapper_does(name: str) -> None:
    make, system = CASES[name]
    path = descend(make, lambda y: torch.from_numpy(A) * y, torch.ones(len(A)), 12 * system.k)
    state = np.broadcast_to(np.asarray(system.start)[:, None], (len(A), len(system.start), 1))
    for period in range(13):
        for of, points in (("x", path.x), ("y", path.y)):
            if of in system.reads:
                expected = (system.reads[of] @ state)[:, 0, 0]
                np.testing.assert_allclose(points[period * system.k].numpy(), expected, rtol=0, atol=1e-12)
        state = system.T @ state


@pytest.mark.parametrize("name", CASES)
def test_the_noise_of_one_period_is_what_the_wrapper_lets_in(name: str) -> None:
    """From x = 0 the response to unit draws, one at a time, squared and summed, is Q."""
    make, system = CASES[name]
    total = np.zeros(len(A))
    for kicked in range(system.k):
        draws = iter(np.eye(system.k)[kicked])

        def gradient(y: torch.Tensor, draws: Iterator[float] = draws) -> torch.Tensor:
            return torch.from_numpy(A) * (y - next(draws))

        total += descend(make, gradient, torch.zeros(len(A)), system.k).x[-1].numpy() ** 2
    np.testing.assert_allclose(s.variance(system, system.Q), total, rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_simulated_variances_are_the_stationary_ones(name: str) -> None:
    make, system = CASES[name]
    a, chains, steps = A[:3], 600, 60 * K
    h = LR * a
    path = nq.noisy(make, a.tolist(), chains, steps + 40 * K, seed=1)
    V = s.stationary(system)
    exact = {"x": s.variance(system, V)[:3]}
    exact["y"] = s.variance(system, V, "y")[:3] if "y" in system.reads else s.fast_variance(exact["x"], h, system.k)
    for of, values in (("x", path.x[steps :: system.k]), ("y", path.y[steps:-1])):
        found, error = nq.measured(values)
        assert np.all(np.abs(found - exact[of]) < 4 * error), (of, found, exact[of], error)
        assert np.all(error < 0.05 * exact[of])


def test_proposition_2_is_the_lyapunov_solution() -> None:
    h, alpha = np.geomspace(1e-3, 1.9, 30)[:, None], np.linspace(0.1, 1, 10)
    for k in (1, 2, 5, 20):
        exact = s.variance(system := s.lookahead(h, alpha, k), s.stationary(system))
        np.testing.assert_allclose(s.proposition_2(h, alpha, k) * s.sgd_variance(h), exact, rtol=1e-10)


def test_lemma_1_is_the_recursion_unrolled() -> None:
    system, n = s.lookahead(H, ALPHA, K), 3
    mean, covariance = list(s.after(system, n))[n]
    exact = s.lemma_1(H, ALPHA, K, 2**n)
    np.testing.assert_allclose(mean[:, 0, 0], exact[0], rtol=1e-12)
    np.testing.assert_allclose(s.variance(system, covariance), exact[1], rtol=1e-12)
    several = s.repeated(system, 2**n)
    np.testing.assert_allclose(several.Q, covariance, rtol=1e-12)
    np.testing.assert_allclose(s.rate(several.T, several.k), s.rate(system.T, K), rtol=1e-9)


def test_what_must_reduce_to_sgd_has_its_rate_and_variance() -> None:
    for system in (
        s.lookahead(H, 1.0, 1),
        s.lookahead(H, 1.0, K),
        s.ema_nesterov(H, 0.0, 0.0),
        s.gpa(H, 0.0, 0.7),
        s.snoo(H, 1.0, 0.0, K),
    ):
        np.testing.assert_allclose(s.rate(system.T, system.k), H, atol=1e-9)
        np.testing.assert_allclose(s.variance(system, s.stationary(system)), s.sgd_variance(H), rtol=1e-9)


def test_trace_and_determinant_are_the_stated_ones() -> None:
    T, share = s.ema_nesterov(H, ALPHA, GAMMA).T, 1 - GAMMA
    np.testing.assert_allclose(np.trace(T, axis1=-2, axis2=-1), (1 - H) * (1 + share * ALPHA) + GAMMA, rtol=1e-14)
    np.testing.assert_allclose(np.linalg.det(T), (1 - H) * (GAMMA + share * ALPHA), rtol=1e-12)


def test_gpa_is_ema_nesterov_reported_at_its_average() -> None:
    """The same gradients with mu_y = alpha, mu_x = alpha + (1 - alpha) gamma, lr / (1 - alpha); GPA's x is e."""
    mu_x, wide = ALPHA + (1 - ALPHA) * GAMMA, LR / (1 - ALPHA)
    ours, theirs = s.ema_nesterov(H, ALPHA, GAMMA), s.gpa(wide * A, mu_x, ALPHA)
    np.testing.assert_allclose(np.linalg.det(theirs.T), np.linalg.det(ours.T), rtol=1e-12)
    np.testing.assert_allclose(s.rate(theirs.T), s.rate(ours.T), rtol=1e-9)
    V, W = s.stationary(ours), s.stationary(theirs)
    np.testing.assert_allclose(s.variance(theirs, W, "y"), s.variance(ours, V, "y"), rtol=1e-9)
    np.testing.assert_allclose(s.variance(theirs, W, "x"), s.variance(ours, V, "e"), rtol=1e-9)
    left = nq.noisy(around(LR, EMANesterov, ALPHA, GAMMA), A.tolist(), 3, 50)
    right = nq.noisy(around(wide, GPA, mu_x, ALPHA), A.tolist(), 3, 50)
    e = left.x - GAMMA / (1 - GAMMA) / ALPHA * (left.y - left.x)
    torch.testing.assert_close(right.y, left.y, rtol=0, atol=1e-12)
    torch.testing.assert_close(right.x, e, rtol=0, atol=1e-11)


def test_flat_directions_see_a_larger_learning_rate_and_sharp_ones_the_base_one() -> None:
    """EMA-Nesterov for h far below 1 - gamma: rate and variance of SGD at lr / (1 - alpha); far above: at lr."""
    alpha, gamma, flat, sharp = 0.5, 0.999, 1e-7, 0.3
    system = s.ema_nesterov(np.array([flat, sharp]), alpha, gamma)
    spread, speed = s.variance(system, s.stationary(system)), s.rate(system.T)
    np.testing.assert_allclose([speed[0], spread[0]], [2 * flat, s.sgd_variance(2 * flat)], rtol=2e-3)
    np.testing.assert_allclose(spread[1], s.sgd_variance(sharp), rtol=1e-2)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_the_rate_of_ema_nesterov_peaks_where_its_roots_meet(alpha: float) -> None:
    d, root = 1e-4, 1 - alpha**0.5
    h = d * root**2
    rates = s.rate(s.ema_nesterov(h * np.geomspace(1, 1e3, 400), alpha, 1 - d).T)
    assert rates[0] == pytest.approx(h / root, rel=0.03)
    assert rates.min() > 0.97 * d * root
    assert s.rate(s.ema_nesterov(h / 2, alpha, 1 - d).T) < 0.8 * rates[0]


def test_a_falling_learning_rate_is_followed_step_by_step() -> None:
    steps, left = 30, iter(range(30))
    system, mean, _ = s.decayed(LR, ALPHA, GAMMA, A, steps)

    def gradient(y: torch.Tensor) -> torch.Tensor:  # SGD knows no other place for its learning rate
        return (1 - next(left) / steps) * torch.from_numpy(A) * y

    make = around(LR, EMANesterov, lambda t: ALPHA * (1 - t / steps), GAMMA)
    x = descend(make, gradient, torch.ones(len(A)), steps).x[-1]
    np.testing.assert_allclose((system.reads["x"] @ mean)[:, 0, 0], x.numpy(), rtol=0, atol=1e-12)


def test_the_script_writes_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nq, "ALPHAS", (0.5,))
    monkeypatch.setattr(nq, "GAMMAS", np.array([0.9, 0.98]))
    monkeypatch.setattr(nq, "DECAY", 20)
    monkeypatch.setattr(nq, "SIMULATED", (1.0, 0.5))
    said = nq.run(nq.Arguments(output=str(tmp_path), dimensions=4, chains=20, ema_decay=0.9))
    assert "rate" in said
    with open(tmp_path / "matched.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [float(row["lr"]) for row in rows[:3]] == [0.1, 0.2, 0.1]
    for row in rows:
        assert f"{float(row['x']):.4f}" in said
    for name in ("noisy_quadratic.png", "noisy_quadratic.svg", "zhang_2019.png", "frontier.csv", "horizon.csv"):
        assert (tmp_path / name).stat().st_size > 0
    with open(tmp_path / "simulation.csv", encoding="utf-8") as f:
        assert {row["optimizer"] for row in csv.DictReader(f)} == set(nq.LABELS) - {"SGD, averaged"}


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("lr=1", "lr / (1 - alpha) below 2"),
        ("alpha=1", "alpha and ema_decay must be above 0"),
        ("k=0", "k at least 1"),
        ("ema_decay=0.9999", "would take too long to settle; type a smaller ema_decay"),
        ("gamma=0.9", "unknown key gamma"),
        ("chains=many", "chains=many must be a whole number"),
    ],
)
def test_bad_keys_are_one_line(argument: str, line: str, refused: Refused) -> None:
    refused("analysis.py", ["noisy_quadratic", argument], line)
