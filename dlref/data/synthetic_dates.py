"""Dates as people write them and in ISO 8601: a task with a known correct translation. No file is needed.

Babel writes the dates as CLDR specifies for each language. Forms that are ambiguous to a reader who does not know the
language, such as the American 3/4/26, are left out; years of two digits are those from 1970 to 2069.
"""

import random
import unicodedata
from datetime import date, timedelta

from babel.dates import format_date

from dlref.data.pairs import Pairs

STYLES = ("full", "long", "medium", "short")
LANGUAGES = ("en_GB", "en_US", "cs", "da", "de", "es", "fi", "fr", "it", "ja", "nl", "pl", "pt", "tr")
AMBIGUOUS = ("en_US", "short")
WITHHELD = ("it", "long")  # not in training or validation, which have the other styles of this language
FIRST, DAYS = date(1970, 1, 1), 36525
EVALUATED = 0.05  # share of the days that only validation uses, and of those that only testing uses
LONG = 6  # letters; a typing error in a shorter word could make it another month


def make_dates(train: int, val: int, test: int, withheld: bool, seed: int) -> dict[str, Pairs]:
    """Draw the pairs of each split, on days that no other split has. `withheld`: test on WITHHELD alone."""
    rng = random.Random(seed)
    days = list(range(DAYS))
    rng.shuffle(days)
    held = int(EVALUATED * DAYS)
    known = [(language, style) for language in LANGUAGES for style in STYLES]
    known = [form for form in known if form not in (AMBIGUOUS, WITHHELD)]
    forms = {"train": known, "val": known, "test": [WITHHELD] if withheld else known}
    parts = {"train": days[2 * held :], "val": days[:held], "test": days[held : 2 * held]}
    counts = {"train": train, "val": val, "test": test}
    return {split: _draw(rng, parts[split], forms[split], counts[split], split) for split in counts}


def _draw(rng: random.Random, days: list[int], forms: list[tuple[str, str]], count: int, split: str) -> Pairs:
    sources, targets = [], []
    for _ in range(count):
        day = FIRST + timedelta(days=rng.choice(days))
        language, style = rng.choice(forms)
        sources.append(typed(rng, format_date(day, style, locale=language)))
        targets.append(day.isoformat())
    return Pairs(sources, targets, [f"{split} {i}" for i in range(count)])


def typed(rng: random.Random, text: str) -> str:
    """Return a text as somebody types it: at times without capitals, marks or punctuation, or with a typing error."""
    if rng.random() < 0.3:
        text = text.lower()
    if rng.random() < 0.15:
        text = "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
    if rng.random() < 0.15 and any(c.isalpha() for c in text):
        text = text.replace(",", "").replace(". ", " ")
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) >= LONG and word.isalpha()]
    if long and rng.random() < 0.15:
        i = rng.choice(long)
        words[i] = slip(rng, words[i])
    return ("  " if rng.random() < 0.05 else " ").join(words)


def slip(rng: random.Random, word: str) -> str:
    """Return a word with one letter left out, doubled or swapped with the next; the first two letters stay."""
    at = rng.randrange(2, len(word) - 1)
    return rng.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        ]
    )
