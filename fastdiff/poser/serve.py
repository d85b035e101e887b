"""A local page where one types a request and watches its steps come: starlette, one static file, no script of others.

POST /runs with JSON {"request": …, "seed": …} answers line by line (NDJSON): "waiting" where another request is being
carried out, then the run's begin, steps, each with its picture as a data URL, and end; "error" where it broke.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec

from fastdiff.poser.ledger import Line
from fastdiff.poser.poser import Episode, Poser
from fastdiff.poser.records import Step
from fastdiff.poser.remote import png
from fastdiff.poser.run import Choose, run

PAGE = Path(__file__).with_name("serve.html")
LARGEST = 1 << 14  # bytes of a request
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    """What the page sends."""

    request: Annotated[str, msgspec.Meta(max_length=2000)]
    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)] = 0


class Refused(Exception):
    """A request that is not served: its HTTP status, and why in words."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def application(poser: Poser, choose: Choose, host: str = LOOPBACK[0]) -> Any:
    """The page as an ASGI application.

    One request is carried out at a time, the others wait; a client that goes away ends its own after the step that is
    being made. host: at which it is served: on the loopback, requests to other names are refused, so that no site
    whose name somebody points there reads it. Raises ImportError with the command that helps.
    """
    try:
        import anyio
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
        from starlette.routing import Route
    except ImportError as error:
        raise ImportError('the page needs starlette and uvicorn: pip install "fastdiff-torch[poser,serve]"') from error
    text = PAGE.read_text(encoding="utf-8")
    hashes = {tag: _hash_of(tag, text) for tag in ("script", "style")}
    policy = f"default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
frame-ancestors 'none'; script-src '{hashes['script']}'; style-src '{hashes['style']}'"
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    turn = asyncio.Lock()  # anyio's is let go of by its own task alone, and a stream may be closed by another

    async def page(request: Request) -> Response:
        check_sender(request.headers, host)
        return HTMLResponse(text, headers=headers)

    async def about(request: Request) -> Response:
        check_sender(request.headers, host)
        experts = [{"name": e.spec.name, "kind": e.spec.kind, "price": e.spec.price} for e in poser.experts]
        budget = msgspec.to_builtins(poser.ledger.budget)
        return JSONResponse({"experts": experts, "budget": budget, "cost": poser.ledger.cost}, headers=headers)

    async def runs(request: Request) -> Response:
        check_sender(request.headers, host)
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refused(415, "the request must be application/json")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LARGEST:
                raise Refused(413, f"the request must be at most {LARGEST} bytes")
        try:
            asked = msgspec.json.decode(body, type=Asked)
            poser.domain.split(asked.request)  # an empty one is refused
        except (ValueError, UnicodeDecodeError) as error:  # msgspec's errors are ValueErrors
            raise Refused(400, str(error)) from None
        return StreamingResponse(lines(asked), media_type="application/x-ndjson", headers=headers)

    async def lines(asked: Asked) -> AsyncIterator[bytes]:
        if turn.locked():
            yield b'{"kind":"waiting"}\n'
        async with turn:
            steps: Iterator[bytes] = _shown(poser, choose, asked)
            # A step is finished even where the client has gone: it may have been paid for.
            while line := await anyio.to_thread.run_sync(partial(next, steps, b"")):
                yield line

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return JSONResponse({"error": str(error)}, status_code=error.status, headers=headers)

    routes = [Route("/", page), Route("/about", about), Route("/runs", runs, methods=["POST"])]
    return Starlette(routes=routes, exception_handlers={Refused: refused})


def check_sender(headers: Any, host: str) -> None:
    """Raises Refused for a request to another name than the server's, and for one that another site's page makes."""
    origin = headers.get("origin")
    try:
        named, sender = urlsplit(f"//{headers.get('host', '')}"), urlsplit(origin or "")
    except ValueError as error:
        raise Refused(400, f"the host or the origin is none: {error}") from None
    if host in LOOPBACK and named.hostname not in LOOPBACK:
        raise Refused(403, f"the host must be one of {', '.join(LOOPBACK)}; got {named.hostname}")
    if origin is not None and sender.netloc != named.netloc:
        raise Refused(403, f"a page of {origin} must not send requests here")


def _shown(poser: Poser, choose: Choose, asked: Asked) -> Iterator[bytes]:
    """A run's lines as JSON, each with what was spent so far, a step's with its picture."""
    try:
        episode = poser.begin(asked.request, asked.seed)
        for line in run(poser, choose, episode):
            yield _line(poser, line, episode)
    except Exception as error:  # whatever a foreign expert raises: the page says what it was
        yield msgspec.json.encode({"kind": "error", "error": f"{type(error).__name__}: {error}"}) + b"\n"


def _line(poser: Poser, line: Line, episode: Episode) -> bytes:
    told = msgspec.to_builtins(line)
    told["spent"] = poser.ledger.cost
    if isinstance(line, Step) and episode.picture is not None:
        told["picture"] = f"data:image/png;base64,{base64.b64encode(png(episode.picture.pixels)).decode()}"
    return msgspec.json.encode(told) + b"\n"


def _hash_of(tag: str, text: str) -> str:
    """Of a page's one script or style, as a Content-Security-Policy names it."""
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    assert found is not None
    return f"sha256-{base64.b64encode(hashlib.sha256(found.group(1).encode()).digest()).decode()}"


def serve(
    poser: Poser, choose: Choose, host: str = LOOPBACK[0], port: int = 8000,
    told: Callable[[str], object] = lambda url: None,
) -> None:  # fmt: skip
    """Serve the page until SIGINT or SIGTERM. port: 0 takes a free one. told: is given the address.

    Raises ImportError with the command that helps, OSError for an address or a port that cannot be had.
    """
    app = application(poser, choose, host)
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError('the page needs starlette and uvicorn: pip install "fastdiff-torch[poser,serve]"') from error
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"port {port} of {host} cannot be served at: {error}") from None
    with listening:
        told(f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[listening])
