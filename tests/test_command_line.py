"""The commands as they are typed, in processes of their own; tests/test_bad_input.py has all that they refuse."""

from __future__ import annotations

import runpy
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from tests.conftest import ROOT, train_process


def test_bad_input_is_one_line_and_exit_code_2_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was loaded')", encoding="utf-8")
    done = train_process("lookahead.alhpa=0.5", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: unknown key lookahead.alhpa; did you mean lookahead.alpha?\n"
    assert not done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["torch.py"]


def test_under_torchrun_rank_0_says_it_once(tmp_path: Path) -> None:
    done = train_process("batch_size=15", f"runs_dir={tmp_path / 'runs'}", ranks=2)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: batch_size=15 does not divide over 2 ranks; type batch_size=16") == 1
    assert not (tmp_path / "runs").exists()


def printed(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / "train.py"), *arguments])
    GlobalHydra.instance().clear()
    with suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
    return capsys.readouterr().out


def test_help_names_the_groups_and_the_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = printed(["--help"], monkeypatch, capsys)
    for text in (
        "lookahead: ema_nesterov, gpa, lookahead, nala, nesterov, none, snoo",
        "experiment=quickstart/muon",
        "batch_size: 16",
        "--cfg job",
    ):
        assert text in told


def test_cfg_job_shows_the_config_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = printed(["experiment=quickstart/muon_ema_nesterov", "--cfg", "job"], monkeypatch, capsys)
    assert "ema_decay: 0.99" in told
    assert not list(tmp_path.iterdir())
