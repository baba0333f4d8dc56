"""Report what quantization costs: by matrix, and loss against bytes for three ways.

    DATA_PATH=... TOKENIZER_PATH=... python -m tools.measure.quant_report \\
        CHECKPOINT_OR_ARTIFACT [--png curve.png]

A checkpoint holds unrounded weights, as tools.measure.keep_weights leaves them. Its report shows the
matrices of the artifact that the settings make of it, then compares, at equal bytes and in fp32,
  rtn+lzma  the record: int6 matrices and int8 tables, rounded to the nearest, packed by xz; the knob widens
            int6's steps
  rtn+ans   the same rounding, packed as an artifact
  gptq+ans  the steps, the rounding and the packing of an artifact
An artifact holds nothing unrounded: its report shows its matrices.
"""

import argparse
import io
import json
import lzma
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import train_gpt as T
from tools.common.cli import Parser, check_folder_of, ends_in_one_line
from tools.common.weights import FullPrecision, read_weights, tables_on

Tensors = dict[str, Tensor]
Row = dict[str, Any]
TOLERANCE = 0.002  # of the bytes asked for
TRIES = 16  # of rounding, to find them
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)  # of the record's int6
METHODS = {
    "rtn+lzma": ("#000000", "s", "--"),
    "rtn+ans": ("#E69F00", "^", "-."),
    "gptq+ans": ("#0072B2", "o", "-"),
}
MATRIX_COLUMNS = {
    "matrix": "14",
    "rows": "6",
    "columns": "8",
    "step": "9.4f",
    "bits": "9.4f",
    "entropy": "9.4f",
    "error": "9.4f",
    "sensitivity": "13.2e",
    "rise": "10.2e",
}
MATRIX_HELP = """\
step: geometric mean, over the rms weight; bits: coded, per weight; entropy: of the matrix's own integers
error: |W - W'| / |W|; sensitivity: mean Fisher information; rise: of the loss, nats per token, as sensitivity
and error foretell it for rounding to the nearest (after GPTQ it is less)
"""
CURVE_COLUMNS = {
    "method": "10",
    "knob": "8.3f",
    "bytes": "12,",
    "loss": "10.6f",
    "gap": "11.6f",
    "gap_error": "11.6f",
    "gap_bpb": "11.6f",
    "gap_ratio": "11.3f",
    "kl": "10.6f",
    "kl_ratio": "10.3f",
    "saved_at_kl": "13.1%",
    "saved_at_gap": "14.1%",
}
CURVE_HELP = """\

unrounded: loss %.6f nats per token, %.6f bpb, on %d tokens
knob: times the record's steps (gptq+ans: times 12 steps in a row's rms); loss, gap above the unrounded
weights, its standard error and KL divergence from their predictions: nats per token; gap_bpb: bits per
byte; ratios: to rtn+lzma at as many bytes; saved: share of rtn+lzma's bytes that gptq+ans saves where it
loses as much; -: lost in noise, or never as much
"""


def note(line: str) -> None:
    """Say on standard error what is going on."""
    print(time.strftime("%X"), line, file=sys.stderr, flush=True)


def print_table(columns: dict[str, str], rows: list[Row]) -> None:
    """Print rows in columns, name: format that begins with the width; - stands for what is not known."""
    widths = [int(re.match(r"\d+", form)[0]) for form in columns.values()]

    def text(value: Any, form: str) -> str:
        if value is None:
            return "-"
        return value if isinstance(value, str) else format(value, form)

    for row in [{name: name for name in columns}, *rows]:
        first, *others = (text(row.get(name), form) for name, form in columns.items())
        print(first.ljust(widths[0]), *map(str.rjust, others, widths[1:]), sep="")


# Input


class Subject(NamedTuple):
    """What the report is on."""

    model: T.GPT  # unrounded, or as an artifact stores it
    data: bytes | None  # the artifact
    fingerprint: str  # of the tokenizer
    tables: T.ByteTables
    holdout: Tensor  # tokens to calibrate on (n + 1,)
    tokens: Tensor  # to score (N + 1,)

    def run(self) -> T.Run:
        """Returns the run that it would be of."""
        return FullPrecision(self.model.s, self.tokens.device)


def prepare(args: argparse.Namespace) -> Subject:
    """Returns what the arguments name. Raises RunError, OSError."""
    weights = read_weights(args.file)
    if args.png and weights.data:
        raise T.RunError(
            f"--png {args.png}: {args.file} is an artifact, not a checkpoint with a curve to draw"
        )
    if args.png and not find_spec("matplotlib"):
        raise T.RunError("--png needs matplotlib: pip install matplotlib")
    s, device = weights.settings(os.environ), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tables, fingerprint = tables_on(device, s)
    model = weights.model(FullPrecision(s, device), fingerprint)
    first = T.read_stream(T.open_shards(s.data_path, "train"), 0, s.calibration_tokens + 1)
    held = T.check_ids(first, s.vocab_size, "first train shard")
    tokens, window = T.validation_tokens(s.data_path, s.vocab_size, s.eval_seq_len), s.eval_seq_len
    count = min(args.tokens, len(tokens) - 1) // window * window
    if count < 2 * window:
        wanted = f"--tokens {args.tokens}, of {len(tokens)}"
        raise T.RunError(f"{wanted}: they do not fill two windows of EVAL_SEQ_LEN={window}")
    return Subject(model, weights.data, fingerprint, tables, held.to(device), tokens[: count + 1].to(device))


# Matrices


class Matrix(NamedTuple):
    """A matrix (rows, columns) of an artifact."""

    name: str
    integers: Tensor
    step: Tensor  # (rows, 1)
    rounded: Tensor
    fisher: Tensor  # (rows, 1)
    unrounded: Tensor | None


def matrices_of(stored: Tensors, fisher: Tensors, weights: Tensors) -> list[Matrix]:
    """Returns the matrices of an artifact; weights: the unrounded ones, if any."""
    found, rounded = [], T.dequantize(stored)
    for name, whole in stored.items():
        if whole.dtype != torch.int16:
            continue
        parts = [whole, stored[name + ".scale"].float(), rounded[name], fisher[name].cpu()]
        parts += [weights[name].cpu()] if weights else []
        stacks = [t.view(-1, *t.shape[-2:]) for t in parts]
        for i in range(len(stacks[0])):
            own = f"{name}[{i}]" if whole.dim() > 2 else name
            matrix = [stack[i] for stack in stacks]
            found.append(Matrix(own, *matrix[:4], matrix[4] if weights else None))
    return found


def matrix_row(matrix: Matrix, cost: Tensor) -> Row:
    """Returns the row of a matrix; cost (contexts, symbols): bits of an integer in a context."""
    q, near = matrix.integers, matrix.rounded
    p = torch.bincount(q.flatten().int() + T.MOST).double() / q.numel()
    step = matrix.step.log2().mean().exp2() / near.square().mean().sqrt().clamp_min(1e-30)
    row = {"matrix": matrix.name, "rows": q.size(0), "columns": q.size(1), "step": step.item()}
    row["bits"] = cost[T.row_contexts(q).long()[:, None], q.long() + T.MOST].mean().item()
    row["entropy"] = -torch.xlogy(p, p).sum().item() / math.log(2)
    row |= {"sensitivity": matrix.fisher.mean().item(), "error": None, "rise": None}
    if matrix.unrounded is not None:
        error = (matrix.unrounded - near).square()
        row["error"] = (error.sum() / matrix.unrounded.square().sum().clamp_min(1e-30)).sqrt().item()
        row["rise"] = (matrix.fisher * error).sum().item() / 2
    return row


def matrix_table(data: bytes, fisher: Tensors, weights: Tensors) -> list[Row]:
    """Returns a row for each matrix of an artifact and one for all; weights: the unrounded ones, if any."""
    with np.load(io.BytesIO(lzma.decompress(data[T.SIDE_START : T.side_bytes(data)]))) as file:
        cost = T.PRECISION - torch.from_numpy(file["frequency"].astype(float)).log2()
    stored = T.unpack_artifact(data, "to report on").stored
    rows = [matrix_row(matrix, cost) for matrix in matrices_of(stored, fisher, weights)]
    counts = [row["rows"] * row["columns"] for row in rows]
    total: Row = {"matrix": "all", "rows": len(rows), "columns": sum(counts)}
    for key in ("bits", "entropy", "sensitivity"):
        total[key] = float(np.average([row[key] for row in rows], weights=counts))
    total["rise"] = sum(row["rise"] for row in rows) if weights else None
    return [*rows, total]


# Loss against bytes


class Meter:
    """Compares weights with the model's, on tokens (N + 1,) int32 in windows side by side."""

    def __init__(self, model: T.GPT, tokens: Tensor, tables: T.ByteTables, window: int) -> None:
        x, y = (t.view(-1, window).long() for t in (tokens[:-1], tokens[1:]))
        self.model, self.rounded = model, T.GPT(model.s, dtype=model.dtype).to(tokens.device)
        self.tokens, rows = x.numel(), max(1, 4096 // window)
        self.x, self.y = x.split(rows), y.split(rows)
        self.bpb_of_nat = self.tokens / math.log(2) / tables.count(x, y).sum().item()
        fits = 4 * self.tokens * model.s.vocab_size <= 2**30  # bytes
        self.before = lru_cache(len(self.x) if fits else 0)(self.predictions)
        self.loss = self.compare(model.state_dict())["loss"]

    def predictions(self, i: int) -> Tensor:
        """Returns the model's log probabilities (rows, window, V) of the i-th rows."""
        return self.model.logits(self.x[i]).log_softmax(dim=-1)

    @torch.no_grad()
    def compare(self, weights: Tensors) -> Row:
        """Returns loss, gap above the model's, that gap's standard error, divergence from the model's
        predictions.
        """
        self.rounded.load_state_dict(weights)
        windows = []  # means of each
        for i, (x, y) in enumerate(zip(self.x, self.y, strict=True)):
            before, after = self.before(i), self.rounded.logits(x).log_softmax(dim=-1)
            kl = (before.exp() * (before - after)).sum(dim=-1)
            nll, old = (-p.gather(2, y[..., None])[..., 0] for p in (after, before))
            windows.append(torch.stack((nll, nll - old, kl)).double().mean(dim=2))
        losses, gaps, kl = torch.cat(windows, dim=1)
        gap = gaps.mean().item()
        return {
            "loss": losses.mean().item(),
            "gap": gap,
            "gap_error": gaps.std().item() / math.sqrt(len(gaps)),
            "gap_bpb": gap * self.bpb_of_nat,
            "kl": kl.mean().item(),
        }


def clip_steps(
    w: Tensor, quantiles: Sequence[float], limit: int, floor: float = T.TINY, dtype: torch.dtype = torch.half
) -> Tensor:
    """Returns the record's steps (rows, 1) of w (rows, columns): the quantile of |w| of least error."""
    clips = torch.quantile(w.abs(), w.new_tensor(quantiles), dim=1, keepdim=True)  # (quantiles, rows, 1)
    steps = [(clip / limit).clamp_min(floor).to(dtype).float() for clip in clips]
    errors = [((w / step).round().clamp(-limit, limit) * step - w).square().mean().item() for step in steps]
    return steps[errors.index(min(errors))]


def record_limit(name: str) -> int:
    """Returns the largest integer of the record: int6 in the banks, int8 in the other matrices."""
    return 31 if name in T.GPT.BANKS else 127


@torch.no_grad()
def record_steps(model: T.GPT) -> T.Steps:
    """Returns the record's steps, (..., rows, 1): a clip of each row over the limit."""
    steps = {}
    for name, w in model.quantized().items():
        quantiles = CLIP_QUANTILES if name in model.BANKS else [0.9999984]
        matrices = w.view(-1, *w.shape[-2:])
        clipped = [clip_steps(m, quantiles, record_limit(name)) for m in matrices]
        steps[name] = torch.cat(clipped).view_as(w[..., :1])
    return steps


def record_quantize(weights: Tensors, base: T.Steps, knob: float) -> Tensors:
    """Returns weights to the nearest of the record's steps, int6's times the knob.

    Finer steps clip where the record's do, not at 31 steps.
    """
    steps = base | {name: (base[name] * knob).clamp(T.TINY, 65504).half().float() for name in T.GPT.BANKS}
    clipped = dict(weights)
    for name, step in steps.items():
        clip = record_limit(name) * step.maximum(base[name])
        clipped[name] = weights[name].clamp(-clip, clip)
    return T.quantize(clipped, steps)


class Method:
    """A way to store weights: the larger its knob, the fewer bytes."""

    def __init__(self, name: str, subject: Subject, factors: Mapping[str, T.Factor], fisher: T.Steps) -> None:
        model = subject.model
        self.name, self.s, self.fingerprint = name, model.s, subject.fingerprint
        self.sizes: dict[float, int] = {}  # bytes of each knob tried
        self.last: tuple[float, Tensors] | None = None  # knob and what it stored
        self.quantizer, self.coder = name.split("+")
        self.factors = factors
        self.base = T.base_steps(model, fisher) if self.quantizer == "gptq" else record_steps(model)
        self.weights, self.count = model.state_dict(), sum(w.numel() for w in model.quantized().values())

    def quantized(self, knob: float) -> Tensors:
        """Returns the weights, rounded."""
        if self.quantizer == "gptq":
            return T.quantize(self.weights, T.scaled(self.base, knob), self.factors)
        return record_quantize(self.weights, self.base, knob)

    def packed(self, stored: Tensors) -> bytes:
        """Returns rounded weights, coded."""
        if self.coder == "ans":
            return T.pack_artifact(self.s, self.fingerprint, stored)
        parts = [t.to(torch.int8) for t in stored.values() if t.dtype == torch.int16]
        parts += [t for t in stored.values() if t.dtype == torch.half]
        return lzma.compress(b"".join(t.cpu().numpy().tobytes() for t in parts), preset=9)

    def store(self, knob: float) -> Tensors:
        """Returns what it stores, in .sizes[knob] bytes."""
        if self.last is None or self.last[0] != knob:
            self.last = knob, self.quantized(knob)
            self.sizes[knob] = len(self.packed(self.last[1]))
        return self.last[1]

    def fit(self, target: int) -> float | None:
        """Returns the knob with the most bytes that are no more than `target`, of those tried until one is
        near.
        """
        aim = (1 - TOLERANCE / 2) * target  # twice the knob takes about a bit from each weight
        for _ in range(TRIES):
            if any((1 - TOLERANCE) * target <= size <= target for size in self.sizes.values()):
                break
            knob = min(self.sizes, key=lambda tried: abs(self.sizes[tried] - aim), default=1.0)
            octaves = 8 * (self.sizes.get(knob, aim) - aim) / self.count
            while knob * 2**octaves in self.sizes:  # a step that was tried and led no nearer
                octaves += math.copysign(1 / 32, octaves)
            self.store(knob * 2**octaves)
        small = [knob for knob, size in self.sizes.items() if size <= target]
        return max(small, key=self.sizes.__getitem__, default=None)

    def point(self, knob: float, meter: Meter) -> Row:
        """Returns a row of the curve."""
        stored = self.store(knob)
        row = {"method": self.name, "knob": knob, "bytes": self.sizes[knob]}
        row |= meter.compare(T.dequantize(stored))
        note(f"{self.name}: {row['bytes']:,} bytes, KL {row['kl']:.6f}")
        return row


def points_of_equal_size(methods: list[Method], knob: float, meter: Meter) -> list[Row]:
    """Returns the point of a knob of the record's, and those of the other methods at as many bytes."""
    first, *others = methods
    record = first.point(knob, meter)
    rows = [record]
    for method in others:
        fitting = method.fit(record["bytes"])
        if fitting:
            rows.append(method.point(fitting, meter))
    for row in rows:
        clear = record["gap"] > 2 * record["gap_error"]
        row["gap_ratio"] = row["gap"] / record["gap"] if clear else None
        row["kl_ratio"] = row["kl"] / record["kl"] if record["kl"] else None
    return rows


def curves(methods: list[Method], knobs: Sequence[float], meter: Meter) -> list[Row]:
    """Returns the points of the record's knobs and of as many bytes; then those of gptq+ans until it loses as
    much.
    """
    rows = [row for knob in sorted(set(knobs)) for row in points_of_equal_size(methods, knob, meter)]
    record = [row for row in rows if row["method"] == "rtn+lzma"]
    for _ in range(TRIES):
        if rows[-1]["method"] != "gptq+ans" or rows[-1]["kl"] >= record[-1]["kl"]:
            break
        rows.append(methods[-1].point(1.5 * rows[-1]["knob"], meter))
    best = [row for row in rows if row["method"] == "gptq+ans"]
    for row in record:
        for key in ("kl", "gap") if row["gap_ratio"] else ("kl",):
            size = bytes_at(row[key], key, best)
            row["saved_at_" + key] = size and 1 - size / row["bytes"]
    return rows


def bytes_at(value: float, key: str, rows: list[Row]) -> float | None:
    """Returns the bytes at which row[key] rises past the value as bytes fall; None if it does not, or not
    just once.
    """
    ordered = sorted(rows, key=lambda row: -row["bytes"])
    passed = [(a, b) for a, b in pairwise(ordered) if (a[key] < value) != (b[key] < value)]
    if len(passed) != 1 or not 0 < passed[0][0][key] < value:
        return None
    x, y = zip(*((math.log(row[key]), row["bytes"]) for row in passed[0]), strict=True)
    return float(np.interp(math.log(value), x, y))


def draw(rows: list[Row]) -> bytes:
    """Returns the curves as PNG, to be told apart by colour, by marker and by line."""
    from matplotlib.figure import Figure

    figure, file = Figure(figsize=(7, 4.5), layout="constrained"), io.BytesIO()
    axes = figure.subplots()
    for method, (colour, marker, line) in METHODS.items():
        points = sorted((row["bytes"] / 1e6, row["kl"]) for row in rows if row["method"] == method)
        axes.plot(
            *np.reshape(points, (-1, 2)).T, line, color=colour, marker=marker, markersize=5, label=method
        )
    axes.set(
        yscale="log",
        xlabel="stored weights (million bytes)",
        ylabel="KL from the unrounded model (nats per token)",
    )
    axes.grid(which="both", linewidth=0.3)
    axes.legend()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def artifact_of(subject: Subject, calibration: T.Calibration) -> bytes:
    """Returns the artifact of unrounded weights."""
    model, s = subject.model, subject.model.s
    copied = T.Calibration({name: m.clone() for name, m in calibration.moments.items()}, calibration.fisher)
    limit = s.artifact_limit - Path(T.__file__).stat().st_size
    with redirect_stdout(sys.stderr):
        return T.export(subject.run(), model, subject.fingerprint, copied, limit)


def report(args: argparse.Namespace) -> None:
    """Print and write what the arguments ask for. Raises RunError, OSError."""
    check_folder_of(args.png)
    check_folder_of(args.json)
    if not all(1 <= knob <= 64 for knob in args.knobs):
        raise T.RunError("--knobs: allowed are numbers from 1 to 64")
    subject = prepare(args)
    model, holdout = subject.model, subject.holdout
    note(f"calibrating on {len(holdout) - 1:,} tokens of the training shards ({holdout.device})")
    calibration = T.calibrate(model, holdout, model.s.train_seq_len)
    data = subject.data or artifact_of(subject, calibration)
    unrounded = {} if subject.data else model.state_dict()
    found: dict[str, Any] = {"matrices": matrix_table(data, calibration.fisher, unrounded)}
    print(MATRIX_HELP)
    print_table(MATRIX_COLUMNS, found["matrices"])
    if not subject.data:
        factors = {name: T.factor(m) for name, m in calibration.moments.items()}
        meter = Meter(model, subject.tokens, subject.tables, model.s.eval_seq_len)
        methods = [Method(name, subject, factors, calibration.fisher) for name in METHODS]
        rows = curves(methods, args.knobs, meter)
        print(CURVE_HELP % (meter.loss, meter.loss * meter.bpb_of_nat, meter.tokens))
        print_table(CURVE_COLUMNS, rows)
        found |= {"tokens": meter.tokens, "loss": meter.loss, "points": rows}
        if args.png:
            T.write_atomically(args.png, draw(rows))
    if args.json:
        T.write_atomically(args.json, (json.dumps(found, indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> None:
    """Report on the file that the arguments name."""
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="checkpoint of unrounded weights, or artifact")
    parser.add_argument("--tokens", type=int, default=131072, help="validation tokens to score (%(default)s)")
    parser.add_argument(
        "--knobs", type=float, nargs="+", default=[1, 1.25, 1.5, 2, 3, 4], help="of rtn+lzma, from 1 to 64"
    )
    parser.add_argument("--png", type=Path, help="file for a drawing of the curves (needs matplotlib)")
    parser.add_argument("--json", type=Path, help="file for all the numbers")
    args = parser.parse_args(argv)
    with ends_in_one_line():
        report(args)


if __name__ == "__main__":
    main()
