"""Where the rows come from: the files and hub data sets that the configuration names, each source with
columns, a system prompt and a number of rows of its own."""

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.config import DataConfig, SourceConfig, Sources, described
from finetune.config_files import SAMPLE, shipped

FILE_SUFFIXES = (".csv", ".parquet", ".json", ".jsonl")
COMPRESSED = (".gz", ".zst")  # behind the suffix of a text file


@dataclass(frozen=True)
class Source:
    """Rows of one origin: either `files`, or the hub data set `dataset`.

    `columns` says what columns of other names are ({theirs: ours}). Of its rows, `num_samples` are taken at
    random, or the `share` (above 0, at most 1) of all rows taken, or all.
    """

    name: str
    files: tuple[str, ...] = ()
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: Mapping[str, str] | None = None
    system_prompt: str | None = None
    num_samples: int | None = None
    share: float | None = None
    key: str = "data.path"
    """The key of the configuration that names it, for errors"""


def training_sources(config: DataConfig) -> list[Source]:
    """The sources of `data.path`, in its order, with names of which no two are the same.

    Raises:
        ValueError: a pattern that matches nothing, a folder without a file that can be read, or a file of
            another kind. Whether a file is there is found when it is read.
    """
    return _with_own_names(_sources(config.path, "data.path", config))


def eval_sources(data: DataConfig, sets: Mapping[str, str | list[str]] | None) -> list[Source]:
    """The sources of `data.eval_path`, then `eval.sets` by their names; no two names are the same.

    Raises:
        ValueError: as `training_sources`; or an eval set has the name of other rows that are evaluated.
    """
    sources: list[Source] = []
    key, others = "data.path", training_sources(data) if data.eval_fraction > 0 else []
    if data.eval_path is not None:
        sources = _with_own_names(_sources(data.eval_path, "data.eval_path", data))
        key, others = "data.eval_path", [*sources]
    for name, path in (sets or {}).items():
        if name in (other.name for other in others):
            raise ValueError(f"eval.sets.{name}: a source of {key} is called {name} too; rename one of them")
        sources += _sources([SourceConfig(path=path, name=name)], f"eval.sets.{name}", data)
    return sources


def is_local(path: str) -> bool:
    """Whether a path names files of this computer rather than a hub data set."""
    return Path(path).exists() or _is_pattern(path) or kind_of(path) is not None


def kind_of(file: str) -> str | None:
    """The suffix in FILE_SUFFIXES of a file, without that of its compression; None for any other kind."""
    name = file.lower()
    for ending in COMPRESSED:
        if name.endswith(ending):
            kind = Path(name.removesuffix(ending)).suffix
            return kind if kind in FILE_SUFFIXES and kind != ".parquet" else None
    suffix = Path(name).suffix
    return suffix if suffix in FILE_SUFFIXES else None


def _sources(path: Sources, key: str, data: DataConfig) -> list[Source]:
    if isinstance(path, str):
        return [_source(SourceConfig(path=path), key, data)]
    entries = [entry for entry in path if isinstance(entry, SourceConfig)]
    if entries:
        return [_source(entry, key, data) for entry in entries]
    return [_source(SourceConfig(path=[str(file) for file in path]), key, data)]


def _source(entry: SourceConfig, key: str, data: DataConfig) -> Source:
    paths = [entry.path] if isinstance(entry.path, str) else entry.path
    try:
        dataset = paths[0] if len(paths) == 1 and not is_local(paths[0]) else None
        files = () if dataset else tuple(file for path in paths for file in _files(path, key))
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise ValueError(f"{key} {described(entry.path):.60}: {error.strerror}") from error
    if dataset is None:
        hub_keys = {"subset": entry.subset, "revision": entry.revision}
        given = [name for name, value in hub_keys.items() if value is not None]
        if given:
            raise ValueError(f"{key}: {given[0]} belongs to a hub data set, and {paths[0]} is a file")
    return Source(
        name=entry.name or _default_name(paths[0], entry.subset),
        files=files,
        dataset=dataset,
        subset=entry.subset,
        split=entry.split,
        revision=entry.revision,
        columns=data.columns if entry.columns is None else entry.columns,
        system_prompt=data.system_prompt if entry.system_prompt is None else entry.system_prompt,
        num_samples=entry.num_samples,
        share=entry.share,
        key=key,
    )


def _files(path: str, key: str) -> list[str]:
    """The files that a path names: itself, those of a folder, or those that match a pattern; sorted."""
    place = Path(path)
    if place.is_dir():
        inside = sorted(str(file) for file in place.iterdir() if not file.name.startswith("."))
        files = [file for file in inside if kind_of(file) and not Path(file).is_dir()]
        if not files:
            raise ValueError(f"{key} {path} is a folder without any file of {', '.join(FILE_SUFFIXES)}")
        return files
    if not place.exists() and _is_pattern(path):
        files = sorted(file for file in glob.glob(path, recursive=True) if not Path(file).is_dir())
        if not files:
            raise ValueError(f"{key} {path} matches no file")
    elif not place.exists() and path == SAMPLE:
        files = [str(shipped(SAMPLE))]
    else:
        files = [path]
    for file in files:
        if Path(file).exists() and not Path(file).is_file():  # reading a pipe would wait for its writer
            raise ValueError(f"{key} {file} is no ordinary file")
        if kind_of(file) is None:
            raise ValueError(
                f"{key} {file} is none of {', '.join(FILE_SUFFIXES)} (text also compressed, as "
                f"{' or '.join(COMPRESSED)})"
                + ("" if Path(file).exists() else "; name a hub data set in an entry {path: ...} of its own")
            )
    return files


def _is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[")


def _default_name(path: str, subset: str | None) -> str:
    """A name for metrics: the file's or folder's without its suffixes, or the data set's with its subset."""
    name = Path(path).name
    if kind_of(path) is not None:
        name = re.sub(r"\.(csv|parquet|jsonl?)(\.gz|\.zst)?$", "", name, flags=re.IGNORECASE)
    name = name if subset is None else f"{name}-{subset}"
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "rows"


def _with_own_names(sources: Sequence[Source]) -> list[Source]:
    """The sources, `-2`, `-3`, ... behind the names that stood before."""
    own: list[Source] = []
    given, taken = {source.name for source in sources}, set[str]()
    for source in sources:
        name, number = source.name, 1
        while name in taken or (number > 1 and name in given):
            number += 1
            name = f"{source.name}-{number}"
        taken.add(name)
        own.append(replace(source, name=name))
    return own
