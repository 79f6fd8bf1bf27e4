"""What a run will hold in memory, found without holding any of it.

Model and optimizer take a training step on fake tensors, which have shapes and no content, and every storage
is counted from its birth to its death. They are on the CPU also for a run on a GPU, in the dtypes that it
would have there, so no GPU is needed. Where the model is compiled, its graph is cut in two as torch.compile
does, and what lies between two matrix products is never stored, as if all of it were fused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import ProcessGroup
from torch.fx import GraphModule
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..lookahead import Wrapper
from ..models import build_model
from ..optim.build import build_optimizer
from .evaluate import at_iterate, copy_iterate, probe
from .loop import compiles

# a step in which all happens that ever does: syncs, extrapolation, new bases
BUSY = {"lookahead.k": 1, "lookahead.warmup_steps": 0, "lookahead.rest_steps": 0, "optimizer.precondition_frequency": 1}
PRODUCTS = ("mm", "dot_product", "convolution")  # parts of the names of what torch.compile does not fuse

Forward = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Memory:
    """Bytes of one rank. The peak is the sum of all but the last."""

    weights: int
    gradients: int  # and the buckets in which several ranks sum them
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
    gpu, ranks = device.type == "cuda", 1 if group is None else group.size()
    precision = partial(torch.autocast, "cpu", torch.bfloat16, enabled=gpu and cfg.model.get("autocast", True))
    eval_precision = nullcontext if cfg.model.get("eval_float32", True) else precision
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole = Started(cfg, gpu)
        checkpoint = whole.weights + whole.state + whole.wrapper
        run = whole if group is None else Started(cfg, gpu, group)
        model, optimizer = run.model, run.optimizer
        with run.live as live:
            forward: Forward = compiled(model, live) if compiles(cfg, device) else model
            tokens = torch.zeros(micro_batch_size, cfg.seq_len, dtype=torch.long)
            if cfg.batch_size == micro_batch_size * ranks:  # else the gradients of micro-batches before are there
                optimizer.zero_grad()
            with precision():
                loss = forward(tokens, tokens)
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad(), eval_precision():
                evaluate: Any = partial(forward, tokens, tokens)
                with at_iterate(optimizer):
                    evaluate()
                if cfg.probe_every:
                    next(probe(optimizer, copy_iterate(optimizer), evaluate))
    buckets = run.gradients if ranks > 1 else 0
    lasting = run.weights + run.gradients + run.state + run.wrapper
    parts = (run.weights, run.gradients + buckets, run.state, run.wrapper)
    return Memory(*parts, activations=live.peak - lasting, checkpoint=checkpoint)


class Started:
    """A model and its optimizer after the first step, with gradients, and the bytes of each part."""

    def __init__(self, cfg: DictConfig, gpu: bool, group: ProcessGroup | None = None):
        with Live() as self.live:
            self.model = fake_model(cfg, torch.bfloat16 if gpu else torch.float32)
            self.weights = self.live.now
            for p in self.model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            self.gradients = self.live.now - self.weights
            self.optimizer = build_optimizer(self.model, cfg, group)
            self.optimizer.step()
        self.wrapper = wrapper_bytes(self.optimizer)
        self.state = self.live.now - self.weights - self.gradients - self.wrapper


def fake_model(cfg: DictConfig, dtype: torch.dtype) -> nn.Module:
    """The model, built without content, with a fake tensor for each of its own; tied ones stay tied."""
    with torch.device("meta"):
        model = build_model(cfg.model, cfg.plugins, dtype)
    fakes: dict[Tensor, Any] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p not in fakes:
                fakes[p] = nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad)
            module._parameters[name] = fakes.get(p)
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else torch.empty_like(b, device="cpu")
    return model


def wrapper_bytes(optimizer: Optimizer) -> int:
    total = 0
    while isinstance(optimizer, Wrapper):
        total += sum(t.nbytes for t in tree_leaves(optimizer._buffers()))
        optimizer = optimizer.base
    return total


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, Any] = {}
        self.now = self.peak = 0
        self.counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.counting:
            self.add(result)
            self.peak = max(self.peak, self.now)
        return result

    def add(self, result: Any) -> None:
        for key, storage in storages(result).items():
            if key not in self.held:
                self.held[key] = weakref.ref(storage, partial(self._drop, key, storage.nbytes()))
                self.now += storage.nbytes()

    def _drop(self, key: int, size: int, _: Any) -> None:
        del self.held[key]
        self.now -= size


def compiled(model: nn.Module, live: Live) -> Forward:
    """The model as torch.compile would run it, to be counted by `live`."""
    from functorch.compile import aot_function, min_cut_rematerialization_partition  # slow to import, like the next
    from torch._inductor.decomposition import select_decomp_table

    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def loss(inputs: Tensor, targets: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(named, values, strict=True)), (inputs, targets))

    def compiler(graph: GraphModule, _: Any) -> Callable[..., Any]:
        product = largest_product(graph)

        def run(*args: Any) -> Any:
            live.peak = max(live.peak, live.now + product)
            before, live.counting = live.counting, False
            result = graph(*args)
            live.counting = before
            live.add(result)
            return result

        return run

    traced = aot_function(loss, compiler, compiler, min_cut_rematerialization_partition, select_decomp_table())

    def forward(inputs: Tensor, targets: Tensor) -> Tensor:
        live.counting = False  # while the graph is traced
        try:
            return traced(inputs, targets, *named.values())
        finally:
            live.counting = True

    return forward


def largest_product(graph: GraphModule) -> int:
    """The most bytes that a product reads and writes beyond the inputs of the graph."""
    given = storages([n.meta.get("val") for n in graph.graph.nodes if n.op == "placeholder"])
    most = 0
    for node in graph.graph.nodes:
        if any(part in str(node.target) for part in PRODUCTS):
            around = storages([n.meta.get("val") for n in (node, *node.all_input_nodes)])
            most = max(most, sum(s.nbytes() for key, s in around.items() if key not in given))
    return most


def storages(tensors: Any) -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors of a nest, each once."""
    held = [t.untyped_storage() for t in tree_leaves(tensors) if isinstance(t, Tensor)]
    return {s._cdata: s for s in held}
