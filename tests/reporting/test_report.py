from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from ema_nesterov.errors import DataError
from ema_nesterov.reporting.figures import draw
from ema_nesterov.reporting.page import write_page
from ema_nesterov.reporting.runs import base_of, find_runs
from ema_nesterov.reporting.table import rows, verdicts, write_table
from ema_nesterov.training.folder import begin
from tests.conftest import composed


def fake_run(root: Path, lookahead: str, losses: list[float], *overrides: str, status: str = "finished") -> None:
    """A run folder as the trainer writes it, with chosen validation losses at steps 0, 10, 20, ..."""
    cfg = composed(f"lookahead={lookahead}", "steps=40", f"name=study/{lookahead}", *overrides)
    folder = root / lookahead / f"seed{cfg.seed}"
    folder.mkdir(parents=True)
    begin(cfg, folder)
    lines = []
    for i, loss in enumerate(losses):
        line = {"step": 10 * i, "tokens": 0, "time": 0.0, "val/loss": loss, "val/bits_per_byte": loss / 2}
        if lookahead != "none":
            line |= {"val/lookahead_loss": loss - 0.1, "val/ema_loss": loss + 0.1}
        lines += [line, {"step": 10 * i, "tokens": 0, "time": 0.0, "train/loss": loss, "optim/alpha": 0.5}]
    for direction in ("ema", "step"):
        for a in (-1.0, 0.0, 1.0):
            lines.append({"step": 20, "probe/direction": direction, "probe/position": a, "probe/loss": 3 + a * a})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "status.json").write_text(json.dumps({"status": status, "step": 40, "message": "", "exit_code": 0}))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    fake_run(tmp_path, "none", [8.0, 6.0, 5.0, 4.5, 4.0])
    fake_run(tmp_path, "ema_nesterov", [8.0, 6.5, 4.8, 4.1, 3.9])
    fake_run(tmp_path, "nesterov", [8.0, 6.5, 5.5, 5.0, 4.2])
    fake_run(tmp_path, "ema_nesterov", [8.0], "seed=1", status="diverged")
    return tmp_path


def test_a_run_is_measured_against_the_run_without_lookahead(study: Path) -> None:
    runs, others = find_runs([study])
    assert [run.name for run in runs] == ["study/none", "study/ema_nesterov", "study/nesterov"]
    assert base_of(runs[1], runs) is runs[0]
    assert base_of(runs[0], runs) is None
    assert len(others) == 1
    assert "diverged" in others[0]


def test_a_base_with_other_settings_is_no_base(tmp_path: Path) -> None:
    fake_run(tmp_path, "none", [8.0, 4.0], "optimizer.lr=0.5")
    fake_run(tmp_path, "ema_nesterov", [8.0, 4.0])
    runs, _ = find_runs([tmp_path])
    assert base_of(runs[1], runs) is None
    assert verdicts(runs) == []


def test_the_numbers_are_those_of_the_metrics(study: Path) -> None:
    runs, _ = find_runs([study])
    names = ("run", "seed", "steps", "x", "bx", "y", "by", "e", "be", "d", "saved")
    base, ema, nesterov = (dict(zip(names, row, strict=True)) for row in rows(runs))
    assert (base["x"], base["bx"], base["y"], base["d"]) == (f"{math.exp(4):.2f}", "2.0000", "-", "-")
    assert (ema["x"], ema["y"], ema["e"]) == tuple(f"{math.exp(v):.2f}" for v in (3.9, 3.8, 4.0))
    assert ema["by"] == "1.9000"
    # 4.0 lies halfway between 4.1 at step 30 and 3.9 at step 40
    assert (ema["d"], ema["saved"]) == ("-0.1000", "5 (12.5%)")
    assert (nesterov["d"], nesterov["saved"]) == ("+0.2000", "not reached")


def test_losing_is_said_as_plainly_as_winning(study: Path) -> None:
    runs, _ = find_runs([study])
    ahead, behind, caution, _ = verdicts(runs)
    assert "0.1000 nats ahead of study/none" in ahead
    assert "0.2000 nats behind study/none" in behind
    assert "no steps are saved" in behind
    assert "one seed" in caution


def test_seeds_are_averaged_as_pairs(tmp_path: Path) -> None:
    for seed, loss in ((0, 3.9), (1, 3.7)):
        fake_run(tmp_path, "none", [8.0, 4.0], f"seed={seed}")
        fake_run(tmp_path, "ema_nesterov", [8.0, loss], f"seed={seed}")
    runs, _ = find_runs([tmp_path])
    assert "-0.2000 nats against its base, mean of 2 paired runs, standard deviation 0.1414" in verdicts(runs)[-1]


def test_table_figure_and_page_are_written(study: Path, tmp_path: Path) -> None:
    runs, others = find_runs([study])
    write_table(runs, tmp_path)
    figures = draw(runs, tmp_path)
    write_page(runs, others, figures, tmp_path / "index.html", "A <title>")
    with open(tmp_path / "table.csv") as f:
        assert len(list(csv.reader(f))) == 4
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") == 1
    assert "A &lt;title&gt;" in page
    assert "diverged" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_no_finished_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished run"):
        find_runs([tmp_path])
