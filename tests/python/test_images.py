"""Images as a function without code takes them, against what Pillow and numpy make of them, to the bit where that is defined.

The model gives back what it is given, so that its answer is the tensor."""

import io
import json
import urllib.error
import urllib.request

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from node import Node
from test_templates import Function

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SETTINGS = """
model = "model.onnx"
[preprocess]
kind = "image"
resize = 64
crop = 56
filter = "{filter}"
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
"""
LABELS = """
model = "model.onnx"
[preprocess]
kind = "image"
resize = [8, 8]
layout = "nhwc"
[postprocess]
kind = "labels"
labels = "labels.txt"
softmax = true
top = 2
"""


def save(path, node, shape_in, shape_out):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape_in)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape_out)
    graph = helper.make_graph([node], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return str(path)


@pytest.fixture(scope="module")
def broker():
    node = Node({})
    yield node
    node.end()


@pytest.fixture(scope="module")
def functions(broker, tmp_path_factory):
    """One function for each filter, and one that names the strongest colour."""
    folder = tmp_path_factory.mktemp("images")
    same = save(folder / "same.onnx", helper.make_node("Identity", ["x"], ["y"]), ["n", 3, 56, 56], ["n", 3, 56, 56])
    mean = helper.make_node("ReduceMean", ["x"], ["y"], axes=[1, 2], keepdims=0)
    mean = save(folder / "mean.onnx", mean, [1, 8, 8, 3], [1, 3])
    started = {}
    for name, model, settings in [
        ("bilinear", same, SETTINGS.format(filter="bilinear")),
        ("bicubic", same, SETTINGS.format(filter="bicubic")),
        ("labels", mean, LABELS),
    ]:
        files = {"function.toml": settings, "labels.txt": "red\ngreen\nblue\n"}
        inside = tmp_path_factory.mktemp(name)
        started[name] = Function(broker, inside, "faaswap-onnx", {"FAASWAP_MODEL": model}, files)
    yield started
    for function in started.values():
        function.process.end()


def post(function, image):
    request = urllib.request.Request(function.url + "/", image, {"Content-Type": "application/octet-stream"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as reply:
        return reply.code, json.load(reply)


def tensor(function, image):
    status, answer = post(function, image)
    assert status == 200, answer
    [output] = answer["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def expected(image, resample):
    """What torchvision's Resize(64), CenterCrop(56), ToTensor and Normalize do with a Pillow image."""
    image = image.convert("RGB")
    width, height = image.size
    short, long = sorted((width, height))
    other = int(64 * long / short)
    image = image.resize((64, other) if width <= height else (other, 64), resample)
    width, height = image.size
    top, left = int(round((height - 56) / 2)), int(round((width - 56) / 2))
    pixels = np.asarray(image)[top : top + 56, left : left + 56].astype(np.float32) / np.float32(255)
    return ((pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).transpose(2, 0, 1)[None]


def picture(width, height, mode="RGB", seed=0):
    """Slopes with noise: edges and flat places, every value."""
    rng = np.random.default_rng(seed)
    down, right = np.mgrid[0:height, 0:width]
    base = np.stack([down * 255 / max(height - 1, 1), right * 255 / max(width - 1, 1), (down * right) % 256], -1)
    noisy = np.clip(base + rng.normal(0, 40, base.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy).convert(mode)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


SIZES = [(640, 480), (65, 64), (64, 64), (97, 301), (20, 33), (1, 1), (3, 200)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name, resample", [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)])
def test_a_png_becomes_the_tensor_that_pillow_makes_of_it(functions, name, resample, size):
    image = picture(*size)
    got = tensor(functions[name], encoded(image, "PNG"))
    np.testing.assert_array_equal(got, expected(image, resample))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_all_kinds_of_png_are_read_as_pillow_reads_them(functions, mode):
    image = picture(90, 80, mode)
    got = tensor(functions["bilinear"], encoded(image, "PNG"))
    np.testing.assert_array_equal(got, expected(image, Image.BILINEAR))


@pytest.mark.parametrize("options", [
    {"quality": 90}, {"quality": 95, "subsampling": 0}, {"quality": 80, "progressive": True}, {"quality": 90, "restart_marker_rows": 1},
], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_differs_from_pillows_by_less_than_one_step_of_colour_in_the_mean(functions, mode, options):
    # A JPEG's decoding is not defined to the bit; ours and libjpeg-turbo's round differently.
    file = encoded(picture(320, 240, mode).resize((640, 480)), "JPEG", **options)
    got = tensor(functions["bilinear"], file)
    step = np.array(STD, np.float32).reshape(1, 3, 1, 1) * 255
    away = np.abs(got - expected(Image.open(io.BytesIO(file)), Image.BILINEAR)) * step
    assert away.mean() < 1 and away.max() < 8, (away.mean(), away.max())


@pytest.mark.parametrize("change", [
    lambda file: file + b"SEFT" + bytes(200),
    lambda file: file + file,
    lambda file: file[:-2],
    lambda file: file[:2] + b"\xff\xff\xff" + file[2:],
], ids=["trailer", "second image", "no end marker", "fill bytes"])
def test_what_cameras_write_around_an_image_changes_nothing(functions, change):
    file = encoded(picture(160, 120), "JPEG", quality=90)
    plain, changed = tensor(functions["bilinear"], file), tensor(functions["bilinear"], change(file))
    np.testing.assert_array_equal(plain, changed)


def test_broken_images_are_the_clients_fault_however_they_are_broken(functions):
    rng = np.random.default_rng(7)
    whole = [encoded(picture(48, 40), "JPEG", progressive=True), encoded(picture(48, 40, "P"), "PNG")]
    statuses = set()
    for at in range(200):
        file = bytearray(whole[at % 2])
        for place in rng.integers(0, min(len(file), 700), 3):
            file[place] = rng.integers(0, 256)
        statuses.add(post(functions["bilinear"], bytes(file))[0])
    assert statuses == {200, 400} or statuses == {200, 400, 413}, statuses


def test_a_jpeg_that_breaks_off_is_refused(functions):
    file = encoded(picture(320, 240), "JPEG")
    status, answer = post(functions["bilinear"], file[: len(file) // 2])
    assert status == 400 and "cannot be decoded" in answer["error"], answer


def test_labels_come_best_first_with_their_shares(functions):
    image = Image.new("RGB", (30, 20), (0, 255, 51))
    status, answer = post(functions["labels"], encoded(image, "PNG"))
    assert status == 200, answer
    shares = np.exp([0, 1, 0.2]) / np.exp([0, 1, 0.2]).sum()
    assert [(one["label"], one["index"]) for one in answer["labels"]] == [("green", 1), ("blue", 2)]
    np.testing.assert_allclose([one["score"] for one in answer["labels"]], shares[[1, 2]], rtol=1e-6)
