"""What is trained with a chat template, tools and reasoning is asked for in the same way afterwards."""

import html
import io
import json
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import gguf
import openai
import pytest
import torch
import uvicorn
from accelerate.state import AcceleratorState, GradientState
from conftest import CHATML_TOKENS, tiny_model, tiny_tokenizer
from tools import tool_rows, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.__main__ import main
from finetune.commands.push import files_to_upload
from finetune.data.conversations import Conversation
from finetune.data.templates.chat_template import render, stop_ids
from finetune.model.generate import generate_answers
from finetune.run.adapter import find_trained, load_trained, load_trained_tokenizer
from finetune.serving.app import create_app
from finetune.serving.engine import Engine

MEMORISE = {
    "data__chat_template": "chatml",
    "data__max_length": 1024,
    "data__eval_fraction": 0,
    "lora__r": 32,
    "lora__lora_alpha": 64,
    "lora__lora_dropout": 0,
    "optim__name": "adamw",
    "optim__learning_rate": 1e-2,
    "optim__schedule": "cosine",
    "train__num_epochs": 80,
    "train__micro_batch_size": 8,
    "train__gradient_accumulation_steps": 1,
    "checkpoint__every_steps": 1000,
    "log__every_steps": 20,
}
WITH_TOOLS = {"data__chat_template": "chatml", "data__max_length": 1024}
SHORT = {"train__max_steps": 2, "eval__at_start": False}


def base_without_template(folder: Path, special: tuple[str, ...]) -> Path:
    """The tiny model without a chat template. It can write the token that ends a text: the embedding is not
    zeros, as that of a padding token is."""
    tokenizer = tiny_tokenizer(None, special)
    model = tiny_model(len(tokenizer))
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    model.config.update(ids)
    model.generation_config.update(**ids)
    model.get_input_embeddings().weight.data[2].normal_(std=0.2)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


# The base has the tokens of the template, or the run adds them.
BASES = {"with its tokens": CHATML_TOKENS, "without its tokens": ("<|endoftext|>",)}


@pytest.fixture(params=BASES)
def memorised(request, run_train, tmp_path, made_once) -> Path:
    """A run that has learned the eight conversations by heart; made once for each base, and only read."""
    if request.param not in made_once:
        rows = write_rows(tmp_path / "tools.jsonl", tool_rows())
        base = base_without_template(tmp_path / "base", BASES[request.param])
        made_once[request.param] = run_train(model__name_or_path=base, data__path=rows, **MEMORISE)
    return made_once[request.param]


def start_anew() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def ask(run_dir: Path, rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    start_anew()
    folder.mkdir()
    output = folder / "answers.jsonl"
    files = ["--input", str(write_rows(folder / "asked.jsonl", rows)), "--output", str(output)]
    assert main(["generate", str(run_dir), *files, "--max_new_tokens", "200"]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def written(tokenizer: Any, row: dict[str, Any], turn: int) -> str:
    """What the model has to write as this turn, without the token that ends it."""
    messages, tools = row["messages"], row["tools"]
    prompt = render(tokenizer, Conversation(messages[:turn], tools), add_generation_prompt=True)
    text = render(tokenizer, Conversation(messages[: turn + 1], tools))
    assert text.startswith(prompt)
    return text.removeprefix(prompt).removesuffix("<|im_end|>\n")


def test_the_calls_and_answers_that_were_trained_are_generated(memorised, tmp_path):
    tokenizer = load_trained_tokenizer(find_trained(memorised))
    rows = tool_rows()
    for turn in (1, -1):
        asked = [{**row, "messages": row["messages"][:turn]} for row in rows]
        lines = ask(memorised, asked, tmp_path / f"turn{turn}")
        turns = [range(len(row["messages"]))[turn] for row in rows]
        assert [line["answer"] for line in lines] == [
            written(tokenizer, row, place) for row, place in zip(rows, turns, strict=True)
        ]
        assert all(line["ended"] for line in lines)
        assert [line["tools"] for line in lines] == [row["tools"] for row in rows]
        assert [len(line["messages"]) for line in lines] == turns


def test_a_server_gives_the_calls_as_calls_whole_and_streamed(memorised):
    start_anew()
    model = load_trained(find_trained(memorised))
    with Engine(model, batch_size=4) as engine, socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(engine, model, system_prompt=None, max_new_tokens=200, title="tools")
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        try:
            for row in tool_rows():
                question, calling, *results, last = row["messages"]
                asked = {"model": "tuned", "messages": [question], "tools": row["tools"]}
                (choice,) = client.chat.completions.create(**asked).choices
                expected = [call["function"] for call in calling["tool_calls"]]
                assert choice.finish_reason == "tool_calls"
                calls = choice.message.tool_calls
                assert [
                    {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
                    for call in calls
                ] == expected
                with client.chat.completions.stream(**asked) as stream:
                    (again,) = stream.get_final_completion().choices
                assert [call.function.name for call in again.message.tool_calls] == [
                    one["name"] for one in expected
                ]
                assert again.message.content == choice.message.content
                # The client sends its turn back, as it got it, with the results.
                thought = {key: value for key, value in calling.items() if key == "reasoning_content"}
                said = {**choice.message.model_dump(), **thought, **({"content": None} if thought else {})}
                asked["messages"] = [question, said, *results]
                (choice,) = client.chat.completions.create(**asked).choices
                assert choice.message.content == last["content"]
                assert choice.finish_reason == "stop"
        finally:
            server.should_exit = True
            thread.join()


def test_chat_is_given_the_tools_and_shows_the_calls(memorised, tmp_path, monkeypatch, capsys):
    row = tool_rows()[0]
    (tmp_path / "tools.json").write_text(json.dumps(row["tools"]))
    question = row["messages"][0]["content"]
    for options, is_call in ((["--tools", str(tmp_path / "tools.json")], True), ([], False)):
        start_anew()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(question.encode())))
        assert main(["chat", str(memorised), "--max_new_tokens", "100", *options]) == 0
        expected = written(load_trained_tokenizer(find_trained(memorised)), row, 1)
        assert (capsys.readouterr().out == expected + "\n") == is_call


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "tools must be a list"),
        ("[1]", "tool 1 must be a function"),
        ("[", "JSON"),
        ("[]", "holds no tool"),
    ],
)
def test_tools_that_chat_cannot_read_are_refused(tmp_path, capsys, text, words):
    (tmp_path / "tools.json").write_text(text)
    assert main(["chat", str(tmp_path), "--tools", str(tmp_path / "tools.json")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert f"--tools {tmp_path}/tools.json" in error


def test_the_merged_model_calls_by_itself_and_ends_its_turn(memorised, tmp_path):
    start_anew()
    settings = ["--data.eval_fraction", "0.25", "--rows", "1"]
    assert main(["merge", str(memorised), "--output", str(tmp_path / "merged"), *settings]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    row = tool_rows()[2]
    prompt = tokenizer.apply_chat_template(
        row["messages"][:1], tools=row["tools"], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    answer = model.generate(prompt, max_new_tokens=100, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer) == written(tokenizer, row, 1) + "<|im_end|>"


def test_an_adapter_is_asked_alike_wherever_it_lies(memorised, tmp_path):
    """As the run's result, as its checkpoint, and copied away from the run."""
    checkpoint = max((memorised / "checkpoints").iterdir())
    elsewhere = shutil.copytree(memorised / "adapter", tmp_path / "elsewhere")
    row, answers, texts = tool_rows()[4], [], []
    for place in (memorised, checkpoint, elsewhere):
        start_anew()
        opened = load_trained(find_trained(place))
        asked = Conversation(row["messages"][:1], row["tools"])
        answers += generate_answers(opened.accelerator, opened.model, opened.tokenizer, [asked], 100)
        tokenizer = opened.tokenizer
        texts.append((tokenizer.chat_template, tokenizer.get_vocab(), stop_ids(tokenizer)))
    assert answers == [answers[0]] * 3
    assert texts == [texts[0]] * 3
    assert answers[0].text == written(tokenizer, row, 1)


def test_evaluate_compares_calls_as_they_are_written(memorised, tmp_path):
    start_anew()
    rows = [{**row, "messages": row["messages"][:2]} for row in tool_rows()]
    data, output = write_rows(tmp_path / "calls.jsonl", rows), tmp_path / "figures.json"
    options = ["--data", str(data), "--output", str(output), "--generate", "8", "--max_new_tokens", "200"]
    assert main(["evaluate", str(memorised), *options]) == 0
    answers = json.loads(output.read_text())["answers"]
    tokenizer = load_trained_tokenizer(find_trained(memorised))
    expected = [written(tokenizer, row, 1) for row in rows]
    assert [row["reference"] for row in answers["rows"]] == expected
    assert [row["tuned"]["text"] for row in answers["rows"]] == expected
    assert [row["base"]["text"] for row in answers["rows"]] != expected
    assert answers["chrf"]["tuned"]["value"] == 100


def test_a_run_shows_its_answers_to_rows_with_tools(run_train, tmp_path):
    rows = write_rows(tmp_path / "tools.jsonl", tool_rows())
    run_dir = run_train(data__path=rows, data__eval_fraction=0.5, train__max_steps=1, **WITH_TOOLS)
    lines = [json.loads(line) for line in (run_dir / "answers.jsonl").read_text().splitlines()]
    for line in lines:
        assert len(line["answers"]) == 4
        for entry in line["answers"]:
            assert [turn["role"] for turn in entry["messages"][:3]] == ["user", "assistant", "tool"]
    page = html.unescape((run_dir / "report.html").read_text())
    called = lines[0]["answers"][0]["messages"][1]["tool_calls"][0]["function"]
    assert f"{called['name']}({json.dumps(called['arguments'], ensure_ascii=False)})" in page


def test_export_serves_with_the_template_and_the_tokens_that_were_trained(memorised, tmp_path, capsys):
    start_anew()
    capsys.readouterr()
    assert main(["export", str(memorised), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    trained = find_trained(memorised)
    tokenizer = load_trained_tokenizer(trained)
    assert "<|im_start|>{{ .Role }}" in modelfile
    stops = tokenizer.convert_ids_to_tokens(sorted(stop_ids(tokenizer)))
    assert [line for line in modelfile.splitlines() if line.startswith("PARAMETER")] == [
        *(f'PARAMETER stop "{stop}"' for stop in stops),
        "PARAMETER num_ctx 1024",  # the model has no more positions
    ]
    assert "without tools: Ollama writes them in a form of its own" in shown
    if "<|im_end|>" in AutoTokenizer.from_pretrained(trained.config.model.name_or_path).get_vocab():
        adapter = memorised / "adapter"
        template = f"--tokenizer {adapter} --chat-template {adapter}/chat_template.jinja"
        assert f"{template} --enable-auto-tool-choice --tool-call-parser hermes\n" in shown
    else:
        assert "vllm serve MERGED" in shown  # the rows of its tokens are not vLLM's to load
    file = next((tmp_path / "out").glob("*.gguf"))
    fields = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert fields["tokenizer.ggml.tokens"][fields["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"


# Templates from a file

MINE = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture
def template_file(tmp_path) -> Path:
    path = tmp_path / "mine.jinja"
    path.write_text(MINE)
    return path


def test_a_template_file_is_kept_by_the_run_and_may_vanish(run_train, template_file, tmp_path, capsys):
    run_dir = run_train(data__chat_template=template_file, **SHORT)
    assert (run_dir / "chat_template.jinja").read_text() == MINE
    described = dict(json.loads((run_dir / "environment.json").read_text())["described"])
    assert described["chat template"].startswith(f"{template_file} (")
    template_file.unlink()
    shutil.rmtree(run_dir / "adapter")
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    for place in (run_dir, checkpoint):
        tokenizer = load_trained_tokenizer(find_trained(place))
        assert tokenizer.chat_template == MINE
        assert tokenizer.eos_token == "<|end|>"
        assert tokenizer.convert_tokens_to_ids("<|end|>") in stop_ids(tokenizer)


def test_what_is_pushed_has_the_template_and_no_folder_of_this_machine(run_train, template_file, tmp_path):
    run_dir = run_train(data__chat_template=template_file, **SHORT)
    folder = tmp_path / "pushed"
    folder.mkdir()
    for name, content in files_to_upload(find_trained(run_dir), "me/it").items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        assert str(tmp_path).encode() not in (folder / name).read_bytes(), name
    base = find_trained(run_dir).config.model.name_or_path
    template_file.unlink()
    pushed = find_trained(folder, ["--model.name_or_path", base])
    assert pushed.config.data.chat_template == "mine.jinja"
    tokenizer = load_trained_tokenizer(pushed)
    assert (tokenizer.chat_template, tokenizer.eos_token) == (MINE, "<|end|>")
    card = (folder / "README.md").read_text()
    assert "| chat template | `mine.jinja`, which is `chat_template.jinja` beside this card |" in card
    assert "max_new_tokens=200, eos_token_id=tokenizer.eos_token_id)" in card


def test_a_run_is_not_resumed_with_another_template(run_train, template_file, capsys):
    run_dir = run_train(data__chat_template=template_file, **SHORT)
    adapter = (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run_dir / "adapter")
    template_file.write_text(MINE.replace("m.content", "m.content | trim"))
    run_train(expect=2, data__chat_template=template_file, **SHORT)
    assert f"data.chat_template {template_file} is not the one that the run in" in capsys.readouterr().err
    template_file.write_text(MINE)
    shutil.rmtree(max((run_dir / "checkpoints").iterdir()))
    run_train(data__chat_template=template_file, **SHORT)
    assert (run_dir / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_a_base_without_a_template_is_refused_with_those_that_can_be_named(run_train, tmp_path, capsys):
    base = base_without_template(tmp_path / "base", CHATML_TOKENS)
    run_train(expect=2, model__name_or_path=base)
    error = capsys.readouterr().err
    assert "set data.chat_template to the one to train with (chatml, llama3, gemma, mistral, or a" in error
    run_train(expect=2, model__name_or_path=base, data__chat_template="llama")
    assert "did you mean llama3?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
