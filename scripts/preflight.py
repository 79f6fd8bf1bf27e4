"""Check a run before it starts: python scripts/preflight.py experiment=... [KEY=VALUE ...], or the same under torchrun.

Takes what train.py takes and trains nothing. Prints a table; exits with 2 where the run would fail, with 0 where not.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

import ema_nesterov.config  # noqa: F401  (registers the schemas)
from ema_nesterov.cli import guard, job

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(cfg: DictConfig) -> None:
    from ema_nesterov.training.preflight import preflight  # here, so that a typo is answered before torch is loaded

    job(preflight, cfg)


if __name__ == "__main__":
    guard(main, CONFIGS)
