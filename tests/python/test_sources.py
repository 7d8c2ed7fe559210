"""Models on a server, with the real broker: fetched once for a node, over connections that break, and never by a second pod."""

import hashlib
import http.server
import re
import threading

import numpy as np
import pytest
import tritonclient.http as triton
from onnx import TensorProto, helper, numpy_helper

from node import ROOT, Node
from test_templates import SCORES, TEMPLATES, X, Function

# After so many bytes the server's first answer to each path breaks off.
BREAKS_AFTER = 100


class Files(http.server.ThreadingHTTPServer):
    """Serves files by path, with ranges; notes what was asked."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = files, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, path):
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def count(self):
        return len(self.asked)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.split("?")[0]
        is_first = path not in [asked for asked, _ in self.server.asked]
        self.server.asked.append((path, self.headers.get("Range")))
        if path not in self.server.files:
            return self.send_error(404)
        body = self.server.files[path]
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        start = 0
        if self.headers.get("Range") and self.headers.get("If-Range") == tag:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if is_first:
            self.wfile.write(body[:BREAKS_AFTER])
            self.close_connection = True
            return
        self.wfile.write(body[start:])

    def log_message(self, *_):
        pass


def sha256(*bodies):
    return hashlib.sha256(*bodies).hexdigest()


def split_model():
    """A model whose weights lie in a second file."""
    rng = np.random.default_rng(5)
    weights = rng.normal(size=(4, 3)).astype(np.float32)
    raw = weights.tobytes()
    w = numpy_helper.from_array(weights, "w")
    w.ClearField("raw_data")
    w.data_location = TensorProto.EXTERNAL
    for key, value in [("location", "w.bin"), ("offset", "0"), ("length", str(len(raw)))]:
        w.external_data.add(key=key, value=value)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["scores"])], "g", [x], [y], [w])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString(), raw, X @ weights


@pytest.fixture()
def broker():
    node = Node({})
    yield node
    node.end()


def scores(function):
    client = triton.InferenceServerClient(f"127.0.0.1:{function.port}")
    x = triton.InferInput("x", X.shape, "FP32")
    x.set_data_from_numpy(X)
    return client.infer("faaswap-onnx", [x]).as_numpy("scores")


def test_a_second_pod_of_the_same_digest_fetches_nothing(broker, tmp_path):
    model = (TEMPLATES / "faaswap-onnx/function/model.onnx").read_bytes()
    files = Files({"/m.onnx": model})
    more = {"FAASWAP_MODEL": files.url(f"/m.onnx?sig=s3cret#sha256={sha256(model)}"), "FAASWAP_MODEL_AUTH": "Bearer s3cret"}
    first = Function(broker, tmp_path / "a", "faaswap-onnx", more)
    np.testing.assert_array_equal(scores(first), SCORES)
    assert files.asked == [("/m.onnx", None), ("/m.onnx", f"bytes={BREAKS_AFTER}-")]
    second = Function(broker, tmp_path / "b", "faaswap-onnx", more)
    np.testing.assert_array_equal(scores(second), SCORES)
    assert files.count() == 2, "the node has it by its digest"
    logs = first.process.log.read_text() + second.process.log.read_text()
    assert "s3cret" not in logs and "/m.onnx" in logs
    # What was fetched is gone from the pod: the broker has it.
    assert not [path for path in (tmp_path / "a").rglob("*") if path.is_file() and path.parent.name == "faaswap"]
    first.process.end()
    second.process.end()


def test_a_model_of_two_files_is_fetched_and_pinned_as_one(broker, tmp_path):
    graph, weights, expected = split_model()
    files = Files({"/v1/m.onnx": graph, "/v1/w.bin": weights})
    listed = f"{sha256(graph)}  m.onnx\n{sha256(weights)}  w.bin\n"
    settings = f"""
model = "{files.url('/v1/m.onnx')}"
model_data = ["w.bin"]
model_digest = "sha256:{sha256(listed.encode())}"
"""
    function = Function(broker, tmp_path, "faaswap-onnx", handler={"function.toml": settings})
    np.testing.assert_allclose(scores(function), expected, rtol=1e-5)
    assert [path for path, _ in files.asked][::2] == ["/v1/m.onnx", "/v1/w.bin"]
    function.process.end()


def test_a_broker_that_lost_its_store_has_the_model_fetched_again(broker, tmp_path):
    model = (TEMPLATES / "faaswap-onnx/function/model.onnx").read_bytes()
    files = Files({"/m.onnx": model})
    more = {"FAASWAP_MODEL": files.url(f"/m.onnx#sha256={sha256(model)}")}
    function = Function(broker, tmp_path, "faaswap-onnx", more)
    fetched = files.count()
    broker.restart(forgets=True)
    function.process.wait_ready(function.url + "/_/ready")
    np.testing.assert_array_equal(scores(function), SCORES)
    assert files.count() == fetched + 1
    function.process.end()


def test_the_documents_digest_of_several_files_is_the_brokers(tmp_path):
    import subprocess

    (tmp_path / "model.onnx").write_bytes(b"graph")
    (tmp_path / "a.bin").write_bytes(b"a")
    [command] = re.findall(r"```\n(sha256sum .*)\n```", (ROOT / "docs/models.md").read_text())
    command = command.replace(" b.bin", "")
    shown = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()[0]
    listed = f"{sha256(b'graph')}  model.onnx\n{sha256(b'a')}  a.bin\n"
    assert shown == sha256(listed.encode())
