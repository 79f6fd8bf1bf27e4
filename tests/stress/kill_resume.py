"""Kill training at random moments, start it again with the same command, and compare with a run left alone.

    python tests/stress/kill_resume.py [kills=100] [ranks=2] [seed=0] [steps=80] [OVERRIDE ...]

Each life of a run is ended by SIGKILL: of all its processes, of torchrun or of one rank, after a random time or in the
middle of a save. When a run has finished in spite of it, its final weights, its checkpoint and every line of
metrics.jsonl but times and speeds must be those of the undisturbed run, none missing, none twice; then
another one begins, until so many kills have been survived.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.conftest import TINY, assert_same, final_state, read_metrics, run_folder  # noqa: E402

SETTINGS = (*TINY, "eval_every=16", "probe_every=20", "checkpoint_every=1", "log_every=1")
SETTINGS += ("trainer.keep_checkpoints=2",)


def launch(ranks: int, *overrides: str) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / "scripts" / "train.py"), *SETTINGS, *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, encoding="utf-8", **pipes)  # type: ignore[call-overload]


def kill(process: subprocess.Popen[str], runs: Path, rng: random.Random) -> str:
    """Let it live for a while; returns how it was killed, or "" where it ended before."""
    saving, alone = rng.random() < 0.4, rng.random() < 0.3
    until = time.monotonic() + rng.uniform(0, 16)
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    if saving:
        until = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < until:
            if any(runs.glob("*/*/*/checkpoints/.step_*.writing")):
                break
    if process.poll() is not None:
        return ""
    processes = [process.pid, *map(int, children_of(process.pid))]  # torchrun gives each worker a session of its own
    if alone := alone and len(processes) > 1:
        processes = [rng.choice(processes)]  # the rest must end by itself
    for pid in processes:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=120)
    how = "all" if not alone else "torchrun" if processes[0] == process.pid else "one rank"
    return f"{how}{' while saving' if saving else ''}"


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()


def survive(kills: int, ranks: int, seed: int, steps: int, overrides: list[str], folder: Path) -> int:
    """Runs that were killed and compared; raises AssertionError at the first difference."""
    rng, survived, finished = random.Random(seed), 0, 0
    overrides = [*overrides, f"steps={steps}"]
    straight = launch(ranks, *overrides, f"runs_dir={folder / 'straight'}")
    output = straight.communicate()[0]
    assert straight.returncode == 0, output
    reference = run_folder(folder / "straight")
    while survived < kills:
        runs, lives = folder / str(finished), 1
        while True:
            process = launch(ranks, *overrides, f"runs_dir={runs}")
            how = kill(process, runs, rng) if survived < kills else ""
            if not how:
                output = process.communicate()[0]
                assert process.returncode == 0, output
                break
            lives += 1
            survived += 1
            saved = [int(p.name[5:]) for p in runs.rglob("step_*")]
            print(f"kill {survived}/{kills} ({how}) of run {finished}, step {max(saved, default=0)}", flush=True)
        killed = run_folder(runs)
        assert read_metrics(killed) == read_metrics(reference)
        states = [final_state(f, steps) for f in (killed, reference)]
        assert_same(*states)
        assert_same(load_file(killed / "model.safetensors"), load_file(reference / "model.safetensors"))
        print(f"run {finished} after {lives} lives is the run left alone", flush=True)
        finished += 1
    return finished


def main(arguments: list[str]) -> None:
    numbers = {"kills": 100, "ranks": 2, "seed": 0, "steps": 80}
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in numbers:
            numbers[key] = int(value)
        else:
            overrides.append(argument)
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        runs = survive(**numbers, overrides=overrides, folder=Path(folder))
    minutes = (time.monotonic() - began) / 60
    print(f"{numbers['kills']} kills, {runs} runs, all bit for bit the one left alone; {minutes:.0f} min")


if __name__ == "__main__":
    main(sys.argv[1:])
