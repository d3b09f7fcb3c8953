"""Each source gives its number or share of rows, drawn from the seed and its place; eval sets give all."""

import json
from pathlib import Path

import pytest

from finetune.config import DataConfig, SourceConfig
from finetune.data.preparing.row_tables import digest_of
from finetune.data.rows import Rows, iterate_rows, load_rows


def source(folder: Path, name: str, num_rows: int, **settings) -> SourceConfig:
    path = folder / f"{name}.jsonl"
    rows = [{"question": f"{name} {n}?", "answer": f"{name} {n}"} for n in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SourceConfig(path=str(path), **settings)


def load(*sources: SourceConfig, eval_fraction: float = 0.0, **settings) -> Rows:
    return load_rows(DataConfig(path=list(sources), eval_fraction=eval_fraction, **settings))


def outputs(table, name: str = "") -> list[str]:
    return [row["output"] for row in iterate_rows(table) if row["output"].startswith(name)]


def what_is_said(*sources: SourceConfig, **settings) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load(*sources, **settings)
    return str(caught.value)


def test_a_source_gives_as_many_rows_as_it_says_and_all_in_their_order_where_it_says_nothing(tmp_path):
    a, b = source(tmp_path, "a", 30, num_samples=8), source(tmp_path, "b", 6)
    rows = load(a, b)
    assert len(set(outputs(rows.train, "a"))) == 8
    assert outputs(rows.train, "b") == [f"b {n}" for n in range(6)]
    assert outputs(rows.train) == outputs(rows.train, "a") + outputs(rows.train, "b")
    assert rows.train["source"][:] == [0] * 8 + [1] * 6
    assert list(rows.source_names) == ["a", "b"]
    assert rows.num_read == rows.num_kept == 36


@pytest.mark.parametrize(
    ("total", "expected"), [(20, (15, 5)), (21, (16, 5)), (None, (30, 10))], ids=["20", "21", "all that fit"]
)
def test_shares_are_of_the_rows_taken(tmp_path, total, expected):
    a, b = source(tmp_path, "a", 40, share=0.75), source(tmp_path, "b", 10, share=0.25)
    rows = load(a, b, num_samples=total)
    assert tuple(len(set(outputs(rows.train, name))) for name in "ab") == expected
    assert len(rows.train) == sum(expected)


def test_what_is_drawn_of_a_source_depends_on_the_seed_and_its_place_alone(tmp_path):
    a, b = source(tmp_path, "a", 40, num_samples=9), source(tmp_path, "b", 10, num_samples=3)
    drawn = outputs(load(a, b).train, "a")
    assert outputs(load(a, source(tmp_path, "c", 25)).train, "a") == drawn
    assert outputs(load(a, b, split_seed=7).train, "a") == drawn
    assert outputs(load(b, a).train, "a") != drawn
    assert outputs(load(a, b, sample_seed=7).train, "a") != drawn


def test_what_cannot_be_drawn_is_refused_with_its_numbers(tmp_path):
    a, b = source(tmp_path, "a", 40, num_samples=41), source(tmp_path, "b", 10)
    assert what_is_said(a, b) == "num_samples of a is 41, but only 40 rows are usable"
    a, b = source(tmp_path, "a", 40, share=0.99), source(tmp_path, "b", 10, share=0.01)
    assert "the share 0.01 of b is not one row of 20" in what_is_said(a, b, num_samples=20)
    a, b = source(tmp_path, "a", 40, share=0.5), source(tmp_path, "b", 10, share=0.5)
    said = what_is_said(a, b, num_samples=30)
    assert said == "data.num_samples is 30, of which the share of b is 15, but only 10 of its rows are usable"


def test_a_source_without_a_usable_row_is_named_with_the_reasons(tmp_path):
    a = source(tmp_path, "a", 4)
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"question": "Is it?", "answer": " "}) + "\n", encoding="utf-8")
    said = what_is_said(a, SourceConfig(path=str(empty)))
    assert said == f"{empty} has no usable row: 1 read (1 without output)"
    with pytest.raises(ValueError, match=r"empty\.jsonl has no usable row"):
        load_rows(DataConfig(path=[a], eval_fraction=0.0, eval_path=str(empty)))


def test_eval_rows_are_those_of_the_split_and_then_all_of_the_eval_sets(tmp_path, monkeypatch):
    a, law = source(tmp_path, "a", 20), source(tmp_path, "law", 5)
    rows = load_rows(DataConfig(path=[a], eval_fraction=0.2), {"contracts": str(law.path)})
    assert len(outputs(rows.eval, "a")) == 4
    assert outputs(rows.eval)[4:] == [f"law {n}" for n in range(5)]
    assert rows.eval["source"][:] == [0] * 4 + [1] * 5
    assert list(rows.source_names) == ["a", "contracts"]
    assert sorted([*rows.train["row_number"], *rows.eval["row_number"]]) == list(range(1, 26))
    # The tables say what their texts depend on, so none is looked at for the key of their tokens.
    for part in (rows.train, rows.eval):
        monkeypatch.setattr(type(part), "with_format", lambda *_: pytest.fail("looked at"))
        assert len(digest_of(part)) == 64
    monkeypatch.undo()
    own = load_rows(
        DataConfig(path=[a], eval_fraction=0.0, eval_path=[source(tmp_path, "m", 9, num_samples=2)])
    )
    assert len(own.train) == 20
    assert len(set(outputs(own.eval, "m"))) == len(own.eval) == 2
