"""tools.reports.docs: the generated parts of README.md and docs/, and that what those say holds."""

import ast
import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from tests import commands
from tests.tools.reports.test_runlog import PRINTED, committed, make_log
from tests.tools.test_layout import COMMANDS
from tools.common.cli import ROOT
from tools.common.spelling import RETIRED
from tools.common.tables import code, table
from tools.reports import docs
from tools.reports.runlog import parse_log, split_source
from train_gpt import FIELDS, RunError, allowed, show

TEMPLATES = {
    "README.md": """# Title

Before.

Between: the line `<!-- generated: demo -->` opens a part.

<!-- generated: demo -->
old text
<!-- end -->

After.
""",
    "docs/tools.md": "<!-- generated: tools -->\n<!-- end -->\n",
    "docs/settings.md": "# Settings\n\n<!-- generated: settings -->\n<!-- end -->\n",
    "docs/frontier.md": """<!-- generated: recipes -->
<!-- end -->

<!-- generated: full-size -->
<!-- end -->
""",
    "docs/gpu.md": "<!-- generated: speed -->\n<!-- end -->\n",
    "docs/experiments.md": """<!-- generated: quantizers -->
<!-- end -->

<!-- generated: ablation -->
<!-- end -->

<!-- generated: ablation-42 -->
<!-- end -->

<!-- generated: tuning -->
<!-- end -->

<!-- generated: tuning-8 -->
<!-- end -->

<!-- generated: experts -->
<!-- end -->

<!-- generated: ngrams -->
<!-- end -->

<!-- generated: scoring -->
<!-- end -->

After.
""",
}


EXPERTS = {
    "title": "2 tokens a weight",
    "experts": [
        {"expert": "lr=0", "bpb": 2.5, "seconds": 10},
        {"expert": "lr=0.02", "bpb": 2.25, "seconds": 30},
        {"expert": "lr=0.04", "bpb": 2.375, "seconds": 20},
    ],
    "mixtures": [{"mix": [0, 1, 2], "bpb": 2.125}, {"mix": [0, 2], "bpb": 2.3125}],
}


NGRAMS = {
    "title": "2 tokens a weight",
    "experts": [{"expert": "lr=0", "bpb": 2.5}, {"expert": "lr=0.02", "bpb": 2.25}],
    "mixtures": [
        {"mix": mix, "cache": order, "bpb": 2 + best / 8 - order / 32, "seconds": order / 2}
        for best, mix in enumerate(([0, 1], [1], [0]))
        for order in (0, 2, 4, 6)
    ],
}


def ablation_of(seed):
    """What tools.measure.ablation leaves of two variants."""
    scores = {"steps": 40, "trained": 2.6, "quantized": 2.6}
    return {
        "rows": [
            {"variant": name, "seed": seed, "after TTT": 2.5 - seed / 100, **scores}
            for name in ("record", "frontier")
        ]
    }


FULL_SIZE = {
    "parameters": 1000,
    "training_flop_per_token": 2.5e8,
    "with_loops": 3.75e8,
    "artifact_bytes": 900,
    "with_code": 1020,
}
ALL = (
    "demo in README.md, tools in docs/tools.md, settings in docs/settings.md, recipes in docs/frontier.md, "
    "full-size in docs/frontier.md, speed in docs/gpu.md, quantizers in docs/experiments.md, "
    "ablation in docs/experiments.md, ablation-42 in docs/experiments.md, tuning in docs/experiments.md, "
    "tuning-8 in docs/experiments.md, experts in docs/experiments.md, ngrams in docs/experiments.md, "
    "scoring in docs/experiments.md"
)
TOOL = '''"""Count the words of a log.

    python -m tools.reports.count logs/RUN_ID.txt

More of it.
"""
'''

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
        *(
            {
                "mode": "streaming + TTT",
                "settings": f"EVAL_WINDOW=512 TTT_LR={lr}",
                "seconds": [50.0] * 3,
                "tokens": 200000,
                "val_bpb": bpb,
            }
            for lr, bpb in ((0.1, 2.0), (0.2, 2.05))
        ),
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
    """The current folder, with README.md, docs/, logs/ and a tool."""
    monkeypatch.chdir(tmp_path)
    for place in ("docs", "logs", "tools/reports"):
        Path(place).mkdir(parents=True)
    for place, text in TEMPLATES.items():
        Path(place).write_text(text, "utf-8")
    Path("tools/reports/count.py").write_text(TOOL)
    Path("tools/reports/part.py").write_text('"""Holds what count.py needs."""\n')
    Path("logs/demo.txt").write_text(make_log(), "utf-8")
    Path("logs/quantizers.json").write_text(json.dumps(QUANTIZERS))
    Path("logs/bench_eval.json").write_text(json.dumps(SCORING))
    names = ("ablation", "ablation_seeds", "ablation_42", "tuning", "tuning_8")
    for name, seed in zip(names, (1, 2, 42, 7, 8), strict=True):
        Path(f"logs/{name}.json").write_text(json.dumps(ablation_of(seed)))
    Path("logs/experts_02.json").write_text(json.dumps(EXPERTS))
    Path("logs/ngrams_2.json").write_text(json.dumps(NGRAMS))
    for recipe, name, step in (
        ("record", "cuda_check", "420.5"),
        ("frontier", "cuda_check_frontier", "860.25"),
    ):
        Path(f"logs/full_size_{recipe}.json").write_text(json.dumps(FULL_SIZE))
        Path(f"logs/{name}.txt").write_text(
            f"PyTorch\ntraining step, 8 x 98,304 tokens: 3 launches, floor {step} ms; more\n"
        )
    return tmp_path


def texts() -> dict[str, str]:
    return {place: Path(place).read_text("utf-8") for place in TEMPLATES}


def run(*arguments: str) -> dict[str, str]:
    docs.main(["--root", ".", *arguments])
    return texts()


def fails(*arguments: str) -> str:
    before = texts()
    line = commands.fails(docs.main, "--root", ".", *arguments)
    assert texts() == before
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
    "step (ms)",
    "tokens/s",
    "of peak",
    "scored/s",
    "TTT (s)",
    "memory (MiB)",
]
NONE = ["not measured"] * 8


def result(bench, machine="NVIDIA H200", processes=1, attention="cudnn", tokens_per_second=1e6, **changed):
    """Of a line of tools.measure.bench what docs.py reads; settings in capitals."""
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


def test_the_ablations_part_joins_its_files(folder):
    paths = [Path("logs/ablation.json"), Path("logs/ablation_seeds.json")]
    text = docs.ablation_part(paths)
    assert "| frontier | 40    | 2.6000  | 2.6000    | 2.4850    | 0.0100      | +0.0000        |" in text
    paths[1].write_text('{"rows": 3}')
    with pytest.raises(RunError, match="logs/ablation_seeds.json: no figures of tools.measure.ablation"):
        docs.ablation_part(paths)


def test_the_full_size_part_counts_and_says_which_log_lacks_what(folder):
    text = docs.full_size_part(Path("logs"))
    assert cells(text)[1:] == [
        ["`record`", "1,000", "250", "375", "1,020", "120", "420.5"],
        ["`frontier`", "1,000", "250", "375", "1,020", "120", "860.25"],
    ]
    Path("logs/cuda_check_frontier.txt").write_text("training step, 8 x 98,304 tokens: FAILED")
    told = (
        "logs/full_size_frontier.json, cuda_check_frontier.txt: no figures of bench artifact and cuda_check"
    )
    with pytest.raises(RunError, match=told):
        docs.full_size_part(Path("logs"))


def test_the_experts_part_compares_mixtures_with_the_best_alone(folder):
    path = Path("logs/experts_02.json")
    mixed = "| 2.3125 (+0.0625) | 2.1250 (-0.1250) | 30, 60  |"
    assert f"| 2 tokens a weight | 2.5000       | 2.2500     | `lr=0.02` {mixed}" in docs.experts_part([path])
    path.write_text('{"experts": []}')
    with pytest.raises(RunError, match="logs/experts_02.json: no figures of tools.measure.experts"):
        docs.experts_part([path])


def test_the_n_grams_part_has_what_each_gains_by_them(folder):
    path = Path("logs/ngrams_2.json")
    scores = "2.5000, 2.0625     | 2.2500, 1.9375   | 2.0000     | 1.9375  | 1.8750  | 1.8125  | 3.0     |"
    assert f"| 2 tokens a weight | {scores}" in docs.ngrams_part([path])
    path.write_text('{"experts": []}')
    with pytest.raises(RunError, match="logs/ngrams_2.json: no figures of tools.measure.experts --cache"):
        docs.ngrams_part([path])


def test_the_quantizers_part_has_the_points_of_equal_size_and_what_is_saved(folder):
    text = docs.quantizers_part(Path("logs/quantizers.json"))
    assert cells(text)[1:] == [
        ["`rtn+lzma`", "1,700,000", "+0.00130 ± 0.00020", "0.00120", "1.000"],
        ["`gptq+ans`", "1,698,000", "-0.00004 ± 0.00010", "0.00006", "0.050"],
        ["`rtn+lzma`", "1,200,000", "+0.00830 ± 0.00030", "0.00800", "1.000"],
        ["`gptq+ans`", "1,199,000", "+0.00060 ± 0.00020", "0.00050", "0.062"],
    ]
    assert "`gptq+ans` takes 26.0% fewer bytes" in text and "131,072 tokens" in text and "3.6500" in text
    for broken in ("{", "[]", "{}", '{"points": [1]}'):
        Path("logs/quantizers.json").write_text(broken)
        assert fails().startswith("logs/quantizers.json: no figures of tools.measure.quant_report")


def test_the_scoring_part_compares_with_the_first_row(folder):
    text = docs.scoring_part(Path("logs/bench_eval.json"))
    assert cells(text)[1:] == [
        ["sliding", "", "2.10000", "+0.00000", "100.0", "2,000", "1.00"],
        ["streaming", "", "2.10021", "+0.00021", "12.0", "16,667", "8.33"],
        ["streaming + TTT", "0.1", "2.00000", "-0.10000", "50.0", "4,000", "2.00"],
        ["streaming + TTT", "0.2", "2.05000", "-0.05000", "50.0", "4,000", "2.00"],
    ]
    assert cells(text)[0][1] == "lr" and "`EVAL_STRIDE=64`, `EVAL_SEQ_LEN=512`, `EVAL_WINDOW=512`." in text
    assert "On 200,000 tokens, 2 x CPU (x86_64), torch 2.13.0; seconds: median of 3, taking turns." in text
    for broken in ("{", "[]", "{}", '{"rows": []}'):
        Path("logs/bench_eval.json").write_text(broken)
        assert fails().startswith("logs/bench_eval.json: no figures of tools.measure.bench_eval")


def test_the_demo_part_knows_streaming():
    printed = PRINTED.replace("final_int6_sliding_window", "final_int6_streaming")
    log = parse_log(make_log(printed, EVAL_MODE="streaming"), "sketch")
    assert list(log.stages) == ["training", "averaged", "roundtrip", "streaming", "ttt"]
    assert cells(docs.demo_part(log))[-2][:3] == ["streaming, each position once", "3.0788", "-0.0097"]


def test_figures_are_read_from_the_folder(folder):
    Path("logs/a.jsonl").write_text(json.dumps(result("ttt")) + "\n" + json.dumps(result("score")) + "\n")
    Path("logs/b.jsonl").write_text(json.dumps(result("train")) + "\n")
    assert cells(part(run()["docs/gpu.md"], "speed"))[1] == [
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
        Path("logs/b.jsonl").write_text(f"{json.dumps(result('train'))}\n{broken}\n")
        assert fails() == "logs/b.jsonl, line 2: no figures of tools.measure.bench; measure again"


def test_events_of_runs_are_no_figures(folder):
    Path("logs/a.jsonl").write_text(json.dumps(result("train")) + "\n")
    expected = part(run()["docs/gpu.md"], "speed")
    Path("logs/run.jsonl").write_text(
        json.dumps({"event": "settings", "time": 0.1, "settings": {}}) + '\n{"event": "cut'
    )
    assert part(run()["docs/gpu.md"], "speed") == expected


def test_the_tools_part_has_the_first_sentence_of_each_command(folder):
    assert cells(docs.tools_part(folder)) == [
        ["python -m", "does this"],
        ["`tools.reports.count`", "Count the words of a log"],
    ]
    names = {row[0].strip("`") for row in cells(docs.tools_part(ROOT))[1:]}
    assert names == set(COMMANDS)


def test_only_the_parts_change_and_a_second_run_changes_nothing(folder, capsys):
    files = {path for path in folder.rglob("*") if path.is_file()}
    found = run()
    for place, text in found.items():
        emptied = re.sub(r"(?ms)^(<!-- generated: [\w-]+ -->\n).*?(^<!-- end -->$)", r"\1\2", text)
        assert emptied == TEMPLATES[place].replace("old text\n", "")
    assert part(found["docs/settings.md"], "settings").strip() == docs.settings_part()
    assert part(found["docs/frontier.md"], "recipes").strip() == docs.recipes_part()
    assert part(found["README.md"], "demo").strip() == docs.demo_part(parse_log(make_log(), "sketch"))
    assert run() == run("--check") == found
    assert capsys.readouterr().out.splitlines() == [f"wrote {ALL}", "up to date", "up to date"]
    assert {path for path in folder.rglob("*") if path.is_file()} == files


def test_check_fails_and_changes_nothing_when_a_part_is_stale(folder):
    assert fails("--check") == f"not up to date: {ALL}; run `python -m tools.reports.docs`"
    run()
    Path("logs/demo.txt").write_text(make_log(PRINTED.replace("val_bpb:3.07092080", "val_bpb:3.06092080")))
    assert "not up to date: demo in README.md; run" in fails("--check")


@pytest.mark.parametrize(
    "place, old, new, told",
    [
        ("docs/tools.md", "<!-- generated: tools -->\n", "", "`<!-- generated: tools -->` 0 times"),
        ("README.md", "After.\n", "<!-- generated: demo -->\n<!-- end -->\n", "generated: demo -->` 2 times"),
        ("docs/experiments.md", "<!-- end -->\n\nAfter.", "After.", "closes the part `scoring`"),
        (
            "docs/experiments.md",
            "<!-- generated: quantizers -->\n<!-- end -->\n",
            "<!-- generated: quantizers -->\n",
            "closes the part `quantizers`",
        ),
    ],
)
def test_a_marker_that_is_missing_or_doubled_is_named(folder, place, old, new, told):
    assert TEMPLATES[place].count(old) == 1
    Path(place).write_text(TEMPLATES[place].replace(old, new))
    for arguments in ([], ["--check"]):
        line = fails(*arguments)
        assert line.startswith(f"{place}: ") and told in line


def test_a_demo_that_did_not_finish_is_refused(folder):
    Path("logs/demo.txt").write_text(make_log(PRINTED[: PRINTED.index("legal_ttt eval_time")]))
    assert fails().startswith("logs/demo.txt: has no score of legal_ttt, so the run did not finish")
    Path("logs/demo.txt").unlink()
    assert fails() == "logs/demo.txt: cannot be read (No such file or directory)"


# This project's own documents

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "logs/README.md",
    *sorted(ROOT.glob("docs/*.md")),
]


def test_this_projects_generated_parts_are_up_to_date_and_the_demos_scores_are_its_logs(tmp_path):
    """With the demo's log as it was committed: `make demo` writes it anew."""
    for name in ("README.md", "docs", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "logs").mkdir()
    for path in (*ROOT.glob("logs/*.json*"), *ROOT.glob("logs/cuda_check*.txt")):
        (tmp_path / "logs" / path.name).write_text(committed(f"logs/{path.name}"), "utf-8")
    text = committed("logs/demo.txt")
    (tmp_path / "logs/demo.txt").write_text(text, "utf-8")
    docs.main(["--check", "--root", str(tmp_path)])
    demo = part((ROOT / "README.md").read_text("utf-8"), "demo")
    scores = [row[1] for row in cells(demo)[1:]]
    logged = re.findall(r"val_bpb:(\d+\.\d+)", text)
    assert len(scores) >= 4 and set(scores) <= {f"{float(number):.4f}" for number in logged}


def test_the_readme_is_short():
    assert 9_000 < (ROOT / "README.md").stat().st_size <= 12_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_lines_and_tables_that_fit(page):
    too_long = [line for line in page.read_text("utf-8").splitlines() if len(line) > 140]
    assert not too_long


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_pages_links_lead_somewhere(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]*)(?:#[^)]*)?\)", text):
        assert not target or (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#([^)]*)\)", text):
        titles = re.findall(r"^#+ (.*)", (page.parent / (target or page.name)).read_text("utf-8"), re.M)
        assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_settings_and_places_that_a_page_names_exist(page):
    text = page.read_text("utf-8")
    for name in re.findall(r"-m (tools\.[\w.]+)", text):
        assert name.rstrip(".") in COMMANDS, name
    for target in re.findall(r"make ([a-z-]+)`", text):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text("utf-8"), target
    for name in re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]+)(?:=[^`]*)?`", text):
        assert name in {*FIELDS, *RETIRED, *NO_SETTINGS}, name


NO_SETTINGS = {
    "OMP_NUM_THREADS",
    "TORCH_COMPILE_DISABLE",
    "TORCHINDUCTOR_MAX_AUTOTUNE_GEMM",
    "TORCHINDUCTOR_MIX_ORDER_REDUCTION",
    "EVAL_MODES",
    "MAX_",
    "RUN_ID",
}


def test_places_to_change_are_in_the_program():
    text = (ROOT / "README.md").read_text("utf-8")
    rows = cells(text[text.index("## Where to change what") :])[1:11]
    assert len(rows) == 10
    source = ast.parse((ROOT / "train_gpt.py").read_text("utf-8"))
    defined = {
        node.name if hasattr(node, "name") else getattr(node, "id", getattr(node, "attr", ""))
        for node in ast.walk(source)
    }
    for row in rows:
        for name in re.findall(r"`([\w.]+)`", row[1]):
            assert set(name.split(".")) - {"torch", "optim"} <= defined | {"Optimizer"}, name


def test_each_log_is_listed_with_the_source_it_is_of():
    text = (ROOT / "logs/README.md").read_text("utf-8")
    listed = {}
    for names, _, source in cells(text)[1:]:
        first, *suffixes = re.findall(r"`([\w.]+)`", names)
        listed |= dict.fromkeys((first, *(first.removesuffix(".txt") + s for s in suffixes)), source)
    tracked = subprocess.run(["git", "ls-files", "logs"], cwd=ROOT, capture_output=True, text=True).stdout
    assert {Path(path).name for path in tracked.split()} - {"README.md"} <= listed.keys()
    for name, source in listed.items():
        text = committed(f"logs/{name}") if name.endswith((".txt", ".jsonl")) else ""
        found = re.findall(r'"source_sha256": "(\w{12})', text)
        program = split_source(text)[0]
        if program:
            found.append(hashlib.sha256(program.encode()).hexdigest()[:12])
        assert {*found} <= {source.split()[0]}, name


def test_the_submission_json_says_that_it_is_no_entry_and_holds_the_demos_numbers():
    s = json.loads((ROOT / "submission.json").read_text("utf-8"))
    assert "not an entry" in [*s.items()][0][1]
    log = parse_log(committed("logs/demo.txt"), "demo")
    assert s["val_bpb"] == log.final.val_bpb and s["bytes_total"] == log.bytes_total
    assert s["source_sha256"] == log.source_sha256
