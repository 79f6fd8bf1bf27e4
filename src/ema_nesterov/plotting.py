"""How all figures look, and how they are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "ema-nesterov",  # the same picture twice is the same file
}


def save(drawing: Figure, folder: Path, name: str) -> None:
    """name.png and name.svg; the drawing is closed."""
    for kind in ("png", "svg"):
        drawing.savefig(folder / f"{name}.{kind}", dpi=130, metadata={"Date": None} if kind == "svg" else None)
    plt.close(drawing)
    with Image.open(folder / f"{name}.png") as picture:  # a palette: a third of the size
        small = picture.convert("RGB").quantize(256)
    small.save(folder / f"{name}.png", optimize=True)
