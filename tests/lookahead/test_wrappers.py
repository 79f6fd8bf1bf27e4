"""Properties of every wrapper; those of EMA-Nesterov alone stand beside its name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from ema_nesterov.lookahead import GPA, NALA, SNOO, EMANesterov, Lookahead, Nesterov
from ema_nesterov.optim import Chain, Muon
from tests.conftest import assert_same
from tests.lookahead.test_ema_nesterov import BASES, parameters, take_step
from tests.pairs import WRAPPERS, anchors, values
from tests.trajectories import Trajectory


def close(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["lookahead", "snoo", "gpa"])
def test_matches_the_authors_trajectories(name: str, base: str) -> None:
    t = Trajectory(f"{name}_{base}", torch.float64)
    params, m = t.parameters(), t.meta
    inner: Optimizer = SGD(params, lr=m["base_lr"])
    if base == "adamw":
        inner = AdamW(params, lr=m["base_lr"], betas=m["betas"], eps=m["eps"], weight_decay=0.0)
    if name == "lookahead":
        wrapper: Any = Lookahead(inner, m["alpha"], m["k"])
    elif name == "snoo":
        wrapper = SNOO(inner, m["lr"], m["momentum"], m["k"])
    else:
        wrapper = GPA(inner, m["mu_x"], m["mu_y"])
    position = 0.0 if name == "gpa" else 1.0  # for the other two the reference holds the fast weights
    assert max(t.error(params, wrapper, lambda: wrapper.at_position(position))) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_leaving_a_position_restores_every_bit(name: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    wrapper = WRAPPERS[name](SGD(params, lr=0.1))
    for step in range(5):
        take_step(wrapper, params, step)
        y = values(params)
        with wrapper.at_position(2.0), wrapper.at_iterate():
            pass
        assert_same(values(params), y)
    assert all(a.dtype == torch.float32 for a in anchors(wrapper))


@pytest.mark.parametrize("base", sorted(BASES))
@pytest.mark.parametrize(
    ("make", "bit_for_bit"),
    [
        (lambda b: NALA(b, 0.0, 3), True),
        (lambda b: Lookahead(b, 1.0, 1), True),
        (lambda b: Lookahead(b, 1.0, 3), True),
        (lambda b: SNOO(b, 1.0, 0.0, 1), False),  # slow + (fast - slow) is fast up to rounding
        (lambda b: GPA(b, 0.0, 1.0), False),
    ],
)
def test_what_must_reduce_to_the_base_does(
    base: str, make: Callable[[Optimizer], Optimizer], bit_for_bit: bool
) -> None:
    wrapped, bare = parameters(), parameters()
    wrapper, alone = make(BASES[base](wrapped)), BASES[base](bare)
    for step in range(8):
        take_step(wrapper, wrapped, step)
        take_step(alone, bare, step)
        (assert_same if bit_for_bit else close)(values(wrapped), values(bare))


@settings(max_examples=25, deadline=None)
@given(lr=st.floats(0.1, 1.5), k=st.integers(1, 5), base=st.sampled_from(sorted(BASES)))
def test_snoo_without_momentum_is_lookahead(lr: float, k: int, base: str) -> None:
    a, b = parameters(), parameters()
    snoo, lookahead = SNOO(BASES[base](a), lr, 0.0, k), Lookahead(BASES[base](b), lr, k)
    for step in range(10):
        take_step(snoo, a, step)
        take_step(lookahead, b, step)
        close(a, b)


@pytest.mark.parametrize("base", sorted(BASES))
def test_nala_with_k_1_is_nesterov(base: str) -> None:
    a, b = parameters(), parameters()
    nala, nesterov = NALA(BASES[base](a), 0.7, 1), Nesterov(BASES[base](b), 0.7)
    for step in range(8):
        take_step(nala, a, step)
        take_step(nesterov, b, step)
        assert_same(values(a), values(b))


def test_nala_looks_ahead_at_every_kth_step_along_k_steps() -> None:
    params = parameters()
    nala = NALA(SGD(params, lr=0.1), 0.7, 3)
    x = [values(params)]
    for step in range(9):
        take_step(nala, params, step)
        with nala.at_iterate():
            x.append(values(params))
        t = step + 1
        if t % 3:
            close(params, x[t])
        else:
            close(params, [now + 0.7 * (now - before) for now, before in zip(x[t], x[t - 3], strict=True)])


@settings(max_examples=25, deadline=None)
@given(mu_y=st.floats(0.1, 0.9), share=st.one_of(st.just(0.0), st.floats(0.05, 0.95)))
def test_gpa_is_ema_nesterov_under_the_mapping(mu_y: float, share: float) -> None:
    """Gradients at the same points, for gamma = share = (mu_x - mu_y) / (1 - mu_y) and updates times 1 - mu_y.

    Below 0.05, but not at 0, the one-buffer form amplifies rounding by 1 / gamma.
    """
    mu_x = mu_y + share * (1 - mu_y)
    a, b = parameters(), parameters()
    gpa = GPA(SGD(a, lr=0.1), mu_x, mu_y)
    ema = EMANesterov(SGD(b, lr=0.1 * (1 - mu_y)), mu_y, (mu_x - mu_y) / (1 - mu_y))
    for step in range(10):
        take_step(gpa, a, step)
        take_step(ema, b, step)
        close(a, b)


def test_the_direction_of_gpa_runs_from_x_to_z() -> None:
    params = parameters()
    gpa = GPA(SGD(params, lr=0.1), 0.9, 0.6)
    for step in range(4):
        take_step(gpa, params, step)
    y = values(params)
    with gpa.at_position(1.0):
        close(params, anchors(gpa))
    with gpa.at_position(1 - 0.6):
        close(params, y)


def test_a_reset_clears_moments_and_keeps_the_step_counter() -> None:
    params = parameters()
    adam = AdamW(params, lr=0.1)
    wrapper = Lookahead(adam, 0.5, 3, inner_state="reset")
    for step in range(3):
        take_step(wrapper, params, step)
    assert not any(adam.state[p][key].any() for p in params for key in ("exp_avg", "exp_avg_sq"))
    assert all(adam.state[p]["step"] == 3 for p in params)


def test_interpolated_moments_lie_between_those_of_two_syncs() -> None:
    params = parameters()
    sgd = SGD(params, lr=0.1, momentum=0.9)
    wrapper = Lookahead(sgd, 0.25, 2, inner_state="interpolate")
    for step in range(2):
        take_step(wrapper, params, step)
    before = sgd.state[params[0]]["momentum_buffer"].clone()
    twin = parameters()
    with torch.no_grad():
        for p, q in zip(twin, params, strict=True):
            p.copy_(q)
    theirs = SGD(twin, lr=0.1, momentum=0.9)
    theirs.load_state_dict(copy.deepcopy(sgd.state_dict()))
    for step in range(2, 4):
        take_step(wrapper, params, step)
        take_step(theirs, twin, step)
    fast = theirs.state[twin[0]]["momentum_buffer"]
    torch.testing.assert_close(sgd.state[params[0]]["momentum_buffer"], 0.25 * fast + 0.75 * before)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_the_adaptive_alpha_is_proposition_1(scale: float) -> None:
    params = parameters()
    adam = AdamW(params, lr=0.05 * scale, betas=(0.9, 0.95), weight_decay=0.0)
    wrapper = Lookahead(adam, 0.2, 3, adaptive=True)
    slow = values(params)
    for step in range(2):
        take_step(wrapper, params, step)
    twin = parameters()
    alone = AdamW(twin, lr=0.05 * scale, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        take_step(alone, twin, step)
    take_step(wrapper, params, 2)
    d = torch.cat([(s - p.detach()).flatten() for s, p in zip(slow, twin, strict=True)])
    g = torch.cat([p.grad.flatten() for p in twin])
    curvature = torch.cat([(alone.state[p]["exp_avg_sq"] / (1 - 0.95**3)).flatten() for p in twin])
    alpha = (((d + g / curvature) * curvature) @ d / (d * curvature * d).sum()).clamp(0.2, 1.0)
    close(params, [s + alpha * (p.detach() - s) for s, p in zip(slow, twin, strict=True)])


def test_an_adaptive_alpha_needs_a_second_moment() -> None:
    params = parameters()
    wrapper = Lookahead(SGD(params, lr=0.1), 0.5, 1, adaptive=True)
    with pytest.raises(ValueError, match="second moment"):
        take_step(wrapper, params, 0)


def test_wrappers_refuse_values_outside_their_range() -> None:
    base = SGD(parameters(), lr=0.1)
    for make in (
        lambda: NALA(base, 0.5, 0),
        lambda: Lookahead(base, 0.5, 0),
        lambda: Lookahead(base, 0.5, 1, inner_state="forget"),
        lambda: SNOO(base, 0.5, 1.0, 1),
        lambda: GPA(base, 1.0, 0.5),
        lambda: GPA(base, 0.5, 0.0),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()


def test_wrappers_sit_around_a_chain() -> None:
    for make in WRAPPERS.values():
        params = parameters(torch.float32)
        wrapper = make(Chain([AdamW(params[1:], lr=0.05), Muon(params[:1], lr=0.05)]))
        for step in range(7):
            take_step(wrapper, params, step)
        assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_skipped_step_moves_nothing_but_the_count(name: str) -> None:
    """With an alpha that does not depend on the step, the run is the one without it."""
    wrap = WRAPPERS[name] if name != "ema_nesterov" else lambda base: EMANesterov(base, 0.9, 0.9, warm_start=True)
    plain, skipping = parameters(), parameters()
    without, with_skips = (wrap(SGD(params, lr=0.1, momentum=0.9)) for params in (plain, skipping))
    for step in range(9):
        take_step(without, plain, step)
        if step in (0, 2, 3, 7):
            before = values(skipping)
            with_skips.skip()
            assert all(torch.equal(a, b) for a, b in zip(before, values(skipping), strict=True))
        take_step(with_skips, skipping, step)
    assert (with_skips.steps, with_skips.taken) == (13, 9)
    assert all(torch.equal(a, b) for a, b in zip(plain, skipping, strict=True))
    again = wrap(SGD(parameters(), lr=0.1, momentum=0.9))
    again.load_state_dict(with_skips.state_dict())
    assert (again.steps, again.taken) == (13, 9)
