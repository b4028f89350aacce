"""What a GPU does: the configs' steps through Lightning's Trainer, on batches of noise that lie on the device.

Networks, batch sizes, precision and optimisers are the configs'; of LeNet-5, DeepAR, Seq2Seq and CIFAR-10 the loaders
too. The share of the arithmetic is what torch counts of a step, forward and backward, over the rate of a product of two
matrices of 8192×8192 in bfloat16 in the same run. Seconds without a batch are the host's, from the end of a step to the
beginning of the next.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning import Callback, Trainer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.configs import read, roots
from benchmarks.overhead import made, options, under_trainer
from benchmarks.rows import DEVICE, NotHere, Row, Rows, in_turns
from dlref.data.loader import SplitData
from dlref.data.small_images import ImageTensors, InMemoryImages
from dlref.tasks import EMA
from dlref.tasks.task import Task

TURNS, WARMUP, SIDE = 3, 20, 8192
CIFAR10 = 0.96  # accuracy on the validation split


class Always(Dataset):
    """The same batch, whatever is asked for."""

    def __init__(self, batch: Any, samples: int):
        self.batch, self.samples = batch, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, samples: Tensor) -> Any:
        return self.batch


class Noise(SplitData):
    """One batch on the device, again and again.

    Args:
        make: the batch of so many samples.
        batch_size: samples of it.
        steps: of an epoch.
        facts: what the task wants to know of its data.
    """

    def __init__(self, make: Callable[[int], Any], batch_size: int, steps: int, **facts: Any):
        super().__init__()
        self.make, self.batch_size, self.steps = make, batch_size, steps
        for name, value in facts.items():
            setattr(self, name, value)

    def setup(self, stage: str) -> None:
        """Make it."""
        device = self.trainer.strategy.root_device
        batch = tree_map(lambda part: part.to(device), self.make(self.batch_size))
        self.splits = dict.fromkeys(("train", "val", "test"), Always(batch, self.batch_size * self.steps))


class Speed(Callback):
    """Seconds of a step, waiting for the device only before the first and after the last, and the host's in between."""

    def __init__(self, steps: int):
        self.steps, self.count, self.between = steps, 0, 0.0

    def on_train_batch_start(self, trainer: Trainer, task: Task, batch: Any, index: int) -> None:
        """A batch is there."""
        now = time.perf_counter()
        if self.count == WARMUP:
            finish()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.start = time.perf_counter()
        elif WARMUP < self.count < WARMUP + self.steps:
            self.between += now - self.end

    def on_train_batch_end(self, trainer: Trainer, task: Task, outputs: Any, batch: Any, index: int) -> None:
        """A step is set off. What comes after the last one, such as a checkpoint, is not timed."""
        self.count += 1
        if self.count > WARMUP + self.steps:
            return
        if self.count == WARMUP + self.steps:
            finish()
            trainer.should_stop = True
        self.end = time.perf_counter()

    def mean(self) -> float:
        """Seconds of a step."""
        return (self.end - self.start) / self.steps


def finish() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def wanted() -> None:
    """Raise NotHere without a GPU."""
    if DEVICE != "cuda":
        raise NotHere("it wants a GPU")


def on_noise(config: str, make: Callable, facts: dict, unit: str, each: int, goal: str, steps: int = 100) -> Rows:
    """A config's step on noise: so many things of `unit` a second, `each` of them in a sample."""
    wanted()
    size = read(config)["data"]["init_args"]["batch_size"]
    rates, between, memory = [], [], []
    for _ in track(range(TURNS), config, console=Console(stderr=True), transient=True):
        task, _ = made(config, ("--model.init_args.weights", "null"))
        data, speed = Noise(make, size, WARMUP + steps, **facts), Speed(steps)
        seconds = under_trainer(task, data, WARMUP + steps, options(config), clock=speed)
        rates.append(size * each / seconds)
        between.append(speed.between / steps / seconds)
        memory.append(torch.cuda.max_memory_allocated() / 1e9)
    share = [rate / (size * each) * operations(config, make, facts, size) / product() for rate in rates]
    return {
        f"training, `{config}`": Row(rates, unit=unit, goal=goal),
        "share of a matrix product's arithmetic": Row(share),
        "share of a step without a batch": Row(between),
        "peak memory": Row(memory, unit="GB"),
    }


def operations(config: str, make: Callable, facts: dict, size: int) -> float:
    """Of a step, counted on two samples."""
    task, _ = made(config, ("--model.init_args.weights", "null", "--model.init_args.compile_network", "false"))
    task.remember(facts)
    task.log = lambda *arguments, **named: None
    task.to(DEVICE).train()
    task.mix = None  # which ImageClassifier.setup makes: blends cost no product
    batch = tree_map(lambda part: part.to(DEVICE), make(2))
    with FlopCounterMode(display=False) as counter, torch.autocast(DEVICE, torch.bfloat16):
        task.training_step(batch, 0).backward()
    return counter.get_total_flops() * size / 2


def product() -> float:
    """Operations a second of a product of two matrices."""
    left, right = torch.randn(2, SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16)
    seconds = in_turns("product", {"product": lambda: left @ right}, turns=20)["product"]
    return 2 * SIDE**3 / statistics.median(seconds)


def images(side: int, classes: int, count: int) -> tuple[Tensor, Tensor]:
    """Pictures and their classes."""
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8), torch.randint(classes, (count,))


def boxes(side: int, classes: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures with eight boxes each."""
    pictures, _ = images(side, classes, count)
    corner = 0.7 * torch.rand(count, 8, 2)
    return pictures, {
        "boxes": torch.cat([corner, corner + 0.05 + 0.25 * torch.rand(count, 8, 2)], dim=-1),
        "labels": torch.randint(classes, (count, 8)),
        "ignored": torch.zeros(count, 8, dtype=torch.bool),
        "sizes": torch.full((count, 2), side),
    }


def tokens(vocabulary: int, length: int, count: int) -> Tensor:
    """Windows of tokens."""
    return torch.randint(vocabulary, (count, length + 1))


class Clothes(InMemoryImages):
    """Noise as much as Fashion-MNIST."""

    def read(self) -> tuple[list[str], dict[str, ImageTensors]]:
        """60,000 pictures of 28×28."""
        pictures = ImageTensors(torch.randint(256, (60_000, 1, 28, 28), dtype=torch.uint8), torch.arange(60_000) % 10)
        return list("0123456789"), dict.fromkeys(("train", "val", "test"), pictures)


def lenet5() -> Rows:
    """An epoch of LeNet-5, batches of its config, from data on the device."""
    wanted()
    config, seconds = "lenet5_fashion_mnist", []
    arguments = {name: value for name, value in read(config)["data"]["init_args"].items() if name != "root"}
    for _ in track(range(TURNS), config, console=Console(stderr=True), transient=True):
        steps = 60_000 // arguments["batch_size"]
        task, speed = made(config)[0], Speed(steps - WARMUP)
        seconds.append(steps * under_trainer(task, Clothes(**arguments), steps, options(config), clock=speed))
    return {f"an epoch of 60,000 pictures, `{config}`": Row(seconds, unit="s", goal="<= 1")}


def beside_a_cpu(config: str, batch_size: int, steps: int = 20) -> Rows:
    """Steps a second of both, in turns."""
    wanted()
    row = Row([], [], "steps/s", "this machine's CPU", ">= 10")
    for _ in track(range(TURNS), config, console=Console(stderr=True), transient=True):
        for accelerator, found in (("cpu", row.peer), ("gpu", row.own)):
            task, data = made(config, ("--data.init_args.batch_size", str(batch_size)))
            seconds = under_trainer(task, data, steps, options(config) | {"accelerator": accelerator})
            found.append(1 / seconds)
    return {f"training in batches of {batch_size}, `{config}`": row}


class Reached(Callback):
    """Seconds until a validation reaches a target, at which the fit ends."""

    seconds, best = None, 0.0

    def on_fit_start(self, trainer: Trainer, task: Task) -> None:
        """The data is read, the network on its device."""
        self.start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, task: Task) -> None:
        """Look."""
        accuracy = float(trainer.callback_metrics["val/accuracy"])
        self.best = max(self.best, accuracy)
        if accuracy >= CIFAR10 and not trainer.sanity_checking:
            self.seconds, trainer.should_stop = time.perf_counter() - self.start, True


def cifar10() -> Rows:
    """ResNet-18 to its target, compilation and validation included."""
    wanted()
    config, seconds, best = "resnet18_cifar10", [], []
    trainer = read(config)["trainer"]
    for _ in range(TURNS):
        task, data = made(config, tuple(roots(config)))
        reached, average = Reached(), EMA(**trainer["callbacks"][0]["init_args"])
        given = {name: value for name, value in trainer.items() if name != "callbacks"}
        given |= {"devices": 1, "logger": False, "enable_checkpointing": False}
        Trainer(**given, callbacks=[average, reached]).fit(task, data)
        best.append(reached.best)
        seconds += [reached.seconds] if reached.seconds else []
    rows = {f"best accuracy on CIFAR-10's validation split, `{config}`": Row(best, goal=f">= {CIFAR10}")}
    timed = {f"seconds to {CIFAR10}, `{config}`": Row(seconds, unit="s", goal="<= 60")}
    return rows | (timed if len(seconds) == TURNS else {})


LETTERS = ["<pad>", "<unk>", "<s>", "</s>", *(chr(0x10000 + i) for i in range(50_300))]
BENCHMARKS = {
    "gpu-resnet50": partial(
        on_noise,
        "resnet50_imagefolder",
        partial(images, 224, 1000),
        {"labels": [str(k) for k in range(1000)], "multi_label": False, "crop": None},
        "images/s",
        1,
        ">= 5800",
    ),
    "gpu-ssd300": partial(
        on_noise,
        "ssd300_resnet50_coco",
        partial(boxes, 300, 80),
        {"labels": [str(k) for k in range(80)], "image_size": 300},
        "images/s",
        1,
        ">= 3500",
    ),
    "gpu-gpt2": partial(
        on_noise,
        "gpt2_124m",
        partial(tokens, 50304, 1024),
        {"vocabulary": {"kind": "character", "exact": True, "tokens": LETTERS}, "context_length": 1024},
        "tokens/s",
        1024,
        ">= 554000",
    ),
    "gpu-lenet5": lenet5,
    "gpu-deepar": partial(beside_a_cpu, "deepar_synthetic", 1024),
    "gpu-seq2seq": partial(beside_a_cpu, "seq2seq_dates", 32_768),
    "gpu-cifar10": cifar10,
}
