"""From a composed config to one optimizer over every trainable parameter of a model."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ..derived import alpha_schedule, steps_of
from ..errors import ConfigError
from ..lookahead import GPA, NALA, SNOO, EMANesterov, Lookahead, Nesterov
from ..plugins import instantiate
from .aurora import Aurora
from .chain import Chain
from .muon import Muon
from .normuon import NorMuon
from .record30 import Record30
from .soap import SOAP

MATRIX_OPTIMIZERS: dict[str, Any] = {"muon": Muon, "normuon": NorMuon, "aurora": Aurora, "record30": Record30}
RECORD30_BLENDS = ("mlp_blend", "value_blend", "value_floor")
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


def build_optimizer(model: nn.Module, cfg: DictConfig, group: ProcessGroup | None = None) -> Optimizer:
    """The base optimizer of `cfg.optimizer` inside the wrapper of `cfg.lookahead`.

    Every group remembers its `initial_lr`, on which the schedule acts, and those of the matrix optimizer
    have the `role` "matrix". group: the ranks that share its work and state. Raises ConfigError unless every
    trainable parameter is covered exactly once.
    """
    base = _build_base(model, cfg, group)
    _require_cover(model, base)
    for param_group in base.param_groups:
        param_group["initial_lr"] = param_group["lr"]
    return wrap(base, cfg)


def wrap(base: Optimizer, cfg: DictConfig) -> Optimizer:
    """The wrapper of `cfg.lookahead` around a base; the base itself where there is none."""
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
        return GPA(base, look.mu_y ** (1 / look.k) if look.k else look.mu_x, look.mu_y)
    raise ConfigError(f"unknown lookahead.name={look.name}")


def _build_base(model: nn.Module, cfg: DictConfig, group: ProcessGroup | None) -> Optimizer:
    o = cfg.optimizer
    if "_target_" in o:
        return instantiate(o, list(cfg.plugins), [p for p in model.parameters() if p.requires_grad])
    roles = parameter_roles(model)
    if o.name == "adamw":
        return _adamw({role: (params, o.lr) for role, params in roles.items()}, o)
    if o.name == "soap":
        options = {str(key): value for key, value in o.items() if key not in ("name", "betas")}
        return SOAP([p for params in roles.values() for p in params], betas=tuple(o.betas), group=group, **options)
    rates = {"embedding": o.adam.embedding_lr, "head": o.adam.head_lr, "vector": o.adam.vector_lr}
    aux = _adamw({role: (roles[role], o.lr if rate is None else rate) for role, rate in rates.items()}, o.adam)
    matrices: list[dict[str, Any]] = [{"params": roles["matrix"], "role": "matrix"}]
    options = {str(key): value for key, value in o.items() if key not in ("name", "adam")}
    if o.name == "record30":
        matrices = _record30_groups(model, roles["matrix"], *map(options.pop, RECORD30_BLENDS))
        options["contra_steps"] = steps_of(o.contra_steps, cfg.steps, "optimizer.contra_steps")
    if o.name in MATRIX_OPTIMIZERS:
        return Chain([aux, MATRIX_OPTIMIZERS[o.name](matrices, group=group, **options)])
    raise ConfigError(f"unknown optimizer.name={o.name}")


def _record30_groups(
    model: nn.Module, matrices: list[Tensor], mlp_blend: float, value_blend: float, value_floor: float
) -> list[dict[str, Any]]:
    """The matrices of the MLP and the value projections, which SOAP preconditions, and the rest.

    A QKV matrix in one piece belongs to the rest.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    kinds: dict[str, list[Tensor]] = {"rest": [], "mlp": [], "value": []}
    for p in matrices:
        name = names[id(p)]
        value = name.endswith((".v.weight", ".v_proj.weight"))
        kinds["value" if value else "mlp" if ".mlp." in name else "rest"].append(p)
    groups = [
        {"params": kinds["rest"], "soap_blend": 0.0, "soap_floor": 0.0},
        {"params": kinds["mlp"], "soap_blend": mlp_blend, "soap_floor": 0.0},
        {"params": kinds["value"], "soap_blend": value_blend, "soap_floor": value_floor},
    ]
    return [{**group, "role": "matrix"} for group in groups if group["params"]]


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
