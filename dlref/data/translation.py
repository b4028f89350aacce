"""Data modules for translation: sources and targets from files, their tokenisers, batches by the number of tokens.

What passes to a task: batches `Batch` of `dlref.data.pairs`, gathered on the device that trains. After `setup`,
`source_vocabulary` and `target_vocabulary` are the tokenisers as `dlref.runtime.text` describes them, `longest` and
`longest_answer` how many tokens a source and an answer may have, and `too_long` what becomes of longer sources.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn

from dlref.data.files import warn_of_shared
from dlref.data.loader import SplitData, check_at_least
from dlref.data.pairs import Corpus, Pairs, TokenBatches, read_parallel, read_records, read_table
from dlref.data.synthetic_dates import make_dates
from dlref.data.vocabulary import KINDS, make_vocabulary, read_vocabulary, tokenizers_of_run
from dlref.runtime.errors import UserError
from dlref.runtime.text import BEGIN, END, SPECIAL, UNKNOWN, make_tokenizer

EVALUATED = 64  # sentences at once


class TranslationData(SplitData):
    """Sources and targets; a subclass reads them.

    Args:
        tokenizer: what a token is: a `word`, a `character`, or pairs of bytes merged from the training text (`bpe`); or
            the folder of a run, for its own two.
        vocabulary_size: tokens on each side, four special ones among them: the most frequent words or characters, or
            as many as byte pairs are merged to.
        shared: one vocabulary for both sides, of their texts together.
        batch_size: tokens of a training batch on its longer side, padding included.
        longest: tokens of a source, its end included, and of a training target.
        too_long: what becomes of longer ones: an `error`, or they are cut (`truncate`), counted, and the targets too.
    """

    def __init__(
        self,
        tokenizer: str = "bpe",
        vocabulary_size: int = 8000,
        shared: bool = False,
        batch_size: int = 4096,
        longest: int = 100,
        too_long: Literal["error", "truncate"] = "error",
    ):
        super().__init__()
        self.tokenizer, self.vocabulary_size, self.shared = tokenizer, vocabulary_size, shared
        self.batch_size, self.longest, self.too_long = batch_size, longest, too_long
        self.splits: dict[str, Corpus] = {}

    def read(self) -> dict[str, Pairs]:
        """Read the splits `train`, `val` and `test`."""
        raise NotImplementedError

    def vocabularies(self, train: Pairs) -> tuple[dict, dict]:
        """The tokenisers of sources and targets."""
        if self.tokenizer not in KINDS:
            if not Path(self.tokenizer).is_dir():
                raise UserError(f"tokenizer: {self.tokenizer}; expected {', '.join(KINDS)} or a run's folder")
            return tuple(tokenizers_of_run(Path(self.tokenizer), "source_vocabulary", "target_vocabulary"))
        sides = [train.source, train.target]
        if self.shared:
            both = make_vocabulary([text for side in sides for text in side], self.tokenizer, self.vocabulary_size)
            return both, both
        return tuple(make_vocabulary(side, self.tokenizer, self.vocabulary_size) for side in sides)

    def setup(self, stage: str | None = None) -> None:
        """Read, check and encode everything, once, and move it to the trainer's device."""
        if not self.splits:
            check_at_least(1, vocabulary_size=self.vocabulary_size, batch_size=self.batch_size)
            check_at_least(2, longest=self.longest)
            pairs = self.read()
            self.source_vocabulary, self.target_vocabulary = self.vocabularies(pairs["train"])
            self.splits = {split: self.encoded(split, pairs[split]) for split in ("train", "val", "test")}
            # What an answer may have beyond the longest of training: a quarter, and a few.
            longest = int(self.splits["train"].target.lengths.max())
            self.longest_answer = longest + longest // 4 + 5
            self.names = pairs["test"].names
        for corpus in self.splits.values():
            corpus.source.to(self.device)
            corpus.target.to(self.device)

    def encoded(self, split: str, pairs: Pairs) -> Corpus:
        """A split as tokens, those that end it added; and its texts, unless it trains."""
        sides, texts, cut = [], [], 0
        for name, described in (("source", self.source_vocabulary), ("target", self.target_vocabulary)):
            tokenizer, rows = make_tokenizer(described), []
            for where, given in zip(pairs.names, getattr(pairs, name), strict=True):
                tokens = tokenizer.encode(given) if isinstance(given, str) else list(given)
                # A target that is not trained on is compared as text, and is not cut.
                if len(tokens) >= self.longest and (name == "source" or split == "train"):
                    if self.too_long == "error":
                        raise UserError(
                            f"{where}: {name}: {len(tokens)} tokens; expected at most {self.longest - 1}, or too_long: "
                            "truncate"
                        )
                    tokens, cut = tokens[: self.longest - 1], cut + 1
                rows.append([*tokens, END] if name == "source" else [BEGIN, *tokens, END])
            sides.append(rows)
            if split != "train":
                texts.append([as_text(tokenizer, given, name == "target") for given in getattr(pairs, name)])
        if cut:
            rank_zero_warn(f"{split}: {cut} sentences of more than {self.longest - 1} tokens are cut")
        return Corpus(*sides, tuple(texts) or None)

    def order(self, devices: int) -> TokenBatches:
        """Batches of about equal lengths, new ones in each epoch."""
        source, target = (side.lengths for side in (self.splits["train"].source, self.splits["train"].target))
        return TokenBatches(source, target - 1, self.batch_size * devices, devices)

    def eval_batch_size(self, split: str) -> int:
        """As many sentences, however long they are."""
        return EVALUATED

    def sources(self) -> Sequence[str]:
        """The name of each sentence to predict."""
        return self.names


def as_text(tokenizer, given: str | Sequence[int], is_reference: bool) -> str:
    """A sentence as text; a reference is written as answers are, with U+FFFD for each unknown token.

    No answer has that character, so an unknown token in a reference matches nothing.
    """
    if isinstance(given, str):
        return tokenizer.written(given) if is_reference else given
    text = tokenizer.decode(list(given))
    return text.replace(SPECIAL[UNKNOWN], "\ufffd") if is_reference else text


class SyntheticDates(TranslationData):
    """Dates as 13 languages write them, to ISO 8601; see `synthetic_dates`. They need no file.

    Args:
        train: pairs to train from.
        val: pairs to validate on.
        test: pairs to test on.
        withheld: test on the style of a language that training does not have.
        seed: of all of them.
        text: what every `TranslationData` takes.
    """

    def __init__(
        self, train: int = 40_000, val: int = 1000, test: int = 2000, withheld: bool = False, seed: int = 0, **text
    ):
        super().__init__(**text)
        self.counts, self.withheld, self.seed = (train, val, test), withheld, seed

    def read(self) -> dict[str, Pairs]:
        """Draw the pairs."""
        check_at_least(1, **dict(zip(("train", "val", "test"), self.counts, strict=True)))
        return make_dates(*self.counts, self.withheld, self.seed)


class ParallelText(TranslationData):
    """Files of which line by line one is the translation of the other: ROOT/train.de and ROOT/train.en, or .gz.

    Args:
        root: folder of the files.
        source: ending of the sources' names, such as de.
        target: ending of the targets' names, such as en.
        train: beginning of the names to train from.
        val: beginning of the names to validate on.
        test: beginning of the names to test on; null: `val`.
        text: what every `TranslationData` takes.
    """

    def __init__(
        self,
        root: str,
        source: str,
        target: str,
        train: str = "train",
        val: str = "val",
        test: str | None = "test",
        **text,
    ):
        super().__init__(**text)
        self.root, self.sides = Path(root), (source, target)
        self.names_of = {"train": train, "val": val, "test": test or val}

    def read(self) -> dict[str, Pairs]:
        """Read the files."""
        return {split: read_parallel(*self.files(name)) for split, name in self.names_of.items()}

    def files(self, name: str) -> list[Path]:
        """The two files of a split, gzipped where they are only there so."""
        plain = [self.root / f"{name}.{side}" for side in self.sides]
        packed = [path.with_name(f"{path.name}.gz") for path in plain]
        return [gz if gz.is_file() and not path.is_file() else path for path, gz in zip(plain, packed, strict=True)]


class PairFiles(TranslationData):
    """Files with a source and a target on each line: .tsv with a tab between, or .jsonl; gzipped or not.

    Args:
        train: to train from.
        val: to validate on.
        test: to test on; left out: `val`.
        text: what every `TranslationData` takes.
    """

    def __init__(self, train: str, val: str, test: str | None = None, **text):
        super().__init__(**text)
        self.paths = {"train": train, "val": val, "test": test or val}

    def read(self) -> dict[str, Pairs]:
        """Read the files."""
        warn_of_shared({split: [path] for split, path in self.paths.items()}, "files")
        return {split: read_table(Path(path)) for split, path in self.paths.items()}


class SageMakerTokens(TranslationData):
    """SageMaker's channels: RecordIO of integer tokens, and the vocabularies that name them.

    Args:
        train: train.rec.
        validation: val.rec.
        vocab: folder of vocab.src.json and vocab.trg.json.
        test: records to test on; left out: `validation`.
        batch_size: see `TranslationData`, as the two below.
        longest: tokens of a source, its end included.
        too_long: error or truncate.
    """

    def __init__(
        self,
        train: str,
        validation: str,
        vocab: str,
        test: str | None = None,
        batch_size: int = 4096,
        longest: int = 100,
        too_long: Literal["error", "truncate"] = "error",
    ):
        super().__init__(batch_size=batch_size, longest=longest, too_long=too_long)
        self.paths, self.vocab = {"train": train, "val": validation, "test": test or validation}, Path(vocab)

    def read(self) -> dict[str, Pairs]:
        """Read the vocabularies, then the records, whose tokens have to be in them."""
        self.read_vocabularies = tuple(read_vocabulary(self.vocab / f"vocab.{side}.json") for side in ("src", "trg"))
        sizes = tuple(len(described["tokens"]) for described in self.read_vocabularies)
        return {split: read_records(Path(path), sizes) for split, path in self.paths.items()}

    def vocabularies(self, train: Pairs) -> tuple[dict, dict]:
        """The vocabularies that were read."""
        return self.read_vocabularies
