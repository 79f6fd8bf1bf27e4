from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.runs import train


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Path:
    """The folder of a run that was left alone."""
    return train(tmp_path_factory.mktemp("straight"), sample)
