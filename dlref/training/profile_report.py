"""What a profile found: the parts of a step, what bounds the run, and what to try."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

PARTS = ("data", "forward", "backward", "optimiser", "callbacks", "logging", "loop")

# Shares of a step from which on a part is told to bound the run, rather than the device's arithmetic.
DATA = 0.2  # workers that keep up leave next to nothing
AROUND = 0.3  # callbacks, logging and the loop together
CHECKPOINT = 0.1  # on top of the steps of an epoch
BUSY = 0.7  # below it a GPU waits for what launches its kernels

ADVICE = {
    "data": "Waiting for data bounds the run. Try more data.init_args.num_workers, smaller files to decode, or data "
    "that is kept in memory.",
    "callbacks": "Callbacks bound the run. Try to have them do their work less often, as EMA's update_every_n_steps.",
    "logging": "Logging bounds the run. Try a larger trainer.log_every_n_steps, or trainer.enable_progress_bar false.",
    "loop": "Lightning's loop around the steps bounds the run: they are short. Try a larger batch, for fewer of them.",
    "launches": "Python and the launches of kernels bound the run: the GPU waits for them. Try "
    "model.init_args.compile_network true, or a larger batch.",
    "checkpoint": "Checkpoints bound the run. Try fewer validations: a larger trainer.check_val_every_n_epoch.",
    "arithmetic": "The device's arithmetic (forward, backward, optimiser) bounds the run, as it should. Try "
    "model.init_args.compile_network true, trainer.precision bf16-mixed on a GPU, a smaller network or another device.",
}


@dataclass(frozen=True)
class Findings:
    """What a run was found to spend its time on. Times are seconds.

    Attributes:
        parts: of a step, by name; they add up to it.
        steps: those that were timed part by part.
        free: those that nothing waited in; on a CPU the same.
        checkpoint: writing one.
        checkpoints: at most so many in an epoch.
        epoch: steps of an epoch.
        busy: the share of a step that a GPU computes, None where there is none.
    """

    parts: dict[str, float]
    steps: Sequence[float]
    free: Sequence[float]
    checkpoint: float
    checkpoints: float
    epoch: int
    busy: float | None

    @property
    def rows(self) -> dict[str, tuple[float, float]]:
        """Seconds a step and the share of it, by part. Checkpoints are spread over an epoch and come on top."""
        step = sum(self.parts.values())
        free = statistics.fmean(self.free)
        written = self.checkpoint * self.checkpoints / self.epoch
        parts = {name: (self.parts[name], self.parts[name] / step) for name in PARTS}
        return parts | {"step": (step, 1.0), "checkpoint": (written, written / free)}

    @property
    def bound(self) -> str:
        """What bounds the run, a key of ADVICE."""
        return bound({name: share for name, (_, share) in self.rows.items()}, self.busy)

    def lines(self) -> list[str]:
        """What there is to say beside the table."""
        mean, median = statistics.fmean(self.free), statistics.median(self.free)
        said = [f"A step takes {milli(mean)} in the mean and {milli(median)} in the median of {len(self.free)}."]
        if self.busy is not None:
            said += [
                f"In the table it is {milli(statistics.fmean(self.steps))}: there each part waits for the GPU, which "
                "tells them apart.",
                f"The GPU computes {self.busy:.0%} of a step.",
            ]
        said += [
            f"A checkpoint takes {milli(self.checkpoint)}. At most {self.checkpoints:.2g} are written in an epoch of "
            f"{self.epoch} steps: two after each validation, one every --checkpoint_minutes."
        ]
        return [" ".join(said), ADVICE[self.bound]]

    def markdown(self, where: list[str]) -> str:
        """The report as a page; `where` says what ran, and the files."""
        rows = [f"| {name} | {1000 * one:.3f} | {share:.1%} |" for name, (one, share) in self.rows.items()]
        table = "\n".join(["| part | ms a step | share |", "|---|---:|---:|", *rows])
        return "\n\n".join(["# Where the time of a step goes", table, *self.lines(), *where]) + "\n"

    def print(self, where: list[str]) -> None:
        """The report on the terminal, what bounds the run in bold."""
        table = Table("part", title="where the time of a step goes", title_justify="left")
        for title in ("ms a step", "share"):
            table.add_column(title, justify="right")
        for name, (seconds, share) in self.rows.items():
            table.add_row(name, f"{1000 * seconds:.3f}", f"{share:.1%}", style="bold" if name == self.bound else "")
        console = Console()
        console.print(table)
        for line in [*self.lines(), *where]:
            console.print(line, soft_wrap=True, highlight=False)


def bound(shares: dict[str, float], busy: float | None) -> str:
    """What bounds a run, a key of ADVICE.

    Args:
        shares: of a step's time, by part; that of checkpoints comes on top.
        busy: the share of a step that a GPU computes, None where there is none.
    """
    around = {name: shares[name] for name in ("callbacks", "logging", "loop")}
    found = {
        "data": (shares["data"], DATA),
        max(around, key=around.get): (sum(around.values()), AROUND),
        "checkpoint": (shares["checkpoint"], CHECKPOINT),
    }
    large = {name: share for name, (share, limit) in found.items() if share > limit}
    if large:
        return max(large, key=large.get)
    return "launches" if busy is not None and busy < BUSY else "arithmetic"


def milli(seconds: float) -> str:
    """A time, for people."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
