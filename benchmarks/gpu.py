"""Training on a GPU: the configs' steps under Lightning's Trainer, with batches of noise on the device.

Networks, batch sizes, precision and optimisers are those of the configs. LeNet-5, DeepAR, Seq2Seq and CIFAR-10 use the
configs' loaders as well. The share of the arithmetic is the rate of a step's operations, forward and backward as torch
counts them, divided by the rate of a product of two 8192×8192 matrices in bfloat16 in the same run. The time without a
batch is the host's time from the end of a step to the beginning of the next. The output layer's row was measured
with 8,192 tokens computed at a time; gpt2_124m's row, like the present code, computes twice as many. Complete trainings
on CIFAR-10 are compared with Jordan's airbench96, which reaches 96% on the published images.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.configs import read, roots
from benchmarks.overhead import made, options, under_trainer
from benchmarks.rows import DEVICE, NotHere, Row, Rows, finish, in_turns, needs, run, watched
from dlref.data.loader import SplitData
from dlref.data.small_images import ImageTensors, InMemoryImages
from dlref.tasks import EMA
from dlref.tasks.cross_entropy import linear_cross_entropy, nll_and_gradient
from dlref.tasks.task import Task
from dlref.training.devices import fast_steps

TURNS, WARMUP, SIDE = 3, 20, 8192


class Always(Dataset):
    """Returns the same batch for every index."""

    def __init__(self, batch: Any, samples: int):
        self.batch, self.samples = batch, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, samples: Tensor) -> Any:
        return self.batch


class Noise(SplitData):
    """Repeats one batch on the device.

    Args:
        make: returns a batch of a given number of samples.
        batch_size: its number of samples.
        steps: per epoch.
        facts: attributes of the data that the task needs.
    """

    def __init__(self, make: Callable[[int], Any], batch_size: int, steps: int, **facts: Any):
        super().__init__(batch_size)
        self.make, self.steps = make, steps
        for name, value in facts.items():
            setattr(self, name, value)

    def setup(self, stage: str) -> None:
        """Make the batch."""
        device = self.trainer.strategy.root_device
        batch = tree_map(lambda part: part.to(device), self.make(self.batch_size))
        self.splits = dict.fromkeys(("train", "val", "test"), Always(batch, self.batch_size * self.steps))


class Speed(Callback):
    """Measures the seconds of a step in each of several turns. Waits for the device before and after a turn, not in it.

    Args:
        steps: per turn.
        turns: number of turns.
    """

    def __init__(self, steps: int, turns: int = TURNS):
        self.steps, self.turns, self.count = steps, turns, -WARMUP
        self.seconds: list[float] = []  # per step, in each turn
        self.without: list[float] = []  # per step without a batch, in each turn

    def on_train_batch_start(self, trainer: Trainer, task: Task, batch: Any, index: int) -> None:
        """Read the clock when a batch has arrived."""
        now = time.perf_counter()
        if self.count < 0 or len(self.seconds) == self.turns:
            return
        if self.count % self.steps:
            self.between += now - self.end
            return
        finish()
        if DEVICE == "cuda" and not self.count:
            torch.cuda.reset_peak_memory_stats()
        self.start, self.between = time.perf_counter(), 0.0

    def on_train_batch_end(self, trainer: Trainer, task: Task, outputs: Any, batch: Any, index: int) -> None:
        """Read the clock when a step is launched. Work after the last step, such as a checkpoint, is not timed."""
        self.count += 1
        if self.count > 0 and self.count % self.steps == 0 and len(self.seconds) < self.turns:
            finish()
            self.seconds.append((time.perf_counter() - self.start) / self.steps)
            self.without.append(self.between / self.steps)
            trainer.should_stop = len(self.seconds) == self.turns
        self.end = time.perf_counter()

    def mean(self) -> float:
        """Return the seconds of a step."""
        return statistics.mean(self.seconds)


def wanted() -> None:
    """Raise NotHere without a GPU."""
    if DEVICE != "cuda":
        raise NotHere("it needs a GPU")


def on_noise(config: str, make: Callable, facts: dict, unit: str, each: int, goal: str, steps: int = 50) -> Rows:
    """Time a config's step on noise, in things of `unit` per second; a sample has `each` of them."""
    wanted()
    size = read(config)["data"]["init_args"]["batch_size"]
    task, _ = made(config, ("--model.init_args.weights", "null"))
    data, speed = Noise(make, size, WARMUP + TURNS * steps, **facts), Speed(steps)
    under_trainer(task, data, WARMUP + TURNS * steps, options(config), clock=speed)
    memory = torch.cuda.max_memory_allocated() / 1e9
    counted, rate = operations(config, make, facts, size), product()
    return {
        f"training, `{config}`": Row([size * each / one for one in speed.seconds], unit=unit, goal=goal),
        "share of a matrix product's arithmetic": Row([counted / one / rate for one in speed.seconds]),
        "share of a step without a batch": Row(
            [one / whole for one, whole in zip(speed.without, speed.seconds, strict=True)]
        ),
        "peak memory": Row([memory], unit="GB"),
    }


def operations(config: str, make: Callable, facts: dict, size: int) -> float:
    """Return the operations of a step, counted on two samples."""
    task, _ = made(config, ("--model.init_args.weights", "null", "--model.init_args.compile_network", "false"))
    task.remember(facts)
    task.log = lambda *arguments, **named: None
    task.to(DEVICE).train()
    task.mix = None  # made by ImageClassifier.setup; blending needs no matrix product
    batch = tree_map(lambda part: part.to(DEVICE), make(2))
    with FlopCounterMode(display=False) as counter, torch.autocast(DEVICE, torch.bfloat16):
        task.training_step(batch, 0).backward()
    return counter.get_total_flops() * size / 2


def product() -> float:
    """Return the operations per second of a product of two matrices."""
    left, right = torch.randn(2, SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16)
    seconds = in_turns("product", {"product": lambda: left @ right}, turns=20)["product"]
    return 2 * SIDE**3 / statistics.median(seconds)


def images(side: int, classes: int, count: int) -> tuple[Tensor, Tensor]:
    """Return pictures and their classes."""
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8), torch.randint(classes, (count,))


def boxes(side: int, classes: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return pictures with eight boxes each."""
    pictures, _ = images(side, classes, count)
    corner = 0.7 * torch.rand(count, 8, 2)
    return pictures, {
        "boxes": torch.cat([corner, corner + 0.05 + 0.25 * torch.rand(count, 8, 2)], dim=-1),
        "labels": torch.randint(classes, (count, 8)),
        "ignored": torch.zeros(count, 8, dtype=torch.bool),
        "sizes": torch.full((count, 2), side),
    }


def tokens(vocabulary: int, length: int, count: int) -> Tensor:
    """Return windows of tokens."""
    return torch.randint(vocabulary, (count, length + 1))


class Clothes(InMemoryImages):
    """Noise of the size of Fashion-MNIST."""

    def read(self) -> tuple[list[str], dict[str, ImageTensors]]:
        """Return 60,000 pictures of 28×28."""
        pictures = ImageTensors(torch.randint(256, (60_000, 1, 28, 28), dtype=torch.uint8), torch.arange(60_000) % 10)
        return list("0123456789"), dict.fromkeys(("train", "val", "test"), pictures)


def output_layer() -> Rows:
    """Time the loss of 65,536 tokens over gpt2_124m's 50,304 classes, and its gradients, compiled and not compiled."""
    wanted()
    hidden, weight = (torch.randn(rows, 768, device=DEVICE, requires_grad=True) for rows in (65_536, 50_304))
    targets = torch.randint(len(weight), (len(hidden),), device=DEVICE)
    compiled = torch.compile(nll_and_gradient, dynamic=False)

    def gradients(row_step: Callable) -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, targets, row_step)
        torch.autograd.grad(loss, (hidden, weight))

    seconds = in_turns(
        "output layer", {"own": partial(gradients, compiled), "peer": partial(gradients, nll_and_gradient)}
    )
    return {
        "the output layer's loss and gradients, compiled": Row(seconds["own"], seconds["peer"], "s", "not compiled")
    }


def lenet5() -> Rows:
    """Time an epoch of LeNet-5 in its config's batches, from data on the device."""
    wanted()
    config, rows = "lenet5_fashion_mnist", {}
    arguments = {name: value for name, value in read(config)["data"]["init_args"].items() if name != "root"}
    steps = 60_000 // arguments["batch_size"]
    for title, compiled in (("", "false"), (", compiled", "true"), (", as CUDA graphs", "graphs")):
        task, _ = made(config, ("--model.init_args.compile_network", compiled))
        speed = Speed(steps)
        under_trainer(task, Clothes(**arguments), WARMUP + TURNS * steps, options(config), clock=speed)
        seconds = [steps * one for one in speed.seconds]
        rows[f"an epoch of 60,000 pictures, `{config}`{title}"] = Row(seconds, unit="s", goal="<= 1")
    return rows


def beside_a_cpu(config: str, sizes: tuple[int, ...], unit: str = "", steps: int = 10) -> Rows:
    """Compare the steps per second of GPU and CPU, in turns, for batches of these sizes, in samples or `unit`."""
    wanted()
    rows = {
        f"training in batches of {size:,}{unit}, `{config}`": Row(
            [], [], "steps/s", f"its CPU, {torch.get_num_threads()} threads", ">= 10"
        )
        for size in sizes
    }
    _, data = made(config)  # read once
    for _ in watched(range(TURNS), config):
        for data.batch_size, row in zip(sizes, rows.values(), strict=True):
            for accelerator, found in (("cpu", row.peer), ("gpu", row.own)):
                task, _ = made(config)
                seconds = under_trainer(task, data, steps, options(config) | {"accelerator": accelerator})
                found.append(1 / seconds)
    return rows


class Duration(Callback):
    """Measures the seconds of a fit with compilation and validation, after data is read and the network is moved."""

    def on_fit_start(self, trainer: Trainer, task: Task) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, task: Task) -> None:
        """Stop the clock."""
        finish()
        self.seconds = time.perf_counter() - self.start


def cifar10() -> Rows:
    """Compare ResNet-18 with airbench96, both trained on all 50,000 images."""
    wanted()
    needs("airbench")
    config = "resnet18_cifar10"
    (wrong, seconds), (their_wrong, alone, their_seconds) = ours(config), airbench96(config)
    peer = "airbench96 with test-time augmentation"
    return {
        f"wrong of the test split, `{config}`": Row([wrong], [alone], "%", "airbench96"),
        f"wrong of the test split, `{config}`, beside test-time augmentation": Row([wrong], [their_wrong], "%", peer),
        f"training, `{config}`": Row([seconds], [their_seconds], "s", "airbench96, which does not compile"),
        f"seconds of training, `{config}`": Row([seconds], unit="s", goal="<= 60"),
    }


def ours(config: str) -> tuple[float, float]:
    """Train a config's network on all but the test split. Return its error there in per cent, and the seconds."""
    task, data = made(config, (*roots(config), "--data.init_args.validation", "0"))
    trainer = read(config)["trainer"]
    fast_steps(torch.device(DEVICE))
    duration, average = Duration(), EMA(**trainer["callbacks"][0]["init_args"])
    given = {name: value for name, value in trainer.items() if name not in ("callbacks", "check_val_every_n_epoch")}
    given |= {
        "devices": 1,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    trainer = Trainer(**given, callbacks=[average, duration])
    trainer.fit(task, data)
    (scores,) = trainer.test(task, data, verbose=False)
    return 100 * (1 - scores["test/accuracy"]), duration.seconds


def airbench96(config: str) -> tuple[float, float, float]:
    """Return the same for Jordan's airbench96: errors with and without mirrored and moved copies, and the seconds."""
    import airbench

    _, data = made(config, (*roots(config), "--data.init_args.validation", "0"))
    data.setup()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("cifar10").mkdir()  # where airbench looks for its data
        for split in ("train", "test"):
            images, labels = data.splits[split].images, data.splits[split].targets
            kept = {"images": images.permute(0, 2, 3, 1), "labels": labels, "classes": data.labels}
            torch.save(kept, f"cifar10/{split}.pt")
        with contextlib.redirect_stdout(sys.stderr):
            airbench.warmup96()  # one step; with verbose=False it would be a whole training
        seed_everything(0, verbose=False)
        finish()
        start = time.perf_counter()
        network = airbench.train96(verbose=False)
        finish()
        seconds = time.perf_counter() - start
        test = airbench.CifarLoader("cifar10", train=False)
        with_copies, alone = (100 * (1 - airbench.evaluate(network, test, level)) for level in (2, 0))
        return with_copies, alone, seconds


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
    "gpu-output-layer": output_layer,
    "gpu-lenet5": lenet5,
    "gpu-deepar": partial(beside_a_cpu, "deepar_synthetic", (64, 4096)),
    "gpu-seq2seq": partial(beside_a_cpu, "seq2seq_dates", (4096, 32_768), " tokens"),
    "gpu-cifar10": cifar10,
}


if __name__ == "__main__":
    run(BENCHMARKS)
