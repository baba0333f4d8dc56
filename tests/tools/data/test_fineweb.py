"""tools/data/fineweb.py, run as a user runs it, against a stand-in for the Hugging Face Hub on loopback."""

import hashlib
import json
import os
import re
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest

from tests import tiny
from tests.commands import fails
from tests.forked import Process
from tools.common.cli import ROOT
from tools.data.fineweb import (
    PUBLISHED,
    RunError,
    check_counts,
    choose_shards,
    choose_tokenizer,
    main,
    parse_arguments,
    state_totals,
)

pytestmark = pytest.mark.slow

REPO, COMMIT = "somebody/parameter-golf", "0123456789abcdef0123456789abcdef01234567"
FOLDER = "datasets/fineweb10B_sp1024"
TOKENIZER = "tokenizers/fineweb_1024_bpe.model"


def shard(tokens: int, magic: int = 20240520) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, 1, tokens
    return header.tobytes() + (np.arange(tokens) % 1024).astype("<u2").tobytes()


class Hub(ThreadingHTTPServer):
    """Serves `files` (bytes by path below datasets/) the way huggingface_hub asks for them.

    `sizes` overrides what the tree lists. A GET of a path in `stall` sends half, sets `stalled` and waits for
    `release`. `gets` records the paths of the files sent.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {
            "manifest.json": json.dumps(
                {
                    "datasets": [{"name": "fineweb10B_sp1024", "tokenizer_name": "bpe"}],
                    "tokenizers": [{"name": "bpe", "model_path": TOKENIZER}],
                }
            ).encode(),
            TOKENIZER: tiny.tokenizer_of(vocab_size=1024),
            "tokenizers/other.model": b"another",
            f"{FOLDER}/fineweb_train_000000.bin": shard(1000),
            f"{FOLDER}/fineweb_train_000001.bin": shard(1001),
            f"{FOLDER}/fineweb_train_000002.bin": shard(1002),
            f"{FOLDER}/fineweb_val_000000.bin": shard(2000),
            f"{FOLDER}/fineweb_val_000001.bin": shard(500),
            "datasets/fineweb10B_sp4096/fineweb_train_000000.bin": shard(9),
        }
        self.sizes, self.stall, self.gets = {}, set(), []
        self.stalled, self.release = threading.Event(), threading.Event()
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self) -> list[str]:
        """Names of the shards and tokenizers sent since the last call."""
        sent, self.gets = [path.rpartition("/")[2] for path in self.gets if path != "manifest.json"], []
        return sent


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status: int, body: bytes, headers: dict, length: int | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body) if length is None else length, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        api, resolve = f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/{COMMIT}/datasets/"
        if path == f"{api}/revision/main":
            self.reply(200, json.dumps({"id": REPO, "sha": COMMIT}).encode(), {})
        elif path == f"{api}/tree/{COMMIT}/datasets":
            self.send_tree(url)
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.server.files:
            self.send_file(path.removeprefix(resolve))
        else:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})

    def send_tree(self, url):
        """Three entries a page, the next page in the Link header."""
        query, hub = parse_qs(url.query), self.server
        assert query["recursive"][0].lower() == "true"
        entries = [{"type": "directory", "path": f"datasets/{FOLDER}", "oid": "0", "size": 0}]
        entries += [
            {"type": "file", "path": f"datasets/{path}", "oid": "0", "size": hub.sizes.get(path, len(data))}
            for path, data in hub.files.items()
        ]
        start = int(query.get("cursor", ["0"])[0])
        more = f'<{hub.endpoint}{url.path}?recursive=True&cursor={start + 3}>; rel="next"'
        headers = {"Link": more} if start + 3 < len(entries) else {}
        self.reply(200, json.dumps(entries[start : start + 3]).encode(), headers)

    def send_file(self, path):
        hub, data = self.server, self.server.files[path]
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        status, body, wanted = 200, data, self.headers.get("Range")
        if wanted:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            status, body = 206, data[start:]
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET":
            hub.gets.append(path)
            if path in hub.stall:
                self.reply(status, body[: len(body) // 2], headers, length=len(body))
                hub.stalled.set()
                hub.release.wait(30)
                self.close_connection = True
                return
        self.reply(status, body, headers)


@pytest.fixture
def hub():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.release.set()
        server.shutdown()


def start(endpoint: str, folder: Path, *options: str) -> Process:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return Process(["-m", "tools.data.fineweb", "--repo", REPO, *options], folder, env)


def fetch(hub: Hub, folder: Path, *options: str) -> str:
    process = start(hub.endpoint, folder, *options)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    return out


def error_line(endpoint: str, folder: Path, *options: str) -> str:
    process = start(endpoint, folder, *options)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0, out
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def names(split: str, count: int) -> list[str]:
    return [f"{FOLDER}/fineweb_{split}_{i:06d}.bin" for i in range(count)]


def test_fetches_once_into_the_default_layout_then_adds_shards_and_repairs_damage(hub, tmp_path):
    data = tmp_path / "data"
    wanted = [TOKENIZER, *names("val", 2), *names("train", 2)]
    out = fetch(hub, tmp_path, "--train-shards", "2")
    stated = {f"{FOLDER}/fineweb_val.json": (data / FOLDER / "fineweb_val.json").read_bytes()}
    totals = json.loads(*stated.values())
    assert totals["tokens"] == 2500 and 5000 < totals["bytes"] < 10_000
    assert f"2,500 tokens of validation, {totals['bytes'] / 1e6:.2f} MB of text" in out
    assert files_in(data) == {name: hub.files[name] for name in wanted} | stated
    assert len(hub.downloads()) == 5
    progress = re.findall(r"^\[(\d)/5\] \S+ [\d.]+ MB, [\d.]+ MB/s, \d+ s left$", out, re.M)
    assert progress == ["1", "2", "3", "4", "5"]
    command = out.splitlines()[-1]
    assert command.startswith(
        f"DATA_PATH=data/{FOLDER} TOKENIZER_PATH=data/{TOKENIZER} VOCAB_SIZE=1024 torchrun "
    )
    assert (tmp_path / command.split()[-1]).resolve() == ROOT / "train_gpt.py"

    assert fetch(hub, tmp_path, "--train-shards", "2").splitlines()[-1] == command
    assert hub.downloads() == []

    (data / names("train", 1)[0]).write_bytes(shard(1000)[:-1])
    (data / names("val", 1)[0]).write_bytes(shard(2000, magic=7))
    out = fetch(hub, tmp_path)
    assert "80 training shards asked for, 3 published: taking all" in out
    assert hub.downloads() == [
        "fineweb_val_000000.bin",
        "fineweb_train_000000.bin",
        "fineweb_train_000002.bin",
    ]
    assert files_in(data) == {name: hub.files[name] for name in [*wanted, names("train", 3)[2]]} | stated


def test_what_is_not_the_challenges_text_is_refused(hub, tmp_path):
    data = tmp_path / "data"
    fetch(hub, tmp_path, "--train-shards", "0")
    known = (data / FOLDER, data / TOKENIZER, "sp1024")
    assert state_totals(*known, published=False).startswith("2,500 tokens of validation, 0.0")
    with pytest.raises(RunError, match="FineWeb has 62,021,633 tokens, 151.08 MB: fetch it again"):
        state_totals(*known, published=True)


def test_a_killed_run_leaves_nothing_half_written_and_the_next_one_finishes(hub, tmp_path):
    first, second = names("val", 2)
    hub.stall = {second}
    process = start(hub.endpoint, tmp_path, "--train-shards", "0")
    assert hub.stalled.wait(60)
    process.kill()
    process.communicate()
    present = {name: data for name, data in files_in(tmp_path / "data").items() if "/.download/" not in name}
    assert present == {first: hub.files[first]}

    hub.release.set()
    hub.stall.clear()
    hub.downloads()
    fetch(hub, tmp_path, "--train-shards", "0")
    assert hub.downloads() == ["fineweb_val_000001.bin", "fineweb_1024_bpe.model"]
    found = files_in(tmp_path / "data")
    assert found.pop(f"{FOLDER}/fineweb_val.json")
    assert found == {name: hub.files[name] for name in (first, second, TOKENIZER)}


def test_a_damaged_published_shard_is_tried_twice_and_never_gets_its_final_name(hub, tmp_path):
    name = names("train", 1)[0]
    hub.files[name] = shard(1000, magic=7)
    error = error_line(hub.endpoint, tmp_path, "--out", "elsewhere")
    assert "fineweb_train_000000.bin" in error and hub.endpoint in error and "20240520" in error
    assert hub.downloads().count("fineweb_train_000000.bin") == 2
    assert sorted(path.name for path in (tmp_path / "elsewhere" / FOLDER).glob("*.bin")) == [
        "fineweb_val_000000.bin",
        "fineweb_val_000001.bin",
    ]


def test_what_cannot_be_downloaded_is_refused_in_one_line_before_starting(hub, tmp_path):
    assert "'sp512'; available: sp1024, sp4096\n" in error_line(hub.endpoint, tmp_path, "--variant", "sp512")
    hub.sizes[names("val", 1)[0]] = 10**18
    assert "1000000000.00 GB to download" in error_line(hub.endpoint, tmp_path)
    error = error_line(hub.endpoint, tmp_path, "--revision", "nowhere")
    assert hub.endpoint in error and "404" in error
    assert hub.downloads() == []


def test_an_unreachable_hub_is_one_line_that_names_it(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        error = error_line(endpoint, tmp_path)
    assert endpoint in error and "running again resumes" in error


def test_a_missing_huggingface_hub_is_one_line_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert fails(main).endswith("; pip install -r tools/requirements.txt")


def test_a_variant_without_validation_shards_is_refused():
    with pytest.raises(RunError, match="no validation shard"):
        choose_shards([f"datasets/{name}" for name in names("train", 3)], "sp1024")


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "not JSON",
        "[]",
        '{"datasets": {"fineweb10B_sp1024": 3}}',
        '{"datasets": [{"name": "fineweb10B_sp1024", "tokenizer": ["x.model"]}]}',
    ],
)
def test_without_a_usable_manifest_the_file_name_tells_the_tokenizer(manifest):
    assert choose_tokenizer(["a/other.model", f"a/{TOKENIZER}"], "sp1024", manifest) == f"a/{TOKENIZER}"


def test_the_manifest_decides_the_tokenizer():
    manifest = '{"datasets": [{"name": "fineweb10B_sp1024", "files": {"model": "t/other.model"}}]}'
    assert choose_tokenizer(["a/other.model", f"a/{TOKENIZER}"], "sp1024", manifest) == "a/other.model"


def test_each_variant_comes_from_the_repository_that_publishes_it():
    found = {
        variant: parse_arguments(["--variant", variant]).repo for variant in ("sp1024", "sp4096", "sp8192")
    }
    assert found == {"sp1024": PUBLISHED[0], "sp4096": PUBLISHED[1], "sp8192": PUBLISHED[1]}
    assert parse_arguments(["--variant", "sp8192", "--repo", "a/b"]).repo == "a/b"


@pytest.mark.parametrize("name, stated, found", [("files_train", 4, 3), ("files_val", 1, 2)])
def test_counts_other_than_the_manifests_are_told(name, stated, found):
    shards = {"files_train": ["a"] * 3, "files_val": ["b"] * 2}
    true = {name: len(paths) for name, paths in shards.items()}
    for stats in (true, {}, None, {"files_val": "two"}):
        manifest = json.dumps({"datasets": [{"name": "fineweb10B_sp8192", "stats": stats}]})
        check_counts(manifest, "sp8192", *shards.values())
    manifest = json.dumps({"datasets": [{"name": "fineweb10B_sp8192", "stats": true | {name: stated}}]})
    with pytest.raises(RunError, match=f"the manifest has {name} {stated}, the Hub {found}"):
        check_counts(manifest, "sp8192", *shards.values())
