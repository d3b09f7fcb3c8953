"""`python -m finetune chat RUN`: chat with the trained model in the terminal, and compare it with its base.

If standard input is not a terminal, each of its lines is a separate question, and only the answers are
printed.
"""

import re
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from finetune.data.conversations import Conversation, Message
from finetune.data.reading.messages import read_tools
from finetune.data.templates.chat_template import stop_ids
from finetune.model.generate import Answer, check_limits, multiply_dequantized
from finetune.model.prefix_cache import PrefixCache
from finetune.report.html import visible
from finetune.run.adapter import Trained, TrainedModel, find_trained, load_trained, trained_parser
from finetune.run.answers import (
    add_answer_options,
    answer,
    check_answer_options,
    choose_system_prompt,
    encode_question,
)
from finetune.runtime.cli import split_arguments
from finetune.runtime.console import console, say

TERMINAL_TEMPERATURE, PIPE_TEMPERATURE = 0.7, 0.0  # defaults

HELP = {
    "/base": "the base model's answer to the last question",
    "/temperature X": "0 picks the most likely token; above 0 samples, more randomly the higher",
    "/length N": "the maximum length of an answer, in tokens",
    "/system TEXT": "change the system prompt, from the next answer on",
    "/clear": "forget the conversation",
    "/undo": "remove the last question and its answer",
    "/help": "list the commands",
    "/quit": "leave, like Ctrl-D and Ctrl-C; during an answer, Ctrl-C stops it",
}


@dataclass
class Chat:
    """A conversation and the settings of its answers."""

    model: TrainedModel
    system_prompt: str | None
    temperature: float
    max_new_tokens: int
    tools: list[dict[str, Any]] | None = None
    prefix_cache: PrefixCache | None = None
    """Of the trained model's turns; None where each question is a conversation of its own"""
    turns: list[Message] = field(default_factory=list)
    """User and assistant turns, alternating"""


class _Screen(TextStreamer):  # type: ignore[misc]
    """Streams an answer to the terminal, as the model writes it to the end of its turn, and keeps its text.

    Control sequences and markup in it have no effect.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=False)
        self.text = ""
        self._ends = stop_ids(tokenizer)
        self._column, self._space = 0, ""

    def put(self, value: Any) -> None:
        if self.next_tokens_are_prompt or int(value) not in self._ends:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        new = text if self.text else text.lstrip()
        self.text += new
        shown = self._folded(visible(new).replace("\t", "    ")) + ("\n" if stream_end else "")
        console.print(Text(shown), end="", soft_wrap=True)

    def _folded(self, text: str) -> str:
        """Break the line before each word that does not fit on it."""
        folded = ""
        for piece in re.findall(r"\n|[^\S\n]+|\S+", text):
            if piece == "\n":
                folded, self._column, self._space = folded + piece, 0, ""
            elif piece.isspace():
                self._space += piece  # written before the next word, unless that starts a line
            else:
                width = cell_len(self._space + piece)
                fits = self._column == 0 or self._column + width <= console.width
                folded += (self._space if fits else "\n") + piece
                self._column = self._column + width if fits else cell_len(piece)
                self._space = ""
        return folded


def command(argv: Sequence[str]) -> None:
    """Chat until the user leaves, or answer the lines of a pipe.

    Raises:
        ValueError: invalid arguments, or a run or a model that cannot be used; in a pipe, a line that leaves
            no room for its answer.
    """
    parser = trained_parser(
        "chat",
        "[options]",
        "Chat with the trained model, and compare it with its base. "
        "Each line from a pipe is answered as a new conversation.",
    )
    add_answer_options(parser)
    parser.add_argument(
        "--temperature",
        type=float,
        help="0 picks the most likely token, above 0 samples "
        f"(default {TERMINAL_TEMPERATURE:g}; {PIPE_TEMPERATURE:g} in a pipe)",
    )
    parser.add_argument(
        "--tools",
        type=Path,
        metavar="FILE",
        help="a JSON list of tools, as in the rows; calls are shown as the model writes them, and not made",
    )
    arguments, settings = split_arguments(parser, argv)
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    temperature = arguments.temperature
    if temperature is None:
        temperature = TERMINAL_TEMPERATURE if is_terminal else PIPE_TEMPERATURE
    check_answer_options(arguments, temperature)
    tools = None if arguments.tools is None else _read_tools(arguments.tools)
    # In a pipe, only the answers go to standard output.
    with nullcontext() if is_terminal else redirect_stdout(sys.stderr):
        trained = find_trained(arguments.trained, settings)
        model = load_trained(trained)
        multiply_dequantized(model.model, model.precision.actual)
    system_prompt = choose_system_prompt(arguments, trained)
    chat = Chat(model, system_prompt, temperature, arguments.max_new_tokens, tools)
    if is_terminal:
        chat.prefix_cache = PrefixCache(model.model)
        _greet(trained)
        with suppress(KeyboardInterrupt):
            _talk(chat)
    elif sys.stdin is not None:
        _answer_lines(chat)


def _read_tools(path: Path) -> list[dict[str, Any]]:
    """The tools of a file.

    Raises:
        ValueError: the file cannot be read, or holds no tools as rows have them.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--tools {path} cannot be read: {error}") from error
    if not (tools := read_tools(text, f"--tools {path}")):
        raise ValueError(f"--tools {path} holds no tool")
    return tools


def _answer_lines(chat: Chat) -> None:
    """Print the answer to each line of standard input, each as a new conversation."""
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    for line in sys.stdin:
        if line.strip() and not console.quiet:  # it is quiet once its reader is gone
            say(visible(_answer(chat, [{"role": "user", "content": line.strip()}]).text))


def _greet(trained: Trained) -> None:
    model = trained.config.model
    say(f"{trained.adapter} on {model.name_or_path} ({model.quantization}). /help lists the commands.")


def _talk(chat: Chat) -> None:
    """Answer what is typed until the user leaves."""
    with suppress(ImportError):  # gives input() line editing and a history
        import readline

        # Makes several pasted lines one question; Python turns it off by default.
        readline.parse_and_bind("set enable-bracketed-paste on")
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    while True:
        try:
            line = input("> ")
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            raise
        try:
            if line.strip() == "/quit":
                return
            if line.startswith("/"):
                _run_chat_command(chat, line)
            elif line.strip():
                _ask(chat, line.strip())
        except ValueError as error:
            say(str(error))


def _ask(chat: Chat, question: str) -> None:
    """Answer a question on screen, and add both to the conversation, even if the answer was stopped."""
    turns = [*chat.turns, {"role": "user", "content": question}]
    if text := _show_answer(chat, turns):
        chat.turns = [*turns, {"role": "assistant", "content": text}]


def _run_chat_command(chat: Chat, line: str) -> None:
    """Run a command of the chat: a line that begins with /.

    Raises:
        ValueError: an unknown command, an invalid value, or nothing to apply the command to.
    """
    name, _, value = line.strip().partition(" ")
    value = value.strip()
    match name:
        case "/base":
            if not chat.turns:
                raise ValueError("There is no question yet.")
            console.print(Text("without the adapter:", style="dim"))
            with chat.model.model.disable_adapter():
                _show_answer(replace(chat, prefix_cache=None), chat.turns[:-1])
        case "/temperature":
            if value:
                temperature = _number(value, float)
                check_limits(temperature, chat.max_new_tokens)
                chat.temperature = temperature
            say(f"The temperature is {chat.temperature:g}.")
        case "/length":
            if value:
                length = _number(value, int)
                check_limits(chat.temperature, length)
                chat.max_new_tokens = length
            say(f"An answer has at most {chat.max_new_tokens} tokens.")
        case "/system":
            chat.system_prompt = value or chat.system_prompt
            prompt = chat.system_prompt or "(the default of the chat template)"
            say(f"The system prompt is: {visible(prompt)}")
        case "/clear":
            chat.turns = []
            say("The conversation is cleared.")
        case "/undo":
            if not chat.turns:
                raise ValueError("There is nothing to undo.")
            say(f"Undone: {visible(chat.turns[-2]['content'])}")
            chat.turns = chat.turns[:-2]
        case "/help":
            table = Table.grid(padding=(0, 2))
            for command_line, description in HELP.items():
                table.add_row(command_line, description)
            console.print(table)
        case _:
            raise ValueError(f"{visible(name)} is not a command; /help lists them.")


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{visible(text)} is not a {'whole ' if kind is int else ''}number.") from None


def _show_answer(chat: Chat, turns: list[Message]) -> str:
    """Stream the answer to the last of these turns, and return it, or the part written before Ctrl-C."""
    screen = _Screen(chat.model.tokenizer)
    start = time.perf_counter()
    try:
        made = _answer(chat, turns, screen)
    except KeyboardInterrupt:
        screen.end()
        console.print(Text("stopped", style="dim"))
    else:
        speed = made.num_tokens / (time.perf_counter() - start)
        cut = "" if made.ended else "; cut at the limit, /length N allows more"
        console.print(Text(f"{made.num_tokens} tokens, {speed:.1f} a second{cut}", style="dim"))
    return screen.text.strip()


def _answer(chat: Chat, turns: list[Message], streamer: Any = None) -> Answer:
    """Return the answer to the last of these turns.

    Raises:
        ValueError: the chat template rejects them, or they leave no room for an answer.
    """
    system = [] if chat.system_prompt is None else [{"role": "system", "content": chat.system_prompt}]
    conversation = Conversation([*system, *turns], chat.tools)
    prompt = encode_question(chat.model, conversation, chat.max_new_tokens)
    seeds = [secrets.randbits(63)]
    (made,) = answer(
        *(chat.model, [prompt], chat.max_new_tokens, chat.temperature, seeds),
        streamer=streamer,
        prefix_cache=chat.prefix_cache,
    )
    return made
