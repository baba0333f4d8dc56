"""Train a GPT in ten minutes, squeeze it into 16,000,000 bytes, then score unseen text while learning from it.

        torchrun --standalone --nproc_per_node=8 train_gpt.py
        EVAL_ONLY=1 ARTIFACT_PATH=logs/RUN_ID.bin python train_gpt.py

Settings are environment variables. The last line logged has val_bpb, bits per byte. Shapes: B sequences, T positions,
width D, H query and K key/value heads of width d, L layers, V vocabulary, N tokens, W processes.
"""

import difflib
import hashlib
import io
import json
import lzma
import math
import os
import platform
import re
import sys
import time
import uuid
from ast import literal_eval
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import make_dataclass
from itertools import count, cycle
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, arange, cat, nn, no_grad, stack


class RunError(Exception):
    """What the user can put right."""


try:
    from tools.extras import notify
except ModuleNotFoundError:

    def notify(what, s=None, *more):
        if what == "start" and (s.audit or s.resume or s.checkpoint_every):
            raise RunError("AUDIT, RESUME and CHECKPOINT_EVERY need tools/")

# ---- Settings ----

Setting = namedtuple("Setting", "default low high help")

TABLE = """
DATA_PATH="./data/datasets/fineweb10B_sp1024" shards' folder
TOKENIZER_PATH="./data/tokenizers/fineweb_1024_bpe.model" SentencePiece model
VOCAB_SIZE=1024 2..65536 tokenizer's tokens

RUN_ID="" of logs/RUN_ID.txt; empty: a UUID
SEED=1337 0..4294967295 seed of the weights
ITERATIONS=20000 most training steps
MAX_WALLCLOCK_SECONDS=600.0 cap on training; 0: none
WARMUP_STEPS=20 steps that compile
WARMDOWN_ITERS=3500 steps down to learning rate 0
TRAIN_BATCH_TOKENS=786432 8.. tokens per step
TRAIN_SEQ_LEN=2048 2.. tokens per sequence
MICRO_BATCH_TOKENS=0 tokens per pass; 0: an eighth step
TRAIN_LOG_EVERY=500 steps between log lines; 0: none
VAL_LOSS_EVERY=4000 steps between validations; 0: one
VAL_BATCH_SIZE=524288 8.. tokens 8 ranks score at once
HOLDOUT_TOKENS=524288 1.. training tokens to choose by
ARTIFACT_PATH="" empty: logs/RUN_ID.bin
ARTIFACT_LIMIT=16_000_000 1.. bytes of code and artifact
EVAL_ONLY=0 0..1 only score ARTIFACT_PATH
CHECKPOINT_EVERY=0.0 seconds between checkpoints; 0: none
RESUME="" checkpoint to go on from, or auto: RUN_ID's
AUDIT=0 0..1 check scoring against the rules
RECIPE="record" or best: other defaults

NUM_LAYERS=11 1.. layers
MODEL_DIM=512 2.. model width
NUM_HEADS=8 1.. query heads
NUM_KV_HEADS=4 1.. key/value heads
MLP_MULT=3.0 0.5.. MLP width over MODEL_DIM
TIE_EMBEDDINGS=1 0..1 the head is the table
ROPE_BASE=10000.0 1.. rotary base
ROPE_DIMS=16 4.. rotating channels per head
LOGIT_SOFTCAP=30.0 0.001.. cap * tanh(logits / cap)
QK_GAIN_INIT=1.5 first query gain
LN_SCALE=1 0..1 inputs by 1/sqrt(layer + 1)
XSA_LAST_N=4 last layers with XSA
BIGRAM_VOCAB_SIZE=1536 bigram rows; below 2: none
BIGRAM_DIM=128 1.. its width
VE_ENABLED=1 0..1 add value embeddings
VE_DIM=128 1.. their width
VE_LAYERS=9,10 layers that add them
TIED_EMBED_INIT_STD=0.005 deviation of new tables

MATRIX_LR=0.025 Muon learning rate
SCALAR_LR=0.025 that of the rest
TIED_EMBED_LR=0.035 that of the tables
EMBED_LR=0.6 the same, TIE_EMBEDDINGS=0
HEAD_LR=0.008 the head's, TIE_EMBEDDINGS=0
MUON_MOMENTUM=0.99 0..1 Muon momentum
MUON_MOMENTUM_WARMUP_START=0.92 0..1 that at step 0
MUON_MOMENTUM_WARMUP_STEPS=1500 steps up to MUON_MOMENTUM
MUON_BACKEND_STEPS=5 1.. Newton-Schulz steps
MUON_WD=0.04 banks' weight decay
ADAM_WD=0.04 that of the rest
BETA1=0.9 0..0.999999 AdamW beta1
BETA2=0.95 0..0.999999 AdamW beta2
ADAM_EPS=1e-8 AdamW epsilon
GRAD_CLIP_NORM=0.3 most gradient norm; 0: none

EMA_ENABLED=1 0..1 exponential average
EMA_DECAY=0.997 0..1 decay of the EMA
SWA_ENABLED=1 0..1 average of last steps
SWA_EVERY=50 1.. steps between, near the end
LATE_QAT=1 0..1 round weights at the end
LATE_QAT_THRESHOLD=0.15 rate / peak that starts it
MATRIX_STEP=1.0 0.25..1000 least mean step; 1: the record's

EVAL_SEQ_LEN=2048 2.. tokens per window
EVAL_STRIDE=64 1.. tokens a window scores
EVAL_MODE="sliding" or streaming: each position once
EVAL_WINDOW=0 tokens it sees; 0: EVAL_SEQ_LEN
EVAL_MAX_SECONDS=600.0 0.001.. limit; TTT does less to keep it
EVAL_TIME_SOFT_CAP_SECONDS=570.0 no extra epochs past 85% of it

TTT_ENABLED=1 0..1 learn from what was scored
TTT_MUON=1 0..1 Newton-Schulz updates; 0: SGD
TTT_NS_STEPS=3 1.. Newton-Schulz steps
TTT_ENTROPY_ADAPT=1 0..1 epochs by difficulty
TTT_ENTROPY_HIGH=2.1 nats that are hard
TTT_ENTROPY_LOW=1.75 nats that are easy
TTT_LR=0.002 learning rate, a cosine
TTT_EPOCHS=3 1.. epochs per chunk
TTT_CHUNK_TOKENS=32768 2.. tokens per chunk
TTT_BATCH_SEQS=32 1.. sequences per update
TTT_FREEZE_BLOCKS=0 first layers kept fixed
TTT_MOMENTUM=0.9 0..0.999999 SGD momentum
TTT_GRAD_CLIP=1.0 most gradient norm; 0: none
TTT_DECAY=0.0 0..1 pull back at an update
"""
FIELDS = {
    name: Setting(literal_eval(default), float(low or 0), float(high or 1e300), text)
    for name, default, low, high, text in re.findall(r"(\w+)=(\S+) (?:(\S+)\.\.(\S*) )?(.+)", TABLE)
}

BEST = dict(
    eval_mode="streaming",
    ttt_entropy_adapt=0,
    ttt_lr=0.01,
    ttt_epochs=1,
    ttt_chunk_tokens=2048,
    ttt_decay=0.005,
)
RECIPES = dict(record={name: FIELDS[name.upper()].default for name in BEST}, best=BEST)
Settings = make_dataclass(
    "Settings", [(name.lower(), type(f.default), f.default) for name, f in FIELDS.items()]
)
PREFIXES = {name.split("_")[0] for name in FIELDS} - {*"ARTIFACT DATA HEAD MAX MODEL NUM RUN SEED".split()}
KINDS = {int: "an integer", float: "a number", str: "text", tuple: "integers separated by commas"}
RULES = """
MODEL_DIM % (2 * NUM_HEADS) == 0
NUM_HEADS % NUM_KV_HEADS == 0
ROPE_DIMS in range(4, MODEL_DIM // NUM_HEADS + 1, 2)
len({*VE_LAYERS} & {*range(NUM_LAYERS)}) == len(VE_LAYERS)
TRAIN_BATCH_TOKENS % (8 * TRAIN_SEQ_LEN) == 0
RECIPE in ("record", "best")
EVAL_MODE == "sliding" or EVAL_MODE == "streaming" and TTT_CHUNK_TOKENS % 8 == 0
EVAL_STRIDE <= EVAL_SEQ_LEN
TTT_CHUNK_TOKENS >= TRAIN_SEQ_LEN or not TTT_ENABLED or EVAL_MODE == "streaming"
TTT_FREEZE_BLOCKS <= NUM_LAYERS
ARTIFACT_PATH or not EVAL_ONLY
"/" not in RUN_ID
RUN_ID or RESUME != "auto"
""".strip().split("\n")


def show(value):
    return (
        value
        if isinstance(value, str)
        else ",".join(map(str, value))
        if isinstance(value, tuple)
        else f"{value:.15g}"
    )


def assignments(s, names):
    return " ".join(f"{name}={show(getattr(s, name.lower()))}" for name in names)


def allowed(f):
    limits = f" from {show(f.low)}" + f" to {show(f.high)}" * (f.high < 1e300)
    return KINDS[type(f.default)] + limits * isinstance(f.default, (int, float))


def parse_value(name, text):
    f, kind = FIELDS[name], type(FIELDS[name].default)
    with suppress(ValueError):
        value = tuple(map(int, filter(None, text.split(",")))) if kind == tuple else kind(text)
        if kind in (str, tuple) or f.low <= value <= f.high:
            return value
    raise RunError(f"{name}={text!r}: allowed is {allowed(f)}")


def parse_settings(environ, defaults={}):
    for name in environ:
        own = "_" in name and (
            name.split("_")[0] in PREFIXES or any(field.startswith(name) for field in FIELDS)
        )
        nearest = name not in FIELDS and difflib.get_close_matches(name, FIELDS, 1, 0 if own else 0.91)
        if nearest:
            raise RunError(f"{name} is no setting; the nearest is {nearest[0]}")
    given = {name.lower(): parse_value(name, environ[name]) for name in FIELDS if name in environ}
    given = defaults | RECIPES.get(given.get("recipe"), {}) | given
    s = Settings(**given)
    if s.eval_only and s.artifact_path and not defaults:
        return s
    if "ve_layers" not in given:
        s.ve_layers = tuple(i for i in s.ve_layers if i < s.num_layers)
    for rule in RULES:
        names = [name for name in FIELDS if name in re.findall(r"\w+", rule)]
        if not eval(rule, {name: getattr(s, name.lower()) for name in names}):
            raise RunError(f"must hold: {rule}; now {assignments(s, names)}")
    return s


# ---- Processes; each helper is a no-op on one ----

world_size = lambda: dist.get_world_size() if dist.is_initialized() else 1
rank = lambda: dist.get_rank() if dist.is_initialized() else 0


def start_processes():
    """Join torchrun's group, if any. Returns the device."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if world not in (1, 2, 4, 8):
        raise RunError(f"{world} processes: use 1, 2, 4 or 8")
    cuda = torch.cuda.is_available()
    if cuda:
        if local >= torch.cuda.device_count():
            raise RunError(f"no GPU for process {local}: lower --nproc_per_node")
        torch.cuda.set_device(local)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return torch.device(f"cuda:{local}" if cuda else "cpu")


def all_reduce(tensor):
    """Sum over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class AllReduce(torch.autograd.Function):
    """The same with a gradient, not in place."""

    forward = staticmethod(lambda context, tensor: all_reduce(tensor.clone()))
    backward = staticmethod(lambda context, grad: all_reduce(grad.contiguous()))


def all_reduce_list(tensors):
    """The same for tensors of one dtype."""
    if world_size() > 1:
        flat = all_reduce(cat([t.flatten() for t in tensors])).split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [*map(Tensor.view_as, flat, tensors)])


def from_rank0(value):
    holder = [value]
    if world_size() > 1:
        dist.broadcast_object_list(holder)
    return holder[0]


def together(action, ranks=8):
    """action() on the first `ranks`; what one raises, all raise as RunError."""
    error = ""
    try:
        result = action() if rank() < ranks else None
    except (RunError, OSError) as e:
        error = str(e)
    if all_reduce(torch.tensor(len(error))):
        errors = [error] * world_size()
        if world_size() > 1:
            dist.all_gather_object(errors, error)
        raise RunError(next(filter(None, errors)))
    return result


def share(total):
    """This rank's [low, high) of `total`."""
    return [total * r // world_size() for r in (rank(), rank() + 1)]


def timer():
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


outputs, lost = [None], []


def log(event, template="", **values):
    """On rank 0; without a template, names and values. A full disk ends a log, and the run only at its end."""
    if rank() == 0:
        more = notify("event", event, values) or ""
        words = (
            f"{name}:{value:.6g}" if isinstance(value, float) else f"{name}:{value}"
            for name, value in values.items()
        )
        line = (template.format_map(values) or " ".join([event, *words])) + more
        for output in outputs[:]:
            try:
                print(line, file=output, flush=True)
            except OSError as e:
                outputs.remove(output)
                lost.append(str(e))


def open_outputs(log_path, artifact_path, source, append):
    for path in filter(None, (log_path, artifact_path)):
        os.makedirs(path.parent, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise RunError(f"{path} cannot be written")
    if log_path.exists() and not append:
        os.replace(log_path, f"{log_path}.previous")
    outputs.append(open(log_path, "a", encoding="utf-8"))
    if not log_path.stat().st_size:
        print(source, "=" * 100, sep="\n", file=outputs[-1])


def write_atomically(path, data):
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@no_grad()
def copy_weights(weights, values):
    torch._foreach_copy_(weights, values)


copies = lambda weights: [w.detach().clone() for w in weights]

# ---- Tokens and bytes ----

GET_DATA = "get data by `make demo` or `python tools/fineweb.py`"


def load_tokenizer(path, vocab_size):
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise RunError(f"TOKENIZER_PATH={path} is no SentencePiece model; {GET_DATA}") from None
    if tokenizer.vocab_size() != vocab_size:
        raise RunError(
            f"TOKENIZER_PATH={path} has {tokenizer.vocab_size()} tokens, not VOCAB_SIZE={vocab_size}"
        )
    return tokenizer, hashlib.sha256(Path(path).read_bytes()).hexdigest()


class ByteTables(NamedTuple):
    """(V,) each. Boundaries: control, unknown, unused."""

    base_bytes: Tensor  # without leading space
    has_leading_space: Tensor
    is_boundary: Tensor

    def count(self, previous, target):
        """A leading space after a boundary is none."""
        return self.base_bytes[target] + (self.has_leading_space[target] & ~self.is_boundary[previous])


def byte_tables(tokenizer):
    rows = []
    for i in range(tokenizer.vocab_size()):
        boundary = tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
        piece = (
            ""
            if boundary
            else "1"
            if tokenizer.is_byte(i)
            else tokenizer.id_to_piece(i).replace("\u2581", " ")
        )
        rows.append((len(piece.removeprefix(" ").encode()), piece.startswith(" "), boundary))
    return ByteTables(*map(torch.tensor, zip(*rows)))


# ---- Data ----

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256


def open_shard(path):
    """Little-endian: 256 int32 (magic, version, count N, zeros), N uint16 tokens."""
    header, size, offset = np.fromfile(path, "<i4", 3).tolist(), os.path.getsize(path), 4 * SHARD_HEADER_INTS
    if size <= offset or header != [SHARD_MAGIC, SHARD_VERSION, (size - offset) / 2]:
        raise RunError(
            f"shard {path}: {size} bytes, header {header}, not {offset} + 2 N, {[SHARD_MAGIC, SHARD_VERSION]} + [N]"
        )
    notify("shard", path)
    return np.memmap(path, "<u2", "r", offset)


def open_shards(data_path, split):
    shards = [open_shard(path) for path in sorted(Path(data_path).glob(f"fineweb_{split}_*.bin"))]
    if not shards:
        raise RunError(f"DATA_PATH={data_path} has no fineweb_{split}_*.bin; {GET_DATA}")
    return shards


def check_ids(tokens, vocab_size, where):
    if tokens.max() >= vocab_size:
        raise RunError(f"{where}: token id {tokens.max()} is not below VOCAB_SIZE={vocab_size}")
    return torch.from_numpy(tokens.astype(np.int32))


def validation_tokens(data_path, vocab_size, window):
    """(N + 1,) int32."""
    tokens = check_ids(np.concatenate(open_shards(data_path, "val")), vocab_size, "validation shards")
    if len(tokens) <= window:
        raise RunError(f"validation shards: {len(tokens)} tokens are too few for EVAL_SEQ_LEN={window}")
    return tokens


def read_stream(shards, position, count):
    """`count` tokens from `position` on; the shards repeat."""
    parts, position = [], position % sum(map(len, shards))
    for shard in cycle(shards):
        parts.append(shard[position : position + count])
        notify("shard", len(parts[-1]) and getattr(shard, "filename", None))
        position, count = max(position - len(shard), 0), count - len(parts[-1])
        if count == 0:
            return np.concatenate(parts)


def split_holdout(shards, tokens, seq_len):
    """Cut off whole sequences + 1, at most `tokens` or a quarter of the last shard."""
    held = min(tokens, len(shards[-1]) // 4) // seq_len * seq_len + 1
    if held == 1:
        raise RunError(f"TRAIN_SEQ_LEN={seq_len} exceeds HOLDOUT_TOKENS or a quarter of the last train shard")
    return shards[:-1] + [shards[-1][:-held]], shards[-1][-held:]


def batches(shards, span, vocab_size, first=0):
    """Every W-th of each step's 8 spans: (8 / W, span + 1) int32, read ahead."""

    def read(step):
        return stack(
            [
                check_ids(read_stream(shards, i * (span + 1), span + 1), vocab_size, f"span {i}")
                for i in range(8 * step + rank(), 8 * step + 8, world_size())
            ]
        )

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, first)
        for step in count(first + 1):
            spans, ahead = ahead.result(), pool.submit(read, step)
            yield spans


# ---- Model ----


def band_of(P, T, device):
    """A mask: T positions behind P others, each of which sees itself and P - 1 before."""
    q, k = arange(T, device=device)[:, None], arange(P + T, device=device)
    return (q < k) & (k <= q + P)


def torch_attention(q, k, v, band=None):
    """q (B, T, H, d), k and v (B, P + T, K, d) -> (B, T, H, d), causal."""
    if band is not None:  # no fast kernel has groups and a mask
        k, v = (t.repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, band, is_causal=band is None, enable_gqa=band is None
    ).transpose(1, 2)


def choose_attention(device):
    """(name, function): FlashAttention 3 if it runs here, else PyTorch's."""
    try:
        from flash_attn_interface import flash_attn_func

        attention = lambda q, k, v, band=None: flash_attn_func(
            q, k, v, causal=True, window_size=(k.size(1) - q.size(1) - 1, 0)
        )
        attention(*[torch.zeros(1, 128, 8, 64, device=device, dtype=torch.bfloat16)] * 3)
        return "FlashAttention 3", attention
    except Exception:
        return "PyTorch", torch_attention


norm = lambda x: F.rms_norm(x, x.shape[-1:])


def rotary_tables(length, window, dims, base, device):
    """cos and sin, (length, 1, dims / 2) fp32; the base grows beyond windows of 1,024."""
    base *= max(1, window / 1024) ** (dims / (dims - 2))
    frequencies = base ** (-arange(0, dims, 2, device=device) / dims)
    angles = torch.outer(arange(length, device=device), frequencies)[:, None]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Of x (B, T, heads, d), the first channels: i with i + dims / 2."""
    n = cos.size(-1)
    x1, x2, rest = x.tensor_split((n, 2 * n), dim=-1)
    return cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


def new(*shape, value=0.0, on=True):
    return nn.Parameter(torch.full(shape, value)) if on else None


def new_lookup(rows, width, out, scale):
    on = rows > 1
    return new(rows, width, on=on), new(out, width, on=on and width != out), new(value=scale, on=on)


class Block(nn.Module):
    def __init__(self, s, layer, attention):
        super().__init__()
        self.s, self.layer, self.attention, D = s, layer, attention, s.model_dim
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, D))
        self.attn_scale, self.mlp_scale = new(D, value=1.0), new(D, value=1.0)
        self.q_gain = new(s.num_heads, value=s.qk_gain_init)

    def forward(self, x, x0, value_embedding, positions, past, ranks, qkv_w, o_w, up_w, down_w):
        """x, x0 (B, T, D), value_embedding (B, T, K*d) or None -> (B, T, D). positions: cos, sin, perhaps a band."""
        s, T, (cos, sin, *band) = self.s, x.size(1), positions
        H, K, scale = s.num_heads, s.num_kv_heads, (self.layer + 1) ** -0.5 if s.ln_scale else 1
        attn_scale, mlp_scale, mix = (
            p.to(x.dtype) for p in (self.attn_scale, self.mlp_scale, self.resid_mix)
        )
        u = mix[0] * x + mix[1] * x0
        q, k, v = F.linear(norm(u) * scale, qkv_w).unflatten(-1, (H + 2 * K, -1)).split((H, K, K), dim=2)
        if value_embedding is not None:
            v = v + value_embedding.view_as(v)
        k, own = norm(k), v
        if past:
            kv, before = stack((k, v)), rank() * T if ranks > 1 else 0
            if ranks > 1:
                kv = AllReduce.apply(F.pad(kv, (0, 0, 0, 0, before, (ranks - 1) * T - before)))
            kv = cat((past[self.layer], kv), dim=2)
            past[self.layer] = kv[:, :, T - len(cos) :].detach().contiguous()
            k, v = kv.narrow(2, before, len(cos))
        q = rotate(norm(q), cos[-T:], sin[-T:]) * self.q_gain.to(x.dtype)[:, None]
        a = self.attention(q, rotate(k, cos, sin), v, *band)
        if self.layer >= s.num_layers - s.xsa_last_n:  # keep nothing along the position's own value
            a, along = a.unflatten(2, (K, -1)), F.normalize(own, dim=-1).unsqueeze(3)
            a = a - (a * along).sum(-1, keepdim=True) * along
        y = u + attn_scale * F.linear(a.flatten(2), o_w)
        h = F.leaky_relu(F.linear(norm(y) * scale, up_w), 0.5).square()
        return y + mlp_scale * F.linear(h, down_w)


class GPT(nn.Module):
    """fp32 weights, cast to `dtype` where used. Banks: qo_bank (2L, D, D), layer i's query matrix at i, output at L + i;
    kv_bank (2L, K*d, D) likewise; up_bank (L, hidden, D); down_bank (L, D, hidden)."""

    BANKS = ("qo_bank", "kv_bank", "up_bank", "down_bank")

    def __init__(self, s, attention=torch_attention, dtype=torch.float32):
        super().__init__()
        self.s, self.dtype, self.encoder_layers = s, dtype, s.num_layers // 2
        self.ve_layers = s.ve_layers if s.ve_enabled else ()
        L, V, D, values = s.num_layers, s.vocab_size, s.model_dim, len(self.ve_layers)
        KD, hidden = D // s.num_heads * s.num_kv_heads, int(s.mlp_mult * D)
        self.qo_bank, self.kv_bank = new(2 * L, D, D), new(2 * L, KD, D)
        self.up_bank, self.down_bank = new(L, hidden, D), new(L, D, hidden)
        self.tok_emb, self.head = new(V, D), new(V, D, on=not s.tie_embeddings)
        self.bigram_table, self.bigram_proj, self.bigram_scale = new_lookup(
            s.bigram_vocab_size, s.bigram_dim, D, 0.05
        )
        self.ve_table, self.ve_proj, self.ve_scale = new_lookup(V if values else 0, s.ve_dim, KD, 0.1)
        self.ve_layer_scales, self.smear_gate = new(values, value=1.0, on=values > 0), new(D)
        self.skip_weights = new(L // 2, D, value=1.0, on=L > 1)
        self.blocks = nn.ModuleList(Block(s, layer, attention) for layer in range(L))

    @no_grad()
    def initialize(self):
        self.tok_emb.normal_(0, self.s.tied_embed_init_std)
        if self.ve_layers:
            self.ve_table.normal_(0, 0.01)
        projections = [p for p in (self.bigram_proj, self.ve_proj) if p is not None and min(p.shape) >= 64]
        for matrix in [*self.qo_bank[: len(self.blocks)], *self.kv_bank, *self.up_bank, *projections]:
            nn.init.orthogonal_(matrix)
        return self

    def on(self, device):
        if device.type == "cuda":
            self.compile(dynamic=False, fullgraph=True)
        return self.to(device)

    def banks(self):
        return [getattr(self, name) for name in self.BANKS]

    def quantized(self):
        return {
            name: w
            for name, w in self.named_parameters(recurse=False)
            if w.dim() > 1 and name != "skip_weights"
        }

    def matrices(self, steps=None):
        """The banks, perhaps rounded to `steps`, cast: q, k, v (L, D + 2*K*d, D), o, up, down."""
        L, banks = len(self.blocks), self.banks()
        if steps:  # the gradient passes straight through
            banks = [
                (round_to(bank, steps[name], MOST) * steps[name]).detach() + (bank - bank.detach())
                for name, bank in zip(self.BANKS, banks)
            ]
        qo, kv, up, down = (bank.to(self.dtype) for bank in banks)
        return [cat((qo[:L], kv[:L], kv[L:]), dim=1), qo[L:], up, down]

    def forward(self, tokens, targets, *more):
        """logits() and targets (B, T) int64 -> negative log-likelihoods in nats (B, T) fp32."""
        logits = self.logits(tokens, *more).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)

    def logits(self, tokens, matrices=None, past=None, ranks=1):
        """(B, T) int64 -> (B, T, V) fp32. In a stream tokens are (B, 2 + T), with the two before, -1 for none, and `past` holds,
        by layer, keys and values of P positions (2, B, P, K, d), which the next replace. `ranks` share the positions."""
        s, device, layers = self.s, tokens.device, zip(*(m.unbind() for m in matrices or self.matrices()))
        T, P = (tokens.size(1) - 2, past[0].size(2)) if past else (tokens.size(1), 0)
        positions = [t.to(self.dtype) for t in rotary_tables(P + T, P or T, s.rope_dims, s.rope_base, device)]
        positions += [band_of(P, T, device)] if P else []
        x = x0 = self.embed(tokens)[:, -T:]
        values = self.lookup("ve", tokens[:, -T:]) if self.ve_layers else None
        skips = []
        for i, (block, weights) in enumerate(zip(self.blocks, layers)):
            if i >= self.encoder_layers and skips:
                x = x + self.skip_weights[i - self.encoder_layers].to(x.dtype) * skips.pop()
            ve = (
                self.ve_layer_scales[self.ve_layers.index(i)].to(x.dtype) * values
                if i in self.ve_layers
                else None
            )
            x = block(x, x0, ve, positions, past, ranks, *weights)
            if i < self.encoder_layers:
                skips.append(x)
        head = self.tok_emb if self.head is None else self.head
        return s.logit_softcap * torch.tanh(F.linear(norm(x), head.to(x.dtype)).float() / s.logit_softcap)

    def lookup(self, name, index):
        table, projection, scale = (getattr(self, f"{name}_{part}") for part in ("table", "proj", "scale"))
        x = F.embedding(index, table).to(self.dtype)
        return (x if projection is None else F.linear(x, projection.to(self.dtype))) * scale.to(self.dtype)

    def embed(self, tokens):
        """Token and hashed-bigram embedding, normed, mixed with the position before: (B, T, D). Token -1 is none."""
        t = tokens.int()
        before = F.pad(t, (1, -1), value=-1)
        x = F.embedding(t.clamp(min=0), self.tok_emb).to(self.dtype)
        if self.bigram_table is not None:
            last = len(self.bigram_table) - 1
            x = x + self.lookup("bigram", torch.where(before < 0, last, (36313 * t ^ 27191 * before) % last))
        x, gate = norm(x) * (t >= 0)[..., None], self.smear_gate.sigmoid().to(self.dtype)
        return (1 - gate) * x + gate * F.pad(x, (0, 0, 1, -1))

    def no_past(self, lanes):
        s, like = self.s, dict(dtype=self.dtype, device=self.tok_emb.device)
        return [torch.empty(2, lanes, 0, s.num_kv_heads, s.model_dim // s.num_heads, **like)] * s.num_layers

    def zero_frozen_gradients(self, n):
        frozen = [p.grad for p in self.blocks[:n].parameters()]
        frozen += [bank.grad.unflatten(0, (-1, len(self.blocks)))[:, :n] for bank in self.banks()]
        if self.skip_weights is not None:
            frozen.append(self.skip_weights.grad[: max(0, n - self.encoder_layers)])
        frozen += [self.ve_layer_scales.grad[i] for i, layer in enumerate(self.ve_layers) if layer < n]
        for grad in frozen:
            grad.zero_()


# ---- Optimizers ----


def newton_schulz(G, steps):
    """Singular values towards 1, in bf16: https://kellerjordan.github.io/posts/muon."""
    tall = G.size(-2) > G.size(-1)
    X = (G.mT if tall else G).bfloat16()
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.775 * A + 2.0315 * (A @ A)) @ X
    return X.mT if tall else X


def muon_update(grad, buffer, momentum, steps):
    """Nesterov's, orthogonalised, in bf16."""
    g = grad.bfloat16()
    return newton_schulz(g.add(buffer.mul_(momentum).add_(g), alpha=momentum), steps)


def apply_muon_update(bank, update, lr, weight_decay):
    bank.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * max(1, bank.size(-2) / bank.size(-1)) ** 0.5)


class Optimizers:
    """Muon, its matrices shared out over the ranks, and AdamW."""

    def __init__(self, model, s):
        self.model, self.s, groups = model, s, {}
        self.banks = sorted(model.banks(), key=torch.numel, reverse=True)
        self.momentum = [
            torch.zeros_like(bank.chunk(world_size())[0], dtype=torch.bfloat16) for bank in self.banks
        ]
        table_lr = s.tied_embed_lr if s.tie_embeddings else s.embed_lr
        rates = dict(tok_emb=table_lr, bigram_table=table_lr, ve_table=table_lr, head=s.head_lr)
        for name, p in model.named_parameters():
            if name not in model.BANKS:
                groups.setdefault(rates.get(name, s.scalar_lr), []).append(p)
        self.adamw = torch.optim.AdamW(
            [dict(base_lr=lr, params=group) for lr, group in groups.items()],
            betas=(s.beta1, s.beta2),
            eps=s.adam_eps,
            weight_decay=s.adam_wd,
            fused=True,
        )

    @no_grad()
    def step(self, multiplier, momentum):
        """Returns the norm before clipping."""
        s, W, groups, updates, works = self.s, world_size(), self.adamw.param_groups, [], []
        shards, grads = (
            [bank.grad for bank in self.banks],
            [p.grad for group in groups for p in group["params"]],
        )
        if W > 1:
            shards = [torch.empty_like(buffer, dtype=torch.float32) for buffer in self.momentum]
            for bank, shard in zip(self.banks, shards):
                dist.reduce_scatter(
                    shard, [*F.pad(bank.grad, (0, 0, 0, 0, 0, len(shard) * W - len(bank))).chunk(W)]
                )
            all_reduce_list(grads)
        self.norms = stack(torch._foreach_norm(shards + grads))
        squares, own = self.norms.square(), len(shards)
        total = (all_reduce(squares[:own].sum()) + squares[own:].sum()).sqrt()
        if s.grad_clip_norm:
            torch._foreach_mul_(shards + grads, (s.grad_clip_norm / (total + 1e-6)).clamp(max=1))
        for shard, buffer in zip(shards, self.momentum):
            own = muon_update(shard, buffer, momentum, s.muon_backend_steps).contiguous()
            updates.append(own.repeat(W, 1, 1))
            if W > 1:
                works.append(dist.all_gather([*updates[-1].chunk(W)], own, async_op=True))
        for group in groups:
            group["lr"] = group["base_lr"] * multiplier
        self.adamw.step()
        for work in works:
            work.wait()
        for bank, update in zip(self.banks, updates):
            apply_muon_update(bank, update[: len(bank)], s.matrix_lr * multiplier, s.muon_wd)
        self.model.zero_grad()
        return total


def lr_multiplier(step, s, elapsed, budget):
    """1, then linearly to 0 in the last WARMDOWN_ITERS."""
    left = s.iterations - step
    if budget < math.inf:
        left = max(budget - elapsed, 0) * max(step, 1) / max(elapsed, 1e-9)
    return min(1.0, left / max(s.warmdown_iters, 1))


def muon_momentum(step, s):
    return np.interp(
        step, (0, max(s.muon_momentum_warmup_steps, 1)), (s.muon_momentum_warmup_start, s.muon_momentum)
    )


# ---- Averaging ----


class WeightAverages:
    def __init__(self, weights, s):
        self.weights, self.s, self.samples = weights, s, 0
        self.averages = dict(ema=copies(weights)) if s.ema_enabled else {}

    @no_grad()
    def update(self, step, multiplier):
        s, averages = self.s, self.averages
        if s.ema_enabled:
            torch._foreach_lerp_(
                averages["ema"], self.weights, 1 - min(s.ema_decay, (1 + step) / (10 + step))
            )
        if s.swa_enabled and multiplier < 0.2 and step % s.swa_every == 0:
            self.samples += 1
            torch._foreach_lerp_(
                averages.setdefault("swa", copies(self.weights)), self.weights, 1 / self.samples
            )


# ---- Quantization ----

CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
TINY = 2.0**-24  # the least fp16 above zero
MOST = 4095  # a weight's largest integer


def round_to(w, step, limit):
    return (w / step).round().clamp(-limit, limit)


def clip_steps(w, quantiles, limit, floor=TINY, dtype=torch.half):
    """The record's: each row's quantile of |w|, over limit, of least squared error."""
    clips = torch.quantile(w.abs(), w.new_tensor(quantiles), dim=1, keepdim=True)
    return min(
        ((clip / limit).clamp_min(floor).to(dtype).float() for clip in clips),
        key=lambda step: (round_to(w, step, limit) * step - w).square().mean().item(),
    )


def calibrate(model, tokens, seq_len):
    """Of tokens (N + 1,): the mean x x^T of inputs of qkv, o, up, down; each row's Fisher information (..., rows, 1), the mean
    squared gradient of a token's loss for a label drawn by the model."""
    count = (len(tokens) - 1) // seq_len * seq_len
    groups = tokens[:count].view(-1, seq_len).long().split(max(1, 2048 // seq_len))
    weights, matrices, linear = model.quantized(), model.matrices(), F.linear
    fisher = {name: torch.zeros_like(w[..., :1]) for name, w in weights.items()}
    moments = [m.new_zeros(len(m), m.size(2), m.size(2), dtype=torch.float32) for m in matrices]
    sums = {one.data_ptr(): total for pair in zip(matrices, moments) for one, total in zip(*pair)}

    def recorded(x, weight):
        if weight.data_ptr() in sums:
            flat = x.detach().flatten(0, -2).float()
            sums[weight.data_ptr()].addmm_(flat.mT, flat)
        return linear(x, weight)

    low, high = share(len(groups))
    for i in range(low, high):
        notify("progress", "calibration", (i + 1 - low) / (high - low))
        with patch.object(F, "linear", recorded):
            logits = model.logits(groups[i], matrices).flatten(0, 1)
        random = torch.empty_like(logits).exponential_(
            generator=torch.Generator(tokens.device).manual_seed(i)
        )
        F.cross_entropy(logits, (logits - random.log()).argmax(dim=-1), reduction="sum").backward()
        for name, w in weights.items():
            fisher[name] += w.grad.square().mean(dim=-1, keepdim=True)
        model.zero_grad()
    sums = [*moments, *fisher.values()]
    all_reduce_list(sums)
    torch._foreach_div_(sums, count)
    sums[-1].cpu()  # this is timed
    return dict(zip(("qkv", "o", "up", "down"), moments)), fisher


@no_grad()
def base_steps(model, fisher):
    """(..., rows, 1): as fine as the record's, ~ 1 / sqrt(Fisher information), so that a bit is worth the same everywhere,
    within 8 times the matrix's."""
    weights, steps = model.quantized(), {}
    record = {name: cat([clip_steps(m, CLIP_QUANTILES, 31) for m in weights[name]]) for name in model.BANKS}
    for name, f in fisher.items():
        mean = f.mean(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
        steps[name] = f.clamp(mean / 64, mean * 64).rsqrt()
    octaves = sum(
        (step.log2().mean() - steps[name].log2().mean()) * weights[name].numel()
        for name, step in record.items()
    )
    ratio = (octaves / sum(map(torch.numel, model.banks()))).exp2()
    return {
        name: (steps[name] * ratio).maximum(w.abs().amax(-1, keepdim=True) / 900)
        for name, w in weights.items()
    }


def scaled(base, knob):
    """base times knob, rounded to eighths of octaves."""
    return {
        name: (8 * (step * knob).log2()).round().div(8).exp2().clamp(TINY, 65504).half().float()
        for name, step in base.items()
    }


def factor(moments):
    """(columns by falling input; so ordered, upper Cholesky factors of the damped moments' inverses, in place)."""
    order = moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    for m, o in zip(moments, order):
        damped = m[o][:, o]
        damped.diagonal().add_((0.05 * m.trace() / len(m)).clamp_min(1e-9))
        m.copy_(torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True))
    return order, moments


def gptq(bank, step, order, upper):
    """Integers of bank (n, rows, columns): the columns to come make good each one's rounding (arXiv 2210.17323)."""
    order = order[:, None].expand_as(bank)
    w, q, step = bank.gather(2, order), torch.empty_like(bank), step[..., 0]
    for j in range(w.size(2)):
        q[..., j] = (w[..., j] / step).round()
        error = (w[..., j] - q[..., j] * step) / upper[:, j, j, None]
        w[..., j:] -= error[..., None] * upper[:, None, j, j:]
    return w.scatter_(2, order, q)


@no_grad()
def quantize(weights, steps, factors={}):
    """NAME -> int16, NAME.scale -> fp16 for what has steps, else NAME -> fp16. Without factors: to the nearest."""
    inputs = dict(qo_bank="qkv o", kv_bank="qkv qkv", up_bank="up", down_bank="down")
    stored = {name: w.half() for name, w in weights.items() if name not in steps}
    for i, (name, step) in enumerate(steps.items()):
        notify("progress", "rounding" if factors else "", i / len(steps))
        q = weights[name] / step
        if factors and name in inputs:
            q = gptq(weights[name], step, *map(cat, zip(*map(factors.get, inputs[name].split()))))
        stored[name], stored[name + ".scale"] = q.round_().clamp_(-MOST, MOST).short(), step.half()
    return stored


def dequantize(stored):
    return {
        name: t.float() * stored.get(name + ".scale", 1)
        for name, t in stored.items()
        if not name.endswith(".scale")
    }


# ---- Entropy coding and artifact ----

PRECISION = 14
SYMBOLS = 2 * MOST + 1


def row_contexts(q):
    """(..., rows), 0 to 31: the rms of each row of q in half octaves."""
    return (4 + 2 * (0.25 + q.float().square().mean(dim=-1).sqrt()).log2()).round().byte()


def count_symbols(stored):
    """(32, SYMBOLS): how often a context has an integer + MOST."""
    return (
        sum(
            torch.bincount(
                (row_contexts(q).int()[..., None] * SYMBOLS + MOST + q).flatten(), minlength=32 * SYMBOLS
            )
            for q in stored.values()
            if q.dtype == torch.int16
        )
        .view(32, -1)
        .cpu()
    )


def estimate_bytes(stored):
    """By the integers' entropy."""
    counts = count_symbols(stored).double()
    nats = -torch.xlogy(counts, counts / counts.sum(dim=1, keepdim=True).clamp_min(1)).sum().item()
    return (
        nats / math.log(256) + 1.5 * sum(t.numel() for t in stored.values() if t.dtype == torch.half) + 6000
    )


def fit_knob(s, model, size, limit, knob):
    """MATRIX_STEP, if its size(knob) fits `limit` bytes, else a knob for (limit - 20,000, limit]."""
    weights = sum(map(torch.numel, model.quantized().values()))  # from each, twice the knob takes a bit
    for _ in range(16):
        excess = size(knob) - limit
        if excess <= 0 and (excess > -20000 or knob <= s.matrix_step) or knob > 1000 * s.matrix_step:
            break
        knob = max(s.matrix_step, knob * 2 ** (8 * (excess + 8000) / weights))
    return knob


lanes_of = lambda n: max(16, min(2048, n // 16384))


def frequencies(counts):
    """Like counts (contexts, symbols), at least 1 for what occurs, 2 ** PRECISION for a context."""
    some, sums = counts > 0, counts.cumsum(axis=1)
    shares = (2**PRECISION - some.sum(axis=1, keepdims=True)) / sums[:, -1:]
    return np.uint64(np.diff(np.rint(sums * shares), prepend=0) + some)


def rans_encode(frequency, contexts, symbols):
    """Of symbols (n,), by contexts (n,) and frequency (contexts, symbols) uint64: rANS (arXiv 1311.2540), interleaved (arXiv
    1402.3392). Lane i codes symbols i, i + lanes, ..., last first; its state, 2^16 to 2^32, spills 16 bits."""
    start, lanes, words = frequency.cumsum(axis=1) - frequency, lanes_of(len(symbols)), []
    states = np.full(lanes, 2**16, np.uint64)
    for row in range(0, len(symbols), lanes)[::-1]:
        at = contexts[row : row + lanes], symbols[row : row + lanes]
        f, x = frequency[at], states[: len(at[0])]
        full = x >= f << (32 - PRECISION)
        words.append(x[full].astype("<u2"))
        x[full] >>= 16
        x[:] = (x // f << PRECISION) + x % f + start[at]
    return b"".join([states.astype("<u4"), *words[::-1]])


def rans_decode(frequency, contexts, code):
    """The symbols (n,) int16. Raises ValueError at what no encoder wrote."""
    start, lanes = frequency.cumsum(axis=1) - frequency, lanes_of(len(contexts))
    symbol_at = np.stack([np.repeat(np.arange(len(f)), np.int64(f)) for f in frequency])
    states, words = (
        np.uint64(np.frombuffer(code, "<u4", lanes)),
        np.uint64(np.frombuffer(code, "<u2", offset=4 * lanes)),
    )
    symbols = np.empty(len(contexts), np.int16)
    for row in range(0, len(contexts), lanes):
        context = contexts[row : row + lanes]
        x = states[: len(context)]
        slot = x % 2**PRECISION
        symbols[row : row + lanes] = symbol = symbol_at[context, slot]
        x[:] = frequency[context, symbol] * (x >> PRECISION) + slot - start[context, symbol]
        low = x < 2**16
        spilled, words = np.split(words, [np.count_nonzero(low)])
        x[low] = x[low] << 16 | spilled
    if len(words) or (states != 2**16).any():
        raise ValueError("its code does not end where it should")
    return symbols


MAGIC = b"GPT16MB2"
LOCAL = "DATA_PATH TOKENIZER_PATH RUN_ID ARTIFACT_PATH ARTIFACT_LIMIT EVAL_ONLY CHECKPOINT_EVERY RESUME AUDIT".split()
NAMES = [name.lower() for name in FIELDS if name not in LOCAL]


def pack_artifact(s, fingerprint, stored):
    """Magic; SHA-256 of the rest; length, 4 bytes, of the xz stream of an .npz file; that; rANS code of all integers + MOST.
    The file: `header` (JSON), quantize()'s fp16, contexts as NAME.rows, `frequency`."""
    stored = {name: t.cpu() for name, t in stored.items()}
    counts = count_symbols(stored).numpy()
    counts[~counts.any(axis=1), 0] = 1
    frequency = frequencies(counts)
    integers = {name: stored.pop(name) for name, t in [*stored.items()] if t.dtype == torch.int16}
    rows = {name + ".rows": row_contexts(q) for name, q in integers.items()}
    columns = {name: q.size(-1) for name, q in integers.items()}
    contexts, symbols = (
        cat([t.flatten() for t in parts]).numpy()
        for parts in (
            map(torch.Tensor.repeat_interleave, rows.values(), columns.values()),
            (q + MOST for q in integers.values()),
        )
    )
    settings = {name: show(getattr(s, name)) for name in NAMES}
    header = json.dumps(dict(tokenizer=fingerprint, settings=settings, columns=columns)).encode()
    file = io.BytesIO()
    np.savez(file, header=np.frombuffer(header, np.uint8), frequency=np.uint16(frequency), **rows, **stored)
    side = lzma.compress(file.getvalue(), preset=9)
    packed = len(side).to_bytes(4, "little") + side + rans_encode(frequency, contexts, symbols)
    return MAGIC + hashlib.sha256(packed).digest() + packed


def unpack_artifact(data, path):
    """(tokenizer fingerprint, settings, what quantize() gave); executes nothing."""
    if data[:40] != MAGIC + hashlib.sha256(data[40:]).digest():
        raise RunError(f"artifact {path}: truncated, altered or no artifact")
    try:
        end = 44 + int.from_bytes(data[40:44], "little")
        arrays = dict(np.load(io.BytesIO(lzma.decompress(data[44:end]))))
        header = json.loads(bytes(arrays.pop("header")))
        settings = {name: parse_value(name.upper(), str(text)) for name, text in header["settings"].items()}
        if settings.keys() != set(NAMES):
            raise ValueError("it has other settings")
        contexts = {
            name: arrays.pop(name + ".rows")[..., None].repeat(n, -1) for name, n in header["columns"].items()
        }
        flat = np.concatenate([*contexts.values()], axis=None)
        symbols = rans_decode(np.uint64(arrays.pop("frequency")), flat, data[end:]) - MOST
        for name, own in contexts.items():
            arrays[name], symbols = symbols[: own.size].reshape(own.shape), symbols[own.size :]
        return header["tokenizer"], settings, {name: torch.from_numpy(a) for name, a in arrays.items()}
    except Exception as e:
        raise RunError(f"artifact {path}: not of this version's format ({e})") from None


# ---- Scoring ----


def plan_windows(targets, window, stride):
    """(n, 3): a window's start, begin and end of its targets. The first scores all, a later one its last `stride`, the last
    what is left."""
    window = min(window, targets)
    end = F.pad(arange(window, targets, stride), (0, 1), value=targets)
    return stack((end - window, F.pad(end[:-1], (1, 0)), end), dim=1)


class Score(NamedTuple):
    nats: float = 0
    tokens: float = 0
    bytes: float = 0
    val_loss = property(lambda self: self.nats / max(self.tokens, 1))
    val_bpb = property(lambda self: self.nats / math.log(2) / max(self.bytes, 1))


score_of = lambda sums: Score(*sums.tolist())


class Scorer:
    """Of tokens (N + 1,) int32 on the model's device. Target i is token i + 1."""

    def __init__(self, model, tokens, tables, window, batch_tokens):
        self.model, self.tokens, self.tables, self.targets = model, tokens, tables, len(tokens) - 1
        self.window = min(window, self.targets)
        self.batch = max(1, batch_tokens // self.window)
        self.segment = -(-self.window // 4)  # of a stream, read at once

    def ids(self, at):
        return torch.where(at < 0, -1, self.tokens[at.clamp(0, self.targets)]).long()

    def read(self, at, matrices, past, ranks=1):
        """The nll at positions (B, T)."""
        x = self.ids(cat((at[:, :1] - 2, at[:, :1] - 1, at), dim=1) if past else at)
        return self.model(x, self.ids(at + 1), matrices, past, ranks)

    def measure(self, nll, at, begin, end):
        """(3,) fp64: nats, number and bytes of the targets from begin to end."""
        x, y, scored = self.ids(at), self.ids(at + 1), (begin <= at) & (at < end)
        size = self.tables.count(x, y) if self.tables else scored
        return stack([(per_token * scored).sum() for per_token in (nll.double(), scored, size)])

    @no_grad()
    def score(self, plan, length=0, stage=""):
        """measure() of a plan, over the ranks; windows of more `length` are streamed. Some that score nothing fill up batches."""
        (low, high), device, length = share(len(plan)), self.tokens.device, max(length, self.window)
        batch = self.batch if self.tokens.is_cuda else max(1, min(self.batch, high - low))
        sums, matrices = torch.zeros(3, dtype=torch.float64, device=device), self.model.matrices()
        batches = F.pad(plan[low:high], (0, 0, 0, (low - high) % batch)).to(device)[..., None].split(batch)
        for i, rows in enumerate(batches):
            start, begin, end = rows.unbind(1)
            past = self.model.no_past(len(rows)) if length > self.window else None
            for low in (0, *range(self.window, length, self.segment)):
                at = start + low + arange(self.segment if low else self.window, device=device)
                sums += self.measure(self.read(at, matrices, past), at, begin, end)
                notify("progress", stage, (i + (low + self.segment) / length) / len(batches))
        return all_reduce(sums)

    def score_all(self, stride, stage="scoring"):
        return self.score_plan(self.window, stride, stage)

    def stream_all(self):
        """Each position sees the last `window`. Lanes begin with a window of context, 1/16 of them at most."""
        lanes = min(8 * self.batch, self.targets // (16 * self.window)) or 1
        length = self.window - (self.window - self.targets) // lanes
        return self.score_plan(length, max(1, length - self.window), "streaming")

    def score_plan(self, length, stride, stage):
        return score_of(self.score(plan_windows(self.targets, length, stride), length, stage))


# ---- Test-time training ----


def chunk_epochs(s, val_loss, late):
    change = (val_loss > s.ttt_entropy_high and not late) - (0 < val_loss < s.ttt_entropy_low)
    return max(s.ttt_epochs + change * s.ttt_entropy_adapt, 1)


class Learner:
    def __init__(self, model, s):
        self.model, self.s, self.weights = model, s, list(model.parameters())
        self.first, self.past = copies(self.weights), model.no_past(1)
        self.sgd = not s.ttt_muon and torch.optim.SGD(self.weights, momentum=s.ttt_momentum)

    def learn(self, tokens, epochs, lr):
        """On the whole sequences in tokens (C + 1,), TTT_BATCH_SEQS an update, over the ranks; some of weight zero fill up."""
        s, T, W, n = self.s, self.s.train_seq_len, world_size(), (len(tokens) - 1) // self.s.train_seq_len
        x, y = (t[: n * T].view(n, T).long() for t in (tokens, tokens[1:]))
        slot = rank() + W * arange(-(-min(s.ttt_batch_seqs, n) // W), device=tokens.device)
        for first in [*range(0, n, s.ttt_batch_seqs)] * epochs:
            rows, at = min(s.ttt_batch_seqs, n - first), (first + slot).clamp(max=n - 1)
            weight = (slot[:, None] < rows) / (rows * T)
            self.update((self.model(x[at], y[at], self.model.matrices()) * weight).sum(), lr)

    def update(self, loss, lr):
        s, weights = self.s, self.weights
        loss.backward()
        with no_grad():
            all_reduce_list([p.grad for p in weights])
            self.model.zero_frozen_gradients(s.ttt_freeze_blocks)
            if s.ttt_grad_clip:
                nn.utils.clip_grad_norm_(weights, s.ttt_grad_clip)
            if s.ttt_decay:
                torch._foreach_lerp_(weights, self.first, s.ttt_decay)
            if self.sgd:
                self.sgd.param_groups[0]["lr"] = lr
                self.sgd.step()
            else:
                for p in weights:
                    p.sub_(newton_schulz(p.grad, s.ttt_ns_steps) if p.dim() > 1 else p.grad, alpha=lr)
            self.model.zero_grad()


def windowed_chunks(scorer, learner, s, first=0):
    """Yield (score, learn(epochs)) of chunks from the first on. A window is of the chunk of its first target."""
    C, plan = s.ttt_chunk_tokens, plan_windows(scorer.targets, scorer.window, s.eval_stride)
    parts = plan.split((plan[:, 1] // C).bincount(minlength=-(-scorer.targets // C)).tolist())
    for c in range(first, len(parts)):
        tokens, cosine = (
            scorer.tokens[c * C : (c + 1) * C + 1],
            math.cos(math.pi * c / max(len(parts) - 1, 1)),
        )
        yield (
            scorer.score(parts[c]),
            lambda epochs: learner.learn(tokens, epochs, s.ttt_lr * (1 + cosine) / 2),
        )


def streamed_chunks(scorer, learner, s, first=0):
    """The same, each position read once. Ranks have parts of a chunk, whose scores are what is learnt from. Past keys and
    values stay as they were. The first chunk is a window of context."""
    C = s.ttt_chunk_tokens
    for low in (0, *range(scorer.window, scorer.targets, C))[first:]:
        ranks, T = (world_size(), C // world_size()) if low else (1, scorer.window)
        at = arange(T, device=scorer.tokens.device)[None] + low + (rank() * T if low else 0)
        before = learner.past

        def read():
            learner.past = before.copy()
            return scorer.read(at, learner.model.matrices(), learner.past, ranks)

        def learn(epochs):
            for epoch in range(epochs):
                learner.update((read() if epoch else nll).sum() / C, s.ttt_lr)

        nll = read()
        score = scorer.measure(nll.detach(), at, 0, scorer.targets if low or rank() == 0 else 0)
        yield all_reduce(score), low and learn


def score_first_ttt(scorer, learner, s, seconds=None):
    """(The whole Score, each chunk's (Score, epochs)); each is scored before the weights learn from it. Rank 0's seconds(), since
    scoring began, limit learning."""
    streaming, records, clock = s.eval_mode == "streaming", notify("resume_ttt", learner) or [], timer()
    quiet, seconds = not seconds, seconds or (lambda: 0.0)
    rate, credit, scoring, learning, now = 1, 0, 0, 0, from_rank0(seconds())
    chunks = (streamed_chunks if streaming else windowed_chunks)(scorer, learner, s, len(records))
    total = sum(score for score, _ in records)
    n = streaming - (streaming * scorer.window - scorer.targets) // s.ttt_chunk_tokens
    for c in range(len(records), n):
        check, epochs = c % max(1, n // 200) == 0, 0  # the clock waits for the device
        start = check and seconds()
        score, learn = next(chunks)
        total, between = total + score, check and seconds()
        if learn and c < n - 1:
            val_loss = score_of(score).val_loss if s.ttt_entropy_adapt else 0
            wanted = chunk_epochs(s, val_loss, late=now > 0.85 * s.eval_time_soft_cap_seconds)
            credit = round(credit % 1 + rate * wanted, 6)
            epochs = int(credit)
            learn(epochs)
        if check:
            now, left, scoring = seconds(), n - 1 - c, max(between - start, scoring / 2)
            learning = max((now - between) / epochs, learning / 2) if epochs else learning
            spare = 0.97 * s.eval_max_seconds - now - left * scoring
            rate = spare / max(left * learning * s.ttt_epochs, 1e-9)
            now, rate = from_rank0((now, min(max(rate, 0), 1)))
        records.append((score, epochs))
        notify("chunk", learner, records)
        notify("progress", "TTT", (c + 1) / n)
        if not quiet and (c % -(-n // 20) == 0 or c == n - 1):
            log(
                "ttt_chunk",
                "ttt_chunk [{chunk}/{chunks}] bpb={bpb:.6f} time={seconds:.1f}s",
                chunk=c + 1,
                chunks=n,
                bpb=score_of(total).val_bpb,
                seconds=clock(),
            )
    return score_of(total), [(score_of(score), epochs) for score, epochs in records]


# ---- Training ----


class Trainer:
    def __init__(self, s, device, attention, dtype):
        self.s, self.device, self.steps = s, device, None
        self.shards, holdout = split_holdout(
            open_shards(s.data_path, "train"), s.holdout_tokens, s.train_seq_len
        )
        holdout = check_ids(holdout, s.vocab_size, "held-out tail").to(device)
        self.batches = lambda first=0: batches(self.shards, s.train_batch_tokens // 8, s.vocab_size, first)
        torch.manual_seed(s.seed)
        self.model = GPT(s, attention, dtype).initialize().on(device)
        self.weights = list(self.model.parameters())
        self.optimizers = Optimizers(self.model, s)
        self.holdout = Scorer(self.model, holdout, None, s.train_seq_len, s.val_batch_size // 8)
        self.holdout_loss = lambda: self.holdout.score_all(s.train_seq_len).val_loss
        self.calibrate = lambda: calibrate(self.model, holdout, s.train_seq_len)

    def step(self, spans, multiplier, momentum):
        """Of spans (8 / W, span + 1): this rank's part of the mean loss, gradient norm."""
        s, spans = self.s, spans.to(self.device, non_blocking=True).long()
        rows = max(1, (s.micro_batch_tokens or s.train_batch_tokens // 8) // s.train_seq_len)
        x, y = (t.reshape(-1, s.train_seq_len).split(rows) for t in (spans[:, :-1], spans[:, 1:]))
        matrices, loss = self.model.matrices(self.steps), 0
        for batch in zip(x, y):
            part = self.model(*batch, matrices).sum() / s.train_batch_tokens
            part.backward()
            loss += part.detach()
        return stack((loss, self.optimizers.step(multiplier, momentum)))

    def fix_steps(self, fisher, limit):
        s, model, base = self.s, self.model, base_steps(self.model, fisher)
        size = lambda knob: estimate_bytes(quantize(model.state_dict(), scaled(base, knob)))
        self.base, self.knob = base, from_rank0(fit_knob(s, model, size, limit, s.matrix_step))
        self.steps = scaled(base, self.knob)

    def warm_up(self):
        """Returns the seconds to keep for the end."""
        spans, before, reserve = self.batches(), copies(self.weights), 0
        for i in range(self.s.warmup_steps):
            notify("progress", "warm-up", i / self.s.warmup_steps)
            self.step(together(lambda: next(spans)), 1.0, self.s.muon_momentum)
        copy_weights(self.weights, before)
        self.optimizers = Optimizers(self.model, self.s)
        for action, times in ((self.holdout_loss, 4), (self.calibrate, 1.5)):
            action()  # the first time compiles
            seconds = timer()
            action()
            reserve += times * seconds()
        return from_rank0(reserve)

    def run(self, validate, limit):
        """Returns GPTQ's moments. Rank 0's clock decides; reading it is a step's only wait for the device."""
        s, reserve = self.s, self.warm_up()
        log("warm_up", reserve=1000 * reserve)
        budget = (s.max_wallclock_seconds or math.inf) - reserve
        averages = WeightAverages(self.weights, s)
        first, elapsed = notify("resume", self, averages) or (0, 0)
        spans, seconds, paused = self.batches(first), timer(), -elapsed
        for step in count(first):
            mean = elapsed / max(step, 1)
            last = step == s.iterations or step and elapsed + mean > budget
            status = "step:{step}/{iterations} %s train_time:{train_time:.0f}ms step_avg:{step_avg:.2f}ms"
            now = dict(step=step, iterations=s.iterations, train_time=1000 * elapsed, step_avg=1000 * mean)
            if step > first and s.train_log_every and (step <= 10 or step % s.train_log_every == 0):
                log(
                    "step",
                    status % "train_loss:{train_loss:.4f}",
                    **now,
                    train_loss=loss,
                    multiplier=multiplier,
                )
            if last or s.val_loss_every and step % s.val_loss_every == 0:
                pause, score = timer(), validate()
                log(
                    "validation",
                    status % "val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}",
                    **now,
                    val_loss=score.val_loss,
                    val_bpb=score.val_bpb,
                )
                paused += pause()
            notify("step", self, averages, step, elapsed, last)
            if last:
                break
            multiplier = lr_multiplier(step, s, elapsed, budget)
            if s.late_qat and step and multiplier < s.late_qat_threshold and not self.steps:
                self.fix_steps(self.calibrate()[1], limit)
                log("late_qat", step=step, knob=self.knob)
            measured = self.step(together(lambda: next(spans)), multiplier, muon_momentum(step, s))
            averages.update(step, multiplier)
            loss, norm = measured.tolist()
            now = [(seconds() - paused) * (rank() == 0), loss, norm / world_size()]
            elapsed, loss, norm = all_reduce(torch.tensor(now, dtype=torch.float64)).tolist()
            if not math.isfinite(loss + norm):
                raise RunError(
                    f"step {step + 1}: loss {loss}, gradient norm {norm}"
                    f"{notify('not_finite', self.optimizers, loss) or ''}; lower the learning rates"
                )
            notify("progress", "training", max((step + 1) / s.iterations, elapsed / budget))
        self.choose(dict(raw=copies(self.weights)) | averages.averages)
        moments, fisher = self.calibrate()
        if not self.steps:
            self.fix_steps(fisher, limit)
        log("trained", steps=step, train_time=now["train_time"], with_calibration=1000 * (seconds() - paused))
        return moments

    def choose(self, candidates):
        losses = {}
        for name, weights in candidates.items():
            copy_weights(self.weights, weights)
            losses[name] = self.holdout_loss()
            log("average", average=name, holdout_loss=losses[name])
        finite = [name for name in losses if math.isfinite(losses[name])]
        if not finite:
            raise RunError("no held-out loss is finite")
        best = min(finite, key=losses.get)
        copy_weights(self.weights, candidates[best])
        log("chosen", average=best)


# ---- Main ----


def export(s, fingerprint, trainer, moments, limit):
    made, weights = {}, trainer.model.state_dict()
    factors = {name: factor(m) for name, m in moments.items()}

    def size(knob):
        made[0] = pack_artifact(s, fingerprint, quantize(weights, scaled(trainer.base, knob), factors))
        return len(made[0])

    knob = fit_knob(s, trainer.model, size, limit, trainer.knob)
    log("quantized", knob=knob)
    return made[0]


def evaluate(**stages):
    for name, stage in stages.items():
        score = notify("scored", name) or stage()
        notify("stage", name, score)
        log(
            "stage",
            "{stage}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}",
            stage=name,
            val_loss=score.val_loss,
            val_bpb=score.val_bpb,
        )


def scoring_stages(s, model, tokens, tables, seconds=None):
    scorer = lambda window: Scorer(model, tokens, tables, window, s.val_batch_size // 8)
    windows = text = scorer(s.eval_seq_len)
    stages = dict(final_int6_roundtrip=lambda: windows.score_all(s.eval_seq_len, "roundtrip"))
    if s.eval_mode == "sliding":
        stages["final_int6_sliding_window"] = lambda: windows.score_all(s.eval_stride, "sliding")
    else:
        text = scorer(s.eval_window or s.eval_seq_len)
        stages["final_int6_streaming"] = text.stream_all
    if s.ttt_enabled:
        stages["legal_ttt"] = lambda: score_first_ttt(text, Learner(model, s), s, seconds)[0]
    return stages


def compile_scoring(s, model, tables):
    device = model.tok_emb.device
    if device.type == "cuda":
        count = s.ttt_chunk_tokens + 2 * max(s.eval_window, s.eval_seq_len) + 1
        made_up = torch.randint(s.vocab_size, (count,), dtype=torch.int32, device=device)
        weights = list(model.parameters())
        before = copies(weights)
        for stage in scoring_stages(s, model, made_up, tables).values():
            stage()
        copy_weights(weights, before)
        log("compiled")


def run(s):
    global newton_schulz
    device = start_processes()
    cuda = device.type == "cuda"
    if cuda:
        torch._dynamo.config.recompile_limit = 64
        newton_schulz = torch.compile(newton_schulz, dynamic=False, fullgraph=True)
    s.run_id = from_rank0(s.run_id or Path(s.resume).stem or str(uuid.uuid4()))
    path, source = Path(s.artifact_path or f"logs/{s.run_id}.bin"), Path(__file__).read_bytes()
    limit = s.artifact_limit - len(source)
    resumed = notify("start", s, sys.modules[__name__])
    only_score = s.eval_only or resumed == "scoring"
    together(
        lambda: open_outputs(
            Path(f"logs/{s.run_id}.txt"), None if s.eval_only else path, source.decode(), resumed
        ),
        1,
    )

    def read_artifact():
        data = from_rank0(together(path.read_bytes, 1))
        return len(data), *unpack_artifact(data, path)

    if only_score:
        size, made_with, kept, stored = read_artifact()
        s = parse_settings(os.environ, kept | dict(run_id=s.run_id))
        for name in NAMES[NAMES.index("num_layers") : NAMES.index("matrix_lr")]:
            if getattr(s, name) != kept[name]:
                raise RunError(f"{assignments(s, [name.upper()])}, but the artifact has {show(kept[name])}")
    notify("settings", s)
    log("settings", "settings: " + assignments(s, FIELDS).replace("{", "{{").replace("}", "}}"))
    (kernel, attention), dtype = choose_attention(device), torch.bfloat16 if cuda else torch.float32
    hardware = torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})"
    log("machine", processes=world_size(), hardware=hardware, attention=kernel)
    tokenizer, fingerprint = together(lambda: load_tokenizer(s.tokenizer_path, s.vocab_size))
    with device:
        tables = byte_tables(tokenizer)
    tokens = together(lambda: validation_tokens(s.data_path, s.vocab_size, s.eval_seq_len)).to(device)
    if not only_score:
        trainer = together(lambda: Trainer(s, device, attention, dtype))
        log(
            "data",
            parameters=sum(map(torch.numel, trainer.weights)),
            validation_tokens=len(tokens),
            training_tokens=sum(map(len, trainer.shards)),
        )
        scorer = Scorer(trainer.model, tokens, tables, s.eval_seq_len, s.val_batch_size // 8)
        validate = lambda: scorer.score_all(s.eval_seq_len)
        moments = trainer.run(validate, limit)
        evaluate(averaged=validate)
        together(lambda: write_atomically(path, export(s, fingerprint, trainer, moments, limit)), 1)
        size, made_with, _, stored = read_artifact()
        del trainer, scorer, validate, moments
    log(
        "size", "Total submission size int+rans: {total} bytes", total=size + len(source), artifact_bytes=size
    )
    if made_with != fingerprint:
        raise RunError(f"artifact {path}: made with another tokenizer than {s.tokenizer_path}")
    model = GPT(s, attention, dtype)
    try:
        model.load_state_dict(dequantize(stored))
    except RuntimeError:
        raise RunError(f"artifact {path}: not the tensors of its settings") from None
    model, clock = model.on(device), timer()
    compile_scoring(s, model, tables)

    before = notify("scoring", path, tokenizer) or 0
    seconds = lambda: (cuda and torch.cuda.synchronize(), before + clock())[1]
    evaluate(**scoring_stages(s, model, tokens, tables, seconds))
    notify("end")
    if lost:
        raise RunError(f"the log is not whole: {lost[0]}")
    if size > limit:
        raise RunError(
            f"submission {size - limit} bytes over ARTIFACT_LIMIT={s.artifact_limit}; {path} is kept"
        )


def main():
    try:
        if sys.argv[1:] == ["--help"]:
            print(__doc__ + TABLE, flush=True)
        elif sys.argv[1:]:
            raise RunError(f"unknown argument {sys.argv[1]}, see --help")
        else:
            run(parse_settings(os.environ))
            if dist.is_initialized():
                dist.destroy_process_group()
        return 0
    except Exception as e:
        notify("failed", e)
        if not isinstance(e, (RunError, OSError)):
            raise
        who = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"train_gpt.py: {who}error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    os._exit(main())  # threads of PyTorch may abort a normal exit
