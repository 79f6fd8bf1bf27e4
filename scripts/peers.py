"""What this project is measured against, written as plainly as its users would; used by bench.py.

Each is a `body` for a Runner: it trains without end, calls `done()` after every step, and reads the batches that
the training loop would read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ema_nesterov.data.loader import MicroBatch
from ema_nesterov.models import build_model
from ema_nesterov.optim.build import build_optimizer, parameter_roles
from ema_nesterov.optim.newton_schulz import newton_schulz
from ema_nesterov.training.distributed import Ranks
from ema_nesterov.training.execution import autocast, bfloat16, model_on

Done = Callable[[], None]
Read = Callable[[int], list[MicroBatch]]


# --- the released trainer -------------------------------------------------------------------------


def released(cfg: DictConfig, read: Read, ranks: Ranks, done: Done) -> None:
    """The authors' trainer in plain PyTorch: a compiled model, a table that is not padded, batches read in line,
    Newton-Schulz matrix by matrix on every rank, a wrapper of two buffers, and a wait for the loss at every step."""
    device = ranks.device
    cfg = cfg.copy()
    cfg.model.pad_vocab_to = 1
    torch.manual_seed(cfg.seed)
    model = model_on(cfg, device)
    roles = parameter_roles(model)
    rest = [p for role, params in roles.items() if role != "matrix" for p in params]
    adam = AdamW(rest, lr=3.6e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    muon = LoopMuon(roles["matrix"], 3.6e-4, cfg.optimizer.get("split_qkv", False), compiled=device.type == "cuda")
    wrapper = TwoBuffers(list(model.parameters()), 0.5, 0.995)
    replica: Any = torch.compile(model, dynamic=False) if device.type == "cuda" else model
    if ranks.size > 1:
        replica = torch.nn.parallel.DistributedDataParallel(replica)
    for step in count():
        batch = read(step)
        for i, (inputs, targets) in enumerate(batch):
            inputs, targets = inputs.to(device), targets.to(device)
            with nullcontext() if i == len(batch) - 1 or ranks.size == 1 else replica.no_sync():
                with autocast(cfg, device):
                    loss = replica(inputs, targets)
                loss.backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad /= len(batch)
        adam.step()
        muon.step()
        wrapper.step()
        model.zero_grad(set_to_none=True)
        loss.item()
        done()


class TwoBuffers:
    """EMA-Nesterov as Algorithm 1 is written: the previous weights and m, tensor after tensor."""

    def __init__(self, params: list[Tensor], alpha: float, gamma: float):
        self.params, self.alpha, self.gamma = params, alpha, gamma
        self.previous, self.m = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        for p, previous, m in zip(self.params, self.previous, self.m, strict=True):
            m.mul_(self.gamma).add_(p - previous, alpha=1 - self.gamma)
            previous.copy_(p)
            p.add_(m, alpha=self.alpha)


class LoopMuon(Optimizer):
    """Muon one matrix at a time."""

    def __init__(self, params: list[Tensor], lr: float, split_qkv: bool, compiled: bool = False):
        super().__init__(params, {"lr": lr})
        self.split_qkv = split_qkv
        self.orthogonalize = torch.compile(newton_schulz) if compiled else newton_schulz

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            update = p.grad.lerp(momentum, 0.95)
            blocks = 3 if self.split_qkv and p.size(0) == 3 * p.size(1) else 1
            o = torch.cat([self.orthogonalize(part) for part in update.chunk(blocks)])
            p.add_(o.to(p.dtype), alpha=-self.param_groups[0]["lr"] * max(1.0, p.size(0) / p.size(1)) ** 0.5)


# --- the same model and optimizer in other loops --------------------------------------------------


def eager(cfg: DictConfig, read: Read, ranks: Ranks, done: Done) -> None:
    """The model and the optimizer of the config in a bare loop: nothing compiled, checked, logged or read ahead."""
    device = ranks.device
    torch.manual_seed(cfg.seed)
    model = model_on(cfg, device)
    optimizer = build_optimizer(model, cfg)
    for step in count():
        batch = read(step)
        for inputs, targets in batch:
            with autocast(cfg, device):
                loss = model(inputs.to(device), targets.to(device)) / len(batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done()


def trainer(cfg: DictConfig, read: Read, ranks: Ranks, done: Done) -> None:
    """The same under transformers' Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build_model(cfg.model)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": self.model(input_ids, labels)}

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for step in count():
                for inputs, targets in read(step):
                    for row, labels in zip(inputs, targets, strict=True):
                        yield {"input_ids": row, "labels": labels}

    class Tell(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            done()

    torch.manual_seed(cfg.seed)
    model = Model()
    micro = len(read(0)[0].inputs)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=10**6,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=cfg.batch_size // micro,
            max_grad_norm=0.0,
            use_cpu=ranks.device.type == "cpu",
            bf16=bfloat16(cfg, ranks.device),
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        optimizer = build_optimizer(model.model, cfg)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        Trainer(model, arguments, train_dataset=Rows(), optimizers=(optimizer, schedule), callbacks=[Tell()]).train()


PEERS = {"released": released, "eager": eager, "trainer": trainer}
