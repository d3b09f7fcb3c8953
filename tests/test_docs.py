"""README.md and docs/: the loop they quote, the keys and commands they list, and where their links lead."""

import re
import textwrap
from dataclasses import fields, is_dataclass

import pytest
from conftest import ROOT

from finetune.__main__ import COMMANDS
from finetune.config import Config

PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_loop_that_the_readme_quotes_is_the_one_that_runs():
    quoted = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert len(quoted) == 1
    assert quoted[0].startswith("adapter.zero_gradients()\n")
    assert quoted[0].endswith("\nstate.step += 1\n")
    assert textwrap.indent(quoted[0], 12 * " ") in (ROOT / "train.py").read_text()


def test_the_page_of_the_configuration_lists_every_key():
    rows = re.findall(
        r"^\| (?:`(\w+)`)? ?\| (`.*) \|$", (ROOT / "docs" / "config.md").read_text(), flags=re.M
    )
    listed = {section: re.findall(r"`(\w+)`", keys) for section, keys in rows}
    sections = {f.name: [key.name for key in fields(f.type)] for f in fields(Config) if is_dataclass(f.type)}
    sections[""] = [f.name for f in fields(Config) if not is_dataclass(f.type)]
    assert {name: sorted(keys) for name, keys in listed.items()} == {
        name: sorted(keys) for name, keys in sections.items()
    }


def test_every_command_is_shown_in_a_page_and_every_command_shown_exists():
    text = "".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"python -m finetune (\w+)", text)) == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.M)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor[1:] in anchors, anchor


def test_every_config_script_and_result_in_the_pages_is_there():
    pattern = r"(?<![\w/])((?:configs|benchmarks|tests|docs)/[\w/]+\.(?:yaml|py|jsonl?|md|svg|png)\b)"
    named = {path for page in PAGES for path in re.findall(pattern, page.read_text())}
    assert len(named) > 10
    for path in named:
        assert (ROOT / path).exists(), path
