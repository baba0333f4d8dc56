"""Read what a run left: its events.

They are in logs/RUN_ID.jsonl where that file is beside the log, else they are told from the lines of
logs/RUN_ID.txt (the program's source, a line of 100 '=', then what the run printed), or of a log of the
challenge's scripts. `read_events` takes what there is, also of a run that goes on or broke off; `read_log`
takes a run that was scored to the end.
"""

import ast
import hashlib
import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from train_gpt import EVAL_MODES, FIELDS, RunError, show

Event = dict[str, Any]
SEPARATOR = "\n" + "=" * 100 + "\n"
SCORED_STAGES = {
    "roundtrip": "final_int6_roundtrip",
    **{name: mode.stage for name, mode in EVAL_MODES.items()},
    "ttt": "legal_ttt",
}
TEXTS = {
    "experts",
    "fault",
    "graphs",
    "hardware",
    "attention",
    "torch",
    "python",
    "hooks",
    "average",
    "stage",
    "message",
    "source_sha256",
}
NUMBERS = {
    "processes",
    "parameters",
    "validation_tokens",
    "training_tokens",
    "took",
    "reserve",
    "step",
    "iterations",
    "train_loss",
    "train_time",
    "step_avg",
    "tokens_per_second",
    "memory",
    "left",
    "multiplier",
    "val_loss",
    "val_bpb",
    "knob",
    "holdout_loss",
    "steps",
    "with_calibration",
    "total",
    "artifact_bytes",
    "code_bytes",
    "side_bytes",
    "eval_time",
    "chunk",
    "chunks",
    "bpb",
    "seconds",
    "done",
    "violations",
    "share",
    "time",
}

NAMES = "|".join(sorted(TEXTS | NUMBERS))
PLAIN = re.compile(
    rf"(machine|data|warming_up|warm_up|swa|average|chosen|trained|quantized|compiled|progress|"
    rf"checkpoint|resumed|dropped|no_graphs|audit|error)((?: (?:{NAMES}):.*)+)"
)  # an event's name, then name:value of its values
N = r"(\d+(?:\.\d+)?)"
EXACT = r"(\d+\.\d{8,})"  # fewer digits: the line is cut
TIMES = rf"(?: train_time:(?P<train_time>{N})ms)?(?: step_avg:(?P<step_avg>{N})ms)?"
LINES = [
    (event, re.compile(pattern))
    for event, pattern in (  # other lines; the names of groups are those of values
        ("data", r"model_params:(?P<parameters>\d+)"),
        (
            "step",
            rf"step:(?P<step>\d+)/(?P<iterations>\d+) train_loss:(?P<train_loss>{N}){TIMES}"
            rf"(?: tokens/s:(?P<tokens_per_second>{N}))?(?: memory:(?P<memory>{N})MiB)?"
            rf"(?: left:(?P<left>{N})s)?\b.*",
        ),
        (
            "validation",
            rf"step:(?P<step>\d+)/(?P<iterations>\d+) val_loss:(?P<val_loss>{N}) "
            rf"val_bpb:(?P<val_bpb>{N}){TIMES}\b.*",
        ),
        ("swa", r"swa:start step:(?P<step>\d+)\b.*"),
        (
            "trained",
            rf"stopping_early: wallclock_cap train_time:(?P<train_time>{N})ms step:(?P<steps>\d+)/\d+",
        ),
        (
            "ttt_chunk",
            rf"ttt_chunk \[(?P<chunk>\d+)/(?P<chunks>\d+)\] bpb=(?P<bpb>{N}) time=(?P<seconds>{N})s",
        ),
        ("progress", r"progress: (?P<stage>.+) (?P<percent>\d+)%, (?P<left>\d+) s left"),
    )
]
SETTINGS = re.compile(r"settings: ([A-Z0-9_]+=.*)")
SCORE = re.compile(rf"(\w+)_exact val_loss:{EXACT} val_bpb:{EXACT}")
EVAL_TIME = re.compile(rf"(\w+) (?:.* )?eval_time:{N}ms(?:, peak memory (\d+) MiB)?")
CODE_SIZE = re.compile(r"Code size: (\d+) bytes")
TOTAL_SIZE = re.compile(r"Total submission size.*: (\d+) bytes")
LOOSE = re.compile(r"(?<!\S)(\w+)[:=](\S+)")  # the challenge's scripts print some settings as name:value


class Stage(NamedTuple):
    """A score of the validation text and what the stage that led to it took."""

    val_loss: float  # nats per token
    val_bpb: float  # bits per byte
    seconds: float
    peak_mib: int  # the first process's highest so far


@dataclass(frozen=True)
class RunLog:
    """A run that trained and was scored to the end."""

    source: str  # empty if only the .jsonl is there
    settings: dict[str, str]  # as one writes them in the environment
    hardware: str  # such as "8 x NVIDIA H100 80GB HBM3"
    torch: str
    python: str
    parameters: int
    steps: int
    holdout_losses: dict[str, float]  # of each weight average, nats per token
    chosen: str  # the average that was exported
    stages: dict[
        str, Stage
    ]  # training, averaged, roundtrip, sliding or streaming, and, unless TTT_ENABLED=0, ttt
    bytes_total: int  # source and artifact
    bytes_code: int
    source_sha256: str
    events: list[Event] = field(compare=False, repr=False)  # of the .jsonl, or made of the lines of the .txt

    @property
    def final(self) -> Stage:
        """The last stage."""
        return list(self.stages.values())[-1]

    @property
    def changed_settings(self) -> dict[str, str]:
        """Those that are not the defaults of the source, which is read, not run, where the events do not name
        them.

        Raises RunError.
        """
        names = latest(self.events, "settings").get("changed")
        if names is None:
            try:
                defaults = source_defaults(self.source)
            except (SyntaxError, ValueError) as e:
                raise RunError(
                    f"run {self.settings['RUN_ID']}: the source in its log is no train_gpt.py ({e})"
                ) from None
            names = [name for name, value in self.settings.items() if value != defaults.get(name)]
        return {name: self.settings[name] for name in names}


def source_defaults(source: str) -> dict[str, str]:
    """Returns the defaults of the class Settings in a train_gpt.py.

    Raises SyntaxError or ValueError for another program.
    """
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    fields = next((node.body for node in classes if node.name == "Settings"), [])
    defaults = {}
    for node in fields:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and node.value.args:
            defaults[node.target.id.upper()] = show(ast.literal_eval(node.value.args[0]))
    if not defaults:
        raise ValueError("it has no class Settings")
    return defaults


def split_source(text: str) -> tuple[str, str]:
    """Returns the source, empty if the log has none, and what the run printed."""
    source, separator, printed = text.partition(SEPARATOR)
    return (source, printed) if separator else ("", text)


def source_facts(source: str) -> Event:
    """Returns what the event `settings` says of the source, if there is one."""
    data = source.encode()
    return {"source_sha256": hashlib.sha256(data).hexdigest(), "code_bytes": len(data)} if source else {}


def values_of(pairs: dict[str, str | None]) -> Event:
    """Returns texts as they are, numbers as numbers; what is no number is left out."""
    values = {}
    for name, text in pairs.items():
        if text is not None:
            with suppress(ValueError):
                values[name] = text if name in TEXTS else int(text) if text.isdecimal() else float(text)
    return values


class TextReader:
    """Collects the events that lines tell."""

    def __init__(self, source: str) -> None:
        self.source, self.events = source, []
        self.loose: dict[str, str] = {}  # settings, as the challenge's scripts print them
        self.times: dict[str, Event] = {}  # of stages whose score is still to come
        self.code: int | None = len(source.encode()) if source else None  # bytes
        self.special: list[tuple[re.Pattern, Callable[[re.Match], None]]] = [
            (SETTINGS, self.read_settings),
            (SCORE, self.read_score),
            (CODE_SIZE, self.read_code_size),
            (TOTAL_SIZE, self.read_total_size),
            (PLAIN, self.read_plain),
        ]

    def add(self, event: str, **values: Any) -> None:
        """Add an event."""
        self.events.append({"event": event} | values)

    def read_settings(self, match: re.Match) -> None:
        """Read this program's line of all settings."""
        settings = dict(part.split("=", 1) for part in re.split(r" (?=[A-Z0-9_]+=)", match[1]))
        self.add("settings", settings=settings, **source_facts(self.source))

    def read_score(self, match: re.Match) -> None:
        """Read the exact score of a stage, whose time was told before."""
        stage, loss, bpb = match.groups()
        self.add("stage", stage=stage, **self.times.pop(stage, {}), val_loss=float(loss), val_bpb=float(bpb))

    def read_code_size(self, match: re.Match) -> None:
        """Read how large the challenge's scripts say they are."""
        self.code = int(match[1])

    def read_total_size(self, match: re.Match) -> None:
        """Read the size of a submission."""
        sizes = {"total": int(match[1])}
        if self.code is not None:
            sizes |= {"artifact_bytes": sizes["total"] - self.code, "code_bytes": self.code}
        self.add("size", **sizes)

    def read_plain(self, match: re.Match) -> None:
        """Read an event's name and values."""
        pairs = re.findall(rf" ({NAMES}):(.*?)(?= (?:{NAMES}):|$)", match[2])
        self.add(match[1], **values_of(dict(pairs)))

    def read_known(self, line: str) -> bool:
        """Read one of LINES; return whether it was."""
        for event, pattern in LINES:
            match = pattern.fullmatch(line)
            if match:
                values = values_of(match.groupdict())
                if "percent" in values:
                    values["done"] = values.pop("percent") / 100
                self.add(event, **values)
                return True
        return False

    def read(self, line: str) -> None:
        """Read a line."""
        for pattern, action in self.special:
            match = pattern.fullmatch(line)
            if match:
                action(match)
                return
        match = EVAL_TIME.match(line)
        if match:
            memory = {"memory": int(match[3])} if match[3] else {}
            self.times[match[1]] = {"eval_time": float(match[2])} | memory
        elif not self.read_known(line):
            found = ((name.upper(), value) for name, value in LOOSE.findall(line))
            self.loose |= {name: value for name, value in found if name in FIELDS}


def events_of_text(text: str) -> list[Event]:
    """Returns events, as far as lines of a log tell them; others are passed over, and a score that is no
    number too.
    """
    source, printed = split_source(text)
    reader = TextReader(source)
    for line in printed.split("\n"):
        reader.read(line.strip())
    if reader.loose and not latest(reader.events, "settings"):
        settings = {"event": "settings", "settings": reader.loose} | source_facts(source)
        return [settings, *reader.events]
    return reader.events


def fault_of(event: Any) -> str:
    """Returns what is wrong with an event, "" if nothing is."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return "no event"
    for key, value in event.items():
        kinds: Any = object
        if key in NUMBERS:
            kinds = (int, float)
        elif key in TEXTS:
            kinds = str
        if value is not None and not isinstance(value, kinds):
            return f"{key} of the event {event['event']!r} is {value!r}"
    settings, changed = event.get("settings"), set(event.get("changed") or ())
    if event["event"] == "settings" and not (isinstance(settings, dict) and settings.keys() >= changed):
        return "it lacks settings"
    return ""


def events_of_json(text: str, name: str, strict: bool) -> list[Event]:
    """Returns the events in the text of a .jsonl. A last line that is cut is an error only if strict.

    Raises RunError, which begins with `name`.
    """
    lines, events = text.split("\n"), []
    if lines[-1] and strict:
        raise RunError(f"{name}: its last line is cut, so the run did not finish; run it again")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            event = json.loads(line)
            fault = fault_of(event)
        except ValueError:
            fault = "no JSON"
        if fault:
            raise RunError(f"{name}, line {number}: {fault}; the file is damaged or not of train_gpt.py")
        events.append(event)
    return events


# What a run that was resumed at a step or a chunk does over again
REPEATED = {"step": ("step", "validation", "swa"), "chunk": ("ttt_chunk",)}


def without_repeats(events: list[Event]) -> list[Event]:
    """Returns the events without what a resumed run did over again: of the same step or chunk, the later ones
    stay.
    """
    kept: list[Event] = []
    for event in events:
        kind = event["event"]
        if kind in ("step", "validation", "ttt_chunk", "resumed"):
            key = "chunk" if event.get("step") is None and event.get("chunk") is not None else "step"
            at = event.get(key)
            first = -1 if at is None else at  # from which on events are repeated
            kinds = REPEATED[key] if kind == "resumed" else (kind,)
            from_there = first + 1 if kind == "resumed" else first
            kept = [
                old
                for old in kept
                if old["event"] not in kinds or old.get(key) is None or old[key] < from_there
            ]
        kept.append(event)
    return kept


def latest(events: list[Event], kind: str) -> Event:
    """Returns the last event of a kind, {} if there is none."""
    return next((event for event in reversed(events) if event["event"] == kind), {})


def read_file(path: Path) -> str:
    """Returns the text of a file. Raises RunError."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise RunError(f"{path}: no log of train_gpt.py; it is no UTF-8 text") from None
    except OSError as e:
        raise RunError(f"{path}: cannot be read ({e.strerror})") from None


def read(path: Path, strict: bool) -> tuple[list[Event], str]:
    """Returns events and source. Raises RunError."""
    log, record = path.with_suffix(".txt"), path.with_suffix(".jsonl")
    if path.suffix != ".jsonl" and not (path.suffix == ".txt" and record.exists()):
        text = read_file(path)
        if strict and SEPARATOR not in text:
            raise RunError(
                f"{path}: no log of train_gpt.py; such a log holds its source, then a line of 100 '='"
            )
        return without_repeats(events_of_text(text)), split_source(text)[0]
    source = split_source(read_file(log))[0] if log.exists() else ""
    events = without_repeats(events_of_json(read_file(record), str(record), strict))
    said = latest(events, "settings").get("source_sha256")
    if strict and source and said and said != source_facts(source)["source_sha256"]:
        raise RunError(f"{log}: its source is not the one that {record} names, so they are of different runs")
    return events, source


def read_events(path: Path) -> list[Event]:
    """Returns the events of a run or of a challenge's log, however far it came. Raises RunError.

    Events that lines of text cannot tell are absent, and so are values.
    """
    return read(path, strict=False)[0]


def read_audit(path: Path) -> dict[str, Any] | None:
    """Returns what the audit of a log's run found, None if there is none beside it. Raises RunError."""
    beside = path.with_suffix(".audit.json")
    try:
        found = json.loads(beside.read_bytes())
        kinds = {"violations": list, "hashes": dict, "stages": dict, "share": float}
        if not all(isinstance(found[name], kind) and found["stages"] for name, kind in kinds.items()):
            raise TypeError
        return found
    except FileNotFoundError:
        return None
    except OSError as e:
        raise RunError(f"{beside}: cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{beside}: no audit of train_gpt.py; run again with AUDIT=1") from None


def final_score(path: Path) -> tuple[float, float]:
    """Returns (val_loss in nats per token, val_bpb) of the last stage with an exact score.

    Raises RunError.
    """
    stage = latest(read_events(path), "stage")
    if not (told(stage.get("val_loss")) and told(stage.get("val_bpb"))):
        raise RunError(
            f"{path}: has no exact score, such as a line `legal_ttt_exact val_loss:... val_bpb:...`"
        )
    return stage["val_loss"], stage["val_bpb"]


def told(value: object) -> bool:
    """Returns whether there is a value and, if it is a number, a finite one."""
    return value is not None and (not isinstance(value, float) or math.isfinite(value))


class Finder:
    """Finds in a finished run's events what must be there. Its errors begin with `name`."""

    def __init__(self, events: list[Event], name: str) -> None:
        self.events, self.name = events, name

    def find(self, what: str, kind: str, *keys: str, **like: str) -> list[Any]:
        """Returns the values of the last event of a kind that is like the others given. Raises RunError."""
        found = latest([event for event in self.events if like.items() <= event.items()], kind)
        if all(told(found.get(key)) for key in keys):
            return [found[key] for key in keys]
        ended = latest(self.events, "error").get("message")
        raise RunError(
            f"{self.name}: has no {what}, so the run did not finish or is another version's; run it again"
            + (f" (it ended in: {ended})" if ended else "")
        )

    def stage(self, title: str) -> Stage:
        """Returns the score of a stage of scoring. Raises RunError."""
        keys = ("val_loss", "val_bpb", "eval_time", "memory")
        loss, bpb, took, peak = self.find(f"score of {title}", "stage", *keys, stage=title)
        return Stage(loss, bpb, took / 1000, round(peak))


def scored_stages(settings: dict[str, str]) -> list[str]:
    """Returns the short names of the stages of scoring that a run has."""
    absent = EVAL_MODES.keys() - {settings.get("EVAL_MODE", "sliding")}
    if settings.get("TTT_ENABLED") == "0":
        absent.add("ttt")
    return [stage for stage in SCORED_STAGES if stage not in absent]


def run_of(events: list[Event], source: str, name: str) -> RunLog:
    """Returns the run of events.

    Raises RunError, which begins with `name`, for an unfinished run or one that did not train.
    """
    find = Finder(events, name).find
    settings, sha256, code = find("settings", "settings", "settings", "source_sha256", "code_bytes")
    if settings.get("EVAL_ONLY") == "1":
        raise RunError(f"{name}: of a run with EVAL_ONLY=1; give the log of the run that trained the weights")
    keys = ("processes", "hardware", "torch", "python")
    processes, hardware, torch, python = find("line on the machine", "machine", *keys)
    (parameters,) = find("number of parameters", "data", "parameters")
    loss, bpb = find("validation after the last step", "validation", "val_loss", "val_bpb")
    average = "raw" if "0" in (settings.get("EMA_ENABLED"), settings.get("EMA_DECAY")) else "ema"
    chosen = latest(events, "chosen").get("average", average)  # older runs chose by held-out loss
    keys = ("steps", "train_time", "with_calibration", "memory")
    steps, train_time, both, peak = find("end of training", "trained", *keys)
    stages = {"training": Stage(loss, bpb, train_time / 1000, round(peak))}
    loss, bpb = find("score of averaged", "stage", "val_loss", "val_bpb", stage="averaged")
    stages["averaged"] = Stage(loss, bpb, (both - train_time) / 1000, round(peak))
    told = {event.get("stage") for event in events}
    for stage in scored_stages(settings):
        # a stream that learns is one stage; in older logs one that does not came before it
        if stage != "streaming" or SCORED_STAGES[stage] in told or settings.get("TTT_ENABLED") == "0":
            stages[stage] = Finder(events, name).stage(SCORED_STAGES[stage])
    (artifact,) = find("size of the submission", "size", "artifact_bytes")
    losses = {event["average"]: event.get("holdout_loss") for event in events if event["event"] == "average"}
    return RunLog(
        source=source,
        settings=settings,
        hardware=f"{processes} x {hardware}",
        torch=torch,
        python=python,
        parameters=parameters,
        steps=steps,
        holdout_losses=losses,
        chosen=chosen,
        stages=stages,
        bytes_total=artifact + code,
        bytes_code=code,
        source_sha256=sha256,
        events=events,
    )


def parse_log(text: str, name: str) -> RunLog:
    """Returns the run of the text of a logs/RUN_ID.txt.

    Raises RunError, which begins with `name`, for what is no log, an unfinished run, or one that did not
    train.
    """
    if SEPARATOR not in text:
        raise RunError(f"{name}: no log of train_gpt.py; such a log holds its source, then a line of 100 '='")
    return run_of(without_repeats(events_of_text(text)), split_source(text)[0], name)


def read_log(path: Path) -> RunLog:
    """Returns the run of logs/RUN_ID.txt or .jsonl. Raises RunError."""
    events, source = read(path, strict=True)
    return run_of(events, source, str(path))
