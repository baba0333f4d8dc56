"""Report what quantization costs: each matrix's bits and errors, and loss against bytes for three ways to store the weights.

    DATA_PATH=... TOKENIZER_PATH=... python tools/quant_report.py CHECKPOINT_OR_ARTIFACT [--png curve.png] [--json all.json]

A checkpoint holds unrounded weights, as tools/keep_weights.py leaves them. Its report shows the matrices of the artifact
that the settings make of it, then compares, at equal bytes and in fp32,
  rtn+lzma  the record: int6 matrices and int8 tables, rounded to the nearest, packed by xz; the knob widens int6's steps
  rtn+ans   the same rounding, packed as an artifact
  gptq+ans  the steps, the rounding and the packing of an artifact
An artifact holds nothing unrounded: its report shows its matrices.
"""

import argparse
import copy
import io
import json
import lzma
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as T  # noqa: E402
from train_gpt import MOST, PRECISION, RunError  # noqa: E402

Weights, Row = dict[str, Tensor], dict[str, Any]
TOLERANCE, TRIES = 0.002, 16  # of the bytes asked for; roundings to find them
METHODS = {
    "rtn+lzma": ("#000000", "s", "--"),
    "rtn+ans": ("#E69F00", "^", "-."),
    "gptq+ans": ("#0072B2", "o", "-"),
}
MATRIX_COLUMNS = dict(
    matrix="14",
    rows="6",
    columns="8",
    step="9.4f",
    bits="9.4f",
    entropy="9.4f",
    error="9.4f",
    sensitivity="13.2e",
    rise="10.2e",
)
MATRIX_HELP = """\
step: geometric mean, over the rms weight; bits: coded, per weight; entropy: of the matrix's own integers
error: |W - W'| / |W|; sensitivity: mean Fisher information; rise: of the loss, nats per token, as sensitivity and error
foretell it for rounding to the nearest (after GPTQ it is less)
"""
CURVE_COLUMNS = dict(
    method="10",
    knob="8.3f",
    bytes="12,",
    loss="10.6f",
    gap="11.6f",
    gap_error="11.6f",
    gap_bpb="11.6f",
    gap_ratio="11.3f",
    kl="10.6f",
    kl_ratio="10.3f",
    saved_at_kl="13.1%",
    saved_at_gap="14.1%",
)
CURVE_HELP = """\

unrounded: loss %.6f nats per token, %.6f bpb, on %d tokens
knob: times the record's steps (gptq+ans: times steps of that mean); loss, gap above the unrounded weights, its standard
error and KL divergence from their predictions: nats per token; gap_bpb: bits per byte; ratios: to rtn+lzma at as many bytes
saved: share of rtn+lzma's bytes that gptq+ans saves where it loses as much; -: lost in noise, or never as much
"""


def note(line: str) -> None:
    print(time.strftime("%X"), line, file=sys.stderr, flush=True)


def print_table(columns: dict[str, str], rows: list[Row]) -> None:
    for row in [{name: name for name in columns}, *rows]:
        texts = [
            "-"
            if row.get(name) is None
            else row[name]
            if isinstance(row[name], str)
            else format(row[name], form)
            for name, form in columns.items()
        ]
        widths = [int(re.match(r"\d+", form)[0]) for form in columns.values()]
        print(texts[0].ljust(widths[0]), *map(str.rjust, texts[1:], widths[1:]), sep="")


# Input


def read(path: Path) -> tuple[str, Row, Weights, bytes | None]:
    """(tokenizer fingerprint, settings, weights, None) of a checkpoint; of an artifact what it stores, and its bytes. Raises
    RunError, OSError."""
    with open(path, "rb") as file:
        if file.read(len(T.MAGIC)) == T.MAGIC:
            return *T.unpack_artifact(data := path.read_bytes(), path), data
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        kept = {name: T.parse_value(name.upper(), text) for name, text in found["settings"].items()}
        if kept.keys() != set(T.NAMES):
            raise ValueError("it has other settings")
        return found["tokenizer"], kept, {name: w.float() for name, w in found["weights"].items()}, None
    except Exception as e:  # unpickling raises all sorts
        why = " ".join(f"{type(e).__name__}: {e}".split())[:80]
        raise RunError(f"{path}: neither an artifact nor a checkpoint of this version ({why})") from None


def settings_for(environ: Mapping[str, str], kept: Row, path: Path) -> Any:
    """`kept`, the settings that the file at path was made with, under the environment's. Raises RunError for another model's."""
    s = T.parse_settings(environ, kept)
    for name in ["vocab_size", *T.NAMES[T.NAMES.index("num_layers") : T.NAMES.index("matrix_lr")]]:
        if getattr(s, name) != kept[name]:
            raise RunError(
                f"{name.upper()}={T.show(getattr(s, name))}, but {path} was made with {T.show(kept[name])}"
            )
    return s


def prepare(
    args: argparse.Namespace, made_with: str, kept: Row, weights: Weights
) -> tuple[T.GPT, T.ByteTables, Tensor, Tensor]:
    """(model, byte tables, tokens to calibrate on, tokens to score) on the device. Raises RunError."""
    s = settings_for(os.environ, kept, args.file)
    tokenizer, fingerprint = T.load_tokenizer(s.tokenizer_path, s.vocab_size)
    if made_with != fingerprint:
        raise RunError(f"{args.file}: made with another tokenizer than TOKENIZER_PATH={s.tokenizer_path}")
    _, holdout = T.split_holdout(T.open_shards(s.data_path, "train"), s.holdout_tokens, s.train_seq_len)
    holdout = T.check_ids(holdout, s.vocab_size, "held-out tail of the last train shard")
    tokens, window = T.validation_tokens(s.data_path, s.vocab_size, s.eval_seq_len), s.eval_seq_len
    count = min(args.tokens, len(tokens) - 1) // window * window
    if count < 2 * window:
        raise RunError(
            f"--tokens {args.tokens}, of {len(tokens)}: they do not fill two windows of EVAL_SEQ_LEN={window}"
        )
    model, device = T.GPT(s), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise RunError(
            f"{args.file}: not a model of its settings ({' '.join(str(e).split())[:200]})"
        ) from None
    tables = T.ByteTables(*(t.to(device) for t in T.byte_tables(tokenizer)))
    return model.to(device), tables, holdout.to(device), tokens[: count + 1].to(device)


# Matrices


def matrix_table(data: bytes, fisher: Weights, weights: Weights) -> list[Row]:
    """A row for each matrix of an artifact, and the last for all of them; weights: the unrounded ones, if any."""
    stored, end = T.unpack_artifact(data, "to report on")[2], 44 + int.from_bytes(data[40:44], "little")
    with np.load(io.BytesIO(lzma.decompress(data[44:end]))) as file:
        cost = (
            PRECISION - torch.from_numpy(file["frequency"].astype(float)).log2()
        )  # bits of an integer in a context
    rows, rounded = [], T.dequantize(stored)
    for name, whole in stored.items():
        for i in range(math.prod(whole.shape[:-2])) if whole.dtype == torch.int16 else ():
            q, step, near, f, w = (
                t.view(-1, *t.shape[-2:])[i]
                for t in (
                    whole,
                    stored[name + ".scale"].float(),
                    rounded[name],
                    fisher[name].cpu(),
                    weights.get(name, rounded[name]),
                )
            )
            p, error = torch.bincount(q.flatten().int() + MOST).double() / q.numel(), (w - near).square()
            rows.append(
                dict(
                    matrix=f"{name}[{i}]" if whole.dim() > 2 else name,
                    rows=q.size(0),
                    columns=q.size(1),
                    step=(step.log2().mean().exp2() / near.square().mean().sqrt().clamp_min(1e-30)).item(),
                    bits=cost[T.row_contexts(q).long()[:, None], q.long() + MOST].mean().item(),
                    entropy=-torch.xlogy(p, p).sum().item() / math.log(2),
                    sensitivity=f.mean().item(),
                    error=(error.sum() / w.square().sum().clamp_min(1e-30)).sqrt().item()
                    if weights
                    else None,
                    rise=(f * error).sum().item() / 2 if weights else None,
                )
            )
    counts, means = [row["rows"] * row["columns"] for row in rows], ("bits", "entropy", "sensitivity")
    total = {key: float(np.average([row[key] for row in rows], weights=counts)) for key in means}
    total["rise"] = sum(row["rise"] for row in rows) if weights else None
    return rows + [dict(matrix="all", rows=len(rows), columns=sum(counts)) | total]


# Loss against bytes


class Meter:
    """Compares weights with the model's, on tokens (N + 1,) int32 in windows side by side."""

    def __init__(self, model: T.GPT, tokens: Tensor, tables: T.ByteTables, window: int) -> None:
        x, y = (t.view(-1, window).long() for t in (tokens[:-1], tokens[1:]))
        self.rounded, self.tokens, rows = copy.deepcopy(model), x.numel(), max(1, 4096 // window)
        self.x, self.y = x.split(rows), y.split(rows)
        self.bpb_of_nat = self.tokens / math.log(2) / tables.count(x, y).sum().item()
        fits = 4 * self.tokens * model.s.vocab_size <= 2**30  # bytes
        self.before = lru_cache(len(self.x) if fits else 0)(
            lambda i: model.logits(self.x[i]).log_softmax(dim=-1)
        )
        self.loss = self.compare(model.state_dict())["loss"]

    @torch.no_grad()
    def compare(self, weights: Weights) -> Row:
        """Loss, gap above the model's, that gap's standard error, divergence from the model's predictions."""
        self.rounded.load_state_dict(weights)
        windows = []  # means of each
        for i, (x, y) in enumerate(zip(self.x, self.y)):
            before, after = self.before(i), self.rounded.logits(x).log_softmax(dim=-1)
            kl = (before.exp() * (before - after)).sum(dim=-1)
            nll, old = (-p.gather(2, y[..., None])[..., 0] for p in (after, before))
            windows.append(torch.stack((nll, nll - old, kl)).double().mean(dim=2))
        loss, gap, kl = torch.cat(windows, dim=1)
        error, gap = gap.std().item() / math.sqrt(len(gap)), gap.mean().item()
        return dict(
            loss=loss.mean().item(),
            gap=gap,
            gap_error=error,
            gap_bpb=gap * self.bpb_of_nat,
            kl=kl.mean().item(),
        )


def record_limit(name: str) -> int:
    """The largest integer of the record: int6 in the banks, int8 in the other matrices."""
    return 31 if name in T.GPT.BANKS else 127


@torch.no_grad()
def record_steps(model: T.GPT) -> Weights:
    """The record's steps, (..., rows, 1): a clip of each row over the limit."""
    steps = {}
    for name, w in model.quantized().items():
        quantiles, matrices = (
            T.CLIP_QUANTILES if name in model.BANKS else [0.9999984],
            w.view(-1, *w.shape[-2:]),
        )
        steps[name] = torch.cat([T.clip_steps(m, quantiles, record_limit(name)) for m in matrices]).view_as(
            w[..., :1]
        )
    return steps


def record_quantize(weights: Weights, base: Weights, knob: float) -> Weights:
    """To the nearest of the record's steps, int6's times the knob; finer ones clip where the record's do, not at 31 steps."""
    steps = base | {name: (base[name] * knob).clamp(T.TINY, 65504).half().float() for name in T.GPT.BANKS}
    clips = {name: record_limit(name) * step.maximum(base[name]) for name, step in steps.items()}
    return T.quantize(
        weights | {name: weights[name].clamp(-clip, clip) for name, clip in clips.items()}, steps
    )


class Method:
    """A way to store weights: the larger its knob, the fewer bytes."""

    def __init__(
        self, name: str, model: T.GPT, fingerprint: str, factors: dict[str, Any], fisher: Weights
    ) -> None:
        self.name, self.s, self.fingerprint, self.sizes = name, model.s, fingerprint, {}
        self.quantizer, self.coder = name.split("+")
        self.base, self.factors = (
            T.base_steps(model, fisher) if self.quantizer == "gptq" else record_steps(model),
            factors,
        )
        self.weights, self.count = model.state_dict(), sum(w.numel() for w in model.quantized().values())
        self.store = lru_cache(1)(self.store)

    def store(self, knob: float) -> Weights:
        """What it stores, in .sizes[knob] bytes."""
        if self.quantizer == "gptq":
            stored = T.quantize(self.weights, T.scaled(self.base, knob), self.factors)
        else:
            stored = record_quantize(self.weights, self.base, knob)
        if self.coder == "ans":
            self.sizes[knob] = len(T.pack_artifact(self.s, self.fingerprint, stored))
        else:
            parts = [t.to(torch.int8) for t in stored.values() if t.dtype == torch.int16]
            parts += [t for t in stored.values() if t.dtype == torch.half]
            self.sizes[knob] = len(
                lzma.compress(b"".join(t.cpu().numpy().tobytes() for t in parts), preset=9)
            )
        return stored

    def fit(self, target: int) -> float | None:
        """Of the knobs tried, until one comes within TOLERANCE, that with the most bytes that are no more than `target`."""
        aim = (1 - TOLERANCE / 2) * target  # twice the knob takes about a bit from each weight
        for _ in range(TRIES):
            if any((1 - TOLERANCE) * target <= size <= target for size in self.sizes.values()):
                break
            knob = min(self.sizes, key=lambda knob: abs(self.sizes[knob] - aim), default=1.0)
            octaves = 8 * (self.sizes.get(knob, aim) - aim) / self.count
            while knob * 2**octaves in self.sizes:  # a step that was tried and led no nearer
                octaves += math.copysign(1 / 32, octaves)
            self.store(knob * 2**octaves)
        return max(
            (knob for knob, size in self.sizes.items() if size <= target), key=self.sizes.get, default=None
        )

    def point(self, knob: float, meter: Meter) -> Row:
        stored = self.store(knob)
        row = dict(method=self.name, knob=knob, bytes=self.sizes[knob]) | meter.compare(T.dequantize(stored))
        note(f"{self.name}: {row['bytes']:,} bytes, KL {row['kl']:.6f}")
        return row


def curves(methods: list[Method], knobs: list[float], meter: Meter) -> list[Row]:
    """For each of the record's knobs its point and those of the other methods at as many bytes; then points of gptq+ans
    alone, until it has lost as much as the record."""
    rows = []
    for knob in sorted(set(knobs)):
        first = methods[0].point(knob, meter)
        found = [(method, method.fit(first["bytes"])) for method in methods[1:]]
        for row in [first] + [method.point(knob, meter) for method, knob in found if knob]:
            row["gap_ratio"] = row["gap"] / first["gap"] if first["gap"] > 2 * first["gap_error"] else None
            row["kl_ratio"] = row["kl"] / first["kl"] if first["kl"] else None
            rows.append(row)
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
    """Bytes at which row[key] rises past the value as bytes fall; None if it does not, or not just once."""
    rows = sorted(rows, key=lambda row: -row["bytes"])
    passed = [pair for pair in zip(rows, rows[1:]) if (pair[0][key] < value) != (pair[1][key] < value)]
    if len(passed) != 1 or not 0 < passed[0][0][key] < value:
        return None
    return float(np.interp(math.log(value), *zip(*((math.log(row[key]), row["bytes"]) for row in passed[0]))))


def draw(rows: list[Row]) -> bytes:
    """The curves as PNG, to be told apart by colour, by marker and by line."""
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


def report(args: argparse.Namespace) -> None:
    """Raises RunError, OSError."""
    for path in filter(None, (args.png, args.json)):
        if not path.parent.is_dir():
            raise RunError(f"{path}: there is no folder {path.parent}")
    if not all(1 <= knob <= 64 for knob in args.knobs):
        raise RunError("--knobs: allowed are numbers from 1 to 64")
    fingerprint, kept, weights, artifact = read(args.file)
    if args.png and (artifact or not find_spec("matplotlib")):
        raise RunError(
            f"--png {args.png}: {args.file} is an artifact, not a checkpoint with a curve to draw"
            if artifact
            else "--png needs matplotlib: pip install matplotlib"
        )
    model, tables, holdout, tokens = prepare(
        args, fingerprint, kept, T.dequantize(weights) if artifact else weights
    )
    s = model.s
    note(f"calibrating on {len(holdout) - 1:,} tokens of the training shards ({holdout.device})")
    moments, fisher = T.calibrate(model, holdout, s.train_seq_len)
    factors = {name: T.factor(m.clone()) for name, m in moments.items()}
    if artifact:
        found = dict(matrices=matrix_table(artifact, fisher, {}))
    else:  # as train_gpt.py makes it, had late QAT not fixed other steps
        trained = SimpleNamespace(model=model, base=T.base_steps(model, fisher), knob=s.matrix_step)
        with redirect_stdout(sys.stderr):
            data = T.export(
                s, fingerprint, trained, moments, s.artifact_limit - Path(T.__file__).stat().st_size
            )
        found = dict(matrices=matrix_table(data, fisher, weights))
    print(MATRIX_HELP)
    print_table(MATRIX_COLUMNS, found["matrices"])
    if not artifact:
        meter = Meter(model, tokens, tables, s.eval_seq_len)
        rows = curves(
            [Method(name, model, fingerprint, factors, fisher) for name in METHODS], args.knobs, meter
        )
        print(CURVE_HELP % (meter.loss, meter.loss * meter.bpb_of_nat, meter.tokens))
        print_table(CURVE_COLUMNS, rows)
        found |= dict(tokens=meter.tokens, loss=meter.loss, points=rows)
        if args.png:
            T.write_atomically(args.png, draw(rows))
    if args.json:
        T.write_atomically(args.json, (json.dumps(found, indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Report what quantization costs: by matrix, and loss against bytes."
    )
    parser.add_argument("file", type=Path, help="checkpoint of unrounded weights, or artifact")
    parser.add_argument("--tokens", type=int, default=131072, help="validation tokens to score (%(default)s)")
    parser.add_argument(
        "--knobs", type=float, nargs="+", default=[1, 1.25, 1.5, 2, 3, 4], help="of rtn+lzma, from 1 to 64"
    )
    parser.add_argument("--png", type=Path, help="file for a drawing of the curves (needs matplotlib)")
    parser.add_argument("--json", type=Path, help="file for all the numbers")
    try:
        report(parser.parse_args(argv))
    except (RunError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
