"""Whether the hub is there is asked once and quickly; a proxy counts as the way to it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from policies.pretrained.load import load_config
from registry import UsageError
from registry.hub import hub_unreachable


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    hub_unreachable.cache_clear()
    yield
    hub_unreachable.cache_clear()


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def silent() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def test_a_hub_that_listens_is_reachable(monkeypatch: pytest.MonkeyPatch, listening: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", listening)
    assert not hub_unreachable()


def test_a_proxy_that_listens_is_the_way_there(monkeypatch: pytest.MonkeyPatch, listening: str, silent: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", silent)
    monkeypatch.setenv("http_proxy", listening)
    monkeypatch.setenv("no_proxy", "elsewhere.example")
    assert not hub_unreachable()


def test_without_it_a_model_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", silent)
    assert hub_unreachable()
    with pytest.raises(UsageError, match="while the hub is reachable"):
        load_config("owner/no-such-model")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_ENDPOINT", "http://hub.local:abc"),
        ("HF_ENDPOINT", "http://a:99999999"),
        ("HF_ENDPOINT", "http://é..x/"),
        ("https_proxy", "::::"),
        ("https_proxy", "http://[::1"),
    ],
)
def test_an_address_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="malformed") as caught:
        hub_unreachable()
    assert repr(value) in str(caught.value)


def test_an_empty_address_is_the_usual_one(monkeypatch: pytest.MonkeyPatch, listening: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "")
    monkeypatch.setenv("https_proxy", listening)
    monkeypatch.delenv("no_proxy", raising=False)
    assert not hub_unreachable()
