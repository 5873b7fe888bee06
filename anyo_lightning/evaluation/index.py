"""Maximum inner product search over the catalogue: the recommender at serving time.

`ItemIndex` is a FAISS index of the item vectors, exact (`Flat`) by default, or whatever a FAISS factory string says
(`HNSW32`, `IVF64,Flat`, `IVF256,PQ16` …), with FAISS's search parameters after a colon (`IVF64,Flat:nprobe=8`). It
returns lists without the items of the history, by asking for as many more as the history is long and filtering, so that
it works with every type of index.

Reference:
    Douze et al., "The Faiss library", 2024; factory strings: https://github.com/facebookresearch/faiss/wiki/The-index-factory
"""

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from anyo_lightning.data.splits import MISSING
from anyo_lightning.errors import InputError

WIDTH_WITH_MANY_DIVISORS = 960  # product quantisers cut a vector into equal parts
LARGEST_WRITTEN_OUT = 30_000**2  # numbers of sparse vectors, 3.4 GiB in float32
ROUNDING = 1e-5  # of a row's largest score: scores that differ by less tie


def check_factory(factory: str) -> None:
    """Refuse, before any vector is there, a factory string that FAISS cannot read.

    Raises:
        InputError: When it cannot.
    """
    kind = factory.partition(":")[0]
    try:
        faiss.index_factory(WIDTH_WITH_MANY_DIVISORS, kind, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(
            f"Expected metrics.index to be a FAISS factory string such as Flat, HNSW32 or IVF16,Flat:nprobe=4; got "
            f"{factory!r} (FAISS: {str(error).splitlines()[0].rsplit(': ', 1)[-1]})"
        ) from error


def dense_for_index(vectors: Float[Tensor, "catalogue dim"]) -> Float[np.ndarray, "catalogue dim"]:
    """All item vectors as FAISS takes them.

    Raises:
        InputError: They are sparse, and too many and too wide to be written out.
    """
    if vectors.is_sparse and vectors.numel() > LARGEST_WRITTEN_OUT:
        items, width = vectors.shape
        raise InputError(
            f"Expected item vectors that a FAISS index can hold, got {items} sparse ones of width {width}, which would "
            f"take {4 * items * width / 2**30:.0f} GiB: only metrics.index Flat ranks them, without an index"
        )
    dense: np.ndarray = vectors.to_dense().cpu().numpy()
    return dense


class ItemIndex:
    """A FAISS index over item vectors, by inner product.

    Attributes:
        build_seconds: What training and filling it took.
    """

    def __init__(self, vectors: Float[np.ndarray, "catalogue dim"], *, factory: str = "Flat") -> None:
        """Build the index, training it first where its type needs that.

        Where FAISS says that there are few vectors to train on, that is a warning: the index works, less well.

        Args:
            vectors: One vector per item, finite.
            factory: FAISS factory string, `:` and search parameters after it where it has any: `IVF64,Flat:nprobe=8`,
                `HNSW32:efSearch=64`.

        Raises:
            InputError: The factory string or a parameter is unknown to FAISS, or does not fit the vectors' width or
                their number.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self.catalogue_size, self.dim = vectors.shape
        self.factory = factory
        self._search_seconds, self._searched = 0.0, 0
        started = time.perf_counter()
        kind, _, parameters = factory.partition(":")
        try:
            with _faiss_warnings(kind):
                self._index = faiss.index_factory(self.dim, kind, faiss.METRIC_INNER_PRODUCT)
                if not self._index.is_trained:
                    self._index.train(vectors)
                self._index.add(vectors)
            self.build_seconds = time.perf_counter() - started
            if parameters:
                faiss.ParameterSpace().set_index_parameters(self._index, parameters)  # type: ignore[arg-type]
                self._index.search(vectors[:1], 1)  # FAISS looks at some values only here
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0].rsplit(": ", 1)[-1]
            raise InputError(
                f"Expected index to be a FAISS factory string that fits {self.catalogue_size} vectors of width "
                f"{self.dim}, such as Flat, HNSW32 or IVF16,Flat:nprobe=4; got {factory!r} (FAISS: {reason})"
            ) from error
        self._beam = self._hnsw.efSearch if self._hnsw is not None else 0

    @property
    def exact(self) -> bool:
        """Whether a search looks at every item at full precision."""
        return type(self._index) is faiss.IndexFlat or type(self._index) is faiss.IndexFlatIP

    def search(
        self,
        queries: Float[np.ndarray, "rows dim"],
        k: int,
        excluded: Sequence[Int[np.ndarray, "_"]] | None = None,
    ) -> tuple[Int[np.ndarray, "rows k"], Float[np.ndarray, "rows k"]]:
        """The k best items of each query that are not excluded, best first.

        Args:
            queries: One vector per row, finite.
            k: Length of the lists.
            excluded: The items that each row must not be given; None excludes nothing.

        Returns:
            Items and scores. Where fewer than k items are left, or an approximate index finds fewer, the list ends
            in -1 with a score of minus infinity.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        rows = len(queries)
        items = np.full((rows, k), MISSING, dtype=np.int64)
        scores = np.full((rows, k), -np.inf, dtype=np.float32)
        lengths = np.zeros(rows, dtype=np.int64) if excluded is None else np.array([len(e) for e in excluded])
        assert len(lengths) == rows, f"Expected {rows} lists of excluded items, got {len(lengths)}"
        # Rows are searched together with rows whose histories are of similar length (up to 16, 32, 64 … items), so
        # that one user with a very long history does not make everyone's search long.
        extra = np.where(lengths == 0, 0, 2 ** np.ceil(np.log2(np.maximum(lengths, 16))).astype(np.int64))
        for more in np.unique(extra):
            group = np.flatnonzero(extra == more)
            found, found_scores = self._search(queries[group], min(k + int(more), self.catalogue_size))
            allowed = found >= 0
            if excluded is not None and more:
                within = np.repeat(np.arange(len(group)), lengths[group])
                seen = np.zeros((len(group), self.catalogue_size), dtype=bool)
                seen[within, np.concatenate([excluded[int(row)] for row in group])] = True
                allowed &= ~np.take_along_axis(seen, np.maximum(found, 0), axis=1)
            place = np.cumsum(allowed, axis=1) - 1
            row, column = np.nonzero(allowed & (place < k))
            items[group[row], place[row, column]] = found[row, column]
            scores[group[row], place[row, column]] = found_scores[row, column]
        return items, scores

    def write(self, path: Path) -> None:
        """Write the index as `faiss.read_index` reads it; its ids are the items' numbers."""
        faiss.write_index(self._index, str(path))

    @property
    def size(self) -> int:
        """Bytes of the index as FAISS writes it to a file."""
        return len(faiss.serialize_index(self._index))

    @property
    def queries_per_second(self) -> float:
        """Of all searches so far: FAISS's own time for blocks of queries, history filter apart; 0 before the first."""
        return self._searched / self._search_seconds if self._search_seconds else 0.0

    @property
    def _hnsw(self) -> "faiss.HNSW | None":
        """The graph of an HNSW index, also after a transform such as PCA."""
        index = self._index
        inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
        return inner.hnsw if isinstance(inner, faiss.IndexHNSW) else None

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """FAISS's own search, with HNSW's beam at least as wide as the list that is asked for."""
        if self._hnsw is not None:
            self._hnsw.efSearch = max(self._beam, k)
        started = time.perf_counter()
        scores, found = self._index.search(queries, k)
        self._search_seconds += time.perf_counter() - started
        self._searched += len(queries)
        return found, scores


@contextmanager
def _faiss_warnings(kind: str) -> Iterator[None]:
    """What FAISS writes to stderr, past Python, as one warning per sentence: PQ16 says the same thing 16 times."""
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with tempfile.TemporaryFile() as caught:
            os.dup2(caught.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(before, 2)
                caught.seek(0)
                lines = dict.fromkeys(caught.read().decode(errors="replace").splitlines())
    finally:
        os.close(before)
    for line in filter(None, lines):
        warnings.warn(f"{kind}: {line.removeprefix('WARNING ')}", stacklevel=4)  # whoever builds the index


def index_recall(found: Int[np.ndarray, "rows k"], exact: Int[np.ndarray, "rows k"]) -> Float[np.ndarray, "rows"]:
    """Share of each row's exact list (see `as_found`) that the index found, in any order; ids of -1 are left out."""
    present = exact >= 0
    hits = (exact[:, :, None] == found[:, None, :]).any(axis=2) & present
    return np.asarray(hits.sum(axis=1) / np.maximum(present.sum(axis=1), 1))


def as_found(
    exact: Int[np.ndarray, "rows k"],
    exact_scores: Float[np.ndarray, "rows k"],
    found: Int[np.ndarray, "rows k"],
    scores: Float[np.ndarray, "rows k"],
) -> Int[np.ndarray, "rows k"]:
    """The exact lists, in which of items that tie those come first that the index found, in its order.

    Items of one text have one vector, and which of them a list of k shows is chance: no index misses anything there.

    Args:
        exact: Exact lists, ids of -1 after their ends.
        exact_scores: Of their items.
        found: The index's lists.
        scores: Of their items too, exact: not what a quantised index thinks they are; of ids of -1 any.
    """
    k = exact.shape[1]
    room = ROUNDING * np.abs(exact_scores, where=exact >= 0, out=np.zeros(exact.shape)).max(axis=1, keepdims=True)
    own = np.where(found >= 0, scores + room * (2 - np.arange(k) / k), -np.inf)
    again = (exact[:, :, None] == found[:, None, :]).any(axis=2) | (exact < 0)
    everything = np.concatenate([own, np.where(again, -np.inf, exact_scores)], axis=1)
    order = np.argsort(-everything, axis=1, kind="stable")[:, :k]
    items = np.take_along_axis(np.concatenate([found, exact], axis=1), order, axis=1)
    return np.where(np.take_along_axis(everything, order, axis=1) == -np.inf, MISSING, items)
