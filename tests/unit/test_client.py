"""client: what is sent, when it is sent again, and how answers are taken apart."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, get_type_hints

import httpx
import numpy as np
import pictures
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as coco

from api_schemas import answers
from api_schemas.answers import MaskRLE
from api_schemas.client import AsyncClient, Client, errors, pixels, results
from api_schemas.client.arguments import (
    ExperimentArguments,
    ExplainArguments,
    PredictArguments,
)
from api_schemas.client.pixel_arrays import to_uint8
from api_schemas.client.requests import (
    ApiCall,
    RetryPolicy,
    Send,
    Wait,
    classify,
    exchange,
    image_file,
    read_options,
)
from api_schemas.client.results import Explanation, Prediction, Result, decode_mask, read_answer
from api_schemas.options import ExperimentOptions, ExplainOptions, Mask, PredictOptions

CALL = ApiCall("GET", "/models")
REQUEST = httpx.Request("GET", "http://service/models")


class Clock:
    """Time that passes where a wait is asked for, and by `lag` with every answer."""

    def __init__(self, lag: float = 0.0) -> None:
        self.seconds, self.lag = 100.0, lag

    def __call__(self) -> float:
        return self.seconds


def talk(heard: list[Any], lag: float = 0.0, **patience: Any) -> tuple[Any, list[Any]]:
    """How an exchange ends that hears these in turn, and its steps."""
    clock, steps, replies = Clock(lag), [], iter(heard)
    talking = exchange(CALL, RetryPolicy(now=clock, jitter=lambda: 1.0, **patience))
    said = None
    try:
        while True:
            step = talking.send(said)
            steps.append(step)
            if isinstance(step, Wait):
                clock.seconds += step.seconds
                said = None
            else:
                clock.seconds += lag
                said = next(replies)
    except StopIteration as end:
        return end.value, steps
    except errors.ClientError as error:
        return error, steps


def answer(status: int = 200, retry_after: str | None = None, **problem: Any) -> httpx.Response:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    body = {"title": "", "status": status, "code": "queue_full", "detail": "Full.", **problem}
    return httpx.Response(
        status, json={"request_id": "r1", **body}, headers=headers, request=REQUEST
    )


def lost(kind: type[httpx.TransportError] = httpx.ConnectError) -> httpx.TransportError:
    return kind("gone", request=REQUEST)


def waits(steps: list[Any]) -> list[float]:
    return [step.seconds for step in steps if isinstance(step, Wait)]


# ---- asking again


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_service_is_not_asked_again_before_it_said(status: int) -> None:
    good = answer()
    end, steps = talk([answer(status, "7"), answer(status, "3"), good])
    assert end is good
    first, second = waits(steps)
    assert 7 <= first < 8
    assert 3 <= second < 4
    assert [type(step) for step in steps] == [Send, Wait, Send, Wait, Send]


def test_a_date_in_retry_after_is_read() -> None:
    _, steps = talk([answer(429, "Wed, 21 Oct 2015 07:28:00 GMT"), answer()])
    assert waits(steps)[0] < 1
    assert errors.failure(answer(503, "soon")).retry_after is None
    assert errors.failure(answer(503, "Fri, 01 Jan 2100 00:00:00 -0000")).retry_after > 1e6


def test_without_retry_after_the_waits_double() -> None:
    _, steps = talk([answer(503), answer(503), answer(503), answer()])
    assert waits(steps) == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("kind", [httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError])
def test_a_lost_connection_is_tried_again(kind: type[httpx.TransportError]) -> None:
    good = answer()
    end, steps = talk([lost(kind), lost(kind), good])
    assert end is good
    assert waits(steps) == [0.5, 1.0]


def test_chance_spreads_those_who_were_refused_together() -> None:
    talking = exchange(CALL, RetryPolicy(jitter=lambda: 0.0))
    next(talking)
    assert talking.send(lost()) == Wait(0.25)


def test_attempts_are_bounded() -> None:
    end, steps = talk([lost()] * 3, attempts=3)
    assert isinstance(end, errors.ConnectionFailed)
    assert isinstance(end.__cause__, httpx.ConnectError)
    assert sum(isinstance(step, Send) for step in steps) == 3


def test_it_gives_up_where_the_wait_would_be_too_late() -> None:
    """At once: who is told to come back in a minute, and has ten seconds, learns it now."""
    end, steps = talk([answer(429, "60")], seconds=10)
    assert (type(end), end.retry_after, end.status) == (errors.Busy, 60, 429)
    assert waits(steps) == []


def test_each_attempt_gets_what_is_left_of_the_time() -> None:
    _, steps = talk([lost(), lost(), answer()], lag=2.0, seconds=10)
    assert [step.seconds for step in steps if isinstance(step, Send)] == [10, 7.5, 4.5]
    request = steps[0].request(httpx.Client(base_url="http://service"))
    assert request.headers["x-request-timeout"] == "10.000"
    assert request.extensions["timeout"]["read"] > 10


@pytest.mark.parametrize("status", [400, 401, 404, 413, 415, 422, 500, 504])
def test_what_will_not_change_is_not_asked_again(status: int) -> None:
    end, steps = talk([answer(status)])
    assert len(steps) == 1
    assert (end.status, end.code, end.detail, end.request_id) == (
        status,
        "queue_full",
        "Full.",
        "r1",
    )


def test_no_answer_in_time_is_not_asked_again() -> None:
    end, steps = talk([lost(httpx.ReadTimeout)])
    assert isinstance(end, errors.TimedOut)
    assert len(steps) == 1


# ---- errors


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.ImageRefused),
        (401, errors.Unauthorized),
        (404, errors.NotFound),
        (415, errors.ImageRefused),
        (422, errors.InvalidOption),
        (500, errors.ServiceError),
        (503, errors.Busy),
        (504, errors.DeadlineExceeded),
    ],
)
def test_the_status_chooses_the_class(status: int, kind: type[errors.ClientError]) -> None:
    assert type(errors.failure(answer(status))) is kind
    assert type(errors.service_error(status, "x", "y", None)) is kind


def test_a_proxys_page_is_an_error_with_its_first_words() -> None:
    page = httpx.Response(502, text="<h1>Bad Gateway</h1>", request=REQUEST)
    error = errors.failure(page)
    assert (type(error), error.code, error.status) == (errors.ServiceError, "http_error", 502)
    assert "Bad Gateway" in error.detail


@pytest.mark.parametrize(
    "other",
    [
        httpx.Response(307, headers={"location": "/login"}),
        httpx.Response(200, text="<html>hello</html>"),
        httpx.Response(200, json={"models": "none"}),
    ],
)
def test_another_service_is_no_camserve(other: httpx.Response) -> None:
    with (
        Client("http://other", transport=httpx.MockTransport(lambda _: other)) as client,
        pytest.raises(errors.UnexpectedAnswer, match="http://other/models"),
    ):
        client.models()


# ---- what is sent


def sent(call: Callable[[Client], Any], url: str = "http://service", **about: Any) -> httpx.Request:
    """The request of a call; it is answered with nothing that is read."""
    seen: list[httpx.Request] = []

    def note(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(204)

    with (
        Client(url, transport=httpx.MockTransport(note), **about) as client,
        pytest.raises(errors.UnexpectedAnswer),
    ):
        call(client)
    (request,) = seen
    return request


def test_the_prefix_of_a_proxy_the_key_and_the_time_are_sent() -> None:
    request = sent(
        lambda client: client.layers("my/model"), "http://host/vision", api_key="k", timeout=5
    )
    assert request.url.raw_path == b"/vision/models/my%2Fmodel/layers"
    assert request.headers["authorization"] == "Bearer k"
    assert request.headers["accept"] == "application/json"
    assert 4 < float(request.headers["x-request-timeout"]) <= 5


def test_files_are_a_form_and_options_its_query() -> None:
    ask = classify("/explain", [b"one", b"two"], read_options(ExplainOptions, {"layer": "a.b"}))
    assert ask.content["params"] == {"layer": ["a.b"]}
    assert [file[1] for _, file in ask.content["files"]] == [b"one", b"two"]


def test_a_url_makes_the_request_json() -> None:
    options = read_options(ExplainOptions, {"targets": [0, "cat"], "top_k": 1})
    ask = classify("/explain", ["https://host/cat.jpg", b"two"], options)
    assert ask.content == {
        "json": {
            "targets": ["id:0", "cat"],
            "top_k": 1,
            "images": [{"url": "https://host/cat.jpg"}, {"data": "dHdv"}],
        }
    }


def test_options_that_would_make_a_long_query_travel_in_the_body() -> None:
    options = read_options(ExplainOptions, {"targets": ["x" * 150] * 40})
    assert classify("/explain", [b""], options).content["json"]["targets"] == ["x" * 150] * 40


def test_options_are_read_as_the_service_does() -> None:
    options = read_options(ExplainOptions, {"include": "grid", "targets": 3, "layer": ["a", "b"]})
    assert (options.include, options.targets, options.layer) == (["grid"], ["id:3"], ["a", "b"])
    with pytest.raises(TypeError, match="did you mean 'contrast'"):
        read_options(ExplainOptions, {"contrst": 1})
    with pytest.raises(TypeError, match="there is no option 'layer'"):
        read_options(PredictOptions, {"layer": "a"})
    with pytest.raises(ValueError, match=r"opacity: .*less than or equal to 1"):
        read_options(ExplainOptions, {"opacity": 2})
    with pytest.raises(ValueError, match="stands alone"):
        read_options(ExplainOptions, {"include": ["none", "grid"]})


def test_the_arguments_of_the_calls_are_the_options_of_the_service() -> None:
    """One name for one thing, also where an editor completes it."""
    for arguments, options in (
        (ExplainArguments, ExplainOptions),
        (PredictArguments, PredictOptions),
        (ExperimentArguments, ExperimentOptions),
    ):
        assert set(arguments.__annotations__) == set(options.model_fields)


def test_a_mask_is_a_dict_a_model_or_text() -> None:
    boxes = {"boxes": [[0, 0, 4.5, 4]], "fill": "grey"}
    expected = json.loads(read_options(ExplainOptions, {"mask": json.dumps(boxes)}).mask)
    for mask in (boxes, Mask.model_validate(boxes)):
        assert json.loads(read_options(ExplainOptions, {"mask": mask}).mask) == expected


# ---- pictures


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_a_pil_image_of_any_mode_becomes_a_file(mode: str) -> None:
    image = Image.fromarray(pictures.noise()).convert(mode)
    found = pictures.opened(image_file(image))
    assert (found.format, found.size) == ("PNG", (80, 60))
    if mode == "RGB":
        assert np.array_equal(np.asarray(found), pictures.noise())


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4)])
def test_pixels_become_a_file_of_the_same_pixels(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    found = pictures.opened(image_file(pixels))
    assert np.array_equal(np.asarray(found), pixels.squeeze())


BYTES = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "image",
    [
        BYTES.astype(np.float32) / 255,
        BYTES.astype(np.float64) / 255,
        np.moveaxis(BYTES, -1, 0),
        np.moveaxis(BYTES, -1, 0).astype(np.float32) / 255,
        torch.from_numpy(BYTES),
        torch.from_numpy(BYTES).permute(2, 0, 1),
        (torch.from_numpy(BYTES).permute(2, 0, 1) / 255).requires_grad_(),
    ],
    ids=["HWC 32", "HWC 64", "CHW bytes", "CHW 32", "tensor HWC", "tensor CHW", "with gradient"],
)
def test_floats_channels_first_and_tensors_become_a_file_of_the_same_pixels(image: Any) -> None:
    assert np.array_equal(np.asarray(pictures.opened(image_file(image))), BYTES)


def test_half_precision_is_within_a_level() -> None:
    half = (torch.from_numpy(BYTES).permute(2, 0, 1) / 255).to(torch.bfloat16)
    found = np.asarray(pictures.opened(image_file(half))).astype(int)
    assert np.abs(found - BYTES).max() <= 1


def test_a_stated_range_is_black_to_white() -> None:
    ramp = np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(pixels(ramp, -1, 1), np.arange(256).reshape(16, 16))


def test_where_both_places_could_be_channels_tensors_are_read_with_them_first() -> None:
    both = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    assert to_uint8(both).shape == (3, 5, 3)
    assert np.array_equal(to_uint8(torch.from_numpy(both)), np.moveaxis(both, 0, 2))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), ["(2, 8, 8, 3)", "list(batch)"]),
        (torch.zeros((2, 3, 8, 8)), ["(2, 3, 8, 8)", "list(batch)"]),
        (np.zeros((0, 4), np.uint8), ["(0, 4)", "(height, width, 3)"]),
        (np.zeros((8, 8, 5), np.uint8), ["(8, 8, 5)", "(3, height, width)"]),
        (np.zeros((8, 8, 3), np.int64), ["int64", "uint8", "0 to 1"]),
        (np.full((8, 8), 255.0, np.float32), ["255", "0 to 1", "pixels(image, low, high)"]),
        (torch.full((3, 8, 8), -2.1), ["-2.1", "normalization"]),
        (np.full((8, 8), np.nan, np.float32), ["nan", "0 to 1"]),
    ],
)
def test_what_is_no_image_is_refused_with_what_is_accepted(image: Any, words: list[str]) -> None:
    with pytest.raises(errors.UnreadableImage) as caught:
        image_file(image)
    assert all(word in str(caught.value) for word in words), caught.value


# ---- results in notebooks and data frames


def a_result() -> Result:
    heatmap = Image.new("P", (4, 3))
    explanation = Explanation(
        *(2, "<b>tench</b>", 0.75, None, "gradcam", "layer4", (0.0, 1.0), ["saturated"]),
        cost=answers.Cost(forwards=1.0),
        grid=None,
        heatmap=heatmap,
        overlay=None,
        regions=None,
    )
    prediction = Prediction(class_id=2, label="<b>tench</b>", score=0.75, logit=3.0)
    return Result(predictions=[prediction], explanations=[explanation])


def test_a_notebook_shows_map_and_predictions_and_text_is_escaped() -> None:
    html = a_result()._repr_html_()
    assert "<b>tench" not in html
    assert html.count("&lt;b&gt;tench&lt;/b&gt;") == 3  # caption, alternative text, table
    assert "75.0%" in html
    assert "gradcam at layer4<br>saturated" in html
    data = html.split("data:image/png;base64,")[1].split('"')[0]
    assert pictures.opened(base64.b64decode(data)).size == (4, 3)


def test_a_notebook_shows_the_error_of_a_failed_image() -> None:
    failed = Result(error=errors.service_error(415, "unsupported_image", "It is <text>.", "id"))
    assert failed._repr_html_() == "<p><b>unsupported_image</b>: It is &lt;text&gt;.</p>"


def test_a_data_frame_of_predictions_has_the_names_of_their_fields_as_columns() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas comes with the extra `ray`")
    frame = pandas.DataFrame(a_result().predictions)
    assert list(frame.columns) == list(answers.Prediction.model_fields)
    assert frame.loc[0].tolist()[:4] == [2, "<b>tench</b>", 0.75, 3.0]


@pytest.mark.parametrize("name", ["Prediction", "Change"])
def test_what_a_data_frame_reads_has_the_fields_of_the_wire(name: str) -> None:
    decoded = getattr(results, name)
    fields = [each.name for each in dataclasses.fields(decoded)]
    assert fields == list(getattr(answers, name).model_fields)


def test_what_is_read_from_where(tmp_path) -> None:
    (tmp_path / "a.bin").write_bytes(b"file")
    for image in (tmp_path / "a.bin", str(tmp_path / "a.bin"), io.BytesIO(b"file"), b"file"):
        assert image_file(image) == b"file"
    assert image_file("HTTPS://host/a.jpg") == "HTTPS://host/a.jpg"
    with pytest.raises(TypeError, match="'rb'"):
        image_file(io.StringIO("text"))
    with pytest.raises(TypeError, match="int is not an image"):
        image_file(3)
    closed = io.BytesIO()
    closed.close()
    with pytest.raises(errors.UnreadableImage, match="closed file"):
        image_file(closed)
    broken = Image.open(io.BytesIO(pictures.png()[:-60]))
    with pytest.raises(errors.UnreadableImage):
        image_file(broken)


# ---- masks

masks = arrays.arrays(
    np.bool_, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40), fill=st.booleans()
)


@given(masks)
def test_a_mask_is_read_as_pycocotools_wrote_it(mask: np.ndarray) -> None:
    theirs = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    found = decode_mask(MaskRLE(size=theirs["size"], counts=theirs["counts"].decode("ascii")))
    assert found.dtype == np.bool_
    assert np.array_equal(found, mask)


@pytest.mark.parametrize("counts", ["", "1", "0", "P", "ö", "O1"])
def test_run_lengths_that_do_not_fill_the_mask_are_refused(counts: str) -> None:
    with pytest.raises(ValueError, match=r"fill a mask|ascii"):
        decode_mask(MaskRLE(size=(4, 5), counts=counts))


# ---- many


def named_after(request: httpx.Request) -> httpx.Response:
    """An answer whose only label is the picture that was sent."""
    body = request.read()
    label = body.partition(b"\r\n\r\n")[2].partition(b"\r\n")[0].decode()
    found = {"predictions": [{"class_id": 0, "label": label, "score": 1.0, "logit": 1.0}]}
    answer = {"id": "i", "model": {"name": "m", "version": "v"}, "results": [found]}
    return httpx.Response(200, json=answer | {"timing_ms": {}})


def labels(results: list[Any]) -> list[str]:
    return [result.predictions[0].label for result in results]


def test_results_keep_their_order_where_the_first_is_the_slowest() -> None:
    """And never more than `concurrency` are on their way."""
    others = threading.Barrier(2)
    under_way, most, lock = 0, 0, threading.Lock()

    def reply(request: httpx.Request) -> httpx.Response:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        answer = named_after(request)
        if labels(read_answer(answer.content).results)[0] in ("0", "5"):
            others.wait(5)  # the first is answered when the sixth is
        with lock:
            under_way -= 1
        return answer

    images = [str(index).encode() for index in range(9)]
    with Client(transport=httpx.MockTransport(reply)) as client:
        results = list(client.explain_many(images, concurrency=3))
    assert labels(results) == [image.decode() for image in images]
    assert 2 <= most <= 3


def test_progress_counts_what_is_handed_out_and_knows_no_end_of_a_generator() -> None:
    seen: list[tuple[int, int | None]] = []
    images = (str(index).encode() for index in range(3))
    with Client(transport=httpx.MockTransport(named_after)) as client:
        for _ in client.explain_many(images, on_progress=lambda *at: seen.append(at)):
            pass
    assert seen == [(1, None), (2, None), (3, None)]


def test_tasks_that_are_left_early_are_cancelled() -> None:
    """The one that hangs, too: nothing of it stays behind."""

    async def main() -> list[str]:
        hangs, cancelled = asyncio.Event(), []

        async def reply(request: httpx.Request) -> httpx.Response:
            answer = named_after(request)
            (label,) = labels(read_answer(answer.content).results)
            if label != "0":
                hangs.set()
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    cancelled.append(label)
                    raise
            return answer

        async with AsyncClient(transport=httpx.MockTransport(reply)) as client:
            images = [b"0", b"1", b"2", b"3", b"4"]
            async with contextlib.aclosing(client.explain_many(images, concurrency=2)) as many:
                found = labels([await anext(many)])
                await hangs.wait()
            assert asyncio.all_tasks() == {asyncio.current_task()}
        assert cancelled
        return found

    assert asyncio.run(main()) == ["0"]


# ---- the two classes


class Counting(ThreadingHTTPServer):
    """Answers `GET /models` once `together` requests have come, and counts its connections."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, together: int) -> None:
        super().__init__(("127.0.0.1", 0), NoModels)
        self.together = threading.Barrier(together)
        self.connections = 0

    def get_request(self) -> tuple[socket.socket, Any]:
        self.connections += 1
        return super().get_request()


class NoModels(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Counting

    def do_GET(self) -> None:
        self.server.together.wait(10)
        self.send_response(200)
        self.send_header("Content-Length", "13")
        self.end_headers()
        self.wfile.write(b'{"models":[]}')

    def log_message(self, *args: object) -> None:
        """Nothing: a test's output is not the place."""


@pytest.fixture
def counting() -> Iterator[Counting]:
    with Counting(together=40) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_threads_that_share_a_client_keep_their_connections(counting: Counting) -> None:
    """By default 20 of these 40 would be closed, at times one that is in use."""
    url = f"http://127.0.0.1:{counting.server_address[1]}"
    with Client(url, trust_env=False) as client, ThreadPoolExecutor(40) as threads:
        for _ in range(3):
            assert list(threads.map(lambda _: client.models(), range(40))) == [[]] * 40
    assert counting.connections == 40


def test_tasks_that_share_a_client_keep_their_connections(counting: Counting) -> None:
    async def main() -> None:
        url = f"http://127.0.0.1:{counting.server_address[1]}"
        async with AsyncClient(url, trust_env=False) as client:
            for _ in range(3):
                found = await asyncio.gather(*(client.models() for _ in range(40)))
                assert found == [[]] * 40

    asyncio.run(main())
    assert counting.connections == 40


def test_both_clients_have_the_same_calls() -> None:
    def calls(kind: type) -> dict[str, Any]:
        names = [name for name in vars(kind) if not name.startswith("_")]
        return {name: list(get_type_hints(getattr(kind, name))) for name in names}

    threads, tasks = calls(Client), calls(AsyncClient)
    assert threads.pop("close") == tasks.pop("aclose")
    assert threads == tasks


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="timeout"):
        Client(timeout=0)
    with (
        Client(transport=httpx.MockTransport(lambda _: httpx.Response(204))) as client,
        pytest.raises(ValueError, match="concurrency"),
    ):
        client.explain_many([], concurrency=0)


def test_an_array_that_does_not_fit_its_shape_is_an_unexpected_answer() -> None:
    result = {
        "explanations": [
            {
                "class_id": 0,
                "label": "a",
                "score": 1.0,
                "method": "gradcam",
                "layer": "l",
                "range": [0, 1],
                "flags": [],
                "cost": {"forwards": 1},
                "grid": {"shape": [2, 2], "data": base64.b64encode(b"\0" * 12).decode()},
            }
        ]
    }
    body = {"id": "i", "model": {"name": "m", "version": "v"}, "results": [result]}
    text = json.dumps(body | {"timing_ms": {}})
    mock = httpx.MockTransport(lambda _: httpx.Response(200, text=text))
    with (
        Client(transport=mock) as client,
        pytest.raises(errors.UnexpectedAnswer, match="cannot be read"),
    ):
        client.explain(b"picture")
