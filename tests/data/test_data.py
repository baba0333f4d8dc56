"""Shards, the stream they make, its spans for any number of processes, and the bytes that tokens stand
for."""

import os
import threading

import numpy as np
import pytest
import sentencepiece
import torch

import train_gpt as T
from tests import tiny


def error_of(function, *arguments):
    """The message of the RunError that a call raises; it is one line."""
    with pytest.raises(T.RunError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_shard_is_mapped_as_it_was_written(tmp_path):
    tokens = [0, 1, 258, 65535, 7]
    tiny.write_shard(tmp_path / "good.bin", tokens)
    shard = T.Shard(tmp_path / "good.bin")
    whole = shard.read()
    assert isinstance(whole, np.memmap) and whole.dtype == np.dtype("<u2") and whole.tolist() == tokens
    assert (
        len(shard) == 5 and shard.read(1, 3).tolist() == tokens[1:3] and shard.read(3).tolist() == tokens[3:]
    )


@pytest.mark.parametrize("change", ["time", "longer"])
def test_a_shard_that_changes_between_two_reads_is_an_error(tmp_path, change):
    path = tmp_path / "fineweb_train_000000.bin"
    tiny.write_shard(path, range(50))
    (shard,) = T.open_shards(tmp_path, "train")
    assert shard.read(0, 2).tolist() == [0, 1]
    if change == "time":
        os.utime(path, (0, 0))
    else:
        path.write_bytes(path.read_bytes() + b"more")
    assert error_of(shard.read) == f"shard {path} was changed during the run"
    with T.span_loader([shard], 5, 1000) as spans:
        assert error_of(spans.__next__) == f"shard {path} was changed during the run"
    path.unlink()
    with pytest.raises(OSError, match=str(path)):
        shard.read()


@pytest.mark.parametrize(
    "header, tokens",
    [
        (dict(magic=20240519), 5),
        (dict(version=2), 5),
        (dict(count=6), 5),
        (dict(count=4), 5),
        (dict(count=2**31 - 1), 0),
        (dict(count=-5), 5),
        (dict(count=0), 5),
        (dict(count=1), 0),
    ],
    ids=str,
)
def test_a_shard_whose_header_is_wrong_is_named(tmp_path, header, tokens):
    path = tmp_path / "bad.bin"
    tiny.write_shard(path, range(tokens), **header)
    message = error_of(T.Shard, path)
    facts = (
        ["20240520, 1"]
        if {"magic", "version"} & set(header)
        else [str(1024 + 2 * tokens), str(header.get("count", 0))]
    )
    assert message.startswith(f"shard {path}: ") and all(fact in message for fact in facts)


def test_a_shard_without_tokens_is_named(tmp_path):
    tiny.write_shard(tmp_path / "empty.bin", [])
    assert error_of(T.Shard, tmp_path / "empty.bin") == f"shard {tmp_path}/empty.bin: holds no tokens"


@pytest.mark.parametrize("size", [0, 3, 1023, 1024, 1033])
def test_a_shard_that_was_cut_is_named(tmp_path, size):
    path = tmp_path / "cut.bin"
    tiny.write_shard(path, range(5))
    path.write_bytes(path.read_bytes()[:size])
    assert error_of(T.Shard, path).startswith(f"shard {path}: ")


def test_a_shard_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            T.Shard(path)


def test_shards_are_opened_in_name_order_and_by_split(tmp_path):
    for name in ("train_000002", "train_000010", "val_000000", "train_000001"):
        tiny.write_shard(tmp_path / f"fineweb_{name}.bin", [int(name[-6:])])
    assert [shard.read().tolist() for shard in T.open_shards(tmp_path, "train")] == [[1], [2], [10]]
    assert [shard.read().tolist() for shard in T.open_shards(tmp_path, "val")] == [[0]]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_without_shards_says_how_to_get_some(tmp_path, split):
    message = error_of(T.open_shards, tmp_path, split)
    for part in (
        f"DATA_PATH={tmp_path}",
        f"fineweb_{split}_*.bin",
        "`make demo`",
        "`python -m tools.data.fineweb`",
    ):
        assert part in message


def test_validation_is_all_shards_and_at_least_a_window(tmp_path):
    for i in range(2):
        tiny.write_shard(tmp_path / f"fineweb_val_{i:06d}.bin", range(10 * i, 10 * i + 10))
    tokens = T.validation_tokens(tmp_path, 20, 19)
    assert tokens.dtype == torch.int32 and tokens.tolist() == list(range(20))
    message = error_of(T.validation_tokens, tmp_path, 20, 20)
    assert "20 tokens" in message and "EVAL_SEQ_LEN=20" in message
    message = error_of(T.validation_tokens, tmp_path, 19, 10)
    assert "validation" in message and "token id 19 " in message and "VOCAB_SIZE=19" in message


@pytest.fixture
def shards_of(tmp_path):
    """shards_of(tokens, [where to split them]) -> shards."""

    def write(tokens, at):
        for i, part in enumerate(np.split(np.asarray(tokens), at)):
            tiny.write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
        return T.open_shards(tmp_path, "train")

    return write


def test_a_stream_is_its_shards_one_after_another_and_wraps_around(shards_of):
    shards = shards_of(range(20), [7, 8])  # of 7, 1 and 12 tokens
    endless = np.tile(np.arange(20), 6)
    for position in range(45):
        for count in (1, 2, 5, 12, 20, 21, 61):
            assert (
                T.read_stream(shards, position, count).tolist()
                == endless[position : position + count].tolist()
            )
    assert T.read_stream(shards, 20 * 10**12 + 19, 2).tolist() == [19, 0]


def spans_of(monkeypatch, rank, world_size, shards, span=5, vocab_size=1000, steps=6):
    monkeypatch.setattr(T, "rank", lambda: rank)
    monkeypatch.setattr(T, "world_size", lambda: world_size)
    with T.span_loader(shards, span, vocab_size) as spans:
        return torch.stack([next(spans) for _ in range(steps)])


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_step_sees_the_same_eight_spans_whatever_the_world_size(monkeypatch, shards_of, world_size):
    shards = shards_of(range(101), [40, 77])
    eight = (
        torch.arange(6 * 8 * 6).view(6, 8, 6) % 101
    )  # (steps, spans, span + 1): consecutive tokens, wrapping around
    for rank in range(world_size):
        spans = spans_of(monkeypatch, rank, world_size, shards)
        assert spans.dtype == torch.int32 and spans.shape == (6, 8 // world_size, 6)
        for m in range(8 // world_size):
            assert torch.equal(spans[:, m].long(), eight[:, m * world_size + rank])


def test_a_loader_may_begin_at_any_step(shards_of):
    shards = shards_of(range(101), [40, 77])
    for first in (1, 4):
        with T.span_loader(shards, 5, 1000) as spans, T.span_loader(shards, 5, 1000, first) as later:
            every = [next(spans) for _ in range(6)]
            assert torch.equal(torch.stack(every[first:]), torch.stack([next(later) for _ in every[first:]]))


def test_a_loaders_thread_ends_with_its_block(shards_of):
    before, shards = set(threading.enumerate()), shards_of(range(101), [40, 77])
    with T.span_loader(shards, 5, 1000) as spans:
        next(spans)
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) == before
    with pytest.raises(T.RunError, match="span"), T.span_loader(shards, 5, 50) as spans:
        for _ in range(3):
            next(spans)
    assert set(threading.enumerate()) == before


def test_a_bad_id_stops_the_rank_and_the_step_that_read_it(monkeypatch, shards_of):
    tokens = np.arange(2000) % 100
    tokens[6 * 43 + 2] = 100  # span 43 is the fourth of step 5: rank 1's of 2, rank 3's of 4
    shards = shards_of(tokens, [])
    for rank, world_size in ((0, 1), (1, 2), (3, 4)):
        spans_of(monkeypatch, rank, world_size, shards, vocab_size=100, steps=5)
        message = error_of(spans_of, monkeypatch, rank, world_size, shards, 5, 100, 6)
        assert "span 43" in message and "token id 100 " in message and "VOCAB_SIZE=100" in message
    spans_of(monkeypatch, 0, 2, shards, vocab_size=100)
    spans_of(monkeypatch, 0, 1, shards, vocab_size=101)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.make_data(folder)
    return folder


def test_targets_are_the_inputs_one_token_later_in_rows_of_the_sequence_length(folder):
    names = tiny.SETTINGS | dict(DATA_PATH=folder / "data", TRAIN_SEQ_LEN=16)
    trainer = T.Trainer(T.Run(T.parse_settings({n: str(v) for n, v in names.items()}), torch.device("cpu")))
    seen = []
    trainer.model.register_forward_pre_hook(lambda model, args: seen.append([t.clone() for t in args[:2]]))
    with trainer.loader() as spans:
        trainer.train_step(next(spans), 1.0, 0.9)
    stream = np.concatenate([shard.read() for shard in T.open_shards(folder / "data", "train")]).astype(
        np.int64
    )
    assert len(seen) == 8
    for (x, y), span in zip(
        seen, torch.from_numpy(stream[: 8 * 65]).view(8, 65), strict=True
    ):  # a step's 512 targets are 8 spans of 64
        assert torch.equal(x, span[:-1].view(4, 16)) and torch.equal(y, span[1:].view(4, 16))


KNOWN = [
    "",
    "return",
    " return",
    "one two  three   four",
    "    if x:\n        return x\n\n\n",
    "\tdef f(x):\r\n",
    "Zwölf Boxkämpfer",
    "\n",
    " ",
    "    ",
    "a" * 300,
    "Deich.  ",
    "(B, T, V) -> x86_64 & more; 16,000,000 bytes",
]
FOREIGN = [
    "naïve café",
    "三人行，必有我師焉。",
    "🙂 smile 🙂🙂",
    "e\u0301 and \u00e9",
    "a\u00a0b\u2003c",
    " 三 ",
]
FINEWEB = dict(byte_fallback=False, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)


def load(path, **options):
    tiny.train_tokenizer(path, **options)
    return T.load_tokenizer(path, tiny.VOCAB_SIZE)[0]


def bytes_of(tokenizer, documents):
    """The bytes counted in a stream of documents, each led by BOS."""
    stream = torch.tensor([i for text in documents for i in [tokenizer.bos_id(), *tokenizer.encode(text)]])
    return T.byte_tables(tokenizer).count(stream[:-1], stream[1:]).sum().item()


@pytest.mark.parametrize(
    "options, documents",
    [
        (dict(), KNOWN + FOREIGN),
        (dict(model_type="unigram"), KNOWN + FOREIGN),
        (FINEWEB, KNOWN),
        (FINEWEB | dict(model_type="unigram"), KNOWN),
        (dict(user_defined_symbols=("\n", "<url>")), KNOWN + FOREIGN + ["a <url> b<url>"]),
        (dict(split_by_whitespace=False, allow_whitespace_only_pieces=True), KNOWN + FOREIGN),
    ],
    ids=["bpe", "unigram", "fineweb", "fineweb-unigram", "user-defined", "across-words"],
)
def test_bytes_add_up_to_the_decoded_text(tmp_path, options, documents):
    tokenizer = load(tmp_path / "t.model", **options)
    decoded = [tokenizer.decode(tokenizer.encode(text)) for text in documents]
    assert decoded == documents or options["byte_fallback"] is False
    for text, back in zip(documents, decoded, strict=True):
        assert bytes_of(tokenizer, [text]) == len(back.encode())
    assert bytes_of(tokenizer, documents) == sum(len(back.encode()) for back in decoded) > 400


def test_unknown_text_and_a_space_behind_it_count_nothing(tmp_path):
    tokenizer = load(tmp_path / "t.model", **FINEWEB)
    assert tokenizer.unk_id() in tokenizer.encode("x 三 d")
    assert bytes_of(tokenizer, ["x 三 d"]) == len("x ") + len("d")
    assert bytes_of(tokenizer, ["三d"]) == len("d")  # and the space that leads every document nothing either


def test_the_first_four_ids_count_nothing_and_byte_pieces_one_byte(tmp_path):
    tokenizer = load(tmp_path / "t.model")
    tables = T.byte_tables(tokenizer)
    assert (
        tables.is_boundary.nonzero().flatten().tolist() == [0, 1, 2, 3]
        and tables.base_bytes[:4].tolist() == [0] * 4
    )
    assert tables.base_bytes[4:260].tolist() == [1] * 256 and not tables.has_leading_space[:260].any()
    for i in range(260, tiny.VOCAB_SIZE):
        piece = tokenizer.id_to_piece(i)
        assert tables.base_bytes[i] == len(piece.removeprefix("▁").replace("▁", " ").encode())
        assert tables.has_leading_space[i] == piece.startswith("▁")


def test_the_fingerprint_is_that_of_the_file(tmp_path):
    prints = []
    for name, options in dict(a={}, b={}, c=dict(model_type="unigram")).items():
        tiny.train_tokenizer(tmp_path / name, **options)
        prints.append(T.load_tokenizer(tmp_path / name, tiny.VOCAB_SIZE)[1])
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("data", [None, b"", b"garbage", "cut"])
def test_a_tokenizer_that_cannot_be_read_says_how_to_get_one(folder, tmp_path, data):
    path = tmp_path / "t.model"
    if data is not None:
        path.write_bytes((folder / "tokenizer.model").read_bytes()[:-50] if data == "cut" else data)
    message = error_of(T.load_tokenizer, path, tiny.VOCAB_SIZE)
    for part in (f"TOKENIZER_PATH={path}", "SentencePiece", "`make demo`", "`python -m tools.data.fineweb`"):
        assert part in message


def test_a_tokenizer_of_another_size_is_named(folder):
    path = folder / "tokenizer.model"
    message = error_of(T.load_tokenizer, path, 1024)
    assert message.startswith(f"TOKENIZER_PATH={path}") and "512" in message and "VOCAB_SIZE=1024" in message
    assert isinstance(T.load_tokenizer(path, tiny.VOCAB_SIZE)[0], sentencepiece.SentencePieceProcessor)
