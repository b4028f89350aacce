"""The path from a config to predictions at the edge: every config, and the commands of the README."""

import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits
from test_detection import framed
from test_export import export
from test_segmentation import folders, painted

from dlref.cli import TrainCLI, load_run, train
from dlref.export import bundle as bundles
from dlref.export.targets import TARGETS
from dlref.runtime import load
from dlref.runtime.__main__ import main as runtime
from dlref.runtime.text import SPECIAL
from tests.faults.bad_input import export as export_py

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
EMBEDDED = ["lenet5_digits"]  # needs no files
FEW_STEPS = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3"]

# A device has neither torch nor the other packages that training needs.
WITHOUT_TORCH = """
import sys
for name in ("torch", "torchvision", "lightning", "onnx", "onnxscript", "torchmetrics", "sklearn", "matplotlib"):
    sys.modules[name] = None
from dlref.runtime.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def by_name(path):
    return path.stem


@pytest.mark.parametrize("config", CONFIGS, ids=by_name)
def test_a_config_parses_builds_and_fits_together(config, monkeypatch, tmp_path):
    built = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def build_only(cli, name):
        built.update(task=cli.model)
        cli.claim.roll_back()

    monkeypatch.setattr(TrainCLI, "_run_subcommand", build_only)
    arguments = ["--trainer.precision", "32-true"]  # mixed precision warns without a GPU
    with torch.device("meta"):  # no weights are drawn: only shapes and class weights are checked
        assert train(["fit", "--config", str(config), *arguments]) == 0
    task = built["task"].to_empty(device="cpu")
    for tensor in chain(task.parameters(), task.buffers()):
        tensor.detach().fill_(1)
    written = yaml.safe_load(config.read_text())
    network = written["model"]["init_args"]["network"]["init_args"]
    facts = {"labels": [str(k) for k in range(network.get("num_classes", 0))], "multi_label": False, "crop": None}
    facts |= {
        name: written["data"]["init_args"].get(name) for name in ("frequency", "context_length", "prediction_length")
    }
    facts |= {"cardinality": network.get("cardinality", []), "unseen": [], "category_names": [], "static_features": 0}
    facts |= {"dynamic_features": int(written["data"]["class_path"].endswith("SyntheticSeries"))}  # promotions
    vocabulary = {"kind": "word", "tokens": [*SPECIAL, *map(str, range(network.get("target_vocabulary", 0) - 4))]}
    facts |= {"source_vocabulary": vocabulary, "target_vocabulary": vocabulary}
    facts |= {"longest": 100, "longest_answer": 100}
    letters = [chr(256 + i) for i in range(min(network.get("vocabulary", 0), 300) - 4)]
    facts |= {"vocabulary": {"kind": "character", "exact": True, "tokens": [*SPECIAL, *letters]}}
    task.remember({name: facts[name] for name in task.fact_names})
    task._device = torch.device("cuda")  # as Lightning sets it in setup, while everything is still on the CPU
    task.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", CONFIGS, ids=by_name)
def test_a_configs_header_gives_the_command_data_time_and_score(config):
    header = [line for line in config.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    started = f"python train.py fit --config configs/{config.name}"
    assert started in text, f"{config.name} has no line {started}"
    for word in ("Data:", "Time:", "Score:"):
        assert word in text, f"{config.name} has no line {word}"


def test_export_reports_gains_over_pytorch_but_no_times_of_a_busy_machine():
    gains = runpy.run_path(ROOT / "export.py")["gains"]
    bundle = {"latency_ms": 2.0, "first_answer_s": 0.1, "peak_rss_mb": 100.0, "installed_mb": None, "waited": None}
    eager = {"latency_ms": 5.0, "first_answer_s": 2.0, "peak_rss_mb": 800.0, "installed_mb": 4000.0, "waited": 0.0}
    found = gains(bundle, eager)
    assert found == "compared with PyTorch: 2.5x faster, 20.0x faster to the first answer, 8.0x less memory"
    busy = gains(bundle | {"waited": 0.4}, eager)
    assert busy == "compared with PyTorch: 8.0x less memory, no times, because other programs kept the machine busy"


@pytest.mark.parametrize("name", EMBEDDED)
def test_fit_test_predict_export_and_inference_without_torch_agree(name, command, tmp_path, monkeypatch, capsys):
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    fitted = command("train.py", "fit", "--config", f"configs/{name}.yaml", "--run", run, *FEW_STEPS)
    assert fitted.returncode == 0, fitted.stderr
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert train(["test", "--config", f"{run}/config.yaml"]) == 0
    assert train(["predict", "--config", f"{run}/config.yaml"]) == 0
    capsys.readouterr()
    unmeasured = partial(bundles.export, contenders=())  # measured by test_bench and, in CI, by the README's command
    monkeypatch.setattr(bundles, "export", unmeasured)
    assert export_py([str(run), "--target", "cpu", "--output", str(bundle)]) == 0
    assert f"{bundle}: float32, accuracy" in capsys.readouterr().out

    digit = np.round(load_digits().images[7] * 255 / 16).astype(np.uint8)
    Image.fromarray(digit).save(tmp_path / "digit.png")
    answered = command("-c", WITHOUT_TORCH, bundle, tmp_path / "digit.png", tmp_path / "digit.png")
    assert answered.returncode == 0, answered.stderr
    lines = [json.loads(line) for line in answered.stdout.splitlines()]
    assert len(lines) == 2
    assert lines[0]["label"] in set("0123456789")
    assert 0 < lines[0]["probability"] <= 1

    accuracy = json.loads((run / "test.json").read_text())["accuracy"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    verification = manifest["verification"]
    assert verification["test"]["pytorch"] == pytest.approx(accuracy)
    assert verification["test"]["bundle"] == pytest.approx(accuracy)
    assert verification["test"]["n"] == 360
    assert max(verification[part]["max_abs_error"] for part in ("metric", "test")) <= 1e-5

    by_pytorch = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    by_bundle = load(bundle)(list(digits_of_the_test_split()))
    assert [row["label"] for row in by_bundle] == [row["label"] for row in by_pytorch]
    np.testing.assert_allclose(
        [row["probability"] for row in by_bundle], [row["probability"] for row in by_pytorch], atol=1e-5
    )


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Fit, test, predict and export as a user does, but in this process and without the measurement.

    Return the scores of the test, the bundle's manifest, the rows of the predictions and the names of the figures.
    """

    def run(name: str, config: str) -> tuple[dict, dict, list[dict], set[str]]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py"])
        Path(f"{name}.yaml").write_text(config)
        folder = Path("runs") / name
        assert train(["fit", "--config", f"{name}.yaml"]) == 0
        assert train(["predict", "--config", f"{folder}/config.yaml"]) == 0
        manifest = export(*load_run(folder, []), TARGETS["cpu"], Path("bundle"))
        scores = json.loads((folder / "test.json").read_text())
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        return scores, manifest, rows, {path.name for path in (folder / "figures").iterdir()}

    return run


RINGS = """
best: {metric: val/accuracy, mode: max}
model:
  class_path: dlref.tasks.ImageClassifier
  init_args:
    network: {class_path: dlref.models.LeNet5, init_args: {num_classes: 2, in_channels: 3, activation: relu}}
    preprocess:
      class_path: dlref.tasks.ImagePreprocess
      init_args: {size: 32, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05, momentum: 0.9}}
data:
  class_path: dlref.data.ImageFolder
  init_args: {root: rings, batch_size: 16, image_size: 32, resize: 40, num_workers: 0}
trainer: {max_epochs: 8, enable_progress_bar: false, log_every_n_steps: 1}
"""


def test_own_pictures_are_cropped_the_same_way_in_the_test_and_at_the_edge(trained, tmp_path):
    """The class is a ring at the border of the crop that evaluation keeps: a second crop would remove it."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 16), ("test", 16)):
        for number in range(count):
            picture = generator.integers(90, 110, (100, 120, 3), dtype=np.uint8)
            label = "ring" if number % 2 else "none"
            if label == "ring":  # evaluation keeps rows 10 to 90, columns 20 to 100
                picture[10:90, 20:100] = 255
                picture[17:83, 27:93] = 100
            (tmp_path / "rings" / split / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / "rings" / split / label / f"{number}.png")
    scores, manifest, rows, _ = trained("rings", RINGS)
    test = manifest["verification"]["test"]
    assert test["pytorch"] == test["bundle"] == scores["accuracy"] == 1
    at_the_edge = load(tmp_path / "bundle")([tmp_path / row["input"] for row in rows])
    assert [row["label"] for row in at_the_edge] == [row["label"] for row in rows]
    assert [row["label"] for row in rows] == [row["input"].split("/")[-2] for row in rows]


BOXES = """
best: {metric: val/map, mode: max}
model:
  class_path: dlref.tasks.ObjectDetector
  init_args:
    network: {class_path: dlref.models.SSDResNet, init_args: {depth: 18, num_classes: 1, size: 96}}
    preprocess:
      class_path: dlref.tasks.ImagePreprocess
      init_args: {size: 96, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.002}}
data:
  class_path: dlref.data.VOCBoxes
  init_args:
    root: boxes
    train: ImageSets/Main/train.txt
    held_out: 0.2
    image_size: 96
    batch_size: 8
    zoom_out: 1.5
    num_workers: 0
trainer: {max_epochs: 1, enable_progress_bar: false, log_every_n_steps: 1}
"""


def test_own_boxes_give_the_same_predictions_in_the_test_and_at_the_edge(command, trained, tmp_path):
    """From VOC's files to a device without torch, in pictures that are not square.

    Four steps are too few to find objects, but PyTorch's boxes in resized pictures, scaled back, must equal those that
    the graph finds in the original pictures.
    """
    framed(tmp_path / "boxes", 40)
    scores, manifest, rows, figures = trained("boxes", BOXES)
    test = manifest["verification"]["test"]
    assert test["pytorch"] == pytest.approx(scores["map"], abs=1e-6)
    assert test["bundle"] == pytest.approx(scores["map"], abs=2e-3)
    assert figures == {"curves.png", "detections.png", "precision_recall.png"}
    answered = command(
        "-c", WITHOUT_TORCH, "bundle", *(row["input"] for row in rows), "--overlay", "drawn", cwd=tmp_path
    )
    assert answered.returncode == 0, answered.stderr
    assert len(list((tmp_path / "drawn").glob("*.png"))) == len(rows) == 8
    for row, line in zip(rows, answered.stdout.splitlines(), strict=True):
        found = json.loads(line)
        assert (found["width"], found["height"]) == (row["width"], row["height"]) == (60, 40)
        edges = np.array([one["box"] for one in found["objects"]])
        scores = np.array([one["score"] for one in found["objects"]])
        assert 40 < edges[:, 2].max() <= 60
        assert edges[:, 3].max() <= 40
        for one in row["objects"][:10]:
            near = (np.abs(edges - one["box"]).max(axis=1) < 2) & (np.abs(scores - one["score"]) < 0.05)
            assert near.any(), one


MASKS = """
best: {metric: val/miou, mode: max}
model:
  class_path: dlref.tasks.SemanticSegmenter
  init_args:
    network: {class_path: dlref.models.FCNCifarResNet, init_args: {depth: 20, num_classes: 3, output_stride: 2}}
    preprocess:
      class_path: dlref.tasks.Normalise
      init_args: {mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
    lr_scheduler: {class_path: dlref.tasks.Polynomial, init_args: {power: 0.9}}
data:
  class_path: dlref.data.MaskFolders
  init_args:
    root: data
    train: train
    val: validation
    class_names: [background, red, blue]
    base_size: 40
    crop_size: 32
    batch_size: 4
    num_workers: 0
trainer: {max_epochs: 10, enable_progress_bar: false, log_every_n_steps: 1}
"""


def test_own_masks_give_the_same_predictions_in_the_test_and_at_the_edge(command, trained, tmp_path):
    """From SageMaker's folders to a device without torch, in pictures that are not square, of unseen sizes."""
    folders(tmp_path / "data", train=16, validation=4)
    scores, manifest, rows, figures = trained("masks", MASKS)
    test = manifest["verification"]["test"]
    assert scores["miou"] > 0.8
    assert test["pytorch"] == pytest.approx(scores["miou"], abs=1e-6)
    assert test["bundle"] == pytest.approx(scores["miou"], abs=2e-3)
    assert figures == {"confusion.png", "curves.png", "masks.png"}
    inputs = [row["input"] for row in rows]
    Image.fromarray(painted(51, 83)[0]).save(tmp_path / "odd.png")
    arguments = ["bundle", *inputs, "odd.png", "--output", "masks", "--overlay", "overlays"]
    answered = command("-c", WITHOUT_TORCH, *arguments, cwd=tmp_path)
    assert answered.returncode == 0, answered.stderr
    answers = [json.loads(line) for line in answered.stdout.splitlines()]
    assert (answers[-1]["width"], answers[-1]["height"]) == (83, 51)
    for row, answer in zip(rows, answers, strict=False):
        assert answer["classes"] == pytest.approx(row["classes"], abs=1e-3)
    for i in range(4):
        with (
            Image.open(tmp_path / f"masks/{i}.png") as by_bundle,
            Image.open(tmp_path / f"runs/masks/predictions/{i}.png") as by_pytorch,
        ):
            assert (np.asarray(by_bundle) == np.asarray(by_pytorch)).mean() >= 0.999
    with Image.open(tmp_path / "masks/odd.png") as mask, Image.open(tmp_path / "overlays/odd.png") as overlay:
        assert mask.size == overlay.size == (83, 51)


SERIES = """
best: {metric: val/wql, mode: min}
model:
  class_path: dlref.tasks.Forecaster
  init_args:
    network:
      class_path: dlref.models.DeepAR
      init_args: {lags: 7, features: 6, cardinality: [2, 7], parameters: 3, cell: gru, num_cells: 12}
    distribution: {class_path: dlref.tasks.StudentT}
    longest_lag: 7
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data:
  class_path: dlref.data.SageMakerSeries
  init_args:
    train: train.json
    predict: predict.jsonl
    frequency: 1H
    prediction_length: 6
    context_length: 12
    batches: 30
trainer:
  max_epochs: 4
  gradient_clip_val: 10
  enable_progress_bar: false
  log_every_n_steps: 10
  callbacks:
    - {class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/wql, patience: 3}}
"""


def test_own_series_give_the_same_predictions_in_the_test_and_at_the_edge(command, trained, tmp_path, capsys):
    """From SageMaker's JSON Lines to a device without torch, with a category, a dynamic feature and missing values."""
    generator = np.random.default_rng(0)
    records = []
    for i, points in enumerate((200, 150, 90, 15)):
        promoted = (generator.random(points + 6) < 0.2).astype(float)
        target = (10**i * (2 + promoted[:points] + generator.normal(0, 0.1, points))).round(4).tolist()
        target[3:5] = [None, "NaN"]
        records.append(
            {
                "start": f"2024-01-0{i + 1}",
                "target": target,
                "cat": [i % 2, 5 + i // 2],
                "dynamic_feat": [promoted.tolist()],
            }
        )
    known = [{**r, "dynamic_feat": [r["dynamic_feat"][0][: len(r["target"])]]} for r in records]
    (tmp_path / "train.json").write_text("".join(json.dumps(record) + "\n" for record in known))
    (tmp_path / "predict.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    scores, manifest, rows, figures = trained("series", SERIES)
    test = manifest["verification"]["test"]
    assert scores["wql"] < scores["last_value_wql"]
    assert test["pytorch"] == pytest.approx(scores["wql"], rel=1e-5)
    assert test["bundle"] == pytest.approx(scores["wql"], rel=1e-4)
    assert figures == {"by_time.png", "calibration.png", "curves.png", "forecasts.png"}
    answered = command("-c", WITHOUT_TORCH, "bundle", "predict.jsonl", cwd=tmp_path)
    assert answered.returncode == 0, answered.stderr
    answers = [json.loads(line) for line in answered.stdout.splitlines()]
    assert [answer["input"] for answer in answers] == [row["input"] for row in rows]
    for row, answer in zip(rows, answers, strict=True):
        np.testing.assert_allclose(answer["mean"], row["mean"], rtol=1e-4)
        for level, values in row["quantiles"].items():
            np.testing.assert_allclose(answer["quantiles"][level], values, rtol=1e-4)
    (tmp_path / "request.json").write_text(json.dumps({"instances": records, "configuration": {"num_samples": 7}}))
    refuses(["bundle", "request.json", "predict.jsonl:9"], "error: predict.jsonl:9: ", capsys)


TEXTS = """
best: {metric: val/exact_match, mode: max}
model:
  class_path: dlref.tasks.Translator
  init_args:
    network:
      class_path: dlref.models.Seq2Seq
      init_args:
        source_vocabulary: 320
        target_vocabulary: 320
        cell: gru
        attention: general
        hidden_size: 96
        embedding_size: 48
        dropout: 0.0
    metric: exact_match
    beam: 2
    optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}
data:
  class_path: dlref.data.ParallelText
  init_args: {root: ., source: de, target: en, vocabulary_size: 290, batch_size: 100, longest: 30}
trainer:
  max_epochs: 100
  check_val_every_n_epoch: 20
  enable_progress_bar: false
  log_every_n_steps: 5
  callbacks:
    - {class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/bleu, mode: max, patience: 9}}
"""


def test_own_texts_give_the_same_predictions_in_the_test_and_at_the_edge(command, trained, tmp_path, capsys):
    """From parallel files, split into byte pairs, to a device without torch: a text, lines, a request, a beam."""
    german, english = ("eins", "zwei", "drei", "vier"), ("one", "two", "three", "four")
    for split in ("train", "val", "test"):
        for ending, words in (("de", german), ("en", english)):
            lines = [f"{a} {b} {c}" for a in words for b in words for c in words]
            (tmp_path / f"{split}.{ending}").write_text("\n".join(lines) + "\n")
    scores, manifest, rows, figures = trained("texts", TEXTS)
    assert scores["exact_match"] > 0.9
    for side in ("pytorch", "bundle"):
        assert manifest["verification"]["test"][side] == pytest.approx(scores["exact_match"])
    assert manifest["metadata"]["source"]["kind"] == "bpe"
    assert figures == {"attention.png", "by_length.png", "curves.png", "samples.md"}
    answered = command("-c", WITHOUT_TORCH, "bundle", "test.de", cwd=tmp_path)
    assert answered.returncode == 0, answered.stderr
    answers = [json.loads(line) for line in answered.stdout.splitlines()]
    assert [answer["target"] for answer in answers] == [row["target"] for row in rows]
    assert answers[5]["input"] == "test.de:6"

    (tmp_path / "request.json").write_text(json.dumps({"instances": [{"data": "eins zwei drei"}]}))
    capsys.readouterr()
    assert runtime(["bundle", "eins zwei drei", "request.json", "--beam", "3"]) == 0
    text, request = map(json.loads, capsys.readouterr().out.splitlines())
    assert text["target"] == request["predictions"][0]["target"] == "one two three"
    refused = command("-c", WITHOUT_TORCH, "bundle", "eins", "--overlay", "out.png", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "error: attention is drawn by matplotlib; expected it to be installed\n"
    assert runtime(["bundle", "eins zwei", "--overlay", "out.png"]) == 0
    with Image.open(tmp_path / "out.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    for arguments, complaint in (
        (["--beam", "17", "bundle", "eins"], "beam: 17; expected a whole number from 1 to 16"),
        (["bundle", ""], "input: empty; expected a text"),
        (["bundle", "eins " * 10_000], "10000 tokens; expected at most 29"),
        (["bundle", "-heute"], "and -- before a text that begins with a dash"),
        (["bundle", "--", "-" * 300], "tokens; expected at most 29"),
    ):
        refuses(arguments, complaint, capsys)
    assert runtime(["bundle", "eins zwei", "request.json", "--overlay", "maps"]) == 2
    drawn = capsys.readouterr()
    assert "a request with instances cannot be drawn" in drawn.err
    second = json.loads(drawn.out.splitlines()[1])
    assert second["predictions"] == request["predictions"]
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["1.png"]


def refuses(arguments, complaint, capsys):
    """Check that the command prints one line with the complaint and exits with code 2."""
    capsys.readouterr()
    assert runtime(arguments) == 2, arguments
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


STORIES = """
best: {metric: val/bits_per_byte, mode: min}
model:
  class_path: dlref.tasks.LanguageModel
  init_args:
    prompt: The
    network:
      class_path: dlref.models.GPT
      init_args: {vocabulary: 320, context_length: 32, n_layer: 2, n_head: 2, n_embd: 32, positions: rotary}
    optimizer: {class_path: dlref.tasks.MuonAdamW, init_args: {lr: 0.01}}
    lr_scheduler: {class_path: dlref.tasks.WarmupCosine, init_args: {warmup: 0.1}}
data:
  class_path: dlref.data.TextFiles
  init_args: {train: "texts/*.txt", vocabulary_size: 290, context_length: 32, batch_size: 16, batches: 60}
trainer:
  max_epochs: 2
  gradient_clip_val: 1
  enable_progress_bar: false
  log_every_n_steps: 20
"""


def test_own_stories_give_the_same_continuations_in_the_test_and_at_the_edge(command, trained, tmp_path, capsys):
    """From text files, split into byte pairs, to a device without torch: prompts, a request, a streamed text."""
    (tmp_path / "texts").mkdir()
    generator = np.random.default_rng(0)
    for i in range(8):
        animals = generator.choice(["cat", "dog", "bird", "cow"], 100)
        (tmp_path / f"texts/{i}.txt").write_text("".join(f"The {animal} sat on the {animal}.\n" for animal in animals))
    scores, manifest, rows, figures = trained("stories", STORIES)
    assert scores["bits_per_byte"] < scores["xz_bits_per_byte"] < 1
    assert scores["perplexity"] == pytest.approx(np.exp(scores["loss"]), rel=1e-4)
    for side in ("pytorch", "bundle"):
        assert manifest["verification"]["test"][side] == pytest.approx(scores["bits_per_byte"], rel=1e-3)
    assert figures == {"attention.png", "by_position.png", "curves.png", "samples.md"}
    answered = command("-c", WITHOUT_TORCH, "bundle", "--", *[row["input"] for row in rows], cwd=tmp_path)
    assert answered.returncode == 0, answered.stderr
    answers = [json.loads(line) for line in answered.stdout.splitlines()]
    assert answers == rows

    said = ["--prompt", "The dog sat on", "--temperature", "0", "--max-new-tokens", "9", "--stop", "\n"]
    capsys.readouterr()
    assert runtime(["bundle", *said]) == 0
    assert re.fullmatch("The dog sat on the (cat|dog|bird|cow)[.]\n", capsys.readouterr().out)
    request = {"inputs": "The cow sat on", "parameters": {"temperature": 0, "stop": ["."]}}
    (tmp_path / "request.jsonl").write_text(json.dumps(request) + "\n")
    assert runtime(["bundle", "request.jsonl", "--form", "sagemaker"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["input"] == "request.jsonl:1"
    assert answer["generated_text"] in (" the cat", " the dog", " the bird", " the cow")
    for arguments, complaint in (
        (["bundle"], "either INPUT or --prompt is required, and not both"),
        (["bundle", "a", "--prompt", "b"], "either INPUT or --prompt is required, and not both"),
        (["bundle", "--prompt", os.fsdecode(b"a\xff")], "input: half of a surrogate pair, or not UTF-8"),
        (["bundle", "a", "--temperature", "-1"], "--temperature: -1; expected a number from 0 to 100"),
        (["bundle", "a", "--top-k", "1.5"], "--top-k: 1.5; expected a whole number"),
        (["bundle", "a", "--beam", "3"], "--beam: unknown to this bundle"),
        (["bundle", "a", "--overlay", "a.png"], "this bundle's answers cannot be drawn"),
    ):
        refuses(arguments, complaint, capsys)


def digits_of_the_test_split():
    from dlref.data import Digits

    data = Digits()
    data.setup("test")
    return data.splits["test"].images.numpy()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected RUN --target TARGET --output FOLDER"),
        (
            ["runs/x", "--target", "abacus", "--output", "b"],
            "target 'abacus' is unknown; expected one of cpu",
        ),
        (["runs/x", "--target", "cpu", "--output", "b"], "runs/x/checkpoints/best.ckpt: no checkpoint"),
    ],
)
def test_export_refuses_invalid_arguments_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert export_py(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_targets_are_listed(capsys):
    assert export_py(["--list-targets"]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.split() == ["target", "precision", "provider", "file", "shapes", "for"]
    assert [row.split()[0] for row in rows] == list(TARGETS)
    assert rows[list(TARGETS).index("qualcomm")].split()[:5] == ["qualcomm", "int16", "QNN", ".onnx", "fixed"]


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    ("opened", "code", "said"),
    [(closed_pipe, 0, ""), (lambda: os.open("/dev/full", os.O_WRONLY), 2, "error: standard output: No space left")],
)
def test_an_output_that_takes_nothing_is_no_traceback(opened, code, said):
    output = opened()
    done = subprocess.run(
        [sys.executable, "export.py", "--list-targets"], stdout=output, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(output)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, bool(said))
    assert done.stderr.startswith(said)
