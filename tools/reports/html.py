"""Make a page of up to six runs for a browser: scores, curves, seconds, bytes, audit, settings.

    python -m tools.reports.html logs/RUN_ID.txt
    python -m tools.reports.html logs/RUN_A.txt logs/RUN_B.txt --out runs.html

The page is one file that loads nothing: curves can be hovered and zoomed. It takes what tools.reports.plot
takes, and logs/RUN_ID.audit.json where that lies beside a log. What a log does not tell is left out, and the
page says so. The same logs make the same page.
"""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tools.common.cli import Parser, check_folder_of, ends_in_one_line
from tools.reports.curves import LIMIT_BYTES, LIMIT_SECONDS, LOOKS, PARTS, STAGES, read_runs
from tools.reports.runlog import Event, latest, read_audit, read_events
from train_gpt import RunError, write_atomically

DASHES = ("solid", "dash", "dashdot", "dot", "longdash", "longdashdot")  # of LOOKS, as plotly calls them
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1180px;
       margin: 0 auto; padding: 0 16px 48px; }
h1 { font-size: 1.6rem; margin: 1.2rem 0 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; }
.lead { font-size: 1.05rem; } .note { color: #595959; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 12px; }
.wide { grid-column: 1 / -1; }
.chart { min-width: 0; overflow: hidden; border: 1px solid #ddd; border-radius: 6px; padding: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 12px 3px 0; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.text, th.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; } th { font-weight: 600; }
td:first-child { white-space: nowrap; }
.good { color: #00664a; } .bad { color: #a32a00; font-weight: 600; }
"""


class Page(NamedTuple):
    """A run to show."""

    curves: dict[str, Any]  # of tools.reports.curves
    events: list[Event]
    audit: dict[str, Any] | None  # what logs/RUN_ID.audit.json holds, if it is there


# Parts of the page


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = (0,)) -> str:
    """Returns a table; the columns `text` are prose, the others numbers."""
    lines = []
    for kind, row in [("th", header), *(("td", row) for row in rows)]:
        cells = (
            f"<{kind}{' class=text' if i in text else ''}>{escape(cell)}</{kind}>"
            for i, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=scroll><table>{''.join(lines)}</table></div>"


def section(title: str, body: str, note: str = "") -> str:
    """Returns a part of the page, with a note below its title."""
    told = f"<p class=note>{escape(note)}</p>" if note else ""
    return f"<h2>{escape(title)}</h2>{told}{body}"


def lead(name: str, page: Page) -> str:
    """Returns what a run is, in a paragraph."""
    run, machine, trained = page.curves, latest(page.events, "machine"), latest(page.events, "trained")
    data, size = latest(page.events, "data"), latest(page.events, "size")
    facts = []
    if run["scores"]:
        title, bpb = [*run["scores"].items()][-1]
        facts.append(f"<b>val_bpb {bpb:.4f}</b> (bits per byte after {escape(title)}; lower is better)")
    steps, seconds = trained.get("steps") or int(run["steps"]), run["training"].get("steps")
    if steps and seconds:
        speed = latest(page.events, "step").get("tokens_per_second")
        facts.append(
            f"{steps:,} steps in {seconds:,.1f} s" + (f", {speed:,.0f} tokens a second" if speed else "")
        )
    if data.get("parameters"):
        facts.append(f"{data['parameters']:,} parameters")
    if size.get("total"):
        share = size["total"] / LIMIT_BYTES
        facts.append(f"{size['total']:,} bytes with code, {share:.1%} of {LIMIT_BYTES:,}")
    if machine.get("hardware"):
        where = f"{machine.get('processes') or '?'} x {machine['hardware']}"
        versions = f"torch {machine.get('torch')}, Python {machine.get('python')}"
        facts.append(escape(f"{where}, {versions}"))
    last = page.events[-1] if page.events else {}
    if last.get("event") in ("error", "stopped"):
        facts.append(f"<span class=bad>{escape(str(last.get('message') or 'stopped by a signal'))}</span>")
    elif not run["scores"]:
        facts.append("not scored: the run goes on or broke off")
    return f"<p class=lead><b>{escape(name)}</b>: {'; '.join(facts)}.</p>"


def settings_part(pages: dict[str, Page]) -> str:
    """Returns a table of the settings that are not the defaults in one of the runs."""
    told = {name: latest(page.events, "settings") for name, page in pages.items()}
    changed = [{*event.get("changed", event.get("settings", {}))} for event in told.values()]
    rows = [
        [setting, *(event.get("settings", {}).get(setting, "") for event in told.values())]
        for setting in sorted(set().union(*changed))
    ]
    if not rows:
        return section("Settings", "", "All are the defaults, or the log does not tell.")
    columns = range(len(pages) + 1)
    return section("Settings that differ from the defaults", html_table(["", *pages], rows, columns))


def scores_part(pages: dict[str, Page], chart: str) -> str:
    """Returns the scores after each stage, and what each changed."""
    stages = {title: None for page in pages.values() for title in page.curves["scores"]}
    order = sorted(stages, key=lambda title: STAGES.index(title) if title in STAGES else len(STAGES))
    rows = []
    for name, page in pages.items():
        scores = page.curves["scores"]
        rows.append([name, *(f"{scores[title]:.4f}" if title in scores else "" for title in order)])
    if not order:
        return section("Scores", "", "No stage has a score yet.")
    note = "Bits per byte of the validation text, lower is better; the last one is the result."
    return section("Scores after each stage", html_table(["", *order], rows) + chart, note)


def audit_part(pages: dict[str, Page]) -> str:
    """Returns what the audits found."""
    parts = []
    for name, page in pages.items():
        if page.audit is None:
            parts.append(f"<p>{escape(name)}: <span class=note>no audit lies beside the log</span></p>")
            continue
        violations, stages = page.audit["violations"], page.audit["stages"]
        verdict = "<span class=good>no violation</span>"
        if violations:
            verdict = "".join(f"<br><span class=bad>{escape(line)}</span>" for line in violations)
        parts.append(f"<p>{escape(name)}: {verdict}, in {page.audit['share']:.1%} of the time of scoring</p>")
        checks = {check: None for stage in stages.values() for check in stage.get("checks", {})}
        rows = [
            [stage, *(f"{found.get('checks', {}).get(check, 0):,}" for check in checks)]
            for stage, found in stages.items()
        ]
        parts.append(html_table([f"checks made ({name})", *checks], rows))
    return section("Audit of the scoring", "".join(parts))


# Charts


def curve(pages: dict[str, Page], key: str, unit: float = 1.0) -> list[dict[str, Any]]:
    """Returns plotly's traces of a curve, one a run, x over a unit."""
    traces = []
    for (colour, _, _), dash, (name, page) in zip(LOOKS, DASHES, pages.items(), strict=False):
        points = page.curves[key]
        if len(points):
            look = {"color": colour, "dash": dash, "width": 2}
            x, y = (points[:, 0] / unit).tolist(), points[:, 1].tolist()
            mode = "lines+markers" if len(points) < 60 else "lines"
            traces.append({"type": "scatter", "name": name, "x": x, "y": y, "mode": mode, "line": look})
    return traces


def weights(page: Page) -> list[dict[str, Any]]:
    """Returns the weights of an ensemble's experts over the text, stacked."""
    traces = []
    for expert, shares in page.curves["experts"].items():
        x = [(i + 0.5) * 100 / len(shares) for i in range(len(shares))]
        traces.append({"type": "scatter", "name": expert, "x": x, "y": shares, "stackgroup": "experts"})
    return traces


def level_without_ttt(pages: dict[str, Page]) -> list[dict[str, Any]]:
    """Returns dotted lines: the score of the stage before TTT."""
    traces = []
    for (colour, _, _), (name, page) in zip(LOOKS, pages.items(), strict=False):
        bpb = page.curves["without_ttt"]
        if len(page.curves["ttt"]) and bpb is not None:
            look = {"color": colour, "dash": "dot", "width": 2}
            title = f"{name}, without TTT"
            traces.append(
                {
                    "type": "scatter",
                    "name": title,
                    "x": [0, 100],
                    "y": [bpb] * 2,
                    "mode": "lines",
                    "line": look,
                }
            )
    return traces


def moments(pages: dict[str, Page]) -> list[dict[str, Any]]:
    """Returns markers where SWA begins, on the learning rate."""
    traces = []
    for (colour, _, _), (name, page) in zip(LOOKS, pages.items(), strict=False):
        rate = page.curves["multiplier"]
        step = page.curves["moments"].get("SWA")
        if step is not None:
            height = float(np.interp(step, *rate.T)) if len(rate) else 0.0
            edge = {"color": "black", "width": 1}
            look = {"color": colour, "symbol": "triangle-up", "size": 12, "line": edge}
            traces.append(
                {
                    "type": "scatter",
                    "name": f"{name}, SWA begins",
                    "x": [step],
                    "y": [height],
                    "mode": "markers",
                    "marker": look,
                }
            )
    return traces


def score_chart(pages: dict[str, Page]) -> list[dict[str, Any]]:
    """Returns a line of scores by stage for each run."""
    traces = []
    for (colour, _, _), dash, (name, page) in zip(LOOKS, DASHES, pages.items(), strict=False):
        scores = page.curves["scores"]
        if scores:
            look = {"color": colour, "dash": dash, "width": 2}
            x, y = [*scores], [*map(float, scores.values())]
            traces.append(
                {"type": "scatter", "name": name, "x": x, "y": y, "mode": "lines+markers", "line": look}
            )
    return traces


def bars(rows: dict[str, dict[str, float]], limit: float, unit: float) -> list[dict[str, Any]]:
    """Returns stacked bars (row: amount of each part), filled up with what is free of the limit."""
    filled = {}
    for row, parts in rows.items():
        free = limit - sum(parts.values())
        filled[row] = parts | ({"free": free} if free > 0 and "outside" not in row else {})
    traces, known = [], [*PARTS]
    every = {part: None for parts in filled.values() for part in parts}
    for part in sorted(every, key=lambda part: known.index(part) if part in known else len(known)):
        colour = PARTS.get(part, ("#999999", ""))[0]
        x = [parts.get(part, 0.0) / unit for parts in filled.values()]
        look = {"color": colour, "line": {"color": "black", "width": 0.5}}
        traces.append(
            {"type": "bar", "orientation": "h", "name": part, "x": x, "y": [*filled], "marker": look}
        )
    return traces


def seconds_rows(pages: dict[str, Page]) -> dict[str, dict[str, float]]:
    """Returns the seconds of each part, by run and limit."""
    several = len(pages) > 1
    return {
        f"{name} {limit}" if several else limit: page.curves[limit]
        for name, page in pages.items()
        for limit in ("training", "scoring", "outside")
        if page.curves[limit]
    }


def chart(
    title: str,
    traces: list[dict[str, Any]],
    axes: tuple[str, str],
    missing: Sequence[str] = (),
    height: int = 300,
    wide: bool = False,
) -> str:
    """Returns a chart with titles of its axes (bars have none of y), or a line if there is none to draw."""
    import plotly.graph_objects as go

    (x, y), bars_only = axes, not axes[1]
    if not traces:
        return f"<div class=chart><p><b>{escape(title)}</b></p><p class=note>not in the log</p></div>"
    note = f"<br><sup>not in the log of {escape(', '.join(missing))}</sup>" if missing else ""
    figure = go.Figure(data=[trace | {"name": escape(trace["name"])} for trace in traces])
    legend_rows = -(-len(traces) // (6 if wide else 2)) if len(traces) > 1 else 0
    figure.update_layout(
        title={"text": escape(title) + note, "font": {"size": 15}, "x": 0.02},
        template="plotly_white",
        font={"color": "#1a1a1a"},
        margin={"l": 64, "r": 16, "t": 52, "b": 60 + 22 * legend_rows},
        height=height + 22 * legend_rows,
        legend={"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom", "x": 0},
        showlegend=len(traces) > 1,
        hovermode="closest" if bars_only else "x unified",
        barmode="stack",
        xaxis={"title": {"text": x}},
        yaxis={"title": {"text": y}, "automargin": True, "autorange": "reversed" if bars_only else True},
    )
    if not x:  # stages
        figure.update_xaxes(categoryorder="array", categoryarray=STAGES)
    name = "chart-" + "".join(c if c.isalnum() else "-" for c in title.lower())
    config = {"responsive": True, "displayModeBar": False}
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)
    return f"<div class='chart{' wide' if wide else ''}'>{drawn}</div>"


def missing(pages: dict[str, Page], key: str) -> list[str]:
    """Returns the names of the runs whose log lacks a curve."""
    return [name for name, page in pages.items() if not len(page.curves[key])]


def charts_part(pages: dict[str, Page]) -> str:
    """Returns the curves."""
    loss, bits = "nats per token", "bits per byte"
    rates, ttt = curve(pages, "multiplier") + moments(pages), curve(pages, "ttt", 0.01)
    charts = [
        ("Training loss by time", curve(pages, "loss_by_time"), ("seconds", loss), "loss_by_time"),
        (
            "Training loss by tokens",
            curve(pages, "loss_by_tokens", 1e6),
            ("million tokens", loss),
            "loss_by_tokens",
        ),
        ("Learning rate", rates, ("steps", "share of the peak"), "multiplier"),
        ("TTT: score so far", ttt + level_without_ttt(pages), ("validation text scored (%)", bits), "ttt"),
    ]
    for name, page in pages.items():
        if page.curves["experts"]:
            title = f"TTT: weights in the mixture of {name}"
            charts.append((title, weights(page), ("validation text scored (%)", "share"), "experts"))
    if any(len(page.curves["validations"]) > 2 for page in pages.values()):
        traces = curve(pages, "validations")
        charts.append(("Validation while training", traces, ("steps", bits), "validations"))
    drawn = [chart(title, traces, axes, missing(pages, key)) for title, traces, axes, key in charts]
    note = "Drag to zoom, double-click to reset."
    return section("Curves", f"<div class=charts>{''.join(drawn)}</div>", note)


def bytes_and_seconds_part(pages: dict[str, Page]) -> str:
    """Returns where the seconds and the bytes went."""
    rows = seconds_rows(pages)
    sizes = {name: page.curves["size"] for name, page in pages.items() if page.curves["size"]}
    seconds = chart(
        f"Seconds, of {LIMIT_SECONDS} for training and {LIMIT_SECONDS} for scoring",
        bars(rows, LIMIT_SECONDS, 1.0),
        ("seconds (outside: in neither limit)", ""),
        height=120 + 40 * len(rows),
        wide=True,
    )
    taken = chart(
        f"Bytes, of {LIMIT_BYTES:,}",
        bars(sizes, LIMIT_BYTES, 1e6),
        ("million bytes", ""),
        height=120 + 40 * len(sizes),
        wide=True,
    )
    return section("Where the seconds and the bytes went", f"<div class=charts>{seconds}{taken}</div>")


def page_of(pages: dict[str, Page]) -> str:
    """Returns the whole page."""
    from plotly.offline import get_plotlyjs

    title = " and ".join(pages) if len(pages) < 3 else f"{len(pages)} runs"
    scores = chart("Scores", score_chart(pages), ("", "bits per byte"), wide=True)
    body = "".join(
        [
            f"<h1>{escape(title)}</h1>",
            *(lead(name, page) for name, page in pages.items()),
            scores_part(pages, f"<div class=charts>{scores}</div>"),
            charts_part(pages),
            bytes_and_seconds_part(pages),
            audit_part(pages),
            settings_part(pages),
        ]
    )
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def write_page(paths: list[Path], out: Path) -> int:
    """Write the page; returns its bytes. Raises RunError, OSError."""
    if not find_spec("plotly"):
        raise RunError("pages need plotly: pip install -r tools/requirements.txt")
    if out.suffix != ".html":
        raise RunError(f"--out {out}: must end in .html")
    check_folder_of(out)
    runs = read_runs(paths)
    pages = {
        name: Page(found, read_events(path), read_audit(path))
        for (name, found), path in zip(runs.items(), paths, strict=True)
    }
    data = page_of(pages).encode()
    write_atomically(out, data)
    return len(data)


def main(argv: list[str] | None = None) -> None:
    """Make a page of the runs of the arguments."""
    parser = Parser(__doc__)
    parser.add_argument("logs", type=Path, nargs="+", help="logs/RUN_ID.txt or .jsonl")
    parser.add_argument("--out", type=Path, help="page to write (the first log's name, with .html)")
    args = parser.parse_args(argv)
    with ends_in_one_line():
        out = args.out or args.logs[0].with_suffix(".html")
        size = write_page(args.logs, out)
        print(f"wrote {out}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
