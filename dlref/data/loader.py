"""Loaders whose batches follow from the run's seed, the epoch and their number, and from nothing that came before.

A run can so go on from any of its steps as if it had never stopped, any batch can be had once more, and neither how
many processes decode nor how many devices share a batch changes what is in it.

A data set of batches answers a tensor of B numbers with a batch. Legend of shapes: N samples, B of them in a batch.
"""

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dlref.runtime.errors import UserError

# A forked worker must not collect what it inherited: to free an onnxruntime session is to wait for its threads, which
# fork does not copy.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=gc.freeze)

ORDER, SAMPLES, STEP = range(3)  # what a seed is for: who is in a batch; decoding and augmenting them; the step


class Order(Protocol):
    """Which samples make the batches of an epoch. The devices share each batch."""

    def __len__(self) -> int:
        """How many batches an epoch has."""

    def draw(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Their samples, (B,) each; all that is random comes from the generator."""


class Shuffled:
    """Each sample once, in batches of one size; what does not fill one is left to another epoch.

    A last, smaller batch would be another shape for torch.compile and for CUDA graphs. A single one may be smaller.
    """

    def __init__(self, count: int, batch_size: int):
        if not count:
            raise UserError("train: 0 samples; expected some")
        self.count, self.batch_size = count, min(batch_size, count)

    def __len__(self) -> int:
        return self.count // self.batch_size

    def draw(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Batches of a permutation."""
        order = torch.randperm(self.count, generator=generator)
        return iter(order.split(self.batch_size)[: len(self)])


def seed_all(seed: int) -> None:
    """Seed what is drawn from on the CPU and on the GPU in use.

    torch.manual_seed would keep the seed for every kind of accelerator that is not in use, each time, with the stack
    of calls it came from: time, and memory that is never given back.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def processes() -> tuple[int, int]:
    """The number of this process among those that train together, and how many they are."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)


class StepSampler(Sampler[tuple[int, Tensor]]):
    """For each step of an epoch a seed and this process' samples, from the step `first` on.

    Args:
        order: of all processes.
        repeat_first_epoch: whether every epoch has the batches of the first.
    """

    def __init__(self, order: Order, repeat_first_epoch: bool = False):
        self.order, self.repeat_first_epoch, self.epoch, self.first = order, repeat_first_epoch, 0, 0
        self.run = int(os.environ.get("PL_GLOBAL_SEED", 0))  # where Lightning keeps the seed of a run
        self.rank, self.devices = processes()

    def __len__(self) -> int:
        return len(self.order)

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = 0 if self.repeat_first_epoch else epoch

    def seed(self, purpose: int, number: int = 0, rank: int = 0) -> int:
        """A seed of 32 bits, as good as a random one: near numbers make seeds that have nothing in common."""
        parts = (purpose, self.run, self.epoch, number, rank)
        return int(np.random.SeedSequence(parts).generate_state(1)[0])

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return self.since(self.first)

    def since(self, first: int) -> Iterator[tuple[int, Tensor]]:
        """The steps of this epoch from one on."""
        generator = torch.Generator().manual_seed(self.seed(ORDER))
        for number, samples in enumerate(self.order.draw(generator)):
            if number >= first:
                yield self.seed(SAMPLES, number, self.rank), samples[self.rank :: self.devices]


class SeededBatches(Dataset):
    """Batches of a data set, each made right after seeding, so that any process makes the same one."""

    def __init__(self, batches: Dataset):
        self.batches = batches

    def __getitem__(self, step: tuple[int, Tensor]) -> Any:
        seed, samples = step
        seed_all(seed)
        return self.batches[samples]


class CollatedBatches(Dataset):
    """Batches of a data set that only gives single samples."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, samples: Tensor) -> Any:
        return default_collate([self.dataset[i] for i in samples.tolist()])


class TrainLoader(DataLoader):
    """Batches to train from; it knows how many of an epoch it gave, and goes on from there."""

    taken = 0

    def __iter__(self) -> Iterator[Any]:
        self.taken = self.sampler.first
        for batch in super().__iter__():
            self.sampler.first = 0  # of the epochs to come
            self.seed(self.taken)
            self.taken += 1
            yield batch

    def seed(self, number: int) -> None:
        """Before augmentation on the device and dropout: all that is random until the next batch."""
        seed_all(self.sampler.seed(STEP, number, self.sampler.rank))

    def batch(self, number: int) -> Any:
        """A batch of this epoch once more."""
        batch = self.dataset[next(self.sampler.since(number))]
        self.seed(number)
        return batch

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that were given."""
        self.sampler.first = state["taken"]


class SplitData(LightningDataModule):
    """Data in `splits`, which `setup` of a subclass fills: "train", "val" and "test".

    Training draws shuffled batches of `batch_size`, evaluation takes so many samples at once, unless a subclass says
    otherwise.
    """

    splits: dict[str, Dataset]
    batch_size: int
    num_workers = 0  # processes that make batches; 0: the one that trains
    decoded_singly = False  # whether a split gives single samples, of which batches have to be made
    repeat_first_epoch = False  # whether every epoch has the batches of the first

    @property
    def device(self) -> torch.device:
        """Where data that stays in memory lies: where it trains."""
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def order(self, devices: int) -> Order:
        """The batches of an epoch, each to be shared by so many devices."""
        count = len(self.splits["train"])
        if 0 < count < devices:
            raise UserError(f"train: {count} samples for {devices} devices; expected one for each")
        return Shuffled(count, self.batch_size * devices)

    def eval_batch_size(self, split: str) -> int:
        """How many samples an evaluation batch has at most."""
        return self.batch_size

    def as_batches(self, split: str) -> Dataset:
        """A split as a data set of batches."""
        return CollatedBatches(self.splits[split]) if self.decoded_singly else self.splits[split]

    def samples(self, split: str) -> Tensor:
        """The samples of a split."""
        return torch.arange(len(self.splits[split]))

    def sources(self) -> Sequence[str]:
        """A name for each input of `predict_dataloader`, in order: here the number of each test sample."""
        return [str(i) for i in range(len(self.splits["test"]))]

    def train_dataloader(self) -> DataLoader:
        """Batches in an order that is new in each epoch."""
        steps = StepSampler(self.order(processes()[1]), self.repeat_first_epoch)
        return TrainLoader(SeededBatches(self.as_batches("train")), sampler=steps, batch_size=None, **self.workers())

    def in_order(self, split: str) -> DataLoader:
        """Each sample of a split once; each batch is one device's alone.

        Lightning's own sharing would give some of them twice where they do not come out even. Raises UserError where
        there are fewer samples than devices.
        """
        samples, (rank, devices) = self.samples(split), processes()
        if len(samples) < devices and devices > 1:
            raise UserError(f"{split}: {len(samples)} samples for {devices} devices; expected one for each")
        size = self.eval_batch_size(split)
        if devices == 1:
            parts = samples.split(size) if len(samples) else ()
        else:  # as many for each device, where there are enough: those that share a network wait for each other
            parts = samples.tensor_split(min(len(samples), -(-len(samples) // (size * devices)) * devices))
        return DataLoader(self.as_batches(split), sampler=parts[rank::devices], batch_size=None, **self.workers())

    def workers(self) -> dict[str, Any]:
        """What a DataLoader has to know of processes."""
        several = self.num_workers > 0
        # What this process makes may lie on the device already, and cannot be pinned.
        pinned = several and self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        # Python 3.14 would start each from scratch: seconds, a gigabyte, and processes that outlive a killed fit.
        start = "fork" if several and sys.platform == "linux" else None
        known = {"num_workers": self.num_workers, "multiprocessing_context": start}
        return known | {"persistent_workers": several, "pin_memory": pinned}

    def val_dataloader(self) -> DataLoader:
        """The validation samples in order."""
        return self.in_order("val")

    def test_dataloader(self) -> DataLoader:
        """The test samples in order."""
        return self.in_order("test")

    def predict_dataloader(self) -> DataLoader:
        """The test samples in order."""
        return self.in_order("test")


def check_at_least(minimum: int, **arguments: int) -> None:
    """Raise a UserError for the first argument below the minimum.

    `setup` calls it, not the constructor: what that raises, jsonargparse wraps in an error of its own.
    """
    for name, value in arguments.items():
        if value < minimum:
            raise UserError(f"--data.init_args.{name}: {value}; expected at least {minimum}")
