"""Time and memory of a training step, of every size of a sweep.

Memory on a CPU is what autograd keeps from the forward pass until the backward pass: the bytes of all storages that
come by `torch.autograd.graph.saved_tensors_hooks`, each counted once however many operations keep it or a view of it,
without the network's own parameters and buffers, which do not grow with a batch. The count is exact: the same in each
run. The peak of resident memory is not: it has the libraries in it, what the allocator does not give back, and buffers
of single operations. On a GPU memory is the peak that a step takes beyond what stood there before it
(`torch.cuda.max_memory_allocated`), gradients and workspaces included, for that is what runs out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.rows import in_turns

TURNS = 7
Law = Callable[[int], float]  # a size -> how much it costs on paper, up to a factor


@dataclass
class Case:
    """A training step of one size.

    Attributes:
        network: what learns.
        loss: forward pass and loss.
        optimizer: takes a step too, where there is one.
        stands: counts bytes that stand between the steps, where these are in question instead of what a step keeps.
    """

    network: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer | None = None
    stands: Callable[[], int] | None = None

    def step(self) -> None:
        """Forward, loss, backward."""
        self.network.zero_grad()
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()


@dataclass
class Line:
    """One way to do what a sweep makes larger.

    Attributes:
        name: in the legend; empty where a sweep has one line.
        case: size -> its step.
        exponents: of time and of memory for large sizes, on paper; None: not looked at.
        time: the law of time on paper, where these sizes are not large enough for a power.
        memory: that of memory.
    """

    name: str
    case: Callable[[int], Case]
    exponents: tuple[float | None, float | None]
    time: Law | None = None
    memory: Law | None = None

    def on_paper(self, sizes: list[int], places: list[float]) -> list[list[float] | None]:
        """What time and memory cost; a power of the place on the axis where nothing else was given."""
        found: list[list[float] | None] = []
        for law, power in zip((self.time, self.memory), self.exponents, strict=True):
            if law:
                found.append([law(size) for size in sizes])
            else:
                found.append(None if power is None else [place**power for place in places])
        return found


@dataclass
class Sweep:
    """One thing that grows.

    Attributes:
        title: what is trained.
        axis: what grows.
        sizes: of it, from small to large.
        paper: what grows how, in words.
        lines: ways to do it.
        place: size -> where it stands on the axis, where that is something else.
    """

    title: str
    axis: str
    sizes: list[int]
    paper: str
    lines: list[Line]
    place: Callable[[int], float] = float


def kept(case: Case) -> int:
    """Bytes that autograd keeps for the backward pass, but for parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in chain(case.network.parameters(), case.network.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the same storage, which so lives as long as the loss; no cycle through the graph

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = case.loss()
    del loss
    return sum(found.values())


def peak(case: Case) -> int:
    """Bytes that a step takes on a GPU at its height, beyond what stood there before."""
    case.network.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory(case: Case, device: str) -> int:
    """Bytes that a case is about."""
    if case.stands is not None:
        case.step()  # gradients and an optimiser's moments are there after the first
        return case.stands()
    return peak(case) if device == "cuda" else kept(case)


def measured(sweep: Sweep, title: str, device: str, turns: int = TURNS) -> dict:
    """All figures of a sweep, as they are kept."""
    cases = {line.name: [line.case(size) for size in sweep.sizes] for line in sweep.lines}
    calls = {
        (line.name, size): case.step
        for line in sweep.lines
        if line.exponents[0] is not None
        for size, case in zip(sweep.sizes, cases[line.name], strict=True)
    }
    seconds = in_turns(title, calls, device, turns)
    places = [sweep.place(size) for size in sweep.sizes]
    lines = {}
    for line in sweep.lines:
        time, room = line.on_paper(sweep.sizes, places)
        lines[line.name] = {
            "exponents": line.exponents,
            "seconds": time and [rounded(seconds[line.name, size]) for size in sweep.sizes],
            "bytes": [memory(case, device) for case in cases[line.name]],
            "paper_time": time,
            "paper_memory": room,
        }
    return {"title": sweep.title, "axis": sweep.axis, "paper": sweep.paper, "sizes": places, "lines": lines}


def rounded(seconds: list[float]) -> list[float]:
    """To the microsecond."""
    return [round(second, 6) for second in seconds]
