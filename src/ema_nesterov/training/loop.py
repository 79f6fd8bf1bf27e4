"""The training loop.

While training, the parameters hold the lookahead point y_t. A step takes the gradient there, and the
wrapper's `step()` leaves y_{t+1}; evaluation visits the iterate x_t and comes back. `step` counts
completed optimizer steps, in the loop, in the logs and in the checkpoints.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..config import alpha_schedule, lookahead_position, lr_schedule, momentum_schedule
from ..data.loader import MicroBatch, prefetch
from ..errors import ConfigError
from ..lookahead import Wrapper
from ..models import build_model
from ..optim.build import build_optimizer
from .checkpoint import load_checkpoint, save_checkpoint, save_weights
from .distributed import Ranks
from .evaluate import at_iterate, copy_iterate, mean_loss, probe, validate
from .logs import Logs, Silence
from .speed import Clock


class Diverged(Exception):
    """The training loss is no longer a number."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"training loss {loss} at step {step}; try a smaller learning rate or alpha")


def train(
    cfg: DictConfig,
    folder: Path,
    dataset: Any,
    ranks: Ranks,
    micro_batch_size: int,
    checkpoints: list[Path],
    logs: Logs | Silence,
) -> None:
    """Train from the last checkpoint, or from the start, to `cfg.steps`.

    Raises Diverged when a logged loss is not finite, on all ranks alike.
    """
    device = ranks.device
    torch.manual_seed(cfg.seed)
    with device:
        model = build_model(cfg.model, cfg.plugins, torch.bfloat16 if device.type == "cuda" else torch.float32)
    logs.say(f"{cfg.model.name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = build_optimizer(model, cfg, ranks.group)
    lr, matrix_lr = lr_schedule(cfg), lr_schedule(cfg, matrix=True)
    momentum, alpha = momentum_schedule(cfg), alpha_schedule(cfg)
    clock = Clock(cfg, model, ranks)
    start = resume(checkpoints, model, optimizer, dataset, ranks, clock)

    compiled: Any = torch.compile(model, dynamic=False) if compiles(cfg, device) else model
    replica: Any = DistributedDataParallel(compiled) if ranks.size > 1 else compiled
    precision = autocast(device, cfg.model.get("autocast", True))
    fix_bucket_layout(replica, (micro_batch_size, cfg.seq_len), ranks, precision)

    eval_precision = nullcontext() if cfg.model.get("eval_float32", True) else precision
    evaluate = partial(evaluate_on, dataset, compiled, ranks, micro_batch_size, eval_precision)
    full_alpha = None if cfg.lookahead.name == "none" else lookahead_position(cfg)
    tokens_per_step = cfg.batch_size * cfg.seq_len
    bytes_per_token = dataset.bytes_per_token()

    def read(step: int) -> list[MicroBatch]:
        return dataset.batch(step, cfg.batch_size, ranks.rank, ranks.size, micro_batch_size)

    def log(step: int, **values: Any) -> None:
        logs.write({"step": step, "tokens": step * tokens_per_step, "time": clock.seconds(), **values})

    def log_validation(step: int) -> None:
        with clock.paused():
            losses = validate(optimizer, full_alpha, partial(evaluate, cfg.dataset.val_tokens))
            log(step, **losses, **derived(losses["val/loss"], bytes_per_token))

    if start == 0 and cfg.eval_every:
        log_validation(0)
    clock.start(start)
    batches = prefetch(read, range(start, cfg.steps), device, cfg.trainer.workers)
    for step, batch in enumerate(batches, start=start + 1):  # the step that this pass completes
        probing = cfg.probe_every and step % cfg.probe_every == 0
        if probing:
            with clock.paused():
                previous = copy_iterate(optimizer)
        for group in optimizer.param_groups:
            matrix = group.get("role") == "matrix"
            group["lr"] = group["initial_lr"] * (matrix_lr if matrix else lr)(step - 1)
            if matrix and momentum is not None:
                group["momentum"] = momentum(step - 1)

        loss = torch.zeros((), device=device)
        weights = loss_weights(batch, ranks)
        for i, (inputs, targets) in enumerate(batch):
            last = i == len(batch) - 1
            with nullcontext() if last or ranks.size == 1 else replica.no_sync():
                with precision:
                    micro_loss = replica(inputs, targets)  # nan where there is no target
                    micro_loss = torch.where(weights[i] > 0, micro_loss * weights[i], 0.0)
                micro_loss.backward()
            loss += micro_loss.detach()

        logged = step % cfg.log_every == 0 or step == cfg.steps
        norm = gradient_norm(model, cfg.trainer.grad_clip) if logged or cfg.trainer.grad_clip else None
        optimizer.step()
        optimizer.zero_grad()

        if logged:
            value = (ranks.sum(loss) / ranks.size).item()
            assert norm is not None
            log(
                step,
                **{"train/loss": value, "train/grad_norm": float(norm)},
                **{"optim/lr": float(optimizer.param_groups[-1]["lr"]), "optim/alpha": alpha(step - 1)},
                **clock.speed(step),
            )
            if not math.isfinite(value):
                raise Diverged(step, value)
        if step == cfg.steps or (cfg.eval_every and step % cfg.eval_every == 0):
            log_validation(step)
        if probing:
            with clock.paused():
                losses = probe(optimizer, previous, partial(evaluate, cfg.dataset.probe_tokens))
                for direction, position, value in losses:
                    log(step, **{"probe/direction": direction, "probe/position": position, "probe/loss": value})
        if step == cfg.steps or (cfg.checkpoint_every and step % cfg.checkpoint_every == 0):
            with clock.paused():
                logs.sync()
                checkpoint(folder, step, model, optimizer, dataset, ranks, clock, cfg.trainer.keep_checkpoints)

    if ranks.is_first:
        with at_iterate(optimizer):
            save_weights(folder / "model.safetensors", model)
    ranks.barrier()


# --- the pieces of a step -------------------------------------------------------------------------


def loss_weights(batch: list[MicroBatch], ranks: Ranks) -> Tensor:
    """The weight of each micro-batch's mean loss, so that the gradient that DDP averages over ranks is
    that of the mean over all targets of the global batch, however they fall into micro-batches."""
    counts = torch.stack([(targets != -100).sum() for _, targets in batch]).float()
    return counts * ranks.size / ranks.sum(counts.sum())


def gradient_norm(model: nn.Module, limit: float) -> Tensor:
    """The norm of the whole gradient, which is then clipped to `limit` (0: left as it is)."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if limit:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


def autocast(device: torch.device, wanted: bool) -> AbstractContextManager:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" and wanted else nullcontext()


def compiles(cfg: DictConfig, device: torch.device) -> bool:
    return device.type == "cuda" if cfg.trainer.compile is None else cfg.trainer.compile


def fix_bucket_layout(
    replica: nn.Module, shape: tuple[int, int], ranks: Ranks, precision: AbstractContextManager
) -> None:
    """One backward pass that nothing uses: DDP orders its buckets anew after the first, and a run that
    starts must sum its gradients in the order of one that resumes, or their last bits differ."""
    if ranks.size > 1:
        tokens = torch.zeros(shape, dtype=torch.long, device=ranks.device)
        with precision:
            loss = replica(tokens, tokens)
        loss.backward()
        replica.zero_grad()


# --- evaluation -----------------------------------------------------------------------------------


def evaluate_on(
    dataset: Any, model: nn.Module, ranks: Ranks, micro_batch_size: int, precision: AbstractContextManager, tokens: int
) -> float:
    """The mean loss of the weights that the model holds on the first `tokens` validation tokens."""
    model.eval()
    batches = dataset.validation(tokens, ranks.rank, ranks.size, micro_batch_size)
    loss = mean_loss(model, batches, ranks, precision)
    model.train()
    return loss


def derived(loss: float, bytes_per_token: float | None) -> dict[str, float]:
    """Perplexity, and bits per byte where the dataset knows the bytes of its tokens."""
    values = {"val/perplexity": math.exp(loss) if loss < 700 else math.inf}
    if bytes_per_token is not None:
        values["val/bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return values


# --- checkpoints ----------------------------------------------------------------------------------


def resume(
    checkpoints: list[Path], model: nn.Module, optimizer: Optimizer, dataset: Any, ranks: Ranks, clock: Clock
) -> int:
    """Restore weights (y_t), optimizer, random state and elapsed time; returns the completed steps."""
    if not checkpoints:
        return 0
    state = load_checkpoint(checkpoints[-1])
    saved, built = state["optimizer"].get("wrapper"), type(optimizer).__name__
    if (saved or "no wrapper") != (built if isinstance(optimizer, Wrapper) else "no wrapper"):
        raise ConfigError(
            f"{checkpoints[-1]} holds {saved or 'no wrapper'}, this config builds {built}: probes keep a weight EMA; "
            "type the probe_every that the run began with"
        )
    dataset.resume(state["data"])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if len(state["rng"]) == ranks.size:
        rng = state["rng"][ranks.rank]
        torch.set_rng_state(rng["cpu"])
        if ranks.device.type == "cuda" and rng["cuda"] is not None:
            torch.cuda.set_rng_state(rng["cuda"])
    clock.earlier = state["seconds"]
    return state["step"]


def checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    dataset: Any,
    ranks: Ranks,
    clock: Clock,
    keep: int,
) -> None:
    """Save everything that the next step depends on. All ranks call it; the first one writes."""
    cuda = torch.cuda.get_rng_state() if ranks.device.type == "cuda" else None
    rng = ranks.gather({"cpu": torch.get_rng_state(), "cuda": cuda})
    optimizer_state = optimizer.state_dict()  # a collective where ranks share the state
    if ranks.is_first:
        state = {
            "step": step,
            "seconds": clock.seconds(),
            "model": model.state_dict(),
            "optimizer": optimizer_state,
            "rng": rng,
            "data": dataset.state(),
        }
        save_checkpoint(folder / "checkpoints", step, state, keep)
    ranks.barrier()
