"""Command lines around Hydra: what the user can mend ends in one line and exit code 2."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from .errors import UserError

BAD_INPUT = 2


def guard(main: Callable[[], object], configs: Path) -> None:
    """Run a Hydra main; turn its errors, and ours, into one line on stderr and exit code 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print
    try:
        main()
    except UserError as e:
        fail(str(e))
    except (HydraException, OmegaConfBaseException) as e:
        fail(explain(e, configs))


def fail(message: str) -> None:
    """Print the one line and exit. Rank 0 goes first: torchrun ends the others as soon as one exits."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(5)
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(BAD_INPUT)


def explain(error: Exception, configs: Path) -> str:
    """Hydra's complaint in one line, with the nearest valid key or option."""
    text = str(error)
    while error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
        text += "\n" + str(error)
    if m := re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '[^']+' (?:is )?not in .*?full_key: (\S+)", text, re.S):
        if "is not in struct" in text or "not in" in text or "No match in the defaults list" in text:
            return unknown_key(m[1].split("@")[0], configs)
    if m := re.search(r"(?:Could not find|Could not load|In '.*?': Could not find) '([^']+)'", text):
        return unknown_option(m[1], configs)
    key = re.search(r"full_key: (\S+)", text)
    first = text.strip().split("\n")[0]
    return f"{key[1]}: {first}" if key else first


def unknown_key(key: str, configs: Path) -> str:
    """Names the key nearest to one that does not exist."""
    overrides = [a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]
    valid = flatten(composed([o for o in overrides if key_of(o) != key], configs))
    valid += [p.name for p in configs.iterdir() if p.is_dir()]
    last = key.rpartition(".")[2]
    near = get_close_matches(key, valid, n=1, cutoff=0.7) or [
        v for name in get_close_matches(last, [v.rpartition(".")[2] for v in valid], n=1) for v in valid if v.endswith(name)
    ]
    hint = f"did you mean {near[0]}?" if near else "see --cfg job for the keys"
    return f"unknown key {key}; {hint}"


def unknown_option(option: str, configs: Path) -> str:
    """Names the option nearest to one that does not exist, e.g. model/tinny."""
    valid = [str(p.relative_to(configs).with_suffix("")) for p in configs.rglob("*.yaml")]
    group, _, name = option.partition("/")
    siblings = [v for v in valid if v.startswith(group + "/")]
    near = get_close_matches(option, siblings, n=1)
    shown = [v.partition("/")[2] for v in near or siblings]
    hint = f"did you mean {group}={shown[0]}?" if near else f"choose one of {', '.join(sorted(shown))}"
    return f"unknown option {group}={name}; {hint}" if siblings else f"unknown config {option}"


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").split("@")[0]


def composed(overrides: list[str], configs: Path) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configs.resolve()), version_base="1.3"):
        try:
            return compose("train", overrides)
        except (HydraException, OmegaConfBaseException):
            return compose("train")


def flatten(cfg: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in cfg:
        keys.append(f"{prefix}{key}")
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            keys += flatten(node, f"{prefix}{key}.")
    return keys
