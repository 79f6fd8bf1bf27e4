"""Which run a config is: the hash that names its folder, so that the same command finds it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

# What does not change the result: where it is kept, how it is split, when it is looked at.
NOT_IN_HASH = {
    *("name", "seed", "runs_dir", "micro_batch_size", "logger", "eval_every", "probe_every"),
    *("checkpoint_every", "log_every", "plugins"),
    *("trainer.device", "trainer.compile", "trainer.keep_checkpoints", "trainer.workers"),
    *(f"dataset.{key}" for key in ("probe_tokens", "prepare", "hub", "files", "val_files", "val_every", "text_key")),
    *(f"dataset.{key}" for key in ("shard_tokens", "shards", "sources", "processes")),
}


def run_hash(cfg: DictConfig) -> str:
    """8 hex digits of the result-changing keys whose value differs from the schema's default.

    A new key with a default therefore renames no old run.
    """
    text = json.dumps(dict(sorted(_changed(cfg, ""))), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _changed(cfg: DictConfig, prefix: str) -> Iterator[tuple[str, Any]]:
    schema = OmegaConf.get_type(cfg)
    defaults = {f.name: _default(f) for f in fields(schema)} if is_dataclass(schema) else {}
    for key in map(str, cfg):
        path, value = f"{prefix}{key}", cfg[key]
        if path in NOT_IN_HASH:
            continue
        if isinstance(value, DictConfig):
            yield from _changed(value, path + ".")
        else:
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            if key not in defaults or plain != defaults[key]:
                yield path, plain


def _default(f: Any) -> Any:
    value = f.default if f.default is not MISSING else f.default_factory()
    return list(value) if isinstance(value, tuple) else value
