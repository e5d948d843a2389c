"""Words of a prompt with their parts of speech, and its noun phrases: by rule, or by spaCy where it is installed."""

from __future__ import annotations

import importlib
import re
from typing import Any, NamedTuple, Protocol

from repalign.errors import UserError

KEY = "prompt_set.scorer.reader"
# Closed classes of English; every other word is judged by the lists below, by its ending and by what stands before it.
_CLOSED = {
    "DET": "a an the this that these those every each some any no another",
    "NUM": "one two three four five six seven eight nine ten",
    "PRON": "i you he she it we they him them me us who which what both itself its his her their our my your",
    "CCONJ": "and or but nor",
    "SCONJ": "while as because if when than where",
    "PART": "'s not",
    "AUX": "is are was were be been being am could will would may might must do does did",
    "ADP": "of to on in with for above by between near through down over from across against up past at out into onto "
    "inside outside beside besides below beneath behind like around under underneath along toward towards off without "
    "within upon among atop during after before",
    "ADV": "very too also together nearby away back there here then just only even almost nearly neatly otherwise most "
    "more less quite seamlessly",
}
_KINDS = {word: kind for kind, words in _CLOSED.items() for word in words.split()}
_ADJECTIVES = set(
    "ancient angry angular antique bad bare beautiful beige bent best big bitter black blue blunt bold brave "
    "bright broad brown calm circular clean clear closed cold common conical cool crimson crisp crystalline cubic "
    "cubical curved cyan cylindrical damp dark deep delicate different dim dirty dry dull early elegant empty "
    "fake fancy fast favorite favourite few fine flat free fresh full gentle giant golden good grand gray great "
    "green grey half happy hard heavy hexagonal high hollow hot huge human indigo intricate large late light "
    "little lone long loose loud low lush magenta main many maroon matte metallic mild modern narrow navy new "
    "next nice oblong octagonal old opaque open orange other oval own pale pentagonal pink plain plastic plush "
    "pointed pointy polished poor pretty pure purple pyramidal quick quiet rare raw real rectangular red remote "
    "rich ripe rough round rounded sad same scarlet several shallow sharp shiny short silent simple sleek slick "
    "slim slow small smooth soft sour spherical square stainless steady steep stiff straight striped strong sweet "
    "tall tame tan tart teal textured thick thin tight tiny tired translucent transparent triangular turquoise "
    "ugly unique vast vibrant vintage violet vivid warm weak wet white whole wide wild wooden woolen woollen "
    "worst yellow young".split()
)
# Words with an adjective's ending that name things.
_NAMES = set(
    "alley animal arrival attic baby bakery ball battery bay bed berry blueberry body boy building bunny "
    "butterfly canal candy canopy carving ceiling cereal cherry chimney city clay clinic clothing comic country "
    "crystal cutlery dairy daisy day disc donkey drawing duckling dumpling earring evening eye fabric factory "
    "fairy family feed festival gallery greenery hall hay honey hospital ivy jelly jersey jewelry journal key "
    "king kitty lady library lighting lily magic meal medal metal money monkey morning mosaic music painting "
    "party pedal petal picnic plastic pony pottery pudding puppy railing raspberry red reed ring sandal scenery "
    "seed shed sibling signal sing sky sled speed spring steed stocking story strawberry string swimming swing "
    "teddy thing topic toy traffic tray trophy turkey valley wall wedding weed wing".split()
)
_VERBS = set(
    "ate bent blew broke came cast comes drove eats fed fell flew flies flows gave gives goes grew had hangs has "
    "have held hold holds hung kept lay leapt led left lies lit made met provide provides ran rises rose runs "
    "sang sank sat shines shone sings sit sits slept sped spun stand stands stood swam swept swims takes threw "
    "told took wears went woke wore wrote".split()
)
_ADJECTIVAL = re.compile(r".{3,}(ful|less|ous|ish|ic|ical|ular|ant|ent|ive|able|ible|shaped|colored|like|ary)$|.{3,}y$")
_NOMINAL = re.compile(r".*(ment|ness|tion|plant|pendant|elephant|tent|student|parent|restaurant|ette|ary|table)$")
_BOTH = ("light", "orange", "gold", "silver", "oval", "square", "stand")  # things, where they close a phrase
_OWNERS = ("its", "his", "her", "their", "our", "my", "your")
_BEFORE_NOUN = ("DET", "ADJ", "NUM")


class Sentence(NamedTuple):
    """A prompt, read.

    Attributes:
        words: text and part of speech of each, in the names of Universal Dependencies.
        phrases: noun phrases without what follows their noun, as they are written.
    """

    words: list[tuple[str, str]]
    phrases: list[str]


class Reader(Protocol):
    """Reads prompts. ``fingerprint`` changes with what it may say."""

    fingerprint: str

    def __call__(self, prompt: str) -> Sentence: ...


class RuleReader:
    """Parts of speech by closed classes, lists and endings; noun phrases are runs that end in a noun.

    For prompts of the patterns of T2I-CompBench ("a red book and a yellow vase", "The red hat was on top of the brown
    coat rack."). Deviation: the benchmark reads with spaCy's ``en_core_web_sm``: see :class:`SpacyReader`. How often
    both agree is in docs/evaluation.md.
    """

    fingerprint = "rules"

    def __call__(self, prompt: str) -> Sentence:
        """The words and noun phrases of a prompt."""
        tokens = list(re.finditer(r"'s\b|\w+(?:-\w+)*|[^\w\s]", prompt))
        words: list[tuple[str, str]] = []
        before = ""  # kind of the last word that bears on the next one
        for place, token in enumerate(tokens):
            after = tokens[place + 1][0].lower() if place + 1 < len(tokens) else "."
            kind = _kind(token[0], before, after)
            words.append((token[0], kind))
            if not (kind in ("ADV", "VERB") and before in _BEFORE_NOUN or before == "ADJ" and _joins(token[0], kind)):
                before = kind  # else the word stands within a phrase whose noun is to come
        return Sentence(words, [prompt[tokens[a].start() : tokens[b].end()] for a, b in _phrases(words)])


def _joins(text: str, kind: str) -> bool:
    """Whether a word may stand between two adjectives of one noun."""
    return text == "," or kind == "CCONJ"


def _kind(text: str, before: str, after: str) -> str:
    """Of a word, by the kind of the one before and the text of the one after it."""
    word = text.lower()
    if not word[0].isalnum() and word != "'s":
        return "PUNCT"
    adjective = word in _ADJECTIVES or (
        bool(_ADJECTIVAL.fullmatch(word)) and not _NOMINAL.fullmatch(word) and word not in _NAMES
    )
    last = not after[0].isalnum() or after in _KINDS  # of its phrase
    if adjective and before == "DET" and after == ",":
        return "ADJ"
    if word == "can":
        return "NOUN" if before in _BEFORE_NOUN else "AUX"
    if word in _KINDS:
        return "ADJ" if word == "only" and before == "DET" else _KINDS[word]
    if word.isdigit():
        return "NUM"
    if word.endswith("ly") and len(word) > 5 and word not in _NAMES:
        return "ADV"
    if word == "next" and before != "DET":
        return "ADJ" if before == "AUX" else "ADV"
    if last and (before in (*_BEFORE_NOUN, "PART") or (before != "AUX" and word in _BOTH)):
        return "NOUN"  # what closes a phrase, whatever it looks like
    if word in _ADJECTIVES or (adjective and (not last or before == "AUX")):
        return "ADJ"
    if word in _VERBS or (re.fullmatch(r"\w{2,}(ed|ing)", word) and word not in _NAMES):
        return "VERB"
    return "NOUN"


def _phrases(words: list[tuple[str, str]]) -> list[tuple[int, int]]:
    """First and last word of runs of determiners, numerals, adjectives and nouns up to their last noun."""
    found: list[tuple[int, int]] = []
    first: int | None = None
    noun: int | None = None
    for place, (text, kind) in enumerate([*words, (".", "PUNCT")]):
        starts = kind == "DET" or text.lower() in _OWNERS
        inside = starts or kind in ("ADJ", "NUM", "NOUN", "PROPN")
        if noun is None and first is not None:
            inside = inside or kind in ("ADV", "VERB") or (words[place - 1][1] == "ADJ" and _joins(text, kind))
        goes_on = inside and not starts and (noun is None or kind in ("NOUN", "PROPN"))
        if first is not None and not goes_on and not (kind == "PART" and text == "'s"):
            found += [(first, noun)] if noun is not None else []
            first = noun = None
        if inside and first is None:
            first = place
        if first is not None:
            noun = place if kind in ("NOUN", "PROPN") else None if kind == "PART" else noun
    return found


class SpacyReader:
    """What T2I-CompBench reads with: spaCy's tagger and noun chunks (``en_core_web_sm``).

    Args:
        model: an installed package of spaCy's.

    Raises:
        UserError: when spaCy or the model is not installed.
    """

    def __init__(self, model: str = "en_core_web_sm") -> None:
        try:
            spacy: Any = importlib.import_module("spacy")
        except ModuleNotFoundError as error:
            raise UserError(
                f"{KEY}: needs the package spacy, which is not installed: 'pip install spacy'; or read by rule with "
                "repalign.prompt_sets.words.RuleReader"
            ) from error
        if not model.isidentifier():
            raise UserError(f"{KEY}.model: '{model}' is no name of a package; expected en_core_web_sm")
        try:
            self._read = spacy.load(model)
        except OSError as error:
            raise UserError(
                f"{KEY}.model: '{model}' is not installed; 'python -m spacy download {model}' installs it"
            ) from error
        self.fingerprint = f"{model}-{self._read.meta['version']}"

    def __call__(self, prompt: str) -> Sentence:
        """The words and noun phrases of a prompt."""
        read = self._read(prompt)
        return Sentence([(word.text, word.pos_) for word in read], [chunk.text for chunk in read.noun_chunks])
