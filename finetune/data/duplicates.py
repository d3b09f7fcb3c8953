"""Find duplicates: texts that are equal except for case, spaces and punctuation, or nearly equal."""

import re
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray

NEAR = 0.8  # two texts are near duplicates if they are at least this similar
SHINGLE_CHARACTERS = 5
# Texts are candidates if all hashes of a band agree. At similarity NEAR, one in 20,000 pairs agrees in none.
NUM_BANDS = 25
HASHES_PER_BAND = 5
# Templated rows ("Convert 3 km", "Convert 4 km", ...) are all near each other, and have too many pairs to
# compare. At most this many candidates are taken from a band, and the nearest by their hashes are measured.
MAX_PER_BAND = 20
MAX_MEASURED = 50

# Punctuation is removed only around words: within a word it has a meaning, as in 3.5, C++ and x-1. After a
# digit, ! and quotes have a meaning too (5! and 5'), and brackets always have one.
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_QUOTES = "\"'\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}"
_QUOTES += "\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}"
_PUNCTUATION = re.compile(rf"(?:(?<!\d)[!{_QUOTES}]|[.,;:?。])+(?=\s|$)|(?<!\S)[{_QUOTES}¿¡]+")


class Match(NamedTuple):
    """The text at `position` is the most similar one; `exact` if it is the same after `normalize`."""

    position: int
    similarity: float
    exact: bool


def normalize(text: str) -> str:
    """Remove what rarely changes the meaning: case, width, spaces, and punctuation around words."""
    compatible = _NOT_ASCII.sub(lambda match: _compatible(match[0]), text)
    plain = unicodedata.normalize("NFC", compatible.casefold())
    return " ".join(_PUNCTUATION.sub("", plain).split()) or plain.strip()


def _compatible(letter: str) -> str:
    """The plain form of a wide letter, a ligature and the like; superscripts stay: 10² is not 102."""
    is_raised = unicodedata.decomposition(letter).startswith(("<super>", "<sub>"))
    return letter if is_raised else unicodedata.normalize("NFKC", letter)


def same_after_normalizing(texts: Sequence[str]) -> list[list[int]]:
    """Group the positions of texts that are equal after `normalize`. Blank texts equal no other."""
    places: dict[str, list[int]] = defaultdict(list)
    for position, text in enumerate(texts):
        places[normalize(text)].append(position)
    return [positions for text, positions in places.items() if text and len(positions) > 1]


def most_similar(texts: Sequence[str], among: Sequence[str] | None = None) -> list[Match | None]:
    """Find the most similar text for each text, `among` others or, by default, among the texts themselves.

    It is None if no text reaches NEAR, and for blank texts. Similarity is the Jaccard index of the sets of
    5-character pieces of the normalized texts (Broder 1997). Candidates come from MinHash with
    locality-sensitive hashing, which may miss a pair just above NEAR, most of all among many similar texts.
    """
    wanted = [normalize(text) for text in texts]
    themselves = among is None
    corpus = wanted if among is None else [normalize(text) for text in among]
    places: dict[str, list[int]] = defaultdict(list)
    for position, text in enumerate(corpus):
        if text:
            places[text].append(position)

    unique = list(places)
    new = [text for text in dict.fromkeys(wanted) if text and text not in places]
    numbers = {text: number for number, text in enumerate([*unique, *new])}
    hashes = _min_hashes(list(numbers))
    bands = [band.tobytes() for row in hashes for band in np.split(row, NUM_BANDS)]
    alike: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for number in range(len(unique)):
        for band in range(NUM_BANDS):
            alike[band, bands[number * NUM_BANDS + band]].append(number)

    near: dict[str, Match | None] = {"": None}
    matches: list[Match | None] = []
    for position, text in enumerate(wanted):
        same = next((i for i in places.get(text, []) if not (themselves and i == position)), None)
        if same is not None:
            matches.append(Match(same, 1.0, exact=True))
            continue
        if text not in near:
            number = numbers[text]
            found: set[int] = set()
            for band in range(NUM_BANDS):
                others = alike.get((band, bands[number * NUM_BANDS + band]), [])
                middle = bisect_left(others, number)
                found.update(others[max(0, middle - MAX_PER_BAND // 2) : middle + MAX_PER_BAND // 2])
            candidates = np.array(sorted(found - {number}), np.int64)
            agreement = (hashes[candidates] == hashes[number]).sum(axis=1)
            nearest = candidates[np.argsort(-agreement, kind="stable")[:MAX_MEASURED]]
            best = _nearest(text, [unique[c] for c in nearest])
            near[text] = Match(places[best[0]][0], best[1], exact=False) if best is not None else None
        matches.append(near[text])
    return matches


def _nearest(text: str, candidates: list[str]) -> tuple[str, float] | None:
    """The most similar candidate and its similarity; None if none reaches NEAR."""
    pieces = _shingles(text)
    scored = [(candidate, _jaccard(pieces, _shingles(candidate))) for candidate in candidates]
    best = max(scored, key=lambda pair: pair[1], default=None)
    return best if best is not None and best[1] >= NEAR else None


def _shingles(text: str) -> set[str]:
    last = max(1, len(text) - SHINGLE_CHARACTERS + 1)
    return {text[start : start + SHINGLE_CHARACTERS] for start in range(last)}


def _min_hashes(texts: Sequence[str]) -> NDArray[np.uint64]:
    """[len(texts), NUM_BANDS * HASHES_PER_BAND]"""
    pieces = [[piece.encode() for piece in sorted(_shingles(text))] for text in texts]
    num_hashes = NUM_BANDS * HASHES_PER_BAND
    hashes = [min_hash.hashvalues for min_hash in MinHash.generator(pieces, num_perm=num_hashes)]
    return np.array(hashes, np.uint64).reshape(len(texts), num_hashes)


def _jaccard(first: set[str], second: set[str]) -> float:
    return len(first & second) / len(first | second)
