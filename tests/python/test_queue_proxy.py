"""A front behind Knative's own queue-proxy: probes, both protocols, its limit, its timeout, and how it drains.

`make fetch-queue-proxy` installs the real one where Go is; else all of this is skipped. Its admin and metrics ports are
fixed, so it is skipped too where somebody has them."""

import concurrent.futures
import os
import pathlib
import signal
import socket
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton

import models
from node import ROOT, Node, Process, free_port, program

QUEUE = pathlib.Path(os.environ.get("FAASWAP_QUEUE_PROXY", ROOT / ".cache/go/bin/queue"))
FIXED_PORTS = (8022, 9090)
CONCURRENCY = 2
# Ten times the concurrency wait behind it.
QUEUED = 10 * CONCURRENCY
TIMEOUT_S = 4
POLL_S = 0.1

pytestmark = pytest.mark.skipif(not QUEUE.is_file(), reason=f"SKIPPED: Knative's queue-proxy is not at {QUEUE}")


def is_free(port):
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


class Pod:
    """A front with its handler, and queue-proxy before it."""

    def __init__(self, node, folder):
        self.port, front, handler = free_port(), free_port(), free_port()
        script = ROOT / "sidecar/tests/support/handler.py"
        env = {
            "TMPDIR": str(folder),
            "port": str(front),
            "fprocess": f"python3 {script} {handler}",
            "upstream_url": f"http://127.0.0.1:{handler}",
            "K_SERVICE": "linear",
            "FAASWAP_MODEL": str(models.linear(folder / "linear.onnx")),
            "FAASWAP_BROKER_SOCKET": f"{node.folder}/broker.sock",
            "FAASWAP_LISTEN": "127.0.0.1:0",
            "FAASWAP_METRICS_LISTEN": "off",
            "healthcheck_interval": "100ms",
        }
        self.front = Process("front", [program("faaswap-sidecar")], folder, env)
        probe = f'{{"httpGet": {{"path": "/_/ready", "port": {front}, "host": "127.0.0.1"}}, "successThreshold": 1}}'
        env = {
            "CONTAINER_CONCURRENCY": str(CONCURRENCY),
            # As docs/knative.md tells people: without it some replies to large bodies break off.
            "ENABLE_HTTP_FULL_DUPLEX": "true",
            "QUEUE_SERVING_PORT": str(self.port),
            "QUEUE_SERVING_TLS_PORT": str(free_port()),
            "USER_PORT": str(front),
            "REVISION_TIMEOUT_SECONDS": str(TIMEOUT_S),
            "REVISION_RESPONSE_START_TIMEOUT_SECONDS": str(TIMEOUT_S),
            "SERVING_READINESS_PROBE": probe,
            "SERVING_LOGGING_CONFIG": "",
            "SERVING_LOGGING_LEVEL": "info",
            "SERVING_NAMESPACE": "default",
            "SERVING_CONFIGURATION": "linear",
            "SERVING_REVISION": "linear-00001",
            "SERVING_POD": "linear-00001-x",
            "SERVING_POD_IP": "127.0.0.1",
        }
        self.queue = Process("queue-proxy", [QUEUE], folder, env)
        self.url = f"http://127.0.0.1:{self.port}"

    def get(self, path, headers=None):
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers or {}), timeout=60) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as reply:
            return reply.code, reply.read()

    def probe(self):
        return self.get("/", {"K-Network-Probe": "queue"})[0]

    def until(self, what):
        for _ in range(600):
            try:
                if what():
                    return
            except OSError:
                pass
            assert self.queue.child.poll() is None, self.queue.log.read_text()
            time.sleep(POLL_S)
        raise AssertionError(self.queue.log.read_text() + self.front.log.read_text())

    def end(self):
        self.queue.end()
        self.front.end()


@pytest.fixture()
def pod(tmp_path):
    taken = [port for port in FIXED_PORTS if not is_free(port)]
    if taken:
        pytest.skip(f"SKIPPED: queue-proxy's fixed ports {taken} are taken on this machine")
    node = Node({})
    pod = Pod(node, tmp_path)
    try:
        pod.until(lambda: pod.probe() == 200)
        yield pod
    finally:
        pod.end()
        node.end()


def x(rows):
    return np.random.default_rng(rows).standard_normal((rows, models.INPUTS), np.float32)


def test_a_function_lives_behind_queue_proxy(pod):
    # Large ones too: queue-proxy keeps Content-Length and streams.
    client = triton.InferenceServerClient(f"127.0.0.1:{pod.port}")
    for rows in (1, 20_000):
        tensor = triton.InferInput("x", [rows, models.INPUTS], "FP32")
        tensor.set_data_from_numpy(x(rows))
        scores = client.infer("linear", [tensor]).as_numpy("scores")
        np.testing.assert_allclose(scores, models.linear_answer(x(rows))[0], rtol=1e-4, atol=1e-4)

    # gRPC comes as cleartext HTTP/2, on the one port that a Service has.
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{pod.port}") as client:
        tensor = triton_grpc.InferInput("x", [3, models.INPUTS], "FP32")
        tensor.set_data_from_numpy(x(3))
        scores = client.infer("linear", [tensor]).as_numpy("scores")
        np.testing.assert_allclose(scores, models.linear_answer(x(3))[0], rtol=1e-4, atol=1e-4)

    # The handler is reached, and queue-proxy's own limits are what clients meet first.
    assert pod.get("/hello")[0] == 200
    assert pod.get("/slow/30")[0] == 504
    too_many = CONCURRENCY + QUEUED + 3
    with concurrent.futures.ThreadPoolExecutor(too_many) as clients:
        answers = [status for status, _ in clients.map(lambda _: pod.get("/slow/1"), range(too_many))]
    assert answers.count(503) >= 3, answers

    # It drains: not ready, but requests are served; then the front is told, and ends well.
    pod.queue.child.send_signal(signal.SIGTERM)
    pod.until(lambda: pod.get("/", {"User-Agent": "kube-probe/1.36"})[0] == 503)
    assert pod.get("/last")[0] == 200
    pod.front.child.terminate()
    assert pod.front.child.wait(timeout=60) == 0
