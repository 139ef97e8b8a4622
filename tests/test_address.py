"""address.py"""

from minir1.address import is_loopback, own_names


def test_who_reaches_an_address():
    hosts = ("127.0.0.1", "127.9.0.1", "::1", "localhost", "0.0.0.0", "::", "192.168.1.2", "example.org")
    assert [is_loopback(host) for host in hosts] == [True] * 4 + [False] * 4


def test_its_names():
    assert own_names("127.0.0.1")[:3] == ["localhost", "127.0.0.1", "[::1]"]
    assert own_names("127.0.0.2")[3] == "127.0.0.2" and own_names("0:0:0:0:0:0:0:1")[3] == "[0:0:0:0:0:0:0:1]"
