"""The training loop.

While training, the parameters hold the lookahead point y_t. A step takes the gradient there, and the
wrapper's `step()` leaves y_{t+1}; evaluation visits the iterate x_t and comes back. `step` counts
completed optimizer steps, in the loop, in the logs and in the checkpoints. A step whose loss or gradient
is not finite on some rank is completed, but not taken.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..data.loader import MicroBatch, prefetch
from ..derived import alpha_schedule, lookahead_position, lr_schedule, momentum_schedule, validation_steps
from ..errors import ConfigError, one_line
from ..lookahead import Wrapper, wrapper_in
from ..models.common import checkpoint_blocks, count_parameters
from ..optim.build import build_optimizer
from .checkpoint import Saver, load_checkpoint, save_weights
from .distributed import Ranks
from .evaluate import at_iterate, copy_iterate, mean_loss, probe, validate
from .execution import autocast, compiles, eval_autocast, model_on
from .folder import Status
from .fork import Fork
from .health import Watch, examine
from .logs import Logs, Silence
from .noise import gradient_noise
from .speed import Clock
from .stop import Stop


class Preempted(Exception):
    """The run was asked to stop, and did after this step."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class Diverged(Exception):
    """The losses are no longer numbers. ranks: on which, as far as known, and data: what those read."""

    def __init__(self, step: int, reason: str, ranks: list[int] | None = None, data: list[str] | None = None):
        places = "; ".join(f"rank {rank} read {place}" for rank, place in zip(ranks or [], data or [], strict=True))
        where = f" ({places})" if places else ""
        super().__init__(f"{reason} at step {step}{where}; try a smaller learning rate or alpha")
        self.step, self.ranks, self.data = step, ranks or [], data or []


def train(
    cfg: DictConfig,
    folder: Path,
    dataset: Any,
    ranks: Ranks,
    micro_batch_size: int,
    checkpoint: Path | None,
    fork: Fork | None,
    logs: Logs | Silence,
    status: Status,
    stop: Stop,
) -> None:
    """Train from the checkpoint, or the fork, or the start, to `cfg.steps`.

    Raises, on all ranks alike, Diverged after cfg.trainer.max_bad_steps steps in a row that could not be taken, or a
    validation that is not finite, and Preempted when one of them was asked to stop; both after saving.
    """
    device = ranks.device
    torch.manual_seed(cfg.seed)
    model = model_on(cfg, device)
    logs.say(f"{cfg.model.name}: {count_parameters(model):,} parameters")
    optimizer = build_optimizer(model, cfg, ranks.group)
    lr, matrix_lr = lr_schedule(cfg), lr_schedule(cfg, matrix=True)
    momentum, alpha = momentum_schedule(cfg), alpha_schedule(cfg)
    clock, watch = Clock(cfg, model, ranks), Watch(cfg.trainer.spike_window, cfg.trainer.skip_spikes)
    validations = validation_steps(cfg)
    start, validated = 0, 0 not in validations
    if checkpoint is not None:
        with told(checkpoint):
            start, validated = resume(restore(checkpoint, model, optimizer), dataset, ranks, clock, watch)
    elif fork is not None:
        with told(fork.checkpoint):
            start, validated = resume(fork.restore(cfg, model, optimizer, ranks), dataset, ranks, clock, watch)

    if cfg.trainer.activation_checkpointing:
        checkpoint_blocks(model)
    compiled: Any = model
    if compiles(cfg, device):
        compiled = torch.compile(model, dynamic=False, mode=cfg.trainer.compile_mode)
    replica: Any = compiled
    if ranks.size > 1:  # the gradients are views of the buckets: no second copy
        replica = DistributedDataParallel(compiled, gradient_as_bucket_view=True)
    precision = autocast(cfg, device)
    fix_bucket_layout(replica, (micro_batch_size, cfg.seq_len), ranks, precision)

    evaluate = partial(evaluate_on, dataset, compiled, ranks, micro_batch_size, eval_autocast(cfg, device))
    full_alpha = None if cfg.lookahead.name == "none" else lookahead_position(cfg)
    tokens_per_step = cfg.batch_size * cfg.seq_len
    bytes_per_token = dataset.bytes_per_token()

    def read(step: int) -> list[MicroBatch]:
        return dataset.batch(step, cfg.batch_size, ranks.rank, ranks.size, micro_batch_size)

    def log(step: int, **values: Any) -> None:
        logs.write({"step": step, "tokens": step * tokens_per_step, "time": clock.seconds(), **values})

    def log_validation(step: int) -> bool:
        """Whether the losses are finite."""
        with clock.paused():
            losses = validate(optimizer, full_alpha, partial(evaluate, cfg.dataset.val_tokens))
            log(step, **losses, **derived(losses["val/loss"], bytes_per_token))
        return math.isfinite(losses["val/loss"])

    def save(step: int, validated: bool) -> None:
        with clock.paused():
            state = training_state(step, validated, model, optimizer, dataset, ranks, clock, watch)
            if ranks.is_first:
                saver.save(step, state, logs.sync)
                if saver.failed is None:
                    status.update(step=step)

    asynchronous = device.type == "cuda" if cfg.trainer.async_checkpoints is None else cfg.trainer.async_checkpoints
    keep = (cfg.trainer.keep_checkpoints, cfg.trainer.keep_every)
    batches = prefetch(read, range(start, cfg.steps), device, cfg.trainer.workers)
    with closing(Saver(folder / "checkpoints", *keep, asynchronous, logs.warn)) as saver, closing(batches):
        if not validated and not log_validation(start):  # at step 0, or where a stop left it out
            raise Diverged(start, "validation loss is not finite")
        clock.start(start)
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

            loss = forward_backward(replica, batch, ranks, precision)
            norm = gradient_norm(model, cfg.trainer.grad_clip)
            health = examine(loss, norm, stop.wanted(), ranks)
            trouble = watch.judge(health)
            if not trouble:
                optimizer.step()
            elif isinstance(optimizer, Wrapper):
                optimizer.skip()
            optimizer.zero_grad()
            if step == start + 1:
                gc.collect()
                gc.freeze()  # what lives until the end is not looked through again and again
                clock.first_done(step)

            measured = {"train/loss": health.loss, "train/grad_norm": health.norm}
            if trouble:
                log(step, **measured, **{"train/skipped": watch.skipped})
                logs.warn(f"step {step} is not taken: {trouble}")
            elif step % cfg.log_every == 0 or step == cfg.steps:
                if watch.zscore is not None:
                    measured["train/loss_zscore"] = watch.zscore
                rates = {"optim/lr": float(optimizer.param_groups[-1]["lr"]), "optim/alpha": alpha(step - 1)}
                log(step, **measured, **rates, **clock.speed(step))
            if probing:
                with clock.paused():
                    losses = probe(optimizer, previous, partial(evaluate, cfg.dataset.probe_tokens))
                    for direction, position, value in losses:
                        log(step, **{"probe/direction": direction, "probe/position": position, "probe/loss": value})
            if cfg.noise_every and step % cfg.noise_every == 0:
                with clock.paused(), at_iterate(optimizer):
                    held_out = dataset.validation(cfg.dataset.val_tokens, ranks.rank, ranks.size, micro_batch_size)
                    log(step, **gradient_noise(compiled, held_out, ranks, precision))

            diverged: Diverged | None = None
            most = min(2, cfg.trainer.max_bad_steps) if step == cfg.steps else cfg.trainer.max_bad_steps
            if watch.in_a_row >= most:
                bad = health.bad_ranks or blame(model, replica, batch, ranks, precision)
                data = [place(dataset, cfg, step - 1, rank, ranks.size, micro_batch_size) for rank in bad]
                diverged = Diverged(step, f"{trouble}, the last of {watch.in_a_row} steps in a row", bad, data)
            due = step in validations
            leaving = diverged or health.stop  # a stop leaves no time to validate: the next start does
            if due and not leaving and not log_validation(step):
                leaving = diverged = Diverged(step, "validation loss is not finite")
            if leaving or step == cfg.steps or (cfg.checkpoint_every and step % cfg.checkpoint_every == 0):
                save(step, validated=not (due and leaving))
            if leaving:
                saver.wait()
                ranks.barrier()  # torchrun ends the others when one does
                if saver.failed and not diverged:
                    raise saver.failed
                raise diverged or Preempted(step)
        saver.wait()
        if ranks.is_first and saver.failed:
            raise saver.failed

    if ranks.is_first:
        with at_iterate(optimizer):
            save_weights(folder / "model.safetensors", model)
    ranks.barrier()


# --- the pieces of a step -------------------------------------------------------------------------


def forward_backward(
    replica: Any, batch: list[MicroBatch], ranks: Ranks, precision: AbstractContextManager, average: bool = True
) -> Tensor:
    """This rank's part of the global batch's mean loss; its gradient, averaged over ranks, is in the parameters."""
    loss = torch.zeros((), device=ranks.device)
    weights = loss_weights(batch, ranks)
    for i, (inputs, targets) in enumerate(batch):
        now = ranks.size == 1 or (average and i == len(batch) - 1)
        with nullcontext() if now else replica.no_sync():
            with precision:
                micro_loss = replica(inputs, targets)  # nan where there is no target
                micro_loss = torch.where(weights[i] > 0, micro_loss * weights[i], 0.0)
            micro_loss.backward()
        loss += micro_loss.detach()
    return loss


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


def blame(
    model: nn.Module, replica: nn.Module, batch: list[MicroBatch], ranks: Ranks, precision: AbstractContextManager
) -> list[int]:
    """The ranks whose own gradient is not finite, where their losses are: they take it again, and do not average."""
    forward_backward(replica, batch, ranks, precision, average=False)
    bad = not gradient_norm(model, 0.0).isfinite().item()
    model.zero_grad()
    return [rank for rank, is_bad in enumerate(ranks.gather(bad)) if is_bad]


def place(dataset: Any, cfg: DictConfig, step: int, rank: int, ranks: int, micro_batch_size: int) -> str:
    """What a rank reads in a step, for a person."""
    if hasattr(dataset, "where"):
        return dataset.where(step, cfg.batch_size, rank, ranks, micro_batch_size)
    first = step * cfg.batch_size + rank * cfg.batch_size // ranks
    return f"sequences {first} to {first + cfg.batch_size // ranks - 1}"


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


def restore(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Weights (y_t) and optimizer; returns all that was saved."""
    state = load_checkpoint(checkpoint)
    saved, built = wrapper_in(state["optimizer"]), optimizer.NAME if isinstance(optimizer, Wrapper) else None
    if saved != built:
        raise ConfigError(
            f"{checkpoint} holds {saved or 'no wrapper'}, this config builds {built or 'none'}: probes keep a weight "
            "EMA; type the probe_every that the run began with"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state


@contextmanager
def told(checkpoint: Path) -> Iterator[None]:
    """Raise ConfigError for a checkpoint whose sums are right and whose content is not."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise ConfigError(
            f"{checkpoint} is not what this run needs ({one_line(e)}); delete it to go on without"
        ) from None


def resume(state: dict[str, Any], dataset: Any, ranks: Ranks, clock: Clock, watch: Watch) -> tuple[int, bool]:
    """Restore all else; returns the completed steps, and whether the last one's validation is done."""
    dataset.resume(state["data"])
    watch.resume(state["watch"])
    if len(state["rng"]) == ranks.size:
        rng = state["rng"][ranks.rank]
        torch.set_rng_state(rng["cpu"])
        if ranks.device.type == "cuda" and rng["cuda"] is not None:
            torch.cuda.set_rng_state(rng["cuda"])
    clock.earlier = state["seconds"]
    return state["step"], state["validated"]


def training_state(
    step: int,
    validated: bool,
    model: nn.Module,
    optimizer: Optimizer,
    dataset: Any,
    ranks: Ranks,
    clock: Clock,
    watch: Watch,
) -> dict[str, Any]:
    """Everything that the next step depends on. All ranks call it: where they share an optimizer's state they gather
    it."""
    cuda = torch.cuda.get_rng_state() if ranks.device.type == "cuda" else None
    return {
        "step": step,
        "validated": validated,
        "seconds": clock.seconds(),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": ranks.gather({"cpu": torch.get_rng_state(), "cuda": cuda}),
        "data": dataset.state(),
        "watch": watch.state(),
    }
