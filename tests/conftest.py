"""What all tests share: one thread, no network, a cache of the session's own, and tiny language models."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

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

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with the real language models fetch 175 MB, so they run only with a cache that keeps them."""
    if "ANYO_TEST_CACHE" not in os.environ:
        skip = pytest.mark.skip(reason="needs ANYO_TEST_CACHE: a folder that keeps the fetched models")
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(skip)


@pytest.fixture
def anyo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the command line in this process; returns what it printed."""
    from anyo_lightning.cli.main import main

    def run(*arguments: object) -> str:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr("sys.argv", ["anyo", *words])
        main(words)
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


@pytest.fixture(autouse=True)
def no_seed_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """`seed_everything` leaves its seed in the environment, where a data module without one would find it."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(scope="session")
def titles() -> list[str]:
    """A few movie titles."""
    return list(TITLES)


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random causal model (3 layers, width 32, shared key heads) and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llm"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TITLES,
        trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")
    fast.save_pretrained(str(folder))
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,  # so that it can write, too
    )
    torch.manual_seed(0)
    LlamaModel(config).save_pretrained(str(folder))
    return str(folder)


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
    fast.save_pretrained(str(folder))
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two CSV files: 40 users with 6 to 25 of 16 movies each, in loops through the catalogue with some noise."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    rows = ["user_id,item_id,timestamp"]
    for user in range(40):
        item = int(random.integers(16))
        for time in range(int(random.integers(6, 26))):
            rows.append(f"u{user},m{item},{time}")
            item = (item + 1) % 16 if random.random() < 0.8 else int(random.integers(16))
    (folder / "interactions.csv").write_text("\n".join(rows) + "\n")
    items = [f'm{i},"{title}"' for i, title in enumerate(TITLES)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *items]) + "\n")
    return folder / "interactions.csv", folder / "items.csv"
