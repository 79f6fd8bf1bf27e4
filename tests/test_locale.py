"""The commands in a locale of one byte a letter: files are UTF-8 there too, and folders have the locale's letters."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ema_nesterov.data.tokenizers import open_tokenizer
from tests.conftest import ROOT, TINY, read_metrics

LATIN = "en_US.ISO-8859-1"
Latin = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def latin(tmp_path: Path) -> Latin:
    """Run a script of ours in an empty folder under Latin-1; what it is given is encoded so."""
    if shutil.which("localedef") is None:
        pytest.skip("needs localedef")
    made = subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", tmp_path / LATIN], capture_output=True)
    if made.returncode > 1:  # 1: with warnings
        pytest.skip("needs the sources of locales, as in Debian's package locales")
    away = ("PYTHONIOENCODING", "LANG", "LANGUAGE")
    environment = {key: value for key, value in os.environ.items() if key not in away}
    environment |= {"LOCPATH": str(tmp_path), "LC_ALL": LATIN, "PYTHONUTF8": "0", "PYTHONWARNDEFAULTENCODING": "1"}
    (tmp_path / "here").mkdir()

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-W", "default::EncodingWarning", str(ROOT / "scripts" / script)]
        typed = [argument.encode("latin-1") for argument in arguments]
        done = subprocess.run([*command, *typed], cwd=tmp_path / "here", env=environment, capture_output=True)
        error = done.stderr.decode("latin-1")
        assert done.returncode == 0, error
        ours = (str(ROOT / "src"), str(ROOT / "scripts"))  # libraries open files of their own as they like
        assert not [line for line in error.splitlines() if line.startswith(ours) and "EncodingWarning" in line]
        return done

    return run


def test_data_runs_and_texts_are_the_same_under_latin_1(latin: Latin, tmp_path: Path) -> None:
    here = tmp_path / "here"
    latin("prepare_data.py", "dataset=sample", "dataset.path='donn\u00e9es'")
    tokenizer = open_tokenizer(str(here / os.fsdecode(b"donn\xe9es") / "tokenizer.json"))
    assert tokenizer.encode(["The people of the United States"])[0].tolist() == [490, 542, 268, 260, 520, 454]

    own = [*TINY, "probe_every=0", "noise_every=0", "dataset.path='donn\u00e9es'", "name='caf\u00e9/x'"]
    latin("train.py", *own)
    printed = latin("where.py", *own).stdout.strip()
    assert printed.startswith(b"runs/caf\xe9/x-")
    run, folder = printed.decode("latin-1"), here / os.fsdecode(printed)
    assert "name: caf\u00e9/x\n" in (folder / "config.yaml").read_text(encoding="utf-8")
    assert read_metrics(folder)[-1]["step"] == 10

    told = latin("generate.py", f"run={run}", "prompt= caf\u00e9", "tokens=60", "temperature=9", "top_k=null").stdout
    assert told.startswith(b" caf\xe9")
    assert rb"\ufffd" in told  # half a letter, which Latin-1 does not have
    latin("report.py", "runs=runs", "title=caf\u00e9")
    assert "<title>caf\u00e9" in (here / "runs" / "report" / "index.html").read_text(encoding="utf-8")
