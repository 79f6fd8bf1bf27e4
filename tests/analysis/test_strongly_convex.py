from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ema_nesterov.analysis.descent import around, descend
from ema_nesterov.analysis.problems import quadratic, random_log_cosh
from ema_nesterov.analysis.strongly_convex import (
    Arguments,
    heavy_ball,
    lyapunov,
    measured_rate,
    problems,
    quadratic_rate,
    run,
    spectral_radius,
    theorem_alpha,
    theorem_kappa,
    theta,
)
from ema_nesterov.lookahead import EMANesterov
from tests.conftest import Refused

PAIRS = [(100, 0.5), (100, 0.9), (1e4, 0.99), (10, 0.0), (1000, 0.99)]


@pytest.mark.parametrize(("kappa", "gamma", "rate"), [(100, 0.5, 0.92929), (100, 0.9, 0.96838), (1e4, 0.99, 0.99900)])
def test_the_rate_on_quadratics_is_known(kappa: float, gamma: float, rate: float) -> None:
    assert quadratic_rate(kappa, theorem_alpha(kappa, gamma), gamma) == pytest.approx(rate, abs=5e-6)


@pytest.mark.parametrize(("kappa", "gamma"), PAIRS)
def test_at_the_theorems_alpha_the_spectral_radius_is_one_minus_theta(kappa: float, gamma: float) -> None:
    alpha = theorem_alpha(kappa, gamma)
    everywhere = spectral_radius(np.geomspace(1 / kappa, 1, 2000), alpha, gamma)
    assert everywhere.max() == pytest.approx(1 - theta(kappa, gamma), abs=1e-6)


@pytest.mark.parametrize(("kappa", "gamma"), PAIRS)
def test_no_other_alpha_has_a_smaller_spectral_radius(kappa: float, gamma: float) -> None:
    alpha = theorem_alpha(kappa, gamma)
    others = [quadratic_rate(kappa, alpha * factor, gamma) for factor in np.linspace(0, 2, 201)]
    assert min(others) == pytest.approx(1 - theta(kappa, gamma), abs=1e-6)
    assert quadratic_rate(kappa, alpha * 1.02, gamma) > 1 - theta(kappa, gamma)
    assert quadratic_rate(kappa, alpha * 0.98, gamma) > 1 - theta(kappa, gamma)


@given(kappa=st.floats(1.5, 1e4), gamma=st.floats(0, 0.99), alpha=st.floats(0, 3))
def test_the_worst_eigenvalue_is_at_an_end(kappa: float, gamma: float, alpha: float) -> None:
    everywhere = spectral_radius(np.geomspace(1 / kappa, 1, 500), alpha, gamma)
    assert everywhere.max() <= quadratic_rate(kappa, alpha, gamma) + 1e-7


@pytest.mark.parametrize("kappa", [2.0, 10.0, 1e4])
def test_gamma_0_is_nesterovs_classical_alpha(kappa: float) -> None:
    assert theorem_alpha(kappa, 0) == pytest.approx((math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1))


@pytest.mark.parametrize(("kappa", "gamma"), PAIRS)
def test_an_alpha_tells_its_kappa(kappa: float, gamma: float) -> None:
    assert theorem_kappa(theorem_alpha(kappa, gamma), gamma) == pytest.approx(kappa)


@pytest.mark.parametrize("kappa", [2.0, 10.0, 1000.0])
def test_it_beats_gradient_descent_only_below_one_minus_one_over_kappa(kappa: float) -> None:
    edge, alphas = 1 - 1 / kappa, np.linspace(0, 50, 301)
    assert theorem_alpha(kappa, edge) == pytest.approx(0, abs=1e-12)
    below, above = edge - 0.1 / kappa, edge + 0.1 / kappa
    assert quadratic_rate(kappa, theorem_alpha(kappa, below), below) < edge
    assert min(quadratic_rate(kappa, alpha, above) for alpha in alphas) >= above > edge


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.8])
def test_the_closed_form_is_what_the_wrapper_does(gamma: float) -> None:
    s, alpha = 0.03, 0.6
    path = descend(around(1.0, EMANesterov, alpha, gamma), lambda x: s * x, torch.ones(1), 200)
    x = path.x[:, 0]
    trace = gamma + (1 - s) * (1 + (1 - gamma) * alpha)
    determinant = (1 - s) * (gamma + (1 - gamma) * alpha)
    assert torch.allclose(x[2:], trace * x[1:-1] - determinant * x[:-2], atol=1e-12)


@pytest.mark.parametrize("kappa", [10.0, 100.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name", ["quadratic", "log-cosh"])
def test_the_distance_falls_no_slower_than_the_theorem_says(name: str, kappa: float, gamma: float) -> None:
    problem, generator = problems(kappa, 1)[name], torch.Generator().manual_seed(0)
    start = torch.randn(20, dtype=torch.float64, generator=generator)
    steps = math.ceil(20 / theta(kappa, gamma))
    path = descend(around(1.0, EMANesterov, theorem_alpha(kappa, gamma), gamma), problem.gradient, start, steps)
    measured, exact = measured_rate(path.x.norm(dim=-1)), 1 - theta(kappa, gamma)
    assert measured < math.sqrt(exact)
    assert 1 - measured > 0.97 * (1 - exact)
    if name == "quadratic":
        assert 1 - measured == pytest.approx(1 - exact, rel=0.03)


def test_a_double_root_is_not_read_as_a_slower_rate() -> None:
    t = torch.arange(200, dtype=torch.float64)
    assert measured_rate((1 + 0.1 * t) * 0.9**t) == pytest.approx(0.9, abs=2e-3)
    assert measured_rate(0.9**t) == pytest.approx(0.9, abs=1e-6)


def test_heavy_ball_has_its_optimal_rate() -> None:
    lr, momentum, rate = heavy_ball(50.0)
    problem = problems(50.0, 0)["quadratic"]
    path = descend(around(lr, momentum=momentum), problem.gradient, torch.ones(20, dtype=torch.float64), 150)
    assert 1 - measured_rate(path.x.norm(dim=-1)) == pytest.approx(1 - rate, rel=0.05)


@settings(deadline=None, max_examples=30)
@given(
    kappa=st.floats(0.1, 4).map(lambda e: 10**e),
    share=st.one_of(st.just(0.0), st.floats(0.01, 1)),  # rounding is amplified near, but not at, gamma 0
    dimensions=st.integers(1, 8),
    size=st.floats(-2, 1.5).map(lambda e: 10**e),
    seed=st.integers(0, 2**31),
    family=st.sampled_from(["quadratic", "log-cosh"]),
)
def test_the_lyapunov_function_falls_by_theta_at_every_step(
    kappa: float, share: float, dimensions: int, size: float, seed: int, family: str
) -> None:
    gamma = share * (1 - 1 / kappa)
    generator = torch.Generator().manual_seed(seed)
    if family == "quadratic":
        eigenvalues = kappa ** -torch.rand(dimensions, dtype=torch.float64, generator=generator)
        problem = quadratic(eigenvalues)
    else:
        problem = random_log_cosh(kappa, dimensions, seed)
    start = size * torch.randn(dimensions, dtype=torch.float64, generator=generator)
    make = around(1.0, EMANesterov, theorem_alpha(kappa, gamma), gamma)
    v = lyapunov(problem, descend(make, problem.gradient, start, 40, directions=True), kappa, gamma)
    assert (v[1:] <= (1 - theta(kappa, gamma)) * v[:-1] * (1 + 1e-8) + 1e-25).all()


def test_the_script_writes_what_it_prints(tmp_path: Path) -> None:
    said = run(Arguments(str(tmp_path), kappas=[10.0], gammas=[0.0, 0.5], efolds=1))
    assert {p.name for p in tmp_path.iterdir()} == {"rates.csv", "strongly_convex.png", "strongly_convex.svg"}
    with open(tmp_path / "rates.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    for problem in ("quadratic", "log-cosh"):
        (line,) = re.findall(rf"{problem}, kappa 10, measured 1 - rate: (.*)", said)
        written = {r["method"]: 1 - float(r["measured_rate"]) for r in rows if r["problem"] == problem}
        assert line == ", ".join(f"{method} {rate:.5f}" for method, rate in written.items())
    assert all(float(r["slowest_v"]) <= float(r["theorem_v"]) for r in rows if r["theorem_v"] != "nan")


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("kappa=10", "unknown key kappa; did you mean kappas"),
        ("kappas=[1]", "kappas must be above 1"),
        ("gammas=[1]", "gammas in [0, 1)"),
        ("efolds=x", "efolds=x must be a number"),
    ],
)
def test_bad_keys_are_one_line(refused: Refused, argument: str, line: str) -> None:
    refused("analysis.py", ["strongly_convex", argument], line)
