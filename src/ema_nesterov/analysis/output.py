"""What an analysis writes: figures as PNG and SVG, tables as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from ..errors import ConfigError
from ..plotting import STYLE, save


def folder_for(output: str) -> Path:
    """Make the folder. Raises ConfigError where that cannot be done."""
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"cannot write {folder}: {e.strerror}; type output=FOLDER") from None
    return folder


@contextmanager
def figure(folder: Path, name: str, columns: int = 1, rows: int = 1, size: tuple[float, float] = (4.6, 3.6)) -> Any:
    """(drawing, axes as a list), saved as name.png and name.svg."""
    with plt.rc_context(STYLE):
        shape = (size[0] * columns, size[1] * rows)
        drawing, axes = plt.subplots(rows, columns, figsize=shape, layout="constrained", squeeze=False)
        yield drawing, list(axes.flat)
        save(drawing, folder, name)


def table(folder: Path, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """name.csv; numbers to 10 digits."""
    with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(columns)
        writer.writerows([f"{cell:.10g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
