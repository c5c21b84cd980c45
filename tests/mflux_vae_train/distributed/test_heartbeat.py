"""Addresses of the main process are found without a long wait for names that nobody knows."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from mflux_vae_train.distributed import heartbeat


def test_nobody_waits_for_an_unknown_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    forever, asked = threading.Event(), []

    def look_up(name: str) -> Any:
        if name.startswith("mac"):
            asked.append(name)
            forever.wait(60)
            raise OSError("unknown")
        return name, [], [name]

    monkeypatch.setattr(socket, "gethostname", lambda: "mac")
    monkeypatch.setattr(socket, "gethostbyname_ex", look_up)
    monkeypatch.setattr(heartbeat, "_RESOLVE_TIMEOUT", 0.05)
    addresses = heartbeat._own_addresses()
    assert addresses[-3:] == ["mac", "mac.local", "127.0.0.1"]

    server = socket.create_server(("127.0.0.1", 0))
    offer = {"addresses": addresses, "port": server.getsockname()[1], "token": "secret"}

    def accept() -> None:
        with server.accept()[0] as connection:
            connection.recv(100)
            connection.sendall(b"welcome\n")

    main = threading.Thread(target=accept)
    main.start()
    connection = heartbeat._connect_to_main(offer, 1)
    main.join()
    forever.set()
    assert connection is not None and asked == ["mac", "mac", "mac.local"]
    connection.close()
    server.close()
