"""Continue a text with a run's weights: python scripts/generate.py run=RUN_FOLDER [prompt="..."] [tokens=100]

    step           of a checkpoint (default: the newest), at its iterate x
    temperature    0 takes the likeliest token each time
    top_k          samples from so many of the likeliest (null: from all)
    samples, seed  how many texts, and which
    path           a folder of shards with the tokenizer (default: that of the run's data)

A text ends at a mark between documents, or after `tokens` tokens; the model sees the last seq_len of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ema_nesterov.cli import arguments, guard
from ema_nesterov.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from ema_nesterov.data.tokenizers import Tokenizer


@dataclass
class Arguments:
    run: str | None = None
    step: int | None = None
    prompt: str = ""
    tokens: int = 100
    temperature: float = 0.8
    top_k: int | None = 50
    samples: int = 1
    seed: int = 0
    path: str | None = None
    device: str = "auto"


def main() -> None:
    args = arguments(Arguments, __doc__)
    if args.run is None:
        raise ConfigError("run= is missing; type run=RUN_FOLDER, as scripts/where.py prints it")
    for key, least in (("tokens", 1), ("temperature", 0), ("top_k", 1), ("samples", 1)):
        value = getattr(args, key)
        if value is not None and not value >= least:
            raise ConfigError(f"{key}={value} must be at least {least}")

    import torch  # here, so that a typo is answered before it is loaded

    from ema_nesterov.data.preparation.recipes import shards_folder
    from ema_nesterov.training.distributed import choose_device
    from ema_nesterov.training.evaluate import at_iterate
    from ema_nesterov.training.trained import open_trained

    device = choose_device(args.device)
    run = open_trained(Path(args.run), args.step, device)
    tokenizer = tokenizer_of(Path(args.path) if args.path else shards_folder(run.cfg.dataset))
    start = [*tokenizer.before, *tokenizer.encode([args.prompt])[0].tolist()]
    if not start:
        raise ConfigError("this tokenizer has no mark that begins a document; type prompt=TEXT")
    generator = torch.Generator(device).manual_seed(args.seed)
    with at_iterate(run.optimizer), torch.no_grad():
        for _ in range(args.samples):
            ids = torch.tensor([start], device=device)
            marks = {*tokenizer.before, *tokenizer.after}
            said = list(sample(run.model, ids, run.cfg.seq_len, args, generator, marks))
            print(tokenizer.decode([*start[len(tokenizer.before) :], *said]), flush=True)


def sample(
    model: nn.Module, ids: Tensor, seq_len: int, args: Arguments, generator: Generator, marks: set[int]
) -> Iterator[int]:
    """The ids that follow ids (1, time), until one that ends a document."""
    import torch

    for _ in range(args.tokens):
        logits = model(ids[:, -seq_len:])[0, -1].float()
        if args.temperature == 0:
            new = logits.argmax(keepdim=True)
        else:
            best = logits.topk(min(args.top_k or len(logits), len(logits)))
            chances = torch.softmax(best.values / args.temperature, 0)
            new = best.indices[torch.multinomial(chances, 1, generator=generator)]
        if int(new) in marks:
            return
        yield int(new)
        ids = torch.cat([ids, new[None]], 1)


def tokenizer_of(folder: Path) -> Tokenizer:
    """The one that prepared shards were made with."""
    from ema_nesterov.data.manifest import load_manifest
    from ema_nesterov.data.tokenizers import open_tokenizer

    manifest = load_manifest(folder) if folder.is_dir() else None
    name = manifest.tokenizer.get("name") if manifest else None
    if manifest is None or name is None:
        raise DataError(f"{folder} does not say which tokenizer its shards are of; type path=FOLDER of prepared shards")
    file = manifest.tokenizer.get("file")
    return open_tokenizer(str(folder / file) if file else name)


if __name__ == "__main__":
    guard(main)
