"""Looks at the shards before a run reads them: names, copies, and what is stated of the validation text."""

import json
import re
from contextlib import suppress
from pathlib import Path

import numpy as np

import train_gpt as T
from tools.common.shards import STATED, check_spaces, count_bytes
from train_gpt import Hooks, Run, RunError, Settings, together

SAMPLE = 4096  # first tokens, by which copies are found


def check_names(folder: str, split: str) -> None:
    """Raises RunError for what is taken for a shard but has no shard's name, OSError."""
    names = sorted(path.name for path in Path(folder).glob(f"fineweb_{split}_*.bin"))
    for name in names:
        number = re.fullmatch(rf"fineweb_{split}_(\d+)\.bin", name)
        if not number:
            raise RunError(
                f"{Path(folder, name)}: no name of a shard (fineweb_{split}_000000.bin); move it away"
            )
        if len(name) != len(names[0]):
            raise RunError(f"{Path(folder, name)}: its number is not as long as that of {names[0]}")


def check_copies(shards: list[T.Shard]) -> None:
    """Raises RunError if two shards hold the same tokens."""
    begins: dict[bytes, T.Shard] = {}
    for shard in shards:
        other = begins.setdefault(shard.read(0, SAMPLE).tobytes(), shard)
        if other is not shard and np.array_equal(other.tokens, shard.tokens):
            raise RunError(f"{other.path} and {shard.path} hold the same tokens; move one away")


def check_text(s: Settings) -> None:
    """Raises RunError if validation has no text, or other than a fineweb_val.json beside it states."""
    shards, path = T.open_shards(s.data_path, "val"), Path(s.data_path, STATED)
    tokenizer = T.sentencepiece.SentencePieceProcessor()
    with suppress(OSError, RuntimeError):  # of a tokenizer that the program will refuse
        tokenizer.Load(str(s.tokenizer_path))
    if not tokenizer.vocab_size() or any(shard.tokens.max() >= tokenizer.vocab_size() for shard in shards):
        return
    check_spaces(tokenizer, f"TOKENIZER_PATH={s.tokenizer_path}")
    found = {"tokens": sum(map(len, shards)), "bytes": count_bytes(shards, T.byte_tables(tokenizer))}
    if not found["bytes"]:
        raise RunError("validation shards: no token stands for a byte of text")
    if path.exists():
        stated = {}
        with suppress(ValueError, KeyError, TypeError):
            stated = {what: json.loads(path.read_bytes())[what] for what in found}
        if stated != found:
            raise RunError(f"{path}: states {stated}, but the shards have {found}: they are cut or others")


class Inputs(Hooks):
    """Refuses data that would make a wrong number. Rank 0 looks."""

    def on_start(self, run: Run) -> None:
        """Look at the shards. Raises RunError."""
        together(lambda: self.check(run.settings), 1)

    def check(self, s: Settings) -> None:
        """Raises RunError, OSError."""
        for split in ("val",) if s.eval_only else ("val", "train"):
            check_names(s.data_path, split)
            check_copies(T.open_shards(s.data_path, split))
        check_text(s)
