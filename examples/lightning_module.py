"""A LightningModule whose optimizer is EMA-Nesterov around Muon and AdamW, validated and saved at the iterate.

    python examples/lightning_module.py                                             # half a minute on two CPU cores
    python examples/lightning_module.py --resume runs/lightning/epoch=1.ckpt        # to the same weights, bit for bit

The text is the language reference that comes with Python, byte by byte. It wants `pip install lightning`.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler

from ema_nesterov.lookahead import EMANesterov
from ema_nesterov.optim import Chain, Muon
from ema_nesterov.schedules import wsd

LENGTH, BATCH = 64, 16
TEXT = torch.frombuffer(bytearray("\n".join(topics.values()), "utf-8"), dtype=torch.uint8).long()
WINDOWS = TEXT.split(LENGTH + 1)[:-1]
TRAIN, VALIDATION = WINDOWS[:-128], WINDOWS[-128:]


class ByteModel(L.LightningModule):
    def __init__(self, width: int):
        super().__init__()
        self.save_hyperparameters()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def loss(self, windows: Tensor) -> Tensor:
        x = self.tokens(windows[:, :-1]) + self.positions.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), windows[:, 1:].flatten())

    def training_step(self, windows: Tensor, _: int) -> Tensor:
        return self.loss(windows)

    def validation_step(self, windows: Tensor, _: int) -> None:
        loss = self.loss(windows)
        self.log("val_loss", loss)
        self.print(f"step {self.global_step} validation loss {loss:.4f}")

    def train_dataloader(self) -> DataLoader:
        # this sampler's order is a function of the epoch alone (Lightning calls its set_epoch), so that a resumed
        # run sees what the interrupted one would have seen
        sampler: DistributedSampler = DistributedSampler(TRAIN, self.trainer.world_size, self.trainer.global_rank)
        return DataLoader(TRAIN, BATCH, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(VALIDATION, len(VALIDATION))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        matrices = [p for p in self.blocks.parameters() if p.ndim == 2]
        others = [p for p in self.parameters() if p not in set(matrices)]
        base = Chain([AdamW(others, lr=3e-3), Muon(matrices, lr=0.02, split_qkv=True)])  # torch fuses Q, K and V
        optimizer = EMANesterov(base, alpha=0.5, ema_decay=0.99)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = LambdaLR(optimizer, wsd(steps, warmup_steps=steps // 20, decay_steps=steps // 4))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Validation takes place at the iterate x, training at the lookahead point y.

    def on_validation_start(self) -> None:
        self.optimizers().eval()

    def on_validation_end(self) -> None:
        self.optimizers().train()

    def on_train_start(self) -> None:
        self.optimizers().train()  # a checkpoint written at the end of a validation resumes in eval mode


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--epoch-batches", type=int, default=75, help="batches of an epoch")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    args = parser.parse_args(arguments)

    L.seed_everything(0)
    model = ByteModel(args.width)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        limit_train_batches=args.epoch_batches,
        # saved right after the validation, still in eval mode: the checkpoint's weights are x, its optimizer has y
        callbacks=[ModelCheckpoint(args.out, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=False)],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, ckpt_path=args.resume)

    for optimizer in trainer.optimizers:
        optimizer.eval()  # training ends at y; what is exported is x
    torch.save(model.state_dict(), args.out / "model.pt")


if __name__ == "__main__":
    main()
