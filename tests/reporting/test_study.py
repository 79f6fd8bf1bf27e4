"""Results as CSV files, and the page made of them."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
from omegaconf import OmegaConf

from ema_nesterov.errors import UserError
from ema_nesterov.reporting.results import read_results, write_results
from ema_nesterov.reporting.runs import Run
from ema_nesterov.reporting.study import open_studies, write_study
from ema_nesterov.sweeps.manifest import Entry
from ema_nesterov.sweeps.plan import plan
from ema_nesterov.training.folder import begin
from tests.conftest import ROOT, Refused, composed

CONFIGS, RESULTS = ROOT / "configs", ROOT / "docs" / "results"
DECIMALS = re.compile(r"[+-]?\d+\.\d{3,}")
ENDS = {"muon": 4.0, "muon_ema_nesterov": 3.9, "muon_lr_matched": 4.1}  # and a hundredth for each seed


def finished(folder: Path) -> list[tuple[Run, Entry]]:
    """Three learning rates of the base on seed 0, and base, lookahead and control on seeds 0 to 3. On seed 0 alone the
    lookahead is far behind."""
    names = ",".join(f"study/cpu/{name}" for name in ENDS)
    commands = [["experiment=study/cpu/muon", "optimizer.lr=0.01,0.04"], [f"experiment={names}", "seed=0,1,2,3"]]
    commands += [[f"experiment={names}", "optimizer.lr=0.01", "seed=1,2,3"]]
    found = []
    for i, planned in enumerate(plan(CONFIGS, commands, [])):
        cfg, runs_dir = planned.cfg, folder / "runs"
        (runs_dir / planned.id).mkdir(parents=True)
        begin(cfg, runs_dir / planned.id, device="1 x abacus")
        end = ENDS[cfg.name.rpartition("/")[2]] + cfg.seed / 100 + (cfg.optimizer.lr != 0.02)
        end += cfg.name.endswith("ema_nesterov") * (1 / 3000 * cfg.seed**2 if cfg.seed else 1)
        metrics = [
            {"step": step, "tokens": step * 2048, "time": step / 2, "val/loss": loss, "val/ema_loss": loss + 0.1}
            for step, loss in ((0, 8.0), (200, 5.0), (400, end))
        ]
        for a in (-1.0, 0.0, 1.0) if cfg.seed != 1 else ():  # not every seed has to be probed
            line = {"probe/direction": "ema", "probe/position": a, "probe/loss": 5 + (a - 1) ** 2}
            metrics.append({"step": 200, "tokens": 409600, "time": 100.0, **line})
        metrics.append({"step": 200, "tokens": 409600, "time": 100.0, "noise/trace": 6.0, "noise/gradient": 2.0})
        metrics[-1]["noise/scale"] = 3.0
        run = Run(runs_dir / planned.id, cfg, {"status": "finished", "step": 400}, metrics)
        found.append((run, Entry(i, planned.id, planned.overrides, OmegaConf.to_container(cfg), runs_dir)))  # type: ignore[arg-type]
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write(finished(tmp_path), folder)
    return folder


def write(runs: list[tuple[Run, Entry]], folder: Path) -> dict[str, bytes]:
    """The files that this made."""
    folder.mkdir(exist_ok=True)
    paths = write_results(runs, folder, "study/cpu", [entry.id for _, entry in runs])
    return {path.name: path.read_bytes() for path in paths}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    runs = finished(tmp_path)
    write(runs, tmp_path)
    for (run, entry), again in zip(runs, read_results(tmp_path / "study_cpu.csv", CONFIGS), strict=True):
        assert again.config == run.config
        assert again.metrics == run.metrics
        assert (again.loss, str(again.folder)) == (run.loss, entry.id)


def test_runs_whose_folders_are_gone_stay(tmp_path: Path) -> None:
    runs = finished(tmp_path)
    at_once, order = write(runs, tmp_path / "at_once"), [entry.id for _, entry in runs]
    for some in (runs[3:8], runs[6:], runs[:4]):  # some of them twice
        paths = write_results(some, tmp_path, "study/cpu", order)
    assert {path.name: path.read_bytes() for path in paths} == at_once


def test_seed_0_chooses_and_is_not_counted(data: Path, tmp_path: Path) -> None:
    write_study(open_studies(data, CONFIGS), tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "0.01: 5.0000; **0.02: 4.0000**; 0.04: 5.0000 | yes |" in page
    assert "EMA-Nesterov against its base in 1 comparisons: 1 ahead." in page
    assert "| 0.02 | **alpha 0.5 gamma 0.92: 4.9000** |" in page
    gains = [-0.1 + seed**2 / 3000 for seed in (1, 2, 3)]
    half = 4.303 * stdev(gains) / 3**0.5
    line = next(line for line in page.splitlines() if line.startswith("| study/cpu/muon_ema_nesterov, alpha"))
    told = f"{mean(gains):+.4f} ± {stdev(gains):.4f} | {mean(gains) - half:+.4f} to {mean(gains) + half:+.4f} |"
    assert f"| 3 | {told}" in line
    assert line.endswith("| ahead |")
    best = next(line for line in page.splitlines() if "| 0.02, alpha 0.5 gamma 0.92 | 0.02 | 3 |" in line)
    assert best.endswith(f"{told} ahead |")
    assert "along the EMA of the updates at a = +1 (-1.0000; -1.0000 at a = 1)" in page


def test_the_page_is_the_same_every_time(data: Path, tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_study(open_studies(data, CONFIGS), tmp_path / name)
        pages.append((tmp_path / name / "README.md").read_bytes())
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("file", "old", "new", "line"),
    [
        ("study_cpu.csv", "optimizer.lr=0.01", "optimizer.lr=0.011", "the configs have changed"),
        ("study_cpu.csv", ",command", ",order", "has no column command"),
        ("study_cpu.csv", "abacus", "abacus,2", "has not 22 cells"),
        ("study_cpu_curves.csv", "4.03", "4.04", "is not the last of its curve"),
        ("study_cpu_noise.csv", "seed3", "seed4", "export both again"),
        ("study_cpu.csv", "experiment=study/cpu/muon ", "experiment=study/cpu/moun ", "did you mean"),
    ],
)
def test_files_that_do_not_fit_are_told(file: str, old: str, new: str, line: str, data: Path) -> None:
    path = data / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=line):
        open_studies(data, CONFIGS)


def test_a_folder_without_results_is_refused(tmp_path: Path, refused: Refused) -> None:
    refused("report.py", [f"data={tmp_path}"], "holds no results; python scripts/report.py sweep=NAME export=")
    refused("report.py", [f"export={tmp_path / 'new'}"], "export= needs a sweep")
    refused("report.py", [f"data={tmp_path / 'nowhere'}"], "holds no results")
    assert not list(tmp_path.iterdir())


# --- the study that is committed ------------------------------------------------------------------


def test_the_committed_page_is_that_of_the_committed_data_and_its_pictures_exist(tmp_path: Path) -> None:
    write_study(open_studies(RESULTS, CONFIGS), tmp_path)
    page = (RESULTS / "README.md").read_bytes()
    assert (tmp_path / "README.md").read_bytes() == page
    pictures = re.findall(r"\]\((\w+\.png)\)", page.decode())
    assert pictures[0] == "study_cpu_headline.png"
    for picture in pictures:
        assert (RESULTS / picture).exists()
        assert (tmp_path / picture).exists()


def test_the_committed_headline_follows_from_the_table_of_runs() -> None:
    """Computed here anew, out of the CSV file alone."""
    with open(RESULTS / "study_cpu.csv", encoding="utf-8") as f:
        place = {"model": "tiny", "optimizer": "muon", "lr": "0.02", "batch_tokens": "2048"}
        rows = [row for row in csv.DictReader(f) if place.items() <= row.items() and row["seed"] != "0"]
    alone = [row for row in rows if row["lookahead"] == "none" and not row["matched_alpha"]]
    base = {row["seed"]: float(row["val_loss"]) for row in alone}
    wrapped = {"lookahead": "ema_nesterov", "alpha": "0.5", "ema_decay": "0.92"}
    gains = [float(row["val_loss"]) - base[row["seed"]] for row in rows if wrapped.items() <= row.items()]
    assert len(gains) == 5
    label, told = "| study/cpu/muon_ema_nesterov, alpha 0.5 gamma 0.92 ", f"{mean(gains):+.4f} ± {stdev(gains):.4f}"
    lines = (RESULTS / "README.md").read_text(encoding="utf-8").splitlines()
    assert any(line.startswith(label) and told in line for line in lines)


def test_every_number_of_the_words_stands_in_the_tables() -> None:
    """Those of three decimals or more: losses, and differences of losses. Rounded, and of either sign."""
    words = (RESULTS / "study_cpu.md").read_text(encoding="utf-8")
    tables = (RESULTS / "README.md").read_text(encoding="utf-8").replace(words.strip(), "")
    in_tables = {abs(float(number)) for number in DECIMALS.findall(tables)}
    in_tables.add(composed("experiment=nanogpt_124m/muon_ema_nesterov").lookahead.ema_decay)  # the paper's gamma
    said = DECIMALS.findall(words)
    assert len(said) > 10
    for number in said:
        half = 0.5 * 10 ** -len(number.partition(".")[2]) + 1e-9
        assert any(abs(abs(float(number)) - other) <= half for other in in_tables), number
