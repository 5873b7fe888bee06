"""The HTML page: what is in it, and in headless Chromium that it draws, sorts, browses and asks the network nothing."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fake_runs import write_run

from anyo_lightning.compare.table import compare
from anyo_lightning.errors import InputError
from anyo_lightning.fidelity.index_page import as_page
from anyo_lightning.fidelity.index_table import FidelityTable
from anyo_lightning.fidelity.measure import Fidelity
from anyo_lightning.runs import RunFolder

USERS = 120
EVIL = "</script><script>document.title = 'broken'</script>"
TITLES = [EVIL, 'Say "yes" & <b>no</b> (1999)', "It's <!-- here", *(f"Title {number}" for number in range(7))]
NO_CHANGE = {"value": 0.0, "low": -0.1, "high": 0.1, "p_holm": 1.0}
LOSS = {"value": -0.2, "low": -0.3, "high": -0.1, "p_holm": 0.01}
PROBES: dict[str, Any] = {
    "split": "00000000000000aa",
    "seed": 0,
    "users": 2,
    "reads_titles": True,
    "figures": {
        f"test/{metric}@10": {
            "as it is": {"value": 0.5, "low": 0.4, "high": 0.6, "difference": None},
            "titles shuffled": {"value": 0.3, "low": 0.2, "high": 0.4, "difference": LOSS},
            "last item only": {"value": 0.5, "low": 0.4, "high": 0.6, "difference": NO_CHANGE},
        }
        for metric in ("hr", "ndcg")
    },
    "memory": {
        what: {
            "asked": 20,
            "completed": {"value": 0.25, "control": 0.05, "difference": NO_CHANGE},
            "log_likelihood": {"value": -2.5, "control": -3.5, "difference": NO_CHANGE},
        }
        for what in ("titles", "next_items")
    },
}
PLOTS = {"cost-plot": 1, "curve-plot": 1, "slice-plots": 4, "pair-plot": 1}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of four variants, one with two seeds, one with a name that would like to be HTML."""
    root = tmp_path_factory.mktemp("runs")
    ranks = np.exp(np.random.default_rng(0).uniform(0, np.log(60), USERS)).round()
    write_run(root, "markov", ranks, lists=True, titles=TITLES)
    trained = [
        write_run(root, "sasrec", np.roll(ranks, seed + 1), seed=seed, lists=True, titles=TITLES) for seed in (0, 1)
    ]
    trained.append(write_run(root, "e4srec", np.maximum(ranks / 3, 1).round(), lists=True, titles=TITLES))
    write_run(root, f"<img src=x> {EVIL}", ranks + 3, folder="odd", lists=True, titles=TITLES)
    e4srec = RunFolder(trained[-1])
    metrics = e4srec.read_metrics()
    e4srec.write_metrics(metrics | {"cost": metrics["cost"] | {"flops": 3.447e14}})
    for path in trained:
        steps = np.arange(1, 9) * 50
        RunFolder(path).write_curves(
            pl.DataFrame(
                {
                    "step": steps,
                    "tokens": steps * 100,
                    "seconds": steps * 0.5,
                    "train/loss": 5 / steps,
                    "val/ndcg@10": [None, 0.1] * 4,
                }
            )
        )
    RunFolder(trained[-1]).write_probes(PROBES)
    output = root / "report.html"
    compare([root], baseline="markov", format="html", metrics=["test/ndcg@10", "test/hr@10"], output=output)
    return output


@pytest.fixture
def page(browser: Any, page_file: Path) -> Iterator[Any]:
    """The page, loaded; fails afterwards if anything was complained about or asked of the network."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(page_file.as_uri())
    opened.wait_for_selector("#pair-plot .main-svg")
    yield opened
    context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]


def test_the_page_stands_alone_and_its_data_cannot_end_the_script(page_file: Path) -> None:
    """No address to load from; the block of JSON has no `<` at all and reads back with the titles as they are."""
    text = page_file.read_text()
    head = text[: text.index('<script type="application/json"')]
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|@import|url\(", head)
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert block is not None
    assert "<" not in block[1]
    content = json.loads(block[1])
    assert EVIL in content["cases"]["items"]
    assert content["cases"]["note"].startswith(f"All {USERS} test rows")
    assert [variant["seeds"] for variant in content["variants"]].count(2) == 1
    assert len(text) < 6_000_000
    assert [cost["name"] for cost in content["costs"]] == ["minutes", "pflop", "trained"]  # what a run has measured
    shown = {variant["label"]: variant["shown"]["pflop"] for variant in content["variants"]}
    assert (shown["e4srec"], shown["markov"]) == ("0.345", "-")


def test_wins_ties_and_losses_add_up(page_file: Path) -> None:
    """By hand for two variants: users for whom one's target is among the first ten and the other's is not."""
    text = page_file.read_text()
    content = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    ranks = np.exp(np.random.default_rng(0).uniform(0, np.log(60), USERS)).round()
    better = np.maximum(ranks / 3, 1).round()
    labels = [variant["label"] for variant in content["variants"]]
    first, second = labels.index("e4srec"), labels.index("markov")
    pairs = content["pairs"]["test/hr@10"]
    assert pairs["wins"][first][second] == np.sum((better <= 10) & (ranks > 10)) > 0
    assert pairs["wins"][second][first] == 0
    assert pairs["difference"][first][second] == pytest.approx(np.mean(better <= 10) - np.mean(ranks <= 10), abs=1e-6)


def test_a_terminal_is_not_flooded(page_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a file to write to, on a terminal, the page is refused."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with pytest.raises(InputError, match="Expected output to name a file"):
        compare([page_file.parent], format="html")


def test_probes_are_of_the_variants_that_have_been_probed(page_file: Path) -> None:
    """One line per probe and one per question, with the paired change; others have none."""
    content = json.loads(re.search(r'id="data">(.*?)</script>', page_file.read_text(), re.DOTALL)[1])  # type: ignore[index]
    figures, memory = content["probes"]["tables"]
    assert figures["headers"] == ["variant", "probe", "HR@10", "change", "NDCG@10", "change", "left"]
    shuffled = ["", "titles shuffled", ".300 ±.100", "-.200 ±.100*", ".300 ±.100", "-.200 ±.100*", "60%"]
    assert [row[1] for row in figures["rows"]] == ["as it is", "titles shuffled", "last item only"]
    assert figures["rows"][1] == shuffled
    assert memory["rows"][0] == ["e4srec", "titles completed", "20", ".250", ".050", "+.000 ±.100 "]
    assert len(memory["rows"]) == 4


def test_probes_are_those_of_the_split_and_of_any_seed(tmp_path: Path) -> None:
    """The second seed is shown where it alone has been probed, but not what was probed on another split."""
    ranks = np.arange(1, 31).astype(float)
    first, second = (RunFolder(write_run(tmp_path, "sasrec", ranks, seed=seed, lists=True)) for seed in (0, 1))
    second.write_probes(PROBES)
    output = tmp_path / "report.html"
    for split, tables in (("00000000000000bb", 2), ("00000000000000aa", 1)):  # the second table: the LLM was asked
        first.write_probes(PROBES | {"split": split, "memory": "the run has none"})
        compare([tmp_path], format="html", output=output)
        content = json.loads(re.search(r'id="data">(.*?)</script>', output.read_text(), re.DOTALL)[1])  # type: ignore[index]
        assert len(content["probes"]["tables"]) == tables


def test_lists_of_an_approximate_index_are_marked_in_the_case_browser(tmp_path: Path) -> None:
    """Beside those of an exact one, which need no note."""
    ranks = np.arange(1, 31).astype(float)
    write_run(tmp_path, "sasrec", ranks, lists=True)
    write_run(tmp_path, "anyo", ranks, lists=True, index="HNSW32")
    output = tmp_path / "report.html"
    compare([tmp_path], format="html", output=output)
    content = json.loads(re.search(r'id="data">(.*?)</script>', output.read_text(), re.DOTALL)[1])  # type: ignore[index]
    assert content["cases"]["note"].endswith("of anyo are of an approximate index: HNSW32.")
    assert "sasrec" not in content["cases"]["note"]


@pytest.mark.browser
def test_probes_are_shown_where_there_are_any(page: Any, page_file: Path, tmp_path: Path) -> None:
    """Two tables and a link; without a probed run neither."""
    assert page.locator("#probe-tables table").count() == 2
    assert "titles shuffled" in page.locator("#probe-tables").text_content()
    assert page.get_by_role("link", name="Probes").count() == 1
    compare([page_file.parent / "markov"], format="html", output=tmp_path / "page.html")
    other = page.context.new_page()
    other.goto((tmp_path / "page.html").as_uri())
    other.wait_for_selector("#results tbody tr")
    assert other.locator("#probes").count() == 0
    assert other.get_by_role("link", name="Probes").count() == 0


@pytest.mark.browser
def test_every_plot_is_drawn_and_follows_its_controls(page: Any) -> None:
    """Marks in each plot; each option of each control draws again without a complaint."""
    for name, count in PLOTS.items():
        assert page.locator(f"#{name} .main-svg").count() >= count, name
    assert page.locator("#cost-plot .scatterlayer .trace").count() == 5  # four variants and the front
    assert page.locator("#ledger thead th").all_text_contents() == ["Variant", "minutes", "pflop", "trained"]
    assert page.locator("#ledger tbody tr").count() == 4
    assert "inf" not in page.locator("#ledger").text_content().lower()
    assert page.locator("#curve-plot .scatterlayer .trace").count() == 3  # three trained runs
    assert page.locator("#pair-plot .bars .point").count() == 9  # three others, three parts
    for select in page.locator(".controls select").all():
        for option in range(select.locator("option").count()):
            select.select_option(index=option)
    page.select_option("#slice-group", label="history length")
    assert page.locator("#slice-plots .main-svg").count() >= 3
    assert "users" in page.locator("#slice-plots h3").first.text_content()


@pytest.mark.browser
def test_lists_of_another_system_are_drawn_as_far_as_they_go(page: Any, tmp_path: Path) -> None:
    """A dash for the metric beyond them; every control works, also where a plot has nothing to show of that row."""
    ranks = np.exp(np.random.default_rng(0).uniform(0, np.log(60), USERS)).round()
    for name, own in (("markov", ranks), ("e4srec", np.maximum(ranks / 3, 1).round())):
        write_run(tmp_path, name, own, lists=True, history_masked=False)
    lists = RunFolder(tmp_path / "markov" / "version_0").read_predictions()
    lists = lists.select("user_id", item_id=pl.col("top_item_ids").list.head(5)).explode("item_id")
    lists.with_columns(rank=pl.int_range(pl.len()).over("user_id")).write_csv(tmp_path / "lists.csv")
    foreign, metrics = [f"peer={tmp_path / 'lists.csv'}"], ["test/hr@10", "test/hr@3"]
    compare([tmp_path], foreign=foreign, format="html", metrics=metrics, output=tmp_path / "page.html")
    other = page.context.new_page()
    complaints: list[str] = []
    other.on("pageerror", lambda error: complaints.append(str(error)))
    other.goto((tmp_path / "page.html").as_uri())
    other.wait_for_selector("#pair-plot .main-svg")
    row = other.locator("#results tbody tr", has_text="peer (top 5)")
    assert row.locator("td").nth(1).text_content() == "-"
    assert "±" in row.locator("td").nth(2).text_content()
    for select in [found for found in other.locator(".controls select").all() if found.is_visible()]:  # no curves here
        for option in range(select.locator("option").count()):
            select.select_option(index=option)
    other.select_option("#pair-metric", label="HR@10")
    other.select_option("#pair-variant", label="peer (top 5)")
    assert not other.locator("#pair-plot").is_visible()
    other.select_option("#pair-metric", label="HR@3")
    assert other.locator("#pair-plot .bars .point").count() == 6  # two others, three parts
    other.select_option("#case-first", label="markov")
    other.select_option("#case-second", label="peer (top 5)")
    other.select_option("#case-filter", "first")
    peer = other.locator("#case .lists > div", has_text="peer (top 5)")
    assert "without the target" in peer.locator("h3").text_content()
    other.select_option("#case-filter", "second")
    assert other.locator("#case").text_content() == "No case matches."  # nothing is better than what it copies
    assert complaints == []


@pytest.mark.browser
def test_the_table_sorts_by_mouse_and_keyboard(page: Any) -> None:
    """Best first at the start; a click on the name sorts by it, Enter turns the order round."""

    def column(position: int) -> list[str]:
        return [row.locator("th, td").nth(position).text_content() for row in page.locator("#results tbody tr").all()]

    values = [float(text.split()[0].rstrip("†")) for text in column(2)]
    assert values == sorted(values, reverse=True)
    assert page.locator("th[aria-sort=descending]").text_content() == "NDCG@10"
    button = page.get_by_role("button", name="Variant")
    button.click()
    ascending = column(0)
    assert ascending == sorted(ascending, key=str.lower)
    button.press("Enter")
    assert column(0) == ascending[::-1]
    assert page.locator("th[aria-sort=descending]").text_content() == "Variant"


@pytest.mark.browser
def test_the_case_browser_works_with_mouse_and_keyboard(page: Any) -> None:
    """Next, arrow keys, search and the filter each show another user, one list per variant, the target marked."""
    facts, picker = page.locator("#case .facts"), page.locator("#case-list")
    first = facts.text_content()
    page.get_by_role("button", name="Next").click()
    second = facts.text_content()
    picker.focus()
    picker.press("ArrowDown")
    third = facts.text_content()
    assert len({first, second, third}) == 3
    page.get_by_role("button", name="Previous").click()
    assert facts.text_content() == second
    assert page.locator("#case .lists > div").count() == 5  # the history and four variants
    page.select_option("#case-first", label="e4srec")
    page.select_option("#case-second", label="markov")
    page.select_option("#case-filter", "first")
    assert 0 < picker.locator("option").count() < USERS
    page.select_option("#case-filter", "all")
    page.fill("#case-search", "u17")
    assert facts.text_content().startswith("User u17,")
    e4srec = page.locator("#case .lists > div", has_text="e4srec")
    rank = int(re.search(r"target at (\d+)", e4srec.locator("h3").text_content())[1])  # type: ignore[index]
    assert rank <= 10
    assert "target" in (e4srec.locator("li").nth(rank - 1).locator("span").get_attribute("class") or "")
    page.fill("#case-search", "nobody")
    assert page.locator("#case").text_content() == "No case matches."


@pytest.mark.browser
def test_titles_and_names_are_text(page: Any) -> None:
    """`<script>`, quotes and comments of titles and variants are seen as they are, and nothing of them runs."""
    assert page.title() == "4 variants compared"
    shown = page.locator("#case").text_content()
    for title in TITLES[:3]:
        assert title in shown
    assert page.locator("img").count() == 0
    assert page.locator("main script, main b").count() == 0
    names = page.locator("#results tbody th").all_text_contents()
    assert f"<img src=x> {EVIL}" in names


@pytest.mark.browser
def test_long_names_of_rows_stay_apart(page: Any) -> None:
    """Rows that are called alike differ at the end: an axis without room for a whole name shows both its ends."""
    ends = ("", ", titles permuted", ", weights shuffled", ", own items masked")
    names = [f"{begin}{end}" for begin in ("e4srec_vectors", "e4srec_vectors_hybrid, SASRec's vectors") for end in ends]
    shown = [page.evaluate("(name) => short(name)", name) for name in names]
    assert len(set(shown)) == len(names)
    assert all(len(text) <= 28 for text in shown)
    assert shown[0] == "e4srec_vectors"


@pytest.mark.browser
def test_nothing_is_wider_than_a_phone_and_print_and_dark_are_readable(browser: Any, page_file: Path) -> None:
    """390 pixels: no sideways scrolling. Dark: light text. Print: a white page, whatever the screen's scheme."""
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark")
    page = context.new_page()
    page.goto(page_file.as_uri())
    page.wait_for_selector("#pair-plot .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") == 390

    def brightness(selector: str, style: str) -> float:
        colour = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).{style}")
        return float(np.mean([int(part) for part in re.findall(r"\d+", colour)[:3]]))

    assert brightness("body", "backgroundColor") < 60 < 180 < brightness("body", "color")
    assert brightness("#cost-plot .xtick text", "fill") > 180
    page.emulate_media(media="print")
    assert brightness("body", "color") < 60 < 250 < brightness("body", "backgroundColor")
    assert brightness("#cost-plot .xtick text", "fill") < 60
    context.close()


@pytest.mark.browser
def test_the_page_of_index_fidelity_draws(browser: Any, tmp_path: Path) -> None:
    """One trace per index that was built, names as text, a table, no complaint, no sideways scrolling on a phone."""
    searched = [("Flat", 1.0), ("IVF64,Flat:nprobe=2", 0.6), ("IVF64,Flat:nprobe=8", 0.9)]
    indexes = tuple(
        Fidelity(name, recall, 0.1, 0.0, 0.01, 345_389, 5e4 * (1.1 - recall), ()) for name, recall in searched
    )
    table = FidelityTable(f"<img src=x> {EVIL}", "test", 943, 1349, 64, True, 10, indexes)
    file = tmp_path / "index.html"
    file.write_text(as_page(table))
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark")
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(file.as_uri())
    page.wait_for_selector("#plot .main-svg")
    assert page.locator("#plot .scatterlayer .trace").count() == 2
    assert page.locator("#plot .scatterlayer .point").count() == 3
    assert page.locator("#results tbody tr").count() == 3
    assert EVIL in page.locator("#about").text_content()
    assert page.locator("img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert complaints == []
    context.close()
