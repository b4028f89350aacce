"""The table of a network's parts and their parameters, printed before training."""

from lightning import Callback, LightningModule, Trainer
from rich import get_console
from rich.table import Column, Table
from torch import nn


class NetworkSummary(Callback):
    """Prints the parts of the network with their parameters.

    Lightning's own table also has a row for each metric and a count of FLOPs, which is 0 unless a task has an
    `example_input_array`.
    """

    def on_fit_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Print the table, in one process only."""
        if trainer.is_global_zero:
            get_console().print(network_table(task.network))


def network_table(network: nn.Module) -> Table:
    """A row for each part of `network`, and their total; a parameter that two parts share counts once in the total."""
    parameters = list(network.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    frozen = sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
    caption = f"{frozen:,} of them frozen" if frozen else None
    table = Table("Part", Column("Type", footer=type(network).__name__), caption=caption, show_footer=True)
    table.add_column("Parameters", f"{total:,}", justify="right")
    for name, part in network.named_children():
        table.add_row(name, type(part).__name__, f"{sum(parameter.numel() for parameter in part.parameters()):,}")
    return table
