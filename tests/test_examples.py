"""The examples learn, and a run of theirs that was interrupted ends at the same weights, bit for bit."""

from __future__ import annotations

import gc
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import ROOT, assert_same

WRAPPERS = ["none", "ema_nesterov", "nesterov", "nala", "lookahead", "snoo", "gpa"]
BASES = ["adamw", "sgd", "soap"]  # tests/optim has every pair
COMBINATIONS = [*(("muon", wrapper) for wrapper in WRAPPERS), *((base, "ema_nesterov") for base in BASES)]
COMBINATIONS.append(("muon --matrices-only", "ema_nesterov"))


@cache
def example(name: str) -> ModuleType:
    """The example as a module, for runs within this process."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    gc.freeze()  # Trainer collects garbage at every start: what imports made need not be searched each time
    return module


def run_process(name: str, arguments: list[str]) -> str:
    """The example as its user runs it: what it printed."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_fork(name: str, arguments: list[str], printed: Path) -> str:
    """The same in a process that has imported what the example imports, and has run none: its imports take seconds."""

    def child() -> None:
        with open(printed, "w", encoding="utf-8") as file, redirect_stdout(file):
            main(arguments)

    main = example(name).main
    process = get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0
    return printed.read_text(encoding="utf-8")


def validation_losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"validation loss ([\d.]+)", printed)]


def assert_falls(losses: list[float]) -> None:
    assert len(losses) > 1
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


# --- plain_loop.py --------------------------------------------------------------------------------


def test_plain_loop_learns_and_resumes_in_a_new_process_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--steps", "16", "--width", "32", "--eval-every", "4", "--out"]
    main = example("plain_loop").main
    main([*small, str(tmp_path / "straight")])
    assert_falls(validation_losses(capsys.readouterr().out))

    main([*small, str(tmp_path / "resumed"), "--stop-after", "8"])
    assert not (tmp_path / "resumed" / "model.pt").exists()
    run_process("plain_loop", [*small, str(tmp_path / "resumed"), "--resume"])
    assert_same(torch.load(tmp_path / "resumed" / "model.pt"), torch.load(tmp_path / "straight" / "model.pt"))


# --- hf_trainer.py --------------------------------------------------------------------------------


def trainer_arguments(out: Path, base: str = "muon", lookahead: str = "ema_nesterov") -> list[str]:
    """A small run that evaluates at steps 6 and 12 and saves at 3, 6, 9 and 12."""
    sizes = ["--steps", "12", "--width", "16", "--eval-every", "6", "--save-every", "3"]
    return ["--base", *base.split(), "--lookahead", lookahead, *sizes, "--out", str(out)]


def exported(out: Path) -> dict[str, Tensor]:
    return load_file(out / "final" / "model.safetensors")


def interrupted(out: Path, step: int) -> Path:
    """A folder as the run of `out` would have left it, had it been stopped after this step."""
    copy = out.with_name(f"{out.name}_{step}")
    shutil.copytree(out / f"checkpoint-{step}", copy / f"checkpoint-{step}")
    return copy


def assert_trainer_learns(out: Path) -> None:
    history = json.loads((out / "checkpoint-12" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    for key in ("loss", "eval_loss"):
        assert_falls([line[key] for line in history if key in line])


@pytest.mark.parametrize(("base", "lookahead"), COMBINATIONS, ids=["-".join(c) for c in COMBINATIONS])
def test_trainer_learns_and_resumes_bit_for_bit_from_either_mode(tmp_path: Path, base: str, lookahead: str) -> None:
    main = example("hf_trainer").main
    out = tmp_path / "run"
    main(trainer_arguments(out, base, lookahead))
    assert_trainer_learns(out)
    # the weights that were exported are those of the last evaluation
    assert_same(exported(out), load_file(out / "checkpoint-12" / "model.safetensors"))

    for step, training in ((6, 0), (9, 1)):  # saved right after an evaluation; between two
        state = torch.load(out / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"]
        modes = {v for entries in state.values() for key, v in entries.items() if key.endswith(".training")}
        assert modes == (set() if lookahead == "none" else {training})
        copy = interrupted(out, step)
        main([*trainer_arguments(copy, base, lookahead), "--resume"])
        assert_same(exported(copy), exported(out), f"from step {step}")


def test_trainer_resumes_in_a_new_process_bit_for_bit(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_fork("hf_trainer", trainer_arguments(out), tmp_path / "printed")
    copy = interrupted(out, 6)
    run_fork("hf_trainer", [*trainer_arguments(copy), "--resume"], tmp_path / "printed")
    assert_same(exported(copy), exported(out))


# --- lightning_module.py --------------------------------------------------------------------------


def test_lightning_learns_and_resumes_in_a_new_process_bit_for_bit(tmp_path: Path) -> None:
    small = ["--epochs", "4", "--epoch-batches", "4", "--width", "32", "--out"]
    told = run_fork("lightning_module", [*small, str(tmp_path / "straight")], tmp_path / "printed")
    assert_falls(validation_losses(told))

    middle = tmp_path / "straight" / "epoch=1.ckpt"
    resume = [*small, str(tmp_path / "resumed"), "--resume", str(middle)]
    run_fork("lightning_module", resume, tmp_path / "printed")
    straight = torch.load(tmp_path / "straight" / "model.pt")
    assert_same(torch.load(tmp_path / "resumed" / "model.pt"), straight)
    # the weights of a checkpoint are those that were validated, and so are the exported ones
    assert_same(torch.load(tmp_path / "straight" / "epoch=3.ckpt")["state_dict"], straight)
