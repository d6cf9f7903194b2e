"""Wikipedia's articles out of a MediaWiki XML dump (`*-pages-articles*.xml.bz2`): streamed, then cleaned of wikitext.

Only articles count (namespace 0, no redirects). The dump is read by one process; cleaning, which costs far more, is for many.
"""

from __future__ import annotations

import bz2
import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

from bert_fast.errors import UserError

_DUMP_NAME = re.compile(r"\.xml(-p\d+p\d+)?(\.bz2|\.gz)?$")  # a dump in parts says its range of pages
_ALWAYS_DROPPED = {"file", "image", "media", "category"}  # these names work in every language's dump
# Tags whose content is no running text. Of the others (b, small, span, ...) the content stays.
_DROPPED_TAGS = {
    "ref", "references", "table", "gallery", "math", "chem", "timeline", "score", "syntaxhighlight", "source", "pre", "code",
    "graph", "imagemap", "mapframe", "templatedata", "hiero", "inputbox",
}  # fmt: skip


def is_dump(name: str) -> bool:
    """Whether a file is named as a dump, or a part of one, is."""
    return _DUMP_NAME.search(name.lower()) is not None


@dataclass(frozen=True)
class Page:
    """One article as it lies in the dump. `spaces` are the dump's namespace names (File, Category, ...), in lower case."""

    title: str
    wikitext: str
    spaces: frozenset[str]


def read_pages(path: str | Path) -> Iterator[Page]:
    """Articles of a dump in its order, one in memory at a time.

    Raises:
        UserError: no dump, damaged, or cut: after which article, and how many were whole.
    """
    count, last, started = 0, "none", False
    spaces: set[str] = set()
    try:
        with _opened(path) as file:
            levels: list[ElementTree.Element] = []
            for event, element in ElementTree.iterparse(file, events=("start", "end")):
                if event == "start":
                    started = True
                    levels.append(element)
                    continue
                levels.pop()
                name = _local(element.tag)
                if name == "namespace" and element.get("key") != "0" and element.text:
                    spaces.add(element.text.lower())
                elif name == "page":
                    page = _article(element, frozenset(spaces))
                    levels[-1].clear()  # the root keeps its children otherwise
                    if page:
                        count, last = count + 1, page.title
                        yield page
    except (EOFError, ElementTree.ParseError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: {error.strerror}") from None
        what = "is cut or damaged" if started or isinstance(error, EOFError) else "is no MediaWiki dump"
        raise UserError(
            f"{path} {what} ({str(error)[:100]}): {count:,} articles before it were whole, the last is '{last}'; "
            "fetch the file again"
        ) from None
    if not count:
        raise UserError(f"{path}: no article in it; give a pages-articles dump")


def _opened(path: str | Path) -> BinaryIO:
    name = str(path)
    if name.endswith(".bz2"):
        return bz2.open(name, "rb")  # type: ignore[return-value]  # of one stream or many
    return gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb")  # type: ignore[return-value]


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _article(element: ElementTree.Element, spaces: frozenset[str]) -> Page | None:
    found: dict[str, str] = {}
    for child in element:
        name = _local(child.tag)
        if name == "redirect":
            return None
        if name in ("title", "ns"):
            found[name] = child.text or ""
        elif name == "revision":
            found["text"] = next((each.text or "" for each in child if _local(each.tag) == "text"), "")
    if found.get("ns", "0") != "0" or not found.get("text"):
        return None
    return Page(found.get("title", ""), found["text"], spaces)


def clean(page: Page) -> str:
    """The running text of an article: paragraphs apart by blank lines; no templates, tables, notes, headings, captions."""
    parser = _parser()
    text = "".join(_rendered(parser.parse(re.sub(r"__[A-Z]+__", "", page.wikitext)), parser.nodes, page.spaces))
    lines = (line.strip().lstrip("*#:;").strip() for line in text.splitlines())
    # What templates leave behind: empty brackets, and spaces before a point.
    tidy = (re.sub(r"\s+([,.;:])", r"\1", re.sub(r"\(\s*[,;]?\s*\)", "", " ".join(line.split()))) for line in lines)
    return "\n\n".join(line for line in tidy if len(line.split()) > 2)


def _rendered(code: Any, nodes: Any, spaces: frozenset[str]) -> Iterator[str]:
    """Text of wikitext nodes; what is none (templates, comments, headings, parameters) gives nothing."""
    for node in code.nodes if code is not None else ():
        if isinstance(node, nodes.Text):
            yield node.value
        elif isinstance(node, nodes.HTMLEntity):
            yield node.normalize()
        elif isinstance(node, nodes.Wikilink):
            space, colon, _ = str(node.title).partition(":")
            if not (colon and space.strip().lower() in spaces | _ALWAYS_DROPPED):
                yield from _rendered(node.title if node.text is None else node.text, nodes, spaces)
        elif isinstance(node, nodes.ExternalLink):
            yield from _rendered(node.title, nodes, spaces)
        elif isinstance(node, nodes.Tag) and str(node.tag).strip().lower() == "br":
            yield " "
        elif isinstance(node, nodes.Tag) and str(node.tag).strip().lower() not in _DROPPED_TAGS:
            yield from _rendered(node.contents, nodes, spaces)


def _parser() -> Any:
    try:
        import mwparserfromhell
    except ModuleNotFoundError:
        raise UserError("reading a MediaWiki dump needs mwparserfromhell; pip install mwparserfromhell") from None
    return mwparserfromhell
