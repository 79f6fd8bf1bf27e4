"""Preparation without processes of its own, which cost seconds each to start."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

import pytest

from ema_nesterov.data import serve, stream
from ema_nesterov.data.preparation import tokenise


class Inline(Executor):
    """Does what a pool of processes is asked to, at once and here."""

    def __init__(self, processes: int, context: Any, begin: Callable[..., None], arguments: tuple[Any, ...]):
        begin(*arguments)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as e:
            future.set_exception(e)
        return future


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of one process is none; larger ones are real."""

    def pool(processes: int, *rest: Any) -> Executor:
        return Inline(processes, *rest) if processes == 1 else ProcessPoolExecutor(processes, *rest)

    monkeypatch.setattr(tokenise, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(tokenise, "begin_worker", lambda: None)


@pytest.fixture
def inline_stream(inline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that reads a stream is a thread, its pool none."""

    class Context:
        Pipe = staticmethod(multiprocessing.Pipe)

        class Process(Thread):
            def __init__(self, target: Callable[..., None], args: tuple[Any, ...]):
                theirs = Connection(os.dup(args[0].fileno()), readable=False)  # this process closes its own
                super().__init__(target=target, args=(theirs, *args[1:]))

            def kill(self) -> None:
                """It ends when its pipe is closed."""

    monkeypatch.setattr(stream, "spawn", Context)
    monkeypatch.setattr(serve, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(serve, "begin_worker", lambda: None)
