"""Evaluate a run's weights: python scripts/evaluate.py run=RUN_FOLDER [step=N] [path=SHARDS] [tokens=N]

    step      of a checkpoint (default: the newest)
    path      a folder of prepared shards in the run's tokens (default: those that the run was validated on)
    tokens    validation targets (default: as many as the run used)

Prints loss in nats, perplexity and, where the tokens spell out their text, bits per byte: at x, the iterate; at y,
the lookahead point at the run's full alpha; and at e, the weight EMA, where the run has them. On the run's own data
and step these are the numbers of its metrics.jsonl, to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ema_nesterov.cli import arguments, guard
from ema_nesterov.errors import ConfigError, DataError

POINTS = {"val/loss": "x", "val/lookahead_loss": "y", "val/ema_loss": "e"}


@dataclass
class Arguments:
    run: str | None = None
    step: int | None = None
    path: str | None = None
    tokens: int | None = None
    device: str = "auto"


def main() -> None:
    args = arguments(Arguments, __doc__)
    if args.run is None:
        raise ConfigError("run= is missing; type run=RUN_FOLDER, as scripts/where.py prints it")
    for key, least in (("step", 0), ("tokens", 1)):
        if getattr(args, key) is not None and getattr(args, key) < least:
            raise ConfigError(f"{key}={getattr(args, key)} must be at least {least}")

    # here, so that a typo is answered before torch is loaded
    from ema_nesterov.data.loader import Validation
    from ema_nesterov.data.preparation.recipes import shards_folder
    from ema_nesterov.derived import lookahead_position
    from ema_nesterov.training.distributed import Ranks, choose_device
    from ema_nesterov.training.evaluate import mean_loss, validate
    from ema_nesterov.training.execution import eval_autocast
    from ema_nesterov.training.run import split_batch
    from ema_nesterov.training.trained import open_trained

    device = choose_device(args.device)
    run = open_trained(Path(args.run), args.step, device)
    cfg, ranks = run.cfg, Ranks(0, 1, device)
    folder = Path(args.path) if args.path else shards_folder(cfg.dataset)
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; type path=FOLDER of prepared shards")
    data = cfg.dataset.copy()
    data.val_tokens = cfg.dataset.val_tokens if args.tokens is None and args.path is None else args.tokens
    shards = Validation(folder, data, cfg.model.get("vocab_size", 2**16), cfg.seq_len)
    precision = eval_autocast(cfg, device)
    micro = split_batch(cfg, 1)

    def evaluate() -> float:
        return mean_loss(run.model, shards.batches(data.val_tokens, 0, 1, micro), ranks, precision)

    alpha = None if cfg.lookahead.name == "none" else lookahead_position(cfg)
    losses, width = validate(run.optimizer, alpha, evaluate), shards.bytes_per_token()
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{run.folder}, step {run.step}, on {folder}")
    table = Table(box=SIMPLE_HEAD)
    for column in ("at", "loss", "perplexity", *(["bits per byte"] if width else [])):
        table.add_column(column, justify="left" if column == "at" else "right")
    for key, loss in losses.items():
        bits = [f"{loss / math.log(2) / width:.4f}"] if width else []
        table.add_row(POINTS[key], f"{loss:.6f}", f"{math.exp(min(loss, 700.0)):.2f}", *bits)
    console.print(table)


if __name__ == "__main__":
    guard(main)
