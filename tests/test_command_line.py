"""The commands as they are typed, in processes of their own; tests/test_bad_input.py has all that they refuse."""

from __future__ import annotations

import runpy
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ema_nesterov.cli import parse, quoted
from ema_nesterov.errors import ConfigError
from tests.conftest import ROOT, composed, train_process


def test_bad_input_is_one_line_and_exit_code_2_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was loaded')", encoding="utf-8")
    done = train_process("lookahead.alhpa=0.5", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: unknown key lookahead.alhpa; did you mean lookahead.alpha?\n"
    assert not done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["torch.py"]


def test_under_torchrun_rank_0_says_it_once(tmp_path: Path) -> None:
    done = train_process("batch_size=15", f"runs_dir={tmp_path / 'runs'}", ranks=2)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: batch_size=15 does not divide over 2 ranks; type batch_size=16") == 1
    assert not (tmp_path / "runs").exists()


def printed(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / "train.py"), *arguments])
    GlobalHydra.instance().clear()
    with suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
    return capsys.readouterr().out


def test_help_names_the_groups_and_the_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = printed(["--help"], monkeypatch, capsys)
    for text in (
        "lookahead: ema_nesterov, gpa, lookahead, nala, nesterov, none, snoo",
        "experiment=quickstart/muon",
        "batch_size: 16",
        "--cfg job",
    ):
        assert text in told


def test_cfg_job_shows_the_config_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = printed(["experiment=quickstart/muon_ema_nesterov", "--cfg", "job"], monkeypatch, capsys)
    assert "ema_decay: 0.99" in told
    assert not list(tmp_path.iterdir())


# --- values ---------------------------------------------------------------------------------------


@dataclass
class Keys:
    text: str = "default"
    optional: str | None = None
    texts: list[str] = field(default_factory=list)
    whole: int = 0
    limit: int | None = 1
    number: float = 0.0
    numbers: list[float] = field(default_factory=list)
    flag: bool = False


@given(st.text())
@example("007")
@example("yes")
@example("null")
@example(" a  b ")
@example("a # b")
@example("a\nb\r\n")
@example("${oc.env:HOME}")
@example("a=b")
@example("'a'")
def test_text_is_what_stands_behind_the_first_equals_sign_to_the_letter(text: str) -> None:
    assert parse(Keys, [f"text={text}"]).text == text
    if text:
        assert parse(Keys, [f"optional={text}"]).optional == text
    if not text.startswith("["):
        assert parse(Keys, [f"texts={text}"]).texts == [text]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("texts=[]", []),
        ("texts=[a, b c,007]", ["a", "b c", "007"]),
        ("texts=['a, b',yes #1,it's]", ["a, b", "yes #1", "it's"]),
        ("texts=[é", "must be a list, such as [A,'B, C']"),
        ("texts=['a]", "must be a list"),
        ("texts=[a\nb]", "must be a list"),
        ("whole=-12", -12),
        ("whole=1e3", "whole=1e3 must be a whole number"),
        ("whole=null", "whole=null must be a whole number"),
        ("whole=${oc.env:HOME}", "must be a whole number"),
        ("whole=", "whole= must be a whole number"),
        ("limit=null", None),
        ("limit=3", 3),
        ("number=1e-3", 1e-3),
        ("number=fast", "number=fast must be a number"),
        ("numbers=[0.5, 1]", [0.5, 1.0]),
        ("numbers=0.5", [0.5]),
        ("numbers=[0.5, x]", "must be a number"),
        ("flag=true", True),
        ("flag=False", False),
        ("flag=perhaps", "flag=perhaps must be true or false"),
        ("optional=", "optional= must be text, or left out"),
    ],
)
def test_numbers_booleans_and_lists_are_read_as_their_type(argument: str, value: Any) -> None:
    if isinstance(value, str):
        with pytest.raises(ConfigError) as error:
            parse(Keys, [argument])
        assert value in str(error.value)
    else:
        assert getattr(parse(Keys, [argument]), argument.partition("=")[0]) == value


def schemas() -> dict[str, type]:
    """Those of all scripts that take KEY=VALUE, by the name of their module."""
    analyses = [f"ema_nesterov.analysis.{path.stem}" for path in (ROOT / "src/ema_nesterov/analysis").glob("[a-z]*.py")]
    modules = {name: import_module(name) for name in [*(p.stem for p in (ROOT / "scripts").glob("*.py")), *analyses]}
    return {name: module.Arguments for name, module in modules.items() if hasattr(module, "Arguments")}


def test_every_key_of_every_script_is_of_a_type_that_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    typed = {str: "a # 007 ${b} ", int: "7", float: "0.5", bool: "true"}
    found = schemas()
    assert {"generate", "evaluate", "export_hf", "report", "sweep", "bench_train", "sync_wandb"} <= set(found)
    for schema in found.values():
        for key, kind in get_type_hints(schema).items():
            (plain,) = (
                t for t in typed if t.__name__ in str(kind).replace("[", " ").replace("]", " ").split() or t is kind
            )
            value = getattr(parse(schema, [f"{key}={typed[plain]}"]), key)
            value = value[0] if isinstance(value, list) else value
            assert value == plain(typed[plain]), f"{schema.__module__}: {key}"


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="$", exclude_categories=("C", "Z")), min_size=1))
@example("/tmp/x #1")
@example(" it's ")
@example("a\\")
@example("1e3")
def test_a_quoted_value_arrives_in_the_config_to_the_letter(text: str) -> None:
    assert composed(quoted("runs_dir", text)).runs_dir == text
