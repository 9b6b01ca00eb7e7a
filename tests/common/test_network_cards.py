"""Lanes are offered on the card of the node's own address, and on no other."""

import socket
import subprocess
import sys

import psutil
import pytest
from flume_common.network_cards import ALL, choose, devices_of

CARDS = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["192.0.2.2", "fd00::2", "fe80::fc%eth0"],
    "eth1": ["198.51.100.7"],
    "down0": [],
}


@pytest.mark.parametrize(
    "wanted, card",
    [
        (["127.0.0.1"], "lo"),
        (["127.0.0.2"], "lo"),
        (["::1"], "lo"),
        (["192.0.2.2"], "eth0"),
        (["fd00::2"], "eth0"),
        (["fe80::fc"], "eth0"),
        (["198.51.100.7"], "eth1"),
        (["192.0.2.2", "198.51.100.7"], "eth0,eth1"),
        (["0.0.0.0"], ALL),
        (["::"], ALL),
    ],
)
def test_the_card_that_has_the_address_is_chosen(wanted, card):
    assert choose(wanted, CARDS) == card


def test_an_address_that_is_nobodys_here_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no network card of this machine has the address 203\.0\.113\.9"):
        choose(["203.0.113.9"], CARDS)
    with pytest.raises(ValueError, match=r"'300.1.1.1' is no address"):
        devices_of("300.1.1.1")


def test_hosts_by_name_and_wildcards_are_understood():
    assert devices_of("localhost") == devices_of("127.0.0.1") == devices_of("[::1]")
    assert devices_of("") == devices_of("0.0.0.0") == ALL


LISTENS = """
import psutil, sys
from flume_common.lanes import Port
with Port(host=sys.argv[1]) as port:
    port.berth(1)
    print(*(item.laddr.ip for item in psutil.Process().net_connections("tcp") if item.status == "LISTEN"))
"""


def listens(host):
    """Addresses at which a process with such a port listens."""
    words = [sys.executable, "-c", LISTENS, host]
    return set(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())


def test_a_port_of_a_loopback_address_listens_nowhere_else():
    assert listens("127.0.0.1") == {"127.0.0.1"}


def test_a_port_of_another_card_listens_there():
    others = [
        item.address
        for card, items in psutil.net_if_addrs().items()
        for item in items
        if item.family == socket.AF_INET and card != "lo" and psutil.net_if_stats()[card].isup
    ]
    if not others:
        pytest.skip("this machine has no card but the loopback")
    assert listens(others[0]) == {others[0]}
