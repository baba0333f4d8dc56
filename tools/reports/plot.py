"""Draw one or several runs: loss, learning rate, scores, TTT, and where the seconds and the bytes went.

    python -m tools.reports.plot logs/RUN_A.txt logs/RUN_B.txt --out runs.png

Takes logs of this program, of the challenge's scripts, and of runs that go on. What a log does not tell is
left out, and the panel says of which log. The same logs make the same file.
"""

import io
import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tools.common.cli import Parser, ends_in_one_line
from tools.reports.runlog import SCORED_STAGES, latest, read_events
from train_gpt import FIELDS, RunError, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIMIT_SECONDS = 600  # of training with averages and calibration, and of scoring
LIMIT_BYTES = FIELDS["ARTIFACT_LIMIT"].default
STAGES = ["trained", "averaged", "roundtrip", "sliding", "streaming", "TTT"]
# The colours of M. Okabe and K. Ito, which colour-blind people can tell apart; line, marker and hatch do so
# in grey print
LOOKS = [
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#E69F00", (0, (8, 2)), "v"),
    ("#56B4E9", (0, (3, 1, 1, 1, 1, 1)), "P"),
]
PARTS = {
    "steps": ("#0072B2", ""),
    "averages, calibration": ("#56B4E9", "////"),
    "roundtrip": ("#F0E442", ""),
    "sliding": ("#E69F00", "\\\\\\\\"),
    "streaming": ("#E69F00", "xxxx"),
    "TTT": ("#D55E00", ""),
    "warm-up": ("#BBBBBB", ""),
    "score of averaged": ("#CC79A7", "...."),
    "quantizing": ("#009E73", "----"),
    "compiling": ("#777777", "////"),
    "code": ("#CC79A7", "...."),
    "integers' code": ("#0072B2", ""),
    "side information": ("#E69F00", "////"),
    "artifact": ("#56B4E9", ""),
    "code and artifact": ("#009E73", ""),
    "free": ("#FFFFFF", ""),
}


def stage_title(name: str) -> str:
    """A short name of a stage, as the challenge's scripts and this program call them."""
    ours = {title: short.replace("ttt", "TTT") for short, title in SCORED_STAGES.items()}
    return ours.get(name) or next((title for title in STAGES if title.lower() in name), name)


def table(events: list[dict], kind: str, *keys: str) -> np.ndarray:
    """The values (events of the kind, keys) in order; nan where one is absent."""
    rows = [
        [math.nan if event.get(key) is None else event[key] for key in keys]
        for event in events
        if event["event"] == kind
    ]
    return np.array(rows, float).reshape(-1, len(keys))


def known(values: np.ndarray) -> np.ndarray:
    """The rows in which every value is a finite number."""
    return values[np.isfinite(values).all(axis=1)]


def curves(events: list[dict]) -> dict:
    """What is drawn of a run; what its events do not tell is empty.

    Arrays have a row for each point: loss_by_time (training seconds, nats per token), loss_by_tokens (tokens,
    nats per token), multiplier (step, share of the peak learning rate), validations (step, bits per byte),
    ttt (share of the text scored, bits per byte so far). Dicts: moments (steps at which SWA and QAT began),
    scores (bits per byte after each stage), training, scoring and outside (seconds in each part; outside is
    in no limit), size (bytes in each part). steps: the last one told of. without_ttt: bits per byte of the
    stage before TTT.
    """
    settings = latest(events, "settings").get("settings", {})
    batch = settings.get("TRAIN_BATCH_TOKENS", "")
    step, seconds, loss, multiplier = table(
        events, "step", "step", "train_time", "train_loss", "multiplier"
    ).T
    tokens = step * (int(batch) if batch.isdecimal() else math.nan)
    validations = known(table(events, "validation", "step", "val_bpb"))
    chunks = table(events, "ttt_chunk", "chunk", "chunks", "bpb")

    stages = {
        stage_title(event["stage"]): event
        for event in events
        if event["event"] == "stage" and event.get("stage")
    }
    scores = {title: stage.get("val_bpb") for title, stage in stages.items()}
    trained = latest(events, "trained")
    if len(validations) and (trained or stages):
        scores = {"trained": validations[-1, 1]} | scores
    scores = {title: bpb for title, bpb in scores.items() if bpb is not None and math.isfinite(bpb)}
    before = [title for title in scores if title not in ("trained", "averaged", "TTT")]

    steps = trained.get("train_time")
    if steps is None:  # a run that goes on, or a log without that line
        times = np.concatenate([table(events, kind, "train_time") for kind in ("step", "validation")])
        steps = max(known(times)[:, 0], default=0)
    took = {title: stage.get("eval_time") for title, stage in stages.items()}
    parts = {
        "training": {
            "steps": steps,
            "averages, calibration": (trained.get("with_calibration") or steps) - steps,
        },
        "scoring": {title: ms for title, ms in took.items() if title != "averaged"},
        "outside": {
            "warm-up": 1000 * latest(events, "warm_up").get("took", 0),
            "score of averaged": took.get("averaged"),
            "quantizing": 1000 * latest(events, "quantized").get("took", 0),
            "compiling": 1000 * latest(events, "compiled").get("took", 0),
        },
    }

    size = latest(events, "size")
    artifact, side = size.get("artifact_bytes"), size.get("side_bytes")
    code = size.get("code_bytes", latest(events, "settings").get("code_bytes"))
    if artifact is None or code is None:
        whole = {"code and artifact": size.get("total")}
    else:
        whole = {"code": code} | (
            {"artifact": artifact}
            if side is None
            else {"integers' code": artifact - side, "side information": side}
        )
    return dict(
        loss_by_time=known(np.stack((seconds / 1000, loss), 1)),
        loss_by_tokens=known(np.stack((tokens, loss), 1)),
        multiplier=known(np.stack((step, multiplier), 1)),
        validations=validations,
        moments={
            name: latest(events, kind)["step"]
            for name, kind in (("SWA", "swa"), ("QAT", "late_qat"))
            if latest(events, kind).get("step") is not None
        },
        steps=max(known(np.concatenate((step, validations[:, 0]))[:, None])[:, 0], default=0),
        scores=scores,
        ttt=known(np.stack((chunks[:, 0] / np.maximum(chunks[:, 1], 1), chunks[:, 2]), 1)),
        without_ttt=scores[before[-1]] if before else None,
        size={part: count for part, count in whole.items() if count},
        **{name: {part: ms / 1000 for part, ms in found.items() if ms} for name, found in parts.items()},
    )


def is_empty(run: dict) -> bool:
    """Returns whether there is nothing to draw of a run."""
    return not (
        run["scores"]
        or any(len(run[name]) for name in ("loss_by_time", "loss_by_tokens", "validations", "ttt"))
    )


def finish(axes: "Axes", title: str, x: str, y: str, unknown: list[str], count: int) -> None:
    """Titles and units, and the logs of `count` that do not tell what the panel is about."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_ylabel(y)
    if len(unknown) == count:
        axes.set_xlabel(x)
        axes.text(
            0.5,
            0.5,
            "not in the log" if count == 1 else "in none of the logs",
            ha="center",
            va="center",
            color="0.4",
            transform=axes.transAxes,
        )
        axes.set(xticks=[], yticks=[])
    else:
        axes.set_xlabel(x + (f"\n(not in the log of {', '.join(unknown)})" if unknown else ""))
        axes.grid(linewidth=0.3)
        axes.set_axisbelow(True)
        if y:
            axes.ticklabel_format(axis="y", useOffset=False)


def draw_lines(axes: "Axes", runs: dict[str, dict], key: str, x_unit: float = 1) -> list[str]:
    """A curve for each run, whose first twentieth, which is steep, may leave the panel; returns the names of
    those that have none.
    """
    for (colour, line, marker), run in zip(LOOKS, runs.values(), strict=False):
        x, y = run[key].T
        axes.plot(
            x / x_unit,
            y,
            linestyle=line,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.4,
            markevery=max(1, len(x) // 12),
        )
    axes.locator_params(axis="x", nbins=6)
    points = [run[key] for run in runs.values() if len(run[key])]
    if points:
        values = np.concatenate([rows[rows[:, 0] >= 0.05 * rows[-1, 0], 1] for rows in points])
        room = max(np.ptp(values), 2e-3)
        axes.set_ylim(values.min() - 0.08 * room, values.max() + 0.12 * room)
    return [name for name, run in runs.items() if not len(run[key])]


def draw_multiplier(axes: "Axes", runs: dict[str, dict]) -> None:
    """The learning rates, with SWA's beginning as a triangle and QAT's as a square: on the curve, or at 0
    without one.
    """
    from matplotlib.lines import Line2D

    unknown = [name for name, run in runs.items() if not len(run["multiplier"]) and not run["moments"]]
    for (colour, line, _), run in zip(LOOKS, runs.values(), strict=False):
        axes.plot(*run["multiplier"].T, linestyle=line, color=colour, linewidth=1.4)
        for name, shape in (("SWA", "^"), ("QAT", "s")):
            if name in run["moments"]:
                step = run["moments"][name]
                height = np.interp(step, *run["multiplier"].T) if len(run["multiplier"]) else 0
                axes.plot(
                    step,
                    height,
                    shape,
                    color=colour,
                    markeredgecolor="black",
                    markersize=8,
                    clip_on=False,
                    zorder=3,
                )
    axes.set(xlim=(0, max(1, *(run["steps"] for run in runs.values()))), ylim=(0, 1.08))
    if not any(len(run["multiplier"]) for run in runs.values()):
        axes.set_yticks([])
    begun = [
        (name, shape)
        for name, shape in (("SWA", "^"), ("QAT", "s"))
        if any(name in run["moments"] for run in runs.values())
    ]
    if begun:
        axes.legend(
            [
                Line2D([], [], linestyle="", marker=shape, color="0.6", markeredgecolor="black", markersize=8)
                for _, shape in begun
            ],
            [f"{name} begins" for name, _ in begun],
            loc="lower left",
            fontsize=8,
        )
    partly = [name for name, run in runs.items() if run["moments"] and not len(run["multiplier"])]
    finish(
        axes,
        "Learning rate",
        "training steps" + (f"\n(no rate in the log of {', '.join(partly)})" if partly else ""),
        "share of the peak",
        unknown,
        len(runs),
    )


def draw_scores(axes: "Axes", runs: dict[str, dict]) -> None:
    """A point for each stage that a run has, side by side where runs share it; of up to four, with its value
    upright above.
    """
    titles = {title: None for run in runs.values() for title in run["scores"]}
    titles = sorted(titles, key=lambda title: STAGES.index(title) if title in STAGES else 2.5)
    for i, ((colour, line, marker), run) in enumerate(zip(LOOKS, runs.values(), strict=False)):
        shift = (i - (len(runs) - 1) / 2) * 0.7 / len(runs)
        points = [(titles.index(title) + shift, bpb) for title, bpb in run["scores"].items()]
        axes.plot(
            *np.reshape(sorted(points), (-1, 2)).T, linestyle=line, color=colour, marker=marker, linewidth=1
        )
        for x, bpb in points if len(runs) <= 4 else ():
            axes.annotate(
                f"{bpb:.4f}",
                (x, bpb),
                (0, 8),
                textcoords="offset points",
                ha="center",
                va="bottom",
                rotation=90,
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )
    if titles:
        low, high = (f(bpb for run in runs.values() for bpb in run["scores"].values()) for f in (min, max))
        room = max(high - low, 1e-3)
        axes.set(
            xlim=(-0.6, len(titles) - 0.4),
            ylim=(low - 0.1 * room, high + 0.5 * room),
            xticks=range(len(titles)),
            xticklabels=titles,
        )
    finish(
        axes,
        "Validation score after each stage (lower is better)",
        "",
        "bits per byte",
        [name for name, run in runs.items() if not run["scores"]],
        len(runs),
    )


def draw_ttt(axes: "Axes", runs: dict[str, dict]) -> None:
    """Running scores, and as dotted lines the score of the stage before."""
    from matplotlib.lines import Line2D

    unknown = draw_lines(axes, runs, "ttt", 0.01)
    without = [
        (look[0], run["without_ttt"])
        for look, run in zip(LOOKS, runs.values(), strict=False)
        if len(run["ttt"]) and run["without_ttt"] is not None
    ]
    for colour, bpb in without:
        axes.axhline(bpb, color=colour, linestyle=(0, (1, 1.5)), linewidth=1.8)
    if without:
        low, high = axes.get_ylim()
        room = 0.06 * (high - low)
        axes.set_ylim(
            min(low, *(bpb - room for _, bpb in without)), max(high, *(bpb + room for _, bpb in without))
        )
        axes.legend(
            [Line2D([], [], color="0.3", linestyle=(0, (1, 1.5)), linewidth=1.8)],
            ["without TTT"],
            loc="upper right",
            bbox_to_anchor=(1, 1.11),
            borderaxespad=0,
            borderpad=0,
            fontsize=8,
            frameon=False,
        )
    if len(unknown) < len(runs):
        axes.set_xlim(0, 100)
    finish(axes, "TTT: score so far", "validation text scored (%)", "bits per byte", unknown, len(runs))


def draw_bars(
    axes: "Axes",
    key: "Axes",
    rows: list[tuple[str, dict]],
    limits: list[float],
    unit: float,
    number: str,
    columns: int,
) -> None:
    """Stacked bars (title, amount of each part), one below the other, filled up with what is free of the
    row's limit. Wide parts show their amount, and the axes `key` say in `columns` which is which, with the
    amounts if they are of one run.
    """
    from matplotlib.patches import Patch

    used, amounts = {}, {}
    widest = max(max(sum(parts.values()), limit) for (_, parts), limit in zip(rows, limits, strict=False))
    right = 1.02 * widest / unit
    for i, ((_, parts), limit) in enumerate(zip(rows, limits, strict=False)):
        left, free = 0, limit - sum(parts.values())
        for part, amount in (parts | ({"free": free} if free > 0 and parts else {})).items():
            colour, hatch = used[part] = PARTS.get(part, ("#999999", "++++"))
            amounts.setdefault(part, []).append(number.format(amount / unit))
            axes.barh(
                i,
                amount / unit,
                0.7,
                left / unit,
                color=colour,
                hatch=hatch,
                edgecolor="black",
                linewidth=0.6,
            )
            if amount / unit > 0.07 * right:
                axes.text(
                    (left + amount / 2) / unit,
                    i,
                    number.format(amount / unit),
                    ha="center",
                    va="center",
                    fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
                )
            left += amount
    axes.set(
        yticks=range(len(rows)),
        yticklabels=[title for title, _ in rows],
        ylim=(len(rows) - 0.4, -0.6),
        xlim=(0, right),
    )
    one = all(len(amounts[part]) == 1 for part in used if part != "free")
    parts = sorted(used, key=lambda part: [*PARTS, part].index(part))
    axes.tick_params(axis="y", length=0, labelsize=8)
    key.axis("off")
    key.legend(
        [Patch(facecolor=used[part][0], hatch=used[part][1], edgecolor="black") for part in parts],
        [f"{part} {' + '.join(amounts[part])}" if one else part for part in parts],
        loc="upper center",
        ncols=columns,
        fontsize=8,
        frameon=False,
        borderaxespad=0,
    )


def draw(runs: dict[str, dict]) -> bytes:
    """A PNG of runs, name: curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from PIL import Image

    count, file = len(runs), io.BytesIO()
    figure = Figure(figsize=(14, 8.8 + 0.8 * count), layout="constrained")
    grid = figure.add_gridspec(4, 12, height_ratios=[3.2, 3.2, 0.8 + 0.8 * count, 0.9])
    short = [name if len(name) <= 18 else f"{name[:8]}…{name[-9:]}" for name in runs]
    runs = dict(zip(short if len({*short}) == count else runs, runs.values(), strict=False))

    axes = figure.add_subplot(grid[0, :4])
    finish(
        axes,
        "Training loss by time",
        "training time (s)",
        "nats per token",
        draw_lines(axes, runs, "loss_by_time"),
        count,
    )
    axes = figure.add_subplot(grid[0, 4:8])
    finish(
        axes,
        "Training loss by tokens",
        "training tokens (million)",
        "nats per token",
        draw_lines(axes, runs, "loss_by_tokens", 1e6),
        count,
    )
    draw_multiplier(figure.add_subplot(grid[0, 8:]), runs)

    # more than the one of step 0 and the one after the last step, which is the first of the scores
    several = any(np.count_nonzero(run["validations"][:, 0]) > bool(run["scores"]) for run in runs.values())
    if several:
        axes = figure.add_subplot(grid[1, :3])
        finish(
            axes,
            "Validation while training",
            "training steps",
            "bits per byte",
            draw_lines(axes, runs, "validations"),
            count,
        )
    draw_scores(figure.add_subplot(grid[1, 3:8] if several else grid[1, :6]), runs)
    draw_ttt(figure.add_subplot(grid[1, 8:] if several else grid[1, 6:]), runs)

    axes = figure.add_subplot(grid[2, :8])
    rows = [
        (f"{name} {part}" if count > 1 else part, run[part])
        for name, run in runs.items()
        for part in ("training", "scoring", "outside")
        if part != "outside" or run[part]
    ]
    draw_bars(
        axes,
        figure.add_subplot(grid[3, :8]),
        rows,
        [0 if title.endswith("outside") else LIMIT_SECONDS for title, _ in rows],
        1,
        "{:.0f}",
        5,
    )
    axes.axvline(LIMIT_SECONDS, color="black", linewidth=1.5)
    finish(
        axes,
        f"Where {LIMIT_SECONDS} + {LIMIT_SECONDS} seconds went (outside: in neither limit)",
        "seconds",
        "",
        [name for name, run in runs.items() if not run["training"] and not run["scoring"]],
        count,
    )
    axes = figure.add_subplot(grid[2, 8:])
    rows = [(name if count > 1 else "", run["size"]) for name, run in runs.items()]
    draw_bars(axes, figure.add_subplot(grid[3, 8:]), rows, [LIMIT_BYTES] * count, 1e6, "{:.2f}", 2)
    axes.axvline(LIMIT_BYTES / 1e6, color="black", linewidth=1.5)
    finish(
        axes,
        f"Where {LIMIT_BYTES:,} bytes went",
        "million bytes",
        "",
        [name for name, run in runs.items() if not run["size"]],
        count,
    )

    handles = [
        Line2D([], [], color=colour, linestyle=line, marker=marker) for colour, line, marker in LOOKS[:count]
    ]
    last = [
        f": {[*run['scores'].values()][-1]:.4f} bits per byte" if run["scores"] else ""
        for run in runs.values()
    ]
    figure.legend(
        handles,
        [name + score for name, score in zip(runs, last, strict=False)],
        loc="outside upper center",
        ncols=3,
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(128, Image.Quantize.MAXCOVERAGE).save(
        file, "PNG", optimize=True
    )  # a palette: a third of the bytes
    return file.getvalue()


def plot(paths: list[Path], out: Path) -> int:
    """Write the PNG; returns its bytes. Raises RunError, OSError."""
    if not find_spec("matplotlib"):
        raise RunError("plots need matplotlib: pip install -r tools/requirements.txt")
    if out.suffix != ".png" or not out.parent.is_dir():
        raise RunError(
            f"--out {out}: "
            + (f"there is no folder {out.parent}" if out.suffix == ".png" else "must end in .png")
        )
    if len(paths) > len(LOOKS):
        raise RunError(f"{len(paths)} logs: at most {len(LOOKS)} can be told apart; plot fewer at once")
    stems = [path.stem for path in paths]
    runs = {
        str(path) if stems.count(path.stem) > 1 else path.stem: curves(read_events(path)) for path in paths
    }
    for path, run in zip(paths, runs.values(), strict=False):
        if is_empty(run):
            raise RunError(f"{path}: nothing to plot: it has no step with a loss and no score")
    if len(runs) < len(paths):
        raise RunError("the same log is given twice")
    data = draw(runs)
    write_atomically(out, data)
    return len(data)


def main(argv: list[str] | None = None) -> None:
    """Draw the runs of the arguments."""
    parser = Parser(__doc__)
    parser.add_argument(
        "logs", type=Path, nargs="+", help="logs/RUN_ID.txt or .jsonl, or a log of the challenge's scripts"
    )
    parser.add_argument("--out", type=Path, help="PNG to write (the first log's name, with .png)")
    args = parser.parse_args(argv)
    with ends_in_one_line():
        out = args.out or args.logs[0].with_suffix(".png")
        size = plot(args.logs, out)
        print(f"wrote {out}, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
