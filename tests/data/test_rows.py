"""Files and hub data sets become clean rows, and these the same sample and split as the seeds' calls give."""

import json
import math
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config import DataConfig
from finetune.data.rows import (
    Rows,
    answer_of,
    find_leaks,
    instruction_of,
    iterate_rows,
    load_rows,
    prompt_of,
    sample_rows,
    split_rows,
    split_rows_by_instruction,
)

ALPACA = [
    {"instruction": "Name a coin.", "input": None, "output": "A dime, or a penny."},
    {"instruction": "Shorten: it,\nplease", "input": 'He said "no".\nTwice.', "output": "No, no."},
    {"instruction": "Übersetze 💶", "input": "Geld, kein Gold", "output": "  Zwei\n\nZeilen "},
    {"instruction": "007", "input": "1.50", "output": "42"},
]
MESSAGES = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "Zwei, 💶?"},
            {"role": "assistant", "content": "2\n"},
        ]
    },
    {"messages": [{"role": "user", "content": "Three?"}, {"role": "assistant", "content": "3"}]},
]
COMPLETION = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "One\nline", "completion": "“Two”"}]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(rows: list[dict]) -> list[dict]:
    return [{**row, "row_number": number} for number, row in enumerate(rows, 1)]


def load_all(path) -> tuple[list[dict], dict[str, list[int]]]:
    """All clean rows, in the file's order, and the numbers of the others."""
    rows = load_rows(DataConfig(path=path if isinstance(path, list) else str(path), eval_fraction=0))
    return list(iterate_rows(rows.train)), rows.dropped


def what_is_said(path, **settings) -> str:
    """The one line that a user reads when these rows cannot be loaded."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_rows(DataConfig(path=path if isinstance(path, list) else str(path), **settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


def what_is_said_of(path: Path, **settings) -> str:
    """The same without the path, whose folder has the words of the test's name in it."""
    return what_is_said(path, **settings).replace(str(path), path.name)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- Reading ---


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.json", "rows.jsonl", "ROWS.CSV"])
def test_alpaca_rows_are_the_same_from_every_kind_of_file(tmp_path, name):
    path = tmp_path / name
    if name == "ROWS.CSV":
        write(tmp_path / "rows.csv", ALPACA).rename(path)
    else:
        write(path, ALPACA)
    assert load_all(path) == (numbered(ALPACA), {})


@pytest.mark.parametrize("rows", [MESSAGES, COMPLETION], ids=["messages", "completion"])
@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
def test_messages_and_completions_are_the_same_from_every_kind_of_file(tmp_path, suffix, rows):
    assert load_all(write(tmp_path / f"rows{suffix}", rows)) == (numbered(rows), {})


def test_prompt_and_completion_can_come_as_csv(tmp_path):
    assert load_all(write(tmp_path / "rows.csv", COMPLETION)) == (numbered(COMPLETION), {})


def test_several_files_of_several_kinds_are_read_one_after_another(tmp_path):
    files = [
        write(tmp_path / "a.csv", ALPACA[:1]),
        write(tmp_path / "b.parquet", ALPACA[1:2]),
        write(tmp_path / "c.json", ALPACA[2:3]),
        write(tmp_path / "d.jsonl", ALPACA[3:]),
    ]
    assert load_all([str(file) for file in files]) == (numbered(ALPACA), {})
    assert load_all([str(file) for file in files[::-1]])[0] == numbered(ALPACA[::-1])


def test_files_with_and_without_the_input_column_go_together(tmp_path):
    bare = [{"instruction": "Say hi.", "output": "Hi."}]
    files = [str(write(tmp_path / "a.parquet", bare)), str(write(tmp_path / "b.csv", ALPACA))]
    expected = [{"instruction": "Say hi.", "input": None, "output": "Hi."}, *ALPACA]
    assert load_all(files)[0] == numbered(expected)
    assert load_all(files[::-1])[0] == numbered([*ALPACA, expected[0]])


def test_files_of_messages_go_together_whatever_else_their_messages_hold(tmp_path):
    turned = [
        {"messages": [{"content": m["content"], "role": m["role"], "name": "x"} for m in row["messages"]]}
        for row in MESSAGES
    ]
    files = [str(write(tmp_path / "a.jsonl", MESSAGES)), str(write(tmp_path / "b.jsonl", turned))]
    read = load_all(files)[0]
    assert [[(message["role"], message["content"]) for message in row["messages"]] for row in read] == 2 * [
        [(message["role"], message["content"]) for message in row["messages"]] for row in MESSAGES
    ]


def test_other_columns_are_left_out(tmp_path):
    rows = [{"id": 7, "row_number": 99, "text": "x", **row} for row in ALPACA]
    for suffix in (".csv", ".jsonl"):
        assert load_all(write(tmp_path / f"rows{suffix}", rows))[0] == numbered(ALPACA)


def test_other_columns_may_hold_anything(tmp_path):
    anything = [1, "x", None, [2], {}]
    rows = [{**row, "id": other} for row, other in zip(ALPACA, anything, strict=False)]
    assert load_all(write(tmp_path / "rows.jsonl", rows))[0] == numbered(ALPACA)


def test_what_else_messages_hold_may_be_anything(tmp_path):
    anything = [1, "x", None, [2], {"a": 1}]
    rows = [
        {"messages": [{**m, "score": other} for m, other in zip(row["messages"], anything, strict=False)]}
        for row in MESSAGES
    ]
    read = load_all(write(tmp_path / "rows.jsonl", rows))[0]
    assert [[(m["role"], m["content"]) for m in row["messages"]] for row in read] == [
        [(m["role"], m["content"]) for m in row["messages"]] for row in MESSAGES
    ]


def test_messages_go_before_columns_and_these_before_prompt_and_completion(tmp_path):
    both = [{**ALPACA[0], **COMPLETION[0]}]
    assert load_all(write(tmp_path / "both.jsonl", both))[0] == numbered(ALPACA[:1])
    every = [{**ALPACA[0], **COMPLETION[0], **MESSAGES[0]}]
    assert load_all(write(tmp_path / "every.jsonl", every))[0] == numbered(MESSAGES[:1])


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", COMPLETION[:1])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_all(path)[0] == numbered(COMPLETION[:1])


def test_a_line_of_json_ends_only_where_the_file_has_a_new_line(tmp_path):
    rows = [{"prompt": "one\u2028two\u2029three", "completion": "four\x85five"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert "\u2028" in lines
    assert load_all(written(tmp_path / "rows.jsonl", lines))[0] == numbered(rows)


def test_blank_lines_between_json_lines_are_no_rows(tmp_path):
    lines = [json.dumps(row) for row in COMPLETION]
    path = written(tmp_path / "rows.jsonl", "\n\n" + "\n \n".join(lines))
    assert load_all(path)[0] == numbered(COMPLETION)


# --- Cleaning ---


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json", ".jsonl"])
def test_a_missing_input_column_reads_as_null(tmp_path, suffix):
    rows = [{"instruction": "Say hi.", "output": "Hi."}, {"instruction": "Bye?", "output": "Bye."}]
    read = load_all(write(tmp_path / f"rows{suffix}", rows))[0]
    assert read == numbered([{**row, "input": None} for row in rows])


@pytest.mark.parametrize("blank", ["absent", "null", "NaN", "empty in CSV"])
def test_a_blank_input_reads_as_null_beside_rows_that_have_one(tmp_path, blank):
    row = {"instruction": "Say hi.", "output": "Hi."}
    if blank == "absent":
        path = write(tmp_path / "rows.jsonl", [row, ALPACA[1]])
    elif blank == "null":
        path = write(tmp_path / "rows.json", [{**row, "input": None}, ALPACA[1]])
    elif blank == "NaN":
        path = write(tmp_path / "rows.jsonl", [{**row, "input": float("nan")}, ALPACA[1]])
    else:
        path = write(tmp_path / "rows.csv", [{**row, "input": ""}, ALPACA[1]])
    assert load_all(path)[0] == numbered([{**row, "input": None}, ALPACA[1]])


def test_a_column_of_nothing_but_nulls_reads_as_null(tmp_path):
    rows = [{**row, "input": None} for row in ALPACA]
    for suffix in (".csv", ".parquet", ".json", ".jsonl"):
        assert load_all(write(tmp_path / f"rows{suffix}", rows)) == (numbered(rows), {})


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json", ".jsonl"])
def test_rows_without_text_are_dropped_and_counted_by_reason_and_the_others_keep_their_numbers(
    tmp_path, suffix
):
    rows = [
        {**ALPACA[0], "output": None},
        ALPACA[1],
        {**ALPACA[0], "output": " \n"},
        {**ALPACA[0], "instruction": "\t"},
        ALPACA[3],
        {**ALPACA[0], "instruction": None, "output": None},
    ]
    path = write(tmp_path / f"rows{suffix}", rows)
    kept, dropped = load_all(path)
    assert kept == [{**ALPACA[1], "row_number": 2}, {**ALPACA[3], "row_number": 5}]
    assert dropped == {"without output": [1, 3, 6], "without instruction": [4]}
    loaded = load_rows(DataConfig(path=str(path)))
    assert (loaded.num_read, loaded.num_kept) == (6, 2)


def test_the_numbers_of_rows_go_on_over_files_also_where_rows_are_dropped(tmp_path):
    rows = [{**row, "output": None} if number == 1 else row for number, row in enumerate(ALPACA)]
    files = [str(write(tmp_path / "a.csv", rows)), str(write(tmp_path / "b.jsonl", rows))]
    kept, dropped = load_all(files)
    assert [row["row_number"] for row in kept] == [1, 3, 4, 5, 7, 8]
    assert dropped == {"without output": [2, 6]}


def test_completions_without_text_are_dropped_and_counted(tmp_path):
    rows = [{"prompt": "a", "completion": ""}, {"prompt": " ", "completion": "b"}, *COMPLETION]
    kept, dropped = load_all(write(tmp_path / "rows.jsonl", rows))
    assert [row["row_number"] for row in kept] == [3, 4]
    assert dropped == {"without completion": [1], "without prompt": [2]}


def test_conversations_with_nothing_to_learn_are_dropped_and_counted(tmp_path):
    user, answer = MESSAGES[1]["messages"]
    rows = [
        {"messages": [user]},
        {"messages": [user, {**answer, "content": "  "}]},
        {"messages": [user, {**answer, "content": None}]},
        {"messages": [user, answer, user, {**answer, "content": ""}]},
        {"messages": []},
        {"messages": None},
        MESSAGES[0],
    ]
    kept, dropped = load_all(write(tmp_path / "rows.jsonl", rows))
    assert kept == [{**MESSAGES[0], "row_number": 7}]
    assert dropped == {"without text in an assistant turn": [1, 2, 3, 4], "without messages": [5, 6]}


# --- Sample and split ---


def as_the_seeds_do(frame: pd.DataFrame, num_samples: int | None) -> tuple[list[tuple], list[tuple]]:
    """(instruction, output) of the train and the eval rows, by the calls of the seeds' notebooks."""
    frame = frame.dropna(subset=["output"])
    if num_samples is not None:
        frame = frame.sample(n=num_samples, random_state=42)
    split = Dataset.from_pandas(frame).train_test_split(test_size=0.2, seed=42)
    return tuple([(row["instruction"], row["output"]) for row in split[part]] for part in ("train", "test"))


def as_we_do(path: Path | list[str], num_samples: int | None) -> tuple[list[tuple], list[tuple]]:
    rows = load_rows(DataConfig(path=path if isinstance(path, list) else str(path), num_samples=num_samples))
    parts = (iterate_rows(rows.train), iterate_rows(rows.eval))
    return tuple([(row["instruction"], row["output"]) for row in part] for part in parts)


@pytest.mark.parametrize("num_samples", [None, 600, 871])
def test_sample_and_split_of_the_real_rows_are_the_seeds_own(shared_data, tmp_path, num_samples):
    csv = shared_data / "finance_alpaca_900.csv"
    frame = pd.read_csv(csv)
    frame.loc[::100, "output"] = None  # 9 rows to drop first, which moves all later ones
    holes = tmp_path / "holes.csv"
    parquet = tmp_path / "holes.parquet"
    frame.to_csv(holes, index=False)
    frame.to_parquet(parquet)
    assert as_we_do(csv, num_samples) == as_the_seeds_do(pd.read_csv(csv), num_samples)
    assert as_we_do(holes, num_samples) == as_the_seeds_do(frame, num_samples)
    assert as_we_do(parquet, num_samples) == as_the_seeds_do(frame, num_samples)


@pytest.mark.parametrize("num_samples", [None, 200])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_sample_and_split_of_the_embedded_rows_are_the_seeds_own(suffix, num_samples):
    expected = as_the_seeds_do(pd.read_csv(ROOT / "data" / "finance_sample.csv"), num_samples)
    assert as_we_do(ROOT / "data" / f"finance_sample{suffix}", num_samples) == expected


def test_the_embedded_csv_and_parquet_hold_the_same_rows():
    csv, parquet = (ROOT / "data" / f"finance_sample{suffix}" for suffix in (".csv", ".parquet"))
    (rows, dropped), (same_rows, same_dropped) = load_all(csv), load_all(parquet)
    assert len(rows) > 400
    assert dropped == same_dropped == {}
    # Parquet can tell an empty input from a missing one, and CSV cannot: both are blank.
    assert rows == [{**row, "input": row["input"] or None} for row in same_rows]


def test_the_kind_of_file_and_cutting_it_in_two_change_neither_sample_nor_split(tmp_path):
    frame = pd.read_csv(ROOT / "data" / "finance_sample.csv")
    expected = as_we_do(ROOT / "data" / "finance_sample.csv", 150)
    frame.to_json(tmp_path / "rows.json", orient="records")
    frame.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    frame[:70].to_csv(tmp_path / "head.csv", index=False)
    frame[70:].to_parquet(tmp_path / "tail.parquet")
    assert as_we_do(tmp_path / "rows.json", 150) == expected
    assert as_we_do(tmp_path / "rows.jsonl", 150) == expected
    assert as_we_do([str(tmp_path / "head.csv"), str(tmp_path / "tail.parquet")], 150) == expected


@pytest.mark.parametrize(
    ("num_rows", "num_samples", "seed"), [(1, 1, 0), (30, 30, 42), (30, 7, 1), (9, 1, 3)]
)
def test_a_sample_is_what_pandas_draws(num_rows, num_samples, seed):
    table = Dataset.from_dict({"row_number": range(1, num_rows + 1)})
    drawn = pd.DataFrame({"row_number": range(1, num_rows + 1)}).sample(n=num_samples, random_state=seed)
    assert sample_rows(table, num_samples, seed)["row_number"][:] == drawn["row_number"].tolist()


@pytest.mark.parametrize(("num_rows", "fraction", "seed"), [(10, 0.2, 42), (2, 0.5, 0), (31, 0.07, 5)])
def test_a_split_is_what_datasets_makes(num_rows, fraction, seed):
    table = Dataset.from_dict({"row_number": range(1, num_rows + 1)})
    train, evaluation = split_rows(table, fraction, seed)
    expected = table.train_test_split(test_size=fraction, seed=seed)
    assert train["row_number"][:] == expected["train"]["row_number"][:]
    assert evaluation["row_number"][:] == expected["test"]["row_number"][:]


def test_another_seed_draws_and_splits_otherwise():
    path = str(ROOT / "data" / "finance_sample.csv")
    runs = [
        load_rows(DataConfig(path=path, num_samples=100, sample_seed=sample, split_seed=split))
        for sample, split in ((42, 42), (42, 43), (43, 42))
    ]
    drawn = [set(run.train["row_number"]) | set(run.eval["row_number"]) for run in runs]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(runs[0].eval["row_number"]) != set(runs[1].eval["row_number"])


def test_an_eval_fraction_of_0_trains_on_all_rows_in_the_order_of_the_sample():
    path = ROOT / "data" / "finance_sample.csv"
    rows = load_rows(DataConfig(path=str(path), num_samples=50, eval_fraction=0))
    drawn = pd.read_csv(path).sample(n=50, random_state=42)
    assert [row["output"] for row in iterate_rows(rows.train)] == drawn["output"].tolist()
    assert len(rows.eval) == 0


def test_more_samples_than_usable_rows_are_refused_with_both_numbers(tmp_path):
    path = write(tmp_path / "rows.csv", [*ALPACA, {**ALPACA[0], "output": None}])
    message = what_is_said(path, num_samples=5)
    assert "num_samples is 5" in message
    assert "only 4 rows" in message


def test_what_cannot_be_split_is_refused_with_the_key(tmp_path):
    one = write(tmp_path / "one.csv", ALPACA[:1])
    assert "1 row cannot be split; set data.eval_fraction to 0" in what_is_said(one)
    assert "data.eval_fraction 0.9" in what_is_said(
        write(tmp_path / "two.csv", ALPACA[:2]), eval_fraction=0.9
    )
    assert load_all(one)[0] == numbered(ALPACA[:1])


# --- Errors ---


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json", ".jsonl", ".CSV"])
def test_a_file_that_is_not_there_is_named(tmp_path, suffix):
    path = tmp_path / f"nowhere{suffix}"
    assert f"nowhere{suffix}: No such file" in what_is_said_of(path)
    there = write(tmp_path / "there.csv", ALPACA)
    assert "No such file" in what_is_said([str(there), str(path)])


def test_a_folder_is_named_as_one(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    assert f"{tmp_path} is a folder" in what_is_said(tmp_path)
    assert "folder.csv is a folder" in what_is_said(tmp_path / "folder.csv")


@pytest.mark.parametrize("name", ["rows.txt", "rows.xlsx", "rows"])
def test_a_file_of_an_unknown_kind_is_refused_with_the_kinds_that_are_known(tmp_path, name):
    message = what_is_said(written(tmp_path / name, "instruction,output\na,b\n"))
    assert name in message
    assert ".csv, .parquet, .json, .jsonl" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", ""),
        ("rows.parquet", ""),
        ("rows.json", ""),
        ("rows.jsonl", ""),
        ("rows.csv", "instruction,output\n"),
        ("rows.json", "[]"),
        ("rows.jsonl", "\n\n"),
    ],
)
def test_a_file_without_any_row_is_called_empty(tmp_path, name, content):
    message = what_is_said_of(written(tmp_path / name, content))
    assert name in message
    assert "empty" in message


def test_a_malformed_json_line_is_named_by_its_line(tmp_path):
    good = json.dumps(ALPACA[0])
    path = written(tmp_path / "rows.jsonl", f'{good}\n\n{good}\n{{"instruction": "a", "output": \n{good}\n')
    assert f"{path}, line 4: " in what_is_said(path)


def test_a_malformed_json_array_is_named_by_its_line(tmp_path):
    path = written(tmp_path / "rows.json", '[\n{"instruction": "a",\n"output" "b"}\n]')
    assert f"{path}, line 3: " in what_is_said(path)
    assert f"{path}, line 1: " in what_is_said(written(path, '[{"instruction": "a"'))


def test_json_that_holds_no_objects_is_named_by_its_place(tmp_path):
    good = json.dumps(ALPACA[0])
    array = written(tmp_path / "rows.json", f"[{good}, 5]")
    lines = written(tmp_path / "rows.jsonl", f'{good}\n\n"text"\n')
    assert f"{array}, entry 2: expected an object" in what_is_said(array)
    assert f"{lines}, line 3: expected an object" in what_is_said(lines)


def test_text_that_is_not_utf_8_is_refused_with_the_place_of_the_first_bad_byte(tmp_path):
    head = "instruction,output\n" + "a,b\n" * 50
    csv = written(tmp_path / "rows.csv", f"{head}café,x\n".encode("latin-1"))
    assert f"{csv} is not UTF-8" in what_is_said(csv)
    lines = written(tmp_path / "rows.jsonl", '["café"]'.encode("latin-1"))
    assert f"{lines} is not UTF-8 text (byte 5)" in what_is_said(lines)
    array = written(tmp_path / "rows.json", json.dumps(COMPLETION).encode("utf-16"))
    assert f"{array} is not UTF-8 text (byte 0)" in what_is_said(array)
    assert f"(byte {len(head) + 3})" in what_is_said(csv)


def test_a_csv_row_with_too_many_cells_is_refused_not_shifted(tmp_path):
    one = written(tmp_path / "one.csv", "instruction,output\na,b\nc,d,e,f\n")
    assert "line 3" in what_is_said(one)
    # pandas takes the first column for an index where every row has one cell more than the header
    every = written(tmp_path / "every.csv", "instruction,output\na,b,c\nd,e,f\n")
    assert str(every) in what_is_said(every)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv"])
def test_a_file_that_is_not_what_its_name_says_is_refused_by_name(tmp_path, name):
    assert name in what_is_said(written(tmp_path / name, 'not,what\n"it says'))


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (["instuction", "output"], "'instuction' is near 'instruction'"),
        (["Instruction", " Output"], "'Instruction' is near 'instruction', ' Output' is near 'output'"),
        (["INSTRUCTION", "output"], "'INSTRUCTION' is near 'instruction'"),
        (["promt", "completion"], "'promt' is near 'prompt'"),
        (["mesages"], "'mesages' is near 'messages'"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_unknown_columns_are_named_with_the_nearest(tmp_path, suffix, columns, hint):
    path = write(tmp_path / f"rows{suffix}", [dict.fromkeys(columns, "text")])
    message = what_is_said(path)
    assert f"{path} has the columns {columns}" in message
    assert message.endswith(hint)


def test_columns_near_to_nothing_get_no_hint(tmp_path):
    message = what_is_said_of(write(tmp_path / "rows.csv", [{"x": "1", "y": "2"}]))
    assert "rows.csv has the columns ['x', 'y']" in message
    assert "expected instruction and output (input optional), messages, or prompt and completion" in message
    assert "is near" not in message


def test_files_with_other_columns_do_not_go_together(tmp_path):
    files = [str(write(tmp_path / "a.csv", ALPACA)), str(write(tmp_path / "b.jsonl", COMPLETION))]
    message = what_is_said(files)
    assert all(file in message for file in files)


@pytest.mark.parametrize("column", ["instruction", "input", "output"])
@pytest.mark.parametrize("wrong", [5, True, ["a"], {"a": "b"}], ids=str)
def test_a_cell_that_is_no_text_is_named_by_its_row_and_column(tmp_path, column, wrong):
    rows = [ALPACA[1], ALPACA[2], {**ALPACA[3], column: wrong}]
    message = what_is_said_of(write(tmp_path / "rows.jsonl", rows))
    assert "row 3" in message
    assert column in message


@pytest.mark.parametrize("column", ["instruction", "input", "output"])
@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl"])
def test_a_column_of_numbers_is_named_by_its_first_row(tmp_path, suffix, column):
    rows = [{**row, column: 5} for row in ALPACA]
    assert f"row 1: {column} must be text, not 5" in what_is_said(write(tmp_path / f"rows{suffix}", rows))


@pytest.mark.parametrize(
    "wrong",
    [
        "text",
        5,
        {"role": "user", "content": "a"},
        [1, 2],
        ["text"],
        [{"from": "human", "value": "a"}],
        [{"role": 1, "content": "a"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image", "text": "a"}]}],
    ],
    ids=lambda wrong: json.dumps(wrong),
)
def test_messages_of_another_form_are_named_by_their_row(tmp_path, wrong):
    path = write(tmp_path / "rows.jsonl", [{"messages": wrong}, {"messages": wrong}])
    assert "row 1: messages" in what_is_said(path)


@pytest.mark.parametrize(
    "wrong", ["text", 5, [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]], ids=str
)
def test_messages_of_another_form_are_named_by_their_row_also_behind_good_ones(tmp_path, wrong):
    path = write(tmp_path / "rows.jsonl", [*MESSAGES, {"messages": wrong}])
    message = what_is_said_of(path)
    assert "row 3" in message
    assert "messages" in message


def test_a_file_whose_rows_are_all_dropped_is_refused_with_the_reasons(tmp_path):
    rows = [{**ALPACA[0], "output": None}, {**ALPACA[1], "output": " "}, {**ALPACA[2], "instruction": ""}]
    path = write(tmp_path / "rows.csv", rows)
    message = what_is_said(path)
    assert f"{path} has no usable row: 3 read" in message
    assert "2 without output" in message
    assert "1 without instruction" in message


# --- Hub data sets ---


@pytest.fixture
def hub(monkeypatch):
    """Put rows on a hub that is not there, under the name someone/some-rows."""

    def put(table: Dataset) -> str:
        def load(name: str, split: str) -> Dataset:
            assert (name, split) == ("someone/some-rows", "train")
            return table

        monkeypatch.setattr("finetune.data.reading.files.load_dataset", load)
        return "someone/some-rows"

    return put


def test_a_hub_data_set_is_cleaned_sampled_and_split_as_the_same_local_rows_are(tmp_path, hub):
    frame = pd.read_csv(ROOT / "data" / "finance_sample.csv")[["instruction", "input", "output"]]
    rows = [
        {key: None if pd.isna(text) else text for key, text in row.items()}
        for row in frame.to_dict("records")
    ]
    rows[3]["output"] = None
    rows[4]["instruction"] = " "
    path = write(tmp_path / "rows.jsonl", rows)
    name = hub(Dataset.from_list([{"id": 1, **row, "text": "x"} for row in rows]))
    local, remote = (load_rows(DataConfig(path=place, num_samples=120)) for place in (str(path), name))
    assert list(remote.train) == list(local.train)
    assert list(remote.eval) == list(local.eval)
    assert (remote.num_read, remote.dropped) == (local.num_read, local.dropped)
    assert remote.dropped == {"without output": [4], "without instruction": [5]}


@pytest.mark.parametrize("rows", [MESSAGES, COMPLETION], ids=["messages", "completion"])
def test_a_hub_data_set_comes_in_every_format(hub, rows):
    assert load_all(hub(Dataset.from_list(rows))) == (numbered(rows), {})


def test_a_hub_data_set_without_input_reads_as_a_file_without(hub):
    rows = [{"instruction": "Say hi.", "output": "Hi."}]
    assert load_all(hub(Dataset.from_list(rows)))[0] == numbered([{**rows[0], "input": None}])


def test_a_hub_data_set_is_refused_as_files_are(hub):
    message = what_is_said(hub(Dataset.from_list([{"instuction": "a", "output": "b"}])))
    assert "someone/some-rows has the columns" in message
    assert "'instuction' is near 'instruction'" in message
    assert "row 2: output" in what_is_said(
        hub(Dataset.from_dict({"instruction": ["a", "b"], "output": [None, 5]}))
    )


def test_a_file_that_exists_goes_before_a_hub_data_set_of_that_name(tmp_path, hub, monkeypatch):
    name = hub(Dataset.from_list(COMPLETION))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    (tmp_path / name).mkdir()
    assert "is a folder" in what_is_said(name)


@pytest.mark.parametrize("name", ["someone/some-rows", "rows.txt", "imdb"])
def test_a_hub_name_without_the_hub_says_so_in_one_line(name):
    message = what_is_said(name)
    assert f"data.path {name!r} is no local file" in message
    assert "hub" in message


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "two words", "/rows"])
def test_what_can_be_no_hub_name_is_not_looked_up(name, monkeypatch):
    monkeypatch.setattr("finetune.data.reading.files.load_dataset", lambda *_, **__: pytest.fail("looked up"))
    assert f"data.path {name!r} is neither a file that exists" in what_is_said(name)


# --- Instructions: split by them, and leaks ---


def table_of(rows: list[dict]) -> Dataset:
    """A table as load_rows makes it."""
    return Dataset.from_list(
        [{"row_number": row["row_number"], "source": 0, "row": json.dumps(row)} for row in rows]
    )


def repeated(num_rows: int, num_instructions: int) -> Dataset:
    """Rows whose instructions repeat, written in more than one way."""
    ways = (str, str.upper, " {}. ".format)
    return table_of(
        [
            {
                "instruction": ways[number % 3](f"Instruction {number * 7 % num_instructions}"),
                "input": str(number),
                "output": "x",
                "row_number": number + 1,
            }
            for number in range(num_rows)
        ]
    )


def instructions(table: Dataset) -> set[str]:
    return {row["instruction"].strip(" .").lower() for row in iterate_rows(table)}


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(4, 80),
    num_instructions=st.integers(2, 30),
    fraction=st.floats(0.05, 0.9),
    seed=st.integers(0, 2**32 - 1),
)
def test_split_by_instruction_leaves_none_on_both_sides_and_keeps_to_its_share(
    num_rows, num_instructions, fraction, seed
):
    table = repeated(num_rows, num_instructions)
    largest = max(Counter(row["instruction"].strip(" .").lower() for row in iterate_rows(table)).values())
    share = math.ceil(fraction * num_rows)
    try:
        train, evaluation = split_rows_by_instruction(table, fraction, seed)
    except ValueError:
        assert share < largest or share > num_rows - largest  # no instruction fits, or none would be left
        return
    assert not instructions(train) & instructions(evaluation)
    assert sorted(train["row_number"][:] + evaluation["row_number"][:]) == table["row_number"][:]
    assert share - largest < len(evaluation) <= share
    again = split_rows_by_instruction(table, fraction, seed)
    assert (list(again[0]), list(again[1])) == (list(train), list(evaluation))


def test_split_by_instruction_is_another_for_another_seed():
    splits = {tuple(split_rows_by_instruction(repeated(60, 20), 0.3, s)[1]["row_number"]) for s in range(5)}
    assert len(splits) == 5


def test_split_by_instruction_is_what_the_configuration_asks_for(tmp_path):
    rows = [{"instruction": f"Say {n // 4}.", "input": str(n), "output": "x"} for n in range(40)]
    path = str(write(tmp_path / "rows.jsonl", rows))
    by_row, by_instruction = (load_rows(DataConfig(path=path, split_by=by)) for by in ("row", "instruction"))
    assert instructions(by_row.train) & instructions(by_row.eval)
    assert not instructions(by_instruction.train) & instructions(by_instruction.eval)
    assert len(by_instruction.eval) == len(by_row.eval) == 8
    assert len(load_rows(DataConfig(path=path, split_by="instruction", eval_fraction=0)).eval) == 0


@pytest.mark.parametrize("count", [1, 2, 10])
def test_one_instruction_cannot_be_split_and_the_keys_are_named(tmp_path, count):
    rows = [{"instruction": way, "output": "x"} for way in ["Say hi.", "say HI", " Say hi "] * 4]
    message = what_is_said(str(write(tmp_path / "rows.jsonl", rows[:count])), split_by="instruction")
    assert "data.split_by" in message
    assert "1 different instruction" in message
    assert "data.eval_fraction" in message


CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Thanks."},
    ]
}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, ("Add.", "Add.\n1, 2", "3")),
        ({"instruction": "Add.", "input": None, "output": "3"}, ("Add.", "Add.", "3")),
        ({"prompt": "2 + 2 =", "completion": "4"}, ("2 + 2 =", "2 + 2 =", "4")),
        (CONVERSATION, ("One?", "One?\n1\nTwo?", "2")),
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, *CONVERSATION["messages"][1:]]},
            ("One?", "One?\n1\nTwo?", "2"),
        ),
        ({"messages": [{"role": "assistant", "content": "Hello."}]}, ("", "", "Hello.")),
    ],
)
def test_instruction_prompt_and_answer_of_every_format(row, expected):
    assert (instruction_of(row), prompt_of(row), answer_of(row)) == expected


def test_leaks_are_eval_rows_whose_prompt_is_trained_on_or_nearly():
    long = "Explain in two or three sentences what a bond is, who issues it, and why anybody would buy one"
    prompts = {
        "train": [("Name a coin.", ""), (long, ""), ("Add them.", "1 and 2")],
        "eval": [
            ("Add them.", "3 and 4"),
            ("NAME a coin", None),
            (long.replace("three", "four"), ""),
            ("Hi", ""),
        ],
    }
    train, evaluation = (
        table_of(
            [
                {"instruction": instruction, "input": text, "output": str(n), "row_number": first + n}
                for n, (instruction, text) in enumerate(prompts[split])
            ]
        )
        for split, first in (("train", 10), ("eval", 50))
    )
    leaks = find_leaks(Rows(train=train, eval=evaluation, num_read=7, dropped={}))
    assert {number: (match.position, match.exact) for number, match in leaks.items()} == {
        51: (0, True),
        52: (1, False),
    }
    assert find_leaks(Rows(train=train, eval=evaluation.select([]), num_read=3, dropped={})) == {}
