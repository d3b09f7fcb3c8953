"""What the configuration names becomes sources: files, folders, patterns, compressed files, hub data sets."""

import gzip
import json
import math
import pickle
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config import DataConfig, SourceConfig
from finetune.data.reading.batches import read_formatted
from finetune.data.reading.files import read_batches, read_column
from finetune.data.reading.json_array import iterate_array
from finetune.data.reading.sources import Source, eval_sources, training_sources

ROWS = [{"instruction": f"Say {n}.", "output": f"“{n}”"} for n in range(7)]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of files of several kinds, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    inside = tmp_path / "rows"
    (inside / "deeper").mkdir(parents=True)
    (inside / "b.jsonl").write_bytes(lines(ROWS[2:4]))
    (inside / "a.csv").write_text(pd.DataFrame(ROWS[:2]).to_csv(index=False), encoding="utf-8")
    (inside / "c.json.gz").write_bytes(gzip.compress(json.dumps(ROWS[4:5]).encode()))
    (inside / "d.jsonl.zst").write_bytes(pa.compress(lines(ROWS[5:]), codec="zstd", asbytes=True))
    (inside / "README.md").write_text("Not rows", encoding="utf-8")
    (inside / ".hidden.jsonl").write_text("no rows either", encoding="utf-8")
    (inside / "deeper" / "e.jsonl").write_bytes(lines(ROWS[:1]))
    return tmp_path


def sources(path, **settings) -> list[Source]:
    return training_sources(DataConfig(path=path, **settings))


def rows_of(path) -> list[dict]:
    """All rows as they are written, without what is missing."""
    return [
        {key: cell for key, cell in row.items() if cell is not None}
        for source in sources(path)
        for batch in read_batches(source, 2)
        for _, row in batch.rows()
    ]


def refusal(path, **settings) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        sources(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- What a path may be ---


@pytest.mark.parametrize("path", ["rows", "rows/", "rows/[a-d].*", ["rows/a.csv", "rows/[b-z].*"], ["rows"]])
def test_folders_and_patterns_are_their_files_in_the_order_of_their_names(folder, path):
    (source,) = sources(path)
    assert source.files == ("rows/a.csv", "rows/b.jsonl", "rows/c.json.gz", "rows/d.jsonl.zst")
    assert rows_of(path) == ROWS


def test_a_pattern_may_go_through_folders(folder):
    (source,) = sources("rows/**/*.jsonl")
    assert source.files == ("rows/b.jsonl", "rows/deeper/e.jsonl")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(folder):
    (folder / "a[1].jsonl").write_bytes(lines(ROWS))
    assert sources("a[1].jsonl")[0].files == ("a[1].jsonl",)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("rows/*.parquet", ["data.path rows/*.parquet matches no file"]),
        ("rows/*", ["rows/README.md is none of .csv"]),
        ("rows/README.md", ["rows/README.md is none of .csv, .parquet, .json, .jsonl", ".gz or .zst"]),
        ("nothing", []),
        (["rows/a.csv", "someone/rows"], ["someone/rows", "hub data set", "{path: ...}"]),
        (["rows/a.csv", "rows/a.parquet.gz"], ["a.parquet.gz is none of"]),
        ("x" * 300, ["File name too long"]),
    ],
)
def test_what_is_no_source_is_refused(folder, path, parts):
    (folder / "nothing").mkdir()
    message = refusal(path) if path != "nothing" else refusal("nothing")
    expected = parts or ["data.path nothing is a folder without any file of .csv"]
    assert [part for part in expected if part not in message] == []


def test_each_entry_is_a_source_with_its_own_settings_before_those_of_all(folder):
    entries = [
        SourceConfig(path="rows/a.csv"),
        SourceConfig(path=["rows/b.jsonl", "rows/c.json.gz"], name="mixed", columns={"q": "instruction"}),
        SourceConfig(
            path="someone/rows", subset="main", split="test", revision="v1", system_prompt="Be brief."
        ),
        SourceConfig(path="rows/b.jsonl", columns={}, share=0.5),
    ]
    found = sources(entries, columns={"a": "output"}, system_prompt="Be kind.")
    assert found == [
        Source("a", ("rows/a.csv",), columns={"a": "output"}, system_prompt="Be kind."),
        Source(
            "mixed",
            ("rows/b.jsonl", "rows/c.json.gz"),
            columns={"q": "instruction"},
            system_prompt="Be kind.",
        ),
        Source(
            "rows-main",
            dataset="someone/rows",
            subset="main",
            split="test",
            revision="v1",
            columns={"a": "output"},
            system_prompt="Be brief.",
        ),
        Source("b", ("rows/b.jsonl",), columns={}, system_prompt="Be kind.", share=0.5),
    ]


@pytest.mark.parametrize("key", ["subset", "revision"])
def test_what_belongs_to_a_hub_data_set_is_refused_of_a_file(folder, key):
    assert f"{key} belongs to a hub data set" in refusal([SourceConfig(path="rows/a.csv", **{key: "x"})])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x.csv", "b/x.csv", "c/x.jsonl.gz"], ["x", "x-2", "x-3"]),
        (["x.csv", "x-2.csv", "y/x.csv"], ["x", "x-2", "x-3"]),
        (["some one/my rows (2).json", "someone/rows", "all"], ["my-rows-2-", "rows", "all"]),
    ],
)
def test_sources_without_a_name_get_one_that_no_other_has(paths, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got = [source.name for source in sources([SourceConfig(path=path) for path in paths])]
    assert [name.strip("-") for name in got] == [name.strip("-") for name in names]
    assert len(set(got)) == len(got)


def test_eval_sets_are_eval_path_and_then_the_named_sets(folder):
    data = DataConfig(eval_path="rows/a.csv", eval_fraction=0, system_prompt="Be kind.")
    found = eval_sources(data, {"math": "rows/b.jsonl", "more": ["rows/c.json.gz", "rows/d.jsonl.zst"]})
    assert [(source.name, source.files) for source in found] == [
        ("a", ("rows/a.csv",)),
        ("math", ("rows/b.jsonl",)),
        ("more", ("rows/c.json.gz", "rows/d.jsonl.zst")),
    ]
    with pytest.raises(ValueError, match=r"eval.sets.a: a source of data.eval_path is called a too"):
        eval_sources(data, {"a": "rows/b.jsonl"})
    assert {source.system_prompt for source in found} == {"Be kind."}
    assert eval_sources(DataConfig(), None) == []
    with pytest.raises(ValueError, match=r"data.eval_path no/\*.csv matches no file"):
        eval_sources(DataConfig(eval_path="no/*.csv"), None)
    (missing,) = eval_sources(DataConfig(), {"math": "nowhere.jsonl"})
    with pytest.raises(ValueError, match=r"eval.sets.math nowhere.jsonl: No such file"):
        list(read_batches(missing, 10))


def test_an_eval_set_has_the_name_it_was_given_or_none(folder):
    sets = {"a": "rows/b.jsonl"}
    with pytest.raises(ValueError, match=r"eval.sets.a: a source of data.eval_path is called a too"):
        eval_sources(DataConfig(eval_path="rows/a.csv"), sets)
    with pytest.raises(ValueError, match=r"eval.sets.a: a source of data.path is called a too"):
        eval_sources(DataConfig(path="rows/a.csv"), sets)
    # Rows that are not evaluated have no figures to be confused with.
    (only,) = eval_sources(DataConfig(path="rows/a.csv", eval_fraction=0), sets)
    assert only.name == "a"


# --- Batches ---


@pytest.mark.parametrize(
    "suffix", [".csv", ".json", ".jsonl", ".parquet", ".csv.gz", ".json.zst", ".jsonl.gz", ".CSV.GZ"]
)
@pytest.mark.parametrize("rows_per_batch", [1, 3, 7, 100])
def test_batches_hold_all_rows_once_and_say_where_they_are(tmp_path, suffix, rows_per_batch):
    frame, kind = pd.DataFrame(ROWS), suffix.lower().split(".")[1]
    if kind == "parquet":
        frame.to_parquet(tmp_path / "rows.parquet", row_group_size=2)
    else:
        csv = frame.to_csv(index=False).encode()
        content = {"csv": csv, "json": json.dumps(ROWS, indent=1).encode(), "jsonl": lines(ROWS)}[kind]
        if suffix.lower().endswith(".gz"):
            content = gzip.compress(content)
        elif suffix.endswith(".zst"):
            content = pa.compress(content, codec="zstd", asbytes=True)
        (tmp_path / f"rows{suffix}").write_bytes(content)
    path = str(tmp_path / f"rows{suffix}")
    batches = list(read_batches(sources(path)[0], rows_per_batch))
    assert {batch.where for batch in batches} == {path}
    assert [batch.first_row for batch in batches] == [
        1 + sum(batch.num_rows for batch in batches[:number]) for number in range(len(batches))
    ]
    assert all(0 < batch.num_rows <= rows_per_batch for batch in batches)
    moved = [pickle.loads(pickle.dumps(batch)) for batch in batches]
    assert [row for batch in moved for row in batch.rows()] == [
        (f"{path}, row {number}", row) for number, row in enumerate(ROWS, 1)
    ]
    assert [len(batch.rows()) for batch in batches] == [batch.num_rows for batch in batches]


def test_a_pickled_batch_does_not_carry_the_rows_of_others(tmp_path):
    rows = [{"instruction": f"{n}" * 1000, "output": "x"} for n in range(400)]
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_bytes(lines(rows))
    for name in ("rows.parquet", "rows.jsonl"):
        (source,) = sources(str(tmp_path / name))
        sizes = [len(pickle.dumps(batch)) for batch in read_batches(source, 10)]
        assert len(sizes) == 40
        assert max(sizes) < 60_000


def test_a_batch_is_read_when_it_is_asked_for(tmp_path):
    """What is wrong behind it does not matter yet: the file is not held as a whole."""
    good = json.dumps(ROWS[0])
    for name, content in (
        ("rows.jsonl", f"{good}\n" * 50_000 + "{"),
        ("rows.json", "[" + f"{good}," * 50_000 + "}"),
        ("rows.csv", "instruction,output\n" + "a,b\n" * 500_000 + "c,d,e\n"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        batches = read_batches(sources(str(tmp_path / name))[0], 1_000)
        assert next(batches).num_rows == 1_000
        with pytest.raises(ValueError, match=name):
            [batch.rows() for batch in batches]


def test_the_line_of_an_error_counts_blank_lines_and_those_of_earlier_batches(tmp_path):
    good = json.dumps(ROWS[0])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n \n" + f"{good}\n\n{good}\n{good}\n\nbroken\n{good}".encode())
    (source,) = sources(str(path))
    batches = list(read_batches(source, 3))
    assert [batch.num_rows for batch in batches] == [3, 2]
    assert [place for place, _ in batches[0].rows()] == [f"{path}, row {n}" for n in (1, 2, 3)]
    with pytest.raises(ValueError, match=rf"{path}, line 8: Expecting value at column 1"):
        batches[1].rows()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.zst", ".csv", ".csv.gz"])
def test_the_first_bad_byte_is_counted_from_the_beginning_of_the_text(tmp_path, suffix):
    head = {".csv": b"instruction,output\n", ".jso": b'{"a": "b"}\n'}[suffix[:4]]
    if suffix.startswith(".json."):
        head = b'[{"a": "b"},\n'
    elif suffix == ".json":
        head = b'\xef\xbb\xbf[{"a": "b"},\n'
    content = head + b'"' + "é".encode() * 5 + b"\xff" + b'"\n'
    packed = {".gz": gzip.compress, "zst": lambda text: pa.compress(text, codec="zstd", asbytes=True)}
    pack = packed.get(suffix[-3:], bytes)
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(pack(content))
    with pytest.raises(ValueError, match=rf"is not UTF-8 text \(byte {content.index(0xFF)}\)"):
        [batch.rows() for batch in read_batches(sources(str(path))[0], 1)]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.zst"])
def test_a_compressed_file_that_was_cut_or_is_none_is_refused_by_name(tmp_path, name):
    pack = (
        gzip.compress if name.endswith("gz") else lambda text: pa.compress(text, codec="zstd", asbytes=True)
    )
    whole = pack(lines(ROWS * 500))
    for content in (whole[: len(whole) // 2], b"instruction,output\na,b\n"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"data.path .*{name}: ") as caught:
            list(read_batches(sources(str(tmp_path / name))[0], 10))
        assert "\n" not in str(caught.value)


# --- JSON arrays, piece by piece ---

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


class Trickle:
    """A text that is read a few characters at a time."""

    def __init__(self, text: str, size: int) -> None:
        self.text, self.size, self.most = text, size, 0

    def read(self, _: int) -> str:
        piece, self.text = self.text[: self.size], self.text[self.size :]
        return piece


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(json_values, max_size=5),
    size=st.integers(1, 9),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
)
def test_an_array_read_in_pieces_is_the_array(values, size, indent, ascii_only):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    assert list(iterate_array(Trickle(text, size), "rows.json")) == values


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(json_values, min_size=1, max_size=3),
    size=st.integers(1, 30),
    cut=st.floats(0, 1),
    other=st.sampled_from(["", ",", "]", "}", '"', "x", "1", "\n"]),
)
def test_an_array_that_json_refuses_is_refused_with_its_line(values, size, cut, other):
    text = json.dumps(values, indent=1)
    place = 1 + int(cut * (len(text) - 1))  # its first character told that it is an array
    text = text[:place] + other + text[place + 1 :]
    try:
        expected = json.loads(text)
    except json.JSONDecodeError as error:
        with pytest.raises(ValueError, match=rf"^rows.json, line {error.lineno}: "):
            list(iterate_array(Trickle(text, size), "rows.json"))
    else:
        if isinstance(expected, list):
            assert list(iterate_array(Trickle(text, size), "rows.json")) == expected


def test_a_missing_quote_in_a_long_array_does_not_read_all_of_it():
    stream = Trickle('[{"a": 1}, {"b: 2}, {"c": 3},\n' + '{"d": 4},' * 1_000_000, 1000)
    with pytest.raises(ValueError, match="line 1"):
        list(iterate_array(stream, "rows.json"))
    assert len(stream.text) > 8_000_000


# --- Hub data sets ---


@pytest.fixture
def hub(monkeypatch):
    """Calls of load_dataset, which gives these rows or raises this error."""

    def put(answer: datasets.Dataset | Exception) -> list[tuple]:
        calls: list[tuple] = []

        def load(*arguments: str, **options: str) -> datasets.Dataset:
            calls.append((arguments, options))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr("finetune.data.reading.files.load_dataset", load)
        return calls

    return put


def test_a_hub_data_set_is_asked_for_with_its_subset_split_and_revision(hub):
    calls = hub(datasets.Dataset.from_list(ROWS))
    entry = SourceConfig(path="someone/rows", subset="main", split="train[:10%]", revision="abc")
    (source,) = sources([entry])
    batches = list(read_batches(source, 3))
    assert calls == [(("someone/rows", "main"), {"split": "train[:10%]", "revision": "abc"})]
    assert [row for batch in batches for row in batch.rows()] == [
        (f"someone/rows, row {number}", row) for number, row in enumerate(ROWS, 1)
    ]
    assert max(len(pickle.dumps(batch)) for batch in batches) < 2000


def test_a_missing_subset_is_said_with_those_that_there_are(hub):
    hub(
        ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nEx"
        )
    )
    with pytest.raises(
        ValueError, match=r"someone/rows' has subsets: set subset to one of \['main', 'socratic'\]"
    ):
        list(read_batches(sources("someone/rows")[0], 3))


def test_nulls_that_arrow_fills_in_are_no_keys(tmp_path):
    """Parquet gives every object of a column the keys of all others."""
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f", "parameters": {"x": 1}}]},
        {"messages": [{"role": "assistant", "content": None, "reasoning": "b"}], "tools": None},
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    (source,) = sources(str(tmp_path / "rows.parquet"))
    (batch,) = read_batches(source, 5)
    read = [row for _, row in batch.rows()]
    assert read[0] == rows[0]
    assert read[1] == {"messages": [{"role": "assistant", "reasoning": "b"}], "tools": None}


# --- A column, for slices ---


def test_a_column_is_text_by_row_number_over_all_sources(folder):
    (folder / "scores.jsonl").write_bytes(
        lines([{"text": "a", "level": 3}, {"text": "b"}, {"text": "c", "level": " x "}])
    )
    (folder / "more.csv").write_text("text,level\nd,\ne,7\n", encoding="utf-8")
    pd.DataFrame({"text": ["f", "g"], "level": [1.5, math.nan]}).to_parquet(folder / "last.parquet")
    found = sources(["scores.jsonl", "more.csv", "last.parquet"])
    assert read_column(found, "level") == ["3", "", "x", "", "7", "1.5", ""]
    with pytest.raises(ValueError, match="scores has no column 'lvl'; there are text, level"):
        read_column(found, "lvl")


# --- Formats of files ---


def test_the_files_of_a_source_have_one_format_each_row_its_own_keys(folder):
    (folder / "x.jsonl").write_bytes(lines([{"question": "a", "answer": "b"}]))
    with pytest.raises(ValueError, match=r"x.jsonl has the columns \['question', 'answer'\], rows/a.csv has"):
        list(read_formatted(sources(["rows/a.csv", "x.jsonl"])[0], 10))
    pairs = list(read_formatted(sources("rows")[0], 1))
    assert {found.name for _, found in pairs} == {"instruction and output"}
    assert sum(batch.num_rows for batch, _ in pairs) == len(ROWS)


def test_the_embedded_rows_are_read_by_their_columns():
    (source,) = sources(str(ROOT / "data" / "finance_sample.parquet"))
    (pair, *_) = read_formatted(source, 1000)
    optional = {"history": "history", "system": "system"}  # which no row here has
    assert pair[1].columns == {name: name for name in ("instruction", "input", "output")} | optional


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_batches_of_long_rows_have_fewer(tmp_path, monkeypatch, suffix):
    rows = [{"text": str(n) * 300} for n in range(10)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (source,) = training_sources(DataConfig(path=str(path)))
    (whole,) = read_batches(source, 100)
    monkeypatch.setattr("finetune.data.reading.files.BATCH_BYTES", 900)
    parts = list(read_batches(source, 100))
    assert len(parts) > 2
    assert max(part.num_rows for part in parts) <= 3
    assert [row for part in parts for row in part.rows()] == whole.rows()
