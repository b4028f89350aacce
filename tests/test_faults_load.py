"""One runner shared by many threads; `python -m tests.faults.load` is the full test."""

import time

import numpy as np
import pytest
import test_detection
import test_forecasting
import test_language
import test_segmentation
import test_translation
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

from dlref.runtime import UserError, load, make_runner
from dlref.runtime.bundle import CPU, OnnxGraph
from tests.faults.load import hammer, sources

DEPLOYED = {
    "object-detection": lambda: test_detection.sighted().deployable((torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {})),
    "semantic-segmentation": lambda: test_segmentation.deployed(test_segmentation.sighted()),
    "forecasting": lambda: test_forecasting.forecaster(cardinality=(5,), dynamic=1).deployable(
        test_forecasting.window_of(torch.rand(2, 10), features=6, categories=1)
    ),
    "translation": lambda: test_translation.translator().deployable(test_translation.batch_of(*test_translation.PAIRS)),
    "language": lambda: test_language.model().deployable(test_language.batch_of("abc", "defgh")),
}


def check(kind, runner, folder):
    result = hammer(runner, *sources(kind, runner, folder), requests=100, threads=8)
    assert (result.unequal, result.refused, result.malformed) == (0, 1, 1), result.example


def test_threads_that_share_a_bundle_get_the_predictions_of_a_single_thread(bundle, tmp_path):
    check("image-classification", load(bundle), tmp_path)


@pytest.mark.parametrize("kind", DEPLOYED)
def test_threads_that_share_a_runner_get_the_predictions_of_a_single_thread(kind, tmp_path, unchecked):
    """The graphs run in PyTorch: only the runner could be disturbed by threads, and ONNX files take longer to make."""
    served = DEPLOYED[kind]()
    runner = make_runner(kind, served.graphs, served.metadata)
    runner.workers = 2 if runner.spreads else 1
    check(kind, runner, tmp_path)


def test_a_buffer_shared_by_threads_is_detected(bundle, tmp_path):
    runner = load(bundle)
    answer = runner.answer

    def shared(items):
        runner.items = items
        time.sleep(1e-4)  # let the other threads run
        return answer(runner.items)

    runner.answer = shared
    result = hammer(runner, *sources("image-classification", runner, tmp_path), requests=400, threads=8)
    assert result.unequal > 0
    assert not result.passed
    assert "in the place of" in result.example


def test_an_intermittent_error_is_detected(bundle, tmp_path):
    runner = load(bundle)
    good, bad = sources("image-classification", runner, tmp_path)
    runner.calls, answer = 0, runner.answer

    def failing(items):
        runner.calls += 1
        if runner.calls == len(good) + 100:
            raise RuntimeError("gone")
        return answer(items)

    runner.answer = failing
    result = hammer(runner, good, bad, requests=400, threads=1)
    assert (result.unequal, result.passed) == (1, False)
    assert result.example.startswith("RuntimeError: gone in the place of {")


def test_a_memory_leak_is_detected(bundle, tmp_path):
    runner = load(bundle)
    kept, answer = [], runner.answer

    def keeping(items):
        kept.append(np.ones(10_000))  # 80 kB
        return answer(items)

    runner.answer = keeping
    result = hammer(runner, *sources("image-classification", runner, tmp_path), requests=1500, threads=8)
    assert result.unequal == 0
    assert not result.flat
    assert not result.passed


class Failing:
    """A session whose provider fails in every run."""

    def __init__(self, session):
        self.session = session

    def __getattr__(self, name):
        return getattr(self.session, name)

    def run(self, *arguments):
        raise EPFail("out of memory")


def test_a_failing_provider_raises_an_error_instead_of_falling_back(bundle, capsys):
    """onnxruntime would print a message, drop the session that other threads use and switch to another provider."""
    graph = OnnxGraph(bundle / "classify.onnx", CPU)
    graph.session._sess = Failing(graph.session._sess)
    with pytest.raises(UserError, match=r"classify.onnx: onnxruntime refuses the input \(out of memory\)"):
        graph(image=np.zeros((1, 4, 4, 1), np.uint8))
    assert capsys.readouterr().out == ""
