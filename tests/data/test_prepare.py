"""Preparation: tokens as an independent tokenisation gives them, whatever stops it."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from tiktoken_ext import openai_public

from ema_nesterov.data.loader import TokenDataset
from ema_nesterov.data.manifest import load_manifest
from ema_nesterov.data.preparation import tokenise
from ema_nesterov.data.preparation.inspect import show, verify
from ema_nesterov.data.preparation.recipes import prepare_dataset
from ema_nesterov.data.preparation.sources import local_sources, read
from ema_nesterov.data.shards import open_shard
from ema_nesterov.data.tokenizers import encode_long, load_tokenizer, open_tokenizer
from ema_nesterov.errors import DataError
from tests.conftest import ROOT, composed

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd
from tests.data.texts import contents, documents, gpt2_stream, tokens, write_c4, write_parquet

pytestmark = pytest.mark.usefixtures("inline")


def prepare(*overrides: str):
    return prepare_dataset(composed("dataset.processes=1", *overrides).dataset)


def process(*arguments: str, **kwargs) -> subprocess.Popen[str]:
    """It hears Ctrl-C, which what a shell runs in the background does not."""
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *arguments]
    kwargs["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", **kwargs)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]], list[str]]:
    """A folder as a download of C4 leaves it."""
    train, val = [documents(600, 1), documents(450, 2)], documents(120, 3)
    return write_c4(tmp_path_factory.mktemp("raw") / "en", train, [val]), train, val


def test_rows_of_c4_are_what_transformers_makes_of_each_document(raw, t5: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder, train, val = raw
    prepare("dataset=c4", f"dataset.path={folder}", f"dataset.output={tmp_path}", f"dataset.tokenizer={t5}",
            "dataset.shard_tokens=100000", "dataset.processes=2")  # fmt: skip
    reference = AutoTokenizer.from_pretrained(t5)
    for split, texts in (("train", train[0] + train[1]), ("val", val)):
        plain = [text.replace(" <extra_id_7>", "") for text in texts]  # a sentinel is beyond the models' vocabulary
        rows = reference(plain, truncation=True, max_length=256, padding="max_length")["input_ids"]
        ours = tokens(tmp_path, split).reshape(-1, 256)
        same = np.array([text == p for text, p in zip(texts, plain, strict=True)])
        assert (ours[same] == np.array(rows)[same]).all()
        assert (ours < 32000).all()
        assert len(ours) == len(texts)
    assert [s.tokens for s in load_manifest(tmp_path).of("train")] == [99840, 99840, 600 * 256 + 450 * 256 - 2 * 99840]
    cut = next(i for i, text in enumerate(train[0]) if len(text) > 3000)
    assert tokens(tmp_path, "train").reshape(-1, 256)[cut, -1] == 1  # a document that is cut ends in </s> too


def test_c4_packed_is_whole_documents_each_ended(raw, t5: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    _, _, val = raw
    small = write_c4(tmp_path / "small", [val[:40]], [val[40:60]])
    prepare(
        "dataset=c4_packed", f"dataset.path={small}", f"dataset.output={tmp_path / 'out'}", f"dataset.tokenizer={t5}"
    )
    reference = AutoTokenizer.from_pretrained(t5)
    plain = [text for text in val[:40] if "<extra_id" not in text]
    packed = tokens(tmp_path / "out", "train")
    pieces = np.split(packed, np.flatnonzero(packed == 1) + 1)[:-1]
    assert len(pieces) == 40
    kept = [list(p) for p, text in zip(pieces, val[:40], strict=True) if "<extra_id" not in text]
    assert kept == [reference(text)["input_ids"] for text in plain]


@pytest.mark.parametrize("processes", [1, 3])
def test_fineweb_text_is_cut_into_shards_as_the_public_writer_does(tmp_path: Path, processes: int) -> None:
    """Parquet in; end-of-text before each document; the first shard for validation; cut in mid-document."""
    texts = documents(700)
    write_parquet(tmp_path / "raw" / "000_00000.parquet", texts[:400])
    write_parquet(tmp_path / "raw" / "001_00000.parquet", texts[400:])
    prepare("dataset=fineweb", f"dataset.path={tmp_path / 'raw'}", f"dataset.output={tmp_path / 'out'}",
            "dataset.shard_tokens=20000", f"dataset.processes={processes}")  # fmt: skip
    expected = gpt2_stream(texts)
    assert (tokens(tmp_path / "out", "val", "train") == expected).all()
    names = [s.file for s in load_manifest(tmp_path / "out").shards]
    assert names[:2] == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]
    assert [len(open_shard(tmp_path / "out" / n)) for n in names[:-1]] == [20000] * (len(names) - 1)


def test_any_text_is_tokenised_and_every_nth_document_held_out(tmp_path: Path) -> None:
    """.txt files with their newlines, .jsonl, .json.gz and parquet, nested, in the order of their paths."""
    texts, folder = documents(300), tmp_path / "raw"
    write_c4(folder / "a", [texts[:50]], [])
    (folder / "b").mkdir()
    (folder / "b" / "lines.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts[50:100]), encoding="utf-8"
    )
    write_parquet(folder / "c" / "x.parquet", texts[100:200])
    (folder / "d").mkdir()
    for i, text in enumerate(texts[200:]):
        (folder / "d" / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    (folder / "notes.docx").write_text("not text to train on", encoding="utf-8")
    prepare("dataset=text", f"dataset.path={folder}", f"dataset.output={tmp_path / 'out'}", "dataset.val_every=7")
    assert (tokens(tmp_path / "out", "val") == gpt2_stream(texts[::7])).all()
    assert (tokens(tmp_path / "out", "train") == gpt2_stream(t for i, t in enumerate(texts) if i % 7)).all()
    data = TokenDataset(composed("dataset=text", f"dataset.path={tmp_path / 'out'}").dataset, 50257, 64, 0)
    assert data.bytes_per_token() is not None


def test_a_tokenizer_of_any_library_and_size_will_do(tmp_path: Path, sample: Path, t5: Path) -> None:
    texts = documents(30)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts), encoding="utf-8")
    common = ["dataset=text", f"dataset.path={tmp_path / 'raw'}", "dataset.text_key=body", "dataset.val_every=10"]
    for name, tokenizer in (("bpe", sample / "tokenizer.json"), ("sp", t5 / "spiece.model")):
        out = tmp_path / name
        prepare(*common, f"dataset.output={out}", f"dataset.tokenizer={tokenizer}")
        manifest = load_manifest(out)
        assert (out / manifest.tokenizer["file"]).read_bytes() == tokenizer.read_bytes()
        cfg = composed("dataset=text", f"dataset.path={out}", "dataset.tokenizer=null").dataset
        TokenDataset(cfg, manifest.tokenizer["vocab_size"], 32, 0)
        with pytest.raises(DataError, match=r"type model.vocab_size="):
            TokenDataset(cfg, 100, 32, 0)
    from ema_nesterov.data.shards import write_shard

    write_shard(tmp_path / "wide_train_000000.bin", np.array([3, 100_000]), 100_277)
    assert open_shard(tmp_path / "wide_train_000000.bin").tolist() == [3, 100_000]


def test_a_stopped_preparation_leaves_no_process_goes_on_and_ends_in_the_same_bytes(raw, tmp_path: Path) -> None:
    folder, *_ = raw
    common = ["dataset=text", f"dataset.path={folder}", "dataset.shard_tokens=1000", "dataset.val_every=5"]
    prepare(*common, f"dataset.output={tmp_path / 'whole'}", "dataset.processes=1")
    out, rng = tmp_path / "out", np.random.default_rng()
    for stop in (signal.SIGKILL, signal.SIGINT):
        before = len(list(out.glob("*.bin")))
        running = process(*common, f"dataset.output={out}", "dataset.processes=1", start_new_session=True)
        while running.poll() is None and len(list(out.glob("*.bin"))) <= before + 1:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.03))
        running.send_signal(stop)
        running.communicate(timeout=60)
        assert running.returncode in (-stop, 130)
        assert_ended(running.pid)
        cfg = composed("dataset=text", f"dataset.path={out}").dataset
        with pytest.raises(DataError, match=r"was stopped after .* type the same"):
            TokenDataset(cfg, 50257, 64, 0)
    prepare(*common, f"dataset.output={out}", "dataset.processes=1")
    assert contents(out) == contents(tmp_path / "whole")


def assert_ended(session: int) -> None:
    def members() -> list[str]:
        stats = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has just ended
                stats.append(path.read_text(encoding="utf-8"))
        return [stat for stat in stats if stat.rpartition(")")[2].split()[3] == str(session)]

    for _ in range(100):
        if not members():
            return
        time.sleep(0.1)
    raise AssertionError(f"processes of a stopped preparation live on: {members()}")


def test_a_missing_shard_is_made_again_and_more_are_made_when_asked(tmp_path: Path) -> None:
    write_parquet(tmp_path / "raw" / "x.parquet", documents(500))
    common = ["dataset=fineweb", f"dataset.path={tmp_path / 'raw'}", f"dataset.output={tmp_path / 'out'}"]
    common += ["dataset.shard_tokens=5000", "dataset.processes=1"]
    prepare(*common, "dataset.shards=2")
    assert [s.split for s in load_manifest(tmp_path / "out").shards] == ["val", "train", "train"]
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "fineweb_train_000001.bin").unlink()
    cut = tmp_path / "out" / "fineweb_val_000000.bin"
    cut.write_bytes(cut.read_bytes()[:-1])
    prepare(*common, "dataset.shards=2")
    assert contents(tmp_path / "out") == before
    prepare(*common)
    prepare(*common[:2], f"dataset.output={tmp_path / 'whole'}", *common[3:])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_shards_made_in_stages_are_those_made_at_once_and_each_can_be_made_again(tmp_path: Path) -> None:
    """Also the last validation shard, which was short between the stages."""
    write_parquet(tmp_path / "raw" / "x.parquet", documents(900))
    common = ["dataset=text", f"dataset.path={tmp_path / 'raw'}", "dataset.val_every=2", "dataset.processes=1"]
    common += ["dataset.shard_tokens=7000"]
    for shards in (2, 4, 5):
        prepare(*common, f"dataset.output={tmp_path / 'out'}", f"dataset.shards={shards}")
    prepare(*common, f"dataset.output={tmp_path / 'whole'}", "dataset.shards=5")
    before = contents(tmp_path / "out")
    assert before == contents(tmp_path / "whole")
    for shard in load_manifest(tmp_path / "out").shards[::3]:
        (tmp_path / "out" / shard.file).unlink()
    prepare(*common, f"dataset.output={tmp_path / 'out'}", "dataset.shards=5")
    assert contents(tmp_path / "out") == before
    (pending,) = (tmp_path / "out").glob(".pending*")
    pending.unlink()
    prepare(*common, f"dataset.output={tmp_path / 'out'}", "dataset.shards=5")  # nothing is to do
    with pytest.raises(DataError, match="is missing or damaged"):
        prepare(*common, f"dataset.output={tmp_path / 'out'}")


def held(folder: Path) -> list[str]:
    return [text for source in local_sources(folder, None) for batch in read(source, "text") for text in batch]


def test_documents_are_read_to_the_letter(tmp_path: Path) -> None:
    files = {
        "a[1].txt": b"named like a pattern",
        "a1.txt": b"another",
        "b.TXT": b"x\r\ny\rz\n",
        "c.txt": "\ufeffé".encode(),
        "d.txt.gz": gzip.compress(b"packed\r\n"),
        "e.txt": b"",
        "f*.jsonl": b'\xef\xbb\xbf{"text": "a \\"q\\" \\n", "m": 1}\r\n\n{"m": {"k": 2}, "text": "2020-01-01"}',
        "g.jsonl": b"",
        "h.json.gz": b"",
        ".hidden/i.txt": b"not meant",
        "__pycache__/j.txt": b"nor this",
        "l.MD": b"# Title\r\n",
        "m.text": b"plain",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_parquet(tmp_path / "k.parquet", [])
    (tmp_path / "out").mkdir()
    assert held(tmp_path) == [
        *("another", "named like a pattern", "x\r\ny\rz\n", "é", "packed\r\n", "", 'a "q" \n', "2020-01-01"),
        *("# Title\r\n", "plain"),
    ]


def zst_of_two_frames(content: bytes) -> bytes:
    """As parallel compressors write it."""
    return zstd.compress(content[:9]) + zstd.compress(content[9:])


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    **{"": bytes, ".gz": gzip.compress, ".GZ": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress},
    **{".zst": zstd.compress, ".ZST": zst_of_two_frames},
}


@pytest.mark.parametrize("behind", COMPRESSORS)
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        *((suffix, "one\n") for suffix in (".txt", ".TXT", ".text", ".md", ".markdown")),
        *((suffix, '{"text": "one\\n"}\n\n{"text": "two"}') for suffix in (".json", ".jsonl", ".ndjson", ".Json")),
    ],
)
def test_every_form_of_text_is_read_compressed_or_not(tmp_path: Path, suffix: str, content: str, behind: str) -> None:
    (tmp_path / f"x{suffix}{behind}").write_bytes(COMPRESSORS[behind](content.encode()))
    assert held(tmp_path) == ["one\n", "two"][: 1 + ("two" in content)]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('[{"text": "one"}, {"text": "two"}]', ["one", "two"]),
        ('\ufeff\n [\n  {"text": "one"},\n  {"text": "two", "score": NaN}\n]\n', ["one", "two"]),
        ("[]", []),
        ('{\n  "text": "one",\n  "more": [1,\n 2]\n}\n', ["one"]),
        ('{"text": "one"}', ["one"]),
        ('[\n{"text": "one"},\n{"text": "tw', "x.json is no JSON .*an object a line, or one array of objects"),
        ('["one", "two"]', 'element 1 of .*x.json has no column text, but is a str; write it as {"text": ...}'),
        ('[{"text": "one"}, {"body": "two"}]', "element 2 of .*x.json has no column text, but columns body"),
        ('{"text": "one"\n{"text": "two"}', "line 1 of .*x.json is no JSON"),
        ('["one"]\n["two"]', "x.json is no JSON"),
        ('{"data": [{"text": "one"}]}', "line 1 of .*x.json has no column text, but columns data"),
    ],
)
def test_a_file_of_json_may_be_one_array_or_one_object(tmp_path: Path, content: str, texts: list[str] | str) -> None:
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    if isinstance(texts, list):
        assert held(tmp_path) == texts
        (source,) = local_sources(tmp_path, None)
        assert [text for batch in read(source, "text", skip=1, batch=1) for text in batch] == texts[1:]
    else:
        with pytest.raises(DataError, match=texts) as error:
            held(tmp_path)
        assert "\n" not in str(error.value)


def test_what_is_not_read_is_counted_and_the_first_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other kinds, no suffix, archives, what is hidden, links to nothing; but not what lies in the shards' folder."""
    raw, out = tmp_path / "raw", tmp_path / "raw" / "out"
    texts = documents(4)
    for name in ("a.txt", "b/c.MD", "b/d/e.text", "f.txt.gz"):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        text = texts.pop().encode()
        (raw / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    others = ["b/notes.docx", "archive.zip", "README", "x.parquet.gz", "y.tar.zst", ".DS_Store", ".git/config"]
    for name in [*others, "_old/g.txt"]:
        (raw / name).parent.mkdir(exist_ok=True)
        (raw / name).write_bytes(b"?")
    (raw / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(raw / "pipe.txt")
    for _ in range(2):
        prepare("dataset=text", f"dataset.path={raw}", f"dataset.output={out}", "dataset.val_every=2")
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "passed over" in line)
        kinds = "1 *.md, 1 *.text, 1 *.txt, 1 *.txt.gz"
        assert line.startswith(
            f"{raw}: {kinds}; passed over: 10 others, the first README (read are *.txt, *.text, *.md,"
        )
    (raw / ".git" / "more").write_bytes(b"")
    with pytest.raises(DataError, match=r"no files \*.txt, .*, but 2 others, the first config; .*rename plain text"):
        local_sources(raw / ".git", None)


def test_files_that_the_pattern_leaves_out_are_counted_too(
    tmp_path: Path, t5: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_c4(tmp_path / "raw", [["One."], ["Two."]], [["Three."]])
    (raw / "c4-train.00002-of-01024.json.zst").write_bytes(zstd.compress(b'{"text": "Four."}'))
    prepare("dataset=c4", f"dataset.path={raw}", f"dataset.output={tmp_path / 'out'}", f"dataset.tokenizer={t5}")
    assert (
        f"{raw}: 3 *.json.gz; passed over: 1 other, c4-train.00002-of-01024.json.zst (read are c4-train.*.json.gz, c4-"
        in (capsys.readouterr().out)
    )


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "b.txt").write_text("b", encoding="utf-8")
    raw = tmp_path / "raw"
    (raw / "one").mkdir(parents=True)
    (raw / "two").mkdir()
    (raw / "one" / "a.txt").write_text("a", encoding="utf-8")
    (raw / "c.txt").symlink_to(raw / "one" / "a.txt")
    (raw / "linked").symlink_to(tmp_path / "elsewhere")
    (raw / "one" / "up").symlink_to(raw)
    (raw / "two" / "to_one").symlink_to(raw / "one")
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(raw / "linked")
    found = [file.removeprefix(f"{raw}/") for source in local_sources(raw, None) for file in source.files]
    assert found == ["c.txt", "linked/deep/b.txt", "one/a.txt", "two/to_one/a.txt"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "shut").mkdir()
    scan = os.scandir

    def refuse(path: str) -> Any:  # root may read all
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot read folder .*/shut: Permission denied"):
        local_sources(tmp_path, None)


def test_a_file_of_plain_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name, content in (("a.txt", b"fine"), ("b.txt", "né".encode("latin-1")), ("c.txt", b"fine")):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"b.txt cannot be read .UnicodeDecodeError"):
        held(tmp_path)


# --- documents that no tokenizer was made for -----------------------------------------------------

MILLION = 1_000_001
STRANGE = {
    "spaces": "a" + " " * MILLION + "word",
    "newlines": "a" + "\n" * MILLION + "word",
    "lines of spaces": "a" + " \n" * MILLION + "  word",
    "no-break spaces": "a" + "\xa0" * MILLION + "word",
    "spaces at the end": "a\n" + " " * MILLION,
    "spaces alone": " " * MILLION,
    "a word": "a" * MILLION,
    "digits": "1" * MILLION,
    "dots": "." * MILLION,
    "marks": "\u0301" * MILLION,
    "NUL": "a\0b" * 1000,
    "nothing": "",
}


def encodings() -> dict[str, tiktoken.Encoding]:
    """Each of tiktoken's ways to split a text, with GPT-2's tokens, as the others are a download."""
    gpt2 = load_tokenizer("gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: gpt2._mergeable_ranks)
        made = {name: openai_public.ENCODING_CONSTRUCTORS[name]() for name in ("cl100k_base", "o200k_base")}
    patterns = {"gpt2": gpt2._pat_str} | {name: spec["pat_str"] for name, spec in made.items()}
    return {
        name: tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=gpt2._mergeable_ranks, special_tokens={})
        for name, pattern in patterns.items()
    }


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_a_text_that_is_cut_around_its_blanks_has_the_ids_of_the_whole(name: str) -> None:
    encoding, rng = encodings()[name], random.Random(0)
    blanks = [*" \t\n\r\v\xa0\x85\u2028\x1c", "\r\n", "  "]
    others = ["a", "B", "12", "...", "'s", "/", "é", "\u0301", "中"]
    for _ in range(3000):
        text = "".join(rng.choices(blanks + others, k=rng.randint(0, 14)))
        assert encode_long(encoding, text, long_run=1).tolist() == encoding.encode_ordinary(text), repr(text)
    for kind, text in STRANGE.items():
        assert encoding.decode(encode_long(encoding, text).tolist()) == text, kind


def test_strange_documents_are_prepared_with_any_tokenizer(tmp_path: Path, sample: Path, t5: Path) -> None:
    (tmp_path / "raw").mkdir()
    texts = [STRANGE[kind] for kind in ("spaces", "newlines", "no-break spaces", "a word", "NUL", "nothing")]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "raw" / "x.jsonl").write_text(lines, encoding="utf-8")
    for i, tokenizer in enumerate(("gpt2", sample / "tokenizer.json", t5 / "tokenizer.json", t5 / "spiece.model")):
        out = tmp_path / str(i)
        prepare("dataset=text", f"dataset.path={tmp_path / 'raw'}", f"dataset.output={out}", "dataset.val_every=9",
                f"dataset.tokenizer={tokenizer}")  # fmt: skip
        opened = open_tokenizer(str(tokenizer))
        expected = [part for ids in opened.encode(texts) for part in (opened.before, ids, opened.after)]
        assert np.array_equal(tokens(out, "val", "train"), np.concatenate(expected))


class Panic(BaseException):
    """As pyo3's, which is no Exception."""


@pytest.mark.parametrize("error", [Panic("no\nroom"), ValueError("no\nroom"), MemoryError("no room")])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_document_that_the_tokenizer_does_not_take_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, kind: str
) -> None:
    whole = tokenise.open_tokenizer("gpt2")

    def encode(texts: list[str]) -> list[np.ndarray]:
        if "bad" in texts:
            raise error
        return whole.encode(texts)

    monkeypatch.setattr(tokenise, "open_tokenizer", lambda name: dataclasses.replace(whole, encode=encode))
    (tmp_path / "raw").mkdir()
    texts = ["fine", "good", "bad", "well"]
    for i, text in enumerate(texts if kind == "txt" else []):
        (tmp_path / "raw" / f"{i}.txt").write_text(text, encoding="utf-8")
    if kind == "jsonl":
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "raw" / "x.jsonl").write_text(lines, encoding="utf-8")
    if kind == "parquet":
        write_parquet(tmp_path / "raw" / "x.parquet", texts)
    place = "raw/2.txt" if kind == "txt" else f"document 3 of .*raw/x.{kind}"
    with pytest.raises(DataError, match=f"{place}, which begins 'bad', is not taken by tokenizer gpt2 .*no room") as e:
        prepare("dataset=text", f"dataset.path={tmp_path / 'raw'}", f"dataset.output={tmp_path / 'out'}")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 3}', "line 2 of .* holds no text under text"),
        ('{"text": null}', "line 2 of .* holds no text under text"),
        ('{"body": "x"}', "line 2 of .* has no column text, but columns body"),
        ('["x"]', "line 2 of .* has no column text, but is a list"),
        (
            '{"text": "b\\ud800"}',
            r"document 2 of .*x.jsonl, which begins 'b\\ud800', holds '\\ud800', which is no char",
        ),
    ],
)
def test_a_row_without_text_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        prepare("dataset=text", f"dataset.path={tmp_path / 'raw'}", f"dataset.output={tmp_path / 'out'}",
                "dataset.processes=1")  # fmt: skip
    assert "\n" not in str(error.value)


def test_the_shards_may_lie_within_the_folder_of_the_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", documents(30))
    common = ["dataset=text", f"dataset.path={tmp_path}", "dataset.processes=1", "dataset.val_every=5"]
    for _ in range(2):
        prepare(*common, f"dataset.output={tmp_path / 'shards'}")
    with pytest.raises(DataError, match="another one, for its shards"):
        prepare(*common, f"dataset.output={tmp_path}")


def test_padding_that_is_a_token_of_text_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "raw" / "x.parquet", documents(30))
    keys = ["dataset.layout=rows", "dataset.row_len=16", "dataset.pad_id=0", f"dataset.output={tmp_path / 'out'}"]
    with pytest.raises(DataError, match=r"pad_id=0 is '!', a token of text.*type dataset.pad_id=50256"):
        prepare("dataset=text", f"dataset.path={tmp_path / 'raw'}", *keys)


def test_verify_finds_what_was_altered_cut_swapped_or_added(tmp_path: Path, capsys) -> None:
    write_parquet(tmp_path / "raw" / "x.parquet", documents(400))
    out = tmp_path / "out"
    prepare("dataset=fineweb", f"dataset.path={tmp_path / 'raw'}", f"dataset.output={out}", "dataset.shard_tokens=5000")
    verify(out)
    assert "all as written" in capsys.readouterr().out
    one, two, three = (out / f"fineweb_train_00000{i}.bin" for i in (1, 2, 3))
    content = bytearray(one.read_bytes())
    content[2000] ^= 4
    one.write_bytes(content)
    keep = two.read_bytes()
    two.write_bytes(three.read_bytes())
    three.write_bytes(keep[:-2])
    (out / "fineweb_train_000999.bin").write_bytes(keep)
    with pytest.raises(DataError, match="has 4 faults"):
        verify(out)
    told = capsys.readouterr().out
    for line in ("000001.bin is not what", "000002.bin is not what", "000003.bin is cut short", "000999"):
        assert line in told


def test_show_prints_the_documents(raw, t5: Path, tmp_path: Path, capsys) -> None:
    small = write_c4(tmp_path / "raw", [["The river runs.", "A second document."]], [["Held out."]])
    out = tmp_path / "out"
    prepare(
        "dataset=c4", f"dataset.path={small}", f"dataset.output={out}", f"dataset.tokenizer={t5}", "dataset.processes=1"
    )
    show(out)
    told = capsys.readouterr().out
    assert "The river runs.</s>" in told
    assert "Held out.</s>" in told
    assert "252 of padding" in told or "251 of padding" in told


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset=text", "dataset.path=nowhere", "dataset.output=OUT"], "folder of text nowhere does not exist"),
        (["dataset=text", "dataset.path=RAW"], "type dataset.output=FOLDER"),
        (["dataset=text", "dataset.path=EMPTY", "dataset.output=OUT"], "no files .*parquet"),
        (["dataset=text", "dataset.path=RAW", "dataset.output=OUT", "dataset.tokenizer=gpt3"], "unknown tokenizer"),
        (
            ["dataset=text", "dataset.path=RAW", "dataset.output=OUT", "dataset.text_key=body"],
            "no column body, but columns text",
        ),
        (["dataset=text", "dataset.path=BROKEN", "dataset.output=OUT"], "line 2 of .*broken.jsonl is no JSON"),
        (["dataset=text", "dataset.path=ONE", "dataset.output=OUT"], "split the text into more documents"),
        (["dataset=fineweb", "dataset.path=RAW", "dataset.output=OUT"], "dataset.shard_tokens=N below"),
        (
            ["dataset=text", "dataset.path=RAW", "dataset.output=OUT", "dataset.vocab_size=300"],
            "type dataset.vocab_size=50257",
        ),
        (["dataset=c4", "dataset.path=RAW", "dataset.output=OUT"], "no files c4-validation"),
    ],
)
def test_what_cannot_be_prepared_is_said_in_one_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    raw, empty, broken, one = (tmp_path / name for name in ("RAW", "EMPTY", "BROKEN", "ONE"))
    for folder in (raw, empty, broken, one):
        folder.mkdir()
    (raw / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents(20)), encoding="utf-8")
    (broken / "broken.jsonl").write_text('{"text": "fine"}\n{"text": "cut', encoding="utf-8")
    (one / "only.txt").write_text("a single document", encoding="utf-8")
    places = {name: str(tmp_path / name) for name in ("RAW", "EMPTY", "BROKEN", "ONE", "OUT")}
    overrides = [f"{key}={places.get(value, value)}" for key, value in (o.split("=") for o in overrides)]
    with pytest.raises(DataError, match=message) as error:
        prepare(*overrides, "dataset.processes=1")
    assert "\n" not in str(error.value)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, sample: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in documents(20)), encoding="utf-8"
    )
    common = ["dataset=text", f"dataset.path={tmp_path / 'raw'}", f"dataset.output={tmp_path / 'out'}"]
    prepare(*common, "dataset.val_every=4")
    before = contents(tmp_path / "out")
    for change, message in (
        ("dataset.val_every=5", "val_every=4, this is val_every=5"),
        (f"dataset.tokenizer={sample / 'tokenizer.json'}", "name=gpt2, this is name="),
    ):
        with pytest.raises(DataError, match=message):
            prepare(*common, "dataset.val_every=4", change)
    (tmp_path / "raw" / "y.jsonl").write_text('{"text": "more"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="delete that one"):
        prepare(*common, "dataset.val_every=4")
    assert contents(tmp_path / "out") == before
