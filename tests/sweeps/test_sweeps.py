from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ema_nesterov.config import check, typed
from ema_nesterov.errors import ConfigError
from ema_nesterov.sweeps.cost import ASSUMED_MFU, PEAK, cost
from ema_nesterov.sweeps.launch import launch
from ema_nesterov.sweeps.manifest import Sweep, freeze, is_frozen, open_sweep, sweep_folder
from ema_nesterov.sweeps.plan import SweepFile, expand, merge, open_sweep_file, plan, split, sweep_names
from ema_nesterov.sweeps.state import state_of, states
from ema_nesterov.training.checkpoint import list_checkpoints
from ema_nesterov.training.folder import claimed
from ema_nesterov.training.identity import run_folder, run_hash
from ema_nesterov.training.run import run
from tests.conftest import ROOT, TINY, Refused, composed, read_metrics
from tests.sweeps.cluster import wait_until
from tests.training.runs import at_step, stop

CONFIGS = ROOT / "configs"
Said = Callable[..., list[str]]
SMALL = [o for o in TINY if not o.startswith("lookahead.")]


@pytest.fixture
def sweep(tmp_path: Path, sample: Path) -> Sweep:
    """Frozen: the base and the lookahead, two seeds each, of ten steps."""
    runs = plan(CONFIGS, [["lookahead=none,ema_nesterov", "seed=0,1"]], [*SMALL, f"dataset.path={sample}"])
    return freeze(sweep_folder(tmp_path / "held", "a/b"), "a/b", SweepFile("A title", [], gpus=1), runs)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """The lines that a script prints, where it ends well."""

    def lines(script: str, *arguments: str) -> list[str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.setattr(sys, "exit", lambda code: code and pytest.fail(f"{script} ended with {code}"))
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return lines


# --- which runs -----------------------------------------------------------------------------------


def test_a_command_line_stands_for_the_product_of_its_lists() -> None:
    lines = list(expand(["experiment=a,b", "seed=range(0,2)", "optimizer.betas=[0.9,0.95]"]))
    assert [line[:2] for line in lines] == [
        [f"experiment={name}", f"seed={seed}"] for name in ("a", "b") for seed in (0, 1)
    ]
    assert {line[2] for line in lines} == {"optimizer.betas=[0.9,0.95]"}
    assert merge(["steps=1", "seed=0,1"], ["seed=3,4"]) == ["steps=1", "seed=3,4"]


def test_runs_are_those_of_train_py_and_one_that_stands_twice_is_one() -> None:
    commands = [["experiment=quickstart/muon", "seed=0,1"], ["experiment=quickstart/muon", "seed=1", "log_every=3"]]
    runs = plan(CONFIGS, commands, ["steps=20"])
    folders = [run_folder(composed("experiment=quickstart/muon", "steps=20", f"seed={seed}")) for seed in (0, 1)]
    assert [Path("runs") / run.id for run in runs] == folders


@pytest.mark.parametrize("name", sweep_names(CONFIGS))
def test_what_a_sweep_says_is_text(name: str) -> None:
    file = open_sweep_file(CONFIGS, name)
    figures = [figure["title"] for figure in file.figures if "title" in figure]
    assert all(isinstance(text, str) and text for text in [file.title, *file.runs, *file.unknown, *figures])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("title: a\nruns: [seed=0]\nunknown:\n  - the rates, from the rule: 0.1, 0.2", "unknown: {'the rates, from"),
        ("title: a\nruns: [seed=0]\nunknown: [the rates, 0.3]", "unknown: 0.3 is not text; put the whole line in"),
        ("title: a\nruns: [seed=0]\nunknown: [[the rates]]", "unknown: ['the rates'] is not text"),
        ("title: a\nruns: [seed=0]\nunknown:\n  -", "unknown: None is not text"),
        ("title: a\nruns: [seed=0]\nunknown: the rates", "unknown must be a list"),
        ("title: a\nruns:\n  - experiment: a", "runs: {'experiment': 'a'} is not text"),
        ("title: a\nruns: [3]", "runs: 3 is not text"),
        ("title: {Figure 9: a}\nruns: [seed=0]", "title: {'Figure 9': 'a'} is not text"),
        ("title: 9\nruns: [seed=0]", "title: 9 is not text"),
        ("title:\nruns: [seed=0]", "title: None is not text"),
        ("runs: [seed=0]", "a sweep needs both title: TEXT and runs:"),
        ("title: Figure 9: a\nruns: [seed=0]", "mapping values are not allowed"),
        ("title: a\nruns: [seed=0]\nfigures: [{kind: final, title: {a: b}}]", "figures: title: {'a': 'b'} is not text"),
        ("title: a\nruns: [seed=0]\nfigures: [final]", "figures: 'final' has no kind; write {kind: final}"),
        ("[a]", "a sweep needs both title: TEXT and runs:"),
        ("", "a sweep needs both title: TEXT and runs:"),
    ],
)
def test_a_sweep_that_says_something_else_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        open_sweep_file(tmp_path, "mine")
    assert "mine.yaml: " in str(error.value)


@pytest.mark.parametrize("experiment", ["nanogpt_124m/soap_ema_nesterov", "nanogpt_162m/record30_lr_matched"])
def test_a_frozen_config_is_the_composed_one(experiment: str) -> None:
    for cfg in (composed(f"experiment={experiment}"), composed("dataset=c4_stream", "model=llama_60m", "seq_len=256")):
        again = typed(json.loads(json.dumps(OmegaConf.to_container(cfg, resolve=True))))
        check(again)
        assert again == cfg
        assert run_hash(again) == run_hash(cfg)


@pytest.mark.parametrize("change", [{"stepz": 3}, {"model": {"architecture": "llama", "width": "wide"}}])
def test_a_manifest_of_another_version_is_one_line(change: dict[str, object]) -> None:
    plain = {**json.loads(json.dumps(OmegaConf.to_container(composed(), resolve=True))), **change}
    with pytest.raises(ConfigError, match="of another version of the code"):
        typed(plain)


def test_what_is_frozen_does_not_follow_later_edits(sweep: Sweep, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    (tmp_path / "held").rename(moved)
    again = open_sweep(moved / "sweeps" / "a" / "b")
    assert [entry.id for entry in again.entries] == [entry.id for entry in sweep.entries]
    assert {entry.folder.parents[2] for entry in again.entries} == {moved}
    first = again.entries[0].cfg
    assert (first.runs_dir, first.steps, first.lookahead.name) == (str(moved), 10, "none")
    assert first.logger.tags == ["sweep:a/b"]
    assert {"title", "git", "date", "gpus"} <= set(again.about)


# --- how they stand -------------------------------------------------------------------------------


def test_states_tell_what_remains(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    finished, preempted, killed, missing = sweep.entries
    assert run(finished.cfg) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 4, stop)
        assert run(preempted.cfg) == 85
    killed.folder.mkdir(parents=True)
    (killed.folder / "status.json").write_text(
        json.dumps({"status": "running", "step": 3, "message": ""}), encoding="utf-8"
    )
    found = states(sweep)
    assert [(s.name, s.step) for s in found] == [("finished", 10), ("preempted", 4), ("killed", 3), ("missing", 0)]
    assert [s.remains for s in found] == [False, True, True, True]
    assert "SIGTERM" in found[1].message
    with claimed(killed.folder):  # as a training does
        assert state_of(killed.folder).name == "running"
    assert state_of(missing.folder, queued=True).name == "queued"
    (killed.folder / "status.json").write_text(
        json.dumps({"status": "diverged", "step": 3, "message": "loss"}), encoding="utf-8"
    )
    assert not state_of(killed.folder).remains


def test_what_was_exported_is_not_run_again(sweep: Sweep, tmp_path: Path, said: Said) -> None:
    """Though its folder is gone, as after an allocation whose disk is given back."""
    first, second, *rest = sweep.entries
    for entry in (first, second):
        assert run(entry.cfg) == 0
        told = said("report.py", f"sweep={sweep.folder}", f"export={tmp_path}")
        assert sum("not exported" in line for line in told) == 3 - entry.index
        shutil.rmtree(entry.folder)
    assert len((tmp_path / "a_b.csv").read_text(encoding="utf-8").splitlines()) == 3
    *_, task = said("sweep.py", "resubmit", f"sweep={sweep.folder}", f"exported={tmp_path}", "dry_run=true", "pack=4")
    assert task == f"task 0: {', '.join(entry.id for entry in rest)}"
    *_, summary = said("sweep.py", "status", f"sweep={sweep.folder}", f"exported={tmp_path}")
    assert summary == "2 exported, 2 missing"


def test_a_run_costs_its_flops_at_the_rate_that_is_known(tmp_path: Path) -> None:
    cfg = composed("experiment=nanogpt_124m/muon", "eval_every=0", "probe_every=0", "dataset.val_tokens=1024")
    found = cost(cfg, tmp_path / "none.json")
    assert found is not None
    matrices = 12 * 12 * 768**2 + 50257 * 768
    flops = 6200 * 524_288 * (6 * matrices + 12 * 12 * 768 * 1024)
    assert found.training == pytest.approx(flops / (ASSUMED_MFU * PEAK) / 3600)
    assert not found.measured
    about = {"command": "python scripts/bench.py train experiment=nanogpt_124m/muon", "device": "1 x NVIDIA H100: ..."}
    figures = {"tokens/s per device": 1e6}
    (tmp_path / "some.json").write_text(
        json.dumps([{"benchmark": "train", "about": about, "figures": figures}]), encoding="utf-8"
    )
    measured = cost(cfg, tmp_path / "some.json")
    assert measured is not None
    assert measured.measured
    assert measured.training == pytest.approx(6200 * 524_288 / 1e6 / 3600)


def test_a_run_costs_every_validation(tmp_path: Path) -> None:
    def validation(*overrides: str) -> float:
        found = cost(composed("experiment=nanogpt_124m/muon", "probe_every=0", *overrides), tmp_path / "none.json")
        assert found is not None
        return found.validation

    once = validation("eval_every=0")
    assert validation() == pytest.approx(32 * once)  # 0, 200, ... 6200
    assert validation("eval_at=[0.5,100/1000]") == pytest.approx(33 * once)  # 3100; the others are in it


# --- the script -----------------------------------------------------------------------------------


def test_a_stopped_sweep_saves_its_runs_and_begins_no_other(tmp_path: Path, sample: Path) -> None:
    """Two side by side, of which one is over when the sweep is asked to stop."""
    overrides = [o for o in SMALL if not o.startswith("steps=")]
    overrides += ["steps=10,100000,20", "lookahead=none", "schedule.decay_steps=0", f"dataset.path={sample}"]
    overrides += ["dataset.max_epochs=10000", "checkpoint_every=0", "eval_every=0", "probe_every=0"]
    script = [sys.executable, str(ROOT / "scripts" / "sweep.py"), "run", "name=tiny", f"runs_dir={tmp_path}", "jobs=2"]
    folder = sweep_folder(tmp_path, "tiny")
    with subprocess.Popen(
        [*script, *overrides], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    ) as process:
        wait_until(lambda: is_frozen(folder), 60)
        short, long, _ = open_sweep(folder).entries
        wait_until(lambda: state_of(short.folder).name == "finished" and state_of(long.folder).step > 4, 120)
        process.send_signal(signal.SIGUSR1)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 85, said
    found = states(open_sweep(folder))
    assert [state.name for state in found[:2]] == ["finished", "preempted"]
    assert found[2].name in ("missing", "preempted")
    assert [state.remains for state in found] == [False, True, True]
    assert not (long.folder / "STOP").exists()
    newest = list_checkpoints(long.folder / "checkpoints")[-1]
    assert newest.name == f"step_{found[1].step:08d}"
    assert read_metrics(long.folder)[-1]["step"] == found[1].step


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("paln sweep=figure_4", "unknown command paln; type one of plan, run, submit, status, resubmit"),
        ("plan", "sweep= is missing; type sweep=NAME"),
        ("status sweep=figure_44", "there is no sweep figure_44; did you mean sweep=figure_4?"),
        ("run name=../a experiment=quickstart/muon", "name='../a' must be a relative folder such as quickstart/muon"),
        ("run name=/a experiment=quickstart/muon", "name='/a' must be a relative folder"),
        ("plan sweep=figure_44", "there is no sweep figure_44; did you mean sweep=figure_4?"),
        ("plan name=a experiment=quickstart/muon,quickstart/moun", "did you mean experiment=quickstart/muon?"),
        ("plan name=a seed=interval(0,1)", "seed=interval(0,1) is an interval; type values"),
        ("plan name=a optimizer.lrr=1,2", "unknown key optimizer.lrr; did you mean optimizer.lr?"),
        ("plan name=a steps=0", "steps=0 must be at least 1"),
        ("status name=a runs_dir=RUNS", "this sweep has not begun; type run, submit or plan"),
        ("submit name=a pack=0", "pack=0 must be at least 1"),
        ("run name=a dataset=packaged dataset.path=x model=nanogpt_124m", "x does not exist; type python scripts"),
        ("train name=a runs_dir=RUNS index=0", "has not begun"),
        ("plan name=a exported=RUNS/x", "x does not exist; python scripts/report.py export="),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(arguments: str, line: str, refused: Refused, tmp_path: Path) -> None:
    refused("sweep.py", arguments.replace("RUNS", str(tmp_path)).split(), line)


def test_other_runs_under_a_name_that_has_begun_are_refused(sweep: Sweep, refused: Refused) -> None:
    own = [f"sweep={sweep.folder}"]
    refused("sweep.py", ["status", *own, "seed=5"], "seed=5 changes nothing any more")
    runs_dir = f"runs_dir={sweep.folder.parents[2]}"
    refused("sweep.py", ["run", "name=a/b", runs_dir, "seed=5"], "has begun with other runs; leave seed=5 out to go on")
    refused("sweep.py", ["submit", *own, "gpus=2", "pack=8"], "pack=8 packs runs of one GPU, these take 2; type gpus=1")


def test_damaged_files_of_a_sweep_are_told(sweep: Sweep, refused: Refused, tmp_path: Path) -> None:
    own = ["status", f"sweep={sweep.folder}"]
    (sweep.folder / "submissions").mkdir()
    (sweep.folder / "submissions" / "0.json").write_text("{", encoding="utf-8")
    refused("sweep.py", own, "0.json is damaged (JSONDecodeError")
    (sweep.folder / "submissions" / "0.json").unlink()
    moved = tmp_path / "b"
    shutil.copytree(sweep.folder, moved)
    refused("sweep.py", ["run", f"sweep={moved}"], "must lie at RUNS_DIR/sweeps/a/b, as its runs lie in RUNS_DIR")
    refused("sweep.py", ["submit", f"sweep={sweep.folder}", "dry_run=true", "sbatch=a 'b"], "close its quotes")
    (sweep.folder / "sweep.json").write_text('{"name": "a/b"}', encoding="utf-8")
    refused("sweep.py", own, "sweep.json has no title")


def test_a_submission_is_an_array_of_what_remains(sweep: Sweep, said: Said) -> None:
    assert run(sweep.entries[1].cfg) == 0
    options = ["pack=2", "throttle=3", "dry_run=true", "sbatch=--partition=gpu --time=1:00:00"]
    command, *tasks = said("sweep.py", "submit", f"sweep={sweep.folder}", *options)
    assert command.startswith("sbatch --parsable --array=0-1%3 --job-name=a/b")
    assert "--gpus-per-node=2" in command
    assert "--partition=gpu --time=1:00:00" in command
    assert command.endswith(f"scripts/sweep.py run sweep={sweep.folder} submission=0 gpus=1 jobs=2")
    ids = [sweep.entries[i].id for i in (0, 2, 3)]
    assert tasks == [f"task 0: {ids[0]}, {ids[1]}", f"task 1: {ids[2]}"]
    assert not (sweep.folder / "submissions").exists()


# --- the paper's ----------------------------------------------------------------------------------


def test_every_sweep_of_the_paper_composes_and_its_page_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "paper.py"))["page"]()
    assert (ROOT / "docs" / "paper.md").read_text(encoding="utf-8") == page, "type python scripts/paper.py"
    for figure in (
        "Figures 2 and 8",
        "Figure 4, left",
        "Figure 4, right",
        *(f"Figure {i}" for i in (5, 6, 7, 9, 10)),
        "Table 2",
    ):
        assert f"\n## {figure}" in page


def test_figure_5_starts_m_as_the_released_code_does_where_that_shows() -> None:
    file = open_sweep_file(CONFIGS, "figure_5")
    held = [split(command) for command in file.runs if "muon_ema_nesterov" in command]
    for planned in plan(CONFIGS, held, []):
        look = planned.cfg.lookahead
        first = look.ema_decay ** (look.warmup_steps - 1)  # the first displacement's weight where alpha begins
        assert look.warm_start == (first > 0.01), planned.overrides


def test_runs_side_by_side_part_the_cores(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os\nprint(os.environ['OMP_NUM_THREADS'])", encoding="utf-8")
    cores = len(os.sched_getaffinity(0))
    for given, slots, wanted in ((None, 1, cores), (None, cores, 1), (None, 2 * cores, 1), ("3", cores, 3)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        launch(script, sweep, sweep.entries[:1], [[]] * slots, lambda line: None)
        assert (sweep.folder / "logs" / "0.log").read_text(encoding="utf-8").split()[-1] == str(wanted)
