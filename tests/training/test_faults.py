"""Runs that are stopped, fed bad numbers, or denied the disk: nothing is lost, and one line says what happened."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_nesterov.errors import ConfigError, DataError
from ema_nesterov.training import checkpoint, health, loop
from ema_nesterov.training.checkpoint import Saver, list_checkpoints, load_checkpoint, save_checkpoint, whole
from ema_nesterov.training.folder import DIVERGED, FAILED, FINISHED, PREEMPTED, read_status
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
from tests.stress.kill_resume import survive


def train(runs: Path, sample: Path, *overrides: str, code: int = FINISHED) -> Path:
    """A run in this process; returns its folder."""
    assert run(composed(*TINY, f"runs_dir={runs}", f"dataset.path={sample}", *overrides)) == code
    return run_folder(runs)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Path:
    """The folder of a run that was left alone."""
    return train(tmp_path_factory.mktemp("straight"), sample)


def copied(folder: Path, runs: Path) -> Path:
    """The same run below another runs_dir."""
    parts = folder.parts[-3:]
    shutil.copytree(folder, runs.joinpath(*parts))
    return runs.joinpath(*parts)


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


# --- disks, folders and data ----------------------------------------------------------------------


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
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(0.3))
        assert run(composed(*TINY, *LONG, *overrides)) == PREEMPTED


def test_a_folder_that_holds_another_run_or_other_code_is_told(
    tmp_path: Path, straight: Path, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(straight, tmp_path)
    status, path = folder / "status.json", folder / "config.yaml"
    status.write_text(json.dumps({**read_status(folder), "status": "running"}))
    saved = path.read_text()
    path.write_text(saved.replace("# torch: ", "# torch: 1."))
    train(tmp_path, sample)
    assert f"warning: torch is {torch.__version__}, was 1.{torch.__version__}" in capsys.readouterr().out
    assert f"# from step 10 on\n# torch: {torch.__version__}" in path.read_text()
    status.write_text(json.dumps({**read_status(folder), "status": "running"}))
    path.write_text(saved.replace("seq_len: 32", "seq_len: 64"))
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
        at_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(0.3))
        moved = train(tmp_path / "moved", sample, code=PREEMPTED)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 1.0)
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        train(tmp_path / "moved", sample)
    assert_same_run(straight, moved)
    times = [json.loads(line)["time"] for line in (moved / "metrics.jsonl").read_text().splitlines()]
    assert times == sorted(times)


# --- forks ----------------------------------------------------------------------------------------


def test_a_fork_with_nothing_changed_is_the_run_itself(tmp_path: Path, straight: Path, sample: Path) -> None:
    origin = copied(straight, tmp_path / "origin")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(0.3))
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


def test_the_short_kill_test_survives(sample: Path, tmp_path: Path) -> None:
    assert survive(kills=2, ranks=2, seed=1, steps=20, overrides=[f"dataset.path={sample}"], folder=tmp_path) >= 1
