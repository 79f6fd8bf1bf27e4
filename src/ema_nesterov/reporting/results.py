"""Finished runs as CSV files, and read back: what a repository can hold when the run folders are gone.

NAME.csv          a row a run: settings, final losses in nats per token, and the command that repeats it
NAME_curves.csv   its validations
NAME_probes.csv   the loss along x + a d
NAME_noise.csv    the gradient noise
"""

from __future__ import annotations

import csv
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..cli import composed_each
from ..errors import DataError, one_line
from ..sweeps.manifest import Entry
from ..training.identity import identity
from .runs import Run

LOSSES = {"val_loss": "val/loss", "val_lookahead_loss": "val/lookahead_loss", "val_ema_loss": "val/ema_loss"}
GROUPS = ("model", "dataset", "optimizer", "lookahead")
COLUMNS = (
    *(*GROUPS, "alpha", "ema_decay", "lr", "schedule", "steps", "tokens", "seed"),
    *(*LOSSES, "device", "commit", "batch_tokens", "matched_alpha", "other", "seconds", "run", "command"),
)
PLACE = {"step": "step", "tokens": "tokens", "seconds": "time"}
TABLES = {  # columns, and the keys of metrics.jsonl; the first of them that is no place says which lines
    "curves": {**PLACE, **LOSSES},
    "probes": {
        **PLACE,
        **{"loss": "probe/loss", "direction": "probe/direction", "position": "probe/position"},
    },
    "noise": {**PLACE, **{"trace": "noise/trace", "gradient": "noise/gradient", "scale": "noise/scale"}},
}


def stem(sweep: str) -> str:
    """What the files of a sweep are called."""
    return sweep.replace("/", "_")


def write_results(runs: Sequence[tuple[Run, Entry]], folder: Path, sweep: str, order: Sequence[str]) -> list[Path]:
    """Write the tables of these runs of a sweep; returns the files.

    What stands there of other runs stays: their folders may be gone. order: the ids of the sweep's runs.
    """
    tables = {path_of(folder, sweep): (COLUMNS, [row(run, entry) for run, entry in runs])}
    for table, keys in TABLES.items():
        marker = list(keys.values())[len(PLACE)]
        lines = ((entry.id, line) for run, entry in runs for line in run.metrics if marker in line)
        rows = [{"run": id, **{column: line.get(key) for column, key in keys.items()}} for id, line in lines]
        tables[path_of(folder, sweep, table)] = (("run", *keys), rows)
    new, rank = {entry.id for _, entry in runs}, {id: i for i, id in enumerate(order)}
    for path, (columns, rows) in tables.items():
        rows[:0] = [line for line in (read_table(path, columns) if path.exists() else []) if line["run"] not in new]
        rows.sort(key=lambda line: rank.get(line["run"], len(rank)))
    for path, (columns, rows) in tables.items():  # once all could be read
        write_table(path, columns, rows)
    return list(tables)


def path_of(folder: Path, sweep: str, table: str = "") -> Path:
    return folder / f"{stem(sweep)}{table and '_'}{table}.csv"


def exported(folder: Path, sweep: str) -> set[str]:
    """The runs of a sweep that stand in a folder, maybe none yet. Raises DataError where there is no folder."""
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; python scripts/report.py export={folder} makes it")
    path = path_of(folder, sweep)
    return set(distinct(path, "run")) if path.exists() else set()


def write_table(path: Path, columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def row(run: Run, entry: Entry) -> dict[str, Any]:
    cfg, header = run.config, provenance_of(run)
    look, schedule = cfg.lookahead, cfg.schedule
    other = {key: look[key] for key in look if key not in ("name", "alpha", "ema_decay") and look[key] is not None}
    return {
        **{key: cfg[key].get("name") or cfg[key].get("_target_") for key in GROUPS},
        "alpha": look.get("alpha"),
        "ema_decay": look.get("ema_decay"),
        "lr": cfg.optimizer.get("lr"),
        "schedule": f"{schedule.decay}, {schedule.decay_steps:g}",
        "steps": cfg.steps,
        "tokens": cfg.steps * run.tokens_per_step,
        "seed": cfg.seed,
        **{column: run.final.get(key) for column, key in LOSSES.items()},
        "device": header.get("device", "unknown"),
        "commit": header.get("git", "unknown")[:12],
        "batch_tokens": run.tokens_per_step,
        "matched_alpha": run.matched_alpha or None,
        "other": " ".join(f"{key}={value}" for key, value in other.items()),
        "seconds": run.final["time"],
        "run": entry.id,
        "command": shlex.join(entry.overrides),
    }


def provenance_of(run: Run) -> dict[str, str]:
    """What the head of config.yaml says: on what the run began."""
    try:
        lines = (run.folder / "config.yaml").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = [line.removeprefix("# ").partition(": ") for line in lines if line.startswith("# ")]
    return {key: value for key, _, value in reversed(pairs)}  # the first of each key


def read_results(path: Path, configs: Path) -> list[Run]:
    """The runs of NAME.csv and the tables beside it; `folder` is the run's name.

    Their configs are composed from their commands. Raises DataError for files that `write_results` did not write, and
    where a command no longer composes the run that it was.
    """
    rows = read_table(path, COLUMNS)
    metrics: dict[str, list[dict[str, Any]]] = {row["run"]: [] for row in rows}
    for table, keys in TABLES.items():
        beside = path.with_name(f"{path.stem}_{table}.csv")
        for line in read_table(beside, ("run", *keys)) if beside.exists() else []:
            values = {key: number(line[column]) for column, key in keys.items() if line[column] != ""}
            try:
                metrics[line["run"]].append(values)
            except KeyError:
                raise DataError(f"{beside} has run {line['run']}, which {path} has not; export both again") from None
    composed = composed_each(configs, [shlex.split(row["command"]) for row in rows])
    return [opened(path, row, cfg, metrics[row["run"]]) for row, cfg in zip(rows, composed, strict=True)]


def distinct(path: Path, column: str) -> list[str]:
    """What stands in a column of NAME.csv, each once, in order of appearance."""
    return list(dict.fromkeys(row[column] for row in read_table(path, COLUMNS)))


def opened(path: Path, row: dict[str, str], cfg: DictConfig, metrics: list[dict[str, Any]]) -> Run:
    run = Run(Path(row["run"]), cfg, {"status": "finished", "step": cfg.steps}, metrics)
    if (id := f"{identity(cfg)}/seed{cfg.seed}") != row["run"]:
        raise DataError(f"{path}: the command of {row['run']} composes {id} now: the configs have changed")
    if not run.curve("val/loss")[0] or run.loss != number(row["val_loss"]):
        raise DataError(f"{path}: val_loss of {row['run']} is not the last of its curve; export both again")
    return run


def read_table(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as f:
            reader = csv.DictReader(f)
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as e:
        raise DataError(
            f"{path} cannot be read ({one_line(e)}); python scripts/report.py export=FOLDER writes it"
        ) from None
    if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
        raise DataError(f"{path} has no column {missing[0]}; python scripts/report.py export=FOLDER writes it")
    if short := [i for i, line in enumerate(rows, start=2) if None in line.values() or None in line]:
        raise DataError(f"{path}, line {short[0]}, has not {len(reader.fieldnames or ())} cells; export it again")
    return rows


def number(text: str) -> Any:
    """An int, a float, or the text where it is none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
