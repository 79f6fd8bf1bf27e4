from __future__ import annotations

import io
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_nesterov.errors import ConfigError
from ema_nesterov.models import build_model
from ema_nesterov.models.common import own
from ema_nesterov.optim import SOAP, AdamW, Aurora, Chain, Muon, NorMuon
from ema_nesterov.optim.build import _require_cover, build_optimizer, parameter_roles
from ema_nesterov.optim.newton_schulz import newton_schulz
from tests.conftest import composed
from tests.trajectories import Trajectory

VARIANTS: dict[str, dict[str, Any]] = {
    "nanogpt": dict(scale="max_dim", split_qkv=True),
    "llama": dict(scale="spectral"),
    "track3": dict(scale="spectral", ns="polar12"),
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_muon_matches_the_authors_trajectories(variant: str) -> None:
    t = Trajectory(f"base_muon_{variant}", torch.float32)
    params, m = t.parameters(), t.meta
    muon = Muon(
        params,
        lr=m["lr"],
        momentum=m["momentum"],
        weight_decay=m.get("weight_decay", 0.0),
        ns_dtype=torch.float32,
        **VARIANTS[variant],
    )
    assert max(t.error(params, muon, nullcontext)) < 1e-5


def test_normuon_matches_the_authors_trajectory() -> None:
    t = Trajectory("base_normuon_nanogpt", torch.float32)
    params, m = t.parameters(), t.meta
    options: dict[str, Any] = dict(lr=m["lr"], momentum=m["momentum"], beta2=m["beta2"], ns_dtype=torch.float32)
    normuon = NorMuon(params, scale="max_dim", split_qkv=True, **options)
    assert max(t.error(params, normuon, nullcontext)) < 1e-5


def test_aurora_matches_the_authors_trajectory() -> None:
    t = Trajectory("base_aurora", torch.float32)
    params, m = t.parameters(), t.meta
    keys = ("lr", "momentum", "weight_decay", "iterations", "exponent")
    aurora = Aurora(params, **{key: m[key] for key in keys}, ns_dtype=torch.float32)
    assert max(t.error(params, aurora, nullcontext)) < 1e-5


def test_aurora_evens_out_the_rows_and_leaves_square_matrices_to_muon() -> None:
    tall, square = random_matrices([(24, 8), (8, 8)])
    with torch.no_grad():
        tall[:4] *= 0.01  # rows that a polar factor nearly drops
    aurora = Aurora([tall, square], lr=1.0, iterations=12)
    group = aurora.param_groups[0]
    rows = aurora._orthogonalize(tall.detach()[None], group)[0].norm(dim=-1)
    torch.testing.assert_close(rows, torch.full((24,), (8 / 24) ** 0.5), atol=0.02, rtol=0)
    expected = newton_schulz(square.detach()[None], "polar12")
    assert torch.equal(aurora._orthogonalize(square.detach()[None], group), expected)


def test_normuon_keeps_the_size_of_muons_step_and_evens_its_rows() -> None:
    ours, theirs = random_matrices([(12, 20)]), random_matrices([(12, 20)])
    start = ours[0].detach().clone()
    for params, make in ((ours, NorMuon), (theirs, Muon)):
        give_gradients(params, 0)
        with torch.no_grad():
            params[0].grad[0] *= 100
        make(params, lr=0.1).step()
    a, b = ours[0].detach() - start, theirs[0].detach() - start
    assert a.norm().item() == pytest.approx(b.norm().item(), rel=1e-5)
    assert a.norm(dim=1).std() < 1e-5 < b.norm(dim=1).std()


def test_soap_matches_the_authors_trajectory_where_its_basis_is_unique() -> None:
    """The square matrices: elsewhere the first eigenbasis has a null space, in which rounding decides."""
    t = Trajectory("base_soap", torch.float32)
    params, m = t.parameters(), t.meta
    soap = SOAP(params, m["lr"], m["betas"], m["precondition_frequency"], split_qkv=True)
    assert max(t.error(params, soap, nullcontext)[1:3]) < 1e-5


def test_soap_is_adam_where_nothing_is_preconditioned() -> None:
    """For vectors, and for sides beyond max_dim; SOAP's first call does not move, and does not count."""
    ours, theirs = random_matrices([(6, 4)]), random_matrices([(6, 4)])
    ours.append(torch.ones(5, requires_grad=True))
    theirs.append(torch.ones(5, requires_grad=True))
    soap = SOAP(ours, lr=0.1, betas=(0.9, 0.95), max_dim=3, weight_decay=0.0)
    adam = AdamW(theirs, lr=0.1, betas=(0.9, 0.95), eps=0.0, weight_decay=0.0)
    give_gradients(ours, 0)
    soap.step()
    for step in range(1, 6):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        soap.step()
        adam.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_soap_works_on_a_batch_as_on_each_matrix_alone() -> None:
    together, apart = (random_matrices([(8, 8), (24, 8), (8, 8)]) for _ in range(2))
    options: dict[str, Any] = dict(lr=0.1, precondition_frequency=2, split_qkv=True)
    optimizers = [SOAP(together, **options), *(SOAP([p], **options) for p in apart)]
    for step in range(6):
        give_gradients(together, step)
        give_gradients(apart, step)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)


def test_soap_waits_for_parameters_that_join_late() -> None:
    early, late = random_matrices([(8, 8), (8, 8)])
    soap = SOAP([early, late], lr=0.1, precondition_frequency=2)
    for step in range(3):
        give_gradients([early], step)
        soap.step()
    for step in range(3, 6):
        give_gradients([early, late], step)
        soap.step()
    assert (soap.state[early]["step"], soap.state[late]["step"]) == (5, 2)


@pytest.mark.parametrize("make", [Muon, NorMuon, Aurora, SOAP])
def test_saved_and_loaded_goes_on_bit_for_bit(make: Any) -> None:
    def build() -> tuple[list[Tensor], Any]:
        params = random_matrices([(8, 8), (24, 8), (6, 10)])
        return params, make(params, lr=0.1)

    straight, optimizer = build()
    first, saved = build()
    for step in range(6):
        give_gradients(straight, step)
        optimizer.step()
    for step in range(3):
        give_gradients(first, step)
        saved.step()
    second, loaded = build()
    with torch.no_grad():
        for p, q in zip(second, first, strict=True):
            p.copy_(q)
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        give_gradients(second, step)
        loaded.step()
    assert all(torch.equal(p, q) for p, q in zip(second, straight, strict=True))


@pytest.mark.parametrize("name", ["adam", "aux_adam_llama"])
def test_adamw_matches_the_authors_trajectories(name: str) -> None:
    t = Trajectory(f"base_{name}", torch.float32)
    params, m = t.parameters(), t.meta
    adam = AdamW(params, lr=m["lr"], betas=m["betas"], eps=m.get("eps", 1e-8), weight_decay=0.0, fused=True)
    assert max(t.error(params, adam, nullcontext)) < 1e-5


def random_matrices(shapes: list[tuple[int, int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def give_gradients(params: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def test_muon_agrees_with_torchs_own() -> None:
    """torch's Muon runs Newton-Schulz in bfloat16, hence the tolerance; its default scale is sqrt(max(1, m/n))."""
    ours, theirs = (random_matrices([(16, 24), (24, 16), (16, 16)]) for _ in range(2))
    a = Muon(ours, lr=0.02, weight_decay=0.1, ns_dtype=torch.bfloat16)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)


def test_a_batch_of_matrices_is_each_matrix_alone() -> None:
    together, apart = (random_matrices([(8, 8), (24, 8), (8, 8), (6, 10)]) for _ in range(2))
    optimizers = [Muon(together, lr=0.1, split_qkv=True), *(Muon([p], lr=0.1, split_qkv=True) for p in apart)]
    for step in range(3):
        give_gradients(together, step)
        give_gradients(apart, step)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_fused_qkv_is_three_matrices() -> None:
    (fused,) = random_matrices([(24, 8)])
    parts = [part.detach().clone().requires_grad_() for part in fused.split(8)]
    give_gradients([fused], 0)
    for part, gradient in zip(parts, fused.grad.split(8), strict=True):
        part.grad = gradient.clone()
    Muon([fused], lr=0.1, split_qkv=True, scale="max_dim").step()
    Muon(parts, lr=0.1, scale="max_dim").step()
    torch.testing.assert_close(fused, torch.cat(parts))


@pytest.mark.parametrize("shape", [(12, 12), (12, 20), (20, 12)])
def test_twelve_steps_reach_the_polar_factor(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(newton_schulz(matrix, "polar12"), u @ vh, atol=1e-3, rtol=0)
    singular = torch.linalg.svdvals(newton_schulz(matrix, "quintic5"))
    assert 0.3 < singular.min() < singular.max() < 1.3


def test_muon_leaves_gradients_and_parameters_without_one_alone() -> None:
    used, unused = random_matrices([(8, 8), (8, 8)])
    before = unused.detach().clone()
    give_gradients([used], 0)
    gradient = used.grad.clone()
    Muon([used, unused], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(used.grad, gradient)
    assert torch.equal(unused, before)


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="2-D"):
        Muon([torch.zeros(3, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match="scale"):
        Muon(random_matrices([(2, 2)]), lr=0.1, scale="spectrum")


def test_chain_refuses_a_parameter_twice() -> None:
    (p,) = random_matrices([(4, 4)])
    with pytest.raises(ValueError, match="more than one parameter group"):
        Chain([Muon([p], lr=0.1), AdamW([p], lr=0.1)])


def test_every_parameter_is_covered_exactly_once() -> None:
    bases = [composed(f"optimizer={o}").optimizer for o in ("adamw", "muon", "normuon", "aurora", "soap", "record30")]
    for name in ("tiny", "nanogpt_124m", "nanogpt_162m", "llama_60m"):
        cfg = composed(f"model={name}", "probe_every=1")
        with torch.device("meta"):
            model = build_model(cfg.model)
        for cfg.optimizer in bases:
            base = build_optimizer(model, cfg)
            held = [id(p) for group in base.param_groups for p in group["params"]]
            assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_a_forgotten_parameter_fails_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"parameter 1.weight is in 0 optimizer groups"):
        _require_cover(model, AdamW(model[0].parameters(), lr=0.1))


def test_a_matrix_with_as_many_rows_as_the_vocabulary_is_no_head() -> None:
    for name in ("tiny", "llama_60m"):
        mlp = "model.width=1024" if name == "tiny" else "model.mlp_width=4096"
        with torch.device("meta"):
            model = build_model(composed(f"model={name}", "model.vocab_size=4096", mlp).model)
        roles = parameter_roles(model)
        assert len(roles["head"]) == (name != "tiny")
        assert len(roles["matrix"]) == (4 * 4 if name == "tiny" else 8 * 7)


def test_roles_follow_the_papers_split() -> None:
    expected = {
        "nanogpt_124m": {"embedding": 38_597_376, "head": 0, "matrix": 84_934_656, "vector": 0},
        "nanogpt_162m": {"embedding": 38_633_472, "head": 38_633_472, "matrix": 84_934_656, "vector": 153_216},
        "llama_60m": {"embedding": 16_384_000, "head": 16_384_000, "matrix": 25_296_896, "vector": 8_704},
    }
    for name, sizes in expected.items():
        with torch.device("meta"):
            model = build_model(composed(f"model={name}").model)
        roles = parameter_roles(model)
        assert {role: sum(own(p).numel() for p in params) for role, params in roles.items()} == sizes
