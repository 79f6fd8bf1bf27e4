"""The configuration: one dataclass per group, so that a typo fails before a GPU is touched.

Importing this module registers the schemas with Hydra; the YAML files in configs/ hold the values and
name their schema in their defaults list. `check` validates what types cannot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from .errors import ConfigError
from .schedules import Schedule, lookahead_alpha, wsd

# --- models ---------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    name: str = MISSING
    architecture: str = MISSING
    vocab_size: int = MISSING
    pad_vocab_to: int = 1  # round the rows of the tables up to a multiple; the loss stays the same
    autocast: bool = True  # on a GPU: bfloat16 autocast, or (false) weights cast per product
    eval_float32: bool = True  # on a GPU: validate in float32, as the published runs of this model do


@dataclass
class NanoGPT124MConfig(ModelConfig):
    layers: int = MISSING
    heads: int = MISSING
    width: int = MISSING


@dataclass
class NanoGPT162MConfig(ModelConfig):
    layers: int = MISSING
    width: int = MISSING
    head_dim: int = MISSING
    autocast: bool = False
    eval_float32: bool = False


@dataclass
class LlamaConfig(ModelConfig):
    layers: int = MISSING
    heads: int = MISSING
    width: int = MISSING
    mlp_width: int = MISSING
    max_seq_len: int = 2048
    padding_idx: int | None = 1  # this embedding row stays 0; the released code has T5's end-of-sentence here


# --- datasets -------------------------------------------------------------------------------------


@dataclass
class DatasetConfig:
    name: str = MISSING
    path: str = MISSING  # folder of shards: *_train_*.bin and *_val_*.bin
    vocab_size: int = MISSING  # of the tokenizer; the model's must be at least as large
    tokenizer: str = MISSING
    layout: str = "stream"  # stream: windows of seq_len over documents end to end; rows: one document a row
    row_len: int | None = None  # rows only: tokens of a row
    pad_id: int | None = None  # rows only: targets of this id do not count
    val_tokens: int = MISSING  # the first of the validation shards, the same for every run
    probe_tokens: int = MISSING  # the first of them that the probe uses
    shuffle: bool = False  # permute the windows of each epoch by the seed
    max_epochs: int = 1  # passes over the training tokens before the data has run out
    prepare: str | None = None  # how train.py makes the folder when it is missing


# --- optimizers -----------------------------------------------------------------------------------


@dataclass
class AdamWConfig:
    name: str = MISSING
    lr: float = MISSING
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices and tables, never on vectors


@dataclass
class AuxAdamConfig:
    """AdamW for what Muon does not take; a learning rate of null is Muon's."""

    embedding_lr: float | None = None
    head_lr: float | None = None
    vector_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass
class MuonConfig:
    name: str = MISSING
    lr: float = MISSING
    momentum: float = 0.95
    weight_decay: float = 0.0
    scale: str = MISSING  # spectral | max_dim
    ns: str = "quintic5"  # quintic5 | polar12
    split_qkv: bool = False
    adam: AuxAdamConfig = field(default_factory=AuxAdamConfig)


# --- lookaheads -----------------------------------------------------------------------------------


@dataclass
class NoLookaheadConfig:
    name: str = MISSING


@dataclass
class NesterovConfig:
    name: str = MISSING
    alpha: float = MISSING
    warmup_steps: float = MISSING  # alpha is 0 before; below 1: a fraction of the run's steps
    rest_steps: float = MISSING  # alpha is 0 over the last of them; below 1: a fraction


@dataclass
class EMANesterovConfig(NesterovConfig):
    ema_decay: float = MISSING
    warm_start: bool = False


# --- schedule, trainer, logger --------------------------------------------------------------------


@dataclass
class ScheduleConfig:
    decay: str = MISSING  # linear | exponential
    warmup_steps: float = 0.0  # below 1: a fraction of the run's steps
    decay_steps: float = MISSING
    min_ratio: float | None = None  # null: 0 linear, 0.1 exponential


@dataclass
class TrainerConfig:
    device: str = "auto"  # auto | cpu | cuda
    compile: bool | None = None  # null: on a GPU only
    grad_clip: float = 0.0  # largest gradient norm; 0: no clipping
    keep_checkpoints: int = 2
    workers: int = 1  # threads that read batches ahead; 0: read when needed


@dataclass
class LoggerConfig:
    name: str = MISSING
    project: str = "ema-nesterov"
    entity: str | None = None
    mode: str = "online"  # online | offline | disabled
    x_axis: str = "tokens"  # tokens | step
    tags: list[str] = field(default_factory=list)


@dataclass
class TrainConfig:
    name: str = MISSING  # folder of the run below runs_dir
    steps: int = MISSING
    seed: int = 0
    seq_len: int = MISSING
    batch_size: int = MISSING  # sequences per optimizer step, over all ranks
    micro_batch_size: int | None = None  # per rank; null: what a rank gets of a batch, 64 at most
    runs_dir: str = "runs"
    eval_every: int = 100  # 0: only at the end
    probe_every: int = 0  # 0: never
    probe_ema_decay: float = 0.99  # of the weight EMA that runs without EMA-Nesterov keep when probes are on
    checkpoint_every: int = 1000  # 0: only at the end
    log_every: int = 10
    plugins: list[str] = field(default_factory=list)  # modules whose classes `_target_` may name
    model: Any = MISSING
    dataset: Any = MISSING
    optimizer: Any = MISSING
    lookahead: Any = MISSING
    schedule: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING


SCHEMAS = {
    "train": TrainConfig,
    "nanogpt_124m": NanoGPT124MConfig,
    "nanogpt_162m": NanoGPT162MConfig,
    "llama": LlamaConfig,
    "token_shards": DatasetConfig,
    "adamw": AdamWConfig,
    "muon": MuonConfig,
    "no_lookahead": NoLookaheadConfig,
    "nesterov": NesterovConfig,
    "ema_nesterov": EMANesterovConfig,
    "wsd": ScheduleConfig,
    "trainer": TrainerConfig,
    "logger": LoggerConfig,
}
for _name, _node in SCHEMAS.items():
    ConfigStore.instance().store(group="schema", name=_name, node=_node)


# --- derived values -------------------------------------------------------------------------------


def steps_of(length: float, total: int, key: str = "length") -> int:
    """A schedule length in steps: a fraction of the run below 1, else a whole number of steps."""
    if not math.isfinite(length) or length < 0 or (length >= 1 and length != int(length)):
        raise ConfigError(f"{key} must be a fraction below 1 or a whole number of steps, got {length}")
    return round(length * total) if length < 1 else int(length)


def lr_schedule(cfg: DictConfig) -> Schedule:
    """The factor on the learning rate as a function of the step."""
    s = cfg.schedule
    warmup = steps_of(s.warmup_steps, cfg.steps, "schedule.warmup_steps")
    decay = steps_of(s.decay_steps, cfg.steps, "schedule.decay_steps")
    try:
        return wsd(cfg.steps, warmup, decay, s.min_ratio, s.decay)
    except ValueError as e:
        raise ConfigError(f"schedule: {e}") from None


def alpha_schedule(cfg: DictConfig) -> Schedule:
    """alpha_t as a function of the step, 0 without a lookahead."""
    look = cfg.lookahead
    if look.name == "none":
        return lambda step: 0.0
    warmup = steps_of(look.warmup_steps, cfg.steps, "lookahead.warmup_steps")
    rest = steps_of(look.rest_steps, cfg.steps, "lookahead.rest_steps")
    try:
        return lookahead_alpha(look.alpha, lr_schedule(cfg), cfg.steps, warmup, rest)
    except ValueError as e:
        raise ConfigError(f"lookahead: {e}") from None


# --- validation -----------------------------------------------------------------------------------


def check(cfg: DictConfig) -> None:
    """Raise ConfigError, in one line, when the composed config cannot be run."""
    _check_keys(cfg, "")
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} has no value; type {missing[0]}=VALUE")
    for key in ("steps", "seq_len", "batch_size", "log_every"):
        _require(cfg[key] >= 1, key, cfg[key], "at least 1")
    _require(cfg.steps <= 10_000_000, "steps", cfg.steps, "at most 10000000")
    for key in ("seed", "eval_every", "probe_every", "checkpoint_every"):
        _require(cfg[key] >= 0, key, cfg[key], "at least 0")
    micro = cfg.micro_batch_size
    _require(micro is None or micro >= 1, "micro_batch_size", micro, "at least 1")
    _require(0 < cfg.probe_ema_decay < 1, "probe_ema_decay", cfg.probe_ema_decay, "between 0 and 1")
    if cfg.name.startswith(("/", "~")) or ".." in cfg.name.split("/") or not cfg.name.strip("/ "):
        raise ConfigError(f"name={cfg.name!r} must be a relative folder such as quickstart/muon")
    _check_model(cfg)
    _check_dataset(cfg)
    _check_optimizer(cfg)
    _check_lookahead(cfg)
    _choice("schedule.decay", cfg.schedule.decay, ["linear", "exponential"])
    alpha_schedule(cfg)
    lr_schedule(cfg)
    _choice("trainer.device", cfg.trainer.device, ["auto", "cpu", "cuda"])
    _require(cfg.trainer.grad_clip >= 0, "trainer.grad_clip", cfg.trainer.grad_clip, "at least 0")
    _require(cfg.trainer.keep_checkpoints >= 1, "trainer.keep_checkpoints", cfg.trainer.keep_checkpoints, "at least 1")
    _require(cfg.trainer.workers in (0, 1), "trainer.workers", cfg.trainer.workers, "0 or 1")
    _choice("logger.mode", cfg.logger.mode, ["online", "offline", "disabled"])
    _choice("logger.x_axis", cfg.logger.x_axis, ["tokens", "step"])


def _check_keys(cfg: DictConfig, prefix: str) -> None:
    """A key added with + escapes Hydra's own check."""
    schema = OmegaConf.get_type(cfg)
    for key in map(str, cfg):
        if is_dataclass(schema) and "_target_" not in cfg:
            known = [f.name for f in fields(schema)]
            if key not in known:
                near = get_close_matches(key, known, n=1)
                raise ConfigError(f"unknown key {prefix}{key}" + (f"; did you mean {prefix}{near[0]}?" if near else ""))
        if not OmegaConf.is_missing(cfg, key) and isinstance(cfg[key], DictConfig):
            _check_keys(cfg[key], f"{prefix}{key}.")


def _check_model(cfg: DictConfig) -> None:
    m = cfg.model
    if "_target_" in m:
        return
    _choice("model.architecture", m.architecture, ["nanogpt_124m", "nanogpt_162m", "llama"])
    for key in ("vocab_size", "pad_vocab_to", "layers", "width"):
        _require(m[key] >= 1, f"model.{key}", m[key], "at least 1")
    if m.architecture == "nanogpt_162m":
        _require(m.head_dim % 4 == 0, "model.head_dim", m.head_dim, "a multiple of 4")
        _require(m.width % m.head_dim == 0, "model.width", m.width, f"a multiple of model.head_dim={m.head_dim}")
    else:
        _require(m.heads >= 1 and m.width % (2 * m.heads) == 0, "model.width", m.width, f"a multiple of 2 x {m.heads}")
    if m.architecture == "llama":
        _require(cfg.seq_len <= m.max_seq_len, "seq_len", cfg.seq_len, f"at most model.max_seq_len={m.max_seq_len}")


def _check_dataset(cfg: DictConfig) -> None:
    d = cfg.dataset
    if "_target_" in d:
        return
    _choice("dataset.layout", d.layout, ["stream", "rows"])
    if d.prepare is not None:
        _choice("dataset.prepare", d.prepare, ["sample"])
    vocab = cfg.model.get("vocab_size")
    if vocab is not None and vocab < d.vocab_size:
        raise ConfigError(
            f"dataset {d.name} has {d.vocab_size} tokens, model {cfg.model.name} only {vocab}; "
            f"type model.vocab_size={d.vocab_size}"
        )
    if d.layout == "rows":
        _require(
            d.row_len is not None and d.pad_id is not None, "dataset.row_len", d.row_len, "set, with dataset.pad_id"
        )
        _require(cfg.seq_len == d.row_len, "seq_len", cfg.seq_len, f"the length of a row of {d.name}, {d.row_len}")
    _require(d.val_tokens >= cfg.seq_len, "dataset.val_tokens", d.val_tokens, f"at least seq_len={cfg.seq_len}")
    _require(d.probe_tokens >= cfg.seq_len, "dataset.probe_tokens", d.probe_tokens, f"at least seq_len={cfg.seq_len}")
    _require(d.max_epochs >= 1, "dataset.max_epochs", d.max_epochs, "at least 1")


def _check_optimizer(cfg: DictConfig) -> None:
    o = cfg.optimizer
    if "_target_" in o:
        return
    _require(o.lr > 0, "optimizer.lr", o.lr, "above 0")
    _require(o.weight_decay >= 0, "optimizer.weight_decay", o.weight_decay, "at least 0")
    adam, prefix = (o.adam, "optimizer.adam") if o.name == "muon" else (o, "optimizer")
    betas = list(adam.betas)
    _require(len(betas) == 2 and all(0 <= b < 1 for b in betas), f"{prefix}.betas", betas, "two numbers in [0, 1)")
    _require(adam.eps >= 0, f"{prefix}.eps", adam.eps, "at least 0")
    if o.name == "muon":
        _require(0 <= o.momentum < 1, "optimizer.momentum", o.momentum, "in [0, 1)")
        _choice("optimizer.scale", o.scale, ["spectral", "max_dim"])
        _choice("optimizer.ns", o.ns, ["quintic5", "polar12"])
        for key in ("embedding_lr", "head_lr", "vector_lr"):
            _require(adam[key] is None or adam[key] > 0, f"optimizer.adam.{key}", adam[key], "above 0")


def _check_lookahead(cfg: DictConfig) -> None:
    look = cfg.lookahead
    if look.name == "none":
        return
    _require(math.isfinite(look.alpha) and look.alpha >= 0, "lookahead.alpha", look.alpha, "at least 0")
    if look.name == "ema_nesterov":
        _require(0 <= look.ema_decay < 1, "lookahead.ema_decay", look.ema_decay, "in [0, 1)")


def _require(holds: bool, key: str, value: Any, what: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={value} must be {what}")


def _choice(key: str, value: str, options: list[str]) -> None:
    if value not in options:
        near = get_close_matches(value, options, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}={value} must be one of {', '.join(options)}{hint}")
