"""Disks that fill, folders that are taken, data that changes: nothing is lost, and one line says what happened."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_nesterov.errors import ConfigError, DataError
from ema_nesterov.training import loop
from ema_nesterov.training.checkpoint import list_checkpoints
from ema_nesterov.training.folder import FAILED, PREEMPTED, read_status
from ema_nesterov.training.run import run
from tests.conftest import TINY, composed, read_metrics, run_folder
from tests.stress.kill_resume import survive
from tests.training.runs import LONG, assert_same_run, at_step, copied, started, stop, train, trained, wait_for


def full_disk(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """No file of this process may grow beyond 64 kB from the first of these steps to before the second."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = iter([(1 << 16, hard), (soft, hard)])
    seen = iter(range(1, 10**6))
    norm = loop.gradient_norm

    def watched(*args: Any) -> torch.Tensor:
        if next(seen) in steps:
            resource.setrlimit(resource.RLIMIT_FSIZE, next(limits))
        return norm(*args)

    monkeypatch.setattr(loop, "gradient_norm", watched)


def test_training_goes_on_while_the_disk_is_full(
    tmp_path: Path, straight: Path, sample: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        full_disk(patch, 5, 8)
        folder = train(tmp_path / "full", sample)
    output = capsys.readouterr().out
    assert "the checkpoint of step 6 is not saved (File too large); the last one is step_00000003; make room" in output
    assert [p.name for p in list_checkpoints(folder / "checkpoints")] == [f"step_{i:08d}" for i in (3, 9, 10)]
    assert not list((folder / "checkpoints").glob(".step*"))
    assert_same_run(straight, folder)


def test_a_run_that_cannot_save_its_end_says_so_and_ends_later(
    tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        full_disk(patch, 8)
        try:
            folder = train(tmp_path, sample, code=FAILED)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large; make room, then type the same command to go on" in capsys.readouterr().err
    assert read_status(folder)["status"] == "failed"
    train(tmp_path, sample)
    assert read_status(folder)["resumed_from"] == 6


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting takes root")
def test_a_full_file_system_loses_no_line_of_metrics(tmp_path: Path, sample: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(runs)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        overrides = ["steps=30", "checkpoint_every=4", "probe_every=0", "trainer.keep_checkpoints=1"]
        process = started(*overrides, f"dataset.path={sample}", f"runs_dir={runs}")
        wait_for(trained(runs, 4), process)
        filler = runs / "filler"
        with open(filler, "wb", buffering=0) as f:
            try:
                while f.write(bytes(4096)):
                    pass
            except OSError:
                pass
        lines = process.stdout
        assert lines is not None
        while "cannot be" not in (line := lines.readline()) and "is not saved" not in line:
            assert line
        filler.unlink()
        assert process.wait(timeout=120) == 0
        folder = run_folder(runs)
        steps = [m["step"] for m in read_metrics(folder) if "train/loss" in m]
        assert steps == list(range(1, 31))
        assert read_status(folder)["status"] == "finished"
    finally:
        subprocess.run(["umount", str(runs)], check=True)


def test_one_process_trains_in_a_folder(tmp_path: Path, sample: Path) -> None:
    overrides = (f"dataset.path={sample}", f"runs_dir={tmp_path}")
    first = started(*LONG, *overrides)
    wait_for(trained(tmp_path, 5), first)
    with pytest.raises(ConfigError, match=rf"process {first.pid} on \S+ trains in .*; wait for it, stop it, or type"):
        run(composed(*TINY, *LONG, *overrides))
    first.kill()
    first.communicate()
    (run_folder(tmp_path) / "STOP").touch()  # left over: it stops nothing
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, stop)
        assert run(composed(*TINY, *LONG, *overrides)) == PREEMPTED


def test_a_folder_that_holds_another_run_or_other_code_is_told(
    tmp_path: Path, straight: Path, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(straight, tmp_path)
    status, path = folder / "status.json", folder / "config.yaml"
    status.write_text(json.dumps({**read_status(folder), "status": "running"}), encoding="utf-8")
    saved = path.read_text(encoding="utf-8")
    path.write_text(saved.replace("# torch: ", "# torch: 1."), encoding="utf-8")
    train(tmp_path, sample)
    assert f"warning: torch is {torch.__version__}, was 1.{torch.__version__}" in capsys.readouterr().out
    assert f"# from step 10 on\n# torch: {torch.__version__}" in path.read_text(encoding="utf-8")
    status.write_text(json.dumps({**read_status(folder), "status": "running"}), encoding="utf-8")
    path.write_text(saved.replace("seq_len: 32", "seq_len: 64"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"says seq_len=64, this command seq_len=32; type seq_len=64, or runs_dir="):
        train(tmp_path, sample)


def test_a_shard_that_is_altered_or_goes_while_it_is_read_ends_the_run(
    tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, harm in (("touched", os.utime), ("gone", os.unlink)):
        shutil.copytree(sample, tmp_path / name)
        (shard,) = (tmp_path / name).glob("*train*")
        with monkeypatch.context() as patch:
            at_step(patch, 3, lambda shard=shard, harm=harm: harm(shard))
            with pytest.raises(DataError, match="was altered or taken away while it was read; put it back"):
                train(tmp_path / f"runs_{name}", tmp_path / name)
        assert read_status(run_folder(tmp_path / f"runs_{name}"))["exit_code"] == 2


def test_neither_the_clock_nor_the_host_matters(
    tmp_path: Path, straight: Path, sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 7, stop)
        moved = train(tmp_path / "moved", sample, code=PREEMPTED)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 1.0)
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        train(tmp_path / "moved", sample)
    assert_same_run(straight, moved)
    times = [json.loads(line)["time"] for line in (moved / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert times == sorted(times)


def test_the_short_kill_test_survives(sample: Path, tmp_path: Path) -> None:
    assert survive(kills=1, ranks=1, seed=1, steps=20, overrides=[f"dataset.path={sample}"], folder=tmp_path) >= 1
