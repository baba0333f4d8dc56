"""Build the demo's data set from text that every Python installation carries.

    python -m tools.data.demo_data --out data/demo

The documents are the standard library's modules, Python's documentation topics and the docstrings of modules
written in C. They are put in order of their SHA-256; the first are for validation, the rest for training. A
SentencePiece BPE tokenizer of 1,024 tokens is trained on the training part. The same Python version gives the
same data.
"""

import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import sentencepiece

from tools.common.cli import Parser, ends_in_one_line
from tools.common.shards import STATED
from tools.data.make_shards import Tally, train_tokenizer, write_shards
from train_gpt import RunError

SPACE = "\u2581"  # how SentencePiece writes a space, so that it cannot tell the two apart
VAL_BYTES = 250_000
MIN_BYTES = 2_000_000
MAX_DOCUMENT_BYTES = 100_000  # a longer one could be most of the validation part
VOCAB_SIZE = 1024
FILES = ("tokenizer.model", "fineweb_val_000000.bin", "fineweb_train_000000.bin", STATED)
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
SKIPPED_MODULES = {"readline"}  # may write to the terminal on import


def module_sources() -> Iterator[str]:
    """Yield the sources of the standard library, without tests, tables and files that are too long or not
    UTF-8.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and not SKIPPED_FOLDERS & set(parts):
            try:
                text = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if len(text.encode()) <= MAX_DOCUMENT_BYTES:
                yield text


def documentation_topics() -> Iterator[str]:
    """Yield what `help("TOPIC")` shows; nothing where Python comes without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    yield from topics.values()


def c_docstrings() -> Iterator[str]:
    """Yield the docstrings of each standard module that has no Python source, as one document a module."""
    seen = set()

    def entries(name: str, thing: object) -> Iterator[str]:
        doc = thing.__doc__
        if isinstance(doc, str) and doc not in seen:
            seen.add(doc)
            yield f"{name}\n{doc.strip()}\n"
        if inspect.ismodule(thing) or inspect.isclass(thing):
            for key, value in sorted(vars(thing).items()):
                method = inspect.isroutine(value) and not inspect.isfunction(value)
                if (
                    method
                    or inspect.isdatadescriptor(value)
                    or inspect.isclass(value)
                    and inspect.ismodule(thing)
                ):
                    yield from entries(f"{name}.{key}", value)

    for name in sorted(sys.stdlib_module_names - SKIPPED_MODULES):
        try:
            spec = importlib.util.find_spec(name)
            is_extension = isinstance(getattr(spec, "loader", None), importlib.machinery.ExtensionFileLoader)
            if is_extension or name in sys.builtin_module_names:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    yield "\n".join(entries(name, importlib.import_module(name)))
        except Exception:  # a module that this machine cannot load has nothing to give
            continue


def size_of(texts: list[str]) -> int:
    """Returns the bytes of texts in UTF-8."""
    return sum(len(text.encode()) for text in texts)


def without_repeats(texts: list[str]) -> list[str]:
    """Returns the texts without those of which at least half, counted in lines of 20 or more characters,
    stands in longer ones.

    Documentation topics contain one another, and C modules repeat the docstrings of their Python twins.
    """
    kept, seen = [], set()
    for text in sorted(set(texts), key=lambda text: (-len(text), text)):
        lines = [line for line in map(str.strip, text.splitlines()) if len(line) >= 20]
        if sum(len(line) for line in lines if line not in seen) * 2 > sum(map(len, lines)):
            kept.append(text)
            seen.update(lines)
    return kept


def split_by_hash(texts: list[str], val_bytes: int) -> tuple[list[str], list[str]]:
    """Order texts by SHA-256; the first, until they hold val_bytes, are for validation, the rest for
    training.
    """
    ordered, count, size = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()), 0, 0
    while count < len(ordered) and size < val_bytes:
        size += len(ordered[count].encode())
        count += 1
    if not 0 < count < len(ordered):
        raise RunError(
            f"--val-bytes {val_bytes}: must be more than 0 and leave some of the {size_of(texts):,} bytes "
            "to train on"
        )
    return ordered[:count], ordered[count:]


def gather(say: Callable[[str], None] = print) -> list[str]:
    """Returns all documents, each text once.

    Raises RunError if this Python carries less than MIN_BYTES of text.
    """
    texts = []
    for kind, source in (
        ("module sources", module_sources),
        ("documentation topics", documentation_topics),
        ("modules' docstrings", c_docstrings),
    ):
        found = [text for text in source() if text.strip() and SPACE not in text]
        say(
            f"found {len(found)} {kind}, {size_of(found):,} bytes"
            if found
            else f"found no {kind} in this Python"
        )
        texts += found
    texts = without_repeats(texts)
    if size_of(texts) < MIN_BYTES:
        raise RunError(
            f"Python {sys.version.split()[0]} carries {size_of(texts):,} bytes of text, "
            f"fewer than {MIN_BYTES:,}; install one that has the sources of its standard library"
        )
    return texts


def build(
    texts: list[str], folder: Path, val_bytes: int = VAL_BYTES, say: Callable[[str], None] = print
) -> None:
    """Split texts, train the tokenizer and write FILES into folder."""
    val, train = split_by_hash(texts, val_bytes)
    model = train_tokenizer(train, VOCAB_SIZE)
    (folder / "tokenizer.model").write_bytes(model)
    say(f"trained a tokenizer of {VOCAB_SIZE} tokens on the training documents")
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    for split, documents in (("val", val), ("train", train)):
        tally = write_shards(documents, Tally(tokenizer), folder, split)
        each = tally.source_bytes / tally.tokens
        say(f"{split}: {len(documents)} documents, {tally.report()}, {each:.3f} bytes per token")


def demo_data(out: Path, val_bytes: int, force: bool) -> None:
    """Build the data beside `out` and move them there when they are complete."""
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:5.1f} s  {line}", flush=True)

    present = {path.name for path in out.iterdir()} if out.exists() else set()
    if present - set(FILES):
        raise RunError(
            f"{out}: holds {min(present - set(FILES))}, which is no demo data; choose another --out"
        )
    if present == set(FILES) and not force:
        say(f"{out} is complete already; --force builds it again")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}_", dir=out.parent) as unfinished:
        new, old = Path(unfinished, "new"), Path(unfinished, "old")
        new.mkdir()
        build(gather(say), new, val_bytes, say)
        if out.exists():
            os.replace(out, old)
        os.replace(new, out)
    say(f"wrote {out}")


def main(argv: list[str] | None = None) -> None:
    """Build the data set."""
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer and the shards")
    parser.add_argument(
        "--val-bytes", type=int, default=VAL_BYTES, help="bytes of text for validation (%(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="build the data again even if they are there")
    args = parser.parse_args(argv)
    with ends_in_one_line():
        demo_data(args.out.resolve(), args.val_bytes, args.force)


if __name__ == "__main__":
    main()
