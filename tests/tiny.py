"""The tests' tiny world: settings for a run that takes about a second, a data set, and three ways to run
train_gpt.py with them. helpers.py makes models, scorers and trainers of it in this process.
"""

import io
import os
import socket
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import sentencepiece
import torch

import train_gpt
from tests.forked import Process

SCRIPT = Path(train_gpt.__file__).resolve()
VOCAB_SIZE = 512
SETTINGS = dict(
    DATA_PATH="data",
    TOKENIZER_PATH="tokenizer.model",
    VOCAB_SIZE=VOCAB_SIZE,
    RUN_ID="tiny",
    NUM_LAYERS=2,
    MODEL_DIM=32,
    NUM_HEADS=2,
    NUM_KV_HEADS=1,
    MLP_MULT=2,
    ROPE_DIMS=8,
    VE_LAYERS=1,
    VE_DIM=8,
    XSA_LAST_N=1,
    BIGRAM_VOCAB_SIZE=64,
    BIGRAM_DIM=8,
    TRAIN_SEQ_LEN=32,
    TRAIN_BATCH_TOKENS=512,
    ITERATIONS=3,
    WARMUP_STEPS=1,
    WARMDOWN_ITERS=2,
    MAX_WALLCLOCK_SECONDS=0,
    VAL_LOSS_EVERY=0,
    CALIBRATION_TOKENS=256,
    EVAL_SEQ_LEN=32,
    EVAL_STRIDE=16,
    VAL_BATCH_SIZE=16384,
    TTT_CHUNK_TOKENS=512,
    TTT_BATCH_SEQS=8,
)


def text():
    """A text at hand: 60 kB of English, Python and a few other characters."""
    return (
        SCRIPT.read_text("utf-8") + "Zwölf Boxkämpfer\n\tjagen Viktor  quer über den großen Sylter Deich.\n"
    )


@cache
def tokenizer_of(**options):
    """A SentencePiece model made of text(): FineWeb's ids 0 to 3 and byte pieces, unless options say
    otherwise."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text().splitlines()),
        model_writer=model,
        minloglevel=2,
        **dict(
            vocab_size=VOCAB_SIZE,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
        )
        | options,
    )
    return model.getvalue()


def train_tokenizer(path, **options):
    """Write tokenizer_of(options), which is made once."""
    Path(path).write_bytes(tokenizer_of(**options))


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """Write a shard whose header claims `count` tokens, by default as many as there are."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def make_data(folder):
    """Write what SETTINGS expects: tokenizer.model, two train shards of 6,000 tokens and a validation
    shard of 1,500."""
    train_tokenizer(folder / "tokenizer.model")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = np.resize(
        np.concatenate([[1] + tokenizer.encode(paragraph) for paragraph in text().split("\n\n")]), 13500
    )
    for name, (low, high) in dict(
        val_000000=(0, 1500), train_000000=(1500, 7500), train_000001=(7500, 13500)
    ).items():
        write_shard(folder / "data" / f"fineweb_{name}.bin", tokens[low:high])


class Result(NamedTuple):
    status: int
    out: str
    err: str


def environment(settings):
    """This process's environment without its own settings and ranks, with SETTINGS and then `settings`;
    None unsets."""
    ours = {*train_gpt.FIELDS, "RANK", "LOCAL_RANK", "WORLD_SIZE"}
    values = {name: value for name, value in os.environ.items() if name not in ours} | SETTINGS | settings
    return {name: str(value) for name, value in values.items() if value is not None}


def run(folder, *arguments, **settings):
    """train_gpt.main() in this process, on one core."""
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)
    with (
        patch.dict(os.environ, environment(settings), clear=True),
        patch.object(sys, "argv", ["train_gpt.py", *arguments]),
        chdir(folder),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            return Result(train_gpt.main(), out.getvalue(), err.getvalue())
        finally:
            torch.set_num_threads(threads)


def start(command, folder, **settings):
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(settings | {"OMP_NUM_THREADS": 1}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(processes, timeout):
    """The results of processes; after `timeout` seconds they are ended and TimeoutExpired is raised."""
    try:
        return [Result(p.returncode, *texts) for p in processes for texts in [p.communicate(timeout=timeout)]]
    finally:
        for p in processes:
            p.terminate()  # does nothing to one that has ended; torchrun passes it on
            p.communicate()


def run_process(folder, *arguments, timeout=120, **settings):
    """`python train_gpt.py arguments`."""
    (result,) = finish([start([sys.executable, SCRIPT, *arguments], folder, **settings)], timeout)
    return result


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run_ranks(folder, world_size, timeout=120, **settings):
    """One result a rank, of processes that nobody but themselves can end."""
    group = dict(WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    return finish(
        [
            Process([SCRIPT], folder, environment(group | settings | dict(RANK=rank, LOCAL_RANK=rank)))
            for rank in range(world_size)
        ],
        timeout,
    )


def run_torchrun(folder, world_size, timeout=120, **settings):
    """The result of torchrun, which mixes the output of the ranks."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={world_size}",
        SCRIPT,
    ]
    (result,) = finish([start(command, folder, **settings)], timeout)
    return result
