"""ResNets compared with torchvision's and timm's.

All networks hold the same weights and see the same pictures, in one process and in turns. One benchmark times a
training step of ResNet-18: forward, cross entropy, backward, SGD. dlref runs in NHWC, as in its configs, the others in
their default layout, and torchvision in NHWC as well. The other times the prediction of a ResNet-50 for one picture:
dlref's graph in onnxruntime, as a bundle opens it, and the others in PyTorch.
"""

import tempfile
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import normalize

from benchmarks.rows import DEVICE, Row, Rows, in_turns, needs, rest, run
from dlref.export.graph import write_onnx
from dlref.export.targets import TARGETS
from dlref.models import ResNet
from dlref.runtime.bundle import OnnxGraph
from dlref.tasks import ImageClassifier, ImagePreprocess

CLASSES = 1000
BATCH, SIDE = 16, 160  # of a training step
ANSWERED, CALLS = 224, 10  # side of the picture for inference, and predictions per turn
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CPU = TARGETS["cpu"]


def networks(depth: int) -> dict[str, nn.Module]:
    """Return the networks of all three projects, with the same weights."""
    needs("timm")
    import timm

    torch.manual_seed(0)
    theirs = torchvision.models.get_model(f"resnet{depth}", weights=None, num_classes=CLASSES)
    found = {"torchvision": theirs, "timm": timm.create_model(f"resnet{depth}"), "dlref": ResNet(depth, CLASSES)}
    for network in found.values():
        network.load_state_dict(theirs.state_dict())
    return found


def trainer(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Return a function that makes a training step and returns its loss."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    layout = torch.contiguous_format if network.conv1.weight.is_contiguous() else torch.channels_last

    def step() -> Tensor:
        loss = F.cross_entropy(network(images.contiguous(memory_format=layout)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def step() -> Rows:
    """Time a training step. The first losses must be equal."""
    found = {name: network.to(DEVICE).train() for name, network in networks(18).items()}
    found["torchvision, NHWC"] = deepcopy(found["torchvision"])
    for name in ("dlref", "torchvision, NHWC"):
        found[name].to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, SIDE, SIDE, device=DEVICE)
    labels = torch.randint(CLASSES, (BATCH,), device=DEVICE)
    calls = {name: trainer(network, images, labels) for name, network in found.items()}
    losses = {name: call() for name, call in calls.items()}
    for loss in losses.values():
        torch.testing.assert_close(loss, losses["torchvision"], rtol=1e-4, atol=0)
    seconds = in_turns("training steps", calls)
    title = f"training step, ResNet-18 at {SIDE} px, batch {BATCH}"
    return {
        f"{title}, beside {name}": Row(seconds["dlref"], seconds[name], "s", name)
        for name in ("torchvision", "torchvision, NHWC", "timm")
    }


def several(answer: Callable) -> None:
    """Make the predictions that a turn times."""
    for _ in range(CALLS):
        answer()


def inference() -> Rows:
    """Time one picture of bytes -> probabilities, without resizing. The predictions must be equal."""
    found = {name: network.eval() for name, network in networks(50).items()}
    task = ImageClassifier(
        network=found.pop("dlref"), preprocess=ImagePreprocess(ANSWERED, MEAN, STD), optimizer=None
    ).eval()
    task.remember({"labels": [str(k) for k in range(CLASSES)], "multi_label": False, "crop": None})
    image = torch.randint(256, (1, 3, ANSWERED, ANSWERED), dtype=torch.uint8)
    graph = task.deployable((image, None)).graphs["classify"]

    def published(network: nn.Module) -> Tensor:
        with torch.inference_mode():
            return network(normalize(image / 255, MEAN, STD)).softmax(dim=-1)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "classify.onnx"
        write_onnx(graph, path, CPU)
        session = OnnxGraph(path, CPU.provider)
    array = image.permute(0, 2, 3, 1).contiguous().numpy()
    answers = {name: partial(published, network) for name, network in found.items()}
    answers["dlref"] = lambda: torch.from_numpy(session(image=array)["probability"])
    for answer in answers.values():
        torch.testing.assert_close(answer(), answers["torchvision"](), rtol=1e-3, atol=1e-6)
    calls = {name: partial(several, answer) for name, answer in answers.items()}
    # Idle threads of both engines spin for a while, and would take the cores from the next measurement.
    calls = {"rest": rest, "dlref": calls.pop("dlref"), "rest again": rest} | calls
    seconds = in_turns("answers", calls)
    title = f"one answer, ResNet-50 at {ANSWERED} px, float32 bundle"
    return {
        f"{title}, beside {name}": Row(
            [s / CALLS for s in seconds["dlref"]], [s / CALLS for s in seconds[name]], "s", f"{name} in PyTorch"
        )
        for name in found
    }


BENCHMARKS = {"classification-step": step, "classification-inference": inference}


if __name__ == "__main__":
    run(BENCHMARKS)
