"""Prepare a dataset ahead of training: python scripts/prepare_data.py dataset=sample [dataset.path=FOLDER]"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

import ema_nesterov.config  # noqa: F401  (registers the schemas)
from ema_nesterov.cli import guard, job
from ema_nesterov.data.sample import prepare_sample
from ema_nesterov.errors import DataError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def prepare(cfg: DictConfig) -> int:
    d = cfg.dataset
    folder = Path(d.path)
    if d.prepare != "sample":
        raise DataError(f"dataset={d.name} cannot be prepared by this version; data/README.md says how it gets here")
    if folder.exists():
        print(f"{folder} is there already")
        return 0
    print(f"preparing {folder}: tokens of {d.tokenizer}, about 10 seconds")
    prepare_sample(folder, d.tokenizer, d.vocab_size)
    return 0


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(cfg: DictConfig) -> None:
    job(prepare, cfg)


if __name__ == "__main__":
    guard(main, CONFIGS)
