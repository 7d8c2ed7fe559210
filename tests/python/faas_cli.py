"""The real faas-cli, for tests: where it is, and a folder into which it has pulled our templates."""

import os
import pathlib
import shutil
import subprocess

from node import ROOT

CLI = pathlib.Path(os.environ.get("FAASWAP_FAAS_CLI", ROOT / ".cache/go/bin/faas-cli"))
WHY_NOT = None if CLI.is_file() else f"SKIPPED: the real faas-cli is not at {CLI}"
TEMPLATES = sorted(folder.name for folder in (ROOT / "faas-templates/template").iterdir())


def run(*command, cwd, timeout=120, **more):
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=timeout, **more
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def project_in(folder):
    """A folder into which the templates were pulled from a repository with what is here, committed or not."""
    repository, project = folder / "faaswap", folder / "project"
    project.mkdir()
    repository.mkdir()
    shutil.copytree(ROOT / "faas-templates", repository / "faas-templates")
    (repository / "template").symlink_to("faas-templates/template")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    run(*git, "init", "-q", "-b", "main", cwd=repository)
    run(*git, "add", "-A", cwd=repository)
    run(*git, "commit", "-qm", "Templates", cwd=repository)
    run(CLI, "template", "pull", repository, cwd=project)
    return project


def stack_of(project, function):
    """What `faas-cli new` has written, by its version's habit."""
    names = ("stack.yaml", "stack.yml", f"{function}.yml")
    return next(path for path in (project / name for name in names) if path.is_file())
