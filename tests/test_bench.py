"""Measurement of bundles and PyTorch, and its report. No test expects a particular speed."""

import json
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from handmade import METADATA, SIGNATURE, write_manifest
from test_tasks import Pixels, classifier
from torch import nn

from dlref.export import contender
from dlref.export.bundle import export
from dlref.export.graph import write_program
from dlref.export.measure import CONTENDERS, Contenders, threads, weights_mb
from dlref.export.report import graphs, held_up, measurement, report
from dlref.export.targets import TARGETS
from dlref.runtime import UserError, bench
from dlref.runtime.__main__ import main
from dlref.runtime.bundle import CPU, sha256
from dlref.tasks.deployable import Graph

FIGURES = {
    *("latency_ms", "latency_p95_ms", "throughput", "peak_rss_mb", "anonymous_mb", "first_answer_s"),
    *("model_mb", "installed_mb"),
}
QUICK = tuple(name for name in CONTENDERS if name != "pytorch-compiled")
# Memory and waiting are read from Linux's /proc; elsewhere they are null.
LINUX = Path("/proc/self/status").is_file()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export without the compiled contender, which takes minutes."""
    folder = tmp_path_factory.mktemp("bench") / "bundle"
    return folder, export(classifier().eval(), Pixels(), TARGETS["cpu"], folder, contenders=QUICK)


def test_every_contender_is_measured_in_its_own_process(exported):
    folder, manifest = exported
    measured = manifest["measurement"]
    assert measured["not_run"] == {}
    assert set(measured["contenders"]) == set(QUICK)
    for name, figures in measured["contenders"].items():
        assert set(figures) == {*FIGURES, "waited"}, name
        known = FIGURES if LINUX else FIGURES - {"peak_rss_mb", "anonymous_mb"}
        assert all(figures[key] > 0 for key in known), name
        assert figures["latency_p95_ms"] >= figures["latency_ms"]
    bundle, eager = measured["contenders"]["bundle"], measured["contenders"]["pytorch-eager"]
    if LINUX:
        assert bundle["peak_rss_mb"] < eager["peak_rss_mb"] / 3  # neither process holds the other's libraries
        assert bundle["waited"] >= 0
    assert bundle["installed_mb"] < eager["installed_mb"] == pytest.approx(bench.installed_mb("torch"), rel=0.01)
    assert bundle["model_mb"] == pytest.approx((folder / "classify.onnx").stat().st_size / 1e6)
    report = (folder / "report.md").read_text()
    assert f"| bundle | {bundle['latency_ms']:.2f} |" in report


@pytest.mark.slow
def test_compiled_pytorch_is_measured_as_well(tmp_path):
    manifest = export(classifier().eval(), Pixels(), TARGETS["cpu"], tmp_path / "b", contenders=("pytorch-compiled",))
    measured = manifest["measurement"]
    assert [*measured["contenders"], *measured["not_run"]] == ["pytorch-compiled"]  # not run without a C++ compiler
    assert all(figures["latency_p95_ms"] >= figures["latency_ms"] > 0 for figures in measured["contenders"].values())


def test_the_bench_command_measures_a_bundle_on_this_machine(exported, command):
    folder, _ = exported
    result = command("-m", "dlref.runtime", "bench", folder, "--threads", "1")
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert set(printed) == FIGURES | {"waited", "bundle", "threads", "provider", "difference"}
    assert printed["threads"] == 1
    assert printed["difference"] <= 1e-6


def changed(folder, place, change):
    """Copy a bundle with changed answers and their new hash, or without answers if `change` returns None."""
    shutil.copytree(folder, place)
    with np.load(place / "answers.npz") as arrays:
        answers = change(dict(arrays))
    manifest = json.loads((place / "manifest.json").read_text())
    if answers is None:
        (place / "answers.npz").unlink()
        del manifest["files"]["answers.npz"]
    else:
        np.savez(place / "answers.npz", **answers)
        manifest["files"]["answers.npz"] = sha256(place / "answers.npz")
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place


@pytest.mark.parametrize(
    ("change", "share"),
    [
        (lambda answers: {name: known + 0.1 for name, known in answers.items()}, 0.1),
        (lambda answers: answers | {"classify/probability": answers["classify/probability"] * np.nan}, 1),
    ],
)
def test_bench_reports_how_far_outputs_differ_from_the_recorded_answers(change, share, exported, tmp_path):
    folder = changed(exported[0], tmp_path / "bundle", change)
    assert bench.difference(folder, None, "CPUExecutionProvider") == pytest.approx(share, rel=0.15)


def test_bench_reports_the_difference_of_the_output_that_differs_most(exported, tmp_path, monkeypatch):
    def two(answers):
        probability = answers["classify/probability"]
        return {"classify/probability": probability, "classify/sum": probability.sum(-1) + 0.5}

    folder, opened = changed(exported[0], tmp_path / "bundle", two), bench.open_graphs

    def with_sums(*arguments):
        graph = opened(*arguments)["classify"]

        def answer(**inputs):
            probability = graph(**inputs)["probability"]
            return {"probability": probability, "sum": probability.sum(-1)}

        return {"classify": answer}

    monkeypatch.setattr(bench, "open_graphs", with_sums)
    assert bench.difference(folder, None, "CPUExecutionProvider") == pytest.approx(0.5 / 1.5, rel=1e-3)


@pytest.mark.parametrize(
    ("answers", "wrong"),
    [
        ({"classify/boxes": np.zeros(1)}, "'boxes' is not in this bundle; expected"),
        ({}, "empty; expected"),
        (None, "unreadable .*; expected"),
    ],
)
def test_recorded_answers_of_another_bundle_or_missing_answers_are_refused(answers, wrong, exported, tmp_path):
    folder = changed(exported[0], tmp_path / "bundle", lambda _: answers)
    with pytest.raises(UserError, match=rf"answers\.npz: {wrong}"):
        bench.difference(folder, None, "CPUExecutionProvider")


@pytest.mark.parametrize(
    ("found", "known", "share"),
    [
        ([1.0, np.nan, -np.inf], [1.0, np.nan, -np.inf], 0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([1e-9], [0.0], 1e-9),
        ([1.0, np.inf], [1.0, 2.0], 1),
        ([np.nan], [1.0], 1),
        ([1.0], [np.nan], 1),
        ([1, 2, 3, 4], [1, 2, 3, 5], 0.25),
        ([1.0], [1.0, 2.0], 1),
    ],
)
def test_differing_returns_how_far_two_outputs_are_apart(found, known, share):
    assert bench.differing(np.array(found), np.array(known)) == share


BOXES = {
    "boxes": np.array([[[10.0, 10, 50, 50], [200, 20, 260, 90], [5, 5, 9, 9], [0] * 4, [0] * 4]]),
    "scores": np.array([[0.9, 0.8, 0.5, 0, 0]]),
    "labels": np.array([[1, 80, 1, 0, 0]]),
    "count": np.array([3]),
}


def other(name, change):
    return BOXES | {name: change(BOXES[name])}


def in_order(*places):
    return {name: array if array.ndim == 1 else array[:, list(places)] for name, array in BOXES.items()}


@pytest.mark.parametrize(
    ("found", "share"),
    [
        (BOXES, 0),
        (in_order(1, 0, 2, 3, 4), 0),
        (other("boxes", lambda boxes: boxes * (1 + 0.01 * (boxes > 9))), 0.01 * 2 / 3),  # the third has small numbers
        (other("scores", lambda scores: scores + 0.1 * (scores == 0.9)), 0.1 / 3),  # of a number below 1
        (other("labels", lambda labels: labels - (labels == 80)), 1 / 3),
        (in_order(0, 1, 3, 3, 4), 1 / 3),
        (in_order(0, 1, 2, 0, 4), 1 / 4),
        (other("boxes", lambda boxes: 10 * boxes), 1),
        (other("boxes", lambda boxes: boxes * np.nan), 1),
        ({name: 0 * array for name, array in BOXES.items()}, 1),
    ],
)
def test_lists_of_boxes_differ_by_their_boxes_and_not_by_their_order(found, share):
    assert bench.unmatched(found, BOXES, list(BOXES)) == pytest.approx(share)


def test_a_missing_box_counts_even_beside_a_similar_one():
    near = other("boxes", lambda boxes: boxes[:, [0, 0, 2, 3, 4]] + [[[0], [0.1], [0], [0], [0]]])
    near |= {"labels": np.array([[1, 1, 1, 0, 0]]), "scores": np.array([[0.9, 0.9, 0.5, 0, 0]])}
    fewer = {name: array if array.ndim == 1 else array[:, [0, 2, 3, 3, 4]] for name, array in near.items()}
    assert bench.unmatched(fewer, near, list(BOXES)) == pytest.approx(1 / 3)


def test_bench_compares_outputs_that_are_a_selection_in_any_order(exported, tmp_path, monkeypatch):
    folder = changed(exported[0], tmp_path / "bundle", lambda _: {f"classify/{name}": a for name, a in BOXES.items()})
    swapped = in_order(1, 0, 2, 3, 4)
    monkeypatch.setattr(bench, "open_graphs", lambda *_: {"classify": lambda **_: swapped})
    assert bench.difference(folder, None, "CPUExecutionProvider") > 0.5
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["graphs"]["classify"]["selected"] = list(BOXES)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert bench.difference(folder, None, "CPUExecutionProvider") == 0


def test_bench_runs_without_torch_onnx_lightning_and_rich(exported):
    folder, _ = exported
    forbid = "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'lightning', 'rich')))\n"
    arguments = [str(folder), "1", "CPUExecutionProvider", "0"]
    code = f"{forbid}from dlref.runtime.bench import main\nsys.exit(main({arguments}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)) == FIGURES | {"waited"}


def test_memory_figures_that_the_system_does_not_report_are_none(monkeypatch):
    """gVisor's /proc/self/status holds only the current resident memory."""
    monkeypatch.setattr(Path, "read_text", lambda path, **_: "Name:\tpython\nVmRSS:\t  100 kB\n")
    assert bench.memory() == {"peak_rss_mb": None, "anonymous_mb": None}


def test_the_runtime_adds_less_than_10_mb_to_the_memory_of_its_packages():
    """The memory of the packages themselves differs by version."""

    def peak(modules):
        code = f"import {modules}; print(open('/proc/self/status').read())"
        status = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1000

    packages = "numpy, onnxruntime, PIL.Image"
    if LINUX:
        assert peak(f"{packages}, dlref.runtime, dlref.runtime.bench") < peak(packages) + 10


def test_bench_of_an_unusable_bundle_reports_the_reason_in_one_line(bundle, capsys):
    assert main(["bench", str(bundle)]) == 2  # this bundle has no example
    printed = capsys.readouterr().err
    assert "example.npz: " in printed
    assert printed.count("\n") == 1
    (bundle / "classify.onnx").write_bytes(b"junk")
    assert main(["bench", str(bundle)]) == 2
    assert "SHA-256 differs" in capsys.readouterr().err


def test_a_failed_process_is_reported_by_the_last_line_of_its_error_output():
    with pytest.raises(UserError, match=r"^no compiler$"):
        bench.in_process([sys.executable, "-c", "raise SystemExit('error: no compiler')"])


def test_a_crashed_process_is_reported_with_its_exit_code():
    with pytest.raises(UserError, match="its process ended with code -11"):
        bench.in_process([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"])


class Suppress(nn.Module):
    """Return the boxes that torchvision's NMS operator keeps."""

    def forward(self, boxes, scores):
        return boxes[torchvision.ops.nms(boxes, scores, 0.5)]


def test_the_pytorch_contender_runs_torchvisions_operators_and_counts_its_size(bundle, tmp_path):
    corners = torch.rand(6, 2)
    graph = Graph(
        module=Suppress().eval(),
        inputs={"boxes": torch.cat([corners, corners + 1], dim=1), "scores": torch.rand(6)},
        outputs=["kept"],
        dynamic_axes={},
        sizes={},
    )
    (tmp_path / "programs").mkdir()
    write_program(graph, tmp_path / "programs/detect.pt2", TARGETS["cpu"])
    np.savez(bundle / "example.npz", **{f"detect/{name}": tensor.numpy() for name, tensor in graph.inputs.items()})
    write_manifest(bundle, graphs={"detect": {"dynamic_axes": {}, "calls": 1}})
    module = [sys.executable, "-m", "dlref.export.contender"]
    figures = bench.in_process([*module, str(tmp_path / "programs"), str(bundle), "eager", "1", "cpu"])
    assert figures["installed_mb"] > bench.installed_mb("torch")


def test_the_pytorch_contender_has_the_given_threads_and_is_compiled_in_that_mode_only(tmp_path, monkeypatch):
    torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(2),)), tmp_path / "g.pt2")
    threads, compiled = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    for mode in ("eager", "compiled"):
        assert not compiled
        answer = contender.programs(tmp_path, mode, 3, "cpu")["g"]
        np.testing.assert_array_equal(answer(x=np.float32([-1, 1])), [[0, 1]])
    assert (threads, len(compiled)) == ([3, 3], 1)


def test_a_manifest_without_the_number_of_calls_of_a_graph_is_refused():
    with pytest.raises(UserError, match=r"^manifest.json: a graph without 'calls'; expected one that export.py wrote$"):
        bench.repeating({"classify": dict}, {"classify": {"dynamic_axes": {}}})


def test_weights_shared_by_several_graphs_count_once():
    shared = nn.Linear(10, 10, bias=False)
    shared.register_buffer("mean", torch.zeros(10))
    modules = {"encode": nn.Sequential(shared), "step": nn.Sequential(shared, nn.Linear(10, 5, bias=False))}
    graphs = {name: SimpleNamespace(module=module) for name, module in modules.items()}
    assert weights_mb(graphs) == pytest.approx(4 * (10 * 10 + 10 + 10 * 5) / 1e6)


def test_pytorch_is_measured_with_the_given_python_interpreter(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr("dlref.export.measure.in_process", lambda command: commands.append(command) or {})
    for options in ({}, {"python": "another"}):
        found = Contenders(TARGETS["cpu"], {}, tmp_path, tmp_path, **options).pytorch("eager")
        assert found == {"model_mb": 0}
    assert [command[0] for command in commands] == [sys.executable, "another"]


@pytest.mark.parametrize(
    ("target", "works", "device"),
    [("cuda", True, "cuda"), ("tensorrt", True, "cuda"), ("cuda", False, "cpu"), ("mobile", True, "cpu")],
)
def test_pytorch_is_measured_in_its_mode_with_the_devices_threads_where_the_bundle_runs(
    target, works, device, tmp_path, monkeypatch
):
    commands = []
    monkeypatch.setattr("dlref.export.measure.in_process", lambda command: commands.append(command) or {})
    monkeypatch.setattr("dlref.export.measure.provider_works", lambda *_: works)
    monkeypatch.setattr("dlref.export.measure.cores", lambda: 8)
    for mode in ("eager", "compiled"):
        Contenders(TARGETS[target], {}, tmp_path, tmp_path / "float32").pytorch(mode)
    given = [str(tmp_path), str(tmp_path / "float32")]
    threads = "2" if target == "mobile" else "8"
    assert [command[3:] for command in commands] == [[*given, mode, threads, device] for mode in ("eager", "compiled")]


def test_a_contender_that_fails_is_listed_with_its_reason_and_without_paths_of_this_machine(tmp_path, monkeypatch):
    found = Contenders(TARGETS["cpu"], {}, tmp_path / "programs", tmp_path / "float32")
    monkeypatch.setattr("dlref.export.measure.can_time", lambda target: True)
    monkeypatch.setattr("dlref.export.measure.cores", lambda: 8)
    monkeypatch.setattr(found, "measured", lambda folder: {"waited": 0.0})

    def fails(mode):
        raise UserError(f"{tmp_path / 'programs' / 'classify.pt2'}: no {mode}")

    monkeypatch.setattr(found, "pytorch", fails)
    measured = found.measurement(tmp_path / "int8", ("pytorch-eager", "bundle"))
    assert measured["contenders"] == {"bundle": {"waited": 0.0}}
    assert measured["not_run"] == {"pytorch-eager": f"{Path('programs', 'classify.pt2')}: no eager"}
    assert measured["threads"] == 8
    monkeypatch.setattr("dlref.export.measure.can_time", lambda target: False)
    assert [*found.measurement(tmp_path / "int8", ("bundle",))["not_run"]] == ["bundle"]


def test_in_process_passes_the_start_time_to_the_new_process():
    before = time.monotonic()
    code = "import sys, json; print('noise'); print(json.dumps({'started': float(sys.argv[1])}))"
    assert before <= bench.in_process([sys.executable, "-c", code])["started"] <= time.monotonic()


def test_batch_of_repeats_inputs_that_have_a_batch_axis():
    image = np.arange(12, dtype=np.uint8).reshape(1, 2, 6, 1)
    several = bench.batch_of({"classify": {"image": image}}, {"classify": SIGNATURE})
    np.testing.assert_array_equal(several["classify"]["image"], image.repeat(8, axis=0))
    fixed = {"classify": {**SIGNATURE, "dynamic_axes": {}}}
    assert bench.batch_of({"classify": {"image": image}}, fixed) is None


@pytest.mark.parametrize(("axes", "rows"), [({"x": {"0": "batch"}}, 8), ({}, 1)])
def test_latency_is_that_of_the_median_call_and_throughput_counts_all_its_rows(axes, rows, tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text(json.dumps({"graphs": {"g": {"dynamic_axes": axes, "calls": 3}}}))
    np.savez(tmp_path / "example.npz", **{"g/x": np.ones((1, 2))})
    monkeypatch.setattr(bench, "clock", lambda call: [0.5, 0.5, 2.0])
    calls = []
    figures = bench.measure({"g": lambda x: calls.append(len(x))}, tmp_path, 0.0)
    assert (figures["throughput"], figures["latency_ms"]) == (rows / 0.5, 500)
    assert calls == [1, 1, 1]  # the first answer, which calls the graph three times


def test_measure_reports_the_p95_latency_and_the_share_of_time_spent_waiting(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text(json.dumps({"graphs": {"g": {"dynamic_axes": {}, "calls": 1}}}))
    np.savez(tmp_path / "example.npz", **{"g/x": np.ones((1, 2))})
    monkeypatch.setattr(bench, "clock", lambda call: [i / 1000 for i in range(101)])
    monkeypatch.setattr(bench, "scheduled", iter([(1.0, 2.0), (4.0, 3.0)]).__next__)
    figures = bench.measure({"g": lambda x: None}, tmp_path, 0.0)
    assert figures["latency_p95_ms"] == pytest.approx(95)
    assert figures["waited"] == 0.25  # 3 seconds running, 1 waiting


def test_a_megabyte_in_the_report_is_a_million_bytes():
    described = {"g": {"file": "g.onnx", "inputs": [], "outputs": []}}
    assert "| g.onnx | 1.50 |" in graphs(described, {"g.onnx": 1_500_000})[1]


def test_pytorch_and_the_bundle_use_the_devices_thread_count(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("dlref.export.measure.cores", lambda: 8)
    monkeypatch.setattr("dlref.export.measure.bench", lambda folder, threads, provider: asked.append(threads) or {})
    for target in (TARGETS["cpu"], TARGETS["mobile"], TARGETS["web"]):
        Contenders(target, {}, tmp_path, tmp_path).measured(tmp_path)
        asked.append(threads(target))
    assert asked == [0, 8, 2, 2, 1, 1]  # 0 for a bundle: `load`'s default, all cores
    asked.clear()
    monkeypatch.setattr("dlref.export.measure.cores", lambda: 1)
    Contenders(TARGETS["mobile"], {}, tmp_path, tmp_path).measured(tmp_path)
    assert [*asked, threads(TARGETS["mobile"])] == [1, 1]


def test_warm_up_calls_are_not_timed(monkeypatch):
    now = iter(np.cumsum([0.0, *[0.0, 5.0] * bench.WARMUP, *[0.0, 1.0] * 99]))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    assert bench.clock(lambda: None) == [1.0] * bench.CALLS


def test_repeating_calls_a_graph_as_often_as_one_prediction_does():
    seen = []
    bench.repeating({"g": lambda x: seen.append(x)}, {"g": {"calls": 3}})["g"](x=1)
    assert seen == [1, 1, 1]


def test_installed_mb_includes_a_package_and_all_its_dependencies():
    def size(name):
        return sum(path.locate().stat().st_size for path in distribution(name).files if path.locate().is_file()) / 1e6

    assert bench.installed_mb("pillow") == pytest.approx(size("pillow"))  # requires nothing
    assert bench.installed_mb("jaxtyping") == pytest.approx(size("jaxtyping") + size("wadler-lindig"))
    assert bench.installed_mb("no-such-package") is None


def test_time_spent_waiting_for_a_core_is_counted():
    """Two processes on one core: each waits for about half of the time."""
    if not LINUX:
        assert bench.scheduled() == (0, 0)
        return
    code = (
        "import os, time; from dlref.runtime.bench import scheduled; os.sched_setaffinity(0, {0}); start = scheduled();"
        "end = time.time() + 1\nwhile time.time() < end: pass\n"
        "print(*(after - before for after, before in zip(scheduled(), start)))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ran, waited = zip(*(map(float, process.communicate()[0].split()) for process in processes), strict=True)
    assert max(waited) > 0.1
    assert sum(ran) < 1.9  # on one core


def test_the_report_states_that_the_machine_was_busy():
    figures = dict.fromkeys(FIGURES, 1.0)
    measured = {
        "threads": 2,
        "processor": "abacus",
        "contenders": {"bundle": figures | {"waited": 0.4}, "onnx-float32": figures | {"waited": 0.02}},
        "not_run": {},
    }
    text = "\n".join(measurement(measured, spread=True))
    assert "has one thread" in text
    assert "has one thread" not in "\n".join(measurement(measured, spread=False))
    assert "bundle waited for a core 40% of the time: the machine was busy" in text
    assert "onnx-float32 waited" not in text
    assert not held_up(figures | {"waited": None})


SCORE = {"name": "accuracy", "split": "validation", "n": 48, "pytorch": 0.9, "bundle": 0.87654}
PLAN = {"precision": "int8", "calibration": "MinMax", "kept_float": {}, "refused": "3 points lost"}
SIZES = {"classify.onnx": 1_500_000}


def described():
    """Return the manifest of a bundle whose last of four attempts was taken."""
    figures = {"latency_ms": 1.234, "latency_p95_ms": 2.346, "throughput": 812.4, "peak_rss_mb": 90.4, "waited": None}
    figures |= {"anonymous_mb": None, "first_answer_s": 0.456, "model_mb": 1.5, "installed_mb": 120.4}
    one = PLAN | {"calibration": "Entropy", "kept_float": {"classify": ["a"]}}
    kept = one | {"kept_float": {"classify": ["a", "b"]}, "refused": "slow"}
    taken = PLAN | {"kept_float": {"classify": ["a", "b"], "head": ["c"]}, "refused": ""}
    row = {"graph": "classify", "shape": {"image": [2, 8, 9, 1]}}
    exact = {"precision": "float32", "max_abs_error": 3e-6, "flipped": 1, "rows": 40, "tolerance": 1e-4}
    rough = {"precision": "int8", "max_abs_error": 0.25, "flipped": 0, "rows": 0, "tolerance": None}
    known = {"max_abs_error": 1e-5, "flipped": 2, "rows": 400}
    return {
        "kind": "image-classification",
        "target": {"name": "arm64", "description": "a board", "provider": CPU, "opset": 20, "precision": "int8"},
        "precision": "int8",
        "graphs": {"classify": SIGNATURE},
        "metadata": METADATA,
        "versions": {"dlref": "1.0", "torch": "2.11"},
        "verification": {
            "provider": "this CPU",
            "metric": SCORE | known,
            "test": SCORE | {"split": "test", "n": 50, "max_abs_error": None, "flipped": 1, "rows": 300},
            "parity": [row | exact, row | rough],
            "attempts": [PLAN, one, kept, taken],
        },
        "measurement": {
            "threads": 2,
            "processor": "abacus",
            "contenders": {"bundle": figures},
            "not_run": {"pytorch-eager": "no torch", "onnx-float32": "gone", "pytorch-compiled": "no torch"},
        },
    }


def test_the_report_has_every_number_of_the_manifest_in_its_place():
    text = report(described(), SIZES)
    for line in (
        f"a board: int8, {CPU}, opset 20.",
        "| classify.onnx | 1.50 | image uint8 (batch, height, width, 1) | probability float32 (batch, 2) |",
        "| accuracy | validation | 48 | 0.9000 | 0.8765 | 1.0e-05 |\n| accuracy | test | 50 | 0.9000 | 0.8765 | – |",
        "Rounding changed 2 of 400 (validation) and 1 of 300 (test).",
        "Tried for int8 and refused:\n\n- int8 MinMax: 3 points lost.\n"
        "- int8 Entropy with 1 node in float: 3 points lost.\n- int8 Entropy with 2 nodes in float: slow.\n",
        "Kept in float: classify/a, classify/b, head/c.\n",
        "abacus, 2 threads;",
        "| bundle | 1.23 | 2.35 | 812 | 90 | – | 0.46 | 1.50 | 120 |",
        "Not run: pytorch-eager, pytorch-compiled (no torch).",
        "Not run: onnx-float32 (gone).",
        "Executed by this CPU.",
        "| classify | float32 | image 2×8×9×1 | 3.0e-06, 1 of 40 differ | 1e-04 |",
        "| classify | int8 | image 2×8×9×1 | 2.5e-01 | judged by the metric |",
        "Made with dlref 1.0, torch 2.11.\n",
    ):
        assert line in text


def test_the_report_leaves_out_what_did_not_happen_and_lists_the_attempts_before_a_fallback():
    manifest = described()
    plain = {"attempts": [PLAN | {"refused": ""}], "test": SCORE | {"max_abs_error": None, "rows": None}}
    text = report(manifest | {"verification": manifest["verification"] | plain}, SIZES)
    assert not any(words in text for words in ("Rounding changed", "refused:", "Kept in float"))
    last = PLAN | {"precision": "float32", "refused": ""}
    fallen = manifest | {"precision": "float32", "verification": manifest["verification"] | {"attempts": [PLAN, last]}}
    text = report(fallen, SIZES)
    assert f"a board: float32, {CPU}" in text
    assert "Tried for int8 and refused:" in text


@pytest.mark.parametrize(
    ("kind", "provider", "alone"),
    [("translation", CPU, True), ("translation", "CUDA", False), ("image-classification", CPU, False)],
)
def test_the_report_says_where_each_graph_has_one_thread(kind, provider, alone):
    manifest = described()
    text = report(manifest | {"kind": kind, "target": manifest["target"] | {"provider": provider}}, SIZES)
    assert ("has one thread" in text) is alone


def contenders(tmp_path, monkeypatch, waits):
    """Return contenders and their next runs, which wait for a core for the shares of time in `waits`."""
    monkeypatch.setattr("dlref.export.measure.TURNS", 3)
    runs = [{"latency_ms": float(i), "waited": share} for i, share in enumerate(waits)]
    found = Contenders(TARGETS["cpu"], {}, tmp_path, tmp_path)
    monkeypatch.setattr(found, "measured", lambda folder: runs.pop(0) | {"of": folder.name})
    return found, runs


@pytest.mark.parametrize(("waits", "kept", "left"), [([0.4, 0.3, 0.35, 0.0], 1, 1), ([0.4, 0.05, 0.0], 1, 1)])
def test_a_run_held_up_by_other_programs_is_repeated_and_the_least_disturbed_is_kept(
    waits, kept, left, tmp_path, monkeypatch
):
    found, runs = contenders(tmp_path, monkeypatch, waits)
    assert found.undisturbed("bundle", tmp_path)["latency_ms"] == kept
    assert len(runs) == left


def test_each_contender_is_measured_from_its_own_folder(tmp_path, monkeypatch):
    found = Contenders(TARGETS["cpu"], {}, tmp_path, tmp_path / "float32")
    monkeypatch.setattr(found, "measured", lambda folder: {"of": folder.name, "waited": 0.0})
    monkeypatch.setattr(found, "pytorch", lambda mode: {"of": mode, "waited": 0.0})
    names = ("bundle", "onnx-float32", "pytorch-eager", "pytorch-compiled")
    measured = [found.undisturbed(name, tmp_path / "int8")["of"] for name in names]
    assert measured == ["int8", "float32", "eager", "compiled"]


def test_latencies_measures_two_bundles_in_turns(tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    found, runs = contenders(tmp_path, monkeypatch, [0.0] * 6 + [0.4, 0.0])
    runs[:6] = [runs[i] for i in (2, 5, 4, 1, 0, 3)]  # 2, 4 and 0 ms for one, 5, 1 and 3 for the other
    assert found.latencies(one, other) == [2.0, 3.0]
    assert [found.known[folder]["of"] for folder in (one, other)] == ["one", "other"]
    assert found.undisturbed("bundle", one)["latency_ms"] == 2.0  # as known
    found.known[one]["waited"] = 0.5
    assert found.undisturbed("bundle", one)["latency_ms"] == 7.0  # measured again until nothing holds it up


FIFTY_MEGABYTES = """
import json
import numpy as np
from dlref.runtime import bench
before = bench.memory()
block = np.ones(50_000_000, np.uint8)
print(json.dumps([before, bench.memory()]))
"""


def test_memory_grows_with_what_this_process_allocates(command):
    """Run in a fresh process: here, the block might reuse memory that an earlier test freed."""
    before, after = json.loads(command("-c", FIFTY_MEGABYTES).stdout)
    if not LINUX:
        assert set(before.values()) == {None}
        return
    assert after["anonymous_mb"] - before["anonymous_mb"] > 40
    assert after["peak_rss_mb"] >= before["peak_rss_mb"]
