"""What a run costs, in hours of one GPU: from the benchmark where it has been measured, else by arithmetic.

Training: tokens / (tokens/s of one GPU, as docs/benchmarks.json has it for this model), or, not measured yet,
tokens x FLOPs per token / (ASSUMED_MFU x the peak of a Hopper GPU). Validation and probes: a third of the FLOPs per
token at each point, at the training's rate, or where the model validates in float32 at ASSUMED_FLOAT32 of that peak.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from ..derived import validation_steps
from ..models import build_model
from ..training.evaluate import PROBE_POSITIONS
from ..training.speed import PEAK_FLOPS, flops_per_token

PEAK, FLOAT32_PEAK = PEAK_FLOPS["H100"], 67e12  # FLOP/s of H100 and H200 alike, from the datasheet
ASSUMED_MFU, ASSUMED_FLOAT32 = 0.4, 0.7
DEFAULT_VAL_TOKENS = 10_485_760  # where a dataset says nothing


@dataclass(frozen=True)
class Cost:
    """Hours of one GPU."""

    training: float
    validation: float
    measured: bool  # the training's rate comes from the benchmark

    @property
    def hours(self) -> float:
        return self.training + self.validation


def cost(cfg: DictConfig, benchmarks: Path) -> Cost | None:
    """None for a model of a plugin, whose products are not known here."""
    if "_target_" in cfg.model:
        return None
    flops = model_flops(json.dumps(OmegaConf.to_container(cfg.model), sort_keys=True), cfg.seq_len)
    rate = measured_rate(benchmarks, cfg.model.name)
    tokens = cfg.steps * cfg.batch_size * cfg.seq_len
    training = tokens / rate if rate else tokens * flops / (ASSUMED_MFU * PEAK)

    averaged = cfg.lookahead.name != "none" or bool(cfg.probe_every)
    points = 1 + (cfg.lookahead.name != "none") + averaged  # x, y, e
    val_tokens = points * len(validation_steps(cfg)) * (cfg.dataset.get("val_tokens") or DEFAULT_VAL_TOKENS)
    if cfg.probe_every:
        probes = cfg.steps // cfg.probe_every
        val_tokens += probes * 2 * len(PROBE_POSITIONS) * (cfg.dataset.get("probe_tokens") or DEFAULT_VAL_TOKENS)
    if cfg.noise_every:  # forward and backward
        measured = cfg.steps // cfg.noise_every * (cfg.dataset.get("val_tokens") or DEFAULT_VAL_TOKENS)
        training *= 1 + measured / tokens
    speed = ASSUMED_FLOAT32 * FLOAT32_PEAK if cfg.model.get("eval_float32", True) else ASSUMED_MFU * PEAK
    return Cost(training / 3600, val_tokens * flops / 3 / speed / 3600, rate is not None)


@cache
def model_flops(model: str, seq_len: int) -> int:
    cfg = OmegaConf.create(json.loads(model))
    with torch.device("meta"):
        return flops_per_token(build_model(cfg), cfg.layers, cfg.width, seq_len)


@cache
def measured_rate(benchmarks: Path, model: str) -> float | None:
    """Tokens/s of one Hopper GPU training this model, the last that `scripts/bench.py train` recorded."""
    rate = None
    for record in json.loads(benchmarks.read_text(encoding="utf-8")) if benchmarks.exists() else []:
        command, device = record["about"]["command"], record["about"]["device"]
        named = f"experiment={model}/" in command or f"model={model} " in f"{command} "
        if record["benchmark"] == "train" and named and ("H100" in device or "H200" in device):
            rate = record["figures"]["tokens/s per device"]
    return rate
