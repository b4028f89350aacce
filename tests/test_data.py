"""The data modules of image classification, on tiny generated files and, if DLREF_DATA is set, on real ones."""

import gzip
import hashlib
import json
import os
import pathlib
import struct
import tarfile
import tempfile
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import jsonargparse
import numpy as np
import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from PIL import Image
from refusals import error_of, one_line
from torch.nn.functional import one_hot
from torchvision.io import write_jpeg, write_png
from torchvision.transforms.v2 import functional as F

from dlref import data
from dlref.data import CIFAR10, MNIST, Digits, FashionMNIST, ImageFolder, ImageList, ImageManifest
from dlref.data.augment import random_crop, random_erase, random_flip
from dlref.data.images import read_image
from dlref.data.listings import Listing
from dlref.data.small_images import ImageTensors
from dlref.data.streamed_images import StreamedImages
from dlref.runtime.errors import UserError
from dlref.runtime.images import read_image as on_a_device

pytestmark = pytest.mark.filterwarnings("ignore:The image (de|en)coding")
NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def setup(module, stage=None):
    module.prepare_data()
    module.setup(stage)
    return module


def write_idx(folder, train=40, test=12, zipped=True):
    """Write MNIST's files with 4 × 5 images; the first two pixels encode the number of the record."""
    folder.mkdir(parents=True, exist_ok=True)
    for count, (images_name, labels_name) in ((train, NAMES[:2]), (test, NAMES[2:])):
        number = np.arange(count)
        images = np.zeros((count, 4, 5), np.uint8)
        images[:, 0, 0], images[:, 0, 1] = number % 256, number // 256
        for name, array in ((images_name, images), (labels_name, (number % 10).astype(np.uint8))):
            content = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()
            path = folder / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


def write_cifar(folder, records=4):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate([*CIFAR10.train_batches, "test_batch.bin"]):
        batch = np.full((records, 3073), number, np.uint8)
        batch[:, 0] = np.arange(records) % 10
        (folder / name).write_bytes(batch.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n\n")
    return folder


def write_images(root, *names, size=(40, 60)):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = torch.full((3, *size), 10 * number, dtype=torch.uint8)
        write_png(image, str(path)) if path.suffix == ".png" else write_jpeg(image, str(path))
    return root


@pytest.fixture
def web(tmp_path):
    """Serve tmp_path/web over HTTP: yields the folder and its address."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    folder = tmp_path / "web"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def image_numbers(split):
    return (split.images[:, 0, 0, 0].int() + 256 * split.images[:, 0, 0, 1].int()).tolist()


# Augmentation


def coordinates(batch: int, height: int, width: int) -> torch.Tensor:
    """Return images whose two channels are row and column, counted from 1, so that a crop reveals its position."""
    rows = torch.arange(1, height + 1).view(1, height, 1).expand(batch, height, width)
    columns = torch.arange(1, width + 1).view(1, 1, width).expand(batch, height, width)
    return torch.stack([rows, columns], 1).to(torch.uint8)


def test_crop_moves_each_image_by_its_own_offset():
    torch.manual_seed(0)
    batch, height, width, padding = 300, 6, 9, 2
    images = coordinates(batch, height, width)
    cropped = random_crop(images, padding)
    assert cropped.shape == images.shape
    assert cropped.dtype == torch.uint8
    assert cropped.is_contiguous()
    offsets = set()
    for crop in cropped:
        # Row 2 and column 2 are inside the original at any offset, so they reveal the offset.
        top, left = crop[0, 2, 2].item() - 3, crop[1, 2, 2].item() - 3
        expected = torch.zeros(2, height, width, dtype=torch.uint8)
        for y in range(height):
            for x in range(width):
                if 0 <= y + top < height and 0 <= x + left < width:
                    expected[:, y, x] = torch.tensor([y + top + 1, x + left + 1])
        torch.testing.assert_close(crop, expected)
        offsets.add((top, left))
    assert offsets == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


def test_flip_mirrors_about_half_of_the_images():
    torch.manual_seed(0)
    images = coordinates(400, 2, 3)
    flipped = random_flip(images)
    mirrored = (flipped[:, 1, 0, 0] == 3).tolist()
    assert 150 < sum(mirrored) < 250
    for image, result, turned in zip(images, flipped, mirrored, strict=True):
        torch.testing.assert_close(result, image.flip(-1) if turned else image)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_erase_blackens_one_square_around_a_pixel(size):
    torch.manual_seed(0)
    images = torch.full((500, 3, 8, 10), 9, dtype=torch.uint8)
    erased = random_erase(images, size) == 0
    assert (erased == erased[:, :1]).all()  # the same in all channels
    for mask in erased[:, 0]:
        rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
        assert mask.sum() == len(rows) * len(columns)  # a rectangle
        for found, length in ((rows, 8), (columns, 10)):
            assert found == list(range(found[0], found[-1] + 1))
            assert len(found) == size or 0 in found or length - 1 in found  # cut only by the border
    assert erased[:, 0].sum((1, 2)).max() == size * size
    assert (images == 9).all()


def test_the_centre_of_the_erased_square_is_uniform_over_the_pixels():
    """A square of 4 begins 2 pixels before its centre: the near border cuts it at two centres, the far one at one."""
    torch.manual_seed(0)
    erased = random_erase(torch.full((20_000, 1, 8, 10), 9, dtype=torch.uint8), 4)[:, 0] == 0
    for axis, length in ((1, 8), (2, 10)):
        seen = erased.any(3 - axis)
        first, last = seen.int().argmax(1), length - 1 - seen.flip(1).int().argmax(1)
        sizes = (last - first + 1).bincount(minlength=5)[1:] / len(seen)
        expected = torch.tensor([0, 1, 2, length - 3]) / length
        torch.testing.assert_close(sizes, expected, atol=0.015, rtol=0)
        at_start, at_end = ((first == 0) & (last < 3)), ((last == length - 1) & (first > length - 4))
        assert at_start.float().mean().item() == pytest.approx(2 / length, abs=0.015)
        assert at_end.float().mean().item() == pytest.approx(1 / length, abs=0.015)


def test_augmentation_is_reproducible_with_the_same_seed():
    def augment():
        torch.manual_seed(3)
        return random_erase(random_flip(random_crop(coordinates(20, 8, 8), 2)), 3)

    torch.testing.assert_close(augment(), augment())


def test_only_training_batches_are_augmented():
    module = Digits(pad_crop=1, flip=True, cutout=2)
    batch = (torch.full((64, 1, 8, 8), 200, dtype=torch.uint8), torch.arange(64))
    torch.testing.assert_close(module.on_after_batch_transfer(batch, 0), batch)
    module.trainer = SimpleNamespace(training=False)
    torch.testing.assert_close(module.on_after_batch_transfer(batch, 0), batch)
    module.trainer = SimpleNamespace(training=True)
    images, targets = module.on_after_batch_transfer(batch, 0)
    assert (images == 0).any()
    torch.testing.assert_close(targets, batch[1])
    plain = Digits()
    plain.trainer = module.trainer
    torch.testing.assert_close(plain.on_after_batch_transfer(batch, 0), batch)


@pytest.mark.parametrize(
    ("option", "augment"),
    [
        ({"pad_crop": 1}, lambda images: random_crop(images, 1)),
        ({"flip": True}, random_flip),
        ({"cutout": 2}, lambda images: random_erase(images, 2)),
    ],
    ids=["pad_crop", "flip", "cutout"],
)
def test_each_option_enables_its_own_augmentation(option, augment):
    module = Digits(**option)
    module.trainer = SimpleNamespace(training=True)
    images = torch.randint(1, 256, (64, 1, 8, 8), dtype=torch.uint8)
    torch.manual_seed(5)
    augmented, _ = module.on_after_batch_transfer((images, torch.arange(64)), 0)
    torch.manual_seed(5)
    torch.testing.assert_close(augmented, augment(images))
    assert not torch.equal(augmented, images)


@pytest.mark.parametrize("option", ["pad_crop", "cutout"])
def test_an_augmentation_of_less_than_nothing_is_refused(option):
    assert error_of(Digits(**{option: -1}).setup) == f"--data.init_args.{option}: -1; expected at least 0"


def test_trivial_augment_is_applied_only_if_requested():
    names = [type(step).__name__ for step in ImageFolder("x", trivial_augment=True).train_transform().transforms]
    assert names == ["RandomResizedCrop", "RandomHorizontalFlip", "TrivialAugmentWide"]
    assert len(ImageFolder("x").train_transform().transforms) == 2


def test_sources_name_the_test_images(folders):
    module = setup(ImageFolder(folders, **SMALL), "test")
    assert module.sources() == module.splits["test"].paths
    assert setup(Digits()).sources()[:2] == ["0", "1"]


# In memory


def test_digits_are_split_and_batched():
    module = setup(Digits())
    assert module.labels == list("0123456789")
    assert not module.multi_label
    assert {name: len(split) for name, split in module.splits.items()} == {
        "train": 1077,
        "val": 360,
        "test": 360,
    }
    everything = torch.cat([split.images for split in module.splits.values()])
    assert everything.unique().tolist() == [round(level * 255 / 16) for level in range(17)]
    for split in module.splits.values():
        counts = torch.bincount(split.targets)
        assert counts.max() - counts.min() <= 0.06 * len(split)
    images, targets = next(iter(module.train_dataloader()))
    assert (images.shape, images.dtype) == ((64, 1, 8, 8), torch.uint8)
    assert (targets.shape, targets.dtype) == ((64,), torch.int64)
    assert len(module.train_dataloader()) == 1077 // 64
    assert [len(batch[1]) for batch in module.test_dataloader()] == [64] * 5 + [40]
    torch.testing.assert_close(next(iter(module.predict_dataloader())), next(iter(module.test_dataloader())))


def test_shuffling_depends_on_the_seed_but_the_splits_do_not(tmp_path):
    write_idx(tmp_path)

    def run(seed):
        seed_everything(seed, verbose=False)
        module = setup(MNIST(tmp_path, validation=8, batch_size=32))
        return next(iter(module.train_dataloader()))[1].tolist(), image_numbers(module.splits["val"])

    assert run(1) == run(1)
    (order, held_out), (other_order, other_held_out) = run(1), run(2)
    assert order != other_order
    assert held_out == other_held_out


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_is_read_split_and_batched(tmp_path, zipped):
    module = setup(MNIST(write_idx(tmp_path, train=300, zipped=zipped), validation=50, batch_size=64), "fit")
    train, val, test = (image_numbers(module.splits[name]) for name in ("train", "val", "test"))
    assert sorted(train + val) == list(range(300))
    assert len(val) == 50
    assert test == list(range(12))
    for split in module.splits.values():
        assert split.targets.tolist() == [number % 10 for number in image_numbers(split)]
    images, targets = next(iter(module.val_dataloader()))
    assert (images.shape, images.dtype) == ((50, 1, 4, 5), torch.uint8)
    assert targets.dtype == torch.int64
    seen = [batch[1] for batch in module.train_dataloader()]
    assert [len(targets) for targets in seen] == [64, 64, 64]  # and 58 dropped
    assert len(next(iter(setup(MNIST(tmp_path, validation=50, batch_size=999)).train_dataloader()))[1]) == 250


def test_setup_reads_the_files_only_once(tmp_path):
    module = setup(MNIST(write_idx(tmp_path), validation=8), "fit")
    before = module.splits["train"].images.data_ptr()
    for name in NAMES:
        (tmp_path / f"{name}.gz").unlink()
    module.setup("test")
    assert module.splits["train"].images.data_ptr() == before


@pytest.mark.parametrize("wrong", [10, -1])
def test_a_class_id_out_of_range_is_refused(wrong):
    class Ten(Digits):
        def read(self):
            labels, splits = super().read()
            splits["val"].targets[7] = wrong
            return labels, splits

    with pytest.raises(UserError) as caught:
        setup(Ten())
    assert one_line(caught.value) == f"val: label {wrong} of image 7; expected 0 to 9"


@pytest.mark.parametrize(
    ("several", "change", "message"),
    [
        (False, torch.Tensor.float, "train: targets are torch.float32 [1077]; expected torch.int64 [1077], class ids"),
        (False, torch.Tensor.int, "targets are torch.int32 [1077]"),
        (False, torch.Tensor.numpy, "targets are ndarray; expected torch.int64 [1077]"),
        (False, lambda ids: ids[:-1], "targets are torch.int64 [1076]"),
        (False, partial(one_hot, num_classes=10), "targets are torch.int64 [1077, 10]"),
        (True, torch.Tensor.clone, "targets are torch.int64 [1077]; expected torch.float32 [1077, 10]"),
        (True, lambda ids: 255 * one_hot(ids, 10).float(), "train: targets from 0 to 255; expected 0 or 1"),
    ],
)
def test_targets_of_another_form_are_refused(several, change, message):
    class Changed(Digits):
        multi_label = several

        def read(self):
            labels, splits = super().read()
            return labels, {name: ImageTensors(one.images, change(one.targets)) for name, one in splits.items()}

    with pytest.raises(UserError) as caught:
        setup(Changed())
    assert message in one_line(caught.value)


def test_missing_files_and_invalid_options_of_published_sets_are_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        setup(MNIST(tmp_path / "none"))
    expected = f"{tmp_path}/none/train-images-idx3-ubyte.gz: no such file; expected it there, or "
    assert one_line(caught.value) == expected + "--data.init_args.download true"
    with pytest.raises(UserError) as caught:
        setup(MNIST(write_idx(tmp_path), validation=40))
    assert one_line(caught.value) == "--data.init_args.validation: 40; expected 0 to 39, of 40 images"
    with pytest.raises(UserError) as caught:
        setup(MNIST(tmp_path, validation=4, batch_size=0))
    assert one_line(caught.value) == "--data.init_args.batch_size: 0; expected at least 1"
    with pytest.raises(UserError) as caught:
        setup(CIFAR10(tmp_path))
    assert f"{tmp_path}: no CIFAR-10 in it; expected data_batch_1.bin" in one_line(caught.value)


def test_mnist_download_tries_the_mirrors_in_order(tmp_path, web, monkeypatch):
    folder, address = web
    source = write_idx(folder / "mirror")
    resources = [(f"{name}.gz", hashlib.md5((source / f"{name}.gz").read_bytes()).hexdigest()) for name in NAMES]
    (folder / "broken").mkdir()
    (folder / "broken" / resources[0][0]).write_bytes(b"not the file")
    mirrors = [f"{address}/{name}/" for name in ("missing", "broken", "mirror")]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))  # which may be another disk
    monkeypatch.setattr(FashionMNIST, "published", SimpleNamespace(mirrors=mirrors, resources=resources))
    root = tmp_path / "new" / "root"
    module = setup(FashionMNIST(root, validation=8, download=True))
    assert len(module.splits["test"]) == 12
    assert module.labels[9] == "Ankle boot"
    assert sorted(path.name for path in root.iterdir()) == sorted(name for name, _ in resources)

    mirrors[:] = mirrors[:1]
    module.prepare_data()  # nothing is missing, so nothing is fetched
    (root / resources[0][0]).unlink()
    with pytest.raises(UserError) as caught:
        module.prepare_data()
    assert f"{root}/{resources[0][0]}: not downloaded from {mirrors[0]}" in one_line(caught.value)
    assert not (root / resources[0][0]).exists()


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-bin"])
def test_cifars_binary_files_are_read(tmp_path, folder):
    write_cifar(tmp_path / folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns about read-only arrays
        module = setup(CIFAR10(tmp_path, validation=5, batch_size=4))
    assert {name: len(split) for name, split in module.splits.items()} == {"train": 15, "val": 5, "test": 4}
    assert module.labels == [f"class{i}" for i in range(10)]
    images, targets = next(iter(module.test_dataloader()))
    assert (images.shape, images.dtype) == ((4, 3, 32, 32), torch.uint8)
    assert (images == 5).all()
    assert targets.tolist() == [0, 1, 2, 3]


def test_cifar_is_downloaded_once(tmp_path, web, monkeypatch):
    folder, address = web
    write_cifar(tmp_path / "source" / "cifar-10-batches-bin")
    archive = folder / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    monkeypatch.setattr(CIFAR10, "url", f"{address}/{archive.name}")
    monkeypatch.setattr(CIFAR10, "md5", hashlib.md5(archive.read_bytes()).hexdigest())
    module = setup(CIFAR10(tmp_path / "root", validation=5, download=True))
    assert len(module.splits["train"]) == 15
    archive.unlink()
    setup(CIFAR10(tmp_path / "root", validation=5, download=True))
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == [
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
    ]


def test_cifars_image_folders_are_read(tmp_path):
    names = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("cat", "ant") for i in range(3)]
    write_images(tmp_path / "CIFAR-10-images", *names, size=(6, 7))
    module = setup(CIFAR10(tmp_path, validation=2))
    assert module.labels == ["ant", "cat"]
    assert {name: len(split) for name, split in module.splits.items()} == {"train": 4, "val": 2, "test": 6}
    images, targets = next(iter(module.test_dataloader()))
    assert images.shape == (6, 3, 6, 7)
    assert targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert images[:, 0, 0, 0].tolist() == [90, 100, 110, 60, 70, 80]  # sorted by class, not in the order of writing
    write_images(tmp_path / "CIFAR-10-images", "test/cat/9.png", size=(7, 7))
    with pytest.raises(UserError) as caught:
        setup(CIFAR10(tmp_path, validation=2))
    assert "test/cat/9.png: 7 x 7 pixels; expected 7 x 6 pixels, as " in one_line(caught.value)


class Probe(LightningModule):
    """Records whether the images that reach each step are black."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.black = {"train": [], "val": [], "test": []}

    def _record(self, stage, batch):
        assert batch[0].dtype == torch.uint8
        self.black[stage].append(bool((batch[0] == 0).all()))
        return self.weight.square()

    def training_step(self, batch, index):
        return self._record("train", batch)

    def validation_step(self, batch, index):
        self._record("val", batch)

    def test_step(self, batch, index):
        self._record("test", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero")  # by Lightning, for 0
@pytest.mark.parametrize("validation", [8, 0])
def test_a_trainer_augments_only_training_batches(tmp_path, validation):
    # A square of twice the image's side blackens the whole image; only training images must be black.
    module = MNIST(write_idx(tmp_path), validation=validation, batch_size=8, cutout=10)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    probe = Probe()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*many workers.*")
        trainer.fit(probe, module)
        trainer.test(probe, module)
    steps = 2 * ((40 - validation) // 8)
    assert probe.black["train"] == [True] * steps
    assert probe.black["val"] == [False] * (3 if validation else 0)  # one of them in the sanity check
    assert probe.black["test"] == [False] * 2


# Streamed

SMALL = {"batch_size": 2, "image_size": 16, "resize": 20, "num_workers": 0}


@pytest.fixture
def folders(tmp_path):
    train = [f"train/{name}/{i}.{kind}" for name in ("cat", "ant") for i, kind in enumerate(("png", "jpg", "jpeg"))]
    return write_images(tmp_path, *train, "val/cat/0.png", "val/ant/1.jpg", "val/ant/2.png")


def check_batches(module, train, test):
    for loader, count in ((module.train_dataloader(), train), (module.test_dataloader(), test)):
        batches = list(loader)
        assert sum(len(targets) for _, targets in batches) == count
        for images, targets in batches:
            assert images.shape == (len(targets), 3, 16, 16)
            assert images.dtype == torch.uint8
            assert targets.dtype == (torch.float32 if module.multi_label else torch.int64)
            assert targets.ndim == 1 + module.multi_label


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_folder_is_read_and_batched(folders, capsys, num_workers):
    module = setup(ImageFolder(folders, **SMALL | {"trivial_augment": True, "num_workers": num_workers}), "fit")
    assert module.labels == ["ant", "cat"]
    assert not module.multi_label
    check_batches(module, train=6, test=3)
    images, targets = zip(*module.val_dataloader(), strict=True)
    assert torch.cat(targets).tolist() == [0, 0, 1]
    assert torch.cat(images)[:, 0, 8, 8].tolist() == [70, 80, 60]


def test_image_folder_logs_when_it_tests_on_the_validation_images(folders, caplog):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    module = setup(ImageFolder(folders, **SMALL))
    assert module.splits["test"].paths == module.splits["val"].paths
    assert caplog.text.count("the validation images are also used for testing") == 1
    module.setup("test")
    assert caplog.text.count("the validation images are also used for testing") == 1
    write_images(folders, "test/ant/7.png")
    assert len(setup(ImageFolder(folders, **SMALL)).splits["test"]) == 1


def test_image_folder_warns_about_the_files_it_skips(folders):
    (folders / "train" / "cat" / "notes.txt").touch()
    (folders / "train" / ".DS_Store").touch()
    with pytest.warns(UserWarning, match=r"files that are not JPEG, PNG, GIF or WebP: 1 \.txt: .*cat/notes\.txt$"):
        setup(ImageFolder(folders, **SMALL))


def test_image_folder_refuses_small_sizes_unknown_classes_and_missing_folders(folders, tmp_path):
    with pytest.raises(UserError) as caught:
        setup(ImageFolder(folders, **SMALL | {"resize": 8}))
    assert one_line(caught.value) == "--data.init_args.resize: 8; expected at least 16"
    for name, wrong, least in (("batch_size", 0, 1), ("image_size", 0, 1), ("num_workers", -1, 0)):
        with pytest.raises(UserError, match=rf"^--data.init_args.{name}: {wrong}; expected at least {least}$"):
            setup(ImageFolder(folders, **SMALL | {name: wrong}))
    write_images(folders, "val/dog/1.png")
    with pytest.raises(UserError) as caught:
        setup(ImageFolder(folders, **SMALL))
    assert one_line(caught.value) == f"{folders}/val/dog: not a class of train; expected one of ['ant', 'cat']"
    with pytest.raises(UserError) as caught:
        setup(ImageFolder(folders / "val", **SMALL))
    assert f"{folders}/val/train: No such file or directory; expected a folder" in one_line(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named(folders, num_workers):
    module = setup(ImageFolder(folders, **SMALL | {"num_workers": num_workers}))
    path = folders / "val" / "ant" / "1.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError) as caught:
        list(module.val_dataloader())
    assert one_line(caught.value) == f"{path}: cannot be decoded; expected a JPEG, PNG, GIF or WebP image"


def test_read_image_refuses_broken_files_and_reads_16_bit_gif_and_turned_images(tmp_path):
    with pytest.raises(UserError) as caught:
        read_image(str(tmp_path / "none.jpg"))
    assert f"{tmp_path}/none.jpg: no such file" in one_line(caught.value)
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name in ("text.png", "empty.png"):
        with pytest.raises(UserError) as caught:
            read_image(str(tmp_path / name))
        assert f"{name}: cannot be decoded" in one_line(caught.value)

    grey = Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 257 * 20)
    grey.save(tmp_path / "16bit.png")
    assert read_image(str(tmp_path / "16bit.png"))[2].flatten().tolist() == [20 * i for i in range(12)]
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(str(tmp_path / "a.gif"))[:, 0, 0].tolist() == [255, 0, 0]
    holes = Image.new("P", (4, 3), 0)
    holes.putpalette([10, 20, 30, 200, 100, 50])
    holes.putpixel((1, 1), 1)
    holes.save(tmp_path / "holes.gif", transparency=1, background=0)
    seen = read_image(str(tmp_path / "holes.gif")).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(seen, on_a_device(tmp_path / "holes.gif", 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    frames[0].save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(str(tmp_path / "turned.jpg")).shape == (3, 4, 3)


@pytest.mark.parametrize("targets", [torch.tensor([1, 2]), torch.tensor([-1, 0]), torch.tensor([0]), torch.eye(3)[:2]])
def test_targets_of_a_listing_that_do_not_fit_its_images_and_classes_are_refused(targets):
    class Own(StreamedImages):
        lists = dict.fromkeys(("train", "val", "test"), "a")

        def read(self, source, classes):
            return Listing(["a.png", "b.png"], targets, ["cat", "dog"])

    with pytest.raises(UserError, match=r"^train: (label|targets)") as caught, warnings.catch_warnings(action="ignore"):
        setup(Own())
    one_line(caught.value)


def test_the_class_names_of_a_listing_in_an_array_are_left_to_the_task_to_refuse():
    class Own(StreamedImages):
        def __init__(self):
            super().__init__()
            self.lists = {"train": "a", "val": "b", "test": "c"}

        def read(self, source, classes):
            return Listing([f"{source}1.png", f"{source}2.png"], torch.tensor([0, 1]), np.array(["cat", "dog"]))

    assert list(setup(Own()).labels) == ["cat", "dog"]


def test_evaluation_keeps_the_aspect_ratio_and_crops_the_centre(tmp_path):
    gradient = torch.arange(60, dtype=torch.uint8).expand(3, 40, 60)
    transform = ImageFolder(tmp_path, image_size=16, resize=20).eval_transform()
    expected = F.center_crop(F.resize(gradient, [20, 30], antialias=True), [16, 16])
    torch.testing.assert_close(transform(gradient), expected)
    assert 25 < transform(gradient).float().mean() < 35


def test_only_training_images_are_cropped_and_mirrored_at_random(tmp_path):
    rising = torch.arange(60, dtype=torch.uint8).expand(3, 40, 60).contiguous()
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        write_png(rising, str(tmp_path / split / "cat/0.png"))
    splits = setup(ImageFolder(tmp_path, **SMALL)).splits
    train, val, test = (torch.stack([splits[name][0][0] for _ in range(20)]) for name in ("train", "val", "test"))
    assert len(train.unique(dim=0)) > 10
    assert 0 < (train[:, 0, 0, 0] > train[:, 0, 0, -1]).sum() < 20
    assert len(torch.cat([val, test]).unique(dim=0)) == 1


def test_images_are_reduced_with_antialiasing(tmp_path):
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(128).expand(3, 256, 256)
    module = ImageFolder(tmp_path, **SMALL)
    for transform in (module.train_transform(), module.eval_transform()):
        assert all((transform(stripes).float() - 127.5).abs().max() < 40 for _ in range(10))


def test_an_image_list_is_read(folders):
    (folders / "train.lst").write_text("0\t1\ttrain/cat/0.png\n1\t0\ttrain/ant/0.png\n2\t1.0\ttrain/cat/1.jpg\n")
    (folders / "val.lst").write_text("0\t1\tval/cat/0.png\n")
    module = setup(ImageList(folders, folders / "train.lst", folders / "val.lst", class_names=["a", "c"], **SMALL))
    assert module.labels == ["a", "c"]
    check_batches(module, train=2, test=1)
    assert setup(ImageList(folders, folders / "train.lst", folders / "val.lst", **SMALL)).labels == ["0", "1"]
    (folders / "val.lst").write_text("0\t2\tval/cat/0.png\n")
    with pytest.raises(UserError) as caught:
        setup(ImageList(folders, folders / "train.lst", folders / "val.lst", **SMALL))
    assert one_line(caught.value) == f"{folders}/val.lst:1: label 2; expected ids from 0 to 1"


def test_a_multi_label_image_list_is_read(folders):
    (folders / "train.lst").write_text("0\t1\t1\t0\ttrain/cat/0.png\n1\t0\t0\t1\ttrain/ant/0.png\n")
    (folders / "val.lst").write_text("0\t0\t0\t0\tval/cat/0.png\n")
    module = setup(ImageList(folders, folders / "train.lst", folders / "val.lst", **SMALL))
    assert module.multi_label
    assert module.labels == ["0", "1", "2"]
    check_batches(module, train=2, test=1)
    (folders / "val.lst").write_text("0\t2\tval/cat/0.png\n")
    with pytest.raises(UserError) as caught:
        setup(ImageList(folders, folders / "train.lst", folders / "val.lst", **SMALL))
    assert "class ids in its list; expected multi-hot labels, as in training" in one_line(caught.value)
    (folders / "test.lst").write_text((folders / "val.lst").read_text())
    (folders / "val.lst").write_text("0\t0\t0\t0\tval/cat/0.png\n")
    with pytest.raises(UserError, match="class ids in its list"):
        setup(ImageList(folders, folders / "train.lst", folders / "val.lst", folders / "test.lst", **SMALL))


def test_an_image_manifest_is_read(folders):
    def entry(path, label, name):
        return json.dumps({"source-ref": path, "pet": label, "pet-metadata": {"class-name": name}}) + "\n"

    train, val = folders / "train.manifest", folders / "lists" / "val.manifest"
    val.parent.mkdir()
    train.write_text(entry("train/cat/0.png", 1, "cat") + entry("train/ant/0.png", 0, "ant"))
    val.write_text(entry("../val/cat/0.png", 1, "cat"))
    with pytest.warns(UserWarning, match=r"^test: 2 of 2 images are among those of train$"):
        module = setup(ImageManifest(train, val, test=train, **SMALL))
    assert module.labels == ["ant", "cat"]
    check_batches(module, train=2, test=2)
    twice = json.loads(entry("val/cat/0.png", 0, "x")) | {"fur": 1, "fur-metadata": {"class-name": "long"}}
    both = folders / "both.manifest"
    both.write_text(json.dumps(twice | {"fur": 0, "fur-metadata": {"class-name": "short"}}) + "\n" + json.dumps(twice))
    with pytest.raises(UserError) as caught:
        setup(ImageManifest(both, val, label_attribute="fur", **SMALL))
    assert one_line(caught.value) == f"{both}:2: val/cat/0.png: label 1; expected 0, as in line 1"
    both.write_text(both.read_text().replace("cat/0.png", "ant/0.png", 1))
    with pytest.warns(UserWarning, match="of 2 images are among those of train"):
        assert setup(ImageManifest(both, both, label_attribute="fur", **SMALL)).labels == ["short", "long"]
    val.write_text(entry("../val/cat/0.png", 1, "ant"))
    with pytest.raises(UserError) as caught:
        setup(ImageManifest(train, val, **SMALL))
    assert one_line(caught.value) == f"{val}:1: class 1: 'ant'; expected 'cat', as before"


@pytest.mark.parametrize("place", [60, 200, -30])
def test_a_damaged_png_is_named(tmp_path, place):
    """The damage is in the pixels or a checksum. torchvision's own decoder would end the process."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[place] ^= 4
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png: cannot be decoded; expected a JPEG, PNG, GIF or WebP image"):
        read_image(str(tmp_path / "a.png"))


def test_classes_without_images_cause_a_warning_and_duplicate_names_are_refused(folders):
    (folders / "train.lst").write_text("0\t1\ttrain/cat/0.png\n1\t2\ttrain/ant/0.png\n")
    (folders / "val.lst").write_text("0\t1\tval/cat/0.png\n")
    lists = {"root": folders, "train": folders / "train.lst", "val": folders / "val.lst"}
    with pytest.warns(UserWarning, match="^train: no image of 0$"):
        setup(ImageList(**lists, **SMALL))
    with pytest.warns(UserWarning, match="^train: no image of ant, dog$"):
        setup(ImageList(**lists, class_names=["ant", "cat", "elk", "dog"], **SMALL))
    with pytest.raises(UserError, match=r"classes \['ant', 'cat', 'ant'\]; expected names that differ"):
        setup(ImageList(**lists, class_names=["ant", "cat", "ant"], **SMALL))


def test_a_generated_class_name_does_not_repeat_a_given_one(folders):
    entry = {"source-ref": "train/cat/0.png", "grade": 2, "grade-metadata": {"class-name": "1"}}
    (folders / "all.manifest").write_text(json.dumps(entry) + "\n")
    with pytest.warns(UserWarning, match="no image of 0, class 1|are among those of train"):
        module = setup(ImageManifest(folders / "all.manifest", folders / "all.manifest", **SMALL))
    assert module.labels == ["0", "class 1", "1"]


# From a config


REQUIRED = {
    **dict.fromkeys(("Digits", "DigitSceneMasks", "DigitScenes"), ()),
    **dict.fromkeys(("MNIST", "FashionMNIST", "CIFAR10", "ImageFolder"), ("root",)),
    "ImageList": ("root", "train", "val"),
    "ImageManifest": ("train", "val"),
    **dict.fromkeys(("COCOBoxes", "ManifestBoxes", "SageMakerBoxes", "VOCBoxes"), ("root", "train")),
    **dict.fromkeys(("MaskFolders", "MaskLists", "VOCMasks"), ("root", "train")),
    **dict.fromkeys(("PythonSources", "SyntheticDates"), ()),
    "TextFiles": ("train",),
    "TokenFiles": ("root",),
    "ParallelText": ("root", "source", "target"),
    "PairFiles": ("train", "val"),
    "SageMakerTokens": ("train", "validation", "vocab"),
    "SyntheticSeries": ("frequency", "prediction_length", "context_length"),
    "SageMakerSeries": ("train", "frequency", "prediction_length", "context_length"),
    "WideSeries": ("path", "start", "frequency", "prediction_length", "context_length"),
    "DatedSeries": ("paths", "frequency", "prediction_length", "context_length"),
    "RowSeries": ("train", "test", "frequency", "prediction_length", "context_length"),
    "LongSeries": ("path", "frequency", "prediction_length", "context_length"),
}
GIVEN = {"prediction_length": "4", "context_length": "6", "paths": "[some/where]"}


@pytest.mark.parametrize("name", data.__all__)
def test_jsonargparse_instantiates_every_data_module(name):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    options = ["--data", f"dlref.data.{name}", "--data.init_args.batch_size", "7"]
    for required in REQUIRED[name]:
        options += [f"--data.init_args.{required}", GIVEN.get(required, "some/where")]
    module = parser.instantiate(parser.parse_args(options)).data
    assert module.batch_size == 7
    with pytest.raises(jsonargparse.ArgumentError):
        parser.parse_args([*options, "--data.init_args.no_such_option", "1"])


# Real data

REAL = os.environ.get("DLREF_DATA")
real = pytest.mark.skipif(not REAL, reason="needs DLREF_DATA, the folder of the real data sets")


@real
@pytest.mark.parametrize(
    ("module", "folder", "first_counts"),
    [(MNIST, "mnist", [980, 1135, 1032]), (FashionMNIST, "fashion-mnist", [1000, 1000, 1000])],
)
def test_the_real_mnist_sets_are_read(module, folder, first_counts):
    module = setup(module(os.path.join(REAL, folder)))
    assert {name: len(split) for name, split in module.splits.items()} == {
        "train": 55000,
        "val": 5000,
        "test": 10000,
    }
    assert module.splits["train"].images.shape[1:] == (1, 28, 28)
    assert torch.bincount(module.splits["test"].targets)[:3].tolist() == first_counts
    whole = torch.bincount(torch.cat([module.splits[name].targets for name in ("train", "val")]))
    assert whole[:3].tolist() == ([5923, 6742, 5958] if folder == "mnist" else [6000, 6000, 6000])


@real
def test_the_real_cifar10_set_is_read(tmp_path):
    root = pathlib.Path(REAL) / "cifar10"
    if (root / "cifar10_jpg.tar.gz").is_file():
        with tarfile.open(root / "cifar10_jpg.tar.gz") as tar:
            tar.extractall(tmp_path, filter="data")
        root = tmp_path
    module = setup(CIFAR10(root))
    assert {name: len(split) for name, split in module.splits.items()} == {
        "train": 45000,
        "val": 5000,
        "test": 10000,
    }
    assert torch.bincount(module.splits["test"].targets).tolist() == [1000] * 10
    whole = torch.cat([module.splits[name].targets for name in ("train", "val")])
    assert torch.bincount(whole).tolist() == [5000] * 10
    assert module.labels[:3] == ["airplane", "automobile", "bird"]
