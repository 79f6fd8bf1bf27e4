"""A run's folder: who trains in it, which run it is, and how that run stands."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError, UserError, one_line
from .identity import changed
from .logs import write_atomically

FINISHED, FAILED, BAD_INPUT, PREEMPTED, DIVERGED = 0, 1, 2, 85, 86  # exit codes
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # what a disk says
STATUS = {FINISHED: "finished", FAILED: "failed", BAD_INPUT: "failed", PREEMPTED: "preempted", DIVERGED: "diverged"}


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder and train in it alone. Raises ConfigError where that is not possible."""
    lock, owner = FileLock(folder / ".lock", timeout=3), folder / ".owner"  # a killed one may take a moment to let go
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock.acquire()
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise ConfigError(f"{who} trains in {folder}; wait for it, stop it, or type another seed") from None
    except OSError as e:
        lock.release()
        raise cannot_write(folder, e) from None
    with lock:
        lock.release()  # acquired twice
        yield


def begin(cfg: DictConfig, folder: Path, step: int = 0, device: str = "unknown") -> list[str]:
    """Write config.yaml, or compare it with the one that is there; returns what differs and may matter.

    Raises ConfigError where the folder holds another run, or cannot be written.
    """
    path, here, header = folder / "config.yaml", {**provenance(), "device": device}, []
    warnings = []
    if path.exists():
        require_same(cfg, path)
        header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        began = dict(line.removeprefix("# ").split(": ", 1) for line in header if ": " in line)  # the last of each key
        news = {key: value for key, value in here.items() if began.get(key) != value}
        if news and step:
            warnings = [f"{key} is {value}, was {began.get(key, 'unknown')}" for key, value in news.items()]
            header += [f"# from step {step} on", *(f"# {key}: {value}" for key, value in news.items())]
    if not step:
        header = [f"# {key}: {value}" for key, value in here.items()]
    try:
        write_atomically(path, "\n".join([*header, OmegaConf.to_yaml(cfg, resolve=True)]))
    except OSError as e:
        raise cannot_write(folder, e) from None
    return warnings


def cannot_write(folder: Path, error: OSError) -> ConfigError:
    advice = "make room, or type" if error.errno in FULL else "type another"
    return ConfigError(f"cannot write run folder {folder}: {error.strerror}; {advice} runs_dir=FOLDER")


def require_same(cfg: DictConfig, path: Path) -> None:
    """Raise ConfigError, naming the first difference, when a config.yaml is not of this run: it was edited, or a newer
    version has other defaults."""
    for key, was, new in differences(cfg, path.parent):
        raise ConfigError(
            f"{path} says {key}={was}, this command {key}={new}; type {key}={was}, or runs_dir=FOLDER to begin anew"
        )


def differences(cfg: DictConfig, folder: Path) -> Iterator[tuple[str, Any, Any]]:
    """(key, value there, value here) of what changes the result and a folder's config has otherwise than this one."""
    there: Any = OmegaConf.to_container(load_config(folder))
    here, now = OmegaConf.to_container(cfg, resolve=True), dict(changed(cfg))
    for key in sorted({*now, *(key for key, _ in changed(OmegaConf.create(there)))} - {"fork_from"}):
        was, new = look_up(there, key), look_up(here, key)
        if was != new and not (was is None and key not in now):
            yield key, was, new


def load_config(folder: Path) -> DictConfig:
    """The config of a run folder. Raises ConfigError for one that train.py did not write: it writes values alone, and
    what refers to others could read this machine's environment."""
    path = folder / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        cfg = OmegaConf.create(text)
    except Exception as e:  # of YAML's and OmegaConf's there are many
        raise ConfigError(f"{path} cannot be read ({one_line(e)}); mend it, or take {folder} away") from None
    if not isinstance(cfg, DictConfig) or "${" in text:
        raise ConfigError(f"{path} refers to other values, which train.py never writes; mend it, or take it away")
    return cfg


def look_up(nest: Any, key: str) -> Any:
    for part in key.split("."):
        nest = nest.get(part) if isinstance(nest, dict) else None
    return nest


def provenance() -> dict[str, str]:
    """The git revision of this code and the versions of the packages that decide the numbers."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        revision = subprocess.run(git, capture_output=True, encoding="utf-8", timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        revision = ""
    packages = {}
    for name in ("ema-nesterov", "torch", "numpy", "transformers", "tokenizers", "omegaconf"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {"git": revision or "unknown", "python": sys.version.split()[0], **packages}


# --- status.json ----------------------------------------------------------------------------------


def read_status(folder: Path) -> dict[str, Any]:
    """Empty where there is none, or none that can be read."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


class Status:
    """What status.json says; only the first rank writes it, and where the disk is full nobody does."""

    def __init__(self, folder: Path, writes: bool, resumed_from: int | None):
        self.path, self.writes = folder / "status.json", writes
        self.exit_code: int | None = None
        self.values: dict[str, Any] = {"step": resumed_from or 0, "message": "", "resumed_from": resumed_from}
        self.write()

    def update(self, exit_code: int | None = None, **values: Any) -> None:
        self.exit_code = exit_code
        self.values |= values
        self.write()

    def write(self) -> None:
        name = "running" if self.exit_code is None else STATUS[self.exit_code]
        if not self.writes:
            return
        try:
            write_atomically(self.path, json.dumps({"status": name, **self.values, "exit_code": self.exit_code}) + "\n")
        except OSError as e:
            print(f"warning: {self.path} cannot be written ({e.strerror}); the run is {name}", file=sys.stderr)


@contextmanager
def status(folder: Path, first: bool, resumed_from: int | None) -> Iterator[Status]:
    """Keep status.json true: running now, and failed where the run raises."""
    state = Status(folder, first, resumed_from)
    try:
        yield state
    except BaseException as e:
        state.writes = True  # whichever rank it is
        user = isinstance(e, UserError)
        state.update(exit_code=BAD_INPUT if user else FAILED, message=one_line(e))
        raise
