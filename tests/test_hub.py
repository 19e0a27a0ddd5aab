"""What is said of a model's name before anything is loaded, against a Hub on this machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from reltune.hub import dataset_problem, model_problem

ANSWERS: dict[str, tuple[int, dict[str, str]]] = {
    "there": (200, {"ETag": '"0"', "X-Repo-Commit": "0" * 40}),
    "absent": (404, {"X-Error-Code": "RepoNotFound"}),
    "gated": (403, {"X-Error-Code": "GatedRepo"}),
    "files": (404, {"X-Error-Code": "EntryNotFound"}),
    "ill": (503, {}),
}


class Hub(BaseHTTPRequestHandler):
    asked: list[str]

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        code, headers = ANSWERS[self.path.removeprefix("/datasets").split("/")[1]]
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    Hub.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _use(monkeypatch, tmp_path, server.server_port)
    yield server
    server.shutdown()
    server.server_close()


def _use(monkeypatch: pytest.MonkeyPatch, cache: Path, port: int, offline: bool = False) -> None:
    constants, hub = "huggingface_hub.constants", f"http://127.0.0.1:{port}"
    monkeypatch.setattr(f"{constants}.ENDPOINT", hub)
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", hub + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", offline)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *[("absent", "no model of the Hugging Face Hub"), ("gated", "your login"), ("files", "no model")],
        *[("there", None), ("ill", None)],
    ],
)
def test_the_hub_is_asked_once(hub: HTTPServer, name: str, said: str | None) -> None:
    """A model that it has, or says nothing of, is left to what loads it."""
    problem = model_problem(name)
    assert (problem is None) if said is None else (problem is not None and said in problem)
    assert Hub.asked == [f"/{name}/resolve/main/config.json"]


@pytest.mark.parametrize(("name", "said"), [("absent", "no data set of the"), ("files", None), ("there", None)])
def test_data_sets_are_asked_for_too(hub: HTTPServer, tmp_path: Path, name: str, said: str | None) -> None:
    """One without a README may be loaded."""
    problem = dataset_problem(name)
    assert (problem is None) if said is None else (problem is not None and said in problem)
    assert Hub.asked == [f"/datasets/{name}/resolve/main/README.md"]
    (tmp_path / "datasets--absent" / "snapshots").mkdir(parents=True)
    assert dataset_problem("absent") is None and len(Hub.asked) == 1


def test_what_is_here_already_is_not_asked_for(
    hub: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model_problem(str(tmp_path)) is None
    kept = tmp_path / "models--absent" / "snapshots" / "0"
    kept.mkdir(parents=True)
    (kept / "config.json").write_text("{}")
    (tmp_path / "models--absent" / "refs").mkdir()
    (tmp_path / "models--absent" / "refs" / "main").write_text("0")
    assert model_problem("absent") is None
    _use(monkeypatch, tmp_path, hub.server_port, offline=True)
    assert model_problem("absent") is None
    assert Hub.asked == []


def test_without_a_network_and_offline_it_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _use(monkeypatch, tmp_path, port)
    assert "cannot be reached; check the path or id, and the network" in (model_problem("there") or "")
    _use(monkeypatch, tmp_path, port, offline=True)
    assert "HF_HUB_OFFLINE is set" in (model_problem("there") or "")
