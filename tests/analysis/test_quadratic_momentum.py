"""Wrappers around momentum on quadratics: the matrices are what the real wrappers do."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from ema_nesterov.analysis import quadratic_momentum as qm
from ema_nesterov.analysis.descent import Make, around, descend
from ema_nesterov.analysis.systems import rate
from ema_nesterov.lookahead import GPA, EMANesterov, Lookahead, Nesterov

from ..conftest import Refused

A = np.array([1.0, 0.4, 0.1, 0.01])
LR, BETA, ALPHA, GAMMA, K = 0.7, 0.9, 0.6, 0.95, 5
H = LR * A
CASES: dict[str, tuple[Make, np.ndarray, tuple[float, ...], int]] = {  # wrapper, matrix, first state, its steps
    "heavy_ball": (around(LR, momentum=BETA), qm.heavy_ball(H, BETA), (1, 0), 1),
    "lookahead": (around(LR, Lookahead, ALPHA, K, momentum=BETA), qm.lookahead(H, BETA, ALPHA, K), (1, 0), K),
    "nesterov": (around(LR, Nesterov, BETA), qm.ema_nesterov(H, 0.0, BETA, 0.0), (1, 0, 0), 1),
    "ema_nesterov": (
        around(LR, EMANesterov, ALPHA, GAMMA, momentum=BETA),
        qm.ema_nesterov(H, BETA, ALPHA, GAMMA),
        (1, 0, 0),
        1,
    ),
    "gpa": (around(LR, GPA, 0.95, 0.7, momentum=BETA), qm.gpa(H, BETA, 0.95, 0.7), (1, 1, 0), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_matrix_is_what_the_wrapper_does(name: str) -> None:
    make, T, start, k = CASES[name]
    x = descend(make, lambda y: torch.from_numpy(A) * y, torch.ones(len(A)), 12 * k).x
    state = np.broadcast_to(np.asarray(start, dtype=float)[:, None], (len(A), len(start), 1))
    for period in range(13):
        np.testing.assert_allclose(x[period * k].numpy(), state[:, 0, 0], rtol=0, atol=1e-12)
        state = T @ state


@pytest.mark.parametrize("k", [2, 5, 20])
def test_the_paper_s_stack_has_the_spectrum_of_two_numbers(k: int) -> None:
    for h in (0.001, 0.1, 0.7, 3.0):
        large = np.sort(np.abs(np.linalg.eigvals(qm.stacked(h, BETA, ALPHA, k))))[::-1]
        small = np.sort(np.abs(np.linalg.eigvals(qm.lookahead(h, BETA, ALPHA, k))))[::-1]
        np.testing.assert_allclose(large[:2], small, rtol=1e-7)
        assert np.all(large[2:] < 1e-3)  # zeros of a defective matrix, as eigvals finds them


def test_what_must_reduce_to_heavy_ball_has_its_rate() -> None:
    base = rate(qm.heavy_ball(H, BETA))
    np.testing.assert_allclose(rate(qm.lookahead(H, BETA, 1.0, K), K), base, rtol=1e-7)
    np.testing.assert_allclose(rate(qm.lookahead(H, BETA, 1.0, 1)), base, rtol=1e-7)
    np.testing.assert_allclose(rate(qm.ema_nesterov(H, BETA, 0.0, 0.0)), base, rtol=1e-7)
    np.testing.assert_allclose(rate(qm.gpa(H, BETA, 0.0, 0.7)), base, rtol=1e-7)


def test_gpa_around_momentum_has_the_spectrum_of_ema_nesterov() -> None:
    ours = np.linalg.eigvals(qm.ema_nesterov(H, BETA, ALPHA, GAMMA))
    theirs = np.linalg.eigvals(qm.gpa(H / (1 - ALPHA), BETA, ALPHA + (1 - ALPHA) * GAMMA, ALPHA))
    np.testing.assert_allclose(np.sort(np.abs(theirs)), np.sort(np.abs(ours)), rtol=1e-8)


def test_the_best_rates_are_the_known_ones() -> None:
    """Gradient descent: 2 / (condition + 1). Heavy ball where all directions oscillate: 1 - sqrt(momentum)."""
    h = np.geomspace(1e-5, 8, 4000)
    found, lr = qm.best_rate(h, rate(qm.heavy_ball(h, 0.0)), 100)
    assert found == pytest.approx(2 / 101, rel=0.01)
    assert lr == pytest.approx(2 / 1.01, rel=0.01)
    rates = rate(qm.lookahead(h, BETA, ALPHA, K), K)
    for condition in (1.5, 10, 1000):
        found, lr = qm.best_rate(h, rates, condition)
        window = rates[(h >= lr / condition / 1.004) & (h <= lr * 1.001)]
        assert found == pytest.approx(window.min(), rel=0.02)
        ends = qm.best_rate(h, rates, condition, only_ends=True)[0]
        assert ends >= found
    assert qm.best_rate(h, rate(qm.heavy_ball(h, BETA)), 10)[0] == pytest.approx(1 - BETA**0.5, rel=1e-6)


@pytest.mark.parametrize("name", ["heavy_ball", "lookahead", "ema_nesterov"])
def test_contraction_of_the_real_wrapper_is_the_rate_of_the_slowest_direction(name: str) -> None:
    make, T, _, k = CASES[name]
    assert qm.contraction(make, A, 2000) == pytest.approx(float(rate(T, k).min()), rel=0.03)


def test_the_script_writes_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qm, "CONDITIONS", np.geomspace(10, 1000, 9))
    monkeypatch.setattr(qm, "CHECKED", (0,))
    monkeypatch.setattr(qm, "STEPS", 1200)
    said = qm.run(qm.Arguments(output=str(tmp_path), momenta=[0.9], k=10))
    with open(tmp_path / "rates.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 9 * 5 * 2
    for row in rows[::9]:
        assert f"{row['optimizer']} {float(row['rate']):.6f}" in said
    with open(tmp_path / "checked.csv", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            assert float(row["measured"]) == pytest.approx(float(row["rate"]), rel=0.1)
    assert (tmp_path / "quadratic_momentum.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("momenta=[0.9,1]", "momenta (at least one), ema_decay and mu_x must be at least 0 and below 1"),
        ("momenta=[0.9", "momenta=[0.9 must be a list"),
        ("mu_y=0", "alpha and mu_y must be above 0 and at most 1"),
        ("k=0", "k must be at least 1"),
        ("beta=0.9", "unknown key beta"),
    ],
)
def test_bad_keys_are_one_line(argument: str, line: str, refused: Refused) -> None:
    refused("analysis.py", ["quadratic_momentum", argument], line)
