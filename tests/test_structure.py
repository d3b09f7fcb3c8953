"""The shape of the code: what fits on a page, and what lies where."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "finetune"
MODULES = sorted(PACKAGE.rglob("*.py"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_loop_is_read_on_one_page():
    (train,) = [node for node in tree_of(ROOT / "train.py").body if getattr(node, "name", "") == "train"]
    assert lines_of(ROOT / "train.py") <= 170
    assert train.end_lineno - train.lineno + 1 <= 100


def test_train_py_has_no_class_and_no_function_inside_a_function():
    tree = tree_of(ROOT / "train.py")
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    assert [node for node in tree.body if node in functions] == functions
    assert [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)] == []


def test_at_most_six_modules_lie_at_the_top_of_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= 6


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_is_longer_than_400_lines(path):
    assert lines_of(path) <= 400


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_the_init_of_a_folder_is_a_docstring_alone(path):
    assert ast.get_docstring(tree_of(path))
    assert len(tree_of(path).body) == 1
