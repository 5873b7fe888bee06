"""Titles as people type them: which item is meant, by fuzzy matching (rapidfuzz)."""

import re
from collections.abc import Sequence

import numpy as np
from rapidfuzz import fuzz, process, utils

from anyo_lightning.errors import InputError

CLOSE = 80.0  # of 100: "Termnator" is "Terminator" (95), and "Her" is not "Heat" (57)
BRACKETS = r"\s*\([^)]*\)"
UP_TO_YEAR = r"^.*?\(\d{4}\)"


class TitleMatcher:
    """Finds the item that a typed title means.

    An item is known by its title, by its title without what is in brackets, and by its text up to a year in brackets:
    `Seven (Se7en)`, `Seven`, `Seven (Se7en) (1995)`. Case, punctuation and the order of words do not count (`The
    Godfather` is `Godfather, The`), but numbers do (`Rocky 3` is not `Rocky 2`).

    Args:
        titles: Of each item.
        texts: Of each item, the whole.
        popularity: (items,) of items that fit equally well, the one with the highest is meant.
    """

    def __init__(self, titles: Sequence[str], texts: Sequence[str], popularity: np.ndarray) -> None:
        self.titles, self.popularity = list(titles), popularity
        self.forms: list[str] = []
        owners: list[int] = []
        for item, (title, text) in enumerate(zip(titles, texts, strict=True)):
            year = re.match(UP_TO_YEAR, text)
            names = {title, re.sub(BRACKETS, "", title), year[0] if year else title}
            forms = sorted(filter(None, map(utils.default_process, names)))
            self.forms += forms
            owners += [item] * len(forms)
        self.owners = np.array(owners, dtype=np.int64)
        self.numbers = [_numbers(form) for form in self.forms]
        self._same: dict[str, int] = {}  # what `find` says of titles with the very words of a form
        for form, item in zip(self.forms, owners, strict=True):
            words = _sorted_words(form)
            self._same[words] = self._preferred({item, self._same.get(words, item)})

    def find(self, title: str) -> int:
        """The item that is meant: the most similar title, or else the only one that begins with these words.

        Args:
            title: As typed.

        Raises:
            InputError: No title is close; the nearest are named.
        """
        wanted = utils.default_process(title)
        if (same := self._same.get(_sorted_words(wanted))) is not None:
            return same
        numbers = _numbers(wanted)
        found = process.extract(wanted, self.forms, scorer=fuzz.token_sort_ratio, score_cutoff=CLOSE, limit=None)
        alike = [(score, int(self.owners[form])) for _, score, form in found if self.numbers[form] == numbers]
        if wanted and alike:
            best = max(score for score, _ in alike)
            return self._preferred({item for score, item in alike if score == best})
        begun = {int(self.owners[form]) for form, text in enumerate(self.forms) if text.startswith(f"{wanted} ")}
        if wanted and len(begun) == 1:
            return begun.pop()
        shown = ", ".join(repr(self.titles[item]) for item in self.nearest(title)) or "none"
        raise InputError(f"Expected a title of the catalogue, got {title!r}; the nearest are {shown}")

    def _preferred(self, items: set[int]) -> int:
        """Of items that fit equally well, the one with the highest popularity, then the first."""
        return max(items, key=lambda item: (self.popularity[item], -item))

    def nearest(self, title: str, count: int = 3) -> list[int]:
        """The items whose titles are most similar, each once.

        Args:
            title: As typed.
            count: How many at most.
        """
        if not (wanted := utils.default_process(title)):
            return []
        found = process.extract(wanted, self.forms, scorer=fuzz.WRatio, limit=4 * count)
        return list(dict.fromkeys(int(self.owners[form]) for _, _, form in found))[:count]


def nearest_ids(wanted: str, ids: Sequence[str], count: int = 3) -> list[str]:
    """The ids that are written most alike.

    Args:
        wanted: As given.
        ids: All that there are.
        count: How many at most.
    """
    return [found for found, _, _ in process.extract(wanted, ids, scorer=fuzz.ratio, limit=count)]


def _sorted_words(text: str) -> str:
    return " ".join(sorted(text.split()))


def _numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d+", text))
