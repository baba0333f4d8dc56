"""tools/data/demo_data.py: a data set from the text that Python carries."""

import os
import sys
import sysconfig

import numpy as np
import pytest
import sentencepiece
import torch

from tests.commands import error_of, fails
from tests.forked import Process
from tools.data import demo_data
from train_gpt import RunError, Shard, byte_tables

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def texts():
    return demo_data.gather(say=lambda line: None)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Folder and output of `python -m tools.data.demo_data`."""
    folder = tmp_path_factory.mktemp("demo") / "data" / "demo"
    process = Process(["-m", "tools.data.demo_data", "--out", folder], folder.parents[1], dict(os.environ))
    out, err = process.communicate(120)
    assert process.returncode == 0, err
    return folder, out


@pytest.fixture(scope="session")
def tokenizer(demo):
    return sentencepiece.SentencePieceProcessor(model_file=str(demo[0] / "tokenizer.model"))


@pytest.fixture(scope="session")
def documents(demo, tokenizer):
    """Decoded documents of each split."""
    decoded = {}
    for split in ("val", "train"):
        tokens = Shard(demo[0] / f"fineweb_{split}_000000.bin").read()
        assert tokens[0] == 1
        parts = np.split(tokens, np.flatnonzero(tokens == 1)[1:])
        decoded[split] = tokenizer.decode([part[1:].tolist() for part in parts])
    return decoded


@pytest.fixture
def small(monkeypatch, texts):
    """Makes demo_data.main quick: it finds only some of the documents."""
    monkeypatch.setattr(demo_data, "gather", lambda say: sorted(texts)[:60])


def run(*arguments) -> None:
    demo_data.main([str(argument) for argument in arguments])


def test_decoded_documents_are_the_gathered_ones_and_validation_has_the_first(documents, texts):
    val, train = demo_data.split_by_hash(texts, demo_data.VAL_BYTES)
    assert documents["val"] == val
    assert documents["train"] == train


def test_no_text_is_in_both_splits(documents):
    assert len(set(documents["val"] + documents["train"])) == len(documents["val"]) + len(documents["train"])
    assert not [text[:60] for text in documents["val"] if any(text in other for other in documents["train"])]


def test_validation_is_a_sample_of_many_documents_and_about_100_000_tokens(demo, documents):
    sizes = [len(text.encode()) for text in documents["val"]]
    assert len(sizes) >= 10 and max(sizes) <= sum(sizes) / 2
    assert 80_000 < len(Shard(demo[0] / "fineweb_val_000000.bin").read()) < 150_000


def test_counted_bytes_are_the_bytes_of_the_documents(demo, documents, tokenizer):
    tokens = torch.from_numpy(Shard(demo[0] / "fineweb_val_000000.bin").read().astype(np.int64))
    counted = byte_tables(tokenizer).count(tokens[:-1], tokens[1:]).sum().item()
    assert counted == sum(len(text.encode()) for text in documents["val"])


def test_tokenizer_has_the_ids_and_byte_pieces_of_finewebs(tokenizer):
    assert tokenizer.vocab_size() == 1024
    assert [tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()] == [0, 1, 2, 3]
    pieces = [tokenizer.id_to_piece(i) for i in range(1024) if tokenizer.is_byte(i)]
    assert pieces == [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.mark.parametrize(
    "text",
    ["", "\n", " ", "   x", "x  \n\n", "\ta\r\n\x0c", "\n    def f():\n\treturn 1234", "é 日本 \U0001f600"],
)
def test_tokenizer_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_same_python_builds_the_same_bytes(demo, texts, tmp_path):
    demo_data.build(texts[::-1], tmp_path, say=lambda line: None)
    for name in demo_data.FILES:
        assert (tmp_path / name).read_bytes() == (demo[0] / name).read_bytes(), name


def test_the_folder_holds_its_files_and_nothing_is_left_beside_it(demo):
    assert sorted(os.listdir(demo[0])) == sorted(demo_data.FILES)
    assert os.listdir(demo[0].parent) == ["demo"]


def test_it_says_documents_bytes_and_tokens_of_each_split(demo, documents):
    lines = demo[1].splitlines()
    for split in ("val", "train"):
        size, tokens = (
            demo_data.size_of(documents[split]),
            len(Shard(demo[0] / f"fineweb_{split}_000000.bin").read()),
        )
        said = f"{split}: {len(documents[split])} documents, {tokens:,} tokens, {size:,} bytes of text, "
        said += f"{size:,} counted, {size / tokens:.3f} bytes per token"
        assert any(said in line for line in lines)


def test_sources_are_the_standard_librarys_without_tests_tables_and_what_is_too_long(tmp_path, monkeypatch):
    for name in [
        "os.py",
        "json/decoder.py",
        "json/tests/test_all.py",
        "test/support.py",
        "idlelib/idle_test/a.py",
        "encodings/cp437.py",
        "pydoc_data/topics.py",
        "site-packages/json.py",
        "elsewhere.py",
        "json/data.txt",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "abc.py").write_bytes(b"# caf\xe9")
    (tmp_path / "ast.py").write_text("#" * (demo_data.MAX_DOCUMENT_BYTES + 1))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(demo_data.module_sources()) == ["# json/decoder.py", "# os.py"]


def test_docstrings_are_taken_from_c_only_and_once(monkeypatch):
    imported = []
    real = demo_data.importlib.import_module
    monkeypatch.setattr(
        demo_data.importlib, "import_module", lambda name: imported.append(name) or real(name)
    )
    found = list(demo_data.c_docstrings())
    assert {"math", "itertools", "builtins", "sys"} <= set(imported)
    assert not {"this", "antigravity", "argparse", "json"} & set(imported)
    assert sum(text.count("Return the square root of x.") for text in found) == 1


def test_a_text_that_mostly_stands_in_a_longer_one_is_dropped():
    lines = [f"a line of its own, number {i}" for i in range(6)]
    long, part, twin, other = (
        "\n".join(lines),
        "\n    ".join(lines[2:4]),
        "\n".join(lines),
        "some quite different text",
    )
    half_new = "\n".join([lines[0], "first line that is not there", "second line that is not there"])
    assert sorted(demo_data.without_repeats([other, part, long, twin, half_new])) == sorted(
        [long, other, half_new]
    )


def test_the_first_by_sha256_are_validation_until_they_hold_enough():
    texts = [str(i) * 100 for i in range(10)]
    val, train = demo_data.split_by_hash(texts, 250)
    assert len(val) == 3 and sorted(val + train) == texts
    assert demo_data.split_by_hash(texts[::-1], 250) == (val, train)
    for val_bytes in (0, -5, 1000, 10**9):
        with pytest.raises(
            RunError, match=f"--val-bytes {val_bytes}: must be more than 0 and leave some of the 1,000 bytes"
        ):
            demo_data.split_by_hash(texts, val_bytes)


def test_a_python_without_its_texts_says_so_and_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    said = []
    with pytest.raises(RunError, match="carries .* bytes of text, fewer than 2,000,000"):
        demo_data.gather(said.append)
    assert said[:2] == [
        "found no module sources in this Python",
        "found no documentation topics in this Python",
    ]


def test_complete_data_are_left_alone_without_force(tmp_path, small, capsys):
    out = tmp_path / "demo"
    run("--out", out, "--val-bytes", 50_000)
    (out / "tokenizer.model").write_bytes(b"changed")
    run("--out", out)
    assert "is complete already" in capsys.readouterr().out
    assert (out / "tokenizer.model").read_bytes() == b"changed"
    run("--out", out, "--val-bytes", 50_000, "--force")
    assert (out / "tokenizer.model").read_bytes() != b"changed"
    assert os.listdir(tmp_path) == ["demo"]


def test_incomplete_data_are_built_again(tmp_path, small):
    out = tmp_path / "demo"
    out.mkdir()
    (out / "tokenizer.model").write_bytes(b"alone")
    run("--out", out, "--val-bytes", 50_000)
    assert sorted(os.listdir(out)) == sorted(demo_data.FILES)


def test_a_folder_with_other_files_is_refused_even_with_force(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    error = fails(demo_data.main, "--out", tmp_path, "--force")
    assert "holds thesis.txt, which is no demo data; choose another --out" in error
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_build_that_fails_leaves_nothing(tmp_path, small):
    error = error_of(demo_data.main, "--out", tmp_path / "demo", "--val-bytes", 10**9)
    assert "--val-bytes 1000000000" in error
    assert os.listdir(tmp_path) == []
