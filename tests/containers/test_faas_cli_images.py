"""What a developer does, with the real faas-cli and a real Docker engine: `template pull`, `new`, `build`; then what OpenFaaS
does with the image. `make fetch-go` installs faas-cli where Go and its module can be had; else all of this is skipped.

Each function runs in a network of its own that has no way out: it listens where its image says, the broker's socket is all
that it has of its node, and it is called over HTTP from outside. Where the engine has no bridge, a `docker` that adds
`--network host` to `build` stands before the real one: faas-cli has no option for it, and packages must be fetched.

The images of python and node are made of Debian's packages where no registry is reached: tests/tools/base-image says how
they differ from the public ones."""

import json
import os
import shutil
import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.http as triton
import yaml

from engine import Pod, docker, get, has_bridge, inspect, need_images
from faas_cli import CLI, TEMPLATES, WHY_NOT, project_in, run, stack_of

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

X = np.array([[1, 2, 3, 4], [0, 1, 0, 0]], np.float32)
# Enough that it cannot go in one frame by chance.
MANY_ROWS = 50_000
# The user as which OpenFaaS runs functions where it is told to use none of root's.
OPENFAAS_USER = 12000
BASES = {"faaswap-onnx": "debian:12-slim", "faaswap-python3": "python:3.12-slim", "faaswap-node": "node:22-slim"}
BUILT_WITHIN_S = 600
# What all but the first test give to a function, to see whether it arrives in the image once.
WEIGHTS_BYTES = 8 << 20
MIB = 1 << 20

DOCKER = """#!/bin/sh
if [ "$1" = build ]; then shift; set -- build --network host "$@"; fi
exec {docker} "$@"
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Where faas-cli finds `docker`."""
    need_images(*BASES.values())
    if has_bridge():
        return os.environ["PATH"]
    tools = tmp_path_factory.mktemp("tools")
    (tools / "docker").write_text(DOCKER.format(docker=shutil.which("docker")))
    (tools / "docker").chmod(0o755)
    return f"{tools}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return project_in(tmp_path_factory.mktemp("developer"))


@pytest.fixture(scope="module")
def build(project, path, sidecar_image):
    """Makes a function of a template, changes its files if told to, and builds it; says the image's name."""

    def build(function, template, change=lambda folder: None, options=()):
        run(CLI, "new", function, "--lang", template, "--prefix", "faaswap-test", cwd=project)
        change(project / function)
        run(
            CLI, "build", "-f", stack_of(project, function).name, "--build-arg", f"SIDECAR_IMAGE={sidecar_image}", *options,
            cwd=project, timeout=BUILT_WITHIN_S, env={**os.environ, "PATH": path},
        )
        # Current versions add to one file what earlier ones wrote into one for each function.
        stack_of(project, function).unlink()
        return f"faaswap-test/{function}:latest"

    return build


@pytest.fixture(scope="module")
def starters(build, figures, sidecar_image):
    """The image of each template as it comes, by the template's name; made when asked for."""
    figures.append(f"{'sidecar image':16} {size(sidecar_image) / MIB:6.1f} MiB")
    built = {}

    def starter(template):
        if template not in built:
            built[template] = build(template.replace("faaswap", "starter"), template)
            whole, base = size(built[template]), size(BASES[template])
            figures.append(f"{template:16} {whole / MIB:6.1f} MiB, {(whole - base) / MIB:.1f} above {BASES[template]}")
        return built[template]

    return starter


@pytest.fixture()
def pod():
    pod = Pod()
    try:
        yield pod
    finally:
        pod.remove()


def size(image):
    return inspect(image)["Size"]


def as_openfaas_runs(project, template, broker):
    """A pod's settings, and what `faas-cli deploy` sends of the template."""
    wanted = yaml.safe_load((project / "template" / template / "template.yml").read_text()).get("fprocess")
    return [
        "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
        "--volume", f"{broker}:/run/faaswap:ro", "--env", "OPENFAAS_NAME=scale", "--env", "healthcheck_interval=0",
        *(["--env", f"fprocess={wanted}"] if wanted else []),
    ]


def scores_of(x):
    """What the starters' model computes."""
    return x @ np.add.outer(np.arange(4), np.arange(3)).astype(np.float32) + np.arange(3, dtype=np.float32)


def infer(pod, x):
    wanted = triton.InferInput("x", x.shape, "FP32")
    wanted.set_data_from_numpy(x)
    with triton.InferenceServerClient(f"127.0.0.1:{pod.port}") as client:
        scores = client.infer("scale", [wanted]).as_numpy("scores")
    np.testing.assert_allclose(scores, scores_of(x), rtol=1e-4, atol=1e-4)


def ask(pod, body):
    try:
        with urllib.request.urlopen(urllib.request.Request(pod.url, json.dumps(body).encode()), timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as reply:
        return reply.code, reply.read()


@pytest.mark.parametrize("user", [OPENFAAS_USER, None], ids=["openfaas-user", "own-user"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_starter_answers_from_the_image_that_faas_cli_built(template, user, starters, project, broker, pod, figures):
    image = starters(template)
    as_user = ["--user", user] if user else []
    since_run, since_began = pod.run(*as_openfaas_runs(project, template, broker), *as_user, image)
    figures.append(f"{template:16} ready {since_run:.2f} s after docker run, {since_began:.2f} s after its process began")
    assert get(f"{pod.url}/_/health")[0] == 200
    for x in (X, np.random.default_rng(0).standard_normal((MANY_ROWS, 4), np.float32)):
        infer(pod, x)
    # Tensors went through memory that both containers see, not through the socket.
    assert "slab=true" in pod.function.logs(), pod.function.logs()
    if template != "faaswap-onnx":
        status, answer = ask(pod, {"x": X.tolist()})
        assert (status, json.loads(answer)) == (200, {"scores": scores_of(X).tolist()}), pod.function.logs()
        # The handler's client passes on what the node says of a wrong input.
        assert ask(pod, {"x": [[1, 2]]})[0] == 400
    for program in ("faaswap-sidecar --run-healthcheck", "cat /tmp/.lock"):
        docker("exec", pod.function.name, *program.split())
    assert docker("exec", pod.function.name, "id", "-u").stdout.strip() == str(OPENFAAS_USER)
    docker("stop", "--time", "20", pod.function.name)
    assert inspect(pod.function.name)["State"]["ExitCode"] == 0, pod.function.logs()


@pytest.mark.parametrize("template", TEMPLATES)
def test_kubernetes_can_tell_that_the_user_is_not_root(template, starters):
    # With runAsNonRoot and no runAsUser, it refuses a user that is a name; Knative sets the one without the other.
    assert int(inspect(starters(template))["Config"]["User"]) != 0


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_model_is_in_the_image_once_and_may_be_read_there(template, starters, build):
    weights = np.random.default_rng(1).bytes(WEIGHTS_BYTES)

    def change(folder):
        (folder / "large").mkdir(mode=0o700)
        (folder / "large/weights.bin").write_bytes(weights)
        (folder / "large/weights.bin").chmod(0o600)

    image = build(template.replace("faaswap", "large"), template, change)
    read = docker(
        "run", "--rm", "--network", "none", "--entrypoint", "stat", "--user", OPENFAAS_USER, image, "--format", "%s %A",
        "/home/app/function/large/weights.bin",
    )
    assert read.stdout.split() == [str(WEIGHTS_BYTES), "-rw-r--r--"]
    added = size(image) - size(starters(template))
    assert WEIGHTS_BYTES <= added < 1.5 * WEIGHTS_BYTES, f"{added / MIB:.1f} MiB for {WEIGHTS_BYTES / MIB:.1f}"


PYTHON_HANDLER = """
import shutil

import humanize

def handle(event, context):
    return {"statusCode": 200, "body": {"text": humanize.intcomma(int(event.body)), "gcc": shutil.which("gcc")}}
"""


def test_packages_and_build_options_of_a_python_function_are_in_its_image(build, project, broker, pod):
    def change(folder):
        (folder / "requirements.txt").write_text("humanize==4.12.3\n")
        (folder / "handler.py").write_text(PYTHON_HANDLER)
        # Of the developer's machine, and for that machine.
        (folder / ".venv").mkdir()
        (folder / ".venv/large").write_text("not for the image")

    image = build("python-packages", "faaswap-python3", change, ["--build-option", "dev"])
    pod.run(*as_openfaas_runs(project, "faaswap-python3", broker), image)
    status, answer = ask(pod, 1234567)
    assert (status, json.loads(answer)) == (200, {"text": "1,234,567", "gcc": "/usr/bin/gcc"}), pod.function.logs()
    assert docker("exec", pod.function.name, "ls", "/home/app/function/.venv", check=False).returncode != 0


NODE_HANDLER = """
const ms = require('ms');
module.exports = async (event, context) => {
  const { version } = require('ms/package.json');
  return context.status(200).succeed({ long: ms(Number(event.body)), version });
};
"""
# Within what package.json allows, and not the newest: an install without the lock file brings another.
LOCKED = "2.1.2"


def test_packages_of_a_node_function_are_those_of_its_lock_file(build, project, broker, pod):
    def change(folder):
        package = {"name": "function", "version": "1.0.0", "private": True, "dependencies": {"ms": "^2.1.0"}}
        lock = {
            "name": "function", "version": "1.0.0", "lockfileVersion": 3, "requires": True,
            "packages": {"": package, "node_modules/ms": {"version": LOCKED}},
        }
        (folder / "package.json").write_text(json.dumps(package))
        (folder / "package-lock.json").write_text(json.dumps(lock))
        (folder / "handler.js").write_text(NODE_HANDLER)
        # As after an install on the developer's machine, for that machine.
        (folder / "node_modules/ms").mkdir(parents=True)
        (folder / "node_modules/ms/package.json").write_text('{"name": "ms", "version": "0.0.0", "main": "index.js"}')
        (folder / "node_modules/ms/index.js").write_text("throw new Error('built for another machine');")

    image = build("node-packages", "faaswap-node", change)
    pod.run(*as_openfaas_runs(project, "faaswap-node", broker), image)
    status, answer = ask(pod, 60000)
    assert (status, json.loads(answer)) == (200, {"long": "1m", "version": LOCKED}), pod.function.logs()
