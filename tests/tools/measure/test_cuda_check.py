"""tools/measure/cuda_check.py: the program compiles for CUDA, what would fail there is told, parts add up."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch

import train_gpt as T
from tests import commands
from tools.common.cli import ROOT
from tools.measure import cuda_check
from tools.measure.bench import forward_flop
from tools.measure.cuda_check import OTHER, PARTS, PHASES, Assembled, Graph, Launch, Piece, Place

needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="needs a CUDA build of PyTorch (docs/gpu.md says how to get one)"
)


def python(*arguments):
    """What Python prints, in a process of its own, since the check patches PyTorch."""
    words = [sys.executable, "-W", "ignore", *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """The figures of all pieces, by name."""
    path = tmp_path_factory.mktemp("figures") / "figures.json"
    said = python("-m", "tools.measure.cuda_check", "--json", path)
    assert "cos, sin or pow in kernels of the " in said and said.strip().endswith(" graphs: none")
    return {piece["name"]: piece for piece in json.loads(path.read_text())["pieces"]}


# Where there is a CUDA build


@needs_cuda_build
@pytest.mark.slow
def test_every_pass_compiles_for_cuda_and_none_waits(pieces):
    assert {piece["kind"] for piece in pieces.values()} == set(cuda_check.PIECES) and len(pieces) == 6
    for name, piece in pieces.items():
        assert not piece["error"], name
        assert piece["launches"] > 100 and piece["floor"] > 0


@needs_cuda_build
@pytest.mark.slow
def test_no_compiled_graph_computes_trigonometry(pieces):
    graphs = [graph for piece in pieces.values() for graph in piece["graphs"]]
    assert len(graphs) > 20 and sum(graph["kernels"] for graph in graphs) > 200
    assert not any(graph["trigonometry"] for graph in graphs)


@needs_cuda_build
@pytest.mark.slow
def test_all_that_is_compiled_for_a_stream_may_become_cuda_graphs(pieces):
    streams = [piece for piece in pieces.values() if piece["kind"] == "stream"]
    assert len(streams) == 2 and max(len(piece["graphs"]) for piece in streams) > 5
    for piece in streams:
        assert [graph["refused"] for graph in piece["graphs"]] == [""] * len(piece["graphs"])
        assert piece["eager"] + piece["calls"] < piece["launches"] / 4 or piece["name"].endswith("window")


@needs_cuda_build
@pytest.mark.slow
def test_the_parts_floors_sum_to_the_whole_floor(pieces):
    for piece in pieces.values():
        assert math.isclose(sum(part["floor"] for part in piece["parts"]), piece["floor"])
    (step,) = (piece for piece in pieces.values() if piece["kind"] == "step")
    floors = {(part["part"], part["phase"]): part["floor"] for part in step["parts"]}
    for part in PARTS[:-1]:
        assert floors[part, "forward"] > 0 and floors[part, "backward"] > 0, part
    assert all(floors.get((OTHER, phase), 0) < 0.01 * step["floor"] for phase in PHASES)


@needs_cuda_build
@pytest.mark.slow
def test_a_steps_flop_are_those_of_the_formula(pieces):
    (step,) = (piece for piece in pieces.values() if piece["kind"] == "step")
    s = T.Settings()
    attention = 2 * s.num_layers * s.train_seq_len * s.model_dim
    products = forward_flop(T.GPT(s), s.train_seq_len)[0] - attention
    expected = s.train_batch_tokens * (3 * products + 3.5 * attention)
    assert 1 < step["flop"] / expected < 1.003  # Newton-Schulz is the rest


@needs_cuda_build
@pytest.mark.slow
def test_logits_of_a_large_vocabulary_are_never_whole_in_fp32():
    """Those of a span, 98,304 x 8,192: softcap and cross-entropy are done piece by piece in the kernels."""
    said = python("-m", "tools.measure.cuda_check", "--recipe", "frontier", "--only", "step")
    (largest,) = re.findall(r"largest fp32 tensor of a graph: ([\d,]+) elements", said)
    s = T.parse_settings({"RECIPE": "frontier"})
    logits = s.train_batch_tokens // T.SPANS * s.vocab_size
    assert 0 < int(largest.replace(",", "")) < logits / 10


WRONG = """
from unittest.mock import patch

import torch
import train_gpt as T
from tools.measure.cuda_check import Piece, PretendedH100, assemble_all, report_assembled, report_trigonometry

def compiled(function):
    return torch.compile(function, dynamic=False, fullgraph=True)

def broken(x):
    torch._dynamo.graph_break()
    return x + 1

def read_clock():
    with patch.object(torch.cuda, "is_initialized", return_value=True):  # as where a GPU is in use
        T.Clock().seconds()

with PretendedH100() as device:
    with device.mode:
        x = torch.ones(4096, device="cuda")
    actions = {
        "value": lambda: x.sum().item(),
        "branch": lambda: x.sum() if x.sum() > 0 else x,
        "copy": lambda: x.cpu(),
        "clock": read_clock,
        "devices": lambda: x + torch.ones(4096, device="cpu"),
        "break": lambda: compiled(broken)(x),
        "operator": lambda: torch.ops.aten.no_such_operator(x),
        "angles": lambda: compiled(lambda t: (t.cos() + 1) * t)(x),
        "fine": lambda: compiled(lambda t: (t + 1) * t)(x),
    }
    pieces = [Piece(name, "step", action) for name, action in actions.items()]
    for piece in pieces:
        piece.check(device)
        print(piece.line())
    print(report_trigonometry(device.graphs))
    print(report_assembled(assemble_all(pieces, device.target)))
print("cuda" if torch.cuda.is_available() else "none", torch.ones(2).sum().item())
"""


@needs_cuda_build
@pytest.mark.slow
def test_what_would_fail_or_wait_is_told_in_one_line_each():
    lines = python("-c", WRONG).splitlines()
    waits = "FAILED: RuntimeError: waits for the device:"
    assert lines[:4] == [
        f"value: {waits} a tensor's value is asked for (.item(), `if`)",
        f"branch: {waits} a tensor's value is asked for (.item(), `if`)",
        f"copy: {waits} a tensor is copied to the CPU",
        f"clock: {waits} torch.cuda.synchronize()",
    ]
    assert lines[4].startswith("devices: FAILED: ") and "cuda" in lines[4] and "cpu" in lines[4]
    assert lines[5].startswith("break: FAILED: ") and "graph_break" in lines[5]
    assert lines[6].startswith("operator: FAILED: ") and "no_such_operator" in lines[6]
    one = "1 launches (0 outside of graphs), 1 calls of graphs, 1 graphs compiled, 0.00 GB, 0.00 TFLOP"
    assert lines[7:9] == [f"angles: {one}, floor 0.00 ms", f"fine: {one}, floor 0.00 ms"]
    assert lines[9] == "cos, sin or pow in kernels of the 2 graphs: 1"
    assert lines[10].startswith("  graph 1 (outside the model): cos in triton_poi_fused_")
    assert lines[11].startswith("Triton for sm_90a: 2 kernels in ") and lines[11].endswith(
        ", 0 of these spill"
    )
    assert lines[12:] == ["none 2.0"], "what was patched is as before"


# Anywhere


def test_the_document_has_the_tables_of_the_log():
    said = (ROOT / "logs/cuda_check.txt").read_text("utf-8")
    page = (ROOT / "docs/gpu.md").read_text("utf-8")
    one = [line for line in said.split("\ntrain_gpt.py ")[0].splitlines() if line.startswith("|")]
    assert len(one) == 2 + len(PARTS) + 1 and "\n".join(one) in page
    (chunk,) = re.findall(
        r"a chunk of 2048: (\d+) launches \((\d+) outside", said.split("\ntrain_gpt.py ")[0]
    )
    assert f"{int(chunk[0]):,} launches, {chunk[1]} of them outside" in " ".join(page.split())
    assert "/tmp" not in said and "/work" not in said and "FAILED" not in said


def test_a_pytorch_without_cuda_is_refused_in_one_line_that_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    line = commands.fails(cuda_check.main)
    assert line.startswith(f"PyTorch {torch.__version__} is no CUDA build; ")
    assert "pip install torch==2.14.1 numpy sentencepiece (5.5 GB)" in line


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--only", "step,all"], "argument --only: 'all' is none of step, calibrate, score, ttt, stream"),
        (["--world", "3"], "argument --world: invalid choice: 3"),
        (["--recipe", "worst"], "argument --recipe: invalid choice: 'worst'"),
    ],
)
def test_bad_arguments_give_one_line(arguments, told):
    assert commands.fails(cuda_check.main, *arguments).startswith(told)


@pytest.mark.parametrize(
    "frames, part",
    [
        (["in logits\n  return cap * torch.tanh(x)"], "loss"),
        (["in forward\n  return F.cross_entropy(logits, targets.flatten())"], "loss"),
        (["in forward\n  u = mix[0] * lanes[0] + mix[1] * x0"], "residual mixes and norms"),
        (["in norm\n  return F.rms_norm(x)", "in logits\n  norm(x)"], "residual mixes and norms"),
        (["in logits\n  x0 = self.embed(tokens)[:, 2:]"], "embedding"),
        (["in norm\n  return F.rms_norm(x)", "in attend\n  k = norm(k)"], "rotary and head norms"),
        (["in rotate\n  torch.cat((x1 * cos, x2))", "in attend\n  q = rotate(q)"], "rotary and head norms"),
        (["in attend\n  along = F.normalize(own_value)"], "XSA"),
        (["in mlp\n  hidden.square()", "in forward\n  self.mlp(y)"], "MLP activation"),
        (["in newton_schulz\n  A = X @ X.mT"], OTHER),
        ([], OTHER),
    ],
)
def test_an_operator_is_of_the_part_whose_line_it_is(frames, part):
    assert Place(tuple(frames)).part() == part


def test_flop_of_products_and_of_attention_with_half_of_it_masked():
    a, b, q, k = (torch.empty(shape) for shape in ((3, 4), (4, 5), (1, 8, 6, 64), (1, 4, 10, 64)))
    assert cuda_check.flop_of("mm", [a, b]) == 2 * 3 * 4 * 5
    assert cuda_check.flop_of("addmm_", [torch.empty(3, 5), a, b]) == 2 * 3 * 4 * 5
    whole, forward = 4 * 8 * 6 * 10 * 64, "_scaled_dot_product_cudnn_attention"
    assert cuda_check.flop_of(forward, [q, k, k, None, True]) == whole
    assert cuda_check.flop_of(forward, [q, k, k, None, True, 0.0, True]) == whole / 2
    backward = [q, q, k, k, q, q, None, None, None, None, None, 1, 1, 0.0]
    assert cuda_check.flop_of(f"{forward}_backward", [*backward, False]) == 2.5 * whole
    assert cuda_check.flop_of(f"{forward}_backward", [*backward, True]) == 1.25 * whole
    assert cuda_check.flop_of("add", [a, a]) == 0
    flat, at = torch.empty(6, 8, 64), torch.empty(3)  # tokens, heads, channels; pieces of 10 at most
    assert cuda_check.flop_of("_varlen_attn", [flat, flat, flat, at, at, 10, 10]) == whole / 2
    backward = [*[flat] * 6, at, at, 10, 10]
    assert cuda_check.flop_of("_varlen_attn_backward", backward) == 1.25 * whole


def test_the_largest_fp32_tensor_is_found_in_a_graphs_code():
    code = """
    buf0 = empty_strided_cuda((98304, 8192), (8192, 1), torch.bfloat16)
    buf1 = empty_strided_cuda((8, 12288, 1), (12288, 1, 98304), torch.float32)
    buf2 = empty_strided_cuda((512, ), (1, ), torch.float32)
    """
    assert cuda_check.widest(code) == 98304 and cuda_check.widest("") == 0


def test_a_floor_is_the_longer_of_bytes_and_flop_and_parts_add_up():
    graph = Graph(
        "forward", [Launch("a", "XSA", 3e9, 0, 2), Launch("mm", PARTS[0], 3e9, 790e9, 1, 3)], {}, 1, 5, 0
    )
    piece = Piece("piece", "step", print)
    piece.add_graph(graph, 4)
    assert (piece.launches, piece.bytes, piece.flop) == (4 * (2 + 3 + 1), 4 * 9e9, 4 * 790e9)
    assert piece.floor == pytest.approx(4 * (2 * 1e-3 + 1e-3)) and piece.saved == 5
    assert "| XSA                      |    8.00 |     0.00 |              0.00 |  8.00 |" in piece.floors()
    assert "| sum                      |   12.00 |     0.00 |              0.00 | 12.00 |" in piece.floors()


def test_trigonometry_and_spills_are_named():
    sources = {"triton_a": "x = tl_math.cos(y) + libdevice.pow(y, 2)", "triton_b": "x = libdevice.tanh(y)"}
    said = cuda_check.report_trigonometry([Graph("backward", [], sources, 0, 0, 0)])
    assert said.splitlines() == [
        "cos, sin or pow in kernels of the 1 graphs: 1",
        "  graph 1 (backward): cos, pow in triton_a",
    ]
    kernels = [
        [
            Assembled("step", "triton_a", "XBLOCK=8", 2, 32, 0, 0),
            Assembled("step", "triton_a", "XBLOCK=4", 2, 255, 12, 0),
        ]
    ]
    said = cuda_check.report_assembled(kernels)
    assert said.splitlines()[0] == "Triton for sm_90a: 1 kernels in 2 configurations, 1 of these spill"
    assert said.splitlines()[1].startswith(
        "  12 bytes spilled, 255 registers, 0 bytes shared by triton_a (XBLOCK=4;"
    )
