"""Probes: what they take away, what they leave alone, and what a language model knows by heart."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CONFIGS, QUIET, Anyo, MakeData, prepare, save_as_run, tiny
from lightning.pytorch import Trainer
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.adapted import AdaptedTextEncoders
from anyo_lightning.encoders.base import HoldsTexts
from anyo_lightning.encoders.hierarchical import HierarchicalEncoders
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.encoders.live import LiveTextEncoders, LiveTextItems
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.encoders.text_start import TextStartEncoders
from anyo_lightning.encoders.vectors import VectorEncoders
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.llm.aliases import load_tokenizer
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.models.anyo import Anyo as AnyoModel
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.cllmrec import CLLMRec
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.models.floors import EASE, Markov, Popularity
from anyo_lightning.models.llara import LLaRA
from anyo_lightning.models.sasrec import SASRec
from anyo_lightning.models.sracl import SRACL
from anyo_lightning.models.transitions import Transitions, transition_matrix
from anyo_lightning.models.unisrec import UniSRec
from anyo_lightning.probes.changes import last_item_only, other_titles, shuffled_order
from anyo_lightning.probes.memory import BareLLM, begins_with, next_items_from_memory, titles_from_memory
from anyo_lightning.probes.probe import probe
from anyo_lightning.runs import RunFolder
from anyo_lightning.views.writers import LocalWriter

ITEMS = 16
STEPS = 400


def probed(model: RetrievalModule, data: RecDataModule, folder: Path, *, asked: int = 0) -> dict[str, Any]:
    """The probes.json of a model with the weights that it has."""
    torch.manual_seed(0)
    trainer = Trainer(callbacks=[RetrievalMetrics()], **QUIET)
    probe(trainer, model, data, RunFolder(folder), checkpoint=None, asked=asked)
    found = RunFolder(folder).read_probes()
    assert found is not None
    return found


def text_variants(llm: str) -> dict[str, Callable[[], RetrievalModule]]:
    """Everything that reads titles, tiny and untrained."""
    texts = partial(TextEncoders, tiny(llm), dim=16)
    return {
        "e4srec texts": partial(E4SRec, texts()),
        "e4srec vectors": partial(E4SRec, texts(reads="vectors")),
        "hybrid, both": partial(E4SRec, texts(reads="both", id_residual=True)),
        "anyo": partial(AnyoModel, texts()),
        "cllmrec": partial(CLLMRec, texts(), weight=0.0),
        "sracl": partial(SRACL, texts(), neighbours=3),
        "llara": partial(LLaRA, LiveTextEncoders(tiny(llm), dim=16)),
        "hllm": partial(LLaRA, HierarchicalEncoders(tiny(llm), item_backbone=tiny(llm), dim=16)),
        "unisrec": partial(UniSRec, AdaptedTextEncoders(tiny(llm, lora=None), dim=16)),
        "sasrec on texts": partial(SASRec, TextStartEncoders(tiny(llm, lora=None), dim=8, frozen=8)),
        "llara frozen": partial(LLaRA, LiveTextEncoders(tiny(llm, lora=None), dim=16)),
    }


# --- histories -------------------------------------------------------------------------------------------------------


def test_histories_keep_their_items_in_another_order(make_data: MakeData) -> None:
    """The same items of what is read, nothing else moved, the data as they were; the same seed, the same order."""
    data = make_data(max_items=5)
    dataset = data.test_dataloader().dataset
    before = dataset.items.copy()
    first, again, other = (shuffled_order(dataset, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(dataset.items, before)
    assert np.array_equal(first.items, again.items)
    assert not np.array_equal(first.items, other.items)
    read = np.zeros(len(before), dtype=bool)
    for start, end in zip(dataset.start, dataset.end, strict=True):
        assert end - start <= 5
        assert sorted(first.items[start:end]) == sorted(before[start:end])
        read[start:end] = True
    assert np.array_equal(first.items[~read], before[~read])
    last = last_item_only(dataset)
    batch = last[[3, 0]]
    assert batch.item_ids.tolist() == [[before[dataset.end[3] - 1]], [before[dataset.end[0] - 1]]]
    assert batch.targets.tolist() == dataset.target[[3, 0]].tolist()


def test_a_model_that_ignores_order_loses_nothing_when_it_is_shuffled(make_data: MakeData, tmp_path: Path) -> None:
    """EASE exactly nothing, Popularity in no probe, a first-order chain in all but the last item; EASE needs them all.

    The data: 80 users who watch 8 of 40 movies in a row, in the order of the catalogue.
    """
    rows = [f"u{user},m{(user + time) % 40},{time}" for user in range(80) for time in range(8)]
    (tmp_path / "rows.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"m{item},Title {item}\n" for item in range(40)))
    data = make_data(interactions=tmp_path / "rows.csv", items=tmp_path / "items.csv")
    chain = Markov(transitions=Transitions(window=1, recent=1))
    found = {type(m): probed(m, data, tmp_path / type(m).__name__)["figures"] for m in (EASE(), Popularity(), chain)}
    for metric, figures in found[EASE].items():
        difference = figures["order shuffled"]["difference"]
        assert (difference["value"], difference["low"], difference["high"], difference["p"]) == (0, 0, 0, 1), metric
        assert len({found[Popularity][metric][name]["value"] for name in figures}) == 1
    ndcg = found[Markov]["test/ndcg@5"]
    assert ndcg["order shuffled"]["difference"]["high"] < 0
    assert ndcg["last item only"]["difference"]["value"] == 0
    assert ndcg["last item only"]["value"] > 0.9
    assert found[EASE]["test/ndcg@5"]["last item only"]["difference"]["value"] != 0


def test_markov_with_the_last_item_only_is_a_first_order_chain(make_data: MakeData, tmp_path: Path) -> None:
    """By hand: rank of the target in the last item's row; nothing is masked where targets repeat their histories."""
    data = make_data()
    found = probed(Markov(transitions=Transitions(recent=5)), data, tmp_path)["figures"]["test/ndcg@10"]
    matrix = transition_matrix(data.split, Transitions()).toarray()
    queries = data.queries("test")
    gains = []
    for row in range(len(queries)):
        history, target = queries.history(row), queries.target[row]
        scores = matrix[history[-1]]
        rivals = [item for item in range(ITEMS) if item != target]
        rank = (
            1 + sum(scores[i] > scores[target] for i in rivals) + sum(scores[i] == scores[target] for i in rivals) / 2
        )
        gains.append(1 / np.log2(1 + rank) if rank <= 10 else 0)
    assert found["last item only"]["value"] == pytest.approx(np.mean(gains), abs=1e-6)
    by_hand = found["last item only"]["value"] - found["as it is"]["value"]
    assert found["last item only"]["difference"]["value"] == pytest.approx(by_hand, abs=1e-6)


# --- titles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "e4srec texts",
        "e4srec vectors",
        "hybrid, both",
        "anyo",
        "cllmrec",
        "sracl",
        "llara",
        "llara frozen",
        "unisrec",
        "sasrec on texts",
    ],
)
def test_shuffled_titles_are_the_same_as_other_items(name: str, tiny_llm: str, make_data: MakeData) -> None:
    """With π for the shuffle: item i's vector is that of π(i), a history is read as that of π of its items.

    Free rows stay with their items. Afterwards everything is as before.
    """
    torch.manual_seed(0)
    data = make_data()
    model = prepare(text_variants(tiny_llm)[name](), data).eval()
    free = torch.zeros(ITEMS, 1)
    if name.startswith("hybrid"):
        torch.nn.init.normal_(model.item_encoder.residual.weight)
        free = model.item_encoder.residual.weight.detach()
    text_of = np.random.default_rng(0).permutation(ITEMS)
    histories = [np.array([3, 1, 4]), np.array([15, 9])]
    before = model.encode_catalogue(), model.encode_histories(histories)
    of_others = model.encode_histories([text_of[items] for items in histories])
    view = data.view(text_of=text_of)
    both = torch.nn.ModuleList([model.history_encoder, model.item_encoder])  # they may share a part
    with torch.no_grad(), other_titles(both, text_of):
        view.read_for(model)
        states = model(view.collate(histories)).float()
        vectors = model.encode_catalogue()
    torch.testing.assert_close(vectors, (before[0] - free)[text_of] + free, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states, of_others, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(states, before[1], atol=1e-3)
    assert torch.equal(model.encode_catalogue(), before[0])
    assert torch.equal(model.encode_histories(histories), before[1])


def test_who_reads_titles(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """Ids, counts and another run's item vectors are no titles, and that is said; nothing is shuffled then."""
    ids = IdEncoders(dim=16)
    for model in (SASRec(ids), Markov(), SRACL(ids, alpha=0.0, beta=0.0)):
        found = probed(model, make_data(), tmp_path / type(model).__name__)
        assert not found["reads_titles"]
        assert list(found["figures"]["test/ndcg@10"]) == ["as it is", "order shuffled", "last item only"]
        assert found["memory"] == "the run has none"
    data = make_data()
    save_as_run(prepare(SASRec(ids), data), tmp_path / "sasrec")
    paper = E4SRec(VectorEncoders(LLM(tiny_llm), item_vectors_from=tmp_path / "sasrec", dim=16))
    prepare(paper, data)
    assert not [part for part in paper.modules() if isinstance(part, HoldsTexts) and part.texts_in]
    assert not paper.encoders.texts
    assert data.tokens is None


@pytest.mark.parametrize("name", ["e4srec texts", "llara", "unisrec"])
def test_equal_titles_may_be_shuffled(
    name: str, tiny_llm: str, tiny_data: tuple[Path, Path], make_data: MakeData, tmp_path: Path
) -> None:
    """A model of texts alone loses nothing where all texts are the same; it does where they differ."""
    same = tmp_path / "same.csv"
    same.write_text("item_id,title\n" + "".join(f"m{item},Babe (1995)\n" for item in range(ITEMS)))
    shuffles = ["titles shuffled"]
    if name != "unisrec":  # whose two sides share their texts' vectors
        shuffles += ["titles shuffled in histories", "titles shuffled in item vectors"]
    figures = probed(text_variants(tiny_llm)[name](), make_data(items=same), tmp_path / "same")["figures"]
    for metric, shuffle in itertools.product(figures, shuffles):
        assert figures[metric][shuffle]["value"] == figures[metric]["as it is"]["value"], (metric, shuffle)
    figures = probed(text_variants(tiny_llm)[name](), make_data(), tmp_path / "own")["figures"]
    for shuffle in shuffles:
        assert figures["test/ndcg@10"][shuffle]["value"] != figures["test/ndcg@10"]["as it is"]["value"]


def test_no_cache_learns_of_a_shuffle(tiny_llm: str, make_data: MakeData, tmp_path: Path, cache: Path) -> None:
    """After probing, the caches hold what they held, and a new model on the same data finds its own vectors."""

    def files() -> dict[Path, bytes]:
        return {
            file: file.read_bytes() for place in ("tokens", "embeddings") for file in (cache / place).rglob("*.np*")
        }

    variants = text_variants(tiny_llm)
    for name in ("hybrid, both", "llara"):
        torch.manual_seed(1)
        before = prepare(variants[name](), make_data())
        held, expected = files(), before.eval().encode_catalogue()
        assert held
        probed(before, make_data(), tmp_path / name)
        assert files() == held
        assert torch.equal(before.encode_catalogue(), expected)
        again = variants[name]()
        torch.manual_seed(1)
        prepare(again, make_data())
        assert torch.equal(again.eval().encode_catalogue(), expected)


def test_shuffled_titles_fit_the_budget(tiny_llm: str, make_data: MakeData) -> None:
    """Longer titles instead of shorter ones: whole items are dropped, oldest first, as ever."""
    data = make_data(max_tokens=40, max_item_tokens=20)
    view = data.view(text_of=np.random.default_rng(3).permutation(ITEMS))
    view.read_for(TextEncoders(LLM(tiny_llm)))
    queries = data.queries("test")
    shapes = []
    for batch in view.test_dataloader():
        assert batch.token_ids.shape[1] <= 40
        for row, items in zip(batch.row.tolist(), batch.histories(), strict=True):
            assert queries.history(row)[-len(items) :].tolist() == items.tolist()
            shapes.append(len(items))
    assert len(shapes) == 40
    assert data.tokens is None


def test_live_items_keep_states_of_the_texts_that_they_read(tiny_llm: str, make_data: MakeData) -> None:
    """With a frozen LLM states are kept; for another store they are computed again."""
    model = prepare(text_variants(tiny_llm)["llara frozen"](), make_data())
    items = model.eval().item_encoder
    assert isinstance(items, LiveTextItems)
    with torch.no_grad():
        own = items(torch.arange(ITEMS))
        with other_titles(items, np.arange(ITEMS)[::-1].copy()):
            torch.testing.assert_close(items(torch.arange(ITEMS)), own.flip(0), rtol=1e-5, atol=1e-6)
        assert torch.equal(items(torch.arange(ITEMS)), own)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned_by_heart(tiny_llm: str, titles: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny LLM after it has read the catalogue in its order, again and again: it knows titles and what follows."""
    tokenizer = load_tokenizer(tiny_llm)
    model = LlamaForCausalLM.from_pretrained(tiny_llm, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    random = np.random.default_rng(0)
    for step in range(STEPS):
        orders = [(random.integers(ITEMS) + np.arange(6)) % ITEMS for _ in range(6)]
        orders += [random.permutation(ITEMS)[:6] for _ in range(2)]  # titles are known in any surroundings
        texts = ["".join(f"{titles[item]}\n" for item in order) for order in orders]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        wanted = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / STEPS)
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), wanted.flatten()).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("models") / "by-heart"
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def test_memory_tells_who_has_read_the_catalogue(
    learned_by_heart: str, tiny_llm: str, titles: list[str], make_data: MakeData
) -> None:
    """Titles and next items of one that has learned them by heart, nothing of a random one; controls stay low."""
    queries = make_data().queries("test")
    knows, ignorant = BareLLM(LocalWriter(learned_by_heart)), BareLLM(LocalWriter(tiny_llm))
    of_titles = titles_from_memory(knows, titles, sample=10, seed=0)
    of_items = next_items_from_memory(knows, titles, queries, sample=40, seed=0)
    assert of_titles is not None
    assert of_items is not None
    assert of_titles["asked"] == 10
    assert of_items["asked"] == 40
    assert of_titles["completed"]["value"] >= 0.8
    assert of_titles["completed"]["control"] <= 0.1
    assert len(of_titles["examples"]) == round(10 * of_titles["completed"]["value"])
    assert of_items["completed"]["value"] >= 0.25  # histories follow the catalogue four times of five; chance is .06
    assert of_items["completed"]["control"] <= 0.1
    for found in (of_titles, of_items):
        assert found["log_likelihood"]["difference"]["low"] > 0
        assert found["completed"]["difference"]["low"] > 0
    nothing = titles_from_memory(ignorant, titles, sample=10, seed=0)
    assert nothing is not None
    assert nothing["completed"]["value"] == 0
    assert nothing["log_likelihood"]["value"] < of_titles["log_likelihood"]["value"]


def test_log_likelihood_is_the_models(tiny_llm: str) -> None:
    """By hand, alone and beside a longer row."""
    llm = BareLLM(LocalWriter(tiny_llm))
    prompt, answer = llm.lines(["Babe (1995)"]), llm.tokens("Toy Story")
    logits = llm.writer.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].float().log_softmax(1)
    expected = np.mean([float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)])
    assert len(answer) > 1
    found = llm.log_likelihoods([prompt, llm.lines(["GoldenEye (1995)"] * 6)], [answer, answer])
    assert found[0] == pytest.approx(expected, abs=0.05)  # bfloat16


def test_completion_is_greedy_whatever_the_model_recommends(learned_by_heart: str, titles: list[str]) -> None:
    """A model's generation_config.json may ask for penalties, which would keep it from writing `(1995)` again."""
    llm = BareLLM(LocalWriter(learned_by_heart))
    prompts = [llm.lines(titles[:n]) for n in (3, 5, 7)]
    expected = llm.complete(prompts, 20)
    recommended = llm.writer.model.generation_config
    recommended.repetition_penalty, recommended.no_repeat_ngram_size, recommended.num_beams = 5.0, 2, 3
    assert llm.complete(prompts, 20) == expected


def test_too_few_titles_and_other_words(tiny_llm: str, make_data: MakeData) -> None:
    """Where nothing can be asked there is no figure; a title is found as a title, not within a longer word."""
    llm = BareLLM(LocalWriter(tiny_llm))
    assert titles_from_memory(llm, ["Babe"] * 9, sample=5, seed=0) is None
    assert next_items_from_memory(llm, ["Babe"] * ITEMS, make_data().queries("test"), sample=1, seed=0) is None
    assert begins_with("Toy Story (1995)", "toy story")
    assert not begins_with("Toy Storyteller", "Toy Story")
    assert not begins_with("A Toy Story", "Toy Story")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_probes_a_run_and_leaves_its_results(
    anyo: Anyo, small: list[str], small_llm: list[str], tmp_path: Path
) -> None:
    """probes.json beside figures that stay to the byte, a table, and the same again; with fit it is refused."""
    options = [f"--config={CONFIGS / 'e4srec.yaml'}", *small, *small_llm, f"--run={tmp_path / 'run'}"]
    with pytest.raises(SystemExit):
        anyo("fit", *options, "--probe")
    anyo("fit", *options)
    run = RunFolder(tmp_path / "run")
    held = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    printed = anyo("test", f"--run={run.path}", "--probe", "--probe_memory=8")
    assert {file: file.read_bytes() for file in held} == held
    assert {file for file in run.path.rglob("*") if file.is_file()} == {*held, run.probes_file}
    probes = run.read_probes()
    assert probes is not None
    assert (
        probes["figures"]["test/ndcg@10"]["as it is"]["value"] == run.read_metrics()["metrics"]["test/ndcg@10"]["value"]
    )
    assert probes["memory"]["llm"] == "tiny-llm"
    for line in (
        "titles shuffled",
        "  in histories",
        "  in item vectors",
        "order shuffled",
        "last item only",
        "titles completed",
    ):
        assert line in printed
    before = run.probes_file.read_bytes()
    anyo("test", f"--run={run.path}", "--probe", "--probe_memory=8")
    assert run.probes_file.read_bytes() == before
