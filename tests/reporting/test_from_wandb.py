"""What a real mirror uploaded, fetched back by wandb's own client, is the run folder again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ema_nesterov.reporting.cells import cells_of, comparisons_of
from ema_nesterov.reporting.runs import find_runs
from ema_nesterov.reporting.table import table_of_cells, table_of_pairs, table_of_runs
from ema_nesterov.training.evaluate import PROBE_POSITIONS
from ema_nesterov.training.folder import begin
from ema_nesterov.training.identity import run_folder
from ema_nesterov.training.wandb_run import rows
from tests.conftest import ROOT, TINY, Refused, composed
from tests.training.wandb_server import WandbServer

KEY = "0123456789abcdef" * 2 + "01234567"
EXPORTED = 5  # steps that W&B has put into a file already


class Server(WandbServer):
    """One that gives runs back: the first steps of a history as Parquet, the rest, and one of them again, as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.summaries: dict[str, dict[str, Any]] = {}
        self.states: dict[str, str] = {}
        self.asked: list[str] = []
        self.filters: dict[str, Any] = {}
        server = self

        def do_GET(self: BaseHTTPRequestHandler) -> None:
            content = server.parquet(self.path.split("/")[-1])
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        self.http.RequestHandlerClass.do_GET = do_GET  # type: ignore[attr-defined]

    def __enter__(self) -> Server:
        super().__enter__()
        return self

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            for line in json.loads(body).get("files", {}).get("wandb-summary.json", {"content": []})["content"]:
                self.summaries[path.split("/")[-2]] = json.loads(line)
        if path == "/graphql":
            query = json.loads(body)
            name = query.get("operationName") or re.search(r"\w+ (\w+)", query["query"])[1]  # type: ignore[index]
            body = json.dumps({**query, "operationName": name}).encode()
            self.asked.append(name)
        return super().answer(path, body)

    def Runs(self, given: dict[str, Any]) -> dict[str, Any]:
        self.filters = json.loads(given["filters"])
        if given["project"] != "paper":
            return {"project": None}
        tag = self.filters.get("tags", {}).get("$in", [None])[0]
        names = [name for name, run in self.runs.items() if not tag or tag in run.fields["tags"]]
        page = {"endCursor": "", "hasNextPage": False}
        edges = [{"node": self.node(name), "cursor": name} for name in names]
        return {"project": {"runCount": len(names), "runs": {"edges": edges, "pageInfo": page}}}

    def node(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        ended = {0: "finished", 1: "failed", None: "running"}[run.exit_code]
        return self._bucket(name) | {
            **{"state": self.states.get(name, ended), "group": run.fields["groupName"], "createdAt": "2026"},
            **{"jobType": run.fields["jobType"], "summaryMetrics": json.dumps(self.summaries.get(name, {}))},
            **{"projectId": "1", "systemMetrics": "{}", "user": {"name": "me", "username": "me"}},
        }

    def GetDefaultEntity(self, given: dict[str, Any]) -> dict[str, Any]:
        return self.Viewer(given)

    def RunHistoryKeys(self, given: dict[str, Any]) -> dict[str, Any]:
        last = self.runs[given["name"]].history[-1]["_step"]
        return {"project": {"run": {"historyKeys": {"lastStep": last}}}}

    def RunParquetHistory(self, given: dict[str, Any]) -> dict[str, Any]:
        files = {"parquetUrls": [f"{self.url}/{given['runName']}"], "liveData": [{"_step": EXPORTED + 1}]}
        return {"project": {"run": {"parquetHistory": files}}}

    def HistoryPage(self, given: dict[str, Any]) -> dict[str, Any]:
        first, end = max(given["minStep"], EXPORTED), given["maxStep"]
        page = [row for row in self.runs[given["run"]].history if first <= row["_step"] < end]
        return {"project": {"run": {"history": [json.dumps(row) for row in page]}}}

    def parquet(self, name: str) -> bytes:
        held = [row for row in self.runs[name].history if row["_step"] <= EXPORTED]
        keys = sorted({key for row in held for key in row if key != "_wandb"})
        sink = pa.BufferOutputStream()
        columns = {k: [None if row.get(k) is None else float(row[k]) for row in held] for k in keys}
        pq.write_table(pa.table(columns | {"_step": [row["_step"] for row in held]}), sink)
        return sink.getvalue().to_pybytes()


def lines(lookahead: bool) -> list[dict[str, Any]]:
    """What loop.py writes in 10 steps, with every float in need of all its digits; one is not finite."""
    found: list[dict[str, Any]] = []
    for step in range(11):
        place = {"step": step, "tokens": 384 * step, "time": 0.1 * step}
        if step:
            loss = None if step == 4 else 7 + 1 / (3 + step)
            found.append(place | {"train/loss": loss, "optim/lr": 0.02, "perf/tokens_per_second": 1e5 / 7})
        if step in (5, 10):
            for direction, position in product(("ema", "step")[not lookahead :], PROBE_POSITIONS):
                probe = {"probe/direction": direction, "probe/position": position}
                found.append(place | probe | {"probe/loss": 6 + position**2 / 7})
        if step % 5 == 0:
            x = 8 - step / 7 - 0.1 * lookahead
            more = {"val/lookahead_loss": x - 0.1, "val/ema_loss": x + 0.1} if lookahead else {}
            found.append(place | {"time": place["time"] + 0.01, "val/loss": x, "val/bits_per_byte": x / 3} | more)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folders of a lookahead, its base, and a seed that diverged."""
    folder = tmp_path_factory.mktemp("mine") / "runs"
    for lookahead, seed, status in (("none", 0, "finished"), ("ema_nesterov", 0, "finished"), ("none", 1, "diverged")):
        more = (f"name=night/{lookahead}", f"seed={seed}", "logger.tags=[sweep:night/a]", f"runs_dir={folder}")
        cfg = composed("logger=wandb", f"lookahead={lookahead}", *(o for o in TINY if "lookahead" not in o), *more)
        run = run_folder(cfg)
        run.mkdir(parents=True)
        begin(cfg, run)
        (run / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines(lookahead != "none")), encoding="utf-8"
        )
        (run / "status.json").write_text(json.dumps({"status": status, "step": 10, "message": ""}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def server(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It has what sync_wandb.py sends of them."""
    with Server() as server:
        done = python(tmp_path_factory.mktemp("home"), server, "sync_wandb.py", runs, "project=paper")
        assert done.returncode == 0, done.stdout + done.stderr
        yield server


def python(
    home: Path, server: Server | None, script: str | Path, *arguments: object
) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    env |= {"HOME": str(home), "NETRC": str(home / "netrc"), "WANDB_DIR": str(home)}
    access = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY} if server else {}
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(
        command, cwd=home, env=env | access, capture_output=True, encoding="utf-8", timeout=120, check=False
    )


def test_the_report_is_that_of_the_run_folders(runs: Path, server: Server, tmp_path: Path) -> None:
    done = python(tmp_path, server, "report.py", "wandb=me/paper", "sweep=night/a")
    assert done.returncode == 0, done.stdout + done.stderr
    assert server.filters == {"jobType": "train", "tags": {"$in": ["sweep:night/a"]}}
    assert re.search(r"^not counted: report/wandb/\S+/seed1: diverged at step 10$", done.stdout, re.M)

    mine, fetched = (find_runs([root])[0] for root in (runs, tmp_path / "report" / "wandb"))
    assert len(mine) == len(fetched) == server.asked.count("HistoryPage") == 2
    for ours, theirs in zip(mine, fetched, strict=True):
        assert theirs.folder.parts[-3:] == ours.folder.parts[-3:]  # group and seed
        assert theirs.config == ours.config
        assert list(rows(theirs.metrics)) == list(rows(ours.metrics))
        probes = [[line for line in run.metrics if "probe/loss" in line] for run in (ours, theirs)]
        assert [{k: v for k, v in line.items() if k != "time"} for line in probes[0]] == probes[1]
        assert theirs.status["step"] == ours.status["step"]
    cells = cells_of(mine)
    comparisons = comparisons_of(cells)
    tables = (table_of_runs(mine), table_of_cells(cells, comparisons, {}), table_of_pairs(comparisons))
    for table in tables:
        table.write(tmp_path)
        for name in (f"{table.name}.md", f"{table.name}.csv"):
            assert (tmp_path / "report" / name).read_text(encoding="utf-8") == (tmp_path / name).read_text(
                encoding="utf-8"
            )


SCENES = """
import sys
from itertools import product
from pathlib import Path
from ema_nesterov.errors import UserError
from ema_nesterov.reporting.from_wandb import fetch

for project, sweep in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        print("fetched", *fetch(project, sweep or None, Path("report")))
    except UserError as e:
        print("error:", " ".join(str(e).split()))
"""


def fetched(home: Path, server: Server | None, *arguments: str) -> list[str]:
    """The lines that `fetch` prints, and raises, called with these projects and sweeps."""
    (home / "scenes.py").write_text(SCENES, encoding="utf-8")
    done = python(home, server, home / "scenes.py", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_is_no_run_of_ours_is_passed_over_and_what_is_here_not_fetched_again(
    server: Server, tmp_path: Path
) -> None:
    first = next(iter(server.runs))
    strange: dict[str, dict[str, Any]] = {
        "mine": {"config": {"lr": 1, "model": "mine"}},
        "other-version": {"config": server.runs[first].config | {"flux": 1}},
        "asks": {"config": server.runs[first].config | {"runs_dir": "${oc.env:HOME}"}},
        "climbs": {"fields": server.runs[first].fields | {"groupName": "../../up"}},
        "twice": {"fields": server.runs[first].fields},
        "agents": {"config": server.runs[first].config | {"seed": 7, "lookahead.alpha": 0.5}},
        "cut": {"config": server.runs[first].config | {"seed": 8}, "history": server.runs[first].history[:-1]},
        "resumed": {"config": server.runs[first].config | {"seed": 9}, "exit_code": None},
    }
    kept = dict(server.runs)
    try:
        for name, changes in strange.items():
            server.runs[name] = replace(server.runs[first], **changes)
            server.summaries[name] = server.summaries[first]
        server.asked.clear()
        said = fetched(tmp_path, server, "me/paper", "", "me/paper", "", "me/papre", "", "me/paper", "none")
    finally:
        server.runs = kept
    passed = [line for line in said if line.startswith("passed over: ")]
    assert {line.split("/runs/")[1].split(":")[0] for line in passed[:5]} == {*list(strange)[:4], "twice"}
    assert passed[5:] == passed[:5]
    once, again = [line.split()[1:] for line in said if line.startswith("fetched")]
    assert once == again
    assert len(once) == 6  # with agents, cut and resumed
    statuses = {
        json.loads((tmp_path / folder / "status.json").read_text(encoding="utf-8"))["status"] for folder in once
    }
    assert statuses == {"finished", "diverged", "incomplete", "running"}
    assert server.asked.count("HistoryPage") == 4 + 1  # that which was cut is asked again
    assert re.fullmatch(r"error: W&B does not give the runs of me/papre \(.*papre.*\); mend .*", said[-2])
    assert said[-1].startswith("error: none of 0 runs of me/paper with the tag sweep:none is finished")


def test_without_a_key_it_says_so(tmp_path: Path) -> None:
    assert fetched(tmp_path, None, "me/paper", "") == ["error: W&B has no key; type wandb login"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["wandb=paper"], "wandb=paper is not ENTITY/PROJECT"),
        (["wandb=me/paper", "sweep=b'c"], "sweep=b'c is no name of a sweep"),
    ],
)
def test_what_cannot_be_asked_is_one_line(arguments: list[str], line: str, refused: Refused) -> None:
    refused("report.py", arguments, line)
