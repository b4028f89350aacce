"""Language modelling: texts as tokens, losses, parameter groups, graphs against PyTorch, generation at the edge."""

import gzip
import io
import json
import lzma
import math
import re
from collections import deque
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from refusals import error_of
from test_detection import fit
from test_tasks import sgd
from torch import nn
from torch.nn import functional as F

from dlref.data import PythonSources, TextFiles, TokenFiles, tokens
from dlref.data.language import LanguageData, Texts, cut, split_of
from dlref.data.make_tokens import main
from dlref.data.tokens import RandomStarts, Windows, open_tokens, texts_of, tokenizer_of, unknown_in
from dlref.data.vocabulary import make_exact, tokenizers_of_run
from dlref.export.convert import Plan, convert, is_quantised
from dlref.export.graph import example_at, first_sizes, trace_sizes, write_onnx
from dlref.export.targets import TARGETS
from dlref.export.verify import Reference, parity
from dlref.models import GPT
from dlref.runtime import UserError, make_runner
from dlref.runtime.bundle import OnnxGraph
from dlref.runtime.text import END, SPECIAL, UNKNOWN, make_tokenizer
from dlref.tasks import LanguageModel, MuonAdamW
from dlref.tasks.cross_entropy import nll_and_gradient
from dlref.tasks.language_modelling import IGNORE, TokenNLL
from dlref.training.facts import check_rows

BYTE = {"kind": "byte", "exact": True}
KINDS = ("byte", "character", "bpe")
SENTENCES = "The cat sat on the mat. A dog, über-fast, ran: 1 2 3!\n" * 30


# Texts


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(text=st.text(alphabet=sorted(set(SENTENCES)), max_size=50))
def test_tokens_spell_the_encoded_text(kind, text):
    tokenizer = make_tokenizer(make_exact([SENTENCES], kind, 300))
    tokens = tokenizer.encode(text)
    assert b"".join(tokenizer.spelling[token] for token in tokens) == text.encode()
    assert max(tokens, default=0) < len(tokenizer) == len(tokenizer.spelling)
    assert len(tokenizer.pieces(tokens)) == len(tokens)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@settings(max_examples=100)
@given(text=st.text(max_size=30))
def test_byte_and_bpe_tokens_spell_any_text(kind, text):
    text = text.encode("utf-8", "ignore").decode()
    tokenizer = make_tokenizer(make_exact([SENTENCES], kind, 300))
    assert b"".join(tokenizer.spelling[token] for token in tokenizer.encode(text)).decode() == text


def gpt2_like(path, **options):
    """Save and return a tokeniser in the published form of GPT-2's: the same algorithm, the end token last."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([SENTENCES], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(path))
    return made


def test_a_gpt2_tokeniser_file_is_read(tmp_path):
    theirs = gpt2_like(tmp_path / "tokenizer.json")
    ours = make_tokenizer(tokenizer_of(str(tmp_path / "tokenizer.json"), [], 0))
    text = " A dog <|endoftext|> ran\n"
    assert ours.end == theirs.token_to_id("<|endoftext|>") == len(ours) - 1
    assert ours.end not in ours.encode(text)
    assert b"".join(ours.spelling[token] for token in ours.encode(text)).decode() == text
    assert ours.encode("The cat") == theirs.encode("The cat").ids
    assert ours.spelling[ours.end] == b""


def unregistered(known):
    """Make the end token an ordinary entry of the vocabulary, as in files made of GPT-2's vocab.json and merges.txt."""
    (end,) = known.pop("added_tokens")
    known["model"]["vocab"][end["content"]], known["added_tokens"] = end["id"], []


def added_plainly(known):
    """Register the end token without marking it as special."""
    known["added_tokens"][0]["special"] = False


@pytest.mark.parametrize("change", [unregistered, added_plainly])
def test_an_end_token_that_is_not_special_has_no_bytes_either(tmp_path, change):
    ours = make_tokenizer(tokenizer_of(str(changed_file(tmp_path, change)), [], 0))
    assert ours.spelling[ours.end] == b""
    assert ours.encode("A dog") == gpt2_like(tmp_path / "other.json").encode("A dog").ids


def test_an_ordinary_token_of_html_does_not_end_texts(tmp_path):
    def change(known):
        known["model"]["vocab"]["</s>"] = known["added_tokens"][0]["id"]
        known["added_tokens"][0]["id"] += 1

    ours = make_tokenizer(tokenizer_of(str(changed_file(tmp_path, change)), [], 0))
    assert ours.tokenizer.id_to_token(ours.end) == "<|endoftext|>"
    assert ours.spelling[ours.end - 1] == b"</s>"

    def without_special(known):
        change(known)
        unregistered(known)

    ours = make_tokenizer(tokenizer_of(str(changed_file(tmp_path, without_special)), [], 0))
    assert ours.tokenizer.id_to_token(ours.end) == "<|endoftext|>"


def test_a_text_always_has_the_same_tokens_even_with_dropout_in_the_tokeniser_file(tmp_path):
    def change(known):
        known["model"]["dropout"] = 0.5

    ours = make_tokenizer(tokenizer_of(str(changed_file(tmp_path, change)), [], 0))
    assert len({tuple(ours.encode("The cat sat on the mat")) for _ in range(20)}) == 1


def renamed(model, letter, other):
    """Remove one of the byte tokens from a model's vocabulary."""
    model["vocab"][other] = model["vocab"].pop(letter)
    model["merges"] = [pair for pair in model["merges"] if not any(letter in part for part in pair)]


def removing(before):
    """Return a pre-tokeniser that drops the characters it splits at."""
    split = {"type": "Split", "pattern": {"String": "="}, "behavior": "Removed", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, before]}


def test_truncation_padding_and_added_tokens_of_a_tokeniser_do_not_change_texts(tmp_path):
    """Truncation and padding must be ignored; an added token that is not special is part of the text."""

    def change(known):
        known["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        known["padding"] = {"strategy": {"Fixed": 200}, "direction": "Right", "pad_to_multiple_of": None}
        known["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
        added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
        known["added_tokens"].append({"id": len(known["model"]["vocab"]) + 1, "content": "<think>", **added})

    tokenizer = make_tokenizer(tokenizer_of(str(changed_file(tmp_path, change)), [], 0))
    text = "a <think> b " * 9
    assert b"".join(tokenizer.spelling[token] for token in tokenizer.encode(text)).decode() == text


def test_a_text_that_the_tokeniser_would_change_is_refused(tmp_path):
    def change(known):
        known["pre_tokenizer"] = removing(known["pre_tokenizer"])
        known["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"String": "qq"}

    described = tokenizer_of(str(changed_file(tmp_path, change)), [], 0)
    (tmp_path / "a.txt").write_text(SENTENCES + "a qq b" + SENTENCES)
    data = TextFiles("a.txt", root=str(tmp_path), tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"b'qq b.*becomes b' b.*expected the text unchanged"):
        data.setup()
    assert make_tokenizer(described).encode("a b")


def changed_file(tmp_path, change):
    gpt2_like(tmp_path / "tokenizer.json")
    known = json.loads((tmp_path / "tokenizer.json").read_text())
    change(known)
    (tmp_path / "tokenizer.json").write_text(json.dumps(known))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda known: known.update(normalizer={"type": "Lowercase"}), "b'Stra.*expected the text unchanged"),
        (lambda known: known.update(normalizer={"type": "NFC"}), "expected the text unchanged"),
        (lambda known: known.update(normalizer={"type": "NFKC"}), "expected the text unchanged"),
        (lambda known: renamed(known["model"], "Ã", "zz"), "expected the text unchanged"),
        (lambda known: known.update(pre_tokenizer=removing(known["pre_tokenizer"])), "expected the text unchanged"),
        (lambda known: known.update(added_tokens=[]), "expected </s> or <|endoftext|>"),
        (lambda known: known.update(pre_tokenizer={"type": "Whitespace"}), "expected"),
        (lambda known: known.pop("model"), "expected one of the package tokenizers"),
        (lambda known: known["model"]["vocab"].update({"字": 300}), "expected GPT-2's bytes"),
    ],
)
def test_an_unsuitable_tokeniser_file_is_refused(tmp_path, change, complaint):
    with pytest.raises(UserError, match=complaint.replace("|", r"\|")) as error:
        tokenizer_of(str(changed_file(tmp_path, change)), [], 0)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "expected one of the package tokenizers"),
        ("[]", "expected one of the package tokenizers"),
        ('{"kind": "word", "tokens": ["<pad>", "<unk>", "<s>", "</s>"]}', "a tokeniser that changes texts"),
        ('{"kind": "character", "exact": true, "tokens": ["a"]}', "tokeniser of kind 'character'"),
    ],
)
def test_a_file_that_is_not_a_tokeniser_is_refused(tmp_path, content, complaint):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=complaint):
        tokenizer_of(str(tmp_path / "tokenizer.json"), [], 0)


def test_texts_are_whole_files_or_lines_of_jsonl(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/two.txt").write_bytes(b"two\r\n")
    (tmp_path / "one.txt").write_bytes(" öne\n".encode())
    with gzip.open(tmp_path / "three.jsonl.gz", "wt") as file:
        file.write('{"text": "x"}\n{"text": "", "more": 1}\n')
    assert list(texts_of(f"{tmp_path}/**/*.txt")) == [
        (f"{tmp_path}/b/two.txt", "two\r\n"),
        (f"{tmp_path}/one.txt", " öne\n"),
    ]
    assert [text for _, text in texts_of(f"{tmp_path}/three.jsonl.gz")] == ["x", ""]
    (tmp_path / "FOUR.JSONL").write_text('{"text": "y"}\n')
    assert [text for _, text in texts_of(f"{tmp_path}/FOUR.JSONL")] == ["y"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"abc\xffd", "a.txt: byte 3 is 0xff, not UTF-8; expected text in UTF-8"),
        ("a.txt", "é".encode("latin-1"), "a.txt: byte 0 is 0xe9, not UTF-8"),
        ("a.txt.gz", b"no gzip", "a.txt.gz: unreadable"),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-9], "a.txt.gz: unreadable"),
        ("a.jsonl", b'{"text": "x"}\nno\n', "a.jsonl:2: 'no'; expected one JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl:1: text: NoneType; expected a text"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: text: int; expected a text"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl:1: half of a surrogate pair"),
        ("a.jsonl", b'{"text": ""}\n{"text": "\xff"}\n', "a.jsonl:2: byte 10 is 0xff, not UTF-8"),
        ("a.txt", b"", "no text in its files; expected some"),
        ("a.txt", b"abc", "a.*: 4 tokens; expected at least 17"),
        ("b.txt", b"abc", "no such file; expected the name of a text, or a pattern"),
    ],
)
def test_a_broken_text_is_refused_with_its_location(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "val").write_text("to validate on")
    data = TextFiles("a.*", "val", root=str(tmp_path), tokenizer="byte", context_length=16)
    with pytest.raises(UserError) as error:
        data.setup()
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"context_length": 7}, "context_length: 7; expected at least 8"),
        ({"batch_size": 0}, "batch_size"),
        ({"batches": 0}, "batches"),
        ({"vocabulary_size": 100}, "vocabulary_size: 100; expected at least 260"),
        ({"tokenizer": "words"}, "tokenizer: words; expected byte, character, bpe, a file"),
        ({"val": "none/*.txt"}, "none/*.txt: no such file"),
    ],
)
def test_invalid_options_of_text_files_are_refused(tmp_path, options, complaint):
    (tmp_path / "a.txt").write_text(SENTENCES)
    with pytest.raises(UserError) as error:
        TextFiles(**{"train": "a.txt", "root": str(tmp_path), "context_length": 16} | options).setup()
    assert complaint in str(error.value)


def module(tmp_path, text=SENTENCES, **options):
    (tmp_path / "a.txt").write_text(text)
    data = TextFiles(**{"train": "a.txt", "root": str(tmp_path), "tokenizer": "byte", "context_length": 16} | options)
    data.setup()
    return data


def test_the_last_tenth_of_a_text_is_held_out_for_validation(tmp_path):
    data = module(tmp_path)
    spelling = data.tokenizer.spelling
    train, val = (
        b"".join(spelling[token] for token in data.splits[split].tokens.tolist()).decode() for split in ("train", "val")
    )
    assert train + val == SENTENCES
    assert len(val) == math.ceil(len(SENTENCES) / 10)
    assert data.splits["val"].tokens[0] == END
    assert torch.equal(data.splits["val"].tokens, data.splits["test"].tokens)


OWN = "a text of its own " * 9


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        ({"train": OWN}, "train: one text; expected a list of texts"),
        ({"train": [OWN, "\ud800"]}, "train: text 2: half of a surrogate pair, or not UTF-8; expected Unicode text"),
        ({"train": iter([OWN, OWN])}, "train: list_iterator; expected a list of texts"),
        ({"train": [OWN], "val": [OWN, OWN.encode()]}, "val: text 2: bytes; expected a text"),
        ({"val": [OWN]}, "the data has no split train; expected train, val and test"),
    ],
)
def test_texts_of_ones_own_in_another_form_are_refused(texts, complaint):
    class Own(Texts):
        def texts(self):
            return texts

    assert error_of(Own(tokenizer="byte", context_length=8).setup) == complaint


@pytest.mark.parametrize("kind", [tuple, np.array, deque, lambda texts: dict(enumerate(texts)).values()])
def test_texts_of_ones_own_may_be_in_any_collection(kind):
    class Own(Texts):
        def texts(self):
            return dict.fromkeys(("train", "val", "test"), kind([OWN, OWN]))

    data = Own(tokenizer="byte", context_length=8)
    data.setup()
    assert len(data.splits["train"].tokens) == 2 * (1 + len(OWN))


ROW = torch.arange(4, 44)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"val": ROW + 217}, "val: token 39 is 260; expected 0 to 259, the tokens of its tokeniser"),
        ({"train": ROW - 5}, "train: token 0 is -1; expected 0 to 259, the tokens of its tokeniser"),
        ({"train": ROW.tolist()}, "train: list; expected a tensor of whole numbers (N), one row of tokens"),
        ({"test": ROW.float()}, "test: torch.float32 [40]; expected a tensor of whole numbers (N), one row of tokens"),
        ({"test": ROW[None]}, "test: torch.int64 [1, 40]; expected a tensor of whole numbers (N), one row of tokens"),
    ],
)
def test_tokens_of_ones_own_outside_the_vocabulary_or_in_another_form_are_refused(changes, complaint):
    class Own(LanguageData):
        def read(self):
            return BYTE, dict.fromkeys(("train", "val", "test"), ROW) | changes

    assert error_of(Own(context_length=8).setup) == complaint


@pytest.mark.parametrize("kind", ["word", "character"])
def test_a_tokeniser_of_ones_own_that_changes_texts_is_refused(kind):
    class Own(LanguageData):
        def read(self):
            return {"kind": kind, "tokens": [*SPECIAL, "a"]}, dict.fromkeys(("train", "val", "test"), ROW * 0 + 4)

    assert error_of(Own(context_length=8).setup).startswith("vocabulary: a tokeniser that changes texts; expected one")


def test_evaluation_batches_hold_at_least_two_windows():
    for context, count in ((1024, 8), (4096, 2), (8192, 2)):
        assert TextFiles("a.txt", context_length=context).eval_batch_size("val") == count


@given(st.lists(st.text(max_size=9), max_size=6), st.floats(0, 1))
def test_cutting_texts_loses_nothing_and_keeps_the_share(texts, share):
    first, last = cut(texts, share)
    assert "".join(first + last) == "".join(texts)
    assert len("".join(last)) == pytest.approx(share * len("".join(texts)), abs=1)


def test_separate_test_texts_and_token_files_are_used(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(40 * name)
        np.array([make_tokenizer(BYTE).encode(40 * name)], np.uint16).tofile(tmp_path / f"{name}.bin")
    (tmp_path / "tokenizer.json").write_text(json.dumps(BYTE))
    texts = TextFiles("a.txt", "b.txt", "c.txt", root=str(tmp_path), tokenizer="byte", context_length=8)
    files = TokenFiles(str(tmp_path), "a.bin", "b.bin", "c.bin", context_length=8)
    for data in (texts, files):
        data.setup()
        assert [data.splits[split].tokens[-1].item() for split in ("train", "val", "test")] == [101, 102, 103]
    with pytest.warns(UserWarning, match="^val: 1 of 1 files are among those of train$"):
        TokenFiles(str(tmp_path), "a.bin", "a.bin", "c.bin", context_length=8).setup()


def test_file_names_may_contain_brackets_and_folders_are_left_out(tmp_path):
    (tmp_path / "[1]").mkdir()
    (tmp_path / "[1]/x[2].txt").write_text(SENTENCES)
    (tmp_path / "[1]/folder.txt").mkdir()
    for pattern in ("x[2].txt", "*.txt"):
        data = TextFiles(pattern, root=str(tmp_path / "[1]"), tokenizer="byte", context_length=16)
        assert "".join(data.texts()["train"]) == SENTENCES[: int(0.9 * len(SENTENCES))]


def test_long_texts_are_encoded_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 10)
    data = module(tmp_path, tokenizer="bpe", vocabulary_size=300)
    spelling = data.tokenizer.spelling
    row = data.splits["train"].tokens.tolist()
    assert row.count(END) == 1
    assert b"".join(spelling[token] for token in row).decode() == SENTENCES[: int(0.9 * len(SENTENCES))]


def test_evaluation_windows_predict_each_token_once(tmp_path):
    data = module(tmp_path)
    tokens = data.splits["val"].tokens.long()
    batch = torch.cat(list(data.val_dataloader()))
    assert len(batch) == len(data.val_dataloader().dataset)
    after = batch[:, 1:]
    assert torch.equal(after[after != IGNORE], tokens[1:])
    assert torch.equal(batch[1:, 0], batch[:-1, -1])
    assert [len(Windows(torch.arange(count), 16)) for count in (2, 17, 18)] == [1, 1, 2]


def test_training_windows_are_parts_of_the_text(tmp_path):
    data = module(tmp_path, batch_size=7, batches=11)
    tokens = data.splits["train"].tokens
    batches = list(data.train_dataloader())
    assert [batch.shape for batch in batches] == [(7, 17)] * 11
    windows = {tuple(window.tolist()) for window in tokens.unfold(0, 17, 1)}
    assert {tuple(row.tolist()) for batch in batches for row in batch} <= windows
    starts = torch.cat(list(RandomStarts(5, 100, 10).draw(torch.Generator())))
    assert set(starts.tolist()) == set(range(5))


def test_texts_are_separated_by_the_end_token_and_repeats_in_val_are_reported(tmp_path):
    (tmp_path / "b.txt").write_text("bb")
    with pytest.warns(UserWarning, match=r"^val: 1 of 1 texts are among those of train$"):
        data = module(tmp_path, train="*.txt", val="b.txt")
    train = data.splits["train"].tokens
    assert (train == END).nonzero().flatten().tolist() == [0, len(train) - 3]
    assert data.splits["val"].tokens.tolist() == [END, *data.tokenizer.encode("bb")]


def test_unknown_characters_cause_a_warning(tmp_path):
    for name in ("b.txt", "c.txt"):
        (tmp_path / name).write_text("a§§")
    told = "{}: 2 characters are not in the vocabulary"
    with pytest.warns(UserWarning, match=told.format("val")), pytest.warns(UserWarning, match=told.format("test")):
        module(tmp_path, val="b.txt", test="c.txt", tokenizer="character")
    assert unknown_in(np.array([UNKNOWN]), make_tokenizer(BYTE)) == 0  # GPT-2 has a quotation mark there


def test_gzip_and_xz_baselines_match_python(tmp_path):
    data = module(tmp_path, tokenizer="bpe", vocabulary_size=300)
    text = SENTENCES[int(0.9 * len(SENTENCES)) :].encode()
    assert data.compressed("val") == {
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }


def test_default_prompts_are_beginnings_of_test_windows(tmp_path):
    data = module(tmp_path)
    assert data.sources()[0] == SENTENCES[int(0.9 * len(SENTENCES)) :][:7]
    assert list(data.predict_dataloader()) == list(data.sources())
    assert list(module(tmp_path, prompts=["The"]).predict_dataloader()) == ["The"]


def test_python_sources_are_split_by_file_and_exclude_tests(tmp_path):
    for i in range(60):
        folder = tmp_path / ("test" if i % 10 == 0 else "package")
        folder.mkdir(exist_ok=True)
        (folder / f"m{i}.py").write_text(f"x{i} = {i}\n" * 3)
    (tmp_path / "package/latin.py").write_bytes(b"\xe9")
    with pytest.warns(UserWarning, match="1 files are not in UTF-8"):
        found = PythonSources(root=str(tmp_path)).texts()
    numbers = {split: {int(text.split()[0][1:]) for text in texts} for split, texts in found.items()}
    assert sorted(n for known in numbers.values() for n in known) == [i for i in range(60) if i % 10]
    for split, known in numbers.items():
        assert {split_of(f"package/m{i}.py") for i in known} <= {split}
    with pytest.raises(UserError, match="no sources in it"):
        PythonSources(root=str(tmp_path / "none")).texts()


def test_sources_of_the_running_python_are_found():
    data = PythonSources()
    texts = data.texts()
    assert all(len(texts[split]) > 10 for split in ("train", "val", "test"))
    assert sum(map(len, texts["train"])) > 4_000_000


# Files of tokens


@pytest.mark.parametrize("kind", KINDS)
def test_token_files_hold_the_same_tokens_as_text_files(tmp_path, capsys, kind):
    (tmp_path / "a.txt").write_text(SENTENCES)
    (tmp_path / "b.txt").write_text("The end.")
    arguments = ["tokens", "--train", "[a]*.txt", "--val", "b.txt", "--tokenizer", kind, "--vocabulary-size", "300"]
    assert main([str(tmp_path / "tokens"), *(str(tmp_path / a) if ".txt" in a else a for a in arguments[1:])]) == 0
    files = TokenFiles(str(tmp_path / "tokens"), context_length=8)
    files.setup()
    made = (f"{split}: {len(files.splits[split].tokens)} tokens" for split in ("train", "val"))
    assert capsys.readouterr().out.splitlines()[:2] == [*made]
    texts = module(tmp_path, train="[a]*.txt", val="b.txt", tokenizer=kind, vocabulary_size=300, context_length=8)
    assert files.vocabulary == texts.vocabulary
    for split in ("train", "val", "test"):
        assert torch.equal(files.splits[split].tokens.long(), texts.splits[split].tokens.long())
    batch = next(iter(files.train_dataloader()))
    assert batch.dtype == torch.long
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == ["tokenizer.json", "train.bin", "val.bin"]


def test_token_files_are_opened_as_uint16_and_read_in_windows(tmp_path):
    np.arange(4, 204, dtype=np.uint16).tofile(tmp_path / "train.bin")
    tokens = open_tokens(tmp_path / "train.bin", make_tokenizer(BYTE))
    assert tokens.dtype == torch.uint16
    assert Windows(tokens, 3)[torch.tensor([5, 198])].tolist() == [[9, 10, 11, 12], [202, 203, IGNORE, IGNORE]]


def test_the_tokeniser_of_bytes_does_not_depend_on_the_texts():
    assert make_exact(["abc"], "byte", 300) == make_exact([], "byte", 0) == BYTE


def test_tokens_of_up_to_65536_kinds_take_16_bits_and_others_32(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK", 2)
    path = tmp_path / "train.bin"
    for size, kind in ((1 << 16, np.uint16), ((1 << 16) + 1, np.int32)):
        ends = np.array([0, size - 1], kind)
        ends.tofile(path)
        assert open_tokens(path, range(size)).tolist() == ends.tolist()
    for wrong, place in ((-1, 0), (size, 0), (-1, 3), (size, 3)):
        row = np.arange(6, dtype=np.int32)
        row[[place, 5]] = wrong
        row.tofile(path)
        with pytest.raises(UserError, match=f"token {place} is {wrong}; expected 0 to 65536"):
            open_tokens(path, range(size))


def saved(array):
    """Return the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "train.bin: 0 bytes; expected tokens of 2 bytes each"),
        (b"abc", "train.bin: 3 bytes; expected tokens of 2 bytes each"),
        (np.array([1, 2, 260, 3], np.uint16).tobytes(), "train.bin: token 2 is 260; expected 0 to 259"),
        (None, "train.bin: unreadable (No such file or directory)"),
        (
            saved(np.arange(4, 204, dtype=np.uint16)),
            "a file of numpy.save; expected tokens of 16 bits and nothing",
        ),
        (np.arange(4, 204, dtype=np.int32).tobytes(), "train.bin: every second token is 0, as with 32 bits each"),
        (np.arange(4, 204, dtype=np.int64).tobytes(), "train.bin: every second token is 0, as with 32 bits each"),
    ],
)
def test_a_broken_token_file_is_refused(tmp_path, content, complaint):
    (tmp_path / "tokenizer.json").write_text(json.dumps(BYTE))
    np.arange(4, 204, dtype=np.uint16).tofile(tmp_path / "val.bin")
    if content is not None:
        (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(UserError) as error:
        TokenFiles(str(tmp_path)).setup()
    assert complaint in str(error.value)


def test_token_files_without_their_tokeniser_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.json: not found; expected the tokeniser of these tokens"):
        TokenFiles(str(tmp_path)).setup()


def test_make_tokens_reports_failures_in_one_line_and_leaves_no_files(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    assert main([str(tmp_path / "out"), "--train", str(tmp_path / "a.txt"), "--val", "b.txt"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/a.txt: byte 2 is 0xff, not UTF-8; expected text in UTF-8\n"
    (tmp_path / "a.txt").write_bytes(b"ab")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    arguments = [str(tmp_path / "a.txt/x"), "--train", str(tmp_path / "a.txt"), "--val", "b.txt", "--tokenizer", "byte"]
    assert main(arguments) == 2
    assert "expected a folder to write to" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_make_tokens_warns_of_texts_that_are_in_both_splits(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("abc")
    both = ["--train", str(tmp_path / "*.txt"), "--val", str(tmp_path / "b.txt"), "--tokenizer", "byte"]
    with pytest.warns(UserWarning, match="^val: 1 of 1 files are among those of train"):
        assert main([str(tmp_path / "out"), *both]) == 0
    both[1] = str(tmp_path / "a.txt")
    assert main([str(tmp_path / "out"), *both]) == 0


def test_make_tokens_leaves_an_existing_output_folder_in_place_when_it_fails(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "out").mkdir()
    assert main([str(tmp_path / "out"), "--train", str(tmp_path / "none"), "--val", str(tmp_path / "none")]) == 2
    assert (tmp_path / "out").is_dir()
    (tmp_path / "out/val.bin").mkdir()
    texts = str(tmp_path / "a.txt")
    assert main([str(tmp_path / "out"), "--train", texts, "--val", texts, "--tokenizer", "byte"]) == 2
    assert f"{tmp_path}/out/val.bin: a folder; expected a place for a file" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["val.bin"]
    assert main(["a" * 300, "--train", texts, "--val", texts, "--tokenizer", "byte"]) == 2
    assert "File name too long; expected a folder to write to" in capsys.readouterr().err


def test_token_files_are_replaced_together_or_not_at_all(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("cba?")
    (tmp_path / "bad.txt").write_bytes(b"\xff")

    def made(train, val):
        patterns = ["--train", str(tmp_path / train), "--val", str(tmp_path / val)]
        return main([str(tmp_path / "out"), *patterns, "--tokenizer", "character", "--vocabulary-size", "50"])

    assert made("a.txt", "b.txt") == 0
    assert "val: 5 tokens, 1 of them for characters that are not in the vocabulary\n" in capsys.readouterr().out
    known = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert made("b.txt", "bad.txt") == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == known


# The task


def model(network=None, **task):
    sizes = {"vocabulary": 264, "context_length": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
    made = LanguageModel(**{"network": GPT(**sizes | (network or {})), "optimizer": sgd} | task)
    made.remember({"vocabulary": BYTE, "context_length": 16})
    return made.eval()


def batch_of(*texts, width=17):
    rows = [[END, *make_tokenizer(BYTE).encode(text)][:width] for text in texts]
    return torch.tensor([row + [IGNORE] * (width - len(row)) for row in rows])


def test_weights_of_a_run_require_its_vocabulary_which_its_folder_provides(tmp_path):
    run, other = tmp_path / "run", make_exact(["abcd" * 9], "character", 264)
    (run / "checkpoints").mkdir(parents=True)
    weights = {f"network.{name}": tensor for name, tensor in model().network.state_dict().items()}
    torch.save({"state_dict": weights, "facts": {"vocabulary": other}}, run / "checkpoints/best.ckpt")
    task = model(weights=str(run))
    task.trainer = SimpleNamespace(datamodule=SimpleNamespace(vocabulary=BYTE, context_length=16))
    with pytest.raises(UserError, match=r"vocabulary of that run and of the data differ.*tokenizer"):
        task.setup("fit")
    fewer = {"vocabulary": make_exact(["abc" * 9], "character", 264)}
    check_rows(task.row_facts, fewer, run, ["wte.weight"])  # allowed: another number of tokens
    with pytest.raises(UserError, match="vocabulary of that run and of the data differ"):
        check_rows(task.row_facts, task.facts, run, ["blocks.0.weight"])  # refused: the embedding was loaded
    (tmp_path / "a.txt").write_text("dcba" * 200)
    data = TextFiles("a.txt", root=str(tmp_path), tokenizer=str(run), context_length=16)
    data.setup()
    assert data.vocabulary == other
    task = LanguageModel(network=model().network, optimizer=sgd, weights=str(run))
    task.trainer = SimpleNamespace(datamodule=data)
    task.setup("fit")
    assert torch.equal(task.network.wte.weight, weights["network.wte.weight"])
    with pytest.raises(UserError, match="expected the folder of a run with vocabulary"):
        TextFiles("a.txt", root=str(tmp_path), tokenizer=str(tmp_path), context_length=16).setup()


@pytest.mark.parametrize(
    "state",
    [
        {"facts": {"vocabulary": BYTE}, "code": torch.nn.Linear(1, 1)},  # a pickle that names a class
        {"facts": {"vocabulary": {"kind": "none"}}},
        {"facts": {"other": BYTE}},
    ],
)
def test_a_run_whose_checkpoint_holds_code_or_no_tokeniser_is_refused_as_tokeniser(state, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints/best.ckpt")
    with pytest.raises(UserError, match=r"best\.ckpt: .*; expected the folder of a run with vocabulary"):
        tokenizers_of_run(tmp_path, "vocabulary")


def test_rows_of_weights_are_compared_only_with_the_same_kind_of_fact(tmp_path):
    rows, fresh = {"vocabulary": "wte"}, ["wte.weight"]
    torch.save({"wte.weight": torch.ones(2)}, tmp_path / "published.pt")
    check_rows(rows, {"vocabulary": BYTE}, tmp_path / "published.pt", [])  # it has no facts
    torch.save({"facts": {"vocabulary": 3}, "state_dict": {}}, tmp_path / "number.ckpt")
    with pytest.raises(UserError, match="vocabulary of that run and of the data differ: 3 and "):
        check_rows(rows, {"vocabulary": BYTE}, tmp_path / "number.ckpt", fresh)


def test_uniform_predictions_have_the_known_bits_per_byte_and_perplexity():
    """If all tokens are equally likely, a byte takes log2 of their number of bits; the end token is not a byte."""
    task = model()
    nn.init.zeros_(task.network.wte.weight)
    task.nll = TokenNLL(16, torch.tensor([len(spelling) for spelling in task.tokenizer.spelling]))
    task.judge(batch_of("abc", "de"))
    found = task.nll.compute()
    assert found["bits_per_byte"] == pytest.approx(math.log2(260))
    assert found["loss"] == pytest.approx(math.log(260))
    assert found["perplexity"] == pytest.approx(260)
    torch.testing.assert_close(task.nll.by_position(), torch.full((3,), math.log(260)))


def test_bits_per_byte_divides_by_bytes_and_the_loss_by_tokens():
    metric = TokenNLL(2, torch.tensor([2, 1, 4]))
    metric.update(torch.tensor([[3.0, 5.0], [1.0, 9.0]]), torch.tensor([[1, 2], [0, IGNORE]]))
    found = metric.compute()
    assert found["bits_per_byte"] == pytest.approx(9 / math.log(2) / 7)
    assert found["loss"] == pytest.approx(3.0)
    assert metric.by_position().tolist() == [2.0, 5.0]


def test_the_logged_sample_starts_with_the_prompt():
    task, told = model(prompt="The cat"), []
    task.log_evaluation, task.runner = lambda stage: None, lambda: lambda prompt: {"text": f"<{prompt}>"}
    logger = SimpleNamespace(experiment=SimpleNamespace(add_text=lambda name, text, step: told.append((text, step))))
    fitting = {"state": SimpleNamespace(fn="fit"), "sanity_checking": False, "is_global_zero": True}
    task.trainer = SimpleNamespace(loggers=[logger], global_step=7, **fitting)
    task.on_validation_epoch_end()
    assert told == [("    The cat<The cat>\n", 7)]


def test_training_loss_is_the_cross_entropy_over_the_window():
    task, batch = model().train(), batch_of("abcdefghijklmnop")
    task.log = lambda *_, **__: None
    logits = task.network.logits(task.network(batch[:, :-1])[0])
    expected = -logits.log_softmax(2).gather(2, batch[:, 1:, None]).mean()
    assert task.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_compiled_network_also_compiles_the_loss_on_a_gpu_only(kind, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    seen = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *parts: seen.append(f) or f(*parts))
    task, batch = model().train(), batch_of("abcdefghijklmnop")
    task.log, task.compile_network = lambda *_, **__: None, True
    strategy = SimpleNamespace(root_device=torch.device(kind))
    data = SimpleNamespace(**task.facts)
    task.trainer = SimpleNamespace(datamodule=data, strategy=strategy, accumulate_grad_batches=1)
    task.setup("fit")
    task.training_step(batch, 0)
    assert seen == [nll_and_gradient] * (kind == "cuda")


def test_an_evaluation_batch_does_not_make_training_compile_dynamic_sizes(monkeypatch, unchecked):
    torch._dynamo.reset()  # compilations in other tests may have marked sizes as dynamic
    seen, compiled = [], torch.nn.Module.compile

    def backend(graph, inputs):
        taken = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        seen.append({type(size) for one in taken if isinstance(one, torch.Tensor) for size in one.shape})
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled(self, backend=backend))
    task = model(compile_network=True)
    task.log = lambda *_, **__: None
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trained = SimpleNamespace(datamodule=SimpleNamespace(**task.facts), strategy=strategy, accumulate_grad_batches=1)
    task.trainer = trained
    task.setup("fit")
    for size, step in ((2, task.judge), (5, lambda batch: task.training_step(batch, 0))):
        before = len(seen)
        step(batch_of(*["abcdefghijklmnop"] * size))
        assert len(seen) > before
        assert seen[-1] == {int}


class Untied(GPT):
    """A GPT with an output layer of its own, and on request with a bias."""

    def __init__(self, *sizes, bias):
        super().__init__(*sizes)
        self.lm_head = nn.Linear(8, 300, bias=bias)

    output = property(lambda self: self.lm_head.weight)

    def logits(self, hidden):
        return self.lm_head(hidden)


def test_an_output_layer_of_its_own_is_not_a_hidden_matrix():
    network = Untied(300, 16, 1, 2, 8, bias=False)
    task = LanguageModel(network=network, optimizer=sgd)
    hidden, tables, _ = task.parameter_groups(list(network.parameters()))
    assert not any(parameter is network.output for parameter in hidden["params"])
    assert any(parameter is network.output for parameter in tables["params"])


class Bounded(GPT):
    """A GPT whose logits are between -30 and 30."""

    def logits(self, hidden):
        return 30 * (super().logits(hidden) / 30).tanh()


class Cut(GPT):
    """A GPT that does not return the logits of its padding tokens."""

    def logits(self, hidden):
        return super().logits(hidden)[..., :262]


@pytest.mark.parametrize(
    ("kind", "options", "refused"),
    [(Untied, {"bias": False}, False), (Untied, {"bias": True}, True), (Bounded, {}, True), (Cut, {}, False)],
)
@pytest.mark.parametrize("deviation", [0.02, 1])
def test_logits_that_differ_from_those_of_the_training_loss_are_refused(kind, options, refused, deviation):
    network = kind(300, 16, 1, 2, 8, **options)
    nn.init.normal_(network.output, std=deviation)
    task = LanguageModel(network=network, optimizer=sgd)
    task.remember({"vocabulary": BYTE, "context_length": 16})
    with pytest.raises(UserError, match="logits differ from its hidden states") if refused else nullcontext():
        task.check()


class Mixed(GPT):
    """A GPT whose hidden states are also those of other tokens (axis 1), or of other texts (axis 0)."""

    axis = 1

    def forward(self, tokens, past=None):
        hidden, keys, values = super().forward(tokens, past)
        return hidden + hidden.mean(self.axis, keepdim=True), keys, values


class Forgetful(GPT):
    """A GPT that does not read its past."""

    def forward(self, tokens, past=None):
        return super().forward(tokens)


@pytest.mark.parametrize("length", [1, 2, 16])
@pytest.mark.parametrize("kind", [GPT, Mixed, type("Across", (Mixed,), {"axis": 0}), Forgetful])
def test_a_network_that_looks_ahead_or_at_other_texts_or_forgets_its_past_is_refused(kind, length):
    task = LanguageModel(network=kind(300, 16, 1, 2, 8), optimizer=sgd)
    task.remember({"vocabulary": BYTE, "context_length": length})
    refused = kind is not GPT and length > 1  # a single token has no past
    words = "network's hidden states change with later tokens, other texts or a past"
    with pytest.raises(UserError, match=words) if refused else nullcontext():
        task.check()


class TimeFirst(GPT):
    """A GPT whose hidden states have the tokens as the first axis."""

    def forward(self, *inputs):
        hidden, keys, values = super().forward(*inputs)
        return hidden.transpose(0, 1), keys, values


def test_a_network_that_returns_time_first_is_refused():
    task = LanguageModel(network=TimeFirst(300, 16, 1, 2, 8), optimizer=sgd)
    task.remember({"vocabulary": BYTE, "context_length": 16})
    with pytest.raises(UserError, match=re.escape("network returns [3, 13, 8]; expected hidden states (B, T, E)")):
        task.check()


def test_hidden_matrices_embeddings_and_vectors_are_separate_parameter_groups():
    task = model()
    groups = task.parameter_groups(list(task.network.parameters()))
    named = {id(parameter): name for name, parameter in task.network.named_parameters()}
    names = [[named[id(parameter)] for parameter in group["params"]] for group in groups]
    assert len(names[0]) == 8
    assert all("c_" in name and name.endswith("weight") for name in names[0])
    assert sorted(names[1]) == ["wpe.weight", "wte.weight"]
    assert [group.get("weight_decay") for group in groups] == [None, None, 0.0]
    assert sum(map(len, names)) == len(named)


def test_decay_vectors_applies_weight_decay_to_vectors():
    task = model(decay_vectors=True)
    groups = task.parameter_groups(list(task.network.parameters()))
    assert [group.get("weight_decay") for group in groups] == [None] * 3


@pytest.mark.parametrize(
    ("network", "complaint"),
    [
        ({"vocabulary": 200}, "at least vocabulary: 260, context_length: 16"),
        ({"context_length": 12}, "at least vocabulary: 260, context_length: 16"),
        ({"context_length": 12, "positions": "rotary"}, "at least vocabulary: 260, context_length: 16"),
    ],
)
def test_a_network_that_is_too_small_is_refused(unchecked, network, complaint):
    with pytest.raises(UserError, match=complaint):
        model(network).check()


@pytest.mark.parametrize("optimizer", [partial(torch.optim.AdamW, lr=0.01), partial(MuonAdamW, lr=0.02)])
def test_a_language_model_learns_a_repeating_text(tmp_path, optimizer):
    data = module(tmp_path, text="abcdefgh" * 80, batch_size=16, batches=60)
    task = model({"positions": "rotary"}, optimizer=optimizer)
    fit(tmp_path, task, data)
    assert task.trainer.callback_metrics["val/bits_per_byte"] < 0.6
    runner = task.runner()
    runner.temperature = 0.0
    assert runner("abcdefghabc")["text"] == ("defghabc" * 9)[:64]


# The contract with the export step


@pytest.fixture(scope="module", params=["learned", "rotary"])
def exported(request, tmp_path_factory):
    """Return a network with large random weights, as a task and as an ONNX file."""
    torch.manual_seed(0)
    task = model({"positions": request.param, "qk_norm": request.param == "rotary", "bias": request.param == "learned"})
    for parameter in task.network.parameters():
        nn.init.normal_(parameter, std=0.3)
    (graph,) = (served := task.deployable(batch_of(SENTENCES, SENTENCES[9:]))).graphs.values()
    path = tmp_path_factory.mktemp("onnx") / "decode.onnx"
    write_onnx(graph, path, TARGETS["cpu"])
    return task, served, graph, path


def test_the_graph_matches_pytorch_at_sizes_not_used_in_tracing(exported):
    _, _, graph, path = exported
    sizes = trace_sizes(graph)
    assert all(sizes[symbol] not in known for symbol, known in graph.sizes.items())
    rows = parity("decode", graph, Reference(graph), OnnxGraph(path, "CPUExecutionProvider"), 1e-4, static=False)
    assert [row["shape"]["key_0"][2] for row in rows] == [16, 0, 3, 1, 33]


def test_a_graph_that_ignores_part_of_its_past_fails_verification(exported):
    """The declared sizes must include a long past: the fault does not show with a short one."""
    _, _, graph, path = exported

    class Forgetful(OnnxGraph):
        def __call__(self, **inputs):
            return super().__call__(**inputs | {"length": inputs["length"].clip(max=3)})

    with pytest.raises(UserError, match="differs from PyTorch"):
        parity("decode", graph, Reference(graph), Forgetful(path, "CPUExecutionProvider"), 1e-4, static=False)


def runners(served, path):
    graph = OnnxGraph(path, "CPUExecutionProvider")
    made = [make_runner(served.kind, graphs, served.metadata) for graphs in (served.graphs, {"decode": graph})]
    for one in made:
        one.max_new_tokens, one.temperature = 64, 0.0  # four contexts
    return made


def test_pytorch_and_the_bundle_generate_the_same_texts(exported):
    _, served, _, path = exported
    ours, theirs = runners(served, path)
    for prompt in ("", "The cat", "a much longer prompt than the context is"):
        for penalty in (1.0, 1.5):  # without a penalty, the likeliest tokens soon repeat
            ours.repetition_penalty = theirs.repetition_penalty = penalty
            assert (answer := ours(prompt)) == theirs(prompt)
            assert answer["new_tokens"] == 64
        assert len(set(answer["text"])) > 10
    for one in (ours, theirs):
        one.temperature, one.top_k, one.top_p, one.repetition_penalty, one.seed = 1.0, 50, 0.9, 1.2, 5
    assert ours("The cat") == theirs("The cat")


def test_the_example_request_in_a_bundles_description_is_accepted(exported):
    _, served, _, path = exported
    runner = runners(served, path)[1]
    shown = json.loads(re.search(r"`(\{.*\})`", runner.takes(served.metadata))[1].replace("text,", '"a text",'))
    assert runner(shown)["new_tokens"] == 50


def test_the_runner_computes_the_same_bits_per_byte_as_the_task(exported):
    task, served, _, path = exported
    batch = batch_of("abcdefghijklmnopq", "xyz", "über")
    task.nll = TokenNLL(16, torch.tensor([len(spelling) for spelling in task.tokenizer.spelling]))
    with torch.no_grad():
        task.judge(batch)
    expected = task.nll.compute()["bits_per_byte"].item()
    for one in runners(served, path):
        assert task.evaluate(one, [batch]) == pytest.approx(expected, rel=1e-4)
    assert task.degradation(2.0, 2.1) == pytest.approx(5)
    assert (task.degradation(0.0, 0.0), task.degradation(0.0, 0.1)) == (0, math.inf)  # a text known by heart


def test_int8_quantises_weights_and_leaves_attention_in_float(exported, tmp_path):
    task, served, _, path = exported
    (tmp_path / "converted").mkdir()
    convert(path, tmp_path / "converted/decode.onnx", TARGETS["x86-64"], Plan("int8"), [])
    assert is_quantised(tmp_path / "converted/decode.onnx")
    exact, coarse = runners(served, tmp_path / "converted/decode.onnx")
    batch = [batch_of(SENTENCES, SENTENCES[5:])]
    assert task.evaluate(coarse, batch) == pytest.approx(task.evaluate(exact, batch), rel=0.05)
    import onnx

    nodes = [node.op_type for node in onnx.load(tmp_path / "converted/decode.onnx").graph.node]
    assert nodes.count("MatMulInteger") + nodes.count("DynamicQuantizeMatMul") >= 9
    assert nodes.count("MatMul") + nodes.count("FusedMatMul") == 8  # scores and weighted sums, over past and new tokens


def test_past_keys_and_values_go_into_products_without_a_copy(exported):
    """Concatenating the past with new keys and values would copy it for each token."""
    import onnx

    *_, path = exported
    nodes = onnx.load(path).graph.node
    takers = {name: {node.op_type for node in nodes if name in node.input} for name in ("key_0", "value_1")}
    assert takers["value_1"] <= {"MatMul", "Shape"}
    assert takers["key_0"] <= {"Transpose", "Shape"}  # onnxruntime fuses the transpose into the product


@pytest.fixture(scope="module")
def fixed(exported, tmp_path_factory):
    """Return the ONNX file of the network with fixed sizes."""
    path = tmp_path_factory.mktemp("fixed") / "decode.onnx"
    write_onnx(exported[2], path, TARGETS["qualcomm"])
    return path


def test_a_graph_with_fixed_sizes_gives_the_same_texts(exported, fixed):
    task, served, _, _ = exported
    ours, theirs = runners(served, fixed)
    assert theirs.decode.shape["tokens"] == [1, 1]
    assert theirs.decode.shape["key_0"][2] == 16
    assert ours(["The cat", "a"]) == theirs(["The cat", "a"])
    batch = [batch_of("abcdefgh", "xyz")]
    assert task.evaluate(theirs, batch) == pytest.approx(task.evaluate(ours, batch), rel=1e-4)


def test_infinities_of_the_mask_are_left_out_of_quantisation_ranges(exported, fixed, tmp_path):
    """A scale of infinity would make all scores equal."""
    graph, target = exported[2], TARGETS["qualcomm"]
    feeds = [{key: tensor.numpy() for key, tensor in example_at(graph, first_sizes(graph)).items()}]
    convert(fixed, tmp_path / "int16.onnx", target, Plan("int16", "MinMax"), feeds)
    tensors = onnx.load(tmp_path / "int16.onnx").graph.initializer
    scales = [numpy_helper.to_array(tensor) for tensor in tensors if tensor.name.endswith("_scale")]
    assert len(scales) > 10
    assert np.isfinite(np.concatenate([scale.ravel() for scale in scales])).all()


def test_example_inputs_can_be_built_for_all_declared_sizes(exported):
    _, _, graph, _ = exported
    inputs = example_at(graph, {"batch": 3, "new": 4, "asked": 1, "past": 0})
    assert inputs["key_0"].shape == (3, 2, 0, 8)
    assert F.one_hot(inputs["tokens"], 260).sum() == 12


class Strict(GPT):
    """A GPT that relies on what `Past` says of its length."""

    def forward(self, tokens, past=None):
        assert past is None or past.length.max() <= past.keys[0].shape[2]
        return super().forward(tokens, past)


def test_a_network_is_never_told_of_more_past_tokens_than_it_gets():
    task = LanguageModel(network=Strict(300, 16, 1, 2, 8), optimizer=sgd)
    task.remember({"vocabulary": BYTE, "context_length": 16})
    (graph,) = task.deployable(batch_of(SENTENCES, SENTENCES[9:])).graphs.values()
    for past in graph.sizes["past"]:
        graph.module(*example_at(graph, {"batch": 3, "new": 4, "asked": 1, "past": past}).values())


def test_training_windows_can_start_at_each_token_with_a_full_window_after_it(tmp_path):
    data = module(tmp_path)
    assert data.order(1).places == len(data.splits["train"].tokens) - 16
