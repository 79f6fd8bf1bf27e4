"""The table of scripts/preflight.py, and its estimates beside what real steps and checkpoints take."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch._subclasses.fake_tensor import FakeTensorMode

from ema_nesterov.data.manifest import load_manifest
from ema_nesterov.optim.build import build_optimizer
from ema_nesterov.training.evaluate import at_iterate, copy_iterate, probe
from ema_nesterov.training.execution import autocast, compiles, model_on
from ema_nesterov.training.memory import compiled_bytes, estimate, fake_model, traced_bytes
from ema_nesterov.training.preflight import FAIL, OK, WARNING, merged, preflight
from ema_nesterov.training.run import run, split_batch
from tests.conftest import ROOT, TINY, composed, run_folder

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = ("model.layers=1", "model.width=128", "seq_len=256", "batch_size=4", "micro_batch_size=4", "probe_every=0")
SMALL += ("trainer.compile=false",)
CASES = {
    "tied, accumulating": (
        *("model=nanogpt_124m", "model.heads=4", "model.vocab_size=8192", *SMALL, "batch_size=8"),
        *("optimizer=muon", "lookahead=ema_nesterov", "lookahead.warmup_steps=0", "lookahead.rest_steps=0"),
    ),
    "transformers' model, eigenbases": (
        *("model=llama_60m", "model.mlp_width=344", "model.vocab_size=8192", *SMALL),
        *("optimizer=soap", "optimizer.precondition_frequency=1", "lookahead=gpa"),
    ),
    "probing, hardly any activations": (
        *("model=nanogpt_162m", "model.vocab_size=16384", *SMALL, "seq_len=32", "batch_size=1", "probe_every=5"),
        *("optimizer=adamw", "lookahead=snoo", "lookahead.k=1"),
    ),
    "products in bfloat16": (
        *("model=nanogpt_124m", "model.heads=4", "model.vocab_size=8192", *SMALL, "trainer.bfloat16=true"),
        *("optimizer=adamw", "lookahead=none"),
    ),
}


def train_a_step(cfg: DictConfig, device: torch.device) -> None:
    """What a run does in a step in which all happens, in the loop's own pieces."""
    model = model_on(cfg, device)
    optimizer = build_optimizer(model, cfg)
    compiled = torch.compile(model, dynamic=False) if compiles(cfg, device) else model
    tokens = torch.zeros(split_batch(cfg, 1), cfg.seq_len, dtype=torch.long, device=device)
    for _ in range(2):  # all state is there, and written
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    optimizer.zero_grad()
    for _ in range(cfg.batch_size // len(tokens)):
        with autocast(cfg, device):
            loss = compiled(tokens, tokens)
        loss.backward()
        del loss
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        evaluate = partial(compiled, tokens, tokens)
        if cfg.probe_every:
            next(probe(optimizer, copy_iterate(optimizer), evaluate))
        with at_iterate(optimizer):
            evaluate()


MEASURE = """
import os, resource
import transformers.models.llama.modeling_llama
from tests.training.test_preflight import CASES, CPU, composed, train_a_step

for case in CASES.values():
    cfg = composed(*case)
    small = composed(*case, "model.vocab_size=256", "seq_len=16")
    if os.fork() == 0:
        train_a_step(small, CPU)  # what the libraries allocate for themselves
        before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        train_a_step(cfg, CPU)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_the_estimate_is_what_a_step_takes_on_a_cpu() -> None:
    # a child of its own for each, and what is freed is given back at once
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    process = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, encoding="utf-8", timeout=300, cwd=ROOT, env=environ
    )
    measured = dict(zip(CASES, map(int, process.stdout.split()), strict=True))
    estimated = {}
    for name, case in CASES.items():
        cfg = composed(*case)
        estimated[name] = estimate(cfg, split_batch(cfg, 1), CPU).peak
    assert estimated == pytest.approx(measured, rel=0.15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compile", ["false", "true"])
@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_what_a_step_takes_on_a_gpu(name: str, compile: str) -> None:
    cfg = composed(*CASES[name], f"trainer.compile={compile}")
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train_a_step(cfg, GPU)
    measured = torch.cuda.max_memory_allocated() - before
    estimated = estimate(cfg, split_batch(cfg, 1), GPU).peak
    assert 0.8 * measured < estimated < (1.5 if compile == "true" else 1.25) * measured


def test_blocks_of_a_compiled_model_take_alike() -> None:
    cfg = composed(*CASES["tied, accumulating"], "model.layers=3")
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole = traced_bytes(fake_model(cfg, half=True), (4, 256))
        assert compiled_bytes(cfg, True, (4, 256)) == pytest.approx(whole, rel=0.01)


def test_the_size_of_a_checkpoint_is_that_of_the_file(tmp_path: Path, sample: Path) -> None:
    short = ("steps=3", "eval_every=0", "probe_every=0", "lookahead=snoo", "lookahead.k=2", "optimizer=soap")
    tiny = [o for o in TINY if not o.startswith("lookahead.")]
    cfg = composed(*tiny, *short, f"runs_dir={tmp_path}", f"dataset.path={sample}")
    run(cfg)
    files = [*run_folder(tmp_path).glob("checkpoints/step_00000003/*")]
    assert estimate(cfg, 2, CPU).checkpoint == pytest.approx(sum(f.stat().st_size for f in files), rel=0.05)


def table(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, dict[str, str]]:
    """The exit code and the rows, each as one line."""
    code = preflight(composed(*TINY, *overrides))
    rows: dict[str, str] = {}
    name = ""
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells:
            name = cells[0] or name
            rows[name] = f"{rows.get(name, '')} {' '.join(cells[1:])}"
    return code, {name: " ".join(row.split()) for name, row in rows.items()}


def assert_says(row: str, begins: str, holds: str) -> None:
    assert row.startswith(begins), row
    assert holds in row, row


def test_a_run_that_can_be_run_passes(tmp_path: Path, sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = table(capsys, f"runs_dir={tmp_path / 'new'}", f"dataset.path={sample}")
    assert code == 0
    assert list(rows) == ["device", "batch", "memory", "disk", "data"]
    assert all(row.startswith("ok") for row in rows.values())
    assert not any(tmp_path.iterdir())


def test_every_failure_is_named_and_the_other_checks_go_on(
    tmp_path: Path, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    places = (f"runs_dir={tmp_path / 'file'}", f"dataset.path={tmp_path}", "trainer.device=cuda", "micro_batch_size=5")
    code, rows = table(capsys, *places, "logger=wandb", "logger.mode=offline")
    assert code == 2
    if not torch.cuda.is_available():
        assert rows["device"] == "FAIL trainer.device=cuda, but no GPU was found; type trainer.device=cpu"
        assert_says(rows["memory"], "ok about", "there is no GPU to compare with")
    assert_says(rows["batch"], "FAIL micro_batch_size=5 does not divide", "type micro_batch_size=4")
    assert_says(rows["disk"], "FAIL cannot write", "type runs_dir=FOLDER")
    assert_says(rows["data"], "FAIL no shards", "scripts/prepare_data.py")
    assert "wandb" not in rows


def test_what_does_not_fit_fails_with_what_to_type(
    tmp_path: Path, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = ("batch_size=65536", "micro_batch_size=65536", "model.vocab_size=400000", "steps=1000000")
    many = ("checkpoint_every=1", "trainer.keep_checkpoints=1000000")
    code, rows = table(capsys, f"runs_dir={tmp_path}", f"dataset.path={sample}", *large, *many)
    assert code == 2
    assert_says(rows["memory"], "FAIL about", "with micro_batch_size=65536; type micro_batch_size=")
    assert_says(rows["disk"], "FAIL 1000000 checkpoints of", "; type trainer.keep_checkpoints=1")
    assert_says(rows["data"], "FAIL the run needs", "dataset.max_epochs=")


def test_altered_shards_and_those_without_a_manifest_are_found(
    tmp_path: Path, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sample, tmp_path / "data")
    manifest = load_manifest(tmp_path / "data")
    assert manifest is not None
    with open(tmp_path / "data" / manifest.of("val")[0].file, "r+b") as f:
        f.seek(-2, os.SEEK_END)
        f.write(b"\0\0")
    overrides = (f"runs_dir={tmp_path}", f"dataset.path={tmp_path / 'data'}")
    code, rows = table(capsys, *overrides)
    assert code == 2
    assert "is not what was written" in rows["data"]
    (tmp_path / "data" / "manifest.json").unlink()
    code, rows = table(capsys, *overrides)
    assert code == 0
    assert_says(rows["data"], "warning", "has no manifest: the run first reads all of its")


def test_findings_of_ranks_are_merged_by_the_worst() -> None:
    assert merged([(OK, "fine"), (OK, "fine")]) == (OK, "fine")
    assert merged([(OK, "fine"), None]) == (OK, "fine")
    assert merged([(OK, "one"), (OK, "another")]) == (OK, "rank 0: one\nrank 1: another")
    assert merged([(OK, "fine"), (FAIL, "lost"), (WARNING, "near"), (FAIL, "lost")]) == (FAIL, "rank 1, 3: lost")
    assert merged([(FAIL, "lost"), (FAIL, "lost")]) == (FAIL, "lost")


def script(*overrides: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    command = [sys.executable, *torchrun, str(ROOT / "scripts" / "preflight.py"), *overrides]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, check=False)


def test_two_ranks_sum_and_the_first_prints_the_one_table(tmp_path: Path, sample: Path) -> None:
    process = script(
        *TINY,
        "model.layers=1",
        "probe_every=0",
        "trainer.device=cpu",
        f"runs_dir={tmp_path}",
        f"dataset.path={sample}",
        ranks=2,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("communication") == 1
    assert "all-reduce over 2 ranks by gloo" in process.stdout
    assert "3 micro-batches of 2 a rank" in process.stdout
    assert "FAIL" not in process.stdout


def test_a_bad_config_is_one_line_and_exit_code_2() -> None:
    process = script("experiment=quickstart/muon", "stepss=3")
    assert process.returncode == 2
    assert process.stderr == "error: unknown key stepss; did you mean steps?\n"
