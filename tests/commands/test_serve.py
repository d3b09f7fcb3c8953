"""OpenAI's own client gets the answers of `generate`, many at a time, and nobody else is let in."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import pytest
from accelerate.state import AcceleratorState, GradientState
from browser import Page
from command_line import help_of
from conftest import ROOT

from finetune.__main__ import main

QUESTIONS = [f"What is a bond of {number} years?" + " Really?" * (number % 7) for number in range(16)]


class Served(NamedTuple):
    run_dir: Path
    process: subprocess.Popen[str]
    address: str
    client: openai.OpenAI
    answers: dict[str, list[dict[str, Any]]]
    """What `generate` answers to QUESTIONS, by model"""


@pytest.fixture(scope="module")
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """The servers that the module has started."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()


_served: list[Served] = []


@pytest.fixture
def served(request, processes, tmp_path) -> Served:
    """A server of a run whose adapter changes the answers; made once."""
    if not _served:
        train = request.getfixturevalue("run_train")
        keys = {"train__max_steps": 2, "optim__learning_rate": 0.1, "eval__at_start": False}
        run_dir = train(**keys, data__system_prompt="Be short.")
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune", "serve", str(run_dir), "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        processes.append(process)
        answers = {which: generated(run_dir, which, tmp_path) for which in ("tuned", "base")}
        seen = ""
        while not (found := re.search(r"page +(http://127\.0\.0\.1:\d+)", seen)):
            line = process.stdout.readline()
            assert line, seen
            seen += line
        client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=0)
        _served.append(Served(run_dir, process, found[1], client, answers))
    return _served[0]


def generated(run_dir: Path, which: str, folder: Path) -> list[dict[str, Any]]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    rows, output = folder / "questions.jsonl", folder / f"{which}.jsonl"
    rows.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    options = ["--which", which, "--max_new_tokens", "12", "--batch_size", "1"]
    assert main(["generate", str(run_dir), "--input", str(rows), "--output", str(output), *options]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def ask(served: Served, question: str, model: str = "tuned", **settings: Any) -> Any:
    return served.client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        **{"max_completion_tokens": 12, "temperature": 0, **settings},
    )


def streamed(served: Served, question: str, model: str = "tuned", **settings: Any) -> tuple[list[str], Any]:
    """The pieces of a streamed answer, and its last chunk, with the numbers of tokens."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(served, question, model, **options, **settings))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    return [piece for piece in pieces if piece], chunks[-1]


@pytest.mark.parametrize("model", ["tuned", "base"])
def test_the_client_gets_the_answers_of_generate_whole_and_streamed(served, model):
    assert [one.id for one in served.client.models.list()] == ["tuned", "base"]
    for question, expected in list(zip(QUESTIONS, served.answers[model], strict=True))[:4]:
        whole = ask(served, question, model)
        (choice,) = whole.choices
        assert choice.message.content == expected["answer"]
        assert choice.finish_reason == ("stop" if expected["ended"] else "length")
        assert whole.usage.completion_tokens == expected["num_tokens"]
        pieces, last = streamed(served, question, model)
        assert "".join(pieces) == expected["answer"]
        assert len(pieces) > 1
        assert last.usage == whole.usage
    assert [line["answer"] for line in served.answers["tuned"]] != [
        line["answer"] for line in served.answers["base"]
    ]


def test_sixteen_requests_at_once_get_the_answer_of_each(served):
    def one(number: int) -> str:
        model = ("tuned", "base")[number % 2]
        if number % 3:
            return "".join(streamed(served, QUESTIONS[number], model)[0])
        return str(ask(served, QUESTIONS[number], model).choices[0].message.content)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(16)))
    assert answers == [
        served.answers[("tuned", "base")[number % 2]][number]["answer"] for number in range(16)
    ]


def test_an_answer_ends_before_a_stop_text_and_no_piece_of_it_is_sent(served):
    answer = served.answers["tuned"][0]["answer"]
    stop = answer[len(answer) // 2 : len(answer) // 2 + 3]
    before = answer[: answer.index(stop)].strip()
    whole = ask(served, QUESTIONS[0], stop=[stop, "never written"])
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (before, "stop")
    assert "".join(streamed(served, QUESTIONS[0], stop=stop)[0]) == before


def test_a_seed_repeats_a_sampled_answer_and_the_system_prompt_may_be_the_requests(served):
    first, again, other = (
        ask(served, QUESTIONS[0], temperature=1, seed=seed).choices[0].message.content for seed in (1, 1, 2)
    )
    assert first == again != other
    messages = [{"role": "system", "content": "Be long."}, {"role": "user", "content": QUESTIONS[0]}]
    own = served.client.chat.completions.create(model="tuned", messages=messages, max_tokens=12)
    assert own.usage.prompt_tokens == ask(served, QUESTIONS[0]).usage.prompt_tokens
    assert own.choices[0].message.content != served.answers["tuned"][0]["answer"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "gpt-4"}, "model: Input should be 'tuned' or 'base'"),
        ({"top_p": 0.5}, "top_p: Input should be greater than or equal to 1"),
        ({"extra_body": {"top_k": 5}}, "top_k: Extra inputs are not permitted"),
        ({"temperature": -1}, "temperature must be 0 (the likeliest token) or 0.01 to 100, not -1"),
        ({"max_completion_tokens": 2000}, "exceeds the model's limit of 1,024"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "there is nothing to answer"),
        ({"messages": [{"content": "Hi"}]}, "must be a list of objects with role and content"),
        ({"tools": [{"type": "search"}]}, "tool 1 must be an object with a name"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_sentence(served, settings, message):
    arguments = {"model": "tuned", "messages": [{"role": "user", "content": "Hi"}], **settings}
    with pytest.raises(openai.BadRequestError) as error:
        served.client.chat.completions.create(**arguments)
    assert message in error.value.body["message"]


def test_a_client_that_leaves_ends_its_answer(served):
    stream = ask(served, QUESTIONS[0], max_completion_tokens=900, stream=True, temperature=50)
    next(iter(stream))
    stream.close()
    # Of the answer that was left, 900 tokens would be written before this one.
    assert (
        ask(served, QUESTIONS[0], timeout=20).choices[0].message.content
        == (served.answers["tuned"][0]["answer"])
    )


def test_nobody_but_programs_on_this_computer_is_let_in(served):
    port = int(served.address.rpartition(":")[2])
    for address in ("127.0.0.2", socket.gethostbyname(socket.gethostname())):
        if address != "127.0.0.1":
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((address, port), timeout=5).close()

    def status(**headers: str) -> int:
        body = json.dumps(
            {"model": "tuned", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        )
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            return urlopen(Request(f"{served.address}/v1/chat/completions", body.encode(), names)).status
        except HTTPError as error:
            return error.code

    assert status(Content_Type="application/json") == 200
    assert status(Content_Type="text/plain") == 415  # what a web page may send without asking first
    assert status(Content_Type="application/json", Host="evil.example") == 400
    response = urlopen(f"{served.address}/")
    assert "access-control-allow-origin" not in {name.lower() for name in response.headers}


def test_a_port_that_is_in_use_is_said_before_the_model_is_loaded(served, capsys):
    port = served.address.rpartition(":")[2]
    assert main(["serve", str(served.run_dir), "--port", port]) == 2
    captured = capsys.readouterr()
    assert f"--port {port} of 127.0.0.1 cannot be used" in captured.err
    assert captured.err.count("\n") == 1
    assert main(["serve", str(served.run_dir), "--batch_size", "0"]) == 2
    assert "--port PORT" in help_of(capsys, "serve")


def test_the_page_shows_the_answers_of_both_models_side_by_side(served, tmp_path):
    with Page(served.address, 1100, 800, tmp_path) as page:
        page.value_of("document.getElementById('length').value = 12")
        for number in (1, 2):
            page.type_text(QUESTIONS[number])
            page.press_enter()
            page.wait_for(f"document.querySelectorAll('.answer:not(.waiting)').length === {2 * number}")
            page.wait_for("!document.getElementById('send').disabled")
        shown = [
            page.value_of(f"[...document.querySelectorAll('#{model} .answer')].map((box) => box.textContent)")
            for model in ("tuned", "base")
        ]
        page.take_screenshot(Path(os.environ.get("SCREENSHOTS", tmp_path)) / "serve.png")
        assert [answers[0] for answers in shown] == [
            served.answers[model][1]["answer"] for model in ("tuned", "base")
        ]
        assert all(answers[1] for answers in shown)
        assert page.value_of("document.title") == "run, and its base"
        page.value_of("document.getElementById('clear').click()")
        assert page.value_of("document.querySelectorAll('.answer').length") == 0
        page.value_of("document.getElementById('length').value = 5000")
        page.value_of("document.getElementById('question').focus()")
        page.type_text("Hi")
        page.press_enter()
        page.wait_for("document.querySelectorAll('.failed').length === 2")
        assert "exceeds the model's limit" in page.value_of("document.querySelector('.failed').textContent")
        assert not [text for text in page.complaints if "400 (Bad Request)" not in text]


def test_ctrl_c_ends_it_though_an_answer_is_under_way(served):
    """The last test of the module: it ends the server."""
    stream = ask(served, QUESTIONS[0], max_completion_tokens=900, stream=True, temperature=50)
    next(iter(stream))
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(30) == 0
