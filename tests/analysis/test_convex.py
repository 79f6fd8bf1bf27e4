from __future__ import annotations

import csv
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ema_nesterov.analysis.convex import (
    Arguments,
    bound,
    lyapunov,
    measure,
    run,
    slope,
    theorem_alpha,
    weights,
)
from ema_nesterov.analysis.descent import around, descend
from ema_nesterov.analysis.problems import Problem, chain, chain_distance, logistic, random_logistic
from ema_nesterov.lookahead import EMANesterov
from tests.conftest import Refused


def path_of(problem: Problem, gamma: float, k: float, steps: int):
    make = around(1 / problem.L, EMANesterov, partial(theorem_alpha, gamma=gamma, k=k), gamma)
    return descend(make, problem.gradient, torch.zeros_like(problem.minimiser), steps, directions=True)


def random_problem(family: str, dimensions: int, rows: int, size: float, seed: int) -> Problem:
    if family == "chain":
        return chain(dimensions)
    generator = torch.Generator().manual_seed(seed)
    features = size * torch.randn(rows + dimensions, dimensions, dtype=torch.float64, generator=generator)
    shares = 0.1 + 0.8 * torch.rand(rows + dimensions, dtype=torch.float64, generator=generator)
    return logistic(features, shares)


@settings(deadline=None, max_examples=20)
@given(
    gamma=st.one_of(st.just(0.0), st.floats(0.01, 0.999)),
    k=st.sampled_from([1 / 3, 2 / 5, 0.43]),
    family=st.sampled_from(["chain", "logistic"]),
    dimensions=st.integers(1, 8),
    rows=st.integers(1, 20),
    size=st.floats(0.1, 10),
    seed=st.integers(0, 2**31),
)
def test_the_lyapunov_function_never_grows_and_the_bound_holds(
    gamma: float, k: float, family: str, dimensions: int, rows: int, size: float, seed: int
) -> None:
    problem = random_problem(family, dimensions, rows, size, seed)
    path = path_of(problem, gamma, k, 50)
    v = lyapunov(problem, path, gamma, k)
    rounding = weights(50, gamma, k)[1:] / problem.L * 1e-15  # f - f* is a difference of numbers around 1
    assert (v.diff() <= 1e-9 * v[0] + rounding).all()
    gap = problem.value(path.x) - problem.minimum
    whole = bound(gap[0].expand(51), (problem.minimiser**2).sum().expand(51), problem.L, gamma, k)
    assert (gap <= whole * (1 + 1e-9) + 1e-15).all()
    assert whole[0] * weights(1, gamma, k)[0] / problem.L == pytest.approx(v[0].item())


@given(gamma=st.floats(0, 0.9999), k=st.floats(0.01, 0.43))
def test_the_weights_grow_by_no_more_than_eta(gamma: float, k: float) -> None:
    steps = 300
    eta = 1 + k * (1 + (1 - gamma) * torch.arange(steps, dtype=torch.float64))
    A = weights(steps, gamma, k)
    assert (A.diff() <= eta * (1 + 1e-9) + 1e-9 * A[1:]).all()
    assert (eta**2 <= (A[:-1] + eta) * (1 + 1e-9)).all()
    assert (A[1:] >= 0).all()


def test_gamma_0_and_k_one_half_is_nesterovs_alpha() -> None:
    assert [theorem_alpha(t, 0.0, 0.5) for t in range(5)] == pytest.approx([t / (t + 3) for t in range(5)])
    t = torch.arange(9, dtype=torch.float64)
    assert torch.allclose(weights(8, 0.0, 0.5), (t + 1) * (t + 3) / 4)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
def test_z_moves_along_the_gradient_at_y(gamma: float) -> None:
    problem, k, steps = random_logistic(30, 5, 0), 0.4, 50
    path = path_of(problem, gamma, k, steps)
    t = torch.arange(steps + 1, dtype=torch.float64)
    z = path.x + (k * (t + gamma / (1 - gamma)))[:, None] * path.d
    eta = (1 + k * (1 + (1 - gamma) * t[:-1])) / problem.L
    assert torch.allclose(z[1:], z[:-1] - eta[:, None] * problem.gradient(path.y[:-1]), atol=1e-9)


def test_the_minimum_of_a_logistic_regression_is_exact() -> None:
    problem = random_logistic(60, 6, 3)
    assert problem.gradient(problem.minimiser).norm() < 1e-12
    x = problem.minimiser.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.value(x), x)
    assert gradient.norm() < 1e-12


def test_the_chain_is_nesterovs() -> None:
    problem = chain(7)
    assert problem.gradient(problem.minimiser).abs().max() < 1e-15
    assert problem.value(problem.minimiser).item() == pytest.approx(problem.minimum)
    assert (problem.minimiser**2).sum().item() == pytest.approx(chain_distance(7))
    x = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(problem.value(x), x)
    assert torch.allclose(gradient, problem.gradient(x.detach()))
    hessian = torch.autograd.functional.hessian(problem.value, torch.zeros(7, dtype=torch.float64))
    assert 0 < torch.linalg.eigvalsh(hessian).min() < torch.linalg.eigvalsh(hessian).max() < 1


def test_t_steps_see_the_same_of_a_longer_chain() -> None:
    short, long = chain(11), chain(40)
    a, b = path_of(short, 0.5, 0.4, 10), path_of(long, 0.5, 0.4, 10)
    assert torch.allclose(short.value(a.x), long.value(b.x))


def test_the_worst_case_is_between_the_bounds_and_falls_with_the_square() -> None:
    measured = measure(Arguments(gammas=[0.5], steps=300))
    m, descent = measured["chain", "gamma 0.5"], measured["chain", "gradient descent"]
    t = torch.arange(301, dtype=torch.float64)
    assert (m.gap <= m.bound)[1:].all()
    assert (m.gap >= 3 / (32 * (t + 1) ** 2))[1:].all()
    assert slope(m.gap) == pytest.approx(-2, abs=0.15)
    assert slope(descent.gap) > -1.6
    assert m.gap[-1] < descent.gap[-1] / 3


def test_a_slope_is_the_power_of_t() -> None:
    t = torch.arange(1, 1002, dtype=torch.float64)
    assert slope(3 / t**2) == pytest.approx(-2, abs=0.02)


def test_the_script_writes_what_it_prints(tmp_path: Path) -> None:
    said = run(Arguments(str(tmp_path), gammas=[0.5], steps=100))
    assert {p.name for p in tmp_path.iterdir()} == {"rates.csv", "curves.csv", "convex.png", "convex.svg"}
    with open(tmp_path / "rates.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 6
    for row in rows:
        line = rf"{row['problem']}, {row['method']}: slope (\S+), gap (\S+), bound (\S+),"
        (numbers,) = re.findall(line, said)
        assert numbers == (f"{float(row['slope']):.2f}", f"{float(row['gap']):.2e}", f"{float(row['bound']):.2e}")
        assert float(row["largest_gap_over_bound"]) <= 1


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("gamma=0.5", "unknown key gamma; did you mean gammas"),
        ("k=0.5", "k must be above 0 and at most 0.43"),
        ("gammas=[]", "gammas must be in [0, 1), at least one"),
        ("steps=1e3x", "steps=1e3x must be a whole number"),
    ],
)
def test_bad_keys_are_one_line(refused: Refused, argument: str, line: str) -> None:
    refused("analysis.py", ["convex", argument], line)
