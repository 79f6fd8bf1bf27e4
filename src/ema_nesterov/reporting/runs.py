"""Run folders read back, each beside the run without a lookahead that it is measured against."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..errors import DataError, UserError, one_line
from ..training.folder import load_config
from ..training.logs import read_metrics

# What may differ between a run and its base: the lookahead, and what does not change the weights.
NOT_COMPARED = (
    *("name", "lookahead", "probe_ema_decay", "runs_dir", "micro_batch_size", "logger", "trainer", "plugins"),
    *("eval_every", "probe_every", "checkpoint_every", "log_every"),
)


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

    @cached_property
    def conditions(self) -> str:
        """All that must be equal for two runs to be comparable."""
        plain: Any = OmegaConf.to_container(self.config)
        return json.dumps({k: v for k, v in plain.items() if k not in NOT_COMPARED}, sort_keys=True)

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        lines = [line for line in self.metrics if key in line]
        return [line["step"] for line in lines], [line[key] for line in lines]

    @property
    def final(self) -> dict[str, Any]:
        """The last validation."""
        return [line for line in self.metrics if "val/loss" in line][-1]

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


def find_runs(roots: list[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs below the folders, and a line for each that is not finished, or has no loss to compare.

    Raises DataError when there is no finished run, or one whose files train.py did not write.
    """
    runs, others = [], []
    for root in roots:
        if not root.exists():
            raise DataError(f"{root} does not exist; type runs=FOLDER, a folder that train.py wrote")
        for folder in sorted(path.parent for path in root.rglob("status.json")):
            try:
                status = json.loads((folder / "status.json").read_text())
                if status["status"] != "finished":
                    others.append(f"{folder}: {status['status']} at step {status['step']} {status['message']}".strip())
                    continue
                run = Run(folder, load_config(folder), status, read_metrics(folder / "metrics.jsonl"))
                losses = run.curve("val/loss")[1]
                if losses and all(isinstance(loss, int | float) and abs(loss) < 700 for loss in losses):
                    runs.append((run.has_lookahead, run.name, run.config.seed, run))
                else:
                    others.append(f"{folder}: no validation loss that is a number")
            except UserError:
                raise
            except Exception as e:  # what parsers raise, and what follows from a key that is not there
                raise DataError(
                    f"{folder} has a damaged status.json, config.yaml or metrics.jsonl ({one_line(e)}); take it away"
                ) from None
    if not runs:
        below = ", ".join(map(str, roots))
        raise DataError(f"no finished run below {below} has validation losses; type another runs=FOLDER")
    return [run for *_, run in sorted(runs, key=lambda entry: entry[:3])], others


def base_of(run: Run, runs: list[Run]) -> Run | None:
    """The run that differs in nothing but having no lookahead."""
    matches = [r for r in runs if not r.has_lookahead and r.conditions == run.conditions]
    return matches[0] if run.has_lookahead and matches else None
