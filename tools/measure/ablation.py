"""Train the record, the frontier and the frontier without each of its parts for the same time; compare.

    python -m tools.measure.ablation data/experiment --seconds 180 --seeds 1337 42 --json logs/ablation.json
    python -m tools.measure.ablation data/experiment --steps 150 --only frontier --try MUON_WD=0.03 MIN_LR=0

--try compares other values of the frontier's settings; with --steps all runs have as many steps, however long
these take, so that rates and decays can be compared on a machine that does other things too.

The folder holds shards and their tokenizer.model; the other settings are tools/ablation.env's. Each run is
train_gpt.py on one thread, --parallel of them at a time, in turns of all variants, so that what else the
machine does hits all alike. Runs leave their logs in --out, where one that has finished is not repeated; what
the comparison needs of them is in --json.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tools.common.cli import ROOT, Parser, check_folder_of, ends_in_one_line, fail, positive, say
from tools.common.machine import machine_name
from tools.common.tables import table
from train_gpt import FIELDS, RECIPES, RunError, parse_settings, show

ENVIRONMENT = ROOT / "tools/ablation.env"
# The frontier's parts at this size, and what a variant without one has instead
SMALL = {
    "RECIPE": "frontier",
    "LOOP_LAYERS": "2-3",
    "PARALLEL_FROM": "4",
    "VE_LAYERS": "",
    "TRAIN_SEQ_SCHEDULE": "256@0,512@0.3",
}
PARTS = {
    "loops": ("LOOP_COUNT",),
    "two lanes": ("PARALLEL_FROM",),
    "skip gates": ("SKIP_GATES",),
    "attention gates": ("ATTN_GATE_CHANNELS",),
    "smear by token": ("SMEAR",),
    "documents": ("DOCUMENT_ATTENTION", "TRAIN_SEQ_SCHEDULE"),
    "row norm, Polar Express": ("MUON_ROW_NORM", "NS_COEFFICIENTS"),
    "warm-down by share": ("WARMDOWN_FRACTION", "MIN_LR"),
    "XSA everywhere, QK gain": ("XSA_LAST_N", "QK_GAIN_INIT"),
    "wider MLP, no bigrams or values": ("MLP_MULT", "BIGRAM_VOCAB_SIZE", "VE_LAYERS"),
}
STAGES = {"averaged": "trained", "final_int6_roundtrip": "quantized", "legal_ttt": "after TTT"}


def variants() -> dict[str, dict[str, str]]:
    """Returns the settings of each variant by its name."""
    found, small = {"record": {"RECIPE": "record"}, "frontier": SMALL}, of_file()
    for part, names in PARTS.items():
        record = {name: small.get(name, show(RECIPES["record"][name.lower()])) for name in names}
        found[f"without {part}"] = SMALL | record
    return found


def of_file() -> dict[str, str]:
    """Returns the settings of the file."""
    lines = ENVIRONMENT.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def environment(folder: Path) -> dict[str, str]:
    """Returns the environment of all runs: no settings but those of the file and the folder."""
    kept = {name: value for name, value in os.environ.items() if name not in FIELDS}
    places = {"DATA_PATH": str(folder), "TOKENIZER_PATH": str(folder / "tokenizer.model")}
    return kept | of_file() | places | {"OMP_NUM_THREADS": "1"}


def read_events(path: Path) -> list[dict[str, Any]]:
    """Returns the events of a run. Raises OSError."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def run(name: str, settings: dict[str, str], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and score a variant; return its figures. Raises RuntimeError with its last line of errors."""
    run_id = re.sub("[^A-Za-z0-9_.=-]+", "_", f"{name} {seed}".replace(",", ""))
    events, path = [], args.out / f"logs/{run_id}.jsonl"
    own = {"RUN_ID": run_id, "SEED": str(seed), "MAX_WALLCLOCK_SECONDS": str(args.seconds)}
    if args.steps:
        own |= {"ITERATIONS": str(args.steps), "MAX_WALLCLOCK_SECONDS": "0"}
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    environ = environment(args.folder.resolve()) | settings | own
    if path.exists():
        events = read_events(path)
    if not events or events[-1]["event"] != "finished":
        done = subprocess.run(command, cwd=args.out, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{run_id}: {(done.stderr.splitlines() or ['no error named'])[-1]}")
        events = read_events(path)
    scores = {event["stage"]: event["val_bpb"] for event in events if event["event"] == "stage"}
    trained = next(event for event in events if event["event"] == "trained")
    found = {"variant": name, "seed": seed, "steps": trained["steps"], "settings": settings}
    found["seconds"] = trained["train_time"] / 1000
    say(f"{name}, seed {seed}: {trained['steps']} steps, {scores['legal_ttt']:.4f}")
    return found | {title: scores[stage] for stage, title in STAGES.items()}


def assignment(text: str) -> tuple[str, str]:
    """Returns name and value of NAME=VALUE. Raises ArgumentTypeError."""
    name, _, value = text.partition("=")
    try:
        parse_settings(environment(Path("data")) | SMALL | {name: value})
        if name not in FIELDS:
            raise RunError(f"{name} is no setting")
    except RunError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    return name, value


def report(rows: list[dict[str, Any]]) -> str:
    """Returns a table of the variants: means over the seeds, and what the frontier gains by each part."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    counts = [what for what in ("steps", "seconds") if all(what in row for row in rows)]
    means = {
        name: {
            what: statistics.mean(row[what] for row in rows if row["variant"] == name)
            for what in (*counts, *STAGES.values())
        }
        for name in names
    }
    lines, last = [], "after TTT"
    for name in names:
        own = [row[last] for row in rows if row["variant"] == name]
        change = means[name][last] - means["frontier"][last]
        values = [f"{means[name][what]:.4f}" for what in STAGES.values()]
        spread = f"{max(own) - min(own):.4f}" if len(own) > 1 else "one seed"
        numbers = [f"{means[name][what]:.0f}" for what in counts]
        lines.append([name, *numbers, *values, spread, f"{change:+.4f}"])
    header = ["variant", *counts, *STAGES.values(), "seeds apart", "above frontier"]
    return table(header, lines)


def main(argv: list[str] | None = None) -> None:
    """Run all variants and compare them."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="shards and tokenizer.model")
    parser.add_argument("--seconds", type=positive, default=180, help="of training (%(default)s)")
    parser.add_argument("--steps", type=positive, help="of training, instead of seconds")
    parser.add_argument(
        "--try",
        nargs="+",
        default=[],
        type=assignment,
        help="other values",
        metavar="NAME=VALUE",
        dest="tried",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 42], help="(%(default)s)")
    parser.add_argument("--parallel", type=positive, default=2, help="runs at a time (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("data/ablation"), help="folder of the runs (%(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=variants(), help="variants (all)", metavar="NAME")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)
    if args.json:
        check_folder_of(args.json)
    with ends_in_one_line():
        args.out.mkdir(parents=True, exist_ok=True)
        machine = machine_name(torch.device("cpu"))
        length = f"{args.steps} steps" if args.steps else f"{args.seconds} s"
        say(f"{machine}, {args.parallel} runs of a thread at a time, {length} of training each")
        chosen = {name: one for name, one in variants().items() if name in (args.only or variants())}
        for name, value in args.tried:
            chosen[f"{name}={value}"] = SMALL | {name: value}
        with ThreadPoolExecutor(args.parallel) as pool:
            jobs = [
                pool.submit(run, name, chosen[name], seed, args) for seed in args.seeds for name in chosen
            ]
            try:
                rows = [job.result() for job in jobs]
            except RuntimeError as e:
                pool.shutdown(cancel_futures=True)
                fail(str(e))
        if args.json:
            budget = {"steps": args.steps} if args.steps else {"seconds": args.seconds}
            args.json.write_text(json.dumps(budget | {"rows": rows}, indent=1) + "\n")
        say(report(rows))


if __name__ == "__main__":
    main()
