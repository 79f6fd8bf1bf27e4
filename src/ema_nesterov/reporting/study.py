"""A study as one Markdown page, made of CSV files that `write_results` wrote.

Seed 0 chooses: the learning rate of each base, the values of each lookahead. The other seeds are counted: what was
chosen because it came out well on one seed is judged on others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from ..errors import DataError
from ..plotting import STYLE, save
from ..sweeps.plan import open_sweep_file, sweep_names
from .cells import AHEAD, BEHIND, UNCLEAR, Cell, Comparison, Statistic, cells_of, comparisons_of
from .comparison import along
from .figures import draw_all, stages
from .gains import forests
from .layout import Data, Figure
from .results import TABLES, distinct, read_results, stem
from .runs import Run
from .table import SEEDS, Table, interval, share, spread, table_of_cells

CHOOSING = 0  # the seed that does
COUNTED = 3  # seeds that a comparison needs, to be one
Key = tuple[str, str, int]  # model, optimizer, tokens of a batch


@dataclass
class Study:
    name: str
    title: str
    figures: list[dict[str, Any]]
    words: str  # what its authors make of it: NAME.md beside the data
    runs: list[Run]
    devices: list[str]

    def __post_init__(self) -> None:
        self.cells = cells_of([run for run in self.runs if run.config.seed != CHOOSING])
        self.comparisons = [c for c in comparisons_of(self.cells) if c.same_length and len(c.pairs) >= COUNTED]
        self.choosing = [run for run in self.runs if run.config.seed == CHOOSING]

    @property
    def rates(self) -> dict[Key, dict[float, float]]:
        """The final loss of each base on the choosing seed, by its learning rate."""
        found: dict[Key, dict[float, float]] = {}
        for run in self.choosing:
            if run.is_base:
                found.setdefault(key_of(run), {})[run.config.optimizer.lr] = run.loss
        return found

    @property
    def tried(self) -> dict[tuple[Key, str], list[Run]]:
        """The runs on the choosing seed of each lookahead and control, by name."""
        found: dict[tuple[Key, str], list[Run]] = {}
        for run in self.choosing:
            if not run.is_base:
                found.setdefault((key_of(run), run.name), []).append(run)
        return found

    def tuned_base(self, key: Key) -> Cell | None:
        """The counted seeds of the base at the learning rate that was chosen."""
        bases = (cell for cell in self.cells if cell.is_base and key_of(cell.first) == key)
        return next((cell for cell in bases if self.is_tuned(cell.first)), None)

    def bests(self) -> Iterator[Best]:
        """Each lookahead and control as the choosing seed chose it, its learning rate included."""
        for (key, _), tried in self.tried.items():
            run, base = min(tried, key=lambda run: run.loss), self.tuned_base(key)
            if base is not None:
                cell = next((cell for cell in self.cells if cell.first.folder.parent == run.folder.parent), Cell([]))
                losses = {run.config.seed: run.loss for run in base.runs}
                pairs = [(run.loss, losses[run.config.seed]) for run in cell.runs if run.config.seed in losses]
                yield Best(run, base, Statistic(tuple(loss - its for loss, its in pairs)))

    def is_tuned(self, run: Run) -> bool:
        rates = self.rates.get(key_of(run), {})
        return bool(rates) and run.config.optimizer.lr == min(rates, key=lambda lr: rates[lr])


@dataclass(frozen=True)
class Best:
    """What the choosing seed chose of one lookahead, and what the counted seeds say of it."""

    run: Run
    base: Cell  # at its own best learning rate
    difference: Statistic

    @property
    def is_counted(self) -> bool:
        return self.difference.n >= COUNTED


def key_of(run: Run) -> Key:
    return run.config.model.name, run.config.optimizer.name, run.tokens_per_step


def open_studies(folder: Path, configs: Path) -> list[Study]:
    """Raises DataError where the folder holds no results, or some that were not exported by this code."""
    known = {stem(name): name for name in sweep_names(configs)}
    beside = tuple(f"_{table}" for table in TABLES)
    paths = [path for path in sorted(folder.glob("*.csv")) if not path.stem.endswith(beside)]
    if not paths:
        raise DataError(f"{folder} holds no results; python scripts/report.py sweep=NAME export={folder} writes some")
    studies = []
    for path in paths:
        if path.stem not in known:
            raise DataError(f"{path} is of no sweep of configs/sweep; take it away")
        file, words = open_sweep_file(configs, known[path.stem]), path.with_suffix(".md")
        text = words.read_text(encoding="utf-8").strip() if words.exists() else ""
        runs, devices = read_results(path, configs), distinct(path, "device")
        studies.append(Study(known[path.stem], file.title, file.figures, text, runs, devices))
    return studies


HEAD = """# Does a lookahead help?

`python scripts/report.py data=FOLDER` wrote this page from the CSV files in this folder: its numbers are theirs."""


def write_study(studies: Sequence[Study], output: Path) -> None:
    """README.md and its figures, in `output`."""
    parts = [HEAD]
    for study in studies:
        parts += page(study, output)
    (output / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def page(study: Study, output: Path) -> list[str]:
    data = Data(cells_of(study.runs), comparisons_of(cells_of(study.runs)), [], {})
    return [
        f"## {study.title}",
        inventory(study),
        *([study.words] if study.words else []),
        *draw_verdicts(study, output),
        "### Against the base",
        headline(study),
        against_base(study).markdown(),
        "### Each at its own best",
        f"Seed {CHOOSING} chose the base's learning rate, and the learning rate and values of each lookahead; the "
        "other seeds are counted, in pairs. What is only a larger step gains below the base's best rate, and not here.",
        own_best(study).markdown(),
        "### The learning rate of each base",
        f"Final loss at x on seed {CHOOSING}, which chooses (bold); the other seeds are counted.",
        rates(study).markdown(),
        "### The values of each lookahead",
        f"Likewise final losses on seed {CHOOSING}.",
        values(study).markdown(),
        "### The loss at the lookahead point",
        "\n".join(positions(study)) or "No run was probed.",
        "### All that was counted",
        SEEDS,
        table_of_cells(study.cells, study.comparisons, {}).markdown(),
        "### Figures",
        *(shown(figure) for figure in draw_all(study.figures, data, output, f"{stem(study.name)}_")),
    ]


def inventory(study: Study) -> str:
    models, datasets = (sorted({run.config[key].name for run in study.runs}) for key in ("model", "dataset"))
    tokens = sum(run.config.steps * run.tokens_per_step for run in study.runs) / 1e6
    hours = sum(run.final["time"] for run in study.runs) / 3600
    table = f"{stem(study.name)}.csv"
    return (
        f"{len(study.runs)} runs of {', '.join(models)} on {', '.join(datasets)}, {tokens:,.0f}M tokens and "
        f"{hours:.1f} hours in all, on {' and '.join(study.devices)}. `python scripts/sweep.py run sweep={study.name}` "
        f"repeats them; the column `command` of [{table}]({table}), behind `python scripts/train.py`, repeats one, and "
        "`commit` is the revision that ran."
    )


# --- what is compared -----------------------------------------------------------------------------


def headline(study: Study) -> str:
    """How often EMA-Nesterov came out ahead of its tuned base, and of its control."""
    mine = [
        c
        for c in study.comparisons
        if c.cell.first.config.lookahead.name == "ema_nesterov" and study.is_tuned(c.cell.first)
    ]
    texts = []
    for is_control, whose in ((False, "its base"), (True, "the base at its learning rate (the control)")):
        found = [c.difference.verdict for c in mine if c.is_control == is_control and c.difference]
        counts = [f"{found.count(word)} {word}" for word in (AHEAD, BEHIND, UNCLEAR) if word in found]
        if counts:
            texts.append(f"EMA-Nesterov against {whose} in {len(found)} comparisons: {', '.join(counts)}.")
    return " ".join(texts) or "No comparison has enough seeds yet."


def against_base(study: Study) -> Table:
    columns = ("config", "lr", "batch", "seeds", "loss - base", "95%", "steps saved", "loss - control", "95%", "so")
    rows = []
    for cell in study.cells:
        mine = [c for c in study.comparisons if c.cell is cell]
        base, control = (next((c for c in mine if c.is_control == wanted), None) for wanted in (False, True))
        if base is not None and base.difference is not None:
            cfg = cell.first.config
            rate = f"{cfg.optimizer.lr:g}" + ("" if study.is_tuned(cell.first) else " (not tuned)")
            place = [label(cell), rate, str(cell.first.tokens_per_step), str(len(base.pairs))]
            beyond = against(control) if control else ("-", "-")
            rows.append([*place, *against(base), saved(base), *beyond, base.difference.verdict])
    return Table("against", "Against the base", columns, rows, "")


def own_best(study: Study) -> Table:
    columns = ("runs", "batch", "lr, values", "base's lr", "seeds", "loss - base", "95%", "so")
    rows = []
    for best in study.bests():
        found, rate = best.difference, best.base.first.config.optimizer.lr
        place = [best.run.config.name, str(best.run.tokens_per_step), described(best.run), f"{rate:g}", str(found.n)]
        told = (
            (spread(found, 4, sign=True), interval(found, sign=True), found.verdict)
            if best.is_counted
            else ("-", "-", "not counted")
        )
        rows.append([*place, *told])
    return Table("own_best", "", columns, rows, "")


def draw_verdicts(study: Study, output: Path) -> list[str]:
    """Everything at its own best, and at the learning rate of its base."""
    shown = {
        "each at its own best": {named(best.run): best.difference for best in study.bests() if best.is_counted},
        "at the base's learning rate": {
            named(c.cell.first): c.difference
            for c in study.comparisons
            if not c.is_control and study.is_tuned(c.cell.first) and c.difference
        },
    }
    shown = {title: found for title, found in shown.items() if found}
    if not shown:
        return []
    name = f"{stem(study.name)}_headline"
    with plt.rc_context(STYLE):
        save(forests(shown), output, name)
    caption = (
        "Final loss less that of the tuned base of the same seed: seeds, mean and 95% interval. Left of the line: "
        "ahead. Behind each name, the learning rate and the values."
    )
    return [picture(name, caption)]


def named(run: Run) -> str:
    return f"{run.config.name.rpartition('/')[2]}, {run.tokens_per_step} tokens, {described(run)}"


def described(run: Run) -> str:
    """The learning rate, and what a table says of a lookahead or a control."""
    return ", ".join(filter(None, (f"{run.config.optimizer.lr:g}", values_of(run))))


def values_of(run: Run) -> str:
    return f"alpha {run.matched_alpha:g}" if run.matched_alpha else settings(run.config.lookahead)


def label(cell: Cell) -> str:
    cfg = cell.first.config
    if cell.first.matched_alpha:
        return f"{cell.name}, alpha {cell.first.matched_alpha:g}"
    return ", ".join([cell.name, settings(cfg.lookahead)]) if cell.first.has_lookahead else cell.name


def settings(lookahead: Any) -> str:
    """What a table says of a lookahead."""
    names = {"ema_decay": "gamma"}
    kept = (
        key for key in ("alpha", "ema_decay", "k", "lr", "momentum", "mu_x", "mu_y") if lookahead.get(key) is not None
    )
    return " ".join(f"{names.get(key, key)} {lookahead[key]:g}" for key in kept)


def against(comparison: Comparison) -> tuple[str, str]:
    assert comparison.difference is not None
    return spread(comparison.difference, 4, sign=True), interval(comparison.difference, sign=True)


def saved(comparison: Comparison) -> str:
    if not comparison.saved:
        return "not reached"
    steps = Statistic(tuple(steps for steps, _, _ in comparison.saved))
    few = "" if steps.n == len(comparison.pairs) else f", {steps.n} of {len(comparison.pairs)} seeds"
    return share(steps.mean, comparison.base.first.status["step"]) + few


# --- what was chosen ------------------------------------------------------------------------------


def rates(study: Study) -> Table:
    rows = []
    for (model, optimizer, batch), found in study.rates.items():
        best = min(found, key=lambda lr: found[lr])
        inner = min(found) < best < max(found)
        tried = chosen({f"{lr:g}": f"{found[lr]:.4f}" for lr in sorted(found)}, f"{best:g}")
        rows.append([model, optimizer, str(batch), tried, "yes" if inner else "no"])
    return Table("rates", "", ("model", "optimizer", "batch", "lr: loss", "bracketed"), rows, "")


def values(study: Study) -> Table:
    rows = []
    for (key, name), tried in study.tried.items():
        best = min(tried, key=lambda run: run.loss)
        for lr in sorted({run.config.optimizer.lr for run in tried}):
            there = [run for run in tried if run.config.optimizer.lr == lr]
            losses = {values_of(run): f"{run.loss:.4f}" for run in there}
            rows.append([name, str(key[2]), f"{lr:g}", chosen(losses, values_of(best) if best in there else "")])
    return Table("values", "", ("runs", "batch", "lr", "values: loss"), rows, "")


def chosen(found: dict[str, str], best: str) -> str:
    return "; ".join(f"**{key}: {value}**" if key == best else f"{key}: {value}" for key, value in found.items())


def positions(study: Study) -> Iterable[str]:
    """Where along x + a d the loss was lowest, in each stage and direction: the paper's Figures 2 and 8."""
    for cell in study.cells:
        for stage, step in stages(cell).items():
            told = []
            for direction, name in (("ema", "the EMA of the updates"), ("step", "the last update")):
                found = [line for run in cell.runs if (line := along(run, step, direction))]
                if found:
                    heights = {a: Statistic(tuple(line[a] - line[0.0] for line in found)).mean for a in found[0]}
                    lowest = min(heights, key=lambda a: heights[a])
                    told.append(
                        f"along {name} at a = {lowest:+g} ({heights[lowest]:+.4f}; {heights[1.0]:+.4f} at a = 1)"
                    )
            where = f"{label(cell)}, {cell.first.tokens_per_step} tokens, {stage}, step {step}"
            yield f"- {where}: lowest {', '.join(told)}"


def shown(figure: Figure) -> str:
    return picture(figure.svg.stem, figure.caption)


def picture(name: str, caption: str) -> str:
    return f"![{caption}]({name}.png)\n\n{caption}"
