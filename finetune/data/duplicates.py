"""Find duplicates: texts that are equal except for case, spaces and punctuation, or nearly equal."""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune.data.mixing import mix

NEAR = 0.8  # two texts are near duplicates if they are at least this similar
SHINGLE_CHARACTERS = 5
# Texts are candidates if all hashes of a band agree. At similarity NEAR, one in 20,000 pairs agrees in none.
NUM_BANDS = 25
HASHES_PER_BAND = 5
NUM_HASHES = NUM_BANDS * HASHES_PER_BAND
# Templated rows ("Convert 3 km", "Convert 4 km", ...) are all near each other, and have too many pairs to
# compare. At most this many candidates are taken from a band, and the nearest by their hashes are measured.
MAX_PER_BAND = 20
MAX_MEASURED = 50
# The share of hashes that agree is off the similarity by 0.036 (one standard deviation, at NEAR). Of near
# texts, one in 15,000 agrees in less than this.
MIN_AGREEMENT = 0.66
TEXTS_AT_ONCE = 1_000  # whose candidates are in memory together
BLOCK_CHARACTERS = 2**15  # hashed at a time, so that they stay in a core's cache
# Hash k of a shingle x is _FACTORS[k] * x + _TERMS[k] modulo 2**32, which permutes the 32-bit numbers.
_FACTORS, _TERMS = np.random.default_rng(5).integers(0, 2**32, (2, NUM_HASHES, 1), np.uint32)
_FACTORS |= np.uint32(1)

# Punctuation is removed only around words: within a word it has a meaning, as in 3.5, C++ and x-1. After a
# digit, ! and quotes have a meaning too (5! and 5'), and brackets always have one.
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_QUOTES = "\"'\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}"
_QUOTES += "\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}"
_PUNCTUATION = re.compile(rf"(?:(?<!\d)[!{_QUOTES}]|[.,;:?。])+(?=\s|$)|(?<!\S)[{_QUOTES}¿¡]+")


class Signatures(NamedTuple):
    """What N texts are compared by.

    `digests` [N] are those of the normalized texts, 0 for blank ones; `hashes` [N, NUM_HASHES] the last bytes
    of their min-hashes: 25 bands of 5.
    """

    digests: NDArray[np.uint64]
    hashes: NDArray[np.uint8]


TextsAt = Callable[[Sequence[int]], list[str]]
"""The texts at these positions"""
Band = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]
"""Positions of the corpus ordered by their hashes of a band, and for each text that asks, where in them those
stand that agree with it: [left, right)"""


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
    wanted = sign(texts)
    corpus = wanted if among is None else sign(among)
    others = texts if among is None else among
    matches: list[Match | None] = [None] * len(texts)
    for position, match in find_matches(
        wanted,
        corpus,
        lambda places: [texts[place] for place in places],
        lambda places: [others[place] for place in places],
        themselves=among is None,
    ):
        matches[position] = match
    return matches


def sign(texts: Sequence[str]) -> Signatures:
    """The signatures of texts, which `find_matches` compares."""
    plain = [normalize(text) for text in texts]
    digests = [
        int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
        if text
        else 0
        for text in plain
    ]
    return Signatures(np.array(digests, np.uint64), _min_hashes(plain))


def find_matches(
    wanted: Signatures,
    corpus: Signatures,
    wanted_texts: TextsAt,
    corpus_texts: TextsAt,
    themselves: bool = False,
) -> Iterator[tuple[int, Match]]:
    """Yield (position in `wanted`, its most similar text in `corpus`) where there is one, as `most_similar`.

    The texts are asked for by their positions, and only where signatures agree in a band. `themselves`: both
    are the same texts, and none is its own match. Memory is some 200 bytes for each text.
    """
    # A text is represented by its first position in the corpus: `firsts` in order of their digests.
    firsts, seconds = _first_two_positions(corpus.digests)
    sorted_digests = corpus.digests[firsts]
    place = np.searchsorted(sorted_digests, wanted.digests)
    place[place == len(sorted_digests)] = 0
    is_in = sorted_digests[place] == wanted.digests if len(firsts) else np.zeros(len(wanted.digests), bool)
    same = np.where(is_in, firsts[place] if len(firsts) else -1, -1)
    if themselves:
        own = same == np.arange(len(same))
        same = np.where(own, seconds[place] if len(firsts) else -1, same)
    same[wanted.digests == 0] = -1

    unique = np.sort(firsts[sorted_digests != 0])
    rest = np.flatnonzero((same < 0) & (wanted.digests != 0))
    _, representatives, inverse = np.unique(wanted.digests[rest], return_index=True, return_inverse=True)
    asking = rest[representatives]
    near = dict(
        zip(
            asking.tolist(),
            _nearest_of_each(asking, wanted, corpus, unique, wanted_texts, corpus_texts, themselves),
            strict=True,
        )
    )
    found = {int(p): near[int(asking[group])] for p, group in zip(rest, inverse, strict=True)}
    for position in range(len(wanted.digests)):
        if same[position] >= 0:
            yield position, Match(int(same[position]), 1.0, exact=True)
        elif (match := found.get(position)) is not None:
            yield position, match


def _first_two_positions(digests: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each digest, in ascending order, its first position, and its second one or -1."""
    order = np.argsort(digests, kind="stable")
    sorted_digests = digests[order]
    starts = np.flatnonzero(np.r_[True, sorted_digests[1:] != sorted_digests[:-1]][: len(order)])
    counts = np.diff(np.r_[starts, len(order)])
    seconds = np.where(counts > 1, order[np.minimum(starts + 1, len(order) - 1)], -1)
    return order[starts], seconds


def _nearest_of_each(
    asking: NDArray[np.int64],
    wanted: Signatures,
    corpus: Signatures,
    unique: NDArray[np.int64],
    wanted_texts: TextsAt,
    corpus_texts: TextsAt,
    themselves: bool,
) -> Iterator[Match | None]:
    """The near match of each text at the positions `asking`, among those at the positions `unique`."""
    bands = [_band_ranges(band, asking, wanted, corpus, unique) for band in range(NUM_BANDS)]
    for start in range(0, len(asking), TEXTS_AT_ONCE):
        block = range(start, min(len(asking), start + TEXTS_AT_ONCE))
        shortlists = [
            _shortlist(number, int(asking[number]), bands, wanted, corpus, themselves) for number in block
        ]
        needed = sorted(set().union(*shortlists))
        shingles_of = _Shingles(dict(zip(needed, corpus_texts(needed), strict=True)))
        searching = [number for number, shortlist in zip(block, shortlists, strict=True) if shortlist]
        own = iter(wanted_texts([int(asking[number]) for number in searching]))
        for shortlist in shortlists:
            yield _nearest(next(own), shortlist, shingles_of) if shortlist else None


def _shortlist(
    number: int,
    position: int,
    bands: Sequence[Band],
    wanted: Signatures,
    corpus: Signatures,
    themselves: bool,
) -> list[int]:
    """Positions in the corpus, the likeliest first, of texts that may be near the one at `position`, which is
    the `number`-th that asks."""
    found: set[int] = set()
    for order, left, right in bands:
        if right[number] - left[number] > themselves:  # a text agrees with itself
            others = order[left[number] : right[number]]
            # Of a crowd, those around its own place; a text of elsewhere has its place behind them all.
            middle = int(np.searchsorted(others, position)) if themselves else len(others)
            found.update(others[max(0, middle - MAX_PER_BAND // 2) : middle + MAX_PER_BAND // 2].tolist())
    if themselves:
        found.discard(position)
    if not found:
        return []
    candidates = np.array(sorted(found), np.int64)
    agreement = (corpus.hashes[candidates] == wanted.hashes[position]).sum(axis=1)
    likeliest = np.argsort(-agreement, kind="stable")[:MAX_MEASURED]
    likely = likeliest[agreement[likeliest] >= MIN_AGREEMENT * NUM_HASHES]
    return [int(candidate) for candidate in candidates[likely]]


class _Shingles:
    """The shingles of texts by their positions; those asked for last are kept."""

    def __init__(self, texts: dict[int, str]):
        self.of = lru_cache(maxsize=4096)(lambda position: _shingles(normalize(texts[position])))


def _nearest(text: str, candidates: Sequence[int], shingles: _Shingles) -> Match | None:
    """The candidate that is most similar to the text; None if none reaches NEAR."""
    pieces = _shingles(normalize(text))
    similarities = [_jaccard(pieces, shingles.of(candidate)) for candidate in candidates]
    best = int(np.argmax(similarities))
    return Match(candidates[best], similarities[best], exact=False) if similarities[best] >= NEAR else None


def _band_ranges(
    band: int,
    asking: NDArray[np.int64],
    wanted: Signatures,
    corpus: Signatures,
    unique: NDArray[np.int64],
) -> Band:
    """The candidates by one band."""
    keys, own = (_band_keys(s.hashes, at, band) for s, at in ((corpus, unique), (wanted, asking)))
    agreeing = np.flatnonzero(np.isin(keys, own))  # of a million texts, most agree with none
    order = agreeing[np.argsort(keys[agreeing], kind="stable")]
    keys = keys[order]
    left, right = np.searchsorted(keys, own), np.searchsorted(keys, own, side="right")
    return unique[order].astype(np.int32), left.astype(np.int32), right.astype(np.int32)


def _band_keys(hashes: NDArray[np.uint8], at: NDArray[np.int64], band: int) -> NDArray[np.uint64]:
    """[len(at)]: the hashes of a band as one number."""
    keys = np.zeros(len(at), np.uint64)
    for column in range(band * HASHES_PER_BAND, (band + 1) * HASHES_PER_BAND):
        keys = keys << np.uint64(8) | hashes[at, column]
    return keys


def _shingles(text: str) -> set[str]:
    last = max(1, len(text) - SHINGLE_CHARACTERS + 1)
    return {text[start : start + SHINGLE_CHARACTERS] for start in range(last)}


def _min_hashes(texts: Sequence[str]) -> NDArray[np.uint8]:
    """[len(texts), NUM_HASHES]: the last byte of the least hash of each text's shingles."""
    hashes = np.empty((len(texts), NUM_HASHES), np.uint8)
    first = 0
    while first < len(texts):
        last, characters = first, 0
        while last < len(texts) and (last == first or characters < BLOCK_CHARACTERS):
            characters += max(SHINGLE_CHARACTERS, len(texts[last]))
            last += 1
        hashes[first:last] = _min_hashes_of_block(texts[first:last])
        first = last
    return hashes


def _min_hashes_of_block(texts: Sequence[str]) -> NDArray[np.uint8]:
    """[len(texts), NUM_HASHES]"""
    padded = [text.ljust(SHINGLE_CHARACTERS, "\0") for text in texts]
    joined = "".join(padded).encode("utf-32-le", errors="surrogatepass")
    characters = np.frombuffer(joined, np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in padded])
    counts = lengths - SHINGLE_CHARACTERS + 1
    windows = np.zeros(len(characters) - SHINGLE_CHARACTERS + 1, np.uint64)
    for place in range(SHINGLE_CHARACTERS):
        windows = windows * np.uint64(0x9E3779B97F4A7C15) + characters[place : place + len(windows)]
    # Not those that begin in one text and end in the next
    ends = np.cumsum(lengths)
    inside = np.ones(len(windows) + SHINGLE_CHARACTERS - 1, bool)
    for back in range(1, SHINGLE_CHARACTERS):
        inside[ends - back] = False
    shingles = mix(windows[inside[: len(windows)]])
    starts = np.cumsum(counts) - counts
    hashes = np.empty((len(texts), NUM_HASHES), np.uint8)
    for k in range(NUM_HASHES):
        hashes[:, k] = np.minimum.reduceat(_FACTORS[k] * shingles + _TERMS[k], starts).astype(np.uint8)
    return hashes


def _jaccard(first: set[str], second: set[str]) -> float:
    return len(first & second) / len(first | second)
