"""Run folders that someone, or something, has been at: the run goes on, or one line says what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ema_nesterov.errors import ConfigError
from ema_nesterov.training.checkpoint import SUMS, Saver, list_checkpoints
from ema_nesterov.training.folder import FAILED, PREEMPTED, read_status
from tests.conftest import final_state, read_metrics
from tests.training.runs import assert_same_run, at_step, copied, started, stop, stop_after, train


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def resummed(checkpoint: Path) -> None:
    """Make the sums those of the files as they are."""
    names = ("tensors.safetensors", "state.json")
    done = subprocess.run(["sha256sum", *names], cwd=checkpoint, capture_output=True, encoding="utf-8", check=True)
    (checkpoint / SUMS).write_text(done.stdout, encoding="utf-8")


def directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


STATE, TENSORS = "checkpoints/step_00000009/state.json", "checkpoints/step_00000009/tensors.safetensors"
GOES_ON: dict[str, Callable[[Path], object]] = {
    "status.json is a list": lambda f: (f / "status.json").write_text("[1]", encoding="utf-8"),
    "config.yaml is gone": lambda f: (f / "config.yaml").unlink(),
    "lines stand twice": lambda f: rewrite(
        f / "metrics.jsonl", lambda t: "".join(2 * (x + "\n") for x in t.split("\n"))
    ),
    "latest is a folder": lambda f: directory(f / "checkpoints" / "latest"),
    "a state that is a list": lambda f: ((f / STATE).write_text("[]", encoding="utf-8"), resummed((f / STATE).parent)),
    "a state without a format": lambda f: (
        (f / STATE).write_text("{}", encoding="utf-8"),
        resummed((f / STATE).parent),
    ),
    "half of the tensors": lambda f: (os.truncate(f / TENSORS, 1000), resummed((f / STATE).parent)),
    "a later step's name": lambda f: shutil.copytree((f / STATE).parent, f / "checkpoints" / "step_00000099"),
    "a file for a checkpoint": lambda f: (f / "checkpoints" / "step_00000010").write_text("", encoding="utf-8"),
    "an old STOP": lambda f: ((f / "STOP").touch(), os.utime(f / "STOP", (1, 1))),
}


@pytest.mark.parametrize("harm", GOES_ON)
def test_a_run_goes_on_where_it_can(tmp_path: Path, straight: Path, sample: Path, harm: str) -> None:
    folder = copied(straight, tmp_path)
    stop_after(folder, 9)
    GOES_ON[harm](folder)
    train(tmp_path, sample)
    assert_same_run(straight, folder)
    assert read_status(folder)["status"] == "finished"


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "config.yaml is no text": (lambda f: (f / "config.yaml").write_bytes(b"\xff\xfe"), r"config.yaml cannot be read"),
    "config.yaml is a folder": (lambda f: directory(f / "config.yaml"), r"config.yaml cannot be read"),
    "metrics.jsonl is a folder": (lambda f: directory(f / "metrics.jsonl"), r"metrics.jsonl cannot be written"),
    "STOP is a folder": (lambda f: (f / "STOP").mkdir() or os.utime(f / "STOP", (1, 1)), r"STOP cannot be deleted"),
    "a state of another shape": (
        lambda f: (rewrite(f / STATE, lambda t: t.replace('"seconds"', '"secomds"')), resummed((f / STATE).parent)),
        r"step_00000009 is not what this run needs \(KeyError: 'seconds'\); delete it",
    ),
}


@pytest.mark.parametrize("harm", REFUSED)
def test_or_one_line_says_what_is_wrong(tmp_path: Path, straight: Path, sample: Path, harm: str) -> None:
    folder = copied(straight, tmp_path)
    stop_after(folder, 9)
    act, line = REFUSED[harm]
    act(folder)
    with pytest.raises(ConfigError, match=line):
        train(tmp_path, sample)


@pytest.mark.parametrize("keep", [0, 4, 17])
def test_a_resumed_run_says_which_metrics_are_lost(
    tmp_path: Path, straight: Path, sample: Path, capsys: pytest.CaptureFixture[str], keep: int
) -> None:
    folder = copied(straight, tmp_path)
    stop_after(folder, 9)
    rewrite(folder / "metrics.jsonl", lambda text: "".join(text.splitlines(keepends=True)[:keep]))
    last = max((line["step"] for line in read_metrics(folder)), default=0)
    rewrite(folder / "metrics.jsonl", lambda text: text + "17\n")
    train(tmp_path, sample)
    assert f"holds no line of steps {last + 1} to 9: it was cut, or taken away" in capsys.readouterr().out


def test_damaged_checkpoints_do_not_crowd_out_what_is_saved(
    tmp_path: Path, straight: Path, sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(straight, tmp_path)
    for path in list_checkpoints(folder / "checkpoints")[-2:]:
        (path / "tensors.safetensors").write_bytes(b"")
    rewrite(folder / "status.json", lambda text: text.replace("finished", "running"))
    with monkeypatch.context() as patch:
        at_step(patch, 1, stop)
        train(tmp_path, sample, "trainer.keep_checkpoints=1", code=PREEMPTED)
    assert read_status(folder)["step"] == 7
    assert list_checkpoints(folder / "checkpoints")[0].name == "step_00000007"
    train(tmp_path, sample, "trainer.keep_checkpoints=1")
    assert read_status(folder)["resumed_from"] == 7
    assert_same_run(straight, folder)


def test_a_resumed_run_holds_no_file_of_a_checkpoint_open(
    tmp_path: Path, straight: Path, sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is mapped keeps its room on the disk when it is deleted."""
    folder, maps = copied(straight, tmp_path), []
    stop_after(folder, 9)
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: maps.append(Path("/proc/self/maps").read_text(encoding="utf-8")))
        train(tmp_path, sample)
    assert not re.search(re.escape(str(folder)), maps[0])


def test_a_stop_that_cannot_save_is_no_preemption(
    tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: (patch.setattr(Saver, "_write", refuse), stop()))
        folder = train(tmp_path, sample, code=FAILED)
    assert "make room, then type the same command to go on" in capsys.readouterr().err
    assert (read_status(folder)["status"], read_status(folder)["step"]) == ("failed", 3)
    train(tmp_path, sample)
    assert read_status(folder)["resumed_from"] == 3


def test_a_stop_that_comes_while_a_run_begins_is_heard(tmp_path: Path, straight: Path, sample: Path) -> None:
    folder = copied(straight, tmp_path)
    stop_after(folder, 3)
    process = started(f"dataset.path={sample}", f"runs_dir={tmp_path}")
    (folder / "STOP").touch()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == PREEMPTED, output
    assert read_status(folder)["step"] == 4


def test_a_fork_copies_the_lines_of_bad_steps_as_they_are(tmp_path: Path, straight: Path, sample: Path) -> None:
    origin = copied(straight, tmp_path / "origin")
    rewrite(origin / "metrics.jsonl", lambda text: re.sub(r'"train/loss": [\d.]+', '"train/loss": null', text, count=1))
    fork = train(tmp_path / "fork", sample, f"fork_from={origin}@6")
    lines = [
        [json.loads(line) for line in (f / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for f in (origin, fork)
    ]
    assert lines[0][:6] == lines[1][:6]
    assert any(value is None for line in lines[1] for value in line.values())
    assert final_state(fork)["step"] == 10
