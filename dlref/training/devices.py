"""Device-dependent parts of a run: number formats and their speed, and training with several processes."""

import os
import sys
from typing import TypeVar

import torch
from lightning import Trainer
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from torch.optim import Optimizer

from dlref.runtime import UserError

Mine = TypeVar("Mine")


def warn_of_slow_bfloat16(trainer: Trainer) -> None:
    """Warn on stderr if the CPU emulates bfloat16 in float32, which is many times slower (x86 with AVX2 only)."""
    slow = trainer.strategy.root_device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if slow and trainer.precision.startswith("bf16") and trainer.is_global_zero:
        words = "this processor emulates bfloat16, which is many times slower than 32-true"
        print(f"trainer.precision {trainer.precision}: {words}", file=sys.stderr)


def check_started(trainer: Trainer) -> None:
    """Raise UserError if torchrun started more processes than work together: each would do and write everything alone.

    Lightning checks this, but not for a strategy of a single device, which it takes by default on a CPU.
    """
    started = int(os.environ.get("WORLD_SIZE", 1)) if TorchElasticEnvironment.detect() else trainer.world_size
    if started != trainer.world_size:
        words = "expected trainer.devices as many as torchrun's --nproc_per_node, and trainer.strategy ddp"
        raise UserError(f"torchrun started {started} processes, of which {trainer.world_size} would work; {words}")


def fast_steps(device: torch.device) -> None:
    """On a GPU, multiply float32 matrices in TF32, as cuDNN does in convolutions and recurrent layers.

    On a CPU, keep torch from searching for a GPU in every step: Adam asks whether there is one, and while this variable
    is set, as it is by importing Lightning, torch searches for NVIDIA's library each time.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for devices without it, such as Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_distributed() -> bool:
    """Return whether this process is one of several that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gather_objects(mine: Mine) -> list[Mine]:
    """Return the objects of all processes, in rank order."""
    if not is_distributed():
        return [mine]
    parts: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return parts


def scales_itself(optimizer: Optimizer) -> bool:
    """Return whether an optimiser unscales the gradients of 16-mixed only within its step, as fused ones do."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def scaler_of(trainer: Trainer) -> torch.amp.GradScaler | None:
    """Return the gradient scaler of 16-mixed, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def lost_another(error: RuntimeError) -> bool:
    """Return whether a collective failed because another process has ended, by the messages of gloo and NCCL."""
    return ("/gloo/" in str(error) and "by peer" in str(error)) or "ncclRemoteError" in str(error)
