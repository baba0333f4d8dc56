"""Measure the speed of training, scoring, TTT and packing, and where the time goes.

    python -m tools.measure.bench train        # the record's size, made-up tokens; a GPU is compiled for
    TRAIN_BATCH_TOKENS=1572864 python -m tools.measure.bench train --attention flash --profile trace.json.gz
    torchrun --standalone --nproc_per_node=8 -m tools.measure.bench score

Settings are those of train_gpt.py, as environment variables. Chrome or https://ui.perfetto.dev opens a
profile.
"""

import argparse
import gzip
import json
import os
import platform
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as T
from tools.common.cli import Parser, check_folder_of, ends_in_one_line, positive, say
from tools.common.machine import machine_name, now, timed
from tools.common.shards import write_shard
from tools.common.spelling import read_settings
from tools.common.tables import table

ATTENTION_KERNELS = (
    "cudnn",
    "flash",
    "mem_efficient",
    "math",
)  # PyTorch's: torch.backends.cuda.enable_NAME_sdp
Figures = dict[str, Any]


@dataclass
class Bench:
    """What every measurement is given."""

    run: T.Run
    compiled: bool = False
    steps: int = 1  # to time
    shards: bool = False  # tokens from DATA_PATH, else uniform ones
    profile: Path | None = None

    @property
    def s(self) -> T.Settings:
        """The settings."""
        return self.run.settings

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.run.device

    def tokens(self, count: int) -> Tensor:
        """Returns tokens (count,) int32 on the device, the same on every rank. Raises RunError, OSError."""
        if self.shards:
            text = np.concatenate([shard.read() for shard in T.open_shards(self.s.data_path, "val")])
            tokens = np.resize(text, count)
        else:
            tokens = np.random.default_rng(self.s.seed).integers(self.s.vocab_size, size=count)
        return T.check_ids(tokens, self.s.vocab_size, "validation shards").to(self.device)

    def prepare(self, model: T.GPT) -> T.GPT:
        """Give every bank random values, since products with zeros can be faster, and compile on a CPU if
        wanted.
        """
        torch.manual_seed(self.s.seed)
        with torch.no_grad():
            for bank in model.banks():
                bank.normal_(0, bank.size(-1) ** -0.5)
        if self.compiled and self.device.type == "cpu":
            model.compile(dynamic=False, fullgraph=True)
        return model

    def model(self) -> T.GPT:
        """Returns a model of random weights."""
        return self.prepare(T.GPT(self.s, self.run.dtype).initialize().on(self.device))

    def scorer(self, model: T.GPT, tokens: Tensor, window: int) -> T.Scorer:
        """Returns a Scorer of tokens (N + 1,) that counts each of them as a byte."""
        one, no = torch.ones((2, self.s.vocab_size), dtype=torch.long, device=tokens.device)
        tables = T.ByteTables(one, no == 0, no == 0)  # each token counts as a byte
        return T.Scorer(model, tokens, tables, window, self.s.val_batch_size // T.SPANS)


# -------
# What a step costs in theory, and what the machine can do
# -------


def forward_flop(model: T.GPT, length: int) -> tuple[int, str]:
    """Returns FLOP of a forward pass per token in sequences of `length`, and the formula.

    Layers that run again count again. Training takes three times that.
    """
    s, runs, others = model.s, len(model.order), (model.tok_emb, model.bigram_proj, model.ve_proj)
    weights = sum(map(torch.numel, model.banks())) // s.num_layers * runs
    weights += sum(m.numel() for m in others if m is not None)
    attention = f"2 x {runs} layers x {length} x {s.model_dim} for attention's two products"
    return (
        2 * weights + 2 * runs * length * s.model_dim,
        f"2 x {weights:,} matrix weights + {attention}, of which the causal mask leaves half",
    )


def matrix_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """Returns FLOP/s of a product of square random matrices, and their size."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    timed(lambda: a @ b, 3, device)
    return 2 * n**3 / float(np.median(timed(lambda: a @ b, 20, device))), n


# -------
# Clocks and counters
# -------


def spread(seconds: list[float]) -> dict[str, float]:
    """Returns least, quartiles and most of some seconds, in milliseconds."""
    values = (1000 * np.percentile(seconds, (0, 25, 50, 75, 100))).tolist()
    return dict(zip(("least", "quartile1", "median", "quartile3", "most"), values, strict=True))


def compilations() -> Counter:
    """Returns how many graphs were compiled so far, and graph breaks met."""
    counters = torch._dynamo.utils.counters
    return Counter(graphs=counters["stats"]["unique_graphs"], breaks=sum(counters["graph_break"].values()))


class ReadsOnHost(TorchFunctionMode):
    """Refuses a tensor's methods that hand its values to Python; on a GPU they wait for the device."""

    READS = {getattr(torch.Tensor, name) for name in ("tolist", "numpy", "cpu", "__array__")}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in self.READS:
            raise RuntimeError(f"Tensor.{function.__name__} reads a tensor on the host")
        return function(*args, **(kwargs or {}))


class WaitsForValues(TorchDispatchMode):
    """Refuses operators whose result, or its size, depends on values: .item(), `if tensor`, nonzero, masks as
    indices.
    """

    WAITS = {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique2",
        "equal",
        "allclose",
        "bincount",
        "repeat_interleave",
    }

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.WAITS or any(i is not None and i.dtype == torch.bool for i in indices):
            raise RuntimeError(f"aten.{name} waits for a tensor's values")
        return function(*args, **(kwargs or {}))


@contextmanager
def no_host_sync(device: torch.device) -> Iterator[None]:
    """Run code in which the host may not wait for the device: RuntimeError if it does.

    On a CPU it must not be compiled.
    """
    if device.type == "cpu":
        with ReadsOnHost(), WaitsForValues():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def host_syncs(step: Callable[[], object], bench: Bench) -> str:
    """Returns `none`, or what waited for the device inside one call."""
    if bench.compiled and bench.device.type == "cpu":
        return "not checked in what is compiled for a CPU"
    try:
        with no_host_sync(bench.device):
            step()
    except RuntimeError as e:
        return str(e).split("\n")[0]
    return "none"


# -------
# Where a step's time goes: from a Chrome trace of torch.profiler
# -------

STEP, OPTIMIZER = "bench: step", "bench: optimizer"  # ranges put around one call and around its weight update
PARTS = ("attention", "matrices", "loss", "optimizer", "rest")
FUSED = re.compile(r"triton_(?!tem)|cpp_fused")  # the compiler's elementwise and reducing kernels
ATTENTION = re.compile(r"attention|scaled_?dot_?product|flash|sdpa|fmha", re.I)
MATRIX_OPERATOR = re.compile(r"aten::(mm|bmm|addmm|baddbmm|_scaled_mm)|mkl(dnn)?::_.*linear.*")
MATRIX_KERNEL = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|wgmma|split_?k|cublas|triton_tem", re.I)
LOSS = re.compile(r"nll_?loss|log_?softmax|cross_?entropy|softcap|tanh", re.I)


def classify(name: str, inside: Sequence[str] = ()) -> str:
    """Returns the part of a step that a kernel or operator belongs to.

    By its name and the operators and ranges that it runs in or was launched from, innermost first. A fused
    kernel's name lists what it replaces: it is the loss's or the rest's.
    """
    chain = (name, *inside)
    operator = next((n for n in chain if "::" in n and not n.startswith("autograd::") and " " not in n), "")
    if OPTIMIZER in chain:
        return "optimizer"
    if not FUSED.search(name):
        if any(map(ATTENTION.search, chain)):
            return "attention"
        if MATRIX_OPERATOR.fullmatch(operator) or MATRIX_KERNEL.search(name):
            return "matrices"
    return "loss" if any(map(LOSS.search, chain)) else "rest"


class Kernel(NamedTuple):
    """A GPU's kernel, or an operator of the CPU without those it calls."""

    name: str
    part: str
    us: float


def contains(outer: dict, event: dict) -> bool:
    """Returns whether an event begins within another one of its thread."""
    return outer["tid"] == event["tid"] and event["ts"] < outer["ts"] + outer["dur"]


def host_calls(events: Iterable[dict]) -> list[list]:
    """Returns operators, ranges and launches as [event, what it runs in, innermost first, microseconds in
    none it calls].
    """
    ours = [e for e in events if e.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")]
    calls: list[list] = []
    stack: list[list] = []  # of calls: [event, names, microseconds left]
    for event in sorted(ours, key=lambda e: (str(e["tid"]), e["ts"], -e["dur"])):
        while stack and not contains(stack[-1][0], event):
            stack.pop()
        if stack:
            stack[-1][2] -= event["dur"]
        names = tuple(call[0]["name"] for call in reversed(stack))
        stack.append([event, names, event["dur"]])
        calls.append(stack[-1])
    return calls


def kernels_of(events: list[dict]) -> tuple[list[Kernel], float]:
    """Returns a trace's kernels, or without any its operators in the STEP range, and the share of that range
    they fill.
    """
    events = [e for e in events if e.get("ph") == "X"]
    step = next(e for e in events if e["name"] == STEP and e["cat"] == "user_annotation")
    kernels = sorted(
        (e for e in events if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"]
    )
    calls = host_calls(events)
    if not kernels:
        found = [
            Kernel(e["name"], classify(e["name"], names), us)
            for e, names, us in calls
            if STEP in (e["name"], *names)
        ]
        return found, sum(kernel.us for kernel in found) / step["dur"]
    launched_in = {
        e["args"]["correlation"]: names for e, names, _ in calls if "correlation" in e.get("args", {})
    }
    found = [
        Kernel(e["name"], classify(e["name"], launched_in.get(e["args"].get("correlation"), ())), e["dur"])
        for e in kernels
    ]
    busy, end = 0.0, 0.0
    for e in kernels:
        busy += max(0.0, e["ts"] + e["dur"] - max(end, e["ts"]))
        end = max(end, e["ts"] + e["dur"])
    return found, busy / step["dur"]


class MarkedOptimizers(T.Optimizers):
    """Optimizers whose steps are in the range OPTIMIZER of a profile."""

    def step(self, multiplier: float, momentum: float) -> Tensor:
        """Do what Optimizers.step() does."""
        with record_function(OPTIMIZER):
            return super().step(multiplier, momentum)


class UpdateWatch(T.Hooks):
    """Puts updates of test-time training in the range OPTIMIZER of a profile and adds up their seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.timing = device, 0.0, False

    def before_update(self, learner: T.Learner) -> None:
        """Open the range."""
        self.start = now(self.device) if self.timing else 0.0
        self.range = record_function(OPTIMIZER)
        self.range.__enter__()

    def on_update(self, learner: T.Learner) -> None:
        """Close it."""
        self.range.__exit__(None, None, None)
        self.seconds += now(self.device) - self.start if self.timing else 0.0


def trace(step: Callable[[], object], bench: Bench) -> list[dict]:
    """Returns the events of one call; rank 0's are left in --profile."""
    activities = [ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    now(bench.device)
    with profile(activities=activities) as profiler, record_function(STEP):
        step()
        now(bench.device)
    with tempfile.TemporaryDirectory() as folder:
        path = bench.profile if bench.profile and T.rank() == 0 else Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]


# -------
# The measurements
# -------


def measure(step: Callable[[], object], bench: Bench, tokens: int, flop: float) -> Figures:
    """Returns what timing and profiling tell: time steps of so many tokens and so much FLOP, over all
    processes, and profile one.
    """
    ms = spread(timed(step, bench.steps, bench.device))
    memory = int(T.peak_memory())
    kernels, busy = kernels_of(trace(step, bench))
    part_us: Counter = Counter()
    name_us: Counter = Counter()
    calls: Counter = Counter()
    for name, part, us in kernels:
        part_us[part] += us
        name_us[name, part] += us
        calls[name, part] += 1
    peak, size = matrix_peak(bench.device, bench.run.dtype)
    return {
        "ms": ms,
        "tokens_per_step": tokens,
        "tokens_per_second": 1000 * tokens / ms["median"],
        "parts": {
            part: {"ms": part_us[part] / 1000, "share": part_us[part] / part_us.total()} for part in PARTS
        },
        "busy_share": busy,
        "flop_per_token": flop / tokens,
        "matrix_peak": peak,
        "matrix_size": size,
        "share_of_peak": 1000 * flop / ms["median"] / T.world_size() / peak,
        "peak_memory_mib": memory,
        "longest": [
            {"name": name, "part": part, "ms": us / 1000, "calls": calls[name, part]}
            for (name, part), us in name_us.most_common(16)
        ],
    }


def after_warm_up(warm_up: Callable[[], object], run: Callable[[], Figures], bench: Bench) -> Figures:
    """Returns what run() finds, what warm_up() took, and how often anything was compiled after that."""
    start = now(bench.device)
    warm_up()
    warm_up_seconds, before = now(bench.device) - start, compilations()
    found = run()
    return found | {
        "warm_up_seconds": warm_up_seconds,
        "recompilations": (compilations() - before)["graphs"],
        "graph_breaks": compilations()["breaks"],
    }


@contextmanager
def trainer_of(bench: Bench) -> Iterator[T.Trainer]:
    """Make a Trainer, on made-up shards unless --shards. Raises RunError."""
    s = bench.s
    with nullcontext(s.data_path) if bench.shards else tempfile.TemporaryDirectory() as folder:
        if not bench.shards:
            count = max(4 * (s.train_batch_tokens + T.SPANS), s.calibration_tokens + 4)
            tokens = np.random.default_rng(s.seed).integers(s.vocab_size, size=count)
            write_shard(Path(folder) / "fineweb_train_000000.bin", tokens)
        run = T.Run(replace(s, data_path=folder), bench.device)
        trainer = T.together(lambda: T.Trainer(run))
        bench.prepare(trainer.model)
        yield trainer


def bench_train(bench: Bench) -> Figures:
    """Measure training steps as under the clock, but for the averages; the warm-up is training's own."""
    s = bench.s
    with trainer_of(bench) as trainer, trainer.loader() as spans:
        flop, formula = forward_flop(trainer.model, s.train_seq_len)

        def step() -> None:
            trainer.train_step(next(spans), 1.0, s.muon_momentum)

        def run() -> Figures:
            trainer.optimizers = MarkedOptimizers(trainer.model, s)
            found = measure(step, bench, s.train_batch_tokens, 3 * flop * s.train_batch_tokens)
            return found | {"host_syncs": {"step": host_syncs(step, bench)}}

        return after_warm_up(trainer.warm_up, run, bench) | {"formula": f"3 x ({formula})"}


def bench_score(bench: Bench) -> Figures:
    """Measure scoring with windows of EVAL_SEQ_LEN that each score EVAL_STRIDE tokens: a step is eight
    batches a process.

    With EVAL_MODE=streaming a step is eight chunks of TTT_CHUNK_TOKENS, each position once.
    """
    s, model, window = bench.s, bench.model(), bench.s.eval_seq_len
    if s.eval_mode == "streaming":
        read = scored = 8 * s.ttt_chunk_tokens
        scorer = bench.scorer(model, bench.tokens(window + scored + 1), window)
        mode = T.StreamingMode(s, scorer, T.Learner(model, s))
        mode.score_chunk(0)

        def step() -> None:
            for chunk in range(1, 9):
                mode.score_chunk(chunk)
    else:
        windows = 8 * T.world_size() * max(1, s.val_batch_size // T.SPANS // window)
        read, scored = windows * window, windows * s.eval_stride
        scorer = bench.scorer(model, bench.tokens(window + scored + 1), window)
        plan = T.plan_windows(scorer.targets, window, s.eval_stride)[1:]  # the first scores all its tokens

        def step() -> None:
            scorer.sums(plan)

    flop, formula = forward_flop(model, window)
    found = after_warm_up(
        lambda: timed(step, 3, bench.device), lambda: measure(step, bench, scored, flop * read), bench
    )
    return found | {"formula": f"{read} / {scored} x ({formula})"}


class Chunks:
    """Scores one chunk after another and learns from it, in TTT_EPOCHS, and adds up the seconds of both."""

    def __init__(self, bench: Bench, watch: UpdateWatch, count: int) -> None:
        s, model = bench.s, bench.model()
        kind = T.EVAL_MODES[s.eval_mode]
        tokens = bench.tokens(s.eval_seq_len + count * s.ttt_chunk_tokens + 1)
        learner = T.Learner(model, s, watch)
        self.mode = kind(s, bench.scorer(model, tokens, s.eval_seq_len), learner)
        self.device, self.epochs, self.chunk = bench.device, s.ttt_epochs, 1
        self.mode.score_chunk(0)  # scores more than the others, or only gives context
        self.forget()

    def forget(self) -> None:
        """Begin to add up anew."""
        self.score = self.learn = 0.0

    def step(self) -> None:
        """Go through the next chunk."""
        start = now(self.device)
        self.mode.score_chunk(self.chunk)
        between = now(self.device)
        self.mode.learn_chunk(self.chunk, self.epochs)
        self.score += between - start
        self.learn += now(self.device) - between
        self.chunk += 1


def bench_ttt(bench: Bench) -> Figures:
    """Measure test-time training: a step is a chunk, scored and then learnt from; in a stream behind a window
    of past.
    """
    s, watch = bench.s, UpdateWatch(bench.device)
    chunks = Chunks(bench, watch, 2 * bench.steps + 6)
    model, window, C = chunks.mode.learner.model, chunks.mode.scorer.window, s.ttt_chunk_tokens

    def flop() -> float:
        score, train = (forward_flop(model, length)[0] for length in (window, s.train_seq_len))
        if s.eval_mode == "streaming":  # an epoch goes on where scoring ended
            return 3 * s.ttt_epochs * C * score
        trained = s.ttt_epochs * C // s.train_seq_len * s.train_seq_len
        return T.ceil_div(C, s.eval_stride) * window * score + 3 * train * trained

    def run() -> Figures:
        found = measure(chunks.step, bench, C, flop())
        watch.timing = True
        chunks.forget()
        timed(chunks.step, bench.steps, bench.device)
        score, learn, update = (
            seconds / bench.steps for seconds in (chunks.score, chunks.learn, watch.seconds)
        )
        return found | {
            "seconds_per_chunk": {"score": score, "train": learn - update, "update": update},
            "seconds_per_million_tokens": 1e6 / found["tokens_per_second"],
            "formula": "of scoring, and forward and backward of each epoch; "
            "in a stream the first epoch's forward is scoring's",
        }

    return after_warm_up(lambda: timed(chunks.step, 2, bench.device), run, bench)


def factors_of(moments: dict[str, Tensor]) -> dict[str, T.Factor]:
    """Returns what train_gpt.export() makes of moments, which stay as they are."""
    return {name: T.factor(m.clone()) for name, m in moments.items()}


def bench_artifact(bench: Bench) -> Figures:
    """Measure calibrating, fitting the size limit, quantizing, packing and unpacking random weights, for each
    process; count parameters, bytes and FLOP.
    """
    s, code = bench.s, Path(T.__file__).stat().st_size
    times: dict[str, dict[str, float]] = {}

    def stage(name: str, action: Callable[[], Any]) -> Any:
        """Time an action and return what it returned last."""
        made: list[Any] = []
        times[name] = spread(timed(lambda: made.append(action()), bench.steps, bench.device))
        return made[-1]

    with trainer_of(bench) as trainer:
        model, flop = trainer.model, {}
        weights = model.state_dict()
        for model.looping in (False, True):
            flop[model.looping], formula = forward_flop(model, s.train_seq_len)
        moments, fisher = stage("calibrate", trainer.calibrate)
        base = T.base_steps(model, fisher)

        def size(knob: float) -> float:
            return T.estimate_bytes(T.quantize(weights, T.scaled(base, knob)))

        knob = stage("fit", lambda: T.fit_knob(model, size, s.artifact_limit - code, 1.0))
        steps = T.scaled(base, knob)
        stored = stage("quantize", lambda: T.quantize(weights, steps, factors_of(moments)))
        data = stage("pack", lambda: T.pack_artifact(s, "0" * 64, stored))
        stage("unpack", lambda: T.dequantize(T.unpack_artifact(data, "in memory").stored))
    return {
        "artifact_ms": times,
        "artifact_bytes": len(data),
        "with_code": len(data) + code,
        "knob": knob,
        "training_flop_per_token": 3 * flop[False],
        "with_loops": 3 * flop[True],
        "formula": formula,
        "parameters": sum(w.numel() for w in weights.values()),
        "peak_memory_mib": int(T.peak_memory()),
    }


BENCHES = {"train": bench_train, "score": bench_score, "ttt": bench_ttt, "artifact": bench_artifact}
STEPS = {"train": "step", "score": "eight batches", "ttt": "chunk"}


# -------
# What is printed
# -------


def time_row(what: str, ms: dict[str, float], remark: str = "") -> list[str]:
    """Returns a row of the table for what spread() returned."""
    quartiles = f"quartiles {ms['quartile1']:,.2f} and {ms['quartile3']:,.2f}"
    spread_text = f"median{remark}; {quartiles}, least {ms['least']:,.2f}, most {ms['most']:,.2f}"
    return [what, f"{ms['median']:,.2f} ms", spread_text]


def step_rows(found: Figures) -> list[list[str]]:
    """Returns the rows on the time of a step and where it goes."""
    rows = [time_row(STEPS[found["bench"]], found["ms"], f" of {found['steps']}")]
    speed = f"{found['tokens_per_second']:,.0f}"
    rows += [["tokens per second", speed, f"{found['tokens_per_step']:,} at a time"]]
    for part, seconds in found.get("seconds_per_chunk", {}).items():
        rows += [[f"{part}, seconds per chunk", f"{seconds:.4f}", ""]]
    if "seconds_per_million_tokens" in found:
        rows += [["seconds per million tokens", f"{found['seconds_per_million_tokens']:.2f}", ""]]
    for name, part in found["parts"].items():
        rows += [[name, f"{part['ms']:,.2f} ms", f"{part['share']:.1%}"]]
    peak, size = f"{found['matrix_peak'] / 1e12:,.2f}", found["matrix_size"]
    return rows + [
        ["busy", f"{found['busy_share']:.1%}", "of the profiled step"],
        ["model FLOP per token", f"{found['flop_per_token']:.4g}", "see below"],
        ["matrix peak, TFLOP/s", peak, f"{found['dtype']} matrices of {size} x {size}"],
        ["share of the matrix peak", f"{found['share_of_peak']:.1%}", ""],
    ]


def rows(found: Figures) -> list[list[str]]:
    """Returns the rows of the table: what, value, remark."""
    lines = step_rows(found) if "ms" in found else []
    for stage, ms in found.get("artifact_ms", {}).items():
        lines += [time_row(stage, ms, f" of {found['steps']}")]
    if "artifact_bytes" in found:
        lines += [["bytes", f"{found['artifact_bytes']:,}", f"{found['parameters']:,} parameters, random"]]
        lines += [["bytes with code", f"{found['with_code']:,}", f"knob {found['knob']:.3f}"]]
        flop = f"{found['training_flop_per_token']:.4g}"
        lines += [["training FLOP per token", flop, f"with loops {found['with_loops']:.4g}"]]
    lines += [["peak memory", f"{found['peak_memory_mib']:,} MiB", "of the first process"]]
    if "ms" in found:
        lines += [
            ["warm-up", f"{found['warm_up_seconds']:.1f} s", "with what it compiles"],
            ["compilations after warm-up", str(found["recompilations"]), ""],
            ["graph breaks", str(found["graph_breaks"]), ""],
        ]
    for step, syncs in found.get("host_syncs", {}).items():
        lines += [[f"host synchronisations in a {step}", syncs, ""]]
    return lines


def report(found: Figures) -> str:
    """Returns what is printed."""
    changed = " ".join(f"{name}={value}" for name, value in found["settings"].items())
    lines = [
        f"{found['bench']}: {found['processes']} x {found['machine']}, {found['dtype']}"
        f"{', compiled' if found['compiled'] else ''}, attention: {found['attention']}, "
        f"torch {found['torch']}, Python {found['python']}",
        f"settings: {changed or 'the defaults'}; {found['tokens']} tokens",
        "",
        table(["what", "value", "remark"], rows(found)),
    ]
    if "longest" in found:
        lines += ["", f"FLOP per token: {found['formula']}"]
        longest = [
            [entry["name"][:90], entry["part"], f"{entry['ms']:,.2f}", str(entry["calls"])]
            for entry in found["longest"]
        ]
        lines += [
            "",
            table(["longest kernels, or operators of a CPU", "part", "ms", "calls"], longest, right=2),
        ]
    return "\n".join(lines)


def check_kernel(kernel: str, s: T.Settings, device: torch.device) -> str:
    """Returns the name of the kernel that PyTorch takes on a GPU.

    Raises RunError if it does not run there.
    """
    q, k, v = (
        torch.randn(
            1, 128, n, s.model_dim // s.num_heads, device=device, dtype=torch.bfloat16
        ).requires_grad_()
        for n in (s.num_heads, s.num_kv_heads, s.num_kv_heads)
    )
    try:
        T.attention(q, k, v).sum().backward()
    except RuntimeError as e:
        raise T.RunError(
            f"attention kernel {kernel}: does not run here ({' '.join(str(e).split())[:200]})"
        ) from None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    chosen = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=True)
    return SDPBackend(chosen).name.lower().removesuffix("_attention")  # cudnn, flash, efficient or math


def choose_attention(name: str | None, device: torch.device, s: T.Settings) -> str:
    """Returns the attention kernel that PyTorch takes: its own choice, or that of a name from here on.

    Raises RunError if it does not run here.
    """
    if device.type == "cpu":
        if name:
            raise T.RunError(f"--attention {name}: only GPUs have a choice of kernels")
        return "PyTorch"
    for other in ATTENTION_KERNELS if name else ():
        getattr(torch.backends.cuda, f"enable_{other}_sdp")(other == name)
    return check_kernel(name or "of PyTorch's choice", s, device)


def run(args: argparse.Namespace) -> Figures:
    """Set this process up as train_gpt.py does, and return what is measured. Raises RunError, OSError."""
    s, device = read_settings(), T.start_processes()
    compiled = device.type == "cuda" or args.compile
    compiled = compiled and os.environ.get("TORCH_COMPILE_DISABLE", "0") != "1"
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # as train_gpt.py does
        torch._inductor.config.cpp.enable_kernel_profile = True  # gives kernels on a CPU names
    kernel = choose_attention(args.attention, device, s)
    bench = Bench(T.Run(s, device), compiled, args.steps, args.shards, args.profile)
    figures = BENCHES[args.bench](bench)
    changed = {
        name: T.show(value)
        for name, f in T.FIELDS.items()
        if (value := getattr(s, name.lower())) != f.default
    }
    return {
        "bench": args.bench,
        "machine": machine_name(device),
        "processes": T.world_size(),
        "attention": kernel,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": str(bench.run.dtype).removeprefix("torch."),
        "compiled": compiled,
        "settings": changed,
        "tokens": "shards'" if args.shards else "uniform",
        "steps": args.steps,
    } | figures


def main(argv: list[str] | None = None) -> None:
    """Measure what the arguments say and print it."""
    parser = Parser(__doc__)
    parser.add_argument("bench", choices=BENCHES, help="what to measure")
    parser.add_argument("--steps", type=positive, metavar="N", help="steps to time (20; artifact: 3)")
    parser.add_argument(
        "--attention", choices=ATTENTION_KERNELS, help="a GPU's kernel; without it, PyTorch's choice"
    )
    parser.add_argument(
        "--shards", action="store_true", help="tokens from DATA_PATH's shards; without it, uniform ones"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile on a CPU too, which takes a C++ compiler"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="leave a Chrome trace of one step, .json or .json.gz"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures as a line of JSON; - prints just that"
    )
    args = parser.parse_args(argv)
    args.steps = args.steps or (3 if args.bench == "artifact" else 20)
    with ends_in_one_line():
        target = Path(args.json) if args.json not in (None, "-") else None
        check_folder_of(args.profile)
        check_folder_of(target)
        if args.profile and args.bench == "artifact":
            raise T.RunError("--profile: there is no profile of artifact")
        with redirect_stdout(sys.stderr):  # what train_gpt.py says on the way
            found = run(args)
        line = json.dumps(found)
        say(line if args.json == "-" else report(found))
        if target and T.rank() == 0:
            T.write_atomically(target, f"{line}\n".encode())


if __name__ == "__main__":
    main()
