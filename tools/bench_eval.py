"""Compare ways to score: mode, settings, val_bpb, seconds and tokens/s side by side.

    TOKENIZER_PATH=... python tools/bench_eval.py CHECKPOINT_OR_ARTIFACT SHARD
    torchrun --standalone --nproc_per_node=2 tools/bench_eval.py logs/RUN_ID.bin fineweb_val_000000.bin --tokens 200000 \\
        --row "RECIPE=best TTT_ENABLED=0" --row "RECIPE=best TTT_LR=0.07 TTT_CHUNK_TOKENS=128"

A row is a set of settings, on top of those the weights were made with and of the environment's. Each starts from the
weights in the file and scores the same tokens, as train_gpt.py does last. Without --row: sliding windows, streaming, the
record's TTT and RECIPE=best's. A GPU is compiled for first, and that is not timed.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import train_gpt as T  # noqa: E402
from bench import Parser, compile_newton_schulz, ends_in_one_line, now, positive  # noqa: E402
from quant_report import read, settings_for  # noqa: E402
from readme import scoring_report  # noqa: E402
from train_gpt import RunError  # noqa: E402

ROWS = [f"RECIPE={recipe} TTT_ENABLED={ttt}" for ttt in (0, 1) for recipe in T.RECIPES]
SHOWN = [
    "eval_stride",
    "eval_window",
    "ttt_chunk_tokens",
    "ttt_epochs",
    "ttt_lr",
    "ttt_muon",
    "ttt_decay",
    "ttt_entropy_adapt",
    "ttt_freeze_blocks",
]  # of what a row's score depends on


def say(line: str) -> None:
    """Print it, on rank 0."""
    if T.rank() == 0:
        print(line, flush=True)


def settings_of(row: str, kept: dict[str, Any], path: Path) -> Any:
    """Those of a row, for the weights at path that were made with `kept`. Raises RunError."""
    words = dict(word.partition("=")[::2] for word in row.split())
    for name in words:
        if name not in T.FIELDS:
            raise RunError(f"--row {row!r}: {name} is no setting of train_gpt.py")
    return settings_for({**os.environ, **words}, kept, path)


def shown(s: Any) -> str:
    """The settings that a row's score depends on, as one writes them."""
    names = [name for name in SHOWN if name.startswith("eval_") or s.ttt_enabled]
    names.remove("eval_window" if s.eval_mode == "sliding" else "eval_stride")
    values = {name: getattr(s, name) for name in names} | (
        {"eval_window": s.eval_window or s.eval_seq_len}
        if s.eval_mode == "streaming"
        else {"eval_seq_len": s.eval_seq_len}
    )
    return " ".join(f"{name.upper()}={T.show(value)}" for name, value in values.items())


def prepare(
    args: argparse.Namespace, device: torch.device
) -> tuple[list[Any], Callable, torch.Tensor, T.ByteTables]:
    """(the rows' settings, a function that makes the model, tokens to score (N + 1,), byte tables). Raises RunError, OSError."""
    made_with, kept, weights, data = read(args.file)
    settings = [settings_of(row, kept, args.file) for row in args.row or ROWS]
    s = settings[0]
    tokenizer, fingerprint = T.load_tokenizer(s.tokenizer_path, s.vocab_size)
    if fingerprint != made_with:
        raise RunError(f"{args.file}: made with another tokenizer than TOKENIZER_PATH={s.tokenizer_path}")
    tokens = T.check_ids(
        T.open_shard(args.shard)[: args.tokens + 1 if args.tokens else None], s.vocab_size, args.shard
    )
    if len(tokens) < 2:
        raise RunError(f"{args.shard}: one token, so that there is nothing to score")
    weights = T.dequantize(weights) if data else weights
    attention, dtype = (
        T.choose_attention(device)[1],
        torch.bfloat16 if device.type == "cuda" else torch.float32,
    )

    def model_of(s: Any) -> T.GPT:
        model = T.GPT(s, attention, dtype)
        model.load_state_dict(weights)
        return model.on(device)

    return (
        settings,
        model_of,
        tokens.to(device),
        T.ByteTables(*(t.to(device) for t in T.byte_tables(tokenizer))),
    )


def measure(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """A dict for each row; its seconds are those of each round, in which the rows take turns."""
    settings, model_of, tokens, tables = T.together(lambda: prepare(args, device))
    found = [
        dict(mode=s.eval_mode + " + TTT" * s.ttt_enabled, settings=shown(s), seconds=[]) for s in settings
    ]
    for _ in range(args.repeat):
        for s, row in zip(settings, found):
            model = model_of(s)
            T.compile_scoring(s, model, tables)
            start = now(device)
            name, stage = list(
                T.scoring_stages(s, model, tokens, tables, lambda: now(device) - start).items()
            )[-1]
            score = stage()
            row["seconds"].append(now(device) - start)
            row |= dict(stage=name, tokens=int(score.tokens), val_loss=score.val_loss, val_bpb=score.val_bpb)
            say(
                f"{row['mode']}: val_bpb {score.val_bpb:.5f} in {row['seconds'][-1]:.1f} s ({row['settings']})"
            )
    return found


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Compare ways to score on the same weights and tokens.")
    parser.add_argument("file", type=Path, help="artifact, or checkpoint of tools/keep_weights.py")
    parser.add_argument("shard", type=Path, help="shard of the text to score")
    parser.add_argument("--tokens", type=positive, help="score the shard's first N tokens (all)", metavar="N")
    parser.add_argument(
        "--repeat", type=positive, default=1, help="rounds to time (%(default)s)", metavar="N"
    )
    parser.add_argument(
        "--row", action="append", help="settings to compare, such as 'RECIPE=best TTT_LR=0.01'"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args(argv)
    with ends_in_one_line():
        if args.json and not args.json.parent.is_dir():
            raise RunError(f"{args.json}: no such folder")
        device = T.start_processes()
        if device.type == "cuda":
            compile_newton_schulz()
        machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})"
        say(time.strftime("%Y-%m-%d ") + f"bench_eval.py {args.file.name} {args.shard.name}")
        found = dict(
            machine=f"{T.world_size()} x {machine}", torch=torch.__version__, rows=measure(args, device)
        )
        say("\n" + scoring_report(found))
        if args.json and T.rank() == 0:
            T.write_atomically(args.json, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
