"""Manifests, patched pods, Dockerfiles: rendered as committed, and valid to the letter of Kubernetes' own schemas."""

import json
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml

from node import ROOT, program

# The schema that patched pods and manifests are held against; unknown fields are errors.
KUBERNETES = "1.36"
# Python 3.11 and later.
tomllib = pytest.importorskip("tomllib", reason="SKIPPED: this Python has no tomllib")
RENDERED = sorted((ROOT / "manifests/rendered").glob("*.yaml"))
GOLDEN = ROOT / "sidecar/injector/tests/golden"
DOCKERFILES = sorted([*ROOT.glob("images/*.Dockerfile"), *ROOT.glob("faas-templates/template/*/Dockerfile")])


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def by_kind(path, kind):
    return [document for document in documents(path) if document["kind"] == kind]


def validate(document):
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_what_is_rendered_is_what_is_committed():
    done = subprocess.run([ROOT / "manifests/render", "--check"], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_overlay_is_rendered():
    overlays = {folder.name for folder in (ROOT / "manifests/overlays").iterdir()}
    assert {path.stem for path in RENDERED} == overlays | {"base"}


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.stem)
def test_rendered_manifests_are_valid(path):
    for document in documents(path):
        validate(document)
        # An unquoted y or true is a truth value, which the API server refuses.
        metadata = document["metadata"]
        for kind in ("labels", "annotations"):
            assert all(isinstance(value, str) for value in metadata.get(kind, {}).values()), metadata


@pytest.mark.parametrize("platform", ["openfaas", "knative", "deployment", "kserve", "fetched"])
def test_patched_pods_are_valid(platform):
    pod = json.loads((GOLDEN / f"{platform}.pod.json").read_text())
    # The API server makes the name; the schema wants one.
    validate({**pod, "metadata": {**pod["metadata"], "name": "x"}})


def test_the_validator_would_notice():
    pod = json.loads((GOLDEN / "knative.pod.json").read_text())
    pod["spec"]["initContainers"][0]["restartPolicies"] = "Always"
    with pytest.raises(Exception, match="restartPolicies"):
        validate(pod)


def test_overlays_do_what_they_are_for():
    rendered = {path.stem: path for path in RENDERED}
    assert by_kind(rendered["no-webhook"], "MutatingWebhookConfiguration") == []
    assert {d["kind"] for d in documents(rendered["no-webhook"])} == {
        "Namespace", "DaemonSet", "Service", "NetworkPolicy", "ConfigMap",
    }
    [cpu] = by_kind(rendered["cpu-only"], "DaemonSet")
    spec = cpu["spec"]["template"]["spec"]
    assert "nodeSelector" not in spec and "nvidia.com/gpu" not in spec["containers"][0]["resources"]["limits"]
    [hook] = by_kind(rendered["openfaas"], "MutatingWebhookConfiguration")
    assert hook["webhooks"][0]["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "openfaas-fn"}}


def test_names_that_must_agree_do(tmp_path):
    """What the injector, its role, its Service and its webhook call each other by."""
    base = ROOT / "manifests/rendered/base.yaml"
    [hook] = by_kind(base, "MutatingWebhookConfiguration")
    [cluster_role] = by_kind(base, "ClusterRole")
    [role] = by_kind(base, "Role")
    usage = subprocess.run([program("faaswap-injector"), "--help"], capture_output=True, text=True).stdout
    for name in (hook["metadata"]["name"], hook["webhooks"][0]["clientConfig"]["service"]["name"], role["rules"][0]["resourceNames"][0]):
        assert f"[default: {name}]" in usage, usage
    assert cluster_role["rules"][0]["resourceNames"] == [hook["metadata"]["name"]]
    [injector] = by_kind(base, "Deployment")
    for variable in injector["spec"]["template"]["spec"]["containers"][0]["env"]:
        assert f"[env: {variable['name']}=" in usage, variable


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.stem)
def test_the_broker_takes_its_configuration(path, tmp_path):
    [config] = [document for document in by_kind(path, "ConfigMap")]
    settings = tomllib.loads(config["data"]["faaswap.toml"])
    [broker] = by_kind(path, "DaemonSet")
    env = {one["name"]: one["value"] for one in broker["spec"]["template"]["spec"]["containers"][0].get("env", [])}
    # That its files and folders are where the image has them is not for this machine to say.
    library = tmp_path / "libonnxruntime.so"
    library.touch()
    env |= {
        "FAASWAP_ONNXRUNTIME": str(library),
        "FAASWAP_STORE_DIR": str(tmp_path / "store"),
        "FAASWAP_MEMORY_DIR": str(tmp_path / "memory"),
        "FAASWAP_SOCKET": str(tmp_path / "broker.sock"),
    }
    file = tmp_path / "faaswap.toml"
    file.write_text(config["data"]["faaswap.toml"])
    check = subprocess.run([program("faaswap-broker"), "serve", "--check", "--config", file], env=env, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
    assert settings["socket"] == "/run/faaswap/broker.sock" and settings["socket_mode"] == "0666"
    # A device that is listed is all that there is: GPUs that the pod is given would not be used.
    assert "device" not in settings and settings["devices"] == "gpu"
    assert env.get("FAASWAP_DEVICES") == ("host" if path.stem == "cpu-only" else None)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_dockerfiles_are_clean(path):
    hadolint = shutil.which("hadolint", path=f"{ROOT}/.cache/venv/bin")
    if not hadolint:
        pytest.skip("SKIPPED: hadolint is not installed for this machine")
    done = subprocess.run([hadolint, "--config", ROOT / "images/hadolint.yaml", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
