"""Checkpoints: complete or absent, tensors as safetensors, all else as JSON, no pickle.

A state is a nest of dicts, lists, tuples, numbers, strings and tensors. `tensors.safetensors` holds the
tensors under the path that leads to them, `state.json` the nest with those paths in their place.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step_<step>` (written aside, synced, renamed), then drop all but the newest `keep`."""
    final = folder / f"step_{step:08d}"
    aside = folder / f".{final.name}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    nest = _flatten(state, "", tensors, {})
    save_file({name: t.contiguous() for name, t in tensors.items()}, aside / "tensors.safetensors")
    (aside / "state.json").write_text(json.dumps(nest))
    for path in (*aside.iterdir(), aside):
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _sync(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state as it was saved, on the CPU."""
    nest = json.loads((path / "state.json").read_text())
    return _unflatten(nest, load_file(path / "tensors.safetensors"))


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(folder.glob("step_*"), key=lambda p: int(p.name.removeprefix("step_")))


def save_weights(path: Path, model: torch.nn.Module) -> None:
    """The model's parameters as one safetensors file, tied ones once; written aside and renamed."""
    aside = path.with_name(f".{path.name}.writing")
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, aside)
    _sync(aside)
    aside.rename(path)


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


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
