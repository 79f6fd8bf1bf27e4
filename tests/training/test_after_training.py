"""What can be done with a run that has trained."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Refused, read_metrics

Typed = Callable[..., str]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Types a script in this process, as starting another costs seconds; returns what it prints."""

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_an_evaluation_finds_the_losses_that_the_run_logged(straight: Path, typed: Typed) -> None:
    logged = read_metrics(straight)[-1]
    found = dict(re.findall(r"^ *([xye]) +([\d.]+)", typed("evaluate.py", f"run={straight}"), re.MULTILINE))
    keys = {"x": "val/loss", "y": "val/lookahead_loss", "e": "val/ema_loss"}
    assert found == {point: f"{logged[key]:.6f}" for point, key in keys.items()}


def test_an_earlier_step_and_fewer_tokens_are_another_loss(straight: Path, sample: Path, typed: Typed) -> None:
    output = typed("evaluate.py", f"run={straight}", "step=6", f"path={sample}", "tokens=512")
    assert "step 6" in output
    assert float(re.findall(r"^ *x +([\d.]+)", output, re.MULTILINE)[0]) > 6


def test_a_text_goes_on_the_same_for_a_seed(straight: Path, typed: Typed) -> None:
    arguments = [f"run={straight}", "prompt=The method returns", "tokens=12"]
    first, again = (typed("generate.py", *arguments, "seed=1") for _ in range(2))
    assert first == again
    assert first.startswith("The method returns")
    assert len(first) > len("The method returns") + 12
    assert typed("generate.py", *arguments, "seed=2", "samples=2") != first
    likeliest = {typed("generate.py", *arguments, "temperature=0", f"seed={seed}") for seed in (1, 2)}
    assert len(likeliest) == 1


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("evaluate.py", "run= is missing"),
        ("evaluate.py run=nowhere", "nowhere is no run folder"),
        ("evaluate.py run=RUN step=5", "has no whole checkpoint of step 5; it holds those of 3, 6, 9, 10"),
        ("evaluate.py run=RUN tokens=0", "tokens=0 must be at least 1"),
        ("evaluate.py run=RUN path=nowhere", "nowhere does not exist; type path=FOLDER"),
        ("generate.py run=RUN temperature=-1", "temperature=-1.0 must be at least 0"),
        ("generate.py run=RUN path=nowhere", "nowhere does not say which tokenizer"),
        ("generate.py run=RUN promt=x", "did you mean prompt?"),
    ],
)
def test_what_cannot_be_asked_is_told(command: str, line: str, refused: Refused, straight: Path) -> None:
    script, *arguments = command.replace("RUN", str(straight)).split()
    refused(script, arguments, line)
