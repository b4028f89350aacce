"""Data modules for translation: sources and targets from files, their tokenisers, batches by the number of tokens.

Tasks receive batches of type `dlref.data.pairs.Batch`, gathered on the training device. After `setup`,
`source_vocabulary` and `target_vocabulary` are the tokenisers as `dlref.runtime.text` describes them, `longest` and
`longest_answer` the maximum numbers of tokens in a source and in a predicted translation, and `too_long` specifies how
longer sources are treated.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn

from dlref.data.files import warn_of_shared
from dlref.data.loader import SplitData, check_at_least, check_split
from dlref.data.pairs import (
    Corpus,
    Pairs,
    TokenBatches,
    check_pairs,
    check_tokens,
    read_parallel,
    read_records,
    read_table,
)
from dlref.data.synthetic_dates import make_dates
from dlref.data.vocabulary import KINDS, make_vocabulary, read_vocabulary, tokenizers_of_run
from dlref.runtime.errors import UserError
from dlref.runtime.text import BEGIN, END, SPECIAL, UNKNOWN, make_tokenizer

EVALUATED = 64  # sentences in an evaluation batch


class TranslationData(SplitData):
    """Sources and targets; a subclass reads them.

    Args:
        tokenizer: the kind of token: `word`, `character`, or byte pairs merged from the training text (`bpe`); or the
            folder of a run, to use its two tokenisers.
        vocabulary_size: number of tokens on each side, including four special ones: the most frequent words or
            characters, or byte pairs merged until there are so many.
        shared: make one vocabulary for both sides from all of their texts.
        batch_size: maximum number of tokens on the longer side of a training batch, including padding.
        longest: maximum number of tokens in a source or a training target, including the one that ends it.
        too_long: how to treat longer sources and training targets: `error`, or `truncate` to cut and count them.
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
        super().__init__(batch_size)
        self.tokenizer, self.vocabulary_size, self.shared = tokenizer, vocabulary_size, shared
        self.longest, self.too_long = longest, too_long

    def read(self) -> dict[str, Pairs]:
        """Read the splits `train`, `val` and `test`."""
        raise NotImplementedError

    def vocabularies(self, train: Pairs) -> tuple[dict, dict]:
        """Return the tokenisers of sources and targets."""
        if self.tokenizer not in KINDS:
            if not Path(self.tokenizer).is_dir():
                raise UserError(f"tokenizer: {self.tokenizer}; expected {', '.join(KINDS)} or a run's folder")
            return tuple(tokenizers_of_run(Path(self.tokenizer), "source_vocabulary", "target_vocabulary"))
        sides = [train.source, train.target]
        if not all(isinstance(text, str) for side in sides for text in side):
            raise UserError("train: tokens; expected texts, or a data module whose vocabularies names the tokens")
        if self.shared:
            both = make_vocabulary([text for side in sides for text in side], self.tokenizer, self.vocabulary_size)
            return both, both
        return tuple(make_vocabulary(side, self.tokenizer, self.vocabulary_size) for side in sides)

    def setup(self, stage: str | None = None) -> None:
        """Read, check and encode all data once, and move it to the trainer's device."""
        if not self.splits:
            check_at_least(1, vocabulary_size=self.vocabulary_size, batch_size=self.batch_size)
            check_at_least(2, longest=self.longest)
            pairs = self.read()
            for split in ("train", "val", "test"):
                check_split(split, pairs)
                check_pairs(split, pairs[split])
            self.source_vocabulary, self.target_vocabulary = self.vocabularies(pairs["train"])
            self.splits = {split: self.encoded(split, pairs[split]) for split in ("train", "val", "test")}
            # A translation may be longer than the longest training target by a quarter and 5 tokens.
            longest = int(self.splits["train"].target.lengths.max())
            self.longest_answer = longest + longest // 4 + 5
            self.names = pairs["test"].names
        for corpus in self.splits.values():
            corpus.source.to(self.device)
            corpus.target.to(self.device)

    def encoded(self, split: str, pairs: Pairs) -> Corpus:
        """Encode a split, adding the tokens that begin and end sentences; keep its texts unless it is for training."""
        sides, texts, cut = [], [], 0
        for name, described in (("source", self.source_vocabulary), ("target", self.target_vocabulary)):
            tokenizer, rows = make_tokenizer(described), []
            for where, given in zip(pairs.names, getattr(pairs, name), strict=True):
                if not isinstance(given, str):
                    check_tokens(given, len(tokenizer), f"{where}: {name}")
                tokens = tokenizer.encode(given) if isinstance(given, str) else list(given)
                # A target of an evaluated split is compared as text and never cut.
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
            rank_zero_warn(f"{split}: {cut} sentences of more than {self.longest - 1} tokens are truncated")
        return Corpus(*sides, tuple(texts) or None)

    def order(self, devices: int) -> TokenBatches:
        """Return batches of sentences of similar length, drawn anew in each epoch."""
        source, target = (side.lengths for side in (self.splits["train"].source, self.splits["train"].target))
        return TokenBatches(source, target - 1, self.batch_size * devices, devices)

    def eval_batch_size(self, split: str) -> int:
        """Return the number of sentences in a batch, however long they are."""
        return EVALUATED

    def sources(self) -> Sequence[str]:
        """Return the name of each sentence to predict."""
        return self.names


def as_text(tokenizer, given: str | Sequence[int], is_reference: bool) -> str:
    """Return a sentence as text; a reference is written like a prediction, with U+FFFD for each unknown token.

    No prediction contains that character, so an unknown token in a reference matches nothing.
    """
    if isinstance(given, str):
        return tokenizer.written(given) if is_reference else given
    text = tokenizer.decode(list(given))
    return text.replace(SPECIAL[UNKNOWN], "\ufffd") if is_reference else text


class SyntheticDates(TranslationData):
    """Dates as written in 13 languages, to be translated to ISO 8601; see `synthetic_dates`. No file is needed.

    Args:
        train: number of pairs to train on.
        val: number of pairs to validate on.
        test: number of pairs to test on.
        withheld: test on a style of one language that is not in the training pairs.
        seed: seed of all pairs.
        text: further arguments of `TranslationData`.
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
    """Pairs of files that are line-by-line translations of each other: ROOT/train.de and ROOT/train.en, or .gz.

    Args:
        root: folder of the files.
        source: ending of the sources' file names, such as de.
        target: ending of the targets' file names, such as en.
        train: beginning of the names of the training files.
        val: beginning of the names of the validation files.
        test: beginning of the names of the test files; null: `val`.
        text: further arguments of `TranslationData`.
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
        warn_of_shared({split: [name] for split, name in self.names_of.items()}, "files")
        return {split: read_parallel(*self.files(name)) for split, name in self.names_of.items()}

    def files(self, name: str) -> list[Path]:
        """Return the two files of a split; one that exists only gzipped gets .gz."""
        plain = [self.root / f"{name}.{side}" for side in self.sides]
        packed = [path.with_name(f"{path.name}.gz") for path in plain]
        return [gz if gz.is_file() and not path.is_file() else path for path, gz in zip(plain, packed, strict=True)]


class PairFiles(TranslationData):
    """Files with a source and a target on each line: .tsv with a tab between, or .jsonl; gzipped or not.

    Args:
        train: file to train on.
        val: file to validate on.
        test: file to test on; by default, `val`.
        text: further arguments of `TranslationData`.
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
        test: records to test on; by default, `validation`.
        batch_size: see `TranslationData`.
        longest: see `TranslationData`.
        too_long: see `TranslationData`.
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
        """Read the records."""
        warn_of_shared({split: [path] for split, path in self.paths.items()}, "files")
        return {split: read_records(Path(path)) for split, path in self.paths.items()}

    def vocabularies(self, train: Pairs) -> tuple[dict, dict]:
        """Read the vocabularies, which must have all tokens of the records."""
        return tuple(read_vocabulary(self.vocab / f"vocab.{side}.json") for side in ("src", "trg"))
