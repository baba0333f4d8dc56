"""Write the generated parts of README.md and docs/.

    python -m tools.reports.docs           # after a change of a setting, `make demo` or a measurement
    python -m tools.reports.docs --check   # change nothing; fail if a part is not up to date

A part stands between the lines `<!-- generated: NAME -->` and `<!-- end -->`: in README.md `demo` (from
logs/demo.txt), in docs/tools.md `tools` (from the tools' docstrings), in docs/settings.md `settings`, in
docs/gpu.md `speed` (from what tools.measure.bench left in logs/*.jsonl), in docs/experiments.md `quantizers`
and `scoring` (from logs/quantizers.json by tools.measure.quant_report and logs/bench_eval.json by
tools.measure.bench_eval).
"""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

from tools.common.cli import ROOT, Parser, ends_in_one_line
from tools.common.tables import code, table
from tools.measure.ablation import report as ablation_report
from tools.measure.bench_eval import scoring_report
from tools.reports.runlog import RunLog, read_log
from train_gpt import FIELDS, RECIPES, RunError, allowed, show, write_atomically

NOT_MEASURED = "not measured"
GROUPS = {  # first setting of each
    "DATA_PATH": "Data",
    "RUN_ID": "Run",
    "NUM_LAYERS": "Model",
    "MATRIX_LR": "Optimizers",
    "EMA_DECAY": "Averages and rounding",
    "EVAL_SEQ_LEN": "Scoring",
    "TTT_ENABLED": "Test-time training",
}
AVERAGES = {"raw": "raw: the last step's", "ema": "EMA", "swa": "SWA"}


def settings_part() -> str:
    """Returns what --help of train_gpt.py says, as a table for each group."""
    groups: dict[str, list[list[str]]] = {}
    for name, f in FIELDS.items():
        if name in GROUPS:
            rows = groups.setdefault(GROUPS[name], [])
        default = f"`{show(f.default)}`" if show(f.default) else "empty"
        rows.append([f"`{name}`", default, allowed(f), code(f.metadata["help"])])
    header = ["setting", "default", "allowed", "meaning"]
    return "\n\n".join(f"**{title}**\n\n{table(header, rows)}" for title, rows in groups.items())


def recipes_part() -> str:
    """Returns a table of the settings in which the recipes differ."""
    rows = []
    for name in RECIPES["frontier"]:
        values = [show(recipe[name]) for recipe in (RECIPES["record"], RECIPES["frontier"])]
        rows.append([f"`{name.upper()}`", *(f"`{value}`" if value else "empty" for value in values)])
    return table(["setting", "record", "frontier"], rows)


def ablation_part(paths: list[Path]) -> str:
    """Returns the comparison of the runs in files of tools.measure.ablation. Raises RunError."""
    found = {}
    for path in paths:
        try:
            rows = json.loads(path.read_text("utf-8"))["rows"]
            found |= {(row["variant"], row["seed"]): row for row in rows}
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(f"{path}: no figures of tools.measure.ablation") from None
    return ablation_report([*found.values()])


def experts_part(paths: list[Path]) -> str:
    """Returns single experts and mixtures of files of tools.measure.experts. Raises RunError."""
    rows = []
    for path in paths:
        try:
            found = json.loads(path.read_text("utf-8"))
            experts, title = found["experts"], found["title"]
            best = min(experts, key=lambda expert: expert["bpb"])
            still = next(expert for expert in experts if expert["expert"] == "lr=0")
            mixed = sorted(found["mixtures"], key=lambda row: len(row["mix"]))
            took = sum(experts[k]["seconds"] for k in mixed[-1]["mix"])
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            raise RunError(f"{path}: no figures of tools.measure.experts") from None
        alone = [f"{still['bpb']:.4f}", f"{best['bpb']:.4f}", f"`{best['expert']}`"]
        gains = [f"{row['bpb']:.4f} ({row['bpb'] - best['bpb']:+.4f})" for row in mixed]
        rows.append([title, *alone, *gains, f"{best['seconds']:.0f}, {took:.0f}"])
    header = ["model", "not learning", "best alone", "that is", "four mixed", "eight mixed", "seconds"]
    return table(header, rows)


def ngrams_part(paths: list[Path]) -> str:
    """Returns what n-grams add, of files of tools.measure.experts --cache. Raises RunError."""
    rows, orders = [], (0, 2, 4, 6)
    for path in paths:
        try:
            found = json.loads(path.read_text("utf-8"))
            alone = {expert["expert"]: expert["bpb"] for expert in found["experts"]}
            names, best = [*alone], min(alone, key=alone.get)
            bpb = {
                (len(row["mix"]), names[row["mix"][0]], row["cache"]): row["bpb"] for row in found["mixtures"]
            }
            everyone = [f"{bpb[len(names), names[0], order]:.4f}" for order in orders]
            single = [f"{alone[name]:.4f}, {bpb[1, name, orders[-1]]:.4f}" for name in ("lr=0", best)]
            took = max(row["seconds"] for row in found["mixtures"])
            rows.append([found["title"], *single, *everyone, f"{took:.1f}"])
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            raise RunError(f"{path}: no figures of tools.measure.experts --cache") from None
    header = ["model and text", "not learning, with", "best alone, with", "four mixed"]
    return table([*header, *(f"order {order}" for order in orders[1:]), "seconds"], rows)


def tools_part(root: Path) -> str:
    """Returns a row for each command in tools/: what the first sentence of its docstring says."""
    rows = []
    for path in sorted(root.glob("tools/*/*.py")):
        text = path.read_text("utf-8")
        if "\n    python -m tools" in text or " -m tools" in text.split('"""')[1]:
            sentence = " ".join(ast.get_docstring(ast.parse(text)).split("\n\n")[0].split())
            rows.append([f"`tools.{path.parent.name}.{path.stem}`", code(sentence.removesuffix("."))])
    return table(["python -m", "does this"], rows)


def demo_part(log: RunLog) -> str:
    """Returns the scores of a run stage by stage.

    Changes are differences of the rounded scores, so that the columns agree.
    """
    s, training = log.settings, log.stages["training"]
    titles = {
        "training": "end of training",
        "averaged": f"averaged weights ({AVERAGES.get(log.chosen, log.chosen)})",
        "roundtrip": "artifact, read back",
        "sliding": f"sliding windows, stride {s['EVAL_STRIDE']}",
        "streaming": "streaming, each position once",
        "ttt": "score-first TTT",
    }
    rows, before = [], None
    for name, stage in log.stages.items():
        bpb = round(stage.val_bpb, 4)
        change = "" if before is None else f"{bpb - before:+.4f}"
        rows.append(
            [
                titles[name],
                f"{bpb:.4f}",
                re.sub("[+-](0.0000)", r"\1", change),
                f"{stage.seconds:.1f}",
                f"{stage.peak_mib:,}",
            ]
        )
        before = bpb
    tokens = int(s["TRAIN_BATCH_TOKENS"])
    speed = f" at {log.steps * tokens / training.seconds:,.0f} tokens per second" if training.seconds else ""
    header = ["stage", "val_bpb", "change", "seconds", "peak memory (MiB)"]
    where = f"{log.hardware}, torch {log.torch}, Python {log.python}"
    size = f"{log.bytes_total:,} bytes, {log.bytes_code:,} of them code"
    notes = [
        f"{log.steps:,} steps of {tokens:,} tokens{speed}, on {where}.",
        f"The model has {log.parameters:,} parameters; the submission takes {size}.",
        "Lower `val_bpb` is better. The seconds of the averaged weights are those of the calibration;",
        "peak memory is the first process's since its start.",
    ]
    return table(header, rows, right=4) + "\n\n" + "\n".join(notes)


def bench_results(folder: Path) -> list[dict]:
    """The figures in folder/*.jsonl, where events of runs lie too. Raises RunError."""
    results = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            try:
                found = json.loads(line)
                if "event" in found:
                    break  # the events of a run
                results += [found] if speed_row(found) or found["bench"] else []
            except (ValueError, KeyError, TypeError, AttributeError):
                raise RunError(
                    f"{path}, line {number}: no figures of tools.measure.bench; measure again"
                ) from None
    return results


def speed_row(found: dict) -> tuple[str, str] | None:
    """Machine and attention kernel, if the figures are for the table: of training, scoring or TTT at the
    record's size.
    """
    where = {"DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE", "RUN_ID", "WARMUP_STEPS", "MICRO_BATCH_TOKENS"}
    if found["settings"].keys() - where or found["bench"] not in ("train", "score", "ttt"):
        return None
    count = "one" if found["processes"] == 1 else f"{found['processes']} x"
    return f"{count} {found['machine'].removeprefix('NVIDIA ')}", found["attention"]


def speed_part(results: list[dict]) -> str:
    """Returns a row for each machine and attention kernel, of the fastest results; one H200 is there in any
    case.
    """
    fastest = {}
    for found in sorted(results, key=lambda found: found.get("tokens_per_second", 0)):
        if row := speed_row(found):
            fastest.setdefault(row, {})[found["bench"]] = found
    if not any(machine == "one H200" for machine, _ in fastest):
        fastest["one H200", NOT_MEASURED] = {}
    rows = []
    for (machine, attention), found in sorted(fastest.items()):
        train, score, ttt = (found.get(name) for name in ("train", "score", "ttt"))
        step = train and 1000 * 786_432 * train["processes"] / train["tokens_per_second"]
        cells = (
            train and f"{step:,.1f}",
            train and f"{train['tokens_per_second']:,.0f}",
            train and f"{train['share_of_peak']:.1%}",
            score and f"{score['tokens_per_second']:,.0f}",
            ttt and f"{ttt['seconds_per_million_tokens']:.2f}",
            train and f"{train['peak_memory_mib']:,}",
        )
        rows.append([machine, attention, *(cell or NOT_MEASURED for cell in cells)])
    return table(
        [
            "machine",
            "attention kernel",
            "step (ms)",
            "tokens/s",
            "of peak",
            "scored/s",
            "TTT (s)",
            "memory (MiB)",
        ],
        rows,
        right=6,
    )


def quantizers_part(path: Path) -> str:
    """Returns loss against bytes, by the figures of tools.measure.quant_report. Raises RunError, OSError."""
    try:
        found = json.loads(path.read_text("utf-8"))
        rows, best, group = [], [], []
        for point in found["points"]:
            if point["method"] == "rtn+lzma":
                record = group = point
                best += [point]
            elif group["bytes"] < point["bytes"] or point["bytes"] < 0.99 * group["bytes"]:
                continue  # beyond the last size of the record's
            rows.append(
                [
                    f"`{point['method']}`",
                    f"{point['bytes']:,}",
                    f"{point['gap']:+.5f} ± {point['gap_error']:.5f}",
                    f"{point['kl']:.5f}",
                    f"{point['kl'] / record['kl']:.3f}",
                ]
            )
        saved = [f"{point['saved_at_kl']:.1%}" for point in best if point["saved_at_kl"] is not None]
        return "\n".join(
            [
                table(
                    [
                        "stored as",
                        "bytes",
                        "loss above unrounded weights'",
                        "KL from them",
                        "of `rtn+lzma`'s",
                    ],
                    rows,
                    right=4,
                ),
                "",
                f"On {found['tokens']:,} tokens of validation text; the unrounded weights' loss is "
                f"{found['loss']:.4f}.\nWhere it loses as much (by KL), `gptq+ans` takes "
                f"{' / '.join(saved)} fewer bytes than the rows of `rtn+lzma`.",
            ]
        )
    except (ValueError, KeyError, TypeError) as e:
        raise RunError(f"{path}: no figures of tools.measure.quant_report ({e}); measure again") from None


def full_size_part(logs: Path) -> str:
    """Returns what the recipes cost at full size, as bench artifact and cuda_check count. Raises RunError."""
    rows = []
    for recipe, name in (("record", "cuda_check.txt"), ("frontier", "cuda_check_frontier.txt")):
        path = logs / f"full_size_{recipe}.json"
        try:
            found = json.loads(path.read_text("utf-8"))
            step = re.search(
                r"^training step, 8 x .*, floor ([\d.]+) ms", (logs / name).read_text("utf-8"), re.M
            )
            flop = [f"{found[what] / 1e6:,.0f}" for what in ("training_flop_per_token", "with_loops")]
            size, code_size = found["with_code"], found["with_code"] - found["artifact_bytes"]
            parameters = f"{found['parameters']:,}"
            rows.append([f"`{recipe}`", parameters, *flop, f"{size:,}", f"{code_size:,}", step[1]])
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(f"{path}, {name}: no figures of bench artifact and cuda_check") from None
    header = [
        "recipe",
        "parameters",
        "MFLOP a token",
        "with loops",
        "bytes",
        "of these code",
        "step's floor (ms)",
    ]
    return table(header, rows, right=6)


def scoring_part(path: Path) -> str:
    """Returns ways to score, from the figures of tools.measure.bench_eval. Raises RunError, OSError."""
    try:
        return scoring_report(json.loads(path.read_text("utf-8")))
    except (ValueError, KeyError, TypeError, IndexError) as e:
        raise RunError(f"{path}: no figures of tools.measure.bench_eval ({e}); measure again") from None


def replace_part(text: str, name: str, body: str, path: str) -> str:
    """Returns a text with another body of a part.

    Raises RunError unless the part's opening line is there once and an end follows it before another part
    opens.
    """
    opening = re.split(rf"^(<!-- generated: {name} -->\n)", text, flags=re.MULTILINE)
    if len(opening) != 3:
        raise RunError(
            f"{path}: has the line `<!-- generated: {name} -->` {len(opening) // 2} times; "
            "it must have it once"
        )
    end = re.search(r"^<!-- (end|generated: \w+) -->$", opening[2], re.MULTILINE)
    if not end or end[1] != "end":
        raise RunError(
            f"{path}: no line `<!-- end -->` closes the part `{name}`; add it where the part is to end"
        )
    return f"{opening[0]}{opening[1]}\n{body}\n\n{opening[2][end.start() :]}"


PARTS: dict[str, tuple[str, Callable[[Path], str]]] = {  # where each part stands, what makes it
    "demo": ("README.md", lambda root: demo_part(read_log(root / "logs/demo.txt"))),
    "tools": ("docs/tools.md", tools_part),
    "settings": ("docs/settings.md", lambda root: settings_part()),
    "recipes": ("docs/frontier.md", lambda root: recipes_part()),
    "full-size": ("docs/frontier.md", lambda root: full_size_part(root / "logs")),
    "speed": ("docs/gpu.md", lambda root: speed_part(bench_results(root / "logs"))),
    "quantizers": ("docs/experiments.md", lambda root: quantizers_part(root / "logs/quantizers.json")),
    "ablation": (
        "docs/experiments.md",
        lambda root: ablation_part([root / "logs/ablation.json", root / "logs/ablation_seeds.json"]),
    ),
    "ablation-42": ("docs/experiments.md", lambda root: ablation_part([root / "logs/ablation_42.json"])),
    "tuning": ("docs/experiments.md", lambda root: ablation_part([root / "logs/tuning.json"])),
    "tuning-8": ("docs/experiments.md", lambda root: ablation_part([root / "logs/tuning_8.json"])),
    "experts": ("docs/experiments.md", lambda root: experts_part(sorted(root.glob("logs/experts_*.json")))),
    "ngrams": ("docs/experiments.md", lambda root: ngrams_part(sorted(root.glob("logs/ngrams_*.json")))),
    "scoring": ("docs/experiments.md", lambda root: scoring_part(root / "logs/bench_eval.json")),
}


def main(argv: list[str] | None = None) -> None:
    """Write the parts."""
    parser = Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a part is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md, docs/ and logs/")
    args = parser.parse_args(argv)
    with ends_in_one_line():
        old = {place: (args.root / place).read_text("utf-8") for place, _ in PARTS.values()}
        new, stale = dict(old), []
        for name, (place, make) in PARTS.items():
            before = new[place]
            new[place] = replace_part(before, name, make(args.root), place)
            if new[place] != before:
                stale.append(f"{name} in {place}")
        if args.check and stale:
            raise RunError(f"not up to date: {', '.join(stale)}; run `python -m tools.reports.docs`")
        for place, text in new.items():
            if text != old[place]:
                write_atomically(args.root / place, text.encode())
        print(f"wrote {', '.join(stale)}" if stale else "up to date")


if __name__ == "__main__":
    main()
