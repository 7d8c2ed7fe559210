"""Every call of tritonclient's HTTP client that the sidecar serves."""

import asyncio

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

import models


@pytest.fixture()
def linear(node):
    with triton.InferenceServerClient(node.urls["linear"], concurrency=4) as client:
        yield client


@pytest.fixture()
def every_type(node):
    with triton.InferenceServerClient(node.urls["every-type"]) as client:
        yield client


def x(rows=3, seed=1):
    return np.random.default_rng(seed).standard_normal((rows, models.INPUTS), np.float32)


def tensor(name, datatype, numbers, binary=True):
    made = triton.InferInput(name, list(numbers.shape), datatype)
    made.set_data_from_numpy(numbers, binary_data=binary)
    return made


def check(result, numbers):
    scores, best = models.linear_answer(numbers)
    np.testing.assert_allclose(result.as_numpy("scores"), scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(result.as_numpy("best"), best)


def refused(call, status, *words):
    with pytest.raises(InferenceServerException) as caught:
        call()
    assert caught.value.status() == str(status), caught.value
    for word in words:
        assert word in caught.value.message(), caught.value
    return caught.value


def test_health(linear):
    assert linear.is_server_live()
    assert linear.is_server_ready()
    assert linear.is_model_ready("linear")
    assert linear.is_model_ready("linear", "1")
    assert not linear.is_model_ready("another")


def test_server_metadata(linear):
    about = linear.get_server_metadata()
    assert "faaswap" in about["name"]
    assert "binary_tensor_data" in about["extensions"]


def test_model_metadata(linear):
    about = linear.get_model_metadata("linear")
    assert about["name"] == "linear"
    assert about["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, models.INPUTS]}]
    assert about["outputs"] == [
        {"name": "scores", "datatype": "FP32", "shape": [-1, models.OUTPUTS]},
        {"name": "best", "datatype": "INT64", "shape": [-1]},
    ]
    refused(lambda: linear.get_model_metadata("another"), 404, "another")


def test_model_config(linear):
    config = linear.get_model_config("linear")
    assert config["max_batch_size"] == 0
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, models.INPUTS]}]


def test_repository(linear):
    index = linear.get_model_repository_index()
    assert [(line["name"], line["state"]) for line in index] == [("linear", "READY")]
    linear.load_model("linear")
    refused(lambda: linear.load_model("another"), 404)
    refused(lambda: linear.unload_model("linear"), 501)


def test_statistics_count_requests(linear):
    def successes():
        stats = linear.get_inference_statistics("linear")["model_stats"]
        assert [line["name"] for line in stats] == ["linear"]
        return stats[0]["inference_stats"]["success"]["count"]

    before = successes()
    linear.infer("linear", [tensor("x", "FP32", x())])
    assert successes() == before + 1
    assert linear.get_inference_statistics()["model_stats"]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_infer(linear, binary_in, binary_out):
    outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("scores", "best")]
    check(linear.infer("linear", [tensor("x", "FP32", x(), binary_in)], outputs=outputs), x())


def test_all_outputs_come_when_none_is_named(linear):
    check(linear.infer("linear", [tensor("x", "FP32", x())], model_version="1"), x())


def test_only_the_named_output_comes(linear):
    outputs = [triton.InferRequestedOutput("best")]
    answer = linear.infer("linear", [tensor("x", "FP32", x())], outputs=outputs)
    assert [output["name"] for output in answer.get_response()["outputs"]] == ["best"]
    np.testing.assert_array_equal(answer.as_numpy("best"), models.linear_answer(x())[1])
    assert answer.as_numpy("scores") is None


def test_the_request_s_id_comes_back(linear):
    answer = linear.infer("linear", [tensor("x", "FP32", x())], request_id="order 66/ü")
    assert answer.get_response()["id"] == "order 66/ü"


@pytest.mark.parametrize("request_coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_compression(linear, request_coding, response_coding, binary):
    numbers = x(rows=64)
    answer = linear.infer(
        "linear",
        [tensor("x", "FP32", numbers, binary)],
        outputs=[triton.InferRequestedOutput(name, binary_data=binary) for name in ("scores", "best")],
        request_compression_algorithm=request_coding,
        response_compression_algorithm=response_coding,
    )
    check(answer, numbers)


def every_input(numbers, binary):
    return [tensor(f"in_{name}", name, numbers[name], binary) for name in numbers]


def test_every_type_as_binary_data(every_type):
    numbers = {name: models.some(name) for name in models.TYPES}
    answer = every_type.infer("every-type", every_input(numbers, binary=True))
    for name, sent in numbers.items():
        np.testing.assert_array_equal(answer.as_numpy(f"out_{name}"), np.concatenate([sent, sent], axis=1), name)


def test_every_type_as_json(every_type):
    # JSON has no numbers of 16 bits by the protocol, so these two go as binary data.
    numbers = {name: models.some(name, seed=2) for name in models.TYPES}
    inputs = [tensor(f"in_{name}", name, numbers[name], name in ("FP16", "BF16")) for name in numbers]
    outputs = [triton.InferRequestedOutput(f"out_{t}", binary_data=t in ("FP16", "BF16")) for t in models.TYPES]
    answer = every_type.infer("every-type", inputs, outputs=outputs)
    for name, sent in numbers.items():
        np.testing.assert_array_equal(answer.as_numpy(f"out_{name}"), np.concatenate([sent, sent], axis=1), name)


def test_no_rows_give_no_rows(every_type):
    numbers = {name: models.some(name)[:0] for name in models.TYPES}
    answer = every_type.infer("every-type", every_input(numbers, binary=True))
    assert answer.as_numpy("out_FP32").shape == (0, 6)


def test_async_infer(linear):
    calls = {seed: linear.async_infer("linear", [tensor("x", "FP32", x(seed=seed))]) for seed in range(8)}
    for seed, call in calls.items():
        check(call.get_result(timeout=60), x(seed=seed))


def test_bodies_can_be_made_and_read_by_themselves(linear):
    body, head_len = triton.InferenceServerClient.generate_request_body([tensor("x", "FP32", x())])
    assert head_len and body
    answer = linear.infer("linear", [tensor("x", "FP32", x())]).get_response()
    assert answer["model_name"] == "linear" and answer["model_version"] == "1"


def test_asyncio(node):
    async def ask():
        async with triton_aio.InferenceServerClient(node.urls["linear"]) as client:
            assert await client.is_server_ready()
            assert await client.is_model_ready("linear")
            assert (await client.get_model_metadata("linear"))["name"] == "linear"
            calls = [client.infer("linear", [tensor("x", "FP32", x(seed=seed))]) for seed in range(8)]
            return await asyncio.gather(*calls)

    for seed, answer in enumerate(asyncio.run(ask())):
        check(answer, x(seed=seed))


def test_wrong_requests_are_refused_with_what_was_expected(linear):
    def infer(name="x", datatype="FP32", numbers=None, model="linear", **more):
        numbers = x() if numbers is None else numbers
        return lambda: linear.infer(model, [tensor(name, datatype, numbers)], **more)

    refused(infer(model="another"), 404, "another")
    refused(infer(model_version="7"), 404)
    refused(infer(name="y"), 400, "y")
    refused(infer(datatype="INT32", numbers=np.zeros((3, models.INPUTS), np.int32)), 400, "INT32", "FP32")
    refused(infer(numbers=np.zeros((3, 9), np.float32)), 400, "9", "8")
    refused(infer(numbers=np.zeros(models.INPUTS, np.float32)), 400)
    refused(infer(outputs=[triton.InferRequestedOutput("nothing")]), 400, "nothing")
    refused(infer(outputs=[triton.InferRequestedOutput("scores", class_count=2)]), 400)
    refused(lambda: linear.infer("linear", []), 400, "x")
    refused(lambda: linear.infer("linear", [tensor("x", "FP32", x()), tensor("x", "FP32", x())]), 400, "x")
    text = np.array([["a"] * models.INPUTS], dtype=np.object_)
    refused(infer(datatype="BYTES", numbers=text), 400, "BYTES")
    check(infer()(), x())


def test_what_is_not_offered_says_so(linear):
    refused(lambda: linear.get_trace_settings(), 501)
    refused(lambda: linear.get_log_settings(), 501)
    refused(lambda: linear.get_system_shared_memory_status(), 501)
    refused(lambda: linear.get_cuda_shared_memory_status(), 501)
