"""Readers of dlref.data, given good, broken and arbitrary files."""

import gzip
import json
import os
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from refusals import answer_or_none, error_of

from dlref.data.cifar import RECORD, read_cifar_batch, read_class_names
from dlref.data.idx import read_idx, read_idx_pair
from dlref.data.listings import MAX_CLASSES, read_folder, read_image_manifest, read_lst

# tmp_path is one folder for all examples of a test: each example overwrites the same file.
quick = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


A_CLASS = "expected a class name"


# idx


@quick
@given(array=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, max_side=6)), zipped=st.booleans())
def test_an_idx_array_is_read_back_unchanged(tmp_path, array, zipped):
    path = tmp_path / ("a.gz" if zipped else "a")
    path.write_bytes(gzip.compress(idx_bytes(array), 1) if zipped else idx_bytes(array))
    np.testing.assert_array_equal(read_idx(path, array.ndim), array)


@quick
@given(content=st.binary(max_size=64), zipped=st.booleans(), named=st.booleans())
def test_arbitrary_bytes_in_an_idx_file_are_read_or_refused(tmp_path, content, zipped, named):
    path = tmp_path / ("a.gz" if named else "a")
    path.write_bytes(gzip.compress(content, 1) if zipped else content)
    answer_or_none(read_idx, path, 3)


@quick
@given(at=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 200), zipped=st.booleans())
def test_a_mutated_idx_file_is_read_or_refused(tmp_path, at, value, cut, zipped):
    content = idx_bytes(np.arange(2 * 5 * 6, dtype=np.uint8).reshape(2, 5, 6))
    content = bytearray(gzip.compress(content) if zipped else content)
    content[at % len(content)] = value
    path = tmp_path / ("a.gz" if zipped else "a")
    path.write_bytes(content[: len(content) - cut % len(content)])
    answer = answer_or_none(read_idx, path, 3)
    assert answer is None or answer.ndim == 3


@quick
@given(sizes=st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3), content=st.binary(max_size=20))
def test_an_idx_header_with_arbitrary_sizes_is_read_or_refused(tmp_path, sizes, content):
    path = tmp_path / "a"
    path.write_bytes(struct.pack(">4I", 0x0803, *sizes) + content)
    answer_or_none(read_idx, path, 3)


def test_a_broken_idx_file_is_refused_with_the_reason(tmp_path):
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(idx_bytes(np.zeros((2, 3, 3), np.uint8)))
    assert error_of(read_idx, path, 1) == f"{path}: magic number 2051; expected 2049 (labels, idx1)"
    path.write_bytes(idx_bytes(np.zeros((2, 3, 3), np.uint8)) + b"x")
    assert error_of(read_idx, path, 3) == f"{path}: more than 18 bytes after the header; expected 2 x 3 x 3 = 18"
    path.write_bytes(struct.pack(">4I", 0x0803, 2**32 - 1, 28, 28) + b"1234")
    assert "only 4 bytes after the header; expected 4294967295 x 28 x 28" in error_of(read_idx, path, 3)
    path.write_bytes(b"")
    assert error_of(read_idx, path, 3) == f"{path}: 0 bytes; expected a header of 16"
    assert "No such file" in error_of(read_idx, tmp_path / "none.gz", 3)
    assert "directory" in error_of(read_idx, tmp_path, 3)
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"abc")[:-2])
    assert "b.gz: unreadable (" in error_of(read_idx, tmp_path / "b.gz", 3)


def test_idx_files_that_do_not_form_a_valid_pair_are_refused(tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.write_bytes(idx_bytes(np.zeros((2, 3, 3), np.uint8)))
    labels.write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    assert error_of(read_idx_pair, images, labels, 10) == f"{labels}: 3 labels; expected 2, as in {images}"
    labels.write_bytes(idx_bytes(np.array([9, 10], np.uint8)))
    assert error_of(read_idx_pair, images, labels, 10) == f"{labels}: label 10 of image 1; expected 0 to 9"
    images.write_bytes(idx_bytes(np.zeros((0, 3, 3), np.uint8)))
    assert "sizes 0 x 3 x 3" in error_of(read_idx_pair, images, labels, 10)


# CIFAR-10


def test_a_cifar_batch_is_read_as_colour_planes(tmp_path):
    red = np.arange(1024) % 251
    record = np.concatenate([[7], red, red + 1, red + 2]).astype(np.uint8)
    (tmp_path / "b.bin").write_bytes(record.tobytes() * 2)
    images, labels = read_cifar_batch(tmp_path / "b.bin")
    assert images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [7, 7]
    assert images[1, :, 0, 5].tolist() == [5, 6, 7]
    assert images[1, 0, 2, 3] == 2 * 32 + 3


@quick
@given(
    content=st.binary(max_size=100),
    length=st.sampled_from([0, 1, RECORD - 1, RECORD, 2 * RECORD, 2 * RECORD + 1]),
)
def test_arbitrary_bytes_in_cifar_files_are_read_or_refused(tmp_path, content, length):
    path = tmp_path / "b.bin"
    path.write_bytes((content + bytes(length))[: max(length, len(content))])
    answer_or_none(read_cifar_batch, path)
    answer_or_none(read_class_names, path)


def test_broken_cifar_files_are_refused_with_the_reason(tmp_path):
    path = tmp_path / "b.bin"
    path.write_bytes(b"\x0a" + bytes(RECORD - 1))
    assert error_of(read_cifar_batch, path) == f"{path}: label 10 of image 0; expected 0 to 9"
    path.write_bytes(bytes(RECORD + 1))
    assert f"{path}: 3074 bytes; expected records of 3073" in error_of(read_cifar_batch, path)
    path.write_text("cat\ndog\n")
    assert error_of(read_class_names, path) == f"{path}: 2 class names; expected 10, one a line"


# .lst


def test_an_lst_file_with_class_ids_is_read(tmp_path):
    path = tmp_path / "a.lst"
    path.write_text("5\t1\tdogs/1.jpg\r\n\n1000\t0.000000\tcats/ü 1.jpg\n22\t3\tx.png")
    listing = read_lst(path, "data")
    assert listing.images == ["data/dogs/1.jpg", "data/cats/ü 1.jpg", "data/x.png"]
    assert listing.targets.tolist() == [1, 0, 3]
    assert listing.targets.dtype == torch.int64
    assert listing.classes == ["0", "1", "2", "3"]
    assert not listing.multi_label
    assert read_lst(path, "data", list("abcd")).classes == list("abcd")
    path.write_text("0\t0\ta.jpg\n")
    assert read_lst(path, "data").classes == ["0"]


def test_an_lst_file_with_multi_hot_labels_is_read(tmp_path):
    path = tmp_path / "a.lst"
    path.write_text("0\t1\t0.0\t1\ta.jpg\n1\t0\t0\t0\tb.jpg\n")
    listing = read_lst(path, tmp_path)
    assert listing.targets.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert listing.targets.dtype == torch.float32
    assert listing.classes == ["0", "1", "2"]
    assert listing.multi_label


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": no lines; expected an image on each"),
        ("0\t1\ta.jpg\n1 1 b.jpg\n", ":2: 1 tab-separated fields; expected index, label(s) and path"),
        ("0\ta.jpg\n", ":1: 2 tab-separated fields; expected index, label(s) and path"),
        ("x\t1\ta.jpg\n", ":1: index 'x'; expected a whole number"),
        ("0\tcat\ta.jpg\n", ":1: label 1 is 'cat'; expected a class id, or 0 or 1"),
        ("0\t0.5\ta.jpg\n", ":1: label 1 is '0.5'; expected a class id, or 0 or 1"),
        ("0\t-1\ta.jpg\n", ":1: label 1 is '-1'; expected a class id, or 0 or 1"),
        ("0\t1\t0\ta.jpg\n\n1\t1\t2\tb.jpg\n", ":3: label [1, 2]; expected 2 values, 0 or 1 each"),
        ("0\t1\t0\ta.jpg\n1\t1\t1\t0\tb.jpg\n", ":2: label [1, 1, 0]; expected 2 values, 0 or 1 each"),
        ("0\t1\ta.jpg\n1\t1\t0\tb.jpg\n", ":2: label [1, 0]; expected one like 1"),
        ("0\t1\t\n", ":1: image ''; expected a path"),
        ("0\t4000000\ta.jpg\n", f":1: label needs 4000001 classes; expected 1 to {MAX_CLASSES}"),
    ],
)
def test_a_broken_lst_file_is_refused_with_the_reason(tmp_path, text, message):
    path = tmp_path / "a.lst"
    path.write_text(text, newline="")
    assert error_of(read_lst, path, ".") == f"{path}{message}"


def test_lst_labels_outside_the_given_classes_and_unreadable_files_are_refused(tmp_path):
    path = tmp_path / "a.lst"
    path.write_text("0\t2\ta.jpg\n")
    assert error_of(read_lst, path, ".", ["cat", "dog"]) == f"{path}:1: label 2; expected ids from 0 to 1"
    path.write_bytes(b"0\t2\t\xff.jpg\n")
    assert "not UTF-8" in error_of(read_lst, path, ".")
    assert "No such file" in error_of(read_lst, tmp_path / "b.lst", ".")


@quick
@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from("\t\n01.")) | st.binary())
def test_an_arbitrary_lst_file_is_read_or_refused(tmp_path, text):
    path = tmp_path / "a.lst"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    answer_or_none(read_lst, path, ".")


@quick
@given(labels=st.lists(st.text("01239. -e\t", min_size=1, max_size=12), min_size=1, max_size=4))
def test_arbitrary_lst_labels_are_read_or_refused(tmp_path, labels):
    path = tmp_path / "a.lst"
    path.write_text("".join(f"{i}\t{label}\t{i}.jpg\n" for i, label in enumerate(labels)))
    listing = answer_or_none(read_lst, path, ".")
    assert listing is None or len(listing.images) == len(listing.targets) == len(labels)


# Augmented manifest


def write_manifest(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_a_manifest_as_written_by_ground_truth_is_read(tmp_path):
    path = write_manifest(
        tmp_path / "a.manifest",
        {"source-ref": "2.jpg", "sport": 1, "sport-metadata": {"class-name": "tennis", "confidence": 0.9}},
        {"source-ref": "sub/1.jpg", "sport": 0, "sport-metadata": {"class-name": "football"}},
        {"source-ref": "3.jpg", "sport": "3"},
    )
    listing = read_image_manifest(path)
    assert listing.images == [str(tmp_path / name) for name in ("2.jpg", "sub/1.jpg", "3.jpg")]
    assert listing.targets.tolist() == [1, 0, 3]
    assert listing.classes == ["football", "tennis", "2", "3"]
    assert read_image_manifest(path, root="elsewhere").images[0] == "elsewhere/2.jpg"


def test_manifests_with_multi_hot_labels_or_lists_of_class_ids_are_read(tmp_path):
    names = {"class-map": {"0": "person", "1": "bicycle"}}
    hot = write_manifest(
        tmp_path / "hot",
        {"source-ref": "a.jpg", "c": [1, 0], "c-metadata": names},
        {"source-ref": "b.jpg", "c": [0, 1]},
    )
    listing = read_image_manifest(hot)
    assert listing.targets.tolist() == [[1, 0], [0, 1]]
    assert listing.targets.dtype == torch.float32
    assert listing.classes == ["person", "bicycle"]
    kind = {"type": "groundtruth/image-classification-multilabel"}
    ids = write_manifest(
        tmp_path / "ids",
        {"source-ref": "a.jpg", "c": [1, 0], "c-metadata": names | kind},
        {"source-ref": "b.jpg", "c": [3], "c-metadata": {"class-map": {"3": "hat"}} | kind},
        {"source-ref": "c.jpg", "c": [], "c-metadata": kind},
    )
    listing = read_image_manifest(ids)
    assert listing.targets.tolist() == [[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert listing.classes == ["person", "bicycle", "2", "hat"]
    assert listing.multi_label


def test_multi_hot_labels_without_a_value_for_a_named_class_are_refused(tmp_path):
    """Such as lists of class ids whose metadata have no type: read as one column, every dog would be no cat."""
    names = {"class-map": {"0": "cat", "1": "dog"}}
    path = write_manifest(
        tmp_path / "m",
        {"source-ref": "a.jpg", "c": [0], "c-metadata": names},
        {"source-ref": "b.jpg", "c": [1], "c-metadata": names},
    )
    assert "m: class 1, 'dog': labels have 1 values; expected one for each class" in error_of(read_image_manifest, path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "'[]'; expected one JSON object"),
        (
            {"source-ref": "s3://b/a.jpg", "c": 0},
            "source-ref 's3://b/a.jpg'; expected a path: download the images first",
        ),
        ({"c": 0}, "source-ref None; expected the path of an image"),
        ({"source-ref": "a.jpg"}, "c None; expected a class id or a list of 0 and 1"),
        ({"source-ref": "a.jpg", "c": True}, "c True; expected a class id or a list of 0 and 1"),
        ({"source-ref": "a.jpg", "c": -1}, "c -1; expected a class id or a list of 0 and 1"),
        ({"source-ref": "a.jpg", "c": [0.5, 1]}, "c [0.5, 1]; expected a class id or a list of 0 and 1"),
        ({"source-ref": "a.jpg", "c": [1, 0]}, "label [1, 0]; expected one like 0"),
        (
            {"source-ref": "a.jpg", "c": 10**30},
            f"label needs {10**30 + 1} classes; expected 1 to {MAX_CLASSES}",
        ),
        ({"source-ref": "a\nb", "c": 1}, "image 'a\\nb'; expected a path"),
        (
            {"source-ref": "a.jpg", "c": 0, "c-metadata": {"class-name": "dog"}},
            "class 0: 'dog'; expected 'cat', as before",
        ),
        ({"source-ref": "a.jpg", "c": 0, "c-metadata": 3}, "metadata 3; expected an object"),
        *(
            ({"source-ref": "a.jpg", "c": 1, "c-metadata": {"class-name": name}}, f"class 1: name {name!r}; {A_CLASS}")
            for name in ("smile\ud83d", "", "a\nb", 3)
        ),
    ],
)
def test_a_broken_manifest_entry_is_refused_with_the_reason(tmp_path, entry, message):
    first = {"source-ref": "a.jpg", "c": 0, "c-metadata": {"class-name": "cat"}}
    path = write_manifest(tmp_path / "a", first, entry)
    assert error_of(read_image_manifest, path).removeprefix(f"{path}:2: ").replace("'c'", "c") == message


def test_a_class_folder_whose_name_is_not_utf_8_is_refused(tmp_path):
    os.makedirs(os.fsencode(tmp_path) + b"/caf\xe9")
    assert error_of(read_folder, tmp_path) == f"{tmp_path}: name 'caf\\udce9'; {A_CLASS}"


def test_the_label_attribute_selects_one_of_several_labels_in_a_manifest(tmp_path):
    path = write_manifest(tmp_path / "a", {"source-ref": "a.jpg", "x": 0, "y": 2})
    assert "attributes ['x', 'y']; expected one" in error_of(read_image_manifest, path)
    assert read_image_manifest(path, label_attribute="y").targets.tolist() == [2]
    assert "expected ids from 0 to 1" in error_of(read_image_manifest, path, None, "y", ["cat", "dog"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@quick
@given(
    entries=st.lists(
        st.fixed_dictionaries(
            {"source-ref": st.just("a.jpg") | json_values, "c": st.integers(0, 5) | json_values},
            optional={
                "c-metadata": json_values
                | st.fixed_dictionaries(
                    {"type": st.just("x-multilabel")},
                    optional={"class-map": json_values, "class-name": json_values},
                )
            },
        )
        | json_values,
        max_size=3,
    )
)
def test_arbitrary_manifest_values_are_read_or_refused(tmp_path, entries):
    listing = answer_or_none(read_image_manifest, write_manifest(tmp_path / "a", *entries))
    assert listing is None or len(listing.images) == len(listing.targets)


@quick
@given(content=st.binary() | st.text(st.sampled_from('{}[]":,0aé\n\\')).map(str.encode))
def test_arbitrary_bytes_in_a_manifest_are_read_or_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    answer_or_none(read_image_manifest, tmp_path / "a")


def test_a_manifest_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "a").write_text("[" * 100_000)
    assert "expected one JSON object" in error_of(read_image_manifest, tmp_path / "a")


# Class folders


def test_class_folders_are_read_and_other_files_are_told(tmp_path):
    for name in (
        "dog/b.JPG",
        "dog/a.png",
        "cat/c.webp",
        "dog/notes.txt",
        "dog/.DS_Store",
        "readme.md",
        ".hidden/x",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"not .*: 1 \.md, 1 \.txt: ") as warned:
        listing = read_folder(tmp_path)
    assert listing.images == [str(tmp_path / name) for name in ("cat/c.webp", "dog/a.png", "dog/b.JPG")]
    assert listing.targets.tolist() == [0, 1, 1]
    assert listing.classes == ["cat", "dog"]
    assert str(warned[0].message).endswith(f": {tmp_path}/readme.md, {tmp_path}/dog/notes.txt")
    with pytest.warns(UserWarning, match="left out"):
        assert read_folder(tmp_path, ["ant", "cat", "dog"]).targets.tolist() == [1, 2, 2]


def test_missing_empty_and_unknown_class_folders_are_refused(tmp_path):
    assert "no folders; expected one for each class" in error_of(read_folder, tmp_path)
    assert "No such file" in error_of(read_folder, tmp_path / "train")
    (tmp_path / "cat").mkdir()
    assert f"{tmp_path}/cat: no images" in error_of(read_folder, tmp_path)
    assert f"{tmp_path}/cat: not a class of train" in error_of(read_folder, tmp_path, ["dog"])
