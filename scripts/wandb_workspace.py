"""Make the W&B dashboard: python scripts/wandb_workspace.py project=NAME [entity=NAME] [sweep=NAME] [title=TEXT]

Losses over tokens and steps, perplexities, the probe, schedules, health, throughput and final values, with the seeds
of a config averaged. sweep=NAME: of the runs with the tag sweep:NAME alone. With a W&B key the dashboard is saved and
its URL printed; without one, or with output=FILE, what would be sent is written as JSON (default: workspace.json).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ema_nesterov.cli import arguments, guard
from ema_nesterov.errors import ConfigError, UserError, one_line
from ema_nesterov.reporting.workspace import CONFIG, SECTIONS, SUMMARY


@dataclass
class Arguments:
    project: str | None = None
    entity: str | None = None
    sweep: str | None = None
    title: str | None = None
    output: str | None = None


def main() -> None:
    args = arguments(Arguments, __doc__)
    if not args.project:
        raise ConfigError("whose runs? type project=NAME, e.g. project=ema-nesterov")
    if args.sweep is not None and not re.fullmatch(r"[\w./-]{1,58}", args.sweep):  # a tag has 64 characters at most
        raise ConfigError(f"sweep={args.sweep} is no name of a sweep: 1 to 58 letters, digits, _ . / or -")
    try:
        import wandb_workspaces.workspaces  # noqa: F401  (here, so that a typo is answered before it is loaded)
    except ImportError as e:
        raise ConfigError(f"wandb-workspaces is missing ({one_line(e)}); type pip install wandb-workspaces") from None
    try:
        workspace = build(args)
    except ValueError:
        raise ConfigError(f"title={args.title!r} has a sign that W&B does not take, e.g. + or an emoji") from None
    if args.output or not can_send():
        write(workspace, Path(args.output or "workspace.json"))
    else:
        print(f"dashboard: {save(workspace)}")


def can_send() -> bool:
    """Whether there is a key."""
    try:
        from ema_nesterov.training.wandb_run import has_key

        return has_key()
    except Exception as e:
        raise UserError(f"W&B does not let in ({one_line(e)}); try later, or type output=FILE") from None


def save(workspace: Any) -> str:
    """Send the dashboard; returns its URL."""
    import wandb

    try:
        workspace.entity = workspace.entity or wandb.Api().default_entity
        return workspace.save().url
    except Exception as e:  # of many kinds
        raise UserError(f"W&B does not take a dashboard of {workspace.project} ({one_line(e)})") from None


def write(workspace: Any, path: Path) -> None:
    view = workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    try:
        path.write_text(json.dumps(view, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}; type output=FILE") from None
    print(f"{path} holds what W&B would get; to send it, type wandb login, then the same command without output=")


def build(args: Arguments) -> Any:
    """The dashboard as wandb_workspaces' object. Raises ValueError for a title that it refuses."""
    import wandb_workspaces.workspaces as ws

    filters = [ws.Metric("JobType") == "train"]
    if args.sweep:
        filters.append(ws.Tags().isin([f"sweep:{args.sweep}"]))
    columns = [f"config:{head}.value{dot}{rest}" for head, dot, rest in (key.partition(".") for key in CONFIG)]
    return ws.Workspace(
        entity=args.entity or "",
        project=args.project or "",
        name=args.title or (f"sweep {args.sweep}" if args.sweep else "Lookahead or not"),
        sections=[
            ws.Section(name=name, panels=[panel(**spec) for spec in specs], is_open=i < 3)
            for i, (name, specs) in enumerate(SECTIONS.items())
        ],
        settings=ws.WorkspaceSettings(max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=filters,
            groupby=[ws.Metric("Group")],
            order=[ws.Ordering(ws.Summary(SUMMARY[0]), ascending=True)],
            pinned_columns=["run:state", *columns, *(f"summary:{key}" for key in SUMMARY)],
        ),
    )


def panel(kind: str, **spec: Any) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if "columns" in spec:
        keys = [wr.Config(k[7:]) if k.startswith("config.") else wr.SummaryMetric(k) for k in spec["columns"]]
        spec["columns"] = [wr.ParallelCoordinatesPlotColumn(metric=key) for key in keys]
    return getattr(wr, kind)(**spec)


if __name__ == "__main__":
    guard(main)
