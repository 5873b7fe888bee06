"""`anyo export`: other libraries open the folder, with the run's own lists and scores; what is refused."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars as pl
import pytest
import torch
from helpers import CONFIGS, Anyo, refused, started_backbone, write_loops
from huggingface_hub import ModelCard
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModel, AutoTokenizer

from anyo_lightning import Recommender
from anyo_lightning.cli.main import main
from anyo_lightning.data.sources import load_source
from anyo_lightning.encoders.live import LiveTextItems
from anyo_lightning.models.restored_run import restore_run
from anyo_lightning.runs import RunFolder
from anyo_lightning.serving.export import export
from anyo_lightning.serving.exported_model import in_float32
from anyo_lightning.serving.flat_heads import NotExpressibleError
from anyo_lightning.serving.sentence_model import with_suffix

Runs = Callable[..., Path]
LLARA = "--model.encoders"
READ = {  # what the language model reads, and what follows its state
    "e4srec": (),
    "e4srec_hybrid": (),
    "e4srec_vectors": (),
    "e4srec_vectors last": ("--data.supervision=last",),
    "anyo": ("--model.encoders.reads=texts",),
    "anyo frozen": ("--model.encoders.backbone.lora=null", "--model.encoders.reads=texts"),
    "llara": (),
    "llara last": ("--data.supervision=last",),
    "llara plain": ("--data.titles_only=false", f"{LLARA}.whiten=false", f"{LLARA}.hidden=null"),
    "llara bare": (f"{LLARA}.dim=null", f"{LLARA}.hidden=null"),
    "llara nothing": (f"{LLARA}.dim=null", f"{LLARA}.hidden=null", f"{LLARA}.whiten=false"),
    "llara_pretrain": (),
    "csft": (),
    "hllm": (),
}


@pytest.fixture(scope="session")
def exported(run_of: Runs, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Exports a run of `run_of`, once in the session; returns the run's folder and the export's."""
    made: dict[tuple[str, ...], tuple[Path, Path]] = {}

    def make(name: str, *options: str) -> tuple[Path, Path]:
        if (name, *options) not in made:
            folder = tmp_path_factory.mktemp("exported") / "out"
            run = run_of(name, *options)
            export(run, folder, device="cpu")
            made[name, *options] = run, folder
        return made[name, *options]

    return make


def of(exported: Callable[..., tuple[Path, Path]], kind: str) -> tuple[Path, Path]:
    return exported(kind.split()[0], *READ[kind])


def block(folder: Path, word: str) -> str:
    """The card's only Python block with a word in it."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (found,) = [one for one in blocks if word in one]
    return str(found)


def run_script(
    folder: Path, history: list[str], monkeypatch: pytest.MonkeyPatch, *, merged: bool = False
) -> dict[str, Any]:
    """What the lines of the card leave behind, for another history than the card's."""
    monkeypatch.chdir(folder)
    script = block(folder, "from transformers")
    script, count = re.subn(r"history = \".\", \[.*?\]", f'history = ".", {json.dumps(history)}', script)
    assert count == 1
    if merged:
        script, count = re.subn(r"model = PeftModel.*", "model = AutoModel.from_pretrained(folder).eval()", script)
        assert count == 1
    names: dict[str, Any] = {}
    exec(compile(script, "README.md", "exec"), names)
    return names


def assert_lists_of_the_run(
    folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch, *, merged: bool = False, atol: float = 1e-5
) -> None:
    """For two users the same ten items, with scores equal to 1e-5."""
    recommender = Recommender.load(run, device="cpu")
    for user in recommender.data.split.user_ids[[3, 7]].tolist():
        history = recommender.history(user)
        names = run_script(folder, history, monkeypatch, merged=merged)
        own = recommender.recommend([history], k=10)
        order = np.argsort(-names["scores"], kind="stable")[: len(own)]
        assert [recommender.item_ids[place] for place in order] == own["item_id"].to_list()
        np.testing.assert_allclose(names["scores"][order], own["score"].to_numpy(), rtol=0, atol=atol)


@pytest.mark.parametrize("kind", READ)
def test_the_cards_lines_give_the_runs_lists(
    kind: str, exported: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By transformers, peft and numpy alone."""
    run, folder = of(exported, kind)
    assert_lists_of_the_run(folder, run, monkeypatch)
    script = block(folder, "from transformers")
    assert "anyo" not in script
    assert len([line for line in script.splitlines() if line and "import" not in line]) <= 22


@pytest.mark.parametrize("kind", ["llara nothing", "llara_pretrain", "csft"])
def test_without_maps_none_are_loaded(kind: str, exported: Callable[..., tuple[Path, Path]]) -> None:
    """The state is the query: the card names no file of maps, nor the package that reads it."""
    _, folder = of(exported, kind)
    assert not (folder / "projectors.safetensors").exists()
    assert "safetensors" not in block(folder, "from transformers")
    assert "`projectors.safetensors`" not in (folder / "README.md").read_text()


def test_the_cards_history_is_nobodys(exported: Callable[..., tuple[Path, Path]]) -> None:
    """Three items that are frequent in training: a user's own would be published with the folder."""
    run, folder = of(exported, "e4srec")
    (found,) = re.findall(r'history = "\.", (\[.*?\])', block(folder, "from transformers"))
    recommender = Recommender.load(run, device="cpu")
    counts = dict(zip(recommender.item_ids, recommender.data.split.training_counts(), strict=True))
    assert sorted((counts[item] for item in json.loads(found)), reverse=True) == sorted(counts.values())[:-4:-1]


@pytest.mark.parametrize("name", ["e4srec_hybrid", "sasrec"])
def test_the_cards_similar_items_are_those_of_the_run(
    name: str,
    exported: Callable[..., tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the cosine, although vectors differ in length: inner products would name others."""
    run, folder = exported(name)
    recommender = Recommender.load(run, device="cpu")
    own = recommender.similar(recommender.item_ids[:1], k=10)["title"].to_list()
    by_products = (-recommender.vectors @ recommender.vectors[0]).argsort().tolist()
    assert [recommender.titles[place] for place in by_products if place][:10] != own
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(compile(block(folder, "import faiss"), "README.md", "exec"), {})
    assert ast.literal_eval(capsys.readouterr().out) == own


@pytest.mark.parametrize("name", ["e4srec", "e4srec_vectors"])
def test_lines_that_would_read_other_tokens_are_left_out(
    name: str, run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's tokens of one title are others than its exported tokenizer's; vectors need no tokenizer."""
    run, out = run_of(name), tmp_path / "out"
    monkeypatch.setenv("ANYO_CACHE", str(tmp_path / "cache"))
    restore_run(run, device=torch.device("cpu"))
    for file in (tmp_path / "cache").glob("tokens/*/token_ids.npy"):
        tokens = np.load(file)
        tokens[0] += 1
        np.save(file, tokens)
    export(run, out, device="cpu")
    card = (out / "README.md").read_text()
    sentence = "- the user side in transformers: its tokenizer, opened by itself, reads 1 of 16 texts otherwise."
    assert (sentence in card) == ("from transformers" not in card) == (name == "e4srec")


@pytest.mark.parametrize("kind", ["e4srec", "e4srec_vectors", "llara", "sasrec"])
def test_the_cards_table_names_the_folders_files(kind: str, exported: Callable[..., tuple[Path, Path]]) -> None:
    """All that are there beside the card, and no other."""
    _, folder = of(exported, kind) if kind in READ else exported(kind)
    (table,) = re.findall(r"## Files\n\n(.*?)\n\n", (folder / "README.md").read_text(), re.DOTALL)
    named = [name for line in table.splitlines()[2:] for name in re.findall(r"`(.*?)`", line.split("|")[1])]
    there = [path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name != "README.md"]
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("kind", ["e4srec", "llara"])
def test_merged_weights_stand_for_the_adapter(
    kind: str, exported: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = of(exported, kind)
    assert_lists_of_the_run(folder, run, monkeypatch, merged=True)


def test_the_language_model_opens_as_it_is(exported: Callable[..., tuple[Path, Path]]) -> None:
    """Cut to its layers, no weight missing, LoRA in it, and by adapter and base the same states."""
    run, folder = of(exported, "e4srec")
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.num_hidden_layers == len(model.layers) == 2
    assert model.dtype == torch.float32
    base = AutoModel.from_pretrained(folder / "base")
    (backbone,) = Recommender.load(run, device="cpu").model.backbones
    tokens = torch.arange(10, 22)[None]
    with torch.no_grad():
        frozen = base(tokens).last_hidden_state
        adapted = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()(tokens).last_hidden_state
        own = backbone(tokens)
        assert_close(model.eval()(tokens).last_hidden_state, own, rtol=0, atol=1e-5)
        assert_close(adapted, own, rtol=0, atol=1e-5)
        assert (frozen - own).abs().max() > 1e-3  # LoRA was trained
        with backbone.with_lora_disabled():
            assert_close(frozen, backbone(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llara", "llara last", "llara plain", "llara bare"])
def test_the_item_side_opens_in_sentence_transformers(kind: str, exported: Callable[..., tuple[Path, Path]]) -> None:
    """Vectors and scores of all items at once, equal to 1e-5, and of a text that is too long."""
    from sentence_transformers import SentenceTransformer

    run, folder = of(exported, kind)
    recommender = Recommender.load(run, device="cpu")
    opened = SentenceTransformer(str(folder), device="cpu")
    vectors, own = opened.encode(recommender.texts, batch_size=5), recommender.vectors.numpy()
    np.testing.assert_allclose(vectors, own, rtol=0, atol=1e-5)
    np.testing.assert_allclose(opened.similarity(vectors, vectors), own @ own.T, rtol=0, atol=1e-5)
    long = " ".join(recommender.texts)
    recommender.add_items(pl.DataFrame({"item_id": ["n"], "title": [long]}))
    np.testing.assert_allclose(opened.encode([long])[0], recommender.vectors[-1].numpy(), rtol=0, atol=1e-5)
    assert "SentenceTransformer" in block(folder, "encode")


def test_items_stand_in_one_order(exported: Callable[..., tuple[Path, Path]]) -> None:
    """In Parquet, numpy, JSON and FAISS, with the vectors of the run."""
    run, folder = of(exported, "e4srec_hybrid")
    recommender = Recommender.load(run, device="cpu")
    own = recommender.vectors.numpy()
    np.testing.assert_array_equal(np.load(folder / "vectors.npy"), own)
    table = pl.read_parquet(folder / "items.parquet")
    np.testing.assert_array_equal(table["vector"].to_numpy(), own)
    names = json.loads((folder / "items.json").read_text())
    assert table["item_id"].to_list() == names["item_id"] == recommender.item_ids
    assert table["title"].to_list() == names["title"] == recommender.titles
    assert table["text"].to_list() == names["text"] == recommender.texts
    index = faiss.read_index(str(folder / "items.faiss"))
    scores, places = index.search(own[:4], len(own))
    np.testing.assert_allclose(scores, np.take_along_axis(own[:4] @ own.T, places, axis=1), rtol=1e-5, atol=1e-6)
    assert sorted(places[0]) == list(range(16))


@pytest.mark.parametrize("name", ["sasrec", "unisrec"])
def test_runs_without_a_language_model_export_their_items(
    name: str, exported: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors and index; the card says what is not there and why, and its lines run."""
    _, folder = exported(name)
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "items.parquet", "vectors.npy", "items.faiss", "items.json", "recommender.json")
    }
    card = (folder / "README.md").read_text()
    assert "- the user side in transformers: no language model reads its histories" in card
    assert "Recommender.load" in card
    monkeypatch.chdir(folder)
    exec(compile(block(folder, "import faiss"), "README.md", "exec"), {})


def test_an_approximate_index_is_written(run_of: Runs, anyo: Anyo, tmp_path: Path) -> None:
    anyo("export", f"--run={run_of('sasrec')}", f"--output={tmp_path / 'made' / 'out'}", "--index=HNSW8")
    assert isinstance(faiss.read_index(str(tmp_path / "made" / "out" / "items.faiss")), faiss.IndexHNSWFlat)


def test_what_is_left_out_is_said(exported: Callable[..., tuple[Path, Path]]) -> None:
    """Frozen vectors and free rows have no sentence-transformers form, nor have pooled tokens of one's own."""
    for run, reason in [
        (of(exported, "e4srec"), "frozen text vectors"),
        (exported("llara", f"{LLARA}.pooled_tokens=2"), "tokens that were added"),
        (of(exported, "hllm"), "a second language model"),
    ]:
        card = (run[1] / "README.md").read_text()
        assert re.search(f"- the item side for sentence-transformers: [^\n]*{reason}", card)
        assert not (run[1] / "modules.json").exists()
        tokenizer = AutoTokenizer.from_pretrained(run[1])
        assert tokenizer("Babe")["input_ids"] == tokenizer("Babe", add_special_tokens=False)["input_ids"]


def test_the_card_has_the_runs_figures_and_terms(exported: Callable[..., tuple[Path, Path]]) -> None:
    """Figures with intervals, fingerprint, cost, licences; its head is read by the hub's library."""
    run, folder = of(exported, "e4srec")
    metrics = RunFolder(run).read_metrics()
    card = ModelCard.load(folder / "README.md")
    figure = metrics["metrics"]["test/ndcg@10"]
    line = f"| ndcg@10 | {figure['value']:.4f} | {figure['low']:.4f} to {figure['high']:.4f} |"
    assert line in card.text
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["ndcg@10"] == pytest.approx(figure["value"], abs=1e-5)
    assert len(results) == len(metrics["metrics"])
    assert metrics["split"]["fingerprint"] in card.text
    assert f"| trained parameters | {metrics['cost']['trainable_parameters']:,} |" in card.text
    assert "The run and this export compute in float32" in card.text
    assert "## Licences" in card.text
    assert "look it up before you publish" in card.text
    assert str(run.parent) not in card.content


def test_weights_in_bfloat16_are_exported_in_float32(
    run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lists of the export's own parts agree to 1e-5, and with the run's to rounding; the card names both dtypes."""
    run = run_of("llara", "--model.encoders.backbone.dtype=bfloat16")
    folder = tmp_path / "out"
    export(run, folder, device="cpu")
    from sentence_transformers import SentenceTransformer

    recommender, vectors = Recommender.load(run, device="cpu"), np.load(folder / "vectors.npy")
    opened = SentenceTransformer(str(folder), device="cpu").encode(recommender.texts)
    np.testing.assert_allclose(opened, vectors, rtol=0, atol=1e-5)
    distance = np.abs(vectors - recommender.vectors.numpy()).max()
    assert 1e-5 < distance < 0.2
    names = run_script(folder, ["m1", "m2"], monkeypatch)
    merged = run_script(folder, ["m1", "m2"], monkeypatch, merged=True)
    np.testing.assert_allclose(names["scores"], merged["scores"], rtol=0, atol=1e-5)
    own = recommender.recommend([["m1", "m2"]], k=16, hide_seen=False)
    scores = dict(zip(own["item_id"], own["score"], strict=True))
    expected = [scores[item] for item in names["items"]["item_id"]]
    shown = np.isfinite(names["scores"])
    np.testing.assert_allclose(names["scores"][shown], np.array(expected)[shown], rtol=0, atol=0.2)
    assert "The run computed in bfloat16; this export computes in float32" in (folder / "README.md").read_text()
    assert AutoModel.from_pretrained(folder / "base", dtype="auto").dtype == torch.bfloat16


def test_a_quantised_language_model_is_left_out_as_it_is(run_of: Runs, tmp_path: Path) -> None:
    """Vectors are the run's own, in its precision, and the card does not call them float32's."""
    pytest.importorskip("bitsandbytes")
    backbone = "--model.encoders.backbone"
    run = run_of("llara", f"--config={CONFIGS / 'overlays' / 'quantized.yaml'}", f"{backbone}.dtype=bfloat16")
    export(run, tmp_path / "out", device="cpu")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- the language model: its weights are quantised, which merged ones could not be." in card
    assert "this export's language model, which is quantised, computes in bfloat16, all else in float32." in card
    own = Recommender.load(run, device="cpu").vectors.numpy()
    np.testing.assert_allclose(np.load(tmp_path / "out" / "vectors.npy"), own, rtol=0, atol=1e-6)


def test_of_several_language_models_all_change_their_precision_or_none(tiny_llm: str) -> None:
    pytest.importorskip("bitsandbytes")
    plain = started_backbone(tiny_llm, dtype="bfloat16")
    quantised = started_backbone(tiny_llm, dtype="bfloat16", quantization_config={"load_in_4bit": True})
    with pytest.raises(NotExpressibleError, match="quantised"):
        in_float32([plain, quantised])
    assert plain.dtype == plain.model.get_input_embeddings().weight.dtype == torch.bfloat16
    in_float32([plain, started_backbone(tiny_llm)])
    assert plain.dtype == plain.model.get_input_embeddings().weight.dtype == torch.float32


ON_THE_HUB = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModel
from helpers import started_backbone
from anyo_lightning.serving.exported_model import write_language_model
from anyo_lightning.serving.user_side import UserSide, script

place = Path(sys.argv[1])
backbone = started_backbone("someone/tiny", layers=2).eval()
base = write_language_model(backbone, place)
side = UserSide("text", False, [], [], 0, 9, 99, 20, layer_norm=False, centred=False, unit_length=False)
lines = script(side, base, ["a"], projected=True, hides=True).splitlines()
names = {"folder": str(place), "AutoConfig": AutoConfig, "AutoModel": AutoModel, "PeftModel": PeftModel, "torch": torch}
for line in lines:
    if line.startswith(("config =", "base =", "model =")):
        exec(line, names)
tokens = torch.arange(9, 20)[None]
with torch.no_grad():
    print(float((names["model"](tokens).last_hidden_state - backbone(tokens)).abs().max()))
print(sorted(path.name for path in place.iterdir() if path.is_dir()), base.revision)
"""


def test_a_base_on_the_hub_is_named_and_not_copied(tiny_llm: str, tmp_path: Path) -> None:
    """By its commit; the card's lines load it from there, cut to the run's layers."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository, out = tmp_path / "models--someone--tiny", tmp_path / "out"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tiny_llm, repository / "snapshots" / commit)
    out.mkdir()
    tests = Path(__file__).parent
    environment = os.environ | {
        "HF_HUB_CACHE": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{tests.parent}:{tests}",
    }
    command = [sys.executable, "-c", ON_THE_HUB, str(out)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    distance, folders = finished.stdout.splitlines()
    assert float(distance) < 1e-5
    assert folders == f"['adapter'] {commit}"


def test_a_suffix_is_appended_after_the_text_is_cut(tiny_llm: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    plain = tokenizer("Dead Man Walking", add_special_tokens=False)["input_ids"]
    found = with_suffix(tokenizer, [7, 0])("Dead Man Walking", truncation=True, max_length=5)["input_ids"]
    assert found == [*plain[:3], 7, 0]
    assert len(plain) > 3


def test_mistakes_are_named_and_nothing_is_written(
    anyo: Anyo, run_of: Runs, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One sentence each, exit code 2, and no folder, not even a temporary one."""
    run, out, there = run_of("sasrec"), tmp_path / "made" / "out", tmp_path / "there"
    there.mkdir()
    untested = tmp_path / "untested"
    shutil.copytree(run, untested)
    RunFolder(untested).metrics_file.unlink()
    for words, sentence in [
        ((f"--run={run}", f"--output={there}"), "a folder that does not exist, got"),
        ((f"--run={untested}", f"--output={out}"), "to be a tested run with a metrics.json, found none"),
        ((f"--run={tmp_path / 'nowhere'}", f"--output={out}"), "found none"),
        (
            (f"--run={run_of('markov')}", f"--output={out}"),
            "whose items have vectors to export, got Markov, which counts",
        ),
        ((f"--run={run_of('popularity')}", f"--output={out}"), "got Popularity, which counts"),
        ((f"--run={run}", f"--output={out}", "--index=Flatt"), "a FAISS factory string"),
        ((f"--run={run}", f"--output={out}", "--device=gpu7"), "a device of this machine such as cpu or cuda:0"),
        ((f"--run={run}", f"--output={out}", "--push_to_hub=me/mine"), "a hub that can be reached"),
        ((f"--run={run}", f"--output={out}", "--push_to_hub=me/mi ne"), "got me/mi ne: Repo id must"),
    ]:
        assert sentence in refused(capsys, anyo, "export", *words), words
        assert not list(tmp_path.glob("made/*")), words
    assert list(there.iterdir()) == []


@pytest.mark.real
@pytest.mark.data
@pytest.mark.slow
def test_a_run_of_the_real_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2's first three layers and 120 titles: the card's lines, the merged weights and sentence-transformers.

    Whitened over 16 titles, as in other tests, the states of a real model would be blown up so far that the run's own
    float32 vectors differ by more than 1e-5 between an item read alone and one read in a batch.
    """
    from sentence_transformers import SentenceTransformer

    titles = load_source("ml-100k").items["movie_title"].unique(maintain_order=True).to_list()[:120]
    tiny_data = write_loops(tmp_path, titles, users=40, lengths=(15, 26))
    run, folder = tmp_path / "run", tmp_path / "out"
    words = ["fit", f"--config={CONFIGS / 'llara.yaml'}", f"--run={run}", "--trainer.accelerator=cpu"]
    words += [f"--data.interactions={tiny_data[0]}", f"--data.items={tiny_data[1]}", "--data.template=null"]
    words += ["--model.encoders.backbone.dtype=float32", "--trainer.max_epochs=1"]
    words += ["--trainer.limit_train_batches=2"]
    main([*words, "--trainer.enable_progress_bar=false"])
    export(run, folder, device="cpu")
    assert_lists_of_the_run(folder, run, monkeypatch)
    assert_lists_of_the_run(folder, run, monkeypatch, merged=True)
    recommender = Recommender.load(run, device="cpu")
    assert isinstance(recommender.model.item_encoder, LiveTextItems)
    vectors, own = SentenceTransformer(str(folder), device="cpu").encode(recommender.texts), recommender.vectors.numpy()
    np.testing.assert_allclose(vectors @ vectors.T, own @ own.T, rtol=0, atol=1e-5)
