"""data.audit: it measures what training does: its labels, its rows, and each row by its number."""

import json
from collections import Counter

import pytest
from audits import SAMPLE, TOKENIZER, audit_of, listed, row, turns, write
from conftest import tiny_tokenizer
from transformers import AutoTokenizer

from finetune.config import DataConfig
from finetune.data.conversations import to_messages
from finetune.data.rows import iterate_rows, load_rows
from finetune.data.splits import tokenize_splits
from finetune.data.templates.anatomy import ROLES
from finetune.data.templates.tokenize import IGNORE, encode


def test_counts_by_role_are_those_of_all_examples_and_their_own_labels():
    audit = audit_of(SAMPLE, max_length=128)
    train, evaluation = tokenize_splits(
        load_rows(DataConfig(path=SAMPLE)), TOKENIZER, DataConfig(path=SAMPLE, max_length=128)
    )
    for split, examples in (("train", train), ("eval", evaluation)):
        part = audit.figures[audit.figures["split"] == split]
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
        for r in iterate_rows(part)
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


def test_of_a_cut_conversation_the_ends_before_the_cut_are_trained(tmp_path):
    conversation = {"messages": turns("What?", "A coin.", "And?", "A long answer. " * 20)}
    path = write(tmp_path / "rows.jsonl", [conversation, {"messages": turns("a", "b", "c", "d")}])
    examples = audit_of(path, max_length=60, eval_fraction=0).figures
    figures = ["num_ends", "num_trained_ends", "last_end"]
    assert examples.loc[1, figures].tolist() == [2, 1, "untrained"]
    assert examples.loc[2, figures].tolist() == [2, 2, "trained"]


def test_where_every_token_is_trained_all_roles_are(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row("Name a coin.")])
    figures = audit_of(path, train_on="all", eval_fraction=0, system_prompt="Be kind.").figures.loc[1]
    for role in ("system", "user", "assistant"):
        assert figures[f"{role} trained"] == figures[role] > 0
    assert figures["template trained"] == figures["template"] - 1  # nothing predicts the first token
    bare = tiny_tokenizer("{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}")
    audit = audit_of(path, bare, train_on="all", eval_fraction=0)
    assert audit.figures.loc[1, "last_end"] == "none"
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
    assert audit.figures.index.tolist() == [2, 6]
    dropped = audit_of(path, max_length=100, eval_fraction=0, overlong="drop")
    assert dropped.dropped["over 100 tokens"] == [3]
    assert listed(dropped)["Dropped: over 100 tokens"] == [(3,)]


def test_labels_that_training_would_not_use_stop_the_audit(monkeypatch):
    def shifted(*arguments):
        tokens = encode(*arguments)
        return tokens._replace(labels=[IGNORE, *tokens.labels[:-1]])

    monkeypatch.setattr("finetune.data.templates.anatomy.encode", shifted)
    with pytest.raises(AssertionError):
        audit_of(SAMPLE)


def test_every_planted_repetition_is_found_by_row_number_and_nothing_else(tmp_path):
    frame = load_rows(DataConfig(path=SAMPLE, eval_fraction=0)).train.select(range(150))
    rows = [{key: r[key] for key in ("instruction", "input", "output")} for r in iterate_rows(frame)]
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
    assert audit.figures["system"].min() > 0
