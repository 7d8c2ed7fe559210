"""One cluster for the whole session, with FaaSwap in it as docs/kubernetes.md has it. Outside of `make test-cluster` all skip."""

import itertools
import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/python"), str(ROOT / "tests/cluster")]
import models  # noqa: E402
from cluster import BIN, PAUSE, Cluster, say, until  # noqa: E402
from images import image  # noqa: E402
from node import onnxruntime, program  # noqa: E402
from pods import FUNCTION_IMAGE  # noqa: E402

INSIDE = "FAASWAP_CLUSTER_INSIDE" in os.environ
NUMBERS = itertools.count(1)
SLOT = "faaswap.dev/slot"
SYSTEM = "faaswap-system"
# Below this, models lie on the node.
MODELS = pathlib.Path("/var/lib/faaswap/models")


def pytest_configure(config):
    config.addinivalue_line("markers", "pod_security(level): what the test's namespace enforces")


def pytest_collection_modifyitems(items):
    if not INSIDE:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="SKIPPED: not in a cluster's namespaces, which `make test-cluster` makes"))


def make_images(folder):
    """Of what Cargo has built, under the names that manifests have; and a function."""
    def ours(name, tag, entrypoint, files, **more):
        return image(folder / f"{name}.tar", f"docker.io/{tag}", [entrypoint], files, **more)

    library = onnxruntime()
    return [
        image(folder / "pause.tar", PAUSE, ["/pause"], {"/pause": BIN / "pause"}),
        ours("function", FUNCTION_IMAGE, "/function", {"/function": BIN / "function"}, user="65532:65532"),
        *(
            ours(name, f"faaswap/{name}:0.1.0", f"/faaswap-{name}", {f"/faaswap-{name}": program(f"faaswap-{name}")}, user="65532:65532")
            for name in ("sidecar", "injector")
        ),
        ours(
            "broker", "faaswap/broker:0.1.0", "/usr/bin/faaswap-broker", command=["serve"], env=["ORT_DISABLE_TELEMETRY=1"],
            files={"/usr/bin/faaswap-broker": program("faaswap-broker"), "/usr/lib/libonnxruntime.so": library},
        ),
    ]


@pytest.fixture(scope="session")
def cluster():
    cluster = Cluster(os.environ["FAASWAP_CLUSTER_DIR"])
    logs = ROOT / ".cache/cluster/logs"
    try:
        say("images are made")
        images = make_images(cluster.folder)
        cluster.start_control_plane()
        cluster.start_node(images)
        yield cluster
    finally:
        cluster.keep(logs)
        say(f"logs are in {logs.relative_to(ROOT)}")
        cluster.end()


@pytest.fixture(scope="session")
def installed(cluster):
    """With the commands of docs/kubernetes.md, and a model on the node."""
    say("FaaSwap is installed: overlay cpu-only")
    # The namespace may be there from trying what is rendered.
    cluster.kubectl("delete", "namespace", SYSTEM, "--ignore-not-found")
    cluster.kubectl("apply", "--warnings-as-errors", "-k", ROOT / "manifests/overlays/cpu-only")
    cluster.kubectl("-n", SYSTEM, "rollout", "status", "daemonset/gpu-broker", "deployment/faaswap-injector", "--timeout=150s")
    # The rollout ends when the broker is ready; the kubelet hears of slots a moment later.
    until("the node has slots", lambda: slots(cluster) > 0)
    models.linear(MODELS / "linear.onnx")
    until("the webhook is trusted", lambda: webhook(cluster)["clientConfig"].get("caBundle"))
    return cluster


def slots(cluster):
    return int(cluster.get("node", "node1")["status"]["allocatable"].get(SLOT, "0"))


def webhook(cluster):
    return cluster.get("mutatingwebhookconfiguration", "faaswap-sidecar-injector")["webhooks"][0]


@pytest.fixture()
def namespace(request, cluster):
    """A namespace of the test's own, with the Pod Security level that it is marked with."""
    marker = request.node.get_closest_marker("pod_security")
    # Short, since platforms make names of hosts with it.
    words = "".join(c if c.isalnum() else "-" for c in request.node.name.removeprefix("test_")).lower()
    name = f"t{next(NUMBERS)}-{words[:24].strip('-')}"
    labels = {"pod-security.kubernetes.io/enforce": marker.args[0]} if marker else {}
    cluster.kubectl("apply", "-f", "-", given={"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    until("its service account is there", lambda: cluster.get("serviceaccount", "default", "-n", name))
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")
