"""Pairs of texts: readers and the files they refuse, tokenisers, batches by number of tokens, dates."""

import gzip
import json
import struct
from collections import Counter
from datetime import date
from types import SimpleNamespace

import pytest
import torch
from babel.dates import format_date
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from test_translation import batch_of, translator

from dlref.data import PairFiles, ParallelText, SageMakerTokens, SyntheticDates, synthetic_dates
from dlref.data.pairs import Corpus, Pairs, TokenBatches, read_parallel, read_records, read_table
from dlref.data.synthetic_dates import LANGUAGES, STYLES, WITHHELD, make_dates
from dlref.data.translation import TranslationData, as_text
from dlref.data.vocabulary import make_vocabulary, read_vocabulary
from dlref.runtime import UserError
from dlref.runtime.text import BEGIN, END, PAD, SPECIAL, UNKNOWN, make_tokenizer

VOCABULARY = {token: number for number, token in enumerate([*SPECIAL, "a", "b", "c"])}


def record_class(values=descriptor_pb2.FieldDescriptorProto.TYPE_INT32):
    """Build SageMaker's Record with protobuf's own library from the numbers of its fields."""
    file = descriptor_pb2.FileDescriptorProto(name="record.proto", package="aialgs.data")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields):
        added = file.message_type.add(name=name)
        for field, number, kind, label, of in fields:
            added.field.add(name=field, number=number, type=kind, label=label, type_name=of)
        return added

    message("Int32Tensor", ("values", 1, values, kinds.LABEL_REPEATED, None))
    message("Value", ("int32_tensor", 7, kinds.TYPE_MESSAGE, kinds.LABEL_OPTIONAL, ".aialgs.data.Int32Tensor"))
    record = message(
        "Record",
        ("features", 1, kinds.TYPE_MESSAGE, kinds.LABEL_REPEATED, ".aialgs.data.Record.FeaturesEntry"),
        ("uid", 3, kinds.TYPE_STRING, kinds.LABEL_OPTIONAL, None),
    )
    entry = record.nested_type.add(name="FeaturesEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    of = {"type": kinds.TYPE_MESSAGE, "type_name": ".aialgs.data.Value"}
    entry.field.add(name="value", number=2, label=kinds.LABEL_OPTIONAL, **of)
    for tensor in file.message_type[0].field:
        tensor.options.packed = True
    file.syntax = "proto2"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("aialgs.data.Record"))


RECORD = record_class()
WIDE = record_class(descriptor_pb2.FieldDescriptorProto.TYPE_INT64)


def packed(source, target, record_class=RECORD, **more):
    record = record_class(**more)
    for name, values in (("source", source), ("target", target)):
        record.features[name].int32_tensor.values.extend(values)
    return record.SerializeToString()


def recordio(*contents):
    head = struct.Struct("<II")
    return b"".join(head.pack(0xCED7230A, len(one)) + one + b"\0" * (-len(one) % 4) for one in contents)


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# Readers


def test_parallel_files_are_paired_line_by_line(tmp_path):
    source, target = write(tmp_path / "a.de", "eins\nzwei\r\n"), tmp_path / "a.en.gz"
    target.write_bytes(gzip.compress(b"\xef\xbb\xbfone\ntwo"))
    pairs = read_parallel(source, target)
    assert (pairs.source, pairs.target) == (["eins", "zwei"], ["one", "two"])
    assert pairs.names == [f"{source}:1", f"{source}:2"]


def test_tsv_and_jsonl_tables_are_read_alike(tmp_path):
    tabs = read_table(write(tmp_path / "a.tsv", "eins\tone\nzwei\ttwo\n"))
    rows = [{"source": "eins", "target": "one"}, {"source": "zwei", "target": "two", "more": 1}]
    objects = read_table(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert tabs.source == objects.source == ("eins", "zwei")
    assert tabs.target == objects.target == ("one", "two")


def test_a_damaged_gzip_file_is_refused_in_one_line(tmp_path):
    data = gzip.compress("".join(f"{i * i}\t{i}\n" for i in range(3000)).encode(), mtime=0)
    for start in (200, 2000, 5000):
        broken = bytes(byte ^ 255 * (start <= place < start + 50) for place, byte in enumerate(data))
        refused(lambda broken=broken: read_table(write(tmp_path / "a.tsv.gz", broken)), "a.tsv.gz")


def test_records_written_by_protobuf_are_read(tmp_path):
    """Includes numbers of several bytes and fields that are not read."""
    sources, targets = [[4, 5, 200, 70_000], [1]], [[6], [4] * 300]
    data = recordio(*(packed(*pair, uid="some") for pair in zip(sources, targets, strict=True)))
    pairs = read_records(write(tmp_path / "train.rec", data))
    assert (pairs.source, pairs.target) == (sources, targets)


BAD_PARALLEL = [
    ("a\nb\n", "a\n", "a.en: 1 lines; expected 2, as"),
    ("a\n\nb\n", "a\nb\nc\n", "a.de:2: empty; expected a text"),
    ("a\nb\n", "a\n \t\n", "a.en:2: empty; expected a text"),
    ("", "", "a.de: no lines; expected a sentence on each"),
    (b"a\n\xff\xfe\n", "a\nb\n", "a.de:2: byte 0 is 0xff, not UTF-8; expected lines of text in UTF-8"),
    ("a\nb\n", b"a\nb\xc3", "a.en:2: byte 1 is 0xc3, not UTF-8"),
    (None, "a\n", "a.de: No such file or directory; expected lines of text"),
    ("a\n\n", "a\nb\n", "a.de:2: empty"),
]
BAD_TABLES = [
    ("a.tsv", "eins one\n", "a.tsv:1: 1 columns; expected a source, a tab and a target"),
    ("a.tsv", "eins\tone\tuno\n", "a.tsv:1: 3 columns"),
    ("a.tsv", "eins\tone\n\n", "a.tsv:2: 1 columns"),
    ("a.tsv", "eins\t \n", "a.tsv:1: target: empty"),
    ("a.tsv", "", "a.tsv: no line"),
    ("a.tsv.gz", "no gzip", "a.tsv.gz: unreadable"),
    ("a.jsonl", '{"source": "a"}\n', "a.jsonl:1: target: NoneType; expected a text"),
    ("a.jsonl", '{"source": 1, "target": "a"}', "a.jsonl:1: source: int; expected a text"),
    ("a.jsonl", '{"source": "", "target": "a"}', "a.jsonl:1: source: empty"),
    ("a.jsonl", '{"source": "a", "target": "\\ud800"}', "a.jsonl:1: target: half of a surrogate pair"),
    ("a.jsonl", "[1]\n", "a.jsonl:1: '[1]'; expected one JSON object"),
    ("a.jsonl", '{"source": "a", "target": "b"}\n{"sou', "a.jsonl:2: "),
]
GOOD = packed([4], [5])
BAD_RECORDS = [
    (b"", "no record"),
    (b"abc", "record 1 at byte 0: broken"),
    (b"\0" * 16, "record 1 at byte 0: broken"),
    (recordio(GOOD)[:-4], "record 1 at byte 0: broken"),
    (recordio(GOOD) + b"\x0a\x23\xd7\xce", f"record 2 at byte {len(recordio(GOOD))}: broken"),
    (struct.pack("<II", 0xCED7230A, 1 << 31) + GOOD, "record 1 at byte 0: broken"),
    (recordio(packed([], [5])), "record 1: source: empty; expected tokens"),
    (recordio(GOOD, packed([4], [])), "record 2: target: empty"),
    (recordio(packed([7], [5])), "record 1: source: token 7; expected 1 or 4 to 6"),
    (recordio(packed([(1 << 32) + 5], [5], WIDE)), "record 1: source: token 4294967301; expected 1 or 4 to 6"),
    (recordio(packed([4], [-1])), "record 1: target: token -1"),
    (recordio(packed([4, 0], [5])), "record 1: source: token 0"),
    (recordio(packed([4, 2], [5])), "record 1: source: token 2"),
    (recordio(packed([4], [5, 3])), "record 1: target: token 3"),
    (recordio(GOOD[:-1]), "record 1: broken; expected a protobuf Record"),
    (recordio(b"\xff" * 12), "record 1: broken"),
    (recordio(b"\x0f" + GOOD), "record 1: broken"),
]


@pytest.mark.parametrize(("source", "target", "complaint"), BAD_PARALLEL, ids=range(len(BAD_PARALLEL)))
def test_invalid_parallel_files_are_refused(tmp_path, source, target, complaint):
    for name, text in (("a.de", source), ("a.en", target)):
        if text is not None:
            write(tmp_path / name, text)
    refused(lambda: read_parallel(tmp_path / "a.de", tmp_path / "a.en"), complaint)


@pytest.mark.parametrize(("name", "text", "complaint"), BAD_TABLES, ids=range(len(BAD_TABLES)))
def test_invalid_tables_are_refused(tmp_path, name, text, complaint):
    paths = [str(write(tmp_path / name, text)) for name in (name, f"other {name}")]
    refused(PairFiles(*paths).setup, complaint)


@pytest.mark.parametrize(("data", "complaint"), BAD_RECORDS, ids=range(len(BAD_RECORDS)))
def test_invalid_records_are_refused(tmp_path, data, complaint):
    for side in ("src", "trg"):
        write(tmp_path / f"vocab.{side}.json", json.dumps(VOCABULARY))
    paths = [str(write(tmp_path / name, data)) for name in ("a.rec", "b.rec")]
    refused(SageMakerTokens(*paths, str(tmp_path)).setup, f"a.rec: {complaint}")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "[]; expected one JSON object"),
        ('{"a": "b"}', "not a vocabulary"),
        ("{", ":1: Expecting property name enclosed in double quotes at column 2; expected one JSON object"),
        (json.dumps({**VOCABULARY, "d": 9}), "8 tokens whose numbers have gaps or repeat; expected 0 to 7"),
        (json.dumps({"a": 0, "b": 1}), "begins with a b; expected <pad> <unk> <s> </s>"),
        (json.dumps({**VOCABULARY, "d": 6}), "have gaps or repeat"),
        (json.dumps({**VOCABULARY, "\ud800": 7}), "vocab.src.json: tokeniser of kind 'word'"),  # half of a pair
    ],
)
def test_invalid_vocabularies_are_refused(tmp_path, text, complaint):
    refused(lambda: read_vocabulary(write(tmp_path / "vocab.src.json", text)), complaint)


def refused(read, complaint):
    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert complaint in message
    assert "expected" in message
    assert len(message.splitlines()) == 1


@given(st.binary(max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bytes") / "a"
    for name, read in (("a.rec", read_records), ("a.tsv", read_table), ("a.jsonl", read_table)):
        for content in (data, recordio(data), GOOD + data):
            message = ""
            try:
                read(write(path.with_name(name), content))
            except UserError as error:
                message = str(error)
            assert len(message.splitlines()) <= 1


# Tokenisers


def test_words_and_characters_are_numbered_by_frequency():
    words = make_vocabulary(["b a", "b c"], "word", 6)
    assert words == {"kind": "word", "tokens": [*SPECIAL, "b", "a"]}
    tokenizer = make_tokenizer(words)
    assert tokenizer.encode(" b  c\ta ") == [4, UNKNOWN, 5]
    assert tokenizer.decode([BEGIN, 4, 5, END, PAD]) == "b a"
    characters = make_tokenizer(make_vocabulary(["aäb", "ab"], "character", 100))
    assert characters.encode("ba\u0308") == [5, 6]  # composed or decomposed umlaut
    assert characters.decode([5, 6]) == "bä"


@pytest.mark.parametrize("kind", ["word", "character", "bpe"])
def test_special_tokens_written_in_a_text_are_not_encoded_as_such(kind):
    tokenizer = make_tokenizer(make_vocabulary(["<pad> </s> <s> a b"] * 3, kind, 300))
    assert not {PAD, BEGIN, END} & set(tokenizer.encode("<pad> a </s> <s> <unk>"))


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_byte_pairs_decode_to_the_normalised_text(text):
    found = BYTE_PAIRS.decode(BYTE_PAIRS.encode(text))
    assert found == make_normal(text)


def make_normal(text):
    from dlref.runtime.text import normal

    return normal(text.encode("utf-8", "ignore").decode())


TEXTS = ["der Hund läuft über die Wiese", "die Katze 😀 läuft"] * 4
BYTE_PAIRS = make_tokenizer(make_vocabulary(TEXTS, "bpe", 300))


def test_byte_pair_training_is_reproducible_and_bounded_by_its_size():
    assert make_vocabulary(TEXTS, "bpe", 300) == make_vocabulary(TEXTS, "bpe", 300)
    assert 260 < len(BYTE_PAIRS) <= 300
    assert len(BYTE_PAIRS.encode("läuft")) < len("läuft".encode())
    with pytest.raises(UserError, match="vocabulary_size: 100; expected at least 260"):
        make_vocabulary(TEXTS, "bpe", 100)


def test_bytes_that_follow_each_other_only_once_are_not_merged():
    assert len(make_tokenizer(make_vocabulary(["abcdefgh ijklm"], "bpe", 400))) == len(SPECIAL) + 256


@pytest.mark.parametrize(
    "described",
    [
        {},
        {"kind": "syllable", "tokens": list(SPECIAL)},
        {"kind": "word"},
        {"kind": "word", "tokens": ["a"]},
        {"kind": "word", "tokens": [*SPECIAL, "a", "a"]},
        {"kind": "word", "tokens": [*SPECIAL, "a", 1]},
        {"kind": "bpe", "model": "{}"},
        {"kind": "bpe", "model": 3},
        {"kind": "word", "tokens": [*SPECIAL, []]},
        {"kind": "bpe", "model": '{"version":"1.0","model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":[]}}'},
    ],
)
def test_invalid_tokenisers_are_refused(described):
    refused(lambda: make_tokenizer(described), "okeniser")


# Batches


def test_each_sentence_is_in_exactly_one_batch_of_bounded_size():
    torch.manual_seed(0)
    source, target = torch.randint(1, 40, (500,)), torch.randint(1, 40, (500,))
    batches = TokenBatches(source, target, 200)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        epoch = list(batches.draw(generator))
        assert len(epoch) == len(batches)
        assert sorted(torch.cat(epoch).tolist()) == list(range(500))
        for batch in epoch:
            assert len(batch) * max(source[batch].max(), target[batch].max()) <= 200
        widths = [int(batches.width(batch).max()) for batch in epoch]
        assert widths != sorted(widths)
    another = list(batches.draw(generator))
    assert Counter(map(len, another)) == Counter(map(len, epoch))
    padding = sum(len(batch) * int(source[batch].max()) for batch in epoch) / int(source.sum())
    assert padding < 1.25
    assert {frozenset(batch.tolist()) for batch in another} != {frozenset(batch.tolist()) for batch in epoch}
    long = TokenBatches(source[:3] + 500, target[:3], 200)
    assert [len(batch) for batch in long.draw(generator)] == [1, 1, 1]
    assert len(TokenBatches(torch.full((10,), 5), torch.full((10,), 5), 50)) == 1


def test_batches_are_padded_at_the_end():
    corpus = Corpus([[4, 5, END], [6, END]], [[BEGIN, 4, END], [BEGIN, 4, 5, END]], (["a b", "c"], ["x", "y z"]))
    batch = corpus[torch.tensor([1, 0])]
    assert batch.source.tolist() == [[6, END, PAD], [4, 5, END]]
    assert batch.target.tolist() == [[BEGIN, 4, 5, END], [BEGIN, 4, END, PAD]]
    assert (batch.sources, batch.references) == (["c", "a b"], ["y z", "x"])


# Modules


def make_text(folder, lines=20):
    for split in ("train", "val", "test"):
        write(folder / f"{split}.de", "".join(f"ein Hund {i % 7}\n" for i in range(lines)))
        write(folder / f"{split}.en", "".join(f"a dog {i % 7}\n" for i in range(lines)))
    return folder


def test_parallel_text_is_read_and_batched(tmp_path):
    data = ParallelText(str(make_text(tmp_path)), "de", "en", tokenizer="word", batch_size=40)
    data.setup()
    assert data.longest_answer == 5 + 5 // 4 + 5
    words = make_tokenizer(data.source_vocabulary)
    batch = next(iter(data.val_dataloader()))
    assert words.decode(batch.source[3].tolist()) == batch.sources[3] == "ein Hund 3"
    assert batch.target[:, 0].tolist() == [BEGIN] * 20
    assert data.sources()[1].endswith("test.de:2")


def test_long_sentences_are_refused_or_truncated_with_a_warning(tmp_path):
    folder = make_text(tmp_path)
    write(folder / "val.de", "eins zwei drei vier\n" * 20)
    options = {"tokenizer": "word", "longest": 4}
    with pytest.raises(UserError, match=r"val\.de:1: source: 4 tokens; expected at most 3, or too_long: truncate"):
        ParallelText(str(folder), "de", "en", **options).setup()
    data = ParallelText(str(folder), "de", "en", **options, too_long="truncate")
    with pytest.warns(UserWarning, match="val: 20 sentences of more than 3 tokens are truncated"):
        data.setup()
    assert next(iter(data.val_dataloader())).source.shape == (20, 4)


def test_too_long_may_differ_from_the_checkpoint_but_longest_may_not():
    task = translator(too_long="error")
    facts = task.facts | {"too_long": "truncate"}
    task.take_facts(SimpleNamespace(**facts))
    assert task.deployable(batch_of(("a", "b"))).metadata["too_long"] == "truncate"
    with pytest.raises(UserError, match="longest of the data and of the checkpoint differ"):
        task.take_facts(SimpleNamespace(**facts | {"longest": 7}))


@pytest.mark.parametrize("kind", ["word", "character", "bpe"])
def test_references_are_normalised_like_decoded_answers(kind, tmp_path):
    """The reference may have decomposed letters and surrounding white space."""
    folder, given = make_text(tmp_path), " Tie\u0302\u0301ng  Vie\u0323\u0302t "
    write(folder / "train.en", f"{given}\n" * 20)
    write(folder / "train.de", "eins\n" * 20)
    write(folder / "val.de", "eins\n")
    write(folder / "val.en", f"{given}\n")
    data = ParallelText(str(folder), "de", "en", tokenizer=kind, vocabulary_size=300, test=None)
    data.setup()
    tokenizer = make_tokenizer(data.target_vocabulary)
    (reference,) = next(iter(data.val_dataloader())).references
    assert tokenizer.decode(tokenizer.encode(given)) == reference


def test_unknown_tokens_in_a_reference_never_equal_an_answer():
    tokenizer = make_tokenizer({"kind": "word", "tokens": [*SPECIAL, "a"]})
    assert as_text(tokenizer, [4, UNKNOWN], is_reference=True) == "a \ufffd"
    assert as_text(tokenizer, [4, UNKNOWN], is_reference=False) == "a <unk>"


def test_vocabularies_of_a_run_can_be_used_for_other_texts(tmp_path):
    run, folder = tmp_path / "run", make_text(tmp_path)
    (run / "checkpoints").mkdir(parents=True)
    known = [{"kind": "word", "tokens": [*SPECIAL, word]} for word in ("Hund", "dog")]
    facts = dict(zip(("source_vocabulary", "target_vocabulary"), known, strict=True))
    torch.save({"state_dict": {}, "facts": facts}, run / "checkpoints/best.ckpt")
    data = ParallelText(str(folder), "de", "en", tokenizer=str(run), test=None)
    data.setup()
    assert [data.source_vocabulary, data.target_vocabulary] == known
    assert data.sources()[1].endswith("val.de:2")
    with pytest.raises(UserError, match="tokenizer: words; expected word, character, bpe or a run's folder"):
        ParallelText(str(folder), "de", "en", tokenizer="words").setup()


def test_a_shared_vocabulary_covers_both_languages(tmp_path):
    data = ParallelText(str(make_text(tmp_path)), "de", "en", tokenizer="word", shared=True)
    data.setup()
    assert data.source_vocabulary == data.target_vocabulary
    assert {"ein", "a"} <= set(data.source_vocabulary["tokens"])


def test_pair_files_test_on_the_validation_file_if_there_is_no_test_file(tmp_path):
    path = str(write(tmp_path / "a.tsv", "eins\tone\nzwei\ttwo\n"))
    data = PairFiles(path, path, tokenizer="character")
    with pytest.warns(UserWarning, match=r"(val|test): 1 of 1 files are among those of train"):
        data.setup()
    assert len(data.splits["test"]) == 2


def test_separate_test_files_are_used(tmp_path):
    tables = [str(write(tmp_path / f"{name}.tsv", f"{name}\tx\n")) for name in "abc"]
    for side in ("src", "trg"):
        write(tmp_path / f"vocab.{side}.json", json.dumps(VOCABULARY))
    records = [str(write(tmp_path / f"{token}.rec", recordio(packed([token], [6])))) for token in (4, 5, 1)]
    for data, expected in (
        (PairFiles(*tables, tokenizer="character"), ["a", "b", "c"]),
        (SageMakerTokens(*records[:2], str(tmp_path), records[2]), [[4], [5], [1]]),
    ):
        pairs = data.read()
        assert [pairs[split].source[0] for split in ("train", "val", "test")] == expected


def test_sagemaker_token_files_are_read_and_batched(tmp_path):
    for side in ("src", "trg"):
        write(tmp_path / f"vocab.{side}.json", json.dumps(VOCABULARY))
    records = recordio(packed([4, 5, 1], [6]), packed([5], [4, 4]))
    path, other = (str(write(tmp_path / name, records)) for name in ("train.rec", "val.rec"))
    data = SageMakerTokens(path, other, str(tmp_path))
    data.setup()
    batch = next(iter(data.test_dataloader()))
    assert batch.source.tolist() == [[4, 5, 1, END], [5, END, PAD, PAD]]
    assert batch.references == ["c", "a a"]
    write(tmp_path / "vocab.trg.json", json.dumps({token: VOCABULARY[token] for token in [*SPECIAL, "a"]}))
    with pytest.raises(UserError, match=r"train\.rec: record 1: target: token 6; expected 1 or 4 to 4"):
        SageMakerTokens(path, other, str(tmp_path)).setup()


def test_files_that_are_trained_on_and_scored_are_told(tmp_path):
    for name, text in (("train.de", "ja\n"), ("train.en", "yes\n")):
        write(tmp_path / name, text)
    for side in ("src", "trg"):
        write(tmp_path / f"vocab.{side}.json", json.dumps(VOCABULARY))
    records = str(write(tmp_path / "train.rec", recordio(packed([4], [4]))))
    for data in (
        ParallelText(str(tmp_path), "de", "en", val="train", test=None, tokenizer="character"),
        SageMakerTokens(records, f"{tmp_path}/./train.rec", str(tmp_path)),
    ):
        with pytest.warns(UserWarning, match="among those of train") as told:
            data.setup()
        assert [str(one.message) for one in told] == [
            f"{split}: 1 of 1 files are among those of train" for split in ("val", "test")
        ]


def test_dates_are_reproducible_and_no_day_is_in_two_splits():
    splits = make_dates(600, 300, 300, withheld=False, seed=1)
    days = [set(splits[name].target) for name in ("train", "val", "test")]
    assert not days[0] & days[1] | days[0] & days[2] | days[1] & days[2]
    assert splits == make_dates(600, 300, 300, withheld=False, seed=1)
    assert len({language.split("_")[0] for language in LANGUAGES}) >= 12


def test_dates_are_written_in_a_known_language_and_style(monkeypatch):
    monkeypatch.setattr(synthetic_dates, "typed", lambda rng, text: text)
    pairs = make_dates(500, 1, 1, withheld=False, seed=1)["train"]
    for source, target in zip(pairs.source, pairs.target, strict=True):
        day = date.fromisoformat(target)
        assert source in {format_date(day, style, locale=language) for language in LANGUAGES for style in STYLES}


def test_the_withheld_style_appears_only_in_test():
    language, style = WITHHELD
    assert (language, style) == ("it", "long")
    months = [
        "gennaio",
        "febbraio",
        "marzo",
        "aprile",
        "maggio",
        "giugno",
        "luglio",
        "agosto",
        "settembre",
        "ottobre",
        "novembre",
        "dicembre",
    ]
    held = make_dates(3000, 10, 200, withheld=True, seed=0)
    assert sum(any(month in source.lower().split() for month in months) for source in held["test"].source) > 150
    weekdays = ("luned", "marted", "mercoled", "gioved", "venerd", "sabat", "domenica")
    for source in held["train"].source:
        words = source.lower().split()
        if "settembre" in words:
            assert words[0].startswith(weekdays) or len(words) > 3, source


def test_an_invalid_number_of_dates_is_refused():
    refused(lambda: SyntheticDates(train=0).setup(), "train: 0; expected at least 1")


def test_batch_order_counts_the_tokens_that_training_reads():
    """The last token of a target is only predicted and not read."""
    data = SyntheticDates(train=50, val=5, test=5)
    data.setup()
    order, train = data.order(1), data.splits["train"]
    assert torch.equal(order.source, train.source.lengths)
    assert torch.equal(order.target, train.target.lengths - 1)
    assert train[torch.arange(9)].target[:, :-1].shape[1] == order.target[:9].max()


OWN = Pairs(["ja", "nein"], ["yes", "no"], ["own 1", "own 2"])
OWN_TOKENS = Pairs([[4], [5, 4]], [[5], [4]], ["own 1", "own 2"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"train": OWN._replace(target=["yes"])}, "train: 2 sources, 1 targets and 2 names; expected one of each"),
        ({"val": OWN._replace(names=["own 1"])}, "val: 2 sources, 2 targets and 1 names; expected one of each"),
        (
            {"train": Pairs([], [], [])},
            "train: 0 sources, 0 targets and 0 names; expected one of each for every pair, and at least",
        ),
        ({"test": tuple(OWN)}, "test: tuple; expected Pairs of sources, targets and names"),
        ({"val": OWN._replace(target=iter(["yes"]))}, "val: list_iterator; expected lists of sources, targets"),
        ({"train": OWN._replace(source="ja")}, "train: source: one text; expected a list of texts"),
        ({"train": OWN._replace(target=["yes", None])}, "own 2: target: NoneType; expected a text or a list of tokens"),
        ({"test": OWN._replace(source=["ja", "\ud800"])}, "own 2: source: half of a surrogate pair, or not UTF-8"),
        ({"val": OWN._replace(source=[b"ja", "nein"])}, "own 1: source: bytes; expected a text or a list of tokens"),
        ({"train": OWN_TOKENS}, "train: tokens; expected texts, or a data module whose vocabularies names the tokens"),
        ({"val": OWN_TOKENS._replace(source=[[4], [5, 99]])}, "own 2: source: token 99; expected 1 or 4 to "),
        ({"val": OWN_TOKENS._replace(target=[[PAD], [5]])}, "own 1: target: token 0; expected 1 or 4 to "),
        ({"test": OWN_TOKENS._replace(source=[[4.5], [5]])}, "own 1: source: token 4.5; expected 1 or 4 to "),
    ],
)
def test_pairs_of_ones_own_that_do_not_fit_together_are_refused(changes, complaint):
    class Own(TranslationData):
        def read(self):
            return dict.fromkeys(("train", "val", "test"), OWN) | changes

    refused(Own(tokenizer="character", vocabulary_size=20).setup, complaint)


def test_a_missing_split_of_pairs_is_refused():
    class Own(TranslationData):
        def read(self):
            return {"train": OWN, "val": OWN}

    refused(Own(tokenizer="character").setup, "the data has no split test; expected train, val and test")
