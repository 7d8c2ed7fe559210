"""A broker and its sidecars as real processes, for tests; killed with the test session."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
READY_WITHIN_S = 120
POLL_S = 0.02


def program(name):
    folder = pathlib.Path(os.environ.get("FAASWAP_BIN_DIR", ROOT / "target" / "debug"))
    path = folder / name
    assert path.is_file(), f"{path} is missing: run `cargo build --workspace --bins` or set FAASWAP_BIN_DIR"
    return path


def onnxruntime():
    path = pathlib.Path(os.environ.get("ORT_DYLIB_PATH", ROOT / ".cache/ort/libonnxruntime.so.1.31.1"))
    assert path.is_file(), f"{path} is missing: run `make fetch` first"
    return path


def free_port():
    """A port nobody listens on now. All of a test session's ports are taken before any of its processes connects."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Process:
    """A program with its log in a file."""

    def __init__(self, name, command, folder, env):
        self.name = name
        self.log = folder / f"{name}.log"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("FAASWAP_")}
        with open(self.log, "wb") as log:
            self.child = subprocess.Popen(
                command, env={**inherited, **env}, stdout=log, stderr=log, start_new_session=True
            )

    def wait_ready(self, url):
        until = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < until:
            assert self.child.poll() is None, f"{self.name} ended with {self.child.returncode}:\n{self.log.read_text()}"
            try:
                with urllib.request.urlopen(url, timeout=READY_WITHIN_S) as page:
                    if page.status == 200:
                        return
            except OSError:
                pass
            time.sleep(POLL_S)
        raise AssertionError(f"{self.name} is not ready after {READY_WITHIN_S} s:\n{self.log.read_text()}")

    def end(self):
        """With what it has started: a front that is killed cannot end its handler, as the end of a container would."""
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.child.wait()


class Node:
    """One broker with a small host device, and a sidecar for each model: {function: model file}."""

    def __init__(self, models):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="faaswap-"))
        self.processes = []
        self.urls = {}
        try:
            self._start(models)
        except BaseException:
            self.end()
            raise

    def _start(self, models):
        self.admin, *ports = [free_port() for _ in range(1 + 2 * len(models))]
        config = self.folder / "faaswap.toml"
        config.write_text(f"""
socket = "{self.folder}/broker.sock"
store_dir = "{self.folder}/store"
memory_dir = "{self.folder}/memory"
host_memory = "256MiB"
admin_listen = "127.0.0.1:{self.admin}"
onnxruntime = "{onnxruntime()}"
[[device]]
name = "host0"
memory = "16MiB"
chunk = "256KiB"
""")
        self._broker = [program("faaswap-broker"), "serve", "--config", config]
        self._run("broker", self._broker, {}, f"http://127.0.0.1:{self.admin}/readyz")
        for function, model in models.items():
            port, metrics = ports.pop(), ports.pop()
            env = {
                "FAASWAP_BROKER_SOCKET": f"{self.folder}/broker.sock",
                "FAASWAP_FUNCTION": function,
                "FAASWAP_MODEL": str(model),
                "FAASWAP_LISTEN": f"127.0.0.1:{port}",
                "FAASWAP_METRICS_LISTEN": f"127.0.0.1:{metrics}",
                "FAASWAP_SLO_MS": "20000",
            }
            self._run(function, [program("faaswap-sidecar")], env, f"http://127.0.0.1:{port}/v2/health/ready")
            self.urls[function] = f"127.0.0.1:{port}"

    def restart(self, forgets=False):
        """Kills the broker and starts it anew, with what it had stored or without."""
        self.processes[0].end()
        if forgets:
            for kept in ("store", "memory"):
                shutil.rmtree(self.folder / kept, ignore_errors=True)
        self.processes[0] = Process("broker-again", self._broker, self.folder, {})
        self.processes[0].wait_ready(f"http://127.0.0.1:{self.admin}/readyz")

    def _run(self, name, command, env, url):
        process = Process(name, command, self.folder, env)
        self.processes.append(process)
        process.wait_ready(url)

    def end(self):
        for process in reversed(self.processes):
            process.end()
        shutil.rmtree(self.folder, ignore_errors=True)
