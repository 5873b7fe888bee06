"""A backbone in 4 bits: it trains, its frozen weights stay as they were loaded, and what it saves loads back."""

import copy
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONFIGS, LORA, Anyo, MakeData, differing, fit, prepare, refused, tiny, validated, weights
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.evaluation_mode import evaluating
from anyo_lightning.llm.selfcheck import self_check
from anyo_lightning.llm.text_vectors import embed_texts
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.runs import RunFolder
from anyo_lightning.training.flops import flop_counter

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
PLAIN = NF4 | {"bnb_4bit_use_double_quant": False}
OVERLAY = CONFIGS / "overlays" / "quantized.yaml"
REAL = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def _bitsandbytes(request: pytest.FixtureRequest) -> None:
    if "anyway" not in request.node.name:
        pytest.importorskip("bitsandbytes")


@pytest.fixture
def ids() -> Tensor:
    """(2, 9) token ids."""
    return torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def frozen(backbone: Backbone) -> dict[str, Tensor]:
    """A copy of the weights that are not trained, with the scales of the 4-bit ones."""
    state = backbone.state_dict()
    return {key: state[key].clone() for key in backbone.frozen_state_keys()}


def quantised(folder: str, settings: dict[str, Any] | None = None, **changes: Any) -> E4SRec:
    """A small model on 4-bit weights, whose learning rate does not depend on the number of epochs."""
    llm = tiny(folder, dtype="bfloat16", quantization_config=settings or NF4)
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    return E4SRec(TextEncoders(llm, dim=16), optimizer=optimizer, warmup=0.0, decay=False, **changes)


@pytest.mark.parametrize("settings", [NF4, PLAIN], ids=["double", "plain"])
@pytest.mark.parametrize("name", ["tiny_llm", "tiny_bert"])
def test_frozen_weights_stay_as_they_were_loaded(
    settings: dict[str, Any], name: str, ids: Tensor, request: pytest.FixtureRequest
) -> None:
    """Evaluation, saving, training, copying and moving change no bit of them, nor a state.

    On a CPU with AVX512-BF16, bitsandbytes by itself would round the scales in evaluation mode and misplace them on
    saving; on others nothing of the kind is tried.
    """
    folder = request.getfixturevalue(name)
    ids, mask = ids % 200, torch.ones(ids.shape, dtype=torch.bool)
    backbone, again = (Backbone(folder, dtype="bfloat16", lora=LORA, quantization_config=settings) for _ in range(2))
    before = frozen(backbone)
    layers = [value for key, value in before.items() if key.endswith("base_layer.weight")]
    assert len(layers) == (3 * 7 if name == "tiny_llm" else 2 * 6)
    assert all(value.dtype == torch.uint8 for value in layers)
    assert not differing(frozen(again), before)
    with evaluating(again):
        states = again(ids, attention_mask=mask)
    for _ in range(2):
        backbone(ids, attention_mask=mask).float().square().mean().backward()
        for one in (backbone, copy.deepcopy(backbone), backbone.place(torch.device("cpu"))):
            with evaluating(one):
                assert torch.equal(one(ids, attention_mask=mask), states)
            assert not differing(frozen(one), before)


def test_lora_gets_gradients_after_an_evaluation(tiny_llm: str, ids: Tensor) -> None:
    """Those of the first layer, too, whose gradients pass through all 4-bit products; equal to those before it."""
    backbone = Backbone(tiny_llm, dtype="bfloat16", lora=LORA, quantization_config=NF4)
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        assert parameter.dtype == torch.float32
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
    first = torch.autograd.grad((backbone(ids).float() @ direction).sum(), trained)
    with evaluating(backbone):
        backbone(ids)
    second = torch.autograd.grad((backbone(ids).float() @ direction).sum(), trained)
    assert all(bool(gradient.any()) for gradient in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_counted_is_not_the_bytes(tiny_llm: str, ids: Tensor) -> None:
    """Parameters and FLOPs, forward and backward, are those of the model that was quantised."""
    counts = []
    for settings in (None, NF4):
        backbone = Backbone(tiny_llm, dtype="bfloat16", lora=LORA, quantization_config=settings)
        with flop_counter() as counter:
            backbone(ids).float().square().mean().backward()
        counts.append((backbone.parameters_total, counter.get_total_flops()))
    assert counts[0] == counts[1]


def test_quantised_states_are_near_and_their_vectors_have_a_store_of_their_own(
    tiny_llm: str, titles: list[str], tmp_path: Path
) -> None:
    """Each quantisation has its own vectors, whether defaults are spelt out or not; none reads another's."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    spelt = PLAIN | {"bnb_4bit_compute_dtype": "bfloat16"}
    vectors = []
    for settings in (None, NF4, {"load_in_4bit": True}, spelt):
        backbone = Backbone(tiny_llm, dtype="bfloat16", quantization_config=settings)
        self_check(backbone, tokenizer)
        vectors.append(torch.from_numpy(embed_texts(backbone, tokenizer, titles, folder=tmp_path)))
    assert len(list(tmp_path.glob("*/settings.json"))) == 3
    cosines = torch.cosine_similarity(vectors[0], vectors[1])
    assert 0.8 < cosines.mean() < 0.9999
    assert torch.equal(vectors[2], vectors[3])
    assert not torch.equal(vectors[1], vectors[2])


@pytest.mark.parametrize(("settings", "epochs"), [(NF4, 8), (PLAIN, 2)], ids=["double", "plain"])
def test_a_run_learns_and_resumes_with_the_same_weights(
    settings: dict[str, Any], epochs: int, tiny_llm: str, make_data: MakeData, tmp_path: Path
) -> None:
    """All epochs in one go are half and half, to the bit; checkpoints hold no frozen weight and no part of one."""
    whole = quantised(tiny_llm, settings)
    loss = fit(whole, make_data(), tmp_path / "whole", epochs=epochs).callback_metrics["train/loss"]
    assert float(loss) < 0.9 * math.log(len(make_data().split.item_ids))  # of a guess among all items
    parts = RunFolder(tmp_path / "parts")
    fit(quantised(tiny_llm, settings), make_data(), parts.path, epochs=epochs // 2)
    fit(quantised(tiny_llm, settings), make_data(), parts.path, epochs=epochs, ckpt_path=parts.last_checkpoint)
    saved = weights(RunFolder(tmp_path / "whole").last_checkpoint)
    assert not differing(weights(parts.last_checkpoint), saved)
    start = prepare(quantised(tiny_llm, settings), make_data())
    changed = differing(saved, {key: value for key, value in start.state_dict().items() if key in saved})
    assert {key for key in saved if "lora_" in key} <= changed
    assert not [key for key in saved if ".model." in key and "lora_" not in key]
    assert not differing(frozen(whole.backbones[0]), frozen(start.backbones[0]))


def test_other_weights_are_refused(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """A checkpoint of another quantisation, or of none, in both directions, also to start from: one sentence."""
    plain = E4SRec(TextEncoders(tiny(tiny_llm, dtype="bfloat16"), dim=16))
    fit(plain, make_data(), tmp_path / "plain", epochs=1)
    fit(quantised(tiny_llm), make_data(), tmp_path / "nf4", epochs=1)
    best = {name: RunFolder(tmp_path / name).best_checkpoint for name in ("plain", "nf4")}
    llm = tiny(tiny_llm, dtype="bfloat16")
    with pytest.raises(InputError, match=r"checkpoint of backbones quantization=none, got quantization=\{.*nf4.*\}"):
        validated(E4SRec(TextEncoders(llm, dim=16)), make_data(), best["nf4"])
    with pytest.raises(InputError, match=r"checkpoint of backbones quantization=\{.*nf4.*\}, got quantization=none"):
        validated(quantised(tiny_llm), make_data(), best["plain"])
    with pytest.raises(InputError, match=r"use_double_quant\": false.*, got .*use_double_quant\": true"):
        validated(quantised(tiny_llm, PLAIN), make_data(), best["nf4"])
    with pytest.raises(InputError, match="quantization=none"):
        prepare(quantised(tiny_llm, init_from=tmp_path / "plain"), make_data())
    with pytest.raises(InputError, match="quantization=none"):
        prepare(E4SRec(TextEncoders(llm, dim=16), init_from=tmp_path / "nf4"), make_data())
    started = prepare(quantised(tiny_llm, init_from=tmp_path / "nf4"), make_data())
    saved = weights(best["nf4"])
    assert not differing({key: value for key, value in started.state_dict().items() if key in saved}, saved)


def test_whole_states_are_refused(tiny_llm: str, make_data: MakeData) -> None:
    """Torch would copy packed weights without their scales."""
    model = prepare(quantised(tiny_llm), make_data())
    with pytest.raises(InputError, match=r"got unknown .*absmax"):
        model.load_state_dict(model.state_dict())
    some = {key: value for key, value in model.state_dict().items() if "norm" in key or "base_layer" not in key}
    del some["history_encoder.backbone.model.embed_tokens.weight"]
    with pytest.raises(InputError, match="same weights as the model"):
        model.load_state_dict(some)


def test_weights_that_were_saved_quantised(tiny_llm: str, ids: Tensor, tmp_path: Path) -> None:
    """A folder in 4 bits is read as it is; it is not quantised again, nor split over processes."""
    folder = tmp_path / "four-bit"
    settings = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype="bfloat16")
    AutoModel.from_pretrained(tiny_llm, dtype=torch.bfloat16, quantization_config=settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(folder)
    states = Backbone(tiny_llm, dtype="bfloat16", quantization_config=NF4)(ids)
    backbone = Backbone(str(folder), dtype="bfloat16")
    with evaluating(backbone):
        assert torch.equal(backbone(ids), states)
    with pytest.raises(InputError, match="no quantization_config for four-bit, whose weights are quantised already"):
        Backbone(str(folder), quantization_config=NF4)
    with pytest.raises(InputError, match="not quantised for a sharded backbone, got four-bit"):
        Backbone(str(folder), sharded=True)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"load_in_8bit": True}, "Expected load_in_4bit in quantization_config, got load_in_8bit"),
        ({}, "Expected quantization_config.load_in_4bit true, got null"),
        ({"load_in_4bit": 1}, "Expected quantization_config.load_in_4bit true, got 1"),
        (NF4 | {"bnb_4bit_quant_typ": "nf4"}, "Expected fields of quantization_config among .*got bnb_4bit_quant_typ"),
        ({"quant_method": "gptq", "bits": 4}, "Expected fields of quantization_config|load_in_4bit true, got null"),
        (NF4 | {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type nf4, got fp4"),
        (NF4 | {"bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype float32 or bfloat16 or float16, got int8"),
    ],
)
def test_wrong_settings_get_one_sentence(tiny_llm: str, settings: dict[str, Any], sentence: str) -> None:
    """What bitsandbytes would ignore or misread is refused before anything is loaded."""
    with pytest.raises(InputError, match=sentence) as raised:
        Backbone(tiny_llm, quantization_config=settings)
    assert "\n" not in str(raised.value)


MISSING = """
import sys
sys.modules["bitsandbytes"] = None  # as where it is not installed
from anyo_lightning.cli.main import main
main()
"""


def test_bitsandbytes_is_missing_anyway(small: list[str], small_llm: list[str], tmp_path: Path) -> None:
    """One sentence that names the extra, exit code 2, and no folder is left."""
    words = ["fit", f"--config={CONFIGS / 'e4srec.yaml'}", f"--config={OVERLAY}", *small, *small_llm]
    command = [sys.executable, "-c", MISSING, *words, f"--run={tmp_path / 'run'}"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].startswith("anyo: error: Expected bitsandbytes for quantization_config")
    assert "pip install '.[quantized]'" in found.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_of_the_command_line(
    anyo: Anyo, capsys: pytest.CaptureFixture[str], small: list[str], small_llm: list[str], tmp_path: Path
) -> None:
    """`test --run`, in a process of its own, repeats the figures of fit; another quantisation is refused."""
    run = RunFolder(tmp_path / "run")
    words = [f"--config={CONFIGS / 'e4srec.yaml'}", f"--config={OVERLAY}", *small, *small_llm]
    anyo("fit", *words, "--model.encoders.backbone.dtype=bfloat16", f"--run={run.path}")
    figures = run.read_metrics()["metrics"]
    run.metrics_file.unlink()
    command = [sys.executable, "-m", "anyo_lightning", "test", f"--run={run.path}"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert run.read_metrics()["metrics"] == figures
    option = "--model.encoders.backbone.quantization_config"
    for stage in ("fit", "test"):
        sentence = refused(capsys, anyo, stage, f"--run={run.path}", f"{option}.bnb_4bit_use_double_quant=false")
        assert "quantization_config.bnb_4bit_use_double_quant True, with which" in sentence
        assert "quantization_config" in refused(capsys, anyo, stage, f"--run={run.path}", f"{option}=null")
    assert run.read_metrics()["metrics"] == figures


@pytest.mark.real
def test_a_real_model(cache: Path) -> None:
    """Two layers of SmolLM2-135M: states near those in bfloat16, in a third of the bytes of its layers."""
    text = "Toy Story (1995), Animation, Children's, Comedy\nHeat (1995), Action, Crime, Thriller"
    tokens = AutoTokenizer.from_pretrained(cache / "models" / REAL)(text, return_tensors="pt")["input_ids"]
    states, sizes = [], []
    for settings in (None, NF4):
        backbone = Backbone(REAL, dtype="bfloat16", layers=2, quantization_config=settings)
        kept = [value for key, value in backbone.state_dict().items() if ".layers." in key]
        sizes.append(sum(value.nbytes for value in kept))
        states.append(backbone(tokens).float().flatten())
    assert torch.cosine_similarity(states[0], states[1], dim=0) > 0.95
    assert sizes[1] < 0.3 * sizes[0]


@pytest.mark.real
@pytest.mark.slow
def test_a_real_model_resumes(anyo: Anyo, small: list[str], tmp_path: Path) -> None:
    """The alias, quantised as it is loaded from the cache: two epochs are one and one, figures included."""
    words = [f"--config={CONFIGS / 'e4srec.yaml'}", f"--config={OVERLAY}", *small, "--model.decay=false"]
    words += ["--model.encoders.backbone.layers=1", "--model.encoders.backbone.dtype=bfloat16"]
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    anyo("fit", *words, "--trainer.max_epochs=2", f"--run={whole.path}")
    anyo("fit", *words, f"--run={parts.path}")
    anyo("fit", f"--run={parts.path}", "--trainer.max_epochs=2")
    assert not differing(weights(parts.last_checkpoint), weights(whole.last_checkpoint))
    assert parts.read_metrics()["metrics"] == whole.read_metrics()["metrics"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_run_resumes_on_a_gpu(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """Also after Lightning has moved the weights to the CPU at the end of fit; a CPU reads the checkpoint."""
    options = {"accelerator": "gpu", "devices": 1}
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    fit(quantised(tiny_llm), make_data(), whole.path, epochs=2, **options)
    fit(quantised(tiny_llm), make_data(), parts.path, epochs=1, **options)
    fit(quantised(tiny_llm), make_data(), parts.path, epochs=2, ckpt_path=parts.last_checkpoint, **options)
    assert not differing(weights(parts.last_checkpoint), weights(whole.last_checkpoint))
    model = prepare(quantised(tiny_llm), make_data(), saved=weights(whole.best_checkpoint)).to("cuda")
    before = frozen(model.backbones[0])
    model.cpu().to("cuda")
    assert not differing(frozen(model.backbones[0]), before)
    figures = validated(quantised(tiny_llm), make_data(), whole.best_checkpoint)  # on the CPU
    assert 0 <= figures["val/ndcg@10"] <= 1


def test_bitsandbytes_is_imported_for_quantised_weights_alone(tiny_llm: str) -> None:
    """A model with LoRA in full precision leaves it alone, and one in 4 bits that follows has LoRA on its layers."""
    script = f"""
import sys
from anyo_lightning.llm.backbone import Backbone
backbone = Backbone({tiny_llm!r}, lora={LORA!r})
assert "bitsandbytes" not in sys.modules
four = Backbone({tiny_llm!r}, dtype="bfloat16", lora={LORA!r}, quantization_config={NF4!r})
print({{type(module).__name__ for module in four.modules() if hasattr(module, "lora_A")}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'Linear4bit'}"
