"""Texts that say the same: but for case, spaces and punctuation, or nearly so."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from datasketch import MinHash, MinHashLSH

NEAR = 0.8  # two texts are near duplicates from this similarity on
SHINGLE_CHARACTERS = 5
NUM_PERMUTATIONS = 128
# Candidates are sought from further off, so that hardly one above NEAR is missed; all are then measured.
CANDIDATES_FROM = 0.6
# Templated rows ("Convert 3 km", "Convert 4 km", ...) are all near each other; a few are enough to show it.
MOST_CANDIDATES = 50

# At the end or the start of a word: within one it has a meaning, as in 3.5 and C++ and x-1.
_PUNCTUATION = re.compile(
    r"[.,;:!?…\"'\u201c\u201d\u2018\u2019)\]]+(?=\s|$)|(?<!\S)[\"'\u201c\u201d\u2018\u2019(\[]+"
)


class Match(NamedTuple):
    """The text at `position` is the most similar one; a similarity of 1 is the same after `normalise`."""

    position: int
    similarity: float


def normalise(text: str) -> str:
    """The text without what seldom changes its meaning: case, width, spaces, punctuation around words."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_PUNCTUATION.sub("", plain).split()) or plain.strip()


def most_similar(texts: Sequence[str], among: Sequence[str] | None = None) -> list[Match | None]:
    """For each text the most similar one `among` others, or, without these, among the texts themselves.

    None where nothing reaches NEAR. Similarity is the Jaccard index of the sets of 5-character pieces of
    the normalised texts (Broder 1997). Candidates come from MinHash with locality-sensitive hashing, which
    may miss a pair just above NEAR.
    """
    wanted = [normalise(text) for text in texts]
    themselves = among is None
    corpus = wanted if among is None else [normalise(text) for text in among]
    places: dict[str, list[int]] = defaultdict(list)
    for index, text in enumerate(corpus):
        places[text].append(index)

    unique = list(places)
    hashes = dict(zip(unique, _min_hashes(unique), strict=True))
    index = MinHashLSH(threshold=CANDIDATES_FROM, num_perm=NUM_PERMUTATIONS)
    for text, signature in hashes.items():
        index.insert(text, signature)
    new = [text for text in dict.fromkeys(wanted) if text not in hashes]
    hashes |= dict(zip(new, _min_hashes(new), strict=True))

    near: dict[str, Match | None] = {}
    matches: list[Match | None] = []
    for position, text in enumerate(wanted):
        same = next((i for i in places.get(text, []) if not (themselves and i == position)), None)
        if same is not None:
            matches.append(Match(same, 1.0))
            continue
        if text not in near:
            candidates = islice(sorted(index.query(hashes[text])), MOST_CANDIDATES)
            scored = [Match(places[c][0], _jaccard(text, c)) for c in candidates if c != text]
            best = max(scored, key=lambda match: match.similarity, default=None)
            near[text] = best if best is not None and best.similarity >= NEAR else None
        matches.append(near[text])
    return matches


def _shingles(text: str) -> set[str]:
    last = max(1, len(text) - SHINGLE_CHARACTERS + 1)
    return {text[start : start + SHINGLE_CHARACTERS] for start in range(last)}


def _min_hashes(texts: Sequence[str]) -> list[MinHash]:
    pieces = [[piece.encode() for piece in sorted(_shingles(text))] for text in texts]
    hashes: list[MinHash] = MinHash.bulk(pieces, num_perm=NUM_PERMUTATIONS) if pieces else []
    return hashes


def _jaccard(first: str, second: str) -> float:
    a, b = _shingles(first), _shingles(second)
    return len(a & b) / len(a | b)
