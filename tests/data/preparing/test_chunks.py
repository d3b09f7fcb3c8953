"""A preparation that is killed resumes at the chunks that are missing, and gives the same files on any number
of processes; what is kept is not taken for other rows, settings or code."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from conftest import ROOT, tiny_tokenizer

from finetune.config import Config, DataConfig, EvalConfig, SourceConfig
from finetune.data.preparing import chunks as prepare
from finetune.data.preparing import row_tables
from finetune.data.preparing.chunk_files import read_chunk, read_in_parts, with_counts
from finetune.data.preparing.chunks import Chunk, join_chunks, make_chunks
from finetune.data.preparing.examples import tokenize_rows
from finetune.data.preparing.row_tables import cache_folder
from finetune.data.rows import find_leaks, iterate_rows, load_rows
from finetune.data.splits import load_data


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def small_chunks(monkeypatch):
    for module in (prepare, row_tables):
        monkeypatch.setattr(module, "CHUNK_ROWS", 10)


def use_processes(monkeypatch, count: int) -> None:
    monkeypatch.setattr(prepare, "FEW_ROWS", 0)
    monkeypatch.setattr(prepare, "available_cpus", lambda: count)


def write(path: Path, num_rows: int, **more) -> str:
    rows = [{"instruction": f"Name coin {n}.", "output": f"Coin {n}", **more} for n in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- Jobs for make_chunks, which other processes import ---


def double(numbers: list[int]) -> pa.Table:
    return pa.table({"n": [2 * n for n in numbers], "pid": [os.getpid()] * len(numbers)})


def refuse_seven(numbers: list[int]) -> pa.Table:
    if 7 in numbers:
        raise ValueError("row 7: no")
    if 9 in numbers:
        raise ValueError("row 9: no")
    return double(numbers)


def end_at_five(numbers: list[int]) -> pa.Table:
    if 5 in numbers:
        os._exit(1)
    return double(numbers)


def chunks_of(num_rows: int, asked: list[int] | None = None) -> list[Chunk]:
    def payload(n: int) -> list[int]:
        if asked is not None:
            asked.append(n)
        return [n]

    return [Chunk(1, partial(payload, n)) for n in range(num_rows)]


def numbers_in(paths: list[Path]) -> list[int]:
    return [n for path in paths for n in read_chunk(path)["n"].to_pylist()]


# --- Chunks ---


@pytest.mark.parametrize("processes", [1, 2])
def test_chunks_are_made_in_order_by_as_many_processes_as_may_work(tmp_path, monkeypatch, processes):
    use_processes(monkeypatch, processes)
    paths = make_chunks(tmp_path / "made", chunks_of(20), double, "Working")
    assert numbers_in(paths) == [2 * n for n in range(20)]
    makers = {read_chunk(path)["pid"][0].as_py() for path in paths}
    assert (makers == {os.getpid()}) == (processes == 1)
    assert len(makers) <= processes
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [path.name for path in paths]
    assert not [p for p in psutil.Process().children() if p.pid in makers]  # none is left behind


def test_few_rows_start_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "available_cpus", lambda: 2)
    monkeypatch.setattr(prepare, "_run_in_others", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(prepare, "FEW_ROWS", 20)
    assert len(make_chunks(tmp_path / "slow", chunks_of(20), double, "Working")) == 20
    assert len(make_chunks(tmp_path / "quick", chunks_of(40), double, "Working", quickness=2)) == 40
    for folder, count, quickness in (("slow more", 21, 1), ("quick more", 41, 2), ("many", 61, 9)):
        with pytest.raises(pytest.fail.Exception, match="started"):
            make_chunks(tmp_path / folder, chunks_of(count), double, "Working", quickness=quickness)


def test_only_missing_chunks_are_made_and_their_rows_alone_are_asked_for(tmp_path):
    paths = make_chunks(tmp_path, chunks_of(6), double, "Working")
    before = [path.stat().st_mtime_ns for path in paths]
    for number in (2, 5):
        paths[number].unlink()
    asked: list[int] = []
    assert make_chunks(tmp_path, chunks_of(6, asked), double, "Working") == paths
    assert asked == [2, 5]
    assert numbers_in(paths) == [0, 2, 4, 6, 8, 10]
    changed = [path.stat().st_mtime_ns != old for path, old in zip(paths, before, strict=True)]
    assert changed == [False, False, True, False, False, True]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}


def test_what_killed_processes_left_is_removed_and_what_others_still_need_is_not(tmp_path, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    here = platform.node()
    left = [f".00002.arrow.{ended.pid}@{here}.partial", f".job.{ended.pid}@{here}.partial"]
    needed = [f".job.{os.getppid()}@{here}.partial", f".00001.arrow.{ended.pid}@elsewhere.partial"]
    for name in (*left, *needed):
        (tmp_path / name).write_bytes(b"half")
    paths = make_chunks(tmp_path, chunks_of(3), double, "Working")
    assert {path.name for path in tmp_path.iterdir()} == {*needed, *(path.name for path in paths)}


def test_two_processes_may_prepare_the_same_rows_at_once(tmp_path):
    path, cache = write(tmp_path / "rows.jsonl", 400), tmp_path / "cache"
    text = PREPARE.format(root=str(ROOT), tests=str(ROOT / "tests"), cache=str(cache), path=path)
    text = text.replace("prepare.FEW_ROWS = 100", "prepare.FEW_ROWS, row_tables.CHUNK_ROWS = 0, 10")
    script = tmp_path / "prepare.py"
    script.write_text(text, encoding="utf-8")
    running = [subprocess.Popen([sys.executable, str(script)], cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=600) for process in running] == [0, 0]
    assert not list(cache.rglob(".*.partial"))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_first_row_that_is_refused_is_named_and_what_came_before_is_kept(
    tmp_path, monkeypatch, processes
):
    use_processes(monkeypatch, processes)
    with pytest.raises(ValueError, match=r"^row 7: no$"):
        make_chunks(tmp_path, chunks_of(12), refuse_seven, "Working")
    assert {f"{number:05}.arrow" for number in range(7)} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "00007.arrow").exists()


def test_a_worker_that_is_killed_is_said_with_what_to_do(tmp_path, monkeypatch):
    use_processes(monkeypatch, 2)
    with pytest.raises(ValueError, match="rerun the same command to resume"):
        make_chunks(tmp_path, chunks_of(12), end_at_five, "Working")
    assert len(make_chunks(tmp_path, chunks_of(12), double, "Working")) == 12


def test_a_folder_that_cannot_be_written_is_named_with_the_variable_that_moves_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/made .*HF_DATASETS_CACHE"):
        make_chunks(tmp_path / "file" / "made", chunks_of(2), double, "Working")


# --- Joined chunks ---

NUMBERS = pa.schema({"n": pa.int64()})


def counted(numbers: list[int]) -> pa.Table:
    return with_counts(pa.table({"n": numbers}, NUMBERS), {"rows": len(numbers)})


def join(folder: Path, num_rows: int = 12) -> dict[str, int]:
    make = partial(make_chunks, folder, chunks_of(num_rows), counted, "Working")
    return join_chunks(folder / "all.arrow", NUMBERS, make, count_rows)


def count_rows(counts) -> dict[str, int]:
    return {"rows": sum(one["rows"] for one in counts)}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("at_once", [1, 3 * 8, 1 << 20])
def test_joined_chunks_are_one_file_with_all_rows_in_order_and_are_made_once(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(prepare, "JOINED_BYTES", at_once)
    assert join(tmp_path) == {"rows": 12}
    assert names_in(tmp_path) == ["all.arrow", "all.json"]
    parts = [part["n"].to_pylist() for part in read_in_parts(tmp_path / "all.arrow")]
    assert len(parts) == {1: 12, 24: 4, 1 << 20: 1}[at_once]
    assert [n for part in parts for n in part] == list(range(12))
    monkeypatch.setattr(prepare, "write_chunk", lambda *_: pytest.fail("made again"))
    assert join(tmp_path) == {"rows": 12}


def test_without_any_chunk_the_joined_file_has_no_row(tmp_path):
    assert join(tmp_path, 0) == {"rows": 0}
    assert read_chunk(tmp_path / "all.arrow") == NUMBERS.empty_table()


@pytest.mark.parametrize("where", ["read_chunk", "write_record", "unlink"])
def test_joining_that_is_killed_anywhere_resumes_without_making_a_chunk_again(tmp_path, monkeypatch, where):
    class Killed(BaseException):
        pass

    calls = []

    def die_at_fourth(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 4 or where == "write_record":
            raise Killed
        return original(*arguments, **keywords)

    owner = Path if where == "unlink" else prepare
    original = getattr(owner, where)
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, die_at_fourth)
        with pytest.raises(Killed):
            join(tmp_path)
    chunks = [name for name in names_in(tmp_path) if name[0].isdigit()]
    assert len(chunks) == (9 if where == "unlink" else 12)
    monkeypatch.setattr(prepare, "write_chunk", lambda *_: pytest.fail("made again"))
    assert join(tmp_path) == {"rows": 12}
    assert [name for name in names_in(tmp_path) if not name.startswith(".")] == ["all.arrow", "all.json"]
    assert read_chunk(tmp_path / "all.arrow")["n"].to_pylist() == list(range(12))


def test_chunks_that_another_process_joined_and_removed_meanwhile_are_not_missed(tmp_path):
    def make() -> list[Path]:
        paths = make_chunks(tmp_path, chunks_of(12), counted, "Working")
        assert join(tmp_path) == {"rows": 12}
        return paths

    assert join_chunks(tmp_path / "all.arrow", NUMBERS, make, count_rows) == {"rows": 12}
    assert names_in(tmp_path) == ["all.arrow", "all.json"]


def test_chunks_that_are_gone_though_nobody_joined_them_are_an_error(tmp_path):
    def make() -> list[Path]:
        paths = make_chunks(tmp_path, chunks_of(12), counted, "Working")
        paths[5].unlink()
        return paths

    with pytest.raises(ValueError, match="rerun the same command"):
        join_chunks(tmp_path / "all.arrow", NUMBERS, make, count_rows)


# --- Rows and examples ---


def test_one_and_two_processes_give_the_same_files(tmp_path, monkeypatch, small_chunks):
    path = write(tmp_path / "rows.jsonl", 95, score=1)
    kept = []
    for processes in (1, 2):
        cache = tmp_path / f"cache-{processes}"
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        use_processes(monkeypatch, processes)
        data = load_data(Config(data=DataConfig(path=path)), tiny_tokenizer())
        kept.append(files_of(cache))
        assert data.unused() == {'column "score"': 95}
        assert len(data.train.dataset) + len(data.eval.dataset) == 95
        assert len(list(row_tables.table_chunks(data.rows.train))) > 5
    assert {Path(name).name for name in kept[0]} >= {"rows.arrow", "examples.arrow", "leaks.arrow"}
    assert kept[0] == kept[1]


PREPARE = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import datasets
datasets.config.HF_DATASETS_CACHE = {cache!r}
from finetune.config import Config, DataConfig
from finetune.data.preparing import encoding
from finetune.data.preparing import chunks as prepare
from finetune.data.preparing import row_tables
from finetune.data.splits import load_data
from conftest import tiny_tokenizer
prepare.available_cpus = lambda: 2
prepare.FEW_ROWS = 100
if __name__ == "__main__":
    load_data(Config(data=DataConfig(path={path!r}, eval_fraction=0.0)), tiny_tokenizer())
"""


def tokenized_chunks(cache: Path) -> list[Path]:
    """The chunks of examples that are in the cache, not yet joined."""
    found = []
    for path in cache.rglob("[0-9]*.arrow"):
        with suppress(FileNotFoundError):  # chunks of rows are removed once they are joined
            if "input_ids" in read_chunk(path).column_names:
                found.append(path)
    return found


def test_a_preparation_that_is_killed_resumes_and_gives_the_same(tmp_path, monkeypatch):
    path, cache = write(tmp_path / "rows.jsonl", 40_000), tmp_path / "cache"
    script = tmp_path / "prepare.py"
    text = PREPARE.format(root=str(ROOT), tests=str(ROOT / "tests"), cache=str(cache), path=path)
    script.write_text(text, encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(script)], cwd=ROOT)
    deadline = time.monotonic() + 600
    workers: list[psutil.Process] = []
    while True:
        if len(tokenized_chunks(cache)) >= 3:
            workers = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
            break
        assert process.poll() is None, "it was done before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    kept = {read_chunk(p)["row_number"][0].as_py() - 1 for p in tokenized_chunks(cache)}
    asked = []
    packed_part = row_tables._packed_part
    monkeypatch.setattr(row_tables, "_packed_part", lambda *a: asked.append(a[1]) or packed_part(*a))
    tokenizer, config = tiny_tokenizer(), Config(data=DataConfig(path=path, eval_fraction=0.0))
    resumed = load_data(config, tokenizer).train
    assert len(kept) >= 3
    assert set(asked) == set(range(0, 40_000, row_tables.CHUNK_ROWS)) - kept
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "other")
    whole = load_data(config, tokenizer).train
    assert len(whole.dataset) == 40_000
    assert (resumed.fingerprint, resumed.lengths.tolist()) == (whole.fingerprint, whole.lengths.tolist())
    assert not list(cache.rglob(".*.partial"))


def read_anew(monkeypatch, config: DataConfig) -> bool:
    """Whether rows had to be converted."""
    converted = []
    convert = row_tables.ReadRows.__call__
    with monkeypatch.context() as patch:
        patch.setattr(row_tables.ReadRows, "__call__", lambda *a: converted.append(1) or convert(*a))
        load_rows(config)
    return bool(converted)


def test_files_are_read_once_and_again_when_they_or_the_settings_change(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", 30)
    config = DataConfig(path=path, eval_fraction=0.0)
    assert read_anew(monkeypatch, config)
    assert not read_anew(monkeypatch, config)
    # What is taken of the rows does not change them.
    assert not read_anew(monkeypatch, DataConfig(path=path, num_samples=5, eval_fraction=0.5, max_length=99))
    assert read_anew(monkeypatch, DataConfig(path=path, columns={"output": "input", "instruction": "text"}))
    source = SourceConfig(path=path, system_prompt="Be kind.")
    assert read_anew(monkeypatch, DataConfig(path=[source]))
    stat = os.stat(path)
    Path(path).write_text(Path(path).read_text().replace("Coin 7", "Note 7"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read_anew(monkeypatch, config)
    assert any(row["output"] == "Note 7" for row in iterate_rows(load_rows(config).train))
    monkeypatch.setattr(row_tables, "_code_digest", lambda: "other code")
    assert read_anew(monkeypatch, config)


def test_the_key_depends_on_the_versions_of_what_reads_and_tokenizes(tmp_path, monkeypatch):
    config = DataConfig(path=write(tmp_path / "rows.jsonl", 3), eval_fraction=0.0)
    assert read_anew(monkeypatch, config)
    for name in ("tokenizers", "transformers", "jinja2"):
        with monkeypatch.context() as patch:
            patch.setattr(row_tables, "version", lambda own, name=name: "9" if own == name else version(own))
            row_tables._code_digest.cache_clear()
            assert read_anew(monkeypatch, config)
        row_tables._code_digest.cache_clear()
    assert not read_anew(monkeypatch, config)


def test_a_system_prompt_of_a_source_is_of_its_rows_alone(tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", 3) for name in "ab"]
    sources = [SourceConfig(path=paths[0]), SourceConfig(path=paths[1], system_prompt="Be kind.")]
    rows = load_rows(DataConfig(path=sources, eval_fraction=0.0, system_prompt="Be brief."))
    assert [row.get("system") for row in iterate_rows(rows.train)] == [None] * 3 + ["Be kind."] * 3


def test_leaks_are_found_once_and_then_read(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", 12)
    Path(path).write_text(Path(path).read_text() * 2)
    rows = load_rows(DataConfig(path=path, eval_fraction=0.5))
    leaks = find_leaks(rows)
    assert leaks
    trained = {row["instruction"] for row in iterate_rows(rows.train)}
    for number, match in leaks.items():
        assert match.exact
        assert list(iterate_rows(rows.train))[match.position]["instruction"] in trained
        assert number in list(rows.eval["row_number"])
    monkeypatch.setattr("finetune.data.rows.find_matches", lambda *_: pytest.fail("compared again"))
    assert find_leaks(load_rows(DataConfig(path=path, eval_fraction=0.5))) == leaks


def test_tokens_come_from_the_cache_for_rows_that_were_read_again(tmp_path, monkeypatch):
    """Their key is that of the files and the numbers of the rows, so no text has to be looked at."""
    config = DataConfig(path=write(tmp_path / "rows.jsonl", 30), eval_fraction=0.0)
    first = tokenize_rows(load_rows(config).train, tiny_tokenizer(), config)
    monkeypatch.setattr(
        "finetune.data.preparing.encoding.encode_batch", lambda *_: pytest.fail("encoded again")
    )
    again = tokenize_rows(load_rows(config).train, tiny_tokenizer(), config)
    assert again.fingerprint == first.fingerprint
    folder = cache_folder({})
    assert folder.parent.is_dir()
    with pytest.raises(BaseException, match="encoded again"):
        tokenize_rows(load_rows(config).train.select([1, 0]), tiny_tokenizer(), config)


# --- What is not used ---


def test_what_is_not_used_is_counted_and_refused_under_strict(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "1", "logprobs": 2},
            ]
        },
        {"messages": [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}], "id": 7},
        {"messages": [{"role": "user", "content": "Six?"}, {"role": "assistant", "content": "6"}], "id": 8},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(data=DataConfig(path=str(path), eval_fraction=0.0))
    data = load_data(config, tiny_tokenizer())
    assert data.unused()['column "id"'] == 2
    assert [count for what, count in data.unused().items() if "logprobs" in what] == [1]
    assert data.counts()["unused"] == dict(data.unused())
    strict = Config(data=config.data, strict=True)
    with pytest.raises(ValueError, match=r'column "id" \(2 rows\), .*logprobs.* \(1 rows?\)'):
        load_data(strict, tiny_tokenizer())
    clean = Config(data=DataConfig(path=write(tmp_path / "clean.jsonl", 3), eval_fraction=0.0), strict=True)
    assert load_data(clean, tiny_tokenizer()).unused() == Counter()


def test_a_row_that_is_refused_is_named_with_its_file_where_there_are_several(tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", 4) for name in "ab"]
    template = (
        "{% for m in messages %}{% if m.content == 'Coin 2' and loop.length == 2 and bad is not defined %}"
        "{{ raise_exception('no coins') }}{% endif %}{{ m.content ~ '<|im_end|>' }}{% endfor %}"
    )
    Path(paths[0]).write_text(Path(paths[0]).read_text().replace("Coin 2", "Coin 9"))
    both = Config(data=DataConfig(path=paths, eval_fraction=0.0))
    with pytest.raises(ValueError, match=r"^row 7 \(.*b\.jsonl, row 3\): .*no coins"):
        load_data(both, tiny_tokenizer(template))
    one = Config(data=DataConfig(path=paths[1], eval_fraction=0.0))
    with pytest.raises(ValueError, match=r"^row 3: .*no coins"):
        load_data(one, tiny_tokenizer(template))


def test_eval_sets_are_rows_of_their_own_with_their_names(tmp_path):
    paths = {name: write(tmp_path / f"{name}.jsonl", 6) for name in ("own", "math", "law")}
    config = Config(
        data=DataConfig(path=paths["own"], eval_path=paths["math"], eval_fraction=0.0),
        eval=EvalConfig(sets={"contracts": paths["law"]}),
    )
    data = load_data(config, tiny_tokenizer())
    assert list(data.eval.source_names) == ["own", "math", "contracts"]
    assert data.train.sources.tolist() == [0] * 6
    assert data.eval.sources.tolist() == [1] * 6 + [2] * 6
    assert data.taken() == [6, 6, 6]
    assert len(data.leaks) == 12  # each prompt is trained on


def test_rows_of_two_sources_of_one_name_are_counted_apart(tmp_path):
    """As the train and the test split of one data set have."""
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
    train, test = write(tmp_path / "train/own.jsonl", 6), write(tmp_path / "test/own.jsonl", 4)
    data = load_data(Config(data=DataConfig(path=train, eval_path=test, eval_fraction=0.0)), tiny_tokenizer())
    assert data.taken() == [6, 4]
    assert [(one["name"], one["taken"]) for one in data.counts()["sources"]] == [("own", 6), ("own", 4)]


def test_a_column_that_only_rows_behind_the_first_batch_have_is_used(tmp_path, small_chunks):
    tool = {"type": "function", "function": {"name": "flip", "parameters": {}}}
    turns = [{"role": "user", "content": "Flip."}, {"role": "assistant", "content": "Heads."}]
    rows = [
        {"messages": turns, **({"tools": [tool], "system": "Be fair."} if n == 14 else {})} for n in range(15)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loaded = load_rows(DataConfig(path=str(path), eval_fraction=0.0))
    assert loaded.unused == Counter()
    *_, last = iterate_rows(loaded.train)
    assert (last["tools"], last["system"]) == ([tool], "Be fair.")


def test_long_texts_are_prepared_a_few_at_a_time(tmp_path, monkeypatch):
    lengths = [50, 10, 10, 900, 10, 400, 400, 10, 10]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "a" * size}) + "\n" for size in lengths), encoding="utf-8")
    config = DataConfig(path=str(path), eval_fraction=0.0)
    rows = load_rows(config).train
    assert [chunk.num_rows for chunk in row_tables.table_chunks(rows)] == [9]
    whole = tokenize_rows(rows, tiny_tokenizer(), config)
    monkeypatch.setattr(row_tables, "CHUNK_BYTES", 500)
    assert [chunk.num_rows for chunk in row_tables.table_chunks(rows)] == [3, 1, 2, 3]
    backwards = rows.select(range(8, -1, -1))
    assert [chunk.num_rows for chunk in row_tables.table_chunks(backwards)] == [3, 2, 1, 3]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "other")
    assert tokenize_rows(rows, tiny_tokenizer(), config).fingerprint == whole.fingerprint
