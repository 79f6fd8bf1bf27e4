"""Reading batches.

    python scripts/bench.py data [tokens=65536] [steps=400] [shards=16] [shard_tokens=2500000] [rate=1e6]

For shards of random tokens (in the page cache), by one rank and thread, per optimizer step of `tokens`:

    ms/step    of dataset.batch: examples found, copied out of the maps, checked, widened to int64
    x floor    over the time that the bytes alone take at this machine's copy bandwidth: 2 read and 16 written a token
    share      of the time that a GPU takes for the step at `rate` tokens a second
    waits      share of that time that a training step waits for its batch, read ahead by a thread, a shard's
               checksum whenever one is entered included
    faster     than a slice and a copy for each example, as loops over nanoGPT's files do it
    grows      memory of the process, over the last three quarters of the steps (private, and mapped from files)
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from floors import measure_machine
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

import ema_nesterov.config  # noqa: F401  (registers the schemas)
from ema_nesterov.cli import parse
from ema_nesterov.data.loader import TokenDataset, prefetch
from ema_nesterov.data.shards import write_shard

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
READ, WRITTEN = 2, 16  # bytes a token: uint16 in, inputs and targets in int64 out


@dataclass
class Arguments:
    tokens: int = 65_536
    steps: int = 400
    shards: int = 16
    shard_tokens: int = 2_500_000
    rate: float = 1e6  # tokens a second and GPU
    output: str | None = None  # a JSON file


@dataclass
class Row:
    name: str
    ms: float
    floor: float
    share: float
    waits: float
    faster: float
    private_mb: float
    mapped_mb: float


def memory() -> tuple[float, float]:
    """MB of this process: private, and mapped from files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    held = {line.split(":")[0]: float(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}
    return held["RssAnon"], held["RssFile"]


def slice_by_slice(folder: Path, seq_len: int, count: int, steps: int) -> float:
    """Seconds a step of the loop that copies one example after the other at random places of a shard."""
    tokens = np.memmap(next(folder.glob("*_train_*.bin")), "<u2", "r", 1024)
    rng = np.random.default_rng(0)
    times = []
    for _ in range(steps):
        starts = rng.integers(0, len(tokens) - seq_len - 1, count)
        begun = time.perf_counter()
        torch.stack([torch.from_numpy(tokens[i : i + seq_len].astype(np.int64)) for i in starts])
        torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + seq_len].astype(np.int64)) for i in starts])
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measure(folder: Path, name: str, overrides: list[str], seq_len: int, args: Arguments, copy: float) -> Row:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(
            "train", [f"dataset.path={folder}", "dataset.max_epochs=1000", "dataset.val_tokens=8192", *overrides]
        )
    data = TokenDataset(cfg.dataset, 50_257, seq_len, 0)
    batch = args.tokens // seq_len
    data.batch(0, batch, 0, 1, batch)
    times = []
    for step in range(args.steps):
        begun = time.perf_counter()
        data.batch(step, batch, 0, 1, batch)
        times.append(time.perf_counter() - begun)
    ms = 1e3 * statistics.median(times)
    step_seconds, waits = args.tokens / args.rate, []
    fresh = TokenDataset(cfg.dataset, 50_257, seq_len, 0)
    batches = prefetch(lambda step: fresh.batch(step, batch, 0, 1, batch), range(args.steps), torch.device("cpu"))
    held = memory()
    for step in range(args.steps):
        begun = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - begun)
        time.sleep(step_seconds)
        if step == args.steps // 4:
            held = memory()
    grown = [after - before for before, after in zip(held, memory(), strict=True)]
    floor = 1e3 * args.tokens * (READ + WRITTEN) / copy
    peer = 1e3 * slice_by_slice(folder, seq_len, batch, max(3, args.steps // 10))
    share, waited = ms / 1e3 / step_seconds, sum(waits[1:]) / len(waits[1:]) / step_seconds
    return Row(name, ms, floor, share, waited, peer / ms, *grown)


def run(arguments: list[str]) -> None:
    args = parse(Arguments, arguments)
    torch.set_num_threads(1)
    copy = 1e3 * measure_machine(torch.device("cpu")).copy  # bytes a second
    rows = []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rng = np.random.default_rng(0)
        for i in range(args.shards):
            write_shard(
                folder / f"x_train_{i + 1:06d}.bin", rng.integers(0, 50_256, args.shard_tokens // 256 * 256, np.uint16)
            )
        write_shard(folder / "x_val_000000.bin", rng.integers(0, 50_257, 65_536, np.uint16))
        stream = ["dataset=fineweb", "model.vocab_size=50257"]
        layout = ["dataset.layout=rows", "dataset.row_len=256", "dataset.pad_id=50256"]
        for name, overrides, seq_len in (
            ("1,024 tokens, in order", stream, 1024),
            ("1,024 tokens, shuffled", [*stream, "dataset.shuffle=true"], 1024),
            ("rows of 256, in order", [*stream, *layout], 256),
        ):
            (folder / "manifest.json").unlink(missing_ok=True)  # which tells the layout
            rows.append(measure(folder, name, overrides, seq_len, args, copy))
    table = Table(
        title=f"{args.tokens:,} tokens a step, {args.rate:,.0f} tokens a second, copies {copy / 1e9:.0f} GB/s"
    )
    for column in ("", "ms/step", "x floor", "share", "waits", "faster", "grows, private", "mapped"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for r in rows:
        table.add_row(
            *(r.name, f"{r.ms:.2f}", f"{r.ms / r.floor:.1f}", f"{r.share:.2%}", f"{r.waits:.2%}", f"{r.faster:.1f} x"),
            *(f"{r.private_mb:.1f} MB", f"{r.mapped_mb:.1f} MB"),
        )
    Console(width=130, highlight=False).print(table)
    if args.output:
        results: dict[str, Any] = {"copy": copy, "rows": [asdict(row) for row in rows]}
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
