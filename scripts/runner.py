"""A training that takes steps when asked, so that several can take turns in one process; used by bench.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch


class Enough(Exception):
    """Ends a training from within a step."""


class Runner:
    """A training in a thread of its own: several can take turns in one process.

    body: trains without end and calls the function that it is given after every step.
    """

    def __init__(self, body: Callable[[Callable[[], None]], None], device: torch.device):
        self.device, self.left, self.over = device, 0, False
        self.may, self.has = threading.Event(), threading.Event()
        self.watch: AbstractContextManager = nullcontext()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(body,), daemon=True)

    def take(self, steps: int, watch: AbstractContextManager | None = None) -> float:
        """Take that many steps; returns the seconds, up to when the device is done with them.

        watch: is entered and left in the thread that takes them, as profilers see no other.
        """
        self.left, self.watch = steps, watch or nullcontext()
        begun = time.perf_counter()
        self.may.set()
        if not self.thread.is_alive():
            self.thread.start()
        self.has.wait()
        self.has.clear()
        if self.error is not None:
            raise self.error
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begun

    def close(self) -> None:
        self.over = True
        self.may.set()
        self.thread.join()

    def _run(self, body: Callable[[Callable[[], None]], None]) -> None:
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a new thread starts on the first GPU
            self._pause()
            body(self._done)
        except Enough:
            pass
        except BaseException as e:
            self.error = e
        finally:
            self.has.set()

    def _done(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.watch.__exit__(None, None, None)
            self.has.set()
            self._pause()

    def _pause(self) -> None:
        self.may.wait()
        self.may.clear()
        if self.over:
            raise Enough
        self.watch.__enter__()
