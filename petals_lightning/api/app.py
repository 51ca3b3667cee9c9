"""The HTTP server: who may use it, its routes, and errors in one form."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from petals_lightning.api.completions import CallerLeft, routes
from petals_lightning.api.errors import ApiError, wrong_field
from petals_lightning.api.generation import GenerationThreads, ServedModel
from petals_lightning.api.runs import read_run
from petals_lightning.api.swarm_watch import SwarmWatch
from petals_lightning.errors import ConfigurationError, PetalsLightningError

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(path: Path) -> list[str]:
    """The keys in a file, one a line.

    Raises:
        ConfigurationError: it cannot be read, or has no key.
    """
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigurationError(f"the API's keys cannot be read from {str(path)!r}: {e}") from e
    if not keys:
        raise ConfigurationError(f"{str(path)!r} has no key: write one a line, e.g. by `openssl rand -hex 24`")
    return keys


def create_app(
    watch: SwarmWatch,
    *,
    models: Mapping[str, ServedModel] | None = None,
    threads: GenerationThreads | None = None,
    keys: list[str] | None = None,
    is_local: bool = True,
    run: Path | None = None,
) -> FastAPI:
    """The application.

    Args:
        watch: of the swarm that the page shows.
        models: by the names by which requests choose them, the base model first; None: the page alone.
        threads: run their generations, and are closed with the application.
        keys: callers need one of them; None: nobody needs one.
        is_local: answer only requests that name this machine, so that no website can reach it through a browser whose
            name servers it controls.
        run: folder of a training run, or of several, whose newest is shown.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        closing = asyncio.create_task(threads.close_unused()) if threads is not None else None
        yield
        if threads is not None and closing is not None:
            closing.cancel()
            with suppress(asyncio.CancelledError):
                await closing
            await asyncio.to_thread(threads.close)

    async def check(request: Request) -> None:
        host = re.sub(r":\d+$", "", request.headers.get("host", "")).strip("[]")
        if is_local and host not in _LOCAL_NAMES:
            raise ApiError(403, f"this server is for its own machine: call it as 127.0.0.1, not as {host!r}")

    async def check_key(request: Request) -> None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        known = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys or ()]
        if keys is not None and (kind.lower() != "bearer" or not any(known)):
            raise ApiError(
                401, "a key is needed: the header Authorization: Bearer KEY, with one that this server knows",
                kind="authentication_error", code="invalid_api_key",
            )  # fmt: skip

    app = FastAPI(
        title="petals-lightning", lifespan=lifespan, dependencies=[Depends(check)], docs_url=None, redoc_url=None,
        openapi_url=None,
    )  # fmt: skip
    if models and threads is not None:
        app.include_router(routes(models, threads), dependencies=[Depends(check_key)])
    page, policy = _page()

    @app.get("/")
    async def show_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    @app.get("/api/swarm", dependencies=[Depends(check_key)])
    def show_swarm() -> Any:
        return watch.look()

    @app.get("/api/run", dependencies=[Depends(check_key)])
    def show_run() -> Any:
        return read_run(run)

    @app.get("/api/about", dependencies=[Depends(check_key)])
    async def show_about() -> Any:
        return {"models": list(models or ()), "has_run": run is not None}

    def answer(error: ApiError) -> Response:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(ApiError)
    async def on_refusal(request: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def on_wrong_field(request: Request, error: RequestValidationError) -> Response:
        return answer(wrong_field(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_wrong_route(request: Request, error: HTTPException) -> Response:
        return answer(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(CallerLeft)
    async def on_leaving(request: Request, error: CallerLeft) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(PetalsLightningError)
    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        return answer(ApiError.of(error))

    return app


def _page() -> tuple[str, str]:
    """The page, and a policy by which a browser runs the page's own script only."""
    page = (files("petals_lightning.api") / "page.html").read_text(encoding="utf-8")
    hashes = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
            for part in re.findall(rf"<{kind}>(.*?)</{kind}>", page, flags=re.DOTALL)
        )
        for kind in ("script", "style")
    }
    return page, (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
