"""Runs that are stopped, fed bad numbers, or denied the disk: nothing is lost, and one line says what happened."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_nesterov.errors import ConfigError
from ema_nesterov.training import checkpoint, health, loop
from ema_nesterov.training.checkpoint import Saver, list_checkpoints, load_checkpoint, save_checkpoint, whole
from ema_nesterov.training.folder import DIVERGED, FINISHED, PREEMPTED, read_status
from ema_nesterov.training.run import run
from tests.conftest import (
    ROOT,
    TINY,
    assert_same,
    composed,
    final_state,
    read_metrics,
    run_folder,
    train_process,
)


def train(runs: Path, sample: Path, *overrides: str, code: int = FINISHED) -> Path:
    """A run in this process; returns its folder."""
    assert run(composed(*TINY, f"runs_dir={runs}", f"dataset.path={sample}", *overrides)) == code
    return run_folder(runs)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Do something while a run of this process is in that step."""
    calls = iter(range(1, 10**6))
    norm = loop.gradient_norm

    def watched(*args: Any) -> torch.Tensor:
        if next(calls) == step:
            act()
        return norm(*args)

    monkeypatch.setattr(loop, "gradient_norm", watched)


def assert_same_run(a: Path, b: Path, step: int = 10) -> None:
    assert read_metrics(a) == read_metrics(b)
    states = [final_state(folder, step) for folder in (a, b)]
    for state in states:
        del state["validated"]  # a stop leaves it to the next start
    assert_same(*states)


# --- preemption -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "SIGINT", "STOP"])
@pytest.mark.parametrize("step", [5, 7, 10])  # a step that is validated, one that is not, the last
def test_a_stopped_run_saves_and_goes_on_as_if_nothing_had_been(
    tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch, how: str, step: int
) -> None:
    if (how == "STOP") != (step == 7) and how != "SIGTERM":
        pytest.skip("each way at one step, and SIGTERM at all")
    straight = train(tmp_path / "straight", sample)

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


def started(*overrides: str, ranks: int = 0, configs: Path | None = None, **kwargs: Any) -> subprocess.Popen[str]:
    """scripts/train.py on its way; ranks > 0: under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script = [str(ROOT / "scripts" / "train.py"), *(["--config-dir", str(configs)] if configs else [])]
    command = [*(torchrun if ranks else [sys.executable]), *script, *TINY, *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, **(pipes | kwargs))


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], limit: float = 120) -> None:
    deadline = time.monotonic() + limit
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trained(runs: Path, step: int) -> Callable[[], bool]:
    return lambda: any(int(p.name[5:]) >= step for p in runs.rglob("step_*"))


LONG = ("steps=100000", "eval_every=0", "probe_every=0", "checkpoint_every=5")


def workers(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_under_torchrun_a_signal_to_all_processes_or_one_rank_stops_all_ranks(tmp_path: Path, sample: Path) -> None:
    """SLURM signals every process, torchrun passes it on besides; and one rank alone may hear of it."""
    for name in ("group", "one"):
        process = started(*LONG, f"dataset.path={sample}", f"runs_dir={tmp_path / name}", ranks=2, process_group=0)
        wait_for(trained(tmp_path / name, 5), process)
        if name == "group":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            os.kill(workers(process)[-1], signal.SIGUSR1)
        output = process.communicate(timeout=60)[0]
        status = read_status(run_folder(tmp_path / name))
        assert status["status"] == "preempted", output
        assert process.returncode == 1  # torchrun's own
        newest = list_checkpoints(run_folder(tmp_path / name) / "checkpoints")[-1]
        assert newest.name == f"step_{status['step']:08d}"
        assert whole(newest)
        assert output.count("type the same command to go on") == 1


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path, sample: Path) -> None:
    plugin = tmp_path / "slow.py"
    plugin.write_text(
        "import time, torch\n"
        "class Slow(torch.optim.SGD):\n"
        "    def step(self, closure=None):\n"
        "        print('stepping', flush=True); time.sleep(600)\n"
    )
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "slow.yaml").write_text("_target_: slow.Slow\nname: slow\nlr: 0.1\n")
    options = ["optimizer=slow", "plugins=[slow]", f"dataset.path={sample}", f"runs_dir={tmp_path}"]
    process = started(*options, configs=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
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


# --- numbers that go bad --------------------------------------------------------------------------


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
                at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(0.3))
            code = run(composed(*cfg, f"runs_dir={tmp_path / name}"))
        folders.append(run_folder(tmp_path / name))
        assert code == (PREEMPTED if name == "stopped" else FINISHED)
    lines = read_metrics(folders[0])
    assert [(m["step"], m["train/skipped"]) for m in lines if "train/skipped" in m] == [(3, 1), (4, 2), (8, 3)]
    assert final_state(folders[0])["watch"]["skipped"] == 3
    for line in (folders[0] / "metrics.jsonl").read_text().splitlines():
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
    """A token that one rank reads gives nan; no rank takes the step."""
    plugin = tmp_path / "fragile.py"
    plugin.write_text(
        "import os, torch\n"
        "from ema_nesterov.models import NanoGPT124M\n"
        "class Fragile(NanoGPT124M):\n"
        "    calls = 0\n"
        "    def forward(self, inputs, targets=None):\n"
        "        out = super().forward(inputs, targets)\n"
        "        self.calls += self.training\n"
        "        bad = os.environ['RANK'] == '1' and self.training and self.calls > 1 + 3 * 4\n"
        "        if bad and os.environ['BAD'] == 'gradient':\n"
        "            out.register_hook(lambda g: g * float('nan'))\n"
        "        return out * float('nan') if bad and os.environ['BAD'] == 'loss' else out\n"
        "def fragile(): return Fragile(4096, 1, 2, 16)\n"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "fragile.yaml").write_text("_target_: fragile.fragile\nname: fragile\n")
    tiny = [o for o in TINY if not o.startswith(("model", "batch_size", "micro"))]
    common = ["--config-dir", str(tmp_path), *tiny, "model=fragile", "plugins=[fragile]", "batch_size=16"]
    common += [f"dataset.path={sample}", "micro_batch_size=2", "trainer.max_bad_steps=3", "eval_every=0"]
    for bad in ("loss", "gradient"):
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "BAD": bad}
        done = train_process(*common, f"runs_dir={tmp_path / bad}", ranks=2, env=environment)
        status = read_status(run_folder(tmp_path / bad))
        assert (status["status"], status["step"], status["ranks"]) == ("diverged", 6, [1]), done.stderr
        skipped = [m["step"] for m in read_metrics(run_folder(tmp_path / bad)) if "train/skipped" in m]
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


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    tmp_path: Path, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = train(tmp_path, sample)
    before, state = read_metrics(straight), copy.deepcopy(final_state(straight))  # the file itself is mapped
    saved = list_checkpoints(straight / "checkpoints")
    for path, name in ((saved[-1], "tensors.safetensors"), (saved[-2], "state.json")):
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)
    (saved[-3] / "SHA256SUMS").unlink()
    status = straight / "status.json"
    status.write_text(json.dumps({**read_status(straight), "status": "running"}))
    train(tmp_path, sample)
    assert capsys.readouterr().out.count("is damaged; going on from the one before it") == 3
    assert (read_metrics(straight), read_status(straight)["resumed_from"]) == (before, 3)
    assert_same(final_state(straight), state)
    for path in list_checkpoints(straight / "checkpoints"):
        (path / "state.json").write_text("{}")
    status.write_text(json.dumps({**read_status(straight), "status": "running"}))
    with pytest.raises(ConfigError, match="are damaged and there is no other; delete"):
        train(tmp_path, sample)


def test_every_nth_checkpoint_stays_and_latest_names_the_newest(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=2, keep_every=4, asynchronous=True)
    tensor = torch.zeros(1000)
    for step in range(1, 11):
        tensor.fill_(step)
        saver.save(step, {"tensor": tensor})
        tensor.fill_(-1)  # training goes on: what is saved is what was
    saver.wait()
    saver.close()
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step_{i:08d}" for i in (4, 8, 9, 10)]
    assert (tmp_path / "latest").read_text() == "step_00000010\n"
    for path in list_checkpoints(tmp_path):
        assert whole(path)
        assert load_checkpoint(path)["tensor"].unique().item() == int(path.name[5:])
    check = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=path, capture_output=True, check=False)
    assert check.returncode == 0


def test_asynchronous_checkpoints_are_those_of_the_step(tmp_path: Path, sample: Path) -> None:
    folders = [train(tmp_path / x, sample, f"trainer.async_checkpoints={x}") for x in ("true", "false")]
    for step in (3, 6, 9, 10):
        assert_same(final_state(folders[0], step), final_state(folders[1], step))


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = save_checkpoint(tmp_path, 1, {"step": 1}, 1)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="has format 2, this version reads up to 1; update"):
        load_checkpoint(path)
