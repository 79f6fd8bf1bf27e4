"""Step for step, the same trajectories as public implementations, set up to be the same algorithm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import pytest
import pytorch_optimizer as peers
import torch
from pytorch_optimizer.optimizer.muon import base as peer_muon
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ema_nesterov.lookahead import GPA, SNOO, EMANesterov, Lookahead, Nesterov
from ema_nesterov.optim import SOAP, Muon, NorMuon

Make = Callable[[list[Tensor]], Any]
STEPS = 30
SHAPES: list[tuple[int, ...]] = [(6, 6), (9, 5), (4, 8), (7,)]
BASES: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "sgd": lambda ps: SGD(ps, lr=0.1, momentum=0.9),
    "adamw": lambda ps: AdamW(ps, lr=0.02, betas=(0.8, 0.95), weight_decay=0.1),
}


def parameters(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def assert_same_path(
    our: Make, their: Make, shapes: Any = SHAPES, tolerance: float = 1e-12, size: float = 1.0, before: Any = None
) -> None:
    """What our and their make of parameters takes the same steps on a noisy quadratic; before: called ahead of each."""
    ours, theirs = parameters(shapes), parameters(shapes)
    a, b = our(ours), their(theirs)

    def assert_close() -> None:
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=tolerance)

    for step in range(STEPS):
        if before is not None:
            before(step, a, b)
        generator = torch.Generator().manual_seed(step)
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            noise = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad, q.grad = (size * ((i + 1) * r.detach() + noise) for r in (p, q))
        a.step()
        b.step()
        assert_close()
        if isinstance(a, GPA):  # the averages too
            for optimizer in (a, b):
                optimizer.eval()
            assert_close()
            a.train()
    assert all((p - q).abs().max() > 0.1 for p, q in zip(ours, parameters(shapes), strict=True))  # all of them moved


@pytest.mark.parametrize(
    ("frequency", "betas", "decay"), [(1, (0.95, 0.95), 0.0), (3, (0.8, 0.99), 0.1), (10, (0.95, 0.9), 0.1)]
)
@pytest.mark.parametrize(("shapes", "max_dim"), [([(8, 8), (5, 5), (12, 12), (7,)], 10_000), ([(9, 5), (4, 8)], 5)])
def test_soap(shapes: Any, max_dim: int, frequency: int, betas: tuple[float, float], decay: float) -> None:
    """Square matrices, or the shorter side alone turned: G G^T of a tall G has a null space, and any basis of it would
    do. Theirs rounds each QR to float32, hence the tolerance."""
    options: dict[str, Any] = dict(lr=0.03, betas=betas, precondition_frequency=frequency, weight_decay=decay)
    peer = partial(peers.SOAP, max_precondition_dim=max_dim, **options)
    assert_same_path(partial(SOAP, max_dim=max_dim, **options), peer, shapes, tolerance=1e-5)


@pytest.mark.parametrize(("momentum", "decay", "scale"), [(0.95, 0.0, "spectral"), (0.8, 0.1, "max_dim")])
@pytest.mark.parametrize(
    ("make", "our", "their"),
    [
        (Muon, {}, {}),
        (Muon, dict(ns="polar12"), dict(ns_steps=12, ns_coeffs=(2.0, -1.5, 0.5))),
        (NorMuon, {}, {}),
        (NorMuon, dict(beta2=0.8), dict(beta2=0.8)),
    ],
)
def test_muon_and_normuon(
    make: Any, our: Any, their: Any, momentum: float, decay: float, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs orthogonalizes in bfloat16 with no option for it: the function that it calls is given float64. First they
    divide by max(norm, 1e-7), we by norm + 1e-7: the same for large gradients. Their "max_dim" has a factor of 0.2."""
    exact = partial(peer_muon.zero_power_via_newton_schulz_5, dtype=torch.float64)
    monkeypatch.setattr(peer_muon, "zero_power_via_newton_schulz_5", exact)
    factor = 0.2 if scale == "max_dim" else 1.0
    our = dict(lr=0.1 * factor, momentum=momentum, weight_decay=decay / factor, scale=scale, **our)
    their = dict(lr=0.1, momentum=momentum, weight_decay=decay, use_adjusted_lr=scale == "max_dim", **their)
    assert_same_path(
        partial(make, ns_dtype=torch.float64, **our),
        lambda ps: getattr(peers, make.__name__)([dict(params=ps, use_muon=True)], **their),
        [(8, 8), (24, 8), (6, 10), (8, 8)],
        tolerance=1e-8,
        size=1e6,
    )


@pytest.mark.parametrize(("k", "alpha"), [(1, 0.5), (5, 0.5), (4, 0.8)])
@pytest.mark.parametrize(
    ("base", "inner_state", "theirs"),
    [  # of the moments, theirs resets and interpolates SGD's alone
        *(("sgd", "maintain", "none"), ("adamw", "maintain", "none")),
        *(("sgd", "reset", "reset"), ("sgd", "interpolate", "pullback")),
    ],
)
def test_lookahead(base: str, inner_state: str, theirs: str, k: int, alpha: float) -> None:
    """Both sync after exactly k steps, and interpolate the moments with 0 at the first sync."""
    assert_same_path(
        lambda ps: Lookahead(BASES[base](ps), alpha, k, inner_state=inner_state),
        lambda ps: peers.Lookahead(BASES[base](ps), k=k, alpha=alpha, pullback_momentum=theirs),
    )


@pytest.mark.parametrize(("mu_x", "mu_y"), [(0.5, 0.6), (0.95, 0.9), (None, 0.9)])
@pytest.mark.parametrize("fused", [False, True])
def test_gpa_is_schedule_free_with_a_constant_average(mu_x: float | None, mu_y: float, fused: bool) -> None:
    """Theirs averages by weight 1 / weight_sum, which is held such that it is 1 - mu_x. None leaves it alone (1 / t:
    schedule-free itself) and moves our mu_x. Their wrapper decays z, we y as their fused AdamW does."""

    def hold(step: int, gpa: Any, peer: Any) -> None:
        peer.train()
        if mu_x is None:
            gpa.mu_x = 1 - 1 / (step + 1)
        else:
            peer.param_groups[0]["weight_sum"] = mu_x / (1 - mu_x)  # before this step's own 1

    def peer(ps: list[Tensor]) -> Any:
        if fused:
            return peers.ScheduleFreeAdamW(ps, lr=0.05, betas=(mu_y, 0.95), weight_decay=0.1, weight_lr_power=0)
        return peers.ScheduleFreeWrapper(Adam(ps, lr=0.05, betas=(0.5, 0.95)), momentum=mu_y, weight_lr_power=0)

    betas, decay = ((0.0, 0.95), 0.1) if fused else ((0.5, 0.95), 0.0)
    base = partial(AdamW, lr=0.05, betas=betas, weight_decay=decay)
    assert_same_path(lambda ps: GPA(base(ps), mu_x or 0.0, mu_y), peer, before=hold)


@pytest.mark.parametrize(("alpha", "ema_decay"), [(0.5, 0.9), (0.8, 0.99), (0.9, 0.5)])
def test_ema_nesterov_is_schedule_free_with_a_constant_average(alpha: float, ema_decay: float) -> None:
    """Where gradients are taken: mu_y = alpha, 1 - mu_x = (1 - ema_decay) (1 - mu_y), and updates times 1 - mu_y."""

    def hold(step: int, ema: Any, peer: Any) -> None:
        peer.train()
        peer.param_groups[0]["weight_sum"] = 1 / ((1 - ema_decay) * (1 - alpha)) - 1

    assert_same_path(
        lambda ps: EMANesterov(Adam(ps, lr=0.1 * (1 - alpha)), alpha, ema_decay),
        lambda ps: peers.ScheduleFreeWrapper(Adam(ps, lr=0.1), momentum=alpha, weight_lr_power=0),
        before=hold,
    )


@pytest.mark.parametrize("alpha", [0.5, 0.95])
def test_nesterov_around_sgd_is_torchs_nesterov(alpha: float) -> None:
    """torch keeps the lookahead point in the parameters, as the wrapper does while training."""
    torchs = partial(SGD, lr=0.05, momentum=alpha, nesterov=True)
    assert_same_path(lambda ps: Nesterov(SGD(ps, lr=0.05), alpha), torchs)


@pytest.mark.parametrize(("lr", "momentum", "k"), [(0.7, 0.9, 5), (1.0, 0.5, 1), (0.5, 0.3, 4)])
@pytest.mark.parametrize("base", sorted(BASES))
def test_snoo_is_torchs_nesterov_on_the_displacement_of_k_steps(base: str, lr: float, momentum: float, k: int) -> None:
    """No package has SNOO; its outer step is torch's SGD with slow - fast for a gradient."""

    def peer(fast: list[Tensor]) -> Any:
        slow, inner, steps = parameters(SHAPES), BASES[base](fast), count(1)
        outer = SGD(slow, lr=lr, momentum=momentum, nesterov=True)

        def sync(*_: Any) -> None:
            if next(steps) % k:
                return
            for s, f in zip(slow, fast, strict=True):
                s.grad = s.detach() - f.detach()
            outer.step()
            torch._foreach_copy_([f.detach() for f in fast], [s.detach() for s in slow])

        inner.register_step_post_hook(sync)
        return inner

    assert_same_path(lambda ps: SNOO(BASES[base](ps), lr, momentum, k), peer)
