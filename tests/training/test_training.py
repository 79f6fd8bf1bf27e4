"""Real runs, in this process or under a real torchrun, on the real sample text."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ema_nesterov.data.shards import write_shard
from ema_nesterov.errors import ConfigError
from ema_nesterov.training.checkpoint import load_checkpoint, save_checkpoint
from ema_nesterov.training.folder import FINISHED, read_status
from ema_nesterov.training.run import run, split_batch
from tests.conftest import TINY, assert_same, composed, final_state, read_metrics, run_folder, train_process
from tests.training.runs import assert_same_run, at_step, plugin, stop_after, train


@pytest.mark.parametrize("stopped_at", [0, 6, 10])
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path: Path, straight: Path, sample: Path, stopped_at: int) -> None:
    shutil.copytree(straight.parents[2], tmp_path / "stopped")
    resumed = run_folder(tmp_path / "stopped")
    stop_after(resumed, stopped_at)
    with open(resumed / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 10, "cut')  # a line that a crash cut short
    train(tmp_path / "stopped", sample)
    assert_same_run(straight, resumed)
    assert read_status(resumed)["resumed_from"] == (stopped_at or None)


@pytest.mark.parametrize(
    "variant",
    [
        ("lookahead=none", "probe_every=5", "schedule=lr_matched"),
        ("lookahead=nesterov", "lookahead.warmup_steps=2", "optimizer=soap", "optimizer.precondition_frequency=2"),
        ("lookahead=nala", "lookahead.k=3", "lookahead.warmup_steps=2", "optimizer=aurora"),
        ("lookahead=lookahead", "lookahead.k=4", "lookahead.inner_state=interpolate"),
        ("lookahead=lookahead", "lookahead.k=4", "lookahead.adaptive=true", "optimizer=adamw", "trainer.grad_clip=0.5"),
        ("lookahead=snoo", "lookahead.k=4", "optimizer=record30", "schedule=power"),
        ("lookahead=gpa", "optimizer=normuon"),
        ("schedule=wsd_exponential", "lookahead.warm_start=true"),
    ],
)
def test_every_kind_of_run_resumes_exactly(tmp_path: Path, sample: Path, variant: tuple[str, ...]) -> None:
    tiny = TINY if "lookahead" not in variant[0] else [o for o in TINY if not o.startswith("lookahead.")]
    overrides = [*tiny, f"dataset.path={sample}", *variant]
    assert run(composed(*overrides, f"runs_dir={tmp_path / 'straight'}")) == FINISHED
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    stop_after(run_folder(tmp_path / "stopped"), 6)
    assert run(composed(*overrides, f"runs_dir={tmp_path / 'stopped'}")) == FINISHED
    assert_same_run(run_folder(tmp_path / "straight"), run_folder(tmp_path / "stopped"))


def test_evaluation_and_probes_change_no_bit_of_the_training(tmp_path: Path, straight: Path, sample: Path) -> None:
    never = ("eval_every=0", "eval_at=[3,0.5/4]", "probe_every=0", "noise_every=0", "checkpoint_every=0")
    alone = train(tmp_path / "alone", sample, *never, "log_every=5")
    assert [line["step"] for line in read_metrics(alone) if "val/loss" in line] == [3, 8, 10]
    assert_same(final_state(straight), final_state(alone))
    losses = {line["step"]: line["train/loss"] for line in read_metrics(straight) if "train/loss" in line}
    assert [line["train/loss"] for line in read_metrics(alone) if "train/loss" in line] == [losses[5], losses[10]]


def test_the_probes_ema_changes_no_bit_of_a_base_run(tmp_path: Path, sample: Path) -> None:
    tiny = [o for o in TINY if not o.startswith("lookahead.")]
    folders = []
    for every in (0, 5):
        runs = tmp_path / str(every)
        overrides = (*tiny, "lookahead=none", f"probe_every={every}", f"runs_dir={runs}", f"dataset.path={sample}")
        assert run(composed(*overrides)) == FINISHED
        folders.append(run_folder(runs))
    without, with_probe = (load_file(folder / "model.safetensors") for folder in folders)
    assert_same(without, with_probe)
    assert any("probe/loss" in line for line in read_metrics(folders[1]))
    assert not any("val/ema_loss" in line for line in read_metrics(folders[0]))


def test_probes_switched_on_in_mid_run_are_refused(tmp_path: Path, sample: Path) -> None:
    tiny = [o for o in TINY if not o.startswith(("lookahead.", "probe_every"))]
    overrides = [*tiny, "lookahead=none", f"runs_dir={tmp_path}", f"dataset.path={sample}"]
    assert run(composed(*overrides, "probe_every=0")) == FINISHED
    stop_after(run_folder(tmp_path), 6)
    with pytest.raises(ConfigError, match="holds no wrapper, this config builds EMANesterov"):
        run(composed(*overrides, "probe_every=5"))


def test_the_micro_batch_changes_losses_by_rounding_alone(tmp_path: Path, sample: Path) -> None:
    whole = read_metrics(train(tmp_path / "whole", sample, "micro_batch_size=12", "noise_every=0"))
    parts = read_metrics(train(tmp_path / "parts", sample, "micro_batch_size=1", "noise_every=0"))
    for a, b in zip(whole, parts, strict=True):
        for key in a:
            assert a[key] == (pytest.approx(b[key], abs=1e-5, rel=1e-5) if isinstance(a[key], float) else b[key])


def test_padded_rows_weigh_by_their_targets_however_they_fall_into_micro_batches(tmp_path: Path) -> None:
    """Rows of 1 to 32 real tokens, so of none to 31 targets: the mean is over those of the global batch."""
    rng = np.random.default_rng(0)
    rows = rng.integers(2, 100, (200, 32))
    for row in rows:
        row[rng.integers(1, 33) :] = 0
    for split, part in (("train", rows[:150]), ("val", rows[150:])):
        write_shard(tmp_path / f"c4_{split}_000000.bin", part.ravel())
    overrides = [*TINY, "dataset=c4", f"dataset.path={tmp_path}", "dataset.row_len=32", "dataset.vocab_size=100"]
    overrides += ["dataset.val_tokens=500", "dataset.probe_tokens=256"]
    whole, parts = [], []
    for micro, lines in ((12, whole), (1, parts)):
        runs = tmp_path / f"runs{micro}"
        assert run(composed(*overrides, f"micro_batch_size={micro}", f"runs_dir={runs}")) == FINISHED
        lines += [line for line in read_metrics(run_folder(runs)) if "train/loss" in line]
    for a, b in zip(whole, parts, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-5)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        ("model=nanogpt_162m", "model.layers=1", "model.width=32", "model.head_dim=16"),
        ("model=llama_60m", "model.layers=1", "model.width=32", "model.heads=2", "model.mlp_width=64"),
    ],
)
def test_every_architecture_trains(tmp_path: Path, sample: Path, model: tuple[str, ...]) -> None:
    tiny = [o for o in TINY if not o.startswith("model.")]
    overrides = (*tiny, *model, "model.vocab_size=4096", f"dataset.path={sample}", f"runs_dir={tmp_path}")
    assert run(composed(*overrides)) == FINISHED
    losses = [line["val/loss"] for line in read_metrics(run_folder(tmp_path)) if "val/loss" in line]
    assert losses[-1] < losses[0]


def test_metrics_hold_what_the_design_promises(straight: Path) -> None:
    folder = straight
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all({"step", "tokens", "time"} <= set(line) for line in lines)
    assert all(line["tokens"] == line["step"] * 12 * 32 for line in lines)
    training = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in training] == list(range(1, 11))
    assert all(
        {"train/grad_norm", "optim/lr", "optim/alpha", "perf/step_ms", "perf/tokens_per_second"} <= set(line)
        for line in training
    )
    assert [line["optim/alpha"] > 0 for line in training] == [2 <= t < 8 for t in range(10)]
    assert [line["step"] for line in training if "perf/first_step_s" in line] == [1]
    validation = [line for line in lines if "val/loss" in line]
    assert [line["step"] for line in validation] == [0, 5, 10]
    assert {"val/perplexity", "val/lookahead_loss", "val/ema_loss", "val/bits_per_byte"} <= set(validation[-1])
    positions = [line["probe/position"] for line in lines if line.get("probe/direction") == "ema"]
    assert positions == 2 * [i / 4 for i in range(-4, 9)]
    at_x = {line["step"]: line["probe/loss"] for line in lines if line.get("probe/position") == 0.0}
    assert len(at_x) == 2
    assert read_status(folder) == {
        "status": "finished",
        "step": 10,
        "message": "",
        "exit_code": 0,
        "resumed_from": None,
    }


def test_the_first_step_which_compiles_is_left_out_of_the_speed(
    tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 1, lambda: time.sleep(3))
    folder = train(tmp_path, sample, "log_every=5", "eval_every=0", "probe_every=0")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0]["perf/first_step_s"] > 3
    assert lines[0]["perf/step_ms"] < 3000 / 5


def test_the_probe_agrees_with_the_validation(tmp_path: Path, sample: Path) -> None:
    """On the same tokens the probe's a = 0 is val/loss, and a = alpha along the EMA is val/lookahead_loss."""
    folder = train(tmp_path, sample, "dataset.probe_tokens=1024", "lookahead.alpha=0.75")
    lines = read_metrics(folder)
    for step in (5, 10):
        validation = next(line for line in lines if line["step"] == step and "val/loss" in line)
        probe = {
            (line["probe/direction"], line["probe/position"]): line["probe/loss"]
            for line in lines
            if line["step"] == step and "probe/loss" in line
        }
        assert probe["ema", 0.0] == probe["step", 0.0] == pytest.approx(validation["val/loss"], abs=1e-6)
        assert probe["ema", 0.75] == pytest.approx(validation["val/lookahead_loss"], abs=1e-5)


def test_exported_weights_are_the_iterate_and_checkpoints_the_lookahead_point(straight: Path) -> None:
    from ema_nesterov.models import build_model
    from ema_nesterov.optim.build import build_optimizer

    folder = straight
    model = build_model(composed(*TINY).model)
    optimizer = build_optimizer(model, composed(*TINY))

    def restore(step: int) -> None:
        state = final_state(folder, step)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    restore(6)  # in the middle, alpha is above 0
    y = [p.detach().clone() for p in model.parameters()]
    with optimizer.at_iterate():
        assert not any(torch.equal(x, held) for x, held in zip(model.parameters(), y, strict=True))
    restore(10)
    with optimizer.at_iterate():
        exported = load_file(folder / "model.safetensors")
        assert all(torch.equal(p, exported.pop(name)) for name, p in model.named_parameters())
        assert not exported


@pytest.mark.parametrize("ranks", [2])
def test_ranks_prepare_data_once_resume_bit_for_bit_and_agree_with_one(tmp_path: Path, ranks: int) -> None:
    path = tmp_path / "data" / "sample"  # not there yet: the real text comes out of the package
    overrides = [*TINY, f"dataset.path={path}", "steps=12", "checkpoint_every=5", "eval_every=6", "probe_every=6"]
    overrides += ["noise_every=0"]  # its estimate depends on which rows a micro-batch holds
    done = train_process(*overrides, f"runs_dir={tmp_path / 'straight'}", ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in path.iterdir()} == {
        *("manifest.json", "tokenizer.json", "token_bytes.npy", "sample_train_000000.bin", "sample_val_000000.bin")
    }
    for name in ("stopped", "taken_over"):
        shutil.copytree(tmp_path / "straight", tmp_path / name)
        stop_after(run_folder(tmp_path / name), 5)
    done = train_process(*overrides, f"runs_dir={tmp_path / 'stopped'}", ranks=ranks)
    assert "resuming at step 5" in done.stdout
    straight, stopped = (run_folder(tmp_path / name) for name in ("straight", "stopped"))
    assert read_metrics(straight) == read_metrics(stopped)
    assert_same(final_state(straight, 12), final_state(stopped, 12))

    # one process alone, and one that takes over from these ranks in the middle
    for name in ("one", "taken_over"):
        assert run(composed(*overrides, f"runs_dir={tmp_path / name}")) == FINISHED
        for a, b in zip(read_metrics(run_folder(tmp_path / name)), read_metrics(straight), strict=True):
            for key in a:
                assert a[key] == (pytest.approx(b[key], abs=1e-5, rel=1e-4) if isinstance(a[key], float) else b[key])
            if "train/loss" in a:
                assert a["train/loss"] == pytest.approx(b["train/loss"], abs=1e-5)


def test_a_finished_run_is_taken_as_it_is(tmp_path: Path, sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(tmp_path, sample)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    train(tmp_path, sample)
    assert "finished already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_old_checkpoints_go_and_half_written_ones_are_not_seen(tmp_path: Path) -> None:
    state = {"step": 1, "numbers": (1, 2.5, None), "nested": {3: [torch.arange(3), {"a": True}]}}
    state["tied"] = state["nested"][3][0]  # type: ignore[index]
    for step in (1, 2, 3):
        path = save_checkpoint(tmp_path, step, state, keep=2)
    (tmp_path / ".step_00000004.writing").mkdir()
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000002", "step_00000003"]
    assert_same(load_checkpoint(path), state)


def test_plugins_bring_in_a_users_own_classes(tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import torch\n"
        "from ema_nesterov.models import NanoGPT124M\n"
        "def Small(width): return NanoGPT124M(4096, 1, 2, width)\n"
        "class MySGD(torch.optim.SGD): pass\n"
    )
    plugin(tmp_path, "mine", code, "model", "_target_: mine.Small\nname: small\nwidth: 16\n")
    environment = plugin(tmp_path, "mine", code, "optimizer", "_target_: mine.MySGD\nname: mine\nlr: 0.1\n")
    common = ["--config-dir", str(tmp_path), "model=mine", "optimizer=mine", "steps=2", "seq_len=16", "batch_size=2"]
    common += ["dataset.val_tokens=64", f"dataset.path={sample}", f"runs_dir={tmp_path / 'runs'}"]
    refused = train_process(*common, env=environment)
    assert refused.returncode == 2
    assert "type plugins=[mine]" in refused.stderr
    done = train_process(*common, "plugins=[mine]", env=environment)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"mine_ema_nesterov-[0-9a-f]{8}", run_folder(tmp_path / "runs").parent.name)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "expected"),
    [(16, None, 1, 16), (512, None, 1, 64), (512, 64, 16, 32), (12, 2, 3, 2), (100, None, 1, 50)],
)
def test_the_batch_is_split_evenly(batch: int, micro: int | None, ranks: int, expected: int) -> None:
    cfg = composed(f"batch_size={batch}", f"micro_batch_size={'null' if micro is None else micro}")
    assert split_batch(cfg, ranks) == expected


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "advice"),
    [(16, None, 3, "type batch_size=15"), (16, 5, 1, "type micro_batch_size=4"), (1, None, 2, "type batch_size=2")],
)
def test_a_batch_that_does_not_divide_is_refused(batch: int, micro: int | None, ranks: int, advice: str) -> None:
    cfg = composed(f"batch_size={batch}", f"micro_batch_size={'null' if micro is None else micro}")
    with pytest.raises(ConfigError, match=advice):
        split_batch(cfg, ranks)
