"""A plain PyTorch loop: Muon and AdamW inside EMA-Nesterov, with a schedule, evaluation, checkpoints and export.

    python examples/plain_loop.py                      # half a minute on two CPU cores
    python examples/plain_loop.py --stop-after 100     # as if interrupted
    python examples/plain_loop.py --resume             # goes on, to the same weights bit for bit

The text is the language reference that comes with Python, byte by byte.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from ema_nesterov.lookahead import EMANesterov
from ema_nesterov.optim import Chain, Muon
from ema_nesterov.schedules import lookahead_alpha, wsd

LENGTH, MICRO_BATCH, ACCUMULATE = 64, 8, 2
TEXT = torch.frombuffer(bytearray("\n".join(topics.values()), "utf-8"), dtype=torch.uint8).long()
TRAIN, VALIDATION = TEXT[:-20_000], TEXT[-20_000:]


class ByteModel(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(inputs) + self.positions.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def batch(text: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Random windows, a function of the seed alone: a resumed run sees what the interrupted one would have seen."""
    starts = torch.randint(len(text) - LENGTH, (MICRO_BATCH,), generator=torch.Generator().manual_seed(seed))
    windows = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    model.eval()
    loss = sum(model(*batch(VALIDATION, seed)).item() for seed in range(16)) / 16
    model.train()
    return loss


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of the whole run, which the schedules need to know")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--eval-every", type=int, default=50, help="evaluate and save every so many steps")
    parser.add_argument("--out", type=Path, default=Path("runs/plain_loop"))
    parser.add_argument("--stop-after", type=int, help="stop at this step, as an interrupted run would")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = ByteModel(args.width)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p not in set(matrices)]

    schedule = wsd(args.steps, warmup_steps=args.steps // 20, decay_steps=args.steps // 4)
    alpha = lookahead_alpha(0.5, schedule, args.steps, warmup_steps=args.steps // 4, rest_steps=args.steps // 10)
    base = Chain([AdamW(others, lr=3e-3), Muon(matrices, lr=0.02, split_qkv=True)])  # torch fuses Q, K and V
    opt = EMANesterov(base, alpha=alpha, ema_decay=0.99)
    scheduler = LambdaLR(opt, schedule)  # on the wrapper; it moves AdamW's and Muon's rates alike

    if args.resume:
        checkpoint = torch.load(args.out / "checkpoint.pt", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        opt.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])

    for step in range(opt.steps, args.steps):  # the wrapper counts its steps, and its state holds the count
        for i in range(ACCUMULATE):
            loss = model(*batch(TRAIN, step * ACCUMULATE + i)) / ACCUMULATE
            loss.backward()  # the model holds the lookahead point y: gradients belong there
        opt.step()
        opt.zero_grad()
        scheduler.step()

        if opt.steps % args.eval_every == 0 or opt.steps == args.steps:
            with opt.at_iterate():  # the iterate x, for evaluation; y comes back bit for bit
                print(f"step {opt.steps} validation loss {evaluate(model):.4f}", flush=True)
            state = {"model": model, "optimizer": opt, "scheduler": scheduler}
            torch.save({name: part.state_dict() for name, part in state.items()}, args.out / "checkpoint.pt")
        if opt.steps == args.stop_after:
            return

    with opt.at_iterate():  # a checkpoint holds y and goes on training; what is exported is x
        torch.save(model.state_dict(), args.out / "model.pt")


if __name__ == "__main__":
    main()
