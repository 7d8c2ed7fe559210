"""Every call of tritonclient's gRPC client that the sidecar serves; it comes in on the same port as HTTP."""

import asyncio
import queue

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

import models

ANSWER_WITHIN_S = 60


@pytest.fixture()
def linear(node):
    with triton.InferenceServerClient(node.urls["linear"]) as client:
        yield client


@pytest.fixture()
def every_type(node):
    with triton.InferenceServerClient(node.urls["every-type"]) as client:
        yield client


def x(rows=3, seed=1):
    return np.random.default_rng(seed).standard_normal((rows, models.INPUTS), np.float32)


def tensor(name, datatype, numbers):
    made = triton.InferInput(name, list(numbers.shape), datatype)
    made.set_data_from_numpy(numbers)
    return made


def check(result, numbers):
    scores, best = models.linear_answer(numbers)
    np.testing.assert_allclose(result.as_numpy("scores"), scores, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(result.as_numpy("best"), best)


def refused(call, status, *words):
    with pytest.raises(InferenceServerException) as caught:
        call()
    assert caught.value.status() == f"StatusCode.{status}", caught.value
    for word in words:
        assert word in caught.value.message(), caught.value


def test_health(linear):
    assert linear.is_server_live()
    assert linear.is_server_ready()
    assert linear.is_model_ready("linear")
    refused(lambda: linear.is_model_ready("another"), "NOT_FOUND", "another")


def test_metadata_and_configuration(linear):
    assert "faaswap" in linear.get_server_metadata().name
    about = linear.get_model_metadata("linear")
    assert [(i.name, i.datatype, list(i.shape)) for i in about.inputs] == [("x", "FP32", [-1, models.INPUTS])]
    assert [o.name for o in about.outputs] == ["scores", "best"]
    assert linear.get_model_metadata("linear", as_json=True)["name"] == "linear"
    config = linear.get_model_config("linear").config
    assert (config.name, config.max_batch_size, config.input[0].name) == ("linear", 0, "x")
    refused(lambda: linear.get_model_config("another"), "NOT_FOUND")


def test_repository(linear):
    assert [(line.name, line.state) for line in linear.get_model_repository_index().models] == [("linear", "READY")]
    linear.load_model("linear")
    refused(lambda: linear.load_model("another"), "NOT_FOUND")
    refused(lambda: linear.unload_model("linear"), "UNIMPLEMENTED")


def test_statistics_count_requests(linear):
    def successes():
        return linear.get_inference_statistics("linear").model_stats[0].inference_stats.success.count

    before = successes()
    linear.infer("linear", [tensor("x", "FP32", x())])
    assert successes() == before + 1


def test_infer(linear):
    answer = linear.infer("linear", [tensor("x", "FP32", x())], request_id="7", model_version="1")
    check(answer, x())
    assert answer.get_response().id == "7"


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compressed_messages_are_refused_rather_than_misread(linear, coding):
    # Only HTTP offers compression; gRPC's own is not offered, and clients use it only when told to.
    refused(lambda: linear.infer("linear", [tensor("x", "FP32", x())], compression_algorithm=coding), "UNIMPLEMENTED")
    check(linear.infer("linear", [tensor("x", "FP32", x())]), x())


def test_only_the_named_output_comes(linear):
    answer = linear.infer("linear", [tensor("x", "FP32", x())], outputs=[triton.InferRequestedOutput("best")])
    assert [output.name for output in answer.get_response().outputs] == ["best"]
    np.testing.assert_array_equal(answer.as_numpy("best"), models.linear_answer(x())[1])


def test_every_type(every_type):
    numbers = {name: models.some(name) for name in models.TYPES}
    answer = every_type.infer("every-type", [tensor(f"in_{name}", name, numbers[name]) for name in numbers])
    for name, sent in numbers.items():
        np.testing.assert_array_equal(answer.as_numpy(f"out_{name}"), np.concatenate([sent, sent], axis=1), name)


def collect(answers, count):
    return [answers.get(timeout=ANSWER_WITHIN_S) for _ in range(count)]


def test_async_infer(linear):
    answers = queue.Queue()
    for seed in range(8):
        note = lambda result, error: answers.put((result, error))  # noqa: E731
        linear.async_infer("linear", [tensor("x", "FP32", x(seed=seed))], note, request_id=str(seed))
    collected = collect(answers, 8)
    assert all(error is None for _, error in collected), collected
    assert sorted(int(result.get_response().id) for result, _ in collected) == list(range(8))
    for result, _ in collected:
        check(result, x(seed=int(result.get_response().id)))


def test_a_stream_answers_each_request_and_a_failed_one_fails_alone(linear):
    answers = queue.Queue()
    linear.start_stream(lambda result, error: answers.put((result, error)))
    for seed in (0, 1):
        linear.async_stream_infer("linear", [tensor("x", "FP32", x(seed=seed))], request_id=str(seed))
    linear.async_stream_infer("linear", [tensor("y", "FP32", x())])
    linear.async_stream_infer("linear", [tensor("x", "FP32", x(seed=2))], request_id="2")
    collected = collect(answers, 4)
    linear.stop_stream()
    failed = [error for result, error in collected if error is not None]
    assert len(failed) == 1 and "y" in failed[0].message(), collected
    for result, _ in (one for one in collected if one[1] is None):
        check(result, x(seed=int(result.get_response().id)))


def test_asyncio(node):
    async def ask():
        async with triton_aio.InferenceServerClient(node.urls["linear"]) as client:
            assert await client.is_server_ready()
            assert (await client.get_model_metadata("linear")).name == "linear"
            calls = [client.infer("linear", [tensor("x", "FP32", x(seed=seed))]) for seed in range(8)]
            return await asyncio.gather(*calls)

    for seed, answer in enumerate(asyncio.run(ask())):
        check(answer, x(seed=seed))


def test_wrong_requests_are_refused_with_what_was_expected(linear):
    def infer(name="x", datatype="FP32", numbers=None, model="linear", **more):
        numbers = x() if numbers is None else numbers
        return lambda: linear.infer(model, [tensor(name, datatype, numbers)], **more)

    refused(infer(model="another"), "NOT_FOUND", "another")
    refused(infer(model_version="7"), "NOT_FOUND")
    refused(infer(name="y"), "INVALID_ARGUMENT", "y")
    refused(infer(datatype="INT32", numbers=np.zeros((3, models.INPUTS), np.int32)), "INVALID_ARGUMENT", "INT32")
    refused(infer(numbers=np.zeros((3, 9), np.float32)), "INVALID_ARGUMENT", "9")
    refused(infer(outputs=[triton.InferRequestedOutput("nothing")]), "INVALID_ARGUMENT", "nothing")
    refused(infer(outputs=[triton.InferRequestedOutput("scores", class_count=2)]), "INVALID_ARGUMENT")
    refused(lambda: linear.infer("linear", []), "INVALID_ARGUMENT", "x")
    text = np.array([["a"] * models.INPUTS], dtype=np.object_)
    refused(infer(datatype="BYTES", numbers=text), "INVALID_ARGUMENT", "BYTES")
    check(infer()(), x())


def test_what_is_not_offered_says_so(linear):
    refused(lambda: linear.get_trace_settings(), "UNIMPLEMENTED")
    refused(lambda: linear.get_log_settings(), "UNIMPLEMENTED")
    refused(lambda: linear.get_system_shared_memory_status(), "UNIMPLEMENTED")
