#!/usr/bin/env python3
"""Makes an ONNX model of a PyTorch module, and checks that both give the same outputs.

    pip install torch onnx onnxruntime numpy
    python3 export_onnx.py torch torchvision.models:resnet18 --input x=float32:1x3x224x224 --dynamic x:0 --out model.onnx

`module:callable` gives the module, called without arguments (`mypackage.mine:make`). `--half` makes weights and floating-point
inputs half precision: half as much memory, half as long to bring to a GPU, and mostly faster there. Of transformers of half precision
with a fixed number of tokens FaaSwap fuses attention; so leave `--dynamic` out for tokens, and pad. `--dynamo` takes PyTorch's newer
exporter (pip install onnxscript), which Hugging Face's models need in half precision. For others there are exporters that
check by themselves or are checked by `check` below:

    optimum-cli export onnx --model distilbert-base-uncased-finetuned-sst-2-english folder/     # Hugging Face
    python3 -m tf2onnx.convert --saved-model folder --opset 17 --output model.onnx              # TensorFlow
    python3 export_onnx.py check model.onnx --inputs inputs.npz --expected outputs.npz          # whatever made it
"""

import argparse
import importlib
import sys

import numpy as np

# The newest set of operators that every exporter writes and FaaSwap's tests cover.
OPSET = 17
# Larger weights do not fit into the graph's own file.
IN_GRAPH_MAX = 1_900_000_000
# What single precision leaves of equality once operators are fused and sums reordered.
RTOL, ATOL = 1e-3, 1e-4
# The same of half precision.
HALF_RTOL, HALF_ATOL = 2e-2, 2e-3


def tensor(text):
    """`name=dtype:1x3x224x224` to a name and random numbers of that shape; small whole numbers for integers."""
    name, _, rest = text.partition("=")
    dtype, _, shape = rest.partition(":")
    try:
        dtype, shape = np.dtype(dtype), [int(dim) for dim in shape.split("x")]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"'{text}' is not like x=float32:1x3x224x224") from None
    random = np.random.default_rng(0)
    numbers = random.standard_normal(shape) if dtype.kind == "f" else random.integers(0, 2, shape)
    return name, numbers.astype(dtype)


def dynamic_axis(text):
    name, _, axis = text.rpartition(":")
    if not name or not axis.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not like x:0")
    return name, int(axis)


def run(path, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs)))


def differences(answers, expected, rtol, atol):
    """What is wrong with the answers, in words; nothing where they agree."""
    wrong = [f"output {name!r} is missing" for name in expected if name not in answers]
    for name in expected.keys() & answers.keys():
        ours, theirs = answers[name], expected[name]
        if ours.shape != theirs.shape:
            wrong.append(f"output {name!r} has shape {ours.shape}, expected {theirs.shape}")
        elif not np.allclose(ours, theirs, rtol=rtol, atol=atol, equal_nan=True):
            most = np.max(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)))
            wrong.append(f"output {name!r} differs by up to {most:g}")
    return wrong


def export_torch(args):
    import torch

    module, _, name = args.module.partition(":")
    model = getattr(importlib.import_module(module), name)().eval()
    inputs = dict(args.input)
    if args.half:
        model = model.half()
        inputs = {name: x.astype(np.float16) if x.dtype.kind == "f" else x for name, x in inputs.items()}
        args.rtol, args.atol = max(args.rtol, HALF_RTOL), max(args.atol, HALF_ATOL)
    tensors = tuple(torch.from_numpy(numbers) for numbers in inputs.values())
    with torch.no_grad():
        outputs = model(*tensors)
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    numbered = ["output"] if len(outputs) == 1 else [f"output{at}" for at in range(len(outputs))]
    names = args.output or numbered
    axes = {}
    for tensor_name, axis in args.dynamic:
        axes.setdefault(tensor_name, {})[axis] = f"{tensor_name}_{axis}"
    for output_name in names if axes else []:
        axes.setdefault(output_name, {})[0] = f"{output_name}_0"
    size = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
    torch.onnx.export(
        model, tensors, args.out, input_names=list(inputs), output_names=names, dynamic_axes=axes, opset_version=OPSET,
        dynamo=args.dynamo, external_data=size > IN_GRAPH_MAX,
    )
    return inputs, {name: output.numpy() for name, output in zip(names, outputs)}, args.out


def load_arrays(args):
    return dict(np.load(args.inputs)), dict(np.load(args.expected)), args.model


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtol", type=float, default=RTOL)
    parser.add_argument("--atol", type=float, default=ATOL)
    kinds = parser.add_subparsers(required=True)
    torch = kinds.add_parser("torch", help="export a PyTorch module and check it")
    torch.add_argument("module", help="module:callable")
    torch.add_argument("--input", action="append", type=tensor, required=True)
    torch.add_argument("--output", action="append", help="names, in order")
    torch.add_argument("--dynamic", action="append", type=dynamic_axis, default=[], help="input:axis")
    torch.add_argument("--half", action="store_true", help="weights and floating-point inputs in half precision")
    torch.add_argument("--dynamo", action="store_true", help="PyTorch's newer exporter, which needs onnxscript")
    torch.add_argument("--out", default="model.onnx")
    torch.set_defaults(make=export_torch)
    check = kinds.add_parser("check", help="check a model against arrays in .npz files")
    check.add_argument("model")
    check.add_argument("--inputs", required=True)
    check.add_argument("--expected", required=True)
    check.set_defaults(make=load_arrays)
    return parser.parse_args()


def main():
    args = arguments()
    inputs, expected, path = args.make(args)
    wrong = differences(run(path, inputs), expected, args.rtol, args.atol)
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        sys.exit(1)
    print(f"{path}: {len(expected)} output(s) agree")


if __name__ == "__main__":
    main()
