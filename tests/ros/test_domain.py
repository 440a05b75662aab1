"""Domains are taken only where nobody speaks."""

from __future__ import annotations

import socket

import pytest

from ros_nodes import domain


def test_a_domain_in_use_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = domain.free_domain()
    monkeypatch.setattr(domain, "DOMAINS", range(wanted, wanted + 1))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as participant:
        participant.bind(("", domain.PORT_BASE + domain.DOMAIN_GAIN * wanted + domain.UNICAST_OFFSET))
        with pytest.raises(OSError, match="in use"):
            domain.free_domain()
    assert domain.free_domain() == wanted
