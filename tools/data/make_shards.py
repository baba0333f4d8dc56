"""Turn text into token shards for train_gpt.py.

    python -m tools.data.make_shards --tokenizer T.model --out data/mine \\
        --val val.jsonl --train a.jsonl.xz b.txt
    python -m tools.data.make_shards --train-tokenizer 8192 --out data/mine --val V.txt --train T.txt

A .txt file is one document; a .jsonl file has one document a line, under "text"; both may be compressed as
.xz. Files are streamed, so they may be larger than memory, but no document may exceed MAX_DOCUMENT_BYTES.
Every document is led by the BOS id. Shards cut the token stream wherever they are full, and appear together
once all of them are complete; only then old ones make way. A training document that is also one of
validation is left out.

It says how many bytes the text has and how many a run counts for its tokens, and what the tokenizer dropped
of the others. The tokens and bytes of validation are stated in fineweb_val.json, which a run checks.

--train-tokenizer makes a tokenizer of the training text first, without the documents that are also in
validation, and keeps it beside the shards as tokenizer.model. The same text gives the same tokenizer.
"""

import argparse
import codecs
import hashlib
import io
import json
import lzma
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece
import torch

import train_gpt as T
from tools.common.cli import Parser, ends_in_one_line
from tools.common.shards import STATED, check_spaces, state, write_shard
from train_gpt import RunError

SPLITS = ("val", "train")
SHARD_TOKENS = 100_000_000
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32
MAX_VOCAB_SIZE = 2**16  # tokens are uint16
MIN_VOCAB_SIZE = 300  # 256 byte pieces, special ones and some characters
TOKENIZER = "tokenizer.model"  # one of --train-tokenizer, beside the shards
MAX_DOCUMENT_BYTES = 2**26
BATCH_CHARS = 2**22  # encoded at once, by all cores


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Returns the tokenizer.

    Raises RunError for a missing or broken file, more tokens than uint16 holds, no BOS, or bytes that cannot
    be counted.
    """
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(path.read_bytes())
    except (OSError, RuntimeError) as e:
        raise RunError(f"tokenizer {path}: {getattr(e, 'strerror', 'not a SentencePiece model')}") from None
    if tokenizer.vocab_size() > MAX_VOCAB_SIZE:
        raise RunError(
            f"tokenizer {path}: {tokenizer.vocab_size()} tokens; a shard can hold {MAX_VOCAB_SIZE} at most"
        )
    if tokenizer.bos_id() < 0:
        raise RunError(f"tokenizer {path}: has no BOS id, which has to lead every document")
    check_spaces(tokenizer, f"tokenizer {path}")
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """Returns a SentencePiece BPE model with FineWeb's special ids.

    What it decodes is what was encoded, whitespace included. Raises RunError for a text that does not have so
    many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=2**30,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as e:
        reason = " ".join(str(e).split())
        raise RunError(f"--train-tokenizer {vocab_size}: the text does not do for that ({reason})") from None
    return model.getvalue()


def tokenizer_text(args: argparse.Namespace) -> Iterator[str]:
    """Yield training documents that are not in validation, --tokenizer-text megabytes of them."""
    known = {digest(text) for path in args.val for text, _ in read_file(path)}
    left = args.tokenizer_text * 1_000_000
    for text in (text for path in args.train for text, _ in read_file(path)):
        if left <= 0:
            return
        if digest(text) not in known:
            left -= len(text.encode())
            yield text


def parse_record(line: bytes) -> str:
    """Returns the "text" of one line of a .jsonl file. Raises ValueError saying what the line is not."""
    try:
        return json.loads(line.decode())["text"].encode().decode()
    except UnicodeError:
        raise ValueError("not valid Unicode in UTF-8") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError('not a JSON object with a string "text"') from None


def read_file(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each document that is not empty, with the number of bytes read so far of the file as it lies on
    disk.

    Raises RunError for damaged xz data, text that is not UTF-8, a bad line, and a document that is too long.
    """
    with open(path, "rb") as file:
        stream = lzma.open(file) if path.suffix == ".xz" else file  # noqa: SIM115 (closes nothing but `file`)
        is_text = path.name.endswith((".txt", ".txt.xz"))
        read, decode = (stream.read, bytes.decode) if is_text else (stream.readline, parse_record)
        number = 0
        try:
            for number, data in enumerate(iter(lambda: read(MAX_DOCUMENT_BYTES + 1), b""), start=1):
                if number == 1:
                    data = data.removeprefix(codecs.BOM_UTF8)
                if len(data) > MAX_DOCUMENT_BYTES:
                    raise ValueError(f"a document of more than {MAX_DOCUMENT_BYTES:,} bytes; divide it")
                if data.strip() and (text := decode(data)):
                    yield text, file.tell()
        except (lzma.LZMAError, EOFError):
            raise RunError(f"{path}: damaged or truncated xz data; fetch it again") from None
        except ValueError as e:
            reason = f"not UTF-8 at byte {e.start:,}" if isinstance(e, UnicodeDecodeError) else e
            raise RunError(f"{path}: {reason}" if is_text else f"{path}, line {number}: {reason}") from None


class Progress:
    """Says every few seconds how far a split is, how fast the files on disk are read, and how long it will
    still take.
    """

    def __init__(self, split: str, paths: list[Path], every: float = 5.0) -> None:
        self.split, self.paths, self.every = split, paths, every
        self.total_bytes = sum(path.stat().st_size for path in paths)
        self.bytes_read = 0
        self.start = self.last = time.perf_counter()

    def documents(self) -> Iterator[str]:
        """Yield the documents of all files in order."""
        for path in self.paths:
            before = self.bytes_read
            for text, position in read_file(path):
                self.bytes_read = before + position
                yield text

    def __call__(self, documents: int, tokens: int) -> None:
        """Tell it, if it is time."""
        now = time.perf_counter()
        if now - self.last >= self.every:
            self.last, seconds = now, now - self.start
            left = seconds * (self.total_bytes / self.bytes_read - 1)
            print(
                f"{self.split}: {documents:,} documents, {tokens:,} tokens, "
                f"{self.bytes_read / 1e6 / seconds:.1f} MB/s, {left:.0f} s left",
                flush=True,
            )


def take(documents: Iterator[str], chars: int) -> list[str]:
    """Returns the next documents, until they hold that many characters or there are no more."""
    batch = []
    while chars > 0 and (text := next(documents, None)) is not None:
        batch.append(text)
        chars -= len(text)
    return batch


def digest(text: str) -> bytes:
    """Returns a hash of a document, spaces at its ends left out."""
    return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()


@dataclass
class Tally:
    """What was encoded of a split, and how many bytes it stands for."""

    tokenizer: sentencepiece.SentencePieceProcessor
    documents: int = 0
    tokens: int = 0
    source_bytes: int = 0  # of the texts
    counted_bytes: int = 0  # of their tokens, by which a run scores
    normalized_bytes: int = 0  # of the texts as the tokenizer sees them
    unknown: int = 0  # tokens that stand for text nobody can tell
    left_out: int = 0  # documents that are also in `others`
    others: set[bytes] | None = None  # digest() of documents that must not be here
    digests: set[bytes] = field(default_factory=set)  # of these documents, unless there are others

    def __post_init__(self) -> None:
        self.tables = T.byte_tables(self.tokenizer)
        self.added = self.tokenizer.normalize("a").startswith(T.SPACES)

    def wanted(self, documents: Iterable[str]) -> Iterator[str]:
        """Yield the documents that are not in `others`."""
        for text in documents:
            own = digest(text)
            if self.others is None:
                self.digests.add(own)
            elif own in self.others:
                self.left_out += 1
                continue
            yield text

    def add(self, texts: list[str], ids: np.ndarray) -> None:
        """Count texts and their tokens, as encode() gives them."""
        tokens = torch.from_numpy(ids.astype(np.int64))
        source = sum(len(text.encode()) for text in texts)
        counted = int(self.tables.count(tokens[:-1], tokens[1:]).sum())
        normalized = source
        if counted != source:
            normalized = sum(self.size_seen(text) for text in texts)
        self.documents, self.tokens = self.documents + len(texts), self.tokens + len(tokens)
        self.source_bytes, self.counted_bytes = self.source_bytes + source, self.counted_bytes + counted
        self.normalized_bytes += normalized
        self.unknown += int((tokens == self.tokenizer.unk_id()).sum())

    def size_seen(self, text: str) -> int:
        """Returns the bytes of a text as the tokenizer sees it."""
        seen = self.tokenizer.normalize(text).replace(*T.SPACES)
        return len(seen.encode()) - (self.added and seen.startswith(" "))

    def report(self) -> str:
        """Returns what was counted, in words."""
        line = f"{self.tokens:,} tokens, {self.source_bytes:,} bytes of text, {self.counted_bytes:,} counted"
        changed, lost = self.source_bytes - self.normalized_bytes, self.normalized_bytes - self.counted_bytes
        if changed:
            line += f"; the tokenizer's normalisation and rules of spaces dropped {changed:,} bytes"
        if lost:
            line += f"; {self.unknown:,} unknown tokens stand for {lost:,} bytes that do not count"
        return line + (f"; {self.left_out:,} documents of validation left out" if self.left_out else "")


def encode(
    documents: Iterable[str], tokenizer: sentencepiece.SentencePieceProcessor
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield batches of documents and their tokens, uint16, each document led by BOS."""
    left = iter(documents)
    while batch := take(left, BATCH_CHARS):
        encoded = tokenizer.encode(batch, add_bos=True, num_threads=os.cpu_count())
        yield batch, np.concatenate([np.array(ids, np.uint16) for ids in encoded])


def cut(arrays: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Yield the concatenation of arrays in pieces of the given length; the last may be shorter, none is
    empty.
    """
    held = np.empty(0, np.uint16)
    for array in arrays:
        held = np.concatenate([held, array])
        while len(held) >= length:
            yield held[:length]
            held = held[length:]
    if len(held):
        yield held


def write_shards(
    documents: Iterable[str],
    tally: Tally,
    out_dir: Path,
    split: str,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int, int], None] = lambda documents, tokens: None,
) -> Tally:
    """Write out_dir/fineweb_SPLIT_%06d.bin with at most shard_tokens tokens each, and return the tally.

    Of validation also state what is in them. progress(documents, tokens) hears of every batch. Raises
    RunError if there are no documents.
    """

    def counted() -> Iterator[np.ndarray]:
        for texts, tokens in encode(tally.wanted(documents), tally.tokenizer):
            tally.add(texts, tokens)
            yield tokens
            progress(tally.documents, tally.tokens)

    for index, tokens in enumerate(cut(counted(), shard_tokens)):
        write_shard(Path(out_dir) / f"fineweb_{split}_{index:06d}.bin", tokens)
    if not tally.tokens:
        raise RunError(f"{split}: the input holds no text")
    if split == "val":
        state(Path(out_dir), documents=tally.documents, tokens=tally.tokens, bytes=tally.counted_bytes)
    return tally


def find_shards(folder: Path) -> list[Path]:
    """Returns the shards in a folder and what is stated of them."""
    found = [path for split in SPLITS for path in sorted(folder.glob(f"fineweb_{split}_*.bin"))]
    return found + [path for path in [folder / STATED, folder / TOKENIZER] if path.exists()]


def check_arguments(args: argparse.Namespace) -> None:
    """Raises RunError for what would fail only after some work, or mix data that has to stay apart."""
    for path in args.val + args.train:
        if not path.is_file():
            raise RunError(f"{path}: no such file")
        if not path.name.endswith((".txt", ".jsonl", ".txt.xz", ".jsonl.xz")):
            raise RunError(f"{path}: unknown kind of file; .txt, .jsonl, .txt.xz and .jsonl.xz can be read")
    for path in {path.resolve() for path in args.val} & {path.resolve() for path in args.train}:
        raise RunError(f"{path}: given for both --val and --train, which must not share text")
    if not 1 <= args.shard_tokens <= MAX_SHARD_TOKENS:
        raise RunError(f"--shard-tokens {args.shard_tokens}: allowed are 1 to {MAX_SHARD_TOKENS}")
    if args.train_tokenizer is not None and not MIN_VOCAB_SIZE <= args.train_tokenizer <= MAX_VOCAB_SIZE:
        allowed = f"allowed are {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}"
        raise RunError(f"--train-tokenizer {args.train_tokenizer}: {allowed}")
    if find_shards(args.out) and not args.force:
        raise RunError(
            f"{args.out}: holds shards already; choose another --out, or replace them with --force"
        )


def make_shards(args: argparse.Namespace) -> None:
    """Do what the arguments say. Raises RunError, OSError."""
    check_arguments(args)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished_", dir=args.out) as unfinished:
        path = args.tokenizer or Path(unfinished) / TOKENIZER
        if args.train_tokenizer is not None:
            start = time.perf_counter()
            path.write_bytes(train_tokenizer(tokenizer_text(args), args.train_tokenizer))
            seconds = time.perf_counter() - start
            print(f"a tokenizer of {args.train_tokenizer:,} tokens, {seconds:.1f} s", flush=True)
        tokenizer = load_tokenizer(path)
        tally = Tally(tokenizer)
        for split, paths in zip(SPLITS, (args.val, args.train), strict=True):
            progress = Progress(split, paths)
            write_shards(progress.documents(), tally, unfinished, split, args.shard_tokens, progress)
            print(f"{split}: {tally.report()}, {time.perf_counter() - progress.start:.1f} s", flush=True)
            tally = Tally(tokenizer, others=tally.digests)
        new = [args.out / path.name for path in find_shards(Path(unfinished))]
        old = set(find_shards(args.out)) - {*new, args.tokenizer}
        for path in new:
            os.replace(Path(unfinished) / path.name, path)
        for path in old:
            path.unlink()
    print(*new, sep="\n")
    if args.train_tokenizer is not None:
        values = {"DATA_PATH": args.out, "TOKENIZER_PATH": args.out / TOKENIZER}
        values["VOCAB_SIZE"] = args.train_tokenizer
        print("To train:", *(f"{name}={shlex.quote(str(value))}" for name, value in values.items()), end=" ")
        print("torchrun --standalone --nproc_per_node=gpu train_gpt.py")


def main(argv: list[str] | None = None) -> None:
    """Turn text into shards."""
    parser = Parser(__doc__)
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=Path, help="SentencePiece model")
    tokenizer.add_argument(
        "--train-tokenizer", type=int, metavar="N", help="make one of N tokens of the training text"
    )
    parser.add_argument(
        "--tokenizer-text", type=int, default=100, metavar="MB", help="of text to make it of (%(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--val", type=Path, nargs="+", required=True, metavar="FILE", help="validation text")
    parser.add_argument("--train", type=Path, nargs="+", required=True, metavar="FILE", help="training text")
    parser.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, help="most tokens in a shard (%(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace the shards in the folder")
    args = parser.parse_args(argv)
    with ends_in_one_line():
        make_shards(args)


if __name__ == "__main__":
    main()
