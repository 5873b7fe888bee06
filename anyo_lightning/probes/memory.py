"""Does the bare LLM know the data set? Titles and next items completed from memory, each beside a control.

The full causal LLM, as it was published, reads a list of titles, one per line, and continues it greedily. Titles: the
list ends in the first half of a title's tokens. Next items: it is the end of a user's history. Controls: the second
half of another title after this first half, and this next item after another user's history. Completions are rare in
small models, so the log-likelihood of the right answer is compared as well. Both also count what any reader of English
would guess (`, The` after a title), so the completed titles are listed for a reader to judge.

Reference: Carlini et al., Quantifying Memorization Across Neural Language Models (ICLR 2023, arXiv 2202.07646), whose
test is completion by greedy decoding.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import GenerationConfig

from anyo_lightning.compare.stats import paired_differences
from anyo_lightning.data.splits import Queries
from anyo_lightning.evaluation.ranking import with_progress
from anyo_lightning.views.writers import LocalWriter

SHOWN_TITLES = 5  # whole titles before one that is to be completed: they show what a line is
SHOWN_ITEMS = 10  # the latest items of a history
LONGEST_PROMPT, LONGEST_ANSWER = 400, 48  # tokens; of a prompt the end is kept
BATCH, LIKELIHOOD_BATCH = 32, 8  # prompts at once; likelihoods need the logits of all their tokens

Tokens = list[int]


class BareLLM:
    """Lists of titles, read and continued by the LLM as it was published.

    Args:
        writer: Loads the LLM.
    """

    def __init__(self, writer: LocalWriter) -> None:
        self.writer, self.tokenizer = writer, writer.tokenizer

    def tokens(self, text: str) -> Tokens:
        """The tokens of a text within a line."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def lines(self, titles: Sequence[str]) -> Tokens:
        """The tokens of whole lines, with what the tokenizer puts at the start of a text."""
        return list(self.tokenizer("".join(f"{title}\n" for title in titles))["input_ids"])[-LONGEST_PROMPT:]

    def text(self, tokens: Tokens) -> str:
        """The first line of tokens as text."""
        decoded = self.tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(decoded, str)
        return decoded.split("\n")[0].strip()

    @torch.no_grad()
    def complete(self, prompts: Sequence[Tokens], new_tokens: int) -> list[str]:
        """The rest of each prompt's last line, by greedy decoding."""
        model, found = self.writer.model, []
        settings = GenerationConfig(  # all named: otherwise the model's own generation_config.json decides
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        for span in with_progress(_spans(len(prompts), BATCH), "completing"):
            inputs = self.tokenizer.pad({"input_ids": prompts[span]}, return_tensors="pt").to(model.device)  # left
            written = model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings
            )
            found += [self.text(row) for row in written[:, inputs["input_ids"].shape[1] :].tolist()]
        return found

    @torch.no_grad()
    def log_likelihoods(self, prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> np.ndarray:
        """(prompts,) the mean log-likelihood of each answer's tokens after its prompt, in nats."""
        model, found = self.writer.model, []
        everything = list(zip(prompts, answers, strict=True))
        for span in with_progress(_spans(len(prompts), LIKELIHOOD_BATCH), "weighing"):
            pairs = everything[span]
            longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
            ids = torch.tensor([[*p, *a] + [0] * (longest - len(p) - len(a)) for p, a in pairs], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits  # causal: no token sees the padding after it
            for row, (prompt, answer) in enumerate(pairs):
                places = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
                targets = torch.tensor(answer, device=model.device)
                found.append(-float(F.cross_entropy(logits[row, places].float(), targets)))
        return np.array(found)


def titles_from_memory(llm: BareLLM, titles: Sequence[str], *, sample: int, seed: int) -> dict[str, Any] | None:
    """How many titles the LLM completes exactly from their first half, and how likely the second half is.

    Args:
        llm: The LLM.
        titles: The catalogue's.
        sample: How many to ask, of those with at least two tokens.
        seed: Chooses them.

    Returns:
        Figures with their controls; None if there are too few titles.
    """
    random = np.random.default_rng(seed)
    distinct = list(dict.fromkeys(titles))
    order = [distinct[place] for place in random.permutation(len(distinct))]
    shown, asked = order[:SHOWN_TITLES], [llm.tokens(title) for title in order[SHOWN_TITLES:]]
    asked = [tokens[:LONGEST_ANSWER] for tokens in asked if len(tokens) > 1][:sample]
    if len(asked) < 2:
        return None
    halves = [(tokens[: -(len(tokens) // 2)], tokens[-(len(tokens) // 2) :]) for tokens in asked]
    prompts = [llm.lines(shown) + first for first, _ in halves]
    answers = [second for _, second in halves]
    written = llm.complete(prompts, max(map(len, answers)) + 2)  # room to continue after the title's end
    texts = [llm.text(answer) for answer in answers]
    right = [one == other for one, other in zip(written, texts, strict=True)]
    found = _figures(
        right,
        [one == other for one, other in zip(written, _next(texts), strict=True)],
        llm.log_likelihoods(prompts, answers),
        llm.log_likelihoods(prompts, _next(answers)),
    )
    found["examples"] = [
        f"{llm.text(first)} | {text}"
        for (first, _), text, is_right in zip(halves, texts, right, strict=True)
        if is_right
    ]
    return found


def next_items_from_memory(
    llm: BareLLM, titles: Sequence[str], queries: Queries, *, sample: int, seed: int
) -> dict[str, Any] | None:
    """How often the LLM continues the end of a history with the title of the next item, and how likely that is.

    The control's history is another user's, whose latest items do not show the answer.

    Args:
        llm: The LLM.
        titles: The catalogue's.
        queries: Histories and their next items.
        sample: How many users to ask for, one row each.
        seed: Chooses them.

    Returns:
        Figures with their controls; None if there are too few users.
    """
    rows = np.unique(queries.user, return_index=True)[1]
    rows = np.random.default_rng(seed).permutation(rows)[:sample]
    if len(rows) < 2:
        return None
    shown = [[titles[item] for item in queries.history(int(row))[-SHOWN_ITEMS:]] for row in rows]
    expected = [titles[item] for item in queries.target[rows]]
    prompts, answers = [llm.lines(of) for of in shown], [llm.tokens(title)[:LONGEST_ANSWER] for title in expected]
    others = [_another(shown, user, title) for user, title in enumerate(expected)]
    written = llm.complete(prompts, max(map(len, answers)) + 2)
    return _figures(
        [begins_with(text, title) for text, title in zip(written, expected, strict=True)],
        [begins_with(written[other], title) for other, title in zip(others, expected, strict=True)],
        llm.log_likelihoods(prompts, answers),
        llm.log_likelihoods([prompts[other] for other in others], answers),
    )


def begins_with(text: str, title: str) -> bool:
    """Whether a line is a title, or a title and more: `Toy Story (1995)` for `Toy Story`, not `Toy Storyteller`."""
    text, title = text.casefold(), title.casefold()
    return text.startswith(title) and not text[len(title) : len(title) + 1].isalnum()


def _spans(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _another(shown: list[list[str]], user: int, title: str) -> int:
    """The next user whose items do not show the title, or simply the next one."""
    others = [*range(user + 1, len(shown)), *range(user)]
    return next((other for other in others if title not in shown[other]), others[0])


def _next(values: list[Any]) -> list[Any]:
    """Each value's successor; the last one gets the first."""
    return [*values[1:], values[0]]


def _figures(hits: list[bool], other_hits: list[bool], likely: np.ndarray, other_likely: np.ndarray) -> dict[str, Any]:
    """Rates and mean log-likelihoods per token, each with its control and the paired difference."""
    found: dict[str, Any] = {"asked": len(hits)}
    pairs = {"completed": (np.array(hits, dtype=float), np.array(other_hits, dtype=float))}
    pairs["log_likelihood"] = likely, other_likely
    for name, (value, control) in pairs.items():
        (difference,) = paired_differences(value[:, None], control)
        found[name] = {
            "value": float(value.mean()),
            "control": float(control.mean()),
            "difference": asdict(difference),
        }
    return found
