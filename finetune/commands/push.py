"""`python -m finetune push RUN --repo OWNER/NAME`: upload an adapter and its card to the Hugging Face Hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub.utils._validators import validate_repo_id
from rich.table import Table
from rich.text import Text

from finetune.model.given_adapter import ADAPTER_CONFIG, MANIFEST
from finetune.model.load import hub_name
from finetune.report.model_card import MADE_HERE, model_card, without_folder
from finetune.run.adapter import Trained, find_trained
from finetune.run.checkpoint import CARD, TRAINING_CONFIG
from finetune.runtime.cli import CommandParser
from finetune.runtime.console import console, say

CHANGED = "without this machine's folders"


def command(argv: Any) -> None:
    """Show what is uploaded, and upload it as one commit with the user's login.

    Raises:
        ValueError: no login, no network, or the hub refuses; the run has no result yet; or --private is
            given for a repository that is public.
    """
    parser = CommandParser(prog="python -m finetune push", description=__doc__)
    parser.add_argument("trained", metavar="RUN", type=Path, help="a finished run's folder, or an adapter")
    parser.add_argument("--repo", metavar="OWNER/NAME", required=True, help="created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    arguments = parser.parse_args(argv)
    repo: str = arguments.repo
    _check_repo_name(repo)
    if huggingface_hub.constants.is_offline_mode():
        raise ValueError("HF_HUB_OFFLINE is set: nothing is uploaded; unset it to push")
    if huggingface_hub.get_token() is None:
        raise ValueError("there is no login for the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")
    trained = find_trained(arguments.trained)
    if (trained.adapter / MANIFEST).exists():
        raise ValueError(f"{trained.adapter} is a checkpoint: let the run finish, and push its result")
    contents = files_to_upload(trained, repo)
    api = huggingface_hub.HfApi()
    show(trained.adapter, contents, f"{api.endpoint}/{repo}")
    url = _upload(api, repo, arguments.private, contents)
    say(f"uploaded     {url}")


def _check_repo_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ValueError(f"--repo {repo}: {error}") from error
    if "/" not in repo:
        raise ValueError(f"--repo {repo} has no owner: name it as OWNER/NAME")


def files_to_upload(trained: Trained, repo: str) -> dict[str, Path | bytes]:
    """Return the files to upload by name: those of the adapter's folder, or content that replaces them.

    The card is written again, unless its first comment is gone: then a person wrote it. The base model and
    the paths of the configuration lose this machine's folders.
    """
    folder = trained.adapter
    paths = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    contents: dict[str, Path | bytes] = {
        name: path for name, path in paths.items() if not name.startswith(".")
    }
    own_card = CARD in paths and MADE_HERE not in paths[CARD].read_text(encoding="utf-8")
    if trained.run_dir is not None and not own_card:
        contents[CARD] = model_card(trained.run_dir, trained.config, repo).encode()
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = hub_name(trained.config.model) or without_folder(str(settings["base_model_name_or_path"]))
    if settings["base_model_name_or_path"] != base:
        settings["base_model_name_or_path"] = base
        contents[ADAPTER_CONFIG] = json.dumps(settings, indent=2).encode()
    if TRAINING_CONFIG in contents:
        config = yaml.safe_load(paths[TRAINING_CONFIG].read_text(encoding="utf-8"))
        shortened = _without_folders(config)
        if shortened != config:
            text = yaml.safe_dump(shortened, sort_keys=False, allow_unicode=True)
            contents[TRAINING_CONFIG] = text.encode()
    return contents


def _without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the last part of each path in it alone."""
    holds_paths = {
        "data": ("path", "eval_path", "chat_template"),
        "model": ("name_or_path", "adapter"),
        "eval": ("sets",),
    }
    return {
        section: {
            key: _shortened(value) if key in holds_paths.get(section, ()) else value
            for key, value in keys.items()
        }
        for section, keys in config.items()
    }


def _shortened(value: Any) -> Any:
    """A path, several of them, eval sets by name, or sources with a path, without folders."""
    if isinstance(value, str):
        return without_folder(value)
    if isinstance(value, list):
        return [_shortened(part) for part in value]
    if isinstance(value, dict) and "path" in value:
        return {**value, "path": _shortened(value["path"])}
    if isinstance(value, dict):
        return {name: _shortened(part) for name, part in value.items()}
    return value


def show(folder: Path, contents: Mapping[str, Path | bytes], url: str) -> None:
    """Print the files to upload and their destination."""
    say(f"From {folder} to {url}")  # not the table's title, which would be folded inside a path
    table = Table("file", "bytes", "")
    for name, content in contents.items():
        remark = "written again" if name == CARD else CHANGED
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        table.add_row(Text(name), f"{size:,}", remark if isinstance(content, bytes) else "")
    console.print(table)


def _upload(
    api: huggingface_hub.HfApi, repo: str, private: bool, contents: Mapping[str, Path | bytes]
) -> str:
    operations = [
        huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in contents.items()
    ]
    try:
        api.create_repo(repo, private=True if private else None, exist_ok=True)
        is_public = private and not api.repo_info(repo).private
        if not is_public:
            api.create_commit(repo, operations, commit_message="Upload LoRA adapter")
    except Exception as error:  # no network, no write access, an expired token: of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{repo} could not be uploaded to {api.endpoint}: {reason[:400]}") from error
    if is_public:
        raise ValueError(f"{repo} already exists and is public: nothing was uploaded; make it private first")
    return f"{api.endpoint}/{repo}"
