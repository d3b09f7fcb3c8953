"""`python -m finetune replay RUN`: repeat the update that had a non-finite number, and show it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from finetune.config import described_rows
from finetune.config_parsing import parse_config
from finetune.data.plan import make_plan
from finetune.data.splits import fingerprint_of
from finetune.model.fast_paths import choose_fast_paths
from finetune.run.bad_update import RECORD, STATE_BEFORE, examine_update, read_bad_update
from finetune.run.checkpoint import fault_of, load_adapter
from finetune.run.folder import CONFIG, read_environment
from finetune.runtime.cli import CommandParser
from finetune.runtime.console import console, say
from finetune.training.setup import load_parts


def command(argv: Sequence[str]) -> int:
    """Returns 0 if the update gave the recorded numbers again, else 1.

    Raises:
        ValueError: the run has no bad update, its files are damaged, or its rows have changed.
    """
    parser = CommandParser(prog="python -m finetune replay", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder, which holds bad_update.json")
    run_dir: Path = parser.parse_args(argv).run
    recorded = read_bad_update(run_dir)
    repeated = repeat_bad_update(run_dir, recorded)
    show_update(repeated)
    same = json.dumps(repeated) == json.dumps(recorded)
    say("The same numbers as in the run." if same else f"These are not the numbers in {run_dir / RECORD}.")
    return 0 if same else 1


def repeat_bad_update(run_dir: Path, recorded: dict[str, Any]) -> dict[str, Any]:
    """Repeat the recorded update from the state before it, and return its `examine_update`."""
    if fault := fault_of(run_dir / STATE_BEFORE):
        raise ValueError(f"{run_dir / STATE_BEFORE} is not an intact checkpoint: {fault}")
    config = parse_config(["--config", str(run_dir / CONFIG)])
    environment = read_environment(run_dir)
    parts = load_parts(config, run_dir / STATE_BEFORE)
    train_set, token_loss = parts.train_set, parts.token_loss
    if environment["data"] != fingerprint_of(train_set, parts.eval_set):
        rows = described_rows(config)
        raise ValueError(f"the rows of {rows} are not those that the run was trained and evaluated on")
    fast_paths = choose_fast_paths(config, parts.accelerator, token_loss, train_set, environment["int8"])
    load_adapter(run_dir / STATE_BEFORE, parts.model)  # not earlier: its weights may be out of range
    layout = fast_paths.packed, 0, environment["num_processes"], environment["token_budget"]
    plan = make_plan(config, train_set, *layout)
    step = recorded["update"] - 1
    return examine_update(parts.accelerator, token_loss, plan, step, train_set.dataset, parts.tokenizer)


def show_update(record: dict[str, Any]) -> None:
    """Print the examples of an update, and the tokens with the largest loss of each."""
    target_tokens = f"{record['num_target_tokens']} target tokens"
    title = f"Update {record['update']}, epoch {record['epoch']}: loss {record['loss']} over {target_tokens}"
    table = Table("row", "tokens", "nats", "worst tokens", title=title, title_justify="left")
    for batch in record["micro_batches"]:
        for example in batch["examples"]:
            worst = sorted(example["targets"], key=lambda target: _badness(target["nll"]), reverse=True)[:5]
            words = ", ".join(f"{target['token']!r} {_short(target['nll'])}" for target in worst)
            tokens = str(example["num_tokens"])
            table.add_row(str(example["row_number"]), tokens, _short(example["nll"]), Text(words))
    console.print(table)
    for batch in record["micro_batches"]:
        bad = batch["parameters_with_bad_gradient"]
        if bad:
            rows = ", ".join(str(example["row_number"]) for example in batch["examples"])
            say(f"rows {rows}: the gradient of {len(bad)} parameters is not finite, such as {bad[0]}")


def _badness(nll: float | str) -> float:
    return float("inf") if isinstance(nll, str) else nll


def _short(nll: float | str) -> str:
    return nll if isinstance(nll, str) else f"{nll:.3f}"
