"""What the tests of training share: runs in this process or in others, and what is done to them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ema_nesterov.training import loop
from ema_nesterov.training.folder import FINISHED, read_status
from ema_nesterov.training.run import run
from tests.conftest import ROOT, TINY, assert_same, composed, final_state, read_metrics, run_folder


def train(runs: Path, sample: Path, *overrides: str, code: int = FINISHED) -> Path:
    """A run in this process; returns its folder."""
    assert run(composed(*TINY, f"runs_dir={runs}", f"dataset.path={sample}", *overrides)) == code
    return run_folder(runs)


def copied(folder: Path, runs: Path) -> Path:
    """The same run below another runs_dir."""
    parts = folder.parts[-3:]
    shutil.copytree(folder, runs.joinpath(*parts))
    return runs.joinpath(*parts)


def stop_after(folder: Path, step: int) -> None:
    """Make a finished run's folder look as if it had been killed after the checkpoint of `step`."""
    for path in (folder / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    status = read_status(folder)
    (folder / "status.json").write_text(json.dumps({**status, "status": "running"}), encoding="utf-8")


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Do something while a run of this process is in that step."""
    calls = iter(range(1, 10**6))
    norm = loop.gradient_norm

    def watched(*args: Any) -> torch.Tensor:
        if next(calls) == step:
            act()
        return norm(*args)

    monkeypatch.setattr(loop, "gradient_norm", watched)


def stop() -> None:
    """What SLURM does to this process; a thread hears it."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)


def assert_same_run(a: Path, b: Path, step: int = 10) -> None:
    assert read_metrics(a) == read_metrics(b)
    states = [final_state(folder, step) for folder in (a, b)]
    for state in states:
        del state["validated"]  # a stop leaves it to the next start
    assert_same(*states)
    assert_same(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"))


def started(*overrides: str, ranks: int = 0, configs: Path | None = None, **kwargs: Any) -> subprocess.Popen[str]:
    """scripts/train.py on its way; ranks > 0: under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script = [str(ROOT / "scripts" / "train.py"), *(["--config-dir", str(configs)] if configs else [])]
    command = [*(torchrun if ranks else [sys.executable]), *script, *TINY, *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return subprocess.Popen(command, **(pipes | kwargs))


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str], limit: float = 120) -> None:
    deadline = time.monotonic() + limit
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trained(runs: Path, step: int) -> Callable[[], bool]:
    return lambda: any(int(p.name[5:]) >= step for p in runs.glob("*/*/*/checkpoints/step_*"))


LONG = ("steps=100000", "eval_every=0", "probe_every=0", "checkpoint_every=5")


def workers(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    return [int(pid) for pid in children if "train.py" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")]


def plugin(folder: Path, module: str, code: str, group: str, config: str) -> dict[str, str]:
    """A user's module and the config that names it, below a folder; returns the environment that finds the module."""
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    (folder / group).mkdir(exist_ok=True)
    (folder / group / f"{module}.yaml").write_text(config, encoding="utf-8")
    return os.environ | {"PYTHONPATH": str(folder)}
