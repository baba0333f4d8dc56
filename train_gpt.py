"""Train a GPT in ten minutes, squeeze it into 16,000,000 bytes, then score unseen text while learning from it.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
    EVAL_ONLY=1 ARTIFACT_PATH=logs/RUN_ID.bin python train_gpt.py
    python train_gpt.py --help

The log's last line holds the measure, val_bpb, bits per byte. In shapes: B sequences, T positions, D model width, H and K
query and key/value heads, d head width, L layers, V vocabulary, N tokens, W processes.
"""
import dataclasses
import difflib
import hashlib
import io
import json
import lzma
import math
import os
import platform
import re
import resource
import sys
import tempfile
import time
import uuid
from bisect import bisect_left
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class RunError(Exception):
    """Something the user can put right, said in one line."""


# -------
# Settings: the only place where a default, a range and a help line live
# -------

class Setting(NamedTuple):
    default: object
    help: str
    low: float = 0
    high: float = sys.float_info.max


SETTINGS = dict(  # the environment variable is the name in capitals
    data_path=("./data/datasets/fineweb10B_sp1024", "folder of the shards"),
    tokenizer_path=("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model"),
    vocab_size=(1024, "tokens of the tokenizer", 2, 65536),

    run_id=("", "logs/RUN_ID.txt is the log; empty: a UUID"),
    seed=(1337, "seed of the first weights", 0, 4294967295),
    iterations=(20000, "training steps at most"),
    max_wallclock_seconds=(600.0, "cap on training; 0: none"),
    warmup_steps=(20, "steps that compile, undone"),
    warmdown_iters=(3500, "last steps, falling to learning rate 0"),
    train_batch_tokens=(786432, "tokens per step, all processes", 8),
    train_seq_len=(2048, "training sequence in tokens", 2),
    train_log_every=(500, "steps between log lines; 0: none"),
    val_loss_every=(4000, "steps between validations; 0: just one"),
    val_batch_size=(524288, "tokens scored at once by 8 processes", 8),
    holdout_tokens=(524288, "last training tokens, to choose the average", 1),
    weight_average=("auto", "auto (least held-out loss), raw, ema, swa, ema_swa"),
    artifact_path=("", "empty: logs/RUN_ID.bin"),
    artifact_limit=(16_000_000, "bytes of train_gpt.py and artifact", 1),
    eval_only=(False, "only score ARTIFACT_PATH"),

    num_layers=(11, "layers", 1),
    model_dim=(512, "model width", 2),
    num_heads=(8, "query heads", 1),
    num_kv_heads=(4, "key/value heads", 1),
    mlp_mult=(3.0, "MLP hidden width over MODEL_DIM", 0.01),
    tie_embeddings=(True, "the head is the embedding table"),
    rope_base=(10000.0, "base of rotary frequencies", 1),
    rope_dims=(16, "rotating channels of a head", 4),
    logit_softcap=(30.0, "cap * tanh(logits / cap)", 1e-3),
    qk_gain_init=(1.5, "initial gain of the queries"),
    ln_scale=(True, "scale layer inputs by 1/sqrt(layer + 1)"),
    xsa_last_n=(4, "last layers with XSA"),
    bigram_vocab_size=(1536, "rows of the bigram table; 0: none"),
    bigram_dim=(128, "width of the bigram table", 1),
    ve_enabled=(True, "add value embeddings"),
    ve_dim=(128, "width of the value-embedding table", 1),
    ve_layers=((9, 10), "layers with value embeddings"),
    tied_embed_init_std=(0.005, "deviation of the first embeddings"),

    matrix_lr=(0.025, "Muon learning rate"),
    scalar_lr=(0.025, "AdamW learning rate of the rest"),
    tied_embed_lr=(0.035, "AdamW learning rate of the tables"),
    embed_lr=(0.6, "tables' learning rate if TIE_EMBEDDINGS=0"),
    head_lr=(0.008, "head's learning rate if TIE_EMBEDDINGS=0"),
    muon_momentum=(0.99, "Muon momentum", 0, 1),
    muon_momentum_warmup_start=(0.92, "Muon momentum at step 0", 0, 1),
    muon_momentum_warmup_steps=(1500, "steps until MUON_MOMENTUM"),
    muon_backend_steps=(5, "Newton-Schulz steps", 1),
    muon_wd=(0.04, "weight decay of the banks"),
    adam_wd=(0.04, "weight decay of the rest"),
    beta1=(0.9, "AdamW beta1", 0, 0.999999),
    beta2=(0.95, "AdamW beta2", 0, 0.999999),
    adam_eps=(1e-8, "AdamW epsilon"),
    grad_clip_norm=(0.3, "limit of the gradient norm; 0: none"),

    ema_enabled=(True, "average exponentially (EMA)"),
    ema_decay=(0.997, "decay of the EMA", 0, 1),
    swa_enabled=(True, "average the last steps (SWA)"),
    swa_every=(50, "steps between, below 0.2 of the peak rate", 1),
    late_qat=(True, "round weights at the end"),
    late_qat_threshold=(0.15, "learning rate / peak that starts it"),

    eval_seq_len=(2048, "scoring window in tokens", 2),
    eval_stride=(64, "tokens a sliding window scores", 1),
    eval_time_soft_cap_seconds=(570.0, "no extra epochs past 85% of it"),

    ttt_enabled=(True, "learn from what was scored"),
    ttt_muon=(True, "Newton-Schulz updates; 0: SGD"),
    ttt_ns_steps=(3, "Newton-Schulz steps", 1),
    ttt_entropy_adapt=(True, "epochs + 1 on hard chunks, - 1 on easy ones"),
    ttt_entropy_high=(2.1, "nats per token that are hard"),
    ttt_entropy_low=(1.75, "nats per token that are easy"),
    ttt_lr=(0.002, "learning rate, a cosine over the chunks"),
    ttt_epochs=(3, "epochs on a chunk", 1),
    ttt_chunk_tokens=(32768, "tokens scored, then learnt from", 2),
    ttt_batch_seqs=(32, "sequences per update, all processes", 1),
    ttt_freeze_blocks=(0, "first layers that do not learn"),
    ttt_momentum=(0.9, "momentum of SGD", 0, 0.999999),
    ttt_grad_clip=(1.0, "limit of the gradient norm; 0: none"),
)


FIELDS = {name.upper(): Setting(*row) for name, row in SETTINGS.items()}
Settings = dataclasses.make_dataclass(
    "Settings", [(name, type(row[0]), row[0]) for name, row in SETTINGS.items()], frozen=True)
GROUPS = dict(DATA_PATH="data", RUN_ID="run", NUM_LAYERS="model", MATRIX_LR="optimizer", EMA_ENABLED="averaging, QAT",
              EVAL_SEQ_LEN="evaluation", TTT_ENABLED="test-time training")
COMMON_PREFIXES = {"ARTIFACT", "DATA", "HEAD", "MAX", "MODEL", "NUM", "RUN"}
PARSERS = {
    int: ("an integer", int), float: ("a number", float), str: ("text", str),
    bool: ("0 or 1", {"0": False, "1": True}.__getitem__),
    tuple: ("integers separated by commas", lambda text: tuple(int(part) for part in text.split(",") if part))}


def show(value):
    """A setting's value as one writes it in the environment."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(int(value)) if isinstance(value, bool) else f"{value:.15g}" if isinstance(value, float) else str(value)


def allowed(f):
    limits = f" from {f.low}" + (f" to {f.high}" if f.high < sys.float_info.max else "")
    return PARSERS[type(f.default)][0] + (limits if type(f.default) in (int, float, tuple) else "")


def parse_value(name, text):
    f = FIELDS[name]
    try:
        value = PARSERS[type(f.default)][1](text)
        numbers = {str: (), tuple: value}.get(type(value), (value,))
        if all(f.low <= n <= f.high for n in numbers):
            return value
    except (ValueError, KeyError):
        pass
    raise RunError(f"{name}={text!r}: allowed is {allowed(f)}")


def parse_settings(environ, defaults={}):
    """Settings from a mapping such as os.environ, else from `defaults`. Raises RunError."""
    prefixes = {name.split("_")[0] for name in FIELDS if "_" in name} - COMMON_PREFIXES
    for name in environ:
        alike = difflib.get_close_matches(name, FIELDS, cutoff=0.91) or "_" in name and (
            name.split("_")[0] in prefixes or any(field.startswith(name) for field in FIELDS))
        if name not in FIELDS and alike:
            nearest = difflib.get_close_matches(name, FIELDS, cutoff=0)[0]
            raise RunError(f"{name} is no setting; the nearest is {nearest} (--help lists all)")
    values = defaults | {name.lower(): parse_value(name, environ[name]) for name in FIELDS if name in environ}
    s = Settings(**values)
    if s.eval_only and not defaults and s.artifact_path:
        return s  # the artifact's settings are still to come
    if "ve_layers" not in values:  # a shallower model may lack the default's layers
        s = dataclasses.replace(s, ve_layers=tuple(layer for layer in s.ve_layers if layer < s.num_layers))
    head_dim = s.model_dim // s.num_heads
    for broken, rule in (
        (s.model_dim % s.num_heads or head_dim % 2, "MODEL_DIM / NUM_HEADS must be whole and even"),
        (s.num_heads % s.num_kv_heads, "NUM_HEADS must be a multiple of NUM_KV_HEADS"),
        (s.rope_dims % 2 or s.rope_dims > head_dim, "ROPE_DIMS must be even and at most MODEL_DIM / NUM_HEADS"),
        (int(s.mlp_mult * s.model_dim) < 1, "MLP_MULT * MODEL_DIM must be at least 1"),
        (s.bigram_vocab_size == 1, "BIGRAM_VOCAB_SIZE must be 0 or at least 2"),
        (len(set(s.ve_layers) & set(range(s.num_layers))) < len(s.ve_layers), "VE_LAYERS must differ, below NUM_LAYERS"),
        (s.train_batch_tokens % (8 * s.train_seq_len), "TRAIN_BATCH_TOKENS must be a multiple of 8 * TRAIN_SEQ_LEN"),
        (s.eval_stride > s.eval_seq_len, "EVAL_STRIDE must be at most EVAL_SEQ_LEN"),
        (s.ttt_enabled and s.ttt_chunk_tokens < s.train_seq_len, "TTT_CHUNK_TOKENS must be at least TRAIN_SEQ_LEN"),
        (s.ttt_freeze_blocks > s.num_layers, "TTT_FREEZE_BLOCKS must be at most NUM_LAYERS"),
        (s.weight_average not in ("auto", "raw", "ema", "swa", "ema_swa"), "WEIGHT_AVERAGE: auto, raw, ema, swa or ema_swa"),
        ("ema" in s.weight_average and not s.ema_enabled, "WEIGHT_AVERAGE needs EMA_ENABLED=1"),
        ("swa" in s.weight_average and not s.swa_enabled, "WEIGHT_AVERAGE needs SWA_ENABLED=1"),
        (s.eval_only and not s.artifact_path, "EVAL_ONLY needs ARTIFACT_PATH"),
        ("/" in s.run_id, "RUN_ID must be a file name without '/'"),
    ):
        if broken:
            values = [f"{name}={show(getattr(s, name.lower()))}" for name in re.findall("[A-Z0-9_]+", rule) if name in FIELDS]
            raise RunError(f"{rule} ({', '.join(values)})")
    return s


def help_text():
    lines = ["usage: [NAME=value ...] torchrun --standalone --nproc_per_node=8 train_gpt.py",
             "The settings are environment variables; these are their defaults:"]
    for name, f in FIELDS.items():
        lines += ["", GROUPS[name] + ":"] if name in GROUPS else []
        lines.append(f"  {name + '=' + show(f.default):38} {f.help} ({allowed(f)})")
    return "\n".join(lines)


# -------
# Processes: one a GPU; every helper is a no-op on a single one
# -------

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def start_processes():
    """Join torchrun's process group, if any, and return the device. Raises RunError."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if world not in (1, 2, 4, 8):
        raise RunError(f"world size {world} does not divide 8: use 1, 2, 4 or 8 processes")
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise RunError(f"process {local} has no GPU of its own: lower --nproc_per_node")
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def all_reduce(tensor):
    """Sum a tensor over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_list(tensors):
    """The same for tensors of one dtype, as one message."""
    if world_size() > 1:
        flat = all_reduce(torch.cat([t.flatten() for t in tensors])).split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(flat, tensors)])


def from_rank0(value):
    """Rank 0's value, any object, on every rank."""
    holder = [value]
    if world_size() > 1:
        dist.broadcast_object_list(holder)
    return holder[0]


def together(action):
    """The result of action(); what one rank raises, all raise as RunError."""
    result = error = None
    try:
        result = action()
    except (RunError, OSError) as e:
        error = str(e)
    if all_reduce(torch.tensor(float(error is not None))).item():
        errors = [error] * world_size()
        if world_size() > 1:
            dist.all_gather_object(errors, error)
        raise RunError(next(e for e in errors if e))
    return result


def share(total):
    """This rank's contiguous part [low, high) of `total` items."""
    return total * rank() // world_size(), total * (rank() + 1) // world_size()


log_file = None  # rank 0's logs/RUN_ID.txt


def log(line):
    for file in (sys.stdout, log_file) if log_file else (sys.stdout,):
        if rank() == 0:
            print(line, file=file, flush=True)


class Progress:
    """Called with a stage's finished fraction, logs the remaining time every ten seconds."""

    def __init__(self, stage):
        self.stage, self.start, self.last = stage, time.perf_counter(), time.perf_counter()

    def __call__(self, done):
        now = time.perf_counter()
        if now - self.last > 10 and done > 0:
            self.last = now
            log(f"progress: {self.stage} {done:.0%}, {(now - self.start) * (1 / done - 1):.0f} s left")


def open_outputs(log_path, artifact_path, source):
    """Rank 0 opens the log, which begins with the source, and tries the artifact's folder. Raises OSError."""
    global log_file
    if rank() == 0:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        if log_path.exists():
            os.replace(log_path, f"{log_path}.previous")
        log_file = open(log_path, "w", encoding="utf-8")
        print(source, "=" * 100, sep="\n", file=log_file)
        if artifact_path:
            if artifact_path.is_dir():
                raise OSError(f"ARTIFACT_PATH={artifact_path} is a folder")
            artifact_path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=artifact_path.parent).close()


def write_atomically(path, data):
    """Under its name a file is whole or not there. Raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_on_rank0(path):
    """A file's bytes on every rank. Raises RunError."""
    return from_rank0(together(lambda: path.read_bytes() if rank() == 0 else None))


@torch.no_grad()
def copy_weights(weights, values):
    torch._foreach_copy_(weights, values)


@contextmanager
def undone(weights):
    before = [w.detach().clone() for w in weights]
    yield
    copy_weights(weights, before)


# -------
# Tokens and bytes
# -------

GET_DATA = "`make demo` builds demo data, `python tools/fineweb.py` downloads FineWeb"


def load_tokenizer(path, vocab_size):
    """(tokenizer, SHA-256 of its file). Raises RunError."""
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        data = Path(path).read_bytes()
        tokenizer.LoadFromSerializedProto(data)
    except (OSError, RuntimeError):
        raise RunError(f"TOKENIZER_PATH={path} is no SentencePiece model; {GET_DATA}") from None
    if tokenizer.vocab_size() != vocab_size:
        raise RunError(f"TOKENIZER_PATH={path} has {tokenizer.vocab_size()} tokens but VOCAB_SIZE={vocab_size}")
    return tokenizer, hashlib.sha256(data).hexdigest()


class ByteTables(NamedTuple):
    """(V,) each: bytes without leading space; has it one; is it a boundary (control, unknown, unused)."""
    base_bytes: Tensor
    has_leading_space: Tensor
    is_boundary: Tensor

    def count(self, previous, target):
        """Bytes of targets behind the tokens `previous`; behind a boundary a leading space is dropped."""
        return self.base_bytes[target] + (self.has_leading_space[target] & ~self.is_boundary[previous])


def byte_tables(tokenizer):
    rows = []
    for i in range(tokenizer.vocab_size()):
        piece = tokenizer.id_to_piece(i)
        boundary = tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
        space = not boundary and piece.startswith("\u2581")
        text = piece[space:].replace("\u2581", " ")  # inside a piece it decodes to a space as well
        rows.append((0 if boundary else 1 if tokenizer.is_byte(i) else len(text.encode()), space, boundary))
    return ByteTables(*map(torch.tensor, zip(*rows)))


# -------
# Data: memory-mapped shards, read ahead on a thread
# -------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256


def open_shard(path):
    """Map a shard: 256 int32 (magic, version, token count, zeros), then tokens, uint16, little-endian. Raises RunError."""
    try:
        header, size = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS), os.path.getsize(path)
    except OSError as e:
        raise RunError(f"shard {path}: {e.strerror}") from None
    if len(header) < SHARD_HEADER_INTS or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
        raise RunError(f"shard {path}: no token shard (it must start with {SHARD_MAGIC}, {SHARD_VERSION})")
    tokens, offset = int(header[2]), 4 * SHARD_HEADER_INTS
    if tokens < 1 or size != offset + 2 * tokens:
        raise RunError(f"shard {path}: empty, truncated or altered ({size} bytes for {tokens} tokens)")
    return np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(tokens,))


def open_shards(data_path, split):
    """In name order. Raises RunError."""
    paths = sorted(Path(data_path).glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise RunError(f"DATA_PATH={data_path} has no fineweb_{split}_*.bin; {GET_DATA}")
    return [open_shard(path) for path in paths]


def check_ids(tokens, vocab_size, where):
    """The tokens as int32. Raises RunError if an id is not below vocab_size."""
    if tokens.max() >= vocab_size:
        raise RunError(f"{where}: token id {tokens.max()} is not below VOCAB_SIZE={vocab_size}")
    return torch.from_numpy(tokens.astype(np.int32))


def validation_tokens(data_path, vocab_size, window):
    """All of it, (N + 1,) int32. Raises RunError."""
    tokens = check_ids(np.concatenate(open_shards(data_path, "val")), vocab_size, "validation shards")
    if len(tokens) <= window:
        raise RunError(f"validation shards: {len(tokens)} tokens do not fill a window of EVAL_SEQ_LEN={window}")
    return tokens


class TokenStream:
    """Shards as one endless stream; read() wraps around and keeps no state."""

    def __init__(self, shards):
        self.shards, self.starts = shards, np.cumsum([0] + [len(shard) for shard in shards])

    def read(self, position, count):
        parts = []
        while count > 0:
            position %= int(self.starts[-1])
            i = int(np.searchsorted(self.starts, position, side="right")) - 1
            parts.append(self.shards[i][position - self.starts[i]:][:count])
            position, count = position + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)


def split_holdout(shards, tokens, seq_len):
    """Cut off the last shard's tail, at most `tokens` and a quarter of it, whole sequences + 1. Raises RunError."""
    held = min(tokens, len(shards[-1]) // 4) // seq_len * seq_len + 1
    if held == 1:
        raise RunError(f"TRAIN_SEQ_LEN={seq_len} exceeds HOLDOUT_TOKENS={tokens} or a quarter of the last train shard")
    return shards[:-1] + [shards[-1][:-held]], shards[-1][-held:]


def batches(stream, span, vocab_size, pin):
    """Yield this rank's spans of step 0, 1, ..., (8 / W, span + 1) int32, read ahead on a thread: of the step's 8 spans
    micro-step m of rank r takes number m * W + r. Raises RunError."""
    first, world = rank(), world_size()

    def read(step):
        spans = torch.stack([check_ids(stream.read(i * (span + 1), span + 1), vocab_size, f"training span {i}")
                             for i in range(8 * step + first, 8 * step + 8, world)])
        return spans.pin_memory() if pin else spans

    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(read, step) for step in range(4))
        for step in count(4):
            yield ahead.popleft().result()
            ahead.append(pool.submit(read, step))


# -------
# Model
# -------

def torch_attention(q, k, v):
    """Causal grouped-query attention: q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def choose_attention(device, heads, kv_heads, head_dim):
    """(name, function): FlashAttention 3, or else the first PyTorch kernel that runs here."""
    if device.type == "cpu":
        return "PyTorch CPU", torch_attention
    builtin = ("cudnn", "flash", "mem_efficient", "math")
    kernels = dict.fromkeys(builtin, torch_attention)
    try:
        from flash_attn_interface import flash_attn_func
        kernels = {"FlashAttention 3": lambda q, k, v: flash_attn_func(q, k, v, causal=True)} | kernels
    except (ImportError, OSError):
        pass
    for name, attention in kernels.items():
        torch._dynamo.reset()  # the switches are no guards
        for other in builtin:
            getattr(torch.backends.cuda, f"enable_{other}_sdp")(other == name)
        try:
            q, k, v = (torch.randn(1, 128, n, head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
                       for n in (heads, kv_heads, kv_heads))
            torch.compile(attention, fullgraph=True)(q, k, v).sum().backward()
            return name, attention
        except (RuntimeError, AttributeError) as e:  # some versions return a tuple
            reason = " ".join(str(e).split())[:300]
    raise RunError(f"no attention kernel runs here: {reason}")


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(length, dims, base, device):
    """cos and sin, (T, 1, dims / 2) fp32; the base grows beyond 1,024 positions."""
    base *= max(1, length / 1024) ** (dims / (dims - 2))
    frequencies = base ** (-torch.arange(0, dims, 2, device=device) / dims)
    angles = torch.outer(torch.arange(length, device=device), frequencies)[:, None]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate the first channels of each head of x (B, T, heads, d), channel i with channel i + dims / 2."""
    x1, x2, rest = x.tensor_split((cos.size(-1), 2 * cos.size(-1)), dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


class Block(nn.Module):
    """One layer: attention, then MLP, on a mix of stream and embedding. Its matrices come from the banks."""

    def __init__(self, s, layer, attention):
        super().__init__()
        self.attention, self.kv_heads, self.xsa = attention, s.num_kv_heads, layer >= s.num_layers - s.xsa_last_n
        self.input_scale = 1 / math.sqrt(layer + 1) if s.ln_scale else 1.0
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, s.model_dim))
        self.attn_scale = nn.Parameter(torch.ones(s.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(s.model_dim))
        self.q_gain = nn.Parameter(torch.full((s.num_heads,), s.qk_gain_init))

    def forward(self, x, x0, value_embedding, rotary, q_w, k_w, v_w, o_w, up_w, down_w):
        attn_scale, mlp_scale, (m0, m1) = (p.to(x.dtype) for p in (self.attn_scale, self.mlp_scale, self.resid_mix))
        u = m0 * x + m1 * x0
        h = norm(u) * self.input_scale
        v = F.linear(h, v_w)
        if value_embedding is not None:
            v = v + value_embedding
        y = u + attn_scale * F.linear(self.attend(F.linear(h, q_w), F.linear(h, k_w), v, *rotary), o_w)
        h = F.linear(norm(y) * self.input_scale, up_w)
        return y + mlp_scale * F.linear(F.leaky_relu(h, 0.5).square(), down_w)

    def attend(self, q, k, v, cos, sin):
        """q (B, T, H*d), k and v (B, T, K*d) -> (B, T, H*d)."""
        q = q.unflatten(-1, (len(self.q_gain), -1))
        k, v = (t.unflatten(-1, (self.kv_heads, -1)) for t in (k, v))
        q = rotate(norm(q), cos, sin) * self.q_gain.to(q.dtype)[:, None]
        y = self.attention(q, rotate(norm(k), cos, sin), v)
        if self.xsa:  # keep nothing along the position's own value
            y, along = y.unflatten(2, (self.kv_heads, -1)), F.normalize(v, dim=-1).unsqueeze(3)
            y = y - (y * along).sum(-1, keepdim=True) * along
        return y.flatten(2)


class GPT(nn.Module):
    """fp32 weights, cast to `dtype` where used. The large matrices live in four banks: qo_bank (2L, D, D), layer i's query
    matrix at i, output matrix at L + i; kv_bank (2L, K*d, D) likewise; up_bank (L, hidden, D); down_bank (L, D, hidden)."""
    BANKS = ("qo_bank", "kv_bank", "up_bank", "down_bank")

    def __init__(self, s, attention=torch_attention, dtype=torch.float32):
        super().__init__()
        L, D, KD, hidden = s.num_layers, s.model_dim, s.model_dim // s.num_heads * s.num_kv_heads, int(s.mlp_mult * s.model_dim)

        def new(*shape, value=0.0, on=True):
            return nn.Parameter(torch.full(shape, value)) if on else None

        self.s, self.dtype, self.encoder_layers = s, dtype, L // 2
        self.ve_layers = s.ve_layers if s.ve_enabled else ()
        bigrams, values = s.bigram_vocab_size > 0, len(self.ve_layers) > 0
        self.qo_bank, self.kv_bank = new(2 * L, D, D), new(2 * L, KD, D)
        self.up_bank, self.down_bank = new(L, hidden, D), new(L, D, hidden)
        self.tok_emb, self.head = new(s.vocab_size, D), new(s.vocab_size, D, on=not s.tie_embeddings)
        self.bigram_table = new(s.bigram_vocab_size, s.bigram_dim, on=bigrams)
        self.bigram_proj = new(D, s.bigram_dim, on=bigrams and s.bigram_dim != D)
        self.bigram_scale = new(value=0.05, on=bigrams)
        self.ve_table = new(s.vocab_size, s.ve_dim, on=values)
        self.ve_proj = new(KD, s.ve_dim, on=values and s.ve_dim != KD)
        self.ve_scale, self.ve_layer_scales = new(value=0.1, on=values), new(len(self.ve_layers), value=1.0, on=values)
        self.smear_gate, self.skip_weights = new(D), new(L // 2, D, value=1.0, on=L > 1)
        self.blocks = nn.ModuleList(Block(s, layer, attention) for layer in range(L))

    @torch.no_grad()
    def initialize(self):
        """Draw initial weights from torch's generator; the others keep what they have."""
        self.tok_emb.normal_(0, self.s.tied_embed_init_std)
        if self.ve_table is not None:
            self.ve_table.normal_(0, 0.01)
        projections = [p for p in (self.bigram_proj, self.ve_proj) if p is not None and min(p.shape) >= 64]
        for matrix in [*self.qo_bank[:len(self.blocks)], *self.kv_bank, *self.up_bank, *projections]:
            nn.init.orthogonal_(matrix)
        return self

    def compile_on_cuda(self):
        if self.tok_emb.is_cuda:
            self.compile(dynamic=False, fullgraph=True)
        return self

    def banks(self):
        return [getattr(self, name) for name in self.BANKS]

    def forward(self, tokens, targets, scales=None):
        """tokens, targets (B, T) int64 -> negative log-likelihoods in nats (B, T) fp32. scales: see bank_scales."""
        logits = self.logits(tokens, scales)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def logits(self, tokens, scales=None):
        """(B, T) int64 -> (B, T, V) fp32."""
        s, L, banks = self.s, len(self.blocks), self.banks()
        if scales is not None:
            banks = [fake_quantize(bank, scale) for bank, scale in zip(banks, scales)]
        qo, kv, up, down = (bank.to(self.dtype).unbind() for bank in banks)
        rotary = [t.to(self.dtype) for t in rotary_tables(tokens.size(1), s.rope_dims, s.rope_base, tokens.device)]
        x = x0 = self.embed(tokens)
        values = self.lookup(tokens, self.ve_table, self.ve_proj, self.ve_scale) if self.ve_layers else None
        skips = []
        for i, block in enumerate(self.blocks):
            if i >= self.encoder_layers and skips:
                x = x + self.skip_weights[i - self.encoder_layers].to(x.dtype) * skips.pop()
            ve = self.ve_layer_scales[self.ve_layers.index(i)].to(x.dtype) * values if i in self.ve_layers else None
            x = block(x, x0, ve, rotary, qo[i], kv[i], kv[L + i], qo[L + i], up[i], down[i])
            if i < self.encoder_layers:
                skips.append(x)
        head = self.tok_emb if self.head is None else self.head
        logits = F.linear(norm(x), head.to(x.dtype)).float()
        return s.logit_softcap * torch.tanh(logits / s.logit_softcap)

    def lookup(self, index, table, projection, scale):
        x = F.embedding(index, table).to(self.dtype)
        return (x if projection is None else F.linear(x, projection.to(self.dtype))) * scale.to(self.dtype)

    def embed(self, tokens):
        """Token plus hashed-bigram embedding, normed, then mixed with the position before: (B, T, D)."""
        x = F.embedding(tokens, self.tok_emb).to(self.dtype)
        if self.bigram_table is not None:
            t, last = tokens.int(), len(self.bigram_table) - 1
            bucket = F.pad((36313 * t[:, 1:] ^ 27191 * t[:, :-1]) % last, (1, 0), value=last)
            x = x + self.lookup(bucket, self.bigram_table, self.bigram_proj, self.bigram_scale)
        x, gate = norm(x), torch.sigmoid(self.smear_gate).to(self.dtype)
        return (1 - gate) * x + gate * F.pad(x, (0, 0, 1, 0))[:, :-1]

    def zero_frozen_gradients(self, n):
        L = len(self.blocks)
        frozen = [bank.grad[at:at + n] for bank in self.banks() for at in range(0, len(bank), L)]
        frozen += [p.grad for block in self.blocks[:n] for p in block.parameters()]
        frozen += [self.ve_layer_scales.grad[j] for j, layer in enumerate(self.ve_layers) if layer < n]
        frozen += [self.skip_weights.grad[:max(0, n - self.encoder_layers)]] if self.skip_weights is not None else []
        torch._foreach_zero_(frozen)


# -------
# Optimizers: Muon for the banks, AdamW for the rest
# -------

def newton_schulz(G, steps):
    """Push the singular values of each matrix of G (..., rows, columns) towards 1, in bf16: the quintic iteration of Muon
    (K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.size(-2) > G.size(-1)
    X = G.bfloat16().mT if tall else G.bfloat16()
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.mT if tall else X


def muon_update(grad, buffer, momentum, steps):
    """Nesterov momentum (in `buffer`, bf16), orthogonalised: (n, rows, columns) -> the same in bf16."""
    g = grad.bfloat16()
    buffer.mul_(momentum).add_(g)
    return newton_schulz(g.add(buffer, alpha=momentum), steps)


@torch.no_grad()
def apply_muon_update(bank, update, lr, weight_decay):
    rows, columns = bank.shape[-2:]
    bank.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * max(1, rows / columns) ** 0.5)


reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before torch 2.13
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Optimizers:
    """Muon, shared out over the processes, beside AdamW on each. The banks' gradients (n, rows, columns), the largest
    first, are reduce-scattered as (ceil(n / W), rows, columns), orthogonalised, all-gathered while AdamW steps."""

    def __init__(self, model, s):
        self.s = s
        self.banks = sorted(model.banks(), key=torch.numel, reverse=True)
        table_lr = s.tied_embed_lr if s.tie_embeddings else s.embed_lr
        rates = dict(tok_emb=table_lr, bigram_table=table_lr, ve_table=table_lr, head=s.head_lr)
        rest = {name: p for name, p in model.named_parameters() if name not in model.BANKS}
        self.rest = list(rest.values())
        groups = [dict(base_lr=lr, params=[p for name, p in rest.items() if rates.get(name, s.scalar_lr) == lr])
                  for lr in {*rates.values(), s.scalar_lr}]
        self.adamw = torch.optim.AdamW([group for group in groups if group["params"]], betas=(s.beta1, s.beta2),
                                       eps=s.adam_eps, weight_decay=s.adam_wd, fused=True)
        self.momentum = [bank.new_zeros((-(-len(bank) // world_size()), *bank.shape[1:]), dtype=torch.bfloat16)
                         for bank in self.banks]

    @torch.no_grad()
    def step(self, multiplier, momentum):
        """Sum gradients over the ranks, clip, update, clear. Returns the unclipped norm, on the device."""
        s, W = self.s, world_size()
        shards, grads, works = [bank.grad for bank in self.banks], [p.grad for p in self.rest], []
        if W > 1:
            shards = [torch.empty_like(buffer, dtype=torch.float32) for buffer in self.momentum]
            for bank, shard in zip(self.banks, shards):
                padded = F.pad(bank.grad, (0, 0, 0, 0, 0, len(shard) * W - len(bank)))
                works.append(reduce_scatter(shard, padded, async_op=True))
            all_reduce_list(grads)
        for work in works:
            work.wait()
        squares = [torch.stack(torch._foreach_norm(tensors)).square().sum() for tensors in (shards, grads)]
        total = (all_reduce(squares[0]) + squares[1]).sqrt()
        if s.grad_clip_norm:
            torch._foreach_mul_(shards + grads, (s.grad_clip_norm / (total + 1e-6)).clamp(max=1))
        updates, works = [], []
        for shard, buffer in zip(shards, self.momentum):
            update = muon_update(shard, buffer, momentum, s.muon_backend_steps).contiguous()
            if W > 1:
                own, update = update, update.new_empty((len(shard) * W, *shard.shape[1:]))
                works.append(all_gather(update, own, async_op=True))
            updates.append(update)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * multiplier
        self.adamw.step()
        for work in works:
            work.wait()
        for bank, update in zip(self.banks, updates):
            apply_muon_update(bank, update[:len(bank)], s.matrix_lr * multiplier, s.muon_wd)
        for p in self.banks + self.rest:
            p.grad = None
        return total


def lr_multiplier(step, s, elapsed_ms, budget_ms):
    """1, then linearly to 0 over the last WARMDOWN_ITERS steps of ITERATIONS or of those that fit the budget."""
    if budget_ms is None:
        return min(1.0, (s.iterations - step) / max(s.warmdown_iters, 1))
    warmdown_ms = s.warmdown_iters * elapsed_ms / max(step, 1)
    return min(1.0, max(budget_ms - elapsed_ms, 0.0) / max(warmdown_ms, 1e-9))


def muon_momentum(step, s):
    fraction = min(step / s.muon_momentum_warmup_steps, 1) if s.muon_momentum_warmup_steps else 1
    return (1 - fraction) * s.muon_momentum_warmup_start + fraction * s.muon_momentum


# -------
# Averaging
# -------

class WeightAverages:

    def __init__(self, weights, s):
        self.weights, self.s, self.swa, self.swa_count = weights, s, None, 0
        self.ema = [w.detach().clone() for w in weights] if s.ema_enabled else None

    @torch.no_grad()
    def update(self, step, multiplier):
        if self.ema:
            torch._foreach_lerp_(self.ema, self.weights, 1 - min(self.s.ema_decay, (1 + step) / (10 + step)))
        if self.s.swa_enabled and multiplier < 0.2 and step % self.s.swa_every == 0:
            self.swa_count += 1
            self.swa = self.swa or [w.detach().clone() for w in self.weights]
            torch._foreach_lerp_(self.swa, self.weights, 1 / self.swa_count)

    @torch.no_grad()
    def candidates(self):
        found = dict(raw=[w.detach().clone() for w in self.weights], ema=self.ema, swa=self.swa)
        if self.ema and self.swa:
            found["ema_swa"] = torch._foreach_lerp(self.ema, self.swa, 0.5)
        return {name: weights for name, weights in found.items() if weights}


# -------
# Quantization and artifact
# -------

CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
SMALL = 65536  # matrices of up to so many elements stay in fp16
TINY = 2.0 ** -24  # the least fp16 above zero: as a scale's floor it only avoids zero


def row_quantiles(a, quantiles):
    """torch.quantile(a, q, dim=-1, keepdim=True) for q near 1, without a sort or a wait for the device."""
    last = a.size(-1) - 1
    top = a.topk(min(last, int(last * (1 - min(quantiles))) + 1) + 1, dim=-1).values
    positions = [float(np.float32(q) * np.float32(last)) for q in quantiles]
    return [torch.lerp(top[..., last - int(p), None], top[..., last - math.ceil(p), None], p % 1) for p in positions]


def round_to(w, scale, limit):
    return (w / scale).round().clamp(-limit, limit)


@torch.no_grad()
def int6_scales(bank, floor=TINY):
    """A scale for each row, (n, rows, 1), fp16 held as fp32; each matrix takes the clip quantile of least squared error."""
    best, least = bank.new_zeros(()), math.inf
    for clip in row_quantiles(bank.abs(), CLIP_QUANTILES):
        scale = (clip / 31).clamp_min(floor).half().float()
        error = (round_to(bank, scale, 31) * scale - bank).square().mean(dim=(1, 2), keepdim=True)
        best = torch.where(error < least, scale, best)
        least = error.clamp(max=least)
    return best


def bank_scales(model, floor):
    """Each bank's scales as the artifact will have them; None for small matrices."""
    return [int6_scales(bank, floor) if bank[0].numel() > SMALL else None for bank in model.banks()]


def fake_quantize(bank, scale):
    """The bank exactly as the artifact gives it back; the gradient passes straight through."""
    rounded = bank.half().float() if scale is None else round_to(bank, scale, 31) * scale
    return rounded.detach() + (bank - bank.detach())


def quantize_int8(w, floor=TINY):
    """(rows, columns) -> integers, fp16 scales (rows, 1); rounding uses the scales in fp32."""
    scale = (row_quantiles(w.abs(), [0.9999984])[0] / 127).clamp_min(floor)
    return round_to(w, scale, 127), scale.half()


@torch.no_grad()
def quantize(weights, floor):
    """NAME -> int8, NAME.scale -> fp16 for banks (int6) and large tables (int8); NAME -> fp16 for others."""
    stored = {}
    for name, w in weights.items():
        if name in GPT.BANKS and w[0].numel() > SMALL:
            scale = int6_scales(w, floor)
            q = round_to(w, scale, 31)
        elif name not in GPT.BANKS and w.dim() == 2 and w.numel() > SMALL:
            q, scale = quantize_int8(w)
        else:
            stored[name] = w.half()
            continue
        stored[name], stored[name + ".scale"] = q.to(torch.int8), scale.half()
    return stored


def dequantize(stored):
    return {name: t.float() * stored.get(name + ".scale", torch.tensor(1.0)).float()
            for name, t in stored.items() if not name.endswith(".scale")}


def fit_scale_floor(weights, limit):
    """The least floor of the int6 scales whose artifact should fit `limit` bytes; TINY if none would. LZMA adds about 3%
    to the integers' entropy (measured)."""
    def size(t):
        if t.dtype != torch.int8:
            return 2 * t.numel()
        p = torch.bincount(t.flatten().int() + 128).double() / t.numel()
        return -1.03 / 8 * t.numel() * torch.xlogy(p, p).sum().item() / math.log(2)

    floors = [TINY] + [2 ** (i / 70 - 10) for i in range(700)]
    i = bisect_left(floors, True, key=lambda floor: sum(map(size, quantize(weights, floor).values())) <= limit)
    return floors[i] if i < len(floors) else TINY


MAGIC = b"GPT16MB1"
NAMES = list(SETTINGS)
MODEL_SETTINGS = ["vocab_size", *NAMES[NAMES.index("num_layers"):NAMES.index("matrix_lr")]]
LOCAL_SETTINGS = {"data_path", "tokenizer_path", "run_id", "artifact_path", "artifact_limit", "eval_only"}


def pack_artifact(s, fingerprint, stored):
    """8 bytes magic, 32 bytes SHA-256 of the rest, the rest: an .npz file as an xz stream. It holds what quantize() gives
    and `header`, JSON as uint8: "tokenizer" (SHA-256 of its file) and "settings"."""
    settings = {name: show(getattr(s, name)) for name in NAMES if name not in LOCAL_SETTINGS}
    header = json.dumps(dict(tokenizer=fingerprint, settings=settings)).encode()
    file = io.BytesIO()
    np.savez(file, header=np.frombuffer(header, np.uint8), **{name: t.cpu().numpy() for name, t in stored.items()})
    packed = lzma.compress(file.getvalue(), preset=9)
    return MAGIC + hashlib.sha256(packed).digest() + packed


def unpack_artifact(data, path):
    """(tokenizer fingerprint, settings, fp32 weights); nothing in the file is executed. Raises RunError."""
    if not data.startswith(MAGIC) or hashlib.sha256(data[40:]).digest() != data[8:40]:
        raise RunError(f"artifact {path}: truncated, altered or no artifact (wrong magic or checksum)")
    try:
        with np.load(io.BytesIO(lzma.decompress(data[40:])), allow_pickle=False) as file:
            stored = {name: torch.from_numpy(file[name]) for name in file.files}
        header = json.loads(bytes(stored.pop("header").numpy()))
        settings = {name: parse_value(name.upper(), str(text)) for name, text in header["settings"].items()}
        if settings.keys() != set(NAMES) - LOCAL_SETTINGS:
            raise ValueError("it has other settings")
        return header["tokenizer"], settings, dequantize(stored)
    except Exception as e:
        raise RunError(f"artifact {path}: not of this version's format ({e})") from None


# -------
# Scoring
# -------

def plan_windows(targets, window, stride):
    """Windows that score each target (token i + 1) once, (n, 3) int64: start of the inputs, begin and end of the targets.
    The first scores all, each later one its last `stride`, one more what is left."""
    window = min(window, targets)
    start = torch.arange(0, targets - window + 1, stride)
    plan = torch.stack((start, start + window - stride, start + window), dim=1)
    plan[0, 1] = 0
    last = plan[-1, 2].item()
    return plan if last == targets else torch.cat((plan, torch.tensor([[targets - window, last, targets]])))


class Score(NamedTuple):
    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    val_loss = property(lambda self: self.nats / max(self.tokens, 1))
    val_bpb = property(lambda self: self.nats / math.log(2) / max(self.bytes, 1))

    def __add__(self, other):
        return Score(*map(sum, zip(self, other)))


class Scorer:
    """Scores windows of tokens (N + 1,) int32, which lie, like the byte tables, on the model's device."""

    def __init__(self, model, tokens, tables, window, batch_tokens):
        self.model, self.tokens, self.tables = model, tokens, tables
        self.targets, self.window = len(tokens) - 1, min(window, len(tokens) - 1)
        self.batch = max(1, batch_tokens // self.window)

    @torch.no_grad()
    def score(self, plan, progress=lambda done: None):
        """Score a plan's windows, shared out over the ranks; all get the sum. Batches have one shape, on CUDA always the
        same: the last is filled up with windows that score nothing."""
        low, high = share(len(plan))
        plan = plan.to(self.tokens.device)
        batch = self.batch if self.tokens.is_cuda else min(self.batch, max(1, -(-len(plan) // world_size())))
        sums = torch.zeros(3, dtype=torch.float64, device=self.tokens.device)
        for i in range(low, high, batch):
            rows = F.pad(plan[i:min(i + batch, high)], (0, 0, 0, max(0, i + batch - high)))
            start, begin, end = rows[:, :, None].unbind(1)
            at = start + torch.arange(self.window, device=sums.device)
            x, y = self.tokens[at].long(), self.tokens[at + 1].long()
            scored = (begin <= at) & (at < end)
            nll = self.model(x, y).double()
            sums += torch.stack(((nll * scored).sum(), scored.sum(), (self.tables.count(x, y) * scored).sum()))
            progress(min((i + batch - low) / (high - low), 1))
        nats, tokens, size = all_reduce(sums).tolist()
        return Score(nats, int(tokens), int(size))

    def score_all(self, stride, stage="scoring"):
        return self.score(plan_windows(self.targets, self.window, stride), Progress(stage))


# -------
# Test-time training: score a chunk, then learn from it
# -------

def chunk_epochs(s, val_loss, late):
    change = (val_loss > s.ttt_entropy_high and not late) - (0 < val_loss < s.ttt_entropy_low)
    return max(s.ttt_epochs + change * s.ttt_entropy_adapt, 1)


class Learner:
    """Moves the weights along gradients from text that has been scored."""

    def __init__(self, model, s):
        self.model, self.s = model, s
        self.weights = list(model.parameters())
        self.sgd = None if s.ttt_muon else torch.optim.SGD(self.weights, lr=0.0, momentum=s.ttt_momentum)

    def learn(self, tokens, epochs, lr):
        """Train on the whole sequences in tokens (C + 1,), TTT_BATCH_SEQS an update over all ranks together. Batches have
        one shape: a rank with fewer sequences adds some of weight zero."""
        T, size = self.s.train_seq_len, self.s.ttt_batch_seqs
        sequences = (len(tokens) - 1) // T
        x, y = (t[:sequences * T].view(sequences, T).long() for t in (tokens, tokens[1:]))
        slot = torch.arange(-(-min(size, sequences) // world_size()), device=tokens.device)
        for first in [*range(0, sequences, size)] * epochs:
            rows = min(size, sequences - first)
            low, high = share(rows)
            weight = (slot < high - low) / (rows * T)
            row = (first + low + slot).clamp(max=sequences - 1)
            (self.model(x[row], y[row]) * weight[:, None]).sum().backward()
            self.update(lr)

    @torch.no_grad()
    def update(self, lr):
        all_reduce_list([p.grad for p in self.weights])
        self.model.zero_frozen_gradients(self.s.ttt_freeze_blocks)
        if self.s.ttt_grad_clip:
            nn.utils.clip_grad_norm_(self.weights, self.s.ttt_grad_clip)
        if self.sgd:
            self.sgd.param_groups[0]["lr"] = lr
            self.sgd.step()
        else:
            for p in self.weights:
                p.add_(newton_schulz(p.grad, self.s.ttt_ns_steps) if p.dim() >= 2 else p.grad, alpha=-lr)
        self.model.zero_grad()


def score_first_ttt(scorer, learner, s, seconds=lambda: 0.0):
    """Score a stream chunk by chunk, each before the weights learn from it: the whole Score, each chunk's (Score, epochs).
    A window belongs to the chunk of the first target it scores. seconds() is how long the evaluation has run."""
    C, start = s.ttt_chunk_tokens, time.perf_counter()
    chunks = -(-scorer.targets // C)
    plan = plan_windows(scorer.targets, scorer.window, s.eval_stride)
    bounds = torch.searchsorted(plan[:, 1].contiguous(), torch.arange(chunks + 1) * C).tolist()
    total, records, progress = Score(), [], Progress("TTT")
    for c in range(chunks):
        score, epochs = scorer.score(plan[bounds[c]:bounds[c + 1]]), 0
        total += score
        if c < chunks - 1:
            epochs = chunk_epochs(s, score.val_loss, late=from_rank0(seconds()) > 0.85 * s.eval_time_soft_cap_seconds)
            lr = s.ttt_lr * (1 + math.cos(math.pi * c / (chunks - 1))) / 2
            learner.learn(scorer.tokens[c * C:(c + 1) * C + 1], epochs, lr)
        records.append((score, epochs))
        if c % -(-chunks // 20) == 0 or c == chunks - 1:
            log(f"ttt_chunk [{c + 1}/{chunks}] bpb={total.val_bpb:.6f} time={time.perf_counter() - start:.1f}s")
        progress((c + 1) / chunks)
    return total, records


# -------
# Training
# -------

class Trainer:
    def __init__(self, s, device, attention, dtype):
        self.s, self.device, self.floor = s, device, TINY
        shards, holdout = split_holdout(open_shards(s.data_path, "train"), s.holdout_tokens, s.train_seq_len)
        holdout = check_ids(holdout, s.vocab_size, "held-out tail of the last train shard").to(device)
        self.stream = TokenStream(shards)
        self.batches = lambda: batches(self.stream, s.train_batch_tokens // 8, s.vocab_size, device.type == "cuda")
        torch.manual_seed(s.seed)
        self.model = GPT(s, attention, dtype).initialize().to(device).compile_on_cuda()
        self.weights = list(self.model.parameters())
        self.optimizers = Optimizers(self.model, s)
        no_bytes = ByteTables(*[torch.zeros(s.vocab_size, dtype=torch.bool, device=device)] * 3)
        self.holdout = Scorer(self.model, holdout, no_bytes, s.train_seq_len, s.val_batch_size // 8)

    def step(self, spans, multiplier, momentum, qat):
        """On spans (8 / W, span + 1): (this rank's part of the mean loss, gradient norm) on the device."""
        scales = bank_scales(self.model, self.floor) if qat else None
        loss = torch.zeros((), device=self.device)
        for span in spans.to(self.device, non_blocking=True).long():
            x, y = (t.view(-1, self.s.train_seq_len) for t in (span[:-1], span[1:]))
            part = self.model(x, y, scales).mean() / 8
            part.backward()
            loss += part.detach()
        return torch.stack((loss, self.optimizers.step(multiplier, momentum)))

    def warm_up(self):
        """Compile what training runs, undo the steps. Returns the ms to keep for choosing the average."""
        spans = self.batches()
        with undone(self.weights):
            for i in range(self.s.warmup_steps):
                self.step(together(lambda: next(spans)), 1.0, self.s.muon_momentum, qat=self.s.late_qat and i % 2 == 1)
        self.optimizers = Optimizers(self.model, self.s)
        for _ in range(2):  # the first time compiles
            start = time.perf_counter()
            self.holdout.score_all(self.s.train_seq_len)
        return from_rank0(5 * 1000 * (time.perf_counter() - start))

    def run(self, validate, artifact_limit):
        """Train, and leave the weights to export in the model. validate() is the Score of the current weights. Rank 0's
        clock is everyone's; reading it after each step, with loss and norm, is the only wait for the device."""
        s, step, elapsed_ms, qat = self.s, 0, 0.0, False
        reserve_ms = self.warm_up()
        log(f"warm-up done, {reserve_ms:.0f}ms reserved for choosing the average")
        budget_ms = 1000 * s.max_wallclock_seconds - reserve_ms if s.max_wallclock_seconds else None
        if budget_ms is not None and budget_ms <= 0:
            raise RunError(f"MAX_WALLCLOCK_SECONDS={s.max_wallclock_seconds:g} is less than choosing the average takes")
        averages, spans, progress = WeightAverages(self.weights, s), self.batches(), Progress("training")
        start = time.perf_counter()
        while True:
            mean_ms = elapsed_ms / max(step, 1)
            last = step == s.iterations or budget_ms is not None and step > 0 and elapsed_ms + mean_ms > budget_ms
            status = f"step:{step}/{s.iterations} %s train_time:{elapsed_ms:.0f}ms step_avg:{mean_ms:.2f}ms"
            if 0 < step and s.train_log_every and (step <= 10 or step % s.train_log_every == 0):
                log(status % f"train_loss:{loss:.4f}")
            if last or s.val_loss_every and step % s.val_loss_every == 0:
                pause = time.perf_counter()
                score = validate()
                log(status % f"val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f}")
                start += time.perf_counter() - pause
            if last:
                break
            multiplier = lr_multiplier(step, s, elapsed_ms, budget_ms)
            if s.late_qat and multiplier < s.late_qat_threshold and not qat:
                qat, self.floor = True, fit_scale_floor(self.model.state_dict(), artifact_limit)
                log(f"late QAT from step {step}, scales from {self.floor:.3g}")
            measured = self.step(together(lambda: next(spans)), multiplier, muon_momentum(step, s), qat)
            averages.update(step, multiplier)
            step += 1
            loss, norm = measured.tolist()
            now = [1000 * (time.perf_counter() - start) * (rank() == 0), loss, norm / world_size()]
            elapsed_ms, loss, norm = all_reduce(torch.tensor(now, dtype=torch.float64)).tolist()
            if not math.isfinite(loss + norm):
                raise RunError(f"step {step}: loss {loss}, gradient norm {norm}; try lower learning rates")
            progress(max(step / s.iterations, elapsed_ms / budget_ms if budget_ms else 0))
        self.choose(averages.candidates())
        log(f"training: {step} steps in {elapsed_ms:.0f}ms, {1000 * (time.perf_counter() - start):.0f}ms with the choice of "
            f"the average; peak memory {peak_memory(self.device)}")

    def choose(self, candidates):
        losses = {}
        for name, weights in candidates.items():
            copy_weights(self.weights, weights)
            losses[name] = self.holdout.score_all(self.s.train_seq_len).val_loss
            log(f"weight_average:{name} holdout_loss:{losses[name]:.6f}")
        best = self.s.weight_average
        if best not in losses:  # auto, or the run was too short for it
            best = min(losses, key=lambda name: (math.isnan(losses[name]), losses[name]))
        if not math.isfinite(losses[best]):
            raise RunError(f"held-out loss of the {best} weights: {losses[best]}; try lower learning rates")
        copy_weights(self.weights, candidates[best])
        log(f"weight_average chosen:{best}")


# -------
# Main
# -------

def peak_memory(device):
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**(0 if sys.platform == "darwin" else 10)
    return f"{(torch.cuda.max_memory_allocated() if device.type == 'cuda' else resident) / 2**20:.0f} MiB"


def evaluate(s, scorer, start):
    """Report the scores: roundtrip, sliding, test-time training. start: when the evaluation began."""
    stages = {"final_int6_roundtrip": lambda: scorer.score_all(s.eval_seq_len, "roundtrip"),
              "final_int6_sliding_window": lambda: scorer.score_all(s.eval_stride, "sliding")}
    if s.ttt_enabled:
        learner = Learner(scorer.model, s)
        stages["legal_ttt"] = lambda: score_first_ttt(scorer, learner, s, lambda: time.perf_counter() - start)[0]
    for name, stage in stages.items():
        begin = time.perf_counter()
        score = stage()
        log(f"{name} eval_time:{1000 * (time.perf_counter() - begin):.0f}ms, peak memory {peak_memory(scorer.tokens.device)}")
        log(f"{name}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")


def export(s, fingerprint, trainer, limit):
    """The artifact; while it exceeds `limit` and that can help, with a higher floor of the scales."""
    weights = trainer.model.state_dict()
    floor = max(trainer.floor, fit_scale_floor(weights, limit))
    data = pack_artifact(s, fingerprint, quantize(weights, floor))
    while len(data) > limit and floor < 1 and (floor > TINY or len(data) < 1.05 * limit):
        floor = max(floor, 2**-10) * 1.02
        data = pack_artifact(s, fingerprint, quantize(weights, floor))
    return data


def run(s):
    global newton_schulz
    device = start_processes()
    cuda = device.type == "cuda"
    if cuda:
        torch._dynamo.config.recompile_limit = 64
        newton_schulz = torch.compile(newton_schulz, dynamic=False, fullgraph=True)
    s = dataclasses.replace(s, run_id=from_rank0(s.run_id or str(uuid.uuid4())))
    path, source = Path(s.artifact_path or f"logs/{s.run_id}.bin"), Path(__file__).read_text(encoding="utf-8")
    limit = s.artifact_limit - len(source.encode())
    together(lambda: open_outputs(Path(f"logs/{s.run_id}.txt"), None if s.eval_only else path, source))
    if s.eval_only:
        data = read_on_rank0(path)
        made_with, stored, weights = unpack_artifact(data, path)
        s = dataclasses.replace(parse_settings(os.environ, stored), run_id=s.run_id)
        for name in MODEL_SETTINGS:
            if getattr(s, name) != stored[name]:
                raise RunError(f"{name.upper()}={show(getattr(s, name))}, but the artifact was made with {show(stored[name])}")
    log("settings: " + " ".join(f"{name.upper()}={show(getattr(s, name))}" for name in SETTINGS))
    kernel, attention = choose_attention(device, s.num_heads, s.num_kv_heads, s.model_dim // s.num_heads)
    dtype = torch.bfloat16 if cuda else torch.float32
    hardware = torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})"
    log(f"{world_size()} x {hardware}, attention: {kernel}, torch {torch.__version__}, Python {platform.python_version()}")
    tokenizer, fingerprint = together(lambda: load_tokenizer(s.tokenizer_path, s.vocab_size))
    tables = ByteTables(*(t.to(device) for t in byte_tables(tokenizer)))
    tokens = together(lambda: validation_tokens(s.data_path, s.vocab_size, s.eval_seq_len)).to(device)
    scorer_of = lambda model, tokens: Scorer(model, tokens, tables, s.eval_seq_len, s.val_batch_size // 8)
    if not s.eval_only:
        trainer = together(lambda: Trainer(s, device, attention, dtype))
        scorer = scorer_of(trainer.model, tokens)
        log(f"{sum(w.numel() for w in trainer.weights)} parameters; tokens: {len(tokens)} for validation, "
            f"{trainer.stream.starts[-1]} for training, {len(trainer.holdout.tokens)} held out")
        trainer.run(lambda: scorer.score_all(s.eval_seq_len), limit)
        score = scorer.score_all(s.eval_seq_len)
        log(f"averaged_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f}")
        together(lambda: write_atomically(path, export(s, fingerprint, trainer, limit)) if rank() == 0 else None)
        data = read_on_rank0(path)
        made_with, _, weights = unpack_artifact(data, path)
    log(f"Total submission size int6+lzma: {len(data) + len(source.encode())} bytes")
    if made_with != fingerprint:
        raise RunError(f"artifact {path}: made with another tokenizer than {s.tokenizer_path}")
    model = GPT(s, attention, dtype)
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise RunError(f"artifact {path}: not a model of its settings ({' '.join(str(e).split())[:200]})") from None
    model, start = model.to(device).compile_on_cuda(), time.perf_counter()
    if cuda:  # compile, on made-up tokens and without a trace
        made_up = torch.randint_like(tokens[:max(s.ttt_chunk_tokens, s.eval_seq_len) + 1], s.vocab_size)
        with undone(list(model.parameters())):
            scorer_of(model, made_up).score_all(s.eval_seq_len)
            Learner(model, s).learn(made_up[:s.ttt_chunk_tokens + 1], int(s.ttt_enabled), 0.0)
        log(f"compiled scoring and TTT in {time.perf_counter() - start:.1f}s")
    evaluate(s, scorer_of(model, tokens), start)
    if len(data) > limit:
        raise RunError(f"submission {len(data) - limit} bytes over ARTIFACT_LIMIT={s.artifact_limit}; {path} is kept")


def main():
    status = 0
    try:
        if sys.argv[1:] == ["--help"]:
            print(help_text())
        elif sys.argv[1:]:
            raise RunError(f"unknown argument {sys.argv[1]}, see --help")
        else:
            run(parse_settings(os.environ))
    except RunError as e:
        who = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"train_gpt.py: {who}error: {e}", file=sys.stderr, flush=True)
        status = 2
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
