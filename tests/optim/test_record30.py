"""The batched stack against the algorithm written out for one matrix, with numpy's own linear algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ema_nesterov.models import build_model
from ema_nesterov.optim import Record30
from ema_nesterov.optim.build import build_optimizer
from tests.conftest import composed

SHAPES = {"tall": (12, 6), "wide": (6, 12), "square": (6, 6), "another": (6, 6)}


def s4(x: np.ndarray) -> float:
    return float((np.linalg.svd(x, compute_uv=False) ** 4).sum() ** 0.25)


def polar(x: np.ndarray) -> np.ndarray:
    x = x / s4(x)
    for _ in range(12):
        x = 2 * x - 1.5 * x @ x.T @ x + 0.5 * x @ x.T @ x @ x.T @ x
    return x


def even_polar(x: np.ndarray) -> np.ndarray:
    t = x.T
    d = 1 / np.linalg.norm(t, axis=1, keepdims=True)
    for k in range(3):
        p = polar((d * t).T).T
        if k < 2:
            d = d * (t.shape[1] / t.shape[0] / (p**2).sum(1, keepdims=True)) ** 0.25
    return p.T


class Literal:
    """One matrix, in float64."""

    def __init__(self, w: Tensor, lr: float, blend: float, floor: float):
        self.w, self.lr, self.blend, self.floor = w.detach().double().numpy().copy(), lr, blend, floor
        self.m = np.zeros_like(self.w)
        self.v = np.zeros_like(self.w)
        self.left, self.right = (np.zeros((n, n)) for n in self.w.shape)
        self.q: tuple[np.ndarray, np.ndarray] | None = None

    def soap(self, u: np.ndarray) -> np.ndarray:
        assert self.q is not None
        a, b = self.q
        p = a.T @ u @ b
        self.v = 0.9 * self.v + 0.1 * p**2
        d = np.sqrt(self.v)
        d = np.maximum(d, self.floor * np.sqrt((d**2).mean()))
        x = self.blend * a @ (p / d) @ b.T + (1 - self.blend) * u
        return x * s4(u) / s4(x)

    def step(self, g: np.ndarray, t: int, mu: float) -> None:
        self.m = mu * self.m + (1 - mu) * g
        u = (1 - mu) * g + mu * self.m
        if self.blend and t:
            u = self.soap(u)
        rows, columns = u.shape
        o = even_polar(u) if rows < columns else polar(u)
        contra = o - 0.2 * max(0, 1 - t / 8) * u / s4(u)
        o = contra * s4(o) / s4(contra) * max(1, rows / columns) ** 0.5
        w, size = self.w, np.linalg.norm
        radial = (o * w).sum() / size(w) ** 2 * w
        if (o * w).sum() < 0:
            o = o - radial / 2
        o = o * max(1, 0.3825 * size(w) / size(o))
        radius = size(w) - self.lr * (o * w).sum() / size(w)
        moved = w - self.lr * o
        self.w = moved * radius / size(moved)
        if self.blend:
            self.left = 0.9 * self.left + 0.1 * g @ g.T
            self.right = 0.9 * self.right + 0.1 * g.T @ g
            if t == 0:
                self.q = tuple(np.linalg.eigh(c)[1][:, ::-1] for c in (self.left, self.right))
            elif t % 2 == 0:
                self.turn()

    def turn(self) -> None:
        assert self.q is not None
        turned = []
        for axis, (c, q) in enumerate(zip((self.left, self.right), self.q, strict=True)):
            order = np.argsort(-np.diag(q.T @ c @ q))
            self.v = np.take(self.v, order, axis)
            turned.append(np.linalg.qr(c @ q[:, order])[0])
        self.q = (turned[0], turned[1])


@pytest.mark.parametrize(("blend", "floor"), [(0.0, 0.0), (1.0, 0.0), (0.95, 0.55)])
def test_the_stack_is_the_algorithm_written_out(blend: float, floor: float) -> None:
    """With SOAP only the square matrices: elsewhere the first basis has a null space, in which rounding decides."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for name, shape in SHAPES.items() if not blend or name in ("square", "another")]
    params = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    literal = [Literal(p, 0.05, blend, floor) for p in params]
    stack = Record30(
        params,
        0.05,
        soap_blend=blend,
        soap_floor=floor,
        contra_steps=8,
        precondition_frequency=2,
        ns_dtype=torch.float64,
    )
    for t in range(10):
        mu = stack.param_groups[0]["momentum"] = 0.85 + 0.01 * t
        for p, one in zip(params, literal, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) + 0.5 * p.detach()
            one.step(p.grad.numpy(), t, mu)
        stack.step()
        for p, one in zip(params, literal, strict=True):
            torch.testing.assert_close(p.detach(), torch.from_numpy(one.w), rtol=1e-5, atol=1e-5)


def test_outward_moves_are_braked_and_small_ones_enlarged() -> None:
    w = torch.eye(4).mul(10).requires_grad_()
    w.grad = -torch.eye(4)  # descent moves outward, along W itself
    Record30([w], lr=0.1).step()
    floor = 0.3825 * 20 / 2  # the update is at least 0.3825 ||W||
    torch.testing.assert_close(w.detach(), torch.eye(4) * (10 + 0.1 * floor), rtol=1e-4, atol=1e-4)


def test_a_zero_matrix_starts_to_move() -> None:
    """As output projections do, which start at 0: the guards of the record keep the first step tiny."""
    w = torch.zeros(4, 4).requires_grad_()
    stack = Record30([w], lr=0.1)
    sizes = []
    for step in range(3):
        w.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(7)) * (step + 1)
        stack.step()
        sizes.append(float(w.detach().norm()))
    assert 0 < sizes[0] < 1e-7 < sizes[1] < sizes[2]


def test_soap_takes_the_mlp_and_the_value_projections() -> None:
    expected = {"nanogpt_162m": [36, 24, 12], "llama_60m": [24, 24, 8], "nanogpt_124m": [24, 24]}
    for name, counts in expected.items():
        cfg = composed(f"model={name}", "optimizer=record30", "lookahead=none", "dataset.vocab_size=9")
        with torch.device("meta"):
            model = build_model(cfg.model)
        groups = [g for g in build_optimizer(model, cfg).param_groups if g.get("role") == "matrix"]
        assert [len(g["params"]) for g in groups] == counts
        assert [g["soap_blend"] for g in groups] == [0.0, 1.0, 0.95][: len(counts)]


def test_the_records_initialisation() -> None:
    cfg = composed(
        "model=nanogpt_162m_record30", "model.layers=3", "model.width=64", "model.head_dim=16", "dataset.vocab_size=9"
    )
    torch.manual_seed(0)
    model = build_model(cfg.model)
    named = dict(model.named_parameters())
    assert all((not p.any()) == ("proj" in name) for name, p in named.items())
    bound = 64**-0.5
    for i, scale in enumerate((1.0, 0.85, 0.7)):
        assert float(named[f"blocks.{i}.mlp.fc.weight"].detach().abs().max()) == pytest.approx(scale * bound, rel=1e-2)
        one, two = named[f"blocks.{i}.norm1.gains"], named[f"blocks.{i}.norm2.gains"]
        assert set(one.detach().mul(100).round().int().tolist()) == {86, 114}
        torch.testing.assert_close(one + two, torch.full_like(one, 2.0))
    assert torch.equal(named["norm1.gains"], torch.ones(64))
