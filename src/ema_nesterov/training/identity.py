"""Which run a config is: the hash that names its folder, so that the same command finds it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

# What does not change the result: where it is kept, how it is split, when it is looked at.
NOT_IN_HASH = {
    *("name", "seed", "runs_dir", "micro_batch_size", "logger", "eval_every", "eval_at"),
    *("probe_every", "noise_every", "checkpoint_every", "log_every", "plugins"),
    *(f"trainer.{key}" for key in ("device", "compile", "keep_checkpoints", "keep_every", "async_checkpoints")),
    *(f"trainer.{key}" for key in ("compile_mode", "deterministic", "activation_checkpointing")),
    *(f"trainer.{key}" for key in ("workers", "max_bad_steps")),
    *(f"dataset.{key}" for key in ("probe_tokens", "prepare", "hub", "files", "val_files", "val_every", "text_key")),
    *(f"dataset.{key}" for key in ("shard_tokens", "shards", "sources", "processes")),
}


def run_folder(cfg: DictConfig) -> Path:
    return Path(cfg.runs_dir) / identity(cfg) / f"seed{cfg.seed}"


def identity(cfg: DictConfig) -> str:
    """The run's name and hash: what its seeds have in common."""
    return f"{cfg.name}-{run_hash(cfg)}"


def run_hash(cfg: DictConfig) -> str:
    """8 hex digits of the result-changing keys whose value differs from the schema's default.

    A new key with a default therefore renames no old run.
    """
    text = json.dumps(dict(sorted(changed(cfg))), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def changed(cfg: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The result-changing keys, dotted, whose value differs from the schema's default, where there is a schema."""
    schema = OmegaConf.get_type(cfg)
    defaults = {f.name: _default(f) for f in fields(schema)} if is_dataclass(schema) else {}
    for key in map(str, cfg):
        path, value = f"{prefix}{key}", cfg[key]
        if path in NOT_IN_HASH:
            continue
        if isinstance(value, DictConfig):
            yield from changed(value, path + ".")
        else:
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            if path == "fork_from" and plain:  # wherever the runs have been moved to
                plain = "/".join(Path(str(plain)).parts[-2:])
            if key not in defaults or plain != defaults[key]:
                yield path, plain


def _default(f: Any) -> Any:
    value = f.default if f.default is not MISSING else f.default_factory()
    return list(value) if isinstance(value, tuple) else value
