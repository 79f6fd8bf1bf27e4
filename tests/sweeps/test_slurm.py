from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ema_nesterov.sweeps.manifest import open_sweep
from ema_nesterov.training.folder import read_status
from ema_nesterov.training.run import run
from tests.conftest import ROOT, TINY, assert_same, final_state, read_metrics, run_folder
from tests.sweeps.cluster import reason_without_slurm, slurm, tell, wait_until

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(reason_without_slurm() is not None, reason=str(reason_without_slurm())),
]
STEPS = 200
RUNS = (
    *(o for o in TINY if not o.startswith(("lookahead.", "steps=", "micro_batch_size="))),
    *(f"steps={STEPS}", "lookahead=ema_nesterov,none", "seed=0,1", "eval_every=0", "probe_every=0"),
    "checkpoint_every=0",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


def sweep(command: str, runs: Path, environment: dict[str, str], *arguments: str, cwd: Path = ROOT) -> str:
    script = [sys.executable, str(ROOT / "scripts" / "sweep.py"), command, "name=tiny", f"runs_dir={runs}"]
    done = subprocess.run(
        [*script, *arguments], capture_output=True, encoding="utf-8", env=environment, cwd=cwd, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_array_goes_on_after_a_preemption_and_ends_as_if_nothing_had_been(
    cluster: dict[str, str], tmp_path: Path, sample: Path
) -> None:
    runs = tmp_path / "runs"
    how = ("gpus=0", "throttle=4", "sbatch=--cpus-per-task=1")
    sweep("submit", runs, cluster, *how, *RUNS, f"dataset.path={sample}")
    folder = runs / "sweeps" / "tiny"
    entries = open_sweep(folder).entries
    assert len(entries) == 4
    job = json.loads((folder / "submissions" / "0.json").read_text(encoding="utf-8"))["job"]

    first = entries[0].folder  # stopped while it trains
    metrics = first / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text(encoding="utf-8").count("train/loss") > 10, 120)
    with subprocess.Popen(["scancel", "--signal=USR1", "--batch", f"{job}_0"], env=cluster) as scancel:
        wait_until(lambda: read_status(first).get("status") == "preempted", 60)
        scancel.kill()  # it signals again and again
    assert 10 < read_status(first)["step"] < STEPS

    wait_until(lambda: not tell(["squeue", "-h", f"--jobs={job}"], cluster).strip(), 240)
    assert sweep("status", runs, cluster).splitlines()[-1] == "4 finished"
    assert read_status(first)["resumed_from"] > 10
    assert "nothing remains" in sweep("resubmit", runs, cluster)
    once = [(folder / "logs" / f"slurm-{job}_{i}.log").read_text(encoding="utf-8").count("started") for i in range(4)]
    assert once == [2, 1, 1, 1]

    cfg = entries[0].cfg
    cfg.runs_dir = str(tmp_path / "alone")
    assert run(cfg) == 0
    undisturbed = run_folder(tmp_path / "alone")
    assert read_metrics(first) == read_metrics(undisturbed)
    a, b = (final_state(path, STEPS) for path in (first, undisturbed))
    assert_same(a, b)


def test_a_sweep_larger_than_an_array_may_be_is_several_and_starts_from_any_folder(
    cluster: dict[str, str], tmp_path: Path, sample: Path
) -> None:
    short = [o for o in RUNS if not o.startswith(("steps=", "seed=", "lookahead="))]
    (tmp_path / "données").symlink_to(sample)
    own = ["steps=2", "lookahead=none", "seed=range(0,5)", "dataset.path='données'"]  # relative, as is runs_dir
    told = sweep("submit", Path("a b"), cluster, "gpus=0", "sbatch=--cpus-per-task=1", *short, *own, cwd=tmp_path)
    assert [line.partition(": ")[2].partition(",")[0] for line in told.splitlines()] == [
        "4 runs in 4 tasks",
        "1 runs in 1 tasks",
    ]
    jobs = ",".join(line.split()[1].rstrip(":") for line in told.splitlines())
    wait_until(lambda: not tell(["squeue", "-h", f"--jobs={jobs}"], cluster).strip(), 240)
    assert sweep("status", Path("a b"), cluster, cwd=tmp_path).splitlines()[-1] == "5 finished"


@pytest.mark.parametrize("script", ["node", "multinode"])
def test_one_run_starts_from_any_folder(cluster: dict[str, str], tmp_path: Path, sample: Path, script: str) -> None:
    command = ["sbatch", "--parsable", "--nodes=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    done = subprocess.run(
        [*command, str(ROOT / "slurm" / f"{script}.sbatch"), *TINY, f"dataset.path={sample}"],
        cwd=tmp_path,
        env={**cluster, "NPROC": "1", "PYTHON": sys.executable},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    wait_until(lambda: not tell(["squeue", "-h", f"--jobs={job}"], cluster).strip(), 240)
    log = (tmp_path / f"slurm-{job}.log").read_text(encoding="utf-8")
    assert read_status(run_folder(tmp_path / "runs"))["status"] == "finished", log
