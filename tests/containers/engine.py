"""A real Docker engine, for tests: its command, containers that are removed again, base images, and what answers over HTTP."""

import concurrent.futures
import datetime
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import pytest

from node import ROOT, free_port

READY_WITHIN_S = 90
POLL_S = 0.005
# The code with which tests/tools/base-image says that it has nothing to make an image from.
NOTHING_TO_MAKE_IT_FROM = 3


def docker(*arguments, check=True, **more):
    command = ["docker", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **more)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done


def inspect(name):
    return json.loads(docker("inspect", name).stdout)[0]


def need_engine():
    if not shutil.which("docker"):
        pytest.skip("SKIPPED: Docker is not installed")
    if docker("version", check=False).returncode != 0:
        pytest.skip("SKIPPED: no Docker engine answers")


def need_images(*names):
    made = subprocess.run([ROOT / "tests/tools/base-image", *names], capture_output=True, text=True, timeout=900)
    if made.returncode == NOTHING_TO_MAKE_IT_FROM:
        pytest.skip(made.stderr.strip())
    assert made.returncode == 0, made.stderr


def has_bridge():
    """Whether containers have a network where none is named. An engine inside a container often has no bridge."""
    return bool(docker("network", "ls", "--quiet", "--filter", "name=^bridge$").stdout.strip())


def programs():
    return pathlib.Path(os.environ["FAASWAP_STATIC_DIR"]), pathlib.Path(os.environ["FAASWAP_BIN_DIR"])


class Container:
    def __init__(self, name, *arguments, network="host"):
        self.name = f"faaswap-test-{name}-{os.getpid()}"
        try:
            docker("run", "--detach", "--name", self.name, "--network", network, *arguments)
        except BaseException:
            self.remove()
            raise

    def logs(self):
        done = docker("logs", self.name, check=False)
        return done.stdout + done.stderr

    def began_at(self):
        # Docker says nanoseconds, Python reads microseconds.
        text = inspect(self.name)["State"]["StartedAt"]
        return datetime.datetime.fromisoformat(text[:26].rstrip("Z") + "+00:00").timestamp()

    def remove(self):
        docker("rm", "--force", self.name, check=False)


class Pod:
    """A network of its own with nothing but the loopback device, and a way in. Functions keep the ports that their images name."""

    def __init__(self, port=8080):
        self.folder = tempfile.mkdtemp(prefix="faaswap-pod-")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.function = self.forward = None
        script = pathlib.Path(__file__).with_name("forward.py")
        self.sandbox = Container(
            "pod", "--volume", f"{self.folder}:/forward", "--volume", f"{script}:/forward.py:ro", "python:3.12-slim",
            "python3", "/forward.py", "/forward/socket", port, network="none",
        )
        self.forward = subprocess.Popen([sys.executable, script, str(self.port), f"{self.folder}/socket"])

    def run(self, *arguments):
        """Starts the function and says how many seconds it took to be ready: since `docker run`, and since its process began."""
        with concurrent.futures.ThreadPoolExecutor() as beside:
            asked_at = time.time()
            ready = beside.submit(self._ready_at)
            self.function = Container("function", *arguments, network=f"container:{self.sandbox.name}")
            ready_at = ready.result()
        return ready_at - asked_at, ready_at - self.function.began_at()

    def _ready_at(self):
        until_200(f"{self.url}/_/ready", lambda: self.function.logs() if self.function else self.sandbox.logs())
        return time.time()

    def remove(self):
        for container in (self.function, self.sandbox):
            if container:
                container.remove()
        if self.forward:
            self.forward.kill()
            self.forward.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as reply:
        return reply.code, reply.read()
    except OSError:
        return 0, b""


def until_200(url, logs):
    until = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < until:
        if get(url)[0] == 200:
            return
        time.sleep(POLL_S)
    raise AssertionError(f"{url}: {get(url)}\n{logs()}")
