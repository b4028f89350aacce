"""Training images/s of the Lightning path against a bare PyTorch loop: `python -m benchmarks.lightning_overhead`.

Both train the same network on the same batches with the same augmentation, optimiser and schedule, in this
process, in turns. The Lightning path is what `train.py fit` runs: the task, the data module, CSV and
TensorBoard logging, the look for NaN, checkpoints. The bare loop does only what the mathematics needs. Timed is the
middle of an epoch: neither start-up nor the validation after it.
"""

import argparse
import logging
import platform
import statistics
import tempfile
import time
import warnings

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dlref.data.small_images import ImageTensors, InMemoryImages
from dlref.models import LeNet5, ResNet
from dlref.tasks import ImageClassifier, ImagePreprocess, WarmupCosine
from dlref.tasks.checkpoints import Last
from dlref.tasks.finite import Finite

WARMUP = 2  # steps before the clock starts
CASES = {  # network, channels, batch size, timed steps
    "ResNet-18 (CIFAR stem)": (lambda: ResNet(18, 10, stem="cifar"), 3, 32, 8),
    "LeNet-5": (lambda: LeNet5(10, activation="relu"), 1, 128, 150),
}


class Noise(InMemoryImages):
    """Random 32×32 images, as many as one epoch of the benchmark takes."""

    def __init__(self, channels: int, batch_size: int, steps: int):
        super().__init__(batch_size=batch_size, pad_crop=4, flip=True)
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size * steps, channels, 32, 32)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.tensors = ImageTensors(images, torch.randint(0, 10, shape[:1], generator=generator))

    def read(self):
        """One set for every split."""
        return list("0123456789"), dict.fromkeys(("train", "val", "test"), self.tensors)


class Clock(Callback):
    """Seconds from the end of the last warm-up step to the end of the last step."""

    def on_train_batch_end(self, trainer: Trainer, task, outputs, batch, batch_index: int) -> None:
        """Read the clock."""
        if batch_index == WARMUP - 1:
            self.start = time.perf_counter()
        self.seconds = time.perf_counter() - getattr(self, "start", 0.0)


def make_task(network, channels: int) -> ImageClassifier:
    """The task both loops train."""
    return ImageClassifier(
        network=network(),
        preprocess=ImagePreprocess(32, mean=[0.5] * channels, std=[0.25] * channels),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
        lr_scheduler=WarmupCosine,
    )


def lightning_path(network, channels: int, batch_size: int, steps: int) -> float:
    """Seconds of `steps` training steps under the Trainer."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_val_batches=0,
            logger=[CSVLogger(folder), TensorBoardLogger(folder)],
            callbacks=[clock, Finite(), Last(minutes=10)],
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(make_task(network, channels), datamodule=Noise(channels, batch_size, WARMUP + steps))
    return clock.seconds


def bare_loop(network, channels: int, batch_size: int, steps: int) -> float:
    """Seconds of `steps` training steps without Lightning."""
    from dlref.data.augment import random_crop, random_flip

    task, data = make_task(network, channels), Noise(channels, batch_size, WARMUP + steps)
    data.setup()
    network, preprocess = task.network.train(), task.preprocess
    optimizer = task.optimizer([{"params": list(network.parameters())}])
    schedule = task.lr_scheduler(optimizer, WARMUP + steps)
    for step, (images, targets) in enumerate(data.train_dataloader()):
        pixels = preprocess(random_flip(random_crop(images, 4)))
        loss = torch.nn.functional.cross_entropy(network(pixels), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step == WARMUP - 1:
            start = time.perf_counter()
    return time.perf_counter() - start


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7, help="runs of each loop, in turns")
    pairs = parser.parse_args().pairs
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # advice on workers and logging intervals; nothing is learnt here
    table = Table(title=f"Training on {torch.get_num_threads()} CPU threads, {pairs} pairs")
    for title in ("network", "batch", "bare images/s", "Lightning images/s", "overhead: median", "min", "max"):
        table.add_column(title, justify="left" if title == "network" else "right")
    for name, (network, channels, batch_size, steps) in CASES.items():
        times = [
            (lightning_path(network, channels, batch_size, steps), bare_loop(network, channels, batch_size, steps))
            for _ in track(range(pairs), name, console=Console(stderr=True), transient=True)
        ]
        overheads = [lightning / bare - 1 for lightning, bare in times]
        speeds = [batch_size * steps / statistics.median(column) for column in zip(*times, strict=True)]
        spread = (statistics.median(overheads), min(overheads), max(overheads))
        table.add_row(name, str(batch_size), f"{speeds[1]:.0f}", f"{speeds[0]:.0f}", *(f"{o:+.1%}" for o in spread))
    Console(width=120).print(table)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")


if __name__ == "__main__":
    main()
