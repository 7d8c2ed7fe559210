"""Two models that numpy can compute: one with every element type, one with weights and two outputs."""

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Name in the Open Inference Protocol -> ONNX's element type. Requests cannot carry strings.
TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
}
INPUTS, OUTPUTS = 8, 5


def save(path, nodes, inputs, outputs, weights=()):
    graph = helper.make_graph(nodes, "made", inputs, outputs, list(weights))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def every_type(path):
    """For each type: out_T is in_T set beside itself."""
    tensor = helper.make_tensor_value_info
    nodes = [helper.make_node("Concat", [f"in_{t}", f"in_{t}"], [f"out_{t}"], axis=1) for t in TYPES]
    inputs = [tensor(f"in_{name}", onnx_type, ["rows", 3]) for name, onnx_type in TYPES.items()]
    outputs = [tensor(f"out_{name}", onnx_type, ["rows", 6]) for name, onnx_type in TYPES.items()]
    return save(path, nodes, inputs, outputs)


def weights():
    random = np.random.default_rng(5)
    return random.standard_normal((INPUTS, OUTPUTS), np.float32), random.standard_normal(OUTPUTS, np.float32)


def linear(path):
    """scores = x w + b, and best = the position of the highest score of each row."""
    tensor = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Add", ["xw", "b"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
    ]
    outputs = [
        tensor("scores", TensorProto.FLOAT, ["rows", OUTPUTS]),
        tensor("best", TensorProto.INT64, ["rows"]),
    ]
    w, b = weights()
    initializers = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")]
    return save(path, nodes, [tensor("x", TensorProto.FLOAT, ["rows", INPUTS])], outputs, initializers)


def linear_answer(x):
    w, b = weights()
    scores = x @ w + b
    return scores, scores.argmax(axis=1)


def some(name, rows=2, seed=1):
    """Random numbers of a type, among them its extremes."""
    random = np.random.default_rng(seed)
    if name == "BOOL":
        return random.integers(0, 2, (rows, 3)).astype(bool)
    if name == "BF16":
        return random.standard_normal((rows, 3)).astype(ml_dtypes.bfloat16)
    dtype = np.dtype(name.lower().replace("fp", "float"))
    if dtype.kind == "f":
        numbers = random.standard_normal((rows, 3)).astype(dtype)
        numbers[0, 0], numbers[0, 1] = np.finfo(dtype).max, np.finfo(dtype).tiny
        return numbers
    info = np.iinfo(dtype)
    numbers = random.integers(info.min, info.max, (rows, 3), dtype=dtype, endpoint=True)
    numbers[0, 0], numbers[0, 1] = info.min, info.max
    return numbers
