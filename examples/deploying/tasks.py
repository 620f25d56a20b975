"""Tasks for a Celery worker with the prefork pool."""

from typing import Any

import telemetry
from answers import first_line
from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown

app = Celery("tasks")
app.config_from_object("celeryconfig")


@worker_process_init.connect
def set_up(**_: Any) -> None:
    telemetry.set_up()


@worker_process_shutdown.connect
def shut_down(**_: Any) -> None:
    telemetry.shut_down()


@app.task
def answer(question: str) -> str:
    return first_line(question)
