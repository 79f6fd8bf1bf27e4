"""A request to stop: SIGTERM, SIGUSR1 or Ctrl-C, or a file STOP in the run folder.

The step under way ends, the run saves and exits 85. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

from ..errors import ConfigError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
COPY = 3.0  # seconds: under torchrun a signal may come twice, from whoever sent it to all processes and from torchrun


def born() -> float:
    """When this process began, by the clock of files; where there is no telling, now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


class Stop:
    """Whether this process was asked to stop, by what, and when."""

    def __init__(self, file: Path | None):
        self.file = file  # that asks, too; None: another rank looks for it
        self.asked = ""
        self.at = 0.0  # time.monotonic() of the first request
        self.looked = 0.0

    def wanted(self) -> bool:
        """Looks for the file once a second at most."""
        now = time.monotonic()
        if not self.asked and self.file is not None and now - self.looked >= 1:
            self.looked = now
            if self.file.exists():
                self.asked, self.at = str(self.file), now
        return bool(self.asked)

    def note(self, number: int) -> None:
        """A signal has come."""
        name, now = signal.Signals(number).name, time.monotonic()
        if self.asked:
            if "TORCHELASTIC_RUN_ID" not in os.environ or now - self.at > COPY:
                os._exit(128 + number)
            return
        self.asked, self.at = name, now
        if self.file is not None:
            print(f"\n{name}: stopping after this step; a second one stops at once", file=sys.stderr, flush=True)


@contextmanager
def stop_requests(file: Path | None) -> Iterator[Stop]:
    """Turn signals into a request. A thread hears them at once, even while the main one waits for a GPU.

    file: STOP in the run folder, which this rank looks for; one that was left over from before is deleted. Raises
    ConfigError where it cannot be.
    """
    try:
        if file is not None and file.exists() and file.stat().st_mtime < born():
            file.unlink()
    except OSError as e:
        raise ConfigError(f"{file} cannot be deleted ({e.strerror}); take it away") from None
    stop = Stop(file)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        while heard := os.read(reader, 1):
            if heard[0] in SIGNALS:
                stop.note(heard[0])

    thread = Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        thread.join()
        os.close(reader)
        if file is not None:
            with suppress(OSError):
                file.unlink(missing_ok=True)
