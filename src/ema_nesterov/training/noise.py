"""How noisy the gradient is: the batch size at which its noise is as large as itself.

    B_noise = tr Sigma / |G|^2 tokens    (McCandlish et al. 2018, An Empirical Model of Large-Batch Training, eq. 2.8)

G is the gradient of the expected loss and Sigma / B the covariance of that of B tokens. From the gradients g_i of n
micro-batches of b tokens and their mean g, without bias (their appendix A.1):

    tr Sigma = b sum_i |g_i - g|^2 / (n - 1) = b (sum_i |g_i|^2 - n |g|^2) / (n - 1)
    |G|^2    = |g|^2 - tr Sigma / (n b)
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..data.loader import MicroBatch
from .distributed import Ranks


def gradient_noise(
    model: nn.Module, batches: Iterable[MicroBatch], ranks: Ranks, precision: AbstractContextManager
) -> dict[str, float]:
    """`noise/trace` (tr Sigma of a token), `noise/gradient` (|G|^2) and their ratio `noise/scale` in tokens, over all
    ranks' batches, all of one size, at the weights that the model holds. No scale where |G|^2 is not above 0: too few
    tokens to tell. Nothing where there are fewer than two batches. Leaves every `.grad` as it is.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    squares, count, tokens = torch.zeros((), dtype=torch.float64, device=ranks.device), 0, 0
    for inputs, targets in batches:
        if count and inputs.numel() != tokens:  # a last one that is short
            continue
        inputs, targets = inputs.to(ranks.device), targets.to(ranks.device)
        with precision:
            loss = model(inputs, targets)
        gradients = torch.autograd.grad(loss, parameters)
        torch._foreach_add_(total, gradients)
        squares += square(gradients)
        count, tokens = count + 1, inputs.numel()
    n = int(ranks.sum(torch.tensor(float(count), device=ranks.device)).item())
    if n < 2:
        return {}
    mean = [ranks.sum(t) / n for t in total]
    mean_square, squares_sum = square(mean).item(), ranks.sum(squares).item()
    trace = tokens * (squares_sum - n * mean_square) / (n - 1)
    gradient = mean_square - trace / (n * tokens)
    values = {"noise/trace": trace, "noise/gradient": gradient}
    return {**values, "noise/scale": trace / gradient} if gradient > 0 else values


def square(tensors: Iterable[Tensor]) -> Tensor:
    """The square of their common norm, a float64 scalar."""
    return torch.stack(torch._foreach_norm(list(tensors))).double().square().sum()
