"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.pairs import PAIRS, WRAPPERS, build_base, parameters, take_step, values

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def no_waiting_left_on() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu() -> list[torch.Tensor]:
    return [p.detach().cuda().requires_grad_() for p in parameters()]


@pytest.mark.parametrize(("wrapper", "base"), PAIRS)
def test_a_step_waits_for_no_device(wrapper: str, base: str) -> None:
    params = on_gpu()
    optimizer = WRAPPERS[wrapper](build_base(base, params))
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(4):  # SOAP's first eigenbasis waits
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(7):
        optimizer.step()


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_the_compiled_pass_agrees_with_the_cpu(wrapper: str) -> None:
    here, there = parameters(), on_gpu()
    a, b = (WRAPPERS[wrapper](build_base("adamw", ps)) for ps in (here, there))
    for step in range(8):
        take_step(a, here, step)
        for p, q in zip(here, there, strict=True):
            assert p.grad is not None
            q.grad = p.grad.cuda()
        if step == 6:
            for group in b.param_groups:
                group["lr"] *= 0.5
        b.step()
        for p, q in zip(values(here), values(there), strict=True):
            torch.testing.assert_close(p, q.cpu(), rtol=1e-4, atol=1e-5)


def test_no_schedule_recompiles_a_step() -> None:
    params = on_gpu()
    optimizer = WRAPPERS["ema_nesterov"](build_base("muon_llama", params))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for p in params:
        p.grad = torch.randn_like(p)
    for step in range(10):  # alpha is 0 at first, and moves with the learning rate
        optimizer.param_groups[-1]["lr"] = 0.1 / (step + 1)
        optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1
