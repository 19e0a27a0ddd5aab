"""The studio's server: who may come in, at which address, and nothing that is fetched from elsewhere."""

from __future__ import annotations

import base64
import contextlib
import hmac
import importlib.util
import ipaddress
import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from reltune.errors import InputError
from reltune.studio.places import Place
from reltune.studio.words import LANGUAGES

POLICY = (  # whatever a page asks for from another address is refused by the browser
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; worker-src 'self' blob:; frame-ancestors 'self'"
)
REPORT_POLICY = "sandbox allow-scripts allow-popups; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def check(runs_dir: str, host: str, password: str | None, language: str, models: Sequence[str] = ()) -> Place:
    """The directory of runs. Raises InputError for what the studio cannot be started with; takes nothing heavy."""
    if language not in LANGUAGES:
        raise InputError(f"--language {language!r} is unknown; write {' or '.join(LANGUAGES)}.")
    if password is not None and not password.strip():
        raise InputError("--password is empty; give one, or leave it out.")
    if not is_local(host) and password is None:
        raise InputError(f"--host {host} lets other computers in; give a --password too, or leave --host out.")
    for name in models:
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"--model {name} is no model's directory (no config.json); check the path.")
    place = Place(runs_dir)
    check_gradio()
    return place


def check_gradio() -> None:
    """Raise InputError where Gradio is missing. It is looked for and not imported, which takes seconds."""
    try:
        there = importlib.util.find_spec("gradio") is not None
    except ValueError:
        there = False
    if not there:
        raise InputError('the studio needs gradio, which is not installed; run: pip install "reltune[studio]"')


def is_local(host: str) -> bool:
    """Whether an address can be reached from this computer alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises InputError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        held = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(
            f"--host {host} is no address of this computer ({error.strerror}); write one such as 0.0.0.0."
        ) from error
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind(address)
        held.listen(128)
    except OSError as error:
        held.close()
        raise InputError(
            f"port {port} on {host} cannot be used ({str(error.strerror).lower()}); give another one with --port, such as {port + 1}."
        ) from error
    return held


class Doorkeeper:
    """ASGI middleware: the password, requests of other pages, and what pages may load.

    A page of another site could send requests to 127.0.0.1 by its own address, or by a name that it has made to mean it; both bear
    another Host or Origin.
    """

    def __init__(self, app: Any, password: str | None, local: bool) -> None:
        self.app, self.password, self.local = app, password, local

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if code := self.refusal(headers):
            await _refuse(scope, send, code)
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = REPORT_POLICY if scope["path"].startswith("/report/") else POLICY
                more = [
                    (b"content-security-policy", own.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        await self.app(scope, receive, guarded)

    def refusal(self, headers: dict[str, str]) -> int | None:
        """The HTTP status that a request is refused with; None where it may pass."""
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if self.local and not is_local(name):
            return 403
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != host:
            return 403
        if self.password is None:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        try:
            password = base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
        except ValueError:
            return 401
        return (
            None if kind.lower() == "basic" and hmac.compare_digest(password.encode(), self.password.encode()) else 401
        )


async def _refuse(scope: Any, send: Any, code: int) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    text = b"Give the studio's password; any name will do." if code == 401 else b"This request comes from another page."
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    if code == 401:
        headers.append((b"www-authenticate", b'Basic realm="reltune studio", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def make_app(
    place: Place, language: str, models: Sequence[str] = (), password: str | None = None, local: bool = True
) -> Any:
    """The application: a page for each language, and the reports of the runs. Needs Gradio."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio
    from fastapi import FastAPI
    from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse, Response

    from reltune.studio.page import Page, head, theme

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/")
    def first() -> Any:
        return RedirectResponse(f"/{language}/")

    @app.get("/favicon.ico")
    def icon() -> Any:
        return Response(status_code=204)

    @app.get("/report/{name:path}")
    def report(name: str) -> Any:
        try:
            run = place.inside(name)
            file = place.inside(f"{name}/report.html")
        except InputError:
            return PlainTextResponse("There is no such run.", status_code=404)
        if not run.is_dir() or not file.is_file():
            return PlainTextResponse("This run has no report yet.", status_code=404)
        return FileResponse(file, media_type="text/html")

    page = Page(place, models)
    for name in LANGUAGES:
        app = gradio.mount_gradio_app(
            app,
            page.build(name),
            path=f"/{name}",
            footer_links=[],
            ssr_mode=False,
            theme=theme(),
            head=head(name),
            enable_monitoring=False,
            run_history=False,
            allowed_paths=[],
        )
    app.add_middleware(Doorkeeper, password=password, local=local)
    return app


def serve(
    place: Place, host: str, port: int, password: str | None, language: str, models: Sequence[str], say: Any
) -> None:
    """Listen until the process is interrupted. ``say`` prints a line."""
    held = bound(host, port)
    uploads = tempfile.mkdtemp(prefix="reltune-studio-")
    os.environ["GRADIO_TEMP_DIR"] = uploads
    try:
        app = make_app(place, language, models, password, is_local(host))
        import uvicorn

        shown = f"[{host}]" if ":" in host else host
        say(f"Studio of {place.path}: http://{shown}:{held.getsockname()[1]}/ (Ctrl-C ends it; jobs go on)")
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
        with contextlib.suppress(KeyboardInterrupt):  # which is how it is ended
            uvicorn.Server(config).run(sockets=[held])
    finally:
        held.close()
        shutil.rmtree(uploads, ignore_errors=True)
