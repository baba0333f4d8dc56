"""Measure what is to be measured where there is a GPU, entry by entry.

    python -m tools.measure.gpu_checks --list
    python -m tools.measure.gpu_checks 0 1 --corpus FOLDER --tokenizer fineweb_1024_bpe.model
    python -m tools.measure.gpu_checks 4 best --corpus FOLDER --tokenizer T.model --dry

FOLDER holds train.jsonl.xz and val.jsonl.xz; their shards stay in data/gpu_checks. Tables, logs without
their source, and figures as JSON go to --out, named MACHINE_*; `make docs` puts the figures into docs/gpu.md.
--dry runs the same commands at a tiny size, on a CPU too. An entry goes on after a command that fails or
takes too long; the exit status is then 1.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

import train_gpt as T
from tools.common.cli import ROOT, Parser, ends_in_one_line, fail
from tools.common.shards import write_shard

SPAN = 98_304  # tokens of a span of the record's step
TINY = {
    "NUM_LAYERS": 2,
    "MODEL_DIM": 32,
    "NUM_HEADS": 2,
    "NUM_KV_HEADS": 1,
    "ROPE_DIMS": 8,
    "VE_LAYERS": 1,
    "TRAIN_SEQ_LEN": 64,
    "WARMUP_STEPS": 2,
    "TRAIN_BATCH_TOKENS": 1024,
    "ITERATIONS": 3,
    "HOLDOUT_TOKENS": 256,
    "EVAL_SEQ_LEN": 64,
    "VAL_BATCH_SIZE": 4096,
    "TTT_CHUNK_TOKENS": 1024,
}
VARIANTS = {  # of entry 4: what differs from the defaults
    "record": {},
    "best": {"RECIPE": "best"},
    "ema": {"SWA_ENABLED": 0},
}
Settings = dict[str, str | int | float]


@dataclass
class Checks:
    """Runs commands for one machine; `failed` names those that did not end well."""

    machine: str  # begins the names of what is left
    out: Path
    dry: bool
    corpus: Path | None
    tokenizer: Path | None
    variants: list[str]
    failed: list[str] = field(default_factory=list)
    benches: list[str] = field(default_factory=list)  # that were run

    @property
    def data(self) -> Path:
        """The folder of the shards."""
        return ROOT / "data" / ("gpu_checks_dry" if self.dry else "gpu_checks")

    @property
    def settings(self) -> Settings:
        """What all commands are given."""
        data = self.data.relative_to(ROOT)  # where commands run: no log names a place of this machine
        places = {"DATA_PATH": str(data), "TOKENIZER_PATH": str(data / "tokenizer.model")}
        return places | (TINY if self.dry else {})

    def path(self, name: str) -> Path:
        """Returns the path of a file to leave."""
        return self.out / f"{self.machine}_{name}"

    def run(self, title: str, words: list[str], settings: Settings, limit_s: float) -> tuple[int, str]:
        """Run `python WORDS`; return its status and what it printed, of which its last error is shown here.

        One that takes longer than `limit_s` seconds is killed.
        """
        print(f"== {title}: python {' '.join(words)}", flush=True)
        start, environment = time.perf_counter(), {**os.environ}
        environment |= {name: str(value) for name, value in (self.settings | settings).items()}
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, errors = process.communicate(timeout=limit_s)
            status = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
            status = 124
        said = (errors.strip().splitlines() or ["no error"])[-1]
        end = f"status {status}: {said}" if status else "done"
        print(f"== {title}: {end}, {time.perf_counter() - start:.0f} s", flush=True)
        if status:
            self.failed.append(title)
        return status, out

    def make_data(self, val_tokens: int) -> None:
        """Make the shards, unless they are there, and cut validation. Raises RunError, OSError."""
        texts = [self.corpus and self.corpus / f"{split}.jsonl.xz" for split in ("val", "train")]
        for path in (self.tokenizer, *texts):
            if path is None or not path.is_file():
                raise T.RunError(f"{path}: no such file; give --corpus and --tokenizer")
        self.data.mkdir(parents=True, exist_ok=True)
        tokenizer = self.data / "tokenizer.model"
        T.write_atomically(tokenizer, self.tokenizer.read_bytes())
        shard = self.data / "fineweb_val_000000.bin"
        if not shard.exists():
            words = ["-m", "tools.data.make_shards", "--tokenizer", str(tokenizer), "--out", str(self.data)]
            words += ["--val", str(texts[0]), "--train", str(texts[1])]
            if self.run("shards", words, {}, 600)[0]:
                raise T.RunError("the shards could not be made")
        write_shard(shard, T.Shard(shard).read(0, val_tokens).copy())

    def train(self, name: str, seconds: int, settings: Settings) -> None:
        """Train for so many seconds, quantize, score, and leave the log without its source.

        At about 650 ms a step that is a tenth and less of the record's 7,000 steps; what it counts in steps
        shrinks likewise, or the learning rate would fall from the first step on.
        """
        shorter = {
            "RUN_ID": f"check_{name}",
            "MAX_WALLCLOCK_SECONDS": seconds,
            "VAL_LOSS_EVERY": 0,
            "TRAIN_LOG_EVERY": 20,
            "WARMDOWN_ITERS": seconds * 3 // 4,
            "MUON_MOMENTUM_WARMUP_STEPS": seconds // 3,
            "SWA_EVERY": max(1, seconds // 60),
            "EMA_DECAY": 0.96,
        }
        self.run(name, ["train_gpt.py"], shorter | settings, 4 * seconds + 300)
        for suffix in (".txt", ".jsonl"):
            log = ROOT / f"logs/check_{name}{suffix}"
            if log.exists():
                text = log.read_text("utf-8")
                self.path(name + suffix).write_text(text.split(f"\n{'=' * 100}\n")[-1], "utf-8")

    def bench(self, name: str, words: list[str], settings: Settings) -> bool:
        """Add a table of tools.measure.bench to NAME.txt and its figures to NAME.jsonl; return if it ran."""
        steps, trace = 3 if self.dry else 20, self.path(f"{name}_{len(self.benches)}.json.gz")
        self.benches.append(name)
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder, "figures.json")
            more = ["--shards", "--steps", str(steps), "--json", str(figures), "--profile", str(trace)]
            title = " ".join([*(f"{key}={value}" for key, value in settings.items()), *words])
            status, printed = self.run(title, ["-m", "tools.measure.bench", *words, *more], settings, 240)
            with open(self.path(f"{name}.txt"), "a", encoding="utf-8") as file:
                print(f"== {title}\n{printed or 'did not run'}", file=file)
            if status == 0:
                with open(self.path(f"{name}.jsonl"), "a", encoding="utf-8") as file:
                    print(figures.read_text("utf-8").strip(), file=file)
        return status == 0


def right(checks: Checks) -> None:
    """Parity and attention kernels in fp32 and bf16; a changed token changes no earlier score."""
    words = ["-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider", "tests/model/test_on_gpu.py"]
    status, printed = checks.run("right", words, {}, 300)
    checks.path("right.txt").write_text(printed.replace(f"{ROOT}/", ""), "utf-8")
    if status == 5:  # nothing was collected
        raise T.RunError("tests/model/test_on_gpu.py has no tests")


def bring_up(checks: Checks) -> None:
    """100 s of the record, quantization, scoring and TTT on a million tokens, audited."""
    checks.make_data(3001 if checks.dry else 1_000_001)
    checks.train("bringup", 100, {"AUDIT": 1})


def training_step(checks: Checks) -> None:
    """Where a training step goes: attention kernels, micro-batches of one and two spans."""
    checks.make_data(3001 if checks.dry else 1_000_001)
    for suffix in ("txt", "jsonl"):
        checks.path(f"step.{suffix}").unlink(missing_ok=True)
    span, kernels = (128, []) if checks.dry else (SPAN, ["cudnn", "flash"])
    for kernel in ["", *kernels]:
        for spans in (1, 2):
            words = ["train", *(["--attention", kernel] if kernel else [])]
            checks.bench("step", words, {"MICRO_BATCH_TOKENS": spans * span})


def scoring(checks: Checks) -> None:
    """Speed of scoring and of TTT, in windows and streaming."""
    checks.make_data(3001 if checks.dry else 1_000_001)
    for suffix in ("txt", "jsonl"):
        checks.path(f"eval.{suffix}").unlink(missing_ok=True)
    for what, settings in (
        ("score", {"EVAL_STRIDE": 32 if checks.dry else 64}),
        ("score", {"EVAL_STRIDE": 64 if checks.dry else 2048}),
        ("ttt", {"EVAL_STRIDE": 32 if checks.dry else 64}),
        ("score", {"EVAL_MODE": "streaming"}),
        ("ttt", {"RECIPE": "best"}),
    ):
        checks.bench("eval", [what], settings)


def quality(checks: Checks) -> None:
    """Quality at equal time: 240 s of training for each variant."""
    checks.make_data(3001 if checks.dry else 1_000_001)
    for name in checks.variants or VARIANTS:
        checks.train(f"quality_{name}", 240, VARIANTS[name])


class Entry(NamedTuple):
    """Something to measure."""

    action: Callable[[Checks], None]
    minutes: int  # on an H100 or H200, about

    @property
    def title(self) -> str:
        """What it is, in a sentence."""
        return " ".join((self.action.__doc__ or "").split())


ENTRIES = {"0": Entry(right, 1), "1": Entry(bring_up, 4), "2": Entry(training_step, 3)}
ENTRIES |= {"3": Entry(scoring, 3), "4": Entry(quality, 14)}


def machine_of(dry: bool) -> str:
    """Returns what begins the names of this machine's files. Raises RunError if there is no GPU."""
    if dry:
        return "dry"
    if not torch.cuda.is_available():
        raise T.RunError("no GPU; --dry tries the commands on a CPU")
    words = torch.cuda.get_device_name().lower().split()
    return next((word for word in words if any(map(str.isdigit, word))), words[-1])


def listing() -> str:
    """Returns the entries in words."""
    lines = [f"{number}  {entry.minutes:2} min  {entry.title}" for number, entry in ENTRIES.items()]
    return "\n".join([*lines, f"Variants of entry 4: {' '.join(VARIANTS)}"])


def prepare(args: argparse.Namespace) -> tuple[list[Entry], Checks]:
    """Returns the entries to run, and what runs them. Raises RunError."""
    numbers, variants = ([word for word in args.what if word in names] for names in (ENTRIES, VARIANTS))
    strange = [word for word in args.what if word not in numbers + variants]
    if strange or not numbers:
        raise T.RunError(f"{' '.join(strange) or 'nothing'} to measure: see --list")
    args.out.mkdir(parents=True, exist_ok=True)
    machine, out = args.machine or machine_of(args.dry), args.out.resolve()
    paths = [path and path.resolve() for path in (args.corpus, args.tokenizer)]
    return [ENTRIES[number] for number in numbers], Checks(machine, out, args.dry, *paths, variants)


def main(argv: list[str] | None = None) -> None:
    """Measure what the arguments say."""
    parser = Parser(__doc__)
    parser.add_argument("what", nargs="*", help="entries, and variants of entry 4 (all)")
    parser.add_argument("--list", action="store_true", help="say which entries there are")
    parser.add_argument("--corpus", type=Path, help="folder of train.jsonl.xz and val.jsonl.xz")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model of 1,024 tokens")
    parser.add_argument("--out", type=Path, default=ROOT / "logs", help="folder of what is left (logs)")
    parser.add_argument("--machine", default="", help="begins the names of files (h100, h200, ...)")
    parser.add_argument("--dry", action="store_true", help="run the commands at a tiny size, on a CPU too")
    args = parser.parse_args(argv)
    if args.list:
        print(listing())
        return
    with ends_in_one_line():
        entries, checks = prepare(args)
        for entry in entries:
            entry.action(checks)
    if checks.failed:
        fail(f"these did not end well: {', '.join(checks.failed)}", 1)


if __name__ == "__main__":
    main()
