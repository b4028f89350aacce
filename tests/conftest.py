"""Shared by all tests: shapes checked, one thread a worker, tiny data and a run made once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores

from jaxtyping import install_import_hook

# Before anything imports them: the shapes in their signatures are checked while the tests run.
SHAPED = ["distributions", "forecast_scores", "forecasting", "multibox", "optimizers", "preprocess"]
SHAPED += ["semantic_segmentation", "translation", "language_modelling", "cross_entropy"]
SHAPED += ["image_classification", "image_task", "object_detection"]
SHAPED = [f"dlref.tasks.{name}" for name in SHAPED]
SHAPED += ["dlref.data.pairs", "dlref.data.tokens", "dlref.data.windows"]
install_import_hook(["dlref.models", *SHAPED], "beartype.beartype")

import logging
import subprocess
import sys
from functools import cache
from pathlib import Path

import jaxtyping
import pytest
import torch
from handmade import make_bundle
from torch.onnx._internal.exporter._registration import ONNXRegistry

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
logging.getLogger("torch.__trace").propagate = False  # of all that is exported: it would drown what a failure shows
logging.getLogger("lightning.pytorch").propagate = True  # to `caplog`, whoever imported it first


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _measured_once():
    """Two workers keep this machine busy: an export would measure everything again and again until they do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlref.export.measure.TURNS", 1)
        yield


@pytest.fixture(scope="session", autouse=True)
def _translations_read_once():
    """For each export torch parses the sources of its translations to ONNX anew: most of a small network's export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture
def unchecked(monkeypatch):
    """Without the checks of annotations, as users run: what the code itself refuses comes to light."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Train in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])  # Lightning warns of arguments beside those of a test's own


@pytest.fixture
def bundle(tmp_path):
    """A bundle whose answer can be read off; see `handmade`."""
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def command():
    """Run a program of this checkout in a process of its own, as a user would."""

    def run(*arguments, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        program = [str(argument) for argument in arguments]
        program[0] = str(ROOT / program[0]) if program[0].endswith(".py") else program[0]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, *program], cwd=cwd, capture_output=True, text=True, env=environment, check=False
        )

    return run
