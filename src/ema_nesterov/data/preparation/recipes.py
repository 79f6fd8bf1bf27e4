"""How each dataset gets here: from a config group to a folder of shards."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock
from omegaconf import DictConfig

from ...errors import DataError
from ..manifest import NAME, Manifest, adopt, load_manifest
from .prepare import prepare
from .sources import Source, hub_sources, local_sources
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

        folder = shards_folder(d)
        assemble(folder / "text", None if d.sources is None else list(d.sources))
        return _prepare_text(
            d, [(s, "every") for s in local_sources(folder / "text", "documents.jsonl.gz")], "packages"
        )
    if d.prepare == "shards" and d.output is None:
        return _bring(d, Path(d.path))
    return prepare_text(d)


def prepare_text(d: DictConfig) -> Manifest:
    """Tokenise the text of a folder (`path`, where `output` is given) or of the hub."""
    if d.output is None and d.hub is None:
        raise DataError(f"where do the shards go? type dataset.output=FOLDER (dataset.path={d.path} is the text)")
    folder = Path(d.path)
    if d.output is None and not (folder / NAME).exists() and any(folder.rglob(Path(d.files or "*").name)):
        raise DataError(f"{folder} holds text; type dataset.output=FOLDER for the shards that are made of it")
    if d.val_files is not None:
        items = [(s, "val") for s in text_sources(d, d.val_files)] + [(s, "train") for s in text_sources(d, d.files)]
    else:
        items = [(s, "every" if d.val_every else "first") for s in text_sources(d, d.files)]
    return _prepare_text(d, items, d.hub if d.output is None else folder.name)


def text_sources(d: DictConfig, pattern: str | None) -> list[Source]:
    """The files of text: of a folder, where the dataset names one, else of the hub."""
    local = d.path is not None and d.output is not None
    return local_sources(Path(d.path), pattern and Path(pattern).name) if local else hub_sources(d.hub, str(pattern))


def prepare_validation(d: DictConfig) -> None:
    """The validation shards of a dataset that streams, once, however many processes ask: twice as many tokens as are
    targets, for the padding."""
    folder = Path(d.output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        manifest = load_manifest(folder)
        if manifest is not None and manifest.complete:
            return
        print(f"preparing the validation shards in {folder}, once", flush=True)
        layout = Layout(d.tokenizer, d.vocab_size, "rows", d.row_len, d.pad_id, d.text_key)
        slots = 2 * max(d.val_tokens, d.probe_tokens)
        items = [(s, "val") for s in text_sources(d, d.val_files)]
        prepare(folder, d.name, d.path or d.hub, items, layout, val_tokens=slots - slots % d.row_len)


def _prepare_text(d: DictConfig, items: list[tuple[Source, str]], origin: str) -> Manifest:
    layout = Layout(d.tokenizer, d.vocab_size, d.layout, d.row_len, d.pad_id, d.text_key, d.val_every)
    return prepare(shards_folder(d), d.name, origin, items, layout, d.shard_tokens, d.shards, processes=d.processes)


def _bring(d: DictConfig, folder: Path) -> Manifest:
    """The public shards, and a manifest for them; without the hub, for those that are there."""
    from .fetch import fetch_shards

    try:
        sha256 = fetch_shards(d.hub, folder, d.shards)
    except DataError:
        there = folder.is_dir() and any(folder.glob("*_train_*.bin")) and any(folder.glob("*_val_*.bin"))
        if not there or load_manifest(folder) is not None:
            raise
        print(f"{d.hub} cannot be reached; taking the shards that are in {folder}")
        sha256 = {}
    return adopt(folder, d, sha256)
