"""Settings of gunicorn for the worker classes `sync`, `gthread` and `gevent`."""

from typing import Any


def post_worker_init(_: Any) -> None:
    # Import here: gevent replaces threads and sockets first.
    import telemetry

    telemetry.set_up()
