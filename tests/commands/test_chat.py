"""What a person types is answered, a pipe gets the answers alone, and every way out is clean."""

import fcntl
import io
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, open_terminal, tiny_tokenizer

from finetune.__main__ import main
from finetune.commands import chat
from finetune.model.generate import Answer, generate_answers
from finetune.run.adapter import find_trained, load_trained

_run: list[Path] = []


@pytest.fixture
def run_dir(request) -> Path:
    """A run whose adapter changes the answers, with a system prompt; trained once, and only read."""
    if not _run:
        train = request.getfixturevalue("run_train")
        keys = {"train__max_steps": 2, "optim__learning_rate": 0.1, "eval__at_start": False}
        _run.append(train(**keys, data__system_prompt="Be short."))
    return _run[0]


def expected(run_dir: Path, *turns: str, system: str | None = "Be short.", base: bool = False) -> str:
    """The greedy answer of at most 10 tokens to user and assistant turns."""
    AcceleratorState._reset_state(reset_partial_state=True)
    model = load_trained(find_trained(run_dir))
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    if base:
        with model.model.disable_adapter():
            (answer,) = generate_answers(model.accelerator, model.model, model.tokenizer, [messages], 10)
    else:
        (answer,) = generate_answers(model.accelerator, model.model, model.tokenizer, [messages], 10)
    AcceleratorState._reset_state(reset_partial_state=True)
    return chat.visible(answer.text)


@pytest.fixture
def pipe(run_dir, monkeypatch) -> Callable[..., int]:
    def answer(text: bytes, *options: str) -> int:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        return main(["chat", str(run_dir), "--max_new_tokens", "10", *options])

    return answer


@pytest.fixture
def talk(run_dir, monkeypatch, capsys) -> Callable[..., str]:
    """Type lines at a terminal, then leave; returns what is on screen."""
    monkeypatch.setenv("COLUMNS", "2000")

    def answer(*lines: str | type[BaseException], leave: type[BaseException] = EOFError) -> str:
        typed = iter([*lines, leave])

        def type_line(prompt: str) -> str:
            print(prompt, end="")
            line = next(typed)
            if not isinstance(line, str):
                raise line
            return line

        terminal = io.TextIOWrapper(io.BytesIO())
        monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("sys.stdin", terminal)
        monkeypatch.setattr("builtins.input", type_line)
        assert main(["chat", str(run_dir), "--max_new_tokens", "10", "--temperature", "0"]) == 0
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out

    return answer


def test_the_lines_of_a_pipe_are_answered_and_nothing_else_is_printed(pipe, run_dir, capsys):
    assert pipe(b"What is a bond?\n\n  And [bold]gold[/bold]?\n") == 0
    printed = capsys.readouterr().out
    answers = [expected(run_dir, "What is a bond?"), expected(run_dir, "And [bold]gold[/bold]?")]
    assert printed == "".join(answer + "\n" for answer in answers)
    assert pipe(b"What is a bond?", "--system_prompt", "Be long.") == 0
    assert capsys.readouterr().out == expected(run_dir, "What is a bond?", system="Be long.") + "\n"


def test_a_pipe_may_hold_anything(pipe, capsys):
    assert pipe(b"") == 0
    assert pipe(b"\xff\xfe not UTF-8\n/base\n") == 0
    assert pipe(b"bond " * 2000) == 2
    assert "exceeds the model's limit of 1,024" in capsys.readouterr().err


def test_what_is_said_of_the_run_does_not_go_down_the_pipe(run_dir, tmp_path, monkeypatch, capsys):
    adapter = tmp_path / "elsewhere"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((run_dir / "adapter" / name).read_bytes())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
    assert main(["chat", str(adapter), "--max_new_tokens", "1", "--train.mixed_precision", "no"]) == 0
    captured = capsys.readouterr()
    assert "does not say how it was trained" in captured.err
    assert captured.out.count("\n") == 1


def test_a_conversation_with_its_base_beside_it(talk, run_dir):
    first = expected(run_dir, "What is a bond?")
    second = expected(run_dir, "What is a bond?", first, "Why?")
    base = expected(run_dir, "What is a bond?", first, "Why?", base=True)
    assert base != second
    screen = talk("What is a bond?", "Why?", "/base", "/undo", "/base", "/clear", "What is a bond?", "/quit")
    answers = [line for line in screen.splitlines() if line.startswith("> ")]
    assert first in answers[0]
    assert second in answers[1]
    assert answers[2] == "> without the adapter:"
    assert base in screen
    assert "> Undone: Why?" in screen
    assert screen.count(first) >= 2  # anew, after /clear
    assert expected(run_dir, "What is a bond?", base=True) in screen


def test_commands_change_what_comes_next_and_say_what_is_wrong(talk, run_dir):
    screen = talk(
        *("/base", "/undo", "/nothing [b]x[/b]", "/temperature warm", "/temperature -1", "/temperature 0.5"),
        *("/temperature 0", "/length 1.5", "/length 0", "/system", "/system Be [long].", "/system", "/help"),
        *("", "Hi", "/length 1020", "Hi again", "/length 3", "Hi again"),
        leave=KeyboardInterrupt,
    )
    for line in (
        "There is no question yet.",
        "There is nothing to undo.",
        "/nothing is not a command; /help lists them.",
        "warm is not a number.",
        "temperature must be 0 (the likeliest token) or 0.01 to 100, not -1",
        "The temperature is 0.5.",
        "1.5 is not a whole number.",
        "the number of new tokens must be at least 1, not 0",
        "The system prompt is: Be short.",
        "The system prompt is: Be [long].",
        "An answer has at most 3 tokens.",
    ):
        assert f"> {line}\n" in screen
    assert all(command in screen for command in chat.HELP)
    assert expected(run_dir, "Hi", system="Be [long].") in screen
    assert "exceeds the model's limit of 1,024\n> An answer" in screen  # and the chat goes on
    assert "3 tokens, " in screen


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(talk, monkeypatch):
    asked = []

    def half_an_answer(*arguments: Any, streamer: Any, **_: Any) -> list[Answer]:
        tokenizer, prompt = arguments[2], arguments[3][0]
        asked.append(tokenizer.decode(prompt))
        streamer.put(tokenizer("the prompt", return_tensors="pt")["input_ids"])
        if len(asked) == 2:
            raise KeyboardInterrupt  # before a word of it
        for token in tokenizer("It is a loan")["input_ids"]:
            streamer.put(torch.tensor([token]))
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.run.answers.answer_prompts", half_an_answer)
    screen = talk("What is a bond?", "Not heard", "Why?")
    assert screen.count("It is a loan\nstopped\n") == 2
    assert "Not heard" not in asked[2]
    assert re.search(r"What is a bond\?.*It is a loan.*Why\?", asked[2], re.DOTALL)


def test_an_answer_is_shown_as_it_is_and_folded_between_words(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    screen = chat._Screen(tiny_tokenizer())
    text = (
        "\n[bold]x[/bold] \x1b[31m:smile: a\rb\n\n    indented and long words beyond it\ta\u202eb " + "w" * 30
    )
    for word in re.findall(r"\s*\S+", text):
        screen.on_finalized_text(word)
    screen.on_finalized_text("", stream_end=True)
    shown = capsys.readouterr().out
    assert shown.split("\n") == [
        "[bold]x[/bold]",
        r"\x1b[31m:smile: a\rb",
        "",
        "    indented and",
        "long words beyond it",
        r"a\u202eb",
        "w" * 30,
        "",
    ]
    assert screen.text == text.lstrip()


def test_help_goes_where_help_goes(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    assert "--system_prompt" in capsys.readouterr().out


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal: the person's, and the program's."""
    ends = open_terminal()
    yield ends
    for end in ends:
        os.close(end)


def test_in_a_real_terminal(run_dir, terminal):
    person, program = terminal
    before = termios.tcgetattr(program)

    def take_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(program, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background ignore it

    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "chat", str(run_dir), "--max_new_tokens", "900"],
        stdin=program,
        stdout=program,
        stderr=program,
        cwd=ROOT,
        preexec_fn=take_the_terminal,
    )
    seen = ""

    deadline = time.monotonic() + 240

    def read_until(done: Callable[[], bool]) -> None:
        nonlocal seen
        while not done():
            ready, _, _ = select.select([person], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"nothing more is written after {seen!r}"
            seen += os.read(person, 65536).decode(errors="replace")

    def wait_for(text: str) -> None:
        nonlocal seen
        read_until(lambda: text in seen)
        seen = seen.partition(text)[2]

    def write(text: bytes) -> None:
        os.write(person, text)

    def press_ctrl_c_until_it_ends() -> int:
        """Between the prompt and the wait for a key, Python notes a signal only at the next one."""
        for _ in range(12):
            write(b"\x03")
            with suppress(subprocess.TimeoutExpired):
                return process.wait(20)  # a slow one may be ending already
        raise AssertionError("Ctrl-C does not end it")

    try:
        wait_for("> ")
        write(b"\x1b[200~What is\na bond?\x1b[201~")  # pasted
        wait_for("a bond?")
        write(b"\r")
        read_until(lambda: len(seen) > 100)  # a part of the answer, which has over 2,000 characters
        write(b"\x03")
        wait_for("stopped")
        wait_for("> ")
        write(b"/undo\r")
        wait_for("Undone: What is\r\na bond?")
        wait_for("> ")
        assert press_ctrl_c_until_it_ends() == 0
    finally:
        process.kill()
    assert "Traceback" not in seen
    assert termios.tcgetattr(program) == before
