"""Draw docs/architecture.svg: the folders of the program, and which imports which.

    python docs/draw_architecture.py

The dots are the import statements of the code. The words are the first lines of the folders' docstrings. The
order is that of the layers in pyproject.toml. tests/test_architecture.py checks that the drawing is current.
"""

import ast
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SVG = ROOT / "docs" / "architecture.svg"
CONFIG = "config"  # config.py, config_checks.py and config_parsing.py, drawn as one
FILES = {
    "train": ("train.py", "The loop, top to bottom."),
    "__main__": ("__main__.py", "python -m finetune: finds the command."),
    CONFIG: ("config*.py", "The keys of the configuration: parsed and checked."),
}
# In pixels: from one room to the next, down and across; a room's size; the margins.
DOWN, ACROSS, WIDTH, HEIGHT, LEFT, TOP = 44, 46, 100, 30, 20, 50


def rooms() -> list[str]:
    """All rooms (folders, and single files above and below them), in the order of the layers."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = next(c["layers"] for c in settings["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    return list(dict.fromkeys(["train", *map(room_of, layers)]))


def room_of(module: str) -> str:
    """The room of a module: `finetune.data.rows` lies in `data`."""
    name = module.split(".")[1] if module.startswith("finetune.") else module
    return CONFIG if name.startswith(CONFIG) else name


def modules() -> dict[str, Path]:
    """Every module of the program by its name, except for the `__init__.py` files: they import nothing."""
    files = [ROOT / "train.py", *sorted((ROOT / "finetune").rglob("*.py"))]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in files
        if path.name != "__init__.py"
    }


def imports_of(path: Path, known: set[str]) -> set[str]:
    """The modules among `known` that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & known


def imports_of_rooms() -> set[tuple[str, str]]:
    """(importing room, imported room), for all that differ."""
    files = modules()
    pairs = {
        (room_of(name), room_of(other))
        for name, path in files.items()
        for other in imports_of(path, set(files))
    }
    pairs.add(("__main__", "commands"))  # by import_module: only the command that was asked for
    return {(importer, imported) for importer, imported in pairs if importer != imported}


def labels(room: str) -> tuple[str, str]:
    """A room's name, and what it is for: the first line of its docstring."""
    if room in FILES:
        return FILES[room]
    source = (ROOT / "finetune" / room / "__init__.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    return f"{room}/", docstring.split("\n")[0].replace("`", "")


def draw() -> str:
    """The drawing, as SVG: rooms down a staircase, and below each room a line to those it imports."""
    names, pairs = rooms(), imports_of_rooms()
    x = {name: LEFT + ACROSS * number for number, name in enumerate(names)}
    y = {name: TOP + DOWN * number for number, name in enumerate(names)}
    width = max(x[name] + WIDTH + 12 + round(6.2 * len(labels(name)[1])) for name in names) + LEFT
    height = y[names[-1]] + HEIGHT + LEFT
    lines, dots, boxes = [], [], []
    for name in names:
        stem = x[name] + 18
        for other in names:
            if (name, other) in pairs:
                middle = y[other] + HEIGHT // 2
                lines.append(f'<path class="line" d="M{stem} {y[name] + HEIGHT}V{middle}H{x[other]}"/>')
                dots.append(f'<circle class="dot" cx="{stem}" cy="{middle}" r="4"/>')
        title, words = labels(name)
        boxes += [
            f'<rect class="room" x="{x[name]}" y="{y[name]}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>',
            f'<text class="name" x="{x[name] + WIDTH // 2}" y="{y[name] + 20}">{escape(title)}</text>',
            f'<text class="words" x="{x[name] + WIDTH + 12}" y="{y[name] + 20}">{escape(words)}</text>',
        ]
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="The folders of the program and their imports">',
        STYLE,
        f'<rect class="page" width="{width}" height="{height}" rx="8"/>',
        f'<text class="words" x="{LEFT}" y="30">Down from a folder, each dot is an import of the '
        "folder to its right. No import leads up.</text>",
    ]
    return "\n".join([*head, *lines, *dots, *boxes, "</svg>\n"])


# The page is drawn too: on a page of any other colour the words can still be read.
STYLE = """<style>
.page { fill: #ffffff; stroke: #d0d7de }
.room { fill: #dbeafe; stroke: #2563a8; stroke-width: 1.2 }
.line { fill: none; stroke: #8c96a0; stroke-width: 1.2 }
.dot { fill: #2563a8 }
text { font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px; fill: #1f2328 }
.name { font-weight: 600; text-anchor: middle }
.words { fill: #57606a; font-size: 12px }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117; stroke: #30363d }
.room { fill: #12305a; stroke: #6ea8fe }
.line { stroke: #6e7681 }
.dot { fill: #6ea8fe }
text { fill: #e6edf3 }
.words { fill: #9198a1 }
}
</style>"""


if __name__ == "__main__":
    SVG.write_text(draw(), encoding="utf-8")
