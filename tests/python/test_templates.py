"""The templates as images would run them: the build context as faas-cli lays it out, the Dockerfile's variables, the
sidecar in front, a broker behind it. What needs a Docker engine is not here; `faas-cli` itself is in test_faas_cli.py."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.http as triton

from node import ROOT, Node, Process, free_port, program

TEMPLATES = ROOT / "faas-templates" / "template"
X = np.array([[1, 2, 3, 4], [0, 1, 0, 0]], np.float32)
# The starters' model: scores = x w + b.
SCORES = X @ np.add.outer(np.arange(4), np.arange(3)).astype(np.float32) + np.arange(3, dtype=np.float32)


def of_dockerfile(template):
    """Variables and command that the image gives its process."""
    text = (TEMPLATES / template / "Dockerfile").read_text().replace("\\\n", " ")
    env = {}
    for line in re.findall(r"^ENV (.*)$", text, re.M):
        env.update((key, value.strip('"')) for key, value in re.findall(r'(\w+)=("[^"]*"|\S+)', line))
    workdir = re.findall(r"^WORKDIR (.*)$", text, re.M)[-1]
    return env, workdir, json.loads(re.findall(r"^CMD (.*)$", text, re.M)[-1])


class Function:
    """A function of a template, behind its front."""

    def __init__(self, node, folder, template, more=None, handler=None):
        context = folder / template
        shutil.copytree(TEMPLATES / template, context)
        for name, text in (handler or {}).items():
            (context / "function" / name).write_text(text)
        env, workdir, command = of_dockerfile(template)
        env = {key: value.replace("/home/app", str(context)) for key, value in env.items()}
        self.port, handler_port = free_port(), free_port()
        if "upstream_url" in env:
            env.update(upstream_url=f"http://127.0.0.1:{handler_port}", FAASWAP_HANDLER_PORT=str(handler_port))
        env.update(
            PATH=f"{context}/bin:{ROOT}/.cache/venv/bin:{os.environ['PATH']}",
            TMPDIR=str(context),
            port=str(self.port),
            OPENFAAS_NAME=template,
            FAASWAP_BROKER_SOCKET=f"{node.folder}/broker.sock",
            FAASWAP_LISTEN="127.0.0.1:0",
            FAASWAP_METRICS_LISTEN="off",
            healthcheck_interval="1s",
            write_timeout="5s",
            **(more or {}),
        )
        assert command == ["faaswap-sidecar"]
        inside = pathlib.Path(workdir.replace("/home/app", str(context)))
        bin_folder = context / "bin"
        bin_folder.mkdir()
        # What the image has in /usr/bin.
        (bin_folder / "faaswap-sidecar").symlink_to(program("faaswap-sidecar"))
        start = ["sh", "-c", f"cd '{inside}' && exec faaswap-sidecar"]
        self.process = Process(f"{template}-{self.port}", start, context, env)
        self.url = f"http://127.0.0.1:{self.port}"
        self.process.wait_ready(self.url + "/_/ready")

    def ask(self, body, path="/", headers=None):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers or {})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.headers, reply.read()
        except urllib.error.HTTPError as reply:
            return reply.code, reply.headers, reply.read()


@pytest.fixture(scope="module")
def broker():
    node = Node({})
    yield node
    node.end()


@pytest.fixture()
def start(broker, tmp_path):
    running = []

    def start(*args, **more):
        running.append(Function(broker, tmp_path, *args, **more))
        return running[-1]

    yield start
    for function in running:
        function.process.end()


def test_a_model_without_code_speaks_the_protocol(start):
    function = start("faaswap-onnx")
    client = triton.InferenceServerClient(f"127.0.0.1:{function.port}")
    x = triton.InferInput("x", X.shape, "FP32")
    x.set_data_from_numpy(X)
    np.testing.assert_array_equal(client.infer("faaswap-onnx", [x]).as_numpy("scores"), SCORES)
    assert client.get_model_metadata("faaswap-onnx")["inputs"][0]["shape"] == [-1, 4]


@pytest.mark.parametrize("template", ["faaswap-python3", "faaswap-node"])
def test_the_starter_answers_and_the_protocol_is_beside_it(start, template):
    if template == "faaswap-node" and not shutil.which("node"):
        pytest.skip("SKIPPED: Node.js is not installed")
    function = start(template)
    status, headers, body = function.ask({"x": X.tolist()})
    assert status == 200, (body, function.process.log.read_text())
    assert json.loads(body) == {"scores": SCORES.tolist()}
    assert headers["Content-Type"].startswith("application/json") and headers["X-Duration-Seconds"]
    # A wrong input is the caller's mistake, and says what was expected.
    status, _, body = function.ask({"x": [[1, 2]]})
    assert status == 400 and b"4" in body, (status, body)
    with urllib.request.urlopen(f"{function.url}/v2/models/{template}") as reply:
        assert json.load(reply)["outputs"][0]["name"] == "scores"
    # The handler serves until its front has drained.
    function.process.child.terminate()
    assert function.ask({"x": X.tolist()})[0] == 200
    assert function.process.child.wait(timeout=60) == 0


def test_functions_of_one_name_in_two_namespaces_are_two_on_their_node(broker, tmp_path_factory):
    running = {}
    try:
        for space, slo in [("team-a", "1000"), ("team-b", "2000")]:
            more = {"POD_NAMESPACE": space, "FAASWAP_SLO_MS": slo}
            running[space] = Function(broker, tmp_path_factory.mktemp(space), "faaswap-onnx", more)
            client = triton.InferenceServerClient(f"127.0.0.1:{running[space].port}")
            x = triton.InferInput("x", X.shape, "FP32")
            x.set_data_from_numpy(X)
            for _ in range(len(running)):
                client.infer("faaswap-onnx", [x])
        with urllib.request.urlopen(f"http://127.0.0.1:{broker.admin}/v1/functions") as reply:
            functions = {one["name"]: one for one in json.load(reply)}
        with urllib.request.urlopen(f"http://127.0.0.1:{broker.admin}/metrics") as reply:
            metrics = reply.read().decode()
    finally:
        for function in running.values():
            function.process.end()
    for count, space in enumerate(running, 1):
        name = f"{space}/faaswap-onnx"
        assert name in functions, functions
        [line] = [line for line in metrics.splitlines() if f'function="{name}"' in line and 'outcome="answered"' in line]
        assert float(line.split()[-1]) == count, line


ASYNC_HANDLER = """
import asyncio
import numpy as np
from faaswap import Client, Refused

client = Client()


async def handle(event, context):
    if event.path == "/types":
        try:
            await client.infer_async({"x": np.zeros((1, 4), np.int32)})
        except ValueError as error:
            return {"statusCode": 422, "body": str(error), "headers": {"X-Kind": event.query["kind"]}}
    if event.path == "/refused":
        try:
            client.infer(np.zeros((1, 9), np.float32))
        except Refused as refusal:
            return {"statusCode": refusal.status, "body": refusal.code}
    x = np.frombuffer(event.body, np.float64).reshape(-1, 4)
    many = await asyncio.gather(*[client.infer_async({"x": x + at}, outputs=["scores"]) for at in range(5)])
    return b"".join(answer["scores"].tobytes() for answer in many)
"""


def test_the_client_runs_many_at_a_time_and_names_what_is_wrong(start):
    function = start("faaswap-python3", handler={"handler.py": ASYNC_HANDLER})
    request = urllib.request.Request(function.url, X.astype(np.float64).tobytes())
    with urllib.request.urlopen(request) as reply:
        assert reply.headers["Content-Type"] == "application/octet-stream"
        answers = np.frombuffer(reply.read(), np.float32).reshape(5, 2, 3)
    w, b = np.add.outer(np.arange(4), np.arange(3)), np.arange(3)
    np.testing.assert_array_equal(answers, [(X + at) @ w + b for at in range(5)])
    status, headers, body = function.ask({}, "/types?kind=int")
    assert (status, headers["x-kind"]) == (422, "int") and b"int32" in body and b"FP32" in body
    assert function.ask({}, "/refused")[::2] == (400, b"input_invalid")


def test_fprocess_is_the_same_in_the_template_and_in_the_image():
    import yaml

    for folder in TEMPLATES.iterdir():
        template = yaml.safe_load((folder / "template.yml").read_text())
        assert template["language"] == folder.name
        # faas-cli sends the template's, which wins over the image's: a difference would only show once deployed.
        assert template.get("fprocess") == of_dockerfile(folder.name)[0].get("fprocess"), folder


def test_the_store_lists_every_template_and_the_stack_uses_only_those():
    import yaml

    names = {folder.name for folder in TEMPLATES.iterdir()}
    store = json.loads((ROOT / "faas-templates/templates.json").read_text())
    assert {one["template"] for one in store} == names
    # faas-cli reads `official` as text and `recommended` as a truth value.
    assert all(isinstance(one["official"], str) and isinstance(one["recommended"], bool) for one in store)
    stack = yaml.safe_load((ROOT / "faas-templates/stack.yaml").read_text())
    assert {function["lang"] for function in stack["functions"].values()} <= names
    for function in stack["functions"].values():
        texts = [function.get(kind, {}) for kind in ("environment", "labels", "annotations")]
        assert all(isinstance(value, str) for values in texts for value in values.values()), "quote them"


def test_the_template_link_leads_to_the_templates():
    # `faas-cli template pull` looks for template/ at the root of the repository.
    assert (ROOT / "template").is_symlink() and (ROOT / "template").resolve() == TEMPLATES


def test_the_export_script_tells_right_outputs_from_wrong_ones(tmp_path):
    pytest.importorskip("onnxruntime", reason="SKIPPED: onnxruntime is not installed for this Python")
    script = ROOT / "faas-templates/tools/export_onnx.py"
    model = TEMPLATES / "faaswap-onnx/function/model.onnx"
    np.savez(tmp_path / "inputs.npz", x=X)
    np.savez(tmp_path / "right.npz", scores=SCORES)
    np.savez(tmp_path / "wrong.npz", scores=SCORES + 0.1, more=SCORES)
    python = [f"{ROOT}/.cache/venv/bin/python", script, "check", model, "--inputs", tmp_path / "inputs.npz", "--expected"]
    right = subprocess.run([*python, tmp_path / "right.npz"], capture_output=True, text=True)
    assert right.returncode == 0 and "1 output(s) agree" in right.stdout, right.stderr
    wrong = subprocess.run([*python, tmp_path / "wrong.npz"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "'scores' differs by up to 0.1" in wrong.stderr, wrong.stderr
    assert "'more' is missing" in wrong.stderr
