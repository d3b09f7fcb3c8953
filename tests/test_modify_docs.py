"""docs/modify.md: its diffs apply to the code as it is, its commands run, each change does what it says."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT, read_metrics
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import train
from finetune.config import Config
from finetune.config_parsing import parse_config
from finetune.data.collate import pack
from finetune.data.order import epoch_order
from finetune.data.plan import make_plan
from finetune.ops.quantized import dropout_off
from finetune.run.checkpoint import fault_of
from finetune.training.setup import Parts, load_parts

COPIED = ("train.py", "finetune", "configs", "data", "pyproject.toml")
NOT_THE_TRAINING = ("useful_tokens_per_second", "mfu", "peak_memory_gib")


class Example(NamedTuple):
    """A section of the document."""

    diff: str
    commands: list[str]
    python: str


def read_examples() -> dict[str, Example]:
    """The sections by their titles."""
    text = (ROOT / "docs" / "modify.md").read_text(encoding="utf-8")
    return {
        title: Example(
            diff="".join(body for kind, body in _blocks(section) if kind == "diff"),
            commands=[line for kind, body in _blocks(section) if kind == "" for line in body.splitlines()],
            python="".join(body for kind, body in _blocks(section) if kind == "python"),
        )
        for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S)
    }


def _blocks(section: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```$", section, flags=re.M | re.S)


EXAMPLES = read_examples()
LOSS, OPTIMIZER, METRIC, ORDER, ADAPTER = EXAMPLES


def apply_diff(diff: str, folder: Path) -> None:
    """Apply a unified diff. A hunk is found by its text, which must be there exactly once; its line numbers
    are not looked at, its counts of lines are."""
    for part in re.split(r"^--- a/.*\n\+\+\+ b/", diff, flags=re.M)[1:]:
        name, *hunks = re.split(r"^@@ -\d+,(\d+) \+\d+,(\d+) @@\n", part, flags=re.M)
        path = folder / name.strip()
        text = path.read_text(encoding="utf-8")
        for old_count, new_count, body in zip(hunks[::3], hunks[1::3], hunks[2::3], strict=True):
            lines = [line or " " for line in body.splitlines()]
            assert {line[0] for line in lines} <= set(" +-")
            old = [line[1:] for line in lines if line[0] != "+"]
            new = [line[1:] for line in lines if line[0] != "-"]
            assert (len(old), len(new)) == (int(old_count), int(new_count)), f"{name}: the counts of a hunk"
            before, after = ("\n" + "\n".join(side) + "\n" for side in (old, new))
            assert f"\n{text}".count(before) == 1, f"{name} is not as this hunk expects it:{before}"
            text = f"\n{text}".replace(before, after)[1:]
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def changed(tmp_path) -> Callable[[str], Path]:
    """A copy of the program, with the diff of a section applied."""

    def copy(title: str) -> Path:
        folder = tmp_path / "changed"
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                folder.mkdir(exist_ok=True)
                shutil.copy2(source, folder / name)
        apply_diff(EXAMPLES[title].diff, folder)
        return folder

    return copy


@pytest.fixture
def small(tmp_path, tiny_model_dir, rows_file) -> list[str]:
    """What is appended to a command: the tiny model on few rows, each update logged and saved."""
    settings = {
        "model.name_or_path": tiny_model_dir,
        "model.quantization": "none",
        "data.path": rows_file,
        "data.num_samples": "null",
        "data.max_length": 128,
        "train.micro_batch_size": 1,
        "train.gradient_accumulation_steps": 4,
        "train.mixed_precision": "no",
        "log.every_steps": 1,
        "checkpoint.every_steps": 1,
        "checkpoint.keep": 100,
    }
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def run(command: str, folder: Path, *more: str, before: str = "") -> Path:
    """Run a command of the document with more arguments, and return the run's folder. `before` is Python to
    run first, in a process that is to be killed."""
    python, script, *arguments = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    start = ["-c", f"import sys, train\n{before}\ntrain.main(sys.argv[1:])"] if before else [script]
    ended = subprocess.run(
        [sys.executable, *start, *arguments, *more],
        cwd=folder,
        env={**os.environ, "HF_DATASETS_CACHE": str(folder / "datasets")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == (-signal.SIGKILL if before else 0), ended.stdout + ended.stderr
    config = parse_config(["--output_dir", _output_dir([*arguments, *more])])
    return folder / config.output_dir


def _output_dir(arguments: list[str]) -> str:
    *_, last = (value for key, value in pairwise(arguments) if key == "--output_dir")
    return last


def kill_in_update(step: int) -> str:
    return (
        "import os, signal; from finetune.run.tracker import Tracker; advance = Tracker.advance\n"
        "def killing_advance(self, step):\n"
        f"    os.kill(os.getpid(), signal.SIGKILL) if step == {step} else advance(self, step)\n"
        "Tracker.advance = killing_advance"
    )


def losses(parts: Parts, examples: list[dict[str, Any]], model: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of N target tokens the nats [N], the mean nats over the vocabulary [N], and N; by the formulas, each
    example alone through the plain model."""
    model = model or parts.model
    nlls, spread = [], []
    for example in examples:
        batch = pack([example]).to(model.device)
        logits = model(input_ids=batch.input_ids).logits[0, batch.target_positions]
        nats = -logits.float().log_softmax(-1).cpu()
        nlls.append(nats[torch.arange(len(nats)), batch.target_ids.cpu()])
        spread.append(nats.mean(-1))
    return torch.cat(nlls), torch.cat(spread), torch.tensor(len(torch.cat(nlls)))


def first_update(config: Config, parts: Parts) -> list[dict[str, Any]]:
    """The examples of the first update, by the unchanged plan."""
    batches = make_plan(config, parts.train_set, True, 0, 1).update(0).micro_batches
    return [parts.train_set.dataset[i] for indices in batches for i in indices]


def gradient(parts: Parts, loss: Tensor) -> dict[str, Tensor]:
    """Of the adapter's weights, by name; the weights have none afterwards."""
    named = {name: p for name, p in parts.model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()))
    return {name: gradient.cpu() for name, gradient in zip(named, gradients, strict=True)}


def norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.stack([g.norm() for g in gradients.values()]).norm())


def lines(run_dir: Path, split: str) -> list[dict[str, Any]]:
    return [entry for entry in read_metrics(run_dir) if entry["split"] == split]


def training_lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from one run to the next."""
    return [
        {key: value for key, value in entry.items() if key not in NOT_THE_TRAINING}
        for entry in read_metrics(run_dir)
    ]


def adapter_bytes(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_document_has_the_five_examples_and_each_passes_the_linter(changed, tmp_path):
    assert len(EXAMPLES) == 5
    for title, example in EXAMPLES.items():
        assert example.diff
        assert example.commands
        folder = changed(title)
        for check in (["check"], ["format", "--check"]):
            asked = [sys.executable, "-m", "ruff", *check, "--no-cache", str(folder)]
            ended = subprocess.run(asked, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, ended.stdout
        shutil.rmtree(folder)


def test_a_hunk_that_does_not_fit_is_refused(tmp_path):
    (tmp_path / "file.py").write_text("a = 1\nb = 2\n")
    fitting = "--- a/file.py\n+++ b/file.py\n@@ -7,2 +7,3 @@\n a = 1\n+c = 3\n b = 2\n"
    with pytest.raises(AssertionError, match="expects"):
        apply_diff(fitting.replace("b = 2", "b = 3"), tmp_path)
    with pytest.raises(AssertionError, match="counts"):
        apply_diff(fitting.replace("7,3", "7,4"), tmp_path)
    apply_diff(fitting, tmp_path)
    assert (tmp_path / "file.py").read_text() == "a = 1\nc = 3\nb = 2\n"


def test_label_smoothing_has_the_gradient_of_its_formula_and_leaves_the_metrics_exact(changed, small):
    (command,) = EXAMPLES[LOSS].commands
    small = [*small, "--lora.lora_dropout", "0"]
    folder = changed(LOSS)
    run_dir = run(command, folder, *small, "--train.max_steps", "1")
    logged = lines(run_dir, "train")[0]
    config = parse_config(small)
    parts = load_parts(config)
    nll, spread, count = losses(parts, first_update(config, parts))
    smoothed = norm(gradient(parts, (0.9 * nll + 0.1 * spread).sum() / count))
    assert logged["grad_norm"] == pytest.approx(smoothed, rel=1e-4)
    assert logged["loss"] == pytest.approx(float(nll.detach().mean()), rel=1e-5)
    with torch.no_grad():
        nll, _, _ = losses(parts, list(parts.eval_set.dataset))
    assert lines(run_dir, "eval")[0]["loss"] == pytest.approx(float(nll.mean()), rel=1e-5)
    nll, _, count = losses(parts, first_update(config, parts))
    assert norm(gradient(parts, nll.sum() / count)) != pytest.approx(smoothed, rel=1e-2)  # it is another
    # Without the flag it would train on the plain loss in silence.
    spec = importlib.util.spec_from_file_location("changed_loss", folder / "finetune" / "model" / "loss.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["changed_loss"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    token_loss = module.TokenLoss(parts.model)
    token_loss.head_mib = 1
    with pytest.raises(ValueError, match=r"--fast\.head false"):
        token_loss(pack(first_update(config, parts)).to(parts.model.device))


def test_lion_makes_its_steps_and_its_state_lies_in_the_checkpoint(changed, small, tmp_path):
    (command,) = EXAMPLES[OPTIMIZER].commands
    small = [*small, "--lora.lora_dropout", "0", "--optim.schedule", "constant", "--optim.warmup_ratio", "0"]
    small += ["--train.max_steps", "4"]
    folder = changed(OPTIMIZER)
    run_dir = run(command, folder, *small)
    first = run_dir / "checkpoints" / "step_000001"
    assert json.loads((first / "state.json").read_text())["optimizer_kind"] == "finetune Lion"
    config = parse_config([*small, "--optim.learning_rate", "1e-4"])
    parts = load_parts(config)
    nll, _, count = losses(parts, first_update(config, parts))
    gradients = gradient(parts, nll.sum() / count)
    clip = min(1.0, config.optim.max_grad_norm / norm(gradients))
    averages, weights = (
        load_file(first / "optimizer.safetensors"),
        load_file(first / "adapter_model.safetensors"),
    )
    assert set(averages) == {f"{number}.exp_avg" for number in range(len(gradients))}
    for number, (name, g) in enumerate(gradients.items()):
        torch.testing.assert_close(averages[f"{number}.exp_avg"], 0.001 * clip * g, rtol=1e-3, atol=1e-9)
        if "lora_B" in name:  # they begin at 0, and A has no gradient yet
            certain = g.abs() > 1e-3 * g.abs().max()
            steps = weights[name.replace(".default", "")]
            torch.testing.assert_close(steps[certain], -1e-4 * g.sign()[certain])
    # What a checkpoint holds of it is all that there is: from one, the same bits.
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    shutil.rmtree(again / "adapter")
    for step in (3, 4):
        shutil.rmtree(again / "checkpoints" / f"step_{step:06d}")
    run(command, folder, *small, "--output_dir", str(again))
    assert adapter_bytes(again) == adapter_bytes(run_dir)
    assert training_lines(again) == training_lines(run_dir)


def test_the_adapters_norm_is_in_tensorboard_and_that_of_its_files(changed, small):
    command, _ = EXAMPLES[METRIC].commands
    run_dir = run(command, changed(METRIC), *small, "--train.max_steps", "4", "--lora.use_rslora", "true")
    events = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0}).Reload()
    shown = events.Scalars("train/adapter_norm")
    assert [event.step for event in shown] == [1, 2, 3, 4]
    norms = []
    for event in shown:
        weights = load_file(run_dir / "checkpoints" / f"step_{event.step:06d}" / "adapter_model.safetensors")
        added = [
            16 / 8**0.5 * weights[name.replace("lora_A", "lora_B")] @ a
            for name, a in weights.items()
            if "lora_A" in name
        ]
        norms.append(float(torch.cat([update.flatten() for update in added]).norm()))
    assert [event.value for event in shown] == pytest.approx(norms, rel=1e-5)
    assert [entry["adapter_norm"] for entry in lines(run_dir, "train")] == pytest.approx(norms, rel=1e-5)
    assert norms[-1] > norms[0]


def test_short_examples_come_first_and_a_killed_run_ends_with_the_same_bits(changed, small, tmp_path):
    (command,) = EXAMPLES[ORDER].commands
    folder = changed(ORDER)
    run_dir = run(command, folder, *small)
    config = parse_config([*small, "--train.num_epochs", "2"])
    examples = load_parts(config).train_set
    orders = [epoch_order(config.train.seed, epoch, len(examples.lengths)).tolist() for epoch in (0, 1)]
    shuffled = [examples.target_counts[orders[0][i : i + 4]].sum() for i in range(0, len(orders[0]), 4)]
    orders[0].sort(key=lambda i: examples.lengths[i])
    expected = [
        int(examples.target_counts[order[i : i + 4]].sum())
        for order in orders
        for i in range(0, len(order), 4)
    ]
    assert expected[: len(shuffled)] != shuffled
    assert [entry["num_target_tokens"] for entry in lines(run_dir, "train")] == expected
    killed = ("--output_dir", str(tmp_path / "killed"))
    run(command, folder, *small, *killed, before=kill_in_update(3))
    assert not (tmp_path / "killed" / "adapter").exists()
    assert fault_of(tmp_path / "killed" / "checkpoints" / "step_000002") is None
    run(command, folder, *small, *killed)
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(run_dir)
    assert training_lines(tmp_path / "killed") == training_lines(run_dir)


def test_a_second_adapter_learns_on_a_frozen_first_one(changed, small, tiny_model_dir):
    first_command, command = EXAMPLES[ADAPTER].commands
    folder = changed(ADAPTER)
    first_dir = folder / "runs" / "quickstart"
    arguments = shlex.split(first_command)[2:]
    assert _output_dir(arguments) == "runs/quickstart"
    # The change is not in this process, and nothing of it is asked for here.
    assert train.main([*arguments, *small, "--output_dir", str(first_dir)]) == 0
    before = {path: path.read_bytes() for path in first_dir.rglob("*") if path.is_file()}
    run_dir = run(command, folder, *small)
    assert {path: path.read_bytes() for path in first_dir.rglob("*") if path.is_file()} == before

    # What is saved is one adapter, of the same shape, which has learned.
    first, second = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first_dir, run_dir)
    )
    assert {name: t.shape for name, t in first.items()} == {name: t.shape for name, t in second.items()}
    assert all(bool(tensor.any()) for name, tensor in second.items() if "lora_B" in name)
    newest = run_dir / "checkpoints" / f"step_{lines(run_dir, 'train')[-1]['step']:06d}"
    assert fault_of(newest) is None

    # Loaded as the document says, both together give the losses of the run before and after.
    loading = EXAMPLES[ADAPTER].python.replace("starter_model_dir()", repr(str(tiny_model_dir)))
    loading = loading.replace('"runs/', f'"{folder}/runs/')
    loaded: dict[str, Any] = {}
    exec(loading, loaded)
    model = loaded["model"]
    parts = load_parts(parse_config(small))
    with torch.no_grad(), dropout_off(model):
        nll, _, _ = losses(parts, list(parts.eval_set.dataset), model)
        model.base_model.set_adapter("below")
        nll_below, _, _ = losses(parts, list(parts.eval_set.dataset), model)
    evaluations = lines(run_dir, "eval")
    assert evaluations[0]["loss"] == pytest.approx(float(nll_below.mean()), rel=1e-5)
    assert evaluations[-1]["loss"] == pytest.approx(float(nll.mean()), rel=1e-5)
    assert evaluations[0]["loss"] != pytest.approx(evaluations[-1]["loss"], rel=1e-4)
