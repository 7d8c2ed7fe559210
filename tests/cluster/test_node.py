"""Functions on a real node: the scheduler places them by slots, the kubelet hands them the broker, and they infer."""

import base64
import hashlib
import http.server
import json
import threading
import urllib.request

import numpy as np
import pytest

import models
from cluster import ADDRESS, until
from conftest import MODELS, SLOT, SYSTEM, slots
from pods import annotated, deployment, pod, service, with_volume


def pods_of(cluster, namespace, name):
    return cluster.get("pods", "-n", namespace, "-l", f"app.kubernetes.io/name={name}")["items"]


def broker_pod(cluster):
    [one] = [one for one in pods_of(cluster, SYSTEM, "gpu-broker") if not one["metadata"].get("deletionTimestamp")]
    return one


def ready(cluster, namespace, name):
    conditions = cluster.get("pod", name, "-n", namespace)["status"].get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def infer(address, model="linear", rows=3, headers=None):
    """Over HTTP, compared with what numpy says."""
    x = np.random.default_rng(rows).standard_normal((rows, models.INPUTS), np.float32)
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}]}
    request = urllib.request.Request(f"http://{address}/v2/models/{model}/infer", json.dumps(body).encode(), headers or {})
    with urllib.request.urlopen(request, timeout=30) as reply:
        outputs = {one["name"]: one["data"] for one in json.load(reply)["outputs"]}
    scores, best = models.linear_answer(x)
    np.testing.assert_allclose(np.reshape(outputs["scores"], scores.shape), scores, rtol=1e-4, atol=1e-4)
    assert outputs["best"] == best.tolist()
    return True


@pytest.fixture()
def function(installed, namespace):
    """A Deployment and its Service, as docs/kubernetes.md has one."""
    annotations = annotated(model="linear.onnx", model_name="linear", slo_ms="20000")
    installed.kubectl("apply", "-n", namespace, "--warnings-as-errors", "-f", "-", given=[deployment("ocr", annotations), service("ocr")])
    installed.kubectl("rollout", "status", "-n", namespace, "deployment/ocr", "--timeout=150s")
    return installed.get("service", "ocr", "-n", namespace)["spec"]["clusterIP"]


@pytest.mark.pod_security("restricted")
def test_a_function_where_pod_security_is_restricted_infers(installed, namespace, function):
    until("the Service leads to it", lambda: infer(function))
    for rows in (1, 2, 1000):
        infer(function, rows=rows)
    [one] = pods_of(installed, namespace, "ocr")
    name = one["metadata"]["name"]
    shown = installed.kubectl("exec", "-n", namespace, name, "-c", "app", "--", "/function", "env").stdout
    assert "FAASWAP_SIDECAR_URL=http://127.0.0.1:9463" in shown.splitlines()
    # Tensors went through memory that both containers see, not through the socket.
    assert '"slab":true' in installed.kubectl("logs", "-n", namespace, name, "-c", "faaswap-sidecar").stdout


@pytest.mark.pod_security("restricted")
def test_a_function_without_a_slot_infers_by_the_brokers_service(installed, namespace):
    """Over TCP, with the model on a volume of its own."""
    content = base64.b64encode((MODELS / "linear.onnx").read_bytes()).decode()
    model = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "model"}, "binaryData": {"mine.onnx": content}}
    annotations = annotated(model="mine.onnx", model_volume="mine", transport="tcp", model_name="linear", slo_ms="20000")
    ocr = with_volume(deployment("ocr", annotations), "mine", {"configMap": {"name": "model"}})
    installed.kubectl("apply", "-n", namespace, "-f", "-", given=[model, ocr, service("ocr")])
    installed.kubectl("rollout", "status", "-n", namespace, "deployment/ocr", "--timeout=150s")
    until("the Service leads to it", lambda: infer(installed.get("service", "ocr", "-n", namespace)["spec"]["clusterIP"]))
    [one] = pods_of(installed, namespace, "ocr")
    logs = installed.kubectl("logs", "-n", namespace, one["metadata"]["name"], "-c", "faaswap-sidecar").stdout
    assert f'"target":"gpu-broker.{SYSTEM}.svc:9470","slab":false' in logs, logs


@pytest.fixture()
def model_server():
    """Gives the node's model to who knows the word."""
    content = (MODELS / "linear.onnx").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.headers.get("Authorization") == "Bearer a-word"
            self.send_response(200 if known else 403)
            self.send_header("Content-Length", str(len(content) if known else 0))
            self.end_headers()
            self.wfile.write(content if known else b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer((ADDRESS, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://{ADDRESS}:{server.server_port}/m.onnx#sha256={hashlib.sha256(content).hexdigest()}"
    server.shutdown()


@pytest.mark.pod_security("restricted")
def test_a_model_is_fetched_with_a_secret_of_the_namespace(installed, namespace, model_server):
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store"}, "stringData": {"authorization": "Bearer a-word"}}
    annotations = annotated(model=model_server, model_secret="store", model_name="linear", slo_ms="20000")
    installed.kubectl("apply", "-n", namespace, "-f", "-", given=[secret, deployment("ocr", annotations), service("ocr")])
    installed.kubectl("rollout", "status", "-n", namespace, "deployment/ocr", "--timeout=150s")
    until("the Service leads to it", lambda: infer(installed.get("service", "ocr", "-n", namespace)["spec"]["clusterIP"]))


def test_a_pod_with_a_slot_finds_the_broker_and_models(installed, namespace):
    function = pod("mounted", annotated(mode="mount"), {"faaswap.dev/inject": "true"})
    function["spec"]["containers"][0]["env"] = [{"name": "FAASWAP_SIDECAR_URL", "value": "http://127.0.0.1:1"}]
    installed.kubectl("apply", "-n", namespace, "-f", "-", given=function)
    until("it runs", lambda: ready(installed, namespace, "mounted"))

    def inside(*what):
        return installed.kubectl("exec", "-n", namespace, "mounted", "--", "/function", *what).stdout
    variables = dict(line.split("=", 1) for line in inside("env").splitlines())
    assert variables["FAASWAP_BROKER_SOCKET"] == "/run/faaswap/broker.sock" and variables["HOST_IP"] == "10.11.0.1"
    mounts = {line.split()[1]: line.split()[3].split(",") for line in inside("/proc/mounts").splitlines()}
    assert "ro" in mounts["/run/faaswap"] and "ro" in mounts["/models"]
    assert "scores" in inside("/models/linear.onnx")


def test_a_pod_without_a_free_slot_waits(installed, namespace):
    function = pod("greedy", {})
    function["spec"]["containers"][0]["resources"] = {"limits": {SLOT: str(slots(installed) + 1)}}
    installed.kubectl("apply", "-n", namespace, "-f", "-", given=function)
    said = f"Insufficient {SLOT}"
    until("the scheduler says why", lambda: said in installed.kubectl("describe", "-n", namespace, "pod", "greedy").stdout)


def test_a_kubelet_that_restarts_finds_the_slots_again(installed, namespace, function):
    until("the Service leads to it", lambda: infer(function))
    [before], count = pods_of(installed, namespace, "ocr"), slots(installed)

    def registrations():
        logs = installed.kubectl("logs", "-n", SYSTEM, "daemonset/gpu-broker", "-c", "device-plugin").stdout
        return logs.count("registered with the kubelet")
    registered = registrations()
    installed.stop("kubelet")
    infer(function, rows=5)
    installed.start_kubelet()
    until("the device plugin registers again", lambda: registrations() > registered)
    until("the node has its slots", lambda: slots(installed) == count)
    installed.kubectl("scale", "-n", namespace, "deployment/ocr", "--replicas=2")
    installed.kubectl("rollout", "status", "-n", namespace, "deployment/ocr", "--timeout=150s")
    after = {one["metadata"]["name"]: one for one in pods_of(installed, namespace, "ocr")}
    assert len(after) == 2
    kept = after[before["metadata"]["name"]]["status"]
    assert [one["restartCount"] for one in kept["containerStatuses"] + kept["initContainerStatuses"]] == [0, 0]
    infer(function)


def test_functions_go_on_when_the_daemonset_is_rolled(installed, namespace, function):
    until("the Service leads to it", lambda: infer(function))
    [before], old = pods_of(installed, namespace, "ocr"), broker_pod(installed)
    installed.kubectl("rollout", "restart", "-n", SYSTEM, "daemonset/gpu-broker")
    installed.kubectl("rollout", "status", "-n", SYSTEM, "daemonset/gpu-broker", "--timeout=150s")
    assert broker_pod(installed)["metadata"]["uid"] != old["metadata"]["uid"]
    until("it answers by the new broker", lambda: infer(function))
    [after] = pods_of(installed, namespace, "ocr")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    until("the node has its slots", lambda: slots(installed) > 0)
    installed.kubectl("scale", "-n", namespace, "deployment/ocr", "--replicas=2")
    installed.kubectl("rollout", "status", "-n", namespace, "deployment/ocr", "--timeout=150s")


def test_a_broker_that_is_gone_makes_slots_unhealthy(installed, namespace):
    """Without its DaemonSet the node gives no slot; with it, the same number again."""
    count = slots(installed)
    selector = {"spec": {"template": {"spec": {"nodeSelector": {"faaswap.test/nowhere": "true"}}}}}
    installed.kubectl("patch", "-n", SYSTEM, "daemonset/gpu-broker", "-p", json.dumps(selector))
    until("there are none", lambda: slots(installed) == 0)
    installed.kubectl("rollout", "undo", "-n", SYSTEM, "daemonset/gpu-broker")
    until("they are back", lambda: slots(installed) == count)


def test_a_function_ends_when_it_is_asked_to(installed, namespace, function):
    [one] = pods_of(installed, namespace, "ocr")
    installed.kubectl("delete", "deployment", "ocr", "-n", namespace)
    until("it is gone", lambda: not pods_of(installed, namespace, "ocr"))
    assert one["spec"]["terminationGracePeriodSeconds"] == 5


@pytest.mark.pod_security("restricted")
def test_many_functions_of_one_node_answer(installed, namespace):
    names = [f"f{n}" for n in range(4)]
    for name in names:
        annotations = annotated(model="linear.onnx", model_name="linear", slo_ms="20000")
        installed.kubectl("apply", "-n", namespace, "-f", "-", given=[deployment(name, annotations), service(name)])
    for name in names:
        installed.kubectl("rollout", "status", "-n", namespace, f"deployment/{name}", "--timeout=150s")
        address = installed.get("service", name, "-n", namespace)["spec"]["clusterIP"]
        until(f"{name} answers", lambda address=address: infer(address))
