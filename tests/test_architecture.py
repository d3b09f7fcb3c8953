"""docs/architecture.md and its drawing: every name in it exists, and the imports are as they are drawn."""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

PAGE = ROOT / "docs" / "architecture.md"
FILE_SUFFIXES = (".html", ".json", ".jsonl", ".md", ".py", ".svg", ".toml", ".yaml", ".cpp")


def quoted_names() -> list[str]:
    return re.findall(r"`([^`\n]+)`", PAGE.read_text(encoding="utf-8"))


def dotted_names() -> list[str]:
    """Names such as `data.plan.lay_out`, once each."""
    names = [name for name in quoted_names() if re.fullmatch(r"\w+(\.\w+)+", name)]
    return list(dict.fromkeys(name for name in names if not name.endswith(FILE_SUFFIXES)))


def file_of(name: str) -> tuple[Path, list[str]]:
    """The file of a module, and the parts of the name behind it."""
    parts = name.split(".")
    if parts[0] == "train":
        return ROOT / "train.py", parts[1:]
    for count in (1, 2, 3):
        file = (ROOT / "finetune").joinpath(*parts[:count]).with_suffix(".py")
        if file.is_file():
            return file, parts[count:]
    raise AssertionError(f"{name} lies in no module")


def defines(body: list[ast.stmt], parts: list[str]) -> bool:
    """Whether statements define the name: a function, a class and what it holds, or a variable."""
    if not parts:
        return True
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == parts[0]:
            return len(parts) == 1 or (isinstance(node, ast.ClassDef) and defines(node.body, parts[1:]))
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = {n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)}
        if len(parts) == 1 and parts[0] in names:
            return True
    return False


def exists(name: str) -> bool:
    file, parts = file_of(name)
    return defines(ast.parse(file.read_text(encoding="utf-8")).body, parts)


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", dotted_names())
def test_every_name_in_the_page_exists(name):
    assert exists(name)


def test_a_name_that_does_not_exist_is_found():
    assert exists("data.plan.Plan.update")
    assert exists("config.FastConfig.head_mib")
    assert not exists("data.plan.Plan.updates")
    assert not exists("data.plan.pack")
    with pytest.raises(AssertionError, match="no module"):
        exists("data.planning.lay_out")
    assert len(dotted_names()) > 80


def test_every_test_that_holds_a_rule_exists():
    named = [name.split("::") for name in quoted_names() if "::" in name]
    assert len(named) > 20
    for file, test in named:
        assert exists_in_test(file, test), f"{file}::{test}"


def exists_in_test(file: str, test: str) -> bool:
    return defines(ast.parse((ROOT / file).read_text(encoding="utf-8")).body, [test])


def test_every_rule_names_a_test():
    rules = re.split(r"^\d+\. ", section("The rules, and the tests that hold them"), flags=re.M)[1:]
    assert len(rules) >= 10
    for rule in rules:
        assert "::test_" in rule, rule


def test_every_file_and_folder_in_the_page_is_there():
    paths = [name for name in quoted_names() if re.fullmatch(r"(finetune|docs|tests|configs)/[\w./-]*", name)]
    assert "finetune/ops/kernels.cpp" in paths
    for path in paths:
        assert (ROOT / path).exists(), path


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert found is not None
    return found[1]


def test_every_folder_says_what_it_is_and_imports_nothing(drawing):
    inner = {
        path.parent.relative_to(ROOT / "finetune").as_posix()
        for path in (ROOT / "finetune").glob("*/*/__init__.py")
    }
    for room in (set(drawing.rooms()) - set(drawing.FILES)) | inner:
        tree = ast.parse((ROOT / "finetune" / room / "__init__.py").read_text(encoding="utf-8"))
        assert len(tree.body) == 1, room
        first, *rest = ast.get_docstring(tree).split("\n")
        assert first.endswith("."), room
        assert rest, room
        # It names each of its modules, or for the commands where they are listed.
        modules = {path.stem for path in (ROOT / "finetune" / room).glob("*.py")} - {"__init__"}
        missing = {name for name in modules if f"`{name}`" not in ast.get_docstring(tree)}
        assert room == "commands" or not missing, (room, missing)


def test_the_drawing_is_of_the_code_as_it_is(drawing):
    assert drawing.SVG.read_text(encoding="utf-8") == drawing.draw(), "run `python docs/draw_architecture.py`"


def test_every_module_is_in_a_room_of_the_drawing(drawing):
    assert {drawing.room_of(name) for name in drawing.modules()} == set(drawing.rooms())


def test_no_import_leads_up(drawing):
    order = drawing.rooms()
    pairs = drawing.imports_of_rooms()
    assert len(pairs) > 30
    for importer, imported in pairs:
        assert order.index(importer) < order.index(imported), (importer, imported)


def test_an_import_is_seen_however_it_is_written(drawing, tmp_path):
    known = {"finetune.data.rows", "finetune.data.plan", "finetune.run.folder", "finetune.ops.lora"}
    file = tmp_path / "module.py"
    file.write_text(
        "import finetune.data.rows\nfrom finetune.data.plan import Plan\nfrom finetune.run import folder\n"
        "def function():\n    from finetune.ops import lora\n"
    )
    assert drawing.imports_of(file, known) == known


def test_the_loop_is_one_short_function_in_one_short_file():
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 200
    tree = ast.parse(source)
    for function in tree.body:
        if isinstance(function, ast.FunctionDef):
            inner = [n for n in ast.walk(function) if isinstance(n, ast.FunctionDef | ast.Lambda)]
            assert inner == [function], function.name
    assert not [node for node in tree.body if isinstance(node, ast.ClassDef)]
