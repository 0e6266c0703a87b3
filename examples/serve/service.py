#!/usr/bin/env python3
"""The exported digits model behind HTTP: a page that draws, and `POST /sample` for programs.

pip install "graftc[serve]"
python examples/serve/service.py out/export/model.onnx --port 8000
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

sys.path.insert(0, str(Path(__file__).parent))
from sample import load, sample

PAGE = Path(__file__).with_name("page.html")
LIMITS = {"label": (0, 9), "count": (1, 8), "steps": (1, 100), "seed": (0, 2**31 - 1)}


class Wrong(ValueError):
    """What was asked for is no request of this service."""


def read(asked: Any) -> dict[str, int]:
    """A checked request: whole numbers within their limits."""
    if not isinstance(asked, dict):
        raise Wrong("send a JSON object with label, count, steps and seed")
    given = {"label": 7, "count": 4, "steps": 25, "seed": 0, **asked}
    for name, value in given.items():
        if name not in LIMITS:
            raise Wrong(f"unknown field {name!r}: this service knows {', '.join(LIMITS)}")
        low, high = LIMITS[name]
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise Wrong(f"{name} is a whole number from {low} to {high}, not {value!r}")
    return given


def application(session: Any) -> Starlette:
    """The service around one session; ONNX Runtime's sessions may be called from several threads."""

    async def page(_: Request) -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    async def draw(request: Request) -> JSONResponse:
        try:
            asked = read(await request.json())
        except ValueError as error:  # no JSON, or Wrong
            return JSONResponse({"error": str(error)}, status_code=422)
        noise = numpy.random.default_rng(asked["seed"]).standard_normal((asked["count"], 1, 8, 8))
        labels = numpy.full(asked["count"], asked["label"])
        images = await run_in_threadpool(
            sample, session, labels, noise=noise, steps=asked["steps"], guidance=2.0
        )
        return JSONResponse({"images": numpy.round(images[:, 0], 4).tolist()})

    async def health(_: Request) -> JSONResponse:
        return JSONResponse({"model": [i.name for i in session.get_inputs()], "ready": True})

    return Starlette(
        routes=[
            Route("/", page),
            Route("/sample", draw, methods=["POST"]),
            Route("/health", health),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve an exported digits model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    uvicorn.run(
        application(load(given.model)), host=given.host, port=given.port, log_level="warning"
    )


if __name__ == "__main__":
    main()
