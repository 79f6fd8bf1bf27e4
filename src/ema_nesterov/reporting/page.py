"""One HTML page that holds everything: it opens from a disk, with no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from omegaconf import OmegaConf

from .cells import Cell
from .layout import Figure
from .runs import Unfinished
from .table import Table

FEW = 12  # sentences that a page begins with
STYLE = """
:root { color-scheme: light; --line: #ddd; --soft: #666; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
th { font-weight: 600; font-size: .85rem; color: var(--soft); }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2rem 0; }
svg { width: 100%; height: auto; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px; }
.soft, figcaption { color: var(--soft); }
"""


def write_page(
    path: Path,
    title: str,
    said: Sequence[str],
    tables: Sequence[Table],
    figures: Sequence[Figure],
    cells: Sequence[Cell],
    others: Sequence[Unfinished],
) -> None:
    """What came out, the figures, the tables, what is not counted, and the configs as one self-contained file."""
    missing = "".join(f"<li>{escape(str(other))}</li>" for other in others)
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>",
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>",
        words(said),
        *(html_table(table) for table in tables[:1]),
        *(html_figure(figure, i) for i, figure in enumerate(figures)),
        *(html_table(table) for table in tables[1:]),
        f"<h2>Not finished, not counted</h2><ul>{missing}</ul>" if others else "",
        "<h2>Configs</h2>",
        *(
            f"<details><summary>{escape(cell.label)}: {escape(', '.join(str(run.folder) for run in cell.runs))}"
            f"</summary><pre>{escape(OmegaConf.to_yaml(cell.first.config))}</pre></details>"
            for cell in cells
        ),
        "</body></html>\n",
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def words(said: Sequence[str]) -> str:
    text = "".join(f"<p>{escape(sentence)}</p>" for sentence in said)
    if len(said) <= FEW:
        return text
    return f"<details><summary>{len(said)} comparisons in words</summary>{text}</details>"


def html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in table.rows)
    return (
        f"<h2>{escape(table.title)}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<p class='soft'>{escape(table.legend)}</p>"
    )


def html_figure(figure: Figure, number: int) -> str:
    """The SVG without its XML prologue. Each has ids of its own, or one figure would clip with another's paths."""
    text = figure.svg.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    for mark in ('id="', "url(#", 'xlink:href="#'):
        text = text.replace(mark, f"{mark}f{number}-")
    return f"<figure id='figure-{figure.svg.stem}'>{text}<figcaption>{escape(figure.caption)}</figcaption></figure>"
