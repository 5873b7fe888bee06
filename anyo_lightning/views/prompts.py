"""What an LLM is asked for a view of a history, and how its answer is read: as data, never as instructions."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from anyo_lightning.errors import InputError

Kind = Literal["rewrite", "summarise"]
Outcome = Literal["written", "refused", "empty"]

PROMPTS: dict[Kind, str] = {
    "summarise": "Here are items that a user liked, oldest first:\n{history}\n\n"
    "Describe in one sentence what this user likes.",
    "rewrite": "Rewrite this list of items that a user liked: put each item in other words, or replace it by one that "
    "is much like it. Answer with one line for each item, with its number, and nothing else.\n\n{history}",
}
NEW_TOKENS_A_SUMMARY = 48
NEW_TOKENS_A_LINE = 24
NO_REPEAT: dict[Kind, int] = {"summarise": 3, "rewrite": 0}  # tokens; a rewritten line may keep its title
LONGEST_SUMMARY, LONGEST_LINE = 600, 200  # characters
LONGEST_ANSWER = 20_000  # characters of an answer that are kept
REFUSAL = re.compile(
    r"\W*((i'm|i am|we're) (very |so |really )?(sorry|unable|not able)|sorry\b|i apologi[sz]e"
    r"|i (can't|cannot|can not|won't|will not)\b|as an? (ai|artificial|language model)\b|unfortunately, i\b)",
    re.IGNORECASE,
)
NUMBERED = re.compile(r"\W{0,3}(\d{1,4})\s*[.):\]]\**\s*(\S.*)")


@dataclass(frozen=True)
class View:
    """What was made of an answer.

    Attributes:
        texts: For `summarise` one text; for `rewrite` one per item, None if its line could not be read. Empty unless
            it was `written`.
        outcome: Whether the answer can be used, was refused by the model, or holds nothing that can be read.
    """

    texts: tuple[str | None, ...]
    outcome: Outcome


def check_prompt(template: str) -> None:
    """Refuse a prompt without `{history}`.

    Raises:
        InputError: When it has no `{history}`.
    """
    if "{history}" not in template:
        raise InputError(f"Expected {{history}} in --prompt, got {template!r}")


def write_prompt(template: str, texts: Sequence[str], *, kind: Kind) -> str:
    """The prompt with the history's texts in it, one per line, numbered for `rewrite`."""
    lines = [f"{number}. {text}" for number, text in enumerate(texts, 1)] if kind == "rewrite" else texts
    return template.replace("{history}", "\n".join(lines))


def new_tokens(kind: Kind, items: int) -> int:
    """The most tokens that an answer about this many items may take."""
    return NEW_TOKENS_A_SUMMARY if kind == "summarise" else NEW_TOKENS_A_LINE * items


def clean(answer: str) -> str:
    """The answer without control and formatting characters, white space collapsed, of bounded length."""
    lines = answer[:LONGEST_ANSWER].splitlines()
    kept = ("".join(c if unicodedata.category(c)[0] != "C" else " " for c in line) for line in lines)
    return "\n".join(line for line in (" ".join(text.split()) for text in kept) if line)


def read_answer(answer: str, *, kind: Kind, items: int, cut: bool = False) -> View:
    """Make a view of a cleaned answer.

    Args:
        answer: As `clean` returns it.
        kind: What was asked for.
        items: The number of items that it is about.
        cut: Whether the answer stopped because it was too long: its last, half sentence or line is then left out.
    """
    if REFUSAL.match(answer.replace("\u2019", "'")):
        return View((), "refused")
    if kind == "summarise":
        text = answer.replace("\n", " ")
        if cut or len(text) > LONGEST_SUMMARY:
            text = text[:LONGEST_SUMMARY]
            text = text[: max(text.rfind(end) for end in ".!?") + 1] or text
        return View((text,), "written") if any(c.isalnum() for c in text) else View((), "empty")
    lines: dict[int, str] = {}
    for line in answer.splitlines()[: -1 if cut else None]:
        if found := NUMBERED.match(line):
            lines.setdefault(int(found[1]), found[2][:LONGEST_LINE])
    texts = tuple(lines.get(number) for number in range(1, items + 1))
    return View(texts, "written") if any(texts) else View((), "empty")
