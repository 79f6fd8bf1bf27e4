"""Run folders read back: the finished runs, and what is to be said of the others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..config import typed
from ..errors import ConfigError, DataError, UserError, one_line
from ..sweeps.manifest import Sweep
from ..sweeps.state import states
from ..training.folder import load_config
from ..training.identity import changed
from ..training.logs import read_metrics

# What may differ between a run and its base: the lookahead or its control, and what does not change the weights.
NOT_COMPARED = (
    *("name", "lookahead", "probe_ema_decay", "runs_dir", "micro_batch_size", "logger", "trainer", "plugins"),
    *("eval_every", "eval_at", "probe_every", "noise_every", "checkpoint_every", "log_every"),
)
CONTROL = ("matched_alpha", "matched_warmup_steps", "matched_rest_steps")  # of the schedule


@dataclass
class Run:
    """One finished run."""

    folder: Path
    config: DictConfig
    status: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def label(self) -> str:
        return f"{self.name} seed {self.config.seed}"

    @property
    def has_lookahead(self) -> bool:
        return self.config.lookahead.name != "none"

    @property
    def is_base(self) -> bool:
        """Neither a lookahead nor the control of one."""
        return not self.has_lookahead and not self.matched_alpha

    @property
    def matched_alpha(self) -> float:
        """Of the control of a lookahead: the alpha that its learning rate goes with; else 0."""
        return self.config.schedule.get("matched_alpha") or 0.0

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """All that must be equal for a run and its base to be comparable; the seed, which pairs them, stands apart."""
        plain: Any = OmegaConf.to_container(self.config)
        kept = {key: value for key, value in plain.items() if key not in (*NOT_COMPARED, "seed")}
        kept["schedule"] = {key: value for key, value in kept["schedule"].items() if key not in CONTROL}
        return kept

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The keys that change the result, dotted, where they differ from the schema's defaults.

        Raises ConfigError for a run of another version of the code.
        """
        try:
            return dict(changed(typed(OmegaConf.to_container(self.config))))  # type: ignore[arg-type]
        except ConfigError as e:
            raise ConfigError(f"{self.folder}: {e}; take it away") from None

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.seq_len

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        lines = [line for line in self.metrics if key in line]
        return [line["step"] for line in lines], [line[key] for line in lines]

    @property
    def final(self) -> dict[str, Any]:
        """The last validation."""
        return [line for line in self.metrics if "val/loss" in line][-1]

    @property
    def loss(self) -> float:
        """At x, at the end, in nats per token."""
        return self.final["val/loss"]

    def step_at(self, loss: float) -> float | None:
        """The first step at which the validation loss is `loss` or less, interpolated linearly between
        evaluations; None when it never is."""
        steps, losses = self.curve("val/loss")
        for i, value in enumerate(losses):
            if value <= loss:
                if i == 0:
                    return float(steps[0])
                share = (losses[i - 1] - loss) / (losses[i - 1] - value)
                return steps[i - 1] + share * (steps[i] - steps[i - 1])
        return None

    def seconds_at(self, step: float) -> float:
        """Since the run began, interpolated linearly between evaluations."""
        lines = [(line["step"], line["time"]) for line in self.metrics if "val/loss" in line]
        for (a, before), (b, after) in pairwise(lines):
            if a <= step <= b:
                return before + (after - before) * (step - a) / (b - a)
        return lines[-1][1]


@dataclass(frozen=True)
class Unfinished:
    """A run that cannot be counted, and why."""

    folder: Path
    reason: str
    config: DictConfig | None = None

    def __str__(self) -> str:
        return f"{self.folder}: {self.reason}"


def find_runs(roots: list[Path]) -> tuple[list[Run], list[Unfinished]]:
    """The finished runs below the folders, and those that are not finished, or have no loss to compare.

    Raises DataError when there is no finished run, or one whose files train.py did not write.
    """
    opened: list[Run | Unfinished] = []
    for root in roots:
        if not root.exists():
            raise DataError(f"{root} does not exist; type runs=FOLDER, a folder that train.py wrote")
        for folder in sorted(path.parent for path in root.rglob("status.json")):
            opened.append(open_run(folder))
    runs, others = parted(opened)
    if not runs:
        below = ", ".join(map(str, roots))
        raise DataError(f"no finished run below {below} has validation losses; type another runs=FOLDER")
    return sorted(runs, key=lambda run: (not run.is_base, run.name, run.config.seed)), others


def runs_of(sweep: Sweep) -> tuple[list[Run], list[Unfinished]]:
    """Likewise of all runs of a sweep, in its order; those that have not begun are told too.

    Raises DataError when none is finished.
    """
    opened: list[Run | Unfinished] = []
    for entry, state in zip(sweep.entries, states(sweep), strict=True):
        if state.name == "finished":
            opened.append(open_run(entry.folder))
        else:
            told = state.name if state.name == "missing" else f"{state.name} at step {state.step} {state.message}"
            opened.append(Unfinished(entry.folder, told.strip(), entry.cfg))
    runs, others = parted(opened)
    if not runs:
        raise DataError(f"no run of {sweep.folder} is finished; python scripts/sweep.py status tells how they stand")
    return runs, others


def parted(opened: list[Run | Unfinished]) -> tuple[list[Run], list[Unfinished]]:
    return [o for o in opened if isinstance(o, Run)], [o for o in opened if isinstance(o, Unfinished)]


def open_run(folder: Path) -> Run | Unfinished:
    """Raises DataError for a folder whose files train.py did not write."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        if status["status"] != "finished":
            return Unfinished(folder, f"{status['status']} at step {status['step']} {status['message']}".strip())
        run = Run(folder, load_config(folder), status, read_metrics(folder / "metrics.jsonl"))
        losses, _ = run.curve("val/loss")[1], (run.is_base, run.conditions)  # what is not there is told now
    except UserError:
        raise
    except Exception as e:  # what parsers raise, and what follows from a key that is not there
        raise DataError(
            f"{folder} has a damaged status.json, config.yaml or metrics.jsonl ({one_line(e)}); take it away"
        ) from None
    if losses and all(isinstance(loss, int | float) and abs(loss) < 700 for loss in losses):
        return run
    return Unfinished(folder, "no validation loss that is a number", run.config)


def base_of(run: Run, runs: list[Run]) -> Run | None:
    """The run of the same seed that differs in nothing but having no lookahead, nor the control of one."""
    matches = [r for r in runs if r.is_base and r.config.seed == run.config.seed and r.conditions == run.conditions]
    return matches[0] if not run.is_base and matches else None
