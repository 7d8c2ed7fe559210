"""A Service of Knative, as docs/knative.md has it, made by Knative's own controllers. `make fetch-platforms` builds them.

Its gateway alone is not here: as it would, these tests name the revision in headers."""

import json
import re

import pytest
import yaml

from cluster import BIN, until
from conftest import ROOT, SYSTEM
from images import image
from pods import FUNCTION_IMAGE
from test_node import infer

KNATIVE = BIN.parent / "knative"
SERVING = "knative-serving"
PROGRAMS = ("controller", "webhook", "autoscaler", "activator", "queue")
# What the cluster has no use for, or no measure of.
LEFT_OUT = ("webhook-hpa.yaml", "activator-hpa.yaml", "999-cache.yaml")
SETTINGS = {
    # There is no registry to ask which image a tag means.
    "config-deployment": {"registries-skipping-tag-resolving": "index.docker.io", "queue-sidecar-image": "knative/queue:test"},
    "config-autoscaler": {"scale-to-zero-grace-period": "6s", "stable-window": "6s"},
}


def manifests():
    files = [path for path in sorted(KNATIVE.glob("config/**/*.yaml")) if path.name not in LEFT_OUT]
    texts = [re.sub(r"ko://knative.dev/serving/cmd/(\w+)", r"knative/\1:test", path.read_text()) for path in files]
    documents = [one for text in texts for one in yaml.safe_load_all(text) if one]
    for document in documents:
        settings = SETTINGS.get(document["metadata"]["name"], {}) if document["kind"] == "ConfigMap" else {}
        if settings:
            document.setdefault("data", {}).update(settings)
    return documents


@pytest.fixture(scope="module")
def knative(installed):
    if not (KNATIVE / ".version").is_file():
        pytest.skip("SKIPPED: Knative's programs are not here; `make fetch-platforms` builds them")
    for name in PROGRAMS:
        archive, files = installed.folder / f"{name}.tar", {"/it": KNATIVE / "bin" / name}
        installed.ctr("images", "import", image(archive, f"docker.io/knative/{name}:test", ["/it"], files, user="65532:65532"))
    documents = manifests()
    first = [one for one in documents if one["kind"] in ("Namespace", "CustomResourceDefinition")]
    installed.kubectl("apply", "--server-side", "-f", "-", given=first)
    installed.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
    installed.kubectl("apply", "--server-side", "-f", "-", given=[one for one in documents if one not in first])
    installed.kubectl("wait", "-n", SERVING, "--for=condition=Available", "deployment", "--all", "--timeout=170s")
    return installed


def example():
    [text] = re.findall(r"```yaml\n(apiVersion: serving.knative.dev.*?)```", (ROOT / "docs/knative.md").read_text(), re.DOTALL)
    return yaml.safe_load(text)


def pods_of(cluster, namespace):
    return cluster.get("pods", "-n", namespace, "-l", "serving.knative.dev/service=resize")["items"]


def is_ready(cluster, namespace, revision):
    conditions = cluster.get("revision", revision, "-n", namespace)["status"].get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def ask(cluster, namespace, revision):
    address = cluster.get("service", revision, "-n", namespace)["spec"]["clusterIP"]
    return infer(address, headers={"Knative-Serving-Namespace": namespace, "Knative-Serving-Revision": revision})


def test_a_service_infers_goes_to_zero_and_comes_back(knative, namespace):
    service = example()
    # As it stands in the docs, Knative takes it; here it has an image, a model, and no patience.
    knative.kubectl("apply", "-n", namespace, "--dry-run=server", "--validate=strict", "-f", "-", given=service)
    template = service["spec"]["template"]
    template["spec"]["containers"][0]["image"] = FUNCTION_IMAGE
    template["metadata"]["annotations"] |= {
        "faaswap.dev/model": "linear.onnx", "faaswap.dev/model-name": "linear",
        "autoscaling.knative.dev/scale-to-zero-pod-retention-period": "0s",
    }
    knative.kubectl("apply", "-n", namespace, "-f", "-", given=service)
    revision = "resize-00001"
    until("the revision is ready", lambda: is_ready(knative, namespace, revision))
    [pod] = pods_of(knative, namespace)
    [sidecar] = pod["spec"]["initContainers"]
    assert sidecar["name"] == "faaswap-sidecar" and sidecar["restartPolicy"] == "Always"
    containers = {one["name"]: one for one in pod["spec"]["containers"]}
    assert containers.keys() == {"user-container", "queue-proxy"}
    variables = {one["name"]: one.get("value") for one in containers["user-container"]["env"]}
    assert variables["FAASWAP_SIDECAR_URL"] == "http://127.0.0.1:9463"
    until("it infers behind queue-proxy", lambda: ask(knative, namespace, revision))
    until("it goes to zero", lambda: not pods_of(knative, namespace))
    until("it comes back for a request that waits", lambda: ask(knative, namespace, revision))
    assert pods_of(knative, namespace)

    template["metadata"]["annotations"]["faaswap.dev/slo-ms"] = "300"
    knative.kubectl("apply", "-n", namespace, "-f", "-", given=service)
    until("the next revision is ready", lambda: is_ready(knative, namespace, "resize-00002"))
    until("it infers", lambda: ask(knative, namespace, "resize-00002"))
    logs = knative.kubectl("logs", "-n", SYSTEM, "daemonset/gpu-broker", "-c", "broker").stdout
    assert logs.count(f"registered function={namespace}/resize") >= 3, logs


def test_mistakes_of_a_service_are_told_by_its_revision(knative, namespace):
    service = example()
    service["spec"]["template"]["metadata"]["annotations"]["faaswap.dev/priority"] = "high"
    service["spec"]["template"]["spec"]["containers"][0]["image"] = FUNCTION_IMAGE
    knative.kubectl("apply", "-n", namespace, "-f", "-", given=service)
    told = "annotation faaswap.dev/priority: 'high' is not allowed; allowed: latency, batch"

    def said():
        return told in json.dumps(knative.get("revision", "resize-00001", "-n", namespace)["status"])
    until("the revision says it", said)
