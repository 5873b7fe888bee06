"""The web application of `anyo serve`: JSON at /recommend and /similar, and a page where one types titles.

Requests wait in one queue; what has come in while the model was busy is answered together, in one batch.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anyo_lightning.errors import InputError
from anyo_lightning.serving.recommender import Recommender

MOST_BYTES = 64 * 1024  # of a request's body
MOST_HISTORIES = 64  # of a request, and of a batch that is read together
MOST_ITEMS = 1000  # of a history: more than any run reads
MOST_WAITING = 512  # requests
LISTED_TITLES = 2000  # that the page offers while one types: the most frequent
POLICY = "default-src 'self'; img-src data:; frame-ancestors 'none'"
PAGES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}

Text = Annotated[str, Field(min_length=1, max_length=300)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MOST_ITEMS)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")
    k: int = Field(default=10, ge=1, le=100)


class ForHistories(_Asked):
    """Whose lists are asked for: one history by items (ids), titles or both, items first; or a user; or histories."""

    titles: Texts | None = None
    items: Texts | None = None
    user: Text | None = None
    histories: Annotated[list[Texts], Field(min_length=1, max_length=MOST_HISTORIES)] | None = None
    seen: Literal["auto", "hide", "show"] = "auto"


class ForItem(_Asked):
    """The item whose neighbours are asked for: its id or its title."""

    item: Text


@dataclass
class _Waiting:
    """A request, and the future of its answer."""

    asked: ForHistories | ForItem
    answer: asyncio.Future[dict[str, Any]]


class Answers:
    """Answers requests by all runs, what waits at the same time together.

    Args:
        recommenders: By the names under which their lists are shown.
    """

    def __init__(self, recommenders: Mapping[str, Recommender]) -> None:
        self.recommenders = recommenders
        self.waiting: asyncio.Queue[_Waiting] = asyncio.Queue(MOST_WAITING)

    async def ask(self, asked: ForHistories | ForItem) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            InputError: What is asked for is not there.
            HTTPException: 503 where too many requests wait.
        """
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        try:
            self.waiting.put_nowait(_Waiting(asked, future))
        except asyncio.QueueFull:
            raise HTTPException(503, "Too many requests are waiting: try again later") from None
        return await future

    async def work(self) -> None:
        """Answer what waits, without end."""
        while True:
            batch = [await self.waiting.get()]
            while not self.waiting.empty() and len(batch) < MOST_HISTORIES:
                batch.append(self.waiting.get_nowait())
            found: Sequence[dict[str, Any] | BaseException]
            try:
                found = await asyncio.to_thread(self.answers, [one.asked for one in batch])
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # polars has some that are no Exception: the next requests must be answered
                found = [RuntimeError(f"{type(error).__name__}: {error}")] * len(batch)
            for one, answer in zip(batch, found, strict=True):
                if one.answer.cancelled():  # the client has gone
                    continue
                if isinstance(answer, BaseException):
                    one.answer.set_exception(answer)
                else:
                    one.answer.set_result(answer)

    def answers(self, batch: Sequence[ForHistories | ForItem]) -> list[dict[str, Any] | BaseException]:
        """The answer to each request of a batch, or what went wrong with it."""
        runs: list[list[dict[str, Any]]] = [[] for _ in batch]
        failed: dict[int, BaseException] = {}

        def attempt(number: int, action: Callable[[], Any]) -> Any:
            try:
                return action()
            except Exception as error:  # of this request alone
                failed.setdefault(number, error)
                return None

        for name, recommender in self.recommenders.items():
            groups: dict[tuple[int, str], list[tuple[int, list[list[str]]]]] = {}
            for number, asked in enumerate(batch):
                if isinstance(asked, ForItem):
                    if found := attempt(number, partial(_similar, recommender, asked)):
                        runs[number].append({"run": name, **found})
                elif read := attempt(number, partial(_histories, recommender, asked)):
                    groups.setdefault((asked.k, asked.seen), []).append((number, read))
            for (k, seen), members in groups.items():
                together = [items for _, read in members for items in read]
                hides = None if seen == "auto" else seen == "hide"
                try:
                    lists = _lists(recommender.recommend(together, k, hide_seen=hides), len(together))
                except Exception as error:
                    failed |= {number: error for number, _ in members if number not in failed}
                    continue
                for number, read in members:
                    own, lists = lists[: len(read)], lists[len(read) :]
                    understood = [[_item(recommender, item) for item in items] for items in read]
                    runs[number].append({"run": name, "histories": understood, "lists": own})
        return [failed.get(number, {"runs": found}) for number, found in enumerate(runs)]


def make_app(recommenders: Mapping[str, Recommender], *, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The application.

    Args:
        recommenders: By the names under which their lists are shown; at least one.
        hosts: Names by which browsers may call it: a page elsewhere cannot, by a name of its own for this machine.
    """
    answers = Answers(recommenders)

    @asynccontextmanager
    async def working(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(answers.work())
        yield
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker

    app = FastAPI(title="anyo-lightning", lifespan=working, docs_url=None, redoc_url=None)
    app.add_middleware(_SmallBodies)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    titles = _frequent_titles(next(iter(recommenders.values())))

    @app.post("/recommend")
    async def recommend(asked: ForHistories) -> dict[str, Any]:
        """Each run's top lists; `histories` of the answer says what was understood."""
        return await answers.ask(asked)

    @app.post("/similar")
    async def similar(asked: ForItem) -> dict[str, Any]:
        """Each run's items whose vectors are most like the item's."""
        return await answers.ask(asked)

    @app.get("/titles")
    def frequent_titles() -> list[str]:
        """The most frequent titles of the first run."""
        return titles

    for path, (name, kind) in PAGES.items():
        content = files("anyo_lightning").joinpath(f"serving/{name}").read_text("utf-8")
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        page = Response(content, media_type=kind, headers=headers)
        app.get(path, include_in_schema=False)(_shows(page))

    @app.exception_handler(InputError)
    def refuse(_: Request, error: InputError) -> JSONResponse:
        return _refused(422, " ".join(str(error).split()))

    @app.exception_handler(RequestValidationError)
    def refuse_form(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        if first["type"] == "json_invalid":
            place = "the body"
        return _refused(422, f"Expected a request as /openapi.json says, got a mistake at {place}: {first['msg']}")

    @app.exception_handler(HTTPException)
    def refuse_request(_: Request, error: HTTPException) -> JSONResponse:
        return _refused(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    def fail(_: Request, error: Exception) -> JSONResponse:
        logging.getLogger("anyo_lightning.serving").error("A request failed", exc_info=error)
        return _refused(500, "Something went wrong; the server's log says what")

    return app


class _SmallBodies:
    """Refuses bodies of more than `MOST_BYTES`, whatever their headers say."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, last = b"", False
        while not last:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                return
            body += message.get("body", b"")
            last = not message.get("more_body", False)
            if len(body) > MOST_BYTES:
                await _refused(413, f"Expected at most {MOST_BYTES:,} bytes, got more")(scope, receive, send)
                return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)


def _shows(page: Response) -> Callable[[], Response]:
    def show() -> Response:
        return page

    return show


def _refused(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status)


def _histories(recommender: Recommender, asked: ForHistories) -> list[list[str]]:
    """The item ids of the histories that a request asks for."""
    one = asked.titles is not None or asked.items is not None
    given = {"titles or items": one, "user": asked.user is not None, "histories": asked.histories is not None}
    named = [name for name, there in given.items() if there]
    if len(named) != 1:
        raise InputError(f"Expected one of {', '.join(given)}, got {' and '.join(named) or 'none'}")
    if asked.user is not None:
        return [recommender.history(asked.user)]
    histories = asked.histories or [asked.items or []]
    for number, items in enumerate(histories):
        if items:
            recommender.numbers(items, f"history {number}")
    return histories if asked.histories else [[*histories[0], *map(recommender.find, asked.titles or [])]]


def _similar(recommender: Recommender, asked: ForItem) -> dict[str, Any]:
    """The neighbours of an item, by its id, or else by its title."""
    item = asked.item if asked.item in recommender.place_of_item else recommender.find(asked.item)
    return {"item": _item(recommender, item), "list": _lists(recommender.similar([item], asked.k), 1)[0]}


def _item(recommender: Recommender, item: str) -> dict[str, str]:
    return {"item_id": item, "title": recommender.titles[recommender.place_of_item[item]]}


def _lists(table: pl.DataFrame, histories: int) -> list[list[dict[str, Any]]]:
    """The lines of a table, by history."""
    lists: list[list[dict[str, Any]]] = [[] for _ in range(histories)]
    for line in table.iter_rows(named=True):
        lists[line.pop("history")].append(line)
    return lists


def _frequent_titles(recommender: Recommender) -> list[str]:
    counts = recommender.data.split.training_counts()
    shown = np.argsort(-counts, kind="stable")[:LISTED_TITLES]
    return sorted({recommender.titles[item] for item in shown})
