"""Compare finished runs: python scripts/report.py sweep=NAME | runs=FOLDER | wandb=ENTITY/PROJECT [output=FOLDER]

sweep   a sweep that has begun: its name below runs_dir (default runs), or its folder; figures as its file asks
runs    a folder of run folders, or a list [A,B] (default runs)
wandb   the runs of a W&B project; with sweep=NAME those of that sweep, which need not be on this disk. They are fetched
        into run folders in `output`/wandb, finished ones once

With sweep=NAME export=FOLDER the finished runs are written there as CSV files, beside those that stand there: a row a
run, curves and probes beside.
data=FOLDER reads those of sweeps that choose by seed 0 and count the other seeds (study/cpu), and writes README.md and
its figures into `output` (default: beside them).

Writes cells.md and .csv (a row a config, over its seeds), table.md and .csv (a row a run), pairwise.md and .csv,
figures as PNG and SVG, and index.html, which holds all of it, into `output` (default: report/ inside the sweep's or
the first folder; with wandb= report/). Runs that are missing, failed or diverged are named. Published numbers
(docs/paper_results.yaml) stand beside those of runs that repeat them. title= names the page.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Printed

from ema_nesterov.cli import arguments, guard
from ema_nesterov.errors import ConfigError
from ema_nesterov.reporting.cells import cells_of, comparisons_of
from ema_nesterov.reporting.figures import draw_all
from ema_nesterov.reporting.from_wandb import fetch
from ema_nesterov.reporting.layout import Data
from ema_nesterov.reporting.page import write_page
from ema_nesterov.reporting.published import load_published, published_for
from ema_nesterov.reporting.results import exported, write_results
from ema_nesterov.reporting.runs import find_runs, runs_of
from ema_nesterov.reporting.study import open_studies, write_study
from ema_nesterov.reporting.table import SHORT, Table, table_of_cells, table_of_pairs, table_of_runs, verdicts
from ema_nesterov.sweeps.manifest import Sweep, is_frozen, open_sweep, sweep_folder
from ema_nesterov.sweeps.plan import open_sweep_file, sweep_names

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, RESULTS = ROOT / "configs", ROOT / "docs" / "paper_results.yaml"
FEW, MANY = 6, 12  # runs that one figure can hold, sentences that are read in a terminal


@dataclass
class Arguments:
    sweep: str | None = None
    runs: list[str] = field(default_factory=lambda: ["runs"])
    wandb: str | None = None
    runs_dir: str = "runs"
    data: str | None = None
    export: str | None = None
    output: str | None = None
    title: str | None = None


def main() -> None:
    args = arguments(Arguments, __doc__)
    if args.data is not None:
        return report_on_data(Path(args.data), Path(args.output or args.data))
    if args.export is not None:
        return export(args, Path(args.export))
    wanted: list[dict[str, Any]]
    if args.wandb is not None:
        folder = Path()
        (runs, others), wanted = find_runs(fetch(args.wandb, args.sweep, Path(args.output or "report"))), []
        title = f"{args.wandb}, sweep {args.sweep}" if args.sweep else args.wandb
        if args.sweep in sweep_names(CONFIGS):
            title, wanted = (file := open_sweep_file(CONFIGS, args.sweep)).title, file.figures
    elif args.sweep:
        sweep = begun(args)
        folder = sweep.folder
        (runs, others), title, wanted = runs_of(sweep), sweep.about["title"], sweep.about["figures"]
    else:
        if not args.runs or not all(args.runs):
            raise ConfigError("runs= must be a folder, or a list [A,B] of them")
        (runs, others), title, wanted = find_runs([Path(name) for name in args.runs]), "Lookahead or not", []
        folder = Path(args.runs[0])
    output = writable(Path(args.output) if args.output else folder / "report")
    cells = cells_of(runs)
    comparisons = comparisons_of(cells)
    published = published_for(cells, load_published(RESULTS), CONFIGS)
    seeds, each = table_of_cells(cells, comparisons, published), table_of_runs(runs)
    tables = [seeds, each, *([table_of_pairs(comparisons)] if comparisons else [])]
    for table in tables:
        table.write(output)
    few = [{"kind": "comparison"}] if len(runs) <= FEW else [{"kind": "curves"}, {"kind": "differences"}]
    figures = draw_all(wanted or few, Data(cells, comparisons, others, published), output)
    said = verdicts(comparisons)
    write_page(output / "index.html", args.title or title, said, tables, figures, cells, others)
    show(each if len(cells) == len(runs) else seeds, args.title or title)
    console = Console(width=None if sys.stdout.isatty() else 140)
    for line in [*(f"not counted: {other}" for other in others), *(said if len(said) <= MANY else [])]:
        console.print(line, highlight=False)
    console.print(f"tables, figures and page: {output}", highlight=False)


def begun(args: Arguments) -> Sweep:
    """Raises ConfigError when there is no such sweep."""
    assert args.sweep is not None
    folder = Path(args.sweep) if is_frozen(Path(args.sweep)) else sweep_folder(Path(args.runs_dir), args.sweep)
    if not is_frozen(folder):
        raise ConfigError(f"{folder} holds no sweep that has begun; python scripts/sweep.py run begins one")
    return open_sweep(folder)


def writable(folder: Path, key: str = "output") -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"cannot write {folder}: {e.strerror}; type {key}=FOLDER") from None
    return folder


def export(args: Arguments, folder: Path) -> None:
    if not args.sweep:
        raise ConfigError("export= needs a sweep, whose manifest has the commands of its runs; type sweep=NAME")
    sweep = begun(args)
    runs, others = runs_of(sweep)
    entries = {entry.folder: entry for entry in sweep.entries}
    finished = [(run, entries[run.folder]) for run in runs]
    paths = write_results(finished, writable(folder, "export"), sweep.name, [entry.id for entry in sweep.entries])
    there = exported(folder, sweep.name)
    missing = [other for other in others if entries[other.folder].id not in there]
    for line in [*(f"not exported: {other}" for other in missing), *map(str, paths)]:
        print(line)


def report_on_data(data: Path, output: Path) -> None:
    studies = open_studies(data, CONFIGS)
    write_study(studies, writable(output))
    print(output / "README.md")


def show(table: Table, title: str) -> None:
    printed = Printed(title=title, box=SIMPLE_HEAD)
    shown = SHORT if table.name == "cells" else range(len(table.columns))
    for i in shown:
        printed.add_column(table.columns[i], justify="right" if i else "left", no_wrap=not i)
    for row in table.rows:
        printed.add_row(*(row[i] for i in shown))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(printed)
    console.print(f"{table.legend}\n", highlight=False)


if __name__ == "__main__":
    guard(main)
