"""Losses and gradients that are not finite: no rank takes the step, and a run that stays bad names the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_nesterov.training import health, loop
from ema_nesterov.training.checkpoint import list_checkpoints
from ema_nesterov.training.folder import DIVERGED, FINISHED, PREEMPTED, read_status
from ema_nesterov.training.run import run
from tests.conftest import TINY, composed, final_state, read_metrics, run_folder, train_process
from tests.training.runs import assert_same_run, at_step, plugin, stop, train


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], gradient: bool = False) -> None:
    """Make the loss, or the gradient alone, of these steps not a number."""
    calls = iter(range(1, 10**6))
    whole_pass = loop.forward_backward

    def poisoned(replica: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = whole_pass(replica, *args, **kwargs)
        if next(calls) in steps:
            next(p for p in replica.parameters()).grad[0, 0] = float("inf")  # type: ignore[index]
            return loss if gradient else loss * float("nan")
        return loss

    monkeypatch.setattr(loop, "forward_backward", poisoned)


@pytest.mark.parametrize("look", ["none", "ema_nesterov", "lookahead"])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_bad_step_is_not_taken_but_counts_and_resumes(
    tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch, look: str, gradient: bool
) -> None:
    overrides = ["lookahead.k=2"] if look == "lookahead" else []
    tiny = TINY if look == "ema_nesterov" else [o for o in TINY if not o.startswith("lookahead.")]
    cfg = [*tiny, f"lookahead={look}", "probe_every=0", *overrides, f"dataset.path={sample}"]
    folders = []
    for name in ("straight", "stopped"):
        with monkeypatch.context() as patch:
            poison(patch, {3, 4, 8}, gradient)
            if name == "stopped":
                at_step(patch, 4, stop)
            code = run(composed(*cfg, f"runs_dir={tmp_path / name}"))
        folders.append(run_folder(tmp_path / name))
        assert code == (PREEMPTED if name == "stopped" else FINISHED)
    lines = read_metrics(folders[0])
    assert [(m["step"], m["train/skipped"]) for m in lines if "train/skipped" in m] == [(3, 1), (4, 2), (8, 3)]
    assert final_state(folders[0])["watch"]["skipped"] == 3
    for line in (folders[0] / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        assert "NaN" not in line
        assert "Infinity" not in line
    with monkeypatch.context() as patch:
        poison(patch, {4}, gradient)  # the eighth step is the fourth of those that are left
        assert run(composed(*cfg, f"runs_dir={tmp_path / 'stopped'}")) == FINISHED
    assert_same_run(*folders)


def test_a_run_whose_numbers_stay_bad_saves_and_exits_86(
    tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(3, 100)))
    folder = train(tmp_path, sample, "trainer.max_bad_steps=4", code=DIVERGED)
    status = read_status(folder)
    assert (status["status"], status["exit_code"], status["step"], status["ranks"]) == ("diverged", 86, 6, [0])
    assert "sample_train_" in status["data"][0]
    assert "the last of 4 steps in a row at step 6 (rank 0 read 12 sequences, the first at token" in status["message"]
    assert list_checkpoints(folder / "checkpoints")[-1].name == "step_00000006"
    assert all(t.isfinite().all() for t in final_state(folder, 6)["model"].values())


def test_a_learning_rate_far_too_large_diverges(tmp_path: Path, sample: Path) -> None:
    folder = train(tmp_path, sample, "optimizer=adamw", "optimizer.lr=1e30", code=DIVERGED)
    assert "smaller learning rate" in read_status(folder)["message"]


def test_the_rank_whose_numbers_are_bad_is_named_by_all(tmp_path: Path, sample: Path) -> None:
    """The losses of a step are numbers, one rank's gradient is not; no rank takes the step."""
    code = (
        "import os, torch\n"
        "from ema_nesterov.models import NanoGPT124M\n"
        "class Fragile(NanoGPT124M):\n"
        "    calls = 0\n"
        "    def forward(self, inputs, targets=None):\n"
        "        out = super().forward(inputs, targets)\n"
        "        self.calls += self.training\n"
        "        if os.environ['RANK'] == '1' and self.training and self.calls > 1 + 3 * 4:\n"
        "            out.register_hook(lambda g: g * float('nan'))\n"
        "        return out\n"
        "def fragile(): return Fragile(4096, 1, 2, 16)\n"
    )
    environment = plugin(tmp_path, "fragile", code, "model", "_target_: fragile.fragile\nname: fragile\n")
    tiny = [o for o in TINY if not o.startswith(("model", "batch_size", "micro"))]
    common = ["--config-dir", str(tmp_path), *tiny, "model=fragile", "plugins=[fragile]", "batch_size=16"]
    common += [f"dataset.path={sample}", "micro_batch_size=2", "trainer.max_bad_steps=3", "eval_every=0"]
    done = train_process(*common, f"runs_dir={tmp_path / 'runs'}", ranks=2, env=environment)
    status = read_status(run_folder(tmp_path / "runs"))
    assert (status["status"], status["step"], status["ranks"]) == ("diverged", 6, [1]), done.stderr
    skipped = [m["step"] for m in read_metrics(run_folder(tmp_path / "runs")) if "train/skipped" in m]
    assert skipped == [4, 5, 6]


def test_spikes_are_measured_against_the_losses_before_and_skipped_where_wished() -> None:
    watch = health.Watch(window=8, skip_spikes=4.0)
    usual = [3.0, 3.1, 2.9, 3.0, 3.2, 2.8, 3.0, 3.0]
    for loss in usual:
        assert not watch.judge(health.Health(loss, 1.0, [], False))
        assert watch.zscore is None
    assert "standard deviations above" in watch.judge(health.Health(9.0, 1.0, [], False))
    spread = torch.tensor(usual, dtype=torch.float64).std(correction=0).item()
    assert watch.zscore == pytest.approx((9.0 - 3.0) / spread)
    assert (watch.skipped, watch.in_a_row) == (1, 0)
    for _ in range(3):  # a lasting shift is no spike for long
        last = watch.judge(health.Health(9.0, 1.0, [], False))
    assert not last
    again = health.Watch(window=8, skip_spikes=4.0)
    again.resume(json.loads(json.dumps(watch.state())))
    assert again.judge(health.Health(5.0, 1.0, [], False)) == watch.judge(health.Health(5.0, 1.0, [], False))
    assert again.zscore == watch.zscore
