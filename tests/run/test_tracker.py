"""What a person sees of a run: TensorBoard, plain lines, and the bar in a terminal."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import EVAL_METRICS, TRAIN_METRICS, open_terminal, read_metrics
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from finetune.run.tracker import Tracker
from finetune.runtime import console

EVAL_TAGS = {f"eval/{name}" for name in EVAL_METRICS}
TRAIN_TAGS = {f"train/{name}" for name in TRAIN_METRICS}
# Six updates, three an epoch.
SIX = {
    "train__micro_batch_size": 2,
    "train__gradient_accumulation_steps": 3,
    "optim__learning_rate": 1e-2,
    "log__every_steps": 2,
}


def read_events(run_dir: Path) -> EventAccumulator:
    """All events, where the default keeps a sample of them."""
    return EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0, "tensors": 0}).Reload()


def lines_of(text: str, split: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"{split} ")]


# TensorBoard


def test_tensorboard_shows_the_numbers_of_the_metrics_file(run_train):
    run_dir = run_train(**SIX)
    events = read_events(run_dir)
    assert set(events.Tags()["scalars"]) == TRAIN_TAGS | EVAL_TAGS
    lines = read_metrics(run_dir)
    for tag in TRAIN_TAGS | EVAL_TAGS:
        split, _, key = tag.partition("/")
        written = [(entry["step"], entry[key]) for entry in lines if entry["split"] == split]
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in shown] == [step for step, _ in written]
        assert [value for _, value in shown] == pytest.approx([value for _, value in written], rel=1e-6)


def test_a_run_is_one_event_file_in_one_folder(run_train):
    run_dir = run_train(**SIX)
    (file,) = (run_dir / "tensorboard").rglob("*")  # a folder below would be a second run on screen
    assert file.name.startswith("events.out.tfevents.")


def test_the_configuration_is_beside_the_curves_as_hyperparameters(run_train):
    run_dir = run_train(**SIX, data__system_prompt="Be brief.")
    events = read_events(run_dir)

    def content(tag: str) -> Any:
        return HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)

    values = content("_hparams_/session_start_info").session_start_info.hparams
    assert values["optim.learning_rate"].number_value == 1e-2
    assert values["train.gradient_accumulation_steps"].number_value == 3
    assert values["data.system_prompt"].string_value == "Be brief."
    assert values["model.revision"].string_value == "None"
    metrics = content("_hparams_/experiment").experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == {"eval/loss", "eval/mean_token_accuracy"}


@pytest.mark.parametrize(("eval_fraction", "count"), [(0.6, 10), (0.1, 2), (0, 0)])
def test_answers_to_the_first_eval_rows_are_shown_before_and_after(run_train, eval_fraction, count):
    run_dir = run_train(**{**SIX, "train__num_epochs": 6}, data__eval_fraction=eval_fraction)
    events = read_events(run_dir)
    tags = {tag for tag in events.Tags()["tensors"] if tag.startswith("answers/")}
    assert tags == {f"answers/{number}/text_summary" for number in range(1, count + 1)}
    last = read_metrics(run_dir)[-1]["step"]
    for tag in tags:
        shown = events.Tensors(tag)
        assert [event.step for event in shown] == [0, last]
        before, after = (event.tensor_proto.string_val[0].decode() for event in shown)
        assert re.match(r"\*\*What is (\d+) plus \1\?", before)
        assert before.splitlines()[0] == after.splitlines()[0]
        assert before != after
        assert "<|im_end|>" not in before + after


# Lines, where the output is no terminal


def test_without_a_terminal_each_log_line_is_one_plain_line_with_the_numbers_of_the_metrics(run_train, capfd):
    capfd.readouterr()
    run_dir = run_train(**SIX)
    output = capfd.readouterr()
    for text in output:
        assert "\x1b" not in text
        assert "\r" not in text
    metrics = read_metrics(run_dir)
    for split in ("train", "eval"):
        entries = [entry for entry in metrics if entry["split"] == split]
        assert len(lines_of(output.out, split)) == len(entries) == 3
        for line, entry in zip(lines_of(output.out, split), entries, strict=True):
            epoch = 1 if entry["step"] <= 3 else 2
            assert re.match(
                rf"{split} +step {entry['step']}/6  epoch {epoch}/2  loss {entry['loss']:.4f}  ", line
            )
            assert f"accuracy {entry['mean_token_accuracy']:.4f}" in line
            assert f"entropy {entry['entropy']:.4f}" in line
            if split == "train":
                assert f"lr {entry['learning_rate']:.2e}" in line
                assert f"grad norm {entry['grad_norm']:.3f}" in line
                assert f"tokens/s {entry['useful_tokens_per_second']:,.0f}" in line
                assert f"GiB {entry['peak_memory_gib']:.2f}" in line


def test_nothing_but_the_run_itself_is_on_the_screen(run_train, capfd, recwarn):
    """Libraries warn, once or on every call, of what a user can do nothing about."""
    capfd.readouterr()
    run_train(
        **SIX, model__quantization="int8", train__mixed_precision="bf16", train__gradient_checkpointing=True
    )
    assert capfd.readouterr().err == ""
    # Python shows all warnings but these by default; under pytest they do not reach stderr.
    hidden = (DeprecationWarning, PendingDeprecationWarning)
    assert [str(w.message) for w in recwarn if not issubclass(w.category, hidden)] == []


# The tables


@pytest.fixture
def wide(monkeypatch) -> None:
    """Tables at full width, so that no cell is folded."""
    monkeypatch.setattr(console.console, "_width", 250)


def cells(text: str, first: str) -> list[str]:
    """The cells of the table row that begins with `first`."""
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in text.splitlines()]
    (row,) = [row for row in rows if row[:1] == [first]]
    return row[1:]


@pytest.mark.usefixtures("wide")
def test_the_start_shows_the_arithmetic_of_a_batch(run_train, capsys):
    run_train(**SIX, train__max_steps=4, train__max_tokens_per_micro_batch=300)
    text = capsys.readouterr().out
    assert cells(text, "examples per update") == ["2 x 3 x 1 process = 6"]
    assert cells(text, "updates") == ["ceil(16 / 6) = 3 an epoch x 2, at most 4 = 4"]
    assert cells(text, "examples") == ["16 train, 4 eval"]
    assert cells(text, "tokens per micro-batch") == ["300 at most, packed without padding"]


@pytest.mark.usefixtures("wide")
def test_the_start_shows_asked_beside_got_and_why(run_train, capsys):
    run_train(**SIX, optim__name="paged_adamw_8bit")
    text = capsys.readouterr().out
    assert cells(text, "optimizer")[:2] == ["paged_adamw_8bit", "adamw_8bit"]
    assert "GPU" in cells(text, "optimizer")[2]
    assert cells(text, "precision") == ["no", "no", ""]


@pytest.mark.usefixtures("wide")
def test_the_start_counts_the_rows_that_were_dropped_and_cut(run_train, rows_file, capsys):
    with rows_file.open("a") as file:
        file.write('{"instruction": "Say nothing.", "input": "", "output": " "}\n' * 2)
        file.write('{"instruction": "", "input": "", "output": "What?"}\n')
    run_train(**SIX, data__max_length=75)
    text = capsys.readouterr().out
    assert cells(text, "rows") == ["23 read, 20 usable, 20 taken; instruction and output"]
    assert cells(text, "dropped")[0].split(", ") == ["2 without output", "1 without instruction"]
    assert re.fullmatch(r"[1-9] train, \d eval", cells(text, "cut at max_length")[0])


@pytest.mark.usefixtures("wide")
def test_the_end_compares_the_first_evaluation_with_the_last(run_train, capsys):
    run_dir = run_train(**SIX)
    text = capsys.readouterr().out.partition("Before and after")[2]
    evaluations = [entry for entry in read_metrics(run_dir) if entry["split"] == "eval"]
    before, after = evaluations[0], evaluations[-1]
    assert cells(text, "eval") == ["step 0", "step 6", "change"]
    change = f"{after['loss'] / before['loss'] - 1:+.1%}"
    assert cells(text, "loss") == [f"{before['loss']:.4f}", f"{after['loss']:.4f}", change]
    assert cells(text, "accuracy")[1] == f"{after['mean_token_accuracy']:.4f}"
    assert f"tensorboard --logdir {run_dir}\n" in text


@pytest.mark.parametrize(
    "settings", [{"data__eval_fraction": 0}, {"eval__at_start": False, "eval__every": 100}]
)
def test_a_run_with_nothing_to_compare_ends_without_that_table(run_train, capsys, settings):
    run_train(**SIX, **settings)
    text = capsys.readouterr().out
    assert "Before and after" not in text
    assert "tensorboard --logdir" in text


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", ["run[1]", "run[red]", "run[", "a[/b]"])
def test_brackets_in_a_path_are_shown_as_they_are(run_train, tmp_path, capsys, name):
    run_train(output_dir=tmp_path / name, **SIX)
    text = capsys.readouterr().out
    assert f"Run {tmp_path / name}" in text
    assert f"adapter      {tmp_path / name / 'adapter'}\n" in text


# The bar, in a terminal


@pytest.fixture
def terminal(monkeypatch) -> Iterator[Callable[[], str]]:
    """A terminal of 120 columns for the program to write to; call it for what was written."""
    master, slave = open_terminal()
    received = bytearray()

    def read() -> None:
        try:
            while data := os.read(master, 65536):
                received.extend(data)
        except OSError:  # how Linux says that the other side was closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    stream = os.fdopen(slave, "w", encoding="utf-8")
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "50"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(console, "console", Console(file=stream, highlight=False))

    def written() -> str:
        stream.close()
        reader.join()
        return received.decode()

    yield written
    stream.close()
    reader.join()
    os.close(master)


def drawn_lines(output: str) -> list[str]:
    """The lines that a terminal shows after this output: text, line ends, cursor up and erase line."""
    lines, row, column = [""], 0, 0
    for control, text in re.findall(r"(\x1b\[[?\d;]*[A-Za-z]|\r|\n)|([^\x1b\r\n]+)", output):
        if control == "\r":
            column = 0
        elif control == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif control.endswith("A"):
            row -= int(control[2:-1] or 1)
        elif control.endswith("K"):
            lines[row] = ""
        elif text:
            lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]
            column += len(text)
    return lines


def test_in_a_terminal_the_bar_ends_on_the_last_update_with_its_figures(run_train, terminal):
    run_dir = run_train(**SIX)
    lines = drawn_lines(terminal())
    train = [entry for entry in read_metrics(run_dir) if entry["split"] == "train"]
    (bar,) = [
        number for number, line in enumerate(lines) if re.match(r"epoch 2/2 .*6/6 .*left.*0:00:00", line)
    ]
    for figure in (
        f"loss {train[-1]['loss']:.4f}",
        f"accuracy {train[-1]['mean_token_accuracy']:.4f}",
        f"entropy {train[-1]['entropy']:.4f}",
        f"lr {train[-1]['learning_rate']:.2e}",
        f"tokens/s {train[-1]['useful_tokens_per_second']:,.0f}",
        f"MFU {train[-1]['mfu']:.0%}",
    ):
        assert figure in lines[bar + 1]
    # Evaluations stay above the bar; the figures of training move on in it.
    assert [line.split()[:3] for line in lines[:bar] if line.startswith("eval ")] == [
        ["eval", "step", f"{step}/6"] for step in (0, 3, 6)
    ]
    assert not any(line.startswith("train ") for line in lines)


def test_in_a_terminal_the_bar_shows_the_latest_figures_while_it_trains(run_train, terminal, monkeypatch):
    advance = Tracker.advance

    def advance_and_draw(self: Tracker, step: int) -> None:
        advance(self, step)
        console.console.print(f"drawn at {step}")

    monkeypatch.setattr(Tracker, "advance", advance_and_draw)
    run_dir = run_train(**SIX)
    output = terminal()
    train = {entry["step"]: entry for entry in read_metrics(run_dir) if entry["split"] == "train"}
    for step, logged in ((3, 2), (4, 2), (5, 4), (6, 4)):  # an evaluation lies between 3 and 4
        frame = "\n".join(drawn_lines(output.split(f"drawn at {step}")[1].split("\x1b[2K")[0]))
        assert f"{step}/6" in frame
        assert f"epoch {1 if step <= 3 else 2}/2" in frame
        assert f"loss {train[logged]['loss']:.4f}" in frame


def test_in_a_terminal_without_the_bar_there_are_plain_lines(run_train, terminal):
    run_train(**SIX, log__progress=False)
    lines = [line for line in drawn_lines(terminal()) if line.startswith("train ")]
    assert [line.split()[2] for line in lines] == ["2/6", "4/6", "6/6"]


def test_a_terminal_gets_its_cursor_back_when_a_run_fails(run_train, terminal, monkeypatch):
    def failing_advance(self: Tracker, step: int) -> None:
        raise RuntimeError("the power went out")

    monkeypatch.setattr(Tracker, "advance", failing_advance)
    with pytest.raises(RuntimeError, match="the power went out"):
        run_train(**SIX)
    output = terminal()
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
