"""A function's life on one device: it is rolled out beside itself, scales to zero, and comes back to warm weights."""

import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.http as triton

import models
from node import Node, Process, free_port, program


@pytest.fixture(scope="module")
def broker():
    node = Node({})
    yield node
    node.end()


class Pod:
    """A pod of the function `ocr` with this model."""

    def __init__(self, node, name, model):
        self.port = free_port()
        folder = node.folder / name
        folder.mkdir()
        env = {
            "FAASWAP_MODE": "watchdog",
            "TMPDIR": str(folder),
            "port": str(self.port),
            "healthcheck_interval": "1s",
            "OPENFAAS_NAME": "ocr",
            "FAASWAP_MODEL": str(model),
            "FAASWAP_BROKER_SOCKET": f"{node.folder}/broker.sock",
            "FAASWAP_LISTEN": "127.0.0.1:0",
            "FAASWAP_METRICS_LISTEN": "off",
            "FAASWAP_SLO_MS": "20000",
        }
        self.process = Process(name, [program("faaswap-sidecar")], folder, env)
        self.process.wait_ready(f"http://127.0.0.1:{self.port}/_/ready")

    def ask(self, x):
        client = triton.InferenceServerClient(f"127.0.0.1:{self.port}")
        tensor = triton.InferInput("x", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        return client.infer("ocr", [tensor]).as_numpy("scores")

    def uploads(self):
        return self.process.log.read_text().count("Uploading")


X = np.ones((2, models.INPUTS), np.float32)


def test_a_rollout_and_a_return_from_zero_need_no_second_device_and_no_second_upload(broker, tmp_path):
    old = models.linear(tmp_path / "old.onnx")
    new = tmp_path / "new.onnx"
    model = models.onnx.load(old)
    weights = model.graph.initializer[0]
    doubled = 2 * models.numpy_helper.to_array(weights)
    weights.CopyFrom(models.numpy_helper.from_array(doubled, weights.name))
    models.onnx.save(model, new)
    old_scores = models.linear_answer(X)[0]
    new_scores = X @ doubled + models.weights()[1]

    first = Pod(broker, "first", old)
    np.testing.assert_allclose(first.ask(X), old_scores, rtol=1e-5, atol=1e-5)
    stop, answered, wrong = threading.Event(), [], []

    def keep_asking():
        while not stop.is_set():
            try:
                np.testing.assert_allclose(first.ask(X), old_scores, rtol=1e-5, atol=1e-5)
                answered.append(1)
            except Exception as error:
                wrong.append(repr(error))
                return

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        # The new revision gets ready while the old one serves, on the one device that there is.
        second = Pod(broker, "second", new)
        np.testing.assert_allclose(second.ask(X), new_scores, rtol=1e-5, atol=1e-5)
        first.process.child.terminate()
        until_unhealthy(first)
        before = len(answered)
        while len(answered) == before and not wrong:
            stop.wait(0.01)
    finally:
        stop.set()
        asking.join()
    assert not wrong and len(answered) > before, "requests are served while routers learn of the end"
    assert first.process.child.wait(timeout=60) == 0
    np.testing.assert_allclose(second.ask(X), new_scores, rtol=1e-5, atol=1e-5)
    assert (first.uploads(), second.uploads()) == (1, 1)

    second.process.child.terminate()
    assert second.process.child.wait(timeout=60) == 0
    third = Pod(broker, "third", new)
    np.testing.assert_allclose(third.ask(X), new_scores, rtol=1e-5, atol=1e-5)
    assert third.uploads() == 0, "the node still has the model"
    third.process.end()


def until_unhealthy(pod):
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{pod.port}/_/health", timeout=10)
        except urllib.error.HTTPError as reply:
            assert reply.code == 503
            return
