"""Bringing data from the Hugging Face hub: the real clients, in processes of their own, against a local hub."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ema_nesterov.data.manifest import load_manifest
from ema_nesterov.data.shards import write_shard
from tests.conftest import ROOT
from tests.data.hub import hub
from tests.data.texts import documents, tokens, write_c4

TOKENS, VAL, TRAIN = "us/tokens", "x_val_000000.bin", "x_train_%06d.bin"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository of one validation shard, too small for LFS, and three training shards of different sizes."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, size in (
        ("val_000000", 9),
        ("train_000001", 10_000),
        ("train_000002", 20_000),
        ("train_000003", 6_000_000),
    ):
        write_shard(folder / f"x_{name}.bin", rng.integers(0, 50257, size))
    others = {"README.md": b"# Tokens", "old/x_train_000000.bin": b"old"}  # no shards at the top
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} | others


def without_hub() -> dict[str, str]:
    """The environment, but what the hub's client or a proxy reads of it."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "PROXY" not in k.upper()}


def python(code: str, endpoint: str, home: Path, **env: str) -> Any:
    """What the code, in a process whose hub is the endpoint, assigns to `out`: or the line of its DataError."""
    script = f"""
import json, time
from pathlib import Path
from ema_nesterov.data.preparation.fetch import fetch_shards, list_files
from ema_nesterov.errors import DataError
def refused(function, *args):
    try:
        return function(*args)
    except DataError as e:
        return str(e)
{code}
print(json.dumps(out))
"""
    env = {**without_hub(), "HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), **env}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def held(folder: Path) -> dict[str, str]:
    return hashes({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})


def some(shards: dict[str, bytes], *numbers: int) -> dict[str, str]:
    return hashes({name: shards[name] for name in (VAL, *(TRAIN % i for i in numbers))})


def test_the_first_shards_are_brought_once_and_whole(tmp_path: Path, shards: dict[str, bytes]) -> None:
    with hub({TOKENS: shards}) as server:
        code = f"out = [fetch_shards('{TOKENS}', Path('data'), 2) for _ in range(2)]"
        first, second = python(code, server.endpoint, tmp_path)
        assert held(tmp_path / "data") == some(shards, 1, 2)
        # the validation shard is too small for LFS, and the hub hashes nothing else
        assert first == second == some(shards, 1, 2) | {VAL: ""}
        assert server.downloads() == [TRAIN % 1, TRAIN % 2, VAL]


def test_a_shard_of_another_size_is_brought_again_and_one_put_there_by_hand_is_kept(
    tmp_path: Path, shards: dict[str, bytes]
) -> None:
    put = {TRAIN % 1: b"0" * len(shards[TRAIN % 1]), "x_other.bin": b"mine", "notes.txt": b"mine"}
    (tmp_path / "data").mkdir()
    for name, content in {**put, VAL: shards[VAL][:-2], TRAIN % 2: shards[TRAIN % 2] + b"more"}.items():
        (tmp_path / "data" / name).write_bytes(content)
    with hub({TOKENS: shards}) as server:
        code = f"""
fetch_shards('{TOKENS}', Path('data'))
Path('data/{TRAIN % 3}').write_bytes(b'damaged since')
out = fetch_shards('{TOKENS}', Path('data'))
"""
        python(code, server.endpoint, tmp_path)
        assert held(tmp_path / "data") == some(shards, 1, 2, 3) | hashes(put)
        assert server.downloads() == [TRAIN % 2, TRAIN % 3, TRAIN % 3, VAL]


def test_a_drop_is_resumed_and_a_broken_download_is_completed_by_the_next_call(
    tmp_path: Path, shards: dict[str, bytes]
) -> None:
    with hub({TOKENS: shards}) as server:
        server.fail_after = 11_000_000
        python(f"out = fetch_shards('{TOKENS}', Path('resumed'))", server.endpoint, tmp_path)
        assert held(tmp_path / "resumed") == some(shards, 1, 2, 3)
        assert f"{TRAIN % 3} bytes=10485760-" in server.downloads()  # the client keeps chunks of 10 MiB

        server.failures, server.reset = 1, True
        code = f"""
out = [refused(fetch_shards, '{TOKENS}', Path('data'))]
Path('data/{TRAIN % 1}').write_bytes(b'damaged, and the client remembers that it brought it')
out.append(refused(fetch_shards, '{TOKENS}', Path('data')))
"""
        first, second = python(code, server.endpoint, tmp_path)
        assert first.startswith(f"the download of {TOKENS} into data broke off (ReadError")
        assert first.endswith("; type the same command again to go on")
        assert held(tmp_path / "data") == some(shards, 1, 2, 3)
        assert second == some(shards, 1, 2, 3) | {VAL: ""}
        assert server.downloads() == [TRAIN % 1, TRAIN % 1, TRAIN % 2, TRAIN % 3, TRAIN % 3, VAL]
        assert not list((tmp_path / "data").rglob("*.incomplete"))


@pytest.mark.parametrize(("offline", "reason"), [("0", "ConnectError: "), ("1", "OfflineModeIsEnabled: ")])
def test_a_hub_that_cannot_be_reached_is_one_line_at_once(tmp_path: Path, offline: str, reason: str) -> None:
    code = f"""
began = time.monotonic()
out = [refused(fetch_shards, '{TOKENS}', Path('data')), refused(list_files, 'us/text', 'en/*')]
out.append(time.monotonic() - began)
"""
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        *lines, seconds = python(code, endpoint, tmp_path, HF_HUB_OFFLINE=offline)
    unreachable = "cannot be reached on the Hugging Face hub (" + reason
    assert lines[0].startswith(f"{TOKENS} {unreachable}")
    assert lines[0].endswith("); bring its shards into data by other means and type the same command again")
    assert lines[1].startswith(f"us/text {unreachable}")
    assert "HF_HUB_OFFLINE" in lines[0] or offline == "0"
    assert seconds < 5
    assert not (tmp_path / "data").exists()


def test_what_the_repository_or_the_disk_cannot_give_is_one_line(tmp_path: Path, shards: dict[str, bytes]) -> None:
    (tmp_path / "file").touch()
    code = f"""
import resource
out = [
    refused(fetch_shards, 'us/unknown', Path('data')),
    refused(fetch_shards, 'us/no/name', Path('data')),
    refused(list_files, 'us/unknown', 'en/*.json.gz'),
    refused(fetch_shards, '{TOKENS}', Path('data'), 4),
    refused(fetch_shards, 'us/train', Path('data')),
    refused(list_files, '{TOKENS}', 'en/*.json.gz'),
    refused(list_files, '{TOKENS}', 'old/*.json.gz'),
    refused(fetch_shards, '{TOKENS}', Path('file/data')),
]
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
out.append(refused(fetch_shards, '{TOKENS}', Path('data')))
"""
    with hub({TOKENS: shards, "us/train": {TRAIN % 1: b""}}) as server:
        lines = python(code, server.endpoint, tmp_path)
    assert lines == [
        "no public dataset us/unknown on the Hugging Face hub; type OWNER/NAME of one",
        "no public dataset us/no/name on the Hugging Face hub; type OWNER/NAME of one",
        "no public dataset us/unknown on the Hugging Face hub; type OWNER/NAME of one",
        f"{TOKENS} holds 3 shards *_train_*.bin; type at most 3",
        "us/train holds 0 shards *_val_*.bin; type another repository",
        f"{TOKENS} holds no files en/*.json.gz on the Hugging Face hub; type another pattern",
        f"{TOKENS} holds no files old/*.json.gz on the Hugging Face hub; type another pattern",
        "cannot write dataset folder file/data: Not a directory; make room or name another",
        "cannot write dataset folder data: File too large; make room or name another",
    ]


def test_texts_are_streamed_from_the_listed_addresses(tmp_path: Path) -> None:
    documents = [f"Document {i}, with ünïcode." * 9 for i in range(60)]
    c4, fineweb = {}, {}
    for i in range(3):
        rows = [{"text": text, "url": "a"} for text in documents[20 * i : 20 * i + 20]]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        c4[f"en/c4-train.{i:05d}-of-01024.json.gz"] = gzip.compress(lines.encode())
        pq.write_table(pa.Table.from_pylist(rows), buffer := io.BytesIO())
        fineweb[f"sample/10BT/{i:03d}_00000.parquet"] = buffer.getvalue()
    other = {"en/c4-validation.00000-of-00008.json.gz": b"", "sample/100BT/000_00000.parquet": b"", "README.md": b"#"}
    code = """
import datasets
out = []
assert len(list_files('us/text', '*0000*')) == 8 and list_files('us/text', '*.md')[0].endswith('/README.md')
for kind, pattern in (('json', 'en/c4-train.*.json.gz'), ('parquet', 'sample/10BT/*.parquet')):
    files = list_files('us/text', pattern)
    rows = datasets.load_dataset(kind, data_files=files, split='train', streaming=True)
    out.append([files, [row['text'] for row in rows]])
"""
    with hub({"us/text": c4 | fineweb | other}) as server:
        for (files, texts), contents in zip(python(code, server.endpoint, tmp_path), (c4, fineweb), strict=True):
            assert texts == documents
            (revision,) = {file.split("@")[1].split("/")[0] for file in files}
            assert len(revision) == 40
            assert files == [f"hf://datasets/us/text@{revision}/{path}" for path in contents]


def test_the_commands_bring_public_shards_and_c4_from_the_hub(tmp_path: Path, t5: Path) -> None:
    """prepare_data.py as it is typed; what the hub has is compared with what lies in the folders."""
    texts = documents(60)
    write_c4(tmp_path / "en", [texts[:40]], [texts[40:]])
    for i, split in enumerate(("val", "train")):
        write_shard(tmp_path / f"fineweb_{split}_00000{i}.bin", np.arange(3000) + i)
    public = {path.name: path for path in tmp_path.glob("fineweb_*.bin")}
    c4 = {f"en/{path.name}": path for path in (tmp_path / "en").iterdir()}
    repos = {"kjj0/fineweb10B-gpt2": public, "allenai/c4": c4}

    def prepare(endpoint: str, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "PROXY" not in k.upper()
        }
        environment = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")}
        script, folder = str(ROOT / "scripts" / "prepare_data.py"), tmp_path / "out" / name
        command = [sys.executable, script, f"dataset={name}", f"dataset.path={folder}", *overrides]
        return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=120)

    with hub(repos) as server:
        for name, *overrides in (
            ("fineweb",),
            ("c4", f"dataset.tokenizer={t5}", "dataset.processes=1"),
        ):
            done = prepare(server.endpoint, name, *overrides)
            assert done.returncode == 0, done.stderr
    brought = tmp_path / "out" / "fineweb"
    assert {p.name: p.read_bytes() for p in brought.glob("*.bin")} == {n: p.read_bytes() for n, p in public.items()}
    assert load_manifest(brought) is not None
    assert len(tokens(tmp_path / "out" / "c4", "train")) == 40 * 256
    gone = prepare(server.endpoint, "c4_packed", f"dataset.tokenizer={t5}")
    assert (gone.returncode, gone.stderr.count("\n")) == (2, 1)
    assert "allenai/c4 cannot be reached on the Hugging Face hub" in gone.stderr
