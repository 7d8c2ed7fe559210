"""Broker and function in containers of their own: one socket, one slab, nothing else in common. `make test-containers`.

The function is an image of the template `faaswap-onnx`, built by Docker from its Dockerfile as `faas-cli` lays it out. It
runs as OpenFaaS runs functions: user 12000, a read-only root, no capabilities. The network is the machine's, so that this
works where Docker has no bridge."""

import json
import shutil
import urllib.request

import numpy as np
import pytest

from engine import Container, docker, inspect, until_200
from node import ROOT, free_port


@pytest.fixture(scope="module")
def image(sidecar_image, tmp_path_factory):
    """The template's image, around the sidecar's."""
    template = tmp_path_factory.mktemp("build") / "scale"
    shutil.copytree(ROOT / "faas-templates/template/faaswap-onnx", template)
    docker(
        "build", "--network", "host", "--build-arg", f"SIDECAR_IMAGE={sidecar_image}", "--build-arg", "ADDITIONAL_PACKAGE=",
        "--tag", "faaswap-test/scale:latest", template,
    )
    return "faaswap-test/scale:latest"


def infer(port, rows):
    x = np.random.default_rng(rows).standard_normal((rows, 4), np.float32)
    head = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, 4], "parameters": {"binary_data_size": x.nbytes}}],
        "parameters": {"binary_data_output": True},
    }
    head = json.dumps(head).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v2/models/scale/infer", head + x.tobytes())
    request.add_header("Inference-Header-Content-Length", str(len(head)))
    with urllib.request.urlopen(request, timeout=60) as reply:
        body = reply.read()
        answer = body[int(reply.headers["Inference-Header-Content-Length"]):]
    scores = np.frombuffer(answer, np.float32).reshape(rows, 3)
    w = np.add.outer(np.arange(4), np.arange(3)).astype(np.float32)
    np.testing.assert_allclose(scores, x @ w + np.arange(3, dtype=np.float32), rtol=1e-4, atol=1e-4)


def test_a_function_answers_from_a_container_that_may_do_nothing(image, broker):
    port = free_port()
    function = Container(
        "function", "--read-only", "--tmpfs", "/tmp", "--user", "12000", "--cap-drop", "ALL",
        "--security-opt", "no-new-privileges", "--volume", f"{broker}:/run/faaswap:ro",
        "--env", f"port={port}", "--env", "OPENFAAS_NAME=scale", "--env", "FAASWAP_LISTEN=127.0.0.1:0",
        "--env", "FAASWAP_METRICS_LISTEN=off", "--env", "healthcheck_interval=0", image,
    )
    try:
        until_200(f"http://127.0.0.1:{port}/_/ready", function.logs)
        for rows in (1, 2, 50_000):
            infer(port, rows)
        # Tensors went through memory that both containers see, not through the socket.
        assert "slab=true" in function.logs(), function.logs()
        assert docker("exec", function.name, "id", "-u").stdout.strip() == "12000"
        assert docker("exec", function.name, "faaswap-sidecar", "--run-healthcheck", check=False).returncode == 0
        docker("stop", "--time", "20", function.name)
        state = inspect(function.name)["State"]
        assert state["ExitCode"] == 0, function.logs()
    finally:
        function.remove()
