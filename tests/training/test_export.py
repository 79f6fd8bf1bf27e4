"""What scripts/export_hf.py writes, and what transformers makes of it without this package."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

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
NAMES = ["124m", "llama", "162m"]
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
    prompt = row[:, :8]
    new = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    said[folder] = {
        "logits": out.logits.tolist(),
        "loss": out.loss.item(),
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


def export(run: Path, *arguments: str) -> str:
    """Types the script in this process, as starting another costs seconds; returns what it prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.syspath_prepend(ROOT / "scripts")
        patch.setattr(sys, "argv", ["export_hf.py", f"run={run}", *arguments])
        runpy.run_path(str(ROOT / "scripts" / "export_hf.py"), run_name="__main__")
    return printed.getvalue()


@pytest.fixture(scope="module")
def exports(straight: Path, llama: Path, record: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """Of each run, where its export is."""
    where = tmp_path_factory.mktemp("exports")
    folders = {trained: where / name for trained, name in zip((straight, llama, record), NAMES, strict=True)}
    for trained, folder in folders.items():
        assert f"{folder}: step" in export(trained, f"output={folder}")
    return folders


def test_transformers_loads_each_model_with_the_runs_logits_and_tokens(
    exports: dict[Path, Path], sample: Path, tmp_path: Path
) -> None:
    runs, folders = list(exports), list(exports.values())
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
        folder = folders[runs.index(trained)]
        tables = [w for w in load_file(folder / "model.safetensors").values() if w.ndim == 2 and w.size(0) > 1000]
        assert {len(w) for w in tables} == {ours.cfg.model.vocab_size}  # no row of the padding
        assert "causal" not in (folder / "config.json").read_text(encoding="utf-8").replace("CausalLM", "")


def test_x_y_and_e_are_exported_and_replace_each_other(straight: Path, tmp_path: Path) -> None:
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


def test_the_card_has_the_loss_that_was_logged(straight: Path, tmp_path: Path) -> None:
    export(straight, f"output={tmp_path / 'out'}", "at=e")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| {read_metrics(straight)[-1]['val/ema_loss']:.4f} nats |" in card
    assert "at e, the weight EMA" in card
    assert "step | 10 of 10" in card


def test_without_its_shards_the_model_is_exported_alone(straight: Path, sample: Path, tmp_path: Path) -> None:
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


# --- what transformers does with a loaded export --------------------------------------------------

NANOGPT = pytest.mark.parametrize("name", ["124m", "162m"])


@pytest.fixture(scope="module")
def loaded(exports: dict[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The model of each export, moved: after a few steps from zero its attention hardly matters."""
    from transformers import AutoModelForCausalLM

    models, generator = {}, torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        for folder in exports.values():
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
            for p in model.parameters():
                p.data += torch.randn(p.shape, generator=generator) * (p.size(-1) ** -0.5 if p.ndim == 2 else 0.1)
            models[folder.name] = model
        yield models


def rows(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(4096, (length,), generator=generator) for length in lengths]


def padded(prompts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """The ids and the mask of a batch. side: left, right, or holes: behind a row's second token."""
    width = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), 7), torch.zeros(len(prompts), width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        start = {"left": 0, "right": len(prompt), "holes": 2}[side]
        there = torch.ones(width, dtype=torch.bool)
        there[start : start + width - len(prompt)] = False
        ids[i, there], mask[i] = prompt, there.long()
    return ids, mask


def close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, atol=1e-4, rtol=0))


@NANOGPT
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_a_padded_row_is_as_the_row_alone(name: str, side: str, loaded: dict[str, Any]) -> None:
    model, prompts = loaded[name], rows(5, 12, 9)
    ids, mask = padded(prompts, side)
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    new = model.generate(ids, attention_mask=mask, **greedy)[:, -4:] if side != "right" else None
    masked, unmasked = (model(ids, attention_mask=m).logits for m in (mask, None))
    for i, prompt in enumerate(prompts):
        alone, there = model(prompt[None]).logits[0], mask[i].bool()
        assert close(masked[i, there], alone)
        if new is not None:
            assert torch.equal(new[i], model.generate(prompt[None], **greedy)[0, -4:])
        # nothing on the right is seen, which lm-eval relies on: it pads there and gives no mask
        assert close(unmasked[i, there], alone) is (side == "right" or len(prompt) == 12)


@NANOGPT
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_has_the_loss_and_the_gradient_of_its_rows(name: str, side: str, loaded: dict[str, Any]) -> None:
    model, prompts = loaded[name], rows(5, 12, 9)
    parameter = next(model.parameters())

    def loss_and_gradient(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        return loss, torch.autograd.grad(loss, parameter)[0]

    alone = [loss_and_gradient(prompt[None], torch.ones(1, len(prompt))) for prompt in prompts]
    weights = [(len(prompt) - 1) / sum(len(p) - 1 for p in prompts) for prompt in prompts]
    expected = [sum(w * part for w, part in zip(weights, parts, strict=True)) for parts in zip(*alone, strict=True)]
    for ours, theirs in zip(loss_and_gradient(*padded(prompts, side)), expected, strict=True):
        assert close(ours, theirs)


@NANOGPT
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left", "holes"])
def test_a_cache_changes_no_logits(name: str, kind: str, side: str | None, loaded: dict[str, Any]) -> None:
    from transformers import StaticCache

    model = loaded[name]
    ids, mask = padded(rows(9, 12), side) if side else (torch.stack(rows(12, 12)), None)
    cache = StaticCache(config=model.config, max_cache_len=16) if kind == "static" else None
    expected, parts = model(ids, attention_mask=mask, use_cache=False), []
    assert expected.past_key_values is None
    for start, end in ((0, 5), (5, 6), (6, 10), (10, 12)):
        seen = None if mask is None else mask[:, :end]
        out = model(ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    there = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert close(torch.cat(parts, 1)[there], expected.logits[there])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}],
    ids=str,
)
def test_a_batch_of_texts_goes_on_as_each_does_alone(
    name: str, options: dict[str, Any], loaded: dict[str, Any], exports: dict[Path, Path]
) -> None:
    from transformers import AutoTokenizer

    model, folder = loaded[name], next(folder for folder in exports.values() if folder.name == name)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    texts = ["The method", "It is na\u00efve to say that the words", "A"]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    alone = [model.generate(**tokenizer(text, return_tensors="pt"), **options)[0, -8:].tolist() for text in texts]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert not batch["attention_mask"].all()
    options.pop("prompt_lookup_num_tokens", None)  # transformers guesses ahead for one text at a time
    assert model.generate(**batch, **options)[:, -8:].tolist() == alone


@NANOGPT
def test_the_other_outputs_and_inputs_agree_with_the_logits(name: str, loaded: dict[str, Any]) -> None:
    model = loaded[name]
    ids, mask = padded(rows(5, 9), "left")
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    assert [state.shape for state in out.hidden_states] == [(2, 9, 32)] * 3
    assert torch.equal(model.model.logits(out.hidden_states[-1]), out.logits)
    embeds = model.get_input_embeddings()(ids)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for given in (
        {"input_ids": ids, "position_ids": positions},
        {"inputs_embeds": embeds},
        {"input_ids": ids, "return_dict": False},
    ):
        assert torch.equal(model(attention_mask=mask, **given)[0], out.logits)
    for kept, which in ((1, slice(-1, None)), (3, slice(-3, None)), (torch.tensor([2, 4]), [2, 4])):
        assert close(model(ids, attention_mask=mask, logits_to_keep=kept).logits, out.logits[:, which])
    four = (mask[:, None, None] & torch.ones(9, 9).tril().long()).bool()
    assert torch.equal(model(ids, attention_mask=four, position_ids=positions).logits, out.logits)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    new = model.generate(ids, **options)[:, 9:]
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), new)
    model.train()
    assert model(ids).past_key_values is None
    model.eval()


@NANOGPT
@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"output_attentions": True}, "leave out output_attentions"),
        ({"inputs_embeds": torch.zeros(2, 4, 32)}, "give either input_ids or inputs_embeds"),
        ({"input_ids": None}, "give either input_ids or inputs_embeds"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask is \(2, 3\): make it \(2, 4\)"),
        ({"attention_mask": torch.ones(4)}, r"attention_mask is \(4,\): make it \(2, 4\)"),
        ({"attention_mask": torch.zeros(2, 1, 4, 4)}, "must be of bools"),
        ({"logits_to_keep": torch.ones(2, 4).bool()}, "a tensor of 1 dimension"),
        ({"labels": torch.ones(2, 4).long(), "logits_to_keep": 1}, "leave out logits_to_keep, or labels"),
    ],
)
def test_what_cannot_be_had_is_refused(name: str, given: dict[str, Any], line: str, loaded: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=line) as refusal:
        loaded[name](**{"input_ids": torch.ones(2, 4).long(), **given})
    assert "\n" not in str(refusal.value)


@NANOGPT
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
def test_generating_from_padding_is_refused(name: str, options: dict[str, Any], loaded: dict[str, Any]) -> None:
    ids, mask = padded(rows(5, 9), "right")
    with pytest.raises(ValueError, match=r"pad on the left, with tokenizer\.padding_side = 'left'"):
        loaded[name].generate(ids, attention_mask=mask, max_new_tokens=4, **options)
