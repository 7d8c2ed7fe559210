"""Writes the starters' model, scores = x w + b with w[i][j] = i + j and b[j] = j, into every template. Needs onnx."""

import pathlib

import numpy as np
from onnx import TensorProto, helper, numpy_helper

TEMPLATES = pathlib.Path(__file__).resolve().parents[1] / "template"


def starter():
    w = np.add.outer(np.arange(4), np.arange(3)).astype(np.float32)
    b = np.arange(3, dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["xw"]), helper.make_node("Add", ["xw", "b"], ["scores"])],
        "starter",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["rows", 3])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


if __name__ == "__main__":
    for folder in sorted(TEMPLATES.glob("*/function")):
        (folder / "model.onnx").write_bytes(starter())
        print(folder / "model.onnx")
