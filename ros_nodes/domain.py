"""A ROS domain of one's own, so that a demo, a test and a robot on one machine never hear each other."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Collection

PORT_BASE, DOMAIN_GAIN, UNICAST_OFFSET = 7400, 250, 10
"""UDP ports of DDS discovery: 7400 + 250 domain + 10 for the first participant (OMG DDSI-RTPS 2.2, 9.6.1.1)."""
DOMAINS = range(1, 101)
"""Domains whose ports stay below Linux' ephemeral range, without 0, the default that robots use."""


def free_domain(besides: Collection[int] = ()) -> int:
    """A domain, none of `besides`, whose first discovery port is free on this machine. Raises OSError when none is left."""
    candidates = [domain for domain in DOMAINS if domain not in besides]
    random.Random(os.getpid()).shuffle(candidates)
    for domain in candidates:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("", PORT_BASE + DOMAIN_GAIN * domain + UNICAST_OFFSET))
            except OSError:
                continue
            return domain
    raise OSError("every ROS domain from 1 to 100 is in use on this machine; end some nodes")
