"""Worker processes that neither outlive their parent nor answer signals in its place."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext
from threading import Thread


def spawn() -> SpawnContext:
    """Fresh processes: forks of a process with threads may hang."""
    return multiprocessing.get_context("spawn")


def begin_worker() -> None:
    """The first call in a worker process: it ends when its parent does, however that ends."""
    for sent_to_all in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the parent decides what they mean
        signal.signal(sent_to_all, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
