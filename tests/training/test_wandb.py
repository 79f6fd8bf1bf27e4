"""W&B as a mirror of metrics.jsonl: real wandb, offline or against a small server in this process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from wandb.proto import wandb_internal_pb2

from ema_nesterov.training import mirror
from ema_nesterov.training.folder import read_status
from ema_nesterov.training.logs import Logs, read_metrics
from ema_nesterov.training.run import FINISHED, run
from ema_nesterov.training.wandb_run import rows
from tests.conftest import ROOT, TINY, composed, run_folder
from tests.training.wandb_server import ServedRun, WandbServer

KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no settings."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        use(server.url, monkeypatch)
        yield server


def train(runs: Path, sample: Path) -> Path:
    """A finished run in this process, mirrored by one beside it; returns its folder."""
    settings = ["logger=wandb", "logger.tags=[mine]", "logger.project=paper"]
    assert run(composed(*TINY, f"runs_dir={runs}", f"dataset.path={sample}", *settings)) == FINISHED
    folder = run_folder(runs)
    assert [m["step"] for m in read_metrics(folder / "metrics.jsonl") if "train/loss" in m] == list(range(1, 11))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Path:
    """A run that nothing mirrored."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        folder = train(tmp_path_factory.mktemp("runs"), sample)
    assert not (folder / "wandb").exists()
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    copy = tmp_path / "runs" / trained.parent.parent.name / trained.parent.name / trained.name
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("checkpoints"))
    return copy


def sync(*arguments: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "sync_wandb.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False, **kwargs)


def expected(folder: Path) -> list[dict[str, Any]]:
    return list(rows(read_metrics(folder / "metrics.jsonl")))


def the_run(server: WandbServer) -> ServedRun:
    (served,) = server.runs.values()
    return served


def run_id(folder: Path) -> str:
    return f"{folder.parent.parent.name}-{folder.parent.name}-{folder.name}"


def offline_rows(folder: Path) -> list[dict[str, Any]]:
    """The history of an offline run: the records of a log in LevelDB's format."""
    (path,) = folder.glob("*.wandb")
    data, at, record, history = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            items = wandb_internal_pb2.Record.FromString(record).history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            history += [{k: v for k, v in row.items() if not k.startswith("_")}] if row else []
            record = b""
    return history


def service() -> tuple[int, int]:
    """The process named wandb-core that descends from this one, and the mirror that started it."""
    parents, names = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            pid, rest = stat.read_text(encoding="utf-8").split(" (", 1)
            name, fields = rest.rsplit(") ", 1)
            parents[int(pid)], names[int(pid)] = int(fields.split()[1]), name

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    (found,) = [pid for pid, name in names.items() if name == "wandb-core" and ours(pid)]
    return found, parents[found]


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def mirrored(folder: Path, until: int, then: Callable[[], object] = lambda: None) -> float:
    """What a training does to its folder, without the training: metrics.jsonl stands at one step, something happens,
    and it grows to the end while its mirror runs. Returns the seconds of the end."""
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    before = sum(json.loads(line)["step"] <= until for line in lines)
    path.write_text("".join(lines[:before]), encoding="utf-8")
    with mirror.mirror(cfg, folder):
        then()
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(lines[before:])
        end = time.monotonic()
    return time.monotonic() - end


# --- live -----------------------------------------------------------------------------------------


def test_a_service_killed_in_the_middle_costs_the_training_nothing_and_sync_sends_the_rest(
    tmp_path: Path,
    sample: Path,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = Logs.write

    def interrupted(self: Logs, line: dict[str, Any]) -> None:
        write(self, line)
        if line["step"] == 5 and "train/loss" in line:
            wait_for(lambda: server.runs)
            os.kill(service()[0], signal.SIGKILL)

    monkeypatch.setattr(Logs, "write", interrupted)
    folder = train(tmp_path, sample)
    assert read_status(folder)["status"] == "finished"
    assert capsys.readouterr().out.count(f"type python scripts/sync_wandb.py {folder}") == 1
    assert the_run(server).rows != expected(folder)
    assert sync(tmp_path).returncode == 0
    assert the_run(server).rows == expected(folder)
    assert the_run(server).exit_code == 0


@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        ("service hangs", "W&B has not taken everything within 2 s"),
        ("server hangs", "W&B has not taken everything within 2 s"),
        ("mirror killed", "the W&B mirror was killed"),
    ],
)
def test_a_mirror_in_trouble_is_left_behind(
    trouble: str,
    line: str,
    folder: Path,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = []

    def act() -> None:
        wait_for(lambda: server.runs)
        started.extend(service())
        if trouble == "service hangs":
            os.kill(started[0], signal.SIGSTOP)
        elif trouble == "server hangs":
            server.answers.clear()
        else:
            os.kill(started[1], signal.SIGKILL)
            wait_for(lambda: line in capsys.readouterr().out)

    monkeypatch.setattr(mirror, "PATIENCE", 2.0)
    try:
        assert mirrored(folder, 5, act) < 5
    finally:
        with suppress(ProcessLookupError):
            os.kill(started[0], signal.SIGKILL)
    if trouble != "mirror killed":
        assert capsys.readouterr().out.splitlines()[-1].startswith(line)


def test_a_training_does_not_wait_for_a_server_that_cannot_be_reached(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with WandbServer() as closed:
        pass
    use(closed.url, monkeypatch)
    monkeypatch.setattr(mirror, "PATIENCE", 1.0)
    assert mirrored(folder, 5) < 3
    assert capsys.readouterr().out.count(f"type python scripts/sync_wandb.py {folder}") == 1


def test_a_resumed_run_has_no_step_twice(folder: Path, server: WandbServer, capsys: pytest.CaptureFixture[str]) -> None:
    rows = expected(folder)
    held = [{**row, "_step": row["step"]} for row in rows if row["step"] <= 8]  # the checkpoint is of step 6
    server.runs[run_id(folder)] = ServedRun({"project": "paper"}, history=held)
    mirrored(folder, 6)
    assert the_run(server).rows == rows
    said = capsys.readouterr()
    assert re.fullmatch(r"mirrored by W&B: http\S+, which has steps up to 8\n", said.out)
    assert said.err == ""


def test_an_offline_mirror_holds_the_whole_run_also_after_a_resume(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirrored(folder, 6)
    assert capsys.readouterr().out.count("W&B has no key") == 1
    (offline,) = (folder / "wandb").glob("offline-run-*")
    assert offline.name.endswith(run_id(folder))
    assert offline_rows(offline) == expected(folder)


def test_live_and_later_make_the_same_run_and_nothing_secret_goes_along(
    folder: Path, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    remote = "https://someone:sesame@example.com/a.git"
    subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", remote], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "sesame")
    monkeypatch.setenv("SLURM_JWT", "sesame")
    mirrored(folder, 6)
    live = the_run(server)
    server.runs.clear()
    sync(folder)
    later = the_run(server)
    for served in (live, later):  # the same run, whichever way it came there
        identity = f"{folder.parent.parent.name}/{folder.parent.name}"
        names = {"groupName": identity, "displayName": f"{identity}/seed0", "project": "paper", "jobType": "train"}
        assert names.items() <= served.fields.items()
        assert served.fields["name"] == run_id(folder)
        assert served.fields["tags"] == ["tiny", "sample", "muon", "ema_nesterov", "mine"]
        assert served.config["lookahead"]["alpha"] == 0.5
        assert {"git", "torch", "python"} <= set(served.config["provenance"])
        assert served.rows == expected(folder)
        assert served.exit_code == 0
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    for content in (server.received, *files):
        assert b"sesame" not in content
        assert b"example.com" not in content
        assert KEY.encode() not in content


# --- later ----------------------------------------------------------------------------------------


def test_sync_sends_what_is_missing_once_and_ends_each_run_as_it_ended(folder: Path, server: WandbServer) -> None:
    ends = {"finished": 0, "failed": 1, "diverged": 1, "preempted": 1, "running": None}
    for seed, status in enumerate(ends):
        copy = folder if seed == 0 else shutil.copytree(folder, folder.with_name(f"seed{seed}"))
        config = copy / "config.yaml"
        config.write_text(config.read_text(encoding="utf-8").replace("seed: 0", f"seed: {seed}"), encoding="utf-8")
        (copy / "status.json").write_text(json.dumps({"status": status}), encoding="utf-8")
    done = sync(folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    served = {name[-1]: run for name, run in server.runs.items()}
    for seed, (status, code) in enumerate(ends.items()):
        run, whole = served[str(seed)], expected(folder)
        assert run.rows == (whole if status != "running" else whole[:-1])  # the last step may not be complete
        assert run.exit_code == code
        assert run.preempting == (status == "preempted")
    assert done.stdout.count(" 11 steps sent") == 4
    del served["0"].history[4:]
    again = sync(folder, folder.parent / "seed1")
    assert [line.split(": ")[1] for line in again.stdout.splitlines()] == [
        "7 steps sent, finished",
        "0 steps sent, failed",
    ]
    assert served["0"].rows == expected(folder)


def test_sync_says_what_wandb_refused(folder: Path, server: WandbServer) -> None:
    server.refuses = True
    done = sync(folder)
    assert done.returncode == 2
    assert f"{folder}: RuntimeError: wandb: WARNING Fatal error while uploading data" in done.stdout
    assert done.stderr == "error: 1 of 1 runs could not be sent; the same command goes on\n"


def test_sync_offline_writes_the_whole_run(folder: Path) -> None:
    done = sync(folder, "mode=offline")
    assert done.returncode == 0, done.stdout + done.stderr
    assert offline_rows(Path(done.stdout.split(": ")[-1].strip())) == expected(folder)


def test_what_sync_cannot_do_is_one_line(folder: Path, tmp_path: Path) -> None:
    for arguments, line in (
        ([folder], "W&B has no key; type wandb login, or mode=offline"),
        ([], "no run folder"),
        ([folder, "mod=offline"], "unknown key mod; did you mean mode?"),
    ):
        done = sync(*arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert line in done.stderr
