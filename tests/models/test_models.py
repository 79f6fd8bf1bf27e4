from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ema_nesterov.models import Llama, NanoGPT124M, NanoGPT162M, build_model
from ema_nesterov.models.common import count_parameters, rotate
from ema_nesterov.training.checkpoint import save_weights
from tests.conftest import composed
from tests.trajectories import REFERENCE

PARAMETERS = {
    "nanogpt_124m": 123_532_032,
    "nanogpt_162m": 162_354_816,
    "llama_60m": 58_073_600,
    "llama_130m": 134_105_856,
    "llama_350m": 367_969_280,
    "llama_1b": 1_339_082_752,
}


def reference(name: str) -> dict[str, Tensor]:
    data = np.load(REFERENCE / f"open_model_{name}_tiny.npz", allow_pickle=False)
    return {key: torch.from_numpy(data[key]) for key in data.files if key != "meta"}


def load(model: nn.Module, data: dict[str, Tensor]) -> None:
    model.load_state_dict({k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")})


def tokens(vocab_size: int, shape: tuple[int, int] = (3, 16)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(vocab_size, (shape[0], shape[1] + 1), generator=generator)
    return inputs[:, :-1], inputs[:, 1:]


def tiny(architecture: str, pad_vocab_to: int = 1) -> nn.Module:
    torch.manual_seed(0)
    if architecture == "nanogpt_124m":
        return NanoGPT124M(97, 2, 2, 32, pad_vocab_to)
    if architecture == "nanogpt_162m":
        model = NanoGPT162M(97, 2, 32, 16, pad_vocab_to=pad_vocab_to)
        with torch.no_grad():  # the head starts at zero, where every loss is log(vocabulary)
            model.proj.weight[:97].normal_(generator=torch.Generator().manual_seed(1))
        return model
    return Llama(97, 2, 2, 32, 64, 128, 1, pad_vocab_to)


ARCHITECTURES = ["nanogpt_124m", "nanogpt_162m", "llama"]


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_has_the_papers_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = build_model(composed(f"model={name}").model)
    assert count_parameters(model) == PARAMETERS[name]


def test_124m_is_the_released_model() -> None:
    data = reference("nanogpt_track1")
    model = NanoGPT124M(vocab_size=97, layers=3, heads=4, width=32)
    load(model, data)
    torch.testing.assert_close(model(data["inputs"]), data["logits"], atol=2e-6, rtol=1e-5)
    loss = model(data["inputs"], data["targets"])
    assert loss.item() == pytest.approx(data["loss"].item(), abs=1e-6)
    loss.backward()
    gradients = {k.removeprefix("grad."): v for k, v in data.items() if k.startswith("grad.")}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-6, rtol=1e-4)


def test_162m_is_the_public_scripts_model() -> None:
    data = reference("nanogpt_track3")
    model = NanoGPT162M(vocab_size=97, layers=2, width=96, head_dim=32)
    load(model, data)
    total = model(data["inputs"], data["targets"]).item() * data["targets"].numel()
    assert total == pytest.approx(data["loss"].item(), rel=1e-6)


def test_162m_starts_at_the_log_of_its_vocabulary() -> None:
    model = NanoGPT162M(vocab_size=97, layers=2, width=32, head_dim=16)
    assert model(*tokens(97)).item() == pytest.approx(np.log(97), abs=1e-6)


def test_llama_is_transformers_llama_with_its_own_loss() -> None:
    model = tiny("llama")
    inputs, _ = tokens(97)
    theirs = model.llama(input_ids=inputs, labels=inputs).loss
    torch.testing.assert_close(model(inputs[:, :-1], inputs[:, 1:]), theirs)
    padding_row = model.llama.model.embed_tokens.weight[1]
    assert not padding_row.any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_the_vocabulary_changes_neither_loss_nor_gradients(architecture: str) -> None:
    plain, padded = tiny(architecture), tiny(architecture, pad_vocab_to=128)
    losses = [model(*tokens(97)) for model in (plain, padded)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
    for loss in losses:
        loss.backward()
    for p, q in zip(plain.parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad[: len(p)], atol=1e-6, rtol=1e-4)
        assert not q.grad[len(p) :].any()
    assert padded(tokens(97)[0]).shape[-1] == 97


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exported_weights_are_not_padded(architecture: str, tmp_path: Path) -> None:
    for name, multiple in (("plain", 1), ("padded", 128)):
        save_weights(tmp_path / name, tiny(architecture, multiple))
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "padded").read_bytes()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_targets_of_minus_100_do_not_count(architecture: str) -> None:
    model = tiny(architecture)
    inputs, targets = tokens(97)
    half = targets.clone()
    half[:, 8:] = -100
    expected = nn.functional.cross_entropy(model(inputs)[:, :8].flatten(0, 1), targets[:, :8].flatten())
    torch.testing.assert_close(model(inputs, half), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_position_sees_the_future(architecture: str) -> None:
    model = tiny(architecture)
    inputs, _ = tokens(97)
    changed = inputs.clone()
    changed[:, 10:] = 5
    torch.testing.assert_close(model(inputs)[:, :10], model(changed)[:, :10])


def test_rotations_in_bfloat16_are_rounded_once() -> None:
    x, frequencies = torch.randn(2, 64, 2, 16).bfloat16(), 0.1 ** torch.arange(8)
    assert torch.equal(rotate(x, frequencies), rotate(x.float(), frequencies).bfloat16())


def test_162m_runs_in_the_dtype_of_its_embedding() -> None:
    model = NanoGPT162M(vocab_size=97, layers=2, width=32, head_dim=16, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    assert model(tokens(97)[0]).dtype == torch.float32
