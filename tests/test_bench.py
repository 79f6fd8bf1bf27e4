"""The benchmark runs; what it measures is no test."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, Refused


@pytest.fixture
def bench_optimizers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return import_module("bench_optimizers")


def test_the_table_has_every_contender_its_memory_and_its_ratio(
    bench_optimizers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = bench_optimizers.make_parameters

    def small(*args: Any) -> dict[str, list[torch.Tensor]]:
        """An eighth of each side: what they hold is the same at any size."""
        made = {
            role: [p.detach()[tuple(slice(n // 8) for n in p.shape)].clone() for p in of]
            for role, of in make(*args).items()
        }
        for p in [p for of in made.values() for p in of]:
            p.requires_grad_()
            p.grad = torch.randn_like(p)
        return made

    output = tmp_path / "bench.json"
    parts = "parts=[wrappers,matrices,soap,record30]"
    monkeypatch.setattr(bench_optimizers, "make_parameters", small)
    bench_optimizers.run(["shapes=tiny", "repeats=1", parts, f"output={output}", "device=cpu", "max_dim=1000"])
    told = capsys.readouterr().out
    results = json.loads(output.read_text(encoding="utf-8"))
    rows = {row["name"]: row for title, part in results.items() if title != "machine" for row in part}
    assert {"EMANesterov", "Nesterov", "GPA", "Muon", "NorMuon", "Aurora", "SOAP", "Record30"} <= set(rows)
    assert rows["EMANesterov"]["held"] == pytest.approx(4.0)  # one float32 copy of the weights
    assert rows["two buffers, literal"]["held"] == pytest.approx(8.0)
    assert rows["Muon"]["held"] == pytest.approx(4.0)
    assert all(row["ms"] > 0 for row in rows.values())
    for row in rows.values():
        if row["peer"]:
            assert row["faster"] == pytest.approx(rows[row["peer"]]["ms"] / row["ms"])
            assert row["peer"] in told


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("shapes=gpt5", "no model gpt5"),
        ("parts=[muon]", "parts=muon must be of wrappers"),
        ("shape=tiny", "did you mean"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(
    argument: str, message: str, refused: Refused, bench_optimizers: Any
) -> None:
    refused("bench.py", ["optimizers", argument], message)
