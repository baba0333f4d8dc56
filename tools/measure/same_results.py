"""Show that a rearrangement changed no digit: run small cases before and after, and compare.

    python -m tools.measure.same_results main
    python -m tools.measure.same_results HEAD~3 streaming resumed     # only these cases

"Here" is the working tree, committed or not: train_gpt.py with its tools/. Compared are, as text, the losses
of each step, validations, the knob of the quantizer, the exact scores of all stages, the chunks of TTT and
what the audit found. The artifacts' bytes are compared for a remark only, since they also hold the settings,
to which a revision may add. All cases take two to three minutes on two cores. The status is 1 if anything
differs.
"""

import hashlib
import io
import lzma
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import sentencepiece

import train_gpt as T
from tools.common.cli import ROOT, Parser, ends_in_one_line, fail
from tools.common.processes import end_group, started
from tools.common.shards import write_shard
from tools.common.tables import table
from tools.data import demo_data
from tools.data.make_shards import encode, train_tokenizer

LIMIT = 300  # seconds of a run, which takes six on a core of its own
DOCUMENTS = 40  # modules of the standard library, from which the text is made
SHARDS = {"val_000000": (0, 3003), "train_000000": (3003, 23_003), "train_000001": (23_003, 43_003)}
SETTINGS = {
    "VOCAB_SIZE": demo_data.VOCAB_SIZE,
    "NUM_LAYERS": 3,
    "MODEL_DIM": 64,
    "NUM_HEADS": 4,
    "NUM_KV_HEADS": 2,
    "MLP_MULT": 2,
    "ROPE_DIMS": 8,
    "VE_LAYERS": "1,2",
    "VE_DIM": 64,
    "XSA_LAST_N": 2,
    "BIGRAM_VOCAB_SIZE": 128,
    "BIGRAM_DIM": 64,
    "TRAIN_SEQ_LEN": 64,
    "TRAIN_BATCH_TOKENS": 1024,
    "ITERATIONS": 10,
    "WARMUP_STEPS": 1,
    "WARMDOWN_ITERS": 20,
    "MAX_WALLCLOCK_SECONDS": 0,
    "VAL_LOSS_EVERY": 5,
    "TRAIN_LOG_EVERY": 1,
    "CALIBRATION_TOKENS": 1024,
    "EVAL_SEQ_LEN": 64,
    "EVAL_STRIDE": 16,
    "VAL_BATCH_SIZE": 16384,
    "TTT_CHUNK_TOKENS": 512,
    "TTT_BATCH_SEQS": 3,
}
STREAMING = {"EVAL_MODE": "streaming", "TTT_CHUNK_TOKENS": 160}
NO_EXTRAS = {"BIGRAM_VOCAB_SIZE": 0, "VE_LAYERS": "", "EMA_DECAY": 0, "TTT_ENABLED": 0}


@dataclass(frozen=True)
class Case:
    """A configuration: what differs from SETTINGS, and how it is run."""

    settings: dict[str, str | float] = field(default_factory=dict)
    processes: int = 1
    room: int = 0  # bytes for the artifact, whatever the size of the code; 0: the challenge's limit for both
    kills: tuple[
        str, ...
    ] = ()  # with which the line begins whose second ends a process; then another goes on


CASES = {
    "windows": Case(),
    "windows_2": Case(processes=2),
    "sgd": Case({"TTT_MUON": 0}),
    "streaming": Case(STREAMING | {"TTT_EPOCHS": 2, "TTT_DECAY": 0.01}),
    "streaming_2": Case(STREAMING | {"TTT_MUON": 0}, processes=2),
    "audited": Case({"AUDIT": 1}),
    "plain": Case(NO_EXTRAS),
    "tight": Case({"TTT_ENTROPY_ADAPT": 0}, room=110_000),
    "resumed": Case(
        {"CHECKPOINT_EVERY": 0.001, "RESUME": "auto"}, kills=("checkpoint step:", "checkpoint chunk:")
    ),
}

# What a line is about, and its digits
COMPARED = re.compile(
    r"(?P<what>step:\d+/\d+ (?:train|val)_loss|quantized knob|\w+_exact val_loss|ttt_chunk \S+ bpb"
    r"|audit violations)"
    r"[:=](?P<digits>\S+(?: (?:val_bpb|knob):\S+)?)"
)


@dataclass
class Outcome:
    """What came of a run: digits by what they are about (the last line's, if there are two), its artifact."""

    digits: dict[str, str] = field(default_factory=dict)
    artifact: bytes = b""
    resumed: int = 0  # how often it went on from a checkpoint
    error: str = ""  # why there is no more

    def read(self, line: str) -> None:
        """Take what there is to compare in a line of the log."""
        self.resumed += line.startswith("resumed ")
        if found := COMPARED.match(line):
            self.digits[found["what"]] = found["digits"]


def make_data(folder: Path) -> None:
    """Write a tokenizer and SHARDS of text that every Python carries. Raises RunError, OSError."""
    texts = list(islice(demo_data.module_sources(), DOCUMENTS))
    if not texts:
        raise T.RunError("this Python comes without the sources of its library")
    model = train_tokenizer(texts, demo_data.VOCAB_SIZE)
    (folder / "tokenizer.model").write_bytes(model)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = np.concatenate([tokens for _, tokens in encode(texts, tokenizer)])
    if len(tokens) < max(high for _, high in SHARDS.values()):
        raise T.RunError(f"the first {DOCUMENTS} modules of this Python's library hold too little text")
    for name, (low, high) in SHARDS.items():
        write_shard(folder / f"fineweb_{name}.bin", tokens[low:high])


def git(*words: str) -> bytes:
    """Returns what a git command prints. Raises RunError."""
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True)
    if done.returncode:
        raise T.RunError(f"git: {' '.join(done.stderr.decode(errors='replace').split())}")
    return done.stdout


def unpack_revision(revision: str, folder: Path) -> None:
    """Write the program of a revision, with its tools/, into a folder. Raises RunError."""
    git("rev-parse", "--git-dir")
    try:
        commit = git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}").decode().strip()
    except T.RunError:
        raise T.RunError(f"git knows no revision {revision!r}") from None
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit, "train_gpt.py", "tools"))) as archive:
        archive.extractall(folder, filter="data")


def copy_program(folder: Path) -> None:
    """Copy the program here, so that it can be edited while it is compared."""
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_gpt.py", folder)


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environments(case: Case, program: Path) -> list[dict[str, str]]:
    """Returns the environment of each process: the case's settings, on one core of the CPU each."""
    ours = {*T.FIELDS, "RANK", "LOCAL_RANK", "WORLD_SIZE"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in range(case.processes)]
    data = program.parent / "data"
    values = SETTINGS | case.settings | {"RUN_ID": "same", "DATA_PATH": data, "OMP_NUM_THREADS": 1}
    values |= {"TOKENIZER_PATH": data / "tokenizer.model", "CUDA_VISIBLE_DEVICES": ""}
    values |= {"WORLD_SIZE": case.processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    if case.room:
        values["ARTIFACT_LIMIT"] = case.room + (program / "train_gpt.py").stat().st_size
    return [kept | {name: str(value) for name, value in (values | rank).items()} for rank in ranks]


def run_once(case: Case, program: Path, folder: Path, outcome: Outcome, kill: str) -> None:
    """Run a program's processes to their end or, if `kill` is a text, to the second line that begins with it.

    Raises RunError if they end in another way.
    """
    seen = 0
    with open(folder / "errors.txt", "w+", encoding="utf-8") as errors:
        with ExitStack() as running:
            processes = [
                running.enter_context(started([program / "train_gpt.py"], folder, environment, LIMIT, errors))
                for environment in environments(case, program)
            ]
            for line in processes[0].stdout:
                outcome.read(line)
                seen += bool(kill) and line.startswith(kill)
                if seen == 2:
                    for process in processes:
                        end_group(process)
        errors.seek(0)
        said = errors.read().splitlines()
    statuses = {process.returncode for process in processes}
    if kill and seen < 2:
        raise T.RunError(f"no second line begins with {kill!r}")
    if not kill and statuses != {0}:
        raise T.RunError(f"ended with status {max(statuses, key=abs)}: {said[-1] if said else 'no error'}")


def run_case(name: str, program: Path) -> Outcome:
    """Returns what came of a case with a program, or why nothing did."""
    case, folder, outcome = CASES[name], program / "runs" / name, Outcome()
    folder.mkdir(parents=True)
    try:
        for kill in (*case.kills, ""):
            run_once(case, program, folder, outcome, kill)
        if outcome.resumed < len(case.kills):
            raise T.RunError("did not go on from its checkpoint")
        outcome.artifact = (folder / "logs/same.bin").read_bytes()
    except (T.RunError, OSError) as e:
        outcome.error = str(e)
    return outcome


def first_difference(before: Outcome, here: Outcome) -> str:
    """Returns the first difference of two outcomes in words, "" if there is none."""
    for where, outcome in (("before", before), ("here", here)):
        if outcome.error:
            return f"{where}: {outcome.error}"
        if not any("_exact" in what for what in outcome.digits):
            return f"{where}: logs no exact score"
    for what in before.digits | here.digits:
        old, new = (outcome.digits.get(what, "no such line") for outcome in (before, here))
        if old != new:
            return f"{what}: {old} before, {new} here"
    return ""


def header_of(artifact: bytes) -> bytes:
    """Returns the settings in an artifact, as they are stored; nothing if its format is another."""
    if not artifact.startswith(T.MAGIC):
        return b""
    with np.load(io.BytesIO(lzma.decompress(artifact[T.SIDE_START : T.side_bytes(artifact)]))) as file:
        return bytes(file["header"])


def remark(before: Outcome, here: Outcome) -> str:
    """Returns a remark on two artifacts."""
    old, new = (hashlib.sha256(outcome.artifact).hexdigest()[:8] for outcome in (before, here))
    if before.artifact == here.artifact:
        return f"same, SHA-256 {new}..." if here.artifact else "none"
    if header_of(before.artifact) != header_of(here.artifact):
        return "headers differ"
    return f"SHA-256 {old}... before, {new}... here"


def compare(names: list[str], revision: str) -> int:
    """Run cases with both programs, print a table and return how many differ. Raises RunError, OSError."""
    rows, different = [], 0
    with tempfile.TemporaryDirectory(prefix="same_results_") as temporary:
        before, here, data = (Path(temporary, name) for name in ("before", "here", "data"))
        unpack_revision(revision, before)
        copy_program(here)
        data.mkdir()
        make_data(data)
        for name in names:
            start = time.perf_counter()
            outcomes = [run_case(name, program) for program in (before, here)]
            print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
            first = first_difference(*outcomes)
            different += bool(first)
            rows.append([name, str(len(outcomes[1].digits)), first or "same", remark(*outcomes)])
    print(table(["case", "lines", "result", "artifact"], rows))
    return different


def main(argv: list[str] | None = None) -> None:
    """Compare the revision that the arguments name with the program here."""
    parser = Parser(__doc__)
    parser.add_argument("revision", help="git revision of the program as it was before")
    parser.add_argument("case", nargs="*", default=[], help=f"cases to run (all): {' '.join(CASES)}")
    args = parser.parse_args(argv)
    with ends_in_one_line():
        for name in args.case:
            if name not in CASES:
                raise T.RunError(f"no case {name!r}; there are {' '.join(CASES)}")
        names = args.case or list(CASES)
        different = compare(names, args.revision)
    if different:
        fail(f"{different} of {len(names)} cases differ", 1)


if __name__ == "__main__":
    main()
