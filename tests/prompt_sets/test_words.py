"""Prompts read by rule, and by spaCy where it is installed."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from repalign.errors import UserError
from repalign.prompt_sets.words import RuleReader, SpacyReader


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a red book and a yellow vase", ["a red book", "a yellow vase"]),
        ("A metallic desk and a fluffy rug.", ["A metallic desk", "a fluffy rug"]),
        ("the oval mirror is on the square table", ["the oval mirror", "the square table"]),
        ("red apple, green leaf", ["red apple", "green leaf"]),
        ("two dogs the size of a cat", ["two dogs", "the size", "a cat"]),
        ("The soft, warm glow of the candle", ["The soft, warm glow", "the candle"]),
        ("the freshly brewed coffee in its cup", ["the freshly brewed coffee", "its cup"]),
        ("the bride's white dress shone", ["the bride's white dress"]),
        ("a can on a light", ["a can", "a light"]),
        ("a circular ceiling light and a cubic can of soup", ["a circular ceiling light", "a cubic can", "soup"]),
        ("the", []),
    ],
)
def test_noun_phrases(prompt, phrases):
    assert RuleReader()(prompt).phrases == phrases


def test_parts_of_speech():
    read = RuleReader()("The red hat was neatly placed next to 2 wooden racks.")
    kinds = "DET ADJ NOUN AUX ADV VERB ADV ADP NUM ADJ NOUN PUNCT"
    assert [kind for _, kind in read.words] == kinds.split()
    assert [text for text, _ in read.words][-3:] == ["wooden", "racks", "."]


def test_what_spacy_reads(monkeypatch):
    """Its words and chunks as they are; another model is another reader."""

    def load(name):
        if name != "en_core_web_sm":
            raise OSError(name)
        words = [SimpleNamespace(text="a", pos_="DET"), SimpleNamespace(text="cat", pos_="NOUN")]

        class Document(list):
            noun_chunks = (SimpleNamespace(text="a cat"),)

        class Model:
            meta = {"version": "3"}

            def __call__(self, prompt):
                return Document(words)

        return Model()

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    reader = SpacyReader()
    assert reader("a cat") == ([("a", "DET"), ("cat", "NOUN")], ["a cat"]) and reader.fingerprint == "en_core_web_sm-3"
    with pytest.raises(UserError, match="'en_core_web_md' is not installed; 'python -m spacy download en_core_web_md'"):
        SpacyReader("en_core_web_md")
    with pytest.raises(UserError, match="reader.model: '../other' is no name of a package"):
        SpacyReader("../other")


def test_spacy_is_missed_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match=r"^prompt_set.scorer.reader: needs the package spacy.*RuleReader") as error:
        SpacyReader()
    assert "\n" not in str(error.value)
