"""The front of the server: every request is checked before the engine sees it.

llama.cpp ignores a model or an adapter that it does not know and answers with
another one. Here an unknown name is an error, in the OpenAI shape.
"""

import asyncio
import contextlib
import json
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Annotated, Any, Literal, TypeVar

import anyio
import httpx
from pydantic import BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lib.bundle import Bundle

BODY_LIMIT = 4_000_000
PATHS = ("/v1/chat/completions", "/v1/completions")
T = TypeVar("T")


class Message(BaseModel, extra="allow"):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class Lora(BaseModel, strict=True):
    """An adapter's scale for one request."""

    name: str
    scale: float = Field(allow_inf_nan=False)


class Request(BaseModel, extra="allow", strict=True):
    """What both completion calls share; fields that are not named here are passed on."""

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-1, lt=2**32)
    stream: bool | None = None
    n: Literal[1] | None = None
    stop: str | list[str] | None = None
    lora: list[Lora] = []


class Chat(Request):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)


class Completion(Request):
    """Body of /v1/completions."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[
        list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Refused(Exception):
    """An error in the OpenAI shape."""

    def __init__(self, status: int, message: str, parameter: str | None = None,
                 code: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.reply = JSONResponse({"error": {
            "message": message, "type": kind, "param": parameter, "code": code}}, status)


async def read_body(request: HTTPRequest) -> bytes:
    """The body, up to the limit.

    Raises:
        Refused: a longer one. What follows is read and dropped, up to 16
            times the limit, so that the client gets to read the answer.
    """
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= BODY_LIMIT:
            body += chunk
        elif size > 16 * BODY_LIMIT:
            break
    if size > BODY_LIMIT:
        raise Refused(413, f"the body is over {BODY_LIMIT:,} bytes: send less",
                      code="request_too_large")
    return bytes(body)


def checked(body: bytes, kind: type[Request], bundle: Bundle, context: int) -> dict[str, Any]:
    """The request for the engine, with the adapters that it asks for.

    Raises:
        Refused: no JSON, a wrong type or range, an unknown model or adapter.
    """
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(400, f"{where or 'body'}: {first['msg']}", where or None) from None
    names = [bundle.name, *bundle.adapters]
    if asked.model not in ("", *names):
        raise Refused(404, f"unknown model {asked.model!r}: use one of {', '.join(names)}",
                      "model", "model_not_found")
    if unknown := [x.name for x in asked.lora if x.name not in bundle.adapters]:
        raise Refused(404, f"unknown adapter {unknown[0]!r}: use one of "
                      f"{', '.join(bundle.adapters)}", "lora", "adapter_not_found")
    limit = asked.max_tokens or asked.max_completion_tokens or 0
    if limit > context:
        raise Refused(400, f"max_tokens is {limit}, the context holds {context}", "max_tokens")
    passed = json.loads(body) | {"model": bundle.name, "lora": scales(bundle, asked)}
    passed.pop("id_slot", None)  # which slot computes is the engine's business
    return passed


def scales(bundle: Bundle, asked: Request) -> list[dict[str, Any]]:
    """llama.cpp's adapter list for a request: by `lora`, by `model`, or the defaults."""
    wanted = {name: scale for name, (_, scale) in bundle.adapters.items()}
    if asked.model in bundle.adapters:
        wanted = {asked.model: 1.0}
    wanted |= {entry.name: entry.scale for entry in asked.lora}
    return [{"id": i, "scale": wanted.get(name, 0.0)} for i, name in enumerate(bundle.adapters)]


class Relay(StreamingResponse):
    """The engine's stream. Whatever becomes of the client, what it held is let go."""

    def __init__(self, answer: httpx.Response, held: AsyncExitStack) -> None:
        super().__init__(answer.aiter_raw(), media_type="text/event-stream")
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientDisconnect):
                await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self.held.aclose()


def application(bundle: Bundle, url: str, key: str, context: int, slots: int) -> Starlette:
    """The front: checks a request, chooses its adapter, passes it to the engine."""
    # No more requests than slots reach the engine; the others wait here, in order.
    gate = asyncio.Semaphore(slots)
    # The engine drops a kept connection now and then, so none is kept.
    engine = httpx.AsyncClient(
        base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=None, trust_env=False,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))

    async def complete(request: HTTPRequest) -> Response:
        kind = Chat if request.url.path.endswith("chat/completions") else Completion
        body = checked(await read_body(request), kind, bundle, context)
        try:
            sent = engine.build_request("POST", request.url.path, json=body)
        except ValueError:  # a field that is only passed on
            raise Refused(400, "a number is not finite: JSON has no such numbers") from None
        async with AsyncExitStack() as held:
            await _unless_gone(request, gate.acquire())
            held.callback(gate.release)
            answer = await _unless_gone(request, engine.send(sent, stream=True))
            held.push_async_callback(answer.aclose)
            if body.get("stream") and answer.status_code == 200:
                return Relay(answer, held.pop_all())
            reply = json.loads(await _unless_gone(request, answer.aread()))
        if "error" in reply:
            raise Refused(answer.status_code, reply["error"]["message"],
                          code=reply["error"].get("type"))
        return JSONResponse(reply)

    async def models(_: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "lib"}
            for name in (bundle.name, *bundle.adapters)]})

    async def watch(request: HTTPRequest) -> Response:
        answer = await engine.get(request.url.path)
        return Response(answer.content, answer.status_code,
                        media_type=answer.headers.get("content-type"))

    async def refuse(_: HTTPRequest, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = Refused(error.status_code, error.detail)
        if isinstance(error, ClientDisconnect):
            return Response(status_code=499)  # nobody is there to read it
        return error.reply if isinstance(error, Refused) else Refused(
            502, f"the engine failed ({type(error).__name__}): try again").reply

    return Starlette(
        routes=[*(Route(path, complete, methods=["POST"]) for path in PATHS),
                Route("/v1/models", models), Route("/health", watch),
                Route("/metrics", watch)],
        # A web page whose own name is made to lead here (DNS rebinding) sends that name,
        # and would read answers past the browser's guard.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
        exception_handlers={kind: refuse for kind in (
            Refused, HTTPException, ClientDisconnect, httpx.HTTPError, ValueError)})


async def _unless_gone(request: HTTPRequest, work: Coroutine[Any, Any, T]) -> T:
    """Result of `work`, which is given up when the client hangs up."""
    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
