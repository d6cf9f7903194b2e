"""Running text of any language: words, whole characters, fences, sentences, and what tells a language."""

from __future__ import annotations

import time

import pytest

from bert_fast.data.text import (
    detect_language,
    num_words,
    split_sentences,
    strip_marks,
    whole_characters,
    without_fences,
)

# Two sentences each; by the language that is told.
TWO_SENTENCES = {
    "en": "The cat sat on the mat, e.g. at noon. It was warm there.",
    "de": "Das ist z. B. am 3. Oktober so gewesen. Die Katze lag nicht auf der Matte.",
    "fr": "Le chat est sur le tapis dans la maison. Il ne bouge pas.",
    "es": "El gato está sobre la alfombra de la casa. No se mueve por la noche.",
    "it": "Il gatto è sul tappeto della casa con la gatta. Non si muove per niente.",
    "pl": "Kot jest w domu i nie śpi na macie. To jest jego dom, ale nie miejsce.",
    "ru": "Кошка спит на ковре. Ей там тепло.",
    "el": "Η γάτα κοιμάται στο χαλί. Είναι πολύ ζεστά εκεί.",
    "ar": "القطة تنام على السجادة. الجو دافئ هناك.",
    "hi": "बिल्ली चटाई पर सोती है। वहाँ बहुत गर्मी है।",
    "ko": "고양이가 매트 위에서 잔다. 그곳은 따뜻하다.",
    "zh": "今天天气很好我们去公园散步。孩子们在湖边喂鸭子。",
    "ja": "猫がマットの上で寝ています。「そこは暖かいですか？」",
    "th": "แมวนอนบนเสื่อ ที่นั่นอบอุ่นมาก",
    "my": "ကြောင်သည်ဖျာပေါ်တွင်အိပ်သည်။ ထိုနေရာသည်နွေးသည်။",
    "km": "ឆ្មាដេកនៅលើកន្ទេល។ ទីនោះក្តៅណាស់។",
}


@pytest.mark.parametrize("language", TWO_SENTENCES)
def test_sentences_of_a_language_that_is_told_by_its_text(language: str) -> None:
    text = TWO_SENTENCES[language]
    assert detect_language(text) == language
    sentences = split_sentences(text, detect_language(text))
    assert len(sentences) == 2
    assert "".join(sentences).replace(" ", "") == text.replace(" ", "")


def test_german_by_english_rules_is_broken_which_is_why_the_language_matters() -> None:
    text = "Er kam am 3. Oktober. Dann ging er."
    assert split_sentences(text, "de") == ["Er kam am 3. Oktober.", "Dann ging er."]
    assert split_sentences(text, "en")[0] != "Er kam am 3. Oktober."


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("one", 1),
        ("two words", 2),
        ("今天天气很好", 3),
        ("好", 1),
        ("GPU 今天天气", 3),
        ("สวัสดี", 3),
        ("안녕 하세요", 2),
    ],
)
def test_words_of_scripts_with_and_without_blanks(text: str, count: int) -> None:
    assert num_words(text) == count


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("plain é 今", "plain é 今"),
        ("a \ud83d\ude00 b", "a 😀 b"),
        ("a \ud83d b", "a \ufffd b"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud83d\ud83d\ude00", "\ufffd😀"),
    ],
)
def test_halves_of_surrogate_pairs(text: str, whole: str) -> None:
    assert whole_characters(text) == whole


def test_halves_of_pairs_in_any_text_reach_the_disk() -> None:
    (sentence,) = split_sentences("A face \ud83d\ude00 and a half \ud83d of one.")
    assert sentence.encode().decode() == "A face 😀 and a half \ufffd of one."


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a\n```py\ncode\n```\nb", "a b"),
        ("a\n~~~\ncode\n~~~\nb", "a b"),
        ("a\n````\n```\ncode\n```\n````\nb", "a b"),  # a longer fence holds a shorter one
        ("a\n```\ncode\n~~~\nb", "a ``` code ~~~ b"),  # never closed: text
        ("a\n~~~\nb", "a ~~~ b"),
        ("a\n   ```\ncode\n ```  \nb", "a b"),
        ("a\n    ```\nb\n    ```\nc", "a     ``` b     ``` c"),  # indented by four: no fence
        ("use ``` here\n``` and `there`\nb", "use ``` here ``` and `there` b"),
    ],
)
def test_fences_of_markdown(text: str, kept: str) -> None:
    assert " ".join(without_fences(text.split("\n"))) == kept


def test_a_fence_that_is_never_closed_is_not_held_for_good() -> None:
    taken = 0

    def lines():
        nonlocal taken
        yield "```"
        for _ in range(200_000):
            taken += 1
            yield "a line"

    assert next(without_fences(lines())) == "```"
    assert taken < 50_000


def test_lines_without_letters_end_a_paragraph() -> None:
    assert strip_marks("# One\n~~~\n* * *\n> 二\n-----\nthree").split("\n") == ["One", "", "", "二", "", "three"]


@pytest.mark.parametrize("unit", ["今天天气很好我们去公园散步。", "!」", "word. ", "word ", "字"])
def test_a_paragraph_without_end_is_split_in_time(unit: str) -> None:
    """A file on one line. `sentencex` alone takes minutes for a MiB of Chinese."""
    start = time.perf_counter()
    sentences = split_sentences((unit * 300_000)[:300_000], "en")
    assert time.perf_counter() - start < 10
    if unit[-1] == "。":
        assert len(sentences) == 300_000 // len(unit) + 1
