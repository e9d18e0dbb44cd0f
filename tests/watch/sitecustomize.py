"""In every Python process below a test: only loopback, and other attempts are written down."""

import ipaddress
import os
import sys
from typing import Any


def _away(host: Any) -> bool:
    """The host is not this machine."""
    if host in (None, "", b"", "localhost"):
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if _away(host):
        with open(os.environ["WATCHED"], "a", encoding="utf-8") as file:
            command = " ".join(" ".join(sys.orig_argv[1:5]).split())[:80]
            file.write(f"{command} -> {host!r}\n")
        raise OSError(f"the network is blocked: {host!r}")


sys.addaudithook(_watch)
