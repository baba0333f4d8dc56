"""Read a log of train_gpt.py, logs/RUN_ID.txt: the program's source, a line of 100 '=', then what the run printed."""
import ast
import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import RunError, show  # noqa: E402

SEPARATOR = "\n" + "=" * 100 + "\n"
NUMBER = r"(\d+\.\d+)"
SCORED_STAGES = {"roundtrip": "final_int6_roundtrip", "sliding": "final_int6_sliding_window",
                 "streaming": "final_int6_streaming", "ttt": "legal_ttt"}


class Stage(NamedTuple):
    """A score of the validation text and what the stage that led to it took."""
    val_loss: float  # nats per token
    val_bpb: float  # bits per byte
    seconds: float
    peak_mib: int  # the first process's highest so far


@dataclass(frozen=True)
class RunLog:
    """A run that trained and was scored to the end."""
    source: str
    settings: dict[str, str]  # as one writes them in the environment
    hardware: str  # such as "8 x NVIDIA H100 80GB HBM3"
    attention: str
    torch: str
    python: str
    parameters: int
    steps: int
    holdout_losses: dict[str, float]  # of each weight average, nats per token
    chosen: str  # the average that was exported
    stages: dict[str, Stage]  # training, averaged, roundtrip, sliding or streaming, and, unless TTT_ENABLED=0, ttt
    bytes_total: int  # source and artifact

    @property
    def source_sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def bytes_code(self) -> int:
        return len(self.source.encode())

    @property
    def final(self) -> Stage:
        return list(self.stages.values())[-1]

    @property
    def changed_settings(self) -> dict[str, str]:
        """Those that are not the defaults of the source in the log, which is read, not run. Raises RunError."""
        try:
            table, = [node.value for node in ast.parse(self.source).body
                      if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "SETTINGS"]
            defaults = {row.arg.upper(): show(ast.literal_eval(row.value)[0]) for row in table.keywords}
        except (SyntaxError, ValueError, AttributeError) as e:
            raise RunError(f"run {self.settings['RUN_ID']}: the source in its log is no train_gpt.py ({e})") from None
        return {name: value for name, value in self.settings.items() if value != defaults.get(name)}


def parse_log(text: str, name: str) -> RunLog:
    """Raises RunError, which begins with `name`, for what is no log, an unfinished run, or one that did not train."""
    source, separator, rest = text.rpartition(SEPARATOR)
    if not separator:
        raise RunError(f"{name}: no log of train_gpt.py; such a log holds its source, then a line of 100 '='")
    lines = rest.split("\n")

    def find(what: str, pattern: str) -> tuple[str, ...]:
        """The groups of the last line that is like the pattern."""
        found = [match for match in map(re.compile(pattern).fullmatch, lines) if match]
        if not found:
            raise RunError(f"{name}: has no {what} line, so the run did not finish or is another version's; run it again")
        return found[-1].groups()

    settings = dict(part.split("=", 1) for part in
                    re.split(r" (?=[A-Z0-9_]+=)", find("settings", r"settings: ([A-Z0-9_]+=.*)")[0]))
    if settings.get("EVAL_ONLY") == "1":
        raise RunError(f"{name}: of a run with EVAL_ONLY=1; give the log of the run that trained the weights")
    hardware = find("hardware", r"(\d+ x .+), attention: (.+), torch (\S+), Python (\S+)")
    parameters, = find("parameters", r"(\d+) parameters; .*")
    train_loss, train_bpb = find("val_loss", rf"step:\d+/\d+ val_loss:{NUMBER} val_bpb:{NUMBER} .*")
    chosen, = find("'weight_average chosen'", r"weight_average chosen:(\w+)")
    steps, train_ms, both_ms, peak = find(
        "'training:'", r"training: (\d+) steps in (\d+)ms, (\d+)ms with .*; peak memory (\d+) MiB")
    exact = rf"_exact val_loss:{NUMBER} val_bpb:{NUMBER}"
    loss, bpb = find("averaged_exact", "averaged" + exact)
    stages = {"training": Stage(float(train_loss), float(train_bpb), int(train_ms) / 1000, int(peak)),
              "averaged": Stage(float(loss), float(bpb), (int(both_ms) - int(train_ms)) / 1000, int(peak))}
    absent = {"sliding" if settings.get("EVAL_MODE") == "streaming" else "streaming"}
    absent |= {"ttt"} if settings.get("TTT_ENABLED") == "0" else set()
    for stage, start in SCORED_STAGES.items():
        if stage not in absent:
            ms, peak = find(f"'{start} eval_time'", start + r" eval_time:(\d+)ms, peak memory (\d+) MiB")
            loss, bpb = find(f"{start}_exact", start + exact)
            stages[stage] = Stage(float(loss), float(bpb), int(ms) / 1000, int(peak))
    losses = re.findall(rf"^weight_average:(\w+) holdout_loss:{NUMBER}$", rest, re.MULTILINE)
    size, = find("'Total submission size'", r"Total submission size .*: (\d+) bytes")
    return RunLog(source, settings, *hardware, int(parameters), int(steps), {average: float(n) for average, n in losses},
                  chosen, stages, int(size))


def read_log(path: Path) -> RunLog:
    """Raises RunError."""
    try:
        return parse_log(path.read_text("utf-8"), str(path))
    except UnicodeDecodeError:
        raise RunError(f"{path}: no log of train_gpt.py; it is no UTF-8 text") from None
    except OSError as e:
        raise RunError(f"{path}: cannot be read ({e.strerror})") from None
