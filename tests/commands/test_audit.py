"""The command shows what training would use, on a page that needs nothing but itself."""

import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from audits import SAMPLE, TOKENIZER, row, write
from conftest import ROOT

from finetune.__main__ import main
from finetune.config import DataConfig
from finetune.data.conversations import to_messages
from finetune.data.templates.tokenize import IGNORE, encode

HOSTILE = "<script>alert('1')</script> & \x1b[31m </mark> <img src=x onerror=y> \u202e"


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

    replace = os.replace

    def full(source, target):
        if Path(target).name == "audit.html":
            raise OSError(28, "No space left on device", "audit.html")
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    code, printed, page = run_audit_command([row("a"), row("b")])
    assert (code, page, printed.err) == (2, "before", "error: audit.html: No space left on device\n")
    assert [path.name for path in Path.cwd().iterdir()] == ["audit.html"]


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
