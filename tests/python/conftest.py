"""One node for the whole session."""

import pathlib
import tempfile

import pytest

import models
from node import Node


@pytest.fixture(scope="session")
def node():
    with tempfile.TemporaryDirectory(prefix="faaswap-models-") as folder:
        folder = pathlib.Path(folder)
        node = Node({
            "linear": models.linear(folder / "linear.onnx"),
            "every-type": models.every_type(folder / "every-type.onnx"),
        })
        try:
            yield node
        finally:
            node.end()
