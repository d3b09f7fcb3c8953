"""Runs side by side: what they differ in, and what can be said of their losses."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from browser import look_at

from finetune.__main__ import main
from finetune.report.comparison import write_comparison
from finetune.report.intervals import difference_interval

MINUS = "\N{MINUS SIGN}"


@pytest.fixture
def runs(run_train, rows_file, tmp_path, made_once, monkeypatch) -> Callable[[str, str], Path]:
    """A copy of a run of its own name: of those made once, "slow" and "fast" differ in the learning rate, and
    "other" in the rows that are evaluated."""
    made = {
        "slow": {},
        "fast": {"optim__learning_rate": 0.01},
        "other": {"data__split_seed": 7, "train__max_steps": 1},
        "untested": {"data__eval_fraction": 0, "train__max_steps": 1},
    }
    made_once.setdefault("rows", rows_file)
    monkeypatch.chdir(tmp_path)

    def copy(which: str, name: str) -> Path:
        if which not in made_once:
            settings: dict[str, Any] = {"data__path": made_once["rows"], **made[which]}
            made_once[which] = run_train(output_dir=made_once["rows"].parent / "made" / which, **settings)
        return Path(shutil.copytree(made_once[which], tmp_path / name))

    return copy


def compare(*run_dirs: Path) -> str:
    """The page of the command."""
    assert main(["compare", *map(str, run_dirs)]) == 0
    return Path("compare.html").read_text(encoding="utf-8")


def last_sums(run_dir: Path) -> pd.DataFrame:
    return pd.read_csv(max((run_dir / "evaluations").iterdir()))


def change_last_losses(run_dir: Path, by: list[float]) -> None:
    sums = last_sums(run_dir)
    sums["nll"] += by
    sums.to_csv(max((run_dir / "evaluations").iterdir()), index=False)


def test_runs_on_the_same_rows_are_compared_example_by_example(runs, capsys):
    slow, fast = runs("slow", "slow"), runs("fast", "fast")
    page = compare(slow, fast)
    of_slow, of_fast = last_sums(slow), last_sums(fast)
    counts = of_slow["num_target_tokens"].to_numpy(float)
    interval = difference_interval(of_slow["nll"].to_numpy(), of_fast["nll"].to_numpy(), counts)
    assert interval.value == pytest.approx((of_fast["nll"].sum() - of_slow["nll"].sum()) / counts.sum())
    assert interval.high < 0
    value, low, high = (f"{x:+.3f}".replace("-", MINUS) for x in interval)
    expected = f"fast is better than slow: its eval loss differs by {value} (95 % interval: {low} to {high})."
    assert expected in page
    said = capsys.readouterr().out
    assert expected in said
    assert "page  compare.html" in said
    for run in (slow, fast):
        loss = f"{last_sums(run)['nll'].sum() / counts.sum():.4f}"
        assert loss in page
        assert loss in said
    assert page.count("<svg") == 4


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ([0.0, 0.0, 0.0, 0.0], "b and a cannot be told apart"),
        ([30.0, -20.0, 20.0, -40.0], "b and a cannot be told apart"),
        ([-1.0, -1.0, -1.0, -1.0], "b is better than a"),
        ([1.0, 1.0, 1.0, 1.0], "b is worse than a"),
    ],
)
def test_the_words_are_the_interval_s(runs, changed, said):
    a, b = runs("slow", "a"), runs("slow", "b")
    change_last_losses(b, changed)
    assert f"{said}: its eval loss differs by " in compare(a, b)


def test_only_the_keys_in_which_runs_differ_are_named(runs, capsys):
    page = compare(runs("slow", "slow"), runs("fast", "fast"))
    assert re.findall(r"<small>([a-z_.]+ [^<]*)</small>", page) == [
        "optim.learning_rate 0.001",
        "optim.learning_rate 0.01",
    ]
    assert "optim.learning_rate 0.01" in capsys.readouterr().out
    page = compare(runs("slow", "same"), runs("slow", "again"))
    assert "optim.learning_rate" not in page


def test_losses_of_other_rows_are_not_compared(runs):
    slow, other = runs("slow", "slow"), runs("other", "other")
    said = "other was evaluated on other rows than slow: their losses cannot be compared."
    assert said in compare(slow, other)
    # Nor are those of the same rows with other numbers of target tokens.
    same = runs("slow", "same")
    sums = last_sums(same)
    sums.loc[0, "num_target_tokens"] += 1
    sums.to_csv(max((same / "evaluations").iterdir()), index=False)
    assert "same was evaluated on other rows than slow" in compare(slow, same)


def test_runs_without_evaluation_and_unfinished_ones_have_their_row(runs):
    slow, untested = runs("slow", "slow"), runs("untested", "untested")
    shutil.rmtree(slow / "adapter")
    begun = runs("fast", "begun")
    shutil.rmtree(begun / "adapter")
    (begun / "metrics.jsonl").unlink()
    page = compare(slow, untested, begun)
    assert "untested and slow cannot be compared: untested evaluated nothing." in page
    assert "begun and slow cannot be compared: begun evaluated nothing." in page
    assert page.count("not finished") == 2
    assert "0 of 4" in page
    assert "nan" not in page


def test_the_function_for_other_commands_writes_any_number_of_runs(runs, tmp_path):
    many = [runs("slow", f"run {number}") for number in range(10)]
    rows = write_comparison(many, tmp_path / "many.html")
    assert [row.name for row in rows] == [f"run {number}" for number in range(10)]
    assert len({(row.colour, row.dashed) for row in rows}) == 10
    assert (tmp_path / "many.html").read_text(encoding="utf-8").count("cannot be told apart") == 9


def test_runs_of_one_name_are_told_apart_by_their_paths(runs, tmp_path):
    page = compare(runs("slow", "x/run"), runs("fast", "y/run"))
    assert f"<b>{tmp_path}/x/run</b>" in page
    assert f"<b>{tmp_path}/y/run</b>" in page


def test_names_of_runs_are_text(runs, capsys):
    page = compare(runs("slow", "<script>a\x1b[31m"), runs("fast", "$x$ {{ 1 }} <i>\u202e"))
    assert "<script" not in page
    assert "&lt;script&gt;a\\x1b[31m" in page
    assert "$x$ {{ 1 }} &lt;i&gt;\\u202e" in page
    printed = capsys.readouterr().out
    for text in (page, printed):
        assert not {"\x1b", "\u202e"} & set(text)


def test_a_phone_shows_it_whole_and_fetches_nothing(runs, tmp_path):
    compare(runs("slow", "slow"), runs("fast", "a-name-without-any-space-" * 4), runs("other", "other"))
    seen = look_at(tmp_path / "compare.html", 400, tmp_path)
    assert seen["console"] == []
    assert seen["fetched"] == []
    assert seen["width"] <= seen["shown_width"]
    assert len(seen["charts"]) == 4
    assert min(seen["charts"]) > 100


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "RUN"),
        (["slow", "slow", "--page"], "expected one argument"),
        (["slow"], "name two runs or more"),
        (["slow", "nowhere"], "nowhere holds no run"),
        (["slow", "slow", "--page", "page.csv"], "name a file that ends in .html"),
    ],
)
def test_a_mistake_is_one_line_and_2(runs, capsys, arguments, named):
    runs("slow", "slow")
    capsys.readouterr()
    assert main(["compare", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert named in said
    assert not Path("compare.html").exists()
