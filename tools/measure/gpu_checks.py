"""Run what is to be measured where there is a GPU, entry by entry, and keep what it prints.

    python -m tools.measure.gpu_checks --list
    python -m tools.measure.gpu_checks data --corpus DIR --tokenizer fineweb_1024_bpe.model
    python -m tools.measure.gpu_checks 1
    python -m tools.measure.gpu_checks 4 --dry best      # the same commands at a tiny size, on a CPU

DIR holds train.jsonl.xz and val.jsonl.xz. Their first tokens become shards in data/gpu_checks, 50 MB to take
along to a machine that has a GPU; an entry that finds none there makes them. What the commands print goes to
MACHINE_NAME.txt (of a run that is its log without the source), figures and events go to MACHINE_NAME.jsonl;
`make docs` makes docs/gpu.md's table of them. Settings in the environment hold for all commands, unless
these set them. Where a command fails the others still run, and the status is 1.
"""

import argparse
import os
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

import train_gpt as T
from tools.common.cli import ROOT, Parser, ends_in_one_line, fail
from tools.common.machine import short_name
from tools.common.processes import started
from tools.common.shards import write_shard
from tools.common.tables import table
from tools.data.make_shards import cut, encode, load_tokenizer, read_file

FIGURES = "logs/check_figures.jsonl"  # of one measurement, from the project's root
Settings = Mapping[str, str | int | float]


@dataclass(frozen=True)
class Size:
    """How large all that runs is."""

    data: str  # folder of the shards, from the project's root
    tokens: dict[str, int]  # of text, by split
    steps: int  # that tools.measure.bench times
    kernels: tuple[str, ...]  # of attention; none: PyTorch's choice
    device: str
    settings: Settings = field(default_factory=dict)


FULL = Size(
    data="data/gpu_checks",
    tokens={"train": 24_000_000, "val": 1_000_001},
    steps=20,
    kernels=("cudnn", "flash"),
    device="cuda",
)
DRY = Size(
    data="data/gpu_checks_dry",
    tokens={"train": 100_000, "val": 3001},
    steps=3,
    kernels=(),
    device="cpu",
    settings={
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": 1,  # with so little to do, more get in each other's way
        "NUM_LAYERS": 2,
        "LOOP_LAYERS": 0,
        "PARALLEL_FROM": 1,
        "TRAIN_SEQ_SCHEDULE": "",
        "MODEL_DIM": 32,
        "NUM_HEADS": 2,
        "NUM_KV_HEADS": 1,
        "ROPE_DIMS": 8,
        "VE_LAYERS": 1,
        "TRAIN_SEQ_LEN": 64,
        "TRAIN_BATCH_TOKENS": 1024,
        "ITERATIONS": 3,
        "WARMUP_STEPS": 2,
        "CALIBRATION_TOKENS": 256,
        "EVAL_SEQ_LEN": 64,
        "VAL_BATCH_SIZE": 4096,
        "TTT_CHUNK_TOKENS": 1024,
    },
)


@dataclass(frozen=True)
class Checks:
    """How the commands are run, and where what they print goes."""

    size: Size
    out: Path
    machine: str
    variants: tuple[str, ...]  # of entry 4

    def file(self, name: str, ending: str) -> Path:
        """Returns a file of commands of that name."""
        return self.out / f"{self.machine}_{name}.{ending}"

    def without_paths(self, text: str) -> str:
        """Returns a text without the folders of this machine."""
        folders = (self.out, ROOT, *map(sysconfig.get_path, ("purelib", "platlib", "stdlib")))
        for folder in folders:
            text = text.replace(f"{folder}/", "").replace(str(folder), ".")
        return text


@dataclass(frozen=True)
class Command:
    """A command: words that follow `python`, and its environment."""

    name: str  # of its files; several may share them
    words: tuple[str, ...]
    settings: Settings
    figures: str = ""  # file that it leaves, lines of JSON
    titled: bool = False  # its title stands above what it prints
    seconds: int = 240  # after which it is ended, so that what hangs costs no more

    @property
    def title(self) -> str:
        """The command as one would type it."""
        values = [f"{name}={value}" for name, value in self.settings.items()]
        return " ".join([*values, "python", *self.words])


def train(name: str, seconds: int, settings: Settings) -> Command:
    """Returns a run with so many seconds of training.

    At about 650 ms a step they hold a tenth and less of the record's 7,000 steps. What is counted in steps
    shrinks likewise, or the learning rate would fall from the first step on.
    """
    values = {
        "RUN_ID": f"check_{name}",
        "MAX_WALLCLOCK_SECONDS": seconds,
        "VAL_LOSS_EVERY": 0,
        "TRAIN_LOG_EVERY": 20,
        "WARMDOWN_ITERS": seconds * 3 // 4,
        "MUON_MOMENTUM_WARMUP_STEPS": seconds // 3,
        "EMA_DECAY": 0.96,
    }
    figures, limit = f"logs/check_{name}.jsonl", seconds + 320  # to compile, to export and to score
    return Command(name, ("train_gpt.py",), values | settings, figures, seconds=limit)


def bench(checks: Checks, name: str, words: tuple[str, ...], settings: Settings) -> Command:
    """Returns a measurement on the shards' tokens; `words` say of what."""
    always = ("--shards", "--steps", str(checks.size.steps), "--json", FIGURES)
    return Command(name, ("-m", "tools.measure.bench", *words, *always), settings, FIGURES, titled=True)


def right(checks: Checks) -> list[Command]:
    """Returns the tests of what has to be right on a GPU, with what they measure."""
    words = ("-m", "pytest", "-v", "-rA", "--no-header", "tests/model/test_on_gpu.py")
    return [Command("right", words, {"GPU_TESTS_DEVICE": checks.size.device})]


def bring_up(checks: Checks) -> list[Command]:
    """Returns a short run of the whole recipe, its scoring audited."""
    return [train("bringup", 100, {"AUDIT": 1})]


def training_step(checks: Checks) -> list[Command]:
    """Returns profiles of a step by each attention kernel.

    Then without Inductor's mix-order reduction, some of whose kernels spill registers; the last chooses
    among Triton's products, into which activations can be fused, by timing them.
    """
    commands = []
    for kernel in checks.size.kernels or ("",):  # "": PyTorch's choice
        profile = checks.file(f"step_{kernel or 'default'}", "json.gz")
        chosen = ("--attention", kernel) if kernel else ()
        commands.append(bench(checks, "step", ("train", *chosen, "--profile", str(profile)), {}))
    for option in ({"TORCHINDUCTOR_MIX_ORDER_REDUCTION": 0}, {"TORCHINDUCTOR_MAX_AUTOTUNE_GEMM": 1}):
        commands.append(bench(checks, "step", ("train",), option))
    return commands


STREAM: Settings = {  # frontier's way to score, on the record's model
    "RECIPE": "record",
    "EVAL_MODE": "streaming",
    "TTT_CHUNK_TOKENS": 2048,
    "TTT_EPOCHS": 1,
    "TTT_ENTROPY_ADAPT": 0,
    "TTT_DECAY": 0.005,
}


def scoring(checks: Checks) -> list[Command]:
    """Returns measurements of scoring and TTT, in windows and streaming."""
    window = checks.size.settings.get("EVAL_SEQ_LEN", 2048)
    return [
        bench(checks, "eval", ("score",), {"RECIPE": "record"}),
        bench(checks, "eval", ("score",), {"RECIPE": "record", "EVAL_STRIDE": window}),
        bench(checks, "eval", ("ttt",), {"RECIPE": "record"}),
        bench(checks, "eval", ("score",), STREAM),
        bench(checks, "eval", ("ttt",), STREAM),
        bench(checks, "eval", ("ttt",), {**STREAM, "TORCHINDUCTOR_CUDAGRAPHS": 1}),
    ]


VARIANTS: dict[str, Settings] = {
    "record": {"RECIPE": "record"},
    "frontier": {"RECIPE": "frontier", "VOCAB_SIZE": 1024},  # with FineWeb's small tokenizer
}


def quality(checks: Checks) -> list[Command]:
    """Returns a run of each variant, with equal time."""
    return [train(f"quality_{name}", 240, VARIANTS[name]) for name in checks.variants or VARIANTS]


def nothing(checks: Checks) -> list[Command]:
    """Returns no command."""
    return []


class Entry(NamedTuple):
    """Commands that belong together."""

    commands: Callable[[Checks], list[Command]]
    title: str
    minutes: str  # with PyTorch's start and compilation on a new machine
    needs_data: bool = True


ENTRIES = {
    "data": Entry(nothing, "shards for the others; needs no GPU", "1"),
    "0": Entry(right, "right at all: parity, attention kernels, streams, causality", "1", needs_data=False),
    "1": Entry(bring_up, "bring-up: 100 s of training, artifact, scoring and TTT, audited", "5"),
    "2": Entry(training_step, "where a training step goes: attention kernels, ways to compile", "5"),
    "3": Entry(scoring, "speed of scoring and TTT, in windows and streaming", "4"),
    "4": Entry(quality, f"quality after 240 s of training: {', '.join(VARIANTS)}", "8 each"),
}


def list_of_entries() -> str:
    """Returns what --list prints."""
    rows = [[name, entry.title, entry.minutes] for name, entry in ENTRIES.items()]
    return table(["entry", "what it measures", "minutes"], rows, right=1)


def prepare_data(size: Size, corpus: Path | None, tokenizer: Path | None) -> None:
    """Make tokenizer and shards unless they are there. Raises RunError, OSError."""
    folder = ROOT / size.data
    if (folder / "tokenizer.model").exists():  # it is written last
        print(f"== data: {size.data} as it is; to make it anew, remove it", flush=True)
        return
    if corpus is None or tokenizer is None:
        raise T.RunError(f"{size.data} holds no data yet: give --corpus and --tokenizer")
    start, model = time.perf_counter(), load_tokenizer(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    for split, most in size.tokens.items():
        path = corpus / f"{split}.jsonl.xz"
        documents = (text for text, _ in read_file(path))
        tokens = next(cut((tokens for _, tokens in encode(documents, model)), most), None)
        if tokens is None:
            raise T.RunError(f"{path}: holds no text")
        shard = f"fineweb_{split}_000000.bin"
        write_shard(folder / shard, tokens)
        print(f"== data: {len(tokens):,} tokens in {size.data}/{shard}", flush=True)
    T.write_atomically(folder / "tokenizer.model", tokenizer.read_bytes())
    print(f"== data: took {time.perf_counter() - start:.1f} s", flush=True)


def environment(checks: Checks, command: Command) -> dict[str, str]:
    """Returns the environment of a command."""
    data = checks.size.data
    ours = {"DATA_PATH": data, "TOKENIZER_PATH": f"{data}/tokenizer.model", "PYTHONUNBUFFERED": 1}
    values = ours | dict(checks.size.settings) | dict(command.settings)
    return dict(os.environ) | {name: str(value) for name, value in values.items()}


def run_command(checks: Checks, command: Command) -> str:
    """Run a command, keep what it prints and its figures; return why it failed, "" if it did not."""
    figures, start, failure = ROOT / command.figures, time.perf_counter(), ""
    if command.figures:
        figures.unlink(missing_ok=True)
    with open(checks.file(command.name, "txt"), "a", encoding="utf-8") as log:
        if command.titled:
            print("==", checks.without_paths(command.title), file=log)
        with started(command.words, ROOT, environment(checks, command), command.seconds) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                print(checks.without_paths(line), end="", file=log, flush=True)
        took = time.perf_counter() - start
        if process.returncode:
            failure = f"status {process.returncode}"
            if took >= command.seconds:
                failure = f"not done after {command.seconds} s"
            print("== failed:", failure, file=log)
    if command.figures and figures.exists():
        with open(checks.file(command.name, "jsonl"), "a", encoding="utf-8") as kept:
            kept.write(checks.without_paths(figures.read_text("utf-8")))
    print(f"== {f'failed: {failure},' if failure else 'took'} {took:.1f} s", flush=True)
    return failure


def run_commands(checks: Checks, commands: list[Command]) -> list[str]:
    """Run commands one after another and return what failed, and why. Raises OSError."""
    failed = []
    for folder in (checks.out, ROOT / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    for command in commands:
        for ending in ("txt", "jsonl"):
            checks.file(command.name, ending).unlink(missing_ok=True)
    for number, command in enumerate(commands, start=1):
        title = checks.without_paths(command.title)
        print(f"== {number} of {len(commands)}: {title}", flush=True)
        if failure := run_command(checks, command):
            failed.append(f"{title} ({failure})")
    return failed


def checks_of(args: argparse.Namespace) -> Checks:
    """Returns how the arguments want the commands to be run. Raises RunError."""
    if args.entry is None:
        raise T.RunError("which entry? see --list")
    for name in args.variant:
        if args.entry != "4" or name not in VARIANTS:
            raise T.RunError(f"no variant {name!r}; entry 4 has {', '.join(VARIANTS)}")
    device = torch.device("cuda" if torch.cuda.is_available() and not args.dry else "cpu")
    machine = args.machine or short_name(device)
    return Checks(DRY if args.dry else FULL, args.out.resolve(), machine, tuple(args.variant))


def main(argv: list[str] | None = None) -> None:
    """Run the entry that the arguments name."""
    parser = Parser(__doc__)
    parser.add_argument("entry", nargs="?", choices=ENTRIES, help="what to measure, see --list")
    parser.add_argument("variant", nargs="*", default=[], help=f"of entry 4 (all): {', '.join(VARIANTS)}")
    parser.add_argument("--list", action="store_true", help="print the entries and the minutes they take")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="folder of the text to make shards of")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="SentencePiece model for them")
    parser.add_argument("--out", type=Path, default=ROOT / "logs", help="folder for what is kept (logs)")
    parser.add_argument("--machine", metavar="NAME", help="what the files are named after (h100, h200, ...)")
    parser.add_argument("--dry", action="store_true", help="the same commands at a tiny size, on a CPU")
    args = parser.parse_intermixed_args(argv)
    if args.list:
        print(list_of_entries())
        return
    with ends_in_one_line():
        checks = checks_of(args)
        commands = ENTRIES[args.entry].commands(checks)
        if commands and not args.dry and not torch.cuda.is_available():
            raise T.RunError("no GPU; --dry tries the commands at a tiny size on a CPU")
        if ENTRIES[args.entry].needs_data:
            prepare_data(checks.size, args.corpus, args.tokenizer)
        failed = run_commands(checks, commands)
    if failed:
        fail(f"{len(failed)} of {len(commands)} commands failed: {'; '.join(failed)}", 1)


if __name__ == "__main__":
    main()
