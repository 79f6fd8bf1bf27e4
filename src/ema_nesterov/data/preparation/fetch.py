"""Files of a public dataset repository of the Hugging Face hub: token shards, and the addresses of texts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from textwrap import shorten

from filelock import FileLock

from ...errors import DataError


def fetch_shards(repo: str, folder: Path, shards: int | None = None) -> dict[str, str]:
    """Bring all shards *_val_*.bin and the first `shards` *_train_*.bin (None: all) of a repository into a folder.

    A shard that is there with the size that the hub says is not brought again, and no other file is touched.
    A connection that drops within a shard is resumed; a later call goes on with the shards that are missing.
    Returns the sha256 that the hub gives for each file name (empty where it gives none). Raises DataError when
    the hub cannot be reached, the repository does not exist or holds fewer shards, or the disk does not take them.
    """
    from huggingface_hub import snapshot_download

    files, revision = _list(repo, "", f"bring its shards into {folder} by other means and type the same command again")
    wanted: dict[str, tuple[int, str]] = {}
    for split, count in (("val", None), ("train", shards)):
        names = sorted(name for name in files if fnmatchcase(name, f"*_{split}_*.bin") and "/" not in name)
        if len(names) < (1 if count is None else count):
            remedy = f"type at most {len(names)}" if names else "type another repository"
            raise DataError(f"{repo} holds {len(names)} shards *_{split}_*.bin; {remedy}")
        wanted |= {name: files[name] for name in names[:count]}

    def missing() -> list[str]:
        sizes = {path.name: path.stat().st_size for path in folder.glob("*.bin") if path.is_file()}
        return [name for name, (size, _) in wanted.items() if sizes.get(name) != size]

    failed, otherwise = f"the download of {repo} into {folder} broke off", "type the same command again to go on"
    with _one_line(repo, failed, otherwise, folder):
        if missing():
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{folder.name}.lock"):
                names = missing()
                if (needed := sum(wanted[name][0] for name in names)) > shutil.disk_usage(folder).free:
                    raise DataError(f"no room for {needed / 1e9:.1f} GB in dataset folder {folder}; make some")
                for name in names:  # the client would keep what it once brought, whatever its size is now
                    (folder / name).unlink(missing_ok=True)
                snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=names, local_dir=folder)
                shutil.rmtree(folder / ".cache" / "huggingface", ignore_errors=True)
            if names := missing():  # the client only warns when it loses the hub before the first file
                raise DataError(f"{failed} ({len(names)} shards are missing); {otherwise}")
    return {name: sha256 for name, (_, sha256) in wanted.items()}


def list_files(repo: str, pattern: str) -> list[str]:
    """`hf://datasets/REPO@REVISION/PATH` of the files of a repository whose path matches the pattern (fnmatch), sorted.

    The revision is the commit, so that a later call of datasets.load_dataset(data_files=...) reads the same
    files. Raises DataError when the hub cannot be reached, the repository does not exist or holds no such file.
    """
    folder = re.split(r"[*?[]", pattern)[0].rpartition("/")[0]
    files, revision = _list(
        repo,
        folder,
        "type the same again when it can be, or dataset.path=FOLDER with its files and dataset.output=FOLDER",
    )
    paths = sorted(path for path in files if fnmatchcase(path, pattern))
    if not paths:
        raise DataError(f"{repo} holds no files {pattern} on the Hugging Face hub; type another pattern")
    return [f"hf://datasets/{repo}@{revision}/{path}" for path in paths]


def _list(repo: str, folder: str, otherwise: str) -> tuple[dict[str, tuple[int, str]], str]:
    """Size and sha256 of the files below a folder of a repository, by path; and the commit."""
    from huggingface_hub import dataset_info, errors, list_repo_tree
    from huggingface_hub.hf_api import RepoFile

    with _one_line(repo, f"{repo} cannot be reached on the Hugging Face hub", otherwise):
        # without a timeout the client waits forever; the info's own list of files is cut for large repositories
        revision = str(dataset_info(repo, expand=["sha"], timeout=10).sha)
        tree = list_repo_tree(repo, folder, recursive=True, revision=revision, repo_type="dataset")
        with suppress(errors.RemoteEntryNotFoundError):
            return {f.path: (f.size, f.lfs.sha256 if f.lfs else "") for f in tree if isinstance(f, RepoFile)}, revision
    return {}, revision


@contextmanager
def _one_line(repo: str, failed: str, otherwise: str, folder: Path | None = None) -> Iterator[None]:
    """What the hub's client raises becomes a DataError; an errno tells the disk's errors from the network's."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise DataError(f"no public dataset {repo} on the Hugging Face hub; type OWNER/NAME of one") from None
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as e:  # RuntimeError: its xet client
        if folder and isinstance(e, OSError) and e.errno:
            raise DataError(f"cannot write dataset folder {folder}: {e.strerror}; make room or name another") from None
        cause = e.__cause__ if isinstance(e, errors.LocalEntryNotFoundError) and e.__cause__ else e
        raise DataError(f"{failed} ({shorten(f'{type(cause).__name__}: {cause}', 300)}); {otherwise}") from None
