"""The benchmark runs; what it measures is no test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Refused


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "optimizers", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_table_has_every_contender_its_memory_and_its_ratio(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    parts = "parts=[wrappers,matrices,soap,record30]"
    done = bench("shapes=tiny", "repeats=1", parts, f"output={output}", "device=cpu", "max_dim=1000")
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    rows = {row["name"]: row for title, part in results.items() if title != "machine" for row in part}
    assert {"EMANesterov", "Nesterov", "GPA", "Muon", "NorMuon", "Aurora", "SOAP", "Record30"} <= set(rows)
    assert rows["EMANesterov"]["held"] == pytest.approx(4.0)  # one float32 copy of the weights
    assert rows["two buffers, literal"]["held"] == pytest.approx(8.0)
    assert rows["Muon"]["held"] == pytest.approx(4.0)
    assert all(row["ms"] > 0 for row in rows.values())
    for row in rows.values():
        if row["peer"]:
            assert row["faster"] == pytest.approx(rows[row["peer"]]["ms"] / row["ms"])
            assert row["peer"] in done.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("shapes=gpt5", "no model gpt5"),
        ("parts=[muon]", "parts=muon must be of wrappers"),
        ("shape=tiny", "did you mean"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(
    argument: str, message: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    refused("bench.py", ["optimizers", argument], message)
