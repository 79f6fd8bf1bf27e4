"""Compare finished runs: python scripts/report.py runs=FOLDER [output=FOLDER] [title=TEXT]

`runs` is a folder of run folders, or a list [A,B]. Writes table.md, table.csv, comparison.png,
comparison.svg and index.html into `output` (default: report/ inside the first folder).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ema_nesterov.cli import arguments, guard
from ema_nesterov.errors import ConfigError
from ema_nesterov.reporting.figures import draw
from ema_nesterov.reporting.page import write_page
from ema_nesterov.reporting.runs import find_runs
from ema_nesterov.reporting.table import COLUMNS, LEGEND, rows, verdicts, write_table


@dataclass
class Arguments:
    runs: Any = "runs"
    output: str | None = None
    title: str = "Lookahead or not"


def main() -> None:
    args = arguments(Arguments, __doc__)
    names = args.runs if isinstance(args.runs, list) else [args.runs]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"runs={args.runs} must be a folder, or a list [A,B] of them; quote a name of digits")
    roots = [Path(name) for name in names]
    runs, others = find_runs(roots)
    folder = Path(args.output) if args.output else roots[0] / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"cannot write {folder}: {e.strerror}; type output=FOLDER") from None
    write_table(runs, folder)
    write_page(runs, others, draw(runs, folder), folder / "index.html", args.title)
    table = Table(title=args.title, box=SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=column == "run")
    for row in rows(runs):
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for line in [LEGEND, "", *(f"not counted: {other}" for other in others), *verdicts(runs)]:
        console.print(line, highlight=False)
    console.print(f"table, figure and page: {folder}", highlight=False)


if __name__ == "__main__":
    guard(main)
