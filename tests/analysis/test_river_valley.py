"""The valley, the limits of stability in it, and what the directions know of the river."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ema_nesterov.analysis import river_valley as analysis
from ema_nesterov.analysis.descent import around, descend
from ema_nesterov.analysis.river_valley import Valley, angle_to_river, largest_rate, loss_along, noisy
from ema_nesterov.lookahead import EMANesterov, Nesterov
from tests.conftest import Refused

VALLEY = Valley(slope=0.05, bend=2.0, length=5.0)
STRAIGHT = Valley(slope=0.05, bend=0.0, length=1.0)


def points(count: int = 20) -> torch.Tensor:
    return 3 * torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_gradient_is_that_of_the_loss() -> None:
    p = points().requires_grad_()
    (expected,) = torch.autograd.grad(VALLEY.loss(p).sum(), p)
    torch.testing.assert_close(VALLEY.gradient(p.detach()), expected)


def test_the_river_runs_along_the_bed_and_downhill() -> None:
    p = points()
    on_bed = torch.stack([p[:, 0], VALLEY.bed(p[:, 0])], dim=1)
    ahead = on_bed + 1e-4 * VALLEY.downstream(on_bed)
    assert (VALLEY.loss(ahead) < VALLEY.loss(on_bed)).all()
    torch.testing.assert_close(VALLEY.bed(ahead[:, 0]), ahead[:, 1], atol=1e-8, rtol=0)
    assert angle_to_river(VALLEY, on_bed, -VALLEY.downstream(on_bed)) == pytest.approx(180.0)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.0, 0.0), (0.5, 0.0), (0.5, 0.9), (0.9, 0.5)])
def test_the_largest_rate_divides_what_stays_in_the_valley_from_what_does_not(alpha: float, gamma: float) -> None:
    start, limit = torch.tensor([0.0, 1e-3]), largest_rate(alpha, gamma)
    for factor, stays in ((0.97, True), (1.03, False)):
        make = around(factor * limit, EMANesterov, alpha, gamma)
        across = descend(make, STRAIGHT.gradient, start, 500).x[-1, 1].abs()
        assert (across < 1e-3) == stays


def test_the_ema_costs_less_of_the_largest_rate_than_nesterov_and_the_control() -> None:
    alpha = 0.5
    assert 2 * (1 - alpha) < largest_rate(alpha, 0.0) < largest_rate(alpha, 0.9) < largest_rate(alpha, 0.99) < 2


def test_under_a_steady_drift_both_lookaheads_move_1_over_1_minus_alpha_times_as_far() -> None:
    start = torch.zeros(2)
    for wrapper, settings in ((Nesterov, (0.5,)), (EMANesterov, (0.5, 0.9))):
        x = descend(around(0.1, wrapper, *settings), STRAIGHT.gradient, start, 400).x[:, 0]
        assert (x[-1] - x[-2]).item() == pytest.approx(2 * 0.1 * 0.05, rel=1e-3)


def test_noise_turns_the_last_update_away_from_the_river_and_the_ema_less() -> None:
    """At the same iterates, as alpha = 0 only watches; Figures 1 and 2."""
    angles, losses = {}, {}
    for name, wrapper, settings in (("last", Nesterov, (0.0,)), ("ema", EMANesterov, (0.0, 0.98))):
        make = around(0.6, wrapper, *settings)
        path = descend(make, noisy(VALLEY, 0.3, 0), torch.zeros(16, 2), 500, directions=True)
        angles[name] = angle_to_river(VALLEY, path.x[250:], path.d[250:]).mean()
        losses[name] = loss_along(VALLEY, path.x[250:], path.d[250:])
    assert angles["last"] > 70
    assert angles["ema"] < 30
    assert losses["last"][-1] > 0 > losses["ema"][-1]


def test_every_optimizer_meets_the_same_noise() -> None:
    first, second = (noisy(VALLEY, 0.3, 7) for _ in range(2))
    p = points()
    for _ in range(3):
        assert torch.equal(first(p), second(p))


def test_it_writes_its_figure_and_tables_and_a_run_that_left_is_not_best(tmp_path: Path) -> None:
    said = analysis.run(analysis.Arguments(output=str(tmp_path), steps=200, gamma=0.9, seeds=2))
    names = {"river_valley.png", "river_valley.svg", "runs.csv", "positions.csv", "rates.csv"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "inf" in (tmp_path / "rates.csv").read_text(encoding="utf-8")
    assert "inf" not in said


def test_what_cannot_be_is_refused_in_one_line(refused: Refused) -> None:
    refused("analysis.py", ["river_valley", "alpha=1"], "alpha=1.0 must be in [0, 1)")
    refused("analysis.py", ["river_valley", "lr=1.7"], "lr must be above 0 and below 1.5")
    refused("analysis.py", ["river_valley", "steps=10"], "steps between 200 and 100000")
