"""Two processes that evaluate together, each with its share of a split."""

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MeanMetric

from dlref.data.loader import SplitData
from dlref.tasks import Translator
from dlref.tasks.object_detection import average_precision, computed
from dlref.training.devices import gather_objects

COUNT = 7  # samples, in batches of 2: the first process has 2 + 2 of them, the second 2 + 1


def share() -> list[int]:
    """Return the samples that this process evaluates, in order."""
    data = SplitData(batch_size=2)
    data.splits["val"] = torch.arange(COUNT)
    return [sample for batch in data.val_dataloader() for sample in batch.tolist()]


def of_detections(samples: list[int]) -> dict[str, torch.Tensor]:
    """Return the scores of detections that differ in overlap and confidence."""
    metric = average_precision()
    for sample in samples:
        truth = {"boxes": torch.tensor([[0.0, 0, 100, 100]]), "labels": torch.tensor([sample % 2])}
        found = {"boxes": truth["boxes"] * (1 - 0.03 * sample), "scores": torch.tensor([(3 * sample % COUNT + 1) / 10])}
        metric.update([truth | found], [truth])
    return computed(metric)


def of_translations(samples: list[int]) -> dict[str, torch.Tensor]:
    """Return the scores of translations that are further off with each sample."""
    words, scores = [f"word{i}" for i in range(COUNT)], {}
    texts = [" ".join(words[:sample] + words[::-1]) for sample in samples]
    both = [SimpleNamespace(text=text, reference=" ".join(words[::-1])) for text in texts]
    task = SimpleNamespace(nll=MeanMetric(), accuracy=MeanMetric(), translated=both)
    task.log_dict = lambda values, prog_bar: scores.update(values)
    task.nll.update(torch.tensor(samples))
    task.accuracy.update(torch.tensor(samples))
    Translator.log_evaluation(task, "test")
    return {name: torch.as_tensor(score) for name, score in scores.items()}


def evaluate(rank: int, folder: Path, *alone: dict[str, torch.Tensor]) -> None:
    """Evaluate in one of two processes."""
    store, patience = f"file://{folder / 'store'}", timedelta(seconds=60)
    dist.init_process_group("gloo", store, world_size=2, rank=rank, timeout=patience)
    mine = share()
    assert gather_objects(mine) == [[0, 1, 4, 5], [2, 3, 6]]
    together = of_detections(mine), of_translations(mine)
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one), (one, other)
    evaluate_unevenly(rank)
    dist.destroy_process_group()


def evaluate_unevenly(rank: int) -> None:
    """Evaluate 3 batches in one process and 2 in the other, all with the first one's statistics.

    DDP sends buffers before the first batch only; before each, a process would wait for one that has no batch left.
    """
    network = DistributedDataParallel(nn.BatchNorm1d(2)).train()
    network(torch.full((4, 2), 1.0 + rank))
    network.eval()
    with torch.no_grad():
        for _ in range(3 - rank):
            network(torch.ones(4, 2))
    assert network.module.running_mean.tolist() == pytest.approx([0.1, 0.1])  # a tenth of the first one's mean, 1


def test_two_processes_evaluate_each_sample_once_and_score_all_of_them(tmp_path):
    every = list(range(COUNT))
    alone = of_detections(every), of_translations(every)
    for samples in (every[1:], [*every, 0], [*every[:4], *every[:3]]):  # the scores tell a missing or repeated sample
        others = of_detections(samples), of_translations(samples)
        assert others[0]["map"] != alone[0]["map"]
        assert others[1]["test/bleu"] != alone[1]["test/bleu"]
    multiprocessing.start_processes(evaluate, (tmp_path, *alone), nprocs=2, start_method="fork")
