"""The first 20 losses of each model at a small width, float32 on a CPU: whatever is made faster must find them again.

`python -m tests.test_golden` writes tests/golden.json anew; do so only when the numbers are meant to change.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from ema_nesterov.data.preparation.sample import prepare_sample
from ema_nesterov.training.folder import FINISHED
from ema_nesterov.training.run import run
from tests.conftest import composed, read_metrics, run_folder

GOLDEN = Path(__file__).parent / "golden.json"
MODELS = {
    "nanogpt_124m": ["model=tiny", "model.layers=1", "model.heads=2", "model.width=64"],
    "nanogpt_162m": ["model=nanogpt_162m", "model.layers=2", "model.head_dim=32", "model.width=64"],
    "record30": ["model=nanogpt_162m_record30", "model.layers=2", "model.head_dim=32", "model.width=64"],
    "llama": ["model=llama_60m", "model.layers=2", "model.heads=2", "model.width=64", "model.mlp_width=160"],
}
SETTING = (
    *("model.vocab_size=4096", "optimizer=muon", "lookahead=ema_nesterov", "steps=20", "seq_len=64", "batch_size=8"),
    *("lookahead.warmup_steps=5", "lookahead.rest_steps=5", "lookahead.ema_decay=0.9", "log_every=1", "eval_every=0"),
    *("checkpoint_every=0", "dataset.val_tokens=1024", "trainer.device=cpu"),
)
BFLOAT16 = 0.02
# Another path, and how far its losses may be from the golden ones
PATHS = {
    "as it is": ([], 1e-4),  # another CPU, another torch
    "all at once": (
        ["micro_batch_size=1", "model.pad_vocab_to=128", "trainer.activation_checkpointing=true"],
        1e-4,
    ),
    "compiled": (["trainer.compile=true"], 1e-4),
}
# compiling takes most of a minute: once is enough
CASES = [(model, path) for model in MODELS for path in PATHS if path != "compiled" or model == "nanogpt_124m"]


def losses(model: str, sample: Path, runs: Path, *overrides: str) -> list[float]:
    cfg = composed(*MODELS[model], *SETTING, f"dataset.path={sample}", f"runs_dir={runs}", *overrides)
    assert run(cfg) == FINISHED
    return [line["train/loss"] for line in read_metrics(run_folder(runs)) if "train/loss" in line]


@pytest.mark.parametrize(("model", "path"), CASES)
def test_every_path_finds_the_golden_losses(model: str, path: str, sample: Path, tmp_path: Path) -> None:
    overrides, tolerance = PATHS[path]
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[model]
    assert losses(model, sample, tmp_path, *overrides) == pytest.approx(golden, abs=tolerance, rel=0)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_products_stay_near(model: str, sample: Path, tmp_path: Path) -> None:
    """What a GPU does, on a CPU: weights and optimizer in float32, products in bfloat16."""
    golden, found = (
        json.loads(GOLDEN.read_text(encoding="utf-8"))[model],
        losses(model, sample, tmp_path, "trainer.bfloat16=true"),
    )
    assert found == pytest.approx(golden, abs=BFLOAT16, rel=0)
    assert found != pytest.approx(golden, abs=1e-5, rel=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model", MODELS)
def test_a_gpu_stays_near(model: str, sample: Path, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[model]
    assert losses(model, sample, tmp_path, "trainer.device=cuda") == pytest.approx(golden, abs=BFLOAT16, rel=0)


def main() -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        sample = Path(folder) / "sample"
        prepare_sample(sample, "sample_bpe4096", 4096)
        golden = {model: losses(model, sample, Path(folder) / model) for model in MODELS}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
