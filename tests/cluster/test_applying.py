"""Every rendering applies on a real API server, and namespaces accept what the docs say that they accept."""

import pathlib
import re

import pytest
import yaml

from pods import annotated, pod

ROOT = pathlib.Path(__file__).resolve().parents[2]
RENDERED = sorted((ROOT / "manifests/rendered").glob("*.yaml"))
# Kinds of others, whose definitions are not here.
FOREIGN = ("serving.knative.dev/", "serving.kserve.io/", "openfaas.com/")


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.stem)
def test_renderings_apply_without_a_warning(cluster, path):
    documents = list(yaml.safe_load_all(path.read_text()))
    [namespace] = [one for one in documents if one["kind"] == "Namespace"]
    # What has a namespace is checked only where the namespace is there, so it is made, and all else only tried.
    cluster.kubectl("apply", "--server-side", "--warnings-as-errors", "-f", "-", given=namespace)
    documents.remove(namespace)
    for how in ("--server-side", "--server-side=false"):
        done = cluster.kubectl("apply", how, "--dry-run=server", "--validate=strict", "--warnings-as-errors", "-f", "-", given=documents)
        assert "Warning" not in done.stderr, done.stderr
        assert len(done.stdout.splitlines()) == len(documents), done.stdout


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.stem)
def test_kubectl_renders_as_kustomize_does(cluster, path):
    folder = ROOT / "manifests" / ("base" if path.stem == "base" else f"overlays/{path.stem}")
    def by_name(text):
        return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text)}
    assert by_name(cluster.kubectl("kustomize", folder).stdout) == by_name(path.read_text())


def examples():
    for page in sorted(ROOT.glob("docs/*.md")):
        for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)):
            for document in yaml.safe_load_all(text):
                if isinstance(document, dict) and {"apiVersion", "kind"} <= document.keys():
                    yield pytest.param(document, id=f"{page.stem}-{number}-{document['kind']}")


@pytest.mark.parametrize("document", examples())
def test_the_docs_examples_apply(cluster, namespace, document):
    if document["apiVersion"].startswith(FOREIGN):
        pytest.skip(f"SKIPPED: {document['apiVersion']} is of a platform, see test_knative.py")
    cluster.kubectl("apply", "-n", namespace, "--dry-run=server", "--validate=strict", "--warnings-as-errors", "-f", "-", given=document)


# What a namespace of each level does with a function that reaches the broker in each way.
ACCEPTS = {"restricted": ("slot", "tcp", "auto"), "baseline": ("slot", "tcp", "auto"), "privileged": ("slot", "tcp", "auto", "uds")}


@pytest.mark.parametrize("level", [pytest.param(level, marks=pytest.mark.pod_security(level)) for level in ACCEPTS])
def test_pod_security_accepts_what_the_docs_say(installed, namespace, level):
    for transport in ("slot", "tcp", "auto", "uds"):
        function = pod(transport, annotated(model="linear.onnx", transport=transport))
        how = ("--dry-run=server", "--warnings-as-errors", "-o", "json")
        done = installed.kubectl("apply", "-n", namespace, *how, "-f", "-", given=function, check=False)
        if transport in ACCEPTS[level]:
            assert done.returncode == 0, done.stderr
            assert '"faaswap-sidecar"' in done.stdout
        else:
            assert f'violates PodSecurity "{level}:latest"' in done.stderr and "hostPath" in done.stderr, done.stderr
