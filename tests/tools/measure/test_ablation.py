"""tools/measure/ablation.py: variants that can be trained, and a comparison of what came of them."""

import json
from pathlib import Path

import pytest

import train_gpt as T
from tests.commands import fails
from tools.measure import ablation

BPB = {"averaged": 2.5, "final_int6_roundtrip": 2.6, "legal_ttt": 2.4}


def finished(folder, name, seed, gain):
    """Leave the events of a run whose scores are BPB less a gain."""
    events = [{"event": "trained", "steps": 100 + seed, "train_time": 1000 * seed}]
    events += [{"event": "stage", "stage": stage, "val_bpb": bpb - gain} for stage, bpb in BPB.items()]
    path = folder / f"logs/{name}_{seed}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, [*events, {"event": "finished"}])))


def test_every_part_of_the_recipe_is_left_out_once():
    given = {name for name in ablation.environment(Path("data")) if name in T.FIELDS}
    parts = [name for names in ablation.PARTS.values() for name in names]
    assert len(parts) == len({*parts}) and given & {*parts} == {"VE_LAYERS"}  # the record's at this size
    for name, settings in ablation.variants().items():
        values = {name: x for name, x in ablation.environment(Path("data")).items() if name in T.FIELDS}
        s = T.parse_settings(values | settings)
        assert s.recipe == ("record" if name == "record" else "frontier") and s.eval_mode == "streaming"


def test_runs_that_have_finished_are_compared_and_not_repeated(tmp_path, capsys):
    for seed, more in ((1, 0.0), (2, 0.02)):
        finished(tmp_path, "record", seed, more)
        finished(tmp_path, "frontier", seed, 0.1 + more)
    only = ("--only", "record", "frontier", "--seeds", "1", "2", "--out", str(tmp_path))
    ablation.main(["data", *only, "--json", str(tmp_path / "found.json")])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["record", "102", "2", "2.4900", "2.5900", "2.3900", "0.0200", "+0.1000"] in rows
    assert ["frontier", "102", "2", "2.3900", "2.4900", "2.2900", "0.0200", "+0.0000"] in rows
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["variant"], row["seed"]) for row in found["rows"]] == [
        ("record", 1),
        ("frontier", 1),
        ("record", 2),
        ("frontier", 2),
    ]


def test_other_values_of_the_frontiers_settings_are_compared_after_as_many_steps(tmp_path, capsys):
    finished(tmp_path, "frontier", 7, 0.1)
    finished(tmp_path, "MUON_WD=0.03", 7, 0.15)
    json_path = tmp_path / "found.json"
    only = ("--only", "frontier", "--try", "MUON_WD=0.03", "--steps", "107", "--seeds", "7")
    ablation.main(["data", *only, "--out", str(tmp_path), "--json", str(json_path)])
    assert "+0.0000" in capsys.readouterr().out.splitlines()[-2]
    found = json.loads(json_path.read_text())
    assert found["steps"] == 107 and "seconds" not in found
    assert found["rows"][1]["variant"] == "MUON_WD=0.03"
    assert found["rows"][1]["settings"] == ablation.SMALL | {"MUON_WD": "0.03"}


@pytest.mark.parametrize(
    "text, told",
    [("MUON_WD=-1", "MUON_WD='-1': allowed is"), ("MUON=1", "MUON is no setting"), ("x", "x is no")],
)
def test_a_value_that_no_run_would_take_is_one_line(text, told):
    assert told in fails(ablation.main, "data", "--try", text)


@pytest.mark.slow
def test_a_run_that_fails_is_told_in_a_line(tmp_path):
    only = ("--only", "record", "--seeds", "1", "--out", str(tmp_path / "out"))
    assert "record_1: train_gpt.py: error: " in fails(ablation.main, str(tmp_path / "none"), *only)
