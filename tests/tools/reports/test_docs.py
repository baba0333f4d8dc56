"""tools/reports/docs.py: the generated parts of README.md."""

import json
import re
from pathlib import Path

import pytest

from tests import commands
from tests.tools.reports.test_runlog import PRINTED, committed, make_log
from tools.common.cli import ROOT
from tools.common.tables import code, table
from tools.reports import docs
from tools.reports.runlog import parse_log
from train_gpt import FIELDS, allowed, show

TEMPLATE = """# Title

Before.

<!-- generated: settings -->
<!-- end -->

Between: the line `<!-- generated: demo -->` opens a part.

<!-- generated: demo -->
old text
<!-- end -->

<!-- generated: speed -->
<!-- end -->

<!-- generated: quantizers -->
<!-- end -->

<!-- generated: scoring -->
<!-- end -->

After.
"""

SCORING = {
    "machine": "2 x CPU (x86_64)",
    "torch": "2.13.0",
    "rows": [
        {
            "mode": "sliding",
            "settings": "EVAL_STRIDE=64 EVAL_SEQ_LEN=512",
            "seconds": [100.0, 90.0, 120.0],
            "tokens": 200000,
            "val_bpb": 2.1,
        },
        {
            "mode": "streaming",
            "settings": "EVAL_WINDOW=512",
            "seconds": [12.5, 10.0, 12.0],
            "tokens": 200000,
            "val_bpb": 2.10021,
        },
    ],
}


QUANTIZERS = {
    "tokens": 131072,
    "loss": 3.65,
    "points": [  # as tools.measure.quant_report writes them, but for what is not read
        {
            "method": "rtn+lzma",
            "bytes": 1_700_000,
            "gap": 0.0013,
            "gap_error": 0.0002,
            "kl": 0.0012,
            "saved_at_kl": 0.26,
        },
        {"method": "gptq+ans", "bytes": 1_698_000, "gap": -0.00004, "gap_error": 0.0001, "kl": 0.00006},
        {
            "method": "rtn+lzma",
            "bytes": 1_200_000,
            "gap": 0.0083,
            "gap_error": 0.0003,
            "kl": 0.008,
            "saved_at_kl": None,
        },
        {"method": "gptq+ans", "bytes": 1_199_000, "gap": 0.0006, "gap_error": 0.0002, "kl": 0.0005},
        {"method": "gptq+ans", "bytes": 800_000, "gap": 0.01, "gap_error": 0.0002, "kl": 0.009},
    ],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with README.md, demo.txt, quantizers.json and bench_eval.json."""
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(TEMPLATE, "utf-8")
    Path("demo.txt").write_text(make_log(), "utf-8")
    Path("quantizers.json").write_text(json.dumps(QUANTIZERS))
    Path("bench_eval.json").write_text(json.dumps(SCORING))
    return tmp_path


ARGUMENTS = (
    "--readme README.md --log demo.txt --bench . --quantizers quantizers.json --scoring bench_eval.json"
)


def run(*arguments: str) -> str:
    docs.main([*ARGUMENTS.split(), *arguments])
    return Path("README.md").read_text("utf-8")


def fails(*arguments: str) -> str:
    before = Path("README.md").read_bytes()
    line = commands.fails(docs.main, *ARGUMENTS.split(), *arguments)
    assert Path("README.md").read_bytes() == before
    return line


def cells(text: str) -> list[list[str]]:
    """The cells of all table rows in a Markdown text."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]


def part(text: str, name: str) -> str:
    return re.search(rf"^<!-- generated: {name} -->\n(.*?)^<!-- end -->$", text, re.DOTALL | re.MULTILINE)[1]


def test_the_settings_part_has_a_row_for_each_setting_in_order():
    text, groups = docs.settings_part(), docs.GROUPS
    rows = [row for row in cells(text) if row[0] != "setting"]
    assert [row[0].strip("`") for row in rows] == list(FIELDS)
    assert text.count("**") == 2 * len(groups) == 2 * text.count("| setting")
    for name, default, range_, meaning in rows:
        f, name = FIELDS[name.strip("`")], name.strip("`")
        assert default == (f"`{show(f.default)}`" if show(f.default) else "empty")
        assert (range_, meaning.replace("`", "")) == (allowed(f), f.metadata["help"])


def test_names_in_meanings_are_code():
    assert code("score ARTIFACT_PATH, train nothing") == "score `ARTIFACT_PATH`, train nothing"
    assert code("if TIE_EMBEDDINGS=0; logs/RUN_ID.txt;") == "if `TIE_EMBEDDINGS=0`; `logs/RUN_ID.txt`;"
    assert code("in fineweb_{train,val}_*.bin") == "in `fineweb_{train,val}_*.bin`"
    assert (
        code("raw, ema, ema_swa; an MLP, 1/sqrt(layer + 1)") == "raw, ema, ema_swa; an MLP, 1/sqrt(layer + 1)"
    )


def test_the_demo_part_says_what_the_log_says():
    text = docs.demo_part(parse_log(make_log(), "sketch"))
    assert cells(text) == [
        ["stage", "val_bpb", "change", "seconds", "peak memory (MiB)"],
        ["end of training", "3.1111", "", "20.0", "687"],
        ["averaged weights (EMA)", "3.0831", "-0.0280", "18.1", "687"],
        ["artifact, read back", "3.0885", "+0.0054", "7.9", "1,687"],
        ["sliding windows, stride 32", "3.0788", "-0.0097", "29.1", "1,702"],
        ["score-first TTT", "3.0709", "-0.0079", "75.5", "2,687"],
    ]
    assert (
        "40 steps of 4,096 tokens at 8,192 tokens per second, on 8 x NVIDIA H100 80GB HBM3, torch 2.9.1+cu128"
        in text
    )
    assert "3,327,044 parameters; the submission takes 2,923,801 bytes" in text


def test_an_average_that_changes_nothing_has_no_sign():
    printed = PRINTED.replace("chosen average:ema", "chosen average:raw").replace(
        "val_bpb:3.08305629", "val_bpb:3.11105629"
    )
    row = cells(docs.demo_part(parse_log(make_log(printed), "sketch")))[2]
    assert row[:3] == ["averaged weights (raw: the last step's)", "3.1111", "0.0000"]


def test_without_ttt_its_row_is_absent():
    log = parse_log(make_log(PRINTED[: PRINTED.index("ttt_chunk")], TTT_ENABLED="0"), "sketch")
    assert cells(docs.demo_part(log))[-1][0] == "sliding windows, stride 32"


def test_columns_are_of_even_width_and_bars_are_escaped():
    assert table(["a", "number"], [["x|y", "1"]], right=1).splitlines() == [
        "| a    | number |",
        "|------|-------:|",
        r"| x\|y |      1 |",
    ]


HEADER = [
    "machine",
    "attention kernel",
    "ms per 786,432-token step per GPU",
    "tokens/s",
    "share of peak",
    "scoring tokens/s",
    "TTT seconds per million tokens",
    "peak memory (MiB)",
]
NONE = ["not measured"] * 8


def result(bench, machine="NVIDIA H200", processes=1, attention="cudnn", tokens_per_second=1e6, **changed):
    """Of a line of tools.measure.bench what readme.py reads; settings in capitals."""
    return {
        "bench": bench,
        "machine": machine,
        "processes": processes,
        "attention": attention,
        "tokens_per_second": tokens_per_second,
        "share_of_peak": 0.4321,
        "peak_memory_mib": 54321,
        "seconds_per_million_tokens": 12.345,
        "settings": changed,
    }


def test_the_speed_part_without_figures_says_so():
    assert cells(docs.speed_part([])) == [HEADER, ["one H200", *NONE[1:]]]


def test_the_speed_part_has_the_fastest_figures_of_each_machine_and_kernel():
    text = docs.speed_part(
        [
            result("train", tokens_per_second=1_250_000),
            result("train", tokens_per_second=1_200_000),
            result("train", tokens_per_second=1_300_000, MICRO_BATCH_TOKENS="196608"),
            result("train", tokens_per_second=9e9, NUM_LAYERS="2"),
            result("score", tokens_per_second=62_000.4),
            result("score", tokens_per_second=2e6, EVAL_STRIDE="2048"),
            result("ttt", DATA_PATH="x"),
            result("train", attention="flash", tokens_per_second=1_100_000),
            result("artifact"),
            result("train", machine="NVIDIA H100 80GB HBM3", processes=8, tokens_per_second=9_000_000),
        ]
    )
    assert cells(text) == [
        HEADER,
        ["8 x H100 80GB HBM3", "cudnn", "699.1", "9,000,000", "43.2%", *NONE[:2], "54,321"],
        ["one H200", "cudnn", "604.9", "1,300,000", "43.2%", "62,000", "12.35", "54,321"],
        ["one H200", "flash", "714.9", "1,100,000", "43.2%", *NONE[:2], "54,321"],
    ]


def test_the_quantizers_part_has_the_points_of_equal_size_and_what_is_saved(folder):
    text = docs.quantizers_part(Path("quantizers.json"))
    assert cells(text)[1:] == [
        ["`rtn+lzma`", "1,700,000", "+0.00130 ± 0.00020", "0.00120", "1.000"],
        ["`gptq+ans`", "1,698,000", "-0.00004 ± 0.00010", "0.00006", "0.050"],
        ["`rtn+lzma`", "1,200,000", "+0.00830 ± 0.00030", "0.00800", "1.000"],
        ["`gptq+ans`", "1,199,000", "+0.00060 ± 0.00020", "0.00050", "0.062"],
    ]
    assert "`gptq+ans` takes 26.0% fewer bytes" in text and "131,072 tokens" in text and "3.6500" in text
    for broken in ("{", "[]", "{}", '{"points": [1]}'):
        Path("quantizers.json").write_text(broken)
        assert fails().startswith("quantizers.json: no figures of tools.measure.quant_report")


def test_the_scoring_part_compares_with_the_first_row(folder):
    text = docs.scoring_part(Path("bench_eval.json"))
    assert cells(text)[1:] == [
        ["sliding", "`EVAL_STRIDE=64` `EVAL_SEQ_LEN=512`", "2.10000", "+0.00000", "100.0", "2,000", "1.00"],
        ["streaming", "`EVAL_WINDOW=512`", "2.10021", "+0.00021", "12.0", "16,667", "8.33"],
    ]
    assert "On 200,000 tokens, 2 x CPU (x86_64), torch 2.13.0; seconds: median of 3, taking turns." in text
    for broken in ("{", "[]", "{}", '{"rows": []}'):
        Path("bench_eval.json").write_text(broken)
        assert fails().startswith("bench_eval.json: no figures of tools.measure.bench_eval")


def test_the_demo_part_knows_streaming():
    printed = PRINTED.replace("final_int6_sliding_window", "final_int6_streaming")
    log = parse_log(make_log(printed, EVAL_MODE="streaming"), "sketch")
    assert list(log.stages) == ["training", "averaged", "roundtrip", "streaming", "ttt"]
    assert cells(docs.demo_part(log))[-2][:3] == ["streaming, each position once", "3.0788", "-0.0097"]


def test_figures_are_read_from_the_folder(folder):
    Path("a.jsonl").write_text(json.dumps(result("ttt")) + "\n" + json.dumps(result("score")) + "\n")
    Path("b.jsonl").write_text(json.dumps(result("train")) + "\n")
    assert cells(part(run(), "speed"))[1] == [
        "one H200",
        "cudnn",
        "786.4",
        "1,000,000",
        "43.2%",
        "1,000,000",
        "12.35",
        "54,321",
    ]
    for broken in ("{", "[]", "1", '{"bench": "train"}'):
        Path("b.jsonl").write_text(f"{json.dumps(result('train'))}\n{broken}\n")
        assert fails() == "b.jsonl, line 2: no figures of tools.measure.bench; measure again"


def test_events_of_runs_are_no_figures(folder):
    Path("a.jsonl").write_text(json.dumps(result("train")) + "\n")
    expected = part(run(), "speed")
    Path("run.jsonl").write_text(
        json.dumps({"event": "settings", "time": 0.1, "settings": {}}) + '\n{"event": "cut'
    )
    assert part(run(), "speed") == expected


def test_only_the_parts_change_and_a_second_run_changes_nothing(folder, capsys):
    text = run()
    emptied = re.sub(r"(?ms)^(<!-- generated: \w+ -->\n).*?(^<!-- end -->$)", r"\1\2", text)
    assert emptied == TEMPLATE.replace("old text\n", "")
    assert part(text, "settings").strip() == docs.settings_part()
    assert part(text, "demo").strip() == docs.demo_part(parse_log(make_log(), "sketch"))
    assert run() == run("--check") == text
    assert capsys.readouterr().out.splitlines() == [
        "README.md: wrote settings and demo and speed and quantizers and scoring",
        "README.md: up to date",
        "README.md: up to date",
    ]
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "bench_eval.json",
        "demo.txt",
        "quantizers.json",
    ]


def test_check_fails_and_changes_nothing_when_a_part_is_stale(folder):
    assert (
        fails("--check")
        == "README.md: not up to date (settings and demo and speed and quantizers and scoring); "
        "run `python -m tools.reports.docs`"
    )
    run()
    Path("demo.txt").write_text(make_log(PRINTED.replace("val_bpb:3.07092080", "val_bpb:3.06092080")))
    assert "not up to date (demo)" in fails("--check")


@pytest.mark.parametrize(
    "old, new, told",
    [
        ("<!-- generated: settings -->\n", "", "`<!-- generated: settings -->` 0 times"),
        ("After.\n", "<!-- generated: demo -->\n<!-- end -->\n", "`<!-- generated: demo -->` 2 times"),
        ("<!-- end -->\n\nAfter.", "After.", "closes the part `scoring`"),
        (
            "<!-- generated: settings -->\n<!-- end -->\n",
            "<!-- generated: settings -->\n",
            "closes the part `settings`",
        ),
    ],
)
def test_a_marker_that_is_missing_or_doubled_is_named(folder, old, new, told):
    assert TEMPLATE.count(old) == 1
    Path("README.md").write_text(TEMPLATE.replace(old, new))
    assert told in fails()
    assert told in fails("--check")


def test_a_demo_that_did_not_finish_is_refused(folder):
    Path("demo.txt").write_text(make_log(PRINTED[: PRINTED.index("legal_ttt eval_time")]))
    assert fails().startswith("demo.txt: has no score of legal_ttt, so the run did not finish")
    Path("demo.txt").unlink()
    assert fails() == "demo.txt: cannot be read (No such file or directory)"


def test_the_repositorys_readme_is_up_to_date_and_its_scores_are_the_logs(tmp_path):
    """With the log as it was committed: `make demo` writes it anew."""
    text = committed("logs/demo.txt")
    (tmp_path / "demo.txt").write_text(text, "utf-8")
    docs.main(
        [
            "--check",
            "--readme",
            str(ROOT / "README.md"),
            "--log",
            str(tmp_path / "demo.txt"),
            "--bench",
            str(ROOT / "logs"),
            "--quantizers",
            str(ROOT / "logs/quantizers.json"),
            "--scoring",
            str(ROOT / "logs/bench_eval.json"),
        ]
    )
    demo = part((ROOT / "README.md").read_text("utf-8"), "demo")
    scores = [row[1] for row in cells(demo)[1:]]
    logged = re.findall(r"val_bpb:(\d+\.\d+)", text)
    assert len(scores) >= 4 and set(scores) <= {f"{float(number):.4f}" for number in logged}
