"""One HTML page that holds everything: it opens from a disk, with no network."""

from __future__ import annotations

from html import escape
from pathlib import Path

from omegaconf import OmegaConf

from .runs import Run
from .table import COLUMNS, LEGEND, rows, verdicts

STYLE = """
:root { color-scheme: light; --line: #ddd; --soft: #666; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
th { font-weight: 600; font-size: .85rem; color: var(--soft); }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
svg { width: 100%; height: auto; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px; }
.soft { color: var(--soft); }
"""


def write_page(runs: list[Run], others: list[str], figures: list[Path], path: Path, title: str) -> None:
    """The verdicts, the table, the figures and the configs of the runs as one self-contained file."""
    head = "".join(f"<th>{escape(c)}</th>" for c in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows(runs))
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdicts(runs))
    unfinished = "".join(f"<li>{escape(line)}</li>" for line in others)
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{said}",
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>",
        f"<p class='soft'>{escape(LEGEND)}</p>",
        *(inline(figure) for figure in figures),
        f"<h2>Not finished, not counted</h2><ul>{unfinished}</ul>" if others else "",
        "<h2>Runs</h2>",
        *(
            f"<details><summary>{escape(str(run.folder))}</summary><pre>{escape(OmegaConf.to_yaml(run.config))}</pre>"
            "</details>"
            for run in runs
        ),
        "</body></html>\n",
    ]
    path.write_text("\n".join(parts))


def inline(figure: Path) -> str:
    """An SVG file without its XML prologue, to stand inside a page."""
    text = figure.read_text()
    return text[text.index("<svg") :]
