"""A classifier and its bundle on the whole test split, image by image: `python -m benchmarks.agreement RUN BUNDLE`.

PyTorch answers as `train.py test` does, on the loader's batches; the bundle answers each image through the runner
that a device uses. Prints how many labels differ and how far probabilities are apart.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from dlref.cli import load_run
from dlref.runtime import load


def main() -> None:
    """Compare and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("bundle", type=Path)
    options, overrides = parser.parse_known_args()
    task, data = load_run(options.run, overrides)
    data.prepare_data()
    data.setup("test")
    runner, labels = load(options.bundle), task.known["labels"]
    images_seen = differing = correct = 0
    error = 0.0
    batches = data.test_dataloader()
    for images, targets in track(batches, "comparing", console=Console(stderr=True), transient=True):
        with torch.no_grad():
            probability = task.probability(task(images)[0])
        answers = runner([image.permute(1, 2, 0).numpy() for image in images])
        answered = torch.tensor([labels.index(answer["label"]) for answer in answers])
        certainty = torch.tensor([answer["probability"] for answer in answers])
        images_seen += len(images)
        correct += (answered == targets).sum().item()
        differing += (answered != probability.argmax(-1)).sum().item()
        error = max(error, (certainty - probability.max(-1).values).abs().max().item())
    print(
        f"{options.run.name}: {images_seen} test images, bundle's accuracy {correct / images_seen:.4f}, "
        f"{differing} labels differ from PyTorch's, probabilities by {error:.1e} at most"
    )


if __name__ == "__main__":
    main()
