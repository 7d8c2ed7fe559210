"""Serves the function's handler over HTTP, behind the sidecar.

What functions see is python3-http's contract: `handle(event, context)`, with `event.body`, `.headers`, `.method`,
`.query` and `.path`, returns a dict with `statusCode`, `body` and `headers`, or anything that can be a body. The handler
may be a coroutine function.
"""

import asyncio
import http
import inspect
import json
import os
import sys
import urllib.parse

import uvicorn

from function import handler

PORT = int(os.environ.get("FAASWAP_HANDLER_PORT", "5000"))
# The sidecar limits bodies before we do; this is for whoever reaches the port directly.
BODY_BYTES_MAX = 1 << 30
# The sidecar serves on after SIGTERM for healthcheck_interval, and then ends us.
SERVES_ON_S = 600


class Headers(dict):
    """Looked up in any case; `get` and `[]` alike."""

    def __init__(self, pairs):
        super().__init__((name.lower(), value) for name, value in pairs)

    def __getitem__(self, name):
        return super().__getitem__(name.lower())

    def __contains__(self, name):
        return super().__contains__(name.lower())

    def get(self, name, default=None):
        return super().get(name.lower(), default)


class Event:
    def __init__(self, scope, body):
        self.body = body
        self.headers = Headers((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])
        self.method = scope["method"]
        self.path = scope["path"]
        self.query = dict(urllib.parse.parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))


class Context:
    def __init__(self):
        self.hostname = os.environ.get("HOSTNAME", "localhost")


async def read_body(receive):
    pieces, length = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client went away")
        pieces.append(message.get("body", b""))
        length += len(pieces[-1])
        if length > BODY_BYTES_MAX:
            return None
        if not message.get("more_body"):
            return b"".join(pieces)


def answer_of(returned):
    """Status, headers and body of what a handler returned."""
    status, headers = http.HTTPStatus.OK, {}
    if isinstance(returned, dict) and "statusCode" in returned:
        status, headers = returned["statusCode"], dict(returned.get("headers") or {})
        returned = returned.get("body", b"")
    kind = "text/plain; charset=utf-8"
    if returned is None:
        body = b""
    elif isinstance(returned, (bytes, bytearray, memoryview)):
        body, kind = bytes(returned), "application/octet-stream"
    elif isinstance(returned, str):
        body = returned.encode()
    else:
        body, kind = json.dumps(returned).encode(), "application/json"
    if not any(name.lower() == "content-type" for name in headers):
        headers["Content-Type"] = kind
    return int(status), headers, body


async def call_handler(event, context):
    if inspect.iscoroutinefunction(handler.handle):
        return await handler.handle(event, context)
    # Others go on while this one computes or waits for its inference.
    return await asyncio.get_running_loop().run_in_executor(None, handler.handle, event, context)


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    try:
        body = await read_body(receive)
        if body is None:
            status, headers, body = 413, {}, b"the request body is too large"
        else:
            status, headers, body = answer_of(await call_handler(Event(scope, body), Context()))
    except ConnectionError:
        return
    except Exception as error:
        # A refusal of the node is passed on as such, so that the platform tries again; anything else is the handler's.
        status = getattr(error, "status", 500)
        headers = {"Retry-After": "1"} if status == 503 else {}
        body = f"{type(error).__name__}: {error}".encode()
        print(f"handler failed: {type(error).__name__}: {error}", file=sys.stderr)
    head = [(name.encode("latin-1"), str(value).encode("latin-1")) for name, value in headers.items()]
    head.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


class Server(uvicorn.Server):
    """Serves on after SIGTERM: the sidecar in front still takes requests, and ends us when it is done."""

    def handle_exit(self, sig, frame):
        if getattr(self, "told", False):
            return super().handle_exit(sig, frame)
        self.told = True
        self.loop.call_soon_threadsafe(self.loop.call_later, SERVES_ON_S, self.handle_exit, sig, frame)

    async def serve(self, sockets=None):
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)


if __name__ == "__main__":
    config = uvicorn.Config(app, host="127.0.0.1", port=PORT, log_level="warning", access_log=False, lifespan="off",
                            timeout_keep_alive=30)
    Server(config).run()
