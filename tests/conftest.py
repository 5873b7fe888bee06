"""What all tests share: one thread, no network, a cache of the session's own, and tiny language models."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from helpers import CONFIGS, Anyo, MakeData, settings_of, write_loops
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel, PreTrainedTokenizerFast

from anyo_lightning.cli.main import main
from anyo_lightning.data.datamodule import RecDataModule

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

TITLES = [
    "Toy Story (1995)",
    "GoldenEye (1995)",
    "Four Rooms (1995)",
    "Get Shorty (1995)",
    "Copycat (1995)",
    "Shanghai Triad (Yao a yao yao dao waipo qiao) (1995)",
    "Twelve Monkeys (1995)",
    "Babe (1995)",
    "Dead Man Walking (1995)",
    "Richard III (1995)",
    "Seven (Se7en) (1995)",
    "The Usual Suspects (1995)",
    "Mighty Aphrodite (1995)",
    "The Postman (Il Postino) (1994)",
    "Mr. Holland's Opus (1995)",
    "From Dusk Till Dawn (1996)",
]

SMALL_MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "initializer_range": 0.2}

torch.set_num_threads(1)


def save(folder: Path, tokenizer: PreTrainedTokenizerFast, make: Callable[[], PreTrainedModel], *, seed: int) -> str:
    """Write a tokenizer and a model of random weights; returns the folder."""
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(seed)
    make().save_pretrained(str(folder))
    return str(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with the real language models fetch 175 MB, so they run only with a cache that keeps them."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
    if "ANYO_TEST_CACHE" not in os.environ:
        skip = pytest.mark.skip(reason="needs ANYO_TEST_CACHE: a folder that keeps the fetched models")
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium, headless, with a profile of its own."""
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("needs Debian's chromium (apt-get install chromium) and the Python package playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def run_of(
    tiny_data: tuple[Path, Path], tiny_llm: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Trains a configuration for an epoch on the tiny data, once in the session; returns its folder."""
    made: dict[tuple[str, ...], Path] = {}

    def train(name: str, *options: str) -> Path:
        if (name, *options) not in made:
            folder = tmp_path_factory.mktemp("served") / name
            words = ["fit", f"--config={CONFIGS / name}.yaml", f"--run={folder}", "--trainer.accelerator=cpu"]
            words += [f"--data.interactions={tiny_data[0]}", f"--data.items={tiny_data[1]}", "--data.template=null"]
            words += ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--data.max_items=20"]
            encoders = settings_of(CONFIGS / f"{name}.yaml")["model"].get("init_args", {}).get("encoders", {})
            for name_of_llm in {"backbone", "item_backbone"} & encoders.get("init_args", {}).keys():
                backbone = f"--model.encoders.{name_of_llm}"
                words += [f"{backbone}.name={tiny_llm}", f"{backbone}.layers=2", f"{backbone}.dtype=float32"]
                words += ["--data.max_tokens=300"]
            main([*words, *options])
            made[name, *options] = folder
        return made[name, *options]

    return train


@pytest.fixture
def anyo(capsys: pytest.CaptureFixture[str]) -> Anyo:
    """Run the command line in this process; returns what it printed."""

    def run(*arguments: object) -> str:
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session", autouse=True)
def cache() -> Iterator[Path]:
    """`ANYO_CACHE` for the session: empty, or the folder that `ANYO_TEST_CACHE` names (for tests marked `real`)."""
    before = os.environ.get("ANYO_CACHE")
    with tempfile.TemporaryDirectory(prefix="anyo-tests-") as temporary:
        folder = os.environ.get("ANYO_TEST_CACHE", temporary)
        os.environ["ANYO_CACHE"] = folder
        yield Path(folder)
    if before is None:
        del os.environ["ANYO_CACHE"]
    else:
        os.environ["ANYO_CACHE"] = before


@pytest.fixture(scope="session")
def titles() -> list[str]:
    """A few movie titles."""
    return list(TITLES)


@pytest.fixture(scope="session")
def make_tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Makes folders with a random causal model (3 layers, width 32, shared key heads) and a byte-level tokenizer."""

    def make(name: str, *, seed: int) -> str:
        folder = tmp_path_factory.mktemp("models") / name
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(TITLES, trainer)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")
        config = LlamaConfig(
            **SMALL_MODEL,
            vocab_size=len(fast),
            num_hidden_layers=3,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=True,  # so that it can write, too
        )
        return save(folder, fast, lambda: LlamaModel(config), seed=seed)

    return make


@pytest.fixture(scope="session")
def tiny_llm(make_tiny_llm: Callable[..., str]) -> str:
    """A folder with a causal model that most tests share."""
    return make_tiny_llm("tiny-llm", seed=0)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random bidirectional model (2 layers, width 32) and a word-piece tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        TITLES, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    config = BertConfig(**SMALL_MODEL, vocab_size=len(fast), num_hidden_layers=2, max_position_embeddings=64)
    return save(folder, fast, lambda: BertModel(config), seed=0)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two CSV files: 40 users with 6 to 25 of 16 movies each, in loops through the catalogue with some noise."""
    return write_loops(tmp_path_factory.mktemp("data"), TITLES, users=40, lengths=(6, 26))


@pytest.fixture
def make_data(tiny_data: tuple[Path, Path]) -> MakeData:
    """Data modules over the tiny data set, set up; by default most histories are read whole."""

    def make(**changes: Any) -> RecDataModule:
        settings: dict[str, Any] = {"max_items": 20, "max_tokens": 300, "batch_tokens": 2000} | changes
        data = RecDataModule(**({"interactions": tiny_data[0], "items": tiny_data[1]} | settings))
        data.setup("fit")
        return data

    return make


@pytest.fixture
def small(tiny_data: tuple[Path, Path]) -> list[str]:
    """Options of the command line: the tiny data, an epoch on the CPU, no bar."""
    files = [f"--data.interactions={tiny_data[0]}", f"--data.items={tiny_data[1]}", "--data.template=null"]
    return [*files, "--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]


@pytest.fixture
def small_llm(tiny_llm: str) -> list[str]:
    """Options that put the first two layers of the tiny language model into a configuration's encoders."""
    backbone = "--model.encoders.backbone"
    return [f"{backbone}.name={tiny_llm}", f"{backbone}.layers=2", "--data.max_tokens=300"]
