"""Read what a run left: its events, from logs/RUN_ID.jsonl where that file is beside the log, else from the lines of
logs/RUN_ID.txt (the program's source, a line of 100 '=', then what the run printed), or of a log of the challenge's scripts.

`read_events` takes what there is, also of a run that goes on or broke off; `read_log` takes a run that was scored to the end.
"""

import ast
import hashlib
import json
import math
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import FIELDS, RunError, show  # noqa: E402

SEPARATOR = "\n" + "=" * 100 + "\n"
SCORED_STAGES = {
    "roundtrip": "final_int6_roundtrip",
    "sliding": "final_int6_sliding_window",
    "streaming": "final_int6_streaming",
    "ttt": "legal_ttt",
}
TEXTS = {
    "hardware",
    "attention",
    "torch",
    "python",
    "average",
    "quantizer",
    "stage",
    "message",
    "source_sha256",
}
NUMBERS = {
    "processes",
    "parameters",
    "validation_tokens",
    "training_tokens",
    "holdout_tokens",
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
    "artifact_bytes",
    "code_bytes",
    "side_bytes",
    "limit",
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
    rf"(machine|data|warm_up|swa|late_qat|average|chosen|trained|quantized|compiled|progress|checkpoint|resumed|"
    rf"audit|error)((?: (?:{NAMES}):.*)+)"
)  # an event's name, then name:value of its values
N = r"(\d+(?:\.\d+)?)"
EXACT = r"(\d+\.\d{8,})"  # fewer digits: the line is cut
TIMES = rf"(?: train_time:(?P<train_time>{N})ms)?(?: step_avg:(?P<step_avg>{N})ms)?"
LINES = [
    (event, re.compile(pattern))
    for event, pattern in (  # other lines; the names of groups are those of values
        (
            "machine",
            r"(?P<processes>\d+) x (?P<hardware>.+), attention: (?P<attention>.+), torch (?P<torch>\S+), "
            r"Python (?P<python>\S+)",
        ),
        (
            "data",
            r"(?P<parameters>\d+) parameters; tokens: (?P<validation_tokens>\d+) for validation, "
            r"(?P<training_tokens>\d+) for training, (?P<holdout_tokens>\d+) held out",
        ),
        ("data", r"model_params:(?P<parameters>\d+)"),
        ("warm_up", rf"warm-up took (?P<took>{N})s; (?P<reserve>{N})ms are kept for .*"),
        (
            "step",
            rf"step:(?P<step>\d+)/(?P<iterations>\d+) train_loss:(?P<train_loss>{N}){TIMES}"
            rf"(?: tokens/s:(?P<tokens_per_second>{N}))?(?: memory:(?P<memory>{N})MiB)?(?: left:(?P<left>{N})s)?\b.*",
        ),
        (
            "validation",
            rf"step:(?P<step>\d+)/(?P<iterations>\d+) val_loss:(?P<val_loss>{N}) val_bpb:(?P<val_bpb>{N}){TIMES}\b.*",
        ),
        ("swa", r"(?:SWA from step |swa:start step:)(?P<step>\d+)\b.*"),
        ("late_qat", rf"late QAT from step (?P<step>\d+), (?P<knob>{N}) times .*"),
        ("late_qat", r"late_qat:enabled step:(?P<step>\d+)\b.*"),
        ("average", rf"weight_average:(?P<average>\w+) holdout_loss:(?P<holdout_loss>{N})"),
        ("chosen", r"weight_average chosen:(?P<average>\w+)"),
        (
            "trained",
            r"training: (?P<steps>\d+) steps in (?P<train_time>\d+)ms, (?P<with_calibration>\d+)ms with .*; "
            r"peak memory (?P<memory>\d+) MiB",
        ),
        (
            "trained",
            rf"stopping_early: wallclock_cap train_time:(?P<train_time>{N})ms step:(?P<steps>\d+)/\d+",
        ),
        ("quantized", rf"quantized by (?P<quantizer>\w+) in (?P<took>{N})s, (?P<knob>{N}) times .*"),
        ("compiled", rf"compiled .* in (?P<took>{N})s"),
        (
            "ttt_chunk",
            rf"ttt_chunk \[(?P<chunk>\d+)/(?P<chunks>\d+)\] bpb=(?P<bpb>{N}) time=(?P<seconds>{N})s",
        ),
        ("progress", r"progress: (?P<stage>\w+) (?P<percent>\d+)%, (?P<left>\d+) s left"),
    )
]


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
    attention: str
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
    events: list[dict] = field(compare=False, repr=False)  # of the .jsonl, or made of the lines of the .txt

    @property
    def final(self) -> Stage:
        return list(self.stages.values())[-1]

    @property
    def changed_settings(self) -> dict[str, str]:
        """Those that are not the defaults of the source, which is read, not run, where the events do not name them.
        Raises RunError."""
        names = latest(self.events, "settings").get("changed")
        if names is None:
            try:
                defaults = source_defaults(self.source)
            except (SyntaxError, ValueError, AttributeError, TypeError) as e:
                raise RunError(
                    f"run {self.settings['RUN_ID']}: the source in its log is no train_gpt.py ({e})"
                ) from None
            names = [name for name, value in self.settings.items() if value != defaults.get(name)]
        return {name: self.settings[name] for name in names}


def source_defaults(source: str) -> dict[str, str]:
    """The defaults in a train_gpt.py: of the lines `NAME=default low..high help` of TABLE or, in older ones, of the rows of
    SETTINGS = dict(name=(default, ...)). Raises SyntaxError or ValueError for another program."""
    tables = {
        node.targets[0].id: node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    if "TABLE" in tables:
        rows = re.findall(r"^(\w+)=(\S+)", ast.literal_eval(tables["TABLE"]), re.MULTILINE)
    elif "SETTINGS" in tables:
        rows = [(row.arg.upper(), ast.unparse(row.value.elts[0])) for row in tables["SETTINGS"].keywords]
    else:
        raise ValueError("it has no table of settings")
    return {name: show(ast.literal_eval(default)) for name, default in rows}


def split_source(text: str) -> tuple[str, str]:
    """The source, empty if the log has none, and what the run printed."""
    source, separator, printed = text.partition(SEPARATOR)
    return (source, printed) if separator else ("", text)


def source_facts(source: str) -> dict:
    """What the event `settings` says of the source. Raises nothing."""
    data = source.encode()
    return dict(source_sha256=hashlib.sha256(data).hexdigest(), code_bytes=len(data)) if source else {}


def values_of(pairs: dict[str, str | None]) -> dict:
    """Texts as they are, numbers as numbers; what is no number is left out."""
    values = {}
    for name, text in pairs.items():
        if text is not None:
            with suppress(ValueError):
                values[name] = text if name in TEXTS else int(text) if text.isdecimal() else float(text)
    return values


def events_of_text(text: str) -> list[dict]:
    """Events, as far as lines of a log tell them; other lines are passed over, and a score that is no number too."""
    source, printed = split_source(text)
    events, loose, times, code = [], {}, {}, len(source.encode()) if source else None
    for line in map(str.strip, printed.split("\n")):
        if match := re.fullmatch(r"settings: ([A-Z0-9_]+=.*)", line):
            settings = dict(part.split("=", 1) for part in re.split(r" (?=[A-Z0-9_]+=)", match[1]))
            events.append(dict(event="settings", settings=settings) | source_facts(source))
        elif match := re.fullmatch(rf"(\w+)_exact val_loss:{EXACT} val_bpb:{EXACT}", line):
            events.append(
                dict(
                    event="stage",
                    stage=match[1],
                    **times.pop(match[1], {}),
                    val_loss=float(match[2]),
                    val_bpb=float(match[3]),
                )
            )
        elif match := re.match(rf"(\w+) (?:.* )?eval_time:{N}ms(?:, peak memory (\d+) MiB)?", line):
            times[match[1]] = dict(eval_time=float(match[2])) | (
                dict(memory=int(match[3])) if match[3] else {}
            )
        elif match := re.fullmatch(r"Code size: (\d+) bytes", line):
            code = int(match[1])
        elif match := re.fullmatch(r"Total submission size.*: (\d+) bytes", line):
            total = int(match[1])
            events.append(
                dict(event="size", total_bytes=total)
                if code is None
                else dict(event="size", artifact_bytes=total - code, code_bytes=code)
            )
        elif match := PLAIN.fullmatch(line):
            pairs = re.findall(rf" ({NAMES}):(.*?)(?= (?:{NAMES}):|$)", match[2])
            events.append(dict(event=match[1]) | values_of(dict(pairs)))
        else:
            for event, pattern in LINES:
                if match := pattern.fullmatch(line):
                    values = values_of(match.groupdict())
                    if "percent" in values:
                        values["done"] = values.pop("percent") / 100
                    events.append(dict(event=event) | values)
                    break
            else:  # the challenge's scripts print some settings as name:value
                loose |= {
                    name.upper(): value
                    for name, value in re.findall(r"(?<!\S)(\w+)[:=](\S+)", line)
                    if name.upper() in FIELDS
                }
    if loose and not latest(events, "settings"):
        events.insert(0, dict(event="settings", settings=loose) | source_facts(source))
    return events


def events_of_json(text: str, name: str, strict: bool) -> list[dict]:
    """The events in the text of a .jsonl. A last line that is cut is an error only if strict. Raises RunError, which begins
    with `name`."""
    lines, events = text.split("\n"), []
    if lines[-1] and strict:
        raise RunError(f"{name}: its last line is cut, so the run did not finish; run it again")
    for number, line in enumerate(lines[:-1], start=1):

        def bad(what: str) -> RunError:
            return RunError(f"{name}, line {number}: {what}; the file is damaged or not of train_gpt.py")

        try:
            event = json.loads(line)
        except ValueError:
            raise bad("no JSON") from None
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            raise bad("no event")
        for key, value in event.items():
            kinds = (int, float) if key in NUMBERS else str if key in TEXTS else object
            if value is not None and not isinstance(value, kinds):
                raise bad(f"{key} of the event {event['event']!r} is {value!r}")
        if event["event"] == "settings" and not (
            isinstance(event.get("settings"), dict)
            and event["settings"].keys() >= set(event.get("changed") or ())
        ):
            raise bad("it lacks settings")
        events.append(event)
    return events


def without_repeats(events: list[dict]) -> list[dict]:
    """The events without what a resumed run did over again: of the same step or chunk, the later ones stay."""
    kept = []
    for event in events:
        kind = event["event"]
        if kind in ("step", "validation", "ttt_chunk", "resumed"):
            key, at = next(
                ((key, event[key]) for key in ("step", "chunk") if event.get(key) is not None), ("step", -1)
            )
            kinds = {"step": ("step", "validation", "swa", "late_qat"), "chunk": ("ttt_chunk",)}[key]
            later = (
                (lambda old: old[key] > at)
                if kind == "resumed"
                else (lambda old: old["event"] == kind and old[key] >= at)
            )
            kept = [
                old for old in kept if old["event"] not in kinds or old.get(key) is None or not later(old)
            ]
        kept.append(event)
    return kept


def latest(events: list[dict], kind: str) -> dict:
    """The last event of a kind, {} if there is none."""
    return next((event for event in reversed(events) if event["event"] == kind), {})


def read_file(path: Path) -> str:
    """Raises RunError."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise RunError(f"{path}: no log of train_gpt.py; it is no UTF-8 text") from None
    except OSError as e:
        raise RunError(f"{path}: cannot be read ({e.strerror})") from None


def read(path: Path, strict: bool) -> tuple[list[dict], str]:
    """Events and source. Raises RunError."""
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


def read_events(path: Path) -> list[dict]:
    """The events of a run or of a challenge's log, however far it came; those that lines of text cannot tell are absent,
    and so are values. A size that is not told apart is `total_bytes`. Raises RunError."""
    return read(path, strict=False)[0]


def final_score(path: Path) -> tuple[float, float]:
    """(val_loss in nats per token, val_bpb) of the last stage with an exact score. Raises RunError."""
    stage = latest(read_events(path), "stage")
    if not (told(stage.get("val_loss")) and told(stage.get("val_bpb"))):
        raise RunError(
            f"{path}: has no exact score, such as a line `legal_ttt_exact val_loss:... val_bpb:...`"
        )
    return stage["val_loss"], stage["val_bpb"]


def told(value: object) -> bool:
    """Whether there is a value and, if it is a number, a finite one."""
    return value is not None and (not isinstance(value, float) or math.isfinite(value))


def run_of(events: list[dict], source: str, name: str) -> RunLog:
    """Raises RunError, which begins with `name`, for an unfinished run or one that did not train."""

    def find(what: str, kind: str, *keys: str, **like: str) -> list:
        """The values of the last event of a kind that is like the others given."""
        found = latest([event for event in events if like.items() <= event.items()], kind)
        if all(told(found.get(key)) for key in keys):
            return [found[key] for key in keys]
        ended = latest(events, "error").get("message")
        raise RunError(
            f"{name}: has no {what}, so the run did not finish or is another version's; run it again"
            + (f" (it ended in: {ended})" if ended else "")
        )

    settings, sha256, code = find("settings", "settings", "settings", "source_sha256", "code_bytes")
    if settings.get("EVAL_ONLY") == "1":
        raise RunError(f"{name}: of a run with EVAL_ONLY=1; give the log of the run that trained the weights")
    processes, hardware, *versions = find(
        "line on the machine", "machine", "processes", "hardware", "attention", "torch", "python"
    )
    (parameters,) = find("number of parameters", "data", "parameters")
    loss, bpb = find("validation after the last step", "validation", "val_loss", "val_bpb")
    losses = {event["average"]: event.get("holdout_loss") for event in events if event["event"] == "average"}
    (chosen,) = find("chosen weight average", "chosen", "average")
    steps, train_time, both, peak = find(
        "end of training", "trained", "steps", "train_time", "with_calibration", "memory"
    )
    stages = {"training": Stage(loss, bpb, train_time / 1000, round(peak))}
    loss, bpb = find("score of averaged", "stage", "val_loss", "val_bpb", stage="averaged")
    stages["averaged"] = Stage(loss, bpb, (both - train_time) / 1000, round(peak))
    absent = {"sliding" if settings.get("EVAL_MODE") == "streaming" else "streaming"}
    absent |= {"ttt"} if settings.get("TTT_ENABLED") == "0" else set()
    for stage, title in SCORED_STAGES.items():
        if stage not in absent:
            loss, bpb, took, peak = find(
                f"score of {title}", "stage", "val_loss", "val_bpb", "eval_time", "memory", stage=title
            )
            stages[stage] = Stage(loss, bpb, took / 1000, round(peak))
    (size,) = find("size of the submission", "size", "artifact_bytes")
    return RunLog(
        source,
        settings,
        f"{processes} x {hardware}",
        *versions,
        parameters,
        steps,
        losses,
        chosen,
        stages,
        size + code,
        code,
        sha256,
        events,
    )


def parse_log(text: str, name: str) -> RunLog:
    """The run of the text of a logs/RUN_ID.txt. Raises RunError, which begins with `name`, for what is no log, an unfinished
    run, or one that did not train."""
    if SEPARATOR not in text:
        raise RunError(f"{name}: no log of train_gpt.py; such a log holds its source, then a line of 100 '='")
    return run_of(without_repeats(events_of_text(text)), split_source(text)[0], name)


def read_log(path: Path) -> RunLog:
    """The run of logs/RUN_ID.txt or .jsonl. Raises RunError."""
    events, source = read(path, strict=True)
    return run_of(events, source, str(path))
