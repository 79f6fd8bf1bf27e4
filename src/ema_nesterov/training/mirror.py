"""The live mirror: a process beside the training that copies metrics.jsonl to W&B as it grows.

The training starts it and, at the end, waits for it for a while; that is all. A W&B that is slow, hung or gone
therefore stops and slows nothing, and what it missed `python scripts/sync_wandb.py RUN_FOLDER` sends later.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired
from threading import Thread

from omegaconf import DictConfig

PATIENCE = 30.0  # seconds that the training waits for its mirror at the end
REFUSED = "Fatal error while uploading"  # in a warning that wandb prints; nothing else tells


@contextmanager
def mirror(cfg: DictConfig, folder: Path) -> Iterator[None]:
    """Mirror the run folder while the context lasts, where the config wants it. Its metrics.jsonl is there."""
    if cfg.logger.name != "wandb" or os.environ.get("WANDB_MODE", cfg.logger.mode) == "disabled":
        yield
        return
    command = [sys.executable, "-P", "-m", "ema_nesterov.training.wandb_run", str(folder)]
    try:  # in a session of its own: Ctrl-C is for the training
        process = Popen(
            command,
            stdin=PIPE,
            stdout=PIPE,
            stderr=STDOUT,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"PYTHONIOENCODING": "utf-8"},
            start_new_session=True,
        )
    except OSError as e:
        print(f"the W&B mirror cannot start ({e.strerror}); {catch_up(folder)}", file=sys.stderr)
        yield
        return
    listener = Thread(target=listen, args=(process, folder), daemon=True)
    listener.start()
    try:
        yield
    finally:
        close(process, folder)
        listener.join(1)


def listen(process: Popen[str], folder: Path) -> None:
    """Pass on what it says, by print, which a progress bar makes room for."""
    assert process.stdin
    for line in process.stdout or ():
        print(line, end="", flush=True)
        if REFUSED in line:
            print(catch_up(folder), flush=True)
    if process.wait() < 0 and not process.stdin.closed:
        print(f"the W&B mirror was killed; {catch_up(folder)}", flush=True)


def close(process: Popen[str], folder: Path) -> None:
    """Let it send the rest and go."""
    assert process.stdin
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(PATIENCE)
    except TimeoutExpired:
        process.kill()
        print(f"W&B has not taken everything within {PATIENCE:.0f} s; {catch_up(folder)}", flush=True)


def catch_up(folder: Path) -> str:
    return f"metrics.jsonl has everything; type python scripts/sync_wandb.py {folder}"
