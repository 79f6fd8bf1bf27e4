"""What a person types wrongly ends in one line on stderr, exit code 2, and no run folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ema_nesterov.data.shards import write_shard
from tests.conftest import ROOT, train_process

WRONG = [
    (["lookahead.alhpa=0.5"], "unknown key lookahead.alhpa; did you mean lookahead.alpha?"),
    (["stpes=3"], "unknown key stpes; did you mean steps?"),
    (["modle=tiny"], "unknown key modle; did you mean model?"),
    (["+lookahead.foo=1"], "unknown key lookahead.foo"),
    (["model=tinny"], "unknown option model=tinny; did you mean model=tiny?"),
    (["experiment=quikstart/muon"], "did you mean experiment=quickstart/muon?"),
    (["steps=many"], "'many' of type 'str' could not be converted to Integer"),
    (["optimizer=adamw", "optimizer.momentum=0.9"], "optimizer has name, lr, betas, eps, weight_decay"),
    (["experiment=quickstart/muon_ema_nesterov", "lookahead=none"], "the experiment sets lookahead.alpha"),
    (["lookahead"], "missing EQUAL"),
    (["model=null"], "must be a string or a list"),
    (["dataset=fineweb", "model=nanogpt_124m", "dataset.path=nowhere"], "dataset folder nowhere does not exist"),
    (["dataset.path=EMPTY"], "no shards *_train_*.bin in"),
    (["dataset.path=CUT"], "is cut short or damaged"),
    (["micro_batch_size=5"], "type micro_batch_size=4"),
    (["trainer.device=cuda"], "type trainer.device=cpu"),
    (["steps=1000000"], "type steps="),
    (["runs_dir=FILE"], "type runs_dir=FOLDER"),
]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "cut").mkdir()
    for split in ("train", "val"):
        path = tmp_path / "cut" / f"x_{split}_000000.bin"
        write_shard(path, np.arange(4000))
        path.write_bytes(path.read_bytes()[:-100])
    return {"EMPTY": str(tmp_path / "empty"), "FILE": str(tmp_path / "file"), "CUT": str(tmp_path / "cut")}


@pytest.mark.parametrize(("arguments", "line"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, folders: dict[str, str], sample: Path, tmp_path: Path
) -> None:
    for name, folder in folders.items():
        arguments = [a.replace(name, folder) for a in arguments]
    if not any(a.startswith(("dataset.path", "dataset=")) for a in arguments):
        arguments = [*arguments, f"dataset.path={sample}"]
    if not any(a.startswith("runs_dir") for a in arguments):
        arguments = [*arguments, f"runs_dir={tmp_path / 'runs'}"]
    done = train_process(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert line in done.stderr
    assert not (tmp_path / "runs").exists()


def test_under_torchrun_rank_0_says_it_once(tmp_path: Path, sample: Path) -> None:
    done = train_process("batch_size=15", f"dataset.path={sample}", f"runs_dir={tmp_path / 'runs'}", ranks=2)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: batch_size=15 does not divide over 2 ranks; type batch_size=16") == 1
    assert not (tmp_path / "runs").exists()


def script(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


def test_help_names_the_groups_and_the_keys(tmp_path: Path) -> None:
    done = script("train.py", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for text in (
        "lookahead: ema_nesterov, gpa, lookahead, nala, nesterov, none, snoo",
        "experiment=quickstart/muon",
        "batch_size: 16",
        "--cfg job",
    ):
        assert text in done.stdout


def test_cfg_job_shows_the_config_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = script("train.py", "experiment=quickstart/muon_ema_nesterov", "--cfg", "job", cwd=tmp_path)
    assert "ema_decay: 0.99" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["runz=x"], "unknown key runz; did you mean runs?"),
        (["runs=nowhere"], "nowhere does not exist"),
        (["runs"], "is not KEY=VALUE"),
    ],
)
def test_report_refuses_bad_input_in_one_line(tmp_path: Path, arguments: list[str], line: str) -> None:
    done = script("report.py", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert line in done.stderr
