"""HTTP in front of llama.cpp, in the OpenAI format: what a request says is done or refused."""

import asyncio
import contextlib
import json
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import httpx
import jsonschema
import llguidance
from jsonschema.exceptions import best_match
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lib.files import in_call_order, unique
from lib.serve.bundle import Bundle
from lib.settings import ServeSettings

SCHEMAS = json.loads(Path(__file__).with_name("requests.json").read_text(encoding="utf-8"))
VALIDATORS = {path: jsonschema.Draft202012Validator({"$defs": SCHEMAS["$defs"]} | schema)
              for path, schema in SCHEMAS.items() if path.startswith("/")}


def insist(condition: object, parameter: str | None, message: str, status: int = 400,
           code: str | None = None) -> None:
    """Refuse the request unless `condition` holds."""
    if not condition:
        said = f"{parameter}: {message}" if parameter else message
        raise HTTPException(status, {"message": said, "param": parameter, "code": code})


def insist_known(kind: str, name: str, names: Collection[str]) -> None:
    """Refuse a name that is not among these."""
    said = f"unknown {kind} {name!r}: use one of {', '.join(names)}"
    insist(name in names, kind, said, 404, f"{kind}_not_found")


async def error_reply(_: Any, error: Exception) -> Response:
    """Any error in the OpenAI format; a failure of the engine is a 502."""
    status = error.status_code if isinstance(error, HTTPException) else 502
    said = getattr(error, "detail", f"the engine failed ({type(error).__name__}): try again")
    if status in (404, 405) and isinstance(said, str):
        said += ": send GET /v1/models, or POST /v1/chat/completions or /v1/completions"
    said = said if isinstance(said, dict) else {"message": said, "param": None, "code": None}
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": said | {"type": kind}}, status)


def engine_request(body: bytes, path: str, bundles: Mapping[str, Bundle], settings: ServeSettings
                   ) -> tuple[str, dict[str, Any], list[str]]:
    """The engine's address, the request for it, and the names of the fields that it leaves out."""
    try:
        fields = json.loads(body, parse_constant=int, object_pairs_hook=unique)  # NaN is refused
        fields = {name: value for name, value in fields.items() if value is not None}
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()  # half a character, 1e999
        error = best_match(VALIDATORS[path].iter_errors(fields))
    except (ValueError, AttributeError, RecursionError):
        insist(False, "body", "it is not a JSON object in UTF-8 with each key once")
    if error:
        said = [e.schema["description"] for e in (error.parent or error, error)
                if "description" in e.schema]
        insist(False, ".".join(map(str, error.absolute_path)) or None,
               said[0] if said else error.message[:200])
    homes = {name: url for url, b in bundles.items() for name in (b.name, *b.adapters)}
    model = fields.get("model") or next(iter(homes))
    insist_known("model", model, homes)
    bundle = bundles[homes[model]]
    ignored = sorted(fields.keys() - SCHEMAS["$defs"]["common"]["properties"].keys()
                     - SCHEMAS[path]["properties"].keys())
    for name in (*ignored, "n", "echo", "best_of", "suffix", "modalities"):
        fields.pop(name, None)  # those of the known ones have their default values
    for message in fields.get("messages", ()):
        message["role"] = message["role"].replace("developer", "system")
        if isinstance(parts := message.get("content"), list):  # as in training
            message["content"] = "".join(part["text"] for part in parts)
    insist(in_call_order(fields.get("messages", ())), "messages", "answer calls in their order")
    insist(bundle.template or "messages" not in fields, None, "no chat template: use /completions")
    insist(fields.get("messages", [{"role": ""}])[-1]["role"] != "assistant", "messages", "end "
           "with a turn of the user or a tool: an answer is not continued")
    insist(all(int(token) < bundle.vocabulary for token in fields.get("logit_bias", ())),
           "logit_bias", f"the vocabulary has {bundle.vocabulary} tokens")
    insist(all(re.search(rf"\b{re.escape(name)}\b", bundle.template)
               for name in fields.get("chat_template_kwargs", ())),
           "chat_template_kwargs", "the model's chat template does not read all of them")
    limits = [fields.pop(name) for name in ("max_tokens", "max_completion_tokens", "n_predict")
              if name in fields]
    insist(max(limits, default=0) <= settings.context, "max_tokens", f"at most {settings.context}")
    scales = {name: (scale or 1.0) * (name == model) if model in bundle.adapters else scale
              for name, (_, scale) in bundle.adapters.items()}
    for entry in fields.get("lora", ()):
        insist_known("adapter", entry["name"], scales)
        insist([e["name"] for e in fields["lora"]].count(entry["name"]) == 1, "lora", "use it once")
        scales[entry["name"]] = entry["scale"]
    tools, choice = fields.get("tools", []), fields.get("tool_choice", "auto")
    if isinstance(choice, dict):  # only that function is left, and has to be called
        name, choice = choice["function"]["name"], "required"
        tools = [tool for tool in tools if tool["function"]["name"] == name]
        fields |= {"tools": tools, "tool_choice": choice}
    insist(choice != "required" or (tools and not fields.get("stream")), "tool_choice", "name one "
           "of the tools, and leave stream out: whether a call comes is known at the end")
    if any(tool["function"].get("strict") for tool in tools):
        ignored.append("tools.strict")  # the engine's rules for calls leave out parts of schemas
    constrain(fields)
    fields["lora"] = [{"id": i, "scale": scale} for i, scale in enumerate(scales.values())]
    fields["max_tokens"] = min(limits, default=settings.max_tokens)
    return homes[model], fields | {"model": model}, ignored


def constrain(fields: dict[str, Any]) -> None:
    """Put a schema as a grammar; refused if a part of it would not be enforced."""
    wanted = fields.keys() & {"json_schema", "response_format", "grammar"}
    insist(len(wanted) < 2, "grammar", f"of {', '.join(sorted(wanted))} use one")
    schema, shape = fields.pop("json_schema", None), fields.pop("response_format", {})
    if shape.get("type") == "json_object":
        schema = {"type": "object"}
    schema = shape.get("json_schema", {"schema": schema})["schema"]
    if schema is not None:
        # The engine's own way drops parts of a schema. A small model would write spaces to the end.
        schema = {"x-guidance": {"whitespace_flexible": False}} | schema
        fields["grammar"] = f"%llguidance {{}}\nstart: %json {json.dumps(schema)}"
    insist(not (fields.get("grammar") and fields.get("ignore_eos")), None, "ignore_eos: omit it")
    if fields.get("grammar", "").startswith("%llguidance"):  # the engine would go on without it
        error = llguidance.LLMatcher.validate_grammar(fields["grammar"]).partition("   1 |")[0]
        said = " ".join(error.rpartition("JSON schema: ")[2].split())
        insist(not error, next(iter(wanted)), "use anyOf" if "coerce_one_of" in said else said)


def left_out(value: Any, prompt: str) -> Iterator[Any]:
    """The texts and numbers in messages or tools that a rendered prompt lacks, plain or as JSON."""
    if type(value) in (int, float):  # of a float llama.cpp writes six digits
        forms = {str(value), f"{value:.6g}" if type(value) is float else str(value)}
        yield from [value] * (not any(f in prompt and type(value)(f) == value for f in forms))
    if isinstance(value, str):
        value = value.rpartition("</think>")[2]  # templates leave out what was thought earlier
        forms = (value, *(json.dumps(value, ensure_ascii=only)[1:-1] for only in (True, False)))
        yield from [value] * (not any(form.strip() in prompt for form in forms))
    for item in value if isinstance(value, list) else ():
        yield from left_out(item, prompt)
    for key, item in value.items() if isinstance(value, dict) else ():
        if key == "arguments":
            with contextlib.suppress(ValueError, TypeError):  # not JSON, or decoded already
                item = json.loads(item)
        if key in ("properties", "arguments") and isinstance(item, dict):
            yield from left_out([*item, *item.values()], prompt)
        if key not in ("role", "type", "id", "index", "tool_call_id", "reasoning_content"):
            yield from left_out(item, prompt)


def admit(request: Request, settings: ServeSettings) -> None:
    """Refuse all but this machine's programs with the key, and the pages that may ask.
    A page may point its own host name here (DNS rebinding), or send a request without asking."""
    host, origin, given = map(request.headers.get, ("host", "origin", "authorization"))
    insist(re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", host or ""), None,
           f"host {host!r}: use 127.0.0.1 or localhost")
    insist(not origin or {origin, "*"} & {*settings.cors.split(",")}, None,
           f"origin {origin!r}: start the server with --cors {origin}", 403)
    scheme, _, token = (given or "").encode("latin-1").partition(b" ")
    insist(not settings.api_key or (scheme.lower() == b"bearer" and secrets.compare_digest(
        token, settings.api_key.encode())), None, "wrong or no API key", 401, "invalid_api_key")


def application(bundles: Mapping[str, Bundle], key: str, settings: ServeSettings) -> Starlette:
    """The app that checks requests and passes them to llama.cpp at the address of their model."""
    # At most `slots` requests reach an engine, or one of several; the others wait, in order.
    gate = asyncio.Semaphore(settings.slots if len(bundles) == 1 else 1)
    # No connection is kept: the engine drops one now and then.
    engine = httpx.AsyncClient(
        headers={"Authorization": f"Bearer {key}"}, timeout=None, trust_env=False,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))

    async def complete(request: Request) -> ASGIApp:
        admit(request, settings)
        path, body = request.url.path, bytearray()
        async for part in request.stream():  # `body()` would first read gigabytes
            body += part
            insist(len(body) <= 4_000_000, None, "over 4 MB: send less", 413, "request_too_large")
        url, fields, ignored = engine_request(bytes(body), path, bundles, settings)
        insist(not (ignored and settings.strict), ", ".join(ignored), "unknown: leave it out")
        if "messages" in fields:
            shown = await engine_json(await engine.post(f"{url}/apply-template", json=fields), 400)
            lost = [*left_out([fields["messages"], fields.get("tools")], shown["prompt"])]
            insist(not lost, "messages", "the model's chat template leaves out "
                   f"{', '.join(map(repr, lost))[:200]}: do without, or use another model")

        async def forward(scope: Scope, receive: Receive, send: Send) -> None:
            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                work.cancel()

            with anyio.CancelScope() as work, contextlib.suppress(
                    ClientDisconnect, asyncio.CancelledError):  # of a second Ctrl-C
                watcher = asyncio.ensure_future(watch())
                try:
                    async with gate, engine.stream("POST", url + path, json=fields) as answer:
                        if fields.get("stream") and answer.status_code == 200:
                            response: Response = StreamingResponse(
                                answer.aiter_raw(), media_type="text/event-stream")
                        else:
                            reply = await engine_json(answer)
                            # The engine lets a model talk first, up to the limit.
                            insist(fields.get("tool_choice") != "required" or all(
                                c["message"].get("tool_calls") for c in reply["choices"]),
                                "tool_choice", "no call came: raise max_tokens", 502)
                            response = JSONResponse(reply | {"model": fields["model"]})
                        if ignored:
                            response.headers["x-ignored-fields"] = json.dumps(ignored)[1:-1][:999]
                        await response(scope, receive, send)
                finally:
                    watcher.cancel()

        return forward

    async def models(request: Request) -> Response:
        admit(request, settings)
        rows = {name: {"id": name, "object": "model", "created": 0, "owned_by": "lib"}
                for bundle in bundles.values() for name in (bundle.name, *bundle.adapters)}
        insist_known("model", (name := request.path_params.get("name")) or next(iter(rows)), rows)
        return JSONResponse(rows[name] if name else {"object": "list", "data": [*rows.values()]})

    async def status(request: Request) -> Response:
        admit(request, settings)
        for url in bundles:  # of several engines the first that is not well
            said = await engine.get(url + request.url.path)
            if not said.is_success:
                break
        return Response(said.content, said.status_code, media_type=said.headers["content-type"])

    pages = [Middleware(CORSMiddleware, allow_origins=settings.cors.split(","),
                        allow_methods=["*"], allow_headers=["*"], allow_private_network=True,
                        expose_headers=["x-ignored-fields"])] if settings.cors else []
    return Starlette(routes=[*(Route(path, complete, methods=["POST"]) for path in VALIDATORS),
        Route("/v1/models", models), Route("/v1/models/{name:path}", models),
        Route("/health", status), *[Route("/metrics", status)] * (len(bundles) == 1)],
        middleware=pages, exception_handlers=dict.fromkeys(
            (HTTPException, ClientDisconnect, httpx.HTTPError, ValueError), error_reply))


async def engine_json(answer: httpx.Response, fault: int = 500) -> dict[str, Any]:
    """llama.cpp's answer; an error is refused with its status, or with `fault` instead of 500."""
    reply, status = json.loads(await answer.aread()), answer.status_code
    if error := reply.get("error"):
        insist(False, None, error["message"], fault if status == 500 else status, error.get("type"))
    return reply
