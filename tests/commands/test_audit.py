"""What the audit says is what training does: its labels, its rows, and each of them by its number."""

import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import QWEN2_TEMPLATE, ROOT, tiny_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from finetune.__main__ import main
from finetune.config import Config, DataConfig, ModelConfig
from finetune.data.audit import measure
from finetune.data.findings import find_listings, find_problems
from finetune.data.rows import load_rows
from finetune.data.splits import tokenize_splits
from finetune.data.tokenize import IGNORE, ROLES, dissect, encode, to_messages
from finetune.report.audit import length_histogram, pick_rows, segments_of
from finetune.report.html import check_page_path

SAMPLE = str(ROOT / "data" / "finance_sample.csv")
TOKENIZER = tiny_tokenizer()
HOSTILE = "<script>alert('1')</script> & \x1b[31m </mark> <img src=x onerror=y> \u202e"
LONG_TEXT = "Explain in two or three sentences what a bond is, who issues it, and why anybody would buy one"


def turns(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [
        {"role": "assistant" if number % 2 else "user", "content": content}
        for number, content in enumerate(contents)
    ]


def row(instruction: str, answer: str = "It is a coin, or a note.", text: str = "") -> dict[str, str]:
    return {"instruction": instruction, "input": text, "output": answer}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def audit_of(path: str, tokenizer=TOKENIZER, **data):
    return measure(Config(model=ModelConfig(), data=DataConfig(path=path, **data)), tokenizer)


def listed(audit) -> dict[str, list[tuple[int, ...]]]:
    """The row numbers of each listing."""
    return {
        listing.title: [tuple(entry.numbers) for entry in listing.entries] for listing in find_listings(audit)
    }


def texts_by_role(tokenizer, messages, train_on="completion") -> dict[str, str]:
    """The tokens of each role, decoded one behind the other."""
    anatomy = dissect(tokenizer, messages, train_on)
    input_ids = encode(tokenizer, messages, train_on).input_ids
    ids = {role: [i for i, r in zip(input_ids, anatomy.roles, strict=True) if r == role] for role in ROLES}
    return {role: tokenizer.decode(tokens) for role, tokens in ids.items() if tokens}


# --- Roles of tokens ---


def test_each_token_is_of_the_turn_whose_text_it_is():
    messages = [
        {"role": "system", "content": "Be kind."},
        *turns("What is it?", "A coin.", "And now?", "A note."),
    ]
    assert texts_by_role(TOKENIZER, messages) == {
        "system": "Be kind.",
        "user": "What is it?And now?",
        "assistant": "A coin.A note.",
        "template": "<|im_start|>system\n<|im_end|>\n"
        + 2 * "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n",
    }


def test_a_system_prompt_that_the_template_brings_is_the_templates():
    assert "system" not in texts_by_role(TOKENIZER, turns("What is it?", "A coin."))
    assert "You are a helpful assistant." in texts_by_role(TOKENIZER, turns("What?", "A coin."))["template"]


def test_what_the_template_rewrites_is_the_templates_and_what_it_trims_is_still_the_turns():
    rewriting = tiny_tokenizer(
        QWEN2_TEMPLATE.replace("turn.content", "(turn.content if turn.role == 'assistant' else 'Same.')")
    )
    roles = texts_by_role(rewriting, turns("What is it?", "A coin."))
    assert "user" not in roles
    assert "Same." in roles["template"]
    trimming = tiny_tokenizer(QWEN2_TEMPLATE.replace("turn.content", "turn.content | trim"))
    roles = texts_by_role(trimming, turns("\n What is it? ", "  A coin.\n"))
    assert (roles["user"], roles["assistant"]) == ("What is it?", "A coin.")


def test_a_turn_that_may_hold_only_some_words_is_the_templates():
    """The template refuses what would be put in its place."""
    template = (
        QWEN2_TEMPLATE
        + "{%- if messages[0].content not in ('yes', 'no') -%}{{ raise_exception('no') }}{%- endif -%}"
    )
    roles = texts_by_role(tiny_tokenizer(template), turns("yes", "A coin."))
    assert (roles["assistant"], "user" in roles) == ("A coin.", False)


def test_turns_of_other_roles_are_told_apart_from_the_template():
    messages = [*turns("What?", "Wait."), {"role": "tool", "content": "coin"}, *turns("?", "A coin.")[1:]]
    roles = texts_by_role(TOKENIZER, messages)
    assert (roles["other"], roles["assistant"]) == ("coin", "Wait.A coin.")


def test_a_token_that_reaches_into_an_answer_is_the_answers():
    """As it is trained: here a space of the template and the first word are one token."""
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ '[' ~ m.role ~ '] ' ~ m.content ~ eos_token }}{% endfor %}"
    )
    messages = turns("What?", "The coin.")
    assert texts_by_role(tokenizer, messages)["assistant"] == " The coin."
    labels = encode(tokenizer, messages, "completion").labels
    assert tokenizer.decode([i for i in labels if i != IGNORE]) == " The coin.<|im_end|>"


def test_a_token_that_reaches_from_a_question_into_an_answer_is_the_answers():
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ m.content ~ (eos_token if m.role == 'assistant' else '') }}{% endfor %}"
    )
    assert tokenizer.tokenize("an interest") == ["an", "Ġinterest"]
    roles = texts_by_role(tokenizer, turns("an inte", "rest"))
    assert (roles["user"], roles["assistant"]) == ("an", " interest")


def test_what_is_cut_away_is_shown_as_not_trained():
    messages = turns("What?", "A long answer. " * 20)
    segments = segments_of({"messages": messages}, TOKENIZER, DataConfig(path="x", max_length=50))
    assert [(s.role, s.trained, s.kept) for s in segments][-3:] == [
        ("assistant", True, True),
        ("assistant", False, False),
        ("template", False, False),
    ]


def test_what_follows_the_last_answer_counts_only_where_every_token_is_trained():
    messages = [*turns("What?", "A coin."), {"role": "user", "content": "Thanks."}]
    assert texts_by_role(TOKENIZER, messages)["user"] == "What?"
    assert texts_by_role(TOKENIZER, messages, "all")["user"] == "What?Thanks."


def test_ends_of_turns_are_found_or_said_to_be_none():
    anatomy = dissect(TOKENIZER, turns("a", "b", "c", "d"), "completion")
    input_ids = encode(TOKENIZER, turns("a", "b", "c", "d"), "completion").input_ids
    assert len(anatomy.ends_of_turn) == 2
    assert [input_ids[end] for end in anatomy.ends_of_turn] == 2 * [TOKENIZER.eos_token_id]
    bare = tiny_tokenizer("{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}")
    assert dissect(bare, turns("a", "b"), "all").ends_of_turn == [None]
    upper = tiny_tokenizer(QWEN2_TEMPLATE.replace("turn.content", "turn.content | upper"))
    assert dissect(upper, turns("a", "b"), "all").ends_of_turn == [None]


PIECES = st.sampled_from(["<|im_end|>", "assistant", "\n", " ", "placeholder", "e\u0301", "💶", "A coin."])
TEXT = st.lists(PIECES | st.text(max_size=4), max_size=6).map("".join)


@settings(max_examples=100, deadline=None)
@given(st.none() | TEXT, st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
@example("", [("A coin.", "A coin."), ("", "")])
def test_roles_part_all_tokens_and_what_is_trained_is_answers_and_their_ends(system, pairs):
    messages = turns(*(content for pair in pairs for content in pair))
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    tokens = encode(TOKENIZER, messages, "completion")
    anatomy = dissect(TOKENIZER, messages, "completion")
    assert len(anatomy.roles) == len(anatomy.offsets) == len(tokens.input_ids)
    assert set(anatomy.roles) <= set(ROLES)
    trained = {t for t, label in enumerate(tokens.labels) if label != IGNORE}
    answers = {t for t, role in enumerate(anatomy.roles) if role == "assistant"}
    assert len(anatomy.ends_of_turn) == len(pairs)
    assert trained == answers | set(anatomy.ends_of_turn)
    assert not answers & set(anatomy.ends_of_turn)

    # The pieces to be shown are the whole conversation, and the marked ones the targets.
    segments = segments_of({"messages": messages}, TOKENIZER, DataConfig(path="x", max_length=10**6))
    assert "".join(segment.text for segment in segments) == anatomy.text
    assert all(segment.role in ("assistant", "template") for segment in segments if segment.trained)


# --- Figures ---


def test_counts_by_role_are_those_of_all_examples_and_their_own_labels():
    audit = audit_of(SAMPLE, max_length=128)
    train, evaluation = tokenize_splits(
        load_rows(DataConfig(path=SAMPLE)), TOKENIZER, DataConfig(path=SAMPLE, max_length=128)
    )
    for split, examples in (("train", train), ("eval", evaluation)):
        part = audit.examples[audit.examples["split"] == split]
        assert part.index.tolist() == examples.dataset["row_number"][:]
        assert part["num_tokens"].tolist() == examples.lengths.tolist()
        assert part["num_targets"].tolist() == examples.target_counts.tolist()
        assert part[list(ROLES)].sum(axis=1).tolist() == examples.lengths.tolist()
        trained = part[[f"{role} trained" for role in ROLES]]
        assert trained.sum(axis=1).tolist() == examples.target_counts.tolist()
        assert (part["assistant trained"] == part["assistant"]).all()
        assert (part["template trained"] == part["num_trained_ends"]).all()


def test_rows_are_cut_where_counting_the_templates_own_tokens_says_so():
    rows = load_rows(DataConfig(path=SAMPLE))
    full = {
        r["row_number"]: len(
            TOKENIZER.apply_chat_template(to_messages(r, None), tokenize=True, return_dict=True)["input_ids"]
        )
        for part in (rows.train, rows.eval)
        for r in part
    }
    audit = audit_of(SAMPLE, max_length=200)
    unanswered = audit.dropped.pop("without a target token")  # cut within the question
    assert audit.dropped == {}
    assert all(full[number] > 200 for number in unanswered)
    longer = sorted(number for number in full if full[number] > 200 and number not in unanswered)
    assert [number for number, *_ in audit.cut_rows()] == longer
    assert {number: lost for number, lost, *_ in audit.cut_rows()} == {n: full[n] - 200 for n in longer}
    assert 3 < len(longer) < len(full)
    assert listed(audit)["Cut at 200 tokens"] == [(number,) for number in longer]
    assert set(listed(audit)["Last end-of-turn token not trained"]) <= {(number,) for number in longer}


def test_a_token_too_many_costs_the_end_of_turn_and_one_fewer_does_not(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row("Name a coin."), row("Name a long coin, please.")])
    lengths = [
        len(encode(TOKENIZER, turns(instruction, row("")["output"]), "completion").input_ids)
        for instruction in ("Name a coin.", "Name a long coin, please.")
    ]
    # The template's newline is the last token, the end of turn the one before it.
    whole, no_newline, no_end = (
        audit_of(path, max_length=lengths[1] - less, eval_fraction=0).examples.loc[2] for less in (0, 1, 2)
    )
    assert [e["last_end"] for e in (whole, no_newline, no_end)] == ["trained", "trained", "untrained"]
    audit = audit_of(path, max_length=lengths[1] - 2, eval_fraction=0)
    assert listed(audit)["Last end-of-turn token not trained"] == [(2,)]
    assert find_problems(audit)[2][0].text == (
        f"cut: 2 of {lengths[1]} tokens lost, the last end-of-turn token with them"
    )
    assert 1 not in find_problems(audit)


def test_of_a_cut_conversation_the_ends_before_the_cut_are_trained(tmp_path):
    conversation = {"messages": turns("What?", "A coin.", "And?", "A long answer. " * 20)}
    path = write(tmp_path / "rows.jsonl", [conversation, {"messages": turns("a", "b", "c", "d")}])
    examples = audit_of(path, max_length=60, eval_fraction=0).examples
    figures = ["num_ends", "num_trained_ends", "last_end"]
    assert examples.loc[1, figures].tolist() == [2, 1, "untrained"]
    assert examples.loc[2, figures].tolist() == [2, 2, "trained"]


def test_where_every_token_is_trained_all_roles_are(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row("Name a coin.")])
    figures = audit_of(path, train_on="all", eval_fraction=0, system_prompt="Be kind.").examples.loc[1]
    for role in ("system", "user", "assistant"):
        assert figures[f"{role} trained"] == figures[role] > 0
    assert figures["template trained"] == figures["template"] - 1  # nothing predicts the first token
    bare = tiny_tokenizer("{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}")
    audit = audit_of(path, bare, train_on="all", eval_fraction=0)
    assert audit.examples.loc[1, "last_end"] == "none"
    assert listed(audit)["Template writes no end-of-turn token"] == [(1,)]


def test_dropped_rows_are_named_by_number_and_reason_whoever_dropped_them(tmp_path):
    rows = [row("a", ""), row("b"), row("c " * 200), row(" "), row("d", " \n"), row("e")]
    path = write(tmp_path / "rows.jsonl", rows)
    audit = audit_of(path, max_length=100, eval_fraction=0)
    assert audit.dropped == {
        "without output": [1, 5],
        "without instruction": [4],
        "without a target token": [3],
    }
    assert audit.examples.index.tolist() == [2, 6]
    dropped = audit_of(path, max_length=100, eval_fraction=0, overlong="drop")
    assert dropped.dropped["over 100 tokens"] == [3]
    assert listed(dropped)["Dropped: over 100 tokens"] == [(3,)]


@pytest.mark.parametrize(
    "rows",
    [
        [row("Name a coin."), row("Add them.", "3", "1 and 2")],
        [{"prompt": "Name a coin.", "completion": "A dime."}, {"prompt": "Add.", "completion": "3"}],
        [{"messages": turns("Name a coin.", "A dime.")}, {"messages": turns("Add.", "3", "And?", "4")}],
    ],
    ids=["instruction", "completion", "messages"],
)
def test_rows_of_every_format_are_audited(tmp_path, rows):
    audit = audit_of(write(tmp_path / "rows.jsonl", [*rows, *rows]), eval_fraction=0)
    assert audit.examples["num_ends"].equals(audit.examples["num_trained_ends"])
    assert (audit.examples["user"] > 0).all()
    assert listed(audit)["Same prompt and answer within a split"] == [(1, 3), (2, 4)]
    for shown in pick_rows(audit, TOKENIZER, find_problems(audit)):
        assert any(segment.trained for segment in shown.segments)


def test_labels_that_training_would_not_use_stop_the_audit(monkeypatch):
    def shifted(*arguments):
        tokens = encode(*arguments)
        return tokens._replace(labels=[IGNORE, *tokens.labels[:-1]])

    monkeypatch.setattr("finetune.data.audit.encode", shifted)
    with pytest.raises(AssertionError):
        audit_of(SAMPLE)


def test_the_histogram_counts_every_example_once():
    lengths = audit_of(SAMPLE).examples["num_tokens"]
    text = length_histogram(lengths.to_numpy())
    bins = [
        (int(a), int(b), int(n.replace(",", "")))
        for a, b, n in re.findall(r"^ *(\d+) to (\d+) +([\d,]+)", text, re.M)
    ]
    assert [n for _, _, n in bins] == [((lengths >= a) & (lengths <= b)).sum() for a, b, _ in bins]
    assert sum(n for *_, n in bins) == len(lengths)
    assert len(bins) <= 16


# --- Duplicates and leaks ---


def test_every_planted_repetition_is_found_by_row_number_and_nothing_else(tmp_path):
    frame = load_rows(DataConfig(path=SAMPLE, eval_fraction=0)).train.select(range(150))
    rows = [{key: r[key] for key in ("instruction", "input", "output")} for r in frame]
    assert not any("ame " in title for title in listed(audit_of(write(tmp_path / "rows.jsonl", rows))))
    count = len(rows)
    planted = {5: "  {}!", 17: "{}", 40: '"{}"', 41: "{}"}
    rows += [
        row(
            way.format(rows[number - 1]["instruction"]).upper() + ("" if number < 41 else " "),
            f"Another answer {number}.",
            f"Another input {number}",
        )
        for number, way in planted.items()
    ]
    rows.append(rows[4])
    path = write(tmp_path / "rows.jsonl", rows)
    groups = {(5, count + 1, count + 5), (17, count + 2), (40, count + 3), (41, count + 4)}

    audit = audit_of(path, eval_fraction=0)
    assert set(map(tuple, audit.likeness["instruction"].same)) == groups
    assert audit.likeness["prompt"].same == [[5, count + 5]]
    assert audit.likeness["prompt and answer"].same == [[5, count + 5]]
    assert set(listed(audit)["Same instruction within a split"]) == groups
    assert "Leak: same instruction in train and eval" not in listed(audit)

    split = audit_of(path)
    eval_rows = set(split.rows.eval["row_number"])
    mixed = {group for group in groups if 0 < len(set(group) & eval_rows) < len(group)}
    assert set(listed(split).get("Leak: same instruction in train and eval", [])) == mixed
    apart = listed(audit_of(path, split_by="instruction"))
    assert "Leak: same instruction in train and eval" not in apart
    assert set(apart["Same instruction within a split"]) == groups


def split_audit(tmp_path, train: list[dict], evaluation: list[dict]):
    """Audit rows whose first ones are trained on; the numbers go on from one split to the other."""
    path = write(tmp_path / "rows.jsonl", [*train, *evaluation])

    def split(table, *_):
        return table.select(range(len(train))), table.select(range(len(train), len(table)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.data.rows.split_rows", split)
        return audit_of(path)


def test_leaks_and_duplicates_are_told_apart_and_said_of_the_row_with_the_strongest_first(tmp_path):
    near = LONG_TEXT.replace("three", "four")
    train = [
        row("Name a coin."),
        row(LONG_TEXT),
        row("Add."),
        row("ADD", "It is 3."),
        row("Add", "It is 9.", "4 and 5"),
    ]
    evaluation = [
        row("name a coin", "Dime."),
        row("Name a coin!"),
        row(near, "Else."),
        row("add", "It is 7.", "3, 4"),
    ]
    audit = split_audit(tmp_path, train, evaluation)
    texts = {number: [p.text for p in problems] for number, problems in find_problems(audit).items()}
    assert texts[7] == [
        "leak: same prompt and answer as row 1 in train",
        "same prompt as row 6",
    ]
    assert texts[6] == ["leak: same prompt as row 1 in train", "same prompt as row 7"]
    assert re.fullmatch(r"leak: prompt much like that of row 2 \(0\.\d\d\) in train", texts[8][0])
    assert texts[9] == ["leak: same instruction as row 3, 4, 5 in train"]
    assert texts[3] == ["same prompt as row 4", "same instruction as row 4, 5"]
    assert 1 not in texts  # only in eval again
    names = listed(audit)
    assert names["Leak: same prompt in train and eval"] == [(1, 6, 7)]
    assert names["Leak: much the same prompt in eval and train"] == [(8, 2)]
    assert names["Same prompt within a split"] == [(3, 4)]


def test_many_rows_of_one_instruction_are_counted_and_the_first_named(tmp_path):
    rows = [row("Name it.", f"It is coin number {number}.", f"{number} cents") for number in range(30)]
    audit = audit_of(write(tmp_path / "rows.jsonl", rows), eval_fraction=0)
    texts = {number: problems[0].text for number, problems in find_problems(audit).items()}
    assert texts[1] == "same instruction as row 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 19 more"
    assert texts[30] == "same instruction as row 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 19 more"
    assert listed(audit)["Same instruction within a split"] == [tuple(range(1, 31))]


def test_near_duplicates_within_a_split_are_listed_once_a_pair(tmp_path):
    rows = [row(LONG_TEXT), row("Name a coin."), row(LONG_TEXT.replace("three", "four"), "Else.")]
    audit = audit_of(write(tmp_path / "rows.jsonl", rows), eval_fraction=0)
    assert listed(audit)["Much the same prompt within train"] == [(1, 3)]
    assert {n for n, found in find_problems(audit).items() if found[0].text.startswith("prompt much")} == {
        1,
        3,
    }


# --- The page and the terminal ---


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps what stands in and on them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.marked: list[str] = []
        self.deleted = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "mark":
            self.marked.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "mark" in self.open:
            self.marked[-1] += data
        if "del" in self.open:
            self.deleted += data


@pytest.fixture
def tokenizer_dir(tmp_path) -> Path:
    """A model folder without a model."""
    TOKENIZER.save_pretrained(tmp_path / "tokenizer-only")
    return tmp_path / "tokenizer-only"


@pytest.fixture
def run_audit_command(tmp_path, tokenizer_dir, capsys, monkeypatch):
    """Run the command in a folder of its own; gives the exit code, what was printed, and the page or None."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(rows, *arguments: str):
        path = rows if isinstance(rows, str) else write(tmp_path / "rows.jsonl", rows)
        (tmp_path / "config.yaml").write_text(f"model:\n  name_or_path: {tokenizer_dir}\n", encoding="utf-8")
        code = main(
            ["audit", "--config", str(tmp_path / "config.yaml"), f"--data.path={path}", *map(str, arguments)]
        )
        page = folder / "audit.html"
        return code, capsys.readouterr(), page.read_text(encoding="utf-8") if page.exists() else None

    return run


def test_the_command_writes_its_page_and_nothing_else(run_audit_command):
    code, printed, page = run_audit_command(SAMPLE, "--data.max_length", "200")
    assert (code, printed.err) == (0, "")
    assert [path.name for path in Path.cwd().iterdir()] == ["audit.html"]
    assert printed.out.endswith("page  audit.html\n")
    for heading in ("Tokens by role", "End-of-turn", "Lengths", "Duplicates and leaks", "Cut at 200 tokens"):
        assert heading in printed.out
        assert heading in page
    assert max(map(len, printed.out.splitlines())) <= 80


def test_the_page_needs_no_network_and_runs_nothing(run_audit_command):
    _, _, page = run_audit_command([row(HOSTILE, HOSTILE, HOSTILE), row("Name a coin."), row(HOSTILE, "")])
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "form", "base"} & set(parsed.tags)
    assert not any(
        name in ("src", "srcset", "action") or name.startswith("on") for name, _ in parsed.attributes
    )
    assert all(value.startswith("#") for name, value in parsed.attributes if name == "href")
    assert not re.search(r"https?:|url\(|@import", page)
    assert "default-src 'none'" in page
    assert "width=device-width" in page


def test_texts_of_rows_are_shown_as_they_are_and_never_run(run_audit_command):
    _, printed, page = run_audit_command(
        [row(HOSTILE, HOSTILE, HOSTILE), row("Name a coin."), row(HOSTILE, "")]
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &amp; \\x1b[31m &lt;/mark&gt;") >= 4
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert f"{shown}<|im_end|>" in "".join(Page(page).marked)
    for forbidden in ("\x1b", "\u202e"):
        assert forbidden not in page
        assert forbidden not in printed.out
    assert "\\x1b[31m" in printed.out


def test_a_file_name_is_text_too(run_audit_command, tmp_path):
    path = tmp_path / "<b>rows.jsonl"
    write(path, [row("a"), row("b"), row("c")])
    _, _, page = run_audit_command(str(path))
    assert "<b>" not in page
    assert "&lt;b&gt;rows.jsonl" in page


def test_marked_text_is_exactly_what_is_trained(run_audit_command):
    rows = [row(f"Coin {n}?", f"Answer {n}. " * (1 + 20 * (n == 2)), "an input") for n in range(5)]
    _, _, page = run_audit_command(rows, "--data.max_length=60", "--data.eval_fraction=0")
    config = DataConfig(path="x", max_length=60)
    expected, lost = "", ""
    for r in [rows[2], *rows[:2], *rows[3:]]:  # the one that is cut goes first
        tokens = encode(TOKENIZER, to_messages(r, None), "completion")
        expected += TOKENIZER.decode(
            [label for label in tokens.labels[: config.max_length] if label != IGNORE]
        )
        lost += TOKENIZER.decode(tokens.input_ids[config.max_length :])
    assert len(lost) > 100
    assert "".join(Page(page).marked) == "trained on" + expected  # behind the key
    assert Page(page).deleted == "cut away" + lost


def test_rows_are_shown_worst_first_with_every_problem_beside_them(run_audit_command):
    rows = [row("Fine?"), row("Twice?"), row("twice"), row("Long?", "It is long. " * 60), row("Nothing?", "")]
    rows += [row("One?", "1"), row("Longer?", "It is longer. " * 90)]
    _, _, page = run_audit_command(rows, "--data.max_length=100", "--data.eval_fraction=0")
    articles = re.findall(r'<article id="row-(\d+)">(.*?)</article>', page, re.S)
    assert [int(number) for number, _ in articles] == [5, 7, 4, 2, 3, 6, 1]
    problems = [re.findall(r"<li>(.*?)</li>", body) for _, body in articles]
    assert problems[0] == ["dropped: without output"]
    assert all("the last end-of-turn token with them" in found for [found] in problems[1:3])
    assert problems[3:] == [
        ["same prompt and answer as row 3"],
        ["same prompt and answer as row 2"],
        ["only 2 target tokens"],
        [],
    ]
    assert "Nothing?" in articles[0][1]


def test_a_row_with_several_problems_names_them_all(tmp_path):
    rows = [row(LONG_TEXT, "Long. " * 100), row(LONG_TEXT.upper(), "Long. " * 100)]
    audit = audit_of(write(tmp_path / "rows.jsonl", rows), max_length=200, eval_fraction=0)
    [shown, _] = pick_rows(audit, TOKENIZER, find_problems(audit))
    assert [text.split()[0] for text in shown.problems] == ["cut:", "same"]


def test_many_rows_are_capped_and_long_lists_folded_but_every_number_is_there(run_audit_command):
    rows = [row(f"Coin {number}?", "1") for number in range(250)]
    _, printed, page = run_audit_command(rows)
    assert page.count("<article") == 200
    assert "250 rows have a finding. Here are the worst 200 of them, and 0 rows without." in page
    folded = re.findall(r"<details.*?</details>", page, re.S)
    numbers = set(map(int, re.findall(r"\b\d+\b", re.sub(r"<[^>]*>", "", folded[0].split("</summary>")[1]))))
    assert numbers == set(range(1, 251))
    assert "and 240 more, on the page" in printed.out


def test_sound_rows_have_no_findings_and_a_few_are_shown(run_audit_command):
    names = ["dime", "penny", "quarter", "nickel", "crown", "florin", "groat", "ducat"]
    _, _, page = run_audit_command([row(f"What is a {name}?", f"The {name} was a coin.") for name in names])
    assert "Nothing found" in page
    assert page.count("<article") == len(names)


def test_trained_text_is_marked_in_brackets_where_there_is_no_colour(run_audit_command):
    _, printed, _ = run_audit_command([row("Name a coin.", "A dime."), row("Name a note.", "A fiver.")])
    assert "[[A dime.<|im_end|>]]" in printed.out
    assert "<|im_start|>user\nName a coin.<|im_end|>" in printed.out
    assert "\x1b" not in printed.out


def test_overrides_are_those_of_training(run_audit_command):
    _, printed, _ = run_audit_command(SAMPLE, "--data.num_samples", "50", "--data.eval_fraction", "0.1")
    assert "45 train, 5 eval" in printed.out
    _, printed, page = run_audit_command(SAMPLE, "--data.eval_fraction=0", "--data.system_prompt", "Be kind.")
    assert "0 eval" in printed.out
    assert "train, system" in printed.out
    assert "Be kind." in page


def test_files_and_arguments_override_each_other_in_their_order_as_in_training(run_audit_command, tmp_path):
    (tmp_path / "more.yaml").write_text("data:\n  num_samples: 30\n", encoding="utf-8")
    more = ("--config", tmp_path / "more.yaml")
    for arguments, expected in (
        (more, "24 train, 6 eval"),
        ((*more, "--data.num_samples=20"), "16 train, 4 eval"),
    ):
        assert expected in run_audit_command(SAMPLE, *arguments)[1].out
    assert "24 train, 6 eval" in run_audit_command(SAMPLE, "--data.num_samples=20", *more)[1].out


def test_a_page_of_another_name_is_written_there(run_audit_command, tmp_path):
    code, _, _ = run_audit_command(SAMPLE, "--page", tmp_path / "other.html", "--data.num_samples=20")
    assert code == 0
    assert (tmp_path / "other.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("nowhere/audit.html", "cannot be written: No such file or directory"),
        ("folder.html", "is a folder"),
        ("rows.csv", "name a file that ends in .html"),
        ("config.yaml", "name a file that ends in .html"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    run_audit_command, monkeypatch, page, reason
):
    Path("folder.html").mkdir()
    Path("rows.csv").write_text("instruction,output\na,b\n", encoding="utf-8")
    monkeypatch.setattr("finetune.data.audit.load_rows", lambda _: pytest.fail("the work began"))
    code, printed, _ = run_audit_command(SAMPLE, "--page", page)
    assert code == 2
    assert (
        printed.err == f"error: --page {page} {reason}\n"
        or printed.err == f"error: --page {page}: {reason}\n"
    )
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["folder.html", "rows.csv"]


def test_a_failing_audit_leaves_the_page_before_it_as_it_was(run_audit_command, monkeypatch):
    Path("audit.html").write_text("before", encoding="utf-8")
    code, printed, page = run_audit_command([row("a", "")])
    assert (code, page) == (2, "before")
    assert "no usable row" in printed.err

    def full(*_):
        raise OSError(28, "No space left on device", "audit.html")

    monkeypatch.setattr("os.replace", full)
    code, printed, page = run_audit_command([row("a"), row("b")])
    assert (code, page, printed.err) == (2, "before", "error: audit.html: No space left on device\n")
    assert [path.name for path in Path.cwd().iterdir()] == ["audit.html"]


def test_checking_the_path_leaves_a_page_that_is_there(tmp_path):
    page = tmp_path / "audit.html"
    page.write_text("before", encoding="utf-8")
    check_page_path(page)
    assert page.read_text(encoding="utf-8") == "before"
    assert list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--page"], "expected one argument"),
        (["--data.max_lenght", "5"], "the nearest is data.max_length"),
        (["--data.path", "nowhere.csv"], "nowhere.csv"),
        (["--config", "nowhere.yaml"], "config file nowhere.yaml"),
        (["--data.split_by", "instruction", "--data.num_samples", "1"], "data.split_by"),
    ],
)
def test_a_mistake_is_one_line_and_2(run_audit_command, arguments, said):
    code, printed, page = run_audit_command(SAMPLE, *arguments)
    assert (code, page) == (2, None)
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err


def test_help_says_what_is_accepted(capsys):
    with pytest.raises(SystemExit) as end:
        main(["audit", "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for expected in (
        "python -m finetune audit",
        "--page FILE",
        "--config FILE",
        "the keys of the configuration",
    ):
        assert expected in said


def test_the_command_of_the_shell(tmp_path, tokenizer_dir):
    path = write(tmp_path / "rows.jsonl", [row("Name a coin.", "A dime."), row("name a coin", "")])
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "empty.yaml").write_text("{}\n", encoding="utf-8")
    command = [sys.executable, "-m", "finetune", "audit", "--config", str(tmp_path / "empty.yaml")]
    command += ["--model.name_or_path", str(tokenizer_dir), "--data.path", path, "--data.eval_fraction", "0"]
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "[[A dime.<|im_end|>]]" in done.stdout
    assert "Dropped: without output (1)\n  2" in done.stdout
    assert [file.name for file in here.iterdir()] == ["audit.html"]


# --- Real rows ---


def test_real_rows_are_cut_and_dropped_as_counted_without_the_audit(shared_data, starter_dir):
    path = shared_data / "alpaca_9229.json"
    tokenizer = AutoTokenizer.from_pretrained(starter_dir)
    raw = json.loads(path.read_text(encoding="utf-8"))
    audit = audit_of(str(path), tokenizer, num_samples=900, max_length=250)
    unanswered = audit.dropped.pop("without a target token", [])  # cut within the question
    assert audit.dropped == {"without output": [n for n, r in enumerate(raw, 1) if not r["output"].strip()]}
    cut = []
    for number in audit.split_of:
        r = raw[number - 1]
        user = r["instruction"] + (f"\n Context:{r['input']}" if r["input"].strip() else "")
        text = tokenizer.apply_chat_template(turns(user, r["output"]), tokenize=False)
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 250:
            cut.append(number)
    assert sorted([*(number for number, *_ in audit.cut_rows()), *unanswered]) == sorted(cut)
    assert len(cut) > 5
    assert not any(likeness.same for likeness in audit.likeness.values())


def test_repeated_prompts_of_real_conversations_are_found(shared_data, starter_dir):
    path = shared_data / "finance_alpaca_900_messages.jsonl"
    lines = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    first: dict[str, int] = {}
    repeats = Counter(messages[1]["content"] for messages in lines)
    for number, messages in enumerate(lines, 1):
        first.setdefault(messages[1]["content"], number)
    expected = {first[content] for content, count in repeats.items() if count > 1}
    audit = audit_of(str(path), AutoTokenizer.from_pretrained(starter_dir), eval_fraction=0)
    assert len(expected) == 5
    assert expected <= {group[0] for group in audit.likeness["prompt"].same}
    assert audit.examples["system"].min() > 0
