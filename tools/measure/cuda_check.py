"""Check train_gpt.py for CUDA without a GPU, and say what bounds its speed.

    python -m tools.measure.cuda_check
    python -m tools.measure.cuda_check --world 8 --only step,stream --ptx --json figures.json

Needs a CUDA build of PyTorch, no driver. Tensors are fake: they have a shape and the device "cuda", but no
memory. Dynamo, AOTAutograd and Inductor compile each pass as on an H100, whose properties are pretended;
what they would run is counted, not run. A piece fails at a graph break, an operator that does not exist,
tensors of two devices, or a wait for the device. Numbers are not checked.

The floor of a kernel is the longer of its bytes / 3.0 TB/s and FLOP / 790 TFLOP/s; links between GPUs and
the host's launches are not in it.
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

import train_gpt as T
from tools.common.cli import Parser, check_folder_of, ends_in_one_line, fail, one_line
from tools.common.shards import write_shard
from tools.common.tables import table

BANDWIDTH, PEAK = 3.0e12, 790e12  # bytes/s and FLOP/s that an H100 reaches
SHARED_MEMORY = 232448  # bytes that a kernel may ask for
INSTALL = "python -m venv cuda && cuda/bin/pip install torch==2.14.1 numpy sentencepiece (5.5 GB)"
PIECES = ("step", "calibrate", "score", "ttt", "stream")
TRIGONOMETRY = re.compile(r"(?:tl_math|libdevice|tl|math)\.(cos|sin|pow)\b")

# -------
# Which part of the model a kernel is of
# -------

ATTENTION, PRODUCTS, OTHER = "attention", "matrix products", "other"
# Parts of fused kernels: the first that one of its operators is of, by its function and line in the program
FUSED_PARTS = {
    "loss": r"in (logits\n(?!.*self\.(embed|lookup)\()|forward\n.*(cross_entropy|self\.logits)\()",
    "XSA": r"in attend\n.*\balong\b",
    "MLP activation": r"in mlp\n",
    "rotary and head norms": r"(norm )?in (rotate|attend)\n",
    "residual mixes and norms": r"(norm )?in (forward|trunk)\n|norm in logits\n",
    "embedding": r"(norm )?in (embed|lookup|logits)\n",
}
PARTS = (PRODUCTS, ATTENTION, *reversed(FUSED_PARTS), OTHER)
FORWARD, BACKWARD, OUTSIDE = PHASES = ("forward", "backward", "outside the model")
# Operators outside of compiled graphs that launch nothing
VIEWS = re.compile(
    "_reshape_alias|_unsafe_view|alias|as_strided|broadcast_in_dim|collapse_view|detach|device|diagonal|"
    "empty|empty_like|empty_strided|expand|is_same_size|lift_fresh|new_empty|permute|select|slice|split|"
    "split_dim|split_with_sizes|squeeze|t|transpose|unbind|unsqueeze|view|view_of|wait_tensor"
)
# What a graph's code allocates in fp32
FP32 = re.compile(r"empty_strided_cuda\(\(([\d, ]*\d),?\), \([\d, ]*\), torch\.float32\)")
PRODUCT = re.compile("(mm|bmm|addmm|baddbmm)_?")


class Place(NamedTuple):
    """Where in train_gpt.py an operator comes from: `in FUNCTION` and its line, innermost first."""

    frames: tuple[str, ...]

    @classmethod
    def of(cls, node: torch.fx.Node) -> "Place":
        """Returns the place of an operator of a graph."""
        found = re.findall(r'train_gpt\.py", line \d+, (in \w+\n.*)', node.meta.get("stack_trace") or "")
        return cls(tuple(reversed(found)))

    def part(self) -> str:
        """Returns which part of FUSED_PARTS it is of; a norm is of its caller's."""
        first, *others = self.frames or ("",)
        if first.startswith("in norm\n") and others:
            first = f"norm {others[0]}"
        return next((part for part, words in FUSED_PARTS.items() if re.match(words, first)), OTHER)


def part_of_fused(nodes: Iterable[torch.fx.Node]) -> str:
    """Returns the part of a kernel that does what these operators say."""
    found = {Place.of(node).part() for node in nodes}
    return next((part for part in FUSED_PARTS if part in found), OTHER)


# -------
# What Inductor would launch
# -------


class Launch(NamedTuple):
    """A kernel, or a library's operator, of a compiled graph."""

    name: str
    part: str
    bytes: float
    flop: float
    times: int  # in one call of the graph
    kernels: int = 1

    @property
    def floor(self) -> float:
        """Seconds that all its launches take at least."""
        return self.times * max(self.bytes / BANDWIDTH, self.flop / PEAK)


@dataclass
class Graph:
    """What a compiled graph launches."""

    phase: str
    launches: list[Launch]
    sources: dict[str, str]  # of its Triton kernels
    collectives: int
    saved: float  # bytes that it returns
    fp32_products: int
    widest_fp32: int = 0  # elements of its largest fp32 tensor
    refused: str = "nobody asked"  # why it cannot become a CUDA graph, if so
    calls: int = 0

    def trigonometry(self) -> dict[str, list[str]]:
        """Returns kernels that compute cos, sin or pow, and which."""
        found = {name: sorted({*TRIGONOMETRY.findall(text)}) for name, text in self.sources.items()}
        return {name: functions for name, functions in found.items() if functions}


def widest(text: str) -> int:
    """Returns the elements of the largest fp32 tensor that a graph's code allocates."""
    return max((math.prod(map(int, size.split(","))) for size in FP32.findall(text)), default=0)


def tensors_of(tree: Any) -> list[Tensor]:
    """Returns the tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def nbytes(tensor: Tensor) -> int:
    """Returns the bytes of memory that a tensor covers; expanded ones have fewer than elements."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes that all cover."""
    return sum(map(nbytes, tensors))


def operator_name(node: torch.fx.Node) -> str:
    """Returns what ATen calls a graph's operator, or nothing."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def flop_of(name: str, args: Sequence[Any]) -> float:
    """Returns the FLOP of a product, or of attention: half of it is masked, if it is causal; else 0.

    Of pieces, of which only a GPU knows how long they are: as if all were of the greatest length.
    """
    args, tensors = list(args), tensors_of(args)
    if PRODUCT.fullmatch(name):
        return 2 * tensors[-2].numel() * tensors[-1].shape[-1]
    backward = "backward" in name
    if "varlen_attn" in name:
        length, causal = args[9 if backward else 6], True
    elif "dot_product_cudnn" in name:
        length, causal = tensors[2 if backward else 1].size(-2), args[14 if backward else 6 :][:1] == [True]
    else:
        return 0
    q = tensors[1 if backward else 0]
    return (10 if backward else 4) * q.numel() * length * (0.5 if causal else 1)


def kernels_of(name: str) -> int:
    """Returns how many kernels an operator launches: cuDNN's backward pass does sums, products, a cast."""
    return 3 if "attention_backward" in name else 1


def library_launch(node: torch.fx.Node) -> Launch | None:
    """Returns what a graph's operator launches, if it is a product or attention."""
    name = operator_name(node)
    args = [a.meta.get("val") if isinstance(a, torch.fx.Node) else a for a in node.args]
    flop = flop_of(name, args)
    if not flop:
        return None
    size = total_bytes(tensors_of([a.meta.get("val") for a in node.all_input_nodes] + [node.meta["val"]]))
    part = PRODUCTS if PRODUCT.fullmatch(name) else ATTENTION
    return Launch(name, part, size, flop, 1, kernels_of(name))


def takes_fp32(node: torch.fx.Node) -> bool:
    """Returns whether an operator is given fp32."""
    return torch.float32 in {t.dtype for t in tensors_of([a.meta.get("val") for a in node.all_input_nodes])}


def leaves_of(node: Any) -> list[Any]:
    """Returns the nodes that one of Inductor's scheduler fuses."""
    if hasattr(node, "snodes"):
        return [leaf for inner in node.snodes for leaf in leaves_of(inner)]
    return [node]


def touched_bytes(graph: Any, nodes: list[Any], kernel: Any) -> int:
    """Returns the bytes of the global tensors that a Triton kernel names: of each its widest access, once."""
    size: Counter = Counter()
    for dep in {dep for node in nodes for dep in node.read_writes.reads | node.read_writes.writes}:
        with suppress(Exception):  # a dependency without a size, as of a mutation's order
            touched = min(int(graph.get_numel(dep.name)), int(dep.get_numel()))
            size[dep.name] = max(size[dep.name], touched * graph.get_dtype(dep.name).itemsize)
    args, real = kernel.args, graph.scheduler.mutation_real_name
    buffers = (*args.input_buffers.items(), *args.output_buffers.items())
    names = [name for name, inner in buffers if isinstance(inner, str)]
    in_place = {id(both): both for both in args.inplace_buffers.values() if hasattr(both, "other_names")}
    names += [both.other_names[i] for both in in_place.values() for i in (0, -1)]
    return sum(size[name] or size[real.get(name, name)] for name in names)


class Counting(FakeTensorMode):
    """Fake tensors; also counts what runs outside of compiled graphs, and refuses to wait for the device."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.found: Counter | None = None  # what is to be noted, while a piece runs
        self.launches: list[Launch] = []

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operator without its values."""
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and self.runs and args[0].device.type == "cuda":
            self.wait("a tensor's value is asked for (.item(), `if`)")
        out = super().dispatch(func, types, args, kwargs or {})
        if self.runs and not VIEWS.fullmatch(name):
            self.count(name, args, kwargs or {}, out)
        return out

    @property
    def runs(self) -> bool:
        """Whether a piece runs, outside of compiled graphs, and is not compiled now."""
        return self.found is not None and torch._guards.TracingContext.try_get() is None

    def wait(self, why: str) -> None:
        """Raises RuntimeError: the host waits for the device."""
        raise RuntimeError(f"waits for the device: {why}")

    def synchronize(self, device: Any = None) -> None:
        """Stand for torch.cuda.synchronize()."""
        if self.runs:
            self.wait("torch.cuda.synchronize()")

    def count(self, name: str, args: Sequence[Any], kwargs: Any, out: Any) -> None:
        """Count an operator of the device. Raises RuntimeError if it waits."""
        results = tensors_of(out)
        every = list({id(t): t for t in tensors_of((args, kwargs, out))}.values())
        devices = {t.device.type for t in every}
        if "cuda" not in devices:
            return
        if len(devices) > 1 and name in ("_to_copy", "copy_") and not kwargs.get("non_blocking"):
            if results[0].device.type == "cpu":
                self.wait("a tensor is copied to the CPU")
            else:
                self.found["copies from the CPU"] += 1
        gathered = name in ("index", "embedding")  # touches as much of its table as it returns
        size, flop = 2 * total_bytes(results) if gathered else total_bytes(every), flop_of(name, args)
        part = OTHER if not flop else PRODUCTS if PRODUCT.fullmatch(name) else ATTENTION
        self.launches.append(Launch(name, part, size, flop, 1, kernels_of(name)))
        if part == PRODUCTS and torch.float32 in {t.dtype for t in every}:
            self.found["fp32 products"] += 1


H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    total_memory=81559 << 20,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=SHARED_MEMORY,
    shared_memory_per_multiprocessor=233472,
)
CUDA_ANSWERS = {
    "device_count": 1,
    "current_device": 0,
    "get_device_properties": H100,
    "_get_device_properties": H100,
    "get_device_capability": (9, 0),
    "get_device_name": H100.name,
    "is_bf16_supported": True,
    "is_tf32_supported": True,
    "is_current_stream_capturing": False,
    "_exchange_device": 0,
    "_maybe_exchange_device": 0,
    **dict.fromkeys(("_lazy_init", "set_device", "set_rng_state")),
}
C_ANSWERS = ("getCurrentRawStream", "getDevice", "setDevice", "exchangeDevice", "maybeExchangeDevice")


def always(value: Any) -> Callable[..., Any]:
    """Returns a function that returns a value, whatever it is given."""
    return lambda *args, **kwargs: value


def cudnn_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Returns scaled dot-product attention as PyTorch does it on an H100: cuDNN comes first there."""
    bias = None
    if attn_mask is not None:
        bias = torch.where(attn_mask, 0.0, -3e38).to(q.dtype).expand(*q.shape[:3], k.size(2))
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    return operator(q, k, v, bias, torch.is_grad_enabled(), 0.0, is_causal)[0]


class AnyGenerator(torch.Generator):
    """Stands for a generator of random numbers on any device."""

    def __new__(cls, device: object = None) -> "AnyGenerator":
        """Make it, on the CPU."""
        return super().__new__(cls, "cpu")

    def manual_seed(self, seed: int) -> None:
        """Give PyTorch's own generator, which no operator on fake tensors asks for a device."""


class PretendedH100:
    """A context in which PyTorch compiles for an H100 that is not there; `graphs` has what it compiled.

    All patches of PyTorch's and Triton's internals are here, made by __enter__ and undone by __exit__: what
    `torch.cuda` says of the device, the answer that autograd's engine gets, Triton's driver, Inductor's
    Triton kernels and graphs (which are noted, not loaded), PyTorch's choice of attention, generators.
    """

    def __init__(self) -> None:
        self.mode, self.graphs, self.stack = Counting(), [], ExitStack()
        self.kernels: dict[tuple[int, str], tuple[int, str]] = {}  # (graph, name) -> bytes, part

    def __enter__(self) -> "PretendedH100":
        import triton

        self.target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        with ExitStack() as self.stack:
            self.settings()
            self.inductor()
            self.device()
            self.autograd()
            self.triton(triton)
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()
        torch._dynamo.reset()
        T.compiled.cache_clear()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Give an attribute another value until the end."""
        self.stack.enter_context(patch.object(owner, name, value, create=True))

    def settings(self) -> None:
        """Compile anew, in this process, and choose nothing by timing it."""
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        places = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
        self.stack.enter_context(patch.dict(os.environ, places | {"CUDA_VISIBLE_DEVICES": ""}))
        # constants are not folded, since that computes on the device; the kernels are the same
        own = {"fx_graph_cache": False, "compile_threads": 1, "shape_padding": False}
        own["joint_graph_constant_folding"] = False
        for module, changed in (
            ("torch._inductor", own),
            ("torch._functorch", {"enable_autograd_cache": False}),
            ("torch._dynamo", {"recompile_limit": 64}),
        ):
            self.stack.enter_context(import_module(f"{module}.config").patch(**changed))

    def device(self) -> None:
        """Answer for the device."""
        for name, value in CUDA_ANSWERS.items():
            self.replace(torch.cuda, name, always(value))
        for name in C_ANSWERS:
            self.replace(torch._C, f"_cuda_{name}", always(0))
        self.replace(
            torch.cuda, "get_rng_state", lambda *args: torch.zeros(16, dtype=torch.uint8, device="cpu")
        )
        self.replace(torch.cuda, "synchronize", self.mode.synchronize)
        self.replace(torch, "Generator", AnyGenerator)
        self.replace(torch.nn.Module, "to", lambda module, device: module)  # made there; fakes do not move
        self.replace(F, "scaled_dot_product_attention", cudnn_attention)
        # clipping does all gradients at once, but not those of a subclass of tensors
        self.replace(torch.nn.utils.clip_grad, "_has_foreach_support", always(True))

        def address(t: FakeTensor) -> int:
            return t.untyped_storage()._cdata + t.storage_offset() * t.element_size()

        self.replace(FakeTensor, "data_ptr", address)  # it only tells tensors apart

    def autograd(self) -> None:
        """Answer autograd's engine that no device has a context: without a driver the question raises.

        It asks CUDA's hooks, by slot 4 of their virtual table: two destructors, isBuilt, isAvailable,
        hasPrimaryContext (ATen/detail/AcceleratorHooksInterface.h).
        """
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
        get_hooks = library._ZN2at6detail12getCUDAHooksEv
        get_hooks.restype = ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p))
        hooks, before = get_hooks(), 2  # words of type information before the table
        no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda this, index: False)
        own = (ctypes.c_void_p * 96)(*(hooks[0][i - before] for i in range(96)))
        own[before + 4] = ctypes.cast(no, ctypes.c_void_p).value
        word = ctypes.sizeof(ctypes.c_void_p)
        original = ctypes.cast(hooks[0], ctypes.c_void_p).value

        def restore() -> None:
            hooks[0] = ctypes.cast(original, ctypes.POINTER(ctypes.c_void_p))

        self.kept = (own, no)  # as long as they are used
        self.stack.callback(restore)
        hooks[0] = ctypes.cast(ctypes.addressof(own) + before * word, ctypes.POINTER(ctypes.c_void_p))

    def triton(self, triton: Any) -> None:
        """Give Triton a driver that knows what it compiles for."""
        facts = {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": H100.multi_processor_count}
        driver = SimpleNamespace(
            get_current_target=lambda: self.target,
            get_current_device=always(0),
            utils=SimpleNamespace(get_device_properties=always(facts)),
        )
        self.replace(triton.runtime.driver, "_active", driver)
        helpers = import_module("torch._inductor.runtime.triton_helpers")
        self.replace(helpers, "set_driver_to_gpu", always(None))

    def inductor(self) -> None:
        """Note kernels and graphs when they are compiled."""
        compile_fx = import_module("torch._inductor.compile_fx")
        scheduling = import_module("torch._inductor.codegen.triton").TritonScheduling
        checks = import_module("torch.utils._triton")
        define_kernel, compiler = scheduling.define_kernel, compile_fx._InProcessFxCompile
        codegen_and_compile = compiler.codegen_and_compile

        def define(scheduler: Any, source: str, schedule: Any, kernel: Any) -> str:
            name = define_kernel(scheduler, source, schedule, kernel)
            self.note_kernel(compile_fx.V.graph, name, schedule, kernel)
            return name

        def compile_graph(*args: Any) -> Any:
            for function in vars(checks).values():
                getattr(function, "cache_clear", always(None))()
            # here only: fake tensors need the truth
            with patch.object(torch.cuda, "is_available", always(True)):
                return codegen_and_compile(*args)

        self.replace(scheduling, "define_kernel", define)

        def make_cuda_graph(function: Any, **facts: Any) -> Any:
            self.graphs[-1].refused = ""
            return function

        def refuse(reason: str) -> None:
            self.graphs[-1].refused = reason

        self.replace(compile_fx, "cudagraphify", make_cuda_graph)
        self.replace(
            import_module("torch._inductor.output_code"), "log_cudagraph_skip_and_bump_counter", refuse
        )
        self.replace(compile_fx.GraphLowering, "compile_to_module", lambda graph: self.note_graph(graph))
        self.replace(compiler, "codegen_and_compile", compile_graph)

    def note_kernel(self, graph: Any, name: str, schedule: Any, kernel: Any) -> None:
        """Keep the bytes and the part of a Triton kernel."""
        nodes = schedule if isinstance(schedule, (list, tuple)) else [schedule]
        nodes = [leaf for node in nodes if hasattr(node, "read_writes") for leaf in leaves_of(node)]
        origins = {origin for leaf in nodes if leaf.node is not None for origin in leaf.node.get_origins()}
        self.kernels[id(graph), name] = touched_bytes(graph, nodes, kernel), part_of_fused(origins)

    def note_graph(self, graph: Any) -> Any:
        """Generate a graph's code, note what it launches; return a module that gives empty fake tensors."""
        text = graph.codegen()[0].value
        sources = dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", text, re.S))
        launches = []
        for name in sources:
            size, part = self.kernels.get((id(graph), name), (0, OTHER))
            launches.append(Launch(name, part, size, 0, text.count(f" {name}.run(")))
        nodes = list(graph.module.graph.nodes)
        library = [launch for node in nodes if (launch := library_launch(node))]
        products = [node for node in nodes if PRODUCT.fullmatch(operator_name(node))]
        inside = any("in trunk\n" in frame for node in nodes for frame in Place.of(node).frames)
        noted = Graph(
            phase=(BACKWARD if graph.is_backward else FORWARD) if inside else OUTSIDE,
            launches=launches + library,
            sources=sources,
            collectives=text.count("_c10d_functional.all_reduce_.default("),
            saved=self.returned_bytes(graph),
            fp32_products=sum(takes_fp32(node) for node in products),
            widest_fp32=widest(text),
        )
        self.graphs.append(noted)
        layouts = [layout_of(output) for output in graph.graph_outputs]

        def call(args: list) -> list[Tensor | None]:
            noted.calls += 1
            args.clear()
            return [layout and layout.empty() for layout in layouts]

        return SimpleNamespace(call=call, runner=None, __file__=os.devnull)

    def returned_bytes(self, graph: Any) -> float:
        """Returns the bytes that a graph gives, besides its inputs: what is saved for the backward pass."""
        found = {
            output.get_name(): layout
            for output in graph.graph_outputs
            if (layout := layout_of(output)) and output.get_name() not in graph.graph_inputs
        }
        return sum(float(np.prod(layout.size)) * layout.dtype.itemsize for layout in found.values())


class Layout(NamedTuple):
    """The form of a tensor that a graph returns."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        """Returns a tensor of that form."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


def layout_of(output: Any) -> Layout | None:
    """Returns the form of one of a graph's outputs, if it is a tensor."""
    if not output.has_tensor_output():
        return None
    size, stride = (tuple(map(int, numbers)) for numbers in (output.get_size(), output.get_layout().stride))
    return Layout(size, stride, output.get_dtype(), output.get_device())


# -------
# Pieces of the program
# -------


@dataclass
class Piece:
    """What a pass of the program takes."""

    name: str
    kind: str  # of PIECES
    action: Callable[[], object]
    error: str = ""
    graphs: list[Graph] = field(default_factory=list)  # that it compiled
    launches: int = 0
    eager: int = 0  # of these outside of compiled graphs
    calls: int = 0  # of compiled graphs, each of which may be one launch as a CUDA graph
    bytes: float = 0
    flop: float = 0
    floor: float = 0  # seconds
    parts: Counter = field(default_factory=Counter)  # (part, phase) -> seconds of the floor
    notes: dict[str, int] = field(default_factory=dict)
    saved: float = 0  # bytes, at most, that a forward pass keeps for its backward pass

    def check(self, device: PretendedH100) -> None:
        """Do it once, which compiles, and again, which counts."""
        mode, first = device.mode, len(device.graphs)
        if self.kind == "stream":
            torch._dynamo.reset()  # what other pieces compiled was to be no CUDA graph
        try:
            for _ in range(2):
                mode.found, mode.launches = Counter(), []
                before = [graph.calls for graph in device.graphs]
                with mode, import_module("torch._inductor.config").patch(self.options()):
                    self.action()
            before += [0] * (len(device.graphs) - len(before))
            self.notes = dict(mode.found)
            self.add_up(mode.launches, OUTSIDE, 1)
            self.eager = self.launches
            for graph, calls in zip(device.graphs, before, strict=True):
                self.add_graph(graph, graph.calls - calls)
        except Exception as e:  # of the program or of the compiler: any means that it does not run
            self.error = one_line(e, 300).split(" Set TORCHDYNAMO_VERBOSE")[0]
        finally:
            mode.found = None
        self.graphs = device.graphs[first:]
        if fp32 := sum(graph.fp32_products for graph in self.graphs):
            self.notes["compiled fp32 products"] = fp32
        if self.kind == "stream":
            self.notes["of the compiled no CUDA graphs"] = sum(bool(graph.refused) for graph in self.graphs)

    def options(self) -> dict[str, Any]:
        """Returns how Inductor compiles it: streams as CUDA graphs, each in one piece."""
        return {"triton.cudagraphs": self.kind == "stream", "graph_partition": False}

    def add_up(self, launches: Iterable[Launch], phase: str, calls: int) -> None:
        """Add what is launched in so many calls."""
        for launch in launches:
            self.launches += calls * launch.times * launch.kernels
            self.bytes += calls * launch.times * launch.bytes
            self.flop += calls * launch.times * launch.flop
            self.floor += calls * launch.floor
            self.parts[launch.part, phase] += calls * launch.floor

    def add_graph(self, graph: Graph, calls: int) -> None:
        """Add so many calls of a graph."""
        self.add_up(graph.launches, graph.phase, calls)
        self.calls += calls
        self.launches += calls * graph.collectives
        self.saved = max(self.saved, graph.saved if calls and graph.phase == FORWARD else 0)

    def line(self) -> str:
        """Returns what is to be said of it."""
        if self.error:
            return f"{self.name}: FAILED: {self.error}"
        graphs = f"{self.launches} launches ({self.eager} outside of graphs), {self.calls} calls of graphs"
        graphs += f", {len(self.graphs)} graphs compiled"
        size = f"{self.bytes / 1e9:.2f} GB, {self.flop / 1e12:.2f} TFLOP"
        notes = "".join(f"; {what}: {number}" for what, number in self.notes.items())
        return f"{self.name}: {graphs}, {size}, floor {1000 * self.floor:.2f} ms{notes}"

    def floors(self) -> str:
        """Returns the table of its floor by part, in milliseconds."""
        rows = []
        for part in PARTS:
            row = [self.parts[part, phase] for phase in PHASES]
            rows.append([part, *(f"{1000 * seconds:.2f}" for seconds in (*row, sum(row)))])
        sums = [sum(self.parts[part, phase] for part in PARTS) for phase in PHASES]
        rows.append(["sum", *(f"{1000 * seconds:.2f}" for seconds in (*sums, self.floor))])
        return table(["floor, ms", *PHASES, "sum"], rows, right=4)

    def figures(self) -> dict[str, Any]:
        """Returns it as in JSON."""
        names = (
            "name",
            "kind",
            "error",
            "launches",
            "eager",
            "calls",
            "bytes",
            "flop",
            "floor",
            "notes",
            "saved",
        )
        parts = [{"part": p, "phase": phase, "floor": s} for (p, phase), s in self.parts.items()]
        graphs = [
            {
                "phase": graph.phase,
                "kernels": len(graph.sources),
                "trigonometry": graph.trigonometry(),
                "widest_fp32": graph.widest_fp32,
                "refused": graph.refused,
            }
            for graph in self.graphs
        ]
        return {name: getattr(self, name) for name in names} | {"parts": parts, "graphs": graphs}


@contextmanager
def processes(number: int) -> Iterator[None]:
    """Be the last of so many processes, which do not exist."""
    if number == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=number - 1, world_size=number, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def made_up_pieces(tokens: Tensor, longest: int) -> Tensor:
    """Returns as many pieces as a span usually has: how many there are depends on tokens, which are fake."""
    return torch.zeros(256, dtype=torch.int32, device=tokens.device)


class Program:
    """The program's passes at the record's size, on fake tensors."""

    def __init__(self, device: PretendedH100, folder: str, recipe: str | None):
        self.mode, self.device, self.W = device.mode, torch.device("cuda:0"), T.world_size()
        write_shard(Path(folder) / "fineweb_train_000000.bin", np.zeros(1 << 22, "<u2"))
        chunk = {"TTT_CHUNK_TOKENS": "2048"}
        windows = {"EVAL_MODE": "sliding", "TTT_CHUNK_TOKENS": "32768"}
        changes = {"sliding": windows, "streaming": {"EVAL_MODE": "streaming", **chunk}}
        given = {"DATA_PATH": folder, "RECIPE": recipe or "record"}
        self.settings = {mode: T.parse_settings(given | change) for mode, change in changes.items()}
        device.replace(T, "document_pieces", made_up_pieces)
        with self.mode, self.device:
            self.trainer = T.Trainer(T.Run(self.settings["sliding"], self.device))
            self.spans = torch.zeros(
                (T.SPANS // self.W, self.trainer.s.train_batch_tokens // T.SPANS + 1),
                dtype=torch.int32,
                device="cpu",
            )
        self.model = self.trainer.model

    def pieces(self) -> Iterator[Piece]:
        """Gives the passes in the order in which a run does them."""
        spans, length = (self.spans.size(0), self.spans.size(1) - 1)
        yield Piece(f"training step, {spans} x {length:,} tokens", "step", self.step)
        yield Piece("calibration, 4 sequences a rank", "calibrate", self.calibration())
        yield Piece("sliding windows, 256 a rank", "score", self.windows())
        yield Piece("TTT in windows, a chunk, one epoch", "ttt", self.ttt())
        yield from self.stream()

    def zeros(self, number: int) -> Tensor:
        """Returns tokens (number,)."""
        with self.mode, self.device:
            return torch.zeros(number, dtype=torch.int32)

    def scorer(self, targets: int) -> T.Scorer:
        """Returns a scorer of a text of so many targets."""
        s, V = self.trainer.s, self.trainer.s.vocab_size
        with self.mode, self.device:
            flags = torch.ones((2, V), dtype=torch.bool)
            tables = T.ByteTables(torch.ones(V, dtype=torch.int64), *flags)
        return T.Scorer(
            self.model, self.zeros(targets + 1), tables, s.eval_seq_len, s.val_batch_size // T.SPANS
        )

    def step(self) -> None:
        """Take a training step."""
        self.trainer.train_step(self.spans, 1.0, 0.95)

    def calibration(self) -> Callable[[], object]:
        """Returns the calibration on few tokens."""
        length = self.trainer.s.train_seq_len
        tokens = self.zeros(4 * self.W * length + 1)
        return lambda: T.calibrate(self.model, tokens, length)

    def windows(self) -> Callable[[], object]:
        """Returns the scoring of sliding windows."""
        s = self.trainer.s
        targets = s.eval_seq_len + s.eval_stride * (256 * self.W - 1)
        scorer, plan = self.scorer(targets), T.plan_windows(targets, s.eval_seq_len, s.eval_stride)
        return lambda: scorer.sums(plan)

    def learner(self, mode: str) -> T.Learner:
        """Returns a learner with a mode's settings."""
        with self.mode, self.device:
            return T.Learner(self.model, self.settings[mode])

    def ttt(self) -> Callable[[], object]:
        """Returns the learning from a chunk in whole sequences."""
        s = self.settings["sliding"]
        mode = T.SlidingMode(s, self.scorer(4 * s.ttt_chunk_tokens), self.learner("sliding"))
        return lambda: mode.learn_chunk(1, 1)

    def stream(self) -> Iterator[Piece]:
        """Gives the first window of a stream, and a chunk that is scored and learnt from."""
        s = self.settings["streaming"]
        scorer, learner = self.scorer(64 * s.ttt_chunk_tokens), self.learner("streaming")
        with self.mode, self.device:
            mode = T.StreamingMode(s, scorer, learner)
        chunks = count(1)

        def window() -> None:
            mode.learner.slots = self.model.empty_cache(1)
            mode.score_chunk(0)

        def chunk() -> None:
            number = next(chunks)
            mode.score_chunk(number)
            mode.learn_chunk(number, 1)

        yield Piece("TTT in a stream, first window", "stream", window)
        yield Piece(f"TTT in a stream, a chunk of {s.ttt_chunk_tokens}", "stream", chunk)


# -------
# What ptxas says of the Triton kernels
# -------


class Assembled(NamedTuple):
    """A Triton kernel in one of its configurations, compiled for sm_90a."""

    piece: str  # that compiled it first
    kernel: str
    configuration: str
    choices: int  # configurations that would be timed
    registers: int
    spilled: int  # bytes
    shared: int  # bytes


def assemble(piece: str, name: str, source: str, target: Any) -> Iterator[Assembled]:
    """Gives a piece's Triton kernel in each of its configurations. Raises RuntimeError."""
    import triton

    code_cache = import_module("torch._inductor.codecache").PyCodeCache
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    module = code_cache.load(source)
    tuner = getattr(module, "triton_", None) or getattr(module, name)
    for config in tuner.configs:
        meta = tuner._create_compile_meta(config)
        ast = triton.compiler.ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
        made = triton.compile(ast, target=target, options=tuner._create_compile_options(config, meta))
        command = [str(ptxas), "-v", "--gpu-name=sm_90a", "-", "-o", os.devnull]
        said = subprocess.run(command, input=made.asm["ptx"], capture_output=True, text=True).stderr
        spilled, registers = re.search(r"(\d+) bytes spill stores", said), re.search(r"Used (\d+) reg", said)
        if not spilled or not registers:
            raise RuntimeError(f"{name}: ptxas fails: {' '.join(said.split())[:200]}")
        shape = ", ".join(f"{key}={value}" for key, value in config.kwargs.items())
        numbers = int(registers[1]), int(spilled[1]), made.metadata.shared
        yield Assembled(piece, name, f"{shape}, num_warps={config.num_warps}", len(tuner.configs), *numbers)


def assemble_all(pieces: list[Piece], target: Any) -> list[list[Assembled]]:
    """Returns each distinct Triton kernel in each of its configurations. Raises RuntimeError."""
    distinct: dict[str, tuple[str, str, str]] = {}
    for piece in pieces:
        for name, source in (item for graph in piece.graphs for item in graph.sources.items()):
            distinct.setdefault(re.sub(r"triton_(poi|per|red)_\w+", "", source), (piece.name, name, source))
    with patch.object(torch.cuda, "is_available", always(True)):
        return [list(assemble(*kernel, target)) for kernel in distinct.values()]


def report_assembled(kernels: list[list[Assembled]]) -> str:
    """Returns how many kernels were compiled, and which spill or need too much shared memory."""
    every = [one for kernel in kernels for one in kernel]
    bad = [one for one in every if one.spilled or one.shared > SHARED_MEMORY]
    lines = [
        f"Triton for sm_90a: {len(kernels)} kernels in {len(every)} configurations, {len(bad)} of these spill"
    ]
    lines += [
        f"  {one.spilled} bytes spilled, {one.registers} registers, {one.shared} bytes shared by "
        f"{one.kernel} ({one.configuration}; {one.choices} to choose from), first in: {one.piece}"
        for one in sorted(bad, key=lambda one: -one.spilled)
    ]
    return "\n".join(lines)


# -------
# The command
# -------


def kinds(text: str) -> list[str]:
    """Returns the kinds of pieces that a text names. Raises ArgumentTypeError."""
    names = text.split(",")
    if unknown := [name for name in names if name not in PIECES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PIECES)}")
    return names


def check_build() -> None:
    """Raises RunError unless this PyTorch can compile for CUDA."""
    if torch.version.cuda is None:
        raise T.RunError(
            f"PyTorch {torch.__version__} is no CUDA build; make an environment of its own: {INSTALL}"
        )


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def report_trigonometry(graphs: list[Graph]) -> str:
    """Returns which compiled graphs have kernels that compute cos, sin or pow; there should be none."""
    lines = [
        f"  graph {i} ({graph.phase}): {', '.join(functions)} in {name}"
        for i, graph in enumerate(graphs, 1)
        for name, functions in graph.trigonometry().items()
    ]
    return "\n".join(
        [f"cos, sin or pow in kernels of the {len(graphs)} graphs: {len(lines) or 'none'}", *lines]
    )


def check_pieces(device: PretendedH100, args: argparse.Namespace, folder: str) -> list[Piece]:
    """Returns the pieces that were asked for, checked; prints a line for each."""
    found = []
    for piece in Program(device, folder, args.recipe).pieces():
        if piece.kind not in args.only:
            continue
        piece.check(device)
        say(piece.line())
        if piece.kind == "step" and not piece.error:
            largest = max(graph.widest_fp32 for graph in piece.graphs)
            say(f"\n{piece.floors()}\n\nsaved for the backward pass: {piece.saved / 2**30:.1f} GiB")
            say(f"largest fp32 tensor of a graph: {largest:,} elements\n")
        found.append(piece)
    return found


def main(argv: list[str] | None = None) -> None:
    """Check the pieces."""
    parser = Parser(__doc__)
    parser.add_argument("--world", type=int, choices=(1, 8), default=1, help="processes")
    parser.add_argument("--recipe", choices=(*T.RECIPES,), help="whose settings (the record's)")
    parser.add_argument("--only", type=kinds, default=list(PIECES), help=f"of {','.join(PIECES)}")
    parser.add_argument("--ptx", action="store_true", help="also compile each Triton kernel by ptxas")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)
    with ends_in_one_line():
        check_build()
        check_folder_of(args.json)
        with tempfile.TemporaryDirectory() as folder, processes(args.world), PretendedH100() as device:
            figures = {"torch": torch.__version__, "world": args.world, "recipe": args.recipe}
            source = hashlib.sha256(Path(T.__file__).read_bytes()).hexdigest()[:12]
            where = f"PyTorch {torch.__version__}, a pretended {H100.name}"
            say(f"train_gpt.py {source}, {where}, rank {T.rank()} of {args.world}\n")
            pieces = check_pieces(device, args, folder)
            figures["pieces"] = [piece.figures() for piece in pieces]
            say(f"\n{report_trigonometry(device.graphs)}")
            if args.ptx:
                assembled = assemble_all(pieces, device.target)
                say(report_assembled(assembled))
                figures["ptx"] = [one._asdict() for kernel in assembled for one in kernel]
        if args.json:
            T.write_atomically(args.json, json.dumps(figures).encode())
    failed = [piece.name for piece in pieces if piece.error]
    if failed:
        fail(f"{len(failed)} of {len(pieces)} pieces failed: {'; '.join(failed)}", 1)


if __name__ == "__main__":
    main()
