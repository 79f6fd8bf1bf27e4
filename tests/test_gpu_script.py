"""scripts/gpu.sh with an interpreter that only writes down what it is asked: is each command one that can be given?"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from ema_nesterov.cli import composed
from ema_nesterov.config import check
from tests.conftest import ROOT

SCRIPT = ROOT / "scripts" / "gpu.sh"


def asked(tmp_path: Path, minutes: str) -> tuple[list[list[str]], str]:
    """The commands, and what the script says."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f'#!/bin/sh\nprintf "%s " "$@" >>{log}; echo >>{log}; test "$2" != compare\n', encoding="utf-8")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), minutes], capture_output=True, encoding="utf-8", env={**os.environ, "PYTHON": str(python)}
    )
    assert done.returncode == 0, done.stderr
    return [
        shlex.split(line) for line in log.read_text(encoding="utf-8").splitlines() if not line.startswith("-c ")
    ], done.stdout


def test_every_benchmark_composes(tmp_path: Path) -> None:
    commands, said = asked(tmp_path, "60")
    timed = [c[2:] for c in commands if c[1] in ("train", "compare")]
    assert len(timed) == 7
    for arguments in timed:
        own = ("b=", "warmup=", "timed=", "turns=", "record=")
        cfg = composed(ROOT / "configs", [a for a in arguments if not a.startswith(own)])
        check(cfg)
        assert cfg.batch_size % cfg.micro_batch_size == 0
        assert cfg.lookahead.name == "ema_nesterov"
    assert ["scripts/sweep.py", "run", "sweep=study/gpu", "exported=docs/results"] in commands
    assert "exit 1" in said  # the comparison failed, and the others went on
    assert said.count("exit 0") == len(commands) - 1


def test_what_there_is_no_time_for_is_told(tmp_path: Path) -> None:
    commands, said = asked(tmp_path, "0")
    assert commands == []
    assert said.count("no time") == 12
