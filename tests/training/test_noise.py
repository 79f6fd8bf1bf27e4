"""The gradient noise scale, on gradients whose noise is known."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ema_nesterov.training.distributed import Ranks
from ema_nesterov.training.noise import gradient_noise
from tests.conftest import ROOT, TINY, read_metrics, run_folder

ALONE = Ranks(0, 1, torch.device("cpu"))


class Mean(nn.Module):
    """The gradient of (w - mean of the tokens' values)^2 / 2 at 0 is minus that mean."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.values, self.w = values, nn.Parameter(torch.zeros(values.size(1)))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return (self.w - self.values[inputs].flatten(0, 1).mean(0)).square().sum() / 2


def batches(tokens: int, micro: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of 4 tokens a row, each token there once."""
    rows = torch.arange(tokens).view(-1, 4)
    return [(part, part) for part in rows.split(micro)]


@pytest.mark.parametrize("micro", [1, 8])
def test_the_noise_is_that_of_the_distribution_whatever_the_micro_batch(micro: int) -> None:
    torch.manual_seed(0)
    width, signal, sd = 1000, 0.02, 0.5
    model = Mean(signal + sd * torch.randn(2048, width))
    found = gradient_noise(model, batches(2048, micro), ALONE, nullcontext())
    assert found["noise/trace"] == pytest.approx(width * sd**2, rel=0.02)
    assert found["noise/gradient"] == pytest.approx(width * signal**2, rel=0.1)
    assert found["noise/scale"] == found["noise/trace"] / found["noise/gradient"]


def test_a_short_last_micro_batch_is_left_out() -> None:
    model = Mean(torch.randn(36, 10))
    whole, short = (gradient_noise(model, batches(tokens, 4), ALONE, nullcontext()) for tokens in (32, 36))
    assert whole == short


def test_too_few_tokens_tell_no_scale() -> None:
    values = torch.randn(4, 10)
    model = Mean(torch.cat([values, -values]))
    assert "noise/scale" not in gradient_noise(model, batches(8, 1), ALONE, nullcontext())
    assert gradient_noise(model, batches(4, 1), ALONE, nullcontext()) == {}


def test_two_ranks_measure_what_one_does(straight: Path, sample: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    overrides = [*TINY, f"runs_dir={tmp_path}", f"dataset.path={sample}"]
    subprocess.run([*command, "scripts/train.py", *overrides], cwd=ROOT, check=True, capture_output=True)
    one, two = (
        next(line for line in read_metrics(folder) if "noise/trace" in line)
        for folder in (straight, run_folder(tmp_path))
    )
    means = [line["noise/gradient"] + line["noise/trace"] / 1024 for line in (one, two)]  # |g|^2 of the 1024 tokens
    assert means[1] == pytest.approx(means[0], rel=1e-4)
    assert two["noise/trace"] == pytest.approx(one["noise/trace"], rel=0.1)  # other rows are put together
