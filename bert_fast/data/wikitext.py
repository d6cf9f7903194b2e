"""Wikipedia's articles from a MediaWiki XML dump (`*-pages-articles*.xml.bz2`): streamed, then stripped of markup.

Only articles are read (namespace 0, no redirects). One process reads the dump; many do the cleaning, which costs far more.
"""

from __future__ import annotations

import bz2
import gzip
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any
from xml.parsers import expat

from bert_fast.data.text import num_words, whole_characters
from bert_fast.errors import UserError

_DUMP_NAME = re.compile(r"\.xml(-p\d+p\d+)?(\.bz2|\.gz)?$")  # a part of a dump has its range of pages in its name
_ALWAYS_DROPPED = {"file", "image", "media", "category"}  # these names work in every language's dump
# Tags whose content is not running text. The content of others (b, small, span, ...) is kept.
_DROPPED_TAGS = {
    "ref",
    "references",
    "table",
    "gallery",
    "math",
    "chem",
    "timeline",
    "score",
    "syntaxhighlight",
    "source",
    "pre",
    "code",
    "graph",
    "imagemap",
    "mapframe",
    "templatedata",
    "hiero",
    "inputbox",
}
_MEDIA_NAME = re.compile(
    r":.*\.(jpe?g|png|gif|svg|webp|tiff?|bmp|xcf|djvu|pdf|og[agv]|webm|mp[34g]|mpeg|wav|flac|opus|mid|midi|stl)$",
    re.I | re.S,
)
_MEDIA_PARAMETER = re.compile(
    r"\s*(thumb(nail)?|mini(atur)?|frame(d|less)?|border|upright(\s*=?\s*[\d.]+)?|(alt|link|lang|page|class)\s*=.*|"
    r"\d*(x\d+)?\s*px|thumb(nail)?\s*=.*)\s*",
    re.I | re.S,
)
_READ_BYTES = 1 << 16
LONGEST_TEXT = 1 << 22
"""Characters of a page; a longer one is left out. MediaWiki itself accepts 2 MiB per page."""
# Where markup is opened and never closed, the parser reads to the end of the page and comes back, every time. Microseconds per
# character and place, twice what was measured: of templates, tables and tags, and of tags without an end.
_COST_US = {"open": 0.06, "cut tag": 0.5}
_MOST_SECONDS = 5.0


def is_dump(name: str) -> bool:
    """Whether a file has the name of a dump, or of a part of one."""
    return _DUMP_NAME.search(name.lower()) is not None


@dataclass(frozen=True)
class Page:
    """One article as it is in the dump. `spaces` are the dump's namespace names (File, Category, ...), in lower case.

    language: the dump's, or empty. left_out: why the article is not read, or empty.
    """

    title: str
    wikitext: str
    spaces: frozenset[str]
    language: str = ""
    left_out: str = ""


def read_pages(path: str | Path) -> Iterator[Page]:
    """Articles of a dump in order. Memory holds one, and no more than `LONGEST_TEXT` characters of it.

    Raises:
        UserError: not a dump, damaged, or cut short; the message says after which article, and how many were whole.
    """
    count, last = 0, "none"
    reader = _DumpReader()
    try:
        with _opened(path) as file:
            while True:
                block = file.read(_READ_BYTES)
                reader.feed(block)
                while reader.pages:
                    page = reader.pages.popleft()
                    count, last = count + 1, page.title
                    yield page
                if not block:
                    break
    except (EOFError, expat.ExpatError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{path}: {error.strerror}") from None
        what = "is cut or damaged" if reader.started or isinstance(error, EOFError) else "is no MediaWiki dump"
        raise UserError(
            f"{path} {what} ({str(error)[:100]}): {count:,} articles before it were whole, the last is '{last}'; "
            "fetch the file again"
        ) from None
    if not count:
        raise UserError(f"{path}: no article in it; give a pages-articles dump")


def _opened(path: str | Path) -> BufferedIOBase:
    name = str(path)
    if name.endswith(".bz2"):
        return bz2.open(name, "rb")  # of one stream or many
    return gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb")


class _DumpReader:
    """An incremental parser of a dump's XML. It keeps a page's title, namespace and the text of its last revision."""

    _KEPT = ("title", "ns", "text", "namespace")

    def __init__(self) -> None:
        self.pages: deque[Page] = deque()
        self.started = False
        self._language = ""
        self._spaces: set[str] = set()
        self._page: dict[str, str] = {}
        self._is_redirect = False
        self._is_space = False
        self._kept: list[str] | None = None  # characters of the open element, if it is one of _KEPT
        self._size = 0
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters

    def feed(self, block: bytes) -> None:
        """Parse the next bytes; an empty block ends the dump. Raises ExpatError."""
        self._parser.Parse(block, not block)

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        name = _local(tag)
        if not self.started:
            self.started, self._language = True, attributes.get("xml:lang", "")
        if name == "page":
            self._page, self._is_redirect = {}, False
        elif name == "redirect":
            self._is_redirect = True
        elif name in self._KEPT:
            self._kept, self._size = [], 0
            self._is_space = attributes.get("key") != "0"

    def _characters(self, characters: str) -> None:
        if self._kept is not None:
            self._size += len(characters)
            if self._size <= LONGEST_TEXT:
                self._kept.append(characters)

    def _end(self, tag: str) -> None:
        name = _local(tag)
        if name == "page":
            self._finish()
        elif name in self._KEPT and self._kept is not None:
            content, self._kept = "".join(self._kept), None
            if name == "namespace":
                if self._is_space and content:
                    self._spaces.add(content.lower())
                return
            self._page[name] = content
            if name == "text":
                long = self._size > LONGEST_TEXT
                self._page["left out"] = f"pages of more than {LONGEST_TEXT >> 20} MiB" if long else ""

    def _finish(self) -> None:
        page = self._page
        if self._is_redirect or page.get("ns", "0") != "0" or not page.get("text"):
            return
        why = page.get("left out", "")
        text = "" if why else page["text"]
        self.pages.append(Page(page.get("title", ""), text, frozenset(self._spaces), self._language, why))


def _local(tag: str) -> str:
    return tag.rpartition(":")[2]


def seconds_to_parse(wikitext: str) -> float:
    """Roughly the most seconds that unclosed markup may cost the parser. Takes time linear in the text."""
    depth = dict.fromkeys(("{{", "{|", "[", "<"), 0)
    cut_tags = 0
    for found in _MARKUP.finditer(wikitext):
        token = found[0]
        if token[0] == "<":
            if token[-1] != ">" or token.count('"') % 2:
                cut_tags += 1
            elif token[1] == "/":
                depth["<"] = max(0, depth["<"] - 1)
            elif token[-2] != "/" and found["tag"].lower() not in _SINGLE_TAGS:
                depth["<"] += 1
        elif token in ("{{", "{|"):
            depth[token] += 1
        elif token[0] == "[":
            depth["["] += 1
        else:
            kind = {"}}": "{{", "|}": "{|"}.get(token, "[")
            depth[kind] = max(0, depth[kind] - 1)
    cost = _COST_US["open"] * sum(depth.values()) + _COST_US["cut tag"] * cut_tags
    return cost * len(wikitext) / 1e6


_MARKUP = re.compile(r"\{\{|\}\}|\{\||\|\}|\[\[|\[(?=\w+:|//)|\]\]?|</?(?P<tag>[A-Za-z]+)[^<>]*>?")
_SINGLE_TAGS = {"br", "wbr", "hr", "meta", "link", "img", "li", "dt", "dd", "th", "td", "tr"}


def _without_comments(wikitext: str) -> str:
    """Text without comments. Of one that never ends only the mark is removed."""
    kept: list[str] = []
    end = 0
    while (begin := wikitext.find("<!--", end)) >= 0:
        kept.append(wikitext[end:begin])
        close = wikitext.find("-->", begin + 4)
        if close < 0:
            return "".join(kept) + wikitext[begin:].replace("<!--", " ")
        end = close + 3
    return "".join(kept) + wikitext[end:]


def clean(page: Page) -> str:
    """The running text of an article, without templates, tables, notes, headings and captions. Blank lines separate paragraphs.

    Raises:
        TooCostlyError: so much markup is never closed that parsing it would take too long.
    """
    parser = _parser()
    wikitext = _without_comments(page.wikitext)
    if seconds_to_parse(wikitext) > _MOST_SECONDS:
        raise TooCostlyError("pages with markup that is never closed")
    text = "".join(_rendered(parser.parse(re.sub(r"__[A-Z]+__", "", wikitext)), parser.nodes, page.spaces))
    text = whole_characters(text)
    lines = (line.strip().lstrip("*#:;").strip() for line in text.splitlines())
    # What templates leave: empty brackets, and spaces before punctuation.
    tidy = (re.sub(r"\s+([,.;:])", r"\1", re.sub(r"\(\s*[,;]?\s*\)", "", " ".join(line.split()))) for line in lines)
    return "\n\n".join(line for line in tidy if num_words(line) > 2)


def _rendered(code: Any, nodes: Any, spaces: frozenset[str]) -> Iterator[str]:
    """Text of wikitext nodes; templates, comments, headings and parameters have no text."""
    for node in code.nodes if code is not None else ():
        if isinstance(node, nodes.Text):
            yield node.value
        elif isinstance(node, nodes.HTMLEntity):
            yield node.normalize()
        elif isinstance(node, nodes.Wikilink):
            # A link to a page that would otherwise be embedded or listed
            if str(node.title).startswith(":") and node.text is None:
                yield str(node.title)[1:]
            elif not _is_dropped(node, spaces):
                yield from _rendered(node.title if node.text is None else node.text, nodes, spaces)
        elif isinstance(node, nodes.ExternalLink):
            yield from _rendered(node.title, nodes, spaces)
        elif isinstance(node, nodes.Tag) and str(node.tag).strip().lower() == "br":
            yield " "
        elif isinstance(node, nodes.Tag) and str(node.tag).strip().lower() not in _DROPPED_TAGS:
            yield from _rendered(node.contents, nodes, spaces)


def _is_dropped(link: Any, spaces: frozenset[str]) -> bool:
    """Whether a link has no running text: categories and pictures, also under a namespace that the dump does not name."""
    title = str(link.title).strip()
    space, colon, _ = title.partition(":")
    if colon and space.strip().lower() in spaces | _ALWAYS_DROPPED:
        return True
    if title.startswith(":"):
        return False
    parameters = str(link.text).split("|")[:-1] if link.text is not None else []
    return bool(_MEDIA_NAME.search(title)) or any(_MEDIA_PARAMETER.fullmatch(each) for each in parameters)


class TooCostlyError(ValueError):
    """A page whose parsing would take too long. The message describes such pages, in the plural."""


def _parser() -> Any:
    try:
        import mwparserfromhell
    except ModuleNotFoundError:
        raise UserError("reading a MediaWiki dump needs mwparserfromhell; pip install mwparserfromhell") from None
    return mwparserfromhell
