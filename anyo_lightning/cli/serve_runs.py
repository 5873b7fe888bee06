"""`anyo serve`: runs behind a port of this machine."""

import socket
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from anyo_lightning.errors import InputError

LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")


def serve_runs(
    run: list[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    items: Path | None = None,
    device: str | None = None,
    index: str = "Flat",
) -> None:
    """Answer `POST /recommend` and `POST /similar`, and show a page where one types titles.

    Args:
        run: Run folders; each is a column of the page.
        host: Address or name to listen on, and to be called by; only this machine can reach the default. 0.0.0.0
            listens on all addresses and answers to any name.
        port: Port to listen on; 0 takes a free one.
        items: File with items that the runs have not seen, as in `anyo recommend`.
        device: Of the models, such as `cpu` or `cuda:0`; by default the first GPU if there is one.
        index: FAISS factory string; `Flat` is exact.

    Raises:
        InputError: FastAPI is not installed, the port is in use, or a run cannot be restored.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise InputError('Expected fastapi and uvicorn to serve, got none: pip install ".[serve]" in the clone')
    import uvicorn

    from anyo_lightning.serving.given_files import read_items
    from anyo_lightning.serving.recommender import Recommender
    from anyo_lightning.serving.web import make_app

    hosts = hosts_for(host)
    if "*" in hosts:
        print(
            "Listening on all addresses under any name: a web page elsewhere can reach this server through a visitor's "
            "browser (DNS rebinding). Give one address or name in --host to prevent that",
            file=sys.stderr,
        )
    new = None if items is None else read_items(items)
    with closing(_listening(host, port)) as listener:  # before the models, which take their time
        recommenders = {}
        for folder, name in zip(run, _names(run), strict=True):
            recommenders[name] = Recommender.load(folder, device=device, index=index)
            if new is not None:
                recommenders[name].add_items(new)
        app = make_app(recommenders, hosts=hosts)
        shown = f"[{host}]" if ":" in host else host
        listener.listen()  # whoever reads the next line may connect at once, and waits for the server's start
        print(f"Serving {', '.join(recommenders)} at http://{shown}:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=30, server_header=False)
        uvicorn.Server(config).run(sockets=[listener])


def hosts_for(host: str) -> tuple[str, ...]:
    """The names under which a browser may call a server: its own, this machine's, or any for all addresses.

    A page elsewhere could otherwise reach it by a name of its own that it lets stand for this address.

    Args:
        host: What it listens on.
    """
    if host in ("", "0.0.0.0", "::"):
        return ("*",)
    return LOCAL if host in LOCAL else (*LOCAL, f"[{host}]" if ":" in host else host)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that nobody else takes the port.

    Raises:
        InputError: The port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"Expected --host and --port that are free, got {host}:{port}: {error}") from None
    return listener


def _names(runs: list[Path]) -> list[str]:
    """Short names of run folders: their last parts, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"Expected each --run once, got {', '.join(map(str, runs))}")
