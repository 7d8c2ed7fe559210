"""The templates through the real faas-cli: pulled from a git repository, made into a function, laid out, generated.

`make fetch-go` installs it where Go and its module can be had; else all of this is skipped."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import threading

import pytest
import yaml

from faas_cli import CLI, TEMPLATES, WHY_NOT, project_in, run, stack_of
from node import ROOT

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.fixture()
def project(tmp_path):
    return project_in(tmp_path)


def test_every_template_is_pulled(project):
    pulled = {folder.name for folder in (project / "template").iterdir() if folder.is_dir()}
    assert pulled >= set(TEMPLATES)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_new_function_is_laid_out_with_its_model(project, template):
    run(CLI, "new", "mine", "--lang", template, "--prefix", "me", cwd=project)
    stack = stack_of(project, "mine")
    run(CLI, "build", "--shrinkwrap", "-f", stack.name, cwd=project)
    context = project / "build/mine"
    original = ROOT / "faas-templates/template" / template
    for path in original.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (context / path.relative_to(original)).read_bytes() == path.read_bytes(), path


def test_the_example_stack_generates_with_its_annotations(project):
    shutil.copy(ROOT / "faas-templates/stack.yaml", project)
    for crd in yaml.safe_load_all(run(CLI, "generate", "-f", "stack.yaml", cwd=project)):
        stack = yaml.safe_load((ROOT / "faas-templates/stack.yaml").read_text())["functions"][crd["spec"]["name"]]
        assert crd["spec"].get("annotations", {}) == stack.get("annotations", {}), json.dumps(crd)


class Gateway(http.server.BaseHTTPRequestHandler):
    """Stands in for OpenFaaS's gateway: notes what is asked of it, and takes every function."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path, json.loads(body or b"null")))
        self.send_response(202)
        self.end_headers()

    do_PUT = do_DELETE = do_POST

    def do_GET(self):
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(handler):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


@pytest.fixture()
def gateway():
    with serving(Gateway) as server:
        server.asked = []
        yield server


def deployed(gateway):
    """What was deployed, by name; a function may be asked for again, as an update and as a new one."""
    return {body["service"]: body for _, path, body in gateway.asked if path.startswith("/system/functions") and body}


def url(server):
    return f"http://127.0.0.1:{server.server_port}"


def test_the_example_stack_is_deployed_with_its_annotations_and_without_a_gpu(project, gateway):
    shutil.copy(ROOT / "faas-templates/stack.yaml", project)
    run(CLI, "deploy", "-f", "stack.yaml", "--gateway", url(gateway), cwd=project)
    wanted = yaml.safe_load((ROOT / "faas-templates/stack.yaml").read_text())["functions"]
    found = deployed(gateway)
    assert set(found) == set(wanted)
    for name, function in wanted.items():
        assert found[name].get("annotations", {}) == function.get("annotations", {}), name
        assert "gpu" not in json.dumps(found[name].get("limits") or {}), name


# Stands in for Docker: notes what it is told, and where it would build from.
DOCKER = """#!/bin/sh
echo "$@" >> "$FAKE_DOCKER_LOG"
for last; do :; done
case "$1" in
  build|buildx) ls "$PWD/Dockerfile" "$last" >> "$FAKE_DOCKER_LOG" 2>&1;;
esac
"""


@pytest.mark.parametrize("template", TEMPLATES)
def test_up_builds_pushes_and_deploys_a_new_function(project, gateway, template, monkeypatch, tmp_path):
    tools, log = tmp_path / "tools", tmp_path / "docker.log"
    tools.mkdir()
    (tools / "docker").write_text(DOCKER)
    (tools / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_DOCKER_LOG", str(log))
    run(CLI, "new", "mine", "--lang", template, "--prefix", "registry.example/me", cwd=project)
    stack = stack_of(project, "mine")
    run(CLI, "up", "-f", stack.name, "--gateway", url(gateway), cwd=project)
    said = log.read_text()
    assert "registry.example/me/mine:latest" in said and "push registry.example/me/mine:latest" in said, said
    assert "No such file" not in said and "Dockerfile" in said, said
    assert deployed(gateway)["mine"]["image"] == "registry.example/me/mine:latest"


def test_the_template_store_shows_ours(tmp_path):
    store = ROOT / "faas-templates/templates.json"
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=store.parent)
    with serving(handler) as server:
        address = f"{url(server)}/{store.name}"
        listed = run(CLI, "template", "store", "list", "--url", address, "--verbose", cwd=tmp_path)
        for template in json.loads(store.read_text()):
            assert template["template"] in listed and template["description"] in listed, listed
            described = run(CLI, "template", "store", "describe", template["template"], "--url", address, cwd=tmp_path)
            assert template["repo"] in described, described
