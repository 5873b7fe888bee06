"""`anyo serve` as a process of its own: what it answers, what it refuses, many clients at once, and its page."""

import json
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from helpers import Anyo

from anyo_lightning import Recommender
from anyo_lightning.cli.serve_runs import LOCAL, hosts_for

Ask = Callable[..., tuple[int, Any]]
NAMES = ["sasrec", "e4srec_vectors"]


@pytest.fixture(scope="module")
def runs(run_of: Callable[..., Path]) -> list[Path]:
    return [run_of(name) for name in NAMES]


@pytest.fixture(scope="module")
def address(runs: list[Path]) -> Iterator[str]:
    """Where a server answers by two runs, a language model's among them."""
    command = [sys.executable, "-m", "anyo_lightning", "serve", "--run", *map(str, runs), "--port=0", "--device=cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    found = re.fullmatch(rf"Serving {', '.join(NAMES)} at (http://127\.0\.0\.1:\d+)\n", said)
    assert found is not None, said
    yield found[1]
    process.terminate()
    assert process.wait(30) == -15 or process.returncode == 0


@pytest.fixture
def ask(address: str) -> Ask:
    """Sends a request; returns the status and the answer."""

    def send(path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(f"{address}/{path}", data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(text) if (text := error.read().decode()).startswith("{") else text

    return send


def ids(lists: list[list[dict[str, Any]]]) -> list[list[str]]:
    return [[line["item_id"] for line in found] for found in lists]


def test_who_reads_the_address_can_connect(
    anyo: Anyo, runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also before the server has started, which takes a while on a busy machine."""
    connected = []

    def connect(self: uvicorn.Server, sockets: list[socket.socket]) -> None:
        assert "Serving" in capsys.readouterr().out
        with socket.create_connection(sockets[0].getsockname(), timeout=10) as connection:
            connected.append(connection.getpeername())

    monkeypatch.setattr(uvicorn.Server, "run", connect)
    anyo("serve", "--run", runs[0], "--port=0", "--device=cpu")
    assert len(connected) == 1


def test_answers_are_the_recommenders(ask: Ask, runs: list[Path]) -> None:
    """Histories by ids, a user, titles and neighbours, of both runs, as `Recommender` has them."""
    recommenders = [Recommender.load(run, device="cpu") for run in runs]
    items = recommenders[0].item_ids
    histories = [items[:3], items[5:6]]
    status, answer = ask("recommend", {"histories": histories, "k": 7})
    assert status == 200
    assert [run["run"] for run in answer["runs"]] == NAMES
    for run, recommender in zip(answer["runs"], recommenders, strict=True):
        found = recommender.recommend(histories, 7)
        assert [item for listed in ids(run["lists"]) for item in listed] == found["item_id"].to_list()
        scores = [line["score"] for lines in run["lists"] for line in lines]
        np.testing.assert_allclose(scores, found["score"].to_list(), rtol=1e-5, atol=1e-6)
    user = str(recommenders[0].data.split.user_ids[0])
    read = ask("recommend", {"user": user})[1]["runs"][0]["histories"]
    assert [item["item_id"] for item in read[0]] == recommenders[0].history(user)
    title = recommenders[0].titles[4]
    understood = ask("recommend", {"titles": [title.upper()]})[1]["runs"][0]["histories"][0][0]
    assert understood == {"item_id": recommenders[0].find(title), "title": title}
    both = ask("recommend", {"items": items[:1], "titles": [title]})[1]["runs"][0]["histories"][0]
    assert [item["item_id"] for item in both] == [items[0], recommenders[0].find(title)]
    near = ask("similar", {"item": items[2], "k": 3})[1]["runs"]
    assert ids([run["list"] for run in near]) == [r.similar([items[2]], 3)["item_id"].to_list() for r in recommenders]
    assert set(ask("titles")[1]) <= set(recommenders[0].titles)
    shown = ask("recommend", {"items": items[:2], "k": len(items) if len(items) < 100 else 100, "seen": "show"})[1]
    assert set(items[:2]) <= set(ids(shown["runs"][0]["lists"])[0])


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        ("recommend", {"titles": ["zzzzqqq xx"]}, 422, "Expected a title of the catalogue, got 'zzzzqqq xx'"),
        ("recommend", {"items": ["nobody"]}, 422, "Expected ids of the catalogue in history 0"),
        ("recommend", {"user": "nobody"}, 422, "Expected one of the"),
        ("recommend", {}, 422, "Expected one of titles or items, user, histories, got none"),
        ("recommend", {"titles": ["a"], "user": "1"}, 422, "got titles or items and user"),
        ("recommend", {"items": []}, 422, "items"),
        ("recommend", {"items": ["1"], "k": 0}, 422, "k: "),
        ("recommend", {"items": ["1"], "k": 101}, 422, "k: "),
        ("recommend", {"histories": [["1"]] * 65}, 422, "histories"),
        ("recommend", {"items": ["1"], "more": 1}, 422, "more"),
        ("recommend", b"{", 422, "the body"),
        ("recommend", b" " * 70_000, 413, "Expected at most 65,536 bytes"),
        ("similar", {"item": "zzzzqqq xx"}, 422, "Expected a title"),
        ("nothing", None, 404, "Not Found"),
        ("recommend", None, 405, "Method Not Allowed"),
    ],
)
def test_mistakes_are_one_sentence(ask: Ask, path: str, body: Any, status: int, sentence: str) -> None:
    """With its status, and nothing of the server's inside."""
    found, answer = ask(path, body)
    assert found == status
    assert list(answer) == ["error"]
    assert sentence in answer["error"]
    assert "Traceback" not in answer["error"]
    assert "\n" not in answer["error"]


def test_a_page_elsewhere_cannot_ask(ask: Ask) -> None:
    """A name of another site that leads to this machine is refused."""
    assert ask("titles", Host="evil.example")[0] == 400


def test_many_clients_get_their_own_answers(ask: Ask, runs: list[Path]) -> None:
    """50 at once, three times, one in five with a mistake; what is read together is not mixed up."""
    recommender = Recommender.load(runs[1], device="cpu")
    items = recommender.item_ids
    wanted = [[items[(3 * n + m) % len(items)] for m in range(1 + n % 5)] for n in range(150)]
    bodies: list[dict[str, Any]] = [{"items": history, "k": 3 + n % 2} for n, history in enumerate(wanted)]
    for n in range(0, 150, 5):
        bodies[n] = {"items": ["nobody"]}
    with ThreadPoolExecutor(50) as clients:
        answers = list(clients.map(lambda body: ask("recommend", body), bodies))
    for n, (status, answer) in enumerate(answers):
        if n % 5 == 0:
            assert status == 422
            continue
        assert status == 200
        (found,) = ids(answer["runs"][1]["lists"])
        assert found == recommender.recommend([wanted[n]], 3 + n % 2)["item_id"].to_list()


def test_a_port_in_use_is_refused(address: str, runs: list[Path]) -> None:
    """In one sentence, with exit code 2, before a model is loaded."""
    command = [
        sys.executable,
        "-m",
        "anyo_lightning",
        "serve",
        f"--run={runs[0]}",
        f"--port={address[-5:].lstrip(':')}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"anyo: error: Expected --host and --port that are free, got .*\n", done.stderr)


@pytest.mark.browser
def test_the_page_lists_and_adds(browser: Any, address: str, runs: list[Path]) -> None:
    """A typed title gives a column per run, a listed one joins the history, mistakes are said, nobody else is asked."""
    recommender = Recommender.load(runs[0], device="cpu")
    page = browser.new_page()
    problems: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.fill("#title", recommender.titles[3])
    page.click("text=Add")
    page.wait_for_selector("section li")
    assert page.locator("section h2").all_text_contents() == NAMES
    assert page.locator("#history li").count() == 1
    understood = recommender.find(recommender.titles[3])
    expected = recommender.recommend([[understood]], 10)["title"].to_list()
    first = page.locator("section").nth(0).locator("li button")
    assert first.all_text_contents() == expected
    first.nth(0).click()
    page.locator("#history li").nth(1).wait_for()
    page.fill("#title", "zzzzqqq xx")
    page.click("text=Add")
    page.locator("#error", has_text="the nearest are").wait_for()
    assert page.locator("#history li").count() == 2
    page.click("#history li >> nth=0 >> button")
    page.locator("#history li").nth(1).wait_for(state="detached")
    page.click("#clear")
    assert page.locator("section").count() == 0
    assert not problems
    assert all(url.startswith((address, "data:")) for url in asked)
    page.close()


def test_a_server_answers_to_its_own_names() -> None:
    """One address or name is called by that or from this machine; all addresses by any name."""
    assert hosts_for("127.0.0.1") == LOCAL
    assert hosts_for("192.168.1.7") == (*LOCAL, "192.168.1.7")
    assert hosts_for("fe80::1")[-1] == "[fe80::1]"
    assert hosts_for("0.0.0.0") == hosts_for("::") == ("*",)
