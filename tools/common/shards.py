"""Token shards: writing them, stating what validation holds, and refusing whose bytes cannot be counted."""

import json
from pathlib import Path

import numpy as np
import sentencepiece
import torch

import train_gpt as T

STATED = "fineweb_val.json"  # beside validation shards: their tokens and bytes
PART = 2**22  # tokens whose bytes are counted at once


def check_spaces(tokenizer: sentencepiece.SentencePieceProcessor, name: str) -> None:
    """Raises RunError for a tokenizer whose spaces' bytes cannot be told from tokens alone."""
    fault = ""
    if tokenizer.piece_to_id(T.SPACES[0]) == tokenizer.unk_id():
        fault = "has no piece of one space (U+2581)"
    if tokenizer.normalize("a").endswith(T.SPACES):
        fault = "adds a space behind each text"
    if fault:
        raise T.RunError(f"{name}: {fault}, so that its bytes cannot be counted")


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens (n,) as a shard, whole or not at all. Raises OSError."""
    header = np.zeros(T.HEADER_BYTES // 4, "<i4")
    header[:3] = T.SHARD_MAGIC, T.SHARD_VERSION, len(tokens)
    T.write_atomically(path, header.tobytes() + tokens.astype("<u2", copy=False).tobytes())


def count_bytes(shards: list[T.Shard], tables: T.ByteTables) -> int:
    """Returns the bytes for which a text's tokens count behind its first one. Raises RunError, OSError."""
    total, before = 0, None
    for shard in shards:
        for low in range(0, len(shard), PART):
            tokens = torch.from_numpy(shard.read(low, low + PART).astype(np.int64))
            if before is not None:
                tokens = torch.cat((before, tokens))
            total += int(tables.count(tokens[:-1], tokens[1:]).sum())
            before = tokens[-1:]
    return total


def state(folder: Path, **totals: int) -> None:
    """Write what the validation shards in a folder hold, for a run to check. Raises OSError."""
    T.write_atomically(folder / STATED, (json.dumps(totals) + "\n").encode())
