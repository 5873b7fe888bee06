"""Who writes views: a local causal LLM, or an OpenAI-compatible endpoint."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from anyo_lightning.errors import InputError
from anyo_lightning.hardware import fast_dtype
from anyo_lightning.llm.aliases import load_config, load_tokenizer, loading, locate
from anyo_lightning.views.prompts import clean
from anyo_lightning.views.store import Answer

if TYPE_CHECKING:
    from openai import OpenAI

DEFAULT = "smollm2-135m-instruct"
ENVIRONMENT = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL")
RETRIES, TIMEOUT_S, PARALLEL = 5, 120.0, 8


class Writer(Protocol):
    """What both writers have."""

    identity: dict[str, str]  # what decides its answers, besides prompt and settings

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """The number of tokens of each prompt."""
        ...

    def write(self, prompts: Sequence[str], *, max_new_tokens: int) -> list[Answer]:
        """Answer each prompt."""
        ...


class LocalWriter:
    """A causal LLM on this machine, in `fast_dtype`, whose chat template is used if it has one.

    Args:
        name: Alias, local folder or hub id.
        revision: Branch, tag or commit of a hub id.
        temperature: Of sampling; 0 is greedy.
        seed: Seed of the sampling; the same prompts in the same batches give the same answers.
        no_repeat: No sequence of this many tokens is written twice or copied from the prompt: a small model would go in
            circles or copy titles. 0 allows both.

    Raises:
        InputError: When there is no such model.
    """

    def __init__(
        self,
        name: str = DEFAULT,
        *,
        revision: str | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        no_repeat: int = 0,
    ) -> None:
        self.location = locate(name, revision)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(name, revision)
        self.tokenizer.padding_side = "left"
        self.temperature, self.seed, self.no_repeat = temperature, seed, no_repeat
        self.identity = {
            "writer": "local",
            "name": self.location.name,
            "revision": self.location.content or str(self.location.revision),
            "dtype": fast_dtype(),
            "no_repeat": str(no_repeat),
        }
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The LLM, loaded on its first use.

        Raises:
            InputError: When it cannot be read, or has no weights of a language model's output layer.
        """
        if self._model is None:
            with loading(self.location):
                self._model, report = AutoModelForCausalLM.from_pretrained(
                    self.location.source,
                    config=load_config(self.location),
                    revision=self.location.revision,
                    dtype=getattr(torch, self.identity["dtype"]),
                    trust_remote_code=False,
                    output_loading_info=True,
                )
            if missing := sorted(report["missing_keys"]):
                raise InputError(
                    f"Expected a causal LLM to write views, got {self.location.name} without weights for {missing[0]}"
                )
            self._model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        return self._model

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """The number of tokens of each prompt, with the chat template."""
        encoded = self.tokenizer([self._chat(prompt) for prompt in prompts], add_special_tokens=False)
        return [len(ids) for ids in encoded["input_ids"]]

    @torch.no_grad()
    def write(self, prompts: Sequence[str], *, max_new_tokens: int) -> list[Answer]:
        """Answer all prompts as one batch, padded on the left.

        Raises:
            InputError: When a prompt with its answer is longer than the model's positions.
        """
        texts = [self._chat(prompt) for prompt in prompts]
        inputs = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        length, limit = inputs["input_ids"].shape[1], getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and length + max_new_tokens > limit:
            raise InputError(
                f"Expected at most {limit} tokens for {self.location.name}, got a prompt of {length} and "
                f"{max_new_tokens} to write; lower --max_items"
            )
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            no_repeat_ngram_size=self.no_repeat,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling,
        )
        torch.manual_seed(self.seed)
        written = self.model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings
        )[:, length:]
        answers = []
        for row, read in zip(written.tolist(), inputs["attention_mask"].sum(1).tolist(), strict=True):
            ended = self.tokenizer.eos_token_id in row
            tokens = read + (row.index(self.tokenizer.eos_token_id) + 1 if ended else len(row))
            text = clean(self.tokenizer.decode(row, skip_special_tokens=True))
            answers.append(Answer(text, "stop" if ended else "length", tokens))
        return answers

    def _chat(self, prompt: str) -> str:
        """The prompt as a user's message, where the model has a chat template."""
        if self.tokenizer.chat_template is None:
            return prompt
        message = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text


class EndpointWriter:
    """Any OpenAI-compatible endpoint, through the `openai` client and its own retries.

    Address and key come from the environment alone (`OPENAI_BASE_URL`, `OPENAI_API_KEY`), so that neither ends up in
    a shell's history or a configuration file. The histories' texts leave this machine.

    Args:
        model: The model's name there; None takes `OPENAI_MODEL`.
        temperature: Passed on.
        seed: Passed on.

    Raises:
        InputError: When the client is not installed or the environment does not say where to ask.
    """

    def __init__(self, model: str | None = None, *, temperature: float = 0.0, seed: int = 0) -> None:
        found = {name: os.environ.get(name) for name in ENVIRONMENT} | ({"OPENAI_MODEL": model} if model else {})
        if missing := [name for name, value in found.items() if not value]:
            raise InputError(f"Expected {' and '.join(missing)} in the environment for --backend endpoint, got none")
        self.model_name = str(found["OPENAI_MODEL"])
        self.temperature, self.seed = temperature, seed
        address = urlsplit(str(found["OPENAI_BASE_URL"]))
        place = f"{address.hostname}:{address.port}{address.path}"  # without any password
        self.identity = {"writer": "endpoint", "name": self.model_name, "revision": place}
        self.client = _client()

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """An estimate of each prompt's tokens, one per four characters: the endpoint's tokenizer is not known."""
        return [-(-len(prompt) // 4) for prompt in prompts]

    def write(self, prompts: Sequence[str], *, max_new_tokens: int) -> list[Answer]:
        """Answer each prompt, some at a time.

        Raises:
            InputError: When the endpoint still fails after its retries.
        """
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(lambda prompt: self._ask(prompt, max_new_tokens), prompts))

    def _ask(self, prompt: str, max_new_tokens: int) -> Answer:
        import openai

        try:
            completion = self.client.chat.completions.create(
                model=self.model_name,
                messages=[{"role": "user", "content": prompt}],
                max_tokens=max_new_tokens,
                temperature=self.temperature,
                seed=self.seed,
            )
        except openai.OpenAIError as error:
            if getattr(error, "code", None) == "content_filter":
                return Answer("", "refused", self.count_tokens([prompt])[0])
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"Expected answers from the endpoint, got {type(error).__name__}: {reason}. Finished answers are kept: "
                "run the same command again to resume"
            ) from error
        tokens = completion.usage.total_tokens if completion.usage else None
        if not completion.choices:
            return Answer("", "stop", tokens)
        choice = completion.choices[0]
        refused = choice.finish_reason == "content_filter" or bool(choice.message.refusal)
        finish = "refused" if refused else "length" if choice.finish_reason == "length" else "stop"
        return Answer(clean(choice.message.content or ""), finish, tokens)


def _client() -> "OpenAI":
    try:
        from openai import OpenAI
    except ImportError as error:
        raise InputError("Expected the openai client: pip install '.[augment]' in the clone") from error
    return OpenAI(max_retries=RETRIES, timeout=TIMEOUT_S)
