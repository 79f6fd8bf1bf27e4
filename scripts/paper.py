"""Write docs/paper.md: each figure and table of the paper, its command, its cost, and the published numbers.

python scripts/paper.py [output=docs/paper.md]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ema_nesterov.cli import arguments, guard
from ema_nesterov.errors import ConfigError
from ema_nesterov.reporting.published import Published, load_published, settings_of, without_places
from ema_nesterov.sweeps.cost import ASSUMED_FLOAT32, ASSUMED_MFU, Cost, cost
from ema_nesterov.sweeps.plan import Planned, SweepFile, open_sweep_file, plan, split, sweep_names
from ema_nesterov.training.identity import changed

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, DOCS = ROOT / "configs", ROOT / "docs"
Entries = list[tuple[Published, dict[str, Any]]]  # with what decides their results
HEAD = f"""\
# The paper, figure by figure

Written by `scripts/paper.py` from [configs/sweep](../configs/sweep), [docs/paper_results.yaml](paper_results.yaml) and
[docs/benchmarks.json](benchmarks.json). [docs/reproducing.md](reproducing.md) goes through one from nothing.

Every sweep is planned, begun, watched and reported alike, on this machine or with SLURM:

```bash
python scripts/sweep.py plan sweep=figure_4      # the runs, how they stand, what they cost
python scripts/sweep.py run sweep=figure_4       # or: submit sweep=figure_4 sbatch="--partition=gpu"
python scripts/sweep.py status sweep=figure_4    # and resubmit for what remains
python scripts/report.py sweep=figure_4
```

GPU-hours are of one H100 or H200: tokens over the rate that the benchmark recorded for the model, or, where it has none
(marked ~), FLOPs at {ASSUMED_MFU:.0%} of 989 TFLOP/s; validation at the same rate, or at {ASSUMED_FLOAT32:.0%} of
67 TFLOP/s where it is in float32, as in the published runs (`model.eval_float32=false` makes it cheap).
"""


@dataclass
class Arguments:
    output: str = str(DOCS / "paper.md")


def main() -> None:
    args = arguments(Arguments, __doc__)
    try:
        Path(args.output).write_text(page(), encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot write {args.output}: {e.strerror}; type output=FILE") from None
    print(args.output)


def page() -> str:
    entries = load_published(DOCS / "paper_results.yaml")
    published = list(zip(entries, settings_of(entries, CONFIGS), strict=True))
    sections, rows = [], []
    ours = [name for name in sweep_names(CONFIGS) if not name.startswith("study/")]
    for name in sorted(ours, key=lambda name: ("/" in name or name == "quickstart", order(name))):
        file = open_sweep_file(CONFIGS, name)
        runs = plan(CONFIGS, [split(command) for command in file.runs], [])
        costs = [price for run in runs if (price := cost(run.cfg, DOCS / "benchmarks.json"))]
        rows.append(f"| [{name}](#{anchor(file.title)}) | {file.title} | {len(runs)} | {file.gpus} | {hours(costs)} |")
        sections.append(section(name, file, runs, costs, published))
    table = ["| sweep | what | runs | GPUs of each | GPU-hours |", "|---|---|---:|---:|---:|", *rows]
    return "\n".join([HEAD, *table, "", *sections])


def order(name: str) -> tuple[str, int]:
    digits = "".join(c for c in name.partition("_")[2] if c.isdigit() or c == "_").partition("_")[0]
    return name.partition("_")[0], int(digits or 0)


def anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def hours(costs: list[Cost]) -> str:
    """A laptop's runs have none to speak of."""
    total = sum(price.hours for price in costs)
    mark = "" if all(price.measured for price in costs) else "~"
    return f"{mark}{total:,.3g}" if total > 0.01 else "-"


def section(name: str, file: SweepFile, runs: list[Planned], costs: list[Cost], published: Entries) -> str:
    names = list(dict.fromkeys(run.cfg.name for run in runs))
    validation = sum(price.validation for price in costs)
    lines = [
        f"## {file.title}",
        "",
        f"`sweep={name}`: {len(runs)} runs, {hours(costs)} GPU-hours, {validation:.3g} of them validation.",
        f"Experiments: {', '.join(f'`{n}`' for n in names)}.",
        "",
        *(f"- Not in the paper: {line}." for line in file.unknown),
        *([""] if file.unknown else []),
        *numbers(published, runs),
    ]
    return "\n".join(lines)


def numbers(published: Entries, runs: list[Planned]) -> Iterator[str]:
    """Of the runs that this sweep repeats."""
    settings = [(run.cfg.name, without_places(dict(changed(run.cfg)))) for run in runs]
    held = [entry for entry, wanted in published if (entry.run, wanted) in settings]
    if not held:
        return
    yield "| published | settings | seeds | loss x | ppl x | GPU-hours of a run | source |"
    yield "|---|---|---:|---:|---:|---:|---|"
    for e in held:
        told = ", ".join(f"{key}={value}" for key, value in e.settings.items()) or "-"
        loss = "-" if e.loss is None else f"{e.loss}" + (f" ± {e.loss_sd}" if e.loss_sd else "")
        yield f"| {e.run} | {told} | {e.seeds or '-'} | {loss} | {e} | {e.gpu_hours or '-'} | {e.source} |"
    yield ""


if __name__ == "__main__":
    guard(main)
