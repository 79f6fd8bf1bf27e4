"""The benchmarks of whole runs time what they say; the speed itself is no test."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_nesterov.models import build_model
from ema_nesterov.training.distributed import Ranks
from tests.conftest import ROOT, TINY, Refused

OFTEN = ("eval_every", "probe_every", "noise_every", "checkpoint_every", "log_every")
SMALL = [o for o in TINY if not o.startswith(OFTEN)]
SHORT = ["warmup=1", "timed=1", "turns=2"]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(sys, "argv", ["bench.py", "train"])


@pytest.fixture
def docs(scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the figures, with the page as it is."""
    records: Any = import_module("records")
    (tmp_path / "benchmarks.md").write_text(
        (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"), encoding="utf-8"
    )
    monkeypatch.setattr(records, "DOCS", tmp_path)
    return tmp_path


def test_a_run_is_timed_with_random_tokens_and_written_down_once(docs: Path, tmp_path: Path) -> None:
    train, records = (import_module(name) for name in ("bench_train", "records"))
    train.run([*SMALL, *SHORT, f"dataset.path={tmp_path / 'no_such'}", "dataset.prepare=null", "record=true"])
    records.write(records.Record(**json.loads((docs / "benchmarks.json").read_text(encoding="utf-8"))[0]))
    (record,) = json.loads((docs / "benchmarks.json").read_text(encoding="utf-8"))
    figures = record["figures"]
    assert figures["tokens/s"] == pytest.approx(12 * 32 / figures["ms/step"] * 1000)
    assert {"ms: forward", "ms: backward", "ms: optimizer", "ms: wrapper", "ms: reading", "ms: logging"} <= set(figures)
    page = (docs / "benchmarks.md").read_text(encoding="utf-8")
    assert page.count("### train") == 1
    assert page.startswith("# Speed")
    assert f"| tokens/s | {figures['tokens/s']:,.0f} |" in page


def test_a_peer_takes_turns_with_the_loop(scripts: None, sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_module("bench_train").run_compare([*SMALL, *SHORT, "b=released", f"dataset.path={sample}"])
    assert re.search(r"B: released, tokens/s +[\d,]+", told := capsys.readouterr().out)
    assert re.search(r"A over B +\d", told)


@pytest.mark.parametrize("peer", ["eager", "trainer"])
def test_a_peer_learns_what_the_loop_learns(
    scripts: None, peer: str, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With alpha and learning rate constant, which the peers know no schedule of, the weights are the same."""
    train = import_module("bench_train")
    constant = ["schedule.decay_steps=0", "lookahead.warmup_steps=0", "lookahead.rest_steps=0"]
    ranks, held = Ranks(0, 1, torch.device("cpu")), []

    def watched(*args: Any, **kwargs: Any) -> Any:  # whatever is built is remembered
        held.append(build_model(*args, **kwargs))
        return held[-1]

    for module in ("ema_nesterov.training.execution", "peers"):
        monkeypatch.setattr(import_module(module), "build_model", watched)
    overrides = [*SMALL, *constant, f"dataset.path={sample}"]
    settings = [train.setting(name, overrides, ranks, tmp_path) for name in ("", peer)]
    with train.started(settings, ranks, warmup=3):
        ours, theirs = (list(model.parameters()) for model in held)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="needs Linux")
def test_ranks_send_what_the_model_of_communication_says(sample: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "scripts" / "bench.py"), "scaling", *SMALL, "model.width=128", f"dataset.path={sample}"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert (found := re.search(r"measured / model = ([\d.]+)", " ".join(done.stdout.split()))), done.stderr
    assert 0.99 < float(found[1]) < 1.5  # others use the loopback, too


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "modle=tiny"], "did you mean model?"),
        (["train", "turns=0"], "turns=0 must be at least 1"),
        (["compare", "a=lookahaed=none"], "did you mean lookahead?"),
        (["train", "dataset=c4_stream", "model=llama_60m"], "streams and datasets of your own are not timed here"),
        (["scaling", "ranks=[3]"], "batch_size=16 does not divide over 3 GPUs"),
    ],
)
def test_what_cannot_be_timed_is_told(scripts: None, arguments: list[str], line: str, refused: Refused) -> None:
    refused("bench.py", arguments, line)
