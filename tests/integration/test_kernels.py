"""`GET /models/{name}/kernels/{layer}`: the picture, its headers, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pictures
import pytest
import tiny
import torchvision  # noqa: F401 - slow to import; here no clock runs
from gates import Hold
from numpy.typing import NDArray
from starlette.testclient import TestClient

from service.cam.tiles import GAP
from service.errors import ShuttingDown
from service.routes.kernel_images import NAMED

KERNELS = ["features.0", "features.3", "head"]


def get(client: TestClient, path: str, status: int = 200) -> Any:
    response = client.get(path)
    assert response.status_code == status, response.text
    return response


def sheet(response: Any) -> NDArray[np.uint8]:
    assert response.headers["content-type"] == "image/png"
    return np.asarray(pictures.opened(response.content))


def counts(response: Any) -> tuple[int, int]:
    return int(response.headers["x-kernels"]), int(response.headers["x-kernels-left-out"])


def test_a_first_convolution_is_in_colour(serve: Any) -> None:
    with serve(models=("tiny:paper",)) as client:
        response = get(client, "/models/paper/kernels/maps")
    assert counts(response) == (2, 0)
    colours = sheet(response)
    assert colours[GAP, GAP].tolist() == [255, 0, 0]
    assert colours[GAP, -GAP - 1].tolist() == [0, 255, 0]


def test_the_list_of_layers_says_which_have_kernels(client: TestClient) -> None:
    layers = get(client, "/models/small/layers").json()["layers"]
    assert [layer["path"] for layer in layers if layer["kernels"]] == KERNELS


def test_paths_have_dots_and_other_layers_are_grey(client: TestClient) -> None:
    response = get(client, "/models/small/kernels/features.3")
    assert counts(response) == (16 * 8, 0)
    assert sheet(response).ndim == 2
    assert sheet(get(client, "/models/small/kernels/features.0")).shape[2] == 3


def test_a_linear_layer_is_its_matrix(client: TestClient) -> None:
    response = get(client, "/models/small/kernels/head")
    assert counts(response) == (7, 0)
    factor = (1024 - 2 * GAP) // 16
    shown = sheet(response)[GAP:-GAP:factor, GAP:-GAP:factor] / 255
    weight = tiny.SmallNet().head.weight.detach().numpy()
    assert shown == pytest.approx((weight - weight.min()) / np.ptp(weight), abs=0.003)


def test_each_model_shows_its_own_weights(client: TestClient) -> None:
    small, other = (
        get(client, f"/models/{name}/kernels/features.0").content for name in ("small", "other")
    )
    assert small != other


def test_the_picture_keeps_to_the_render_side_and_says_what_it_left_out(serve: Any) -> None:
    with serve(max_render_side=32) as client:
        response = get(client, "/models/small/kernels/features.3")
    assert counts(response) == (128, 128 - 6 * 6)
    assert sheet(response).shape == (32, 32)


def test_every_layer_is_drawn_or_refused_with_the_layers_that_have_kernels(
    client: TestClient,
) -> None:
    for layer in get(client, "/models/small/layers").json()["layers"]:
        path = f"/models/small/kernels/{layer['path']}"
        if layer["path"] in KERNELS:
            sheet(get(client, path))
            continue
        problem = get(client, path, 422).json()
        assert problem["code"] == "invalid_option"
        inside = layer["path"] == "features"
        for known in KERNELS[:2] if inside else KERNELS:
            assert known in problem["detail"]
        assert ("head" in problem["detail"]) is not inside


@pytest.mark.timeout(30)
def test_a_refusal_names_a_few_layers_of_many(serve: Any) -> None:
    settings = {"models": ("torchvision/alexnet",), "allow_random_weights": True}
    with serve(**settings) as client:
        detail = get(client, "/models/alexnet/kernels/features.1", 422).json()["detail"]
        assert "features.0, features.3, features.6, features.8, features.10, " in detail
        for layer, kernels in (("0", 64), ("3", 192 * 64), ("6", 384 * 192)):
            response = get(client, f"/models/alexnet/kernels/features.{layer}")
            assert counts(response) == (kernels, 0)
    assert NAMED >= 8


def test_unknown_models_and_layers_are_404_with_the_nearest_names(client: TestClient) -> None:
    problem = get(client, "/models/smal/kernels/head", 404).json()
    assert (problem["code"], "'small'" in problem["detail"]) == ("unknown_model", True)
    problem = get(client, "/models/small/kernels/feature.0", 404).json()
    assert (problem["code"], "'features.0'" in problem["detail"]) == ("unknown_layer", True)
    get(client, "/models/small/kernels/a/b", 404)
    get(client, "/models/small/kernels/", 404)


def test_weights_that_are_not_finite_are_said(serve: Any) -> None:
    with serve() as client:
        model = client.app.state.service.pool.model("small")
        head = model.module.head
        kept = head.weight.data
        head.weight.data = kept * float("nan")
        try:
            problem = get(client, "/models/small/kernels/head", 500).json()
        finally:
            head.weight.data = kept
    assert problem["code"] == "render_failed"


def test_pictures_of_kernels_count_among_what_is_admitted(serve: Any) -> None:
    with serve(max_queue=1) as client:
        admission = client.app.state.service.admission
        with admission.admit():
            response = get(client, "/models/small/kernels/head", 429)
            assert int(response.headers["retry-after"]) >= 1
        get(client, "/models/small/kernels/head")
        assert admission.images == 0


def test_a_picture_that_is_not_ready_in_time_is_504(serve: Any) -> None:
    with serve(request_timeout=0.05) as client:
        held = Hold(client.app.state.service.scheduler)
        held.wait_until_it_holds()
        try:
            problem = get(client, "/models/small/kernels/head", 504).json()
        finally:
            held.release()
    assert problem["code"] == "deadline_exceeded"


def test_a_service_that_ends_draws_nothing_new(serve: Any) -> None:
    with serve() as client:
        client.app.state.service.admission.close()
        assert get(client, "/models/small/kernels/head", 503).json()["code"] == ShuttingDown.code


def test_the_document_says_what_comes_back(client: TestClient) -> None:
    route = get(client, "/openapi.json").json()["paths"]["/models/{name}/kernels/{layer}"]["get"]
    assert route["tags"] == ["models"]
    assert set(route["responses"]["200"]["content"]) == {"image/png"}
    assert set(route["responses"]["200"]["headers"]) == {"X-Kernels", "X-Kernels-Left-Out"}
    assert {"404", "422", "429"} <= set(route["responses"])
