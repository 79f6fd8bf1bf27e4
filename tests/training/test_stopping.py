"""Runs that are asked to stop, or whose processes are killed, keep what was trained; the same command goes on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from ema_nesterov.training.checkpoint import list_checkpoints, whole
from ema_nesterov.training.folder import PREEMPTED, read_status
from tests.conftest import run_folder
from tests.training.runs import LONG, assert_same_run, at_step, plugin, started, train, trained, wait_for, workers


@pytest.mark.parametrize(("how", "step"), [("SIGTERM", 5), ("SIGUSR1", 10), ("SIGINT", 6), ("STOP", 7)])
def test_a_stopped_run_saves_and_goes_on_as_if_nothing_had_been(
    tmp_path: Path, straight: Path, sample: Path, monkeypatch: pytest.MonkeyPatch, how: str, step: int
) -> None:
    def ask() -> None:
        if how == "STOP":
            (run_folder(tmp_path / "stopped") / "STOP").touch()
            time.sleep(1)  # it is looked for once a second
        else:
            os.kill(os.getpid(), getattr(signal, how))
            time.sleep(0.3)  # heard by a thread

    with monkeypatch.context() as patch:
        at_step(patch, step, ask)
        stopped = train(tmp_path / "stopped", sample, code=PREEMPTED)
    status = read_status(stopped)
    assert (status["status"], status["exit_code"], status["step"]) == ("preempted", PREEMPTED, step)
    assert list_checkpoints(stopped / "checkpoints")[-1].name == f"step_{step:08d}"
    assert not (stopped / "STOP").exists()
    train(tmp_path / "stopped", sample)
    assert_same_run(straight, stopped)


def test_under_torchrun_a_signal_to_one_rank_stops_all_ranks(tmp_path: Path, sample: Path) -> None:
    process = started(*LONG, f"dataset.path={sample}", f"runs_dir={tmp_path}", ranks=2, process_group=0)
    wait_for(trained(tmp_path, 5), process)
    os.kill(workers(process)[-1], signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    status = read_status(run_folder(tmp_path))
    assert status["status"] == "preempted", output
    assert process.returncode == 1  # torchrun's own
    newest = list_checkpoints(run_folder(tmp_path) / "checkpoints")[-1]
    assert newest.name == f"step_{status['step']:08d}"
    assert whole(newest)
    assert output.count("type the same command to go on") == 1


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path, sample: Path) -> None:
    code = (
        "import time, torch\n"
        "class Slow(torch.optim.SGD):\n"
        "    def step(self, closure=None):\n"
        "        print('stepping', flush=True); time.sleep(600)\n"
    )
    environment = plugin(tmp_path, "slow", code, "optimizer", "_target_: slow.Slow\nname: slow\nlr: 0.1\n")
    options = ["optimizer=slow", "plugins=[slow]", f"dataset.path={sample}", f"runs_dir={tmp_path}"]
    process = started(*options, configs=tmp_path, env=environment)
    assert process.stdout is not None

    def read_until(text: str) -> None:
        lines = []
        while text not in "".join(lines[-1:]):
            lines.append(process.stdout.readline())  # type: ignore[union-attr]
            assert lines[-1], lines

    read_until("stepping")
    process.send_signal(signal.SIGTERM)
    read_until("a second one stops at once")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM


def test_when_a_rank_is_killed_the_others_end_and_say_so(tmp_path: Path, sample: Path) -> None:
    process = started(*LONG, f"dataset.path={sample}", f"runs_dir={tmp_path}", ranks=2)
    wait_for(trained(tmp_path, 5), process)
    before = time.monotonic()
    os.kill(workers(process)[-1], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert time.monotonic() - before < 40  # torchrun kills after 30 s what does not end by itself
    assert read_status(run_folder(tmp_path))["status"] in ("failed", "running", "preempted")
    assert "ema_nesterov/training" not in output  # no traceback but torchrun's own
