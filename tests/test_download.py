"""A local server plays the hub and the release page: whole files, wrong hashes, cut connections, 401, 404, no
answer."""
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT

from ldm import encoder, weights
from ldm.app import Fail
from ldm.weights import hub_file

DATA = bytes(range(256)) * 100_000          # 26 MB: half of it is more than one chunk of the hub's client
SHA256 = hashlib.sha256(DATA).hexdigest()
TOKEN = "hf_secretsecretsecretsecretsecret"

class Server(BaseHTTPRequestHandler):
    """The behaviour is the second part of the path: /o/cut/resolve/main/file."""
    protocol_version = "HTTP/1.1"
    seen = []

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        kind, range_ = self.path.split("/")[2], self.headers.get("Range")
        if kind == "models":                # /api/models/o/cut: the list of its files
            files = [] if "missing" in self.path else [{"rfilename": "file.bin", "size": len(DATA)}]
            return self.answer(200, json.dumps({"id": "o/x", "siblings": files}).encode(), {})
        self.seen.append((self.command, kind, range_, self.headers.get("Authorization")))
        error = {"gated": (401, "GatedRepo"), "missing": (404, "EntryNotFound"),
                 "broken": (503, "")}.get(kind)
        if error:
            return self.answer(error[0], b"", {"X-Error-Code": error[1]})
        if kind == "slow" and self.command == "GET":
            time.sleep(4)
        start = int(range_.removeprefix("bytes=").split("-")[0]) if range_ else 0
        headers = {"ETag": f'"{SHA256}"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        if range_:
            headers["Content-Range"] = f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
        cut = self.command == "GET" and kind == "cut" and not range_
        self.answer(206 if range_ else 200, DATA[start:], headers, cut=len(DATA) // 2 if cut else None)

    def answer(self, status, body, headers, cut=None):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            try:
                self.wfile.write(body[:cut])
            except OSError:
                pass
        if cut:
            self.close_connection = True

@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()

# A client in a process of its own. Its pauses between attempts, 23 s of them, are omitted.
HUB = """
import json, os, sys, time
time.sleep = lambda seconds: None
sys.path.insert(0, {root!r})
from huggingface_hub import close_session
from ldm.app import Fail
from ldm.weights import SHA256, hub_file
for name, sha256, environment in {cases!r}:
    os.environ.update(environment)
    close_session()                         # the next one reads the environment again
    try:
        SHA256["o/" + name + "/file.bin"] = sha256
        result = len(hub_file("o/" + name, ["file.bin"]).read_bytes())
    except Fail as problem:
        result = str(problem)
    print("RESULT", json.dumps(result))
"""

def hub(server, cases, home):
    """Ask for a file of each repository -> the child's stderr; the length of each file, or the refusal."""
    environment = {"HF_ENDPOINT": server, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN,
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
    ran = subprocess.run([sys.executable, "-c", HUB.format(root=str(ROOT), cases=cases)], capture_output=True,
                         text=True, env=os.environ | environment, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert TOKEN not in ran.stdout + ran.stderr
    lines = [line.removeprefix("RESULT ") for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    return ran.stderr, [json.loads(line) for line in lines]

NOWHERE = dict.fromkeys(("HTTP_PROXY", "http_proxy"), "http://127.0.0.1:9") | dict(NO_PROXY="", no_proxy="")

def test_the_hub_as_it_should_be_and_as_it_may_be(server, tmp_path):
    Server.seen.clear()
    cases = [("ok", SHA256, {}), ("cut", SHA256, {}), ("wrong", "0" * 64, {}), ("gated", None, {}),
             ("missing", None, {}), ("ok", SHA256, {}), ("broken", None, {}), ("proxy", None, NOWHERE)]
    text, (ok, cut, wrong, gated, missing, again, broken, proxy) = hub(server, cases, tmp_path)
    assert ok == cut == again == len(DATA)
    # named and sized, whatever stdout is
    assert "downloading file.bin of o/ok (0.03 GB)" in text
    # resumed, not begun again
    assert any(kind == "cut" and range_ for _, kind, range_, _ in Server.seen)
    assert "sha256" in wrong and "removed" in wrong
    assert "request access" in gated and "https://huggingface.co/o/gated" in gated
    assert "missing has no file.bin; check the name" in missing
    assert "try again later" in broken
    assert "cannot get file.bin" in proxy and "connection, HTTPS_PROXY" in proxy
    assert "request access" not in broken + proxy
    files = [path.relative_to(tmp_path).parts[1] for path in tmp_path.rglob("file.bin")]
    assert sorted(files) == ["models--o--cut", "models--o--ok"]
    assert not list((tmp_path / "hub/models--o--wrong/blobs").glob("*"))
    # the second time from the cache
    assert sum(command == "GET" and kind == "ok" for command, kind, *_ in Server.seen) == 1
    # sent, and nowhere printed
    asked = {name for name, *_ in cases}
    assert {auth for _, kind, _, auth in Server.seen if kind in asked} == {f"Bearer {TOKEN}"}

def test_a_hub_that_must_not_be_asked_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Fail, match="cannot get file.bin.*HF_HUB_OFFLINE.*local path") as problem:
        hub_file("o/ok", ["file.bin"])
    assert "request access" not in str(problem.value)

@pytest.mark.parametrize("problem, words", [
    (OSError(28, "No space left on device"), "HF_HOME has space"),
    (PermissionError(13, "denied"), "may be written to"),
    (ImportError("Using SOCKS proxy, but the 'socksio' package is not installed"), "HTTPS_PROXY"),
    (ConnectionError("refused"), "the connection")])
def test_a_failed_download_names_its_remedy(problem, words, monkeypatch):
    def fail(*args):
        raise problem
    monkeypatch.setattr("huggingface_hub.model_info", fail)
    with pytest.raises(Fail, match=words) as found:
        hub_file("nobody/nothing", ["x.bin"])
    assert "request access" not in str(found.value) and "local path" in str(found.value)

@pytest.mark.slow
def test_a_hub_that_is_slow_ends_in_one_line(server, tmp_path):
    _, [slow] = hub(server, [("slow", SHA256, {})], tmp_path)
    assert "cannot get file.bin" in slow and not list(tmp_path.rglob("file.bin"))

@pytest.mark.parametrize("kind, hash8, words", [("ok", SHA256[:8], None), ("ok", "00000000", "hash"),
                                                ("cut", SHA256[:8], "hash"), ("missing", SHA256[:8], "404")])
def test_the_inception_weights_are_checked_and_appear_whole_or_not_at_all(
        kind, hash8, words, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encoder, "INCEPTION_URL", f"{server}/o/{kind}/pt_inception-2015-12-05-{hash8}.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(Fail) as problem:
        encoder.Inception()
    [said] = [line for line in capsys.readouterr().err.splitlines() if "downloading" in line]
    assert str(tmp_path) in said and "96 MB" in said
    files = list((tmp_path / "checkpoints").iterdir())
    if words is None:           # whole, but these bytes are no weights
        assert "not a plain file of tensors" in str(problem.value)
        assert [f.read_bytes() for f in files] == [DATA]
    else:
        for text in ("cannot be downloaded", words, "--inception"):
            assert text in str(problem.value)
        assert files == []

def test_float16_is_taken_of_a_repository_and_the_full_file_of_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "hub_file", lambda repository, names: names[0])
    names = [f"unet/x{kind}.safetensors" for kind in ("", ".fp16", ".non_ema")]
    assert weights.find_file("--sd15", "owner/name", names) == "unet/x.fp16.safetensors"
    (tmp_path / "unet").mkdir()
    for name in names:
        (tmp_path / name).touch()
    assert weights.find_file("--sd15", str(tmp_path), names) == tmp_path / names[0]
    with pytest.raises(Fail, match="--sd15 /no: no file, folder .* or Hugging Face repository; pass one"):
        weights.find_file("--sd15", "/no", names)
