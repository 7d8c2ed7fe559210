"""The templates through the real faas-cli: pulled from a git repository, made into a function, laid out, generated.

`make fetch-go` installs it where Go and its module can be had; else all of this is skipped."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest
import yaml

from node import ROOT

CLI = pathlib.Path(os.environ.get("FAASWAP_FAAS_CLI", ROOT / ".cache/go/bin/faas-cli"))
TEMPLATES = sorted(folder.name for folder in (ROOT / "faas-templates/template").iterdir())

pytestmark = pytest.mark.skipif(not CLI.is_file(), reason=f"SKIPPED: the real faas-cli is not at {CLI}")


def run(*command, cwd):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture()
def project(tmp_path):
    """A folder into which the templates were pulled from a repository with what is here, committed or not."""
    repository, folder = tmp_path / "faaswap", tmp_path / "project"
    folder.mkdir()
    repository.mkdir()
    shutil.copytree(ROOT / "faas-templates", repository / "faas-templates")
    (repository / "template").symlink_to("faas-templates/template")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    run(*git, "init", "-q", "-b", "main", cwd=repository)
    run(*git, "add", "-A", cwd=repository)
    run(*git, "commit", "-qm", "Templates", cwd=repository)
    run(CLI, "template", "pull", repository, cwd=folder)
    return folder


def test_every_template_is_pulled(project):
    pulled = {folder.name for folder in (project / "template").iterdir() if folder.is_dir()}
    assert pulled >= set(TEMPLATES)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_new_function_is_laid_out_with_its_model(project, template):
    run(CLI, "new", "mine", "--lang", template, "--prefix", "me", cwd=project)
    stack = next(path for path in (project / "stack.yaml", project / "stack.yml", project / "mine.yml") if path.is_file())
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
