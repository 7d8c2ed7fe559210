"""An InferenceService of KServe, made by its own controller and webhook: theirs and ours change the same pods.

`make fetch-platforms` builds KServe. Its storage initializer is Python; here a program of ours stands for it, which fetches too."""

import base64
import functools
import http.server
import json
import subprocess
import threading

import pytest
import yaml

from cluster import ADDRESS, BIN, until
from conftest import MODELS, ROOT
from images import image
from pods import FUNCTION_IMAGE, annotated, pod
from test_node import infer

KSERVE = BIN.parent / "kserve"
HOST = "kserve-webhook-server-service.kserve.svc"
# What asks for another operator, and what watches models on nodes.
LEFT_OUT = ("cert-manager.io", "kserve-localmodel")


def certificate(folder):
    """What cert-manager would make."""
    key, crt = folder / "kserve.key", folder / "kserve.crt"
    names = ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, "-keyout", key, "-out", crt]
    subprocess.run(command, check=True, capture_output=True)
    return [base64.b64encode(path.read_bytes()).decode() for path in (crt, key)]


def manifests(folder):
    crt, key = certificate(folder)
    secret = {"metadata": {"name": "kserve-webhook-server-cert", "namespace": "kserve"}, "data": {"tls.crt": crt, "tls.key": key}}
    documents = [{"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", **secret}]
    for document in yaml.safe_load_all((KSERVE / "config/kserve.yaml").read_text()):
        if not document or any(word in document["apiVersion"] + document["metadata"]["name"] for word in LEFT_OUT):
            continue
        for hook in document.get("webhooks", []):
            hook["clientConfig"]["caBundle"] = crt
        if document["kind"] == "Deployment":
            spec = document["spec"]["template"]["spec"]
            [manager] = [one for one in spec["containers"] if one["name"] == "manager"]
            manager |= {"image": "kserve/manager:test", "imagePullPolicy": "IfNotPresent"}
            manager["resources"]["limits"] = {"memory": "300Mi"}
            spec["containers"] = [manager]
        if document["metadata"]["name"] == "inferenceservice-config":
            initializer = json.loads(document["data"]["storageInitializer"])
            document["data"]["storageInitializer"] = json.dumps(initializer | {"image": FUNCTION_IMAGE, "cpuRequest": "10m"})
        documents.append(document)
    return documents


@pytest.fixture(scope="module")
def kserve(installed):
    if not (KSERVE / ".version").is_file():
        pytest.skip("SKIPPED: KServe's program is not here; `make fetch-platforms` builds it")
    archive, files = installed.folder / "manager.tar", {"/manager": KSERVE / "bin/manager"}
    installed.ctr("images", "import", image(archive, "docker.io/kserve/manager:test", ["/manager"], files, user="65532:65532"))
    documents = manifests(installed.folder)
    first = [one for one in documents if one["kind"] in ("Namespace", "CustomResourceDefinition")]
    # Hooks that nobody answers yet would be in the way.
    last = [one for one in documents if "webhooks" in one]
    installed.kubectl("apply", "--server-side", "-f", "-", given=first)
    installed.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
    installed.kubectl("apply", "--server-side", "-f", "-", given=[one for one in documents if one not in first and one not in last])
    installed.kubectl("wait", "-n", "kserve", "--for=condition=Available", "deployment", "--all", "--timeout=170s")
    installed.kubectl("apply", "--server-side", "-f", "-", given=last)
    # What the overlay kserve differs in.
    rendered = yaml.safe_load_all((ROOT / "manifests/rendered/kserve.yaml").read_text())
    [hooks] = [one for one in rendered if one["kind"] == "MutatingWebhookConfiguration"]
    selector = hooks["webhooks"][0]["objectSelector"]
    patch = [{"op": "add", "path": "/webhooks/0/objectSelector", "value": selector}]
    installed.kubectl("patch", "mutatingwebhookconfiguration", "faaswap-sidecar-injector", "--type=json", "-p", json.dumps(patch))
    yield installed
    patch = [{"op": "replace", "path": "/webhooks/0/objectSelector", "value": {}}]
    installed.kubectl("patch", "mutatingwebhookconfiguration", "faaswap-sidecar-injector", "--type=json", "-p", json.dumps(patch))
    installed.kubectl("delete", "-f", "-", "--wait=false", given=last)


@pytest.fixture()
def model_url(tmp_path):
    (tmp_path / "model.onnx").write_bytes((MODELS / "linear.onnx").read_bytes())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer((ADDRESS, 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://{ADDRESS}:{server.server_port}/model.onnx"
    server.shutdown()


def inference_service(annotations, url):
    more = {"serving.kserve.io/deploymentMode": "RawDeployment", "serving.kserve.io/autoscalerClass": "external"}
    return {
        "apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": {"name": "ocr", "annotations": annotations | more},
        "spec": {"predictor": {"containers": [{
            "name": "kserve-container", "image": FUNCTION_IMAGE, "ports": [{"containerPort": 8080, "protocol": "TCP"}],
            "env": [{"name": "STORAGE_URI", "value": url}],
            "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"cpu": "1", "memory": "64Mi"}},
        }]}},
    }


def test_a_predictor_infers_with_the_model_that_kserve_fetches(kserve, namespace, model_url):
    annotations = annotated(model="model.onnx", model_volume="kserve-provision-location", model_name="linear", slo_ms="20000")
    kserve.kubectl("apply", "-n", namespace, "--validate=strict", "-f", "-", given=inference_service(annotations, model_url))
    until("there is a Deployment", lambda: kserve.get("deployment", "ocr-predictor", "-n", namespace))
    kserve.kubectl("rollout", "status", "-n", namespace, "deployment/ocr-predictor", "--timeout=170s")
    [predictor] = kserve.get("pods", "-n", namespace)["items"]
    # The sidecar starts when the model is there, though our webhook is asked before KServe's.
    assert [one["name"] for one in predictor["spec"]["initContainers"]] == ["storage-initializer", "faaswap-sidecar"]
    address = predictor["status"]["podIP"] + ":8080"
    until("it infers", lambda: infer(address))


def test_pods_of_others_are_not_asked_about(kserve, namespace):
    other = pod("not-kserves", annotated(model="linear.onnx"))
    done = kserve.kubectl("create", "-n", namespace, "--dry-run=server", "-o", "json", "-f", "-", given=other)
    assert "initContainers" not in json.loads(done.stdout)["spec"]
