"""`python -m finetune push` against a stand-in of the hub on this machine: the bytes that arrive."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from conftest import ROOT
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.__main__ import main
from finetune.report.model_card import MADE_HERE

TOKEN = "hf_of_a_test"


class Hub(ThreadingHTTPServer):
    """Answers what huggingface_hub asks of the hub when it makes a repository and a commit. Files of 10 kB
    and more go through LFS, as those of 10 MB do there."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.repo: dict[str, Any] = {}
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.validated = ""
        self.exists_publicly = False
        self.refusal: tuple[int, str] | None = None


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_request(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, path))
        # Neither takes a login: a signed address of the storage; a list the library asks for its own ends.
        if not path.startswith(("/blob/", "/api/agent-harnesses")):
            hub.tokens.add(self.headers.get("Authorization"))
        if hub.refusal is not None:
            status, message = hub.refusal
            self.answer({"error": message}, status)
        elif path == "/api/repos/create":
            hub.repo = json.loads(body)
            if hub.exists_publicly:
                self.answer({"error": "You already created this model repo", "url": f"{hub.url}/me/it"}, 409)
            else:
                self.answer({"url": f"{hub.url}/me/it", "id": "1"})
        elif path == "/api/validate-yaml":  # of the card's metadata
            hub.validated = json.loads(body)["content"]
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/models/me/it":
            self.answer({"id": "me/it", "private": not hub.exists_publicly, "siblings": [], "tags": []})
        elif path.startswith("/api/models/me/it/preupload/"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= 10_000 else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif path == "/me/it.git/info/lfs/objects/batch":
            objects = [
                {**file, "actions": {"upload": {"href": f"{hub.url}/blob/{file['oid']}", "header": {}}}}
                for file in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif path.startswith("/blob/"):
            hub.blobs[path.removeprefix("/blob/")] = body
            self.answer({})
        elif path.startswith("/api/models/me/it/commit/"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.blobs[value["oid"]]
            self.answer({"commitUrl": f"{hub.url}/me/it/commit/1", "commitOid": "1"})
        else:
            self.answer({"error": f"nothing at {path}"}, 404)

    do_GET = do_POST = do_PUT = handle_request  # noqa: N815


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage is a service of its own
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def push(run_dir: Path, *options: str, expect: int = 0) -> None:
    assert main(["push", str(run_dir), "--repo", "me/it", *options]) == expect


def test_what_arrives_is_the_adapter_with_its_card_and_no_folder_of_this_machine(
    run_train, tmp_path, tiny_model_dir, hub, capsys
):
    run_dir = run_train(train__max_steps=2)
    adapter = run_dir / "adapter"
    (adapter / ".cache").write_text("of an editor")
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    capsys.readouterr()
    push(run_dir)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.repo == {"name": "it", "organization": "me"}
    assert hub.blobs.keys() == {hashlib.sha256(blob).hexdigest() for blob in hub.blobs.values()}
    assert hub.validated == hub.files["README.md"].decode()
    assert hub.blobs  # the weights went through LFS
    changed = {"README.md", "adapter_config.json", "training_config.yaml"}
    assert hub.files.keys() == before.keys() - {".cache"}
    for name in hub.files.keys() - changed:
        assert hub.files[name] == before[name], name
    assert 'from_pretrained(base, "me/it")' in hub.files["README.md"].decode()
    for name in changed:
        for folder in (tmp_path, tiny_model_dir.parent):
            assert str(folder) not in hub.files[name].decode(), name
    config = yaml.safe_load(hub.files["training_config.yaml"])
    original = yaml.safe_load(before["training_config.yaml"])
    assert config["data"]["path"] == "rows.jsonl"
    assert config["model"]["name_or_path"] == tiny_model_dir.name
    assert {**config["data"], "path": None} == {**original["data"], "path": None}
    assert {key: config[key] for key in ("lora", "train", "optim")} == {
        key: original[key] for key in ("lora", "train", "optim")
    }

    shown = capsys.readouterr().out
    sizes = {row[0]: int(row[1].replace(",", "")) for row in re.findall(r"│ (\S+) +│ +([\d,]+) +│", shown)}
    assert sizes == {name: len(content) for name, content in hub.files.items()}
    assert f"{hub.url}/me/it" in shown.replace("\n", "")

    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name, content in hub.files.items():
        (downloaded / name).write_bytes(content)
    AutoTokenizer.from_pretrained(downloaded)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), downloaded)


def test_a_card_that_a_person_wrote_is_uploaded_as_it_is(run_train, hub):
    run_dir = run_train(train__max_steps=1)
    card = run_dir / "adapter" / "README.md"
    card.write_text(card.read_text().replace(MADE_HERE, "").replace("## Limits", "## My limits"))
    push(run_dir)
    assert hub.files["README.md"] == card.read_bytes()
    card.unlink()
    push(run_dir)
    assert MADE_HERE in hub.files["README.md"].decode()


def test_a_private_repository_is_asked_for_and_a_public_one_is_not_written_to(run_train, hub, capsys):
    run_dir = run_train(train__max_steps=1)
    push(run_dir, "--private")
    assert hub.repo["visibility"] == "private"
    assert hub.files
    hub.files.clear()
    hub.exists_publicly = True
    push(run_dir, "--private", expect=2)
    assert "me/it already exists and is public: nothing was uploaded" in capsys.readouterr().err
    assert hub.files == {}
    push(run_dir)  # without --private it is where this adapter belongs
    assert hub.files


def test_what_cannot_be_uploaded_ends_in_one_line(run_train, hub, monkeypatch, capsys):
    run_dir = run_train(train__max_steps=2, checkpoint__every_steps=1)

    def error_of(*argv: str) -> str:
        assert main(["push", *argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    run, repo = str(run_dir), ("--repo", "me/it")
    assert "has no owner" in error_of(run, "--repo", "it")
    assert "--repo me/it!" in error_of(run, "--repo", "me/it!")
    assert "is a checkpoint" in error_of(str(run_dir / "checkpoints" / "step_000001"), *repo)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in error_of(run, *repo)
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        assert "run `hf auth login`, or set HF_TOKEN" in error_of(run, *repo)
    assert hub.requests == []
    hub.refusal = (403, "You don't have the rights to create a model under the namespace me")
    assert "You don't have the rights" in error_of(run, *repo)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
        assert "me/it could not be uploaded to http://127.0.0.1:9: " in error_of(run, *repo)
    assert hub.files == {}


def test_as_a_program_it_takes_the_hub_and_the_login_from_the_environment(run_train, hub, tmp_path):
    run_dir = run_train(train__max_steps=1)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_stored")
    environment = {
        key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_HUB_OFFLINE")
    }
    environment |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "finetune", "push", str(run_dir), "--repo", "me/it"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert hub.tokens == {"Bearer hf_stored"}
    assert (
        hub.files["adapter_model.safetensors"] == (run_dir / "adapter/adapter_model.safetensors").read_bytes()
    )
    assert "hf_stored" not in ended.stdout + ended.stderr
