"""How long exact ranks and lists take beside what they cannot do without, and beside a search by FAISS for the lists.

    OMP_NUM_THREADS=1 python benchmarks/evaluation_speed.py [--users 4096] [--items 100000] [--dim 128] [--repeats 3]

In one run: `rank` as the evaluator calls it; torch's product, count of the higher scores and topk, without a mask; the
product alone; and both products and counts of an evaluator that masks item by item, makes matrices of what is higher
and what ties, and has FAISS find the lists. Each block of 256 users goes through all of them in turn, so that whoever
else uses the machine slows down all alike; the median over repeats of ratios is shown.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import faiss
import numpy as np
import torch
from torch import Tensor

from anyo_lightning.evaluation.index import ItemIndex
from anyo_lightning.evaluation.ranking import block_rows, excluded_items, rank

HISTORY, K = 50, 20


def main() -> None:
    """Print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"users": 4096, "items": 100_000, "dim": 128, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    faiss.omp_set_num_threads(torch.get_num_threads())
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    queries = torch.randn(options.users, options.dim, generator=generator)
    vectors = torch.randn(options.items, options.dim, generator=generator).to(device)
    histories = random.integers(options.items, size=(options.users, HISTORY))
    target = random.integers(options.items, size=options.users)
    index, size = ItemIndex(vectors.cpu().numpy()), block_rows(options.items)

    def whole(span: slice) -> None:
        rows = np.arange(span.start, span.stop)
        history: Callable[[int], np.ndarray] = histories.__getitem__
        rank(rows, queries[span], vectors, target[span], index=index, k=K, history=history)

    def product(span: slice) -> Tensor:
        return queries[span].to(device) @ vectors.T

    def bare(span: slice) -> None:
        scores = product(span)
        wanted = scores.gather(1, torch.from_numpy(target[span]).to(device)[:, None])
        (scores > wanted).sum(1).cpu(), [part.cpu() for part in scores.topk(K, dim=1)]

    def twice(span: slice) -> None:
        scores, wanted_items = product(span), torch.from_numpy(target[span]).to(device)
        excluded = excluded_items(np.arange(span.start, span.stop), target[span], histories.__getitem__)
        where = torch.from_numpy(np.repeat(np.arange(len(excluded)), [len(items) for items in excluded]))
        scores[where.to(device), torch.from_numpy(np.concatenate(excluded)).to(device)] = -torch.inf
        wanted = scores.gather(1, wanted_items[:, None])
        higher, tied = scores > wanted, (scores == wanted).scatter(1, wanted_items[:, None], False)
        (2 * higher.sum(1) + tied.sum(1)).cpu()
        index.search(queries[span].numpy(), K, excluded)

    ways = {"rank": whole, "product, count, top-k": bare, "product": product, "two products, FAISS": twice}
    spans = [slice(start, min(start + size, options.users)) for start in range(0, options.users, size)]
    for way in ways.values():
        way(spans[0])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        totals = dict.fromkeys(ways, 0.0)
        for span in spans:
            for name, way in ways.items():
                started = time.perf_counter()
                way(span)
                totals[name] += time.perf_counter() - started
        for name, total in totals.items():
            seconds[name].append(total)
    print(
        f"{options.users:,} users, {options.items:,} items of width {options.dim}, {HISTORY} masked, {K} listed; "
        f"{device.type}, {torch.get_num_threads()} thread(s)\n\n"
        "| | seconds | times product, count, top-k |\n|---|---:|---:|"
    )
    for name, found in seconds.items():
        ratio = statistics.median(own / base for own, base in zip(found, seconds["product, count, top-k"], strict=True))
        print(f"| {name} | {min(found):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
