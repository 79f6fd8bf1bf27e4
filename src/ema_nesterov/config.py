"""The configuration, and whether it can be run.

Importing this module registers the schemas with Hydra; the YAML files in configs/ hold the values.
`check` validates what types cannot. What a config implies is in derived.py.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import schemas  # importing it registers them
from .derived import alpha_schedule, lr_schedule, momentum_schedule, steps_of, validation_steps
from .errors import ConfigError, one_line
from .schedules import lowest_alpha


def check(cfg: DictConfig) -> None:
    """Raise ConfigError, in one line, when the composed config cannot be run."""
    check_secrets(cfg)
    plain = [key for key in map(str, cfg) if not OmegaConf.is_interpolation(cfg, key)]
    missing = [key for key in plain if OmegaConf.is_missing(cfg, key)]
    try:
        if missing := missing or sorted(OmegaConf.missing_keys(cfg)):
            raise ConfigError(f"{missing[0]} has no value; type {missing[0]}=VALUE")
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as e:
        raise ConfigError(f"{e.full_key}: {str(e).splitlines()[0]}; type {e.full_key}=VALUE without $") from None
    _check_keys(cfg, "")
    _check_groups(cfg)
    _check_environment(cfg)
    for key in ("steps", "seq_len", "batch_size", "log_every"):
        _require(cfg[key] >= 1, key, cfg[key], "at least 1")
    _require(cfg.steps <= 10_000_000, "steps", cfg.steps, "at most 10000000")
    for key in ("seed", "eval_every", "probe_every", "noise_every", "checkpoint_every"):
        _require(cfg[key] >= 0, key, cfg[key], "at least 0")
    validation_steps(cfg)
    _require(cfg.seed < 2**63, "seed", cfg.seed, f"at most {2**63 - 1}")
    micro = cfg.micro_batch_size
    _require(micro is None or micro >= 1, "micro_batch_size", micro, "at least 1")
    _require(0 < cfg.probe_ema_decay < 1, "probe_ema_decay", cfg.probe_ema_decay, "between 0 and 1")
    check_name("name", cfg.name)
    check_path("runs_dir", cfg.runs_dir)
    _check_model(cfg)
    _check_dataset(cfg)
    _check_optimizer(cfg)
    _check_lookahead(cfg)
    _check_schedule(cfg)
    alpha_schedule(cfg)
    _choice("trainer.device", cfg.trainer.device, ["auto", "cpu", "cuda"])
    _require(cfg.trainer.grad_clip >= 0, "trainer.grad_clip", cfg.trainer.grad_clip, "at least 0")
    _require(cfg.trainer.keep_checkpoints >= 1, "trainer.keep_checkpoints", cfg.trainer.keep_checkpoints, "at least 1")
    for key, least in (("keep_every", 1), ("max_bad_steps", 1), ("spike_window", 2)):
        value = cfg.trainer[key]
        _require(value is None or value >= least, f"trainer.{key}", value, f"at least {least}")
    _require(cfg.trainer.spike_window <= 10**6, "trainer.spike_window", cfg.trainer.spike_window, "at most 1000000")
    z = cfg.trainer.skip_spikes
    _require(z is None or z > 0, "trainer.skip_spikes", z, "above 0")
    if cfg.fork_from is not None:
        folder, at, step = cfg.fork_from.rpartition("@")
        if not (folder and at and step.isascii() and step.isdigit() and len(step) < 18):
            raise ConfigError(f"fork_from={cfg.fork_from} must be RUN_FOLDER@STEP, such as runs/NAME/seed0@3000")
        _require(int(step) < cfg.steps, "steps", cfg.steps, f"above the {step} of fork_from")
    _require(cfg.trainer.workers in (0, 1), "trainer.workers", cfg.trainer.workers, "0 or 1")
    _choice("logger.name", cfg.logger.name, ["local", "wandb"])
    _choice("logger.mode", cfg.logger.mode, ["online", "offline", "disabled"])
    _choice("logger.x_axis", cfg.logger.x_axis, ["tokens", "step"])


def check_name(key: str, name: str) -> None:
    """Raise ConfigError for what is no folder below another."""
    if not re.fullmatch(r"\w[^/\\]*(/\w[^/\\]*)*", name) or not name.isprintable() or len(name) > 200:
        raise ConfigError(f"{key}={name!r} must be a relative folder such as quickstart/muon, at most 200 letters")
    _check_letters(key, name)


def check_path(key: str, path: str | None) -> None:
    """Raise ConfigError for a folder that would be made where nobody looks for it."""
    if path is not None and len(path) > 1000:
        raise ConfigError(f"{key} is {len(path)} characters long; type {key}=FOLDER")
    if path is not None and (not path.strip() or path.startswith("~") or "$" in path or not path.isprintable()):
        raise ConfigError(f"{key}={path!r} must name a folder, with ~ and variables expanded; type {key}=FOLDER")
    _check_letters(key, path or "")


def _check_letters(key: str, path: str) -> None:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ConfigError(
            f"{key}={path!r} has letters that this locale cannot write; type export LC_ALL=C.UTF-8"
        ) from None


SECRET = re.compile("KEY|TOKEN(?!IZ)|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)  # in the name of a variable


def check_secrets(cfg: DictConfig) -> None:
    """Raise ConfigError for a secret of the environment, which config.yaml and W&B would keep."""
    advice = "config.yaml and W&B would keep it; leave it out: what needs it reads the environment itself"
    written: Any = OmegaConf.to_container(cfg)
    written.pop("hydra", None)
    for key, text in _texts(written):
        for name in re.findall(r"oc\.env:\s*([^,}\s]*)", text):
            if SECRET.search(name):
                raise ConfigError(f"{key} asks for the secret {name}; {advice}")
    secrets = {name: value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= 8}
    for group in written if secrets else ():
        with suppress(OmegaConfBaseException):  # `check` tells of what cannot be resolved
            value = cfg[group]
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for key, text in _texts(value, group):
                for name in (name for name, secret in secrets.items() if secret in text):
                    raise ConfigError(f"{key} holds the value of the secret {name}; {advice}")


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every value of a nest, as text, and its dotted key."""
    if isinstance(node, (dict, list)):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, str(node)


def _check_keys(cfg: DictConfig, prefix: str) -> None:
    """A key added with + escapes Hydra's own check, one taken away with ~, and a number that is none its types."""
    schema = OmegaConf.get_type(cfg)
    if "_target_" in cfg and prefix not in ("model.", "dataset.", "optimizer."):
        raise ConfigError(f"{prefix}_target_ is not followed: only model, dataset and optimizer may name a class")
    known = [f.name for f in fields(schema)] if is_dataclass(schema) and "_target_" not in cfg else []
    if lost := [key for key in known if key not in cfg]:
        raise ConfigError(f"{prefix}{lost[0]} is needed; leave out ~{prefix}{lost[0]}")
    for key in map(str, cfg):
        if known and key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else "--help shows the keys"
            raise ConfigError(f"unknown key {prefix}{key}; {hint}")
        if OmegaConf.is_missing(cfg, key):
            continue
        if isinstance(cfg[key], DictConfig):
            _check_keys(cfg[key], f"{prefix}{key}.")
        elif isinstance(cfg[key], float):
            _require(math.isfinite(cfg[key]), f"{prefix}{key}", cfg[key], "a finite number")


OPTIONS = {  # of each group, by what its schema is called
    "model": ("nanogpt_124m", "nanogpt_162m", "llama"),
    "dataset": ("token_shards", "text_stream"),
    "optimizer": ("adamw", "muon", "normuon", "aurora", "soap", "record30"),
    "lookahead": ("no_lookahead", "nesterov", "ema_nesterov", "nala", "lookahead", "snoo", "gpa"),
    **{"schedule": ("wsd",), "trainer": ("trainer",), "logger": ("logger",)},
}


def _check_groups(cfg: DictConfig) -> None:
    """A file without a schema, or a name that belongs to another one, escapes all that the schemas promise."""
    given: dict[str, Any] = {
        "model": ((), {}),
        "dataset": ((), {"vocab_size": 0, "seq_len": 0, "seed": 0}),
        "optimizer": (([],), {}),
    }
    for group, options in OPTIONS.items():
        node = cfg[group]
        if not isinstance(node, DictConfig):
            raise ConfigError(f"{group}={node} must be a group of keys; type {group}=OPTION")
        if "_target_" in node:
            from .plugins import find  # here, as it loads torch

            find(node, list(cfg.plugins), *given[group][0], **given[group][1])
            continue
        held = [name for name in options if schemas.SCHEMAS[name] is OmegaConf.get_type(node)]
        if not held:
            raise ConfigError(
                f"the file that {group} is chosen from has no schema of a {group}; begin it with "
                f"defaults: [/schema/{options[-1]}@_here_, _self_]"
            )
        key = {"model": "architecture", "optimizer": "name", "lookahead": "name"}.get(group)
        name = held[0].removeprefix("no_lookahead") or "none"
        if key and node[key] != name:
            raise ConfigError(f"{group}.{key}={node[key]} must be {name}, as chosen; type {group}=OPTION for another")


def typed(plain: dict[str, Any]) -> DictConfig:
    """A config as config.yaml and manifests hold it, resolved, with its schemas again. Raises ConfigError where it has
    keys or values that they do not."""
    try:
        cfg: Any = OmegaConf.merge(OmegaConf.structured(schemas.TrainConfig), plain)
        for group, options in OPTIONS.items():
            node = plain[group]
            if "_target_" in node:
                continue
            name = node.get("architecture" if group == "model" else "name")
            if group == "dataset":
                name = "text_stream" if "buffer" in node else "token_shards"
            held = {"none": "no_lookahead"}.get(name, name) if name in options or name == "none" else options[0]
            cfg[group] = OmegaConf.merge(OmegaConf.structured(schemas.SCHEMAS[held]), node)
    except (OmegaConfBaseException, KeyError) as e:
        raise ConfigError(f"this config is of another version of the code ({one_line(e)})") from None
    return cfg


def _check_environment(cfg: DictConfig) -> None:
    """What torchrun sets, and what W&B reads."""
    advice = "type unset {}, or start with torchrun"
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        text = os.environ.get(name, "1")
        if not (text.isascii() and text.isdigit() and int(text) < 2**16):
            raise ConfigError(f"{name}={text!r} in the environment is no such number; {advice.format(name)}")
    size = int(os.environ.get("WORLD_SIZE", 1))
    _require(size >= 1, "WORLD_SIZE", size, f"at least 1; {advice.format('WORLD_SIZE')}")
    for name in ("RANK", "LOCAL_RANK"):
        rank = int(os.environ.get(name, 0))
        _require(rank < size, name, rank, f"below WORLD_SIZE={size}; {advice.format(name)}")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if size > 1 and not os.environ.get(name):
            raise ConfigError(f"WORLD_SIZE={size}, but {name} is not set; {advice.format('WORLD_SIZE')}")
    mode = os.environ.get("WANDB_MODE", "online")
    modes = ["online", "offline", "disabled", "shared", "dryrun", "run"]
    if cfg.logger.name == "wandb" and mode not in modes:
        raise ConfigError(f"WANDB_MODE={mode!r} in the environment must be one of {', '.join(modes)}, or unset")


def _check_model(cfg: DictConfig) -> None:
    m = cfg.model
    if "_target_" in m:
        return
    _choice("model.architecture", m.architecture, ["nanogpt_124m", "nanogpt_162m", "llama"])
    for key in ("vocab_size", "pad_vocab_to", "layers", "width", "heads", "mlp_width", "head_dim", "max_seq_len"):
        _require(m.get(key, 1) >= 1, f"model.{key}", m.get(key), "at least 1")
    _require(m.pad_vocab_to <= 2**16, "model.pad_vocab_to", m.pad_vocab_to, f"at most {2**16}")
    size = 12 * m.layers * m.width**2 + m.vocab_size * m.width
    if size > 10**12 or m.layers > 10_000:
        raise ConfigError(
            f"model.layers={m.layers}, model.width={m.width}: {size:.0e} parameters; type smaller numbers"
        )
    if m.architecture == "nanogpt_162m":
        _require(m.head_dim % 4 == 0, "model.head_dim", m.head_dim, "a multiple of 4")
        _choice("model.init", m.init, ["normal", "record30"])
        _require(m.width % m.head_dim == 0, "model.width", m.width, f"a multiple of model.head_dim={m.head_dim}")
    else:
        _require(m.width % (2 * m.heads) == 0, "model.width", m.width, f"a multiple of 2 x model.heads={m.heads}")
    if m.architecture == "llama":
        pad = m.padding_idx
        _require(pad is None or 0 <= pad < m.vocab_size, "model.padding_idx", pad, f"below {m.vocab_size}, or null")
        _require(cfg.seq_len <= m.max_seq_len, "seq_len", cfg.seq_len, f"at most model.max_seq_len={m.max_seq_len}")


def _check_dataset(cfg: DictConfig) -> None:
    d = cfg.dataset
    if "_target_" in d:
        return
    _check_places(d)
    _choice("dataset.layout", d.layout, ["stream", "rows"])
    vocab = cfg.model.get("vocab_size")
    if vocab is not None and vocab < (d.vocab_size or 0):
        raise ConfigError(
            f"dataset {d.name} has {d.vocab_size} tokens, model {cfg.model.name} only {vocab}; "
            f"type model.vocab_size={d.vocab_size}"
        )
    if d.layout == "rows":
        _require(
            d.row_len is not None and d.pad_id is not None, "dataset.row_len", d.row_len, "set, with dataset.pad_id"
        )
        _require(cfg.seq_len == d.row_len, "seq_len", cfg.seq_len, f"the length of a row of {d.name}, {d.row_len}")
    for key in ("val_tokens", "probe_tokens"):
        _require(d[key] is None or d[key] >= cfg.seq_len, f"dataset.{key}", d[key], f"at least seq_len={cfg.seq_len}")
    _require(d.max_epochs >= 1, "dataset.max_epochs", d.max_epochs, "at least 1")
    if "buffer" in d:
        _require(d.buffer >= 1, "dataset.buffer", d.buffer, "at least 1")
        _require(d.processes is None or d.processes >= 1, "dataset.processes", d.processes, "at least 1")
    else:
        _choice("dataset.order", d.order, ["windows", "nanogpt_124m", "nanogpt_162m"])
        if d.order != "windows" and (d.shuffle or d.layout == "rows"):
            raise ConfigError(f"dataset.order={d.order} neither shuffles nor reads rows; type dataset.order=windows")
        check_preparation(d)


def _check_places(d: DictConfig) -> None:
    """Where the shards lie and what they are called."""
    for key in ("path", "output"):
        check_path(f"dataset.{key}", d[key])
    if not re.fullmatch(r"\w[\w.-]{,99}", d.name) or re.search("_(train|val)_", d.name):
        raise ConfigError(
            f"dataset.name={d.name!r} begins the names of shards: type letters, digits and . _ - without _train_, _val_"
        )


def check_preparation(d: DictConfig) -> None:
    """Raise ConfigError when the keys that prepare a dataset cannot be followed."""
    if missing := sorted(key for key in map(str, d) if OmegaConf.is_missing(d, key)):
        raise ConfigError(f"dataset.{missing[0]} has no value; type dataset.{missing[0]}=VALUE")
    _check_places(d)
    if d.prepare is not None:
        _choice("dataset.prepare", d.prepare, ["sample", "shards", "text", "packaged"])
    _choice("dataset.layout", d.layout, ["stream", "rows"])
    if d.layout == "rows":
        for key, least in (("row_len", 2), ("pad_id", 0)):
            _require(d[key] is not None and d[key] >= least, f"dataset.{key}", d[key], f"at least {least}")
    for key in ("row_len", "pad_id"):
        _require(d.layout == "rows" or d[key] is None, f"dataset.{key}", d[key], "left out unless dataset.layout=rows")
    _require(d.tokenizer != "", "dataset.tokenizer", d.tokenizer, "a name or a file, such as gpt2")
    _require(d.sources is None or len(d.sources) > 0, "dataset.sources", d.sources, "null for all, or name some")
    _require((d.processes or 1) <= 1024, "dataset.processes", d.processes, "at most 1024")
    _require(d.shard_tokens >= (d.row_len or 1), "dataset.shard_tokens", d.shard_tokens, f"at least {d.row_len or 1}")
    _require(d.shard_tokens <= 10**9, "dataset.shard_tokens", d.shard_tokens, "at most 1000000000")
    for key, least in (("vocab_size", 1), ("shards", 1), ("processes", 1), ("val_every", 2)):
        _require(d[key] is None or d[key] >= least, f"dataset.{key}", d[key], f"at least {least}")


def _check_optimizer(cfg: DictConfig) -> None:
    o = cfg.optimizer
    if "_target_" in o:
        return
    _require(o.lr > 0, "optimizer.lr", o.lr, "above 0")
    decay = o.get("weight_decay", 0.0)
    _require(decay >= 0, "optimizer.weight_decay", decay, "at least 0")
    adam, prefix = (o.adam, "optimizer.adam") if "adam" in o else (o, "optimizer")
    betas = list(adam.betas)
    _require(len(betas) == 2 and all(0 <= b < 1 for b in betas), f"{prefix}.betas", betas, "two numbers in [0, 1)")
    _require(adam.eps >= 0, f"{prefix}.eps", adam.eps, "at least 0")
    if "scale" in o:
        _choice("optimizer.scale", o.scale, ["spectral", "max_dim"])
        _choice("optimizer.ns", o.ns, ["quintic5", "polar12"])
    for key in ("momentum", "beta2", "soap_beta"):
        _require(0 <= o.get(key, 0) < 1, f"optimizer.{key}", o.get(key), "in [0, 1)")
    for key in ("mlp_blend", "value_blend", "brake"):
        _require(0 <= o.get(key, 0) <= 1, f"optimizer.{key}", o.get(key), "between 0 and 1")
    for key in ("value_floor", "contra", "update_floor", "exponent"):
        _require(o.get(key, 0) >= 0, f"optimizer.{key}", o.get(key), "at least 0")
    if "contra_steps" in o:
        steps_of(o.contra_steps, cfg.steps, "optimizer.contra_steps")
        _require(o.gradient_scale > 0, "optimizer.gradient_scale", o.gradient_scale, "above 0")
    for key in ("iterations", "precondition_frequency", "max_dim"):
        _require(o.get(key, 1) >= 1, f"optimizer.{key}", o.get(key), "at least 1")
    _require(o.get("iterations", 1) <= 100, "optimizer.iterations", o.get("iterations"), "at most 100")
    if "adam" in o:
        for key in ("embedding_lr", "head_lr", "vector_lr"):
            _require(adam[key] is None or adam[key] > 0, f"optimizer.adam.{key}", adam[key], "above 0")


def _check_schedule(cfg: DictConfig) -> None:
    s = cfg.schedule
    _choice("schedule.decay", s.decay, ["linear", "exponential", "power"])
    _require(0 <= s.momentum_low < 1, "schedule.momentum_low", s.momentum_low, "in [0, 1)")
    _require(-math.inf < s.matched_alpha < 1, "schedule.matched_alpha", s.matched_alpha, "a number below 1")
    if s.decay == "power":
        for key in ("warmup_steps", "min_ratio"):
            _require(not s[key], f"schedule.{key}", s[key], "left out when schedule.decay=power")
        for key in ("decay_steps", "matrix_decay_steps", "exponent"):
            _require(s[key] is None or s[key] > 0, f"schedule.{key}", s[key], "above 0")
        _require(s.extra_steps >= 0, "schedule.extra_steps", s.extra_steps, "at least 0")
        _require(s.exponent <= 100, "schedule.exponent", s.exponent, "at most 100")  # a power of it must be a number
    else:
        for key in ("extra_steps", "matrix_decay_steps"):
            _require(not s[key], f"schedule.{key}", s[key], "left out unless schedule.decay=power")
    if (s.momentum_warmup_steps or s.momentum_cooldown_steps) and "momentum" not in cfg.optimizer:
        raise ConfigError(f"schedule.momentum_* moves a matrix optimizer's momentum, {cfg.optimizer.name} has none")
    if s.matched_alpha and cfg.lookahead.name != "none":
        raise ConfigError(
            "schedule.matched_alpha is the control of a lookahead, by the base alone; type lookahead=none"
        )
    lr_schedule(cfg)
    lr_schedule(cfg, matrix=True)
    momentum_schedule(cfg)


def _check_lookahead(cfg: DictConfig) -> None:
    look = cfg.lookahead
    for key, holds, what in (
        ("ema_decay", lambda v: 0 <= v < 1, "in [0, 1)"),
        ("k", lambda v: v >= 1, "at least 1"),
        ("lr", lambda v: v > 0, "above 0"),
        ("momentum", lambda v: 0 <= v < 1, "in [0, 1)"),
        ("mu_x", lambda v: 0 <= v < 1, "in [0, 1)"),
        ("mu_y", lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ):
        if look.get(key) is not None:
            _require(holds(look[key]), f"lookahead.{key}", look[key], what)
    if look.name == "lookahead":
        _require(look.alpha >= 0, "lookahead.alpha", look.alpha, "at least 0")
    elif "alpha" in look:  # below 0 it looks back along the line
        lowest = lowest_alpha(look.get("ema_decay", 0.0))
        _require(look.alpha > lowest, "lookahead.alpha", look.alpha, f"a number above {lowest:g}")
    if look.name == "gpa":
        _require((look.mu_x is None) != (look.k is None), "lookahead.mu_x", look.mu_x, "null where lookahead.k is set")
    if "inner_state" in look:
        _choice("lookahead.inner_state", look.inner_state, ["maintain", "interpolate", "reset"])
        if look.inner_state == "interpolate" and cfg.optimizer.name in ("soap", "record30"):
            raise ConfigError("SOAP's moments turn with its bases; type lookahead.inner_state=maintain, or reset")
        if look.adaptive and cfg.optimizer.name != "adamw":
            raise ConfigError("lookahead.adaptive=true needs the second moment of Adam; type optimizer=adamw")


def _require(holds: bool, key: str, value: Any, what: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={'null' if value is None else value} must be {what}")


def _choice(key: str, value: str, options: list[str]) -> None:
    if value not in options:
        near = get_close_matches(value, options, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}={value} must be one of {', '.join(options)}{hint}")
