"""The figures that the notebooks behind the presets published, for runs that use the same rows."""

from pathlib import Path
from typing import Any, NamedTuple

from finetune.config import Config, flatten, paths_of
from finetune.config_parsing import config_to_dict


class Published(NamedTuple):
    """What a notebook reports of its last evaluation, with the loss on every token.

    It used the data set named `data`, and a run with the configuration `keys` uses the same rows and split.
    """

    data: str
    keys: dict[str, Any]
    metrics: dict[str, float]


PUBLISHED_MODEL = "Qwen2-0.5B-Instruct"
_SAME_ROWS = {
    "data.sample_seed": 42,
    "data.split_seed": 42,
    "data.split_by": "row",
    "data.eval_fraction": 0.2,
    "data.max_length": 512,
}
_FINANCE_PROMPT = "You are a Professional financial assistant. Provide accurate financial advice"
PUBLICATIONS = [
    Published(
        "finance-alpaca",
        {**_SAME_ROWS, "data.num_samples": 6000, "data.system_prompt": _FINANCE_PROMPT},
        {"loss": 1.788, "entropy": 1.799, "mean_token_accuracy": 0.612},
    ),
    Published(
        "alpaca",
        {**_SAME_ROWS, "data.num_samples": 5000, "data.system_prompt": None},
        {"loss": 1.3833, "entropy": 1.3761, "mean_token_accuracy": 0.6682},
    ),
]


def find_published(config: Config) -> Published | None:
    """The notebook whose model, rows and split the run shares, whatever its other settings; None if none."""
    paths = paths_of(config.data.path)
    if len(paths) != 1 or Path(config.model.name_or_path).name != PUBLISHED_MODEL:
        return None
    data, keys = Path(paths[0]).stem.lower().replace("_", "-"), flatten(config_to_dict(config))
    matching = (p for p in PUBLICATIONS if p.data == data and p.keys.items() <= keys.items())
    return next(matching, None)


def comparable_metrics(config: Config) -> dict[str, float]:
    """The published metrics that can be compared with the run's: none unless it trains on every token."""
    published = find_published(config)
    return published.metrics if published is not None and config.data.train_on == "all" else {}


def published_note(config: Config) -> str:
    """What to say about the published figures; an empty string where there are none."""
    published = find_published(config)
    if published is None:
        return ""
    metrics = published.metrics
    statement = (
        f"The notebook that this job comes from gives, after its last epoch, a validation loss of "
        f"{metrics['loss']}, an entropy of {metrics['entropy']} and a token accuracy of "
        f"{metrics['mean_token_accuracy']}, with the loss on every token"
    )
    if config.data.train_on == "all":
        return (
            f"{statement}, as here: the dashed lines. "
            "Its entropy and accuracy are means over batches, not tokens."
        )
    return (
        f"{statement}. This run's loss is on the answers alone, so the two cannot be compared, and they are "
        "not drawn; --data.train_on all trains as the notebook did."
    )
