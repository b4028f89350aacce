"""The example programs of docs/edge.md, run unchanged."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_tasks import Pixels, classifier

from dlref.export.bundle import export
from dlref.export.targets import TARGETS
from dlref.runtime import load

PAGE = (Path(__file__).parent.parent / "docs/edge.md").read_text(encoding="utf-8")
NODE = """
import { readFile } from "node:fs/promises";
import { load } from "./consumer.mjs";
const classify = await load((name) => readFile(`bundles/NAME/${name}`));
console.log(JSON.stringify(await classify(new Uint8Array(await readFile("picture.raw")), 40, 50)));
"""


def program(language: str) -> str:
    (code,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return code


@pytest.fixture
def place(tmp_path, request):
    """A folder with a bundle for a target and an image, and the runner's prediction for the image."""
    name, crop = request.param
    task, data = classifier().eval(), Pixels()
    task.facts["crop"] = data.crop = crop
    target = replace(TARGETS[name], gate=100.0)  # the network is untrained
    manifest = export(task, data, target, tmp_path / "bundles/NAME", contenders=())
    assert manifest["precision"] == target.precision
    picture = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    (tmp_path / "picture.raw").write_bytes(picture.tobytes())
    return tmp_path, load(tmp_path / "bundles/NAME")(picture)


@pytest.mark.parametrize("place", [("cpu", None), ("cpu", 0.5)], indirect=True)
def test_the_python_program_in_the_docs_predicts_like_the_runner(place):
    folder, answer = place
    run = subprocess.run(
        [sys.executable, "-c", program("python")], cwd=folder, capture_output=True, text=True, check=True
    )
    label, probability = run.stdout.split()
    assert label == answer["label"]
    assert float(probability) == pytest.approx(answer["probability"], abs=1e-6)


@pytest.mark.slow  # fetches onnxruntime-web
@pytest.mark.parametrize("place", [("web", None)], indirect=True)
def test_the_javascript_program_in_the_docs_predicts_like_the_runner(place):
    folder, answer = place
    npm = shutil.which("npm")
    assert npm, "npm and node have to be installed"
    (folder / "package.json").write_text("{}")
    subprocess.run([npm, "install", "--no-audit", "--no-fund", "onnxruntime-web"], cwd=folder, check=True)
    imports = json.loads(re.sub("<[^>]*>", "", program("html")))["imports"]  # where a browser finds the package
    assert (folder / imports["onnxruntime-web"]).is_file()
    (folder / "consumer.mjs").write_text(program("javascript"))
    (folder / "run.mjs").write_text(NODE)
    run = subprocess.run(["node", "run.mjs"], cwd=folder, capture_output=True, text=True, check=True)
    answered = json.loads(run.stdout)
    assert answered["label"] == answer["label"]
    assert answered["probability"] == pytest.approx(answer["probability"], abs=1e-6)
