"""Bring W&B up to what metrics.jsonl holds: python scripts/sync_wandb.py FOLDER ... [KEY=VALUE ...]

FOLDER is a run folder or holds some. Each becomes, or goes on as, the W&B run that logger=wandb makes, whether or not
the run was mirrored; steps that W&B has are not sent again, so the command may be repeated. Keys: mode=online|offline
(offline: into FOLDER/wandb, whole), project=NAME, entity=NAME (default: what the run's config says).
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress

from ema_nesterov.cli import guard, parse
from ema_nesterov.errors import ConfigError, UserError, one_line
from ema_nesterov.training.folder import read_status
from ema_nesterov.training.logs import read_metrics
from ema_nesterov.training.mirror import REFUSED


@dataclass
class Arguments:
    mode: str = os.environ.get("WANDB_MODE", "online")
    project: str | None = None
    entity: str | None = None


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    names = [a for a in sys.argv[1:] if "=" not in a or Path(a).exists()]
    args = parse(Arguments, [a for a in sys.argv[1:] if a not in names])
    folders = find([Path(name) for name in names])
    if args.mode not in ("online", "offline"):
        raise ConfigError(f"mode={args.mode} is neither online nor offline")
    if args.mode == "online":
        require_key()
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    failed = 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for folder in progress.track(folders, description="runs"):
            try:
                console.print(f"{folder}: {sync(folder, args)}")
            except Timeout:
                console.print(f"{folder}: left to its own mirror, which runs at present")
            except Exception as e:  # of many kinds; the next run may do
                failed += 1
                console.print(f"{folder}: {one_line(e)}")
    if failed:
        raise UserError(f"{failed} of {len(folders)} runs could not be sent; the same command goes on")


def find(roots: list[Path]) -> list[Path]:
    """The run folders below these folders. Raises ConfigError where there is none."""
    for root in roots:
        if not root.exists():
            raise ConfigError(f"{root} does not exist; type a run folder, or a folder of them, e.g. runs")
    found = {path.parent: None for root in roots for path in sorted(root.rglob("metrics.jsonl"))}
    folders = [folder for folder in found if (folder / "config.yaml").exists()]
    if not folders:
        raise ConfigError(f"no run folder in {', '.join(map(str, roots)) or 'nothing'}; type one, or e.g. runs")
    return folders


def require_key() -> None:
    from ema_nesterov.training.wandb_run import has_key  # here, so that a typo is answered before wandb is loaded

    try:
        reason = None if has_key() else "W&B has no key; type wandb login"
    except Exception as e:
        reason = f"W&B does not let in ({one_line(e)}); try later"
    if reason:
        raise UserError(f"{reason}, or mode=offline")


def sync(folder: Path, args: Arguments) -> str:
    """Send one run; returns what was sent, and where to. Raises RuntimeError where W&B refuses it."""
    from ema_nesterov.training.wandb_run import LOCK, finish, open_run, rows, send

    online = args.mode == "online"
    status = read_status(folder).get("status", "running")
    running = status == "running"
    with (
        FileLock(folder / LOCK, timeout=0),
        tempfile.TemporaryDirectory() if online else nullcontext(folder) as scratch,
        redirect_stderr(StringIO()) as warnings,
    ):
        settings: dict[str, Any] = dict(x_disable_stats=True, x_update_finish_state=not running, finish_timeout=600)
        run = open_run(folder, args.mode, Path(scratch), args.project, args.entity, **settings)
        sent = send(run, rows(read_metrics(folder / "metrics.jsonl"), lambda: not running))
        finish(run, status)
    if REFUSED in warnings.getvalue():
        raise RuntimeError(warnings.getvalue().strip())
    return f"{sent} steps sent, {status}: {run.url if online else Path(run.dir).parent}"


if __name__ == "__main__":
    guard(main)
