"""Train one run: python scripts/train.py experiment=... [KEY=VALUE ...], or the same under torchrun."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

import ema_nesterov.config  # noqa: F401  (registers the schemas)
from ema_nesterov.cli import guard, job

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(cfg: DictConfig) -> None:
    from ema_nesterov.training.run import run  # here, so that a typo is answered before torch is loaded

    job(run, cfg)


if __name__ == "__main__":
    guard(main, CONFIGS)
