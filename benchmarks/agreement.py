"""Compare a run and its bundle on the whole test split: `python -m benchmarks.agreement RUN BUNDLE`.

For a classifier of one class per image, PyTorch and the runner that a device uses predict for the loader's batches,
which are cropped already. The output is how many labels differ, and how far apart probabilities are. For any other task
it is the metric (for detection all that COCO reports) of PyTorch and of the bundle, both through that runner.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.rows import watched
from dlref.cli import load_run
from dlref.runtime import load
from dlref.runtime.arguments import Parser, exit_code
from dlref.tasks.task import Task


def labels(task: Task, batches, bundle: Path) -> list[str]:
    """Compare a classifier's labels and probabilities."""
    runner, names = load(bundle), task.facts["labels"]
    images_seen = differing = correct = 0
    error = 0.0
    for images, targets in watched(batches, "comparing"):
        with torch.no_grad():
            probability = task.probability(task(images)[0])
        answers = runner.answer([image.permute(1, 2, 0).numpy() for image in images])
        answered = torch.tensor([names.index(answer["label"]) for answer in answers])
        certainty = torch.tensor([answer["probability"] for answer in answers])
        images_seen += len(images)
        correct += (answered == targets).sum().item()
        differing += (answered != probability.argmax(-1)).sum().item()
        error = max(error, (certainty - probability.max(-1).values).abs().max().item())
    return [
        f"{images_seen} test images, bundle's accuracy {correct / images_seen:.4f}, "
        f"{differing} labels differ from PyTorch's, probabilities by {error:.1e} at most"
    ]


def metrics(task: Task, batches, bundle: Path) -> list[str]:
    """Compare the metric of any task, or its scores if it has several."""
    served = task.deployable(next(iter(batches)))
    runners = {"PyTorch": served.runner(), "bundle": load(bundle)}
    scores = getattr(task, "scores", lambda *arguments: {task.metric: task.evaluate(*arguments)})
    found = {name: scores(runner, watched(batches, name)) for name, runner in runners.items()}
    return [
        f"{name}: {', '.join(f'{key} {value:.4f}' for key, value in values.items())}" for name, values in found.items()
    ]


def main() -> int:
    """Compare and print a line or two. Return the exit code."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("bundle", type=Path)
    return exit_code(lambda: compare(*parser.parse_known_args()))


def compare(options: argparse.Namespace, overrides: list[str]) -> None:
    """Compare a run with a bundle. Raises UserError."""
    task, data = load_run(options.run, overrides)
    data.prepare_data()
    data.setup("test")
    task.take_facts(data)
    found = labels if task.facts.get("multi_label") is False else metrics
    for line in found(task, data.test_dataloader(), options.bundle):
        print(f"{options.run.name}, {line}")


if __name__ == "__main__":
    sys.exit(main())
