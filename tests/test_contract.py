"""torch's contract of an optimizer: every optimizer and wrapper is a row (`tests.pairs.ROWS`), every clause a column.

A new optimizer is a new row.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from ema_nesterov.lookahead import GPA, NALA, SNOO, EMANesterov, Lookahead, Nesterov
from ema_nesterov.optim import SOAP, Aurora, Chain, Muon, NorMuon, Record30
from tests.conftest import assert_same
from tests.pairs import (
    BASES,
    KINDS,
    MATRIX_BASES,
    PAIRS,
    ROWS,
    WRAPPERS,
    anchors,
    build_base,
    parameters,
    set_values,
    take_step,
    values,
)
from tests.ranks import group, on_ranks

rows = pytest.mark.parametrize("row", ROWS)
some = pytest.mark.parametrize("row", [row for row in ROWS if " of " not in row or row.endswith(("adamw", "kind"))])
LOOKAHEAD = [row for row in ROWS if " of " in row or row in ("backward", "warm", "adaptive")]
wrappers = pytest.mark.parametrize("row", LOOKAHEAD)
pairs = pytest.mark.parametrize(("wrapper", "base"), PAIRS)
kinds = pytest.mark.parametrize(("wrapper", "base"), [pair for pair in PAIRS if pair[1] in KINDS])
MATRIX = [Muon, NorMuon, Aurora, SOAP, Record30]


def stepped(row: str, steps: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Any]:
    params = parameters(dtype)
    optimizer = ROWS[row](params)
    for step in range(steps):
        take_step(optimizer, params, step)
    return params, optimizer


def goes_on_alike(one: tuple[list[Tensor], Any], other: tuple[list[Tensor], Any], first: int, steps: int = 4) -> None:
    for step in range(first, first + steps):
        for params, optimizer in (one, other):
            take_step(optimizer, params, step)
    assert_same(values(one[0]), values(other[0]))
    assert_same(one[1].state_dict(), other[1].state_dict())


# --- the methods ----------------------------------------------------------------------------------


@rows
def test_methods_take_what_torchs_take(row: str) -> None:
    optimizer = ROWS[row](parameters())
    assert isinstance(optimizer, Optimizer)
    for name in ("step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"):
        ours, torchs = (inspect.signature(getattr(of, name)) for of in (type(optimizer), Optimizer))
        wanted = [(p.name, p.default, p.kind) for p in torchs.parameters.values()]
        assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == wanted, name


# --- the state dict -------------------------------------------------------------------------------


@rows
def test_a_state_dict_has_torchs_form_and_loads_with_weights_only(row: str) -> None:
    params, optimizer = stepped(row, 5)
    saved = optimizer.state_dict()
    assert list(saved) == ["state", "param_groups"]
    assert [i for group in saved["param_groups"] for i in group["params"]] == list(range(len(params)))
    assert set(saved["state"]) <= set(range(len(params)))
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = parameters()
    set_values(loaded, values(params))
    again = ROWS[row](loaded)
    again.load_state_dict(torch.load(file, weights_only=True))
    goes_on_alike((params, optimizer), (loaded, again), 5)


@rows
def test_ids_are_labels_that_the_groups_order(row: str) -> None:
    params, optimizer = stepped(row, 5)
    saved = optimizer.state_dict()
    names = {i: ("seventh", 7, 3, "b", "a")[i] for i in range(5)}
    renamed = {
        "state": {names[i]: entries for i, entries in reversed(saved["state"].items())},
        "param_groups": [{**g, "params": [names[i] for i in g["params"]]} for g in saved["param_groups"]],
    }
    again = parameters()
    set_values(again, values(params))
    loaded = ROWS[row](again)
    loaded.load_state_dict(renamed)
    goes_on_alike((params, optimizer), (again, loaded), 5)


@rows
def test_all_four_hooks_of_a_state_dict_fire_and_count(row: str) -> None:
    params, optimizer = stepped(row, 4)
    said: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: said.append(f"before {bool(o.state)}"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "more": bool(saved["state"])})
    saved = optimizer.state_dict()
    assert (said, saved.pop("more")) == (["before True"], row != "chain without memory")

    def halved(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "param_groups": [{**g, "lr": g["lr"] / 2} for g in state_dict["param_groups"]]}

    again = parameters()
    set_values(again, values(params))
    loaded = ROWS[row](again)
    loaded.register_load_state_dict_pre_hook(halved)
    loaded.register_load_state_dict_post_hook(lambda o: said.append(f"after {o.param_groups[0]['lr']}"))
    loaded.load_state_dict(saved)
    half = optimizer.param_groups[0]["lr"] / 2
    assert said[1:] == [f"after {half}"]
    for settings in optimizer.param_groups:
        settings["lr"] /= 2
    take_step(optimizer, params, 4)
    take_step(loaded, again, 4)
    assert_same(values(again), values(params))


@rows
def test_an_empty_entry_is_no_entry(row: str) -> None:
    """As a logger makes, that reads the state before there is one, and a state dict may hold."""
    params, optimizer = parameters(), None
    optimizer = ROWS[row](params)
    for p in params:
        optimizer.state.get(p)
        assert not optimizer.state[p] or row == "chain with state"
    if not isinstance(optimizer, Chain):  # torch's own, in a chain or a wrapper, are torch's to ask
        assert not optimizer.state
    reference = stepped(row, 4)
    for step in range(4):
        take_step(optimizer, params, step)
    goes_on_alike((params, optimizer), reference, 4)
    fresh = ROWS[row](parameters())
    empty = {"state": {i: {} for i in range(5)}, "param_groups": fresh.state_dict()["param_groups"]}
    fresh.load_state_dict(empty)
    assert not fresh.state


@rows
def test_states_of_other_forms_and_other_optimizers_are_refused_before_anything_moves(row: str) -> None:
    _, optimizer = stepped(row, 4)
    before = copy.deepcopy(optimizer.state_dict())
    other = ROWS["gpa of adamw" if row.startswith("snoo") or row == "adaptive" else "snoo of adamw"](parameters())
    take_step(other, other.param_groups[0]["params"], 0)
    old = {"wrapper": "EMANesterov", "base_type": "AdamW", "base": {}, "steps": 4, "buffers": {}}
    short = {**before, "param_groups": before["param_groups"][:-1]}
    for wrong in (old, {"types": [], "optimizers": []}, short, other.state_dict()):
        with pytest.raises(ValueError, match=r"before 0\.2|in the state|cannot be loaded|another optimizer's"):
            optimizer.load_state_dict(wrong)
        assert_same(optimizer.state_dict(), before)


# --- torch.distributed.checkpoint -----------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(p.detach()) for p in parameters()])

    def held(self) -> list[Tensor]:
        return list(self.weights)


def restored(make: Callable[[list[Tensor]], Any], folder: Path, options: StateDictOptions) -> tuple[Model, Any]:
    model = Model()
    optimizer = make(model.held())
    weights, state = get_state_dict(model, optimizer, options=options)
    held = {"model": weights, "optimizer": state}
    dcp.load(held, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"], options=options
    )
    return model, optimizer


@rows
def test_distributed_checkpoint_moves_nothing_and_restores_every_bit(row: str, tmp_path: Path) -> None:
    go_through_distributed_checkpoint(row, StateDictOptions(), tmp_path)


@some
def test_distributed_checkpoint_does_so_with_flat_names(row: str, tmp_path: Path) -> None:
    go_through_distributed_checkpoint(row, StateDictOptions(flatten_optimizer_state_dict=True), tmp_path)


def go_through_distributed_checkpoint(row: str, options: StateDictOptions, folder: Path) -> None:
    params, reference = stepped(row, 0)
    model = Model()
    optimizer = ROWS[row](model.held())
    get_optimizer_state_dict(model, optimizer, options=options)  # of a fresh one: what it allocates does not stay
    for step in range(6):
        take_step(reference, params, step)
        take_step(optimizer, model.held(), step)
    optimizer.zero_grad()
    weights, state = get_state_dict(model, optimizer, options=options)
    assert_same(values(model.held()), values(params))
    assert_same(optimizer.state_dict(), reference.state_dict())
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    again, loaded = restored(ROWS[row], folder, options)
    if hasattr(loaded, "steps"):
        assert loaded.steps == 6
    goes_on_alike((again.held(), loaded), (params, reference), 6)


@wrappers
def test_distributed_checkpoint_restores_eval_mode_or_refuses(row: str) -> None:
    model = Model()
    optimizer = ROWS[row](model.held())
    for step in range(5):
        take_step(optimizer, model.held(), step)
    optimizer.eval()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = Model()
    set_values(other.held(), values(model.held()))
    loaded = ROWS[row](other.held())
    incomplete = copy.deepcopy(saved)
    for entries in incomplete["state"].values():
        for key in [key for key in entries if key.endswith(".y")]:
            del entries[key]
    with pytest.raises(ValueError, match=r"call eval\(\)"):
        set_optimizer_state_dict(other, loaded, optim_state_dict=incomplete)
    loaded.eval()  # as the message says
    target = get_optimizer_state_dict(other, loaded)
    assert {k: set(v) for k, v in target["state"].items()} == {k: set(v) for k, v in saved["state"].items()}
    set_optimizer_state_dict(other, loaded, optim_state_dict=saved)
    optimizer.train()
    loaded.train()
    goes_on_alike((model.held(), optimizer), (other.held(), loaded), 5)


SHARED = {base: (lambda params, base=base: build_base(base, params, group())) for base in ("soap", *MATRIX_BASES)}
SHARED |= {
    f"{wrapper} of {base}": (lambda params, w=wrapper, b=base: WRAPPERS[w](build_base(b, params, group())))
    for wrapper, base in PAIRS
    if base in ("soap", "muon_nanogpt")
}


def save_and_restore(folder: Path) -> Callable[[int], list[str]]:
    """Over a process group, each rank with its share of the state; what did not go on bit for bit."""

    def work(_: int = 0) -> list[str]:
        failed = []
        for name, make in SHARED.items():
            model, reference = Model(), Model()
            optimizer, straight = make(model.held()), make(reference.held())
            for step in range(6):
                take_step(optimizer, model.held(), step)
                take_step(straight, reference.held(), step)
            optimizer.zero_grad()
            weights, state = get_state_dict(model, optimizer)
            where = folder / name.replace(" ", "_")
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=where)
            again, loaded = restored(make, where, StateDictOptions())
            try:
                goes_on_alike((again.held(), loaded), (reference.held(), straight), 6)
            except AssertionError as e:
                failed.append(f"{name}: {e}")
        return failed

    return work


def test_distributed_checkpoint_restores_shared_state_on_two_ranks_and_on_one(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path, save_and_restore(tmp_path)) == [[], []]
    for name, make in SHARED.items():
        model, loaded = restored(make, tmp_path / name.replace(" ", "_"), StateDictOptions())
        params = parameters()
        alone = make(params)
        for step in range(6):
            take_step(alone, params, step)
        for step in range(6, 8):
            take_step(loaded, model.held(), step)
            take_step(alone, params, step)
        for p, q in zip(model.held(), params, strict=True):  # batches of other sizes are rounded otherwise
            torch.testing.assert_close(p.detach(), q.detach(), rtol=2e-3, atol=5e-4)


# --- gradients that are None ----------------------------------------------------------------------


def give(params: list[Tensor], step: int, but: tuple[int, ...] = ()) -> None:
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + i)
        p.grad = None if i in but else torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@rows
def test_a_parameter_without_a_gradient_keeps_its_x(row: str, dtype: torch.dtype) -> None:
    """From the start, and from the middle on, while alpha moves; then it goes on."""
    params, optimizer = stepped(row, 0, dtype)
    for step in range(5):
        give(params, step, but=(3,))
        optimizer.step()
    x = [iterate(optimizer, params)[i] for i in (0, 3)]
    for step in range(5, 12):
        give(params, step, but=(0, 3))
        optimizer.step()
        assert_same([iterate(optimizer, params)[i] for i in (0, 3)], x)
    before = values(params)
    for step in range(12, 15):
        give(params, step)
        optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(values(params), before, strict=True))


def iterate(optimizer: Any, params: list[Tensor]) -> list[Tensor]:
    if not hasattr(optimizer, "at_iterate"):
        return values(params)
    with optimizer.at_iterate():
        return values(params)


@pytest.mark.parametrize("make", [lambda b, a: EMANesterov(b, a, 0.9), Nesterov, lambda b, a: NALA(b, a, 2)])
def test_the_lookahead_point_of_a_frozen_parameter_follows_alpha(make: Any) -> None:
    params = parameters(torch.float64)
    alphas = [0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, -0.1, 0.6, 0.6]
    optimizer = make(SGD(params, lr=0.1), lambda step: alphas[step])
    for step in range(len(alphas) - 1):
        give(params, step, but=(0,) if step >= 2 else ())
        optimizer.step()
        with optimizer.at_position(optimizer.alpha_t):
            expected = params[0].detach().clone()
        torch.testing.assert_close(params[0].detach(), expected, rtol=1e-12, atol=1e-12)
        with optimizer.at_iterate():
            assert torch.equal(params[0].detach(), expected) == (optimizer.alpha_t == 0)


# --- parameters that come, go and change places ---------------------------------------------------


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("change", ["group", "append", "replace", "delete", "swap"])
def test_every_parameter_keeps_its_own_state_when_others_come_and_go(wrapper: str, change: str) -> None:
    """A parameter's path does not depend on what is beside it: here it is compared with its path alone."""
    start = parameters(torch.float64)
    params = [p.detach().clone().requires_grad_() for p in start]
    new = torch.full((3,), 3.0, dtype=torch.float64, requires_grad=True)
    first, second = SGD(params[:2], lr=0.1, momentum=0.9), SGD(params[2:4], lr=0.1, momentum=0.9)
    optimizer = WRAPPERS[wrapper](Chain([first, second]))
    alone = [p.detach().clone().requires_grad_() for p in start[:4]]
    each = [WRAPPERS[wrapper](SGD([p], lr=0.1, momentum=0.9)) for p in alone]
    for step in range(10):
        if step == 4:
            held = first.param_groups[0]["params"]
            if change == "group":
                first.add_param_group({"params": [new]})
            elif change == "append":
                held.append(new)
            elif change == "replace":
                held[0] = new
            elif change == "delete":
                del second.param_groups[0]
            else:
                held[:] = held[::-1]
        give(params, step)
        for p, q in zip(params, alone, strict=False):
            q.grad = None if p.grad is None else p.grad.clone()
        new.grad = torch.zeros_like(new)
        optimizer.step()
        for one in each:
            one.step()
    gone = {"replace": (0,), "delete": (2, 3)}.get(change, ())
    for i, (p, q) in enumerate(zip(params, alone, strict=False)):
        if i not in gone:
            assert torch.equal(p, q), i
    assert torch.equal(new, torch.full_like(new, 3.0))


@pytest.mark.parametrize("optimizer", MATRIX)
def test_a_parameter_put_in_anothers_place_is_trained(optimizer: Any) -> None:
    old, new = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    held = optimizer([old], lr=0.1)
    held.param_groups[0]["params"][0] = new
    for step in range(3):
        new.grad = torch.randn(3, 3, generator=torch.Generator().manual_seed(step))
        held.step()
    assert not torch.equal(new.detach(), old.detach())


def parameters_come_to_ranks(_: int) -> list[Tensor]:
    params = parameters()
    muon = Muon(params[:2], lr=0.1, group=group())
    for step in range(6):
        if step == 2:
            muon.add_param_group({"params": params[2:3]})
        if step == 4:
            muon.param_groups[0]["params"][0] = params[3]
        give(params, step)
        muon.step()
    return values(params)


def test_parameters_come_and_go_also_where_ranks_share_them(tmp_path: Path) -> None:
    one, other = on_ranks(2, tmp_path, parameters_come_to_ranks)
    assert_same(one, other)
    assert not any(torch.equal(p, q) for p, q in zip(one[:4], parameters()[:4], strict=True))


# --- modes ----------------------------------------------------------------------------------------


def test_a_chain_passes_its_modes_on_to_the_wrappers_in_it() -> None:
    params, alone = parameters(), parameters()
    vectors, matrices = [params[4]], params[:4]
    chain = Chain([AdamW(vectors, lr=0.05), EMANesterov(Muon(matrices, lr=0.05), 0.5, 0.9)])
    muon = EMANesterov(Muon(alone[:4], lr=0.05), 0.5, 0.9)
    for step in range(5):
        take_step(chain, params, step)
        take_step(muon, alone, step)
    y = values(params)
    for there, here in ((chain.at_iterate(), muon.at_iterate()), (chain.at_position(2.0), muon.at_position(2.0))):
        with there, here:
            assert_same(values(matrices), values(alone[:4]))
            assert torch.equal(params[4], y[4])
        assert_same(values(params), y)
    chain.eval()
    muon.eval()
    assert_same(values(matrices), values(alone[:4]))
    chain.train()
    assert_same(values(params), y)
    chain.skip(3)
    assert chain.optimizers[1].steps == 8  # type: ignore[attr-defined]


@wrappers
def test_weights_written_in_eval_mode_are_never_thrown_away(row: str) -> None:
    params, optimizer = stepped(row, 5)
    theirs = [torch.full_like(p, 7.0) for p in params]
    optimizer.eval()
    set_values(params, theirs)
    with pytest.raises(RuntimeError, match=r"restart\(\)"):
        optimizer.train()
    assert_same(values(params), theirs)
    optimizer.restart()
    assert_same(iterate(optimizer, params), theirs)
    take_step(optimizer, params, 5)
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(values(params), theirs, strict=True))


@wrappers
def test_what_an_evaluation_raises_is_raised_and_y_comes_back(row: str) -> None:
    params, optimizer = stepped(row, 5)
    y = values(params)
    with pytest.raises(MemoryError), optimizer.at_iterate():
        raise MemoryError
    assert_same(values(params), y)


# --- everything else that people do ---------------------------------------------------------------


@some
def test_a_compiled_step_is_the_step(row: str) -> None:
    torch._dynamo.reset()
    params, optimizer = stepped(row, 0)
    plain, eager = stepped(row, 0)
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(8):
        give(params, step)
        give(plain, step)
        compiled()
        eager.step()
    assert_same(values(params), values(plain))


@pytest.mark.parametrize("row", [row for row in ROWS if row != "ema_nesterov of another's"])  # it cannot be copied
def test_copies_and_pickles_go_on_bit_for_bit(row: str) -> None:
    params = parameters()
    optimizer = ROWS[row](params)
    LambdaLR(optimizer, abs)  # patches step() on the instance
    optimizer.register_step_post_hook(lambda *_: None)  # which cannot be pickled; torch's leaves hooks behind
    for step in range(4):
        take_step(optimizer, params, step)
    held = {"params": params, "optimizer": optimizer}
    for twin in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        again = copy.deepcopy(held)
        goes_on_alike((twin["params"], twin["optimizer"]), (again["params"], again["optimizer"]), 4)
        twin["optimizer"].register_step_post_hook(lambda *_: None)


@rows
def test_a_cast_in_mid_run_is_refused_before_anything_moves(row: str) -> None:
    params, optimizer = stepped(row, 4)
    before = copy.deepcopy(optimizer.state_dict())
    for p in params:
        p.data, p.grad = p.data.double(), None
    x = values(params)
    give(params, 4)
    with pytest.raises(RuntimeError, match=r"was float32 on cpu in the last step, and is float64"):
        optimizer.step()
    assert_same(values(params), x)
    assert_same(optimizer.state_dict(), before)
    optimizer.load_state_dict(optimizer.state_dict())  # as the message says
    for step in range(4, 8):
        give(params, step)
        optimizer.step()
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(values(params), x, strict=True))


@rows
def test_subclasses_load_the_state_of_their_parent(row: str) -> None:
    """As Lightning's proxies are, whose class is made of the optimizer's."""
    params, optimizer = stepped(row, 4)
    again = parameters()
    set_values(again, values(params))
    proxy = copy.copy(ROWS[row](again))
    proxy.__class__ = type("Lightning" + type(optimizer).__name__, (type(optimizer),), {})
    proxy.load_state_dict(optimizer.state_dict())
    goes_on_alike((params, optimizer), (again, proxy), 4)


@rows
def test_every_entry_of_a_state_can_be_replaced(row: str) -> None:
    """As offloading and Lightning do."""
    params, optimizer = stepped(row, 4)
    other = stepped(row, 4)
    for p, entries in list(optimizer.state.items()):
        optimizer.state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in entries.items()}
    goes_on_alike((params, optimizer), other, 4)


HUGE = [1e9, 6e10, 1e15, 1e19, 3e19, 1e30, 3e38]


@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize("base", ["soap", *MATRIX_BASES])
def test_a_huge_gradient_leaves_no_nan_and_the_next_ordinary_one_moves(base: str, size: float) -> None:
    params = parameters()
    optimizer = build_base(base, params)
    matrix: Any = optimizer if base == "soap" else optimizer.optimizers[1]  # type: ignore[attr-defined]
    for step in range(8):
        give(params, step)
        if step == 4:
            for p in params:
                p.grad = (p.grad.sign() * size).clamp(-3e38, 3e38)
        before = values(params)
        matrix.step()
        assert all(p.isfinite().all() for p in params)
        assert all(t.isfinite().all() for s in matrix.state.values() for t in s.values() if isinstance(t, Tensor))
        if step > 4:
            assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True) if p in matrix.state)


# --- values ---------------------------------------------------------------------------------------

NAN = float("nan")


def matrix_() -> list[Tensor]:
    return [torch.ones(2, 2, requires_grad=True)]


def sgd() -> Optimizer:
    return SGD(matrix_(), lr=0.1)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Muon([{"params": matrix_(), "momentum": 1.5}], lr=0.1), "momentum must be in [0, 1), got 1.5"),
        (lambda: Muon([{"params": matrix_(), "lr": -1}], lr=0.1), "lr must be at least 0, got -1"),
        (lambda: Muon([{"params": matrix_(), "scale": "foo"}], lr=0.1), "scale must be one of ['max_dim', 'spectral']"),
        (lambda: Muon(matrix_(), lr=0.1, ns="x"), "ns must be one of ['polar12', 'quintic5'], got 'x'"),
        (lambda: Muon(matrix_(), lr=NAN), "lr must be at least 0, got nan"),
        (lambda: Muon(matrix_(), lr=0.1, weight_decay=NAN), "weight_decay must be at least 0, got nan"),
        (lambda: Muon(matrix_(), lr="0.1"), "lr must be at least 0, got '0.1'"),
        (lambda: NorMuon(matrix_(), lr=0.1, beta2=1.5), "beta2 must be in [0, 1), got 1.5"),
        (lambda: NorMuon([{"params": matrix_(), "beta2": -1}], lr=0.1), "beta2 must be in [0, 1), got -1"),
        (lambda: Aurora(matrix_(), lr=0.1, iterations=0), "iterations must be a whole number, at least 1, got 0"),
        (lambda: SOAP(matrix_(), lr=0.1, betas=(1.2, 0.9)), "betas must be two numbers in [0, 1), got (1.2, 0.9)"),
        (lambda: SOAP(matrix_(), lr=0.1, precondition_frequency=0), "precondition_frequency must be a whole number"),
        (lambda: Record30(matrix_(), lr=0.1, soap_blend=2), "soap_blend must be in [0, 1], got 2"),
        (lambda: Record30(matrix_(), lr=0.1, brake=NAN), "brake must be a number, got nan"),
        (lambda: EMANesterov(sgd(), NAN, 0.9), "alpha must be a number above -9, got nan"),
        (lambda: EMANesterov(sgd(), -9.5, 0.9), "alpha must be a number above -9, got -9.5"),
        (lambda: EMANesterov(sgd(), 0.5, NAN), "ema_decay must be in [0, 1), got nan"),
        (lambda: Nesterov(sgd(), -1.0), "alpha must be a number above -1, got -1.0"),
        (lambda: NALA(sgd(), 0.5, 0), "k must be a whole number, at least 1, got 0"),
        (lambda: Lookahead(sgd(), -0.1, 2), "alpha must be at least 0, got -0.1"),
        (lambda: Lookahead(sgd(), 0.5, True), "k must be a whole number, at least 1, got True"),
        (lambda: Lookahead(sgd(), 0.5, 2, inner_state="forget"), "inner_state must be one of"),
        (lambda: SNOO(sgd(), 0.5, 0.5, 2.5), "k must be a whole number, at least 1, got 2.5"),
        (lambda: SNOO(sgd(), NAN, 0.5, 2), "lr must be a number, got nan"),
        (lambda: SNOO(sgd(), 0.5, 1.0, 2), "momentum must be in [0, 1), got 1.0"),
        (lambda: GPA(sgd(), NAN, 0.5), "mu_x must be in [0, 1), got nan"),
        (lambda: GPA(sgd(), 0.5, 0.0), "mu_y must be above 0 and at most 1, got 0.0"),
        (lambda: EMANesterov("adamw", 0.5, 0.9), "base must be a torch.optim.Optimizer, got str"),
    ],
)
def test_values_out_of_range_are_refused_in_constructors_and_groups(make: Callable[[], Any], line: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    assert line in str(error.value)


@pytest.mark.parametrize("alpha", [NAN, float("inf"), -20.0])
def test_an_alpha_that_its_schedule_spoils_is_refused_before_anything_moves(alpha: float) -> None:
    params = parameters()
    optimizer = EMANesterov(SGD(params, lr=0.1), lambda step: 0.5 if step < 4 else alpha, 0.9)
    for step in range(3):
        take_step(optimizer, params, step)
    before, state = values(params), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="alpha must be a number above -9"):
        take_step(optimizer, params, 3)
    assert_same(values(params), before)
    assert_same(optimizer.state_dict(), state)


def zero_redundancy(inner_state: str) -> Callable[[int], str]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def work(_: int) -> str:
        params = [p.detach().clone().requires_grad_() for p in parameters()]
        base = ZeroRedundancyOptimizer(params, AdamW, lr=0.1)
        try:
            Lookahead(base, 0.5, 2, inner_state=inner_state)
        except ValueError as e:
            return str(e)
        return "taken"

    return work


def test_a_base_that_hides_its_state_is_refused_where_its_state_is_needed(tmp_path: Path) -> None:
    for inner_state in ("reset", "interpolate"):
        (tmp_path / inner_state).mkdir()
        (said,) = on_ranks(1, tmp_path / inner_state, zero_redundancy(inner_state))
        assert said.startswith("ZeroRedundancyOptimizer hides the state of the optimizer in it")
    assert on_ranks(1, tmp_path, zero_redundancy("maintain")) == ["taken"]

    class Hidden(Optimizer):
        def __init__(self, params: list[Tensor]):
            super().__init__(params, {"lr": 0.1})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            with torch.no_grad():
                for group in self.param_groups:
                    torch._foreach_add_(group["params"], [p.grad for p in group["params"]], alpha=-group["lr"])

    params = parameters()
    optimizer = Lookahead(Hidden(params), 0.5, 2, inner_state="reset")
    take_step(optimizer, params, 0)
    with pytest.raises(ValueError, match="Hidden keeps no state that Lookahead can reach"):
        take_step(optimizer, params, 1)


# --- sharded parameters ---------------------------------------------------------------------------


def fsdp(wrapper: str, folder: Path) -> Callable[[int], tuple[list[Tensor], list[Tensor]]]:
    """FSDP2 against DDP on the same data; then saved and restored. The full weights of both, and after more steps."""

    def work(rank: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        from torch.distributed.fsdp import fully_shard

        def build() -> nn.Module:
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))

        def train(model: nn.Module, optimizer: Optimizer, steps: range, average: bool) -> None:
            for step in steps:
                data = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
                optimizer.zero_grad()
                (model(data) - data).square().mean().backward()
                if average:
                    for p in model.parameters():
                        dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
                        p.grad /= dist.get_world_size()
                optimizer.step()

        def full(model: nn.Module) -> list[Tensor]:
            with torch.no_grad():
                return [p.full_tensor().clone() if hasattr(p, "full_tensor") else p.clone() for p in model.parameters()]

        sharded, plain = build(), build()
        fully_shard(sharded)
        one = WRAPPERS[wrapper](AdamW(sharded.parameters(), lr=0.05))
        other = WRAPPERS[wrapper](AdamW(plain.parameters(), lr=0.05))
        train(sharded, one, range(6), False)
        train(plain, other, range(6), True)
        with one.at_iterate(), other.at_iterate():
            for p, q in zip(full(sharded), full(plain), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        one.zero_grad()
        weights, state = get_state_dict(sharded, one)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / wrapper)
        again = build()
        fully_shard(again)
        loaded = WRAPPERS[wrapper](AdamW(again.parameters(), lr=0.05))
        weights, state = get_state_dict(again, loaded)
        held = {"model": weights, "optimizer": state}
        dcp.load(held, checkpoint_id=folder / wrapper)
        set_state_dict(again, loaded, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
        train(sharded, one, range(6, 9), False)
        train(again, loaded, range(6, 9), False)
        assert_same(full(sharded), full(again))
        with one.at_iterate():
            return full(sharded), full(again)

    return work


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_take_fsdps_parameters(wrapper: str, tmp_path: Path) -> None:
    """As DDP to rounding, restored bit for bit, and what two ranks have saved one loads."""
    (ranks, _) = on_ranks(2, tmp_path, fsdp(wrapper, tmp_path))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    optimizer = WRAPPERS[wrapper](AdamW(model.parameters(), lr=0.05))
    weights, state = get_state_dict(model, optimizer)
    held = {"model": weights, "optimizer": state}
    dcp.load(held, checkpoint_id=tmp_path / wrapper)
    set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    for step in range(6, 9):
        optimizer.zero_grad()
        for rank in range(2):
            data = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
            ((model(data) - data).square().mean() / 2).backward()
        optimizer.step()
    with optimizer.at_iterate():
        for p, q in zip(values(list(model.parameters())), ranks[0], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# --- every wrapper around every base -----------------------------------------------------------------


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
        for ours, theirs in zip(by_hand.param_groups, optimizer.param_groups, strict=True):
            ours["lr"] = theirs["lr"]
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
