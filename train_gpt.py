"""Train a GPT in ten minutes, squeeze it into 16,000,000 bytes, score unseen text while learning from it.

    torchrun --standalone --nproc_per_node=8 train_gpt.py
    EVAL_ONLY=1 ARTIFACT_PATH=logs/RUN_ID.bin python train_gpt.py

Settings are environment variables (see --help); the last line logged has val_bpb, bits per byte.

Shapes: B sequences, T positions, D model width, H query heads, K key/value heads of width d = D / H,
L layers, V vocabulary, P positions of the past, N tokens, W processes.

A *bank* holds one matrix of every layer; a *span* is an eighth of a step's tokens. A *window* is what a
position may see; a *chunk* is scored before weights learn from it; *lanes* are residual streams (or coders)
side by side. Rows are rounded to multiples of their *step*; the *knob* scales all until the artifact fits.
"""

import hashlib
import importlib
import io
import json
import lzma
import math
import os
import platform
import re
import resource
import sys
import time
import traceback
import uuid
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache, partial
from itertools import chain, count, cycle, islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist

# First, or the end may abort (pytorch issue 190489)
import torch.distributed.nn  # noqa: F401
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.utils._pytree import tree_map_only

Value = TypeVar("Value")
State = dict[str, Any]
Named = Mapping[str, Tensor]
Schedule = tuple[tuple[int, float], ...]  # values, from a share of training on
SPANS = 8  # of a step, and most processes


class RunError(Exception):
    """What the user can put right; the message is one line that says how."""


class Stopped(Exception):
    """The run ends as a hook asked; what could be kept is kept."""


STOPPED_STATUS = 75  # exit status, if it can go on later


def ceil_div(a: int, b: int) -> int:
    """Returns a / b, rounded up."""
    return -(-a // b)


# ======== Settings ========


def setting(
    default: Any,
    help: str,
    *,
    low: float = 0,
    high: float = math.inf,
    choices: tuple = (),
    kept: str = "yes",
    **recipe: Any,
) -> Any:
    """Returns a field of Settings: numbers from `low` to `high`, texts among `choices`.

    `kept` in the artifact: "yes", a default for scoring; "fixed", belongs to the weights; "no", is local.
    `recipe`: the default of RECIPE=frontier, if it is another.
    """
    facts = {"help": help, "low": low, "high": high, "choices": choices, "kept": kept} | recipe
    return field(default=default, metadata=facts)


fixed, local = partial(setting, kept="fixed"), partial(setting, kept="no")


@dataclass
class Settings:
    """All settings, environment variables of these names in capitals; the defaults are the record's."""

    data_path: str = local("./data/datasets/fineweb10B_sp1024", "folder of the token shards")
    tokenizer_path: str = local("./data/tokenizers/fineweb_1024_bpe.model", "their SentencePiece model")
    vocab_size: int = setting(1024, "tokens of the tokenizer", low=2, high=65536, frontier=8192)

    run_id: str = local("", "name of logs/RUN_ID.txt; empty: a UUID")
    seed: int = setting(1337, "of the first weights", high=2**32 - 1)
    iterations: int = setting(20000, "training steps")
    max_wallclock_seconds: float = setting(600.0, "seconds of training; 0: no limit")
    warmup_steps: int = setting(20, "steps before the clock starts, undone")
    warmdown_iters: int = setting(3500, "last steps, the rate falls")
    warmdown_fraction: float = setting(0.0, "or last share of training, if above 0", high=1, frontier=0.85)
    min_lr: float = setting(0.0, "least factor of the rate", high=1, frontier=0.1)
    train_batch_tokens: int = setting(786432, "tokens per step", low=8)
    train_seq_len: int = setting(2048, "tokens per sequence or piece", low=2, frontier=3072)
    train_seq_schedule: Schedule = setting(
        (), "pieces by share of training, as 512@0,1024@0.3", frontier=((1024, 0.0), (2048, 0.1), (3072, 0.7))
    )
    train_log_every: int = setting(500, "steps between log lines; 0: none")
    val_loss_every: int = setting(4000, "steps between validations; 0: the last")
    val_batch_size: int = setting(524288, "tokens that 8 processes score at once", low=8)
    calibration_tokens: int = setting(524288, "training tokens to calibrate by", low=1)
    artifact_path: str = local("", "artifact; empty: logs/RUN_ID.bin")
    artifact_limit: int = local(16_000_000, "most bytes of artifact and code", low=1)
    eval_only: bool = local(False, "only score ARTIFACT_PATH")
    checkpoint_every: float = local(0.0, "seconds between checkpoints; 0: on SIGTERM")
    resume: str = local("", "checkpoint to go on from; auto: RUN_ID's")
    audit: bool = local(False, "check scoring against the rules")
    recipe: str = setting("record", "which defaults hold", choices=("record", "frontier"))

    num_layers: int = fixed(11, "layers", low=1)
    model_dim: int = fixed(512, "width of the residual stream", low=1)
    num_heads: int = fixed(8, "query heads", low=1)
    num_kv_heads: int = fixed(4, "key and value heads", low=1)
    mlp_mult: float = fixed(3.0, "hidden width of the MLP over MODEL_DIM", low=0.5, frontier=4.0)
    rope_base: float = fixed(10000.0, "base of the rotary frequencies", low=1)
    rope_dims: int = fixed(16, "channels of a head that rotate", low=4)
    logit_softcap: float = fixed(30.0, "bound of logits, by tanh", low=0.001)
    qk_gain_init: float = fixed(1.5, "first gain of queries", frontier=5.25)
    xsa_last_n: int = fixed(4, "last layers that drop their own value", frontier=11)
    bigram_vocab_size: int = fixed(1536, "rows of the bigram table; below 2: none", frontier=0)
    bigram_dim: int = fixed(128, "width of the bigram table", low=1)
    ve_dim: int = fixed(128, "width of the value embeddings", low=1)
    ve_layers: tuple[int, ...] = fixed((9, 10), "layers with value embeddings", frontier=())
    tied_embed_init_std: float = fixed(0.005, "deviation of the token table")
    smear: str = fixed("channel", "gates of the token before", choices=("channel", "token"), frontier="token")
    skip_gates: bool = fixed(False, "mix skips in by gates, do not add them", frontier=True)
    attn_gate_channels: int = fixed(0, "channels that gate each head; 0: none", frontier=12)
    attn_gate_scale: float = fixed(0.5, "factor of these gates' logits")
    parallel_from: int = fixed(-1, "first layer of two residual lanes; -1: none", low=-1, frontier=8)
    loop_layers: tuple[int, ...] = fixed((), "layers that run again, as 3-5", frontier=(3, 4, 5))
    loop_count: int = fixed(0, "times that they run again", frontier=2)
    loop_from: float = setting(0.35, "share of training before they do", high=1)
    document_attention: bool = fixed(False, "see the own document only", frontier=True)

    matrix_lr: float = setting(0.025, "Muon's learning rate, of the banks", frontier=0.028)
    scalar_lr: float = setting(0.025, "AdamW's, of scalars and vectors", frontier=0.02)
    tied_embed_lr: float = setting(0.035, "AdamW's, of the tables", frontier=0.03)
    muon_momentum: float = setting(0.99, "Muon's momentum", high=1, frontier=0.97)
    muon_momentum_warmup_start: float = setting(0.92, "it at the first step", high=1)
    muon_momentum_warmup_steps: int = setting(1500, "steps in which it rises")
    muon_backend_steps: int = setting(5, "Newton-Schulz steps in training", low=1)
    muon_row_norm: bool = setting(False, "norm rows before Newton-Schulz", frontier=True)
    ns_coefficients: str = setting("classic", "theirs", choices=("classic", "polar"), frontier="polar")
    muon_wd: float = setting(0.04, "weight decay of the banks", frontier=0.095)
    embed_wd: float = setting(-1.0, "AdamW's weight decay of the tables; -1: ADAM_WD", low=-1, frontier=0.085)
    adam_wd: float = setting(0.04, "AdamW's weight decay", frontier=0.02)
    beta2: float = setting(0.95, "AdamW's decay of the squared gradient", high=0.999999, frontier=0.99)
    grad_clip_norm: float = setting(0.3, "most norm of the gradient; 0: no limit")

    ema_decay: float = setting(0.997, "of the weights' average, per step; 0: none", high=1, frontier=0.9965)

    eval_seq_len: int = setting(2048, "tokens that one sees in scoring", low=2, frontier=3072)
    eval_stride: int = setting(64, "tokens that a sliding window scores", low=1)
    eval_mode: str = setting(
        "sliding", "windows or each once", choices=("sliding", "streaming"), frontier="streaming"
    )
    eval_max_seconds: float = setting(600.0, "seconds of scoring", low=0.001)

    ttt_enabled: bool = setting(True, "learn from what has been scored")
    ttt_muon: bool = setting(True, "update by Newton-Schulz; 0: by SGD")
    ttt_ns_steps: int = setting(3, "Newton-Schulz steps of an update", low=1)
    ttt_entropy_adapt: bool = setting(True, "an epoch more if hard, one less if easy", frontier=False)
    ttt_entropy_high: float = setting(2.1, "nats above which a chunk is hard")
    ttt_entropy_low: float = setting(1.75, "nats below which a chunk is easy")
    ttt_lr: float = setting(0.002, "learning rate; of windows: first", frontier=0.01)
    ttt_epochs: int = setting(3, "times to learn from a chunk", low=1, frontier=1)
    ttt_chunk_tokens: int = setting(32768, "tokens scored, then learnt from", low=2, frontier=2048)
    ttt_batch_seqs: int = setting(32, "sequences per update of windows", low=1)
    ttt_momentum: float = setting(0.9, "momentum of SGD", high=0.999999)
    ttt_grad_clip: float = setting(1.0, "most norm of the gradient; 0: no limit")
    ttt_decay: float = setting(0.0, "way back to the first weights, each update", high=1, frontier=0.005)
    ttt_forget: bool = setting(False, "learn anew where documents begin")
    ttt_experts: str = setting(
        "",
        "streams to mix, as lr=0;lr=0.02,chunk=64",
        frontier="lr=0;lr=0.0025;lr=0.005;lr=0.01;lr=0.02;lr=0.04;lr=0.08;lr=0.01,epochs=2",
    )
    ttt_cache: int = setting(0, "longest n-grams' context; 0: none", high=16, frontier=6)
    ttt_share: float = setting(0.2, "share of weights that returns to their mean", high=1)
    ttt_share_tokens: int = setting(100, "tokens of that mean", low=1)

    def validate(self) -> None:
        """Raises RunError for settings that contradict each other."""
        s, spans, head_dim = self, SPANS * self.train_seq_len, self.model_dim // self.num_heads
        layers = {*range(s.num_layers)} & {*s.ve_layers}
        loop, schedule = s.loop_layers, ((1, -1), *s.train_seq_schedule, (s.train_seq_len + 1, 9))
        behind_loop = max(loop, default=-1) + 1
        lanes = range(max(behind_loop, s.num_layers // 2), s.num_layers)
        rules = {
            "MODEL_DIM must be a multiple of 2 * NUM_HEADS": s.model_dim % (2 * s.num_heads) == 0,
            "NUM_HEADS must be a multiple of NUM_KV_HEADS": s.num_heads % s.num_kv_heads == 0,
            "ROPE_DIMS must be even, at most MODEL_DIM / NUM_HEADS": s.rope_dims in range(4, head_dim + 1, 2),
            "VE_LAYERS must be different layers below NUM_LAYERS": len(layers) == len(s.ve_layers),
            "LOOP_LAYERS must follow each other, below NUM_LAYERS": loop
            == tuple(range(behind_loop - len(loop), min(behind_loop, s.num_layers))),
            "PARALLEL_FROM must be after LOOP_LAYERS, in the second half of NUM_LAYERS": s.parallel_from
            in (-1, *lanes),
            "TRAIN_SEQ_SCHEDULE must rise from share 0 on, to TRAIN_SEQ_LEN at most": schedule[1][1] in (0, 9)
            and all(a < c and b < d for (a, b), (c, d) in pairwise(schedule)),
            "TRAIN_SEQ_SCHEDULE needs DOCUMENT_ATTENTION=1": s.document_attention or len(schedule) == 2,
            "MUON_BACKEND_STEPS must be at most 5 if NS_COEFFICIENTS=polar": s.ns_coefficients != "polar"
            or s.muon_backend_steps <= len(POLAR),
            "TRAIN_BATCH_TOKENS must be a multiple of 8 * TRAIN_SEQ_LEN": not s.train_batch_tokens % spans,
            "ATTN_GATE_CHANNELS must be at most MODEL_DIM": s.attn_gate_channels <= s.model_dim,
            "EVAL_STRIDE must be at most EVAL_SEQ_LEN": s.eval_stride <= s.eval_seq_len,
            "TTT_CHUNK_TOKENS must be at least TRAIN_SEQ_LEN": s.eval_mode != "sliding"
            or s.ttt_chunk_tokens >= s.train_seq_len
            or not s.ttt_enabled,
            "EVAL_ONLY=1 needs ARTIFACT_PATH": s.artifact_path or not s.eval_only,
            "RUN_ID must be a name without /": "/" not in s.run_id,
            "RESUME=auto needs RUN_ID": s.run_id or s.resume != "auto",
        }
        for rule, holds in rules.items():
            if not holds:
                names = [name for name in re.findall("[A-Z_]+", rule) if name in FIELDS]
                raise RunError(f"{rule}; now {assignments(s, names)}")
        expert_settings(self)


FIELDS = {f.name.upper(): f for f in fields(Settings)}
KEPT = [f.name for f in FIELDS.values() if f.metadata["kept"] != "no"]
FIXED = [f.name for f in FIELDS.values() if f.metadata["kept"] == "fixed"]

OF_RECIPES = [f for f in FIELDS.values() if "frontier" in f.metadata]
RECIPES = {r: {f.name: f.metadata.get(r, f.default) for f in OF_RECIPES} for r in ("record", "frontier")}


def read_integers(text: str) -> tuple[int, ...]:
    """Returns the integers that 1,3-5 means. Raises ValueError."""
    ends = [[int(end) for end in part.split("-")] for part in text.split(",") if part]
    ranges = [range(end[0], end[-1] + 1) for end in ends]
    if not all(0 < len(r) < 1000 for r in ranges):
        raise ValueError
    return tuple(chain(*ranges))


def read_schedule(text: str) -> Schedule:
    """Returns the pairs that 1024@0,2048@0.1 means. Raises ValueError."""
    pairs = (part.split("@") for part in text.split(",") if part)
    return tuple((int(length), float(share)) for length, share in pairs)


KINDS = {
    bool: ("0 or 1", lambda text: bool((0, 1).index(int(text)))),
    int: ("an integer", int),
    float: ("a number", float),
    str: ("text", str),
    tuple[int, ...]: ("integers separated by commas, or 3-5", read_integers),
    Schedule: ("LENGTH@SHARE, separated by commas", read_schedule),
}


def show(value: Any) -> str:
    """Returns a value as one writes it in the environment."""
    if isinstance(value, tuple):
        return ",".join("@".join(map(show, v)) if isinstance(v, tuple) else show(v) for v in value)
    return value if isinstance(value, str) else f"{value:.15g}"


def assignments(s: Settings, names: Sequence[str]) -> str:
    """Returns NAME=value for each name; control characters are escaped."""
    texts = {name: show(getattr(s, name.lower())) for name in names}
    return " ".join(f"{name}={t if t.isprintable() else ascii(t)}" for name, t in texts.items())


def allowed(f: Field) -> str:
    """Returns which values are allowed, in words."""
    low, high, choices = (f.metadata[fact] for fact in ("low", "high", "choices"))
    words = " or ".join(choices) or KINDS[f.type][0]
    if f.type not in (int, float):
        return words
    return f"{words} from {show(low)}" + (f" to {show(high)}" if high < math.inf else "")


def parse_value(name: str, text: str) -> Any:
    """Returns what a text says for setting NAME. Raises RunError."""
    f, facts = FIELDS[name], FIELDS[name].metadata
    with suppress(ValueError):
        value, numeric = KINDS[f.type][1](text), f.type in (int, float)
        in_range = not numeric or facts["low"] <= value <= min(facts["high"], sys.float_info.max)
        if in_range and value in (facts["choices"] or [value]):
            return value
    raise RunError(f"{name}={text!r}: allowed is {allowed(f)}")


def parse_settings(environ: Mapping[str, str], kept: Mapping[str, Any] | None = None) -> Settings:
    """Returns an environment's settings, over those `kept` in an artifact. Raises RunError."""
    given = {name.lower(): parse_value(name, environ[name]) for name in FIELDS if name in environ}
    given = dict(kept or {}) | RECIPES.get(given.get("recipe"), {}) | given
    s = Settings(**given)
    if s.eval_mode == "sliding" or not s.ttt_enabled:
        s.ttt_experts = ""
    s.ttt_cache *= bool(s.ttt_experts)
    if s.eval_only and s.artifact_path and kept is None:
        return s  # the artifact brings the rest
    if not s.ttt_experts and (environ.get("TTT_EXPERTS") or environ.get("TTT_CACHE", "0") != "0"):
        raise RunError("TTT_CACHE needs TTT_EXPERTS, that EVAL_MODE=streaming and TTT_ENABLED=1")
    if "ve_layers" not in given:
        s.ve_layers = tuple(layer for layer in s.ve_layers if layer < s.num_layers)
    s.validate()
    for name in FIXED if kept else ():
        if getattr(s, name) != kept[name]:
            raise RunError(f"{assignments(s, [name.upper()])}, but the artifact has {show(kept[name])}")
    return s


EXPERT_KEYS = {key: f"TTT_{key.upper()}" for key in ("lr", "decay", "epochs", "muon", "forget")}
EXPERT_KEYS["chunk"] = "TTT_CHUNK_TOKENS"


def expert_settings(s: Settings) -> dict[str, Settings]:
    """Returns the settings of each of TTT_EXPERTS: its own over the common ones. Raises RunError."""
    experts, common = {}, s.ttt_chunk_tokens
    for text in filter(None, s.ttt_experts.replace(" ", "").split(";")):
        own, fault = {}, ""
        for key, _, value in (pair.partition("=") for pair in text.split(",")):
            if key not in EXPERT_KEYS:
                raise RunError(f"TTT_EXPERTS: {key!r} is none of {', '.join(EXPERT_KEYS)}")
            own[EXPERT_KEYS[key].lower()] = parse_value(EXPERT_KEYS[key], value)
        expert = replace(s, **own)
        if common % expert.ttt_chunk_tokens:
            fault = f"chunk must divide TTT_CHUNK_TOKENS={common}"
        if text in experts or fault:
            raise RunError(f"TTT_EXPERTS: {text}: {fault or 'stands twice'}")
        experts[text] = expert
    return experts


def help_text() -> str:
    """Returns what --help prints."""
    lines = [f"  {name}={show(f.default)}  {f.metadata['help']} ({allowed(f)})" for name, f in FIELDS.items()]
    return "\n".join([__doc__ or "", *lines])


# ======== Processes ========


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns this process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def start_processes() -> torch.device:
    """Join torchrun's process group, if any; return the device. Raises RunError."""
    world, local_rank = (int(os.environ.get(n) or d) for n, d in (("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if SPANS % world != 0:
        raise RunError(f"{world} processes: use 1, 2, 4 or 8")
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise RunError(f"no GPU for process {local_rank}: lower --nproc_per_node")
    if cuda:
        torch.cuda.set_device(local_rank)
    if world > 1 and not os.environ.get("RANK"):
        raise RunError("WORLD_SIZE without RANK: start by torchrun")
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return torch.device(f"cuda:{local_rank}" if cuda else "cpu")


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_list(tensors: list[Tensor]) -> None:
    """Sum tensors of one dtype over the ranks, in place, at once."""
    if world_size() > 1:
        flat = all_reduce(torch.cat([t.flatten() for t in tensors])).split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(flat, tensors, strict=True)])


def from_rank0(value: Value) -> Value:
    """Returns rank 0's value on all ranks."""
    holder = [value]
    if world_size() > 1:
        dist.broadcast_object_list(holder)
    return holder[0]


def gather(value: Value) -> list[Value]:
    """Returns every rank's value."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def together(action: Callable[[], Value], ranks: int = SPANS) -> Value:
    """Returns what `action` gives on the first ranks; what one raises, all raise as RunError."""
    error, result = "", None
    try:
        if rank() < ranks:
            result = action()
    except (RunError, OSError) as e:
        error = str(e) or repr(e)
    if all_reduce(torch.tensor(len(error))):
        raise RunError(next(filter(None, gather(error))))
    return result


def share(total: int) -> tuple[int, int]:
    """Returns this rank's [low, high) of `total` things."""
    return total * rank() // world_size(), total * (rank() + 1) // world_size()


def peak_memory() -> float:
    """Returns the most MiB used, of the GPU if there is one."""
    return (torch.cuda.max_memory_allocated() or 1024 * resource.getrusage(0).ru_maxrss) / 2**20


@torch.no_grad()
def copy_weights(weights: list[Tensor], values: list[Tensor]) -> None:
    """Give the weights new values, in place."""
    torch._foreach_copy_(weights, values)


def copies(weights: list[Tensor]) -> list[Tensor]:
    """Returns new tensors of their values."""
    return [w.detach().clone() for w in weights]


class Stateful:
    """Carries the attributes that STATE names over a restart."""

    STATE: tuple[str, ...] = ()

    def state_dict(self) -> State:
        """Returns tensors, numbers, texts, containers of them. All ranks ask."""
        parts = {name: getattr(self, name) for name in self.STATE}
        return {name: p.state_dict() if hasattr(p, "state_dict") else p for name, p in parts.items()}

    def load_state_dict(self, state: State) -> None:
        """Go on from a state_dict(); weights keep their place."""
        for name in self.STATE:
            own = getattr(self, name)
            if hasattr(own, "load_state_dict"):
                own.load_state_dict(state[name])
            elif isinstance(own, list) and own and isinstance(own[0], nn.Parameter):
                copy_weights(own, state[name])
            else:
                setattr(self, name, state[name])


class Clock:
    """Seconds since it was made, and before a restart; reading it waits for the GPU."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def seconds(self) -> float:
        """Returns all seconds so far."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter() - self.start

    def add(self, seconds: float) -> None:
        """Count so many more."""
        self.start -= seconds

    def state_dict(self) -> dict[str, float]:
        """Returns the seconds."""
        return {"seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Add those of a state_dict()."""
        self.add(state["seconds"])


# ======== Log and hooks ========


class Hooks:
    """Where tools may watch a run, see tools/run/__init__.py."""

    def __str__(self) -> str:
        return "none"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith(("on_", "before_", "restore_", "should_")):
            return lambda *args, **more: None
        raise AttributeError(name)


NO_HOOKS = Hooks()


class Log:
    """Writes rank 0's lines to the console and a file; `lost` says what a full disk kept out."""

    def __init__(self, hooks: Hooks = NO_HOOKS):
        self.hooks, self.lost = hooks, ""
        self.outputs = [None]  # None: standard output

    def open(self, path: Path, source: str, append: bool) -> None:
        """Also write to a file, first the source; an older one becomes path.previous. Raises OSError."""
        path.parent.mkdir(exist_ok=True)
        if path.exists() and not append:
            os.replace(path, f"{path}.previous")
        file = open(path, "a", encoding="utf-8", errors="backslashreplace")
        self.outputs.append(file)
        if not path.stat().st_size:
            print(source, "=" * 100, sep="\n", file=file)

    def event(self, name: str, line: str = "", **values: Any) -> None:
        """Log a line with values put in; without one, name and values."""
        if rank() != 0:
            return
        self.hooks.on_event(name, values)
        shown = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
        line = line.format_map(values) or " ".join([name, *(f"{k}:{v}" for k, v in shown.items())])
        for output in self.outputs[:]:
            try:
                print(line, file=output, flush=True)
            except OSError as e:
                self.outputs.remove(output)
                if output is None:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                else:
                    self.lost = self.lost or str(e)


def write_atomically(path: Path | str, data: bytes) -> None:
    """Write a file whole or not at all. Raises OSError."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class Run:
    """What the parts of a run have in common."""

    settings: Settings
    device: torch.device
    hooks: Hooks = NO_HOOKS
    log: Log = field(default_factory=Log)

    @property
    def log_path(self) -> Path:
        """The log's file."""
        return Path(f"logs/{self.settings.run_id}{'.eval' if self.settings.eval_only else ''}.txt")

    @property
    def artifact_path(self) -> Path:
        """The artifact's file."""
        return Path(self.settings.artifact_path or f"logs/{self.settings.run_id}.bin")

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def report_progress(hooks: Hooks, stage: str, done: float) -> None:
    """Tell which share of a stage is done. Raises Stopped."""
    hooks.on_progress(stage, done)
    if hooks.should_stop():
        raise Stopped


# ======== Tokens and bytes ========

GET_DATA = "get data by `make demo` or `python -m tools.data.fineweb`"


SPACES = ("\u2581", " ")  # SentencePiece's
BOS = 1  # begins each document


def load_tokenizer(path: str, vocab_size: int) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """Returns a tokenizer and its file's SHA-256. Raises RunError."""
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise RunError(f"TOKENIZER_PATH={path} is no SentencePiece model; {GET_DATA}") from None
    if (size := tokenizer.vocab_size()) != vocab_size:
        raise RunError(f"TOKENIZER_PATH={path} has {size} tokens, not VOCAB_SIZE={vocab_size}")
    return tokenizer, hashlib.sha256(Path(path).read_bytes()).hexdigest()


class ByteTables(NamedTuple):
    """Bytes of text by token, (V,) each. Boundaries: control, unknown and unused tokens."""

    base_bytes: Tensor  # without a leading space
    has_leading_space: Tensor
    is_boundary: Tensor

    def count(self, previous: Tensor, target: Tensor) -> Tensor:
        """Returns each target's bytes; after a boundary a leading space is not counted."""
        return self.base_bytes[target] + (self.has_leading_space[target] & ~self.is_boundary[previous])


def byte_tables(tokenizer: sentencepiece.SentencePieceProcessor) -> ByteTables:
    """Returns a tokenizer's tables; a space in a piece is one byte.

    A first space that the tokenizer adds to each text is not the text's: it stands behind a boundary.
    """
    rows, added = [], tokenizer.normalize("a").startswith(SPACES)
    for i in range(tokenizer.vocab_size()):
        boundary = tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i)
        piece = "" if boundary else tokenizer.id_to_piece(i).replace(*SPACES)
        space = added and piece.startswith(" ")
        rows.append((1 if tokenizer.is_byte(i) else len(piece.encode()) - space, space, boundary))
    return ByteTables(*map(torch.tensor, zip(*rows, strict=True)))


SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024


class Shard:
    """A file's tokens: 256 little-endian int32 (magic, version, N, zeros), N uint16."""

    def __init__(self, path: Path):
        """Raises RunError, OSError."""
        self.path, self.changed, size = path, os.path.getmtime(path), os.path.getsize(path)
        header, start = np.fromfile(path, "<i4", 3).tolist(), HEADER_BYTES
        known = [SHARD_MAGIC, SHARD_VERSION]
        if size < start or header != [*known, (size - start) / 2]:
            raise RunError(f"shard {path}: {size} bytes, header {header}, not {start} + 2 N, {known} + [N]")
        if size == start:
            raise RunError(f"shard {path}: holds no tokens")
        self.tokens = np.memmap(path, "<u2", "r", start)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns tokens [start, stop), uint16. Raises RunError for a changed file, OSError."""
        if os.path.getmtime(self.path) != self.changed:
            raise RunError(f"shard {self.path} was changed during the run")
        return self.tokens[start:stop]


def open_shards(data_path: str, split: str) -> list[Shard]:
    """Returns a split's shards by name. Raises RunError, OSError."""
    shards = [Shard(path) for path in sorted(Path(data_path).glob(f"fineweb_{split}_*.bin"))]
    if not shards:
        raise RunError(f"DATA_PATH={data_path} has no readable fineweb_{split}_*.bin; {GET_DATA}")
    return shards


def check_ids(tokens: np.ndarray, vocab_size: int, where: str) -> Tensor:
    """Returns tokens (n,) int32. Raises RunError."""
    if tokens.max() >= vocab_size:
        raise RunError(f"{where}: token id {tokens.max()} is not below VOCAB_SIZE={vocab_size}")
    return torch.from_numpy(tokens.astype(np.int32))


def validation_tokens(data_path: str, vocab_size: int, window: int) -> Tensor:
    """Returns the text (N + 1,) int32, longer than a window. Raises RunError, OSError."""
    tokens = np.concatenate([shard.read() for shard in open_shards(data_path, "val")])
    if len(tokens) <= window:
        raise RunError(f"validation shards: {len(tokens)} tokens are too few for EVAL_SEQ_LEN={window}")
    return check_ids(tokens, vocab_size, "validation shards")


def read_stream(shards: list[Shard], position: int, number: int) -> np.ndarray:
    """Returns tokens, uint16, of the endlessly repeated shards. Raises RunError, OSError."""
    parts, position, endless = [], position % sum(map(len, shards)), cycle(shards)
    while number:
        shard = next(endless)
        if position < len(shard):
            parts.append(shard.read(position, position + number))
            number -= len(parts[-1])
        position = max(position - len(shard), 0)
    return np.concatenate(parts)


@contextmanager
def span_loader(
    shards: list[Shard], span: int, vocab_size: int, first_step: int = 0
) -> Iterator[Iterator[Tensor]]:
    """Gives this rank's spans of step after step, (SPANS / W, span + 1) int32, read ahead on a thread.

    Rank r has spans r, r + W, ... of each step's eight. Reading raises RunError, OSError.
    """

    def read(step: int) -> Tensor:
        own = range(SPANS * step + rank(), SPANS * (step + 1), world_size())
        spans = {f"span {i}": read_stream(shards, i * (span + 1), span + 1) for i in own}
        return torch.stack([check_ids(tokens, vocab_size, where) for where, tokens in spans.items()])

    def steps(pool: ThreadPoolExecutor) -> Iterator[Tensor]:
        ahead = pool.submit(read, first_step)
        for step in count(first_step + 1):
            spans, ahead = ahead.result(), pool.submit(read, step)
            yield spans

    with ThreadPoolExecutor(1) as pool:
        yield steps(pool)


# ======== Model ========


def document_pieces(tokens: Tensor, longest: int) -> Tensor:
    """Returns where pieces of documents begin in tokens (B, T) as one row, then B * T, (n,) int32.

    A document begins at BOS or with its row and is cut from there on. Few n occur: a GPU compiles for each.
    """
    at = torch.arange(tokens.size(1), device=tokens.device)
    start = torch.where(tokens == BOS, at, 0).cummax(dim=1).values  # of each one's document
    begins = ((at - start) % longest == 0).flatten()
    size = max(256, 2 ** int(begins.sum()).bit_length())
    return begins.nonzero_static(size=size, fill_value=len(begins))[:, 0].int()


def window_mask(past: int, length: int, device: torch.device) -> Tensor:
    """Returns what each of the last T of P + T positions sees, itself and P - 1 before: (T, P + T) bool."""
    query, key = torch.arange(length, device=device)[:, None], torch.arange(past + length, device=device)
    return (query < key) & (key <= query + past)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns attention (B, T, H, d) of q (B, T, H, d) to k and v (B, P + T, K, d); without a mask causal."""
    causal = mask is None
    if not causal:  # no fast kernel takes both groups and a mask
        k, v = (t.repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, positions, d)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=causal).transpose(1, 2)


def piece_attention(q: Tensor, k: Tensor, v: Tensor, pieces: Tensor, longest: int) -> Tensor:
    """Returns causal attention (B, T, H, d) within pieces, see document_pieces(), of at most `longest`."""
    if q.is_cuda and q.dtype == torch.bfloat16:
        k, v = (t.repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
        flat = [t.flatten(0, 1) for t in (q, k, v)]  # (B * T, H, d)
        return varlen.varlen_attn(*flat, pieces, pieces, longest, longest, window_size=(-1, 0)).view_as(q)
    lengths = [length for length in pieces.diff().tolist() if length]
    split = (t.flatten(0, 1)[None].split(lengths, dim=1) for t in (q, k, v))
    return torch.cat([attention(*part) for part in zip(*split, strict=True)], dim=1).view_as(q)


def norm(x: Tensor) -> Tensor:
    """Returns x over its root mean square."""
    return F.rms_norm(x, x.shape[-1:])


def rotary_tables(length: int, window: int, dims: int, base: float, device: torch.device) -> list[Tensor]:
    """Returns cos and sin, (length, 1, dims / 2); the base grows with windows beyond 1,024."""
    base *= max(1, window / 1024) ** (dims / (dims - 2))
    frequencies = base ** (-torch.arange(0, dims, 2, device=device) / dims)
    angles = torch.outer(torch.arange(length, device=device), frequencies)[:, None]
    return [angles.cos(), angles.sin()]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns x (B, T, heads, d), its first channels rotated, channel i with i + dims / 2."""
    half = cos.size(-1)
    x1, x2, rest = x.tensor_split((half, 2 * half), dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


# Keys (normed, not rotated) and values of P positions before: (2, B, P, K, d) for each execution
KVCache = list[Tensor]


class Matrices(NamedTuple):
    """The banks cast for use, each (L, rows, columns); or one layer's, each (rows, columns)."""

    qkv: Tensor  # rows: D of queries, K*d of keys, K*d of values
    out: Tensor
    up: Tensor
    down: Tensor


@dataclass
class Forward:
    """What all layers of one forward pass share."""

    cos: Tensor  # (P + T, 1, ROPE_DIMS / 2)
    sin: Tensor
    mask: Tensor | None = None  # (T, P + T), of each stream or of all; None: causal
    pieces: Tensor | None = None  # see document_pieces()
    longest: int = 0  # of the pieces
    cache: KVCache | None = None
    moments: dict[str, Tensor] | None = None  # field of Matrices -> sums of x x^T to add inputs x to

    def product(self, name: str, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        """Returns x W^T for a layer's matrix."""
        if self.moments is not None:
            flat = x.detach().flatten(0, -2).float()
            self.moments[name][layer].addmm_(flat.mT, flat)
        return F.linear(x, weight)

    def with_past(self, slot: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns past and present keys, values (B, P + T, K, d); the cache keeps the last P, if 0 all."""
        kv = torch.cat((self.cache[slot], torch.stack((k, v))), dim=2)  # (2, B, P + T, K, d)
        self.cache[slot] = kv[:, :, k.size(1) - kv.size(2) :].detach().contiguous()
        return kv[0], kv[1]


def parameter(*shape: int, value: float = 0.0) -> nn.Parameter:
    """Returns a weight, all of one value."""
    return nn.Parameter(torch.full(shape, value))


def lookup_weights(rows: int, width: int, out: int, scale: float) -> list[nn.Parameter | None]:
    """Returns table (rows, width), projection (out, width) unless out is width, scale; or Nones."""
    if not rows:
        return [None, None, None]
    return [parameter(rows, width), None if width == out else parameter(out, width), parameter(value=scale)]


class Block(nn.Module):
    """A layer; its matrices are in the banks."""

    def __init__(self, s: Settings, layer: int):
        super().__init__()
        self.s, self.layer, D = s, layer, s.model_dim
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, D))
        self.attn_scale, self.mlp_scale = parameter(D, value=1.0), parameter(D, value=1.0)
        self.q_gain = parameter(s.num_heads, value=s.qk_gain_init)
        self.input_scale = (layer + 1) ** -0.5
        self.drops_own_value = layer >= s.num_layers - s.xsa_last_n  # XSA
        self.attn_gate = parameter(s.num_heads, s.attn_gate_channels) if s.attn_gate_channels else None
        if 0 <= s.parallel_from <= layer:  # of both lanes; what each gives to both
            self.lane_keep, self.lane_gain = parameter(2, value=1.1), parameter(2, 2, value=1.0)

    def forward(
        self, lanes: list[Tensor], x0: Tensor, values: Tensor | None, m: Matrices, f: Forward, slot: int
    ) -> list[Tensor]:
        """Returns the next lanes, one or two (B, T, D); `values` (B, T, K*d) join the value vectors."""
        attn_scale, mlp_scale, mix = (
            p.to(x0.dtype) for p in (self.attn_scale, self.mlp_scale, self.resid_mix)
        )
        u = mix[0] * lanes[0] + mix[1] * x0
        a = attn_scale * self.attend(norm(u) * self.input_scale, values, m, f, slot)
        y = u + a if len(lanes) == 1 else lanes[1]
        b = mlp_scale * self.mlp(norm(y) * self.input_scale, m, f)
        if len(lanes) == 1:
            return [y + b]
        keep, gain = self.lane_keep.to(x0.dtype), self.lane_gain.to(x0.dtype)
        return [keep[i] * lanes[i] + gain[0, i] * a + gain[1, i] * b for i in (0, 1)]

    def attend(self, x: Tensor, values: Tensor | None, m: Matrices, f: Forward, slot: int) -> Tensor:
        """Returns the attention's output (B, T, D) for x (B, T, D)."""
        length, H, K = x.size(1), self.s.num_heads, self.s.num_kv_heads
        qkv = f.product("qkv", self.layer, x, m.qkv).unflatten(-1, (H + 2 * K, -1))
        q, k, v = qkv.split((H, K, K), dim=2)  # (B, T, H or K, d)
        if values is not None:
            v = v + values.view_as(v)
        k, own_value = norm(k), v
        if f.cache is not None:
            k, v = f.with_past(slot, k, v)  # (B, P + T, K, d)
        q = rotate(norm(q), f.cos[-length:], f.sin[-length:]) * self.q_gain.to(x.dtype)[:, None]
        k = rotate(k, f.cos, f.sin)
        a = attention(q, k, v, f.mask) if f.pieces is None else piece_attention(q, k, v, f.pieces, f.longest)
        if self.drops_own_value:
            a = a.unflatten(2, (K, -1))  # (B, T, K, H / K, d)
            along = F.normalize(own_value, dim=-1).unsqueeze(3)  # (B, T, K, 1, d)
            a = (a - (a * along).sum(-1, keepdim=True) * along).flatten(2, 3)
        if self.attn_gate is not None:
            gate = F.linear(x[..., : self.s.attn_gate_channels], self.attn_gate.to(x.dtype))  # (B, T, H)
            a = a * (self.s.attn_gate_scale * gate).sigmoid()[..., None]
        return f.product("out", self.layer, a.flatten(2), m.out)

    def mlp(self, x: Tensor, m: Matrices, f: Forward) -> Tensor:
        """Returns the MLP's output (B, T, D) for x (B, T, D)."""
        hidden = F.leaky_relu(f.product("up", self.layer, x, m.up), 0.5).square()
        return f.product("down", self.layer, hidden, m.down)


class GPT(nn.Module):
    """The language model, fp32 weights cast to `dtype` where they are used.

    Banks: qo_bank (2L, D, D), layer i's query matrix at i, output at L + i; kv_bank (2L, K*d, D), k and v;
    up_bank (L, hidden, D); down_bank (L, D, hidden).
    """

    BANKS = ("qo_bank", "kv_bank", "up_bank", "down_bank")

    def __init__(self, s: Settings, dtype: torch.dtype = torch.float32):
        super().__init__()
        L, V, D, bigrams = s.num_layers, s.vocab_size, s.model_dim, s.bigram_vocab_size
        KD, hidden = D // s.num_heads * s.num_kv_heads, int(s.mlp_mult * D)
        self.s, self.dtype = s, dtype
        self.looping = True  # layers that run again do, as they always do in scoring
        again = max(s.loop_layers, default=-1) + 1
        self.looped_order = [*range(again), *s.loop_layers * s.loop_count, *range(again, L)]
        self.rotary = {}  # rotary_tables() by length and window
        self.qo_bank, self.kv_bank = parameter(2 * L, D, D), parameter(2 * L, KD, D)
        self.up_bank, self.down_bank = parameter(L, hidden, D), parameter(L, D, hidden)
        self.tok_emb = parameter(V, D)
        bigram_weights = lookup_weights(bigrams if bigrams > 1 else 0, s.bigram_dim, D, 0.05)
        self.bigram_table, self.bigram_proj, self.bigram_scale = bigram_weights
        values = len(s.ve_layers)
        self.ve_table, self.ve_proj, self.ve_scale = lookup_weights(V if values else 0, s.ve_dim, KD, 0.1)
        self.ve_layer_scales = parameter(values, value=1.0) if values else None
        by_token, skips = s.smear == "token", (len(self.looped_order) // 2, D)
        self.smear_gate = parameter((s.attn_gate_channels or 12) if by_token else D)
        self.smear_lambda = parameter() if by_token else None
        self.skip_weights = parameter(*skips, value=1.0) if L > 1 else None
        self.skip_gates = parameter(*skips) if L > 1 and s.skip_gates else None
        self.blocks = nn.ModuleList(Block(s, layer) for layer in range(L))

    @torch.no_grad()
    def initialize(self) -> "GPT":
        """Draw the first weights, where they are no constants, and return the model."""
        for table, deviation in ((self.tok_emb, self.s.tied_embed_init_std), (self.ve_table, 0.01)):
            if table is not None:
                table.normal_(0, deviation)
        orthogonal = [*self.qo_bank[: len(self.blocks)], *self.kv_bank, *self.up_bank]
        orthogonal += [p for p in (self.bigram_proj, self.ve_proj) if p is not None and min(p.shape) >= 64]
        for matrix in orthogonal:
            nn.init.orthogonal_(matrix)
        return self

    def on(self, device: torch.device) -> "GPT":
        """Move the model to a device, compile it for a GPU, and return it."""
        if device.type == "cuda":
            self.compile(dynamic=False, fullgraph=True)
        return self.to(device)

    @property
    def order(self) -> list[int]:
        """The layers as they run."""
        return self.looped_order if self.looping else [*range(len(self.blocks))]

    def banks(self) -> list[nn.Parameter]:
        """Returns the four banks."""
        return [getattr(self, name) for name in self.BANKS]

    def quantized(self) -> dict[str, nn.Parameter]:
        """Returns what the artifact rounds: banks, tables and projections."""
        own = self.named_parameters(recurse=False)
        return {name: w for name, w in own if w.dim() > 1 and not name.startswith("skip_")}

    def matrices(self) -> Matrices:
        """Returns the banks cast."""
        L, (qo, kv, up, down) = len(self.blocks), (bank.to(self.dtype) for bank in self.banks())
        return Matrices(torch.cat((qo[:L], kv[:L], kv[L:]), dim=1), qo[L:], up, down)

    def context(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        moments: dict[str, Tensor] | None = None,
        pieces: Tensor | None = None,
    ) -> Forward:
        """Returns what the layers share when they read the last T of tokens (B, P + T).

        `pieces` of documents, in training: at most TRAIN_SEQ_LEN; else they are whole.
        """
        past, s, length = 0 if cache is None else cache[0].size(2), self.s, tokens.size(1)
        sizes = length, 0 if s.document_attention else past or length
        if sizes not in self.rotary:
            tables = rotary_tables(*sizes, s.rope_dims, s.rope_base, tokens.device)
            self.rotary[sizes] = [t.to(self.dtype) for t in tables]
        mask = window_mask(past, length - past, tokens.device) if past else None
        longest = length if pieces is None else s.train_seq_len
        if s.document_attention and past:
            document = (tokens == BOS).cumsum(1)
            mask = (mask & (document[:, past:, None] == document[:, None]))[:, None]  # (B, 1, T, P + T)
        elif s.document_attention and pieces is None:
            pieces = document_pieces(tokens, length)
        return Forward(*self.rotary[sizes], mask, pieces, longest, cache, moments)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        matrices: Matrices | None = None,
        context: Forward | None = None,
    ) -> Tensor:
        """Returns -log p in nats, (B, T) fp32, of targets (B, T) int64 behind tokens (B, T) int64.

        With a cache, tokens are (B, 2 + T): two earlier ones first, -1 for none; the cache is updated.
        """
        logits = self.logits(tokens, matrices, context).flatten(0, 1)  # (B * T, V)
        return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)

    def logits(
        self, tokens: Tensor, matrices: Matrices | None = None, context: Forward | None = None
    ) -> Tensor:
        """Returns the logits (B, T, V) fp32; tokens as in forward()."""
        context = context or self.context(tokens)
        present = tokens if context.cache is None else tokens[:, 2:]  # (B, T)
        x0, values = self.embed(tokens)[:, -present.size(1) :], None
        if self.s.ve_layers:
            values = self.lookup(present, self.ve_table, self.ve_proj, self.ve_scale)
        x = self.trunk(x0, values, matrices or self.matrices(), context)
        cap = self.s.logit_softcap
        return cap * torch.tanh(F.linear(norm(x), self.tok_emb.to(x.dtype)).float() / cap)

    def lookup(self, index: Tensor, table: Tensor, projection: Tensor | None, scale: Tensor) -> Tensor:
        """Returns a table's rows for an index (B, T), projected and scaled: (B, T, out)."""
        x = F.embedding(index, table).to(self.dtype)
        return (x if projection is None else F.linear(x, projection.to(self.dtype))) * scale.to(self.dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns token and hashed-bigram embedding (B, T, D), normed and smeared. Token -1 is none."""
        t = tokens.int()
        before = F.pad(t, (1, -1), value=-1)
        x = F.embedding(t.clamp(min=0), self.tok_emb).to(self.dtype)
        if self.bigram_table is not None:
            last = len(self.bigram_table) - 1
            bucket = torch.where(before < 0, last, (36313 * t ^ 27191 * before) % last)
            x = x + self.lookup(bucket, self.bigram_table, self.bigram_proj, self.bigram_scale)
        if self.smear_lambda is not None:
            gate = (x[..., : len(self.smear_gate)] @ self.smear_gate.to(x.dtype)).sigmoid()  # (B, T)
            gate = gate * ((before >= 0) & (t != BOS)) * self.smear_lambda.to(x.dtype)
            return norm(x + gate[..., None] * F.pad(x, (0, 0, 1, -1))) * (t >= 0)[..., None]
        x, gate = norm(x) * (t >= 0)[..., None], self.smear_gate.sigmoid().to(self.dtype)
        return (1 - gate) * x + gate * F.pad(x, (0, 0, 1, -1))

    def trunk(self, x0: Tensor, values: Tensor | None, matrices: Matrices, context: Forward) -> Tensor:
        """Returns the residual stream (B, T, D) after all layers of the embedding x0 (B, T, D)."""
        lanes, skips, order = [x0], [], self.order
        encoder_length = len(order) // 2
        layers = [Matrices(*m) for m in zip(*(bank.unbind() for bank in matrices), strict=True)]
        for slot, layer in enumerate(order):
            added = None
            if layer in self.s.ve_layers:
                added = self.ve_layer_scales[self.s.ve_layers.index(layer)].to(x0.dtype) * values
            if layer == self.s.parallel_from:
                lanes = lanes * 2
            if slot >= encoder_length and skips:
                lanes = [self.add_skip(lanes[0], slot - encoder_length, skips.pop()), *lanes[1:]]
            lanes = self.blocks[layer](lanes, x0, added, layers[layer], context, slot)
            if slot < encoder_length:
                skips.append(lanes[0])
        return lanes[0] if len(lanes) == 1 else (lanes[0] + lanes[1]) / 2

    def add_skip(self, x: Tensor, row: int, skip: Tensor) -> Tensor:
        """Returns x (B, T, D) with the skip of an encoder's layer."""
        skip = self.skip_weights[row].to(x.dtype) * skip
        if self.skip_gates is None:
            return x + skip
        return torch.lerp(skip, x, self.skip_gates[row].to(x.dtype).sigmoid())

    def empty_cache(self, lanes: int) -> KVCache:
        """Returns the cache of streams without a past."""
        shape = (2, lanes, 0, self.s.num_kv_heads, self.s.model_dim // self.s.num_heads)
        return [torch.empty(shape, dtype=self.dtype, device=self.tok_emb.device)] * len(self.order)


# ======== Optimizers and schedules ========


CLASSIC = ((3.4445, -4.775, 2.0315),)  # https://kellerjordan.github.io/posts/muon, of all steps
POLAR = (  # Polar Express, arXiv 2505.16932, of step after step
    (8.15655452, -22.4832929, 15.8787699),
    (4.04292994, -2.80891747, 0.500017845),
    (3.8916678, -2.77248415, 0.506064818),
    (3.28575366, -2.36812949, 0.464490242),
    (2.34654133, -1.70978284, 0.423235512),
)


def newton_schulz(G: Tensor, steps: int, triples: tuple = CLASSIC) -> Tensor:
    """Returns G (..., rows, columns), singular values near 1, bf16, by triples of coefficients."""
    tall = G.size(-2) > G.size(-1)
    X = (G.mT if tall else G).bfloat16()
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in islice(cycle(triples), steps):
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.mT if tall else X


compiled = cache(partial(torch.compile, dynamic=False, fullgraph=True))


def orthogonalize(G: Tensor, steps: int, triples: tuple = CLASSIC) -> Tensor:
    """Returns newton_schulz(G, steps, triples), compiled on a GPU."""
    return (compiled(newton_schulz) if G.is_cuda else newton_schulz)(G, steps, triples)


def nesterov_update(grad: Tensor, buffer: Tensor, momentum: float, *, row_norm: bool = False) -> Tensor:
    """Returns Nesterov's update (n, rows, columns) bf16, before Newton-Schulz; the buffer is updated.

    Row norm: MuonEq-R, parameter-golf #1285.
    """
    g = grad.bfloat16()
    update = g.add(buffer.mul_(momentum).add_(g), alpha=momentum)
    if row_norm:
        update = update / update.float().norm(dim=-1, keepdim=True).clamp_min(1e-7).bfloat16()
    return update


def apply_muon_update(bank: Tensor, update: Tensor, lr: float, weight_decay: float) -> None:
    """Decay a bank (n, rows, columns) and subtract an update, scaled for its shape."""
    shape_factor = max(1, bank.size(-2) / bank.size(-1)) ** 0.5
    bank.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * shape_factor)


class Optimizers(Stateful):
    """Muon for the banks and AdamW for the rest. Of each bank's update a rank orthogonalises its share."""

    STATE = ("adamw", "momentum")

    def __init__(self, model: GPT, s: Settings):
        self.model, self.s = model, s
        self.banks = sorted(model.banks(), key=torch.numel, reverse=True)
        self.momentum = [torch.zeros_like(bank, dtype=torch.bfloat16) for bank in self.banks]
        self.triples = POLAR if s.ns_coefficients == "polar" else CLASSIC
        tables, groups = ("tok_emb", "bigram_table", "ve_table"), {}
        embed_wd = s.adam_wd if s.embed_wd < 0 else s.embed_wd
        for name, p in model.named_parameters():
            if name not in model.BANKS:
                rule = (s.tied_embed_lr, embed_wd) if name in tables else (s.scalar_lr, s.adam_wd)
                groups.setdefault(rule, []).append(p)
        split = [{"base_lr": lr, "weight_decay": decay, "params": p} for (lr, decay), p in groups.items()]
        self.adamw = torch.optim.AdamW(split, betas=(0.9, s.beta2), fused=True)
        self.weights = self.banks + sum(groups.values(), [])

    @torch.no_grad()
    def step(self, multiplier: float, momentum: float) -> Tensor:
        """Move the weights, drop their gradients and return the norm before clipping, ()."""
        s, grads = self.s, [w.grad for w in self.weights]
        all_reduce_list(grads)
        squares = torch.stack(torch._foreach_norm(grads)).square()
        total = sum(part.sum() for part in squares.tensor_split([len(self.banks)])).sqrt()
        if s.grad_clip_norm:
            torch._foreach_mul_(grads, (s.grad_clip_norm / (total + 1e-6)).clamp(max=1))
        for bank, buffer in zip(self.banks, self.momentum, strict=True):
            low, high = share(len(bank))
            update = nesterov_update(bank.grad, buffer, momentum, row_norm=s.muon_row_norm)
            own = orthogonalize(update[low:high], s.muon_backend_steps, self.triples)
            update.zero_()[low:high] = own
            apply_muon_update(bank, all_reduce(update), s.matrix_lr * multiplier, s.muon_wd)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * multiplier
        self.adamw.step()
        self.model.zero_grad()
        return total


def share_done(step: int, s: Settings, elapsed: float, budget: float) -> float:
    """Returns the share of training that is done, of steps or of seconds."""
    return min(1.0, max(step / max(s.iterations, 1), elapsed / max(budget, 1e-9)))


def warmdown_left(step: int, s: Settings, elapsed: float, budget: float) -> float:
    """Returns the share of the warm-down to come, 1 to 0; WARMDOWN_ITERS: by time alone if that is finite."""
    if s.warmdown_fraction:
        return min(1.0, (1 - share_done(step, s, elapsed, budget)) / s.warmdown_fraction)
    steps = s.iterations - step
    if budget < math.inf:
        steps = max(budget - elapsed, 0) * max(step, 1) / max(elapsed, 1e-9)
    return min(1.0, steps / max(s.warmdown_iters, 1))


def muon_momentum(step: int, s: Settings) -> float:
    """Returns Muon's momentum at a step: it rises in a line."""
    steps = (0, max(s.muon_momentum_warmup_steps, 1))
    return float(np.interp(step, steps, (s.muon_momentum_warmup_start, s.muon_momentum)))


def ema_decay(step: int, s: Settings) -> float:
    """Returns the decay of the average weights: it rises, so that they lag by 4% of a run at most."""
    return min(s.ema_decay, (1 + step) / (25 + step))


# ======== Quantization ========

RMS_STEPS = 12  # in a row's rms at knob 1, about the record's int6
TINY = 2.0**-24  # the least fp16 above zero
MOST = 4095  # the largest integer of a weight
REACH = 900  # steps in a row's largest weight, at most, before the knob
FISHER_TOKENS = 2048  # of one sample of the Fisher information

Steps = dict[str, Tensor]  # weight (..., rows, columns) -> steps (..., rows, 1) fp32


class Calibration(NamedTuple):
    """What calibrate() finds."""

    moments: dict[str, Tensor]  # field of Matrices -> mean of x x^T over inputs x (L, columns, columns)
    fisher: Named  # weight -> Fisher information of each row, its mean squared gradient


def calibrate(model: GPT, tokens: Tensor, seq_len: int, hooks: Hooks = NO_HOOKS) -> Calibration:
    """Returns moments and Fisher information on tokens (N + 1,), over all ranks. Raises Stopped."""
    number = (len(tokens) - 1) // seq_len * seq_len
    groups = tokens[:number].view(-1, seq_len).long().split(max(1, FISHER_TOKENS // seq_len))
    weights, matrices, (low, high) = model.quantized(), model.matrices(), share(len(groups))
    fisher = {name: torch.zeros_like(w[..., :1]) for name, w in weights.items()}
    shapes = {name: (len(m), m.size(2), m.size(2)) for name, m in matrices._asdict().items()}
    moments = {name: torch.zeros(shape, device=tokens.device) for name, shape in shapes.items()}
    for i in range(low, high):
        report_progress(hooks, "calibration", (i + 1 - low) / (high - low))
        context = model.context(groups[i], moments=moments)
        logits = model.logits(groups[i], matrices, context).flatten(0, 1)
        generator = torch.Generator(tokens.device).manual_seed(i)
        gumbel = -torch.empty_like(logits).exponential_(generator=generator).log()
        labels = (logits + gumbel).argmax(dim=-1)  # drawn from the softmax
        F.cross_entropy(logits, labels, reduction="sum").backward()
        for name, w in weights.items():
            fisher[name] += w.grad.square().mean(dim=-1, keepdim=True)
        model.zero_grad()
    sums = [*moments.values(), *fisher.values()]
    all_reduce_list(sums)
    torch._foreach_div_(sums, number)
    return Calibration(moments, fisher)


@torch.no_grad()
def base_steps(model: GPT, fisher: Named) -> Steps:
    """Returns each row's step before the knob, as 1 / sqrt(Fisher information), so all rounding costs alike.

    At most 8 times off a weight's typical step; the banks' geometric mean is of their rows' rms / RMS_STEPS.
    """
    weights, steps, octaves = model.quantized(), {}, 0
    for name, information in fisher.items():
        mean = information.mean(dim=(-2, -1), keepdim=True).clamp_min(1e-30)
        steps[name] = information.clamp(mean / 64, mean * 64).rsqrt()
    for name in model.BANKS:
        fine = weights[name].square().mean(dim=-1).clamp_min(TINY**2).sqrt() / RMS_STEPS
        octaves += (fine.log2().mean() - steps[name].log2().mean()) * weights[name].numel()
    ratio = (octaves / sum(map(torch.numel, model.banks()))).exp2()
    return {
        name: (steps[name] * ratio).maximum(w.abs().amax(-1, keepdim=True) / REACH)
        for name, w in weights.items()
    }


def scaled(base: Steps, knob: float) -> Steps:
    """Returns the steps times the knob, in eighths of octaves, within fp16."""
    octaves = {name: (8 * (step * knob).log2()).round().div(8) for name, step in base.items()}
    return {name: octave.exp2().clamp(TINY, 65504).half().float() for name, octave in octaves.items()}


class Factor(NamedTuple):
    """What factor() makes of matrices' inputs."""

    order: Tensor  # (n, columns), columns by falling mean square of their input
    upper: Tensor  # (n, columns, columns), upper Cholesky factors of the inverse moments, in that order


def factor(moments: Tensor) -> Factor:
    """Returns GPTQ's factors of moments (n, columns, columns), not 0, which are overwritten."""
    order = moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    for m, o in zip(moments, order, strict=True):
        damped = m[o][:, o]
        damped.diagonal().add_(0.05 * m.trace() / len(m))
        m.copy_(torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True))
    return Factor(order, moments)


def gptq(bank: Tensor, step: Tensor, factors: Factor) -> Tensor:
    """Returns a bank's integers, fp32 (n, rows, columns); later columns make good each rounding.

    GPTQ, arXiv 2210.17323.
    """
    order = factors.order[:, None].expand_as(bank)
    w, q, step, upper = bank.gather(2, order), torch.empty_like(bank), step[..., 0], factors.upper
    for j in range(w.size(2)):
        q[..., j] = (w[..., j] / step).round()
        error = (w[..., j] - q[..., j] * step) / upper[:, j, j, None]
        w[..., j:] -= error[..., None] * upper[:, None, j, j:]
    return w.scatter_(2, order, q)


# Whose inputs a bank's parts have
BANK_INPUTS = {
    "qo_bank": ("qkv", "out"),
    "kv_bank": ("qkv", "qkv"),
    "up_bank": ("up",),
    "down_bank": ("down",),
}


@torch.no_grad()
def quantize(weights: Named, steps: Steps, factors: Mapping[str, Factor] | None = None) -> dict[str, Tensor]:
    """Returns NAME int16 and NAME.scale fp16 of weights with steps, NAME fp16 of others; factors: by GPTQ."""
    stored = {name: w.half() for name, w in weights.items() if name not in steps}
    for name, step in steps.items():
        integers = weights[name] / step
        if factors is not None and name in BANK_INPUTS:
            parts = zip(*(factors[inputs] for inputs in BANK_INPUTS[name]), strict=True)
            integers = gptq(weights[name], step, Factor(*map(torch.cat, parts)))
        stored[name], stored[name + ".scale"] = integers.round_().clamp_(-MOST, MOST).short(), step.half()
    return stored


def dequantize(stored: Named) -> dict[str, Tensor]:
    """Returns the weights, fp32, of what quantize() returned."""
    names = [name for name in stored if not name.endswith(".scale")]
    return {name: stored[name].float() * stored.get(name + ".scale", 1) for name in names}


# ======== Coding and artifact ========

PRECISION = 14  # bits of a symbol's frequency
SYMBOLS, CONTEXTS = 2 * MOST + 1, 32  # a symbol is an integer + MOST


def row_contexts(q: Tensor) -> Tensor:
    """Returns each row's context (..., rows) uint8, 0 to 31: its rms in half octaves."""
    return (4 + 2 * (0.25 + q.float().square().mean(dim=-1).sqrt()).log2()).round().byte()


def count_symbols(stored: Named) -> Tensor:
    """Returns each context's count of each symbol, (CONTEXTS, SYMBOLS) int64, CPU."""
    counts = torch.zeros(CONTEXTS * SYMBOLS, dtype=torch.int64)
    for q in stored.values():
        if q.dtype == torch.int16:
            index = row_contexts(q).int()[..., None] * SYMBOLS + MOST + q
            counts += torch.bincount(index.flatten(), minlength=len(counts)).cpu()
    return counts.view(CONTEXTS, SYMBOLS)


def estimate_bytes(stored: Named) -> float:
    """Returns about the artifact's size in bytes, by the integers' entropy."""
    counts = count_symbols(stored).double()
    nats = -torch.xlogy(counts, counts / counts.sum(dim=1, keepdim=True).clamp_min(1)).sum().item()
    halves = sum(t.numel() for t in stored.values() if t.dtype == torch.half)
    return nats / math.log(256) + 1.5 * halves + 6000


SLACK_BYTES = 20_000  # allowed below the limit


def fit_knob(model: GPT, size: Callable[[float], float], limit: int, knob: float) -> float:
    """Returns knob 1 if its size(knob) fits, else one for (limit - SLACK_BYTES, limit] bytes.

    Twice the knob takes a bit from each weight. The knob is the one that size() saw last, of 16 at most.
    """
    weights = sum(map(torch.numel, model.quantized().values()))
    for tries in count(1):
        excess = size(knob) - limit
        fits = excess <= 0 and (excess > -SLACK_BYTES or knob <= 1 or tries > 8)
        if fits or knob > 1000 or tries == 16:
            break
        knob = max(1.0, knob * 2 ** (8 * (excess + 0.4 * SLACK_BYTES) / weights))
    return knob


def lanes_of(n: int) -> int:
    """Returns how many lanes code n symbols."""
    return max(16, min(2048, n // 16384))


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Returns counts (contexts, symbols) scaled to 2 ** PRECISION, uint64; what occurs gets 1 or more."""
    occurs, sums = counts > 0, counts.cumsum(axis=1)
    shares = (2**PRECISION - occurs.sum(axis=1, keepdims=True)) / sums[:, -1:]
    return np.uint64(np.diff(np.rint(sums * shares), prepend=0) + occurs)


def rans_encode(frequency: np.ndarray, contexts: np.ndarray, symbols: np.ndarray) -> bytes:
    """Returns the code of symbols (n,), by contexts (n,) and frequency (contexts, symbols) uint64.

    rANS (arXiv 1311.2540), interleaved (arXiv 1402.3392): lane i has symbols i, i + lanes, ..., last first;
    its state, 2^16 to 2^32, spills 16 bits when full.
    """
    start, lanes, words = frequency.cumsum(axis=1) - frequency, lanes_of(len(symbols)), []
    states = np.full(lanes, 2**16, np.uint64)
    for row in reversed(range(0, len(symbols), lanes)):
        at = contexts[row : row + lanes], symbols[row : row + lanes]
        f, x = frequency[at], states[: len(at[0])]
        full = x >= f << (32 - PRECISION)
        words.append(x[full].astype("<u2"))
        x[full] >>= 16
        x[:] = (x // f << PRECISION) + x % f + start[at]
    return b"".join([states.astype("<u4"), *words[::-1]])


def rans_decode(frequency: np.ndarray, contexts: np.ndarray, code: bytes) -> np.ndarray:
    """Returns the symbols (n,) int16. Raises ValueError at what no encoder wrote."""
    start, lanes = frequency.cumsum(axis=1) - frequency, lanes_of(len(contexts))
    symbol_at = np.stack([np.repeat(np.arange(len(f)), np.int64(f)) for f in frequency])
    states = np.uint64(np.frombuffer(code, "<u4", lanes))
    words = np.uint64(np.frombuffer(code, "<u2", offset=4 * lanes))
    symbols = np.empty(len(contexts), np.int16)
    for row in range(0, len(contexts), lanes):
        context = contexts[row : row + lanes]
        x = states[: len(context)]
        slot = x % 2**PRECISION
        symbol = symbols[row : row + lanes] = symbol_at[context, slot]
        x[:] = frequency[context, symbol] * (x >> PRECISION) + slot - start[context, symbol]
        low = x < 2**16
        spilled, words = np.split(words, [np.count_nonzero(low)])
        x[low] = x[low] << 16 | spilled
    if len(words) or (states != 2**16).any():
        raise ValueError("it ends elsewhere")
    return symbols


MAGIC = b"GPT16MB2"  # ends with the version of the format
HASH_END, SIDE_START = 40, 44  # behind magic and SHA-256; behind the length of the xz stream


def pack_artifact(s: Settings, fingerprint: str, stored: Named) -> bytes:
    """Returns the artifact of what quantize() returned; `fingerprint` is the tokenizer's.

    Magic; SHA-256 of the rest; length (4 bytes) of the xz stream of an .npz file; that; rANS code.
    The file: `header` (JSON), fp16 tensors, contexts of integers as NAME.rows, `frequency`.
    """
    integers = {name: t.cpu() for name, t in stored.items() if t.dtype == torch.int16}
    halves = {name: t.cpu() for name, t in stored.items() if t.dtype != torch.int16}
    counts = count_symbols(integers).numpy()
    counts[~counts.any(axis=1), 0] = 1  # of contexts that do not occur
    frequency, columns = frequencies(counts), {name: q.size(-1) for name, q in integers.items()}
    rows = {name: row_contexts(q) for name, q in integers.items()}
    contexts = torch.cat([rows[name].flatten().repeat_interleave(n) for name, n in columns.items()])
    symbols = torch.cat([(q + MOST).flatten() for q in integers.values()])
    settings = {name: show(getattr(s, name)) for name in KEPT}
    known = {"tokenizer": fingerprint, "settings": settings, "columns": columns}
    header, file = np.frombuffer(json.dumps(known).encode(), np.uint8), io.BytesIO()
    arrays = {f"{name}.rows": r for name, r in rows.items()} | halves
    np.savez(file, header=header, frequency=np.uint16(frequency), **arrays)
    side = lzma.compress(file.getvalue(), preset=9)
    code = rans_encode(frequency, contexts.numpy(), symbols.numpy())
    packed = len(side).to_bytes(4, "little") + side + code
    return MAGIC + hashlib.sha256(packed).digest() + packed


class Artifact(NamedTuple):
    """What an artifact holds."""

    fingerprint: str  # SHA-256 of its tokenizer
    settings: dict[str, Any]
    stored: dict[str, Tensor]  # as quantize() returned it


def side_bytes(data: bytes) -> int:
    """Returns how many of an artifact's bytes are not the integers' code."""
    return SIDE_START + int.from_bytes(data[HASH_END:SIDE_START], "little")


def unpack_artifact(data: bytes, path: Path | str) -> Artifact:
    """Returns what pack_artifact() was given; executes nothing. Raises RunError."""
    if data[:HASH_END] != MAGIC + hashlib.sha256(data[HASH_END:]).digest():
        raise RunError(f"artifact {path}: truncated, altered, of another version or no artifact")
    try:
        end, position = side_bytes(data), 0
        arrays = dict(np.load(io.BytesIO(lzma.decompress(data[SIDE_START:end]))))
        header = json.loads(bytes(arrays.pop("header")))
        texts, columns = header["settings"], header["columns"]
        texts["recipe"] = texts["recipe"].replace("best", "record")
        if texts.get("ve_enabled") == "0":
            texts["ve_layers"] = ""
        settings = {name: FIELDS[name.upper()].default for name in FIXED}  # of what was added later
        settings |= {name: parse_value(name.upper(), str(texts[name])) for name in texts if name in KEPT}
        contexts = {name: arrays.pop(name + ".rows")[..., None].repeat(n, -1) for name, n in columns.items()}
        flat = np.concatenate([context.ravel() for context in contexts.values()])
        symbols = rans_decode(np.uint64(arrays.pop("frequency")), flat, data[end:]) - MOST
        for name, context in contexts.items():
            arrays[name] = symbols[position : position + context.size].reshape(context.shape)
            position += context.size
        stored = {name: torch.from_numpy(a) for name, a in arrays.items()}
        return Artifact(header["tokenizer"], settings, stored)
    except Exception as e:
        raise RunError(f"artifact {path}: not of this version's format ({e})") from None


def load_for_scoring(artifact: Artifact, path: Path, run: Run, fingerprint: str) -> GPT:
    """Returns an artifact's model, ready to score. Raises RunError."""
    if artifact.fingerprint != fingerprint:
        raise RunError(f"artifact {path}: made with another tokenizer than {run.settings.tokenizer_path}")
    model = GPT(run.settings, run.dtype)
    try:
        model.load_state_dict(dequantize(artifact.stored))
    except RuntimeError:
        raise RunError(f"artifact {path}: not the tensors of its settings") from None
    return model.on(run.device)


# ======== Scoring ========


def plan_windows(targets: int, window: int, stride: int) -> Tensor:
    """Returns (n, 3) int64, windows' start, first target, end: the first scores all, others `stride`."""
    window = min(window, targets)
    end = F.pad(torch.arange(window, targets, stride), (0, 1), value=targets)
    return torch.stack((end - window, F.pad(end[:-1], (1, 0)), end), dim=1)


class Score(NamedTuple):
    """Sums over scored targets."""

    nats: float = 0
    tokens: float = 0
    bytes: float = 0

    @property
    def val_loss(self) -> float:
        """Nats per token."""
        return self.nats / max(self.tokens, 1)

    @property
    def val_bpb(self) -> float:
        """Bits per byte."""
        return self.nats / math.log(2) / max(self.bytes, 1)


@dataclass
class Read:
    """What came of positions of a text, by a forward pass if there are matrices."""

    scorer: "Scorer"
    at: Tensor  # (B, T), positions
    losses: Tensor  # (B, T), in nats
    matrices: Matrices | None = None
    cache: KVCache | None = None  # as it was before


class Scorer:
    """Scores a text (N + 1,) int32: target i is token i + 1."""

    def __init__(
        self,
        model: GPT,
        tokens: Tensor,
        tables: ByteTables,
        window: int,
        batch_tokens: int,
        hooks: Hooks = NO_HOOKS,
    ):
        self.model, self.tokens, self.tables, self.hooks = model, tokens, tables, hooks
        self.targets = len(tokens) - 1
        self.window = min(window, self.targets)
        self.batch = max(1, batch_tokens // self.window)

    def ids(self, at: Tensor) -> Tensor:
        """Returns the tokens at positions, int64, -1 before the text."""
        return torch.where(at < 0, -1, self.tokens[at.clamp(0, self.targets)]).long()

    def context(self, at: Tensor, cache: KVCache | None) -> Forward:
        """Returns what the layers share when positions (B, T) are read behind a cache."""
        past = 0 if cache is None else cache[0].size(2)
        tokens = self.ids(at[:, :1] + torch.arange(-past, at.size(1), device=at.device))  # (B, P + T)
        return self.model.context(tokens, cache)

    def read(self, at: Tensor, matrices: Matrices, cache: KVCache | None = None) -> Read:
        """Read positions (B, T), in a stream behind a cache, which is brought up to date.

        With CUDA graphs the next read overwrites what this one gives.
        """
        if at.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        before, seen = cache and list(cache), at
        if cache is not None:  # the embedding also looks at the two tokens before
            seen = torch.cat((at[:, :1] - 2, at[:, :1] - 1, at), dim=1)
        losses = self.model(self.ids(seen), self.ids(at + 1), matrices, self.context(at, cache))
        read = Read(self, at, losses, matrices, before)
        self.hooks.on_read(read)
        return read

    def measure(self, read: Read, begin: Tensor | int, end: Tensor | int) -> Tensor:
        """Returns (3,) fp64: nats, number, bytes of targets [begin, end), per row (B, 1) or for all."""
        at, scored = read.at, (begin <= read.at) & (read.at < end)
        size = self.tables.count(self.ids(at), self.ids(at + 1))
        sums = torch.stack(
            [(per_token * scored).sum() for per_token in (read.losses.detach().double(), scored, size)]
        )
        self.hooks.on_scores(read, scored, sums)
        return sums

    @torch.no_grad()
    def sums(self, plan: Tensor, stage: str = "") -> Tensor:
        """Returns measure() of a plan of windows (n, 3), over all ranks."""
        (low, high), device = share(len(plan)), self.tokens.device
        batch = self.batch if self.tokens.is_cuda else max(1, min(self.batch, high - low))
        filled = F.pad(plan[low:high], (0, 0, 0, (low - high) % batch))  # by rows that score nothing
        batches = filled.to(device)[..., None].split(batch)
        sums, matrices = torch.zeros(3, dtype=torch.float64, device=device), self.model.matrices()
        for i, rows in enumerate(batches):
            start, begin, end = rows.unbind(1)  # (B, 1) each
            at = start + torch.arange(self.window, device=device)
            sums += self.measure(self.read(at, matrices), begin, end)
            if stage:
                report_progress(self.hooks, stage, (i + 1) / len(batches))
        return all_reduce(sums)

    def score_windows(self, stride: int, stage: str = "scoring") -> Score:
        """Returns the score by windows of `stride` targets each."""
        return Score(*self.sums(plan_windows(self.targets, self.window, stride), stage).tolist())


# ======== Test-time training ========


class Learner(Stateful):
    """A model that learns at test time, and a stream's past."""

    STATE = ("weights", "slots", "losses", "sgd")

    def __init__(self, model: GPT, s: Settings, hooks: Hooks = NO_HOOKS):
        self.model, self.s, self.hooks = model, s, hooks
        self.weights = list(model.parameters())
        shapes = dict.fromkeys(w.shape for w in self.weights)
        self.alike = [[w for w in self.weights if w.shape == shape] for shape in shapes]
        self.first, self.slots = copies(self.weights), model.empty_cache(1)
        self.losses: Tensor | None = None  # of a stream's targets, (N,)
        self.sgd = torch.optim.SGD(self.weights, s.ttt_lr, momentum=s.ttt_momentum)

    def update(self, loss: Tensor, lr: float) -> None:
        """Move the weights against the gradient of the loss, in sliding mode of all ranks' parts of it."""
        s = self.s
        self.hooks.before_update(self)
        loss.backward()
        with torch.no_grad():
            if s.eval_mode == "sliding":
                all_reduce_list([w.grad for w in self.weights])
            if s.ttt_grad_clip:
                nn.utils.clip_grad_norm_(self.weights, s.ttt_grad_clip)
            if s.ttt_decay:
                torch._foreach_lerp_(self.weights, self.first, s.ttt_decay)
            if s.ttt_muon:
                for alike in self.alike:
                    update = torch.stack([w.grad for w in alike])
                    if update.dim() > 2:
                        update = orthogonalize(update, s.ttt_ns_steps).float()
                    torch._foreach_sub_(alike, update.unbind(), alpha=lr)
            else:
                self.sgd.param_groups[0]["lr"] = lr
                self.sgd.step()
            self.model.zero_grad()
        self.hooks.on_update(self)


class SlidingMode:
    """Windows that each score EVAL_STRIDE targets. A chunk is learnt from in whole sequences."""

    stage = "final_int6_sliding_window"
    context_chunks = 0  # first chunks that are not learnt from

    def __init__(self, s: Settings, scorer: Scorer, learner: Learner):
        self.s, self.scorer, self.learner = s, scorer, learner
        self.chunks = ceil_div(scorer.targets, s.ttt_chunk_tokens)
        plan = plan_windows(scorer.targets, scorer.window, s.eval_stride)
        windows = (plan[:, 1] // s.ttt_chunk_tokens).bincount(minlength=self.chunks)
        self.plans = plan.split(windows.tolist())  # by first target

    def score_chunk(self, chunk: int) -> Tensor:
        """Returns a chunk's sums (3,) fp64, over all ranks."""
        return self.scorer.sums(self.plans[chunk])

    def learn_chunk(self, chunk: int, epochs: int) -> None:
        """Learn from whole sequences, TTT_BATCH_SEQS an update; some of weight zero fill up."""
        s, length, device = self.s, self.s.train_seq_len, self.scorer.tokens.device
        low = chunk * s.ttt_chunk_tokens
        sequences = min(s.ttt_chunk_tokens, self.scorer.targets - low) // length
        lr = s.ttt_lr * (1 + math.cos(math.pi * chunk / max(self.chunks - 1, 1))) / 2
        own = ceil_div(min(s.ttt_batch_seqs, sequences), world_size())
        slot = rank() + world_size() * torch.arange(own, device=device)
        for first in [*range(0, sequences, s.ttt_batch_seqs)] * epochs:
            rows = min(s.ttt_batch_seqs, sequences - first)
            start = low + length * (first + slot).clamp(max=sequences - 1)
            at = start[:, None] + torch.arange(length, device=device)  # (B, T)
            losses = self.scorer.read(at, self.learner.model.matrices()).losses
            self.learner.update((losses * ((slot[:, None] < rows) / (rows * length))).sum(), lr)


class StreamingMode:
    """Each position is read once and sees a window. Chunk 0 is a window.

    Keys and values of the past stay as they were when read.
    """

    stage = "final_int6_streaming"
    context_chunks = 1

    def __init__(self, s: Settings, scorer: Scorer, learner: Learner):
        self.s, self.scorer, self.learner = s, scorer, learner
        self.chunks = 1 + ceil_div(scorer.targets - scorer.window, s.ttt_chunk_tokens)
        learner.losses = torch.zeros(scorer.targets, device=scorer.tokens.device)

    def start(self, chunk: int) -> int:
        """Returns a chunk's first position."""
        return self.scorer.window + (chunk - 1) * self.s.ttt_chunk_tokens if chunk else 0

    def read(self, chunk: int) -> Read:
        """Read a chunk behind what was before it."""
        at = torch.arange(self.start(chunk), self.start(chunk + 1), device=self.scorer.tokens.device)
        cache = list(self.before)
        read = self.scorer.read(at[None], self.learner.model.matrices(), cache)
        self.learner.slots = cache
        return read

    def score_chunk(self, chunk: int) -> Tensor:
        """Returns a chunk's sums (3,) fp64."""
        self.before = copies(self.learner.slots)
        self.first_read = self.read(chunk)
        own = self.learner.losses[self.start(chunk) : self.start(chunk + 1)]
        own.copy_(self.first_read.losses.detach()[0, : len(own)])
        return self.scorer.measure(self.first_read, 0, self.scorer.targets)

    def learn_chunk(self, chunk: int, epochs: int) -> None:
        """Learn from all tokens of a chunk, an update an epoch."""
        forget = self.s.ttt_forget and (self.scorer.ids(self.first_read.at) == BOS).any()
        if forget:
            copy_weights(self.learner.weights, self.learner.first)
            self.learner.hooks.on_forget(self.learner)
        for epoch in range(epochs):
            read = self.read(chunk) if epoch or forget else self.first_read
            self.learner.update(read.losses.sum() / self.s.ttt_chunk_tokens, self.s.ttt_lr)


EVAL_MODES = {"sliding": SlidingMode, "streaming": StreamingMode}


class Pace(Stateful):
    """Keeps to EVAL_MAX_SECONDS by rank 0's clock: if short of time, less is learnt, evenly."""

    STATE = ("now", "rate", "credit", "scoring", "learning")
    CHECKS = 200  # of the clock, which waits for the device

    def __init__(self, s: Settings, chunks: int, clock: Clock):
        self.s, self.chunks, self.clock = s, chunks, clock
        self.limit = 0.97 * s.eval_max_seconds * (0.97 if s.audit else 1)  # a reserve; an audit's 3%
        self.rate, self.credit = 1.0, 0.0  # share of the wanted epochs; epochs that are due
        self.scoring, self.learning = 0.0, 0.0  # seconds to score a chunk; for an epoch on one
        self.now = from_rank0(clock.seconds())

    def time(self, chunk: int) -> float:
        """Returns the seconds so far, or 0 for chunks in which nobody looks."""
        looks = chunk % max(1, self.chunks // self.CHECKS) == 0
        return self.clock.seconds() if looks else 0.0

    def epochs(self, sums: Tensor) -> int:
        """Returns how often to learn from a chunk with these sums (3,)."""
        s, wanted = self.s, self.s.ttt_epochs
        if s.ttt_entropy_adapt:
            val_loss = Score(*sums.tolist()).val_loss
            wanted += int(val_loss > s.ttt_entropy_high) - int(0 < val_loss < s.ttt_entropy_low)
        self.credit = round(self.credit % 1 + self.rate * max(wanted, 1), 6)
        return int(self.credit)

    def end(self, chunk: int, start: float, scored: float, epochs: int) -> None:
        """Adapt the rate to a chunk of these times that ends now."""
        now, left = self.time(chunk), self.chunks - 1 - chunk
        if now:
            self.scoring = max(scored - start, self.scoring / 2)
            self.learning = max((now - scored) / epochs, self.learning / 2) if epochs else self.learning
            spare = self.limit - now - left * self.scoring
            rate = spare / max(left * self.learning * self.s.ttt_epochs, 1e-9)
            paced = now, min(max(rate, 0.0), 1.0)
            self.now, self.rate = paced if self.s.ttt_experts else from_rank0(paced)


class TestTimeTraining(Stateful):
    """Scores chunk after chunk, and learns from each after it was scored."""

    STATE = ("records", "learner", "pace")

    def __init__(self, mode: SlidingMode | StreamingMode, clock: Clock | None = None, log: Log | None = None):
        self.mode, self.learner, self.log, self.hooks = mode, mode.learner, log, mode.learner.hooks
        self.pace = Pace(mode.s, mode.chunks, clock or Clock())
        self.records = []  # of each chunk: sums (3,) fp64, epochs
        self.every = 1  # chunks between meetings

    def run(self) -> Score:
        """Score and learn from chunks to come; return the score of all. Raises Stopped."""
        clock, n, mode, pace = Clock(), self.mode.chunks, self.mode, self.pace
        total = sum(sums for sums, _ in self.records)
        for c in range(len(self.records), n):
            self.hooks.on_chunk_start(self, c)
            start, epochs = pace.time(c), 0
            sums = mode.score_chunk(c)
            total, scored = total + sums, pace.time(c)
            if mode.context_chunks <= c < n - 1 and mode.s.ttt_enabled and mode.s.ttt_lr:
                epochs = pace.epochs(sums)
                mode.learn_chunk(c, epochs)
            pace.end(c, start, scored, epochs)
            self.records.append((sums, epochs))
            self.hooks.on_chunk(self)
            if c % self.every == 0:
                self.hooks.on_meeting(self)
                if self.hooks.should_stop(in_loop=True):
                    raise Stopped
                self.hooks.on_progress("TTT", (c + 1) / n)
            if self.log and (c % ceil_div(n, 20) == 0 or c == n - 1):
                values = {"bpb": Score(*total.tolist()).val_bpb, "seconds": clock.seconds()}
                line = "ttt_chunk [{chunk}/{chunks}] bpb={bpb:.6f} time={seconds:.1f}s"
                self.log.event("ttt_chunk", line, chunk=c + 1, chunks=n, **values)
        return Score(*total.tolist())


BLOCK = 4096  # targets of a mixture; blocks are mixed side by side


def mix(losses: Tensor, share: float, look_back: int) -> tuple[Tensor, Tensor]:
    """Returns a mixture's losses (N,) fp64 of experts' (E, N), in nats, and the weights (E, N) it had.

    Behind each target weights follow Bayes' rule; then a share goes back to their average, which looks back
    on so many targets (mixing past posteriors, Bousquet and Warmuth 2002).
    """
    number, n = losses.shape
    p = losses.double().neg().exp().nan_to_num(0)
    p = F.pad(p, (0, -n % BLOCK), value=1).view(number, -1, BLOCK)
    weights, now = torch.empty_like(p), torch.full_like(p[..., 0], 1 / number)
    average = now
    for t in range(BLOCK):
        weights[..., t] = now
        joint = now * p[..., t]  # (E, blocks)
        posterior = joint / joint.sum(dim=0)
        average = torch.lerp(average, posterior, 1 / look_back)
        now = torch.lerp(posterior, average, share)
    return -(weights * p).sum(dim=0).log().flatten()[:n], weights.flatten(1)[:, :n]


STRENGTHS = (1, 8, 64)  # of caches


def before(keys: Tensor, counts: Tensor) -> Tensor:
    """Returns how many that count, (N,) bool, stand earlier and have the same one of keys (N,)."""
    order = keys.argsort(stable=True)
    own = counts[order].long()
    sums = own.cumsum(0) - own
    begins = keys[order].diff(prepend=keys.new_tensor([-1])) != 0
    return torch.empty_like(sums).scatter_(0, order, sums - torch.where(begins, sums, 0).cummax(0).values)


def cache_losses(tokens: Tensor, losses: Tensor, order: int) -> Tensor:
    """Returns -log p in nats, (strengths, N), of the targets of tokens (N + 1,) by n-grams.

    The last k tokens were there n times before, d different ones behind them, the target c times:
    p_k = (c + a d p_{k-1}) / (n + a d), a the strength (Witten and Bell 1991). The first p is that of
    losses (N,), of a model; then k is 2 to `order` in the text so far, then 1 to `order` in the document.
    """
    x, y, p = tokens[:-1].long(), tokens[1:].long(), losses.double().neg().exp()
    a, every = torch.tensor(STRENGTHS, device=x.device).double()[:, None], x >= 0
    for context, least in ((0 * x, 2), ((x == BOS).cumsum(0), 1)):
        for k in range(1, order + 1):
            context = (context << 16 | F.pad(x, (k - 1, 1 - k))).unique(return_inverse=True)[1]
            if k >= least:
                c, n = before(context << 16 | y, every), before(context, every)
                d = before(context, c == 0)
                p = torch.where(n > 0, (c + a * d * p) / (n + a * d), p)
    return -p.log()


class Ensemble(Stateful):
    """Experts that each read the text, one at a time on a rank; their mixture counts."""

    mode = StreamingMode
    records = ()

    def __init__(self, s: Settings, scorer: Scorer, clock: Clock, log: Log):
        self.s, self.scorer, self.clock, self.log = s, scorer, clock, log
        self.experts = expert_settings(s)
        self.done: dict[str, Tensor] = {}  # losses (N,)
        self.begun: dict[str, State] = {}  # from before a restart
        self.now: dict[str, TestTimeTraining] = {}

    def state_dict(self) -> State:
        """Returns what all ranks' experts have come to."""
        own = {name: tree_map_only(Tensor, Tensor.cpu, ttt.state_dict()) for name, ttt in self.now.items()}
        return {"done": dict(self.done), "begun": self.begun | dict(ChainMap(*gather(own)))}

    def load_state_dict(self, state: State) -> None:
        """Go on from a state_dict(), of perhaps another number of ranks."""
        self.done, self.begun = state["done"], state["begun"]

    def run(self) -> Score:
        """Let all experts read that there is time for; return the mixture's score. Raises Stopped."""
        scorer, world, needed, common = self.scorer, world_size(), 0.0, self.s.ttt_chunk_tokens
        while rest := [name for name in self.experts if name not in self.done]:
            end, turn = self.s.eval_max_seconds, rest[:world]
            now, needed = from_rank0((self.clock.seconds(), needed))
            if self.done and now + needed > end:
                self.log.event("dropped", experts="; ".join(rest))
                break
            name = turn[rank() % len(turn)]
            s = replace(self.experts[name], eval_max_seconds=now + (end - now) / ceil_div(len(rest), world))
            mode = self.mode(s, scorer, Learner(scorer.model, s, scorer.hooks))
            every = common // s.ttt_chunk_tokens
            mode.chunks = 1 + every * ceil_div(scorer.targets - scorer.window, common)
            self.now[name] = ttt = TestTimeTraining(mode, self.clock)
            ttt.every = every
            if name in self.begun:
                ttt.load_state_dict(self.begun.pop(name))
            ttt.run()
            scorer.hooks.on_expert(ttt)
            copy_weights(mode.learner.weights, mode.learner.first)
            for i, name in enumerate(turn):
                losses = ttt.learner.losses if i == rank() else torch.zeros_like(ttt.learner.losses)
                self.done[name] = all_reduce(losses)
            self.now, needed = {}, ttt.pace.scoring * mode.chunks
        return self.mixture()

    def mixture(self) -> Score:
        """Returns the score of what counts."""
        s, scorer, members = self.s, self.scorer, dict(self.done)

        def mixture() -> tuple[Tensor, Tensor]:
            return mix(torch.stack([*members.values()]), s.ttt_share, s.ttt_share_tokens)

        mixed, weights = mixture()
        if s.ttt_cache:
            caches = cache_losses(scorer.tokens, mixed, s.ttt_cache)
            members |= {f"cache {a}": own for a, own in zip(STRENGTHS, caches, strict=True)}
            mixed, weights = mixture()
        scorer.hooks.on_mixture(self, members, mixed, weights)
        read = Read(scorer, torch.arange(scorer.targets, device=mixed.device)[None], mixed[None])
        return Score(*all_reduce(scorer.measure(read, 0, scorer.targets if rank() == 0 else 0)).tolist())


class Evaluation(Stateful):
    """The stages of scoring tokens (N + 1,) int32, in order, under a clock."""

    STATE = ("scores", "seconds", "clock", "ttt")

    def __init__(self, run: Run, model: GPT, tokens: Tensor, tables: ByteTables):
        s, self.run_of, self.model, self.clock = run.settings, run, model, Clock()
        batch = s.val_batch_size // SPANS
        self.scorer = scorer = Scorer(model, tokens, tables, s.eval_seq_len, batch, run.hooks)
        mode = EVAL_MODES[s.eval_mode]
        if s.ttt_experts:
            self.ttt = Ensemble(s, scorer, self.clock, run.log)
        else:
            self.ttt = TestTimeTraining(mode(s, scorer, Learner(model, s, run.hooks)), self.clock, run.log)
        self.stages = {"final_int6_roundtrip": lambda: scorer.score_windows(s.eval_seq_len, "roundtrip")}
        if s.eval_mode == "sliding":
            self.stages[mode.stage] = lambda: scorer.score_windows(s.eval_stride, "sliding")
        if s.ttt_enabled or s.eval_mode == "streaming":
            self.stages["legal_ttt" if s.ttt_enabled else mode.stage] = self.ttt.run
        self.scores, self.seconds = {}, {}

    def run(self) -> None:
        """Score by all stages still to come. Raises RunError, Stopped."""
        for name, stage in self.stages.items():
            if name not in self.scores:
                score = stage()
                if not math.isfinite(score.nats):
                    raise RunError(f"{name}: the loss is {score.nats}; lower TTT_LR or the learning rates")
                self.scores[name] = tuple(score)
                self.seconds[name] = self.clock.seconds() - sum(self.seconds.values())
                self.run_of.hooks.on_stage(name, score)
            report_stage(self.run_of, name, Score(*self.scores[name]), self.seconds[name])


def report_stage(run: Run, name: str, score: Score, seconds: float) -> None:
    """Log the score of a stage that took so long."""
    values = {"stage": name, "val_loss": score.val_loss, "val_bpb": score.val_bpb}
    line = "{stage} eval_time:{eval_time:.0f}ms, peak memory {memory:.0f} MiB\n"
    line += "{stage}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}"
    run.log.event("stage", line, **values, eval_time=1000 * seconds, memory=peak_memory())


# ======== Training ========

WARM_UP_TOKENS = 16384  # least ones in warm-up


class Trainer(Stateful):
    """Trains a model under the clock. Making one raises RunError, OSError."""

    STATE = ("done", "elapsed", "weights", "optimizers", "ema")

    def __init__(self, run: Run):
        s, self.run_of, self.device = run.settings, run, run.device
        self.s, self.shards = s, open_shards(s.data_path, "train")
        self.loader = partial(span_loader, self.shards, s.train_batch_tokens // SPANS, s.vocab_size)
        number = max(s.calibration_tokens // s.train_seq_len, 1) * s.train_seq_len + 1
        first = check_ids(read_stream(self.shards, 0, number), s.vocab_size, "first train shard")
        self.calibration_tokens = first.to(self.device)
        torch.manual_seed(s.seed)
        self.model = GPT(s, run.dtype).initialize().on(self.device)
        self.weights = list(self.model.parameters())
        self.optimizers = Optimizers(self.model, s)
        self.ema = copies(self.weights)
        self.done, self.elapsed = 0, 0.0  # steps, seconds so far
        self.piece = 0  # longest one of a document now

    def calibrate(self, part: int | None = None) -> Calibration:
        """Returns calibrate() of the first training tokens, all or a `part`."""
        return calibrate(self.model, self.calibration_tokens[:part], self.s.train_seq_len, self.run_of.hooks)

    def train_step(self, spans: Tensor, multiplier: float, momentum: float) -> Tensor:
        """Learn from spans (SPANS / W, span + 1); return this rank's part of the loss, norm: (2,)."""
        s, length, pieces = self.s, self.s.train_seq_len, [None] * len(spans)
        if s.document_attention:  # a row is a span; nobody waits for the device
            length = spans.size(1) - 1
            pieces = [document_pieces(span[None, :-1], self.piece).to(self.device) for span in spans]
        spans = spans.to(self.device, non_blocking=True).long()
        matrices, loss = self.model.matrices(), 0
        leaves = Matrices(*(m.detach().requires_grad_() for m in matrices))  # whose gradients are cast once
        sums = [torch.zeros_like(m, dtype=torch.float32) for m in matrices]
        for span, own in zip(spans, pieces, strict=True):
            x, y = span[:-1].view(-1, length), span[1:].view(-1, length)
            context = self.model.context(x, pieces=own)
            part = self.model(x, y, leaves, context).sum() / s.train_batch_tokens
            part.backward()
            loss += part.detach()
            for leaf, total in zip(leaves, sums, strict=True):
                total += leaf.grad
                leaf.grad = None
        torch.autograd.backward(matrices, [t.to(m.dtype) for t, m in zip(sums, matrices, strict=True)])
        return torch.stack((loss, self.optimizers.step(multiplier, momentum)))

    def enter(self, share: float) -> None:
        """Do what a share of training brings: loops, longer pieces of documents."""
        self.model.looping = share >= self.s.loop_from
        schedule = self.s.train_seq_schedule or ((self.s.train_seq_len, 0),)
        self.piece = max(length for length, start in schedule if start <= share)

    def warm_up(self) -> float:
        """Compile by steps that leave no trace; return the seconds to keep for the end."""
        s, log, clock, before = self.s, self.run_of.log, Clock(), copies(self.weights)
        number = len(self.calibration_tokens) - 1
        part = min(number, max(number // 16, WARM_UP_TOKENS) // s.train_seq_len * s.train_seq_len)
        with self.loader() as spans:
            for i in range(s.warmup_steps):
                report_progress(self.run_of.hooks, "warm-up", i / s.warmup_steps)
                self.enter((i + 1) % 2)
                self.train_step(together(spans.__next__), 1.0, s.muon_momentum)
        copy_weights(self.weights, before)
        self.optimizers = Optimizers(self.model, s)
        for _ in range(2):  # the first time is slower
            again = Clock()
            self.calibrate(part + 1)
        reserve = from_rank0(1.5 * number / part * again.seconds())
        log.event("warm_up", reserve=1000 * reserve, took=clock.seconds())
        return reserve

    def run(self, validate: Callable[[], Score]) -> Calibration:
        """Train till steps or rank 0's time are used up, average, calibrate. Raises RunError, Stopped."""
        s, log, hooks = self.s, self.run_of.log, self.run_of.hooks
        budget = (s.max_wallclock_seconds or math.inf) - self.warm_up()
        if (restored := hooks.restore_training()) is not None:
            self.load_state_dict(restored)
            log.event("resumed", step=self.done)
        clock = Clock()
        clock.add(self.elapsed)
        with self.loader(self.done) as spans:
            while True:
                expected = self.elapsed + self.elapsed / max(self.done, 1)
                last = self.done == s.iterations or (self.done > 0 and expected > budget)
                self.enter(1 if last else share_done(self.done, s, self.elapsed, budget))
                if last or (s.val_loss_every and self.done % s.val_loss_every == 0):
                    pause, score = Clock(), validate()
                    losses = {"val_loss": score.val_loss, "val_bpb": score.val_bpb}
                    self.report("validation", "val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f}", **losses)
                    if not math.isfinite(score.nats):
                        raise RunError("no validation loss is finite; lower the learning rates")
                    clock.add(-pause.seconds())
                hooks.on_step(self, last)
                if hooks.should_stop(in_loop=True):
                    raise Stopped
                if last:
                    break
                left = warmdown_left(self.done, s, self.elapsed, budget)
                multiplier, momentum = max(left, s.min_lr), muon_momentum(self.done, s)
                measured = self.train_step(together(spans.__next__), multiplier, momentum)
                with torch.no_grad():
                    torch._foreach_lerp_(self.ema, self.weights, 1 - ema_decay(self.done, s))
                self.finish_step(measured, clock, multiplier)
                hooks.on_progress("training", share_done(self.done, s, self.elapsed, budget))
        copy_weights(self.weights, self.ema)
        calibration = self.calibrate()
        times = {"train_time": 1000 * self.elapsed, "with_calibration": 1000 * clock.seconds()}
        log.event("trained", steps=self.done, memory=peak_memory(), **times)
        return calibration

    def finish_step(self, measured: Tensor, clock: Clock, multiplier: float) -> None:
        """Count and report a step; `measured` is train_step()'s. Raises RunError."""
        s, (loss, norm) = self.s, measured.tolist()
        numbers = [clock.seconds() if rank() == 0 else 0.0, loss, norm / world_size()]
        self.elapsed, loss, norm = all_reduce(torch.tensor(numbers, dtype=torch.float64)).tolist()
        self.done += 1
        if not math.isfinite(loss + norm):
            raise RunError(f"step {self.done}: loss {loss}, gradient norm {norm}; lower the learning rates")
        if s.train_log_every and (self.done <= 10 or self.done % s.train_log_every == 0):
            speed = s.train_batch_tokens * self.done / self.elapsed
            values = {"train_loss": loss, "tokens_per_second": speed, "memory": peak_memory()}
            end = " tokens/s:{tokens_per_second:.0f} memory:{memory:.0f}MiB"
            self.report("step", "train_loss:{train_loss:.4f}", end, **values, multiplier=multiplier)

    def report(self, event: str, losses: str, end: str = "", **values: float) -> None:
        """Log losses after so many steps and milliseconds."""
        line, took = " train_time:{train_time:.0f}ms step_avg:{step_avg:.2f}ms", 1000 * self.elapsed
        values |= {"step": self.done, "iterations": self.s.iterations, "train_time": took}
        line = "step:{step}/{iterations} " + losses + line + end
        self.run_of.log.event(event, line, **values, step_avg=took / max(self.done, 1))


def export(run: Run, model: GPT, fingerprint: str, calibration: Calibration, limit: int) -> bytes:
    """Returns a trained model's artifact, within `limit` bytes if that can be."""
    s, clock, weights, packed = run.settings, Clock(), model.state_dict(), b""
    base = base_steps(model, calibration.fisher)
    factors = {name: factor(moments) for name, moments in calibration.moments.items()}

    def estimate(knob: float) -> float:
        return estimate_bytes(quantize(weights, scaled(base, knob)))

    def size(knob: float) -> float:
        nonlocal packed
        packed = pack_artifact(s, fingerprint, quantize(weights, scaled(base, knob), factors))
        return len(packed)

    knob = fit_knob(model, size, limit, fit_knob(model, estimate, limit, 1.0))
    run.log.event("quantized", knob=knob, took=clock.seconds())
    return packed


# ======== Main ========


def load_hooks(s: Settings) -> Hooks:
    """Returns the hooks of tools/run/ beside this file, or none. Raises RunError."""
    folder = Path(__file__).resolve().parent / "tools"
    if not (folder / "run").is_dir():
        if s.audit or s.resume or s.checkpoint_every:
            raise RunError("AUDIT, RESUME and CHECKPOINT_EVERY need tools/")
        return NO_HOOKS
    sys.modules.setdefault("tools", ModuleType("tools")).__path__ = [str(folder)]
    try:
        return importlib.import_module("tools.run").make_hooks(s)
    except ImportError as e:
        raise RunError(f"tools/ beside this file: {e}") from None


def read_artifact(run: Run) -> tuple[bytes, Artifact]:
    """Returns rank 0's artifact, as it is and unpacked. Raises RunError."""
    data = from_rank0(together(run.artifact_path.read_bytes, 1))
    return data, unpack_artifact(data, run.artifact_path)


def compile_scoring(run: Run, model: GPT, tables: ByteTables) -> None:
    """Compile what scoring will run, on made-up tokens, without a trace.

    Streams become CUDA graphs unless these fail, or an audit keeps what the next would overwrite.
    """
    s, clock, weights, triton = run.settings, Clock(), list(model.parameters()), torch._inductor.config.triton
    before, number = copies(weights), 4 * s.ttt_chunk_tokens + 2 * s.eval_seq_len + 1
    made_up = torch.randint(s.vocab_size, (number,), dtype=torch.int32, device=run.device)
    quiet = Run(replace(s, eval_max_seconds=math.inf), run.device)
    quiet.log.outputs.clear()
    for triton.cudagraphs in (s.eval_mode == "streaming" and not s.audit, False):
        try:
            for stage in Evaluation(quiet, model, made_up, tables).stages.values():
                stage()
            break
        except RuntimeError as e:
            if not triton.cudagraphs:
                raise
            run.log.event("no_graphs", fault=str(e))
            torch._dynamo.reset()
        finally:
            model.zero_grad()
            copy_weights(weights, before)
    run.log.event("compiled", took=clock.seconds(), graphs=triton.cudagraphs)


def log_beginning(run: Run, source: bytes) -> None:
    """Log what runs and where."""
    shown, code = assignments(run.settings, list(FIELDS)), hashlib.sha256(source).hexdigest()
    run.log.event(
        "settings", "settings: {settings}", settings=shown, source_sha256=code, code_bytes=len(source)
    )
    hardware = torch.cuda.get_device_name() if run.device.type == "cuda" else f"CPU ({platform.machine()})"
    where = {"processes": world_size(), "hardware": hardware, "torch": torch.__version__}
    run.log.event("machine", **where, python=platform.python_version(), hooks=str(run.hooks))


def train_and_export(
    run: Run, trainer: Trainer, text: Tensor, tables: ByteTables, fingerprint: str, limit: int
) -> None:
    """Train a model and write its artifact. Raises RunError, Stopped."""
    s = run.settings
    number, tokens = sum(map(torch.numel, trainer.weights)), sum(map(len, trainer.shards))
    run.log.event("data", parameters=number, validation_tokens=len(text), training_tokens=tokens)
    scorer = Scorer(trainer.model, text, tables, s.eval_seq_len, s.val_batch_size // SPANS, run.hooks)
    calibration = trainer.run(lambda: scorer.score_windows(s.eval_seq_len))
    clock, score = Clock(), scorer.score_windows(s.eval_seq_len)
    report_stage(run, "averaged", score, clock.seconds())
    run.hooks.on_stage("averaged", score)
    report_progress(run.hooks, "quantizing and coding", 0)
    packed = partial(export, run, trainer.model, fingerprint, calibration, limit)
    together(lambda: write_atomically(run.artifact_path, packed()), 1)


def execute(run: Run) -> None:
    """Train, unless there is only something to score; score the artifact on disk."""
    s, hooks, source = run.settings, run.hooks, Path(__file__).read_bytes()
    if run.device.type == "cuda":
        torch._dynamo.config.recompile_limit = 64
        torch.set_float32_matmul_precision("high")  # calibration in TF32
    s.run_id = from_rank0(s.run_id or Path(s.resume).stem or str(uuid.uuid4()))
    limit = s.artifact_limit - len(source)
    hooks.on_start(run)
    phase = hooks.restore_phase()
    only_score = s.eval_only or phase == "scoring"
    if only_score:
        data, artifact = read_artifact(run)
        s = run.settings = parse_settings(os.environ, artifact.settings | {"run_id": s.run_id})
    tokenizer, fingerprint = together(lambda: load_tokenizer(s.tokenizer_path, s.vocab_size))
    if (s.document_attention or s.smear == "token") and tokenizer.bos_id() != BOS:
        raise RunError(f"TOKENIZER_PATH={s.tokenizer_path}: documents must begin with BOS {BOS}")
    with run.device:
        tables = byte_tables(tokenizer)
    text = together(lambda: validation_tokens(s.data_path, s.vocab_size, s.eval_seq_len)).to(run.device)
    trainer = None if only_score else together(lambda: Trainer(run))
    together(lambda: run.log.open(run.log_path, source.decode(), append=bool(phase)), 1)
    log_beginning(run, source)
    if trainer is not None:
        train_and_export(run, trainer, text, tables, fingerprint, limit)
        del trainer
        data, artifact = read_artifact(run)
    sizes = {"total": len(data) + len(source), "artifact_bytes": len(data), "side_bytes": side_bytes(data)}
    run.log.event("size", "Total submission size int+rans: {total} bytes", **sizes)
    model = load_for_scoring(artifact, run.artifact_path, run, fingerprint)
    if run.device.type == "cuda":
        compile_scoring(run, model, tables)
    evaluation = Evaluation(run, model, text, tables)
    hooks.on_scoring(evaluation)
    if (restored := hooks.restore_scoring()) is not None:
        evaluation.load_state_dict(restored)
        run.log.event("resumed", chunk=len(evaluation.ttt.records))
    evaluation.run()
    hooks.on_end()
    if run.log.lost:
        raise RunError(f"the log is not whole: {run.log.lost}")
    if (over := sizes["total"] - s.artifact_limit) > 0:
        raise RunError(f"submission {over} bytes over ARTIFACT_LIMIT; {run.artifact_path} is kept")


def main() -> int:
    """Returns the exit status: 0, 2 after an error, 75 if it can go on later."""
    if sys.argv[1:] == ["--help"]:
        print(help_text(), flush=True)
        return 0
    hooks, status = NO_HOOKS, 0
    with suppress(AttributeError):  # a closed console
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if sys.argv[1:]:
            raise RunError(f"unknown argument {sys.argv[1]}, see --help")
        s, device = parse_settings(os.environ), start_processes()
        hooks = load_hooks(s)
        execute(Run(s, device, hooks, Log(hooks)))
    except Stopped:
        hooks.on_stopped()
        status = STOPPED_STATUS
    except (Exception, KeyboardInterrupt) as e:
        hooks.on_error(e)
        status = STOPPED_STATUS if hooks.should_stop() else 2  # since others stopped
        if status == 2 and isinstance(e, (RunError, OSError, KeyboardInterrupt)):
            who = f"rank {os.environ['RANK']}: " if os.environ.get("RANK") else ""
            print(f"train_gpt.py: {who}error: {str(e) or 'interrupted'}", file=sys.stderr)
        elif status == 2:
            traceback.print_exc()
    if dist.is_initialized() and (status != 2 or not torch.cuda.is_available()):  # else NCCL may wait
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.modules["train_gpt"] = sys.modules["__main__"]
    sys.exit(main())
