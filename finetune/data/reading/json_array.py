"""A JSON array read entry by entry, so that memory holds some of its text and one of its entries."""

import json
from collections.abc import Iterator
from typing import IO, Any

CHARACTERS_AT_ONCE = 1 << 18
LONGEST_WORD = 16  # characters; a shorter rest may be the beginning of a word, a number or an escape


def iterate_array(stream: IO[str], where: str, line: int = 1) -> Iterator[Any]:
    """The entries of the array that the text holds, which begins in `line`; nothing else may follow it.

    Raises:
        ValueError: the text is no JSON, said with its line.
    """
    text = _Text(stream, where, line)
    text.expect("[")
    if text.next_character() == "]":
        text.expect("]")
    else:
        yield text.value()
        while text.next_character() != "]":
            text.expect(",")
            yield text.value()
        text.expect("]")
    if text.next_character():
        raise text.error("Extra data", text.position)


class _Text:
    def __init__(self, stream: IO[str], where: str, line: int) -> None:
        self._stream, self._where, self._line = stream, where, line
        self._decode = json.JSONDecoder().raw_decode
        self._text = ""
        self.position = 0
        self._is_whole = False

    def next_character(self) -> str:
        """The next character that is no white space, where `position` then stands; "" at the end."""
        while True:
            while self.position < len(self._text) and self._text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self._text):
                return self._text[self.position]
            if self._is_whole:
                return ""
            self._read_on()

    def expect(self, character: str) -> None:
        if self.next_character() != character:
            raise self.error(f"Expecting {character!r}", self.position)
        self.position += 1

    def value(self) -> Any:
        self.next_character()
        while True:
            try:
                value, end = self._decode(self._text, self.position)
            except json.JSONDecodeError as error:
                # Either what is read so far ends within the value, or the value is wrong.
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - LONGEST_WORD
                if self._is_whole or not is_cut:
                    raise self.error(error.msg, error.pos) from error
            else:
                # A number might go on, by up to "e+" that stands without its digits yet.
                is_cut = isinstance(value, int | float) and end + 2 >= len(self._text)
                if self._is_whole or not is_cut:
                    self.position = end
                    return value
            self._read_on()

    def _read_on(self) -> None:
        """Drop what is behind `position`, and read on: as much again as is kept, or the decoder, which begins
        a value anew each time, would take quadratic time over a long one."""
        self._line += self._text.count("\n", 0, self.position)
        self._text = self._text[self.position :]
        self.position = 0
        more = self._stream.read(max(CHARACTERS_AT_ONCE, len(self._text)))
        self._is_whole = not more
        self._text += more

    def error(self, message: str, position: int) -> ValueError:
        return ValueError(
            f"{self._where}, line {self._line + self._text.count(chr(10), 0, position)}: {message}"
        )
