"""What is the same and what is nearly so: found against brute force, and never a text with itself."""

from itertools import combinations

import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import duplicates
from finetune.data.duplicates import NEAR, SHINGLE_CHARACTERS, most_similar, normalize, same_after_normalizing

SENTENCE = (
    "Explain in two or three sentences what a bond is and who issues it, and why a state would rather sell "
    "one than raise a tax"
)


def similarity(first: str, second: str) -> float:
    """The Jaccard index, written down a second time."""
    a, b = (
        {t[i : i + SHINGLE_CHARACTERS] for i in range(max(1, len(t) - SHINGLE_CHARACTERS + 1))}
        for t in (normalize(first), normalize(second))
    )
    return len(a & b) / len(a | b)


# --- The same ---


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is a bond?", "  what  IS a\tbond\n"),
        ("Name a coin.", "Name a coin"),
        ("Name a coin!!", "name a coin..."),
        ('Say "hi", then go.', "say hi then go"),
        ("Say \N{LEFT DOUBLE QUOTATION MARK}hi\N{RIGHT DOUBLE QUOTATION MARK}", "Say 'hi'"),
        ("It is 2020.", "it is 2020"),
        ("Stra\N{LATIN SMALL LETTER SHARP S}e", "STRASSE"),
        ("cafe\N{COMBINING ACUTE ACCENT}", "CAF\N{LATIN CAPITAL LETTER E WITH ACUTE}"),
        ("\N{FULLWIDTH LATIN CAPITAL LETTER A}bc", "abc"),
        ("\N{LATIN SMALL LIGATURE FI}ne", "fine"),
        ("one\N{NO-BREAK SPACE}two", "one two"),
        ("\N{INVERTED QUESTION MARK}que?", "que"),
        ("\u4f60\u597d\N{IDEOGRAPHIC FULL STOP}", "\u4f60\u597d"),
    ],
)
def test_case_width_spaces_and_punctuation_around_words_make_no_difference(first, second):
    assert normalize(first) == normalize(second)
    assert most_similar([first, second]) == [(1, 1.0, True), (0, 1.0, True)]
    assert same_after_normalizing([first, second]) == [[0, 1]]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is 3.5?", "What is 35?"),
        ("1,000 coins", "1000 coins"),
        ("Write it in C++.", "Write it in C."),
        ("Write it in C#", "Write it in C"),
        ("Solve x-1", "Solve x+1"),
        ("Solve -5", "Solve 5"),
        ("What is 5!", "What is 5"),
        ("What is 10\N{SUPERSCRIPT TWO}", "What is 102"),
        ("Is 1 in [0, 1)?", "Is 1 in [0, 1]?"),
        ("5' tall", '5" tall'),
        ("$5", "5"),
        ("5%", "5"),
        ("its", "it's"),
        ("resume", "r\N{LATIN SMALL LETTER E WITH ACUTE}sum\N{LATIN SMALL LETTER E WITH ACUTE}"),
        ("...", "???"),
        ("", "?"),
    ],
)
def test_what_has_a_meaning_makes_a_difference(first, second):
    assert normalize(first) != normalize(second)
    assert same_after_normalizing([first, second]) == []
    assert not any(match and match.exact for match in most_similar([first, second]))


@settings(deadline=None)
@given(st.text(max_size=30))
def test_a_normalized_text_stays_as_it_is(text):
    once = normalize(text)
    assert normalize(once) == once


def test_all_of_a_group_are_found_in_order():
    texts = ["a coin", "a note", "A coin.", "a bond", "a NOTE", " a coin"]
    assert same_after_normalizing(texts) == [[0, 2, 5], [1, 4]]
    matches = most_similar(texts)
    assert [match and match.position for match in matches] == [2, 4, 0, None, 1, 0]
    assert all(match is None or match.exact for match in matches)


@pytest.mark.parametrize("blank", ["", "  ", "\n"])
def test_blank_texts_are_like_nothing(blank):
    assert same_after_normalizing([blank, blank, "a coin"]) == []
    assert most_similar([blank, blank, "a coin"]) == [None, None, None]
    assert most_similar([blank, "a coin"], [blank, "a coin"]) == [None, (1, 1.0, True)]


def test_no_texts_are_like_nothing():
    assert most_similar([]) == []
    assert most_similar(["a coin"], []) == [None]
    assert most_similar([], ["a coin"]) == []
    assert same_after_normalizing([]) == []


def test_different_texts_of_the_same_pieces_are_near_and_not_the_same():
    assert most_similar(["haha" * 5, "haha" * 6]) == [(1, 1.0, False), (0, 1.0, False)]


# --- Nearly the same ---


def test_a_text_with_a_few_letters_changed_is_near_and_says_how_near():
    changed = SENTENCE.replace("three", "four")
    match, back = most_similar([SENTENCE, changed])
    assert match == (1, pytest.approx(similarity(SENTENCE, changed)), False)
    assert back == (0, match.similarity, False)
    assert NEAR <= match.similarity < 1


def test_texts_that_share_half_of_their_words_are_not_near():
    other = "Explain in two or three sentences how a car engine works, for a child of ten"
    assert similarity(SENTENCE, other) < NEAR
    assert most_similar([SENTENCE, other]) == [None, None]


def test_the_nearest_of_many_is_found():
    """Also where far more are near than are measured."""
    words = [f"{SENTENCE} {number} times" for number in range(300)]
    wanted = f"{SENTENCE} 7 times over"
    [match] = most_similar([wanted], words)
    assert match.position == max(range(len(words)), key=lambda i: similarity(wanted, words[i]))


def test_a_crowd_of_near_texts_is_compared_in_a_time_that_grows_with_it_alone(monkeypatch):
    measured = []
    jaccard = duplicates._jaccard
    monkeypatch.setattr(duplicates, "_jaccard", lambda a, b: measured.append(1) or jaccard(a, b))
    crowd = [f"{SENTENCE} {number} times" for number in range(400)]
    assert all(match is not None for match in most_similar(crowd))
    assert len(measured) <= duplicates.MAX_MEASURED * len(crowd) < len(crowd) * (len(crowd) - 1) / 4


def test_a_same_text_goes_before_near_ones():
    [match] = most_similar([SENTENCE], [SENTENCE + " then", SENTENCE.upper(), SENTENCE])
    assert match == (1, 1.0, True)


def test_positions_are_those_of_the_texts_searched():
    changed = SENTENCE.replace("three", "four")
    assert most_similar(["x", SENTENCE], ["a", "b", changed]) == [
        None,
        (2, pytest.approx(similarity(SENTENCE, changed)), False),
    ]


def test_all_near_pairs_of_real_texts_are_found_as_brute_force_finds_them():
    frame = pd.read_csv(ROOT / "data" / "finance_sample.csv", dtype=str)
    answers = [text for text in frame["output"] if 100 < len(text) < 600][:60]
    texts = [
        *answers,
        *(" ".join(text.split()[2:]) for text in answers),
        *(t[: -len(t) // 5] for t in answers),
    ]
    best = [0.0] * len(texts)
    for i, j in combinations(range(len(texts)), 2):
        pair = similarity(texts[i], texts[j])
        best[i], best[j] = max(best[i], pair), max(best[j], pair)
    found = [match.similarity if match else None for match in most_similar(texts)]
    assert found == [pytest.approx(value) if value >= NEAR else None for value in best]
    assert 60 < sum(value is not None for value in found) < len(texts)


WORDS = st.lists(st.sampled_from(["coin", "bond", "share", "Note.", "rate", "3.5"]), min_size=6, max_size=9)


@settings(deadline=None, max_examples=60)
@given(st.lists(WORDS.map(" ".join), min_size=2, max_size=12))
def test_no_text_matches_itself_and_likeness_goes_both_ways(texts):
    matches = most_similar(texts)
    for position, match in enumerate(matches):
        if match is not None:
            assert match.position != position
            back = matches[match.position]
            assert back is not None
            assert back.similarity >= match.similarity
            assert match.exact == (normalize(texts[position]) == normalize(texts[match.position]))
            assert match.similarity == pytest.approx(similarity(texts[position], texts[match.position]))
    assert matches == most_similar(texts)
