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
from typing import Any

from omegaconf import DictConfig

PATIENCE = 30.0  # seconds that the training waits for its mirror at the end
REFUSED = "Fatal error while uploading"  # in the warning that wandb prints, and nothing else tells


class Mirror:
    """The process that mirrors a run folder, or none."""

    def __init__(self, folder: Path | None = None):
        self.folder, self.process = folder, None
        if folder is None:
            return
        command = [sys.executable, "-P", "-m", "ema_nesterov.training.wandb_run", str(folder)]
        try:  # in a session of its own: Ctrl-C is for the training
            self.process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=STDOUT, text=True, start_new_session=True)
        except OSError as e:
            print(f"the W&B mirror cannot start ({e.strerror}); {catch_up(folder)}", file=sys.stderr)
            return
        self.listener = Thread(target=self._listen, daemon=True)
        self.listener.start()

    def log(self, line: dict[str, Any]) -> None:
        """Nothing: the mirror reads metrics.jsonl."""

    def _listen(self) -> None:
        """Pass on what it says. By print, which a progress bar makes room for."""
        assert self.folder
        assert self.process
        assert self.process.stdout
        for line in self.process.stdout:
            print(line, end="", flush=True)
            if REFUSED in line:
                print(catch_up(self.folder), flush=True)
        if self.process.wait() < 0 and not self.process.stdin.closed:  # type: ignore[union-attr]
            print(f"the W&B mirror was killed; {catch_up(self.folder)}", flush=True)

    def close(self) -> None:
        """Let it send the rest and go."""
        if self.process is None or self.folder is None:
            return
        assert self.process.stdin
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(PATIENCE)
        except TimeoutExpired:
            self.process.kill()
            print(f"W&B has not taken everything within {PATIENCE:.0f} s; {catch_up(self.folder)}", flush=True)
        self.listener.join(1)


@contextmanager
def mirror(cfg: DictConfig, folder: Path, identity: str = "") -> Iterator[Mirror]:
    """Mirror the run folder, whose metrics.jsonl is there, while the context lasts."""
    wanted = cfg.logger.name == "wandb" and os.environ.get("WANDB_MODE", cfg.logger.mode) != "disabled"
    process = Mirror(folder if wanted else None)
    try:
        yield process
    finally:
        process.close()


def catch_up(folder: Path) -> str:
    return f"metrics.jsonl has everything; type python scripts/sync_wandb.py {folder}"
