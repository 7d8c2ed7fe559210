"""Broker and function in containers of their own: one socket, one slab, nothing else in common. `make test-containers`.

The function is an image of the template `faaswap-onnx`, built by Docker from its Dockerfile as `faas-cli` lays it out. It
runs as OpenFaaS runs functions: user 12000, a read-only root, no capabilities. The network is the machine's, so that this
works where Docker has no bridge."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/python"))
from node import free_port, onnxruntime  # noqa: E402

SIDECAR_IMAGE = "faaswap/sidecar:test"
READY_WITHIN_S = 90
POLL_S = 0.1


def docker(*arguments, check=True, **more):
    command = ["docker", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **more)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done


def engine():
    if not shutil.which("docker"):
        return "SKIPPED: Docker is not installed"
    if docker("version", check=False).returncode != 0:
        return "SKIPPED: no Docker engine answers"
    base = subprocess.run([ROOT / "tests/tools/base-image"], capture_output=True, text=True, timeout=600)
    return base.stderr.strip() or "SKIPPED: no base image" if base.returncode else None


@pytest.fixture(scope="module", autouse=True)
def with_engine():
    why_not = engine()
    if why_not:
        pytest.skip(why_not)


def programs():
    return pathlib.Path(os.environ["FAASWAP_STATIC_DIR"]), pathlib.Path(os.environ["FAASWAP_BIN_DIR"])


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The template's image, around an image with the static sidecar alone, as images/sidecar.Dockerfile makes one."""
    static, _ = programs()
    context = tmp_path_factory.mktemp("sidecar")
    shutil.copy(static / "faaswap-sidecar", context)
    (context / "ca-certificates.crt").write_text("# The real image has Mozilla's; nothing is fetched over https here.\n")
    (context / "Dockerfile").write_text(
        "FROM scratch\nCOPY faaswap-sidecar /faaswap-sidecar\n"
        "COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt\nUSER 65532:65532\nENTRYPOINT [\"/faaswap-sidecar\"]\n"
    )
    docker("build", "--network", "host", "--tag", SIDECAR_IMAGE, context)
    template = tmp_path_factory.mktemp("build") / "scale"
    shutil.copytree(ROOT / "faas-templates/template/faaswap-onnx", template)
    docker(
        "build", "--network", "host", "--build-arg", f"SIDECAR_IMAGE={SIDECAR_IMAGE}", "--build-arg", "ADDITIONAL_PACKAGE=",
        "--tag", "faaswap-test/scale:latest", template,
    )
    return "faaswap-test/scale:latest"


class Container:
    def __init__(self, name, *arguments):
        self.name = f"faaswap-test-{name}-{os.getpid()}"
        docker("run", "--detach", "--name", self.name, "--network", "host", *arguments)

    def logs(self):
        done = docker("logs", self.name, check=False)
        return done.stdout + done.stderr

    def remove(self):
        docker("rm", "--force", self.name, check=False)


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as reply:
        return reply.code, reply.read()
    except OSError:
        return 0, b""


def until_200(url, container):
    until = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < until:
        if get(url)[0] == 200:
            return
        time.sleep(POLL_S)
    raise AssertionError(f"{url}: {get(url)}\n{container.logs()}")


@pytest.fixture()
def broker(tmp_path):
    _, built = programs()
    admin = free_port()
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "faaswap.toml").write_text(f"""
socket = "/run/faaswap/broker.sock"
socket_mode = "0666"
store_dir = "/tmp/store"
memory_dir = "/dev/shm/faaswap"
host_memory = "64MiB"
admin_listen = "127.0.0.1:{admin}"
onnxruntime = "/ort/{onnxruntime().name}"
[[device]]
name = "host0"
memory = "16MiB"
chunk = "256KiB"
""")
    container = Container(
        "broker", "--read-only", "--tmpfs", "/tmp", "--shm-size", "128m", "--cap-drop", "ALL",
        "--volume", f"{run}:/run/faaswap", "--volume", f"{tmp_path}/faaswap.toml:/etc/faaswap.toml:ro",
        "--volume", f"{built}/faaswap-broker:/usr/bin/faaswap-broker:ro", "--volume", f"{onnxruntime().parent}:/ort:ro",
        "debian:12-slim", "/usr/bin/faaswap-broker", "serve", "--config", "/etc/faaswap.toml",
    )
    try:
        until_200(f"http://127.0.0.1:{admin}/readyz", container)
        yield run
    finally:
        container.remove()


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
        until_200(f"http://127.0.0.1:{port}/_/ready", function)
        for rows in (1, 2, 50_000):
            infer(port, rows)
        # Tensors went through memory that both containers see, not through the socket.
        assert "slab=true" in function.logs(), function.logs()
        assert docker("exec", function.name, "id", "-u").stdout.strip() == "12000"
        assert docker("exec", function.name, "faaswap-sidecar", "--run-healthcheck", check=False).returncode == 0
        docker("stop", "--time", "20", function.name)
        state = json.loads(docker("inspect", function.name).stdout)[0]["State"]
        assert state["ExitCode"] == 0, function.logs()
    finally:
        function.remove()
