"""Each row is answered once, as if it were alone, and a killed generation goes on."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT
from datasets import Dataset

from finetune.__main__ import main
from finetune.commands import generate
from finetune.model.generate import generate_answers
from finetune.run import answers
from finetune.run.adapter import find_trained, load_trained
from finetune.runtime import files

QUESTIONS = [f"What is a bond of {number} years?" + " Really?" * (number % 7) for number in range(13)]


_run: list[Path] = []


@pytest.fixture
def run_dir(request) -> Path:
    """A run whose adapter changes the answers; trained once, and only read."""
    if not _run:
        train = request.getfixturevalue("run_train")
        _run.append(train(train__max_steps=2, optim__learning_rate=0.1, eval__at_start=False))
    return _run[0]


@pytest.fixture
def questions(tmp_path) -> Path:
    """Rows without an answer column."""
    path = tmp_path / "questions.csv"
    pd.DataFrame({"instruction": QUESTIONS, "topic": "bonds"}).to_csv(path, index=False)
    return path


@pytest.fixture
def ask(run_dir, questions, tmp_path) -> Callable[..., Path]:
    """Generate in this process; returns the output's path."""

    def call(*options: str, name: str = "answers.jsonl", rows: Path = questions, expect: int = 0) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        output = tmp_path / name
        assert main(arguments(run_dir, rows, output, *options)) == expect
        return output

    return call


def arguments(run_dir: Path, rows: Path, output: Path, *options: str) -> list[str]:
    files = ["--input", str(rows), "--output", str(output)]
    return ["generate", str(run_dir), *files, "--max_new_tokens", "12", *options]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_columns_are_mapped_and_those_that_are_not_used_are_named(ask, tmp_path, capsys):
    rows = tmp_path / "mapped.csv.gz"
    pd.DataFrame({"customer_says": QUESTIONS[:2], "ticket": [7, 8]}).to_csv(rows, index=False)
    columns = "{customer_says: instruction, we_reply: output}"  # the column of the answers is not there
    output = ask("--data.columns", columns, rows=rows)
    assert [line["instruction"] for line in read(output)] == QUESTIONS[:2]
    assert 'Not used: column "ticket" (2 rows)' in capsys.readouterr().out
    ask("--data.columns", "{client: instruction}", rows=rows, name="none.jsonl", expect=2)
    assert "has no column 'client', which data.columns names" in capsys.readouterr().err


def test_every_row_has_the_answer_it_would_have_alone(ask, run_dir, capsys):
    output = ask("--which", "both", "--batch_size", "5")
    lines = read(output)
    assert [line["row_number"] for line in lines] == list(range(1, 14))
    assert [line["instruction"] for line in lines] == QUESTIONS
    assert list(lines[0]) == [
        *("row_number", "instruction", "input", "answer", "num_tokens", "ended"),
        *("base_answer", "base_num_tokens", "base_ended"),
    ]
    AcceleratorState._reset_state(reset_partial_state=True)
    model = load_trained(find_trained(run_dir))
    for line, question in zip(lines, QUESTIONS, strict=True):
        asked = [[{"role": "user", "content": question}]]
        (tuned,) = generate_answers(model.accelerator, model.model, model.tokenizer, asked, 12)
        with model.model.disable_adapter():
            (base,) = generate_answers(model.accelerator, model.model, model.tokenizer, asked, 12)
        assert (line["answer"], line["num_tokens"], line["ended"]) == tuned
        assert (line["base_answer"], line["base_num_tokens"], line["base_ended"]) == base
    assert any(line["answer"] != line["base_answer"] for line in lines)
    assert not list(output.parent.glob("*.partial"))
    printed = capsys.readouterr().out
    assert "13 answers of " in printed
    assert "13 answers of the base of " in printed


def test_what_kind_of_rows_can_be_answered(ask, tmp_path, capsys):
    system, user, assistant = (
        {"role": role, "content": text}
        for role, text in (("system", "Be short."), ("user", "Hi"), ("assistant", "Yes?"))
    )
    kinds: dict[str, tuple[list[dict[str, Any]], list[int]]] = {
        "alpaca": ([{"instruction": "Hi", "output": ""}, {"instruction": " ", "output": "x"}], [1]),
        "prompts": ([{"prompt": "Hi"}, {"prompt": None}, {"prompt": "Bye"}], [1, 3]),
        "messages": (
            [
                {"messages": messages}
                for messages in (
                    [system, user, assistant],
                    [user, assistant, user],
                    [system],
                    [assistant],
                    [],
                )
            ],
            [1, 2],
        ),
    }
    for name, (rows, answered) in kinds.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        lines = read(ask(name=f"answers-{name}.jsonl", rows=path))
        assert [line["row_number"] for line in lines] == answered
        column = next(iter(rows[0]))
        assert [line[column] for line in lines] == [rows[number - 1][column] for number in answered]
    printed = capsys.readouterr().out
    assert "Left out, without instruction: row 2" in printed
    assert "Left out, without prompt: row 2" in printed
    assert "Left out, without a question: rows 3, 4" in printed


def test_the_reference_answer_is_not_shown_to_the_model(ask, tmp_path):
    for name, answer in (("one", "It is a loan."), ("other", "Never mind.")):
        row = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": row}) + "\n", encoding="utf-8")
    one, other = (read(ask(name=f"out-{n}.jsonl", rows=tmp_path / f"{n}.jsonl")) for n in ("one", "other"))
    assert one[0]["answer"] == other[0]["answer"]


def test_a_csv_file_holds_the_same_answers(ask):
    lines = read(ask())
    frame = pd.read_csv(ask(name="answers.csv"), keep_default_na=False)
    assert frame["answer"].tolist() == [line["answer"] for line in lines]
    assert frame["row_number"].tolist() == [line["row_number"] for line in lines]
    assert frame["ended"].tolist() == [line["ended"] for line in lines]


def test_a_csv_cell_holds_whatever_a_model_may_say(tmp_path):
    said = ["a\rb", 'quoted "c", d', "two\nlines\r\n", "=1+1", ""]
    row = json.dumps({"prompt": "x", "completion": ""})
    rows = Dataset.from_dict({"row": [row] * len(said), "row_number": list(range(1, len(said) + 1))})
    records = {
        n: {"row_number": n, "answer": text, "num_tokens": 1, "ended": True} for n, text in enumerate(said, 1)
    }
    path = tmp_path / "answers.csv"
    files.write_atomically(path, answers.format_answers(rows, records, ".csv"))
    assert pd.read_csv(path, keep_default_na=False)["answer"].tolist() == said


def test_a_draw_depends_on_the_seed_and_the_row_alone(ask):
    drawing = ("--temperature", "1.5")
    first = ask(*drawing, "--batch_size", "13", name="first.jsonl").read_bytes()
    assert ask(*drawing, "--batch_size", "4", name="again.jsonl").read_bytes() == first
    other_seed = ask(*drawing, "--seed", "1", name="other.jsonl").read_bytes()
    greedy = ask(name="greedy.jsonl").read_bytes()
    assert len({first, other_seed, greedy}) == 3
    texts = [line["answer"] for line in read(ask(*drawing, name="a.jsonl"))]
    assert len(set(texts)) == len(texts)


def test_killed_it_goes_on_and_no_row_is_missing_or_twice(ask, run_dir, questions, tmp_path, capsys):
    whole = ask("--batch_size", "1", name="whole.jsonl").read_bytes()
    output = tmp_path / "answers.jsonl"
    partial = tmp_path / "answers.jsonl.partial"
    options = arguments(run_dir, questions, output, "--batch_size", "1")
    # Slowed down, so that it is killed amid the rows.
    program = (
        "import sys, time; from finetune.run import answers; f = answers.answer_batch\n"
        "answers.answer_batch = lambda *a: (time.sleep(0.2), f(*a))[1]\n"
        "from finetune.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, *options], cwd=ROOT)
    while process.poll() is None and not (partial.exists() and partial.read_bytes().count(b"\n") >= 5):
        time.sleep(0.05)
    ask("--batch_size", "1", expect=2)
    assert f"--output {output} is being written by another generate" in capsys.readouterr().err
    process.kill()
    assert process.wait() == -signal.SIGKILL
    num_answered = partial.read_bytes().count(b"\n") - 1
    assert 4 <= num_answered < len(QUESTIONS)
    assert not output.exists()
    with partial.open("ab") as file:
        file.write(b'{"row_number": 3, "ans')  # a line that the kill has torn
    capsys.readouterr()
    assert ask("--batch_size", "3").read_bytes() == whole
    assert f"Resuming: {num_answered} of 13 rows are answered." in capsys.readouterr().out
    assert not [path.name for path in tmp_path.iterdir() if path.suffix in (".partial", ".lock")]


def test_no_row_is_asked_again(ask, monkeypatch, capsys):
    answer_batch, asked = answers.answer_batch, []

    def stop_at_the_third(model: Any, batch: Any, arguments: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append([question.row_number for question in batch])
        return answer_batch(model, batch, arguments)

    monkeypatch.setattr(answers, "answer_batch", stop_at_the_third)
    ask("--batch_size", "4", expect=130)
    assert "rerun the same command to resume" in capsys.readouterr().out
    lengths = [len(QUESTIONS[number - 1]) for batch in asked for number in batch]
    assert lengths == sorted(lengths, reverse=True)
    before = asked.copy()
    asked.clear()
    monkeypatch.setattr(
        answers, "answer_batch", lambda *a: asked.append([q.row_number for q in a[1]]) or answer_batch(*a)
    )
    ask("--batch_size", "4")
    assert sorted(number for batch in before + asked for number in batch) == list(range(1, 14))


def test_an_answer_begun_otherwise_is_not_gone_on_with(
    ask, run_dir, run_train, questions, monkeypatch, capsys
):
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answers, "answer_batch", stop)
        output = ask(expect=130)
    partial = output.with_name("answers.jsonl.partial")
    assert partial.exists()
    monkeypatch.setattr(generate, "load_trained", stop)  # nothing is loaded for that
    for options, told in (
        (["--temperature", "1"], "temperature was 0.0, is 1.0"),
        (["--which", "base"], "which was tuned, is base"),
        (["--system_prompt", "Be [short]."], "system_prompt was None, is Be [short]."),
    ):
        ask(*options, expect=2)
        assert told in capsys.readouterr().err
    questions.write_text("prompt\nHi\n", encoding="utf-8")
    ask(expect=2)
    assert "the rows were another" in capsys.readouterr().err
    for other in ("[]\n", "[1]\nmine", "mine", ""):
        partial.write_text(other, encoding="utf-8")
        ask(expect=2)
        assert "is no record of a generation" in capsys.readouterr().err
        assert partial.read_text(encoding="utf-8") == other


def test_what_is_wrong_is_said_before_a_model_is_loaded(ask, tmp_path, monkeypatch, capsys):
    def load(_: Any) -> Any:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(generate, "load_trained", load)
    there = tmp_path / "there.jsonl"
    there.write_text("mine", encoding="utf-8")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"prompt": " "}\n', encoding="utf-8")
    for call, told in (
        (lambda: ask(name="answers.txt", expect=2), "ends in .jsonl or .csv"),
        (lambda: ask(name="there.jsonl", expect=2), "exists already"),
        (lambda: ask(name="none/answers.csv", expect=2), "is not a writable folder"),
        (lambda: ask(rows=tmp_path / "none.csv", expect=2), "none.csv is not a file"),
        (lambda: ask(rows=empty, expect=2), "has no row to answer"),
        (lambda: ask("--batch_size", "0", expect=2), "--batch_size must be at least 1"),
        (lambda: ask("--max_new_tokens", "0", expect=2), "at least 1, not 0"),
        (lambda: ask("--temperature", "-1", expect=2), "temperature must be 0"),
    ):
        call()
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    assert there.read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in tmp_path.glob("*.partial")) == []


def test_a_row_without_room_for_its_answer_is_named(ask, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    path.write_text(f'{{"prompt": "Hi"}}\n{{"prompt": "{"bond " * 1200}"}}\n', encoding="utf-8")
    ask(rows=path, expect=2)
    assert "row 2: the prompt has " in capsys.readouterr().err


def test_help_loads_nothing(capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", "--help"])
    assert end.value.code == 0
    assert "--max_new_tokens" in capsys.readouterr().out
