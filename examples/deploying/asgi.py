"""A service for uvicorn, and for gunicorn with `UvicornWorker`: `GET /?question=...`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import telemetry
from answers import async_first_line
from fastapi import FastAPI


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    telemetry.set_up()
    yield
    telemetry.shut_down()


app = FastAPI(lifespan=lifespan)


@app.get("/")
async def answer(question: str) -> str:
    return await async_first_line(question)
