"""Batches that depend only on the seed, the epoch and their number."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import chain

import pytest
import torch
from torch.utils.data import Dataset

from dlref.data import loader
from dlref.data.loader import Shuffled, SplitData
from dlref.data.pairs import TokenBatches
from dlref.data.tokens import RandomStarts
from dlref.data.windows import Draws
from dlref.runtime import UserError

LENGTHS = torch.arange(50) % 7 + 1
ORDERS = {
    "shuffled": lambda devices: Shuffled(50, 6 * devices),
    "windows": lambda devices: Draws(torch.tensor([40, 10]), torch.ones(2), 6 * devices, 8),
    "tokens": lambda devices: RandomStarts(50, 6 * devices, 8),
    "sentences": lambda devices: TokenBatches(
        torch.arange(50) % 7 + 1, torch.arange(50) % 5 + 1, 30 * devices, devices
    ),
}


class Noisy(Dataset):
    """Samples whose augmentation is random."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        return torch.tensor([float(index), torch.rand(()).item()])


class Data(SplitData):
    decoded_singly = True

    def __init__(self, order="shuffled", num_workers=0):
        super().__init__(6, num_workers)
        self.kind = order
        self.splits = {"train": Noisy(), "val": Noisy()}

    def order(self, devices):
        return ORDERS[self.kind](devices)


def epoch_of(train, number):
    train.sampler.set_epoch(number)
    return [(batch, torch.rand(3)) for batch in train]  # the second stands for the random numbers of a step


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, chain(*one), chain(*other)))


@pytest.fixture
def devices(monkeypatch):
    """Act as one of several processes."""

    def be(rank, count):
        monkeypatch.setattr(loader, "processes", lambda: (rank, count))

    return be


@pytest.mark.parametrize("order", ORDERS)
def test_an_epoch_does_not_depend_on_earlier_epochs_or_the_random_state(order):
    train = Data(order).train_dataloader()
    first, second = epoch_of(train, 0), epoch_of(train, 1)
    assert len(first) == len(train)
    assert not same(first, second)
    torch.manual_seed(5)
    assert same(epoch_of(Data(order).train_dataloader(), 1), second)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="only some systems tell who sent a signal")
def test_workers_survive_sigterm_to_the_whole_run_and_end_at_their_parents():
    earlier = set(multiprocessing.active_children())
    batches = iter(Data(num_workers=2).train_dataloader())
    next(batches)
    next(batches)  # of the second worker: both have started
    workers = [process for process in multiprocessing.active_children() if process not in earlier]
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)  # not by their parent
    assert len(list(batches)) == 50 // 6 - 2
    for worker in workers:
        worker.terminate()
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_resumes_after_the_batches_taken_with_or_without_workers(order, num_workers):
    whole = epoch_of(Data(order).train_dataloader(), 3)
    train = Data(order, num_workers).train_dataloader()
    train.load_state_dict({"taken": 2})
    assert same(epoch_of(train, 3), whole[2:])
    assert train.state_dict() == {"taken": len(whole)}
    assert same(epoch_of(train, 3), whole)  # only once: the next epoch is complete


class Parents(Dataset):
    """Samples that name the parent of the process that makes them."""

    def __getitem__(self, sample):
        return os.getppid()


def test_workers_are_children_of_the_training_process():
    data = Data("shuffled", 2)
    data.splits = {"train": Parents(), "val": Parents()}
    data.samples = lambda split: torch.arange(3)
    if sys.platform == "linux":
        assert {parent for batch in data.val_dataloader() for parent in batch.tolist()} == {os.getpid()}


class Unreachable:
    """Cyclic garbage that records which process collects it."""

    def __init__(self, folder):
        self.folder, self.me = folder, self

    def __del__(self):
        (self.folder / str(os.getpid())).touch()


class Collecting(Dataset):
    """Samples that trigger a garbage collection."""

    def __getitem__(self, sample):
        gc.collect()
        return os.getpid()


def test_workers_do_not_collect_inherited_garbage(tmp_path):
    """Deleting an ONNX Runtime session waits for its threads, which a fork does not copy."""
    data = Data("shuffled", 2)
    data.splits = {"train": Collecting(), "val": Collecting()}
    data.samples = lambda split: torch.arange(4)
    gc.disable()
    try:
        Unreachable(tmp_path)
        workers = {worker for batch in data.val_dataloader() for worker in batch.tolist()}
    finally:
        gc.enable()
    gc.collect()
    assert os.getpid() not in workers
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]


def test_a_single_batch_can_be_recreated_with_its_random_state():
    train = Data().train_dataloader()
    whole = epoch_of(train, 2)
    assert torch.equal(train.batch(4), whole[4][0])
    assert torch.equal(torch.rand(3), whole[4][1])


def test_another_seed_gives_other_batches(monkeypatch):
    first = epoch_of(Data().train_dataloader(), 0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert not same(epoch_of(Data().train_dataloader(), 0), first)


def test_repeat_first_epoch_repeats_the_first_epoch():
    data = Data()
    first = epoch_of(data.train_dataloader(), 0)
    data.repeat_first_epoch = True
    assert same(epoch_of(data.train_dataloader(), 5), first)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [2, 3])
def test_devices_divide_each_batch_between_them(order, count, devices):
    shares = []
    for rank in range(count):
        devices(rank, count)
        shares.append([batch[:, 0].tolist() for batch, _ in epoch_of(Data(order).train_dataloader(), 0)])
    devices(0, 1)
    data = Data(order)
    data.order = lambda _: ORDERS[order](count)  # one device draws the batches of all
    whole = [batch[:, 0].tolist() for batch, _ in epoch_of(data.train_dataloader(), 0)]
    assert [sorted(chain(*parts)) for parts in zip(*shares, strict=True)] == list(map(sorted, whole))
    assert all(parts for share in shares for parts in share)


def test_devices_draw_different_random_numbers_in_batches_and_steps(devices):
    drawn = []
    for rank in range(2):
        devices(rank, 2)
        epoch = epoch_of(Data().train_dataloader(), 0)
        drawn.append([part for batch, step in epoch for part in (batch[:, 1], step)])
    assert not any(torch.equal(one, other) for one in drawn[0] for other in drawn[1])


def test_each_batch_and_step_of_each_device_has_a_seed_of_its_own(devices, monkeypatch):
    seeds = []
    monkeypatch.setattr(loader, "seed_all", seeds.append)
    for rank in range(2):
        devices(rank, 2)
        train = Data().train_dataloader()
        for epoch in range(3):
            epoch_of(train, epoch)
            seeds += [train.sampler.seed(loader.ORDER)] * (rank == 0)  # the devices draw the same order
    assert len(seeds) == len(set(seeds)) == 3 * (1 + 2 * 2 * 4)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_devices_evaluate_each_sample_exactly_once(count, devices):
    seen = []
    for rank in range(count):
        devices(rank, count)
        batches = list(Data().val_dataloader())
        assert all(len(batch) <= 6 for batch in batches)
        seen.append([int(row[0]) for batch in batches for row in batch])
    assert all(seen)
    assert count > 7 or len({-(-len(share) // 6) for share in seen}) == 1  # the same number of batches for each
    assert sorted(chain(*seen)) == list(range(50))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_devices_evaluate_equally_many_batches_unless_the_batch_size_is_one(count, devices, monkeypatch):
    """Devices that share a network wait for each other. Batches of one are never enlarged to make numbers equal."""
    for size in (1, 2):
        monkeypatch.setattr(Data, "eval_batch_size", lambda self, split, size=size: size)
        numbers = []
        for rank in range(count):
            devices(rank, count)
            batches = list(Data().val_dataloader())
            assert max(map(len, batches)) <= size
            numbers.append(len(batches))
        assert size == 1 or len(set(numbers)) == 1


def test_more_devices_than_samples_are_refused(devices):
    devices(0, 51)
    with pytest.raises(UserError, match="val: 50 samples for 51 devices"):
        Data().val_dataloader()
    data = Data()
    data.splits = {"train": range(50)}
    with pytest.raises(UserError, match="train: 50 samples for 51 devices"):
        SplitData.order(data, 51)
    assert len(SplitData.order(data, 50)) == 1
    data.splits = {"train": range(1)}
    with pytest.raises(UserError, match="train: 1 samples for 2 devices"):
        SplitData.order(data, 2)


def test_batches_of_overlong_sentences_have_a_sentence_for_every_device():
    lengths = torch.full((7,), 100)
    batches = TokenBatches(lengths, lengths, 60, devices=2).draw(torch.Generator())
    assert [len(batch) for batch in batches] in ([2, 2, 3], [2, 3, 2], [3, 2, 2])


@pytest.mark.parametrize("loader_of", ["test_dataloader", "predict_dataloader"])
def test_a_split_that_the_data_lacks_is_refused(loader_of):
    with pytest.raises(UserError, match="no split test; expected train, val and test"):
        getattr(Data(), loader_of)()
