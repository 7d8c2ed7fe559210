"""Container images without a builder: a program, the libraries that it is linked with, and what else it wants, in one layer."""

import hashlib
import io
import json
import platform
import re
import subprocess
import tarfile

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}


def libraries(program):
    """Where the loader finds what this program or library needs, itself among it; nothing for static ones."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True)
    return {path for path in re.findall(r"(?:=> |^\s*)(/\S+) \(0x", done.stdout, re.MULTILINE)}


def add_file(layer, inside, path):
    entry = tarfile.TarInfo(inside.lstrip("/"))
    entry.mode = 0o755
    # What a library's name leads to, not the link.
    with open(path, "rb") as content:
        entry.size = content.seek(0, io.SEEK_END)
        content.seek(0)
        layer.addfile(entry, content)


def image(archive, name, entrypoint, files, command=(), user="0", env=()):
    """An archive of an image, as `docker save` writes it: `files` are {where in the image: which file}."""
    files = dict(files)
    for path in list(files.values()):
        files |= {library: library for library in libraries(path)}
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for inside, path in sorted(files.items()):
            add_file(tar, inside, path)
    layer = layer.getvalue()
    config = {
        "architecture": ARCHITECTURE[platform.machine()],
        "os": "linux",
        "config": {"Entrypoint": list(entrypoint), "Cmd": list(command), "User": user, "Env": list(env)},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    with tarfile.open(archive, "w") as tar:
        for inside, content in {
            "manifest.json": json.dumps(manifest).encode(), "config.json": json.dumps(config).encode(), "layer.tar": layer,
        }.items():
            entry = tarfile.TarInfo(inside)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive
