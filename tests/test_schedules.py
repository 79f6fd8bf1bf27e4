from __future__ import annotations

import pytest

from ema_nesterov.schedules import lookahead_alpha, wsd


def test_the_124m_schedule_is_the_records() -> None:
    factor = wsd(6200, 0, 1800)
    assert all(factor(t) == (1.0 if t < 4400 else pytest.approx((6200 - t) / 1800)) for t in range(6200))


def test_the_162m_schedule_is_the_records() -> None:
    factor = wsd(3350, 0, round(0.7 * 3350))
    for t in range(3350):
        assert factor(t) == pytest.approx(1.0 if t / 3350 < 0.3 else (1 - t / 3350) / 0.7)


def test_the_llama_schedule_is_the_releases() -> None:
    factor = wsd(2500, 250, 250, decay="exponential")
    assert [factor(0), factor(125), factor(250), factor(2250)] == [0.0, 0.5, 1.0, 1.0]
    assert factor(2375) == pytest.approx(0.1**0.5)
    assert factor(2500) == pytest.approx(0.1)


def test_alpha_follows_the_learning_rate_inside_its_window() -> None:
    alpha = lookahead_alpha(0.5, wsd(6200, 0, 1800), 6200, 1800, 600)
    assert [alpha(0), alpha(1799), alpha(1800), alpha(4400)] == [0.0, 0.0, 0.5, 0.5]
    assert alpha(5599) == pytest.approx(0.5 * 601 / 1800)
    assert [alpha(5600), alpha(6200)] == [0.0, 0.0]


def test_alpha_is_relative_to_the_largest_rate() -> None:
    assert lookahead_alpha(0.5, lambda step: 3.0, 10, 0, 0)(5) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 6, 6), "do not fit"),
        ((10, -1, 0), "do not fit"),
        ((10, 0, 5, 0.0, "exponential"), "min_ratio"),
        ((10, 0, 5, None, "cosine"), "linear or exponential"),
    ],
)
def test_refuses_what_is_no_schedule(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wsd(*arguments)
    with pytest.raises(ValueError, match="do not fit"):
        lookahead_alpha(0.5, wsd(10, 0, 5), 10, 6, 6)
