"""data.findings: each problem is named at its row, the worst first."""

import re

import pytest
from audits import LONG_TEXT, TOKENIZER, audit_of, listed, row, turns, write

from finetune.data.findings import find_problems
from finetune.data.templates.tokenize import encode


def test_a_token_too_many_costs_the_end_of_turn_and_one_fewer_does_not(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row("Name a coin."), row("Name a long coin, please.")])
    lengths = [
        len(encode(TOKENIZER, turns(instruction, row("")["output"]), "completion").input_ids)
        for instruction in ("Name a coin.", "Name a long coin, please.")
    ]
    # The template's newline is the last token, the end of turn the one before it.
    whole, no_newline, no_end = (
        audit_of(path, max_length=lengths[1] - less, eval_fraction=0).figures.loc[2] for less in (0, 1, 2)
    )
    assert [e["last_end"] for e in (whole, no_newline, no_end)] == ["trained", "trained", "untrained"]
    audit = audit_of(path, max_length=lengths[1] - 2, eval_fraction=0)
    assert listed(audit)["Last end-of-turn token not trained"] == [(2,)]
    assert find_problems(audit)[2][0].text == (
        f"cut: 2 of {lengths[1]} tokens lost, the last end-of-turn token with them"
    )
    assert 1 not in find_problems(audit)


def split_audit(tmp_path, train: list[dict], evaluation: list[dict]):
    """Audit rows whose first ones are trained on; the numbers go on from one split to the other."""
    path = write(tmp_path / "rows.jsonl", [*train, *evaluation])

    def split(table, *_):
        return table.select(range(len(train))), table.select(range(len(train), len(table)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.data.rows.split_rows", split)
        return audit_of(path)


def test_leaks_and_duplicates_are_told_apart_and_said_of_the_row_with_the_strongest_first(tmp_path):
    near = LONG_TEXT.replace("three", "four")
    train = [
        row("Name a coin."),
        row(LONG_TEXT),
        row("Add."),
        row("ADD", "It is 3."),
        row("Add", "It is 9.", "4 and 5"),
    ]
    evaluation = [
        row("name a coin", "Dime."),
        row("Name a coin!"),
        row(near, "Else."),
        row("add", "It is 7.", "3, 4"),
    ]
    audit = split_audit(tmp_path, train, evaluation)
    texts = {number: [p.text for p in problems] for number, problems in find_problems(audit).items()}
    assert texts[7] == [
        "leak: same prompt and answer as row 1 in train",
        "same prompt as row 6",
    ]
    assert texts[6] == ["leak: same prompt as row 1 in train", "same prompt as row 7"]
    assert re.fullmatch(r"leak: prompt much like that of row 2 \(0\.\d\d\) in train", texts[8][0])
    assert texts[9] == ["leak: same instruction as row 3, 4, 5 in train"]
    assert texts[3] == ["same prompt as row 4", "same instruction as row 4, 5"]
    assert 1 not in texts  # only in eval again
    names = listed(audit)
    assert names["Leak: same prompt in train and eval"] == [(1, 6, 7)]
    assert names["Leak: much the same prompt in eval and train"] == [(8, 2)]
    assert names["Same prompt within a split"] == [(3, 4)]


def test_many_rows_of_one_instruction_are_counted_and_the_first_named(tmp_path):
    rows = [row("Name it.", f"It is coin number {number}.", f"{number} cents") for number in range(30)]
    audit = audit_of(write(tmp_path / "rows.jsonl", rows), eval_fraction=0)
    texts = {number: problems[0].text for number, problems in find_problems(audit).items()}
    assert texts[1] == "same instruction as row 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 19 more"
    assert texts[30] == "same instruction as row 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 19 more"
    assert listed(audit)["Same instruction within a split"] == [tuple(range(1, 31))]


def test_near_duplicates_within_a_split_are_listed_once_a_pair(tmp_path):
    rows = [row(LONG_TEXT), row("Name a coin."), row(LONG_TEXT.replace("three", "four"), "Else.")]
    audit = audit_of(write(tmp_path / "rows.jsonl", rows), eval_fraction=0)
    assert listed(audit)["Much the same prompt within train"] == [(1, 3)]
    assert {n for n, found in find_problems(audit).items() if found[0].text.startswith("prompt much")} == {
        1,
        3,
    }
