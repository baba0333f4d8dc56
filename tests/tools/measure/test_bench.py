"""tools/measure/bench.py: plausible figures at a tiny size, and its arithmetic against hand counts.
tools/measure/gpu_checks.sh runs.
"""

import gzip
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as T
from tests import commands
from tests.helpers import BASE, attention_by, random_batch, settings, write_shards
from tools.measure import bench, kernels

ROOT = Path(T.__file__).resolve().parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The settings of helpers.py."""
    for name in {*T.FIELDS, "RANK", "LOCAL_RANK", "WORLD_SIZE"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in BASE.items():
        monkeypatch.setenv(name, str(value))


def run(capsys, *arguments):
    """What is printed."""
    bench.main(list(arguments))
    return capsys.readouterr().out


def run_json(capsys, *arguments):
    return json.loads(run(capsys, *arguments, "--json", "-"))


def fails(*arguments):
    """The error, of one line."""
    return commands.fails(bench.main, *arguments)


def check_common(found, name):
    assert (found["bench"], found["processes"], found["dtype"]) == (name, 1, "float32")
    assert found["machine"].startswith("CPU (") and found["torch"] == torch.__version__
    assert found["attention"].startswith("PyTorch")
    assert (
        found["settings"]["MODEL_DIM"] == "32" and "SEED" not in found["settings"]
    )  # those that are not defaults
    assert 50 < found["peak_memory_mib"] < 10_000


def check_speed(found):
    ms = list(found["ms"].values())
    assert ms[0] > 0 and ms == sorted(ms)
    assert found["tokens_per_second"] == pytest.approx(
        1000 * found["tokens_per_step"] / found["ms"]["median"]
    )
    shares = {name: part["share"] for name, part in found["parts"].items()}
    assert list(shares) == list(bench.PARTS) and sum(shares.values()) == pytest.approx(1)
    assert all(0.001 < shares[name] < 0.95 for name in ("attention", "matrices", "loss", "rest"))
    assert found["busy_share"] == pytest.approx(1, abs=1e-3)  # operators' own times add up to the step
    achieved = found["flop_per_token"] * found["tokens_per_second"]
    assert (
        found["share_of_peak"] == pytest.approx(achieved / found["matrix_peak"])
        and 0 < found["share_of_peak"] < 1
    )
    assert found["recompilations"] == found["graph_breaks"] == 0


@pytest.mark.slow
def test_train(capsys, tmp_path):
    trace = tmp_path / "trace.json.gz"
    found = run_json(capsys, "train", "--steps", "3", "--profile", str(trace))
    check_common(found, "train")
    check_speed(found)
    assert found["tokens_per_step"] == 256 and 0.01 < found["parts"]["optimizer"]["share"] < 0.9
    assert found["host_syncs"] == {"step": "none"}
    banks, others = 3 * (4 * 32 * 32 + 2 * 64 * 32 - 2 * 32 * 16), 64 * 32 + 32 * 16 + 16 * 8
    assert found["flop_per_token"] == 6 * (banks + others) + 6 * 3 * 16 * 32
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    assert {bench.STEP, bench.OPTIMIZER, "aten::mm"} <= {event["name"] for event in events}


def test_score(capsys):
    found = run_json(capsys, "score", "--steps", "3")
    check_common(found, "score")
    check_speed(found)
    assert found["tokens_per_step"] == 8 * 4 * 8  # batches of four windows that score eight tokens each
    weights = 3 * 7168 + 64 * 32 + 32 * 16 + 16 * 8
    assert found["flop_per_token"] == 32 / 8 * (2 * weights + 2 * 3 * 32 * 32)


@pytest.mark.slow
def test_ttt(capsys):
    found = run_json(capsys, "ttt", "--steps", "3")
    check_common(found, "ttt")
    check_speed(found)
    split = found["seconds_per_chunk"]
    assert list(split) == ["score", "train", "update"] and min(split.values()) > 0
    assert 0.3 < 1000 * sum(split.values()) / found["ms"]["median"] < 3
    assert found["seconds_per_million_tokens"] == pytest.approx(1000 * found["ms"]["median"] / 48)


def test_artifact(capsys):
    found = run_json(capsys, "artifact", "--steps", "2")
    check_common(found, "artifact")
    assert {"quantize", "pack", "unpack"} <= set(found["artifact_ms"])
    assert all(0 < ms["least"] <= ms["most"] for ms in found["artifact_ms"].values())
    assert found["parameters"] / 4 < found["artifact_bytes"] < 2 * found["parameters"]
    assert found["with_code"] == found["artifact_bytes"] + Path(T.__file__).stat().st_size
    assert found["training_flop_per_token"] == found["with_loops"] > 6 * found["parameters"] / 2  # no loops


def test_layers_that_run_again_count_again(capsys, monkeypatch):
    monkeypatch.setenv("LOOP_LAYERS", "0-1")
    monkeypatch.setenv("LOOP_COUNT", "2")
    found = run_json(capsys, "artifact", "--steps", "1")
    assert 2 < found["with_loops"] / found["training_flop_per_token"] < 3


def test_the_table_and_the_json_say_the_same(capsys, tmp_path):
    path = tmp_path / "score.jsonl"
    lines = run(capsys, "score", "--steps", "2", "--json", str(path)).splitlines()
    found = json.loads(path.read_text())
    cells = dict(
        [cell.strip() for cell in line.strip("|").split("|")][:2] for line in lines if line.startswith("|")
    )
    assert cells["tokens per second"] == f"{found['tokens_per_second']:,.0f}"
    assert cells["attention"] == f"{found['parts']['attention']['ms']:,.2f} ms"
    assert cells["compilations after warm-up"] == "0"
    assert (
        "MODEL_DIM=32" in lines[1]
        and "uniform tokens" in lines[1]
        and f"torch {torch.__version__}" in lines[0]
    )


def test_tokens_come_from_shards_if_wanted(tmp_path, monkeypatch):
    write_shards(tmp_path)
    (tmp_path / "fineweb_train_000000.bin").rename(tmp_path / "fineweb_val_000000.bin")
    s = settings(DATA_PATH=tmp_path)
    tokens = bench.Bench(T.Run(s, CPU), shards=True).tokens(5000)
    assert torch.equal(tokens[:1000], tokens[4000:]) and (tokens[48:96] == 7).all()
    uniform = bench.Bench(T.Run(s, CPU)).tokens(64_000)
    assert uniform.bincount(minlength=64).min() > 800 and uniform.bincount().max() < 1200


# What a step costs


def plain_attention(q, k, v, mask=None):
    """The definition, whose products a counter sees; it computes what the mask then drops."""
    k, v = (t.repeat_interleave(q.size(2) // t.size(2), dim=2).transpose(1, 2) for t in (k, v))
    scores = q.transpose(1, 2) @ k.mT / q.size(-1) ** 0.5
    causal = torch.ones(q.size(1), q.size(1)).tril().log()
    return ((scores + causal).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("extra", [{}, {"BIGRAM_VOCAB_SIZE": 0, "VE_LAYERS": ""}], ids=str)
def test_flop_are_those_that_a_counter_finds(extra):
    s = settings(**extra)
    model, (x, y) = T.GPT(s).initialize(), random_batch(4, 16)
    flop = bench.forward_flop(model, 16)[0] * x.numel()
    masked = 2 * s.num_layers * 16 * s.model_dim * x.numel()
    with attention_by(plain_attention), FlopCounterMode(display=False) as forward:
        nll = model(x, y, model.matrices())
    with FlopCounterMode(display=False) as backward:
        nll.sum().backward()
    assert forward.get_total_flops() == flop + masked
    assert backward.get_total_flops() == 2 * (flop + masked)


def test_flop_at_the_records_size():
    s = T.Settings()
    with torch.device("meta"):
        model = T.GPT(s)
    banks, head, bigrams, values = (
        11 * (2 * 512**2 + 2 * 256 * 512 + 2 * 1536 * 512),
        1024 * 512,
        512 * 128,
        256 * 128,
    )
    assert round(banks / 1e6, 1) == 26.0
    assert (
        3 * bench.forward_flop(model, 2048)[0] == 6 * (banks + head + bigrams + values) + 6 * 11 * 2048 * 512
    )


def test_layers_that_run_again_count_again():
    settings = dict(RECIPE="frontier", VOCAB_SIZE="64", NUM_LAYERS="6", LOOP_LAYERS="2-3", PARALLEL_FROM="4")
    model = T.GPT(T.parse_settings(settings))
    looped = bench.forward_flop(model, 100)[0]
    model.looping = False
    layer = 2 * (4 * 512 * 512 * 3 // 4 + 2 * 4 * 512 * 512) + 2 * 100 * 512
    assert looped - bench.forward_flop(model, 100)[0] == 4 * layer  # two layers, twice more


# Where it goes


@pytest.mark.parametrize(
    "part, name, inside",
    [
        ("attention", "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", ()),
        ("attention", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31", ()),
        ("attention", "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90>>", ()),
        ("attention", "fmha_cutlassB_bf16_aligned_64x64_k64_sm80", ()),
        (
            "attention",
            "void at::native::elementwise_kernel<128, 4>",
            ("aten::_scaled_dot_product_cudnn_attention_backward",),
        ),
        ("matrices", "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", ("aten::mm", "CompiledFunction")),
        ("matrices", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", ()),
        ("matrices", "void cublasLt::splitKreduce_kernel<32, 16, int>", ("aten::mm",)),
        (
            "matrices",
            "Memset (Device)",
            ("aten::mm", "MmBackward0", "autograd::engine::evaluate_function: MmBackward0"),
        ),
        ("matrices", "triton_tem_fused_mm_t_4", ()),
        ("matrices", "aten::addmm", ("aten::linear",)),
        ("rest", "aten::t", ("aten::linear",)),
        (
            "loss",
            "triton_per_fused__log_softmax__to_copy_div_mul_nll_loss_forward_tanh_7",
            ("CompiledFunction",),
        ),
        ("loss", "triton_red_fused__log_softmax_backward_data_nll_loss_backward_tanh_backward_mm_3", ()),
        ("loss", "graph_0_cpp_fused__log_softmax_nll_loss_forward_tanh_5", ()),
        ("loss", "aten::mul", ("TanhBackward0", "autograd::engine::evaluate_function: TanhBackward0")),
        ("rest", "triton_poi_fused__scaled_dot_product_cudnn_attention_cat_mm_mul_9", ("CompiledFunction",)),
        ("rest", "Memcpy HtoD (Pinned -> Device)", ("aten::copy_",)),
        ("optimizer", "nvjet_tst_64x64", ("aten::bmm", "CompiledFunction", bench.OPTIMIZER)),
        ("optimizer", "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", (bench.OPTIMIZER,)),
        ("optimizer", bench.OPTIMIZER, (bench.STEP,)),
    ],
)
def test_kernels_are_told_apart(part, name, inside):
    assert bench.classify(name, (*inside, bench.STEP)) == part


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def test_a_gpus_kernels_belong_where_they_were_launched():
    """Also on the thread of the backward pass; ranges on the GPU count for nothing, and overlaps only once as
    busy.
    """
    found, busy = bench.kernels_of(
        [
            event("user_annotation", bench.STEP, 0, 100),
            event("user_annotation", bench.OPTIMIZER, 50, 20),
            event("cpu_op", "aten::mm", 1, 5),
            event("cuda_runtime", "cudaLaunchKernel", 2, 1, correlation=1),
            event("cpu_op", "aten::bmm", 51, 5),
            event("cuda_driver", "cuLaunchKernelEx", 52, 1, correlation=2),
            event("cpu_op", "TanhBackward0", 20, 9, 2),
            event("cuda_runtime", "cudaLaunchKernel", 21, 1, 2, correlation=3),
            event("cuda_runtime", "cudaMemcpyAsync", 30, 1, correlation=4),
            {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 2, "tid": 1},
            event("gpu_user_annotation", bench.OPTIMIZER, 40, 50, tid=7),
            event("kernel", "a", 10, 20, tid=7, correlation=1),
            event("kernel", "b", 60, 10, tid=7, correlation=2),
            event("kernel", "c", 25, 10, tid=8, correlation=3),
            event("gpu_memcpy", "d", 80, 5, tid=7, correlation=4),
        ]
    )
    assert [tuple(kernel) for kernel in found] == [
        ("a", "matrices", 20),
        ("c", "loss", 10),
        ("b", "optimizer", 10),
        ("d", "rest", 5),
    ]
    assert busy == pytest.approx(0.40)


def test_a_cpus_operators_count_without_those_they_call():
    found, busy = bench.kernels_of(
        [
            event("user_annotation", bench.STEP, 0, 100),
            event("cpu_op", "aten::linear", 10, 50),
            event("cpu_op", "aten::t", 10, 5),
            event("cpu_op", "aten::mm", 20, 40),
            event("cpu_op", "aten::mul", 60, 10),
            event("cpu_op", "aten::stack", 0, 90, tid=2),
        ]
    )  # of the thread that reads ahead
    assert {kernel.name: (kernel.part, kernel.us) for kernel in found} == {
        bench.STEP: ("rest", 40),
        "aten::linear": ("rest", 5),
        "aten::t": ("rest", 5),
        "aten::mm": ("matrices", 40),
        "aten::mul": ("rest", 10),
    }
    assert busy == 1


def test_compilations_after_the_warm_up_are_counted():
    function = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)

    def call(n):
        function(torch.ones(n))
        return {}

    given = bench.Bench(T.Run(settings(), CPU), compiled=True)
    again, other = (bench.after_warm_up(lambda: call(3), partial(call, n), given) for n in (3, 4))
    torch._dynamo.reset()
    assert (again["recompilations"], other["recompilations"], other["graph_breaks"]) == (0, 1, 0)


def test_what_waits_for_the_device_is_named():
    given = bench.Bench(T.Run(settings(), CPU))
    assert (
        bench.host_syncs(lambda: torch.ones(()).item(), given)
        == "aten._local_scalar_dense waits for a tensor's values"
    )
    assert bench.host_syncs(lambda: torch.ones(3).sum(), given) == "none"


# Errors


@pytest.mark.parametrize(
    "arguments, environment, told",
    [
        ([], {}, "the following arguments are required: bench; see --help"),
        (["fly"], {}, "argument bench: invalid choice: 'fly'"),
        (["train", "--steps", "0"], {}, "argument --steps: '0' is not an integer from 1"),
        (["train", "--attention", "flash"], {}, "--attention flash: only GPUs have a choice of kernels"),
        (["score", "--shards"], {"DATA_PATH": "nowhere"}, "DATA_PATH=nowhere has no readable fineweb_val_"),
        (["train", "--shards"], {"DATA_PATH": "nowhere"}, "DATA_PATH=nowhere has no readable fineweb_train_"),
        (["train"], {"NUM_LAYER": "3"}, "NUM_LAYER is no setting; the nearest is NUM_LAYERS"),
        (["train", "--profile", "nowhere/trace.json"], {}, "nowhere/trace.json: there is no folder nowhere"),
        (["train", "--json", "nowhere/figures"], {}, "nowhere/figures: there is no folder nowhere"),
        (["artifact", "--profile", "trace.json"], {}, "--profile: there is no profile of artifact"),
    ],
)
def test_bad_arguments_give_one_line(capsys, monkeypatch, arguments, environment, told):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert fails(*arguments).startswith(told)


@pytest.mark.slow
def test_streaming_is_measured_too(capsys, monkeypatch):
    monkeypatch.setenv("EVAL_MODE", "streaming")
    weights = 3 * 7168 + 64 * 32 + 32 * 16 + 16 * 8
    forward = 2 * weights + 2 * 3 * 32 * 32
    score = run_json(capsys, "score", "--steps", "2")
    check_common(score, "score")
    check_speed(score)
    assert score["tokens_per_step"] == 8 * 48  # eight chunks
    assert score["flop_per_token"] == forward  # each position is computed once
    ttt = run_json(capsys, "ttt", "--steps", "2")
    check_common(ttt, "ttt")
    check_speed(ttt)
    assert ttt["tokens_per_step"] == 48 and ttt["flop_per_token"] == 3 * 3 * forward
    assert min(ttt["seconds_per_chunk"].values()) > 0


def test_single_kernels_are_timed_and_those_that_are_not_here_are_told():
    timer = kernels.Timer(CPU, times=1)
    kernels.time_matrices(timer, 16, 64)
    kernels.time_newton_schulz(timer, 64)
    assert len(timer.lines) == 28 and all(" ms " in line for line in timer.lines)
    timer.line("nothing", lambda: torch.ones(2, device="meta").item())
    assert timer.lines[-1].startswith("nothing") and "does not run: " in timer.lines[-1]
