"""From a composed config to one optimizer over every trainable parameter of a model."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import alpha_schedule
from ..errors import ConfigError
from ..lookahead import GPA, NALA, SNOO, EMANesterov, Lookahead, Nesterov
from ..plugins import instantiate
from .aurora import Aurora
from .chain import Chain
from .muon import Muon
from .normuon import NorMuon
from .soap import SOAP

MATRIX_OPTIMIZERS = {"muon": Muon, "normuon": NorMuon, "aurora": Aurora}
ROLES = ("embedding", "head", "matrix", "vector")


def parameter_roles(model: nn.Module) -> dict[str, list[Tensor]]:
    """The trainable parameters by what they are, tied ones once.

    embedding: tables of nn.Embedding (a tied head included). head: the weight of the last nn.Linear, if it
    has as many rows as a table. vector: fewer than two dimensions. matrix: the rest.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    rows = {m.weight.size(0) for m in model.modules() if isinstance(m, nn.Embedding)}
    last = [m.weight for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    heads = {id(weight) for weight in last if weight.size(0) in rows}

    def role_of(p: Tensor) -> str:
        if id(p) in tables:
            return "embedding"
        if id(p) in heads:
            return "head"
        return "vector" if p.ndim < 2 else "matrix"

    roles: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    for p in model.parameters():  # a tied parameter comes once
        if p.requires_grad:
            roles[role_of(p)].append(p)
    return roles


def build_optimizer(model: nn.Module, cfg: DictConfig) -> Optimizer:
    """The base optimizer of `cfg.optimizer` inside the wrapper of `cfg.lookahead`.

    Every group remembers its `initial_lr`, on which the schedule acts. Raises ConfigError unless every
    trainable parameter is covered exactly once.
    """
    base = _build_base(model, cfg)
    _require_cover(model, base)
    for group in base.param_groups:
        group["initial_lr"] = group["lr"]
    return _wrap(base, cfg)


def _wrap(base: Optimizer, cfg: DictConfig) -> Optimizer:
    look, alpha = cfg.lookahead, alpha_schedule(cfg)
    if look.name == "ema_nesterov" and look.ema_decay > 0:
        return EMANesterov(base, alpha, look.ema_decay, look.warm_start)
    if cfg.probe_every:
        # with alpha = 0 no bit of the base changes: what remains of EMA-Nesterov is the EMA of its weights
        base = EMANesterov(base, 0.0, cfg.probe_ema_decay)
    if look.name == "none":
        return base
    if look.name in ("nesterov", "ema_nesterov"):
        return Nesterov(base, alpha)
    if look.name == "nala":
        return NALA(base, alpha, look.k)
    if look.name == "lookahead":
        return Lookahead(base, look.alpha, look.k, look.inner_state, look.adaptive)
    if look.name == "snoo":
        return SNOO(base, look.lr, look.momentum, look.k)
    if look.name == "gpa":
        return GPA(base, look.mu_x, look.mu_y)
    raise ConfigError(f"unknown lookahead.name={look.name}")


def _build_base(model: nn.Module, cfg: DictConfig) -> Optimizer:
    o = cfg.optimizer
    if "_target_" in o:
        return instantiate(o, list(cfg.plugins), [p for p in model.parameters() if p.requires_grad])
    roles = parameter_roles(model)
    if o.name == "adamw":
        return _adamw({role: (params, o.lr) for role, params in roles.items()}, o)
    if o.name == "soap":
        options = {str(key): value for key, value in o.items() if key not in ("name", "betas")}
        return SOAP([p for params in roles.values() for p in params], betas=tuple(o.betas), **options)
    if o.name in MATRIX_OPTIMIZERS:
        rates = {"embedding": o.adam.embedding_lr, "head": o.adam.head_lr, "vector": o.adam.vector_lr}
        aux = {role: (roles[role], o.lr if rate is None else rate) for role, rate in rates.items()}
        options = {str(key): value for key, value in o.items() if key not in ("name", "adam")}
        return Chain([_adamw(aux, o.adam), MATRIX_OPTIMIZERS[o.name](roles["matrix"], **options)])
    raise ConfigError(f"unknown optimizer.name={o.name}")


def _adamw(roles: dict[str, tuple[list[Tensor], float]], cfg: DictConfig) -> Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": params, "lr": lr, "weight_decay": 0.0 if role == "vector" else cfg.weight_decay}
        for role, (params, lr) in roles.items()
        if params
    ]
    return torch.optim.AdamW(groups, betas=tuple(cfg.betas), eps=cfg.eps, fused=True)


def _require_cover(model: nn.Module, optimizer: Optimizer) -> None:
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    for i, name in names.items():
        if held.count(i) != 1:
            raise ConfigError(f"parameter {name} is in {held.count(i)} optimizer groups; it must be in exactly one")
    if strangers := set(held) - set(names):
        raise ConfigError(f"the optimizer holds {len(strangers)} parameters that the model does not train")
