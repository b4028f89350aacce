"""Loaders whose batches depend only on the run's seed, the epoch and the step, and on nothing that came before.

A run can therefore resume at any step as if it had never stopped, and any batch can be made again. Neither the number
of worker processes nor the number of devices that share a batch changes which samples it contains.

A data set of batches maps a tensor of B sample numbers to a batch. Shapes: N samples, B of them in a batch.
"""

import gc
import os
import signal
import sys
import threading
from collections.abc import Container, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dlref.runtime.errors import UserError

# A forked worker must not free objects of its parent: freeing an onnxruntime session waits for the session's threads,
# which fork does not copy.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=gc.freeze)

ORDER, SAMPLES, STEP = range(3)  # purposes of a seed: draw a batch's samples; decode and augment them; run the step


class Order(Protocol):
    """The samples that make up the batches of an epoch, up to `batch_size` (or its tokens) in each.

    The devices share each batch.
    """

    batch_size: int

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""

    def draw(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Return the samples of each batch, (B,); all randomness comes from the generator."""


class Shuffled:
    """Each sample once, in batches of one size; samples that do not fill a last batch are left out of the epoch.

    A smaller last batch would be another shape for torch.compile and for CUDA graphs. If there are fewer samples than
    `batch_size`, they make a single smaller batch.
    """

    def __init__(self, count: int, batch_size: int):
        if not count:
            raise UserError("train: 0 samples; expected some")
        self.count, self.batch_size = count, min(batch_size, count)

    def __len__(self) -> int:
        return self.count // self.batch_size

    def draw(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Return the batches of a random permutation."""
        order = torch.randperm(self.count, generator=generator)
        return iter(order.split(self.batch_size)[: len(self)])


def seed_all(seed: int) -> None:
    """Seed the random generators of the CPU and of the GPU in use.

    torch.manual_seed would also store each seed, with a stack trace, for every kind of accelerator that is not in use:
    this takes time, and the memory is never freed.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy host memory to a device. A blocking copy would make every batch wait for the GPU to catch up.

    An Apple GPU is waited for, as by Lightning: it may read host memory only after it is freed or reused, and so get
    other values (https://github.com/pytorch/pytorch/issues/83015).
    """
    return tensor.to(device, non_blocking=device.type != "mps")


def processes() -> tuple[int, int]:
    """Return the rank of this process and the number of processes that train together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)


class StepSampler(Sampler[tuple[int, Tensor]]):
    """A seed and this process's samples for each step of an epoch, from step `first` on.

    Args:
        order: the batches of all processes together.
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
        """Return a 32-bit seed that is as good as a random one: neighbouring numbers give unrelated seeds."""
        parts = (purpose, self.run, self.epoch, number, rank)
        return int(np.random.SeedSequence(parts).generate_state(1)[0])

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return self.since(self.first)

    def since(self, first: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the steps of this epoch, from step `first` on."""
        generator = torch.Generator().manual_seed(self.seed(ORDER))
        for number, samples in enumerate(self.order.draw(generator)):
            if number >= first:
                yield self.seed(SAMPLES, number, self.rank), samples[self.rank :: self.devices].contiguous()


class SeededBatches(Dataset):
    """Batches of a data set, each made right after seeding, so that every process makes the same batch."""

    def __init__(self, batches: Dataset):
        self.batches = batches

    def __getitem__(self, step: tuple[int, Tensor]) -> Any:
        seed, samples = step
        seed_all(seed)
        return self.batches[samples]


class CollatedBatches(Dataset):
    """Batches of a data set that returns single samples."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, samples: Tensor) -> Any:
        return default_collate([self.dataset[i] for i in samples.tolist()])


class TrainLoader(DataLoader):
    """A loader of training batches that counts the batches taken from an epoch and can resume after them."""

    taken = 0

    def __iter__(self) -> Iterator[Any]:
        self.taken = self.sampler.first
        for batch in super().__iter__():
            self.sampler.first = 0  # later epochs start at their first step
            self.seed(self.taken)
            self.taken += 1
            yield batch

    def seed(self, number: int) -> None:
        """Seed everything random until the next batch, such as augmentation on the device and dropout."""
        seed_all(self.sampler.seed(STEP, number, self.sampler.rank))

    def batch(self, number: int) -> Any:
        """Make a batch of this epoch again."""
        batch = self.dataset[next(self.sampler.since(number))]
        self.seed(number)
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return the state that a checkpoint keeps."""
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume after the batches already taken."""
        self.sampler.first = state["taken"]


class SplitData(LightningDataModule):
    """Data in the `splits` "train", "val" and "test", which the `setup` of a subclass fills.

    Training draws shuffled batches of `batch_size` samples, and evaluation takes up to `batch_size` samples at once,
    unless a subclass overrides this. `num_workers` worker processes make the batches; 0: the training process does.
    """

    decoded_singly = False  # whether a split returns single samples, which must be collated into batches
    repeat_first_epoch = False  # whether every epoch has the batches of the first

    def __init__(self, batch_size: int, num_workers: int = 0):
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers
        self.splits: dict[str, Dataset] = {}

    @property
    def device(self) -> torch.device:
        """The training device, where data kept in memory is stored."""
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def order(self, devices: int) -> Order:
        """Return the batches of an epoch, each shared by that many devices."""
        count = len(self.splits["train"])
        if 0 < count < devices:
            raise UserError(f"train: {count} samples for {devices} devices; expected one for each")
        return Shuffled(count, self.batch_size * devices)

    def eval_batch_size(self, split: str) -> int:
        """Return the maximum number of samples in an evaluation batch."""
        return self.batch_size

    def as_batches(self, split: str) -> Dataset:
        """Return a split as a data set of batches."""
        return CollatedBatches(self.splits[split]) if self.decoded_singly else self.splits[split]

    def samples(self, split: str) -> Tensor:
        """Return the sample numbers of a split."""
        return torch.arange(len(self.splits[split]))

    def sources(self) -> Sequence[str]:
        """Return a name for each input of `predict_dataloader`, in order: here the number of each test sample."""
        return [str(i) for i in range(len(self.splits["test"]))]

    def train_dataloader(self) -> DataLoader:
        """Return the training batches, in a new order for each epoch unless `repeat_first_epoch` is set."""
        steps = StepSampler(self.order(processes()[1]), self.repeat_first_epoch)
        return TrainLoader(SeededBatches(self.as_batches("train")), sampler=steps, batch_size=None, **self.workers())

    def in_order(self, split: str) -> DataLoader:
        """Return each sample of a split once, in batches that each belong to a single device.

        Lightning's own sampler would repeat some samples if they do not divide evenly among the devices. Raises
        UserError if there are fewer samples than devices, or no such split.
        """
        check_split(split, self.splits)
        samples, (rank, devices) = self.samples(split), processes()
        if len(samples) < devices and devices > 1:
            raise UserError(f"{split}: {len(samples)} samples for {devices} devices; expected one for each")
        size = self.eval_batch_size(split)
        if devices == 1:
            parts = samples.split(size) if len(samples) else ()
        else:  # the same number of batches per device if there are enough samples: devices wait for each other
            parts = samples.tensor_split(min(len(samples), -(-len(samples) // (size * devices)) * devices))
        return DataLoader(self.as_batches(split), sampler=parts[rank::devices], batch_size=None, **self.workers())

    def workers(self) -> dict[str, Any]:
        """Return the arguments of a DataLoader that concern worker processes."""
        several = self.num_workers > 0
        # A batch made in this process may already be on the device, and then cannot be pinned.
        pinned = several and self.device.type == "cuda"
        # Python 3.14 would start each worker from scratch, which costs seconds and a gigabyte, and such workers outlive
        # a killed fit.
        start = "fork" if several and sys.platform == "linux" else None
        known = {"num_workers": self.num_workers, "multiprocessing_context": start, "worker_init_fn": heed_parent_only}
        return known | {"persistent_workers": several, "pin_memory": pinned}

    def val_dataloader(self) -> DataLoader:
        """Return the validation samples in order."""
        return self.in_order("val")

    def test_dataloader(self) -> DataLoader:
        """Return the test samples in order."""
        return self.in_order("test")

    predict_dataloader = test_dataloader


def heed_parent_only(worker: int) -> None:
    """Let a worker process end only at a SIGTERM of its parent, where the platform tells the sender (not on a Mac).

    `timeout`, systemd and SLURM send SIGTERM to all processes of a run; the workers are still needed for the last step.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with_parent, daemon=True).start()
    pl_worker_init_function(worker)  # seeds numpy and random; Lightning sets it only for loaders without a function


def end_with_parent() -> None:
    """Wait for a SIGTERM of the parent, and end the process."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def check_split(split: str, found: Container[str]) -> None:
    """Raise UserError if data of one's own lacks a split."""
    if split not in found:
        raise UserError(f"the data has no split {split}; expected train, val and test")


def check_at_least(minimum: int, **arguments: int) -> None:
    """Raise UserError for the first argument below the minimum.

    Call it in `setup`, not in a constructor: jsonargparse wraps errors of a constructor in one of its own.
    """
    for name, value in arguments.items():
        if value < minimum:
            raise UserError(f"--data.init_args.{name}: {value}; expected at least {minimum}")
