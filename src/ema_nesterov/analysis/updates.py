"""The updates of a real run, coordinate by coordinate, and the directions that EMANesterov makes of them.

The quickstart's model, data and base (experiment=quickstart/muon) at any size, at a constant learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.optim import Optimizer

from ..lookahead import EMANesterov
from ..models import build_model
from ..optim.build import build_optimizer, parameter_roles
from ..schemas import (
    AuxAdamConfig,
    DatasetConfig,
    LoggerConfig,
    MuonConfig,
    NanoGPT124MConfig,
    NoLookaheadConfig,
    ScheduleConfig,
    TrainConfig,
    TrainerConfig,
)
from ..training.run import open_dataset

Array = np.ndarray


class Updates(NamedTuple):
    """By role of the weights ("matrix": Muon's, "embedding": Adam's), each (steps, coordinates)."""

    updates: dict[str, Tensor]  # x_{t+1} - x_t
    directions: dict[float, dict[str, Tensor]]  # for each gamma, m_{t+1}


def config(data: str, steps: int, batch_size: int, seq_len: int, layers: int, width: int, seed: int) -> DictConfig:
    """experiment=quickstart/muon at these sizes, without a decay of the learning rate. data: its folder."""
    d = DatasetConfig("sample", data, shuffle=True, max_epochs=100, prepare="sample")
    d.vocab_size, d.tokenizer, d.val_tokens, d.probe_tokens = 4096, "sample_bpe4096", 1024, 1024
    adam = AuxAdamConfig(embedding_lr=0.01, head_lr=0.003, vector_lr=0.003)
    return OmegaConf.structured(
        TrainConfig(
            "analysis/filter",
            steps,
            seed,
            seq_len,
            batch_size,
            model=NanoGPT124MConfig("tiny", "nanogpt_124m", vocab_size=4096, layers=layers, heads=4, width=width),
            dataset=d,
            optimizer=MuonConfig("muon", 0.02, scale="spectral", split_qkv=True, adam=adam),
            lookahead=NoLookaheadConfig("none"),
            schedule=ScheduleConfig("linear", decay_steps=0.0),
            trainer=TrainerConfig(),
            logger=LoggerConfig("local"),
        )
    )


def follow(cfg: DictConfig, gammas: Sequence[float], coordinates: int) -> Updates:
    """Train, and keep the updates of so many randomly chosen weights of the matrices and of the table each.

    The wrappers, one around the other, have alpha = 0: they average, and leave every bit of the training as it is.
    Raises DataError when the data do not do."""
    torch.manual_seed(cfg.seed)
    model = build_model(cfg.model)
    optimizer: Optimizer = build_optimizer(model, cfg)
    wrappers: dict[float, EMANesterov] = {}
    for gamma in gammas:
        optimizer = wrappers[gamma] = EMANesterov(optimizer, 0.0, gamma)
    roles = {role: held for role, held in parameter_roles(model).items() if held}
    chosen = {role: torch.randperm(sum(p.numel() for p in held))[:coordinates] for role, held in roles.items()}

    @torch.no_grad()
    def read() -> dict[str, Tensor]:
        return {role: torch.cat([p.flatten() for p in held])[chosen[role]] for role, held in roles.items()}

    xs = [read()]
    ms: dict[float, list[dict[str, Tensor]]] = {gamma: [] for gamma in gammas}
    with closing(open_dataset(cfg, cfg.batch_size, 1)) as dataset:
        for step in range(cfg.steps):
            ((inputs, targets),) = dataset.batch(step, cfg.batch_size, 0, 1, cfg.batch_size)
            model(inputs, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            xs.append(read())
            for gamma, wrapper in wrappers.items():
                with wrapper.at_position(1.0):  # x + m
                    ms[gamma].append({role: ahead - xs[-1][role] for role, ahead in read().items()})
    updates = {role: torch.stack([x[role] for x in xs]).diff(dim=0) for role in roles}
    return Updates(updates, {gamma: {r: torch.stack([m[r] for m in ms[gamma]]) for r in roles} for gamma in gammas})


# --- measures of (steps, n) -----------------------------------------------------------------------


def spectrum(series: Tensor) -> tuple[Array, Array]:
    """(w, power), 0 < w < pi: Hann periodogram less the straight line through each column, mean over columns.

    White noise has its variance at all w. The first bins, over which the window smears, are left out."""
    series = series.double()
    t = torch.linspace(-1, 1, len(series), dtype=torch.float64)[:, None]
    series = series - series.mean(0) - t * (t * series).mean(0) / (t * t).mean()
    window = torch.hann_window(len(series), periodic=False, dtype=torch.float64)[:, None]
    power = (torch.fft.rfft(window * series, dim=0).abs() ** 2 / (window**2).sum()).mean(1)
    return (2 * np.pi * torch.fft.rfftfreq(len(series))[2:-1]).numpy(), power[2:-1].numpy()


def slow_share(series: Tensor, period: float) -> float:
    """Share of the energy, the mean's included, at periods of at least so many steps; of white noise, 2 / period."""
    power = (torch.fft.rfft(series.double(), dim=0).abs() ** 2).mean(1)
    power[1 : (len(series) + 1) // 2] *= 2  # what a real series has at negative frequencies
    slow = torch.fft.rfftfreq(len(series)) <= 1 / period
    return (power[slow].sum() / power.sum()).item()


def energy(series: Tensor) -> float:
    return (series.double() ** 2).mean().item()


def persistent_share(updates: Tensor, lags: range) -> float:
    """Mean of u_t . u_{t + lag} over that of u_t . u_t: the energy of what stays the same for so many steps."""
    u = updates.double()
    return float(np.mean([(u[lag:] * u[:-lag]).mean().item() for lag in lags]) / energy(u))
