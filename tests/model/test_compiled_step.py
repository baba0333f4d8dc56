"""What a training step must not do, read from its graphs: compile again, leave bf16 in products, wait for
the device."""

import math
import re
from collections import Counter

import pytest
import torch
import torch._inductor.async_compile
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as T
from tests.helpers import random_batch, settings, write_shards
from tools.measure.bench import no_host_sync

pytestmark = pytest.mark.slow

CPU, BF16, aten = torch.device("cpu"), torch.bfloat16, torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
SHAPES = dict(
    VOCAB_SIZE=56, NUM_LAYERS=2, VE_LAYERS=1, MLP_MULT=2.5, TRAIN_SEQ_LEN=24, TRAIN_BATCH_TOKENS=384
)
MATRICES = [
    (64, 32),
    (32, 32),
    (80, 32),
    (32, 80),
]  # a layer's; 48 tokens at a time, so that nothing else is so shaped


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    for path in folder.iterdir():  # ids below 56
        data = path.read_bytes()
        path.write_bytes(data[:1024] + bytes(b % 56 for b in data[1024:]))
    return folder


@pytest.fixture
def trainer(folder):
    """Of a model in bf16, eight micro-batches a step."""
    return trainer_of(folder)


def trainer_of(folder):
    trainer = T.Trainer(T.Run(settings(DATA_PATH=folder, **SHAPES), CPU))
    trainer.model.dtype = BF16
    return trainer


def steps(trainer, count):
    """The losses of so many steps."""
    with trainer.loader() as spans:
        return [trainer.train_step(next(spans), 1.0, 0.95)[0].item() for _ in range(count)]


def first_spans(trainer):
    with trainer.loader() as spans:
        return next(spans)


@pytest.fixture(scope="module")
def graphs(folder):
    """forward, backward: the graphs compiled in six steps."""
    graphs = dict(forward=[], backward=[])

    def keep(kind):
        def compiler(graph, inputs):
            graphs[kind].append(graph)
            return make_boxed_func(graph.forward)

        return compiler

    torch._dynamo.reset()
    trainer = trainer_of(folder)
    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    model = trainer.model
    model.compile(backend=backend, dynamic=False, fullgraph=True)  # no graph break
    losses = steps(trainer, 6)
    assert losses[0] == pytest.approx(math.log(56), abs=0.1) and losses[-1] < losses[0]
    return graphs


def test_steps_compile_one_graph_each_way(graphs):
    assert {kind: len(found) for kind, found in graphs.items()} == dict(forward=1, backward=1)


def test_the_graphs_compute_no_angles(graphs):
    """Rotary tables are made once, outside, and handed in."""
    targets = {str(node.target) for found in graphs.values() for graph in found for node in graph.graph.nodes}
    assert "aten.tanh.default" in targets
    assert not [
        target for target in targets if re.search(r"aten\.(cos|sin|tan|outer|arange|exp2|polar)\b", target)
    ]


@pytest.mark.parametrize("kind, products", [("forward", 4 * 2 + 3), ("backward", 2 * (4 * 2 + 3))])
def test_matrix_products_are_in_bf16_and_as_few_as_they_can_be(graphs, kind, products):
    """Four a layer (q, k and v are one), head, bigram and value projections; each has two in the backward
    pass."""
    found = [node for graph in graphs[kind] for node in graph.graph.nodes if node.target in PRODUCTS]
    assert len(found) == products
    assert {arg.meta["val"].dtype for node in found for arg in node.args if hasattr(arg, "meta")} == {BF16}


def is_matrix(tensor):
    return isinstance(tensor, torch.Tensor) and tuple(tensor.shape[-2:]) in MATRICES


def test_the_graphs_neither_take_nor_cast_a_bank_in_fp32(graphs):
    for found in graphs.values():
        for graph in found:
            values = {node: node.meta.get("val") for node in graph.graph.nodes}
            taken = [v for node, v in values.items() if node.op == "placeholder" and is_matrix(v)]
            assert taken and {v.dtype for v in taken} == {BF16}
            assert not [node for node, v in values.items() if is_matrix(v) and v.dtype != BF16]


class Watch(TorchDispatchMode):
    """Counts casts of weights to bf16, by the weight's place in memory, and matrix products by their
    inputs' types."""

    def __init__(self, weights):
        super().__init__()
        self.weights, self.casts, self.products = ({w.data_ptr() for w in weights}, Counter(), Counter())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is aten._to_copy.default and (args[0].dtype, kwargs.get("dtype")) == (
            torch.float32,
            BF16,
        ):
            self.casts[args[0].data_ptr()] += args[0].data_ptr() in self.weights
        if function in PRODUCTS:
            self.products[tuple(arg.dtype for arg in args if isinstance(arg, torch.Tensor))] += 1
        return function(*args, **kwargs)


def test_a_step_casts_each_bank_once_and_multiplies_in_bf16_only(trainer):
    with Watch(trainer.model.banks()) as watch:
        steps(trainer, 1)
    assert [watch.casts[bank.data_ptr()] for bank in trainer.model.banks()] == [1, 1, 1, 1]
    assert set(watch.products) == {(BF16, BF16)} and watch.products.total() > 8 * 3 * (4 * 2 + 3)


class Moves(TorchFunctionMode):
    """Fails where tokens would be copied to a device and waited for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_device = any(isinstance(arg, torch.device) for arg in (*args, *kwargs.values()))
        if function is torch.Tensor.to and to_device and not args[0].is_floating_point():
            assert kwargs.get("non_blocking"), "a copy that waits"
        return function(*args, **kwargs)


def test_a_step_copies_its_batch_without_waiting(trainer):
    spans = first_spans(trainer)
    with Moves():
        trainer.train_step(spans, 1.0, 0.95)
        with pytest.raises(AssertionError, match="a copy that waits"):
            spans.to(CPU)


def test_a_step_does_not_wait_for_the_device(trainer):
    spans = first_spans(trainer)
    with no_host_sync(CPU):
        trainer.train_step(spans, 1.0, 0.95)


@pytest.mark.parametrize(
    "read",
    [
        torch.Tensor.item,
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        bool,
        torch.nonzero,
        lambda t: torch.ones(1)[t[None] > 0],
    ],
    ids=["item", "tolist", "numpy", "bool", "nonzero", "mask"],
)
def test_what_waits_for_the_device_is_noticed(read):
    with pytest.raises(RuntimeError), no_host_sync(CPU):
        read(torch.ones(()))


def test_logits_are_held_in_fp32_once_in_forward_and_backward_together(monkeypatch):
    """In the code that inductor writes, whose kernels are left out: nothing is compiled or computed."""
    inductor = torch._inductor
    monkeypatch.setattr(
        inductor.async_compile.AsyncCompile, "cpp_pybinding", lambda *args, **kwargs: lambda *args: None
    )
    monkeypatch.setattr(inductor.config, "fx_graph_cache", False)
    monkeypatch.setattr(
        inductor.config.cpp, "simdlen", 1
    )  # fewer forms of each kernel are tried; buffers are the same
    V, (x, y) = 1024, random_batch(4, 32)
    s = settings(VOCAB_SIZE=V, NUM_LAYERS=1, XSA_LAST_N=0, VE_LAYERS="", BIGRAM_VOCAB_SIZE=0)
    model = T.GPT(s, dtype=BF16).initialize()
    torch._dynamo.reset()
    model.compile(dynamic=False, fullgraph=True)
    matrices = T.Matrices(*(m.detach().requires_grad_() for m in model.matrices()))
    _, codes = inductor.utils.run_and_get_code(lambda: model(x, y, matrices).sum().backward())
    torch._dynamo.reset()
    held = [
        [
            shape
            for shape in re.findall(r"empty_strided_cpu\(\((.*?)\), \(.*?\), torch\.float32\)", code)
            if math.prod(int(n) for n in shape.split(",") if n.strip()) == x.numel() * V
        ]
        for code in codes
    ]
    assert len(held) == 2 and sum(map(len, held)) == 1  # PyTorch 2.11 does so backward, later ones forward
