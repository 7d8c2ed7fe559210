"""The scripts around the GPU program, without a GPU: results are judged, drawn, and never lost on the way."""

import importlib.machinery
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as xml

import pytest

GPU = pathlib.Path(__file__).resolve().parents[1] / "gpu"
sys.path.insert(0, str(GPU))
import plot  # noqa: E402
import records  # noqa: E402


def script(name):
    """A script without a suffix, as a module."""
    loader = importlib.machinery.SourceFileLoader(f"gpu_{name}", str(GPU / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def record(figure="swapped_in_request", model="resnet50", dtype="fp16", ours=1.02, reference=1.0, target=None, **more):
    ratio = None if reference is None else ours / reference
    name = None if reference is None else "bare <copy> & more"
    return {"figure": figure, "model": model, "dtype": dtype, "unit": "ms", "ours": ours, "reference": reference,
            "reference_name": name, "ratio": ratio, "target": target, "outputs_checked": 10, "outputs_wrong": 0,
            "device": "NVIDIA H100 80GB HBM3", **more}


@pytest.mark.parametrize("ours, reference, target, verdict", [
    (1.08, 1.0, {"at_most": 1.08}, "met"),
    (1.09, 1.0, {"at_most": 1.08}, "missed"),
    (48.5, 50.0, {"at_least": 0.97}, "met"),
    (48.0, 50.0, {"at_least": 0.97}, "missed"),
    (1.4, None, {"at_most": 1.5}, "met"),
    (1.6, None, {"at_most": 1.5}, "missed"),
    (9.0, 1.0, None, "told"),
])
def test_a_target_is_about_the_ratio_or_else_about_our_value(ours, reference, target, verdict):
    assert records.verdict(record(ours=ours, reference=reference, target=target)) == verdict


def test_wrong_outputs_count_more_than_any_target():
    assert records.verdict(record(target={"at_most": 5.0}, outputs_wrong=1)) == "wrong"


@pytest.mark.parametrize("change", [
    {"ours": None}, {"ours": True}, {"ratio": "1"}, {"outputs_wrong": -1}, {"outputs_checked": 1.5}, {"model": 3},
    {"target": 1.08}, {"target": {"at_most": 1, "at_least": 0}}, {"target": {"below": 1}}, {"surprise": 1},
])
def test_a_record_that_is_none_is_refused(change):
    with pytest.raises(records.Bad):
        records.check({**record(), **change})
    short = record()
    del short["outputs_wrong"]
    with pytest.raises(records.Bad):
        records.check(short)


def test_wrong_outputs_are_found_wherever_they_are_counted():
    nested = {"records": [{"measured": {"outputs_wrong": 2, "x": 1}}, {"outputs_wrong": 0}], "outputs_wrong": 1}
    assert records.wrong_in(nested) == 3
    assert records.wrong_in({"outputs_wrong": None, "other": [1, "outputs_wrong"]}) == 0


def test_figures_come_in_their_order_and_unknown_ones_after_them():
    found = [record("new_thing"), record("swapped_in_request", "b"), record("swapped_in_request", "a"), record("swap_in_bandwidth")]
    groups = records.figures(found)
    assert [name for name, _ in groups] == ["swap_in_bandwidth", "swapped_in_request", "new_thing"]
    assert [r["model"] for r in groups[1][1]] == ["a", "b"]


@pytest.mark.parametrize("most", [0.0, 0.003, 0.97, 1.0, 6.0, 7.4, 250.0, 1e6])
def test_a_scale_holds_the_largest_value_in_few_round_steps(most):
    step, end = plot.scale(most)
    assert end >= most and end / step <= plot.TICKS_MAX + 1e-6 and end <= max(1.0, 2 * most)


def widths(drawing, colour):
    return [float(rect.get("width")) for rect in drawing.iter("{http://www.w3.org/2000/svg}rect")
            if rect.get("fill") == colour and rect.get("height") == str(plot.BAR)]


def test_a_plot_shows_ours_beside_the_reference_to_scale():
    found = [record(ours=2.0, reference=4.0, target={"at_most": 1.0}), record(ours=3.0, reference=1.0, target={"at_most": 1.0})]
    drawing = xml.fromstring(plot.svg("swapped_in_request", found))
    (good,), (bad,), reference = (widths(drawing, colour) for colour in (plot.OURS, plot.MISSED, plot.REFERENCE))
    assert reference == pytest.approx([2 * good, good / 2], abs=0.2) and bad == pytest.approx(1.5 * good, abs=0.2)


def test_a_report_has_a_table_and_a_plot_per_figure(tmp_path):
    found = [record(target={"at_most": 1.08}), record(model="bert_large", ours=1.2, target={"at_most": 1.08}),
             record("bind", ours=30.0, reference=None), record("a strange/one")]
    steps = [{"step": "conform", "outcome": "passed", "seconds": 3.5}]
    result = {"machine": {"gpus": ["H100, 580.1"], "when": "", "notes": ["shared", "a note"]}, "steps": steps, "outputs_wrong": 0, "records": found}
    (tmp_path / "one GPU.json").write_text(json.dumps(result))
    (tmp_path / "list.json").write_text(json.dumps(found[:1]))
    out = tmp_path / "results"
    assert script("report").main([str(tmp_path / "one GPU.json"), str(tmp_path / "list.json"), "--out", str(out)]) == 0
    page = (out / "README.md").read_text()
    for line in ["| Swapped-in request, pipelined | 2 | 1.11 | <= 1.08 | 1 of 2 |", "outputs compared: 40, wrong: 0",
                 "| conform | passed | 3.5 |", "gpus: H100, 580.1", "* shared", "* a note"]:
        assert line in page, page
    assert "| bert_large | fp16 | 1.20 ms | 1.00 (bare <copy> & more) | 1.20 | <= 1.08 | **missed** |" in page
    linked = {line.split("](")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")}
    drawn = {path.name for path in out.glob("*.svg")}
    assert linked == drawn and len(drawn) == 4, "every plot is linked, and every link leads to one"
    for path in out.glob("*.svg"):
        xml.fromstring(path.read_text())


def test_a_report_of_wrong_outputs_is_written_and_fails(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"records": [record()], "outputs_wrong": 2}))
    assert script("report").main([str(tmp_path / "r.json"), "--out", str(tmp_path)]) == 1
    assert "wrong: **2**" in (tmp_path / "README.md").read_text()


def test_a_file_that_is_no_result_is_named(tmp_path, capsys):
    (tmp_path / "r.json").write_text('{"records": [{"figure": "x"}]}')
    assert script("report").main([str(tmp_path / "r.json"), "--out", str(tmp_path)]) == 1
    assert "r.json" in capsys.readouterr().err


PROGRAM = """#!{python}
import json, os, pathlib, sys, time
if len(sys.argv) == 1:
    print("faaswap-gpu: usage: faaswap-gpu conform | figures MODELS OUT | soak OUT | other THING | prepare", file=sys.stderr)
    sys.exit(1)
if sys.argv[1] == "conform":
    sys.exit(int(os.environ.get("CONFORM", "0")))
if sys.argv[1] == "figures":
    models, out = map(pathlib.Path, sys.argv[2:])
    found = json.loads(os.environ["RECORD"])
    names = sorted(path.parent.name for path in models.glob("*/model.onnx"))
    (out / "records/figures.json").write_text(json.dumps([{{**found, "model": name}} for name in names]))
    (out / "figures.json").write_text(json.dumps({{"records": [{{"outputs_wrong": int(os.environ.get("WRONG", "0"))}}]}}))
if sys.argv[1] == "soak":
    time.sleep(float(os.environ.get("SOAK", "0")))
"""


def run(tmp_path, *args, **environment):
    """Runs `tests/gpu/run` with a program that stands in for the real one."""
    program, models = tmp_path / "program", tmp_path / "models"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    for name in ("a-fp32", "a-fp16", "b-fp32"):
        (models / name).mkdir(parents=True, exist_ok=True)
        (models / name / "model.onnx").write_text("")
    environment = {**os.environ, "FAASWAP_GPU_PROGRAM": str(program), "RECORD": json.dumps(record()), **environment}
    ended = subprocess.run([sys.executable, GPU / "run", tmp_path / "out", "--model-dir", models, *args],
                           env=environment, capture_output=True, text=True, timeout=60)
    result = tmp_path / "out/results.json"
    return ended, json.loads(result.read_text()) if result.exists() else None


def outcomes(result):
    return {step["step"]: step["outcome"] for step in result["steps"]}


def test_a_run_does_every_step_that_it_can_and_gathers_the_records(tmp_path):
    ended, result = run(tmp_path, "--only", "conform,figures,soak", "--models", "a")
    assert ended.returncode == 0, ended.stderr
    assert outcomes(result) == {"conform": "passed", "figures": "passed", "soak": "passed"}
    assert [r["model"] for r in result["records"]] == ["a-fp16", "a-fp32"], "only what was chosen"
    assert "swapped_in_request" in ended.stdout
    _, result = run(tmp_path, "--skip", "export,soak", "--models", "a")
    assert outcomes(result) == {"conform": "passed", "figures": "passed"}
    _, result = run(tmp_path, "--only", "figures", "--dtypes", "fp32")
    assert [r["model"] for r in result["records"]] == ["a-fp32", "b-fp32"], "a choice is made anew each time"


def test_a_run_fails_on_wrong_outputs_and_on_failed_steps(tmp_path):
    ended, result = run(tmp_path, "--only", "figures", WRONG="1")
    assert (ended.returncode, result["outputs_wrong"]) == (1, 1), "also where no record counts them"
    ended, result = run(tmp_path, "--only", "figures", RECORD=json.dumps(record(outputs_wrong=1)))
    assert (ended.returncode, result["outputs_wrong"]) == (1, 3), "one in each of three models"
    ended, result = run(tmp_path, "--only", "conform,figures", CONFORM="3")
    assert ended.returncode == 1 and outcomes(result) == {"conform": "failed with 3", "figures": "passed"}


def test_a_run_that_has_no_time_left_keeps_what_it_has(tmp_path):
    ended, result = run(tmp_path, "--only", "figures,soak", "--within", "5", SOAK="50")
    assert ended.returncode == 0, ended.stderr
    assert outcomes(result) == {"figures": "passed", "soak": "out of time"}
    assert len(result["records"]) == 3


def test_a_run_that_is_asked_for_what_there_is_not_says_so(tmp_path):
    for wrong in (["--only", "nonsense"], ["--skip", "nonsense"], ["--dtypes", "fp8"], ["--within", "soon"]):
        ended, result = run(tmp_path, *wrong)
        assert ended.returncode == 64 and result is None and ended.stderr, wrong
