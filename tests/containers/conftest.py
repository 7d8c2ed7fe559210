"""What all tests in containers need: an engine, the sidecar's image, a broker. Figures are printed at the end."""

import pathlib
import shutil
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "python"))
from engine import Container, docker, need_engine, need_images, programs, until_200  # noqa: E402
from node import free_port, onnxruntime  # noqa: E402

SIDECAR_IMAGE = "faaswap/sidecar:test"
FIGURES = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[FIGURES] = []


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[FIGURES]:
        terminalreporter.section("figures")
    for line in config.stash[FIGURES]:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def figures(pytestconfig):
    """Lines for the end; nothing is asserted of them."""
    return pytestconfig.stash[FIGURES]


@pytest.fixture(scope="session", autouse=True)
def with_engine():
    need_engine()
    need_images("debian:12-slim")


@pytest.fixture(scope="session")
def sidecar_image(with_engine, tmp_path_factory):
    """An image with the static sidecar alone, as images/sidecar.Dockerfile makes one."""
    static, _ = programs()
    context = tmp_path_factory.mktemp("sidecar")
    shutil.copy(static / "faaswap-sidecar", context)
    (context / "ca-certificates.crt").write_text("# The real image has Mozilla's; nothing is fetched over https here.\n")
    (context / "Dockerfile").write_text(
        "FROM scratch\nCOPY faaswap-sidecar /faaswap-sidecar\n"
        "COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt\nUSER 65532:65532\nENTRYPOINT [\"/faaswap-sidecar\"]\n"
    )
    docker("build", "--network", "host", "--tag", SIDECAR_IMAGE, context)
    return SIDECAR_IMAGE


@pytest.fixture()
def broker(tmp_path):
    """The folder with the socket of a broker in a container, with a small host device."""
    _, built = programs()
    admin = free_port()
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "faaswap.toml").write_text(f"""
socket = "/run/faaswap/broker.sock"
socket_mode = "0666"
store_dir = "/tmp/store"
memory_dir = "/dev/shm/faaswap"
host_memory = "64MiB"
admin_listen = "127.0.0.1:{admin}"
onnxruntime = "/ort/{onnxruntime().name}"
[[device]]
name = "host0"
memory = "16MiB"
chunk = "256KiB"
""")
    container = Container(
        "broker", "--read-only", "--tmpfs", "/tmp", "--shm-size", "128m", "--cap-drop", "ALL",
        "--volume", f"{run}:/run/faaswap", "--volume", f"{tmp_path}/faaswap.toml:/etc/faaswap.toml:ro",
        "--volume", f"{built}/faaswap-broker:/usr/bin/faaswap-broker:ro", "--volume", f"{onnxruntime().parent}:/ort:ro",
        "debian:12-slim", "/usr/bin/faaswap-broker", "serve", "--config", "/etc/faaswap.toml",
    )
    try:
        until_200(f"http://127.0.0.1:{admin}/readyz", container.logs)
        yield run
    finally:
        container.remove()
