"""What a misspelt name was meant to be: compared by its words, then by its letters. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher


LONG = 12
"""A list of more names than this is left out where one of them is near."""

NEAR = 0.6
"""From which likeness on, between 0 and 1, two words or names are near each other."""

_ENDINGS = ("8bit", "layerwise")
"""Words that every method's name may end with; lists of names without them do not say otherwise."""

_TRANSFORMERS = {
    "galore_adamw": "galore_dominant_adamw",
    "galore_adafactor": "galore_dominant_adafactor",
    "apollo_adamw": "apollo_random_adamw",
}
"""Names that transformers has itself (for galore-torch and apollo-torch), and what is the same method here."""


def suggest(word: str, valid: Iterable[str]) -> str:
    """Return the end of an error message about an unknown name: what was meant, or what there is.

    Examples:
        >>> suggest("galore_adamw_i3s", ["galore_dominant_adamw", "galore_i3s_adamw"])
        "; did you mean 'galore_i3s_adamw'? Valid: galore_dominant_adamw, galore_i3s_adamw"
    """
    names = list(valid)
    listed = f" Valid: {', '.join(names) or 'none'}"
    if ours := _of_transformers(word, names):
        return f"; that is transformers' own, which keeps its name: the method here is {ours!r}"
    found, near = nearest(word, names)
    if near < NEAR:
        return "." + listed
    ours = _TRANSFORMERS.get(found, found)
    return f"; did you mean {ours if ours in names else found!r}?" + (listed if len(names) <= LONG else "")


def nearest(word: str, valid: Iterable[str]) -> tuple[str, float]:
    """Return the name that is nearest to a word, and how near it is, in [0, 1].

    Of equally near ones that is the method itself, without a subspace, if there is one; else the first that is listed.
    """
    itself = "full_" + "_".join(one for one in _words(word) if one not in _ENDINGS)
    likeness = {name: _likeness(word, name) for name in valid}
    found = max(likeness, key=lambda name: (likeness[name], name == itself), default="")
    return found, likeness.get(found, 0.0)


def _of_transformers(word: str, names: list[str]) -> str:
    """Return our name of a method for which transformers has the name `word`; "" if it is no such name."""
    found = re.fullmatch(r"(\w+?)((?:_8bit)?(?:_layerwise)?)", word)
    ours = _TRANSFORMERS.get(found[1], "") if found else ""
    return ours + found[2] if found and ours in names else ""


def _likeness(word: str, name: str) -> float:
    """Return how near a word is to a name, in [0, 1]: 1 for the same words in any order."""
    words = _words(name)
    given = [one for one in _words(word) if one not in _ENDINGS or one in words]
    return max(_by_words(given, words), _by_letters(word.lower(), name))


def _by_words(given: list[str], words: list[str]) -> float:
    """Compare two lists of words in any order. Left-out words count less than wrong ones."""
    left, found = list(words), 0.0
    for one in given:
        best = max(left, key=lambda other: _by_letters(one, other), default="")
        if (near := _by_letters(one, best)) >= NEAR:
            found += near
            left.remove(best)
    return 0.75 * found / max(len(given), 1) + 0.25 * found / max(len(words), 1)


def _by_letters(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b).ratio()


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.lower())
