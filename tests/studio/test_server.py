"""Who may come in, and what the studio is not started with."""

from __future__ import annotations

import asyncio
import base64
import socket
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from command_line import assert_refused, reltune
from reltune.errors import InputError
from reltune.studio.server import Doorkeeper, bound, check, is_local


@pytest.fixture
def there() -> Any:
    """As if Gradio were installed: these refusals come before it is imported."""
    with mock.patch("reltune.studio.server.check_gradio"):
        yield


@pytest.mark.parametrize(
    "words, named",
    [
        (["absent"], "absent does not exist"),
        (["file"], "is a file"),
        (["run"], "is a run itself"),
        ([".", "--host", "0.0.0.0"], "--password"),
        ([".", "--host", "example.org"], "--password"),
        ([".", "--password", " "], "--password is empty"),
        ([".", "--language", "de"], "en or zh"),
        ([".", "--model", "absent"], "--model absent"),
        ([".", "--port", "70000"], "65535"),
        (["."], 'pip install "reltune[studio]"'),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], named: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "run" / "relevance").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    with mock.patch.dict(sys.modules, {"gradio": None}):
        assert_refused(reltune("studio", *words), named)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_a_port_in_use_is_named_with_the_mend(tmp_path: Path, there: None) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert_refused(reltune("studio", tmp_path, "--port", port), f"port {port} on 127.0.0.1", "--port")
    with pytest.raises(InputError, match="no address"):
        bound("no.such.host.invalid", 0)


def test_another_address_needs_a_password_and_then_may_be_listened_on(tmp_path: Path, there: None) -> None:
    assert check(str(tmp_path), "0.0.0.0", "secret", "zh").path == tmp_path
    assert [
        is_local(host) for host in ("127.0.0.1", "::1", "localhost", "127.8.0.1", "0.0.0.0", "10.0.0.1", "a.b", "")
    ] == [
        *[True] * 4,
        *[False] * 4,
    ]


def status(keeper: Doorkeeper, path: str = "/", **headers: str) -> tuple[int, dict[str, str]]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    given = {"host": "127.0.0.1:7860", **headers}
    scope = {"type": "http", "path": path, "headers": [(k.encode(), v.encode()) for k, v in given.items()]}
    asyncio.run(keeper(scope, None, send))
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


async def inner(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def basic(text: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(text.encode()).decode()}


def test_the_password_is_asked_for_and_compared() -> None:
    keeper = Doorkeeper(inner, "pass:wörd", local=False)
    code, headers = status(keeper)
    assert code == 401 and headers["www-authenticate"].startswith("Basic")
    for wrong in ("", "x:pass", "x:pass:word", "pass:wörd"):
        assert status(keeper, **basic(wrong))[0] == 401
    for odd in ("Basic %%%", "Bearer x", "Basic", "Basic /w=="):
        assert status(keeper, authorization=odd)[0] == 401
    assert status(keeper, **basic("anybody:pass:wörd"))[0] == 200
    assert status(Doorkeeper(inner, None, local=True))[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9"},
    ],
)
def test_requests_of_other_pages_are_refused(headers: dict[str, str]) -> None:
    keeper = Doorkeeper(inner, None, local=True)
    assert status(keeper, **headers)[0] == 403
    for good in (
        {},
        {"origin": "http://127.0.0.1:7860"},
        {"host": "localhost:1", "origin": "http://localhost:1"},
        {"host": "[::1]:7860"},
    ):
        assert status(keeper, **good)[0] == 200


def test_pages_may_load_nothing_from_elsewhere_and_reports_reach_nothing() -> None:
    keeper = Doorkeeper(inner, None, local=True)
    assert status(keeper, "/en/")[1]["content-security-policy"].startswith("default-src 'self'")
    report = status(keeper, "/report/x")[1]["content-security-policy"]
    assert "sandbox" in report and "allow-same-origin" not in report and "default-src 'none'" in report
