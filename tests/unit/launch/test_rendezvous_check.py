"""What every rank checks of its launcher's variables."""

from __future__ import annotations

import socket

import pytest

from bert_fast.errors import UserError
from bert_fast.launch.rendezvous_check import RENDEZVOUS_ADDRESSES, addresses_of, check_rendezvous_address


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    def getaddrinfo(*_: object, **__: object) -> list[tuple[object, ...]]:
        if not addresses:
            raise socket.gaierror(-2, "Name or service not known")
        return [(2, 1, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    monkeypatch.setenv(RENDEZVOUS_ADDRESSES, "10.0.0.1,fe80::1")


@pytest.mark.usefixtures("head")
def test_the_same_machine_by_one_address_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "192.168.0.1", "10.0.0.1")
    check_rendezvous_address()


@pytest.mark.usefixtures("head")
def test_another_machine_is_refused_with_both_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, "127.0.1.1")
    with pytest.raises(UserError, match=r"resolves MASTER_ADDR=node-1 to 127.0.1.1 and the first node to 10.0.0.1"):
        check_rendezvous_address()


@pytest.mark.usefixtures("head")
def test_a_name_that_is_unknown_here(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch)
    with pytest.raises(UserError, match="cannot resolve MASTER_ADDR=node-1 .*export it as an address: 10.0.0.1"):
        check_rendezvous_address()


def test_an_address_is_itself_and_nothing_is_asked_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch)
    assert addresses_of("10.1.2.3") == ["10.1.2.3"]
    monkeypatch.delenv(RENDEZVOUS_ADDRESSES, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "nowhere")
    check_rendezvous_address()
