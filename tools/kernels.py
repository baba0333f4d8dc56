"""Time single kernels of a GPU at the record's shapes, medians of 20: python tools/kernels.py"""

import sys, math, time, os
import numpy as np, torch, torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path[:0] = [os.getcwd()]
import train_gpt as T

dev = torch.device("cuda")
bf = torch.bfloat16
SMALL = os.environ.get("SMALL")


def ms(f, n=20, warm=3):
    for _ in range(warm):
        f()
    out = []
    for _ in range(n):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        f()
        b.record()
        b.synchronize()
        out.append(a.elapsed_time(b))
    return float(np.median(out))


def line(name, f, flop=0, size=0):
    try:
        t = ms(f)
        print(
            f"{name:58} {t:9.4f} ms"
            + (f"  {flop / t / 1e9:7.1f} TFLOP/s" if flop else "")
            + (f"  {size / t / 1e9:6.3f} TB/s" if size else ""),
            flush=True,
        )
    except Exception as e:
        print(f"{name:58} does not run: {type(e).__name__} {' '.join(str(e).split())[:160]}", flush=True)


print(
    torch.cuda.get_device_name(),
    torch.__version__,
    torch.cuda.get_device_properties(0).total_memory >> 20,
    "MiB",
)
import subprocess

print(
    subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"],
        capture_output=True,
        text=True,
    ).stdout
)
n = 1 << 30
a = torch.empty(n, dtype=bf, device=dev).normal_()
b = torch.empty_like(a)
line("copy 2 x 2.1 GB", lambda: b.copy_(a), size=2 * a.nbytes)
del a, b
x = torch.randn(8192, 8192, device=dev, dtype=bf)
y = torch.randn(8192, 8192, device=dev, dtype=bf)
line("matmul 8192", lambda: x @ y, 2 * 8192**3)
del x, y
M = 98304
for name, k, m in (
    ("qkv", 512, 1024),
    ("o", 512, 512),
    ("up", 512, 1536),
    ("down", 1536, 512),
    ("head", 512, 1024),
    ("up 4x", 512, 2048),
):
    x, w, g = (
        torch.randn(M, k, device=dev, dtype=bf),
        torch.randn(m, k, device=dev, dtype=bf),
        torch.randn(M, m, device=dev, dtype=bf),
    )
    line(
        f"{name} forward ({M}, {k}) -> {m}",
        lambda: F.linear(x, w),
        2 * M * k * m,
        2 * (M * k + k * m + M * m),
    )
    line(f"{name} input gradient", lambda: g @ w, 2 * M * k * m, 2 * (M * k + k * m + M * m))
    line(f"{name} weight gradient", lambda: g.mT @ x, 2 * M * k * m, 2 * (M * k + k * m + M * m))
    del x, w, g


def heads(B, Tq, Tk, H=8, K=4, d=64):
    return [
        torch.randn(B, t, h, d, device=dev, dtype=bf, requires_grad=True)
        for t, h in ((Tq, H), (Tk, K), (Tk, K))
    ]


def both(name, f, inputs, flop):
    line(f"{name} forward", lambda: f(*inputs), flop)
    try:
        g = torch.randn_like(f(*inputs))
    except Exception:
        return
    line(f"{name} forward + backward", lambda: torch.autograd.grad(f(*inputs), inputs, g), 3.5 * flop)


B, L = 48, 2048
flop = 4 * B * 8 * L * L * 64 / 2
q, k, v = heads(B, L, L)
for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

    def f(q, k, v):
        with sdpa_kernel(kernel):
            return T.torch_attention(q, k, v)

    both(f"48 x 2048 causal, {kernel.name}", f, (q, k, v), flop)
both("48 x 2048 causal, PyTorch's own choice", T.torch_attention, (q, k, v), flop)


def repeated(q, k, v):
    k, v = (t.repeat_interleave(2, dim=2) for t in (k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True
        ).transpose(1, 2)


both("48 x 2048 causal, cuDNN, k and v repeated", repeated, (q, k, v), flop)
try:
    import flash_attn_interface

    both("48 x 2048 causal, FlashAttention 3", T.choose_attention(dev)[1], (q, k, v), flop)
except ImportError as e:
    print("FlashAttention 3:", e)
print(
    "flash implementations:",
    getattr(torch.nn.attention, "list_flash_attention_impls", lambda: "none listed")(),
)
try:
    from torch.nn.attention.varlen import varlen_attn

    for length in (2048, 512, 300):
        starts = torch.arange(0, B * L + 1, length, dtype=torch.int32, device=dev)
        if starts[-1] != B * L:
            starts = torch.cat((starts, starts.new_tensor([B * L])))
        for window in ((-1, 0), (2047, 0)):

            def f(q, k, v):
                k, v = (t.repeat_interleave(2, dim=2).flatten(0, 1) for t in (k, v))
                return varlen_attn(q.flatten(0, 1), k, v, starts, starts, 2048, 2048, window_size=window)

            both(
                f"varlen, pieces of {length}, window {window}, k and v repeated",
                f,
                (q, k, v),
                4 * B * 8 * L * length * 64 / 2,
            )
except Exception as e:
    print("varlen:", type(e).__name__, e)
try:
    from torch.nn.attention.flex_attention import flex_attention, create_block_mask

    flex = torch.compile(flex_attention, dynamic=False)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, L, L, device=dev)

    def f(q, k, v):
        return flex(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask, enable_gqa=True).transpose(1, 2)

    both("48 x 2048 causal, flex_attention", f, (q, k, v), flop)
except Exception as e:
    print("flex:", type(e).__name__, str(e)[:200])
del q, k, v
for C, P in ((2048, 2048), (256, 2048), (2048, 3072)):
    q, k, v = heads(1, C, C + P)
    flop = 4 * 8 * C * P * 64
    band = T.band_of(P, C, dev)
    for kernel in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def f(q, k, v):
            with sdpa_kernel(kernel):
                return T.torch_attention(q, k, v, band)

        both(f"stream, {C} behind {P}, band, {kernel.name}", f, (q, k, v), flop)
    both(
        f"stream, {C} behind {P}, band, PyTorch's own choice",
        lambda q, k, v: T.torch_attention(q, k, v, band),
        (q, k, v),
        flop,
    )
    try:
        sq = torch.tensor([0, C], dtype=torch.int32, device=dev)
        sk = torch.tensor([0, C + P], dtype=torch.int32, device=dev)

        def f(q, k, v):
            k, v = (t.repeat_interleave(2, dim=2)[0] for t in (k, v))
            return varlen_attn(q[0], k, v, sq, sk, C, C + P, window_size=(P - 1, 0))

        both(f"stream, {C} behind {P}, varlen window", f, (q, k, v), flop)
    except Exception as e:
        print("varlen stream:", e)
    try:
        mask = create_block_mask(lambda b, h, i, j: (i < j) & (j <= i + P), None, None, C, C + P, device=dev)

        def f(q, k, v):
            return flex(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask, enable_gqa=True).transpose(
                1, 2
            )

        both(f"stream, {C} behind {P}, flex_attention", f, (q, k, v), flop)
    except Exception as e:
        print("flex stream:", type(e).__name__, str(e)[:200])
ns = torch.compile(T.newton_schulz, dynamic=False, fullgraph=True)
for shape in ((22, 512, 512), (22, 256, 512), (11, 1536, 512), (11, 512, 1536)):
    g = torch.randn(*shape, device=dev)
    n, (r, c) = shape[0], (min(shape[1:]), max(shape[1:]))
    for steps in (5, 3):
        line(
            f"Newton-Schulz {steps} steps, {shape}",
            lambda: ns(g, steps),
            steps * n * 2 * (2 * r * r * c + r**3),
        )
