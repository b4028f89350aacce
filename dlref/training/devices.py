"""What depends on the devices of a run: number formats, their speed, and several processes for one network."""

import os
import sys
from typing import TypeVar

import torch
from lightning import Callback, LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

Mine = TypeVar("Mine")


def warn_of_slow_bfloat16(trainer: Trainer) -> None:
    """Say on stderr where a CPU emulates bfloat16 in float32, many times slower (x86 with AVX2 only)."""
    slow = trainer.strategy.root_device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if slow and trainer.precision.startswith("bf16") and trainer.is_global_zero:
        words = "this processor has no bfloat16 and imitates it, many times slower than 32-true"
        print(f"trainer.precision {trainer.precision}: {words}", file=sys.stderr)


def fast_steps(device: torch.device) -> None:
    """On a GPU multiply matrices of float32 in TF32, as cuDNN does in convolutions and recurrent layers.

    On a processor look for no GPU in every step: Adam asks whether one is there, and as long as this variable is set,
    which importing Lightning does, torch looks for NVIDIA's library anew each time.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 where a device has no wider one, as Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gather_objects(mine: Mine) -> list[Mine]:
    """What each process has, in the order of their numbers."""
    if not is_distributed():
        return [mine]
    parts: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return parts


def scales_itself(optimizer: Optimizer) -> bool:
    """Whether it undoes the scale of 16-mixed within its step, as fused ones do: gradients are scaled until then."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def scaler_of(trainer: Trainer) -> torch.amp.GradScaler | None:
    """What scales the gradients of 16-mixed."""
    return getattr(trainer.precision_plugin, "scaler", None)


def lost_another(error: RuntimeError) -> bool:
    """Whether a collective has failed because another process is no more: gloo's errors, or NCCL's."""
    return ("/gloo/" in str(error) and "by peer" in str(error)) or "ncclRemoteError" in str(error)


class UnevenEvaluation(Callback):
    """Let devices evaluate shares of different lengths, all by the first one's statistics.

    DDP sends the buffers of the first device to the others before every batch, in evaluation too, and waits for ever
    where one of them has no batch left. Once is enough: what is kept of batch norm is the first device's.
    """

    def on_validation_epoch_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Send them now, those of an average of the weights where there is one, and not before each batch."""
        if isinstance(trainer.model, DistributedDataParallel):
            for buffer in task.buffers():
                torch.distributed.broadcast(buffer, 0)
            trainer.model.require_forward_param_sync = False

    def on_validation_end(self, trainer: Trainer, task: LightningModule) -> None:
        """In training DDP sends buffers again."""
        if isinstance(trainer.model, DistributedDataParallel):
            trainer.model.require_forward_param_sync = True
