"""Base models by their name at the hub, fetched from a stand-in for it on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny_run import write_data, write_model

from adazeta import hub_models
from adazeta.base_models import model_folder
from adazeta.errors import UserError
from adazeta.hub_models import hub_folder
from adazeta.model_card import hub_name

COMMIT = "a" * 40
GATED, BARE = "owner/gated", "owner/bare"


class Hub(BaseHTTPRequestHandler):
    """What ``huggingface_hub`` asks a hub for: the list of files of a repository, and the files."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        server, path = self.server, self.path.partition("?")[0].lstrip("/")
        server.asked.append(path)
        owner = path.removeprefix("api/models/")
        name = next((name for name in server.repositories if owner.startswith(f"{name}/") or owner == name), None)
        if name is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if name == GATED:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        files, rest = server.repositories[name], owner.removeprefix(name).strip("/")
        if path.startswith("api/models/"):
            if rest and "main" not in rest and COMMIT not in rest:
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            if rest.startswith("tree/"):
                tree = [
                    {"type": "file", "path": f, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for f, c in files.items()
                ]
                return self._send(200, json.dumps(tree).encode(), {}, body)
            found = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files], "tags": []}
            return self._send(200, json.dumps(found).encode(), {}, body)
        content = files.get(rest.split("/", 2)[2])
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT}, body)

    def _send(self, status, content, headers, body):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    base = tmp_path_factory.mktemp("hub") / "base"
    write_model(base)
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    server.repositories = {
        "owner/tiny": {**files, "modeling.py": b"raise SystemExit", "tf_model.h5": b"x", "onnx/model.onnx": b"x"},
        GATED: {},
        BARE: {"README.md": b"#"},
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """The stand-in, for calls in this process."""
    address = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_models, "kept_offline", False)  # a command in this process may have set it
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return hub


def ran(hub, home, *arguments, **environment):
    """Run the command line in a process that takes the stand-in for the hub."""
    code = "import sys; from adazeta.cli import main; raise SystemExit(main(sys.argv[1:]))"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HTTP", "http"))}
    address = f"http://127.0.0.1:{hub.server_port}"
    environment = {**kept, "HF_ENDPOINT": address, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_model_is_fetched_once_and_serves_run_and_prediction(hub, tmp_path):
    write_data(tmp_path / "data.jsonl")
    run, home, hub.asked = tmp_path / "run", tmp_path / "home", []
    small = ["--steps", 1, "--batch-size", 2, "--queries", 1, "--rank", 1, "--bottleneck", 4, "--layers", 0]
    small += ["--dtype", "float32", "--gemm", "plain", "--threads", 1]
    done = ran(
        hub, home, "train", "--model", "hub:owner/tiny", "--data", tmp_path / "data.jsonl", "--output", run, *small
    )
    assert done.returncode == 0 and "fetching hub:owner/tiny" in done.stderr, done.stderr
    fetched = {path.name for path in home.rglob("snapshots/*/*")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not fetched & {"modeling.py", "tf_model.h5", "model.onnx"}
    assert json.loads((run / "adazeta.json").read_text())["base_model"] == "hub:owner/tiny"
    hub.asked = []
    done = ran(hub, home, "predict", run, "a text", "--json")
    assert done.returncode == 0 and "probabilities" in done.stdout and hub.asked == [], done.stderr
    done = ran(hub, tmp_path / "elsewhere", "predict", run, "a text", "--json")
    assert done.returncode == 0 and "fetching hub:owner/tiny" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "model, offline, message",
    [
        ("hub:owner/nobody", False, "hub:owner/nobody cannot be had from the hub: there is no such repository"),
        ("hub:owner/tiny@none", False, "hub:owner/tiny@none cannot be had from the hub: there is no such revision"),
        (f"hub:{GATED}", False, "its owner lets in who asks at its page"),
        (f"hub:{BARE}", False, "has no config.json or no weights"),
        ("hub:owner/tiny", True, "it is not in the cache, and the hub cannot be reached, and HF_HUB_OFF"),
    ],
)
def test_each_wrong_turn_is_one_line(here, monkeypatch, model, offline, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline else "")
    with pytest.raises(UserError) as error:
        model_folder(model)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model-00001-of-00002.safetensors"])
def test_older_repositories_and_weights_in_parts(here, weights):
    files = {"config.json": b"{}", weights: b"weights", "README.md": b"#"}
    if weights.startswith("model-"):
        second = "model-00002-of-00002.safetensors"
        index = {"weight_map": {"a": weights, "b": second}}
        files |= {second: b"more", "model.safetensors.index.json": json.dumps(index).encode()}
    here.repositories["owner/other"] = files
    folder = model_folder("hub:owner/other")
    assert {path.name for path in folder.iterdir()} == set(files) - {"README.md"}
    here.asked = []
    assert model_folder("hub:owner/other") == folder and here.asked == []


def test_names():
    with pytest.raises(UserError, match=r"expected a model of the hub as hub:OWNER/NAME\[@REVISION\], got 'hub:tiny'"):
        hub_folder("hub:tiny")
    with pytest.raises(UserError, match=r"no such model folder: owner/tiny; .* \(hub:owner/tiny\?\)"):
        model_folder("owner/tiny")
    assert hub_name("hub:owner/tiny@main") == "owner/tiny" and not Path("owner").exists()
