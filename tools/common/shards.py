"""Writing token shards as train_gpt.Shard reads them."""

from pathlib import Path

import numpy as np

import train_gpt as T

STATED = "fineweb_val.json"  # beside validation shards: their tokens and bytes


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens (n,) as a shard, whole or not at all. Raises OSError."""
    header = np.zeros(T.SHARD_HEADER_INTS, "<i4")
    header[:3] = T.SHARD_MAGIC, T.SHARD_VERSION, len(tokens)
    T.write_atomically(path, header.tobytes() + tokens.astype("<u2", copy=False).tobytes())
