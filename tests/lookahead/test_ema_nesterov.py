from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from ema_nesterov.lookahead import EMANesterov, Nesterov
from ema_nesterov.optim import Chain, Muon
from tests.conftest import assert_same
from tests.trajectories import Trajectory

BASES: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "sgd": lambda ps: SGD(ps, lr=0.1, momentum=0.9),
    "adamw": lambda ps: AdamW(ps, lr=0.05),
    "muon+adamw": lambda ps: Chain([AdamW(ps[1:], lr=0.05), Muon(ps[:1], lr=0.05)]),
}


def parameters(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in ((4, 3), (5,))]


def take_step(optimizer: Optimizer, params: list[Tensor], step: int) -> None:
    """One step on a noisy quadratic."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (p.detach() + 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
    optimizer.step()


def two_buffers(params: list[Tensor], base: Optimizer, alpha: float, gamma: float, steps: int, warm: bool = False):
    """Algorithm 1 as it is written, yielding (x_t, m_t) after each step."""
    x = [p.detach().clone() for p in params]
    m = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        with torch.no_grad():
            for p, x_i, m_i in zip(params, x, m, strict=True):
                p.copy_(x_i + alpha * m_i)
        take_step(base, params, step)
        new = [p.detach().clone() for p in params]
        weight = 1.0 if warm and step == 0 else 1 - gamma
        m = [m_i + weight * (b - a - m_i) for m_i, a, b in zip(m, x, new, strict=True)]
        x = new
        yield x, m


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("start", ["", "_zero_start"])
def test_matches_the_authors_trajectories(base: str, start: str) -> None:
    t = Trajectory(f"ema_nesterov{start}_{base}", torch.float64)
    params, m = t.parameters(), t.meta
    inner: Optimizer = SGD(params, lr=m["base_lr"])
    if base == "adamw":
        inner = AdamW(params, lr=m["base_lr"], betas=m["betas"], eps=m["eps"], weight_decay=0.0)
    wrapper = EMANesterov(inner, t.lookahead_alpha, m["ema_decay"], warm_start=m["warm_start"])
    assert max(t.error(params, wrapper, wrapper.at_iterate)) < 1e-12


@settings(max_examples=30, deadline=None)
@given(
    alpha=st.floats(0.0, 0.95),
    gamma=st.one_of(st.just(0.0), st.floats(0.05, 0.999)),
    base=st.sampled_from(sorted(BASES)),
    warm=st.booleans(),
)
def test_one_buffer_is_the_two_buffer_algorithm(alpha: float, gamma: float, base: str, warm: bool) -> None:
    ours, theirs = parameters(), parameters()
    wrapper = EMANesterov(BASES[base](ours), alpha, gamma, warm_start=warm)
    literal = two_buffers(theirs, BASES[base](theirs), alpha, gamma, 12, warm and gamma > 0)
    for step, (x, m) in enumerate(literal):
        take_step(wrapper, ours, step)
        for position in (0.0, alpha, 2.0):
            with wrapper.at_position(position):
                for p, x_i, m_i in zip(ours, x, m, strict=True):
                    torch.testing.assert_close(p.detach(), x_i + position * m_i, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("base", sorted(BASES))
@pytest.mark.parametrize("make", [lambda b: EMANesterov(b, 0.0, 0.9), lambda b: Nesterov(b, lambda step: 0.0)])
def test_alpha_zero_is_bit_equal_to_the_base(base: str, make: Callable[[Optimizer], Optimizer]) -> None:
    wrapped, bare = parameters(torch.float32), parameters(torch.float32)
    wrapper, alone = make(BASES[base](wrapped)), BASES[base](bare)
    for step in range(8):
        take_step(wrapper, wrapped, step)
        take_step(alone, bare, step)
    assert_same([p.detach() for p in wrapped], [p.detach() for p in bare])


def test_gamma_zero_is_nesterov() -> None:
    a, b = parameters(), parameters()
    ema, nesterov = EMANesterov(SGD(a, lr=0.1), 0.7, 0.0), Nesterov(SGD(b, lr=0.1), 0.7)
    for step in range(8):
        take_step(ema, a, step)
        take_step(nesterov, b, step)
    assert_same([p.detach() for p in a], [p.detach() for p in b])


def test_the_weight_ema_lies_on_the_line() -> None:
    params = parameters()
    wrapper = EMANesterov(SGD(params, lr=0.1), 0.7, 0.9)
    e = [p.detach().clone() for p in params]
    for step in range(8):
        take_step(wrapper, params, step)
        with wrapper.at_iterate():
            e = [0.9 * e_i + 0.1 * p.detach() for e_i, p in zip(e, params, strict=True)]
    with wrapper.at_position(-1 / wrapper.k):
        for p, e_i, held in zip(params, e, wrapper.average(), strict=True):
            torch.testing.assert_close(p.detach(), e_i)
            torch.testing.assert_close(held, e_i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_leaving_a_position_restores_every_bit(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    wrapper = EMANesterov(SGD(params, lr=0.1), 0.7, 0.9)
    with wrapper.at_position(1.0):  # before the first step every position is x_0
        assert_same([p.detach() for p in params], [p.detach() for p in parameters(dtype)])
    for step in range(3):
        take_step(wrapper, params, step)
    y = [p.detach().clone() for p in params]
    with wrapper.at_position(2.0), wrapper.at_iterate():
        assert not torch.equal(params[0], y[0])
    wrapper.eval()
    x = [p.detach().clone() for p in params]
    wrapper.eval()
    with wrapper.at_position(-1.0):
        pass
    assert_same([p.detach() for p in params], x)
    wrapper.train()
    wrapper.train()
    assert_same([p.detach() for p in params], y)


def test_step_refuses_another_position() -> None:
    params = parameters()
    wrapper = EMANesterov(SGD(params, lr=0.1), 0.7, 0.9)
    take_step(wrapper, params, 0)
    wrapper.eval()
    with pytest.raises(RuntimeError, match="train"):
        wrapper.step()


def test_loading_names_the_first_mismatch() -> None:
    params = parameters()
    wrapper = EMANesterov(SGD(params, lr=0.1), 0.7, 0.9)
    take_step(wrapper, params, 0)
    other = [torch.zeros(4, 3).requires_grad_(), torch.zeros(6).requires_grad_()]
    with pytest.raises(ValueError, match=r"anchor of parameter 1 is \(5,\), the parameter is \(6,\)"):
        EMANesterov(SGD(other, lr=0.1), 0.7, 0.9).load_state_dict(wrapper.state_dict())
    with pytest.raises(ValueError, match="state of EMANesterov cannot be loaded into Nesterov"):
        Nesterov(SGD(parameters(), lr=0.1), 0.7).load_state_dict(wrapper.state_dict())


@pytest.mark.parametrize("on", ["wrapper", "base"])
def test_a_scheduler_on_either_moves_both(on: str) -> None:
    params = parameters()
    base = SGD(params, lr=0.1)
    wrapper = EMANesterov(base, 0.7, 0.9)
    assert wrapper.param_groups is base.param_groups
    wrapper.load_state_dict(copy.deepcopy(wrapper.state_dict()))  # where sharing is lost by those who copy groups
    scheduler = torch.optim.lr_scheduler.LambdaLR(wrapper if on == "wrapper" else base, lambda step: 0.5**step)
    take_step(wrapper, params, 0)
    scheduler.step()
    assert base.param_groups[0]["lr"] == wrapper.param_groups[0]["lr"] == 0.05


def test_buffers_are_float32_and_apart_from_the_base() -> None:
    params = parameters(torch.bfloat16)
    base = AdamW(params, lr=0.05)
    wrapper = EMANesterov(base, 0.7, 0.99)
    take_step(wrapper, params, 0)
    assert all(e.dtype == torch.float32 for e in wrapper.average())
    assert set(base.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(wrapper.state[params[0]]) > {"EMANesterov.anchor", "exp_avg"}


def test_weights_loaded_after_construction_are_the_start() -> None:
    params = parameters()
    wrapper = EMANesterov(SGD(params, lr=0.0), 0.7, 0.9)
    with torch.no_grad():
        params[0].fill_(3.0)
    take_step(wrapper, params, 0)
    assert torch.equal(wrapper.average()[0], torch.full_like(params[0], 3.0))


def test_copies_and_pickles_go_on_alike() -> None:
    params = parameters()
    wrapper = EMANesterov(SGD(params, lr=0.1), 0.7, 0.9)
    take_step(wrapper, params, 0)
    for twin in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        theirs = twin.param_groups[0]["params"]
        again = copy.deepcopy(wrapper)
        take_step(twin, theirs, 1)
        take_step(again, again.param_groups[0]["params"], 1)
        assert_same([p.detach() for p in theirs], [p.detach() for p in again.param_groups[0]["params"]])


def test_new_group_after_some_steps_trains_with_a_buffer_of_its_own() -> None:
    params = parameters()
    wrapper = EMANesterov(SGD(params[:1], lr=0.1), 0.7, 0.9)
    take_step(wrapper, params[:1], 0)
    wrapper.add_param_group({"params": params[1:], "lr": 0.2})
    take_step(wrapper, params, 1)
    assert len(wrapper.average()) == 2
    assert wrapper.base.param_groups[1]["lr"] == 0.2


@pytest.mark.parametrize("bad", [-0.1, 1.0, float("nan")])
def test_refuses_an_ema_decay_outside_its_range(bad: float) -> None:
    with pytest.raises(ValueError, match="ema_decay"):
        EMANesterov(SGD(parameters(), lr=0.1), 0.5, bad)
