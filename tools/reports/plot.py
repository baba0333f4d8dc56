"""Draw up to six runs: loss, rates, scores, TTT, where seconds and bytes went.

    python -m tools.reports.plot logs/RUN_A.txt logs/RUN_B.txt --out runs.png

Takes logs of this program, of the challenge's scripts, and of runs that go on. What a log does not tell is
left out, and the panel says of which log. The same logs make the same file.
"""

import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tools.common.cli import Parser, ends_in_one_line
from tools.reports.curves import LIMIT_BYTES, LIMIT_SECONDS, LOOKS, PARTS, STAGES, read_runs
from train_gpt import RunError, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    """The learning rates, with a triangle where SWA begins: on the curve, or at 0 without one."""
    from matplotlib.lines import Line2D

    unknown = [name for name, run in runs.items() if not len(run["multiplier"]) and not run["moments"]]
    for (colour, line, _), run in zip(LOOKS, runs.values(), strict=False):
        axes.plot(*run["multiplier"].T, linestyle=line, color=colour, linewidth=1.4)
        if "SWA" in run["moments"]:
            step = run["moments"]["SWA"]
            height = np.interp(step, *run["multiplier"].T) if len(run["multiplier"]) else 0
            axes.plot(
                step,
                height,
                "^",
                color=colour,
                markeredgecolor="black",
                markersize=8,
                clip_on=False,
                zorder=3,
            )
    axes.set(xlim=(0, max(1, *(run["steps"] for run in runs.values()))), ylim=(0, 1.08))
    if not any(len(run["multiplier"]) for run in runs.values()):
        axes.set_yticks([])
    if any(run["moments"] for run in runs.values()):
        look = {"linestyle": "", "color": "0.6", "markeredgecolor": "black", "markersize": 8}
        triangle = Line2D([], [], marker="^", **look)
        axes.legend([triangle], ["SWA begins"], loc="lower left", fontsize=8)
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


def draw_weights(axes: "Axes", runs: dict[str, dict]) -> None:
    """The weights of the first ensemble's members over the text, stacked."""
    name, experts = next((name, run["experts"]) for name, run in runs.items() if run["experts"])
    parts = len(next(iter(experts.values())))
    axes.stackplot((np.arange(parts) + 0.5) * 100 / parts, *experts.values(), labels=list(experts))
    axes.set(xlim=(0, 100), ylim=(0, 1))
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "fontsize": 7, "title_fontsize": 7}
    axes.legend(**beside, title="bits per byte alone", reverse=True)
    others = [other for other, run in runs.items() if not run["experts"]]
    title = "TTT: weights in the mixture" + (f" of {name}" if len(runs) > 1 else "")
    finish(axes, title, "validation text scored (%)", "share", others, len(runs))


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
    draw = draw_weights if any(run["experts"] for run in runs.values()) else draw_ttt
    draw(figure.add_subplot(grid[1, 8:] if several else grid[1, 6:]), runs)

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
    runs = read_runs(paths)
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
