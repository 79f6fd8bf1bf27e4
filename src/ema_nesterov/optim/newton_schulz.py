"""Newton-Schulz iteration: the nearest (semi-)orthogonal matrix of a batch of matrices.

For X = U S V^T with singular values at most 1, the odd polynomial

    X <- a X + b (X X^T) X + c (X X^T)^2 X

acts on the singular values alone, s <- a s + b s^3 + c s^5, and drives them towards 1.

`quintic5` takes 5 steps of (3.4445, -4.7750, 2.0315): steep at 0, so small singular values rise fast,
but it ends anywhere in about [0.7, 1.2]. `polar12` takes 12 steps of (2, -1.5, 0.5), whose fixed point
1 is attracting: it converges to the polar factor U V^T.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = {
    "quintic5": [(3.4445, -4.7750, 2.0315)] * 5,
    "polar12": [(2.0, -1.5, 0.5)] * 12,
}


def frobenius(x: Tensor) -> Tensor:
    """The Frobenius norm of each matrix of a batch, (..., 1, 1)."""
    return x.norm(dim=(-2, -1), keepdim=True)


def schatten4(x: Tensor) -> Tensor:
    """The Schatten-4 norm (sum s_i^4)^(1/4) = ||X X^T||_F^(1/2) of each matrix of a batch, (..., 1, 1).

    Like Frobenius' it bounds the largest singular value from above, but more tightly.
    """
    gram = x.mT @ x if x.size(-2) > x.size(-1) else x @ x.mT
    return frobenius(gram).sqrt()


def newton_schulz(
    matrices: Tensor,
    method: str = "quintic5",
    dtype: torch.dtype | None = None,
    norm: Callable[[Tensor], Tensor] = frobenius,
) -> Tensor:
    """Orthogonalize each matrix of a batch (..., rows, columns); the result has `dtype`.

    dtype: of the products; by default bfloat16 on a GPU and float32 on a CPU, where bfloat16 is slow.
    norm: what the matrices are divided by, to bring their singular values to at most 1.
    """
    if dtype is None:
        dtype = torch.float32 if matrices.device.type == "cpu" else torch.bfloat16
    x = (matrices / (norm(matrices) + 1e-7)).to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:  # so that X X^T is the smaller of the two Gram matrices
        x = x.mT
    shape, x = x.shape, x.reshape(-1, *x.shape[-2:])
    for a, b, c in STEPS[method]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(shape)
    return x.mT if tall else x
