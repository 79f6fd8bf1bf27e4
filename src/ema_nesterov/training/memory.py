"""What a run will hold in memory, found without holding any of it.

Model and optimizer take a training step on fake tensors, which have shapes and no content, and every storage
is counted from its birth to its death. They are on the CPU also for a run on a GPU, in the dtypes that it
would have there, so no GPU is needed. A model that is compiled is not run but cut in two as torch.compile
does: what it saves for the backward pass is counted, and the largest matrix product of that pass; between
products everything counts as fused. That is rather too much: the compiler also reuses buffers.
"""

from __future__ import annotations

import warnings
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed import ProcessGroup
from torch.fx import Graph, GraphModule, Node
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..lookahead import Wrapper
from ..models import build_model, common
from ..optim.build import build_optimizer
from .evaluate import at_iterate, copy_iterate, probe
from .execution import bfloat16, compiles

# a step in which all happens that ever does: syncs, extrapolation, new bases
BUSY = {"lookahead.k": 1, "lookahead.warmup_steps": 0, "lookahead.rest_steps": 0, "optimizer.precondition_frequency": 1}
PRODUCTS = ("mm", "dot_product", "convolution")  # parts of the names of what torch.compile does not fuse


@dataclass
class Memory:
    """Bytes of one rank. The peak is the sum of all but the last."""

    weights: int
    gradients: int  # twice where several ranks sum what they have accumulated
    optimizer: int
    wrapper: int
    activations: int  # and all else that is held for a while, at the peak
    checkpoint: int  # on the disk, of all ranks

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.wrapper + self.activations


def estimate(cfg: DictConfig, micro_batch_size: int, device: torch.device, group: ProcessGroup | None = None) -> Memory:
    """The memory of a rank; group: the ranks that share the optimizer's work and state, None for one rank.

    Raises what a model or an optimizer raises that cannot work on fake tensors.
    """
    cfg = cfg.copy()
    for key, value in BUSY.items():
        if OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, value)
    ranks = 1 if group is None else group.size()
    # checkpointed blocks keep the same either way, and cutting in two as below knows nothing of them
    compiled = compiles(cfg, device) and not cfg.trainer.activation_checkpointing
    shape = (micro_batch_size, cfg.seq_len)
    half = bfloat16(cfg, device)
    precision = partial(torch.autocast, "cpu", torch.bfloat16, enabled=half and cfg.model.get("autocast", True))
    eval_precision: Any = nullcontext if cfg.model.get("eval_float32", True) else precision
    with attention_on(device), FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is meant: an address of a tensor that has none
        whole = Started(cfg, half)
        run = whole if group is None else Started(cfg, half, group)
        model, optimizer, live = run.model, run.optimizer, run.live
        tokens = torch.zeros(shape, dtype=torch.long)
        if compiled:
            with precision():
                training = compiled_bytes(cfg, half, shape)
            with eval_precision(), torch.no_grad():
                evaluate: Any = partial(torch.empty, compiled_bytes(cfg, half, shape), dtype=torch.uint8)
        else:
            evaluate = partial(model, tokens, tokens)
        with live:
            summed = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters() if cfg.noise_every]
            if cfg.batch_size == micro_batch_size * ranks:  # else the gradients of the micro-batches before are there
                optimizer.zero_grad()
            if compiled:
                torch.empty(training, dtype=torch.uint8)
                set_gradients(model)
            else:
                with precision():
                    loss = model(tokens, tokens)
                loss.backward()
                del loss
            del summed
            optimizer.step()
            optimizer.zero_grad()
            untouched = patch.object(
                Wrapper, "_require_untouched", lambda *_: None
            )  # it compares values: there are none
            with torch.no_grad(), eval_precision(), untouched:
                if cfg.probe_every:
                    next(probe(optimizer, copy_iterate(optimizer), evaluate))
                else:
                    with at_iterate(optimizer):
                        evaluate()
    lasting = run.weights + run.gradients + run.state + run.wrapper
    return Memory(
        weights=run.weights,
        gradients=run.gradients * (2 if ranks > 1 and cfg.batch_size > micro_batch_size * ranks else 1),
        optimizer=run.state,
        wrapper=run.wrapper,
        activations=live.peak - lasting,
        checkpoint=whole.weights + whole.state + whole.wrapper,
    )


def checkpoint_bytes(cfg: DictConfig) -> int:
    """On the disk, of all ranks."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        run = Started(cfg, half=False)
        return run.weights + run.state + run.wrapper


class Started:
    """A model and its optimizer after the first step, with gradients, and the bytes of each part."""

    def __init__(self, cfg: DictConfig, half: bool, group: ProcessGroup | None = None):
        with Live() as self.live:
            self.model = fake_model(cfg, half)
            self.weights = self.live.now
            set_gradients(self.model)
            self.gradients = self.live.now - self.weights
            self.optimizer = build_optimizer(self.model, cfg, group)
            self.optimizer.step()
        self.wrapper = wrapper_bytes(self.optimizer)
        self.state = self.live.now - self.weights - self.gradients - self.wrapper


def attention_on(device: torch.device) -> AbstractContextManager:
    """The attention that the device would choose, though the fake tensors are on the CPU."""
    return nullcontext() if device.type == "cpu" else patch.object(common, "slow_in_bfloat16", lambda q: False)


def fake_model(cfg: DictConfig, half: bool) -> nn.Module:
    """The model, built without content, with a fake tensor for each of its own; tied ones stay tied."""
    with unset_fake_temporarily(), torch.device("meta"):  # a fake weight does not change its dtype
        model = build_model(cfg.model, cfg.plugins, torch.bfloat16 if half else torch.float32)
    if cfg.trainer.activation_checkpointing:
        common.checkpoint_blocks(model)
    fakes: dict[Tensor, Any] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p not in fakes:
                fakes[p] = nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad)
            module._parameters[name] = None if p is None else fakes[p]
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else torch.empty_like(b, device="cpu")
    return model


def set_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None


def wrapper_bytes(optimizer: Optimizer) -> int:
    if not isinstance(optimizer, Wrapper):
        return 0
    entries = (entry for state in optimizer.state.values() for entry in state.items())
    return sum(t.nbytes for name, t in entries if "." in name and isinstance(t, Tensor))  # a base's names have no dot


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, Any] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for key, storage in storages(result).items():
            if key not in self.held:
                self.held[key] = weakref.ref(storage, partial(self._drop, key, storage.nbytes()))
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    def _drop(self, key: int, size: int, _: Any) -> None:
        del self.held[key]
        self.now -= size


# --- a model that is compiled ---------------------------------------------------------------------


def compiled_bytes(cfg: DictConfig, half: bool, shape: tuple[int, int]) -> int:
    """What a pass of the compiled model holds beside the weights: with the backward pass, or without, under no_grad.

    Blocks are alike: a model of ours is traced with one and with two of them.
    """
    if "_target_" in cfg.model or cfg.model.layers < 3:
        return traced_bytes(fake_model(cfg, half), shape)
    small, traced = cfg.copy(), []
    for small.model.layers in (1, 2):
        traced.append(traced_bytes(fake_model(small, half), shape))
    first, second = traced
    return first + (cfg.model.layers - 1) * (second - first)


def traced_bytes(model: nn.Module, shape: tuple[int, int]) -> int:
    # slow to import
    from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    graphs: list[Graph] = []

    def loss(inputs: Tensor, targets: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(named, values, strict=True)), (inputs, targets))

    def keep(module: GraphModule, _: Any) -> Any:
        graphs.append(module.graph)
        return make_boxed_func(module)

    tokens = torch.zeros(shape, dtype=torch.long)
    forward = aot_function(loss, keep, keep, min_cut_rematerialization_partition, select_decomp_table())
    torch.compiler._is_compiling_flag = True  # as it is for the models that ask
    try:
        result = forward(tokens, tokens, *named.values())
    finally:
        torch.compiler._is_compiling_flag = False
    saved = 0
    if result.requires_grad:
        result.backward()
        saved = bytes_beyond_inputs(graphs[0], graphs[0].output_node().all_input_nodes)
    last = graphs[-1]
    products = [n for n in last.nodes if any(part in str(n.target) for part in PRODUCTS)]
    return saved + max((bytes_beyond_inputs(last, [n, *n.all_input_nodes]) for n in products), default=0)


def bytes_beyond_inputs(graph: Graph, nodes: list[Node]) -> int:
    """Of the tensors of these nodes."""
    given = storages([n.meta.get("val") for n in graph.find_nodes(op="placeholder")])
    return sum(s.nbytes() for key, s in storages([n.meta.get("val") for n in nodes]).items() if key not in given)


def storages(tensors: Any) -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors of a nest, each once."""
    held = [t.untyped_storage() for t in tree_leaves(tensors) if isinstance(t, Tensor)]
    return {s._cdata: s for s in held}
