"""The formats of rows: found by their columns, and each row turned into its one form, a Row."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune.data.conversations import SYSTEM_ROLES, Message, Row
from finetune.data.reading.mapping_hints import unknown_columns
from finetune.data.reading.messages import read_messages, read_sharegpt, read_template_kwargs, read_tools

Kind = Literal["messages", "sharegpt", "instruction", "completion", "text"]

BESIDE_MESSAGES = ("tools", "system", "chat_template_kwargs")
BESIDE_AN_INSTRUCTION = ("input", "history", "system")
ANSWERS = ("output", "completion")
OTHER_NAMES = {"system": "system_prompt", "input": "context"}  # taken where the first is no column

# Two columns that ask and answer, in the order in which they are looked for.
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("instruction", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("question", "output"),
    ("question", "solution"),
    ("query", "response"),
    ("query", "answer"),
    ("query", "output"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("problem", "output"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("prompt", "answer"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("input", "output"),
    ("input", "response"),
    ("input", "target"),
    ("inputs", "targets"),
    ("source", "target"),
)


@dataclass(frozen=True)
class Format:
    """How the columns of a source make up a row.

    `columns` maps our names to those of the source; without the `required` ones (the source's names) a row is
    of another format.
    """

    kind: Kind
    name: str
    """In words, such as "question and answer" """
    required: tuple[str, ...]
    columns: Mapping[str, str]

    def convert(self, raw: Mapping[str, Any], place: str) -> tuple[Row, list[str]]:
        """A row in its one form, and what of it is not used, in words such as `column "score"` or
        `message key "logprobs"`; what is null counts as absent.

        Raises:
            ValueError: a cell of the wrong type, a row of another format, or a text that is no Unicode; named
                by its place.
        """
        if not any(column in raw for column in self.required):
            other = _first_match(raw)
            if other:
                raise ValueError(
                    f"{place}: it has {other.name}, where other rows have {self.name}; a source has one "
                    "format: split the rows into files, and name each in data.path as {path: FILE}"
                )
        cells = {ours: _none_if_nan(raw.get(theirs)) for ours, theirs in self.columns.items()}
        used = set(self.columns.values())
        idle = [column for column, cell in raw.items() if column not in used]
        unused = [f'column "{column}"' for column in idle if _none_if_nan(raw[column]) is not None]
        readers = {
            "messages": self._of_messages,
            "sharegpt": self._of_messages,
            "instruction": self._of_instruction,
            "completion": self._of_completion,
            "text": self._of_text,
        }
        row, more = readers[self.kind](cells, place)
        for key, value in row.items():
            _require_characters(value, f"{place}: {self.columns.get(key, key)}")
        return row, unused + more

    def _of_messages(self, cells: Mapping[str, Any], place: str) -> tuple[Row, list[str]]:
        read = read_messages if self.kind == "messages" else read_sharegpt
        messages, unused = read(cells["messages"], place, self.columns["messages"])
        return self._with_what_is_beside(messages, cells, unused, place)

    def _of_completion(self, cells: Mapping[str, Any], place: str) -> tuple[Row, list[str]]:
        prompt, completion = cells["prompt"], cells.get("completion")
        if isinstance(prompt, list) or isinstance(completion, list):
            if isinstance(prompt, str) or isinstance(completion, str):
                raise ValueError(f"{place}: prompt and completion must both be text, or both be messages")
            asked, unused = read_messages(prompt, place, self.columns["prompt"])
            given, more = read_messages(completion, place, self.columns.get("completion", "completion"))
            asked = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in asked]
            return self._with_what_is_beside([*asked, *given], cells, unused + more, place)
        row: Row = {name: self._text(cells, name, place) for name in ("prompt", "completion")}
        if all(cells.get(name) is None for name in BESIDE_MESSAGES):
            return row, []
        turns: list[Message] = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        return self._with_what_is_beside(turns, cells, [], place)

    def _of_instruction(self, cells: Mapping[str, Any], place: str) -> tuple[Row, list[str]]:
        row: Row = {name: self._text(cells, name, place) for name in ("instruction", "input", "output")}
        history = cells.get("history")
        if history is not None:
            if not isinstance(history, list) or not all(
                isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
                for turn in history
            ):
                column = self.columns["history"]
                raise ValueError(
                    f"{place}: {column} must be a list of [question, answer], not {history!r:.60}"
                )
            if history:
                row["history"] = history
        if (system := self._system(cells, place)) is not None:
            row["system"] = system
        return row, []

    def _of_text(self, cells: Mapping[str, Any], place: str) -> tuple[Row, list[str]]:
        return {"text": self._text(cells, "text", place)}, []

    def _with_what_is_beside(
        self, messages: list[Message], cells: Mapping[str, Any], unused: list[str], place: str
    ) -> tuple[Row, list[str]]:
        row: Row = {"messages": messages}
        if tools := read_tools(cells.get("tools"), place):
            row["tools"] = tools
        if (system := self._system(cells, place)) is not None:
            if not (messages and messages[0]["role"] in SYSTEM_ROLES):
                row["system"] = system
            elif messages[0]["content"] != system:
                unused = [*unused, f'column "{self.columns["system"]}" beside a system turn']
        name = "chat_template_kwargs"
        if arguments := read_template_kwargs(cells.get(name), place, self.columns.get(name, name)):
            row[name] = arguments
        return row, unused

    def _system(self, cells: Mapping[str, Any], place: str) -> str | None:
        """The row's system text; a blank one is none."""
        system = self._text(cells, "system", place)
        return system if (system or "").strip() else None

    def _text(self, cells: Mapping[str, Any], name: str, place: str) -> str | None:
        cell = cells.get(name)
        if not isinstance(cell, str | None):
            raise ValueError(f"{place}: {self.columns[name]} must be text, not {cell!r:.60}")
        return cell


def format_of(
    columns: Sequence[str],
    mapping: Mapping[str, str] | None,
    where: str,
    row: Mapping[str, Any] | None = None,
    questions_only: bool = False,
) -> Format:
    """The format of rows with these columns; `mapping` says what columns of other names are ({theirs: ours}).

    Where several formats match, it is that of the mapped columns, else the first of: messages, ShareGPT,
    instruction and output, prompt and completion, other pairs, text. `row` is one of them, which an error
    shows. With `questions_only` the columns of the answers may be missing.

    Raises:
        ValueError: columns of no known format (with the line of YAML that would map them, as far as that can
            be guessed), or a mapping of columns that are not there.
    """
    mapping = mapping or {}
    if questions_only:
        mapping = {
            theirs: ours for theirs, ours in mapping.items() if theirs in columns or ours not in ANSWERS
        }
    for column in mapping:
        if column not in columns:
            names = ", ".join(map(str, columns))
            raise ValueError(f"{where} has no column {column!r}, which data.columns names; there are {names}")
    found = _matches(columns, mapping, questions_only)
    # An input is beside an instruction, though some rows have nothing but an input and an output.
    mapped = {theirs for theirs, ours in mapping.items() if ours not in BESIDE_AN_INSTRUCTION}
    best = max(
        found, key=lambda one: len(mapped.intersection(one.required)), default=None
    )  # of equals the first
    if best is None:
        raise ValueError(unknown_columns(columns, mapping, where, row))
    return best


def _first_match(columns: Iterable[str]) -> Format | None:
    return next(iter(_matches(list(columns), {}, False)), None)


def _matches(columns: Sequence[str], mapping: Mapping[str, str], questions_only: bool) -> list[Format]:
    """The formats whose columns are there, best first."""
    theirs = {column: column for column in columns if column not in mapping}
    theirs |= {ours: column for column, ours in mapping.items()}
    formats = []
    for kind, name, required, optional in _forms(questions_only):
        if set(required) <= set(theirs):
            own = {ours: theirs[column] for column, ours in required.items()}
            for ours in optional:
                names = (ours, OTHER_NAMES.get(ours, ours))
                # One that none of these rows has may be in rows further on.
                absent = None if ours in mapping else ours
                column = next((theirs[name] for name in names if name in theirs), absent)
                if column is not None and column not in own.values():
                    own.setdefault(ours, column)
            formats.append(Format(kind, name, tuple(theirs[column] for column in required), own))
    return formats


def _forms(questions_only: bool) -> list[tuple[Kind, str, dict[str, str], tuple[str, ...]]]:
    """Kind, name, required columns ({column: ours}) and optional ones of the formats, in their order."""
    conversations: list[tuple[Kind, str, dict[str, str], tuple[str, ...]]] = [
        ("messages", "messages", {"messages": "messages"}, BESIDE_MESSAGES),
        ("sharegpt", "conversations (ShareGPT)", {"conversations": "messages"}, BESIDE_MESSAGES),
        ("sharegpt", "conversation (ShareGPT)", {"conversation": "messages"}, BESIDE_MESSAGES),
    ]
    pairs: list[tuple[Kind, str, dict[str, str], tuple[str, ...]]] = [
        ("instruction", f"{ask} and {answer}", {ask: "instruction", answer: "output"}, BESIDE_AN_INSTRUCTION)
        for ask, answer in PAIRS
    ]
    completion = {"prompt": "prompt", "completion": "completion"}
    pairs.insert(1, ("completion", "prompt and completion", completion, BESIDE_MESSAGES))
    if questions_only:
        for ask in dict.fromkeys(ask for ask, _ in PAIRS):
            if ask == "prompt":
                pairs.append(("completion", ask, {ask: "prompt"}, BESIDE_MESSAGES))
            else:
                pairs.append(("instruction", ask, {ask: "instruction"}, BESIDE_AN_INSTRUCTION))
    return [*conversations, *pairs, ("text", "text", {"text": "text"}, ())]


def _none_if_nan(cell: Any) -> Any:
    return None if isinstance(cell, float) and cell != cell else cell


def _require_characters(value: Any, place: str) -> None:
    """Raise ValueError for a text that is no Unicode: a JSON escape can encode half of a surrogate pair."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{place} holds {value[error.start]!r}, which is no character") from error
    elif isinstance(value, dict):
        for key, item in value.items():
            _require_characters(key, place)
            _require_characters(item, place)
    elif isinstance(value, list):
        for item in value:
            _require_characters(item, place)
