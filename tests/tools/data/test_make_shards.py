"""tools/data/make_shards.py: text in, shards out, and a clear line for everything that cannot be one."""

import argparse
import io
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from tests.commands import fails
from tests.forked import Process
from tools.common.cli import ROOT
from tools.data import make_shards
from train_gpt import RunError, Shard

DOCUMENTS = ["One document.", "  Zwei\n\nDokumente,\tmit Umlaut: ü.\n", "三", "x " * 50]


def train_tokenizer(path: Path, **settings) -> Path:
    model = io.BytesIO()
    settings = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    } | settings
    lines = settings.pop("lines", Path(argparse.__file__).read_text("utf-8").splitlines())
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def tokenizer(model):
    return make_shards.load_tokenizer(model)


@pytest.fixture
def folder(tmp_path, monkeypatch, model):
    """The current folder: a tokenizer and one small input file for each split."""
    monkeypatch.chdir(tmp_path)
    Path("tokenizer.model").write_bytes(model.read_bytes())
    Path("val.txt").write_text("some validation text")
    Path("train.jsonl").write_text('{"text": "some training text"}\n')
    return tmp_path


USUAL = ["--tokenizer", "tokenizer.model", "--out", "out", "--val", "val.txt"]


def run(*arguments: str) -> None:
    make_shards.main([*USUAL, *arguments])


def error_of(*arguments: str) -> str:
    """The message with which a run stops; it is one line."""
    return fails(make_shards.main, *USUAL, *arguments)


def shards_of(folder: Path, split: str) -> list[np.ndarray]:
    return [Shard(path).read() for path in sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))]


def documents_of(shards: list[np.ndarray], tokenizer) -> list[str]:
    tokens = np.concatenate(shards)
    assert tokens[0] == tokenizer.bos_id()
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id())[1:])
    return [tokenizer.decode(part[1:].tolist()) for part in parts]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_documents_come_back_from_the_shards_each_led_by_bos(tmp_path, tokenizer):
    tokens = make_shards.write_shards(DOCUMENTS, make_shards.Tally(tokenizer), tmp_path, "train").tokens
    [shard] = shards_of(tmp_path, "train")
    assert len(shard) == tokens == sum(len(tokenizer.encode(text)) + 1 for text in DOCUMENTS)
    assert documents_of([shard], tokenizer) == DOCUMENTS


@pytest.mark.parametrize("shard_tokens", [3, 64, 10**6])
def test_shards_are_full_but_the_last_and_hold_the_same_stream(
    tmp_path, tokenizer, shard_tokens, monkeypatch
):
    monkeypatch.setattr(make_shards, "BATCH_CHARS", 20)
    tokens = make_shards.write_shards(
        DOCUMENTS, make_shards.Tally(tokenizer), tmp_path, "val", shard_tokens
    ).tokens
    shards = shards_of(tmp_path, "val")
    assert [len(shard) for shard in shards[:-1]] == [shard_tokens] * (len(shards) - 1)
    assert 0 < len(shards[-1]) <= shard_tokens and sum(map(len, shards)) == tokens
    assert documents_of(shards, tokenizer) == DOCUMENTS


def test_a_stream_that_fills_its_shards_leaves_no_empty_one():
    pieces = list(make_shards.cut([np.arange(5), np.arange(0), np.arange(5, 12)], 4))
    assert [piece.tolist() for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_documents_are_streamed(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(make_shards, "BATCH_CHARS", 1)
    shards_seen = []

    def documents():
        for text in DOCUMENTS:
            shards_seen.append(len(shards_of(tmp_path, "train")))
            yield text

    make_shards.write_shards(documents(), make_shards.Tally(tokenizer), tmp_path, "train", shard_tokens=10)
    lengths = [len(tokenizer.encode(text)) + 1 for text in DOCUMENTS]
    assert shards_seen == [0, *np.cumsum(lengths)[:-1] // 10]


def test_a_header_is_256_int32_and_the_tokens_uint16(tmp_path, tokenizer):
    tokens = make_shards.write_shards(DOCUMENTS, make_shards.Tally(tokenizer), tmp_path, "val").tokens
    data = (tmp_path / "fineweb_val_000000.bin").read_bytes()
    assert np.frombuffer(data, "<i4", 256).tolist() == [20240520, 1, tokens] + [0] * 253
    assert len(data) == 1024 + 2 * tokens


@pytest.mark.parametrize("compress", [False, True])
def test_text_and_jsonl_are_read_in_order_compressed_or_not(folder, tokenizer, compress):
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n\n" for i, text in enumerate(DOCUMENTS))
    inputs = {"a.txt": "first\r\nfile\n", "b.jsonl": lines, "c.txt": "last file"}
    for name, text in inputs.items():
        data = text.encode()
        Path(name + ".xz" * compress).write_bytes(lzma.compress(data) if compress else data)
    run("--train", *(name + ".xz" * compress for name in inputs), "--shard-tokens", "50")
    assert documents_of(shards_of("out", "train"), tokenizer) == ["first\r\nfile\n", *DOCUMENTS, "last file"]
    assert documents_of(shards_of("out", "val"), tokenizer) == ["some validation text"]


@pytest.mark.slow
def test_the_command_line_ends_with_0_or_with_one_line_and_2(folder):
    command = [
        "-m",
        "tools.data.make_shards",
        "--tokenizer",
        "tokenizer.model",
        "--out",
        "out",
        "--val",
        "val.txt",
        "--train",
    ]
    good, bad = (
        Process([*command, name], folder, dict(os.environ)) for name in ("train.jsonl", "missing.jsonl")
    )
    out, err = good.communicate(60)
    assert (good.returncode, err) == (0, "")
    names = ("fineweb_val_000000.bin", "fineweb_train_000000.bin", "fineweb_val.json")
    assert out.splitlines()[-3:] == [str(Path("out", name)) for name in names]
    out, err = bad.communicate(60)
    assert (bad.returncode, err) == (2, "error: missing.jsonl: no such file\n")


@pytest.mark.parametrize(
    "name, data, message",
    [
        (
            "a.jsonl",
            b'{"text": "good"}\n{"text": \n',
            'a.jsonl, line 2: not a JSON object with a string "text"',
        ),
        ("a.jsonl", b'["text"]\n', 'a.jsonl, line 1: not a JSON object with a string "text"'),
        ("a.jsonl", b'\n\n{"content": "x"}\n', 'a.jsonl, line 3: not a JSON object with a string "text"'),
        ("a.jsonl", b'{"text": 5}', 'a.jsonl, line 1: not a JSON object with a string "text"'),
        ("a.jsonl", b"[" * 20_000, 'a.jsonl, line 1: not a JSON object with a string "text"'),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl, line 2: not valid Unicode in UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1: not valid Unicode in UTF-8"),
        ("a.txt", b"abc\xff", "a.txt: not UTF-8 at byte 3"),
        ("a.txt.xz", b"not xz", "a.txt.xz: damaged or truncated xz data; fetch it again"),
        (
            "a.jsonl.xz",
            lzma.compress(b'{"text": "a"}\n')[:-20],
            "a.jsonl.xz: damaged or truncated xz data; fetch it again",
        ),
        ("a.txt", b"", "train: the input holds no text"),
        ("a.jsonl", b'\n{"text": ""}\n', "train: the input holds no text"),
        ("a.csv", b"text", "a.csv: unknown kind of file; .txt, .jsonl, .txt.xz and .jsonl.xz can be read"),
        ("a.txt", b"x" * 20_001, "a.txt: a document of more than 20,000 bytes; divide it"),
        ("a.jsonl", b"{}" * 10_001, "a.jsonl, line 1: a document of more than 20,000 bytes; divide it"),
    ],
)
def test_a_bad_input_is_named_and_leaves_no_shard(folder, monkeypatch, name, data, message):
    monkeypatch.setattr(make_shards, "MAX_DOCUMENT_BYTES", 20_000)
    Path(name).write_bytes(data)
    assert error_of("--train", name) == message
    assert not Path("out").exists() or contents("out") == {}


def test_a_file_of_both_splits_is_refused(folder):
    assert "val.txt: given for both --val and --train" in error_of("--train", "train.jsonl", "./val.txt")


@pytest.mark.parametrize(
    "data, message",
    [
        (None, "No such file or directory"),
        (b"", "not a SentencePiece model"),
        (b"text", "not a SentencePiece model"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named(folder, data, message):
    Path("tokenizer.model").unlink()
    if data is not None:
        Path("tokenizer.model").write_bytes(data)
    assert error_of("--train", "train.jsonl") == "tokenizer tokenizer.model: " + message


def test_a_tokenizer_without_bos_is_refused(tmp_path):
    with pytest.raises(RunError, match="has no BOS id"):
        make_shards.load_tokenizer(train_tokenizer(tmp_path / "no_bos.model", bos_id=-1, eos_id=1, unk_id=2))


def test_a_vocabulary_beyond_uint16_is_refused(tmp_path):
    path = train_tokenizer(
        tmp_path / "big.model",
        lines=[f"w{i}" for i in range(65_600)],
        model_type="word",
        byte_fallback=False,
        vocab_size=65_600,
    )
    with pytest.raises(RunError, match="65600 tokens; a shard can hold 65536 at most"):
        make_shards.load_tokenizer(path)


@pytest.mark.parametrize("shard_tokens", ["0", "-1", str(2**31)])
def test_a_shard_size_that_no_header_can_hold_is_refused(folder, shard_tokens):
    message = f"--shard-tokens {shard_tokens}: allowed are 1 to {2**31 - 1}"
    assert error_of("--train", "train.jsonl", "--shard-tokens", shard_tokens) == message


def test_an_output_folder_that_cannot_be_made_is_named(folder):
    assert "val.txt" in error_of("--train", "train.jsonl", "--out", "val.txt/out")


def test_shards_are_replaced_only_with_force_and_then_all_of_them(folder):
    run("--train", "train.jsonl", "--shard-tokens", "2")
    Path("out/notes.md").write_text("mine")
    before = contents("out")
    assert "out: holds shards already" in error_of("--train", "train.jsonl")
    assert contents("out") == before and len(before) > 3
    run("--train", "train.jsonl", "--force")
    shards = {"fineweb_val_000000.bin", "fineweb_train_000000.bin", "fineweb_val.json"}
    assert set(contents("out")) == {"notes.md"} | shards


def test_a_run_that_fails_late_leaves_the_old_shards(folder):
    run("--train", "train.jsonl", "--shard-tokens", "2")
    before = contents("out")
    Path("bad.jsonl").write_text("{")
    error_of("--train", "train.jsonl", "bad.jsonl", "--force", "--shard-tokens", "1")
    assert contents("out") == before


def test_progress_says_documents_tokens_speed_and_time_left(folder, capsys, tokenizer, monkeypatch):
    monkeypatch.setattr(make_shards, "BATCH_CHARS", 1)
    Path("two.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    progress = make_shards.Progress("train", [Path("two.jsonl")], every=0.0)
    make_shards.write_shards(
        progress.documents(), make_shards.Tally(tokenizer), folder, "train", progress=progress
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and progress.bytes_read == progress.total_bytes == Path("two.jsonl").stat().st_size
    assert re.fullmatch(r"train: 1 documents, \d+ tokens, \d+\.\d MB/s, \d+ s left", lines[0])
    assert re.fullmatch(r"train: 2 documents, \d+ tokens, \d+\.\d MB/s, 0 s left", lines[1])


def test_progress_keeps_still_between_its_lines(folder, capsys, tokenizer, monkeypatch):
    monkeypatch.setattr(make_shards, "BATCH_CHARS", 1)
    progress = make_shards.Progress("train", [Path("train.jsonl")], every=60.0)
    make_shards.write_shards(
        progress.documents(), make_shards.Tally(tokenizer), folder, "train", progress=progress
    )
    assert capsys.readouterr().out == ""


def test_a_byte_order_mark_is_no_text(folder):
    bom = "\ufeff".encode()
    Path("bom.txt").write_bytes(bom + b"one")
    Path("bom.jsonl").write_bytes(bom + b'{"text": "one"}\n')
    for name in ("bom.txt", "bom.jsonl"):
        assert [text for text, _ in make_shards.read_file(Path(name))] == ["one"]


def test_documents_of_validation_are_left_out_of_training_and_counted(folder, capsys):
    Path("own.jsonl").write_text('{"text": "one"}\n{"text": " a text of both\\n"}\n{"text": "two"}\n')
    Path("val.jsonl").write_text('{"text": "a text of both"}\n{"text": "only here"}\n')
    make_shards.main(
        [*["--tokenizer", "tokenizer.model", "--out", "out", "--val", "val.jsonl", "--train", "own.jsonl"]]
    )
    said = capsys.readouterr().out
    assert "1 documents of validation left out" in said.splitlines()[1]
    (train,) = shards_of(Path("out"), "train")
    tokenizer = make_shards.load_tokenizer(Path("tokenizer.model"))
    documents = " ".join(map(str, train.tolist())).split(f"{tokenizer.bos_id()} ")[1:]
    assert [tokenizer.decode(list(map(int, ids.split()))) for ids in documents] == ["one", "two"]


def test_what_is_stated_is_what_the_text_has(folder, capsys):
    run("--train", "train.jsonl")
    stated = json.loads(Path("out/fineweb_val.json").read_text())
    assert stated["tokens"] == len(shards_of(Path("out"), "val")[0])
    assert stated["bytes"] == len(Path("val.txt").read_bytes()) and stated["documents"] == 1
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"val: {stated['tokens']:,} tokens, {stated['bytes']:,} bytes of text, ")
    assert f" {stated['bytes']:,} counted, " in line


@pytest.mark.slow
def test_a_reader_that_goes_away_costs_no_shards(folder):
    """As with `| head -2`: the old ones stay, or the new ones are there whole."""
    run("--train", "train.jsonl", "--shard-tokens", "2")
    before = contents("out")
    command = ["-m", "tools.data.make_shards", *USUAL, "--train", "train.jsonl", "--force"]
    for lines in (0, 2):
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(os.environ) | {"PYTHONPATH": str(ROOT)},
        )
        for _ in range(lines):
            process.stdout.readline()
        process.stdout.close()
        process.wait(120)
        after = contents("out")
        assert after == before or {"fineweb_val_000000.bin", "fineweb_train_000000.bin"} <= after.keys()
        assert len(after) in (len(before), 3)


def test_a_tokenizer_is_made_of_the_training_text_alone(folder, capsys):
    """Without what is also in validation; the same text gives the same one; its command is printed."""
    text = Path(argparse.__file__).read_text("utf-8")
    records = [json.dumps({"text": part}) for part in (text[:30_000], "Qqqq Xxxx " * 50)]
    Path("train.jsonl").write_text("\n".join(records))
    Path("val.jsonl").write_text(records[1])
    made = []
    for out in ("one", "two"):
        arguments = ["--train-tokenizer", "400", "--val", "val.jsonl", "--train", "train.jsonl", "--out", out]
        make_shards.main(arguments)
        made.append(Path(out, "tokenizer.model").read_bytes())
    assert made[0] == made[1]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("To train: DATA_PATH=two TOKENIZER_PATH=two/tokenizer.model VOCAB_SIZE=400 ")
    assert any("1 documents of validation left out" in line for line in lines)
    tokenizer = make_shards.load_tokenizer(Path("two/tokenizer.model"))
    assert (tokenizer.vocab_size(), tokenizer.bos_id(), tokenizer.pad_id()) == (400, 1, 0)
    assert not any("Qq" in tokenizer.id_to_piece(i) for i in range(400))
    assert tokenizer.decode(tokenizer.encode(text[:3000])) == text[:3000]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--train-tokenizer", "299"], "--train-tokenizer 299: allowed are 300 to 65536"),
        (["--train-tokenizer", "65537"], "--train-tokenizer 65537: allowed are 300 to 65536"),
        (["--train-tokenizer", "60000"], "--train-tokenizer 60000: the text does not do for that ("),
        ([], "one of the arguments --tokenizer --train-tokenizer is required"),
        (["--train-tokenizer", "400", "--tokenizer", "tokenizer.model"], "not allowed with argument"),
    ],
)
def test_a_tokenizer_that_cannot_be_made_is_told_in_a_line(folder, arguments, told):
    rest = ["--out", "out", "--val", "val.txt", "--train", "train.jsonl"]
    assert told in fails(make_shards.main, *arguments, *rest)
