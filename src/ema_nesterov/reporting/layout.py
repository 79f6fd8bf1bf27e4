"""What the figures of a report share: their data, panels and colors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError
from ..schemas import SCHEMAS
from .cells import Cell, Comparison, cells_of, comparisons_of, problem
from .published import Published
from .runs import Run, Unfinished

WIDTH, HEIGHT = 4.6, 3.6  # inches of a panel
BASE, CONTROL = "0.35", "C1"  # colors
COLORS = ["C2", "C0", "C3", "C4", "C5", "C6", "C8", "C9"]


@dataclass
class Figure:
    svg: Path
    caption: str


@dataclass
class Data:
    cells: list[Cell]
    comparisons: list[Comparison]
    others: list[Unfinished]
    published: dict[int, Published]  # by the index of a cell

    @property
    def runs(self) -> list[Run]:
        return [run for cell in self.cells for run in cell.runs]

    def where(self, wanted: dict[str, Any]) -> Data:
        """What is left of runs that have these values of these keys, or one of a list, or not the key at all.

        Raises ConfigError for a key that no config has.
        """
        names = {f.name for schema in SCHEMAS.values() for f in fields(schema)}
        if unknown := [key for key in wanted if not names.issuperset(key.split("."))]:
            raise ConfigError(f"a figure asks for where: {unknown[0]}, a key that no config has; mend it")

        def fits(cfg: DictConfig | None) -> bool:
            found = [(None if cfg is None else OmegaConf.select(cfg, key), want) for key, want in wanted.items()]
            return all(is_ is None or is_ in (want if isinstance(want, list) else [want]) for is_, want in found)

        cells = cells_of([run for run in self.runs if fits(run.config)])
        old = {id(run): i for i, cell in enumerate(self.cells) for run in cell.runs}
        published = {
            i: self.published[known] for i, cell in enumerate(cells) if (known := old[id(cell.first)]) in self.published
        }
        return Data(cells, comparisons_of(cells), [o for o in self.others if fits(o.config)], published)


Drawn = tuple[Drawing, str] | None


def panels(count: int, height: float = HEIGHT) -> tuple[Drawing, list[Axes]]:
    """Up to three in a row."""
    columns = min(count, 3)
    rows = -(-count // columns)
    drawing, axes = plt.subplots(
        rows, columns, figsize=(WIDTH * columns, height * rows), layout="constrained", squeeze=False
    )
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_axis_off()
    return drawing, flat[:count]


def families(cells: list[Cell]) -> list[list[Cell]]:
    """Cells of one problem together, in order."""
    found: list[list[Cell]] = []
    for cell in cells:
        near = next((family for family in found if problem(family[0]) == problem(cell)), None)
        if near is None:
            found.append([cell])
        else:
            near.append(cell)
    return found


def colors(family: list[Cell]) -> Iterator[tuple[Cell, Any]]:
    rest = iter(COLORS * len(family))
    for cell in family:
        yield cell, BASE if cell.is_base else CONTROL if cell.first.matched_alpha else next(rest)


def ticks_at(ax: Axes, places: set[float]) -> None:
    """A logarithmic axis that names the places that were measured."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(places), [f"{place:g}" for place in sorted(places)])
    ax.minorticks_off()


def about(family: list[Cell]) -> str:
    cfg = family[0].first.config
    optimizer = cfg.optimizer.get("name") or cfg.optimizer.get("_target_")
    return f"{cfg.model.get('name', 'model')}, {optimizer}, {cfg.batch_size} x {cfg.seq_len} tokens"


def place(cfg: DictConfig, *keys: str | None) -> tuple[Any, ...]:
    return tuple(value(cfg, key) if key else None for key in keys)


def value(cfg: DictConfig, key: str) -> Any:
    found = OmegaConf.select(cfg, key)
    if found is None:
        raise ConfigError(f"a figure asks for {key}, which {cfg.name} does not have; mend the figures of the sweep")
    return found
