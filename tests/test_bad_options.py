"""Options, configurations, checkpoints and folders that cannot be used: one sentence each and exit code 2."""

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, Anyo, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel

from anyo_lightning.cli.main import main
from anyo_lightning.runs import RunFolder

SASREC, E4SREC, LLARA, SRACL, CLLMREC = ("sasrec", "e4srec", "llara", "sracl_paper", "cllmrec")
# The configuration, what is given with it, and words of the sentence.
MISTAKES = [
    (SASREC, ["--trainer.accelerator=gpu"], "gpu"),
    (SASREC, ["--trainer.logger=CometLogger"], "comet"),  # which is not installed
    (SASREC, ["--trainer.precision=64-true"], "Expected trainer.precision among"),
    (SASREC, ["--trainer.overfit_batches=2"], "Expected trainer.overfit_batches 0, got 2"),
    (SASREC, ["--trainer.enable_checkpointing=false"], "Expected trainer.enable_checkpointing true"),
    (SASREC, ["--trainer.val_check_interval=50"], "val_check_interval"),
    (SASREC, ["--trainer.strategy=fsdp"], "Expected trainer.strategy auto or one of Lightning's ddp strategies"),
    (SASREC, ["--trainer.max_epochs=many"], "trainer.max_epochs"),
    (SASREC, ["--trainer.num_nodes=0"], "Expected trainer.num_nodes to be at least 1, got 0"),
    (SASREC, ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.01"], "got: "),
    (SASREC, ["--data.num_workers=-1"], "Expected data.num_workers to be at least 0, got -1"),
    (SASREC, ["--data.batch_tokens=0"], "Expected data.batch_tokens to be positive, got 0"),
    (SASREC, ["--data.micro_batch_tokens=0"], "Expected data.micro_batch_tokens to be positive, auto or null, got 0"),
    (SASREC, ["--trainer.accumulate_grad_batches=2"], "Expected trainer.accumulate_grad_batches 1, got 2"),
    (SASREC, ["--data.max_items=0"], "Expected data.max_items to be positive, got 0"),
    (SASREC, ["--data.overlap=1"], "Expected data.overlap in [0, 1), got 1"),
    (SASREC, ["--data.max_tokens=10"], "Expected data.max_tokens to be at least 96"),
    (SASREC, ["--data.strategy=random"], "data.strategy"),
    (SASREC, ["--data.k_core=1000"], "data.k_core"),
    (SASREC, ["--data.supervision=some"], "data.supervision"),
    (SASREC, ["--data.unknown=1"], "data.unknown"),
    (SASREC, ["--save_every_n_steps=-5"], "Expected save_every_n_steps to be at least 0, got -5"),
    (SASREC, ["--seed_everything=-1"], "-1"),
    (SASREC, ["--early_stopping.patience=-1"], "Expected early_stopping.patience to be at least 0, got -1"),
    (SASREC, ["--early_stopping.monitor=val/ndcg@7"], "Expected early_stopping.monitor at one of metrics.cutoffs"),
    (SASREC, ["--checkpoint.monitor=val/mrr@99"], "Expected checkpoint.monitor at one of metrics.cutoffs"),
    (SASREC, ["--checkpoint.monitor=val/loss"], "Expected checkpoint.monitor among val/hr"),
    (SASREC, ["--checkpoint.monitor=val/ild@1", "--metrics.cutoffs=[1, 10]", "--metrics.extra=[ild]"], "got val/ild@1"),
    (SASREC, ["--checkpoint.mode=maximum"], "maximum"),
    (SASREC, ["--metrics.cutoffs=[0]"], "Expected checkpoint.monitor at one of metrics.cutoffs"),
    (SASREC, ["--metrics.top_k=0"], "Expected top_k to be positive, got 0"),
    (SASREC, ["--metrics.index=Flut"], "Expected metrics.index to be a FAISS factory string"),
    (SASREC, ["--model.encoders.dropout=2"], "Expected model.encoders.dropout in [0, 1), got 2"),
    (SASREC, ["--model.encoders.layers=0"], "Expected model.encoders.layers to be positive, got 0"),
    (SASREC, ["--model.encoders.dim=15"], "multiple of"),
    (SASREC, ["--model.encoders.depth=2"], "depth"),
    (SASREC, ["--model.optimizer.lr=-1"], "Invalid learning rate"),
    (SASREC, ["--model.optimizer=torch.optim.Adamm"], "Adamm"),
    (SASREC, ['--model.learning_rates={"decoder": 0.1}'], "learning_rates"),
    (SASREC, ["--model.init_from=nowhere"], "Expected a checkpoint, got no file"),
    (SASREC, ["--model=my_package.Mine"], "my_package"),
    (SASREC, ["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
    (SASREC, ["--probe"], "Expected --probe with test"),
    (E4SREC, ["--model.encoders.backbone.layers=9"], "Expected layers between 1 and 3, got 9"),
    (E4SREC, ["--model.encoders.backbone.layers=0"], "Expected layers between 1 and 3, got 0"),
    (E4SREC, ["--model.encoders.backbone.name=no/such-model"], "Expected an alias"),
    (E4SREC, ["--model.encoders.backbone.dtype=int8"], "int8"),
    (E4SREC, ["--model.encoders.backbone.attention=none"], "attention"),
    (E4SREC, ["--model.encoders.backbone.lora.rank=3"], "rank"),
    (E4SREC, ["--model.encoders.backbone.lora.init_lora_weights=pissa"], "Expected lora.init_lora_weights among"),
    (E4SREC, ["--model.encoders.backbone.lora.bias=lora_only"], "Expected lora.bias none"),
    (E4SREC, ["--model.encoders.backbone.lora.target_modules=[embed_tokens]"], "without token embeddings"),
    (E4SREC, ["--model.encoders.backbone.lora.target_modules=[nothing]"], "nothing"),
    (
        E4SREC,
        [
            '--model.encoders.backbone.quantization_config={"load_in_4bit": true}',
            "--model.encoders.backbone.sharded=true",
        ],
        "Expected a sharded backbone without quantization_config",
    ),
    (E4SREC, ["--model.encoders.reads=pictures"], "pictures"),
    (E4SREC, ["--model.encoders.input_dropout=-0.1"], "Expected model.encoders.input_dropout in [0, 1)"),
    (LLARA, ["--model.temperature=0"], "temperature"),
    (LLARA, ["--model.hard_negatives=99"], "hard_negatives"),
    (SRACL, ["--model.share=2"], "share"),
    (SRACL, ["--model.neighbours=0"], "neighbours"),
    (CLLMREC, ["--model.views=[original, poem]"], "poem"),
    (CLLMREC, [], "Expected views written by `anyo augment --kind summarise`"),
    (CLLMREC, ["--model.crop_share=1.5"], "crop_share"),
    (CLLMREC, ["--model.temperature=0"], "Expected model.temperature to be positive, got 0"),
    (CLLMREC, ["--model.weight=-1"], "Expected model.weight to be at least 0, got -1"),
    (CLLMREC, ["--model.neighbours=0"], "Expected model.neighbours to be positive, got 0"),
    (SRACL, ["--model.alpha=-1"], "Expected model.alpha to be at least 0, got -1"),
    (SRACL, ["--model.beta=-0.1"], "Expected model.beta to be at least 0, got -0.1"),
    (SASREC, ["--model.warmup=5"], "Expected model.warmup, a share of the steps, between 0 and 1, got 5"),
    ("anyo", ["--model.negatives=0"], "Expected model.negatives to be positive, got 0"),
    (E4SREC, ["--model.encoders.dim=0"], "Expected model.encoders.dim to be positive, got 0"),
    (E4SREC, ["--model.encoders.hidden=0"], "Expected model.encoders.hidden to be positive, got 0"),
    (LLARA, ["--model.encoders.dim=-3"], "Expected model.encoders.dim to be positive, got -3"),
    (LLARA, ["--model.encoders.pooled_tokens=-1"], "Expected model.encoders.pooled_tokens to be at least 0, got -1"),
    ("hllm", ["--model.encoders.dim=0"], "Expected model.encoders.dim to be positive, got 0"),
    ("hllm", ["--model.encoders.pooled_tokens=-1"], "Expected model.encoders.pooled_tokens to be at least 0, got -1"),
]


@pytest.fixture
def words(tiny_data: tuple[Path, Path], tiny_llm: str, tmp_path: Path) -> Callable[[str], list[str]]:
    """The options of a small run of a configuration."""

    def options(config: str) -> list[str]:
        found = [
            f"--config={CONFIGS / config}.yaml",
            f"--data.interactions={tiny_data[0]}",
            f"--data.items={tiny_data[1]}",
            "--data.template=null",
            "--trainer.max_epochs=1",
            "--trainer.limit_train_batches=1",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={tmp_path / 'runs'}",
        ]
        if config in (E4SREC, LLARA, CLLMREC, "anyo"):
            small = {"name": tiny_llm, "layers": 2, "dtype": "float32"}
            found += [f"--model.encoders.backbone.{name}={value}" for name, value in small.items()]
            found += ["--data.max_tokens=300", "--data.max_items=20"]
        if config == SRACL:
            found += [f"--model.semantics.name={tiny_llm}"]
        return found

    return options


@pytest.mark.parametrize(
    ("config", "given", "expected"), MISTAKES, ids=[f"{config} {' '.join(given)}" for config, given, _ in MISTAKES]
)
def test_a_mistake_is_one_sentence(
    config: str,
    given: list[str],
    expected: str,
    words: Callable[[str], list[str]],
    anyo: Anyo,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing is left behind."""
    if config == CLLMREC:  # the session's cache may hold the views of another test, which are missed here
        monkeypatch.setenv("ANYO_CACHE", str(tmp_path / "cache"))
    assert expected in refused(capsys, anyo, "fit", *words(config), *given)
    assert not list((tmp_path / "runs").rglob("*.ckpt"))
    assert not (tmp_path / "runs" / config).exists()


def test_there_are_enough_of_them() -> None:
    """With those of files and columns well over a hundred."""
    assert len(MISTAKES) >= 55


@pytest.mark.parametrize("command", ["compare", "index", "data", "augment", "fit", "test"])
def test_commands_refuse_what_they_do_not_know(
    command: str, anyo: Anyo, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """An unknown option, a missing folder, an unknown command."""
    refused(capsys, anyo, command, "--no_such_option", "1")
    assert "Expected a command among" in refused(capsys, anyo, "train")
    assert "folders" in refused(capsys, anyo, "compare", str(tmp_path / "none"))
    assert "config.yaml" in refused(capsys, anyo, "index", f"--run={tmp_path / 'none'}")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("fit", "Expected a model in --config FILE, or in the config.yaml of --run FOLDER, got none"),
        (
            f"fit -c {CONFIGS}/overlays/gpu.yaml --run=new",
            "Expected a model in --config FILE, or in the config.yaml of --run FOLDER, got none",
        ),
        (
            "test --run=absent",
            "Expected --config FILE, or --run with a run folder, got absent, which has no config.yaml",
        ),
        ("compare", "Expected runs to be given, got none"),
        ("export --run=absent", "Expected output to be given, got none"),
        ("recommend --run=absent --usr=1", "Expected options that the command has (--help lists them), got --usr=1"),
        ("compare absent --metrics=ndcg@10", "Expected runs to be folders, found none at absent"),
        ("data --micro_batch_tokens=None", "Expected micro_batch_tokens to be one of int, 'auto', null, got None"),
        (
            f"fit --config={CONFIGS / E4SREC}.yaml --model.encoders.backbone.layers=x",
            "Expected model.encoders.backbone.layers to be one of int, null, got x",
        ),
        (
            f"fit --config={CONFIGS / SASREC}.yaml --model.encoders.backbone.layers=3",
            "Expected options of model, got model.encoders.backbone.layers",
        ),
        (
            f'fit --config={CONFIGS / SASREC}.yaml --config={{"data":{{"max_itms":3}}}}',
            "Expected options that the command has (--help lists them), got data.max_itms",
        ),
        (
            f"fit --config={CONFIGS / SASREC}.yaml --trainer.logger=CSVLogger --trainer.logger.foo.bar=3",
            "Expected options of trainer.logger, got trainer.logger.foo.bar",
        ),
        ("fit --trainer=absent.yaml", "Expected a configuration for trainer, got absent.yaml"),
    ],
)
def test_what_is_typed_first(words: str, sentence: str, anyo: Anyo, capsys: pytest.CaptureFixture[str]) -> None:
    """What is missing or misspelt is said in our words, not in those of the parser's insides."""
    assert refused(capsys, anyo, *words.split()) == f"anyo: error: {sentence}"


def test_configurations_that_cannot_be_read(
    words: Callable[[str], list[str]], anyo: Anyo, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Another encoding, broken YAML, no such file, a run folder that is a file."""
    latin, broken = tmp_path / "latin.yaml", tmp_path / "broken.yaml"
    latin.write_bytes(b"model: {class_path: SASRec} # caf\xe9\n")
    broken.write_text("model: {class_path: [\n")
    assert "UTF-8" in refused(capsys, anyo, "fit", f"--config={latin}")
    assert "Expected configurations in YAML" in refused(capsys, anyo, "fit", f"--config={broken}")
    for absent in (tmp_path / "none.yaml", tmp_path):
        expected = f"anyo: error: Expected a file for config, got none at {absent}"
        assert refused(capsys, anyo, "fit", f"--config={absent}") == expected
    assert "got the file" in refused(capsys, anyo, "fit", *words(SASREC), f"--run={latin}")
    files = words(SASREC)[1:3]
    output = refused(capsys, anyo, "data", *(word.replace("data.", "") for word in files), f"--output={latin}/x")
    assert "Expected --output" in output


def test_checkpoints_that_cannot_be_used(
    words: Callable[[str], list[str]], anyo: Anyo, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Half of one, one of something else, and one that is gone."""
    run = RunFolder(tmp_path / "run")
    anyo("fit", *words(SASREC), f"--run={run.path}")
    whole = run.best_checkpoint.read_bytes()
    run.best_checkpoint.write_bytes(whole[: len(whole) // 2])
    assert "Expected a readable checkpoint" in refused(capsys, anyo, "test", f"--run={run.path}")
    torch.save({"state_dict": {}}, run.best_checkpoint)
    assert "Expected a checkpoint written by anyo-lightning" in refused(capsys, anyo, "test", f"--run={run.path}")
    run.best_checkpoint.unlink()
    assert "Expected --run with a trained run folder" in refused(capsys, anyo, "test", f"--run={run.path}")


def test_language_models_that_cannot_be_used(
    words: Callable[[str], list[str]],
    tiny_llm: str,
    tiny_bert: str,
    anyo: Anyo,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Token ids beyond the embeddings, too few positions with padding's offset, a tokenizer without an end."""
    fit = ["fit", *words(E4SREC)]
    name = "--model.encoders.backbone.name"
    AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(str(tmp_path / "few"))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaModel(LlamaConfig(**small, vocab_size=60)).save_pretrained(str(tmp_path / "few"))
    assert "token embeddings), got token id" in refused(capsys, anyo, *fit, f"{name}={tmp_path / 'few'}")
    short = tmp_path / "short"
    shutil.copytree(tiny_llm, short)
    LlamaModel(LlamaConfig(**small, vocab_size=320, max_position_embeddings=64)).save_pretrained(str(short))
    assert "lower data.max_tokens" in refused(capsys, anyo, *fit, f"{name}={short}")
    endless = tmp_path / "endless"
    shutil.copytree(tiny_llm, endless)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(str(endless))
    assert "end-of-sequence or separator token" in refused(capsys, anyo, *fit, f"{name}={endless}")
    few = ("--data.max_tokens=50", "--data.max_item_tokens=20")
    assert "bidirectional" in refused(capsys, anyo, *fit, *few, f"{name}={tiny_bert}")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in refused(capsys, anyo, *fit, f"{name}={empty}")
    BertModel(BertConfig(**small, vocab_size=200)).save_pretrained(str(empty))
    assert "got one that knows no word" in refused(capsys, anyo, *fit, f"{name}={empty}")  # no tokenizer's files


NAMES = """
    model.encoders.dim model.encoders.dropout model.optimizer.lr model.learning_rates model.init_from
    data.max_items data.ratios data.times data.columns.user data.template data.source data.ties
    trainer.max_epochs trainer.devices trainer.limit_test_batches trainer.precision trainer.logger
    metrics.cutoffs metrics.index checkpoint.save_top_k early_stopping.patience seed_everything
"""
FORMS = ["null", "true", "[]", "{}", "[1,2]", "{a:1}", "1e309", "-0", "0x10", "~", "a=b", "[", "{", "'"]
OPTIONS = st.sampled_from(NAMES.split())
VALUES = st.one_of(
    st.sampled_from([*FORMS, ""]),
    st.integers(-3, 10**12).map(str),
    st.floats(allow_nan=True).map(str),
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(options=st.lists(st.tuples(OPTIONS, VALUES), min_size=1, max_size=3), equals=st.booleans())
def test_configurations_are_parsed_or_refused(options: list[tuple[str, str]], equals: bool) -> None:
    """Whatever an option is given: a configuration is printed, or one sentence says what is wrong."""
    words = ["fit", f"--config={CONFIGS / SASREC}.yaml"]
    for name, value in options:
        words += [f"--{name}={value}"] if equals else [f"--{name}", value]
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main([*words, "--print_config"])
    if ended.value.code:
        assert ended.value.code == 2
        assert len([line for line in err.getvalue().splitlines() if line.startswith("anyo: error:")]) == 1
    else:
        assert "class_path: anyo_lightning.SASRec" in out.getvalue()
