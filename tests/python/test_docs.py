"""What the documents tell people to write is what the programs know."""

import re

import pytest
import yaml

from node import ROOT

DOCUMENTS = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", *ROOT.glob("faas-templates/*.md")])
# Labels, resources and namespaces' labels that are not annotations of pods.
OTHERS = {"slot", "metrics"}


def known_annotations():
    source = (ROOT / "sidecar/injector/src/wish.rs").read_text()
    [table] = re.findall(r"const KNOWN: \[&str; \d+\] = \[(.*?)\];", source, re.S)
    return set(re.findall(r'"([a-z0-9-]+)"', table))


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "faas-templates/stack.yaml"], ids=lambda path: path.name)
def test_annotations_in_documents_exist(path):
    used = set(re.findall(r"faaswap\.dev/([a-z][a-z0-9-]*[a-z0-9])", path.read_text()))
    assert used <= known_annotations() | OTHERS, used - known_annotations() - OTHERS


def test_every_annotation_is_explained():
    text = (ROOT / "docs/kubernetes.md").read_text()
    # `status` is ours; the sidecar's three share a line.
    shown = set(re.findall(r"faaswap\.dev/([a-z][a-z0-9-]*[a-z0-9])", text)) | {"status", "sidecar-cpu", "sidecar-memory"}
    assert known_annotations() <= shown, known_annotations() - shown


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_yaml_in_documents_can_be_read_and_its_annotations_are_texts(path):
    for block in re.findall(r"```yaml\n(.*?)```", path.read_text(), re.S):
        document = yaml.safe_load(block)
        metadata = document.get("spec", {}).get("template", document).get("metadata", {})
        values = [*metadata.get("annotations", {}).values(), *metadata.get("labels", {}).values()]
        assert all(isinstance(value, str) for value in values), block


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_in_documents_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link
