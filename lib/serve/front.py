"""HTTP in front of llama.cpp: unknown models and adapters are errors, in the OpenAI format."""

import asyncio
import contextlib
import json
from contextlib import aclosing
from typing import Annotated, Any, Literal

import anyio
import httpx
from pydantic import BaseModel, Field, ValidationError, create_model
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lib.serve.bundle import Bundle

BODY_LIMIT = 4_000_000


class Message(BaseModel):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class Lora(BaseModel, strict=True):
    """An adapter's scale for one request."""

    name: str
    scale: float = Field(allow_inf_nan=False)


class Request(BaseModel, strict=True):
    """The fields that we check; all others go to llama.cpp as they are."""

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


Some = Field(min_length=1)
Token = Annotated[int, Field(ge=0)]
Prompt = Annotated[str, Some] | Annotated[list[Token], Some]
REQUESTS = {
    "/v1/chat/completions": create_model("Chat", __base__=Request, messages=(list[Message], Some)),
    "/v1/completions": create_model("Completion", __base__=Request, prompt=(Prompt, ...))}


class Refused(HTTPException):
    """A request that the client has to change."""

    def __init__(self, status: int, message: str, parameter: str | None = None,
                 code: str | None = None) -> None:
        super().__init__(status, message)
        self.parameter, self.code = parameter, code


async def error_reply(_: HTTPRequest, error: Exception) -> Response:
    """Any error in the OpenAI format; a failure of the engine is a 502."""
    status, message = 502, f"the engine failed ({type(error).__name__}): try again"
    if isinstance(error, HTTPException):
        status, message = error.status_code, error.detail
    return JSONResponse({"error": {
        "message": message, "type": "invalid_request_error" if status < 500 else "server_error",
        "param": getattr(error, "parameter", None), "code": getattr(error, "code", None)}}, status)


async def read_body(request: HTTPRequest) -> bytes:
    """The body; Refused above the limit."""
    body = bytearray()
    async for chunk in request.stream():  # read on: clients listen when they have sent all
        if len(body) <= BODY_LIMIT:
            body += chunk
    if len(body) > BODY_LIMIT:
        raise Refused(413, f"the body is over {BODY_LIMIT:,} bytes: send less",
                      code="request_too_large")
    return bytes(body)


def engine_request(body: bytes, schema: type[Request], bundle: Bundle, context: int
                   ) -> dict[str, Any]:
    """The request for llama.cpp, with a scale for each adapter; Refused if it is invalid."""
    try:
        request = schema.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(400, f"{where or 'body'}: {first['msg']}", where or None) from None
    names = [bundle.name, *bundle.adapters]
    if request.model not in ("", *names):
        raise Refused(404, f"unknown model {request.model!r}: use one of {', '.join(names)}",
                      "model", "model_not_found")
    scales = {name: scale for name, (_, scale) in bundle.adapters.items()}
    if request.model in scales:
        scales = {name: float(name == request.model) for name in scales}
    for entry in request.lora:
        if entry.name not in scales:
            raise Refused(404, f"unknown adapter {entry.name!r}: use one of {', '.join(scales)}",
                          "lora", "adapter_not_found")
        scales[entry.name] = entry.scale
    limit = request.max_tokens or request.max_completion_tokens or 0
    if limit > context:
        raise Refused(400, f"max_tokens is {limit}, the context holds {context}", "max_tokens")
    fields = json.loads(body)
    fields.pop("id_slot", None)  # the engine chooses the slot
    return fields | {"model": bundle.name, "lora": [
        {"id": i, "scale": scale} for i, scale in enumerate(scales.values())]}


def application(bundle: Bundle, url: str, key: str, context: int, slots: int) -> Starlette:
    """The app that checks requests and passes them to llama.cpp at `url`."""
    # At most `slots` requests reach the engine; the others wait here, in order.
    gate = asyncio.Semaphore(slots)
    # No connection is kept: the engine drops one now and then.
    engine = httpx.AsyncClient(
        base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=None, trust_env=False,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))

    async def complete(request: HTTPRequest) -> ASGIApp:
        path = request.url.path
        fields = engine_request(await read_body(request), REQUESTS[path], bundle, context)
        try:
            call = engine.build_request("POST", path, json=fields)
        except ValueError:  # in a field that we only pass on
            raise Refused(400, "a number is not finite: JSON has no such numbers") from None

        async def forward(scope: Scope, receive: Receive, send: Send) -> None:
            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                work.cancel()

            with anyio.CancelScope() as work, contextlib.suppress(ClientDisconnect):
                watcher = asyncio.ensure_future(watch())
                try:
                    async with gate, aclosing(await engine.send(call, stream=True)) as answer:
                        response = await engine_reply(answer, bool(fields.get("stream")))
                        await response(scope, receive, send)
                finally:
                    watcher.cancel()

        return forward

    async def models(_: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "lib"}
            for name in (bundle.name, *bundle.adapters)]})

    async def status(request: HTTPRequest) -> Response:
        answer = await engine.get(request.url.path)
        return Response(answer.content, answer.status_code,
                        media_type=answer.headers.get("content-type"))

    return Starlette(
        routes=[*(Route(path, complete, methods=["POST"]) for path in REQUESTS),
                Route("/v1/models", models), Route("/health", status), Route("/metrics", status)],
        # DNS rebinding: a web page may point its own host name here to read the answers.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
        exception_handlers=dict.fromkeys(
            (HTTPException, ClientDisconnect, httpx.HTTPError, ValueError), error_reply))


async def engine_reply(answer: httpx.Response, stream: bool) -> Response:
    """llama.cpp's answer for the client; Refused if it is an error."""
    if stream and answer.status_code == 200:
        return StreamingResponse(answer.aiter_raw(), media_type="text/event-stream")
    reply = json.loads(await answer.aread())
    if "error" in reply:
        raise Refused(answer.status_code, reply["error"]["message"],
                      code=reply["error"].get("type"))
    return JSONResponse(reply)
