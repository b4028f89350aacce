"""The base of all image tasks: preprocessing inside the task, memory format, and checks with a black image."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import UInt8
from torch import Tensor

from dlref.runtime import UserError
from dlref.runtime.errors import one_line, shortened
from dlref.tasks.preprocess import Normalise
from dlref.tasks.task import Task, unlike


class ImageTask(Task):
    """A task whose network takes normalised pixels and returns a tensor or a tuple of tensors.

    Args:
        preprocess: maps pixels to the network's input, in training, evaluation and the bundle.
        channels_last: keep the network's weights and activations in NHWC order in memory.
        task: arguments of every `Task`: network, optimizer, lr_scheduler, weights, freeze, ...
    """

    def __init__(self, preprocess: Normalise, channels_last: bool = False, **task):
        super().__init__(**task)
        self.preprocess = preprocess
        if channels_last:
            self.network.to(memory_format=torch.channels_last)

    def take_facts(self, datamodule) -> None:
        """Also check the names of the classes, which figures and answers write as texts."""
        super().take_facts(datamodule)
        labels = self.facts.get("labels", [])  # a regression has none
        if not all(isinstance(name, str) for name in labels):
            raise UserError(f"labels of the data: {shortened(labels)}; expected texts, the class names")

    def forward(self, images: UInt8[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        """Return the network's outputs for these pixels."""
        return as_tuple(self.network(self.preprocess(images)))

    def probe(self, side: int, expected: str = "expected one that takes what preprocess gives") -> tuple[Tensor, ...]:
        """Return the network's outputs for a black image.

        Raises UserError if the network rejects it, or answers otherwise when a white image is in the same batch.
        """
        channels = self.preprocess.channels
        images = torch.zeros(2, channels, side, side, dtype=torch.uint8, device=self.network_device)
        images[1] = 255
        with self.probing(f"an image of {side}×{side} pixels and {channels} channels", expected):
            answers, batch = self(images[:1]), self(images)
        for answer in answers:
            if not isinstance(answer, Tensor):
                raise UserError(f"network returns {type(answer).__name__}; expected tensors, alone or in a tuple")
        for alone, among in zip(answers, batch, strict=False):
            # Scores would be those of the evaluation's batches; a bundle mostly sees one image at a time.
            if alone.ndim and alone.shape == among[:1].shape and unlike(among[:1], alone):
                raise UserError(
                    "network's outputs for an image change with the other images in its batch; expected the same in "
                    "evaluation mode: attention with batch_first, batch norm with running statistics, no random numbers"
                )
        return answers


def as_tuple(answer) -> tuple:
    """Return a network's output as a tuple, whether it is one tensor or several."""
    return answer if isinstance(answer, tuple) else (answer,)


def nhwc(images: UInt8[Tensor, "B C H W"]) -> UInt8[Tensor, "B H W C"]:
    """Return images in the layout that a bundle takes."""
    return images.permute(0, 2, 3, 1).contiguous()


@contextmanager
def enough_to_normalise(images: Tensor) -> Iterator[None]:
    """Raise UserError if batch norm gets a single value per channel, from a one-pixel map of a single image."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"a batch of {len(images)}: {one_line(error)}; expected a larger batch_size") from error


def check_classes(found: int, known: int) -> None:
    """Raise UserError unless the network has as many classes as the data."""
    if found != known:
        raise UserError(
            f"network returns {found} classes, the data has {known}; expected "
            f"model.init_args.network.init_args.num_classes to be {known}"
        )


def check_class_weights(weights: Tensor | None, classes: int) -> None:
    """Raise UserError unless `weights` are usable factors of a loss, one per class."""
    if weights is None:
        return
    if len(weights) != classes:
        raise UserError(f"class_weights has {len(weights)} factors; expected {classes}, one a class")
    if not (weights.isfinite().all() and (weights >= 0).all() and weights.any()):
        raise UserError(f"class_weights {weights.tolist()}; expected factors of 0 or more, and not all 0")
