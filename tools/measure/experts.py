"""Let experts of test-time training read a text, and compare mixtures of them: TTT_EXPERTS, TTT_SHARE.

    TOKENIZER_PATH=... python -m tools.measure.experts logs/RUN_ID.bin fineweb_val_000000.bin \\
        --experts "lr=0;lr=0.01;lr=0.02,chunk=256" --keep data/experts --mix 0,1 --mix 0,1,2 --share 0.1 0.3

Each expert reads on its own, as in a run; what it says of each token is kept in --keep, where one that has
read is not run again. Mixtures then cost seconds: each --mix (numbers in --experts; all of them without one)
with each --share, --look-back and --cache (as TTT_CACHE; 0: none). Settings are those of the artifact, over
them the environment's.
"""

import argparse
import hashlib
import json
import os
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import train_gpt as T
from tools.common.cli import Parser, check_folder_of, ends_in_one_line, positive, say
from tools.common.machine import machine_name
from tools.common.tables import table
from tools.common.weights import Weights, read_weights, tables_on


class Losses(T.Hooks):
    """Keeps what an expert says."""

    def on_expert(self, ttt: T.TestTimeTraining) -> None:
        """Copy its losses, (N,)."""
        self.losses = ttt.learner.losses.cpu().numpy()


def scoring_settings(s: T.Settings) -> str:
    """Returns the settings that scoring depends on, as one writes them."""
    return T.assignments(s, [name for name in T.FIELDS if name.startswith(("TTT_", "EVAL_"))])


def read_alone(text: str, s: T.Settings, weights: Weights, tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the losses (N,) of one expert, in nats, and its seconds. Raises RunError."""
    device, hooks = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Losses()
    run = T.Run(replace(s, ttt_experts=text), device, hooks)
    run.log.outputs.clear()
    tables, fingerprint = tables_on(device, s)
    model = weights.model(run, fingerprint)
    ids = T.check_ids(tokens, s.vocab_size, "the text").to(device)
    evaluation = T.Evaluation(run, model, ids, tables)
    start = time.perf_counter()
    evaluation.ttt.run()
    return hooks.losses, time.perf_counter() - start


def experts_losses(args: argparse.Namespace, s: T.Settings, weights: Weights) -> list[dict[str, Any]]:
    """Returns each expert's name, losses and seconds, run or from the folder. Raises RunError, OSError."""
    found, data = [], args.file.read_bytes()
    tokens = T.Shard(args.shard).read(0, args.tokens + 1 if args.tokens else None)
    common = scoring_settings(replace(s, ttt_experts="", ttt_cache=0, ttt_share=0, ttt_share_tokens=1))
    for text in T.expert_settings(s):
        what = hashlib.sha256(data + tokens.tobytes() + f"{common} {text}".encode())
        path = args.keep / f"{args.file.stem}_{what.hexdigest()[:16]}.npz" if args.keep else None
        if path and path.exists():
            kept = np.load(path)
            losses, seconds = kept["losses"], float(kept["seconds"])
        else:
            losses, seconds = read_alone(text, s, weights, tokens)
            if path:
                np.savez(path, losses=losses, seconds=seconds)
        found.append({"expert": text, "losses": losses, "seconds": seconds})
        say(f"{text}: {losses.mean():.4f} nats per token, {seconds:.0f} s")
    return found


def mixtures(
    args: argparse.Namespace, found: list[dict[str, Any]], ids: Tensor, size: T.Score
) -> list[dict[str, Any]]:
    """Returns the score of each set with each share, look-back and cache; `size` knows the text's bytes."""
    rows = []
    for chosen in args.mix or [list(range(len(found)))]:
        experts = torch.from_numpy(np.stack([found[k]["losses"] for k in chosen]))
        for share, look_back, cache in product(args.share, args.look_back, args.cache):
            start, losses = time.perf_counter(), experts
            mixed, weights = T.mix(losses, share, look_back)
            if cache:
                losses = torch.cat((losses, T.cache_losses(ids, mixed, cache)))
                mixed, weights = T.mix(losses, share, look_back)
            row = {"mix": chosen, "share": share, "look_back": look_back, "cache": cache}
            row["bpb"] = size._replace(nats=mixed.sum().item()).val_bpb
            row["seconds"] = time.perf_counter() - start
            rows.append(row | {"weights": weights.mean(dim=1).tolist()})
    return rows


def experts_report(found: dict[str, Any]) -> str:
    """Returns the tables of the experts and of their mixtures."""
    experts = found["experts"]
    alone = [
        [str(k), expert["expert"], f"{expert['bpb']:.4f}", f"{expert['seconds']:.0f}"]
        for k, expert in enumerate(experts)
    ]
    best, rows = min(expert["bpb"] for expert in experts), []
    for row in found["mixtures"]:
        own = min(experts[k]["bpb"] for k in row["mix"])
        gains = [f"{row['bpb'] - bpb:+.4f}" for bpb in (own, best)]
        which = [
            ",".join(map(str, row["mix"])),
            f"{row['share']:g}",
            str(row["look_back"]),
            str(row["cache"]),
        ]
        rows.append([*which, f"{row['bpb']:.4f}", *gains])
    header = [
        "mixture of",
        "share",
        "look back",
        "cache",
        "val_bpb",
        "above its best",
        "above the best of all",
    ]
    first = table(["", "expert", "val_bpb", "seconds"], alone, right=2)
    return f"{first}\n\n{table(header, rows, right=6)}"


def numbers(text: str) -> list[int]:
    """Returns the integers in a text such as 0,2,3. Raises ValueError."""
    return [int(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> None:
    """Compare what the arguments say and print it."""
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="artifact, or checkpoint of tools.measure.keep_weights")
    parser.add_argument("shard", type=Path, help="shard of the text to score")
    parser.add_argument("--experts", required=True, help="as TTT_EXPERTS")
    parser.add_argument("--tokens", type=positive, help="score the shard's first N tokens (all)", metavar="N")
    parser.add_argument("--keep", type=Path, help="folder of experts' scores")
    parser.add_argument("--cache", nargs="+", default=["0"], help="orders (0)", metavar="N")
    parser.add_argument("--mix", type=numbers, action="append", help="experts to mix, such as 0,2,3 (all)")
    parser.add_argument("--share", type=float, nargs="+", default=[0.2], help="(%(default)s)")
    parser.add_argument("--look-back", type=positive, nargs="+", default=[100], help="targets (%(default)s)")
    parser.add_argument("--title", default="", help="what the weights are, for the figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args(argv)
    with ends_in_one_line():
        check_folder_of(args.json)
        args.cache = [T.parse_value("TTT_CACHE", text) for text in args.cache]
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
        weights = read_weights(args.file)
        own = {"EVAL_MODE": "streaming", "TTT_ENABLED": "1", "TTT_EXPERTS": args.experts, "TTT_CACHE": "0"}
        s = weights.settings(os.environ | own | {"EVAL_MAX_SECONDS": "1e9"})
        count = len(T.expert_settings(s))
        for bad in (k for mix in args.mix or [] for k in mix if not 0 <= k < count):
            raise T.RunError(f"--mix: {bad} is no number of an expert")
        experts = experts_losses(args, s, weights)
        tables, _ = tables_on(torch.device("cpu"), s)
        ids = torch.from_numpy(T.Shard(args.shard).read(0, len(experts[0]["losses"]) + 1).astype(np.int64))
        size = T.Score(tokens=len(ids) - 1, bytes=int(tables.count(ids[:-1], ids[1:]).sum()))
        found = {
            "title": args.title or args.file.stem,
            "machine": machine_name(torch.device("cpu")),
            "tokens": size.tokens,
            "settings": scoring_settings(s),
            "mixtures": mixtures(args, experts, ids, size),
        }
        for expert in experts:
            nats = float(expert.pop("losses").sum(dtype=np.float64))
            expert["bpb"] = size._replace(nats=nats).val_bpb
        found["experts"] = experts
        say("\n" + experts_report(found))
        if args.json:
            T.write_atomically(args.json, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
