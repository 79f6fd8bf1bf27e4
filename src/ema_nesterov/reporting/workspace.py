"""The W&B dashboard as plain data, which scripts/wandb_workspace.py turns into W&B's objects.

Sections hold panels: the name of a class of wandb_workspaces and its arguments, where metrics are keys of metrics.jsonl
as W&B gets them. Lines and bars follow the grouping of the runs, by W&B's group: what the seeds of a config have in
common. x is the iterate, y the lookahead point, e the weight EMA.
"""

from __future__ import annotations

from typing import Any

LOSSES = ("val/loss", "val/lookahead_loss", "val/ema_loss")  # at x, y and e
POSITIONS = ("-0.50", "+0.00", "+0.50", "+1.00")  # of those that are probed
SEARCHED = ("optimizer.lr", "lookahead.alpha", "lookahead.ema_decay", "lookahead.warmup_steps")


def lines(title: str, *y: str, x: str = "tokens", **more: Any) -> dict[str, Any]:
    seeds = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax", "max_runs_to_show": 100}
    return {"kind": "LinePlot", "title": title, "x": x, "title_x": x, "y": list(y), **seeds, **more}


def bars(title: str, metric: str, **more: Any) -> dict[str, Any]:
    seeds = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev", "max_runs_to_show": 1000}
    return {"kind": "BarPlot", "title": title, "metrics": [metric], "max_bars_to_show": 50, **seeds, **more}


def perplexity(title: str, loss: str) -> dict[str, Any]:
    """Of a loss whose perplexity is not logged. In W&B's expressions ** is a power."""
    return lines(title, loss, custom_expressions=[f"2.718281828459045 ** ${{{loss}}}"], log_y=True)


def gain(direction: str, position: str) -> str:
    """An expression: how much lower the loss is at x + a d than at x."""
    return f"${{probe/{direction}/+0.00}} - ${{probe/{direction}/{position}}}"


SECTIONS: dict[str, list[dict[str, Any]]] = {
    "Validation loss": [
        lines("Loss at x, over tokens", "val/loss"),
        lines("Loss at x, over steps", "val/loss", x="step"),
        lines("Loss at x, over seconds of training", "val/loss", x="time"),
        lines("Loss at x, y and e", *LOSSES),
        lines("Bits per byte at x", "val/bits_per_byte"),
    ],
    "Perplexity": [
        lines("Perplexity at x, the iterate", "val/perplexity", log_y=True),
        perplexity("Perplexity at y, the lookahead point", "val/lookahead_loss"),
        perplexity("Perplexity at e, the weight EMA", "val/ema_loss"),
    ],
    "Final values": [
        bars("Loss at x", "val/loss"),
        bars("Loss at y", "val/lookahead_loss"),
        bars("Loss at e", "val/ema_loss"),
        bars("Lowest loss at x under each name", "val/loss", groupby="config.name")
        | {"groupby_aggfunc": "min", "groupby_rangefunc": "none"},  # a search has many groups under one name
        {
            **{"kind": "ParallelCoordinatesPlot", "title": "Loss at x by what was searched"},
            "columns": [*(f"config.{key}" for key in SEARCHED), "val/loss"],
        },
    ],
    "Probe: loss along x + a d": [
        lines("d: away from the weight EMA", *(f"probe/ema/{a}" for a in POSITIONS)),
        lines("d: the last step", *(f"probe/step/{a}" for a in POSITIONS)),
        lines("Loss at x minus loss at a = 0.5 and a = 1", *(f"probe/ema/{a}" for a in POSITIONS[1:]))
        | {"custom_expressions": [gain("ema", "+0.50"), gain("ema", "+1.00")]},
    ],
    "Alpha and learning rate": [
        lines("alpha", "optim/alpha", x="step"),
        lines("Learning rate", "optim/lr", x="step"),
    ],
    "Health": [
        lines("Training loss", "train/loss"),
        lines("Gradient norm", "train/grad_norm", x="step", log_y=True),
        lines("z-score of the training loss", "train/loss_zscore", x="step"),
        lines("Steps not taken", "train/skipped", x="step"),
    ],
    "Throughput": [
        lines("Tokens per second", "perf/tokens_per_second", x="step"),
        lines("Milliseconds per step", "perf/step_ms", x="step"),
        lines("Model FLOPs utilisation", "perf/mfu", x="step"),
    ],
}

# The table of runs, from the lowest val/loss up
CONFIG = ("name", "model.name", "optimizer.name", "lookahead.name", "seed")
SUMMARY = (*LOSSES, "val/perplexity", "val/bits_per_byte", "step", "tokens", "time", "status")
