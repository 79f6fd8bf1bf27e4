"""In other people's loops: what torch and its users do to an optimizer, done to every wrapper and base."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from ema_nesterov.lookahead import EMANesterov
from ema_nesterov.optim import SOAP, Aurora, Muon, NorMuon, Record30
from tests.conftest import assert_same
from tests.pairs import BASES, PAIRS, WRAPPERS, anchors, build_base, parameters, take_step, values

pairs = pytest.mark.parametrize(("wrapper", "base"), PAIRS)
KINDS = ("adamw", "muon_nanogpt", "soap", "record30")  # of bases, where Muon's kin do not differ
kinds = pytest.mark.parametrize(("wrapper", "base"), [pair for pair in PAIRS if pair[1] in KINDS])
MATRIX = [Muon, NorMuon, Aurora, SOAP, Record30]


def make(wrapper: str, base: str, params: list[Tensor]) -> Any:
    return WRAPPERS[wrapper](build_base(base, params))


@pairs
def test_every_wrapper_of_every_base_is_an_optimizer(wrapper: str, base: str) -> None:
    params = parameters()
    optimizer = make(wrapper, base, params)
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert sorted(id(p) for g in optimizer.param_groups for p in g["params"]) == sorted(map(id, params))
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    take_step(optimizer, params, 0)
    assert calls == [1]
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@kinds
def test_copies_and_pickles_go_on_bit_for_bit(wrapper: str, base: str) -> None:
    params = parameters()
    optimizer = make(wrapper, base, params)
    LambdaLR(optimizer, abs)  # patches step() on the instance
    for step in range(4):
        take_step(optimizer, params, step)
    held = {"params": params, "optimizer": optimizer}
    twins = [copy.deepcopy(held), pickle.loads(pickle.dumps(held))]
    for step in range(4, 7):
        take_step(optimizer, params, step)
        for twin in twins:
            take_step(twin["optimizer"], twin["params"], step)
    for twin in twins:
        assert_same(values(twin["params"]), values(params))
        assert_same(twin["optimizer"].state_dict(), optimizer.state_dict())


@kinds
def test_a_closure_gives_the_same_steps(wrapper: str, base: str) -> None:
    plain, closed = parameters(), parameters()
    one, other = make(wrapper, base, plain), make(wrapper, base, closed)

    def closure() -> Tensor:
        other.zero_grad()
        loss = sum(((p - 1) ** 2).sum() for p in closed)
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss

    for _ in range(5):
        one.zero_grad()
        sum(((p - 1) ** 2).sum() for p in plain).backward()  # type: ignore[union-attr]
        one.step()
        assert isinstance(other.step(closure), Tensor)
        assert_same(values(closed), values(plain))


@pytest.mark.parametrize("scheduled", ["wrapper", "base"])
@kinds
def test_torchs_schedulers_move_wrapper_and_base_alike(wrapper: str, base: str, scheduled: str) -> None:
    params, plain = parameters(), parameters()
    optimizer, by_hand = make(wrapper, base, params), make(wrapper, base, plain)
    rates = [g["lr"] for g in by_hand.param_groups]
    scheduler = CosineAnnealingLR(optimizer if scheduled == "wrapper" else optimizer.base, T_max=10)
    for step in range(5):
        take_step(optimizer, params, step)
        scheduler.step()
        take_step(by_hand, plain, step)
        for group, theirs in zip(by_hand.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = theirs["lr"]
        assert_same(values(params), values(plain))
    assert all(g["lr"] < lr for g, lr in zip(optimizer.param_groups, rates, strict=True))


@kinds
def test_a_gradient_scaler_skips_and_unscales(wrapper: str, base: str) -> None:
    scaled, plain = parameters(), parameters()
    one, other = make(wrapper, base, scaled), make(wrapper, base, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        for p, q in zip(scaled, plain, strict=True):
            generator = torch.Generator().manual_seed(step)
            q.grad = torch.randn(q.shape, generator=generator)
            p.grad = 4.0 * q.grad
        if step == 2:
            scaled[0].grad[0, 0] = torch.inf
        before = values(scaled)
        scaler.scale(torch.zeros(()))  # what a backward pass would begin with
        scaler.step(one)
        scaler.update(4.0)
        if step == 2:
            assert_same(values(scaled), before)  # an overflow: nothing moves
        else:
            other.step()
            assert_same(values(scaled), values(plain))


@pairs
def test_frozen_and_unused_parameters_stay_where_they_are(wrapper: str, base: str) -> None:
    before = values(parameters())
    params = parameters()
    params[0].requires_grad_(False)  # frozen; the fourth never gets a gradient
    optimizer = make(wrapper, base, params)
    for _ in range(5):
        for p in (params[1], params[2], params[4]):
            p.grad = torch.ones_like(p)
        optimizer.step()
        with optimizer.at_iterate():
            assert_same(values([params[0], params[3]]), [before[0], before[3]])
    assert_same(values([params[0], params[3]]), [before[0], before[3]])
    assert not torch.equal(params[1].detach(), before[1])


@pairs
def test_bfloat16_parameters_keep_float32_state_through_a_load(wrapper: str, base: str) -> None:
    straight = parameters(torch.bfloat16)
    optimizer = make(wrapper, base, straight)
    for step in range(8):
        take_step(optimizer, straight, step)
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in straight)
    assert all(a.dtype == torch.float32 for a in anchors(optimizer))
    first, second = parameters(torch.bfloat16), parameters(torch.bfloat16)
    saved, loaded = make(wrapper, base, first), make(wrapper, base, second)
    for step in range(5):
        take_step(saved, first, step)
    with torch.no_grad():
        torch._foreach_copy_(second, first)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    for step in range(5, 8):
        take_step(loaded, second, step)
    assert_same(values(second), values(straight))
    if base not in ("sgd", "adamw"):  # torch's own keep their state in the parameter's dtype
        matrix = loaded.base if base == "soap" else loaded.base.optimizers[1]
        tensors = [t for s in matrix.state.values() for t in s.values() if isinstance(t, Tensor)]
        assert all(t.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize("base", BASES)
def test_tied_weights_are_stepped_once(base: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.two.weight = self.one.weight
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x) * self.scale)

    torch.manual_seed(0)
    model = Tied()
    apart = [model.one.weight.detach().clone().requires_grad_(), model.scale.detach().clone().requires_grad_()]
    order = {id(model.one.weight): 0, id(model.scale): 1}
    params = sorted(model.parameters(), key=lambda p: order[id(p)])
    optimizer = EMANesterov(build_base(base, params), 0.5, 0.9)
    other = EMANesterov(build_base(base, apart), 0.5, 0.9)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.eye(6)).square().sum().backward()
        for p, q in zip(params, apart, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
        assert_same(values(params), values(apart))
    assert model.one.weight is model.two.weight
    assert len(optimizer.average()) == 2


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_a_group_added_in_mid_run_trains(wrapper: str) -> None:
    params = parameters()
    optimizer = WRAPPERS[wrapper](Muon(params[:2], lr=0.1))
    for step in range(4):
        take_step(optimizer, params[:2], step)
    before = values(params)
    optimizer.add_param_group({"params": params[2:4], "lr": 0.2})
    for step in range(4, 8):
        take_step(optimizer, params[:4], step)
    assert not any(torch.equal(p, b) for p, b in zip(values(params[:4]), before[:4], strict=True))
    state = copy.deepcopy(optimizer.state_dict())
    again = WRAPPERS[wrapper](Muon([{"params": params[:2]}, {"params": params[2:4], "lr": 0.2}], lr=0.1))
    again.load_state_dict(state)
    assert_same(again.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("optimizer", MATRIX)
def test_groups_have_learning_rates_of_their_own(optimizer: Any) -> None:
    together, apart = parameters()[:4], parameters()[:4]
    grouped = optimizer([{"params": together[:2], "lr": 0.01}, {"params": together[2:]}], lr=0.1)
    single = [optimizer(apart[:2], lr=0.01), optimizer(apart[2:], lr=0.1)]
    for step in range(3):
        take_step(grouped, together, step)
        for one, part in zip(single, (apart[:2], apart[2:]), strict=True):
            generator = torch.Generator().manual_seed(step)
            for p in apart:
                noise = 0.3 * torch.randn(p.shape, generator=generator)
                if any(p is q for q in part):
                    p.grad = p.detach() + noise
            one.step()
    assert_same(values(together), values(apart))


@pytest.mark.parametrize("base", ["soap", "record30", "muon_llama"])
def test_a_state_that_others_move_or_clear_is_the_state_that_steps(base: str) -> None:
    params = parameters()
    optimizer = build_base(base, params)
    member: Any = optimizer if base == "soap" else optimizer.optimizers[1]  # type: ignore[attr-defined]
    for step in range(4):
        take_step(optimizer, params, step)
    for state in member.state.values():  # as offloading does
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = value.clone()
    take_step(optimizer, params, 4)
    twin = parameters()
    with torch.no_grad():
        torch._foreach_copy_(twin, params)
    again = build_base(base, twin)
    again.load_state_dict(optimizer.state_dict())
    for step in range(5, 8):
        take_step(optimizer, params, step)
        take_step(again, twin, step)
    assert_same(values(twin), values(params))
    for one, ps in ((optimizer, params), (again, twin)):
        inner: Any = one if base == "soap" else one.optimizers[1]  # type: ignore[attr-defined]
        inner.state.clear()
        for step in range(3):
            take_step(one, ps, step)
    assert_same(values(twin), values(params))


@pytest.mark.parametrize("optimizer", MATRIX)
def test_a_parameter_put_in_anothers_place_is_trained(optimizer: Any) -> None:
    old, new = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    held = optimizer([old], lr=0.1)
    held.param_groups[0]["params"][0] = new
    for step in range(3):
        new.grad = torch.randn(3, 3, generator=torch.Generator().manual_seed(step))
        held.step()
    assert not torch.equal(new.detach(), old.detach())


@kinds
def test_a_closure_that_fails_leaves_everything_as_it_was(wrapper: str, base: str) -> None:
    params, plain = parameters(), parameters()
    optimizer, undisturbed = make(wrapper, base, params), make(wrapper, base, plain)

    def fail() -> None:
        raise MemoryError

    for step in range(6):
        if step == 3:
            with pytest.raises(MemoryError):
                optimizer.step(fail)
        take_step(optimizer, params, step)
        take_step(undisturbed, plain, step)
    assert_same(values(params), values(plain))
    assert_same(optimizer.state_dict(), undisturbed.state_dict())


@kinds
def test_a_loaded_state_is_not_shared_with_what_was_loaded(wrapper: str, base: str) -> None:
    params, other = parameters(), parameters()
    optimizer, loaded = make(wrapper, base, params), make(wrapper, base, other)
    for step in range(4):
        take_step(optimizer, params, step)
    before = copy.deepcopy(optimizer.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    for step in range(4, 7):
        take_step(loaded, other, step)
    assert_same(optimizer.state_dict(), before)


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_a_group_added_to_the_base_itself_is_wrapped_too(wrapper: str) -> None:
    params = parameters()
    optimizer = WRAPPERS[wrapper](SGD(params[:2], lr=0.1))
    for step in range(4):
        take_step(optimizer, params[:2], step)
    optimizer.base.add_param_group({"params": params[2:]})
    take_step(optimizer, params, 4)
    assert len(anchors(optimizer)) == 5


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_wrappers_sit_around_an_optimizer_of_nothing(wrapper: str) -> None:
    optimizer = WRAPPERS[wrapper](AdamW([{"params": []}], lr=0.1))
    optimizer.step()
    with optimizer.at_iterate():
        pass


def test_schedulers_that_look_into_the_defaults_take_a_wrapper() -> None:
    params = parameters()
    optimizer = EMANesterov(AdamW(params, lr=0.1), 0.5, 0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    take_step(optimizer, params, 0)
    scheduler.step()
    assert optimizer.param_groups[0]["betas"][0] < 0.95


def test_a_compiled_step_is_the_step() -> None:
    params, plain = parameters()[:4], parameters()[:4]
    eager, compiled = Muon(plain, lr=0.1), Muon(params, lr=0.1)
    step_of = torch.compile(compiled.step, backend="eager")
    for step in range(3):
        for p, q in zip(params, plain, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        step_of()
        eager.step()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q)


def test_no_schedule_recompiles_the_fused_pass() -> None:
    """The function that a GPU compiles, here with a backend that only counts."""
    from torch._dynamo.testing import CompileCounter

    from ema_nesterov.lookahead.fused import average_and_extrapolate_, one_pass_

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(one_pass_, backend=counter, dynamic=False)
    averages, points = values(parameters()), values(parameters())
    for p in points:
        p += 1
    for step in range(20):
        a, b = 0.1 / (step + 1), -0.5 * step
        expected = [x.clone() for x in averages], [x.clone() for x in points]
        average_and_extrapolate_(*expected, a, b)
        compiled(averages, points, torch.tensor(a), torch.tensor(b))
        for ours, theirs in zip((averages, points), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
