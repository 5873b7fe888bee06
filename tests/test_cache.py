"""The store of text vectors: what is encoded, when, and what survives."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LORA, kill_after
from torch import nn

from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone, load_tokenizer
from anyo_lightning.llm.text_vectors import embed_texts


class Counting(Backbone):
    """A real backbone that counts the rows it encodes."""

    rows = 0

    def forward(self, token_ids: torch.Tensor | None = None, **arguments: object) -> torch.Tensor:
        """As the backbone's."""
        assert token_ids is not None
        self.rows += len(token_ids)
        return super().forward(token_ids, **arguments)


def test_vectors_are_the_pooled_states(tiny_llm: str, tiny_bert: str, titles: list[str], tmp_path: Path) -> None:
    """Each row is the mean, or the last state, of that text encoded alone; of any layer; in the order given."""
    for folder in (tiny_llm, tiny_bert):
        backbone, tokenizer = Backbone(folder, dtype="float32", lora=LORA).train(), load_tokenizer(folder)
        nn.init.constant_(next(p for n, p in backbone.named_parameters() if "lora_B" in n), 0.5)  # must not count
        plain = Backbone(folder, dtype="float32").eval()
        for layer in (None, 1):
            mean = embed_texts(backbone, tokenizer, titles, folder=tmp_path, pooling="mean", layer=layer)
            last = embed_texts(backbone, tokenizer, titles, folder=tmp_path, pooling="last", layer=layer)
            assert mean.dtype == last.dtype == np.float32
            for row, title in enumerate(titles):
                ids = torch.tensor([tokenizer(title)["input_ids"]])
                states = plain(ids, layer=layer)[0].detach()
                np.testing.assert_allclose(mean[row], states.mean(0), atol=1e-4)
                np.testing.assert_allclose(last[row], states[-1], atol=1e-4)
        assert backbone.training
        assert all(p.requires_grad == ("lora_" in n) for n, p in backbone.named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vector_does_not_depend_on_neighbours(tiny_llm: str, titles: list[str], tmp_path: Path, dtype: str) -> None:
    """Alone, among others, in large and small batches: the same vector up to the dtype's rounding."""
    backbone, tokenizer = Backbone(tiny_llm, dtype=dtype), load_tokenizer(tiny_llm)
    together = embed_texts(backbone, tokenizer, titles, folder=tmp_path / "a")
    small = embed_texts(backbone, tokenizer, titles, folder=tmp_path / "b", batch_tokens=1)
    tolerance = 1e-4 if dtype == "float32" else 0.05
    np.testing.assert_allclose(together, small, atol=tolerance)
    for row, title in enumerate(titles):
        alone = embed_texts(backbone, tokenizer, [title], folder=tmp_path / f"c{row}")
        np.testing.assert_allclose(together[row], alone[0], atol=tolerance)


def test_only_what_is_new_is_encoded(tiny_llm: str, titles: list[str], tmp_path: Path) -> None:
    """Repeats once; a second call nothing; a changed title alone; other settings everything."""
    backbone, tokenizer = Counting(tiny_llm), load_tokenizer(tiny_llm)
    first = embed_texts(backbone, tokenizer, [*titles, *titles], folder=tmp_path)
    assert backbone.rows == len(titles)
    np.testing.assert_array_equal(first[: len(titles)], first[len(titles) :])

    changed = [titles[0].upper(), *titles[:0:-1]]
    second = embed_texts(backbone, tokenizer, changed, folder=tmp_path)
    assert backbone.rows == len(titles) + 1
    np.testing.assert_array_equal(second[1:], first[1 : len(titles)][::-1])
    assert np.abs(second[0] - first[0]).max() > 0.01

    embed_texts(backbone, tokenizer, titles, folder=tmp_path, pooling="last")
    embed_texts(backbone, tokenizer, titles, folder=tmp_path, max_tokens=4)
    shallow = Counting(tiny_llm, layers=1)
    embed_texts(shallow, tokenizer, titles, folder=tmp_path)
    assert backbone.rows == 3 * len(titles) + 1
    assert shallow.rows == len(titles)


SLOW = """
import sys, time
from pathlib import Path
from anyo_lightning.llm.backbone import Backbone, load_tokenizer
from anyo_lightning.llm.text_vectors import embed_texts

class Slow(Backbone):
    def forward(self, token_ids=None, **arguments):
        time.sleep(0.2)
        return super().forward(token_ids, **arguments)

folder, store = sys.argv[1:]
texts = [f"Movie number {number} (1995)" for number in range(60)]
embed_texts(Slow(folder), load_tokenizer(folder), texts, folder=Path(store), batch_tokens=1, shard_texts=3)
"""


def test_killed_half_way(tiny_llm: str, tmp_path: Path) -> None:
    """After SIGKILL in another process, the next run encodes the rest only, and gives what one whole run gives."""
    process = subprocess.Popen([sys.executable, "-c", SLOW, tiny_llm, str(tmp_path)], cwd=Path(__file__).parents[1])
    kept = 3 * kill_after(process, 2, tmp_path, "*/*.npz")
    texts = [f"Movie number {number} (1995)" for number in range(60)]
    backbone, tokenizer = Counting(tiny_llm), load_tokenizer(tiny_llm)
    resumed = embed_texts(backbone, tokenizer, texts, folder=tmp_path)
    assert 6 <= kept < 60
    assert backbone.rows == 60 - kept
    whole = embed_texts(backbone, tokenizer, texts, folder=tmp_path / "whole")
    np.testing.assert_allclose(resumed, whole, atol=0.05)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_damaged_shard(tiny_llm: str, titles: list[str], tmp_path: Path, damage: str) -> None:
    """It is told in a warning, kept beside, and its texts alone are encoded again."""
    backbone, tokenizer = Counting(tiny_llm), load_tokenizer(tiny_llm)
    before = embed_texts(backbone, tokenizer, titles, folder=tmp_path, shard_texts=1, batch_tokens=1)
    shard = sorted(tmp_path.glob("*/*.npz"))[0]
    content = shard.read_bytes()
    middle = content.index(b"vectors.npy") + 200
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    damaged = {"truncated": content[:-40], "flipped": flipped, "foreign": b"not a shard", "empty": b""}[damage]
    shard.write_bytes(damaged)
    with pytest.warns(UserWarning, match="is damaged"):
        after = embed_texts(backbone, tokenizer, titles, folder=tmp_path)
    assert backbone.rows == len(titles) + 1
    assert shard.with_name(f"{shard.name}.damaged-1").read_bytes() == damaged
    np.testing.assert_allclose(after, before, atol=0.05)


def test_what_cannot_be_encoded(tiny_llm: str, tmp_path: Path) -> None:
    """A text without tokens and a model that overflows are refused, and nothing is stored."""
    backbone, tokenizer = Backbone(tiny_llm), load_tokenizer(tiny_llm)
    with pytest.raises(InputError, match="Expected every text to have a token, got ''"):
        embed_texts(backbone, tokenizer, ["Babe (1995)", ""], folder=tmp_path)
    backbone.model.norm.weight[0] = float("inf")
    with pytest.raises(InputError, match="Expected finite states of tiny-llm"):
        embed_texts(backbone, tokenizer, ["Babe (1995)"], folder=tmp_path)
    assert not list(tmp_path.glob("*/*.npz"))
    assert embed_texts(backbone, tokenizer, [], folder=tmp_path).shape == (0, 32)
