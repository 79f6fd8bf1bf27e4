"""The schemas of the config groups: a key that is not here, or of another type, fails at composition.

Every group names its schema in its defaults list. A value without a default is set in the YAML files
of configs/; the defaults here are those that a run's hash leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

# --- models ---------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    name: str = MISSING
    architecture: str = MISSING
    vocab_size: int = MISSING
    pad_vocab_to: int = 1  # round the rows of the tables up to a multiple; the loss stays the same
    autocast: bool = True  # to bfloat16, or (false) weights cast per product: trainer.bfloat16
    eval_float32: bool = True  # validate in float32, as the published runs of this model do


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
    init: str = "normal"  # normal | record30
    float32_gains: bool = False  # multiply the norms' gains in float32
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
    """Prepared shards, and how they are prepared."""

    name: str = MISSING
    path: str = MISSING  # folder of shards: *_train_*.bin and *_val_*.bin; where `output` is given, of text
    output: str | None = None  # folder of the shards that are made of the text in `path`
    tokenizer: str | None = (
        None  # tiktoken encoding, t5, tokenizer.json or *.model; null: what the shards' manifest says
    )
    vocab_size: int | None = None  # of the tokenizer; the model's must be at least as large
    layout: str = "stream"  # stream: windows of seq_len over documents end to end; rows: one document a row
    row_len: int | None = None  # rows only: tokens of a row
    pad_id: int | None = None  # rows only: targets of this id do not count
    val_tokens: int | None = None  # validation targets, the first of the shards; null: all, 10,485,760 at most
    probe_tokens: int = MISSING  # the first of them, or all, that the probe uses
    shuffle: bool = False  # the shards, and the windows in each, anew each epoch, by the seed
    order: str = "windows"  # windows | nanogpt_124m | nanogpt_162m: what the authors' two loaders read
    max_epochs: int = 1  # passes over the training tokens before the data has run out
    # how scripts/prepare_data.py makes the folder
    prepare: str | None = None  # sample | shards | text | packaged
    hub: str | None = None  # dataset repository of the Hugging Face hub
    files: str | None = None  # which of its files hold the text; of a folder: by their names (null: all it can read)
    val_files: str | None = None  # files held out for validation; without any:
    val_every: int | None = None  # documents 0, val_every, 2 val_every, ... are held out; null: the first shard
    text_key: str = "text"  # column of the text in JSON and parquet
    shard_tokens: int = 100_000_000
    shards: int | None = None  # training shards to bring or to make; null: all
    sources: list[str] | None = None  # packaged only: which packages; null: all
    processes: int | None = None  # that tokenise; null: one a core


@dataclass
class StreamConfig:
    """Rows tokenised while training: one document each, out of a shuffle buffer."""

    name: str = MISSING
    path: str | None = None  # folder of the files of text; null: the hub
    output: str = MISSING  # folder of the validation shards, prepared when it is missing
    tokenizer: str = MISSING
    vocab_size: int | None = None
    layout: str = "rows"
    row_len: int = MISSING
    pad_id: int = MISSING
    hub: str | None = None
    files: str = MISSING
    val_files: str = MISSING
    text_key: str = "text"
    buffer: int = 100_000  # documents that are shuffled among each other
    val_tokens: int = MISSING  # validation targets
    probe_tokens: int = MISSING
    max_epochs: int = 1
    processes: int | None = None  # that tokenise, for each rank; null: what the cores give


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
    """AdamW for what a matrix optimizer does not take; a learning rate of null is that optimizer's."""

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


@dataclass
class NorMuonConfig(MuonConfig):
    beta2: float = 0.95


@dataclass
class AuroraConfig:
    name: str = MISSING
    lr: float = MISSING
    momentum: float = 0.95
    weight_decay: float = 0.0
    iterations: int = 2
    exponent: float = 0.5
    adam: AuxAdamConfig = field(default_factory=AuxAdamConfig)


@dataclass
class Record30Config:
    name: str = MISSING
    lr: float = MISSING
    momentum: float = 0.95
    mlp_blend: float = 1.0  # of SOAP, in the matrices of the MLP
    value_blend: float = 0.95  # and in the value projections
    value_floor: float = 0.55
    contra: float = 0.2
    contra_steps: float = MISSING  # below 1: a fraction of the run's steps
    update_floor: float = 0.3825
    brake: float = 0.5
    soap_beta: float = 0.9
    precondition_frequency: int = 10
    iterations: int = 3
    exponent: float = 0.25
    gradient_scale: float = 1.0  # of a summed loss: the tokens of a step
    adam: AuxAdamConfig = field(default_factory=AuxAdamConfig)


@dataclass
class SOAPConfig:
    name: str = MISSING
    lr: float = MISSING
    betas: tuple[float, float] = (0.95, 0.95)
    precondition_frequency: int = 10
    weight_decay: float = 0.0
    split_qkv: bool = False
    eps: float = 1e-8
    max_dim: int = 10000


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


@dataclass
class NALAConfig(NesterovConfig):
    k: int = MISSING


@dataclass
class LookaheadConfig:
    name: str = MISSING
    alpha: float = MISSING
    k: int = MISSING
    inner_state: str = "maintain"  # maintain | interpolate | reset
    adaptive: bool = False


@dataclass
class SNOOConfig:
    name: str = MISSING
    lr: float = MISSING
    momentum: float = MISSING
    k: int = MISSING


@dataclass
class GPAConfig:
    name: str = MISSING
    mu_x: float | None = MISSING
    mu_y: float = MISSING
    k: int | None = None  # in place of mu_x, which is then mu_y^(1/k), as in the released code


# --- schedule, trainer, logger --------------------------------------------------------------------


@dataclass
class ScheduleConfig:
    """Of the learning rate, and of the matrices' momentum. Lengths below 1 are fractions of the run's steps."""

    decay: str = MISSING  # linear | exponential | power
    warmup_steps: float = 0.0
    decay_steps: float = MISSING
    min_ratio: float | None = None  # null: 0 linear, 0.1 exponential
    exponent: float = 1.2  # power only, as are the next two
    extra_steps: float = 0.0  # how long after the run's end the rate would be 0
    matrix_decay_steps: float | None = None  # of the matrices, when other than decay_steps
    momentum_low: float = 0.85  # the matrices' momentum rises from here, and falls back
    momentum_warmup_steps: float = 0.0
    momentum_cooldown_steps: float = 0.0
    matched_alpha: float = (
        0.0  # the rate is multiplied by 1 / (1 - alpha_t): the control of a lookahead with this alpha
    )
    matched_warmup_steps: float = 0.0  # of that alpha_t
    matched_rest_steps: float = 0.0


@dataclass
class TrainerConfig:
    device: str = "auto"  # auto | cpu | cuda
    compile: bool | None = None  # null: on a GPU, and on a CPU for 200 steps or more
    compile_mode: str = "default"  # of torch.compile
    bfloat16: bool | None = None  # products in bfloat16; null: on a GPU. A CPU with AMX gains by it
    deterministic: bool | None = None  # the same bits at every repetition; null: on a CPU
    activation_checkpointing: bool = False  # keep each block's input alone, and compute the rest again: less memory
    grad_clip: float = 0.0  # largest gradient norm; 0: no clipping
    keep_checkpoints: int = 2  # the newest
    keep_every: int | None = None  # steps; their checkpoints stay for good
    async_checkpoints: bool | None = None  # written while the training goes on; null: on a GPU only
    workers: int = 1  # threads that read batches ahead; 0: read when needed
    max_bad_steps: int = 10  # in a row whose loss or gradient is not finite, until the run ends as diverged
    spike_window: int = 128  # losses that the next one is compared with, for train/loss_zscore
    skip_spikes: float | None = None  # standard deviations above those from which a step is not taken


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
    fork_from: str | None = None  # RUN_FOLDER@STEP: begin with that checkpoint, under another schedule or lookahead
    eval_every: int = 100  # 0: only at the end
    eval_at: list[str] = field(default_factory=list)  # validations besides, such as 100, 0.5 and 0.9/25
    probe_every: int = 0  # 0: never
    noise_every: int = 0  # likewise: measure the noise of the gradient
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
    "text_stream": StreamConfig,
    "adamw": AdamWConfig,
    "muon": MuonConfig,
    "normuon": NorMuonConfig,
    "aurora": AuroraConfig,
    "soap": SOAPConfig,
    "record30": Record30Config,
    "no_lookahead": NoLookaheadConfig,
    "nesterov": NesterovConfig,
    "ema_nesterov": EMANesterovConfig,
    "nala": NALAConfig,
    "lookahead": LookaheadConfig,
    "snoo": SNOOConfig,
    "gpa": GPAConfig,
    "wsd": ScheduleConfig,
    "trainer": TrainerConfig,
    "logger": LoggerConfig,
}
for _name, _node in SCHEMAS.items():
    ConfigStore.instance().store(group="schema", name=_name, node=_node)
