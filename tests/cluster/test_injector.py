"""The injector as the manifests run it: a real API server asks it, and its role is enforced."""

import base64
import json
import time

import pytest

from cluster import until
from conftest import ROOT, SYSTEM, webhook
from pods import annotated, deployment, pod

AUTHORITY = "faaswap-injector-authority"


def made(cluster, namespace, function):
    """The pod as the API server would store it."""
    done = cluster.kubectl("create", "-n", namespace, "--dry-run=server", "-o", "json", "-f", "-", given=function)
    return json.loads(done.stdout)


def sidecars(pod):
    return [one for one in pod["spec"].get("initContainers", []) if one["name"] == "faaswap-sidecar"]


def authorities(cluster):
    bundle = webhook(cluster)["clientConfig"].get("caBundle", "")
    return base64.b64decode(bundle).decode().count("BEGIN CERTIFICATE")


def test_an_annotated_pod_gets_its_sidecar_and_others_do_not(installed, namespace):
    [sidecar] = sidecars(made(installed, namespace, pod("asks", annotated(model="linear.onnx", slo_ms="200"))))
    assert sidecar["restartPolicy"] == "Always" and sidecar["image"] == "faaswap/sidecar:0.1.0"
    variables = {one["name"]: one.get("value") for one in sidecar["env"]}
    assert variables["FAASWAP_MODEL"] == "/models/linear.onnx" and variables["FAASWAP_SLO_MS"] == "200"
    assert sidecar["resources"]["limits"]["faaswap.dev/slot"] == "1"
    assert not sidecars(made(installed, namespace, pod("asks-not", {})))
    assert not sidecars(made(installed, namespace, pod("declines", annotated(model="linear.onnx", inject="false"))))
    labelled = pod("by-label", annotated(mode="mount"), {"faaswap.dev/inject": "true"})
    [app] = made(installed, namespace, labelled)["spec"]["containers"]
    assert app["resources"]["limits"]["faaswap.dev/slot"] == "1"


def test_mistakes_are_told_by_the_api_server(installed, namespace):
    done = installed.kubectl(
        "create", "-n", namespace, "-f", "-", check=False,
        given=pod("wrong", annotated(model="../secret", slo_ms="soon", colour="red")),
    )
    assert done.returncode != 0
    assert 'admission webhook "inject.faaswap.dev" denied the request' in done.stderr, done.stderr
    for told in (
        "annotation faaswap.dev/model: '../secret' is not allowed",
        "annotation faaswap.dev/slo-ms: 'soon' is not allowed; allowed: whole milliseconds",
        "annotation faaswap.dev/colour: 'red' means nothing",
    ):
        assert told in done.stderr, done.stderr


def test_mistakes_of_a_deployment_are_told_by_its_replica_set(installed, namespace):
    installed.kubectl("apply", "-n", namespace, "-f", "-", given=deployment("wrong", annotated(model="linear.onnx", priority="high")))
    told = "annotation faaswap.dev/priority: 'high' is not allowed; allowed: latency, batch"
    until("describe shows it", lambda: told in installed.kubectl("describe", "-n", namespace, "replicaset").stdout)


def test_the_injector_may_do_what_it_must_and_no_more(installed):
    token = installed.kubectl("create", "token", "-n", SYSTEM, "faaswap-injector").stdout.strip()
    config = installed.folder / "injector.kubeconfig"
    config.write_text(installed.configs["admin"].read_text().replace("token-of-admin", token))

    def may(*arguments, given=None):
        done = installed.kubectl(*arguments, given=given, config=config, check=False)
        assert done.returncode == 0 or "Forbidden" in done.stderr or "forbidden" in done.stderr, done.stderr
        return done.returncode == 0

    assert may("get", "secret", AUTHORITY, "-n", SYSTEM)
    assert may("get", "mutatingwebhookconfiguration", "faaswap-sidecar-injector")
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "other", "namespace": SYSTEM}}
    installed.kubectl("apply", "-f", "-", given=secret)
    for refused in (
        ("get", "secret", "other", "-n", SYSTEM), ("get", "secrets", "-n", SYSTEM), ("get", "secrets", "-n", "default"),
        ("delete", "secret", AUTHORITY, "-n", SYSTEM), ("get", "pods", "-A"), ("get", "mutatingwebhookconfigurations"),
        ("delete", "mutatingwebhookconfiguration", "faaswap-sidecar-injector"), ("get", "nodes"),
    ):
        assert not may(*refused), refused


def test_an_authority_that_ends_is_followed_and_reviews_go_on(installed, namespace):
    secret = installed.get("secret", AUTHORITY, "-n", SYSTEM)["data"]
    was, trusted = secret["tls.crt"], authorities(installed)
    # As it will be in 240 days; the injector looks when it starts, and then every hour.
    soon = base64.b64encode(str(int(time.time()) + 3600).encode()).decode()
    installed.kubectl("patch", "secret", AUTHORITY, "-n", SYSTEM, "-p", json.dumps({"data": {"ends": soon}}))
    installed.kubectl("rollout", "restart", "-n", SYSTEM, "deployment/faaswap-injector")
    function = pod("meanwhile", annotated(model="linear.onnx"))
    reviewed = 0
    while True:
        assert sidecars(made(installed, namespace, function)), "a review failed while replicas were exchanged"
        reviewed += 1
        done = installed.kubectl("rollout", "status", "-n", SYSTEM, "deployment/faaswap-injector", "--watch=false")
        if "successfully rolled out" in done.stdout:
            break
    secret = installed.get("secret", AUTHORITY, "-n", SYSTEM)["data"]
    assert secret["tls.crt"] != was and secret["previous.crt"] == was
    assert (trusted, authorities(installed)) == (1, 2) and reviewed > 1
    assert sidecars(made(installed, namespace, function))


def test_a_bundle_that_is_lost_is_written_again(installed, namespace):
    """Whoever applies the manifests anew with server-side apply, or restores a copy, may take caBundle away."""
    patch = [{"op": "remove", "path": "/webhooks/0/clientConfig/caBundle"}]
    installed.kubectl("patch", "mutatingwebhookconfiguration", "faaswap-sidecar-injector", "--type=json", "-p", json.dumps(patch))
    installed.kubectl("rollout", "restart", "-n", SYSTEM, "deployment/faaswap-injector")
    until("it is there", lambda: authorities(installed))
    until("reviews are answered", lambda: sidecars(made(installed, namespace, pod("again", annotated(model="linear.onnx")))))
    installed.kubectl("rollout", "status", "-n", SYSTEM, "deployment/faaswap-injector", "--timeout=150s")


def test_applying_the_manifests_again_leaves_the_bundle(installed):
    before = authorities(installed)
    for how in ("--server-side=false", "--server-side"):
        more = ["--force-conflicts"] if how == "--server-side" else []
        installed.kubectl("apply", how, *more, "-k", ROOT / "manifests/overlays/cpu-only")
        assert authorities(installed) == before, how


def test_deployments_go_on_while_the_injector_is_away(installed, namespace):
    installed.kubectl("scale", "-n", SYSTEM, "deployment/faaswap-injector", "--replicas=0")
    try:
        function = pod("alone", annotated(model="linear.onnx"))
        until("pods are made without it", lambda: not sidecars(made(installed, namespace, function)))
    finally:
        installed.kubectl("scale", "-n", SYSTEM, "deployment/faaswap-injector", "--replicas=2")
        installed.kubectl("rollout", "status", "-n", SYSTEM, "deployment/faaswap-injector", "--timeout=150s")
    until("it is back", lambda: sidecars(made(installed, namespace, pod("with", annotated(model="linear.onnx")))))


@pytest.mark.pod_security("restricted")
def test_a_disruption_budget_keeps_one_injector(installed, namespace):
    until("both are counted", lambda: installed.get("pdb", "faaswap-injector", "-n", SYSTEM)["status"]["disruptionsAllowed"] == 1)
