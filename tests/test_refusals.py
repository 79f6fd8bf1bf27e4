"""What optimizers refuse, and that one clear line says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.optim import SGD, AdamW

from ema_nesterov.lookahead import EMANesterov, Lookahead
from ema_nesterov.optim import SOAP, Aurora, Chain, Muon, NorMuon, Record30
from tests.pairs import WRAPPERS, build_base, parameters, take_step

MATRIX = [Muon, NorMuon, Aurora, SOAP, Record30]


def test_a_chain_says_where_a_new_group_goes() -> None:
    params = parameters()
    optimizer = EMANesterov(Chain([SGD(params[:1], lr=0.1), SGD(params[1:2], lr=0.1)]), 0.5, 0.9)
    with pytest.raises(RuntimeError, match="add the group to the member"):
        optimizer.add_param_group({"params": params[2:]})


@pytest.mark.parametrize("optimizer", MATRIX)
def test_distributed_tensors_are_refused_with_the_reason(optimizer: Any, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        shard = nn.Parameter(distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (1,)), [Replicate()]))
        with pytest.raises(TypeError, match="its update of a shard is not that of the matrix"):
            optimizer([shard], lr=0.1)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("optimizer", MATRIX)
def test_a_refused_group_leaves_the_optimizer_as_it_was(optimizer: Any) -> None:
    held = optimizer(parameters()[:2], lr=0.1)
    with pytest.raises(ValueError, match="got shape"):
        held.add_param_group({"params": [torch.zeros(2, 2, 2, requires_grad=True)]})
    assert len(held.param_groups) == 1


def test_loading_names_the_first_mismatch_of_model_or_pair() -> None:
    params = parameters()
    saved = EMANesterov(build_base("muon_llama", params), 0.5, 0.9)
    take_step(saved, params, 0)
    state = saved.state_dict()
    for other, message in (
        (Lookahead(build_base("muon_llama", params), 0.5, 3), "state of EMANesterov cannot be loaded into Lookahead"),
        (EMANesterov(SGD(params, lr=0.1), 0.5, 0.9), "2 parameter groups in the state, 1 here"),
        (
            EMANesterov(build_base("normuon", params), 0.5, 0.9),
            "NorMuon: a group of the state has no beta2; it is another",
        ),
        (EMANesterov(build_base("muon_llama", params), 0.5, 0.99), "ema_decay is 0.9 in the state, 0.99 here"),
        (EMANesterov(build_base("muon_llama", params[1:]), 0.5, 0.9), "group 1 has 4 parameters in the state, 3 here"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    bare, smaller = AdamW(parameters(), lr=0.1), [torch.zeros(3, 3).requires_grad_(), *parameters()[1:]]
    held = [p for g in bare.param_groups for p in g["params"]]
    take_step(bare, held, 0)
    state = {**EMANesterov(bare, 0.5, 0.9).state_dict()}  # a wrapper that has made no step has no buffers to compare
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 is \(8, 8\), the parameter is \(3, 3\)"):
        EMANesterov(AdamW(smaller, lr=0.1), 0.5, 0.9).load_state_dict(state)
    with pytest.raises(ValueError, match="group 0 has 5 parameters in the state, 4 here"):
        EMANesterov(AdamW(parameters()[1:], lr=0.1), 0.5, 0.9).load_state_dict(state)


def test_an_adaptive_lookahead_refuses_soap_whose_second_moment_is_of_another_basis() -> None:
    params = parameters()
    optimizer = Lookahead(build_base("soap", params), 0.5, 2, adaptive=True)
    take_step(optimizer, params, 0)
    with pytest.raises(ValueError, match="second moment"):
        take_step(optimizer, params, 1)


@pytest.mark.parametrize("base", ["soap", "record30"])
def test_soaps_moments_are_not_interpolated(base: str) -> None:
    with pytest.raises(ValueError, match="maintain or reset"):
        WRAPPERS["lookahead_interpolate"](build_base(base, parameters()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Muon([torch.zeros(2, 2, dtype=torch.complex64, requires_grad=True)], lr=0.1), "complex"),
        (lambda: Muon([torch.zeros(0, 5, requires_grad=True)], lr=0.1), "got shape"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_states_of_other_kinds_are_refused_in_one_line() -> None:
    params = parameters()[:4]
    muon, soap = Muon(params, lr=0.1), SOAP(params, lr=0.1)
    for optimizer in (muon, soap):
        take_step(optimizer, params, 0)
    smaller = Muon([torch.zeros(3, 3, requires_grad=True), *params[1:]], lr=0.1)
    chain = Chain([AdamW(params[:1], lr=0.1), Muon(params[1:], lr=0.1)])
    for target, state, message in (
        (muon, soap.state_dict(), "has no momentum; it is another optimizer's"),
        (muon, EMANesterov(SGD(params, lr=0.1), 0.5, 0.9).state_dict(), "has no scale; it is another optimizer's"),
        (muon, Aurora(params, lr=0.1).state_dict(), "has (iterations|exponent); it is another optimizer's"),
        (muon, NorMuon(params, lr=0.1).state_dict(), "has beta2; it is another optimizer's"),
        (smaller, muon.state_dict(), r"momentum of parameter 0 is \(8, 8\), the parameter is \(3, 3\)"),
        (chain, muon.state_dict(), "1 parameter groups in the state, 2 here"),
    ):
        with pytest.raises(ValueError, match=message):
            target.load_state_dict(state)
