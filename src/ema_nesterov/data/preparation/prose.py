"""English prose out of files: readers for the kinds of file that packages carry, and the filter that keeps prose.

A document is a list of paragraphs, each without a line break.
"""

from __future__ import annotations

import html
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b

LARGE, PART = 200_000, 50_000  # characters: larger documents are cut into parts of about PART
SHORTEST = 200  # characters of a document

WORD = re.compile(r"[a-z]+(?:['’][a-z]+)?")
SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?: \[[^][]{,200}\])?$")  # a reference in brackets may follow
SYMBOL = re.compile(r"[^\w\s.,;:!?'\"()‘’“”–—…-]|_")
UNREADABLE = re.compile(r"[\ufffd\x00-\x08\x0e-\x1f\x80-\x9f]")
FUNCTION_WORDS = """
a about after again against all also although am an and another any are as at be because been before being between
both but by can cannot could did do does doing down during each either every few for from further had has have
having he her here hers him his how however i if in into is it its itself just let may me might more most much must
my neither no nor not of off on once one only or other our out over own same shall she should since so some such
than that the their them then there therefore these they this those though through thus to too under unless until
unto up upon us very was we were what when where whether which while who whom whose why will with within without
would yet you your
"""
KNOWN = frozenset(FUNCTION_WORDS.split())


def is_prose(paragraph: str) -> bool:
    """Whether it is 80 characters and 12 words or more, ends as a sentence, and reads as English, not as code."""
    if len(paragraph) < 80 or not SENTENCE_END.search(paragraph) or UNREADABLE.search(paragraph):
        return False
    if len(paragraph.split()) < 12 or len(SYMBOL.findall(paragraph)) > 0.08 * len(paragraph):
        return False
    words = WORD.findall(paragraph.lower())
    return sum(map(KNOWN.__contains__, words)) >= 0.22 * max(len(words), len(paragraph.split()))


def drop_repeats(documents: Iterable[list[str]], seen: set[bytes]) -> Iterator[list[str]]:
    """The documents without the paragraphs in `seen`, which it adds to, as far as SHORTEST characters are left."""
    for document in documents:
        kept = []
        for paragraph in document:
            digest = blake2b(paragraph.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                kept.append(paragraph)
        if sum(map(len, kept)) >= SHORTEST:
            yield kept


def prose_of(kind: str, data: bytes) -> Iterator[list[str]]:
    """The documents of one file: their prose alone, and none much larger than LARGE."""
    for document in READERS[kind](data):
        kept = [clean for paragraph in document if is_prose(clean := " ".join(paragraph.split()))]
        whole = sum(map(len, kept)) <= LARGE
        part: list[str] = []
        size = 0
        for paragraph in kept:
            part.append(paragraph)
            size += len(paragraph)
            if size >= PART and not whole:
                yield part
                part, size = [], 0
        if part:
            yield part


# --- readers: a file's bytes to documents ---------------------------------------------------------

DROPPED = ("head", "script", "style", "pre", "nav", "header", "footer", "h1", "h2", "h3", "h4", "h5", "h6")
BLOCKS = ("p", "li", "dd", "div", "section", "article", "blockquote", "table", "tr", "td", "th", "ul", "ol", "dl", "dt")
BORDER = "\ue000"  # a private character


def _html(data: bytes) -> Iterator[list[str]]:
    """The text between any two borders of blocks."""
    import lxml.html
    from lxml.etree import LxmlError

    parser = lxml.html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    try:
        root = lxml.html.document_fromstring(_decode(data).encode(), parser=parser)
    except LxmlError:  # an empty page
        return
    for element in list(root.iter(*DROPPED)):
        element.tail = BORDER + (element.tail or "")
        element.drop_tree()
    for element in root.iter("br"):
        element.tail = " " + (element.tail or "")
    for element in root.iter(*BLOCKS):
        element.text = BORDER + (element.text or "")
        element.tail = BORDER + (element.tail or "")
    yield root.text_content().split(BORDER)


def _text(data: bytes) -> Iterator[list[str]]:
    yield re.split(r"\n\s*\n", _decode(data).replace("\r\n", "\n"))


def _dictionary(data: bytes) -> Iterator[list[str]]:
    """Text with references in braces, origins in brackets and pronunciations between backslashes."""
    text = re.sub(r"\[[^][]*\]|\([^()]*\[[^()]*\)|\\[^\\\n]*\\", "", _decode(data.translate(None, b"{}")))
    yield from _text(re.sub(r"([.,]?)\s+([,.])", r"\2", text).encode())


def _pod(data: bytes) -> Iterator[list[str]]:
    """Perl's: commands start with =, code is indented, and markup looks like C<this>."""
    for document in _text(data):
        kept = [p for p in document if p[:1] not in ("=", " ", "\t", "")]
        for markup in (r"[A-Z]<<+ (.*?) >>+", r"L<([^<>|]*)\|[^<>]*>", r"[A-Z]<([^<>]*)>", r"[A-Z]<([^<>]*)>"):
            kept = [re.sub(markup, r"\1", p, flags=re.DOTALL) for p in kept]
        yield [html.unescape(re.sub(r"E<(\w+)>", r"&\1;", p)) for p in kept]


def _brown(data: bytes) -> Iterator[list[str]]:
    """word/tag, with spaces around punctuation; a paragraph starts with a tab."""
    text = re.sub(r"/[^\s/]+(?=\s)", "", _decode(data))
    text = re.sub(r"([;?!:]) \1", r"\1", text.replace("`` ", "“").replace(" ''", "”"))
    text = re.sub(r"\s+([.,;:?!)”])", r"\1", text).replace("( ", "(")
    yield re.split(r"\n\s*\n\s*", text)


def _verses(data: bytes) -> Iterator[list[str]]:
    """A verse a line, as JSON: a book is a document, a chapter a paragraph."""
    books: dict[str, dict[int, list[str]]] = {}
    for verse in map(json.loads, _decode(data).splitlines()):
        books.setdefault(verse["book"], {}).setdefault(verse["chapter"], []).append(verse["text"])
    for chapters in books.values():
        yield [" ".join(verses) for verses in chapters.values()]


def _json(data: bytes) -> Iterator[list[str]]:
    """Every string under a key "text"."""

    def strings(node: object) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else ():
            if key == "text" and isinstance(value, str):
                yield from re.split(r"\n|\+\+|<br>", value)
            yield from strings(value)

    yield list(strings(json.loads(data)))


def _sword(data: bytes) -> Iterator[list[str]]:
    """A SWORD module's compressed blocks of OSIS markup: each is a document."""
    for block in _inflated(data):
        text = re.sub(r"<note\b.*?</note>|<title\b.*?</title>", "\n\n", _decode(block), flags=re.DOTALL)
        text = re.sub(r"</?(?:div|p|chapter|lg|table|row|cell)\b[^>]*>", "\n\n", text)
        yield [html.unescape(re.sub(r"<[^>]*>", "", p)) for p in re.split(r"\n\s*\n", text)]


def _r_strings(data: bytes) -> Iterator[list[str]]:
    """R's lazy-loading database: a vector of lines is a document."""
    for block in _inflated(data):
        lines, at = [], 0
        while string := re.compile(rb"\x00(?:\x04\x00|\x00\x80)\x09(.{4})", re.DOTALL).search(block, at):
            at = string.end() + int.from_bytes(string[1], "big")
            lines.append(block[string.end() : at])
        yield from _text(b"\n".join(lines))


def _inflated(data: bytes) -> Iterator[bytes]:
    """zlib streams with other bytes between them."""
    while (start := data.find(b"\x78\x9c")) >= 0:
        stream = zlib.decompressobj()
        yield stream.decompress(data[start:])
        data = stream.unused_data


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


READERS: dict[str, Callable[[bytes], Iterator[list[str]]]] = {
    "html": _html,
    "text": _text,
    "dictionary": _dictionary,
    "pod": _pod,
    "brown": _brown,
    "verses": _verses,
    "json": _json,
    "sword": _sword,
    "r": _r_strings,
}
