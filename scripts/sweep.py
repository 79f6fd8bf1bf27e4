"""Many runs: python scripts/sweep.py COMMAND sweep=NAME [KEY=VALUE ...]

plan       the runs, how they stand, and what they cost; nothing is written
run        train here what remains, one run after another, or one on each GPU
submit     hand the runs to SLURM, as an array
status     finished, running, queued, preempted, killed, diverged, failed or missing, each with its reason
resubmit   hand to SLURM what remains, and nothing else

sweep      a file of configs/sweep, such as small/figure_4, or the folder of a sweep that has begun
name       of a sweep without a file; its runs are those of train.py --multirun:
           python scripts/sweep.py plan name=mine experiment=quickstart/muon,quickstart/muon_ema_nesterov seed=0,1
runs_dir   where the runs and sweeps/NAME lie (default runs)
gpus       of each run, in place of what the sweep says: the batch is global, so the numbers stay
jobs       runs side by side (default: as many as have GPUs of their own, 1 without; small ones may share a GPU)
pack       submit: one-GPU runs that share an array task, e.g. 8 on a node of 8
throttle   submit: array tasks at a time; what exceeds the cluster's MaxArraySize waits in arrays of its own
sbatch     submit: options for sbatch, e.g. sbatch="--partition=gpu --time=4:00:00"
dry_run    submit: true prints the call and the tasks, and submits nothing
diverged   run, resubmit: true takes the diverged runs again too
exported   a folder that report.py export= wrote: its runs are over, though their folders are gone

Any other KEY=VALUE goes to every run, as in scripts/train.py (seed=0,1,2 gives each of them). With run or submit a
sweep is frozen: configs and git revision stand in runs_dir/sweeps/NAME from then on, whatever is edited later. A
finished run is never repeated, in whichever sweep it stands. Exit codes of run: 0, 85 asked to stop, 86 runs
diverged, 1 runs failed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ema_nesterov.cli import guard, key_of, parse, quoted
from ema_nesterov.config import check_name
from ema_nesterov.errors import ConfigError
from ema_nesterov.sweeps.manifest import Entry, Sweep, freeze, is_frozen, open_sweep, same, sweep_folder
from ema_nesterov.sweeps.plan import Planned, SweepFile, open_sweep_file, plan, split
from ema_nesterov.sweeps.state import OVER, State, array_limit, state_of, states, submissions
from ema_nesterov.training.folder import DIVERGED, FINISHED

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, BENCHMARKS, ARRAY = ROOT / "configs", ROOT / "docs" / "benchmarks.json", ROOT / "slurm" / "array.sbatch"


@dataclass
class Arguments:
    sweep: str | None = None
    name: str | None = None
    runs_dir: str = "runs"
    gpus: int | None = None
    jobs: int | None = None
    pack: int = 1
    throttle: int = 8
    sbatch: str = ""
    dry_run: bool = False
    diverged: bool = False
    exported: str | None = None
    submission: int | None = None  # by slurm/array.sbatch, with its task
    task: int | None = None
    index: int | None = None  # of `train`, by `run`


def main() -> None:
    command, *rest = sys.argv[1:] or ["--help"]
    if {"-h", "--help"} & {command, *rest}:
        print(__doc__)
        return
    commands = {"plan": show_plan, "run": run, "submit": submit, "status": show, "resubmit": resubmit, "train": train}
    if command not in commands:
        raise ConfigError(f"unknown command {command}; type one of {', '.join(list(commands)[:-1])}")
    own = {f.name for f in fields(Arguments)}
    args = parse(Arguments, [a for a in rest if key_of(a) in own])
    for key, least in (("gpus", 0), ("jobs", 1), ("pack", 1), ("throttle", 1)):
        value = getattr(args, key)
        if value is not None and value < least:
            raise ConfigError(f"{key}={value} must be at least {least}")
    sys.exit(commands[command](args, [a for a in rest if key_of(a) not in own]) or 0)


# --- which sweep ----------------------------------------------------------------------------------


def folder_of(args: Arguments) -> tuple[Path, str]:
    """The folder and the name of the sweep that is meant."""
    if args.sweep and is_frozen(Path(args.sweep)):
        sweep = open_sweep(Path(args.sweep))
        return sweep.folder, sweep.name
    name = args.name or args.sweep
    if not name:
        raise ConfigError("sweep= is missing; type sweep=NAME, a file of configs/sweep, or name=MINE experiment=A,B")
    check_name("name" if args.name else "sweep", name)
    folder = sweep_folder(Path(args.runs_dir), name)
    if args.sweep and not is_frozen(folder):
        open_sweep_file(CONFIGS, args.sweep)
    return folder, name


def planned(args: Arguments, overrides: list[str]) -> tuple[SweepFile, list[Planned]]:
    """What configs/ and the command line say today."""
    overrides = [*overrides, quoted("runs_dir", args.runs_dir)]
    if args.sweep:
        file = open_sweep_file(CONFIGS, args.sweep)
        commands = [split(command) for command in file.runs]
    else:
        file, commands = SweepFile(title=str(args.name), runs=[], gpus=1), [[]]
    if args.gpus is not None:
        file.gpus = args.gpus
    return file, plan(CONFIGS, commands, overrides)


def begun(args: Arguments, overrides: list[str]) -> Sweep:
    """The frozen sweep, frozen now where it was not. Raises ConfigError where it holds other runs."""
    folder, name = folder_of(args)
    if not is_frozen(folder):
        file, runs = planned(args, overrides)
        require_data(runs)
        return freeze(folder, name, file, runs)
    sweep = open_sweep(folder)
    if overrides and not same(sweep, planned(args, overrides)[1]):
        raise ConfigError(
            f"{folder} has begun with other runs; leave {' '.join(overrides)} out to go on, or type name=OTHER"
        )
    if args.gpus is not None:
        sweep.about["gpus"] = args.gpus
    return sweep


def frozen(args: Arguments, overrides: list[str]) -> Sweep:
    folder, _ = folder_of(args)
    if not is_frozen(folder):
        raise ConfigError(f"{folder} does not exist: this sweep has not begun; type run, submit or plan")
    if overrides:
        raise ConfigError(f"{overrides[0]} changes nothing any more: the sweep has begun; leave it out")
    return open_sweep(folder)


def elsewhere(args: Arguments, name: str) -> set[str]:
    """The runs of this sweep that `exported` has."""
    if args.exported is None:
        return set()
    from ema_nesterov.reporting.results import exported  # here, as little else needs it

    return exported(Path(args.exported), name)


def frozen_at(sweep: Sweep) -> str:
    return f"frozen on {sweep.about['date']} at git revision {sweep.about['git'][:12]}"


def require_data(runs: list[Planned]) -> None:
    """Raise ConfigError, before anything is queued, for a dataset that is not there."""
    for cfg in (run.cfg for run in runs):
        d = cfg.dataset
        if "_target_" not in d and "buffer" not in d and d.prepare != "sample":
            folder = Path(d.path if d.output is None else d.output)
            if not folder.is_dir():
                raise ConfigError(f"{folder} does not exist; type python scripts/prepare_data.py dataset={d.name}")


# --- commands -------------------------------------------------------------------------------------


def show_plan(args: Arguments, overrides: list[str]) -> None:
    folder, name = folder_of(args)
    over = elsewhere(args, name)
    if is_frozen(folder):
        sweep = open_sweep(folder)
        print(f"{sweep.about['title']}\n{folder}, {frozen_at(sweep)}")
        runs = [(entry.id, entry.overrides, entry.cfg) for entry in sweep.entries]
        gpus, runs_dir = sweep.about["gpus"], sweep.runs_dir
    else:
        file, found = planned(args, overrides)
        runs = [(run.id, run.overrides, run.cfg) for run in found]
        gpus, runs_dir = file.gpus, Path(args.runs_dir)
        print(f"{file.title}\nnot begun: run or submit would freeze it in {folder}")
        for line in file.unknown:
            print(f"not in the paper: {line}")
    from ema_nesterov.sweeps.cost import ASSUMED_MFU, cost  # here, as it loads torch

    table = Table(box=SIMPLE_HEAD)
    for column in ("", "run", "settings", "state", "GPU-hours"):
        table.add_column(column, justify="right" if column in ("", "GPU-hours") else "left", overflow="fold")
    costs = [cost(cfg, BENCHMARKS) for *_, cfg in runs]
    standing = [state_of(runs_dir / id, exported=id in over) for id, *_ in runs]
    for i, (id, settings, _) in enumerate(runs):
        hours = f"{price.hours:.3g}" if (price := costs[i]) else "?"
        table.add_row(str(i), id, " ".join(settings), standing[i].name, hours)
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    console.print(table)
    known = [price for price in costs if price]
    left = sum(price.hours for price, state in zip(costs, standing, strict=True) if price and state.name not in OVER)
    total, validation = sum(price.hours for price in known), sum(price.validation for price in known)
    measured = known and all(price.measured for price in known)
    rates = "rates" if measured else f"assuming {ASSUMED_MFU:.0%} MFU, as there is no figure of a GPU for each model"
    console.print(
        f"{len(runs)} runs of {gpus} GPUs, {total:.3g} GPU-hours, {validation:.3g} of them validation; "
        f"{left:.3g} remain ({rates} in docs/benchmarks.json)"
    )


def run(args: Arguments, overrides: list[str]) -> int:
    from ema_nesterov.sweeps.launch import launch, visible_gpus

    over = elsewhere(args, folder_of(args)[1])
    sweep = begun(args, overrides)
    wanted = of_task(sweep, args)
    standing = [state_of(entry.folder, exported=entry.id in over) for entry in wanted]
    todo = [entry for entry, state in zip(wanted, standing, strict=True) if to_do(state, args)]
    if not todo:
        print(f"nothing remains to be done: {summary(standing)}")
        return DIVERGED if any(state.name == "diverged" for state in standing) else FINISHED
    gpus = visible_gpus()
    each = min(sweep.about["gpus"], len(gpus))
    if each < sweep.about["gpus"] and gpus:
        print(f"each run takes {each} GPU here, not {sweep.about['gpus']}: slower, with the same numbers")
    apart = [gpus[i : i + each] for i in range(0, len(gpus) - each + 1, each)] if each else [[]]
    count = args.jobs or len(apart)  # more than there are GPUs share them
    slots = [apart[i % len(apart)] for i in range(count)]
    print(f"{len(todo)} of {len(wanted)} runs, {count} at a time: {sweep.folder}, {frozen_at(sweep)}", flush=True)
    code = launch(Path(__file__).resolve(), sweep, todo, slots, lambda line: print(line, flush=True))
    print(summary([state_of(entry.folder, exported=entry.id in over) for entry in wanted]))
    return code


def to_do(state: State, args: Arguments) -> bool:
    return state.remains or (args.diverged and state.name == "diverged")


def of_task(sweep: Sweep, args: Arguments) -> list[Entry]:
    """All runs, or those of an array task."""
    if args.submission is None:
        return sweep.entries
    path = sweep.folder / "submissions" / f"{args.submission}.json"
    try:
        indices = json.loads(path.read_text(encoding="utf-8"))["tasks"][args.task]
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"{path} has no task {args.task}; type submit or resubmit, which call this") from None
    return [sweep.entries[index] for index in indices]


def submit(args: Arguments, overrides: list[str]) -> int:
    folder, _ = folder_of(args)
    if is_frozen(folder) and submissions(open_sweep(folder)):
        raise ConfigError(f"{folder} has been submitted; type resubmit for what remains, or name=OTHER to begin anew")
    return hand_over(begun(args, overrides), args)


def resubmit(args: Arguments, overrides: list[str]) -> int:
    return hand_over(frozen(args, overrides), args)


def hand_over(sweep: Sweep, args: Arguments) -> int:
    """Give SLURM an array of what remains."""
    over = elsewhere(args, sweep.name)
    gpus = sweep.about["gpus"] if args.gpus is None else args.gpus
    if args.pack > 1 and gpus > 1:
        raise ConfigError(f"pack={args.pack} packs runs of one GPU, these take {gpus}; type gpus=1")
    if shutil.which("sbatch") is None and not args.dry_run:
        raise ConfigError("sbatch is not found: SLURM is not installed here; type run in place of submit")
    standing = states(sweep, over)
    todo = [entry.index for entry, state in zip(sweep.entries, standing, strict=True) if to_do(state, args)]
    if not todo:
        print(f"nothing remains to be done: {summary(standing)}")
        return 0
    tasks = [todo[i : i + args.pack] for i in range(0, len(todo), args.pack)]
    limit = array_limit()
    if limit == 0:
        raise ConfigError(
            "this cluster takes no job arrays (its MaxArraySize is 0); type run in a job in place of submit"
        )
    paths, folder, job = submissions(sweep), sweep.folder.absolute(), None
    first = int(paths[-1].stem) + 1 if paths else 0
    (folder / "logs").mkdir(exist_ok=True)
    for number, part in enumerate(batched(tasks, limit or len(tasks)), first):
        command = [
            *("sbatch", "--parsable", f"--array=0-{len(part) - 1}%{args.throttle}", f"--job-name={sweep.name}"),
            f"--output={str(folder).replace('%', '%%')}/logs/slurm-%A_%a.log",
            *([f"--gpus-per-node={gpus * args.pack}", f"--cpus-per-task={4 * gpus * args.pack}"] if gpus else []),
            *([f"--dependency=afterany:{job}"] if number > first else []),
            *split(args.sbatch),
            *(str(ARRAY), sys.executable, str(Path(__file__).resolve()), "run"),
            *(f"sweep={folder}", f"submission={number}", f"gpus={gpus}", f"jobs={args.pack}"),
        ]
        if args.dry_run:
            job = "JOB"
            print(shlex.join(command))
            for i, task in enumerate(part):
                print(f"task {i}: {', '.join(sweep.entries[index].id for index in task)}")
        else:
            job = give(command, folder / "submissions" / f"{number}.json", part)
            runs = sum(map(len, part))
            print(f"job {job}: {runs} runs in {len(part)} tasks, {args.throttle} at a time; logs in {folder}/logs")
    return 0


def batched(tasks: list[list[int]], size: int) -> list[list[list[int]]]:
    return [tasks[i : i + size] for i in range(0, len(tasks), size)]


def give(command: list[str], path: Path, tasks: list[list[int]]) -> str:
    """Call sbatch and write down what it was given; returns the job. Raises ConfigError where it refuses."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"job": None, "tasks": tasks}), encoding="utf-8")  # before a task can look for it
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        path.unlink()
        raise ConfigError(f"sbatch refuses: {done.stderr.strip() or done.stdout.strip()}; see sbatch= in --help")
    job = done.stdout.strip().partition(";")[0]
    path.write_text(json.dumps({"job": job, "tasks": tasks, "command": command}), encoding="utf-8")
    return job


def show(args: Arguments, overrides: list[str]) -> None:
    sweep = frozen(args, overrides)
    table = Table(box=SIMPLE_HEAD, title=sweep.about["title"], title_justify="left")
    for column in ("", "run", "state", "step", "reason"):
        table.add_column(column, justify="right" if column in ("", "step") else "left", overflow="fold")
    standing = states(sweep, elsewhere(args, sweep.name))
    for entry, state in zip(sweep.entries, standing, strict=True):
        table.add_row(str(entry.index), entry.id, state.name, f"{state.step}/{entry.plain['steps']}", state.message)
    Console(width=None if sys.stdout.isatty() else 180, highlight=False).print(table)
    print(summary(standing))


def summary(standing: list[State]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(state.name for state in standing).most_common())


def train(args: Arguments, overrides: list[str]) -> int:
    """One run, as it was frozen; `run` calls this, under torchrun where it takes several GPUs."""
    from ema_nesterov.training.folder import provenance
    from ema_nesterov.training.run import run as train_run

    sweep = frozen(args, overrides)
    if args.index is None or not 0 <= args.index < len(sweep.entries):
        raise ConfigError(f"index={args.index} must be at least 0 and below {len(sweep.entries)}")
    if (here := provenance()["git"]) != sweep.about["git"] and os.environ.get("RANK", "0") == "0":
        print(f"warning: git revision is {here}, the sweep was frozen at {sweep.about['git']}", flush=True)
    return train_run(sweep.entries[args.index].cfg)


if __name__ == "__main__":
    guard(main)
