"""The runs of a sweep, from a file of configs/sweep or from the command line.

A sweep is a list of command lines in Hydra's grammar for several values: what one would type behind
`scripts/train.py --multirun`. Each stands for the product of its lists; runs that stand in two are one.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..cli import composed_each, explain, key_of, unreadable
from ..errors import ConfigError
from ..training.identity import identity

TEXTS = ("title", "runs", "unknown", "figures: title")  # what a file of configs/sweep says in text


@dataclass
class SweepFile:
    """A file of configs/sweep."""

    title: str = MISSING
    runs: list[str] = MISSING  # command lines
    gpus: int = 8  # of each run
    figures: list[dict[str, Any]] = field(default_factory=list)  # of the report: see reporting/figures.py
    unknown: list[str] = field(default_factory=list)  # what the paper does not say, and what stands here instead


@dataclass
class Planned:
    """One run."""

    id: str  # its folder, below runs_dir
    overrides: list[str]
    cfg: DictConfig


def open_sweep_file(configs: Path, name: str) -> SweepFile:
    """Raises ConfigError for one that does not exist or is none."""
    path = configs / "sweep" / f"{name}.yaml"
    if not path.is_file():
        known = sweep_names(configs)
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean sweep={near[0]}?" if near else f"choose one of {', '.join(known)}"
        raise ConfigError(f"there is no sweep {name}; {hint}")
    try:
        held = OmegaConf.load(path)
        require_text(path, OmegaConf.to_container(held))
        sweep: Any = OmegaConf.merge(OmegaConf.structured(SweepFile), held)
        return OmegaConf.to_object(sweep)  # type: ignore[return-value]
    except (OmegaConfBaseException, YAMLError) as e:
        raise ConfigError(f"{path}: {explain(e, None)}") from None


def require_text(path: Path, held: Any) -> None:
    """Raise ConfigError where YAML reads something else: a colon makes a line a mapping, which OmegaConf takes, as it
    takes numbers for text."""
    if not isinstance(held, dict) or not {"title", "runs"} <= held.keys():
        raise ConfigError(f"{path}: a sweep needs both title: TEXT and runs: [COMMAND LINE, ...]; write them")
    lists = {key: held[key] if isinstance(held[key], list) else [held[key]] for key in held}
    for figure in lists.get("figures", ()):
        if not isinstance(figure, dict):
            raise ConfigError(f"{path}: figures: {figure!r} has no kind; write {{kind: {figure}}}")
    titles = [figure["title"] for figure in lists.get("figures", ()) if "title" in figure]
    for key, texts in {**lists, "figures: title": titles}.items():
        if wrong := [text for text in texts if key in TEXTS and not isinstance(text, str)]:
            raise ConfigError(f"{path}: {key}: {wrong[0]!r} is not text; put the whole line in quotes")


def sweep_names(configs: Path) -> list[str]:
    folder = configs / "sweep"
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def plan(configs: Path, commands: list[list[str]], overrides: list[str]) -> list[Planned]:
    """The runs of these command lines, in their order, each with the overrides on top.

    Raises ConfigError, in one line, when one of them could not be run.
    """
    lines = [line for command in commands for line in expand(merge(command, overrides))]
    runs: dict[str, Planned] = {}
    for line, cfg in zip(lines, composed_each(configs, lines), strict=True):
        id = f"{identity(cfg)}/seed{cfg.seed}"
        runs.setdefault(id, Planned(id, [o for o in line if key_of(o) != "runs_dir"], cfg))
    if not runs:
        raise ConfigError("this sweep has no runs; type experiment=A,B seed=0,1")
    return list(runs.values())


def split(command: str) -> list[str]:
    """A command line as arguments."""
    try:
        return shlex.split(command)
    except ValueError as e:
        raise ConfigError(f"{command!r} cannot be read ({e}); close its quotes") from None


def merge(command: list[str], overrides: list[str]) -> list[str]:
    """The command line, a key that the overrides give too being theirs."""
    given = {key_of(override) for override in overrides}
    return [argument for argument in command if key_of(argument) not in given] + overrides


def expand(command: list[str]) -> Iterator[list[str]]:
    """One command line for each combination of the values of one in Hydra's grammar."""
    try:
        parsed = OverridesParser.create().parse_overrides(command)
    except OverrideParseException as e:
        raise ConfigError(unreadable(e.override)) from None
    choices = []
    for argument, override in zip(command, parsed, strict=True):
        if override.is_discrete_sweep():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        elif override.is_sweep_override():
            raise ConfigError(f"{argument} is an interval; type values, such as KEY=A,B, or KEY=range(0,5)")
        else:
            choices.append([argument])
    return (list(values) for values in product(*choices))
