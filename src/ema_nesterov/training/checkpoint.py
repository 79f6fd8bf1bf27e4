"""Checkpoints: complete or absent, tensors as safetensors, all else as JSON, no pickle.

    step_00001000/tensors.safetensors    the tensors of the state, under the path that leads to them
    step_00001000/state.json             the nest of dicts, lists and numbers with those paths in their place
    step_00001000/SHA256SUMS             of both, for `sha256sum -c`
    latest                               a text, the name of the newest; written last

One rank writes a whole checkpoint: any number of ranks reads it. Where it is asynchronous, a thread
writes a copy of the state while the training goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ConfigError
from ..models.common import own
from .logs import write_atomically

FORMAT = 2  # 1: optimizer states in a form of their own, before 0.2
FILES = ("tensors.safetensors", "state.json")
SUMS = "SHA256SUMS"


class Saver:
    """Writes checkpoints into a folder, one at a time, and drops old ones. What the disk refuses is warned of, and the
    checkpoint before it stands.

    keep: the newest so many.  keep_every: those of every so many steps stay for good.  asynchronous: `save` returns
    once the state is copied to the CPU.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_every: int | None = None,
        asynchronous: bool = False,
        warn: Callable[[str], None] = print,
    ):
        self.folder, self.keep, self.keep_every, self.warn = folder, keep, keep_every, warn
        self.pool = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self.writing: Future[bool] | None = None
        self.copies: dict[str, Tensor] = {}  # pinned, and used again
        self.failed: OSError | None = None  # why the last one was not saved

    def save(self, step: int, state: dict[str, Any], first: Callable[[], None] = lambda: None) -> None:
        """first: what must be on the disk before it."""
        self.wait()
        tensors: dict[str, Tensor] = {}
        nest = {"format": FORMAT, "state": _flatten(state, "", tensors, {})}
        if self.pool is None:
            self._try(step, first, lambda: self._write(step, tensors, nest))
        elif self._try(step, first):
            copies = self._copy(tensors)
            self.writing = self.pool.submit(self._try, step, lambda: self._write(step, copies, nest))

    def wait(self) -> None:
        """Until what was saved is on the disk."""
        if self.writing is not None:
            self.writing.result()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()

    def _try(self, step: int, *parts: Callable[[], None]) -> bool:
        try:
            for part in parts:
                part()
            self.failed = None
            return True
        except OSError as e:
            self.failed = e
            held = ", ".join(p.name for p in list_checkpoints(self.folder)[-1:]) or "none"
            self.warn(f"the checkpoint of step {step} is not saved ({e.strerror}); the last one is {held}; make room")
            return False

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, on the CPU."""
        for name, tensor in tensors.items():
            if name not in self.copies:
                self.copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self.copies[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: self.copies[name] for name in tensors}

    def _write(self, step: int, tensors: dict[str, Tensor], nest: dict[str, Any]) -> None:
        final = self.folder / f"step_{step:08d}"
        aside = self.folder / f".{final.name}.writing"
        for stale in self.folder.glob(".step_*.writing"):
            shutil.rmtree(stale, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            _save_tensors({name: t.contiguous() for name, t in tensors.items()}, aside / FILES[0])
            (aside / FILES[1]).write_text(json.dumps(nest), encoding="utf-8")
            (aside / SUMS).write_text("".join(f"{_sha256(aside / name)}  {name}\n" for name in FILES), encoding="utf-8")
            for path in (*aside.iterdir(), aside):
                _sync(path)
            remove(final)  # damaged, and trained again
            aside.rename(final)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)  # the room is needed
            raise
        _sync(self.folder)
        try:
            write_atomically(self.folder / "latest", final.name + "\n")
        except OSError as e:  # it is for people
            self.warn(f"{self.folder / 'latest'} is not written: {e.strerror}")
        before = [path for path in list_checkpoints(self.folder) if step_of(path) <= step]  # those after it are damaged
        for old in before[: -self.keep]:
            if self.keep_every is None or step_of(old) % self.keep_every:
                shutil.rmtree(old, ignore_errors=True)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step_<step>`, then drop all but the newest `keep`."""
    Saver(folder, keep).save(step, state)
    return folder / f"step_{step:08d}"


def remove(path: Path) -> None:
    """Whatever it is, if it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state as it was saved, on the CPU. Raises ConfigError for one of another version."""
    # copies: a mapped file takes its room on the disk also when it has been deleted
    return _load(path, lambda name: {key: tensor.clone() for key, tensor in load_file(name).items()})


def _load(path: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Any]:
    nest = json.loads((path / FILES[1]).read_text(encoding="utf-8"))
    if nest["format"] != FORMAT:
        then = "update ema-nesterov" if nest["format"] > FORMAT else "finish the run with the version that began it"
        raise ConfigError(
            f"{path} has format {nest['format']}, this version reads {FORMAT}; {then}, or type runs_dir=FOLDER to "
            "begin anew"
        )
    with in_utf8(path) as folder:
        return _unflatten(nest["state"], read(folder / FILES[0]))


@contextmanager
def in_utf8(folder: Path) -> Iterator[Path]:
    """The folder, under a name for libraries that take every path for UTF-8, whatever the locale says."""
    if os.fsencode(folder) == str(folder).encode(errors="replace"):
        yield folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield Path(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


def whole(path: Path) -> bool:
    """Whether a checkpoint is what was written, by its checksums, and of the step that it is named after."""
    try:
        sums = dict(line.split("  ")[::-1] for line in (path / SUMS).read_text(encoding="utf-8").splitlines())
        state = _load(path, load_file)
        return all(sums[name] == _sha256(path / name) for name in FILES) and state.get("step") == step_of(path)
    except ConfigError:  # of another version: who loads it is told
        return True
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError):
        return False


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    named = (p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8,18}", p.name))
    return sorted((p for p in named if p.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def save_weights(path: Path, model: torch.nn.Module) -> None:
    """The model's parameters as one safetensors file, tied ones once and none padded; written aside and renamed."""
    aside = path.with_name(f".{path.name}.writing")
    try:
        _save_tensors({name: own(p).detach().contiguous() for name, p in model.named_parameters()}, aside)
        _sync(aside)
        aside.rename(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as e:  # what the disk said is in its text alone
        if said := re.search(r"os error (\d+)", str(e)):
            raise OSError(int(said[1]), os.strerror(int(said[1]))) from None
        raise


def _flatten(value: Any, path: str, tensors: dict[str, Tensor], seen: dict[tuple, str]) -> Any:
    if isinstance(value, Tensor):
        # a tied parameter stands twice in a state dict and once in the file
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (path,)
        if key not in seen:
            assert path not in tensors, f"two tensors under {path}"
            seen[key] = path
            tensors[path] = value.detach()
        return {"tensor": seen[key]}
    if isinstance(value, dict):
        return {"dict": [[k, _flatten(v, f"{path}/{k}", tensors, seen)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_flatten(v, f"{path}/{i}", tensors, seen) for i, v in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    return value


def _unflatten(nest: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(nest, list):
        return [_unflatten(v, tensors) for v in nest]
    if not isinstance(nest, dict):
        return nest
    if "tensor" in nest:
        return tensors[nest["tensor"]]
    if "tuple" in nest:
        return tuple(_unflatten(v, tensors) for v in nest["tuple"])
    return {k: _unflatten(v, tensors) for k, v in nest["dict"]}


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
