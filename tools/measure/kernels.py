"""Time single kernels at the record's shapes, medians of 20.

    python -m tools.measure.kernels

On a GPU; --small tries what is here at a small size, on a CPU too.
"""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_gpt as T
from tools.common.cli import Parser, ends_in_one_line, one_line
from tools.common.machine import machine_name, timed

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
H, K, D = 8, 4, 64  # query heads, key and value heads, width of a head
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@dataclass
class Timer:
    """Times functions on a device and prints a line for each."""

    device: torch.device
    times: int = 20
    dtype: torch.dtype = torch.bfloat16
    lines: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        """Print a line."""
        self.lines.append(line)
        print(line, flush=True)

    def line(self, name: str, f: Callable[[], object], flop: float = 0, size: float = 0) -> None:
        """Time a function of so much FLOP, which moves `size` bytes, or say why it does not run."""
        try:
            timed(f, 3, self.device)
            ms = 1000 * float(np.median(timed(f, self.times, self.device)))
        except Exception as e:  # kernels that are not there raise all sorts
            self.say(f"{name:58} does not run: {one_line(e, 160)}")
            return
        speed = f"  {flop / ms / 1e9:7.1f} TFLOP/s" if flop else ""
        rate = f"  {size / ms / 1e9:6.3f} TB/s" if size else ""
        self.say(f"{name:58} {ms:9.4f} ms{speed}{rate}")

    def both(self, name: str, attention: Attention, inputs: list[Tensor], flop: float) -> None:
        """Time an attention kernel forward, and forward and backward."""
        self.line(f"{name} forward", lambda: attention(*inputs), flop)

        def step() -> None:
            out = attention(*inputs)
            torch.autograd.grad(out, inputs, out.detach())

        self.line(f"{name} forward + backward", step, 3.5 * flop)

    def random(self, *shape: int) -> Tensor:
        """Returns a random tensor in the timer's type."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def heads(self, B: int, queries: int, keys: int) -> list[Tensor]:
        """Returns queries (B, queries, H, D), keys and values (B, keys, K, D) that take gradients."""
        shapes = ((B, queries, H, D), (B, keys, K, D), (B, keys, K, D))
        return [self.random(*shape).requires_grad_() for shape in shapes]


def by_backend(backend: SDPBackend, mask: Tensor | None = None) -> Attention:
    """Returns PyTorch's attention by one of its kernels."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return T.attention(q, k, v, mask)

    return attention


def by_cudnn_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns causal attention by cuDNN, keys and values repeated for each query head."""
    k, v = (t.repeat_interleave(H // K, dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def by_flex(seen: Callable[..., Tensor], queries: int, keys: int, device: torch.device) -> Attention:
    """Returns compiled flex_attention with a rule for which key a query sees."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention, dynamic=False)
    mask = create_block_mask(seen, None, None, queries, keys, device=str(device))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flex(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return attention


def by_varlen(query_starts: Tensor, key_starts: Tensor, most: tuple[int, int], window: int) -> Attention:
    """Returns attention in pieces that begin at the starts, have at most so many queries and keys, and see a
    window.
    """
    from torch.nn.attention.varlen import varlen_attn

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(H // K, dim=2).flatten(0, 1) for t in (k, v))
        return varlen_attn(q.flatten(0, 1), k, v, query_starts, key_starts, *most, window_size=(window, 0))

    return attention


def try_both(
    timer: Timer, name: str, make: Callable[[], Attention], inputs: list[Tensor], flop: float
) -> None:
    """Time a kernel that this PyTorch may lack."""
    try:
        attention = make()
    except Exception as e:  # of the library that is not there, or of its compiler
        timer.say(f"{name}: {one_line(e)}")
        return
    timer.both(name, attention, inputs, flop)


def time_matrices(timer: Timer, rows: int, square: int) -> None:
    """Time copying, a large product and the products of a layer for so many tokens."""
    a = timer.random(rows * 1024)
    b = torch.empty_like(a)
    timer.line(f"copy 2 x {a.nbytes / 1e9:.1f} GB", lambda: b.copy_(a), size=2 * a.nbytes)
    x, y = timer.random(square, square), timer.random(square, square)
    timer.line(f"matmul {square}", lambda: x @ y, 2 * square**3)
    shapes = {"qkv": (512, 1024), "o": (512, 512), "up": (512, 1536), "down": (1536, 512)}
    shapes |= {"head": (512, 1024), "up 4x": (512, 2048)}
    for name, (k, m) in shapes.items():
        time_product(timer, name, (rows, k, m))


def time_product(timer: Timer, name: str, shape: tuple[int, int, int]) -> None:
    """Time x W^T of (rows, k) by (m, k), and both gradients."""
    rows, k, m = shape
    x, w, g = timer.random(rows, k), timer.random(m, k), timer.random(rows, m)
    flop, size = 2 * rows * k * m, 2 * (rows * k + k * m + rows * m)
    timer.line(f"{name} forward ({rows}, {k}) -> {m}", lambda: F.linear(x, w), flop, size)
    timer.line(f"{name} input gradient", lambda: g @ w, flop, size)
    timer.line(f"{name} weight gradient", lambda: g.mT @ x, flop, size)


def time_training_attention(timer: Timer, B: int, L: int) -> None:
    """Time causal attention of B sequences of L positions."""
    inputs, name = timer.heads(B, L, L), f"{B} x {L} causal"
    flop = 4 * B * H * L * L * D / 2
    for backend in BACKENDS:
        timer.both(f"{name}, {backend.name}", by_backend(backend), inputs, flop)
    timer.both(f"{name}, PyTorch's own choice", T.attention, inputs, flop)
    timer.both(f"{name}, cuDNN, k and v repeated", by_cudnn_repeated, inputs, flop)
    kernels = getattr(torch.nn.attention, "list_flash_attention_impls", list)()  # from PyTorch 2.11 on
    timer.say(f"flash implementations that can be activated: {kernels}")
    for length in (L, L // 4, 300 * L // 2048):
        ends = chain(range(0, B * L, length), (B * L,))
        starts = torch.tensor(list(ends), dtype=torch.int32, device=timer.device)
        for window in (-1, L - 1):
            title = f"varlen, pieces of {length}, window {window}, k and v repeated"
            piece_flop = 4 * B * H * L * length * D / 2
            try_both(
                timer,
                title,
                lambda starts=starts, window=window: by_varlen(starts, starts, (L, L), window),
                inputs,
                piece_flop,
            )
    try_both(
        timer,
        f"{name}, flex_attention",
        lambda: by_flex(lambda b, h, i, j: i >= j, L, L, timer.device),
        inputs,
        flop,
    )


def time_stream_attention(timer: Timer, C: int, P: int) -> None:
    """Time attention of C positions behind P, each of which sees P."""
    inputs, name = timer.heads(1, C, C + P), f"stream, {C} behind {P}"
    flop, mask = 4 * H * C * P * D, T.window_mask(P, C, timer.device)

    def by_choice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return T.attention(q, k, v, mask)

    for backend in BACKENDS[1:]:
        timer.both(f"{name}, mask, {backend.name}", by_backend(backend, mask), inputs, flop)
    timer.both(f"{name}, mask, PyTorch's own choice", by_choice, inputs, flop)
    queries, keys = (torch.tensor([0, n], dtype=torch.int32, device=timer.device) for n in (C, C + P))
    try_both(timer, f"{name}, varlen", lambda: by_varlen(queries, keys, (C, C + P), P - 1), inputs, flop)
    try_both(
        timer,
        f"{name}, flex_attention",
        lambda: by_flex(lambda b, h, i, j: (i < j) & (j <= i + P), C, C + P, timer.device),
        inputs,
        flop,
    )


def time_newton_schulz(timer: Timer, scale: int) -> None:
    """Time Newton-Schulz iterations of the banks, whose matrices are `scale` times as small."""
    for n, rows, columns in ((22, 512, 512), (22, 256, 512), (11, 1536, 512), (11, 512, 1536)):
        g = torch.randn(n, rows // scale, columns // scale, device=timer.device)
        r, c = sorted(g.shape[1:])
        for steps in (5, 3):
            name = f"Newton-Schulz {steps} steps, {tuple(g.shape)}"
            flop = steps * n * 2 * (2 * r * r * c + r**3)
            timer.line(name, lambda g=g, steps=steps: T.orthogonalize(g, steps), flop)


def describe(timer: Timer) -> None:
    """Print what machine this is."""
    timer.say(f"{machine_name(timer.device)}, torch {torch.__version__}")
    if timer.device.type == "cuda":
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit"
        found = subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True)
        timer.say(found.stdout)


def main(argv: list[str] | None = None) -> None:
    """Time all of it."""
    parser = Parser(__doc__)
    parser.add_argument("--small", action="store_true", help="at a small size, each once; on a CPU too")
    args = parser.parse_args(argv)
    with ends_in_one_line():
        if not args.small and not torch.cuda.is_available():
            raise T.RunError("no GPU; --small tries it on a CPU")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        timer = Timer(device, 1 if args.small else 20)
        describe(timer)
        time_matrices(timer, 64 if args.small else 98304, 128 if args.small else 8192)
        time_training_attention(timer, *((1, 128) if args.small else (48, 2048)))
        for queries, past in ((32, 64),) if args.small else ((2048, 2048), (256, 2048), (2048, 3072)):
            time_stream_attention(timer, queries, past)
        time_newton_schulz(timer, 32 if args.small else 1)


if __name__ == "__main__":
    main()
