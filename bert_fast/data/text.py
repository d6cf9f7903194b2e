"""Running text in any language: whole characters, words, sentences, and removing code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import sentencex

DEFAULT_LANGUAGE = "en"

# Letters of scripts that put no blank between words: Thai to Tibetan, Myanmar, Khmer, Yi, kana, Bopomofo, Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u3041-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua48f\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff]"
)
# These end a sentence even without a blank after them; a point inside a word (torch.nn.Linear) does not.
_ENDS_ANYWHERE = re.compile("[。．！？｡।॥။༎።៕។][\"'”’」』）)》〉】]*$")
# Thai and Lao have no full stop, and `sentencex` does not know Khmer's.
_BLANK_ENDS_SENTENCE = re.compile("(?<=[\u0e00-\u0eff])\\s+(?=[\u0e00-\u0eff])|(?<=[\u17d4\u17d5])\\s+")
_SHORTEST_PARAGRAPH = 12
# Characters that are split at once: without blanks, the time of `sentencex` grows with their square.
_UNSPACED_PORTION, _PORTION = 1 << 12, 1 << 15
_LOOKED_AT = 4000  # characters from which the language is detected


def whole_characters(text: str) -> str:
    """`text` with surrogate pairs joined to the characters they encode; a lone surrogate becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def num_words(text: str) -> int:
    """Number of words between blanks; in scripts without blanks, two letters count as one word."""
    if not _UNSPACED.search(text):
        return len(text.split())
    return sum(max(1, (len(_UNSPACED.findall(word)) + 1) // 2) for word in text.split())


def without_fences(lines: Iterable[str]) -> Iterator[str]:
    """Lines of Markdown without fenced code blocks. A block that is never closed is text."""
    held: list[str] = []  # lines since an open fence
    fence = ""
    for line in lines:
        found = re.match(r" {0,3}(`{3,}|~{3,})(.*)", line)
        if fence:
            held.append(line)
            if found and found[1].startswith(fence) and not found[2].strip():
                held, fence = [], ""
            elif len(held) > _MOST_HELD:
                yield from held
                held, fence = [], ""
        elif found and not (found[1][0] == "`" and "`" in found[2]):
            held, fence = [line], found[1]
        else:
            yield line
    yield from held


_MOST_HELD = 20_000


def strip_marks(text: str) -> str:
    """Lines without the marks of headings, quotes and lists; a line without a letter or digit ends a paragraph."""
    stripped = (line.strip().lstrip("#>*-").strip() for line in text.splitlines())
    return "\n".join(line if re.search(r"\w", line) else "" for line in stripped)


def split_sentences(text: str, language: str = DEFAULT_LANGUAGE) -> list[str]:
    """Sentences of at least two words, by a language's rules, of paragraphs that blank lines separate."""
    sentences: list[str] = []
    for paragraph in re.split(r"\n\s*\n", whole_characters(text)):
        joined = " ".join(paragraph.split())
        if len(joined) < _SHORTEST_PARAGRAPH and not _UNSPACED.search(joined):
            continue
        for portion in _portions(joined):
            pending = ""
            for piece in sentencex.segment(language, portion):
                pending += piece
                if piece[-1].isspace() or _ENDS_ANYWHERE.search(piece):
                    sentences.append(pending.strip())
                    pending = ""
            if pending.strip():
                sentences.append(pending.strip())
    phrases = (phrase for sentence in sentences for phrase in _BLANK_ENDS_SENTENCE.split(sentence))
    return [phrase for phrase in phrases if num_words(phrase) > 1]


def _portions(paragraph: str) -> Iterator[str]:
    """A long paragraph in portions that end with a sentence where possible."""
    begin = 0
    while len(paragraph) - begin > _UNSPACED_PORTION:
        end = max(paragraph.rfind(stop, begin, begin + _UNSPACED_PORTION) for stop in "。！？｡។။།") + 1
        if end <= begin:
            window = begin + (_PORTION if " " in paragraph[begin : begin + _UNSPACED_PORTION] else _UNSPACED_PORTION)
            if len(paragraph) <= window:
                break
            end = (paragraph.rfind(". ", begin, window) + 1 or paragraph.rfind(" ", begin, window)) + 1
            end = end if end > begin + 1 else window
        yield paragraph[begin:end]
        begin = end
    yield paragraph[begin:]


class _Script(NamedTuple):
    language: str
    letters: re.Pattern[str]


# Scripts of one language, or of languages that end sentences alike. Kana before Han, as Japanese has both.
_SCRIPTS = tuple(
    _Script(language, re.compile(f"[{letters}]"))
    for language, letters in (
        ("ja", "\u3041-\u30ff"),
        ("zh", "\u3400-\u9fff"),
        ("ko", "\uac00-\ud7a3"),
        ("th", "\u0e00-\u0e7f"),
        ("lo", "\u0e80-\u0eff"),
        ("bo", "\u0f00-\u0fff"),
        ("my", "\u1000-\u109f"),
        ("km", "\u1780-\u17ff"),
        ("hi", "\u0900-\u097f"),
        ("bn", "\u0980-\u09ff"),
        ("pa", "\u0a00-\u0a7f"),
        ("gu", "\u0a80-\u0aff"),
        ("or", "\u0b00-\u0b7f"),
        ("ta", "\u0b80-\u0bff"),
        ("te", "\u0c00-\u0c7f"),
        ("kn", "\u0c80-\u0cff"),
        ("ml", "\u0d00-\u0d7f"),
        ("si", "\u0d80-\u0dff"),
        ("ar", "\u0600-\u06ff"),
        ("he", "\u0590-\u05ff"),
        ("ru", "\u0400-\u04ff"),
        ("el", "\u0370-\u03ff"),
        ("hy", "\u0530-\u058f"),
        ("ka", "\u10a0-\u10ff"),
        ("am", "\u1200-\u137f"),
    )
)
# Frequent words that tell languages of the Latin script apart.
_WORDS = {
    "en": "the and of to is in that it was for with as his he be not by are this have from she which",
    "de": "der die das und ist nicht ein eine mit den von zu auf sich dem für wird auch des im als er sie war",
    "fr": "le la les et des est une dans pas que qui il pour sur du elle au avec ne sont cette plus par ce",
    "es": "el la los las y es una en que no por con se del para un su como al lo más pero fue está",
    "it": "il la gli e è una di che non per con si del della un sono nel alla anche le più come era lo",
    "pt": "o a os as e é uma em que não por com se do da para um ao no na mais como foi são",
    "nl": "de het een en is van niet dat in op te met voor zijn die er aan ook hij naar bij werd als",
    "sv": "och att det är en som på av för med den inte till ett var har jag han om de från",
    "da": "og at det er en som på af for med den ikke til et var har jeg han om de fra",
    "pl": "i w nie na się że jest z do to jak o co ale po tak od za przez był jego dla",
    "fi": "ja on ei että se oli hän ovat kun mutta myös niin joka kuin tai olen sen ole",
    "cs": "a je se na že v to s jako byl ale z do pro jsem by tak o po jeho která",
    "tr": "ve bir bu da de için ile çok ne olarak gibi daha o ama kadar olan sonra var",
    "ro": "și de la a în că este cu nu o un pe care din mai sau pentru se sunt fost",
    "hu": "a az és hogy nem egy is volt meg ez csak de már még mint vagy el ki",
}
_FREQUENT = {language: frozenset(words.split()) for language, words in _WORDS.items()}


def detect_language(text: str) -> str:
    """The language whose rules end the sentences of `text`, found by its script, and in the Latin script by frequent words.

    English unless there is clear evidence of another language.
    """
    start = text[:_LOOKED_AT]
    if not start.isascii():
        counts = {script.language: len(script.letters.findall(start)) for script in _SCRIPTS}
        if counts["ja"] * 10 > counts["zh"]:
            counts["ja"] += counts["zh"]
        best = max(counts, key=lambda language: counts[language])
        if 2 * counts[best] > len(re.findall(r"[^\W\d_A-Za-z]", start)) and counts[best] * 2 > len(
            re.findall("[A-Za-z]", start)
        ):
            return best
    words = re.findall(r"[^\W\d_]+", start.lower())
    found = {language: sum(word in frequent for word in words) for language, frequent in _FREQUENT.items()}
    best = max(found, key=lambda language: found[language])
    return best if found[best] > 1.3 * found[DEFAULT_LANGUAGE] and found[best] > 0.08 * len(words) else DEFAULT_LANGUAGE
