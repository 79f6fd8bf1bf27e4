"""Small files of text in the public formats, and an independent tokenisation of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ema_nesterov.data.manifest import load_manifest
from ema_nesterov.data.shards import open_shard

WORDS = [
    "the",
    "river",
    "of",
    "loss",
    "runs",
    "down",
    "a",
    "valley",
    "where",
    "every",
    "small",
    "step",
    "adds",
    "to",
    "naïve",
    "momentum",
    "and",
    "café",
    "noise",
]


def documents(count: int, seed: int = 0) -> list[str]:
    """Of 1 to 400 words, in lines, with accents, quotes, runs of spaces and what looks like special tokens."""
    rng = np.random.default_rng(seed)
    texts = []
    for i in range(count):
        words = rng.choice(WORDS, int(rng.geometric(1 / 60)) % 400 + 1)
        text = " ".join(words) + "\n" * int(rng.integers(0, 3)) + " ".join(words[::-1]) + '  "{½} 12,345.67" ﬁn'
        texts.append(text + (" <|endoftext|> <extra_id_7>" if i % 17 == 3 else ""))
    return texts


def write_c4(folder: Path, train: Sequence[Sequence[str]], val: Sequence[Sequence[str]]) -> Path:
    """json.gz files named as C4's."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, files, total in (("train", train, 1024), ("validation", val, 8)):
        for i, texts in enumerate(files):
            with gzip.open(folder / f"c4-{split}.{i:05d}-of-{total:05d}.json.gz", "wt", encoding="utf-8") as f:
                for k, text in enumerate(texts):
                    record = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.org/{i}/{k}"}
                    f.write(json.dumps(record) + "\n")
    return folder


def write_parquet(path: Path, texts: Sequence[str]) -> Path:
    """In row groups, with columns as FineWeb has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "text": list(texts),
        "id": [f"<urn:uuid:{i}>" for i in range(len(texts))],
        "token_count": [1] * len(texts),
    }
    pq.write_table(pa.table(columns), path, row_group_size=100)
    return path


def tokens(folder: Path, *splits: str) -> np.ndarray:
    """All tokens of the splits of a prepared folder, in the order of its manifest."""
    manifest = load_manifest(folder)
    assert manifest is not None
    return np.concatenate([open_shard(folder / s.file) for split in splits for s in manifest.of(split)])


def gpt2_stream(texts: Iterable[str]) -> np.ndarray:
    """End-of-text before each document, with tiktoken's plainest call."""
    from ema_nesterov.data.tokenizers import load_tokenizer

    gpt2 = load_tokenizer("gpt2")
    return np.array([token for text in texts for token in [50256, *gpt2.encode_ordinary(text)]])


def contents(folder: Path) -> dict[str, bytes]:
    """What a preparation leaves behind."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.endswith(".lock")}
