"""The dashboard as the package's own objects, the sweep file as an agent reads it, and a run that an agent starts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from ema_nesterov import cli
from ema_nesterov.training import speed
from ema_nesterov.training.folder import load_config
from ema_nesterov.training.logs import read_metrics
from ema_nesterov.training.wandb_run import rows
from tests.conftest import ROOT, Refused
from tests.training.runs import train
from tests.training.wandb_server import ServedRun, WandbServer

SWEEP = yaml.safe_load((ROOT / "configs" / "wandb_sweep.yaml").read_text(encoding="utf-8"))
KEY = "0123456789abcdef" * 2 + "01234567"


class Server(WandbServer):
    """One that also takes dashboards, and keeps the summary."""

    def __init__(self) -> None:
        super().__init__()
        self.takes = True
        self.views: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            for line in json.loads(body).get("files", {}).get("wandb-summary.json", {"content": []})["content"]:
                self.summary = json.loads(line)
        if path == "/graphql" and not (query := json.loads(body)).get("operationName"):  # of wandb.Api
            name = re.search(r"\w+ (\w+)", query["query"])
            body = json.dumps({**query, "operationName": name and name[1]}).encode()
            if not self.takes and b"UpsertView2" in body:
                return {"data": None, "errors": [{"message": "no such project"}]}
        return super().answer(path, body)

    def GetDefaultEntity(self, given: dict[str, Any]) -> dict[str, Any]:
        return self.Viewer(given)

    def UpsertView2(self, given: dict[str, Any]) -> dict[str, Any]:
        self.views.append(given)
        return {"upsertView": {"view": {"id": "v", "name": given["name"]}, "inserted": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample: Path) -> Path:
    """A run that writes all it can: two losses are enough for a z-score, some steps are skipped, the peak is known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.setattr(speed, "PEAK_FLOPS", {"": 1e12})
        spikes = ("trainer.spike_window=2", "trainer.skip_spikes=0.01", "optimizer.lr=1")
        return train(tmp_path_factory.mktemp("runs"), sample, *spikes, "logger=wandb", "logger.tags=[sweep:a]")


def environment(home: Path, **more: str) -> dict[str, str]:
    """Without key and settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    return kept | {"HOME": str(home), "NETRC": str(home / "netrc")} | more


def script(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "wandb_workspace.py"), *arguments]
    env = environment(home, **more)
    return subprocess.run(command, cwd=home, env=env, capture_output=True, encoding="utf-8", timeout=60, check=False)


# --- the dashboard --------------------------------------------------------------------------------


def test_without_a_key_what_would_be_sent_is_written_and_names_only_what_runs_have(
    folder: Path, tmp_path: Path
) -> None:
    done = script(tmp_path, "project=paper", "sweep=night/a")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "type wandb login" in done.stdout
    view = json.loads((tmp_path / "workspace.json").read_text(encoding="utf-8"))
    assert (view["project"], view["displayName"]) == ("paper", "sweep night/a")
    section = view["spec"]["section"]
    panels = [panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]
    (runs,) = section["runSets"]

    cfg = load_config(folder)
    logged = {key for row in rows(read_metrics(folder / "metrics.jsonl")) for key in row} | {"status"}
    searched = [column["accessor"] for panel in panels for column in panel["config"].get("columns", [])]
    columns = [*runs["runFeed"]["columnOrder"], *searched]
    named = {column.removeprefix("summary:") for column in columns if column.startswith("summary:")}
    for panel in panels:
        config = panel["config"]
        used = {name for text in config.get("expressions", []) for name in re.findall(r"\$\{(.*?)\}", text)}
        assert used <= set(config.get("metrics", []))  # W&B loads what is plotted
        named |= {*config.get("metrics", []), *([config["xAxis"]] if "xAxis" in config else [])}
    assert named <= logged
    settings = [column[7:].replace(".value", "") for column in columns if column.startswith("config:")]
    assert {"optimizer.name", "lookahead.name", "model.name", "seed", "lookahead.alpha"} <= set(settings)
    for key in settings:
        assert OmegaConf.select(cfg, key) is not None, key

    of_loss = [panel["config"] for panel in panels if panel["config"].get("metrics") == ["val/loss"]]
    assert {"tokens", "step"} <= {config.get("xAxis") for config in of_loss}
    assert runs["grouping"] == [{"section": "run", "name": "group"}]
    assert runs["sort"]["keys"] == [{"key": {"section": "summary", "name": "val/loss"}, "ascending": True}]
    asked = {f["key"]["name"]: f["value"] for f in runs["filters"]["filters"]}
    assert asked == {"jobType": "train", "tags": ["sweep:night/a"]}


def test_with_a_key_it_is_sent_and_its_address_printed(tmp_path: Path) -> None:
    with Server() as server:
        access = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        done = script(tmp_path, "project=paper", "title=Mine", **access)
        assert done.returncode == 0, done.stderr
        (sent,) = server.views
        assert (sent["entityName"], sent["projectName"], sent["displayName"]) == ("me", "paper", "Mine")
        assert len(json.loads(sent["spec"])["section"]["panelBankConfig"]["sections"]) == 7
        assert re.fullmatch(r"dashboard: http\S+/me/paper\?nw=\w+\n", done.stdout)
        assert not (tmp_path / "workspace.json").exists()
        server.takes = False
        refused = script(tmp_path, "project=papre", **access)
    assert refused.returncode == 2
    assert re.fullmatch(r"error: W&B does not take a dashboard of papre \(.*no such project.*\)\n", refused.stderr)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "type project=NAME"),
        (["projct=a"], "unknown key projct; did you mean project?"),
        (["project=a", "sweep=b'c"], "sweep=b'c is no name of a sweep"),
        (["project=a", "title=☃"], "title='☃' has a sign that W&B does not take"),
        (["project=a", "output=none/a.json"], "cannot write none/a.json: No such file or directory; type output=FILE"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], line: str, refused: Refused) -> None:
    refused("wandb_workspace.py", arguments, line)


# --- W&B's search ---------------------------------------------------------------------------------


def test_the_sweep_file_gives_commands_that_train_takes(folder: Path) -> None:
    assert (ROOT / SWEEP["program"]).exists()
    assert SWEEP["metric"]["name"] in read_metrics(folder / "metrics.jsonl")[-1]
    ends = {key: given.get("values") or [given["min"], given["max"]] for key, given in SWEEP["parameters"].items()}
    for side in (0, -1):
        args = {key: {"value": values[side]} for key, values in ends.items()}
        typed = create_sweep_command_args({"args": args})["args_no_hyphens"]
        fixed = [part for part in create_sweep_command(SWEEP["command"]) if "=" in part]
        cfg = cli.composed(ROOT / "configs", [*fixed, *typed])
        assert {key: OmegaConf.select(cfg, key) for key in ends} == {key: values[side] for key, values in ends.items()}
        assert (cfg.name, cfg.logger.name, cfg.logger.tags) == (
            "quickstart/muon_ema_nesterov", "wandb", ["sweep:search"],
        )  # fmt: skip
        assert not set(ends) & set(cfg)  # one would replace that part of the run's config in W&B


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_below_an_agent_its_run_is_the_one_that_is_filled(folder: Path, tmp_path: Path, mode: str) -> None:
    param = tmp_path / "config-drawn1.yaml"
    param.write_text("wandb_version: 1\n\nlookahead.alpha:\n  value: 0.5\n", encoding="utf-8")
    names = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "drawn1", "WANDB_PROJECT": "found", "WANDB_ENTITY": "me"}
    with Server() as server:
        access = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "WANDB_MODE": mode}
        env = environment(tmp_path, **names, **access, WANDB_SWEEP_PARAM_PATH=str(param))
        server.runs["drawn1"] = ServedRun({"project": "found"})  # W&B makes it when the agent asks for work
        command = [sys.executable, "-m", "ema_nesterov.training.wandb_run", str(folder)]
        done = subprocess.run(
            command, env=env, input="", capture_output=True, encoding="utf-8", timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Ignoring" not in done.stderr  # what wandb says of an id that is not the agent's
        ((name, served),) = server.runs.items()
    if mode == "offline":
        (offline,) = (folder / "wandb").glob("offline-run-*")
        assert offline.name.endswith("-drawn1")
        return
    last = (whole := list(rows(read_metrics(folder / "metrics.jsonl"))))[-1]
    identity = f"{folder.parent.parent.name}/{folder.parent.name}"
    assert name == "drawn1"
    assert served.rows == whole
    assert {"groupName": identity, "jobType": "train", "project": "found"}.items() <= served.fields.items()
    assert served.fields["tags"][-1] == "sweep:a"
    assert served.config["lookahead"]["alpha"] == served.config["lookahead.alpha"] == 0.5
    assert served.config["logger"]["name"] == "wandb"
    # what a table of runs shows: the last of each, and how the run ended
    final = {key: last[key] for key in ("val/loss", "val/perplexity", "val/lookahead_loss", "val/ema_loss", "tokens")}
    assert {**final, "status": "finished"}.items() <= server.summary.items()
