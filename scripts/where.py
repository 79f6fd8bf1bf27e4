"""Print the run folder of a config: python scripts/where.py experiment=... [KEY=VALUE ...], as for train.py."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

import ema_nesterov.config
from ema_nesterov.cli import guard, job

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def show(cfg: DictConfig) -> int:
    from ema_nesterov.training.identity import run_folder

    ema_nesterov.config.check(cfg)
    print(run_folder(cfg))
    return 0


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(cfg: DictConfig) -> None:
    job(show, cfg)


if __name__ == "__main__":
    guard(main, CONFIGS)
