"""Time and memory of a training step, for every size of a sweep.

On a CPU, memory is what autograd keeps from the forward pass until the backward pass: the bytes of all storages that
pass through `torch.autograd.graph.saved_tensors_hooks`. Each storage counts once, however many operations keep it or a
view of it. The network's own parameters and buffers do not count, as they do not grow with a batch. This count is exact
and the same in each run. The peak of resident memory is neither: it includes the libraries, memory that the allocator
does not return, and buffers of single operations. On a GPU, memory is the peak that a step adds to the memory in use
before it (`torch.cuda.max_memory_allocated`), including gradients and workspaces, because that is what runs out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.rows import in_turns

TURNS = 7
Law = Callable[[int], float]  # a size -> its cost on paper, up to a factor


@dataclass
class Case:
    """A training step of one size.

    Attributes:
        network: the network to train.
        loss: forward pass and loss.
        optimizer: takes a step too, if there is one.
        stands: counts bytes that remain between steps, if these are to be measured instead of what a step keeps.
    """

    network: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer | None = None
    stands: Callable[[], int] | None = None

    def step(self) -> None:
        """Compute forward pass, loss and backward pass."""
        self.network.zero_grad()
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()


@dataclass
class Line:
    """One way to do what a sweep makes larger.

    Attributes:
        name: in the legend; empty if a sweep has one line.
        case: size -> its step.
        exponents: of time and of memory for large sizes, on paper. None for time: not timed; for memory: no power law.
        time: the law of time on paper, if these sizes are not large enough for a power.
        memory: the law of memory.
    """

    name: str
    case: Callable[[int], Case]
    exponents: tuple[float | None, float | None]
    time: Law | None = None
    memory: Law | None = None

    def on_paper(self, sizes: list[int], places: list[float]) -> list[list[float] | None]:
        """Return the cost in time and memory; a power of the place on the axis if there is no other law."""
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
        title: the network that is trained.
        axis: the thing that grows.
        sizes: its sizes, from small to large.
        paper: the laws on paper, in words.
        lines: ways to do it.
        place: size -> its place on the axis, if that is another number.
    """

    title: str
    axis: str
    sizes: list[int]
    paper: str
    lines: list[Line]
    place: Callable[[int], float] = float


def kept(case: Case) -> int:
    """Return the bytes that autograd keeps for the backward pass, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in chain(case.network.parameters(), case.network.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # keeps the storage as long as the loss lives, without a cycle through the graph

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = case.loss()
    del loss
    return sum(found.values())


def peak(case: Case) -> int:
    """Return the peak of bytes that a step on a GPU adds to those in use before it."""
    case.network.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory(case: Case, device: str) -> int:
    """Return the bytes that a case measures."""
    if case.stands is not None:
        case.step()  # gradients and an optimiser's moments exist after the first step
        return case.stands()
    return peak(case) if device == "cuda" else kept(case)


def measured(sweep: Sweep, title: str, device: str, turns: int = TURNS) -> dict:
    """Measure all figures of a sweep, in the format of docs/scaling.json."""
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
    """Round to the microsecond."""
    return [round(second, 6) for second in seconds]
