"""The filters against their definitions, and against what the real wrappers make of noise and of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ema_nesterov.analysis import filter as analysis
from ema_nesterov.analysis.descent import Make, around
from ema_nesterov.analysis.updates import config, energy, follow, persistent_share, slow_share, spectrum
from ema_nesterov.lookahead import GPA, NALA, EMANesterov
from tests.conftest import ROOT, Refused, composed

SMALL = {"steps": 150, "batch_size": 4, "seq_len": 16, "layers": 1, "width": 16, "coordinates": 64, "gamma": 0.8}


def noise(steps: int, columns: int = 200, rho: float = 0.0) -> torch.Tensor:
    """Stationary series with correlations rho^lag and variance 1."""
    series = torch.randn(steps, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in range(1, steps):
        series[t] = rho * series[t - 1] + (1 - rho**2) ** 0.5 * series[t]
    return series


def loop_power(rate: float, gain: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda w: gain**2 * analysis.ema_power(rate, w)


@pytest.mark.parametrize(
    ("make", "power"),
    [
        (around(1.0, EMANesterov, 0.0, 0.5), loop_power(0.5, 1.0)),
        (around(1.0, EMANesterov, 0.0, 0.9), loop_power(0.9, 1.0)),
        (around(1.0, EMANesterov, 0.5, 0.9), loop_power(*analysis.closed_loop(0.9, 0.5))),
        (around(1.0, GPA, 0.9, 0.7), loop_power(*analysis.gpa_loop(0.9))),
    ],
    ids=["gamma 0.5", "gamma 0.9", "alpha 0.5, with respect to the base's steps", "GPA"],
)
def test_what_a_wrapper_makes_of_white_noise_has_the_squared_transfer_function(
    make: Make, power: Callable[[np.ndarray], np.ndarray]
) -> None:
    updates = noise(800, 600)
    w, of_updates = spectrum(updates[150:])
    ratio = spectrum(analysis.replay(make, updates)[150:])[1] / of_updates / power(w)
    assert abs(np.mean(ratio) - 1) < 0.01
    assert np.quantile(np.abs(ratio - 1), 0.95) < 0.05


@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_the_variance_of_the_ema_is_the_predicted_share_of_that_of_its_input(rho: float) -> None:
    updates = noise(800, 1200, rho)
    m = analysis.replay(around(1.0, EMANesterov, 0.0, 0.9), updates)[300:]
    assert energy(m) / energy(updates[300:]) == pytest.approx(analysis.ema_noise(0.9, rho), rel=0.02)


def test_nalas_direction_at_a_sync_is_the_mean_of_k_updates_times_k() -> None:
    updates = noise(35, 3)
    syncs = slice(6, None, 7)
    nala = analysis.replay(around(1.0, NALA, 0.0, 7), updates)[syncs]
    torch.testing.assert_close(nala, 7 * analysis.moving_average(updates, 7)[syncs])


@pytest.mark.parametrize("k", [3, 19])
def test_the_transfer_function_of_the_average_is_that_of_its_weights(k: int) -> None:
    w = np.linspace(0, np.pi, 50)
    direct = np.abs(np.exp(-1j * np.outer(w, np.arange(k))).mean(1)) ** 2
    np.testing.assert_allclose(analysis.average_power(k, w), direct, atol=1e-9)
    impulse = torch.zeros(2 * k, 1, dtype=torch.float64)
    impulse[0] = 1
    torch.testing.assert_close(analysis.moving_average(impulse, k)[:, 0], (torch.arange(2 * k) < k).double() / k)


def test_the_delay_at_frequency_zero_is_the_mean_age_and_elsewhere_the_slope_of_the_phase() -> None:
    ages, gamma = np.arange(5000), 0.95
    assert analysis.ema_delay(gamma, np.zeros(1))[0] == pytest.approx(((1 - gamma) * gamma**ages * ages).sum())
    w = np.linspace(0.01, 3, 2000)
    phase = np.unwrap(np.angle((1 - gamma) / (1 - gamma * np.exp(-1j * w))))
    np.testing.assert_allclose(analysis.ema_delay(gamma, w)[1:-1], -np.gradient(phase, w)[1:-1], atol=0.02)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99, 0.999])
def test_the_matched_average_has_the_age_and_the_noise_of_the_ema(gamma: float) -> None:
    k = analysis.matched_k(gamma)
    assert (k - 1) / 2 == pytest.approx(gamma / (1 - gamma))
    assert 1 / k == pytest.approx(analysis.ema_noise(gamma))


def test_after_a_corner_the_ema_is_ahead_first_and_the_average_is_done_first() -> None:
    k = analysis.matched_k(0.9)
    path = torch.zeros(4 * k, 2, dtype=torch.float64)
    path[: 2 * k, 0] = path[2 * k :, 1] = 1
    ema = analysis.angle_between(analysis.replay(around(1.0, EMANesterov, 0.0, 0.9), path), path)
    average = analysis.angle_between(analysis.moving_average(path, k), path)
    assert ema[2 * k + k // 2] < average[2 * k + k // 2]
    assert average[3 * k] < 1e-3 < ema[3 * k]


def test_the_measures_tell_noise_from_a_drift() -> None:
    white = noise(500)
    assert slow_share(white, 20) == pytest.approx(0.1, abs=0.01)
    assert slow_share(torch.ones(500, 3), 20) == pytest.approx(1.0)
    assert persistent_share(white, range(50, 100)) == pytest.approx(0.0, abs=0.01)
    assert persistent_share(white + 0.5, range(50, 100)) == pytest.approx(0.2, abs=0.02)


def test_the_run_is_the_quickstarts_and_the_wrappers_do_not_change_it(sample: Path) -> None:
    cfg = config(str(sample), 20, 4, 16, 1, 16, 0)
    quickstart = composed("experiment=quickstart/muon")
    assert cfg.optimizer == quickstart.optimizer
    kept = {key for key in cfg.model if key not in ("layers", "width")}
    assert {key: cfg.model[key] for key in kept} == {key: quickstart.model[key] for key in kept}
    followed, alone = follow(cfg, [0.9, 0.5], 64), follow(cfg, [], 64)
    m = {role: torch.zeros(64) for role in alone.updates}
    for role, updates in alone.updates.items():
        assert torch.equal(updates, followed.updates[role])
        for update, direction in zip(updates, followed.directions[0.5][role], strict=True):
            m[role] = 0.5 * m[role] + 0.5 * update
            torch.testing.assert_close(direction, m[role], atol=1e-6, rtol=1e-3)


def test_it_writes_its_figure_and_tables_and_says_what_it_measured(sample: Path, tmp_path: Path) -> None:
    said = analysis.run(analysis.Arguments(output=str(tmp_path), data=str(sample), **SMALL))  # type: ignore[arg-type]
    names = {"filter.png", "filter.svg", "filters.csv", "spectrum.csv", "energy.csv"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "matrices (Muon)" in said
    assert str(ROOT) not in said


def test_what_cannot_be_is_refused_in_one_line(refused: Refused) -> None:
    refused("analysis.py", ["filter", "gamma=1"], "gamma=1.0 must be between 0 and 1")
    refused("analysis.py", ["filter", "steps=10"], "steps must be at least 150")
    refused("analysis.py", ["filter", "width=12"], "width must be a multiple of 8")
