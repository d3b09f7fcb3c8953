"""Rows of several sources, for tests of what is given by source."""

import json
from pathlib import Path

NAMES = ("most", "few", "rest")


def in_sources(rows_file: Path) -> str:
    """The first 8, the next 2 and the other rows of a file as a source each: a value of data.path."""
    lines = rows_file.read_text(encoding="utf-8").splitlines(keepends=True)
    entries = []
    for name, part in zip(NAMES, (lines[:8], lines[8:10], lines[10:]), strict=True):
        path = rows_file.with_name(f"{name}.jsonl")
        path.write_text("".join(part), encoding="utf-8")
        entries.append({"path": str(path), "name": name})
    return json.dumps(entries)
