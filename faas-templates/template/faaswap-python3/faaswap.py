"""Runs the function's model on numpy arrays, through the sidecar.

    from faaswap import Client
    client = Client()
    scores = client.infer(x)                        # one input, one output
    answers = client.infer({"ids": a, "mask": b})   # by name: a dict of all outputs
    scores = await client.infer_async(x)

Speaks the Open Inference Protocol v2 with binary tensors, so arrays are not turned into text. Connections are kept, one per
thread that asks. Nothing is tried again here: whoever called the function knows whether that makes sense.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Union

import numpy as np

Arrays = Union[np.ndarray, Mapping[str, np.ndarray]]

# How long an inference may take where nothing else is said; the function's deadline is far below.
TIMEOUT_S = 60.0
HEADER_LENGTH = "Inference-Header-Content-Length"

DTYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class Refused(Exception):
    """The node declined. `status` is HTTP's, `code` is stable, `retry_after` in seconds where trying again helps."""

    def __init__(self, status: int, code: str, text: str, retry_after: float | None):
        super().__init__(text)
        self.status = status
        self.code = code
        self.retry_after = retry_after


class Client:
    """One model at one sidecar. May be used by many threads and tasks at a time."""

    def __init__(self, url: str | None = None, model: str | None = None, timeout: float = TIMEOUT_S):
        url = url or os.environ.get("FAASWAP_SIDECAR_URL", "http://127.0.0.1:9463")
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url!r} is no http://host:port")
        self._host, self._port, self._timeout = parts.hostname, parts.port or 80, timeout
        self._model, self._about = model, None
        self._kept = threading.local()

    def metadata(self) -> dict:
        """Names, types and shapes of the model's inputs and outputs."""
        if self._about is None:
            if self._model is None:
                models = json.loads(self._ask("GET", "/v2/models")[1])["models"]
                self._model = models[0] if isinstance(models[0], str) else models[0]["name"]
            self._about = json.loads(self._ask("GET", self._path())[1])
        return self._about

    def infer(
        self,
        inputs: Arrays,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> np.ndarray | dict[str, np.ndarray]:
        """Runs the model once. A bare array is the model's only input; the answer then is bare too if it has one output."""
        about = self.metadata()
        named = inputs if isinstance(inputs, Mapping) else {self._only(about["inputs"]): inputs}
        head, tensors = self._request(about, named, outputs)
        if timeout is not None:
            head["parameters"]["timeout"] = int(timeout * 1e6)
        text = json.dumps(head).encode()
        headers = {HEADER_LENGTH: str(len(text)), "Content-Type": "application/octet-stream"}
        reply, body = self._ask("POST", self._path() + "/infer", [text, *tensors], headers)
        answers = _read(body, int(reply.headers.get(HEADER_LENGTH, len(body))))
        bare = not isinstance(inputs, Mapping) and len(answers) == 1
        return next(iter(answers.values())) if bare else answers

    async def infer_async(
        self, inputs: Arrays, outputs: Sequence[str] | None = None, timeout: float | None = None
    ) -> np.ndarray | dict[str, np.ndarray]:
        """The same, without keeping the event loop waiting."""
        return await asyncio.to_thread(self.infer, inputs, outputs, timeout)

    def _path(self) -> str:
        return "/v2/models/" + urllib.parse.quote(self._model, safe="")

    @staticmethod
    def _only(inputs: list[dict]) -> str:
        if len(inputs) != 1:
            names = ", ".join(one["name"] for one in inputs)
            raise ValueError(f"the model has {len(inputs)} inputs: pass a dict with {names}")
        return inputs[0]["name"]

    @staticmethod
    def _request(about, named, outputs):
        types = {one["name"]: one["datatype"] for one in about["inputs"]}
        listed, tensors = [], []
        for name, array in named.items():
            wanted = types.get(name)
            if wanted is None:
                raise ValueError(f"the model has no input {name!r}; it has {', '.join(types)}")
            array = np.ascontiguousarray(array)
            # Python's own numbers are 64 bits wide; what is exact by nature is not rounded behind one's back.
            if array.dtype.kind == "f" and wanted.startswith("FP"):
                array = array.astype(DTYPES[wanted], copy=False)
            if NAMES.get(array.dtype) != wanted:
                raise ValueError(f"input {name!r} is {array.dtype} and the model takes {wanted}")
            listed.append({
                "name": name,
                "datatype": wanted,
                "shape": list(array.shape),
                "parameters": {"binary_data_size": array.nbytes},
            })
            tensors.append(array.tobytes())
        head = {"inputs": listed, "parameters": {"binary_data_output": True}}
        if outputs is not None:
            head["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
        return head, tensors

    def _ask(self, verb, path, pieces=(), headers=None):
        headers = {**(headers or {}), "Content-Length": str(sum(map(len, pieces)))}
        kept = getattr(self._kept, "connection", None)
        connection = kept or http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        self._kept.connection = None
        try:
            connection.request(verb, path, iter(pieces) if pieces else None, headers)
            reply = connection.getresponse()
            body = reply.read()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            connection.close()
            if kept is None:
                raise
            # The sidecar closed what was idle; on a new connection the request is sent for the first time.
            return self._ask(verb, path, pieces, headers)
        except BaseException:
            connection.close()
            raise
        self._kept.connection = connection
        if reply.status != 200:
            raise _refusal(reply, body)
        return reply, body


def _refusal(reply, body):
    try:
        text = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        text = body.decode(errors="replace")
    after = reply.headers.get("Retry-After")
    return Refused(reply.status, reply.headers.get("faaswap-refusal", ""), text, float(after) if after else None)


def _read(body, head_len):
    answers, at = {}, head_len
    for output in json.loads(body[:head_len])["outputs"]:
        dtype = DTYPES.get(output["datatype"])
        if dtype is None:
            raise ValueError(f"output {output['name']!r} is {output['datatype']}, which numpy does not have")
        size = output["parameters"]["binary_data_size"]
        numbers = np.frombuffer(body, dtype, count=size // np.dtype(dtype).itemsize, offset=at)
        answers[output["name"]] = numbers.reshape(output["shape"])
        at += size
    return answers
