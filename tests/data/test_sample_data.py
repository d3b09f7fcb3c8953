"""The embedded sample: its shape, and that every number in its answers is right.

Its answers are what people see a model learn, so a wrong sum in one is a defect of the project. Beside each
row, finance_sample_notes.jsonl keeps its topic, its calculations (`shown`, the piece of the answer that holds
the result, and `expression`, the arithmetic behind it) and its facts (years, levels and parts of names: what
no arithmetic gives). The rules:

1. A calculation's `shown` stands in the answer and holds one number, which is a whole number of the answer
   ("$3" is not found in "$3,584"). Its expression gives that number, rounded to the digits that are shown.
2. Each number an expression starts from has a source: the question or its input (in digits or as a word), a
   number word of the answer, a fact, a constant of arithmetic (12 months, 100 percent), or the result of a
   calculation that itself has sources. A percentage may be written as a share (7.2 as 0.072) and an amount
   in millions (250,000 as 0.25).
3. Each number in digits in the answer is in the question or its input, is a calculation's result or one of
   the numbers it starts from, or is a fact.
4. A fact is used by the answer or by an expression: an idle one would only excuse a wrong number.

Numbers that the answer writes as words ("four points") are not checked.
"""

import ast
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pandas as pd
import pytest
from conftest import ROOT

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
ZERO_TO_TWELVE = "zero one two three four five six seven eight nine ten eleven twelve"
NUMBER_WORDS: dict[str, float] = {word: value for value, word in enumerate(ZERO_TO_TWELVE.split(" "))}
NUMBER_WORDS |= {"twenty": 20, "thirty": 30}
# Nothing, the whole, two for averages; months, weeks, a banker's and a full year's days; percent, thousands.
CONSTANTS = [0, 1, 2, 12, 52, 360, 365, 100, 1000]
OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
FUNCTIONS: dict[str, Callable[..., float]] = {"log": math.log, "sqrt": math.sqrt, "min": min, "max": max}


@dataclass(frozen=True)
class Calculation:
    shown: str
    expression: str


@dataclass(frozen=True)
class Row:
    """A row of the sample with its notes."""

    instruction: str
    input: str
    output: str
    topic: str
    calculations: tuple[Calculation, ...] = ()
    facts: tuple[str, ...] = ()


def numbers_in(text: str) -> list[float]:
    return [as_number(match) for match in NUMBER.findall(text)]


def as_number(digits: str) -> float:
    return float(digits.replace(",", ""))


def number_words_in(text: str) -> list[float]:
    return [value for word, value in NUMBER_WORDS.items() if re.search(rf"\b{word}\b", text.lower())]


def is_one_of(number: float, others: Iterable[float]) -> bool:
    return any(math.isclose(number, other, rel_tol=1e-12, abs_tol=1e-12) for other in others)


def evaluate(expression: str) -> tuple[float, list[float]]:
    """The value of an arithmetic expression, and the numbers it starts from."""
    literals: list[float] = []

    def value_of(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                literals.append(float(number))
                return float(number)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value_of(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value_of(left), value_of(right))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
                return FUNCTIONS[name](*[value_of(argument) for argument in arguments])
        raise ValueError(f"{ast.unparse(node)} is not arithmetic")

    return value_of(ast.parse(expression, mode="eval").body), literals


def faults_of(row: Row) -> list[str]:
    """What breaks the rules at the top of this file, a line each."""
    faults: list[str] = []
    in_answer = numbers_in(row.output)
    in_question = numbers_in(f"{row.instruction} {row.input}")
    facts = [as_number(fact) for fact in row.facts]
    words = number_words_in(f"{row.instruction} {row.input} {row.output}")
    calculated: list[tuple[str, float, list[float]]] = []  # expression, result, the numbers it starts from
    for calculation in row.calculations:
        shown, expression = calculation.shown, calculation.expression
        digits = NUMBER.findall(shown)
        stands = re.search(rf"(?<!\d)(?<!\d[.,]){re.escape(shown)}(?![.,]?\d)", row.output)
        if not stands or len(digits) != 1:
            faults.append(f"{shown!r} does not stand in the answer as one whole number")
            continue
        result, decimals = as_number(digits[0]), len(digits[0].partition(".")[2])
        value, literals = evaluate(expression)
        if abs(value - result) > 0.5 * 10**-decimals + 1e-9:
            faults.append(f"{expression} is {value}, and {shown!r} is shown")
        calculated.append((expression, result, literals))

    # A result becomes a source once all the numbers behind it have one: no calculation proves itself.
    known = [*in_question, *words, *facts, *CONSTANTS]
    accounted = [*in_question, *facts]
    used = [*in_answer]
    while settled := [entry for entry in calculated if not without_source(entry[2], known)]:
        for entry in settled:
            _, result, literals = entry
            calculated.remove(entry)
            known.append(result)
            accounted += [result, *literals]
            used += literals
    for expression, _, literals in calculated:
        for number in without_source(literals, known):
            faults.append(f"{number:g} of {expression} comes from nowhere")

    for number in in_answer:
        if not is_one_of(number, accounted):
            faults.append(f"{number:g} of the answer comes from nowhere")
    for fact in facts:
        if not is_one_of(fact, used):
            faults.append(f"the fact {fact:g} is not used")
    return faults


def without_source(literals: list[float], known: list[float]) -> list[float]:
    """Those that are not known: neither as they stand, nor as a share of 100, nor in millions."""
    return [
        number
        for number in literals
        if not any(is_one_of(number * unit, known) for unit in (1, 100, 1_000_000))
    ]


@pytest.fixture(scope="module")
def sample() -> pd.DataFrame:
    return pd.read_csv(ROOT / "data" / "finance_sample.csv", dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def rows(sample: pd.DataFrame) -> list[Row]:
    lines = (ROOT / "tests" / "finance_sample_notes.jsonl").read_text(encoding="utf-8").splitlines()
    notes = [json.loads(line) for line in lines]
    assert [note["instruction"] for note in notes] == sample["instruction"].tolist()
    return [
        Row(
            instruction=instruction,
            input=context,
            output=output,
            topic=note["topic"],
            calculations=tuple(Calculation(**calculation) for calculation in note["calculations"]),
            facts=tuple(note["facts"]),
        )
        for note, (instruction, context, output) in zip(notes, sample.itertuples(index=False), strict=True)
    ]


def test_the_csv_and_the_parquet_file_hold_the_same_rows_under_the_same_three_columns(sample):
    parquet = pd.read_parquet(ROOT / "data" / "finance_sample.parquet")
    assert list(sample.columns) == list(parquet.columns) == ["instruction", "input", "output"]
    assert sample.to_numpy().tolist() == parquet.to_numpy().tolist()


def test_there_are_at_least_400_rows_on_at_least_15_topics(rows):
    assert len(rows) >= 400
    topics = Counter(row.topic for row in rows)
    assert len(topics) >= 15
    assert min(topics.values()) >= 10


def test_no_instruction_stands_twice_even_in_other_letters_or_punctuation(rows):
    seen = Counter(re.sub(r"\W+", " ", row.instruction.lower()).strip() for row in rows)
    assert [text for text, count in seen.items() if count > 1 or not text] == []


def test_a_fifth_to_three_tenths_of_the_rows_have_an_input(rows):
    assert 0.2 <= sum(row.input.strip() != "" for row in rows) / len(rows) <= 0.3


def test_answers_have_15_to_150_words_and_no_text_is_padded_with_blanks(rows):
    assert [row.instruction for row in rows if not 15 <= len(row.output.split()) <= 150] == []
    for row in rows:
        for text in (row.instruction, row.input, row.output):
            assert text == text.strip()


def test_every_calculation_is_right_and_every_number_of_every_answer_is_accounted_for(rows):
    assert [f"{row.instruction}: {fault}" for row in rows for fault in faults_of(row)] == []
    assert sum(len(row.calculations) for row in rows) >= 400


def test_the_checker_finds_every_result_of_the_sample_that_is_changed_by_one_in_its_last_digit(rows):
    """The answer and the note change together, as a wrong sum would have been written down."""
    for row in rows:
        for calculation in row.calculations:
            digits = NUMBER.findall(calculation.shown)[0]
            last = str((int(digits[-1]) + 1) % 10)
            wrong = Calculation(calculation.shown.replace(digits, digits[:-1] + last), calculation.expression)
            changed = replace(
                row,
                output=row.output.replace(calculation.shown, wrong.shown),
                calculations=tuple(wrong if it is calculation else it for it in row.calculations),
            )
            assert any(f"{calculation.expression} is" in fault for fault in faults_of(changed)), calculation


def test_the_checker_finds_every_result_of_the_sample_whose_calculation_is_missing(rows):
    """Unless the number is in the question, or another calculation starts from it or gives it, too."""
    num_found = 0
    for row in rows:
        for calculation in row.calculations:
            others = tuple(it for it in row.calculations if it is not calculation)
            result = numbers_in(calculation.shown)
            elsewhere = [*numbers_in(row.instruction + " " + row.input), *map(as_number, row.facts)]
            for other in others:
                elsewhere += [*numbers_in(other.shown), *evaluate(other.expression)[1]]
            if not is_one_of(result[0], elsewhere):
                assert faults_of(replace(row, calculations=others)) != [], calculation
                num_found += 1
    assert num_found > 300


RIGHT = Row(
    instruction="I save $200 a month for three years at 6%. What do I pay in, and how long until it doubles?",
    input="Fee: $1,250 of 250,000",
    output="You pay in $7,200. By the rule of 72 it doubles in 12 years, and $1,250 is 0.5% of 0.25 million.",
    topic="budgets",
    calculations=(
        Calculation("$7,200", "200*12*3"),
        Calculation("12 years", "72/6"),
        Calculation("0.5%", "100*1250/250000"),
        Calculation("0.25 million", "250000/1000/1000"),
    ),
    facts=("72",),
)


def with_calculations(*calculations: tuple[str, str]) -> Row:
    return replace(RIGHT, calculations=tuple(Calculation(*pair) for pair in calculations))


def test_the_checker_finds_nothing_in_a_right_row():
    assert faults_of(RIGHT) == []


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (replace(RIGHT, output=RIGHT.output + " That was 1987."), "1987 of the answer comes from nowhere"),
        (replace(RIGHT, output=RIGHT.output + " Or 7200.5."), "7200.5 of the answer comes from nowhere"),
        (replace(RIGHT, output=RIGHT.output + " Or 7,201."), "7201 of the answer comes from nowhere"),
        (replace(RIGHT, facts=("72", "1987")), "the fact 1987 is not used"),
        (replace(RIGHT, calculations=RIGHT.calculations[1:]), "7200 of the answer comes from nowhere"),
        (with_calculations(("$7,200", "200*12*4")), "200*12*4 is 9600.0, and '$7,200' is shown"),
        (with_calculations(("0.5%", "100*1250/240000")), "240000 of 100*1250/240000 comes from nowhere"),
        (with_calculations(("$7,200", "240*30")), "240 of 240*30 comes from nowhere"),
        (with_calculations(("$7,200", "7200")), "7200 of 7200 comes from nowhere"),
        (
            with_calculations(("$7,200", "600*12"), ("0.5%", "300*12/7200")),
            "600 of 600*12 comes from nowhere",
        ),
        (with_calculations(("$7,2", "72")), "'$7,2' does not stand in the answer as one whole number"),
        (with_calculations((",200", "200")), "',200' does not stand in the answer as one whole number"),
        (with_calculations(("$9,600", "200*12*4")), "'$9,600' does not stand in the answer"),
        (with_calculations(("72 it doubles in 12 years", "72/6")), "does not stand in the answer as one"),
    ],
)
def test_the_checker_names_each_kind_of_fault(row, fault):
    assert any(fault in found for found in faults_of(row)), faults_of(row)


def test_two_calculations_that_only_prove_each_other_are_found():
    row = replace(
        RIGHT,
        output="It is 34, or 17 twice.",
        calculations=(Calculation("34", "17*2"), Calculation("17", "34/2")),
        facts=(),
    )
    assert len([fault for fault in faults_of(row) if "nowhere" in fault]) >= 2


@pytest.mark.parametrize(
    ("value", "shown", "is_right"),
    [
        ("7.25", "7.2", True),
        ("7.25", "7.3", True),
        ("7.251", "7.3", True),
        ("7.251", "7.2", False),
        ("7.249", "7.3", False),
        ("7.25", "7", True),
        ("7.25", "8", False),
        ("1725", "1,725", True),
        ("1725", "1,700", False),
    ],
)
def test_a_result_may_be_rounded_to_the_digits_that_are_shown_and_no_further(value, shown, is_right):
    row = Row(value, "", f"It is {shown}.", "rounding", (Calculation(shown, f"{value}*1"),))
    assert faults_of(row) == ([] if is_right else [f"{value}*1 is {float(value)}, and {shown!r} is shown"])


@pytest.mark.parametrize(
    "expression", ["__import__('os')", "open('x')", "(1).real", "[1][0]", "True+1", "'a'*3", "x", "7 % 4"]
)
def test_an_expression_that_is_not_arithmetic_is_refused(expression):
    with pytest.raises(ValueError, match="is not arithmetic"):
        evaluate(expression)


def test_the_evaluator_knows_the_arithmetic_of_the_notes():
    value, literals = evaluate("-2 ** 2 + sqrt(16) * log(1) - min(3, 4) / max(1, 2)")
    assert value == -5.5
    assert literals == [2, 2, 16, 1, 3, 4, 1, 2]
