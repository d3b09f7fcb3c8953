"""The addresses of the server: OpenAI's interface under /v1, and a page to talk to both models."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from finetune.report.html import TEMPLATES, render_page
from finetune.run.adapter import TrainedModel
from finetune.runtime.console import say
from finetune.serving.engine import Engine, Job, Progress
from finetune.serving.requests import ChatRequest, read_request
from finetune.serving.responses import Answering, error_body, error_event

HOST = "127.0.0.1"
MODEL_IDS = ("tuned", "base")
SECONDS_BETWEEN_LOOKS = 1.0  # whether the client of an answer that is not streamed is still there


def create_app(
    engine: Engine, model: TrainedModel, system_prompt: str | None, max_new_tokens: int, title: str
) -> Starlette:
    """The application that serves `model` by `engine`.

    `system_prompt` and `max_new_tokens` are for requests without their own; `title` heads the page.
    """
    page = render_page("chat.html", title=title, max_new_tokens=max_new_tokens, system_prompt=system_prompt)
    source, _, _ = TEMPLATES.get_source(None, "chat.js")  # type: ignore[arg-type]

    async def show_page(_: Request) -> Response:
        return HTMLResponse(page)

    async def show_script(_: Request) -> Response:
        return Response(source, media_type="text/javascript")

    async def list_models(_: Request) -> Response:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "finetune"} for name in MODEL_IDS]
        return JSONResponse({"object": "list", "data": models})

    async def complete(http: Request) -> Response:
        # A web page of another origin may send any other type without asking first.
        if http.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _refusal("the request's content-type must be application/json", 415)
        try:
            body = await http.json()
            request = await run_in_threadpool(read_request, body, model, system_prompt, max_new_tokens)
        except (ValueError, RecursionError) as error:
            return _refusal(" ".join(str(error).split()) or "the request is no JSON", 400)
        if request.unused:
            say(f"Not used of a request: {', '.join(dict.fromkeys(request.unused))}")
        return await _respond(http, engine, request)

    return Starlette(
        routes=[
            Route("/", show_page),
            Route("/chat.js", show_script),
            Route("/v1/models", list_models),
            Route("/v1/chat/completions", complete, methods=["POST"]),
        ],
        # A page of another name that resolves to this address is not let in.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
    )


def _refusal(message: str, status: int) -> Response:
    return JSONResponse(error_body(message, "invalid_request_error"), status)


async def _respond(http: Request, engine: Engine, request: ChatRequest) -> Response:
    loop = asyncio.get_running_loop()
    reports: asyncio.Queue[Progress | Exception] = asyncio.Queue()
    job = Job(request.asked, lambda report: loop.call_soon_threadsafe(reports.put_nowait, report))
    answering = Answering(request, secrets.token_hex(8))
    engine.submit(job)
    if request.stream:
        return StreamingResponse(_events(job, reports, answering), media_type="text/event-stream")
    while True:
        try:
            report = await asyncio.wait_for(reports.get(), SECONDS_BETWEEN_LOOKS)
        except TimeoutError:
            if await http.is_disconnected():
                job.cancel()
                return Response(status_code=499)
            continue
        if isinstance(report, Exception):
            return JSONResponse(error_body(str(report), "server_error"), 500)
        if report.end is not None:
            return JSONResponse(answering.whole(report))


async def _events(
    job: Job, reports: "asyncio.Queue[Progress | Exception]", answering: Answering
) -> AsyncIterator[str]:
    """The stream of an answer, which is ended when its client is gone."""
    try:
        yield answering.first_event()
        while True:
            report: Any = await reports.get()
            if isinstance(report, Exception):
                yield error_event(report)
                return
            yield answering.events(report)
            if report.end is not None:
                return
    finally:
        job.cancel()
