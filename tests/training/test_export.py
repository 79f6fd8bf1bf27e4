"""What scripts/export_hf.py writes, and what transformers makes of it without this package."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ema_nesterov.data.tokenizers import open_tokenizer
from ema_nesterov.training.evaluate import at_iterate, holding, parameters, weight_ema
from ema_nesterov.training.run import run
from ema_nesterov.training.trained import open_trained
from tests.conftest import ROOT, TINY, Refused, composed, read_metrics, run_folder
from tests.training.runs import copied

SHORT = (
    *("lookahead=none", "steps=3", "eval_every=0", "probe_every=0", "checkpoint_every=0", "micro_batch_size=12"),
    *("model.vocab_size=4100", "model.pad_vocab_to=128"),
)
TEXT = "The method returns 1,234  words;\n\n\tit's na\u00efve."

# In a process of its own, where this package cannot be imported
LOAD = """
import json, sys
sys.modules["ema_nesterov"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

row, text, said = torch.tensor([json.loads(sys.argv[1])]), sys.argv[2], {}
for folder in sys.argv[3:]:
    trust = {"trust_remote_code": True} if json.load(open(folder + "/config.json"))["model_type"] != "llama" else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    model, report = AutoModelForCausalLM.from_pretrained(folder, **trust, output_loading_info=True)
    padded, mask = torch.nn.functional.pad(row, (0, 8)), torch.ones(1, row.shape[1] + 8)
    mask[:, -8:] = 0
    out = model(input_ids=row, labels=row)
    try:  # Llama's positions may begin anywhere
        left = bool(trust) and model(input_ids=row, attention_mask=mask[:, 8:].flip(1))
    except ValueError as e:
        left = "padding on the right alone" not in str(e)
    prompt = row[:, :8]
    new = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    said[folder] = {
        "logits": out.logits.tolist(),
        "loss": out.loss.item(),
        "left": left,
        "padded": model(input_ids=padded, attention_mask=mask).logits[:, :-8].tolist(),
        "generated": new[0].tolist(),
        "ids": tokenizer(text)["input_ids"],
        "marks": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, model.generation_config.eos_token_id],
        "longest": tokenizer.model_max_length,
        "missing": sorted(report["missing_keys"]) + sorted(report["unexpected_keys"]),
    }
print(json.dumps(said))
"""


def short(runs: Path, sample: Path, *overrides: str) -> Path:
    """The folder of a run of three steps, its vocabulary padded, without a wrapper."""
    known = [key for key in TINY if not key.startswith(("lookahead", "model.heads"))]
    assert run(composed(*known, *SHORT, f"runs_dir={runs}", f"dataset.path={sample}", *overrides)) == 0
    return run_folder(runs)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Path:
    model = ("model=llama_60m", "model.heads=2", "model.mlp_width=64")
    return short(tmp_path_factory.mktemp("llama"), sample, *model)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Path:
    return short(tmp_path_factory.mktemp("record"), sample, "model=nanogpt_162m_record30", "model.head_dim=16")


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Types the script in this process, as starting another costs seconds; returns what it prints."""

    def typed(run: Path, *arguments: str) -> str:
        monkeypatch.syspath_prepend(ROOT / "scripts")
        monkeypatch.setattr(sys, "argv", ["export_hf.py", f"run={run}", *arguments])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "scripts" / "export_hf.py"), run_name="__main__")
        return capsys.readouterr().out

    return typed


def test_transformers_loads_each_model_with_the_runs_logits_and_tokens(
    export: Any, straight: Path, llama: Path, record: Path, sample: Path, tmp_path: Path
) -> None:
    runs = [straight, llama, record]
    folders = [tmp_path / f"export-{i}" for i in range(len(runs))]
    for trained, folder in zip(runs, folders, strict=True):
        assert f"{folder}: step" in export(trained, f"output={folder}")
    row = torch.randint(4096, (1, 32), generator=torch.Generator().manual_seed(1))
    command = [sys.executable, "-I", "-c", LOAD, json.dumps(row[0].tolist()), TEXT, *map(str, folders)]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "MISSING" not in done.stderr + done.stdout
    assert "newly initialized" not in done.stderr + done.stdout
    ids = open_tokenizer(str(sample / "tokenizer.json")).encode([TEXT])[0].tolist()
    for trained, said in zip(runs, json.loads(done.stdout.splitlines()[-1]).values(), strict=True):
        ours = open_trained(trained, None, torch.device("cpu"))
        with torch.no_grad(), at_iterate(ours.optimizer):
            expected, loss, likeliest = ours.model(row), ours.model(row[:, :-1], row[:, 1:]), row[:, :8]
            for _ in range(4):
                likeliest = torch.cat([likeliest, ours.model(likeliest)[:, -1:].argmax(-1)], 1)
        for key in ("logits", "padded"):
            torch.testing.assert_close(torch.tensor(said[key]), expected, atol=1e-5, rtol=0)
        assert said["loss"] == pytest.approx(float(loss), abs=1e-5)
        assert said["generated"] == likeliest[0].tolist()
        assert said["ids"] == ids
        assert said["marks"] == ["<|endoftext|>"] * 3 + [0]
        assert said["longest"] == 32
        assert said["missing"] == []
        assert said["left"] is False
        folder = folders[runs.index(trained)]
        tables = [w for w in load_file(folder / "model.safetensors").values() if w.ndim == 2 and w.size(0) > 1000]
        assert {len(w) for w in tables} == {ours.cfg.model.vocab_size}  # no row of the padding
        assert "causal" not in (folder / "config.json").read_text(encoding="utf-8").replace("CausalLM", "")


def test_x_y_and_e_are_exported_and_replace_each_other(export: Any, straight: Path, tmp_path: Path) -> None:
    weights = {}
    for at in "xye":
        export(straight, f"output={tmp_path / 'out'}", f"at={at}", "step=6")
        weights[at] = load_file(tmp_path / "out" / "model.safetensors")["model.transformer.wte.weight"]
        config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
        assert config["ema_nesterov_run"]["at"] == at
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not torch.equal(weights["x"], weights["y"])
    ours = open_trained(straight, 6, torch.device("cpu"))
    tracker = weight_ema(ours.optimizer)
    assert tracker is not None
    with holding(parameters(ours.optimizer), tracker.average()):
        held = dict(ours.model.named_parameters())["transformer.wte.weight"]
        assert torch.equal(weights["e"], held)
    assert not torch.equal(weights["x"], weights["e"])


def test_the_card_has_the_loss_that_was_logged(export: Any, straight: Path, tmp_path: Path) -> None:
    export(straight, f"output={tmp_path / 'out'}", "at=e")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| {read_metrics(straight)[-1]['val/ema_loss']:.4f} nats |" in card
    assert "at e, the weight EMA" in card
    assert "step | 10 of 10" in card


def test_without_its_shards_the_model_is_exported_alone(
    export: Any, straight: Path, sample: Path, tmp_path: Path
) -> None:
    moved = copied(straight, tmp_path / "runs")
    (moved / "config.yaml").write_text(
        (moved / "config.yaml").read_text(encoding="utf-8").replace(str(sample), "gone"), encoding="utf-8"
    )
    said = export(moved)
    assert "without a tokenizer: gone does not say which" in said
    assert "type path=SHARDS" in said
    assert (moved / "hf" / "model.safetensors").exists()
    assert not (moved / "hf" / "tokenizer.json").exists()


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_a_converted_tokenizer_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers

    spec = kind
    if kind == "t5":  # as T5's: unigram, </s> behind, sentinels that the models do not know
        rust = Tokenizer(models.Unigram())
        rust.pre_tokenizer = pre_tokenizers.Metaspace()
        special = ["<pad>", "</s>", "<unk>"]
        trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
        rust.train_from_iterator([TEXT, "some more words, to have pieces of them"], trainer)
        rust.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        rust.add_special_tokens([AddedToken("<extra_id_0>")])
        rust.save(spec := str(tmp_path / "tokenizer.json"))
    ours = open_tokenizer(spec)
    script = runpy.run_path(str(ROOT / "scripts" / "export_hf.py"))
    theirs = script["converted"](ours, 0 if kind == "t5" else None, 64)
    assert theirs(TEXT)["input_ids"] == ours.encode([TEXT])[0].tolist()
    assert len(theirs) == ours.vocab_size
    mark = "<|endoftext|>"
    marks = (None, "</s>", "<pad>") if kind == "t5" else (mark, mark, mark)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == marks


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("", "run= is missing"),
        ("run=nowhere", "nowhere is no run folder"),
        ("run=RUN at=z", "at=z is no point; type at=x, at=y or at=e"),
        ("run=RUN step=5", "has no whole checkpoint of step 5"),
        ("run=RUN output=RUN/checkpoints", "checkpoints exists and is no export; type output=FOLDER"),
        ("run=RUN path=nowhere", "nowhere does not say which tokenizer"),
        ("run=LLAMA at=y", "has no lookahead point at full alpha at step 3; type at=x"),
        ("run=LLAMA at=e", "has no weight EMA at step 3; type at=x"),
    ],
)
def test_what_cannot_be_exported_is_told(
    arguments: str, line: str, refused: Refused, straight: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    refused("export_hf.py", arguments.replace("RUN", str(straight)).replace("LLAMA", str(llama)).split(), line)
