"""Compare ways to score: mode, settings, val_bpb, seconds and tokens/s side by side.

    TOKENIZER_PATH=... python -m tools.measure.bench_eval CHECKPOINT_OR_ARTIFACT SHARD
    torchrun --standalone --nproc_per_node=2 -m tools.measure.bench_eval logs/RUN_ID.bin \\
        fineweb_val_000000.bin --tokens 200000 --row "EVAL_MODE=streaming TTT_ENABLED=0" \\
        --row "EVAL_MODE=streaming TTT_LR=0.07 TTT_CHUNK_TOKENS=128"

A row is a set of settings, on top of those the weights were made with and of the environment's. Each starts
from the weights in the file and scores the same tokens, as train_gpt.py does last. Without --row: sliding
windows and streaming, without and with TTT. A GPU is compiled for first, and that is not timed.
"""

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train_gpt as T
from tools.common.cli import Parser, check_folder_of, ends_in_one_line, positive, say
from tools.common.machine import machine_name, now
from tools.common.tables import table
from tools.common.weights import Weights, read_weights, tables_on

STREAM = (
    "EVAL_MODE=streaming TTT_ENTROPY_ADAPT=0 TTT_EPOCHS=1 TTT_CHUNK_TOKENS=2048 TTT_LR=0.01 TTT_DECAY=0.005"
)
ROWS = [f"{mode} TTT_ENABLED={ttt}" for ttt in (0, 1) for mode in ("EVAL_MODE=sliding", STREAM)]
TTT_SHOWN = (
    "ttt_chunk_tokens",
    "ttt_epochs",
    "ttt_lr",
    "ttt_muon",
    "ttt_decay",
    "ttt_entropy_adapt",
)  # of what a score with test-time training depends on


@dataclass
class Text:
    """What is scored, and by what."""

    weights: Weights
    tokens: Tensor  # (N + 1,) int32, on the device
    tables: T.ByteTables
    fingerprint: str  # of the tokenizer


def settings_of(row: str, weights: Weights) -> T.Settings:
    """Returns the settings of a row for some weights. Raises RunError."""
    words = dict(word.partition("=")[::2] for word in row.split())
    for name in words:
        if name not in T.FIELDS:
            raise T.RunError(f"--row {row!r}: {name} is no setting of train_gpt.py")
    return weights.settings({**os.environ, **words})


def shown(s: T.Settings) -> str:
    """Returns the settings that a row's score depends on, as one writes them."""
    if s.eval_mode == "streaming":
        values: dict[str, Any] = {"eval_seq_len": s.eval_seq_len}
    else:
        values = {"eval_stride": s.eval_stride, "eval_seq_len": s.eval_seq_len}
    if s.ttt_enabled:
        values |= {name: getattr(s, name) for name in TTT_SHOWN}
    return " ".join(f"{name.upper()}={T.show(value)}" for name, value in values.items())


def prepare(args: argparse.Namespace, device: torch.device) -> tuple[list[T.Settings], Text]:
    """Returns the rows' settings and what to score. Raises RunError, OSError."""
    weights = read_weights(args.file)
    settings = [settings_of(row, weights) for row in args.row or ROWS]
    tables, fingerprint = tables_on(device, settings[0])
    shard = T.Shard(args.shard).read(0, args.tokens + 1 if args.tokens else None)
    tokens = T.check_ids(shard, settings[0].vocab_size, args.shard).to(device)
    if len(tokens) < 2:
        raise T.RunError(f"{args.shard}: one token, so that there is nothing to score")
    return settings, Text(weights, tokens, tables, fingerprint)


def score(s: T.Settings, text: Text, device: torch.device) -> tuple[str, T.Score, float]:
    """Returns the last stage of scoring by some settings, its score and its seconds. Raises RunError."""
    run = T.Run(s, device)
    model = text.weights.model(run, text.fingerprint)
    T.compile_scoring(run, model, text.tables)
    start = now(device)
    name, stage = list(T.Evaluation(run, model, text.tokens, text.tables).stages.items())[-1]
    return name, stage(), now(device) - start


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Returns a dict for each row; its seconds are those of each round, in which the rows take turns.

    Raises RunError.
    """
    settings, text = T.together(lambda: prepare(args, device))
    found: list[dict[str, Any]] = []
    for s in settings:
        mode = s.eval_mode + (" + TTT" if s.ttt_enabled else "")
        found.append({"mode": mode, "settings": shown(s), "seconds": []})
    for _ in range(args.repeat):
        for s, row in zip(settings, found, strict=True):
            with redirect_stdout(sys.stderr):  # what train_gpt.py says on the way
                stage, scored, seconds = score(s, text, device)
            row["seconds"].append(seconds)
            row |= {"stage": stage, "tokens": int(scored.tokens)}
            row |= {"val_loss": scored.val_loss, "val_bpb": scored.val_bpb}
            say(f"{row['mode']}: val_bpb {scored.val_bpb:.5f} in {seconds:.1f} s ({row['settings']})")
    return found


def varying(rows: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Returns the names of the settings that differ between rows that depend on them, and NAME=value of the
    others.
    """
    values: dict[str, set[str]] = {}
    for row in rows:
        for name, value in values_of(row).items():
            values.setdefault(name, set()).add(value)
    differing = [name for name, found in values.items() if len(found) > 1]
    return differing, [f"{name}={found.pop()}" for name, found in values.items() if len(found) == 1]


def values_of(row: dict[str, Any]) -> dict[str, str]:
    """Returns the settings that a row depends on, by their names."""
    return dict(word.split("=", 1) for word in row["settings"].split())


def scoring_report(found: dict[str, Any]) -> str:
    """Returns the table, with a column for each setting that differs; changes and speed are against the first
    row.
    """
    first, rows = found["rows"][0], []
    differing, same = varying(found["rows"])
    for row in found["rows"]:
        seconds = statistics.median(row["seconds"])
        rows.append(
            [
                row["mode"],
                *(values_of(row).get(name, "") for name in differing),
                f"{row['val_bpb']:.5f}",
                f"{row['val_bpb'] - first['val_bpb']:+.5f}",
                f"{seconds:.1f}",
                f"{row['tokens'] / seconds:,.0f}",
                f"{statistics.median(first['seconds']) / seconds:.2f}",
            ]
        )
    short = [name.removeprefix("TTT_").lower().replace("_", " ") for name in differing]
    header = ["mode", *short, "val_bpb", "change", "seconds", "tokens/s", "speed"]
    times = len(first["seconds"])
    seconds_are = f"median of {times}, taking turns" if times > 1 else "of one run"
    where = f"{found['machine']}, torch {found['torch']}"
    notes = f"On {first['tokens']:,} tokens, {where}; seconds: {seconds_are}.\nWhere it counts: " + ", ".join(
        f"`{word}`" for word in same
    )
    return f"{table(header, rows, right=len(header) - 1)}\n\n{notes}."


def main(argv: list[str] | None = None) -> None:
    """Compare what the arguments say and print it."""
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="artifact, or checkpoint of tools.measure.keep_weights")
    parser.add_argument("shard", type=Path, help="shard of the text to score")
    parser.add_argument("--tokens", type=positive, help="score the shard's first N tokens (all)", metavar="N")
    parser.add_argument(
        "--repeat", type=positive, default=1, help="rounds to time (%(default)s)", metavar="N"
    )
    parser.add_argument(
        "--row", action="append", help="settings to compare, such as 'EVAL_MODE=streaming TTT_LR=0.01'"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args(argv)
    with ends_in_one_line():
        check_folder_of(args.json)
        device = T.start_processes()
        torch._dynamo.config.recompile_limit = 64  # as train_gpt.py does
        say(time.strftime("%Y-%m-%d ") + f"bench_eval {args.file.name} {args.shard.name}")
        machine = f"{T.world_size()} x {machine_name(device)}"
        found = {"machine": machine, "torch": torch.__version__, "rows": measure(args, device)}
        say("\n" + scoring_report(found))
        if args.json and T.rank() == 0:
            T.write_atomically(args.json, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
