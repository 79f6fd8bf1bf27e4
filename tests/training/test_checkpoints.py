"""Checkpoints are complete or absent, are passed over when damaged, and may begin other runs."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ema_nesterov.errors import ConfigError
from ema_nesterov.training import checkpoint
from ema_nesterov.training.checkpoint import Saver, list_checkpoints, load_checkpoint, save_checkpoint, whole
from ema_nesterov.training.folder import FINISHED, PREEMPTED, read_status
from ema_nesterov.training.run import run
from tests.conftest import TINY, assert_same, composed, final_state, read_metrics, run_folder
from tests.training.runs import assert_same_run, at_step, copied, stop, train


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    tmp_path: Path, straight: Path, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = copied(straight, tmp_path)
    before, state = read_metrics(straight), copy.deepcopy(final_state(straight))  # the file itself is mapped
    saved = list_checkpoints(straight / "checkpoints")
    for path, name in ((saved[-1], "tensors.safetensors"), (saved[-2], "state.json")):
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
    (saved[-3] / "SHA256SUMS").unlink()
    status = straight / "status.json"
    status.write_text(json.dumps({**read_status(straight), "status": "running"}), encoding="utf-8")
    train(tmp_path, sample)
    assert capsys.readouterr().out.count("is damaged; going on from the one before it") == 3
    assert (read_metrics(straight), read_status(straight)["resumed_from"]) == (before, 3)
    assert_same(final_state(straight), state)
    for path in list_checkpoints(straight / "checkpoints"):
        (path / "state.json").write_text("{}", encoding="utf-8")
    status.write_text(json.dumps({**read_status(straight), "status": "running"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="are damaged and there is no other; delete"):
        train(tmp_path, sample)


def test_every_nth_checkpoint_stays_and_latest_names_the_newest(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=2, keep_every=4, asynchronous=True)
    tensor = torch.zeros(1000)
    for step in range(1, 11):
        tensor.fill_(step)
        saver.save(step, {"step": step, "tensor": tensor})
        tensor.fill_(-1)  # training goes on: what is saved is what was
    saver.wait()
    saver.close()
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step_{i:08d}" for i in (4, 8, 9, 10)]
    assert (tmp_path / "latest").read_text(encoding="utf-8") == "step_00000010\n"
    for path in list_checkpoints(tmp_path):
        assert whole(path)
        assert load_checkpoint(path)["tensor"].unique().item() == int(path.name[5:])
    check = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=path, capture_output=True, check=False)
    assert check.returncode == 0


def test_asynchronous_checkpoints_are_those_of_the_step(tmp_path: Path, sample: Path) -> None:
    folders = [train(tmp_path / x, sample, f"trainer.async_checkpoints={x}") for x in ("true", "false")]
    for step in (3, 6, 9, 10):
        assert_same(final_state(folders[0], step), final_state(folders[1], step))


@pytest.mark.parametrize(
    ("version", "then"), [(99, "update ema-nesterov"), (1, "finish the run with the version that began it")]
)
def test_a_checkpoint_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, then: str
) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", version)
    path = save_checkpoint(tmp_path, 1, {"step": 1}, 1)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=f"has format {version}, this version reads 2; {then}"):
        load_checkpoint(path)
    assert whole(path)  # so that it is not passed over in silence


# --- forks ----------------------------------------------------------------------------------------


def test_a_fork_with_nothing_changed_is_the_run_itself(tmp_path: Path, straight: Path, sample: Path) -> None:
    origin = copied(straight, tmp_path / "origin")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, stop)
        fork = train(tmp_path / "fork", sample, f"fork_from={origin}@6", code=PREEMPTED)
    shutil.rmtree(origin)  # no longer needed
    train(tmp_path / "fork", sample, f"fork_from={origin}@6")
    assert fork.parent.name != straight.parent.name
    assert_same_run(straight, fork)


def test_decays_branch_off_one_plateau(tmp_path: Path, sample: Path) -> None:
    """Up to the fork's end its learning rate is the schedule's; a wrapper begins anew at x."""
    plateau = ["schedule.decay_steps=0", "steps=9"]
    tiny = [o for o in TINY if not o.startswith("lookahead.")]
    trunk = run(composed(*tiny, "lookahead=none", "probe_every=0", *plateau, f"runs_dir={tmp_path / 'trunk'}",
                         f"dataset.path={sample}"))  # fmt: skip
    assert trunk == FINISHED
    start = run_folder(tmp_path / "trunk")
    for look in ("none", "ema_nesterov", "lookahead"):
        branch = ["steps=8", "schedule.decay_steps=2", f"lookahead={look}", "probe_every=0", f"fork_from={start}@6"]
        code = run(composed(*tiny, *branch, f"runs_dir={tmp_path / look}", f"dataset.path={sample}"))
        assert code == FINISHED
        lines = [m for m in read_metrics(run_folder(tmp_path / look)) if "train/loss" in m]
        trained = [m for m in read_metrics(start) if "train/loss" in m]
        assert [m["step"] for m in lines] == list(range(1, 9))
        assert lines[:7] == [m | {"optim/alpha": n["optim/alpha"]} for m, n in zip(trained, lines, strict=False)][:7]
        assert lines[7]["optim/lr"] == pytest.approx(lines[6]["optim/lr"] / 2)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("model.width=64", "model.width=64 cannot carry over from .*, which has 32; type model.width=32"),
        ("seed=1", "seed=1 cannot carry over"),
        ("optimizer.lr=0.5", "optimizer.lr=0.5 cannot carry over"),
        ("batch_size=6", "batch_size=6 cannot carry over"),
        ("fork_from=FOLDER@5", "has no checkpoint of step 5, but of 3, 6, 9, 10"),
        ("fork_from=nowhere@5", "nowhere is no run folder"),
        ("fork_from=FOLDER", "must be RUN_FOLDER@STEP"),
        ("steps=6", "steps=6 must be above the 6 of fork_from"),
    ],
)
def test_what_cannot_carry_over_is_refused(
    tmp_path: Path, straight: Path, sample: Path, change: str, line: str
) -> None:
    change = change.replace("FOLDER", str(straight))
    with pytest.raises(ConfigError, match=line):
        train(tmp_path, sample, f"fork_from={straight}@6", change)
    assert not list(tmp_path.rglob("status.json"))
