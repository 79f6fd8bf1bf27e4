"""Documents into a folder of token shards that is complete, or goes on where it was stopped.

The shards are a function of the text, the tokenizer and the layout, not of the number of processes or of
stops. After each one the manifest says where the next begins: a stop at any moment loses at most the shard
being written. A listed shard that is missing is made again.
"""

from __future__ import annotations

import os
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock, Timeout

from ...errors import DataError
from ..manifest import Manifest, Shard, load_manifest, save_token_bytes
from ..shards import read_header, write_shard
from ..tokenizers import Tokenizer, open_tokenizer
from .processes import cores
from .progress import Meter
from .sources import Source, digest
from .tokenise import Layout, Tokens, tokenise


def prepare(
    folder: Path,
    name: str,
    origin: str,
    items: list[tuple[Source, str]],
    layout: Layout,
    shard_tokens: int = 100_000_000,
    shards: int | None = None,
    val_tokens: int | None = None,
    processes: int | None = None,
) -> Manifest:
    """Write the shards `<name>_<split>_<index>.bin` of the sources into a folder; returns its manifest.

    items: sources in order, each with where its documents go: "train", "val", "every" (layout.val_every tells) or
    "first" (the first shard is for validation).  shards: of training at most; val_tokens: of validation at most, and
    then all is done.  Raises DataError for text, a tokenizer or a disk that does not do, and for a folder that holds
    something else.
    """
    tokenizer = open_tokenizer(layout.tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".preparing.lock", timeout=0):
            manifest = agreed_manifest(folder, origin, items, layout, shard_tokens, tokenizer)
            keep_tokenizer(folder, tokenizer)
            for lost in (True, False):  # first what is missing, then what is not yet there
                work = Work(folder, name, items, manifest, layout, shard_tokens, shards, val_tokens, repair=lost)
                if work.wanted():
                    work.run(processes or cores())
            return manifest
    except Timeout:
        raise DataError(f"another process is preparing {folder}; wait for it, or type dataset.output=FOLDER") from None
    except BrokenProcessPool:
        raise DataError("a tokenising process was killed (out of memory?); type dataset.processes=1 with it") from None
    except OSError as e:
        raise DataError(
            f"cannot write {folder}: {e.strerror}; make room or type dataset.output=FOLDER (nothing written is lost)"
        ) from None


def agreed_manifest(
    folder: Path,
    origin: str,
    items: list[tuple[Source, str]],
    layout: Layout,
    shard_tokens: int,
    tokenizer: Tokenizer,
) -> Manifest:
    """The folder's manifest, which must be of the same preparation, or a new one.

    Raises DataError, naming the first difference.
    """
    vocab_size = layout.vocab_size or tokenizer.vocab_size
    marks = (*tokenizer.before, *tokenizer.after)
    if layout.pad_id is not None and layout.pad_id >= vocab_size:
        raise DataError(
            f"dataset.pad_id={layout.pad_id} is beyond the {vocab_size} tokens of {tokenizer.name}; "
            f"type dataset.pad_id={marks[0]}"
        )
    if layout.pad_id is not None and tokenizer.token_bytes and tokenizer.token_bytes[layout.pad_id]:
        raise DataError(
            f"dataset.pad_id={layout.pad_id} is {tokenizer.decode([layout.pad_id])!r}, a token of text, which would be "
            f"masked; type dataset.pad_id={marks[0]}"
        )
    known = {"name": tokenizer.name, "sha256": tokenizer.sha256, "vocab_size": vocab_size}
    options: dict[str, Any] = {k: v for k, v in asdict(layout).items() if k not in ("tokenizer", "vocab_size")}
    options |= {"shard_tokens": shard_tokens, "text": digest(items)}
    manifest = load_manifest(folder)
    if manifest is not None:
        for key, value in {**known, **options}.items():
            held = manifest.tokenizer[key] if key in known else manifest.options.get(key)
            if held != value and key == "text":
                raise DataError(
                    f"the files of the text are not those that {folder} was begun with; put them back, type "
                    "dataset.output=FOLDER for another folder, or delete that one"
                )
            if held != value:
                raise DataError(
                    f"{folder} was prepared from {manifest.source} with {key}={held}, this is {key}={value}; "
                    "type dataset.output=FOLDER for another folder, or delete that one"
                )
        return manifest
    if any(folder.glob("*.bin")):
        raise DataError(f"{folder} holds shards of something else; type dataset.output=FOLDER for another folder")
    file = tokenizer.file.name if tokenizer.file else None
    begun = Manifest(origin, {**known, "file": file}, layout.layout, layout.row_len, layout.pad_id, [], False, options)
    begun.save(folder)
    return begun


def keep_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Beside the shards, so that they can be decoded wherever they go."""
    save_token_bytes(folder, tokenizer.token_bytes)
    if tokenizer.file is not None and not (folder / tokenizer.file.name).exists():
        (folder / tokenizer.file.name).write_bytes(tokenizer.file.read_bytes())


class Work:
    """One pass over the text. What is tokenised but not yet a whole shard waits in `pending`.

    repair: from the start, writing the listed shards that are missing. Otherwise: from the manifest's cursor on.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        items: list[tuple[Source, str]],
        manifest: Manifest,
        layout: Layout,
        shard_tokens: int,
        shards: int | None,
        val_tokens: int | None,
        repair: bool,
    ):
        self.folder, self.name, self.items, self.manifest, self.layout = folder, name, items, manifest, layout
        self.shards, self.val_tokens, self.repair = shards, val_tokens, repair
        if repair:
            self.shards = len(manifest.of("train"))
        self.vocab_size = manifest.tokenizer["vocab_size"]
        self.shard_tokens = shard_tokens - shard_tokens % (layout.row_len or 1)
        self.pending: dict[str, list[np.ndarray]] = {"train": [], "val": []}
        self.counts = {"train": 0, "val": 0}  # shards made
        self.at = {"source": 0, "documents": 0, "before": 0}  # what comes next, and the documents before it
        self.short: str | None = None  # the last validation shard, where more of the text would make it longer
        self.lost = [s.file for s in manifest.shards if not self._whole(s)] if repair else []

    def wanted(self) -> bool:
        """Whether there is anything to do."""
        if self.repair:
            return bool(self.lost)
        more = self.manifest.cursor is not None and self.val_tokens is None
        made = len(self.manifest.of("train"))
        return not self.manifest.complete or (more and (self.shards is None or made < self.shards))

    def run(self, processes: int) -> None:
        """Tokenise until the text or what is asked for ends; raises DataError when that leaves a split empty."""
        for stale in self.folder.glob(".*.writing"):
            stale.unlink()
        if not self.repair and self.manifest.cursor is not None:
            self._restore(self.manifest.cursor)
        measure = self.shards and (self.shards - self.counts["train"]) * self.shard_tokens
        with Meter(self.name, [source.expected for source, _ in self.items], measure) as meter:
            self._drain("train")  # what a lower limit left over
            if not self._enough():
                self._read(meter, processes)
            self._end_validation()
            self._finish()

    def _restore(self, cursor: dict[str, Any]) -> None:
        """Go on from a cursor, with the tokens that were no whole shard then."""
        path = self.folder / cursor["pending"]
        try:
            with np.load(path, allow_pickle=False) as kept:
                self.pending = {split: [kept[split]] for split in self.pending}
            if any(a.ndim != 1 or a.dtype.kind != "u" for (a,) in self.pending.values()):
                raise ValueError
        except (OSError, ValueError, EOFError, KeyError, BadZipFile):
            raise DataError(f"{path} is missing or damaged; delete {self.folder} and prepare it again") from None
        self.at = {key: cursor[key] for key in self.at}
        self.manifest.shards = [s for s in self.manifest.shards if s.file != cursor["short"]]
        self.counts = {split: len(self.manifest.of(split)) for split in self.counts}

    def _end_validation(self) -> None:
        """The last validation shard; its tokens are kept where more of the text may follow, so that the shards are
        the same however many calls make them."""
        kept = list(self.pending["val"])
        more = self.val_tokens is None and (self.at["source"] < len(self.items) or self._held("train"))
        self._flush("val")
        if more and not self.repair and any(a.size for a in kept):
            self.pending["val"] = kept
            self.short = self.manifest.of("val")[-1].file

    def _read(self, meter: Meter, processes: int) -> None:
        batches = tokenise(self.items, self.at, self.layout, processes)
        for batch, tokens in batches:
            if batch.split != "val" and self._held("val") and self.items[self.at["source"]][1] == "val":
                self._flush("val")  # a split with files of its own has ended
                if not self.repair:
                    self._save_cursor()
            made = self._add(batch.split, tokens)
            done = batch.first + batch.documents
            self.at = {"source": batch.source, "documents": done, "before": batch.before + batch.documents}
            meter.advance(batch.source, tokens.bytes, tokens.train.size + tokens.val.size, batch.documents)
            for shard in made if not self.repair else []:
                meter.say(f"{shard.file}: {shard.tokens:,} tokens")
            if made and not self.repair:
                self._save_cursor()
            if self._enough():
                batches.close()
                return
        self.at["source"] = len(self.items)
        if not self._full():
            self._flush("train")

    def _add(self, split: str, tokens: Tokens) -> list[Shard]:
        """Put tokens behind those of their splits; returns the shards that this made whole."""
        train, val = tokens.train, tokens.val
        if split == "first":  # documents are cut at the border, as they are between shards
            room = 0 if self.counts["val"] else self.shard_tokens - self._held("val")
            train, val = train[room:], train[:room]
        for name, more in (("val", val), ("train", train)):
            if more.size:
                self.pending[name].append(more)
        return self._drain("val") + self._drain("train")

    def _drain(self, split: str) -> list[Shard]:
        """Whole shards out of the pending tokens, as far as they are wanted."""
        made = []
        while self._held(split) >= self.shard_tokens and not (split == "train" and self._full()):
            made.append(self._make(split, self.shard_tokens))
        return made

    def _held(self, split: str) -> int:
        return sum(a.size for a in self.pending[split])

    def _full(self) -> bool:
        return self.shards is not None and self.counts["train"] >= self.shards

    def _enough(self) -> bool:
        if self.repair and not self.lost:
            return True
        if self.val_tokens is not None:
            return self.counts["val"] * self.shard_tokens + self._held("val") >= self.val_tokens
        return self._full()

    def _flush(self, split: str) -> None:
        """The last, short shard of a split."""
        size = self._held(split)
        if split == "val" and self.val_tokens is not None:
            size = min(size, self.val_tokens - self.counts["val"] * self.shard_tokens)
        if size > 0:
            self._make(split, size)

    def _make(self, split: str, size: int) -> Shard:
        """The next shard, out of the first pending tokens."""
        joined = np.concatenate(self.pending[split])
        tokens, self.pending[split] = joined[:size], [joined[size:]]
        number = self.counts[split] + (split == "train")  # training begins with 1, as in the public set
        self.counts[split] += 1
        file = f"{self.name}_{split}_{number:06d}.bin"
        if self.repair and file not in self.lost:
            return Shard(file, size, 0, "")
        shard = Shard(file, size, int(tokens.max()), write_shard(self.folder / file, tokens, self.vocab_size))
        if not self.repair:
            self.manifest.shards.append(shard)
        elif shard not in self.manifest.shards:
            raise DataError(f"the text no longer gives {file}; delete {self.folder} and prepare it again")
        else:
            self.lost.remove(file)
        return shard

    def _whole(self, shard: Shard) -> bool:
        try:
            return read_header(self.folder / shard.file)[0] == shard.tokens
        except DataError:
            return False

    def _save_cursor(self) -> None:
        """The manifest, and where it goes on; the tokens that it names are on the disk before it."""
        name = f".pending_{len(self.manifest.shards):06d}.npz"
        empty = np.empty(0, np.uint16 if self.vocab_size <= 2**16 else np.uint32)
        aside = self.folder / f"{name}.writing"
        with open(aside, "wb") as f:
            train, val = (np.concatenate([empty, *self.pending[split]]) for split in ("train", "val"))
            np.savez(f, train=train, val=val)
            f.flush()
            os.fsync(f.fileno())
        aside.rename(self.folder / name)
        self.manifest.cursor = {**self.at, "pending": name, "short": self.short}
        self.manifest.save(self.folder)
        self._forget_pending(name)

    def _forget_pending(self, but: str | None) -> None:
        for stale in self.folder.glob(".pending_*.npz"):
            if stale.name != but:
                stale.unlink()

    def _finish(self) -> None:
        if self.repair:
            if self.lost:
                raise DataError(f"the text no longer gives {self.lost[0]}; delete {self.folder} and prepare it again")
            return
        if not self.counts["val"] or not (self.counts["train"] or self.val_tokens is not None):
            held = sum(s.tokens for s in self.manifest.shards)
            if not held:
                raise DataError(f"{self.manifest.source} holds no text; type dataset.path=FOLDER, delete {self.folder}")
            advice = "dataset.val_every=N above 1, or split the text into more documents"
            if any(split == "first" for _, split in self.items):
                advice = f"dataset.shard_tokens=N below {held}; the first N are held out"
            raise DataError(
                f"{self.manifest.source} gives {held} tokens, all for one of training and validation; type {advice}; "
                f"delete {self.folder} first"
            )
        self.manifest.complete = True
        if self.at["source"] < len(self.items) or self._held("train"):
            self._save_cursor()
        else:
            self.manifest.cursor = None
            self.manifest.save(self.folder)
            self._forget_pending(None)
