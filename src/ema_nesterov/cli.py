"""Command lines: what the user can mend ends in one line and exit code 2."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError, UserError

BAD_INPUT = 2


def guard(main: Callable[[], object], configs: Path | None = None) -> None:
    """Run a main function; an error that the user can mend becomes one line on stderr and exit code 2.

    configs: the folder that a Hydra main composes from, where the nearest valid key is looked for. What
    such a main raises is Hydra's complaint about the command line or the configs: its body is a `job`.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; type the same command to go on", file=sys.stderr)
        sys.exit(130)
    except UserError as e:
        fail(str(e))
    except Exception as e:
        if configs is None:
            raise
        fail(explain(e, configs))


def job(run: Callable[[DictConfig], int], cfg: DictConfig) -> None:
    """The body of a Hydra main: exits with the code that `run` returns, unless that is 0."""
    try:
        code = run(cfg)
    except UserError as e:
        fail(str(e))
    except Exception:  # a defect or a machine's failure: all of it is shown
        traceback.print_exc()
        code = 1
    if code:
        sys.exit(code)


def fail(message: str) -> NoReturn:
    """Print the one line and exit. Rank 0 goes first: torchrun ends the others as soon as one exits."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(5)
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(BAD_INPUT)


def parse(schema: type, arguments: list[str]) -> Any:
    """KEY=VALUE arguments as an instance of a dataclass. Raises ConfigError for an unknown key or a bad value."""
    defaults = OmegaConf.structured(schema)
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is not KEY=VALUE; the keys are {', '.join(map(str, defaults))}")
        if key not in defaults:
            raise ConfigError(f"unknown key {key}; {suggest(key, map(str, defaults))}")
    try:
        return OmegaConf.to_object(OmegaConf.merge(defaults, OmegaConf.from_dotlist(arguments)))
    except OmegaConfBaseException as e:
        raise ConfigError(explain(e, None)) from None


def explain(error: Exception, configs: Path | None) -> str:
    """Hydra's or OmegaConf's complaint in one line, with the nearest valid key or option."""
    text, cause = str(error), error.__cause__
    while cause is not None:
        text, cause = f"{text}\n{cause}", cause.__cause__
    full_key = re.search(r"full_key: (\S+)", text)
    if configs is not None:
        override = re.search(r"Could not override '([^']+)'", text)
        if re.search(r"Key '.*' is not in struct|Key '.*' not in '|No match in the defaults list", text):
            found = override or full_key
            if found:
                return unknown_key(found[1].split("@")[0], configs)
        if missing := re.search(r"Could not (?:find|load) '([^']+)'", text):
            return unknown_option(missing[1], configs)
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith(("    ", "See http"))]
    first, reason = lines[0], lines[-1]
    if full_key and full_key[1] not in first:
        first = f"{full_key[1]}: {first}"
    return first if reason in first else f"{first}: {reason}"


def unknown_key(key: str, configs: Path) -> str:
    """Name the valid key nearest to one that does not exist."""
    overrides = [a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]
    if key not in map(key_of, overrides):  # it stands in a file, for a group that another choice replaced
        group = key.partition(".")[0]
        return f"the experiment sets {key}, which the chosen {group} does not have; choose an experiment made for it"
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configs.resolve()), version_base="1.3"):
        try:
            cfg = compose("train", [o for o in overrides if key_of(o) != key])
        except (HydraException, OmegaConfBaseException):
            cfg = compose("train")
    groups = [p.name for p in configs.iterdir() if p.is_dir()]
    return f"unknown key {key}; {suggest(key, [*keys(cfg), *groups])}"


def unknown_option(option: str, configs: Path) -> str:
    """Name the option nearest to one that does not exist, e.g. model/tinny."""
    group, _, name = option.partition("/")
    options = [str(p.relative_to(configs / group).with_suffix("")) for p in (configs / group).rglob("*.yaml")]
    if not options:
        return f"unknown config {option}; see --help"
    near = get_close_matches(name, options, n=1)
    hint = f"did you mean {group}={near[0]}?" if near else f"choose one of {', '.join(sorted(options))}"
    return f"unknown option {group}={name}; {hint}"


def suggest(key: str, valid: Iterable[str]) -> str:
    """A hint that names the valid key most like this one: as a whole, or in its last part."""
    valid = list(valid)
    group, _, name = key.rpartition(".")
    inside = [v for v in valid if group and v.startswith(f"{group}.")]  # a group that exists is what was meant
    last = {v.rpartition(".")[2]: v for v in reversed(inside or valid)}
    near = get_close_matches(key, valid, n=1, cutoff=0.8)
    if near := near or [last[n] for n in get_close_matches(name, last, n=1, cutoff=0.7)]:
        return f"did you mean {near[0]}?"
    siblings = [v.rpartition(".")[2] for v in valid if v.rpartition(".")[0] == group]
    return f"{group or 'this command'} has {', '.join(siblings)}" if siblings else "--help lists the keys"


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").split("@")[0]


def keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """All keys of a config, dotted."""
    found: list[str] = []
    for key in map(str, cfg):
        found.append(f"{prefix}{key}")
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            found += keys(node, f"{prefix}{key}.")
    return found
