"""The numbers of the paper and of the public benchmark, found for the cells that repeat them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..cli import composed_each
from ..errors import ConfigError
from ..training.identity import changed
from .cells import Cell

PLACES = ("dataset.path", "dataset.output")  # where the data lie changes no number


@dataclass
class Published:
    """An entry of docs/paper_results.yaml, whose head says what the fields mean."""

    run: str
    source: str
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int | None = None
    loss: float | None = None
    loss_sd: float | None = None
    perplexity: float | None = None
    perplexity_drop: float | None = None
    gpu_hours: float | None = None
    curve: dict[int, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Its perplexity, or how much below the base's it is."""
        if self.perplexity is not None:
            return f"{self.perplexity:.2f}"
        if self.loss is not None:
            return f"{math.exp(self.loss):.2f}"
        return f"base - {self.perplexity_drop}" if self.perplexity_drop is not None else "-"


def load_published(path: Path) -> list[Published]:
    return [Published(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["results"]]


def published_for(cells: list[Cell], entries: list[Published], configs: Path) -> dict[int, Published]:
    """The entry of each cell, by its index: one whose experiment and settings are the cell's in all that changes
    the result. Nothing else would be the same number."""
    names = {cell.name for cell in cells}
    wanted = [entry for entry in entries if entry.run in names]
    try:
        settings = settings_of(wanted, configs)
    except ConfigError:  # configs of another version
        return {}
    pairs = [(i, e) for i, cell in enumerate(cells) for e, s in zip(wanted, settings, strict=True)
             if e.run == cell.name and s == without_places(cell.settings)]  # fmt: skip
    return dict(pairs)


def settings_of(entries: list[Published], configs: Path) -> list[dict[str, Any]]:
    """What decides the result of the runs that each entry is of."""
    commands = [[f"experiment={e.run}", *(f"{key}={value}" for key, value in e.settings.items())] for e in entries]
    return [without_places(dict(changed(cfg))) for cfg in composed_each(configs, commands)]


def without_places(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in PLACES}
