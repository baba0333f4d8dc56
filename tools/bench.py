"""Measure how fast the model trains, scores, learns at test time and is packed on this machine, and where the time goes.

    python tools/bench.py train                             # the record's size, made-up tokens; a GPU is compiled for
    MICRO_BATCH_TOKENS=196608 python tools/bench.py train --attention flash --json speed.jsonl --profile trace.json.gz
    torchrun --standalone --nproc_per_node=8 tools/bench.py score

Settings are those of train_gpt.py, as environment variables. Chrome or https://ui.perfetto.dev opens a profile.
"""

import argparse
import gzip
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import train_gpt as T  # noqa: E402
from readme import table  # noqa: E402
from tools.extras import peak_memory  # noqa: E402
from train_gpt import RunError  # noqa: E402

ATTENTION_KERNELS = (
    "cudnn",
    "flash",
    "mem_efficient",
    "math",
)  # PyTorch's, as torch.backends.cuda.enable_NAME_sdp


class Bench(NamedTuple):
    """What every measurement is given."""

    s: object  # the settings
    device: torch.device
    attention: Callable
    dtype: torch.dtype
    compiled: bool
    steps: int  # to time
    shards: bool  # tokens from DATA_PATH, else uniform ones
    profile: Path | None

    def tokens(self, count: int) -> torch.Tensor:
        """(count,) int32 on the device, the same on every rank. Raises RunError."""
        if self.shards:
            tokens = np.resize(np.concatenate(T.open_shards(self.s.data_path, "val")), count)
        else:
            tokens = np.random.default_rng(self.s.seed).integers(self.s.vocab_size, size=count)
        return T.check_ids(tokens, self.s.vocab_size, "validation shards").to(self.device)

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """Give every bank random values, since products with zeros can be faster, and compile on a CPU if wanted."""
        torch.manual_seed(self.s.seed)
        with torch.no_grad():
            for bank in model.banks():
                bank.normal_(0, bank.size(-1) ** -0.5)
        if self.compiled and self.device.type == "cpu":
            model.compile(dynamic=False, fullgraph=True)
        return model

    def model(self) -> torch.nn.Module:
        return self.prepare(T.GPT(self.s, self.attention, self.dtype).initialize().on(self.device))

    def scorer(self, model: torch.nn.Module, tokens: torch.Tensor, window: int) -> T.Scorer:
        return T.Scorer(model, tokens, None, window, self.s.val_batch_size // 8)


# -------
# What a step costs in theory, and what the machine can do
# -------


def forward_flop(model: torch.nn.Module, s, length: int) -> tuple[int, str]:
    """FLOP of a forward pass per token in sequences of `length`, and the formula. Training takes three times that."""
    head = model.tok_emb if model.head is None else model.head
    weights = sum(
        m.numel() for m in (*model.banks(), head, model.bigram_proj, model.ve_proj) if m is not None
    )
    return (
        2 * weights + 2 * s.num_layers * length * s.model_dim,
        f"2 x {weights:,} matrix weights + 2 x {s.num_layers} layers x {length} x {s.model_dim} for attention's two "
        "products, of which the causal mask leaves half",
    )


def matrix_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """FLOP/s of a product of square random matrices, and their size."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    timed(lambda: a @ b, 3, device)
    return 2 * n**3 / float(np.median(timed(lambda: a @ b, 20, device))), n


# -------
# Clocks and counters
# -------


def now(device: torch.device) -> float:
    """Seconds, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(step: Callable, times: int, device: torch.device) -> list[float]:
    """Seconds of each of several calls."""
    marks = [now(device)]
    for _ in range(times):
        step()
        marks.append(now(device))
    return [b - a for a, b in pairwise(marks)]


def spread(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    return dict(
        zip(
            ("least", "quartile1", "median", "quartile3", "most"),
            (1000 * np.percentile(seconds, (0, 25, 50, 75, 100))).tolist(),
        )
    )


def compilations() -> Counter:
    """So far: graphs compiled, and graph breaks."""
    counters = torch._dynamo.utils.counters
    return Counter(graphs=counters["stats"]["unique_graphs"], breaks=sum(counters["graph_break"].values()))


class ReadsOnHost(TorchFunctionMode):
    """Refuses a tensor's methods that hand its values to Python; on a GPU they wait for the device."""

    READS = {getattr(torch.Tensor, name) for name in ("tolist", "numpy", "cpu", "__array__")}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.READS:
            raise RuntimeError(f"Tensor.{function.__name__} reads a tensor on the host")
        return function(*args, **(kwargs or {}))


class WaitsForValues(TorchDispatchMode):
    """Refuses operators whose result, or its size, depends on values: .item(), `if tensor`, nonzero, masks as indices."""

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

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.WAITS or any(i is not None and i.dtype == torch.bool for i in indices):
            raise RuntimeError(f"aten.{name} waits for a tensor's values")
        return function(*args, **(kwargs or {}))


@contextmanager
def no_host_sync(device: torch.device):
    """Code in which the host may not wait for the device: RuntimeError if it does. On a CPU it must not be compiled."""
    if device.type == "cpu":
        with ReadsOnHost(), WaitsForValues():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def host_syncs(step: Callable, bench: Bench) -> str:
    """`none`, or what waited for the device inside one call."""
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
    """The part of a step that a kernel or operator belongs to, by its name and by the operators and ranges it runs in or was
    launched from, innermost first. A fused kernel's name lists what it replaces: it is the loss's or the rest's."""
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


def host_calls(events: Iterable[dict]) -> Iterable[tuple[dict, tuple[str, ...], float]]:
    """Operators, ranges and launches as (event, what it runs in, innermost first, microseconds in none it calls)."""
    events = [
        e for e in events if e.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
    ]
    calls, stack = [], []  # a call: [event, names, microseconds left]
    for event in sorted(events, key=lambda e: (str(e["tid"]), e["ts"], -e["dur"])):
        while stack and (
            (last := stack[-1][0])["tid"] != event["tid"] or last["ts"] + last["dur"] <= event["ts"]
        ):
            stack.pop()
        if stack:
            stack[-1][2] -= event["dur"]
        names = tuple(call[0]["name"] for call in reversed(stack))
        stack.append([event, names, event["dur"]])
        calls.append(stack[-1])
    return calls


def kernels_of(events: list[dict]) -> tuple[list[Kernel], float]:
    """A trace's kernels, or without any its operators in the STEP range; and the share of that range they fill."""
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


def marked(method: Callable) -> Callable:
    """The method, in the range OPTIMIZER of a profile."""

    def run(*args, **kwargs):
        with record_function(OPTIMIZER):
            return method(*args, **kwargs)

    return run


def trace(step: Callable, bench: Bench) -> list[dict]:
    """The events of one call; rank 0's are left in --profile."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.device.type == "cuda")
    now(bench.device)
    with profile(activities=activities) as profiler, record_function(STEP):
        step()
        now(bench.device)
    with tempfile.TemporaryDirectory() as folder:
        path = bench.profile if bench.profile and T.rank() == 0 else Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            return json.load(file)["traceEvents"]


# -------
# The measurements
# -------


def measure(step: Callable, bench: Bench, tokens: int, flop: float) -> dict:
    """Time steps of so many tokens and so much FLOP, over all processes, and profile one."""
    ms = spread(timed(step, bench.steps, bench.device))
    memory = int(peak_memory())
    kernels, busy = kernels_of(trace(step, bench))
    part_us, name_us, calls = Counter(), Counter(), Counter()
    for name, part, us in kernels:
        part_us[part] += us
        name_us[name, part] += us
        calls[name, part] += 1
    peak, size = matrix_peak(bench.device, bench.dtype)
    return dict(
        ms=ms,
        tokens_per_step=tokens,
        tokens_per_second=1000 * tokens / ms["median"],
        parts={part: dict(ms=part_us[part] / 1000, share=part_us[part] / part_us.total()) for part in PARTS},
        busy_share=busy,
        flop_per_token=flop / tokens,
        matrix_peak=peak,
        matrix_size=size,
        share_of_peak=1000 * flop / ms["median"] / T.world_size() / peak,
        peak_memory_mib=memory,
        longest=[
            dict(name=name, part=part, ms=us / 1000, calls=calls[name, part])
            for (name, part), us in name_us.most_common(16)
        ],
    )


def after_warm_up(warm_up: Callable, run: Callable[[], dict], bench: Bench) -> dict:
    """What run() finds, what warm_up() took, and how often anything was compiled after that."""
    start = now(bench.device)
    warm_up()
    warm_up_seconds, before = now(bench.device) - start, compilations()
    found = run()
    return found | dict(
        warm_up_seconds=warm_up_seconds,
        recompilations=(compilations() - before)["graphs"],
        graph_breaks=compilations()["breaks"],
    )


def write_shard(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(T.SHARD_HEADER_INTS, "<i4")
    header[:3] = T.SHARD_MAGIC, T.SHARD_VERSION, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


@contextmanager
def trainer_of(bench: Bench):
    """A Trainer, on made-up shards unless --shards."""
    s = bench.s
    with nullcontext(s.data_path) if bench.shards else tempfile.TemporaryDirectory() as folder:
        if not bench.shards:
            count = max(4 * (s.train_batch_tokens + 8), 4 * s.holdout_tokens + 4)
            tokens = np.random.default_rng(s.seed).integers(s.vocab_size, size=count)
            write_shard(Path(folder) / "fineweb_train_000000.bin", tokens)
        s = type(s)(**vars(s) | dict(data_path=folder))
        trainer = T.together(lambda: T.Trainer(s, bench.device, bench.attention, bench.dtype))
        bench.prepare(trainer.model)
        yield trainer


def bench_train(bench: Bench) -> dict:
    """Training steps as under the clock, but for the weight averages; the warm-up is training's own."""
    s = bench.s
    with trainer_of(bench) as trainer:
        batches = trainer.batches()
        flop, formula = forward_flop(trainer.model, s, s.train_seq_len)

        def step() -> None:
            trainer.step(next(batches), 1.0, s.muon_momentum)

        def run() -> dict:
            trainer.optimizers.step = marked(trainer.optimizers.step)
            found = measure(step, bench, s.train_batch_tokens, 3 * flop * s.train_batch_tokens)
            syncs = {"step": host_syncs(step, bench)}
            (seconds,) = timed(lambda: start_qat(trainer), 1, bench.device)
            qat_ms = spread(timed(step, -(-bench.steps // 4), bench.device))
            syncs["step with late QAT"] = host_syncs(step, bench)
            return found | dict(qat_start_seconds=seconds, qat_ms=qat_ms, host_syncs=syncs)

        return after_warm_up(trainer.warm_up, run, bench) | dict(formula=f"3 x ({formula})")


def bench_score(bench: Bench) -> dict:
    """Scoring with windows of EVAL_SEQ_LEN that each score EVAL_STRIDE tokens: a step is eight batches a process. With
    EVAL_MODE=streaming: a batch of lanes of nine windows, each position once."""
    s, model = bench.s, bench.model()
    if s.eval_mode == "streaming":
        window = s.eval_window or s.eval_seq_len
        lanes, length = T.world_size() * max(1, s.val_batch_size // 8 // window), 9 * window
        scorer = bench.scorer(model, bench.tokens(lanes * length + 1), window)
        start, read, scored = length * torch.arange(lanes), lanes * length, lanes * length
        plan = torch.stack((start, start, start + length), dim=1), length
    else:
        windows = 8 * T.world_size() * max(1, s.val_batch_size // 8 // s.eval_seq_len)
        scorer = bench.scorer(
            model, bench.tokens(s.eval_seq_len + windows * s.eval_stride + 1), s.eval_seq_len
        )
        window, read, scored = s.eval_seq_len, windows * s.eval_seq_len, windows * s.eval_stride
        plan = (
            T.plan_windows(scorer.targets, window, s.eval_stride)[1:],
        )  # the first window scores all its tokens
    flop, formula = forward_flop(model, s, window)
    return after_warm_up(
        lambda: timed(lambda: scorer.score(*plan), 3, bench.device),
        lambda: measure(lambda: scorer.score(*plan), bench, scored, flop * read),
        bench,
    ) | dict(formula=f"{read} / {scored} x ({formula})")


def stopwatch(method: Callable, seconds: list[float], device: torch.device) -> Callable:
    """The method, adding what each call takes to a list."""

    def run(*args, **kwargs):
        start = now(device)
        result = method(*args, **kwargs)
        seconds.append(now(device) - start)
        return result

    return run


def bench_ttt(bench: Bench) -> dict:
    """A step is a chunk: scored, then learnt from for TTT_EPOCHS; with EVAL_MODE=streaming behind a window of past."""
    s, model, split = bench.s, bench.model(), dict(score=[], learn=[], update=[])
    C, learner = s.ttt_chunk_tokens, T.Learner(model, s)
    streaming = s.eval_mode == "streaming"
    window = streaming and s.eval_window or s.eval_seq_len
    scorer = bench.scorer(model, bench.tokens(window + (2 * bench.steps + 6) * C + 1), window)
    chunks = (T.streamed_chunks if streaming else T.windowed_chunks)(scorer, learner, s)
    learner.update = marked(learner.update)
    next(chunks)  # which scores more, or only gives context

    def chunk() -> None:
        start = now(bench.device)
        _, learn = next(chunks)
        between = now(bench.device)
        learn(s.ttt_epochs)
        split["score"].append(between - start)
        split["learn"].append(now(bench.device) - between)

    def run() -> dict:
        score, train = (forward_flop(model, s, length)[0] for length in (window, s.train_seq_len))
        trained = s.ttt_epochs * C // s.train_seq_len * s.train_seq_len
        flop = -(-C // s.eval_stride) * window * score + 3 * train * trained
        if streaming:  # an epoch goes on where scoring ended
            flop = 3 * s.ttt_epochs * C * score
        found = measure(chunk, bench, C, flop)
        learner.update = stopwatch(learner.update, split["update"], bench.device)
        for seconds in split.values():
            seconds.clear()
        timed(chunk, bench.steps, bench.device)
        score, learn, update = (sum(seconds) / bench.steps for seconds in split.values())
        return found | dict(
            seconds_per_chunk=dict(score=score, train=learn - update, update=update),
            seconds_per_million_tokens=1e6 / found["tokens_per_second"],
            formula="of scoring, and forward and backward of each epoch; in a stream the first epoch's forward is scoring's",
        )

    return after_warm_up(lambda: timed(chunk, 2, bench.device), run, bench)


def factors_of(moments: dict) -> dict:
    """As train_gpt.export() makes them of moments, which stay as they are."""
    return {name: T.factor(m.clone()) for name, m in moments.items()}


def start_qat(trainer: T.Trainer) -> None:
    """As Trainer.run() does when late QAT begins."""
    trainer.fix_steps(trainer.calibrate()[1], trainer.s.artifact_limit)


def bench_artifact(bench: Bench) -> dict:
    """Calibrate, fit the size limit, quantize, pack and unpack random weights; times are each process's own."""
    s, made = bench.s, {}
    with trainer_of(bench) as trainer:
        weights = trainer.model.state_dict()
        stages = dict(
            calibrate=lambda: made.update(zip(("moments", "fisher"), trainer.calibrate())),
            fit=lambda: trainer.fix_steps(made["fisher"], s.artifact_limit),
            quantize=lambda: made.update(
                stored=T.quantize(weights, trainer.steps, factors_of(made["moments"]))
            ),
            pack=lambda: made.update(data=T.pack_artifact(s, "0" * 64, made["stored"])),
            unpack=lambda: T.dequantize(T.unpack_artifact(made["data"], "in memory")[2]),
        )
        times = {name: spread(timed(stage, bench.steps, bench.device)) for name, stage in stages.items()}
    return dict(
        artifact_ms=times,
        artifact_bytes=len(made["data"]),
        parameters=sum(w.numel() for w in weights.values()),
        peak_memory_mib=int(peak_memory()),
    )


BENCHES = dict(train=bench_train, score=bench_score, ttt=bench_ttt, artifact=bench_artifact)
STEPS = dict(train="step", score="eight batches", ttt="chunk")


# -------
# What is printed
# -------


def rows(found: dict) -> list[list[str]]:
    """The table: what, value, remark."""

    def time_row(what: str, ms: dict[str, float], remark: str = "") -> list[str]:
        return [
            what,
            f"{ms['median']:,.2f} ms",
            f"median{remark}; quartiles {ms['quartile1']:,.2f} and "
            f"{ms['quartile3']:,.2f}, least {ms['least']:,.2f}, most {ms['most']:,.2f}",
        ]

    lines = []
    if "ms" in found:
        lines += [time_row(STEPS[found["bench"]], found["ms"], f" of {found['steps']}")]
        if "qat_ms" in found:
            lines += [
                time_row("step with late QAT", found["qat_ms"]),
                ["start of late QAT", f"{found['qat_start_seconds']:.2f} s", ""],
            ]
        lines += [
            [
                "tokens per second",
                f"{found['tokens_per_second']:,.0f}",
                f"{found['tokens_per_step']:,} at a time",
            ]
        ]
        for part, seconds in found.get("seconds_per_chunk", {}).items():
            lines += [[f"{part}, seconds per chunk", f"{seconds:.4f}", ""]]
        if "seconds_per_million_tokens" in found:
            lines += [["seconds per million tokens", f"{found['seconds_per_million_tokens']:.2f}", ""]]
        for name, part in found["parts"].items():
            lines += [[name, f"{part['ms']:,.2f} ms", f"{part['share']:.1%}"]]
        lines += [
            ["busy", f"{found['busy_share']:.1%}", "of the profiled step"],
            ["model FLOP per token", f"{found['flop_per_token']:.4g}", "see below"],
            [
                "matrix peak, TFLOP/s",
                f"{found['matrix_peak'] / 1e12:,.2f}",
                f"{found['dtype']} matrices of {found['matrix_size']} x {found['matrix_size']}",
            ],
            ["share of the matrix peak", f"{found['share_of_peak']:.1%}", ""],
        ]
    for stage, ms in found.get("artifact_ms", {}).items():
        lines += [time_row(stage, ms, f" of {found['steps']}")]
    if "artifact_bytes" in found:
        lines += [["bytes", f"{found['artifact_bytes']:,}", f"{found['parameters']:,} parameters, random"]]
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


def report(found: dict) -> str:
    changed = " ".join(f"{name}={value}" for name, value in found["settings"].items())
    lines = [
        f"{found['bench']}: {found['processes']} x {found['machine']}, {found['dtype']}"
        f"{', compiled' * found['compiled']}, attention: {found['attention']}, torch {found['torch']}, "
        f"Python {found['python']}",
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


def choose_attention(name: str | None, device: torch.device, s) -> tuple[str, Callable]:
    """train_gpt.py's choice, or the PyTorch kernel of that name. Raises RunError if it does not run here."""
    kernel, attention = T.choose_attention(device) if name is None else (name, T.torch_attention)
    if name and device.type == "cpu":
        raise RunError(f"--attention {name}: only GPUs have a choice of kernels")
    if attention is T.torch_attention and device.type == "cuda":
        for other in ATTENTION_KERNELS if name else ():
            getattr(torch.backends.cuda, f"enable_{other}_sdp")(other == name)
        q, k, v = (
            torch.randn(
                1, 128, n, s.model_dim // s.num_heads, device=device, dtype=torch.bfloat16, requires_grad=True
            )
            for n in (s.num_heads, s.num_kv_heads, s.num_kv_heads)
        )
        try:
            attention(q, k, v).sum().backward()
        except RuntimeError as e:
            raise RunError(
                f"attention kernel {kernel}: does not run here ({' '.join(str(e).split())[:200]})"
            ) from None
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        chosen = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=True)
        kernel = SDPBackend(chosen).name.lower().removesuffix("_attention")  # cudnn, flash, efficient or math
    return kernel, attention


def compile_newton_schulz() -> None:
    """As train_gpt.py does on a GPU before it makes a model."""
    torch._dynamo.config.recompile_limit = 64
    T.newton_schulz = torch.compile(T.newton_schulz, dynamic=False, fullgraph=True)


def run(args: argparse.Namespace) -> dict:
    """Set this process up as train_gpt.py does, and measure."""
    s, device = T.parse_settings(os.environ), T.start_processes()
    cuda = device.type == "cuda"
    compiled = (cuda or args.compile) and os.environ.get("TORCH_COMPILE_DISABLE", "0") != "1"
    if compiled:
        torch._inductor.config.cpp.enable_kernel_profile = True  # gives kernels on a CPU names
        compile_newton_schulz()
    kernel, attention = choose_attention(args.attention, device, s)
    dtype = torch.bfloat16 if cuda else torch.float32
    bench = Bench(s, device, attention, dtype, compiled, args.steps, args.shards, args.profile)
    figures = BENCHES[args.bench](bench)
    machine = (
        torch.cuda.get_device_name()
        if cuda
        else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    )
    changed = {
        name: T.show(value)
        for name, f in T.FIELDS.items()
        if (value := getattr(s, name.lower())) != f.default
    }
    return (
        dict(
            bench=args.bench,
            machine=machine,
            processes=T.world_size(),
            attention=kernel,
            torch=torch.__version__,
            python=platform.python_version(),
            dtype=str(dtype).removeprefix("torch."),
            compiled=compiled,
            settings=changed,
            tokens="shards'" if args.shards else "uniform",
            steps=args.steps,
        )
        | figures
    )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1")
    return int(text)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}; see --help\n")


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """What the user can put right ends the process with a line; the group of processes ends in any case."""
    try:
        yield
    except (RunError, OSError) as e:
        sys.exit(f"error: {e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        description="Measure speed on this machine; settings are train_gpt.py's environment variables."
    )
    parser.add_argument("bench", choices=BENCHES, help="what to measure")
    parser.add_argument("--steps", type=positive, metavar="N", help="steps to time (20; artifact: 3)")
    parser.add_argument(
        "--attention", choices=ATTENTION_KERNELS, help="a GPU's kernel; without it, train_gpt.py's choice"
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
        for path in (args.profile, args.json and args.json != "-" and Path(args.json)):
            if path and not path.parent.is_dir():
                raise RunError(f"{path}: no such folder")
        if args.profile and args.bench == "artifact":
            raise RunError("--profile: there is no profile of artifact")
        with redirect_stdout(sys.stderr):  # what train_gpt.py says on the way
            found = run(args)
        line = json.dumps(found)
        if T.rank() == 0:
            print(line if args.json == "-" else report(found), flush=True)
            if args.json not in (None, "-"):
                T.write_atomically(Path(args.json), f"{line}\n".encode())


if __name__ == "__main__":
    main()
