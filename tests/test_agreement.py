"""The comparison of a run with its bundle on the test split."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from benchmarks import agreement
from dlref.runtime import make_runner


class Framed(torch.nn.Module):
    """Images are of class 1 if they are bright, whatever is around the centre."""

    facts: ClassVar = {"labels": ["dark", "bright"], "multi_label": False, "crop": 0.5}

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        bright = images.float().mean((1, 2, 3)) / 255
        return (torch.stack([1 - bright, bright], 1),)

    def probability(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def test_agreement_gives_the_bundle_the_images_that_pytorch_gets(monkeypatch):
    task = Framed()
    images = torch.full((3, 1, 8, 8), 255, dtype=torch.uint8)
    images[:, :, 2:6, 2:6] = 0  # bright as a whole, and dark in its centre

    def classify(image: np.ndarray) -> dict[str, np.ndarray]:
        return {"probability": task(torch.from_numpy(image).permute(0, 3, 1, 2))[0].numpy()}

    classify.shape = {"image": ("batch", "height", "width", 1)}
    runner = make_runner("image-classification", {"classify": classify}, task.facts | {"channels": 1})
    monkeypatch.setattr(agreement, "load", lambda bundle: runner)
    (told,) = agreement.labels(task, [(images, torch.tensor([1, 1, 0]))], Path("bundle"))
    assert told == (
        "3 test images, bundle's accuracy 0.6667, 0 labels differ from PyTorch's, probabilities by 0.0e+00 at most"
    )
