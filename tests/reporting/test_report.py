from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from ema_nesterov.cli import composed_each
from ema_nesterov.errors import ConfigError, DataError
from ema_nesterov.reporting.cells import Cell, Comparison, Statistic, cells_of, comparisons_of
from ema_nesterov.reporting.figures import KINDS, curves, draw_all
from ema_nesterov.reporting.gains import gains
from ema_nesterov.reporting.layout import Data
from ema_nesterov.reporting.page import write_page
from ema_nesterov.reporting.published import Published, load_published, published_for
from ema_nesterov.reporting.runs import Run, base_of, find_runs
from ema_nesterov.reporting.table import table_of_cells, table_of_pairs, table_of_runs, verdicts
from ema_nesterov.training.folder import begin
from tests.conftest import ROOT, composed
from tests.reporting.browser import CHROMIUM, look_at


def fake_run(root: Path, lookahead: str, losses: list[float], *overrides: str, status: str = "finished") -> None:
    """A run folder as the trainer writes it, with chosen validation losses at steps 0, 10, 20, ..."""
    steps = 10 * (len(losses) - 1)
    cfg = composed(f"lookahead={lookahead}", f"steps={steps}", f"name=study/{lookahead}", *overrides)
    folder = root / f"{lookahead}{steps}" / "-".join(overrides).replace("/", "_") / f"seed{cfg.seed}"
    folder.mkdir(parents=True)
    begin(cfg, folder)
    lines: list[dict[str, Any]] = []
    for i, loss in enumerate(losses):
        line = {"step": 10 * i, "tokens": 0, "time": 2.0 * i, "val/loss": loss, "val/bits_per_byte": loss / 2}
        if lookahead != "none":
            line |= {"val/lookahead_loss": loss - 0.1, "val/ema_loss": loss + 0.1}
        lines += [line, {"step": 10 * i, "tokens": 0, "time": 0.0, "train/loss": loss, "optim/alpha": 0.5}]
    for step in (10, 10 * (len(losses) - 1)):
        for direction in ("ema", "step"):
            for a in (-1.0, 0.0, 1.0):
                lines.append({"step": step, "probe/direction": direction, "probe/position": a, "probe/loss": 3 + a * a})
        lines.append({"step": step, "noise/scale": 1000.0 * step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "status.json").write_text(
        json.dumps({"status": status, "step": steps, "message": "", "exit_code": 0}), encoding="utf-8"
    )


def compared(root: Path) -> tuple[list[Run], list[Cell], list[Comparison]]:
    runs, _ = find_runs([root])
    cells = cells_of(runs)
    return runs, cells, comparisons_of(cells)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    fake_run(tmp_path, "none", [8.0, 6.0, 5.0, 4.5, 4.0])
    fake_run(tmp_path, "ema_nesterov", [8.0, 6.5, 4.8, 4.1, 3.9])
    fake_run(tmp_path, "nesterov", [8.0, 6.5, 5.5, 5.0, 4.2])
    fake_run(tmp_path, "ema_nesterov", [8.0] * 5, "seed=1", status="diverged")
    return tmp_path


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    """Three seeds: the base ends at 4, 4.1, 4.2, the lookahead 0.1, 0.2 and 0.3 below, the control 0.05 above."""
    for seed, gain in ((0, 0.1), (1, 0.2), (2, 0.3)):
        end = 4 + seed / 10
        fake_run(tmp_path, "none", [8.0, 6.0, 5.0, 4.5, end], f"seed={seed}")
        fake_run(tmp_path, "ema_nesterov", [8.0, 6.0, 5.0, end + gain, end - gain], f"seed={seed}")
        control = ("schedule=lr_matched", "name=study/lr_matched")
        fake_run(tmp_path, "none", [8.0, 6.0, 5.0, 4.5, end + 0.05], f"seed={seed}", *control)
    return tmp_path


def test_a_run_is_measured_against_the_run_without_lookahead(study: Path) -> None:
    runs, others = find_runs([study])
    assert [run.name for run in runs] == ["study/none", "study/ema_nesterov", "study/nesterov"]
    assert base_of(runs[1], runs) is runs[0]
    assert base_of(runs[0], runs) is None
    assert [str(other).partition(": ")[2] for other in others] == ["diverged at step 40"]


def test_a_figure_may_be_of_a_part_of_the_runs(seeds: Path) -> None:
    """Of the base and the lookahead that are asked for; the base has no alpha, and stays."""
    _, cells, comparisons = compared(seeds)
    published = {0: Published("study/none", "a paper", loss=4.0)}
    part = Data(cells, comparisons, [], published).where(
        {"seed": [1, 2], "lookahead.alpha": 0.7, "schedule.matched_alpha": 0.0}
    )
    assert [(cell.name, len(cell.runs)) for cell in part.cells] == [("study/none", 2)]
    part = Data(cells, comparisons, [], published).where({"name": ["study/ema_nesterov", "study/none"], "seed": 1})
    assert [c.pairs[0][0].config.seed for c in part.comparisons] == [1]
    assert part.published == published
    with pytest.raises(ConfigError, match=r"where: lookahead\.alhpa, a key that no config has"):
        part.where({"lookahead.alhpa": 0.5})


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ({"kind": "curve"}, "kind=curve must be one of .*curves"),
        ({"kind": "gains"}, "kind=gains: missing a required argument: 'x'; mend"),
        ({"kind": "curves", "y": "step"}, "kind=curves: got an unexpected keyword argument 'y'; mend"),
    ],
)
def test_a_figure_that_no_kind_draws_is_told(spec: dict[str, Any], line: str, seeds: Path) -> None:
    _, cells, comparisons = compared(seeds)
    with pytest.raises(ConfigError, match=line):
        draw_all([spec], Data(cells, comparisons, [], {}), seeds)


def test_the_seed_that_chooses_between_bases_is_not_shown(tmp_path: Path) -> None:
    """Seed 0 ends lower at a rate of 0.01, the others at 0.02; the lookahead is 0.1 behind at the one, 0.2 ahead at the
    other."""
    for lr, seed_0, gain in ((0.01, 4.0, -0.1), (0.02, 4.1, 0.2)):
        for seed in (0, 1, 2):
            end = 4.2 - 10 * lr if seed else seed_0
            fake_run(tmp_path, "none", [8.0, end], f"seed={seed}", f"optimizer.lr={lr}")
            fake_run(tmp_path, "ema_nesterov", [8.0, end - gain - seed / 100], f"seed={seed}", f"optimizer.lr={lr}")
    _, cells, comparisons = compared(tmp_path)
    data, shown = Data(cells, comparisons, [], {}), {}
    for chooses in (None, 0):
        drawn = gains(data, "batch_size", chooses)
        assert drawn is not None
        shown[chooses] = drawn[0].axes[0].containers[0].lines[0].get_ydata()
    assert shown[None] == pytest.approx([-0.21])  # the rate that is better on average, all seeds
    assert shown[0] == pytest.approx([0.1 - 0.015])


def test_a_base_with_other_settings_is_no_base(tmp_path: Path) -> None:
    fake_run(tmp_path, "none", [8.0, 4.0], "optimizer.lr=0.5")
    fake_run(tmp_path, "ema_nesterov", [8.0, 4.0])
    runs, _, comparisons = compared(tmp_path)
    assert base_of(runs[1], runs) is None
    assert comparisons == []


def test_the_numbers_are_those_of_the_metrics(study: Path) -> None:
    runs, _ = find_runs([study])
    names = ("run", "seed", "steps", "x", "bx", "y", "by", "e", "be", "d", "saved")
    base, ema, nesterov = (dict(zip(names, row, strict=True)) for row in table_of_runs(runs).rows)
    assert (base["x"], base["bx"], base["y"], base["d"]) == (f"{math.exp(4):.2f}", "2.0000", "-", "-")
    assert (ema["x"], ema["y"], ema["e"]) == tuple(f"{math.exp(v):.2f}" for v in (3.9, 3.8, 4.0))
    assert ema["by"] == "1.9000"
    # 4.0 lies halfway between 4.1 at step 30 and 3.9 at step 40
    assert (ema["d"], ema["saved"]) == ("-0.1000", "5 (12.5%)")
    assert (nesterov["d"], nesterov["saved"]) == ("+0.2000", "not reached")


def test_losing_is_said_as_plainly_as_winning(study: Path) -> None:
    ahead, behind = verdicts(compared(study)[2])
    assert "0.1000 nats ahead of study/none (seed 0). One seed, so this may be chance" in ahead
    assert "0.2000 nats behind study/none" in behind
    assert "no steps are saved" in behind


def test_seeds_are_paired_and_averaged(seeds: Path) -> None:
    _, cells, comparisons = compared(seeds)
    assert [(cell.name, len(cell.runs)) for cell in cells] == [
        *(("study/none", 3), ("study/ema_nesterov", 3), ("study/lr_matched", 3)),
    ]
    ema, beyond, control = comparisons
    assert ema.difference is not None
    assert ema.difference.mean == pytest.approx(-0.2)
    assert ema.difference.sd == pytest.approx(0.1)
    half = 4.303 * 0.1 / math.sqrt(3)
    assert ema.difference.interval == pytest.approx((-0.2 - half, -0.2 + half))
    # the base's end is crossed halfway between steps 30 and 40: 5 steps of 16 x 256 tokens, 1 second
    assert ema.saved == [pytest.approx((5, 5 * 16 * 256, 1.0))] * 3
    assert control.difference is not None
    assert control.difference.mean == pytest.approx(0.05)
    assert beyond.is_control
    assert beyond.difference is not None
    assert beyond.difference.mean == pytest.approx(-0.25)
    (base, first, second) = table_of_cells(cells, comparisons, {}).rows
    assert base[:4] == ["study/none", "3", "4.1000 ± 0.1000", "3.8516 to 4.3484"]
    spans = [f"{mean - half:+.4f} to {mean + half:+.4f}" for mean in (-0.2, -0.25)]
    assert first[5:11] == ["-", "-0.2000 ± 0.1000", spans[0], "5 (12.5%)", "-0.2500 ± 0.1000", spans[1]]
    assert first[11:13] == ["0.02048M", "1 s"]
    assert second[8:13] == ["not reached", "-", "-", "-", "-"]
    numbers = table_of_cells(cells, comparisons, {}).data
    assert numbers is not None
    assert numbers[1]["loss_less_base"] == pytest.approx(-0.2)
    assert numbers[1]["loss_less_control_low"] == pytest.approx(-0.25 - half)
    assert numbers[1]["seconds_saved"] == pytest.approx(1.0)
    won, more, lost = verdicts(comparisons)
    assert "0.2500 nats ahead of its control, study/lr_matched, the mean of 3 seeds" in more
    assert "0 is inside, so it may be chance" in won
    assert "in 3 of 3 seeds" in won
    assert "0.0500 nats behind study/none" in lost


def test_another_length_is_told_and_the_pairwise_rule_accounts_for_it(tmp_path: Path) -> None:
    for seed in range(4):
        fake_run(tmp_path, "none", [8.0, 6.0, 5.0, 4.5, 4.0], f"seed={seed}", "schedule.decay_steps=0.5")
        fake_run(tmp_path, "ema_nesterov", [8.0, 6.0, 5.0, 4.001], f"seed={seed}", "schedule.decay_steps=0.4")
    _, cells, comparisons = compared(tmp_path)
    (found,) = comparisons
    assert not found.same_length
    assert found.pairwise == pytest.approx((-0.001 + 0.0045 * 10 / 100) / math.sqrt(2 / 4))
    assert table_of_pairs(comparisons).rows[0][2:] == ["30", "40", f"{found.pairwise:.4f}", "no"]
    assert "(other length)" in table_of_cells(cells, comparisons, {}).rows[1][6]
    assert "of 40 steps, with 30" in verdicts(comparisons)[0]


def test_students_interval_holds_the_mean_as_often_as_it_says() -> None:
    """2,000 samples of five normal numbers; the deviation of the share is 0.5%."""
    import numpy as np

    draws = np.random.default_rng(0).normal(size=(2000, 5))
    held = [low <= 0 <= high for row in draws if (i := Statistic(tuple(row)).interval) for low, high in [i]]
    assert 0.935 < sum(held) / len(held) < 0.965


def test_a_published_number_stands_beside_the_runs_that_repeat_it_alone(tmp_path: Path) -> None:
    own = [[f"experiment={name}"] for name in ("llama_60m/muon", "nanogpt_162m/muon")]
    commands = [own[0], [*own[0], "batch_size=16384", "optimizer.lr=0.0505"], [*own[0], "optimizer.lr=0.1"]]
    commands += [[*own[1], "dataset.path=elsewhere", "seed=3"], [*own[1], "steps=3150"], [*own[1], "steps=3000"]]
    cells = [Cell([Run(tmp_path, cfg, {}, [])]) for cfg in composed_each(ROOT / "configs", commands)]
    entries = load_published(ROOT / "docs" / "paper_results.yaml")
    found = {i: str(entry) for i, entry in published_for(cells, entries, ROOT / "configs").items()}
    assert found == {0: "28.11", 1: "24.09", 3: f"{math.exp(3.27847):.2f}", 4: f"{math.exp(3.2881):.2f}"}


def test_a_curve_is_the_mean_where_every_seed_was_validated(tmp_path: Path) -> None:
    """Also where one was validated more often than another: eval_every and eval_at rename no run."""
    for seed, losses in enumerate(([8.0, 6.0, 5.0, 4.0], [6.0, 4.0, 3.0, 2.0])):
        fake_run(tmp_path, "none", losses, f"seed={seed}")
    runs, cells, comparisons = compared(tmp_path)
    runs[1].metrics = [line for line in runs[1].metrics if line["step"] != 10]
    drawn = curves(Data(cells, comparisons, [], {}))
    assert drawn is not None
    (line,) = drawn[0].axes[0].lines
    assert line.get_xydata().tolist() == [[0.0, 7.0], [20.0, 4.0], [30.0, 3.0]]


def test_a_page_shows_every_table_and_figure_in_a_browser_without_a_network(seeds: Path, tmp_path: Path) -> None:
    fake_run(tmp_path, "nesterov", [8.0] * 5, status="diverged")
    runs, others = find_runs([seeds])
    cells = cells_of(runs)
    comparisons = comparisons_of(cells)
    published = {0: Published("study/none", "a paper", loss=4.0, curve={0: 8.0, 40: 4.0})}
    wanted: list[dict[str, Any]] = [
        {"kind": kind} for kind in ("comparison", "curves", "differences", "final", "positions")
    ]
    ema = {"name": "study/ema_nesterov", "rows": "lookahead.alpha", "columns": "lookahead.ema_decay"}
    wanted += [
        {"kind": "grid", **ema},
        {"kind": "grid", **ema, "panels": "seed"},
        {"kind": "scaling", "x": "batch_size"},
        {"kind": "gains", "x": "batch_size", "title": "With noise"},
    ]
    assert {spec["kind"] for spec in wanted} == set(KINDS)
    figures = draw_all(wanted, Data(cells, comparisons, others, published), tmp_path)
    assert len(figures) == len(wanted)
    for figure in figures:
        assert figure.svg.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    tables = [table_of_cells(cells, comparisons, published), table_of_runs(runs), table_of_pairs(comparisons)]
    for table in tables:
        table.write(tmp_path)
        with open(tmp_path / f"{table.name}.csv", encoding="utf-8") as f:
            assert len(list(csv.reader(f))) == len(table.rows) + 1
        assert len((tmp_path / f"{table.name}.md").read_text(encoding="utf-8").splitlines()) == len(table.rows) + 2
    page = tmp_path / "index.html"
    write_page(page, "A <title>", verdicts(comparisons), tables, figures, cells, others)
    assert "diverged at step 40" in page.read_text(encoding="utf-8")
    if CHROMIUM is None:
        pytest.skip("no Chromium here to open the page with; type apt-get install chromium")

    script = """({
        title: document.title,
        figures: [...document.querySelectorAll('figure svg')].map(svg => {
            const box = svg.getBoundingClientRect();
            return [box.width, box.height, svg.querySelectorAll('path').length, svg.querySelectorAll('text').length];
        }),
        ids: [...document.querySelectorAll('[id]')].map(element => element.id),
        rows: document.querySelectorAll('tbody tr').length,
        wide: document.documentElement.scrollWidth > document.documentElement.clientWidth,
    })"""
    seen = look_at(page, script)
    assert seen.complaints == []
    assert {address.partition(":")[0] for address in seen.requests} <= {"file", "data"}
    assert seen.answer["title"] == "A <title>"
    assert len(seen.answer["figures"]) == len(figures)
    for width, height, paths, texts in seen.answer["figures"]:
        assert width > 300
        assert height > 50
        assert paths > 5
        assert texts > 5
    assert len(set(seen.answer["ids"])) == len(seen.answer["ids"])
    assert seen.answer["rows"] == sum(len(table.rows) for table in tables)
    assert not seen.answer["wide"]
    assert len(seen.screenshot) > 50_000


def test_no_finished_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished run"):
        find_runs([tmp_path])
