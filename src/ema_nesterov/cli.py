"""Command lines: what the user can mend ends in one line and exit code 2."""

from __future__ import annotations

import copy
import csv
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import reduce
from io import TextIOWrapper
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from .config import check, check_secrets
from .errors import ConfigError, UserError

BAD_INPUT = 2
NO_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}
# Hydra's own keys as configs/train.yaml sets them. It instantiates what stands under some of them, and runs what
# stands in a logging config; others write elsewhere.
FIXED: dict[str, Any] = {
    "launcher._target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "sweeper._target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    **{"callbacks": {}, "searchpath": [], "hydra_logging": NO_LOGGING, "job_logging": NO_LOGGING},
    **{"run.dir": ".", "sweep.dir": "${runs_dir}", "sweep.subdir": ".", "output_subdir": None},
    **{"job.chdir": False, "job.env_set": {}, "job.env_copy": []},
}
# What a value must be, by what OmegaConf says of one that is not; {key} is its key
WANTED = {
    "could not be converted to Integer": "must be a whole number",
    "could not be converted to Float": "must be a number",
    "is not a valid bool": "must be true or false",
    "is not Optional": "must have a value, not null",
    r"Cannot convert '\w+' to string": "must be text",
    "NoneType is not a subclass of str": "must hold text, not null",
    "is not a ListConfig|Cannot merge DictConfig with ListConfig": "must be a list, such as {key}=[A,B]",
    "is not a subclass of|Cannot assign": "sets a whole group; type {key}.KEY=VALUE for one of its keys",
    "does not support deletion": "would take away a key that is needed; type {key}=VALUE to change it",
}


def guard(main: Callable[[], object], configs: Path | None = None) -> None:
    """Run a main function; an error that the user can mend becomes one line on stderr and exit code 2.

    configs: the folder that a Hydra main composes from, where the nearest valid key is looked for. What
    such a main raises is Hydra's complaint about the command line or the configs: its body is a `job`.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of what the locale cannot hold, as stderr has it
    try:
        if configs is None:
            main()
        else:
            read_arguments(sys.argv[1:])
            with watched_composition():
                main()
    except KeyboardInterrupt:
        print("interrupted; type the same command to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # | head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
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
    if os.environ.get("RANK", "0").strip("0").isdigit():
        time.sleep(5)
    line = re.sub(r"\s*\n\s*", " ", message.strip())
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(BAD_INPUT)


# --- what Hydra is given, and what it makes of it -------------------------------------------------


def read_arguments(arguments: list[str]) -> None:
    """Raise ConfigError for what Hydra would answer with its usage, or take as leave to run what it is given."""

    def refuse(message: str) -> NoReturn:
        misplaced = "unrecognized" in message and "=" in message
        advice = "type flags such as -m behind all KEY=VALUE" if misplaced else "--help shows what can be typed"
        raise ConfigError(f"{message}; {advice}")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    given = parser.parse_args(arguments)
    if given.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun would run what a pickle holds; type the run's own command, it resumes")
    if given.config_path is not None or given.config_name not in (None, "train"):
        raise ConfigError("--config-path and --config-name are fixed; type --config-dir=FOLDER to add configs of yours")
    for override in given.overrides:
        key = key_of(override)
        if not key.strip() or ("=" not in override and not override.startswith("~")):
            raise ConfigError(f"{override!r} is not KEY=VALUE; --help shows the keys")
        if re.match(r"hydra[./]", key):
            raise ConfigError(f"{key} is Hydra's own and fixed here; leave it out")


@contextmanager
def watched_composition() -> Iterator[None]:
    """Every config that Hydra composes within is looked at before Hydra acts on it: files can set all that
    command lines can. And flags alone say whether to run or to sweep: Hydra composes all once more to ask a file."""
    load, mode = ConfigLoaderImpl.load_configuration, Hydra.get_mode

    def watched(
        self: ConfigLoaderImpl, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> DictConfig:
        cfg = load(self, config_name, overrides, *args, **kwargs)
        if config_name is not None:  # None: Hydra's own help
            refuse_foreign(cfg)
            refuse_altered(cfg, OverridesParser.create().parse_overrides(overrides))
            check_secrets(cfg)
        return cfg

    patched: Any = ConfigLoaderImpl, Hydra
    patched[0].load_configuration, patched[1].get_mode = watched, lambda *args, **kwargs: None
    try:
        yield
    finally:
        patched[0].load_configuration, patched[1].get_mode = load, mode


def composed(configs: Path, overrides: list[str]) -> DictConfig:
    """What train.py would train. Raises ConfigError in one line."""
    return next(composed_each(configs, [overrides]))


def composed_each(configs: Path, commands: Iterable[list[str]]) -> Iterator[DictConfig]:
    """What train.py would train with each of these command lines. The files are composed once for each choice of
    groups, as that takes a second, and the values set on top. Raises ConfigError in one line."""
    chosen: dict[tuple[str, ...], DictConfig] = {}
    groups = {path.name for path in configs.iterdir() if path.is_dir()}
    for command in commands:
        read_arguments(command)
        choices = tuple(o for o in command if key_of(o) in groups or "@" in o.partition("=")[0])
        try:
            values = OverridesParser.create().parse_overrides([o for o in command if o not in choices])
            if choices not in chosen:
                GlobalHydra.instance().clear()
                with watched_composition(), initialize_config_dir(str(configs), version_base="1.3"):
                    chosen[choices] = compose("train", list(choices))
            cfg = copy.deepcopy(chosen[choices])
            ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
            refuse_altered(cfg, values)
        except UserError:
            raise
        except Exception as e:
            raise ConfigError(explain(e, configs)) from None
        check(cfg)
        yield cfg


def refuse_foreign(cfg: DictConfig) -> None:
    """Raise ConfigError where a config would have Hydra run or import something, or write elsewhere."""
    held: Any = OmegaConf.to_container(cfg.hydra)
    for key, fixed in FIXED.items():
        if reduce(lambda node, part: node[part], key.split("."), held) != fixed:
            raise ConfigError(f"a config sets hydra.{key}, which is fixed here; take it out of the file")


def refuse_altered(cfg: DictConfig, given: list[Override]) -> None:
    """Raise ConfigError for text that Hydra would alter: it strips spaces, and takes 1e3 for 1000.0."""
    for override in given:
        key, _, typed = (override.input_line or "").partition("=")
        group, _, name = override.key_or_group.rpartition(".")
        parent = OmegaConf.select(cfg, group) if group else cfg
        node: Any = parent._get_node(name, validate_access=False) if isinstance(parent, DictConfig) else None
        text = node._metadata.element_type is str if isinstance(node, ListConfig) else isinstance(node, StringNode)
        if not text:
            continue
        value = override.value()
        if isinstance(value, str | bool | int | float):
            if str(value) != typed and not isinstance(override._value, QuotedString):
                raise ConfigError(f"{typed!r} would become {str(value)!r}; {quoting(key, typed)}")
        else:
            items = getattr(value, "list", value)  # of a sweep
            parts = re.split(r"[\s,\[\]()]+", typed)
            for item in items if isinstance(items, list) else ():
                if isinstance(item, bool | int | float) and str(item) not in parts:
                    raise ConfigError(f"{key}={typed} would give {str(item)!r}; quote each text within it, such as 'A'")


def arguments(schema: type, doc: str | None) -> Any:
    """The command line's KEY=VALUE as an instance of a dataclass; --help prints the doc and ends."""
    if {"-h", "--help"} & set(sys.argv):
        print(doc)
        sys.exit()
    return parse(schema, sys.argv[1:])


def parse(schema: type, arguments: list[str]) -> Any:
    """KEY=VALUE arguments as an instance of a dataclass. Text is what stands behind the first =, to the letter.
    Raises ConfigError for an unknown key or a bad value."""
    kinds = get_type_hints(schema)
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is not KEY=VALUE; the keys are {', '.join(kinds)}")
        if key not in kinds:
            raise ConfigError(f"unknown key {key}; {suggest(key, kinds)}")
        try:
            text.encode()
            values[key] = value_of(kinds[key], text)
        except UnicodeEncodeError:
            encoding = sys.getfilesystemencoding()
            raise ConfigError(f"{argument!r} is no text in {encoding}, the encoding of this locale") from None
        except ValueError as e:
            raise ConfigError(f"{argument if text else key + '='} must be {e}") from None
    return schema(**values)


def value_of(kind: Any, text: str) -> Any:
    """Text as a value of this type: str, bool, int, float, a list of one of these, or one of all these and None.
    Raises ValueError with what it must be."""
    if isinstance(kind, UnionType):
        (wanted,) = (part for part in get_args(kind) if part is not NoneType)
        if wanted is str and not text:
            raise ValueError("text, or left out")
        return None if text == "null" and wanted is not str else value_of(wanted, text)
    if get_origin(kind) is list:
        (each,) = get_args(kind)
        return [value_of(each, item) for item in items_of(text)]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError("a whole number" if kind is int else "a number") from None


def items_of(text: str) -> list[str]:
    """Of a list such as [A,'B, C']; without brackets, it is one of one item."""
    if not text.startswith("["):
        return [text]
    try:
        inner = [text[1:-1]] if text.endswith("]") else []
        (items,) = csv.reader(inner, quotechar="'", skipinitialspace=True, strict=True)
        return items
    except (csv.Error, ValueError):
        raise ValueError("a list, such as [A,'B, C']") from None


# --- complaints -----------------------------------------------------------------------------------


def explain(error: Exception, configs: Path | None) -> str:
    """Hydra's or OmegaConf's complaint in one line, with what to type instead where that is known."""
    text, cause = str(error), error.__cause__
    while cause is not None:
        text, cause = f"{text}\n{cause}", cause.__cause__
    if isinstance(error, OverrideParseException):
        return unreadable(error.override)
    full_key = re.search(r"full_key: (\S+)", text)
    override = re.search(r"Error merging override (.*)", text)
    key = key_of(override[1]) if override else full_key[1] if full_key else ""
    for pattern, wanted in WANTED.items():
        if key and re.search(pattern, text):
            file = re.search(r"In '([^']+)'", text)
            return f"{override[1] if override else key} {wanted.format(key=key)}" + (f" (in {file[1]})" if file else "")
    if missing := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{missing[1]} has no value; type {missing[1]}=VALUE"
    if configs is not None and (known := explain_choice(text, full_key[1] if full_key else None, configs)):
        return known
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith(("    ", "See http"))]
    first, reason = (lines or [type(error).__name__])[0], (lines or [""])[-1]
    if full_key and full_key[1] not in first:
        first = f"{full_key[1]}: {first}"
    return first if reason in first else f"{first}: {reason}"


def unreadable(override: str) -> str:
    """Of an argument that is not in Hydra's grammar."""
    key, _, value = override.partition("=")
    if not re.fullmatch(r"[+~]*[A-Za-z_][\w/-]*(\.[A-Za-z_]\w*)*(@[\w.:]*)?", key, re.ASCII):
        return f"{key!r} in {override!r} is no key; type KEY=VALUE, such as steps=100 or optimizer.lr=0.01"
    return f"the value of {override!r} cannot be read; {quoting(key, value)}"


def quoting(key: str, value: str) -> str:
    """How to give Hydra a text to the letter, typed in a shell."""
    if "\n" in value:
        return "leave out the line end"
    if value[:1] in ("'", '"') and value[:1] == value[1:][-1:]:
        value = value[1:-1]
    argument = quoted(key, value)
    typed = shlex.quote(argument) if re.search(r'["$`!]|\\\\', argument) else f'"{argument}"'
    return f"quote it within the argument: {typed}"


def quoted(key: str, value: str) -> str:
    """KEY=VALUE in Hydra's grammar, the value being this text."""
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}"


def explain_choice(text: str, full_key: str | None, configs: Path) -> str | None:
    """Of keys and options that do not exist, or cannot be chosen so."""
    override = re.search(r"Could not override '([^']+)'", text)
    if override and "@" in override[1]:
        return f"{override[1]} cannot be chosen; type {override[1].split('@')[0]}=OPTION"
    if re.search(r"Key '.*' is not in struct|Key '.*' not in '|No match in the defaults list", text):
        found = override[1] if override else full_key
        if found:
            return unknown_key(found, configs)
    if missing := re.search(r"Could not (?:find|load) '([^']+)'", text):
        return unknown_option(missing[1], configs)
    if "Config group override must be" in text:
        for group, value in (o.split("=", 1) for o in overrides()):
            if (configs / group).is_dir() and not (configs / group / f"{value}.yaml").exists():
                return unknown_option(f"{group}/{value}", configs)
    if twice := re.search(r"Multiple values for (\S+)\..*?: (\S+?)'", text):
        return f"{twice[1]} is chosen already; type {twice[1]}={twice[2]}, without +"
    if there := re.search(r"An item is already at '([^']+)'", text):
        return f"{there[1]} exists already; type {there[1]}=VALUE, once and without +"
    if several := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{several[1]} gives several values; type one, or --multirun behind all to run each"
    return None


def unknown_key(key: str, configs: Path) -> str:
    """Name the valid key nearest to one that does not exist."""
    if key == "experiment":
        return "the file of the experiment is empty, or does not begin with the line # @package _global_"
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configs.resolve()), version_base="1.3"):
        try:
            cfg = compose("train", [o for o in overrides() if key_of(o) != key])
        except (HydraException, OmegaConfBaseException):
            cfg = compose("train")
    if key == "sweep":
        return "sweep= belongs to another script; type python scripts/sweep.py run sweep=NAME"
    groups = [p.name for p in configs.iterdir() if p.is_dir()]
    valid, group = [*keys(cfg), *groups], key.partition(".")[0]
    if key in groups:
        return f"{key} is a group; type {key}=OPTION, or {key}.KEY=VALUE for one of its keys"
    if key not in map(key_of, overrides()) and group in groups:  # it stands in a file, for a group that was replaced
        return f"the experiment sets {key}, which the chosen {group} does not have; choose an experiment made for it"
    if key in valid:
        return f"{key} does not go with the other arguments; leave it or one of them out"
    return f"unknown key {key}; {suggest(key, valid)}"


def unknown_option(option: str, configs: Path) -> str:
    """Name the option nearest to one that does not exist, e.g. model/tinny, or the shortest that begins with it."""
    group, _, name = option.partition("/")
    options = [str(p.relative_to(configs / group).with_suffix("")) for p in (configs / group).rglob("*.yaml")]
    if not options:
        return f"unknown config {option}; see --help"
    begun = sorted((option for option in options if name and option.startswith(name)), key=lambda o: (len(o), o))
    near = begun or get_close_matches(name, options, n=1)
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


def overrides() -> list[str]:
    """Those of the command line."""
    return [a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]


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
