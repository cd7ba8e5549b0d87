"""`uncertainty` of `/predict`, `/explain` and the protocols: the numbers of plain torch."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import tiny
import torch
from starlette.testclient import TestClient
from torchvision.transforms.v2 import functional as transforms

from api_schemas.client import Client
from api_schemas.client.results import read_answer
from service.images.decode import Preprocessing

PNG = pictures.png(224, 224)
RAW = {"content-type": "image/png"}
B64 = base64.b64encode(PNG).decode()


@pytest.fixture(scope="module")
def client(serve, tmp_path_factory) -> Iterator[TestClient]:
    """One network under a softmax, under sigmoids and bare."""
    folder: Path = tmp_path_factory.mktemp("models")
    tables = [
        f'[[model]]\nname = "{kind}"\nbuilder = "tiny:small"\noutput.activation = "{kind}"\n'
        for kind in ("softmax", "sigmoid", "none")
    ]
    (folder / "models.toml").write_text("\n".join(tables))
    with serve(models=(), config=str(folder / "models.toml")) as client:
        yield client


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    """The network's own, without the service."""
    normal = Preprocessing()
    pixels = torch.from_numpy(pictures.noise(224, 224)).permute(2, 0, 1)
    crop = transforms.center_crop(transforms.resize(pixels, [256], antialias=True), [224, 224])
    batch = transforms.normalize(crop / 255, list(normal.mean), list(normal.std))[None]
    with torch.no_grad():
        return tiny.SmallNet().eval()(batch)[0].double()


def expected(logits: torch.Tensor, output: str) -> dict[str, Any]:
    if output == "sigmoid":
        both = torch.stack([logits, -logits]).sigmoid()
        bits = -(both * both.log2()).sum(0)
        return _near((both[0] - both[1]).abs().min(), bits.mean())
    best = logits.softmax(0).sort(descending=True).values
    return _near(best[0] - best[1], -(best * best.log()).sum() / np.log(len(best)))


def _near(margin: torch.Tensor, entropy: torch.Tensor) -> dict[str, Any]:
    return {
        "margin": pytest.approx(float(margin), abs=1e-5),
        "entropy": pytest.approx(float(entropy), abs=1e-5),
    }


def test_the_network_is_undecided_enough_to_tell_the_definitions_apart(logits) -> None:
    margins = [expected(logits, output)["margin"].expected for output in ("softmax", "sigmoid")]
    assert abs(margins[0] - margins[1]) > 1e-3


@pytest.mark.parametrize("output", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("route", ["/predict", "/explain"])
def test_a_result_has_margin_and_entropy_of_all_classes(
    client: TestClient, logits, route: str, output: str
) -> None:
    """Of all, however few are listed."""
    query = {"model": output, "uncertainty": "true", "top_k": 1}
    answer = client.post(route, params=query, content=PNG, headers=RAW).raise_for_status()
    (result,) = answer.json()["results"]
    assert result["uncertainty"] == expected(logits, output)
    assert len(result["predictions"]) == 1
    decoded = read_answer(answer.content)[0].uncertainty
    assert decoded is not None
    assert decoded.model_dump() == result["uncertainty"]


@pytest.mark.parametrize("route", ["/predict", "/explain"])
def test_without_the_option_there_is_none(client: TestClient, route: str) -> None:
    answer = client.post(route, content=PNG, headers=RAW).raise_for_status()
    assert "uncertainty" not in answer.json()["results"][0]
    assert read_answer(answer.content)[0].uncertainty is None


def test_json_takes_a_boolean_and_each_image_has_its_own(client: TestClient) -> None:
    images = [{"data": B64}, {"data": base64.b64encode(pictures.png(40, 30)).decode()}]
    answer = client.post("/predict", json={"images": images, "uncertainty": True})
    first, second = (each["uncertainty"] for each in answer.json()["results"])
    assert first != second
    refused = client.post("/predict", json={"images": images, "uncertainty": "perhaps"})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_option")
    assert "uncertainty" in refused.json()["detail"]


def test_the_client_asks_by_the_same_name(run_server, logits) -> None:
    with (
        run_server(models=("tiny:small",)) as server,
        Client(server.url, trust_env=False) as client,
    ):
        found = client.predict(PNG, uncertainty=True)[0].uncertainty
        assert found is not None
        assert found.model_dump() == expected(logits, "softmax")
        assert client.predict(PNG)[0].uncertainty is None


def test_kserves_first_protocol_has_it_for_each_instance(client: TestClient, logits) -> None:
    body = {"instances": [{"b64": B64}] * 2, "parameters": {"uncertainty": True}}
    answer = client.post("/v1/models/softmax:predict", json=body).raise_for_status().json()
    assert answer["uncertainty"] == [expected(logits, "softmax")] * 2
    del body["parameters"]
    plain = client.post("/v1/models/softmax:predict", json=body).raise_for_status().json()
    assert list(plain) == ["predictions"]


def infer(client: TestClient, route: str = "infer", **more: Any) -> Any:
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [B64]}
    return client.post(f"/v2/models/sigmoid/{route}", json={"inputs": [tensor], **more})


@pytest.mark.parametrize("route", ["infer", "explain"])
def test_the_open_inference_protocol_has_them_as_outputs(client, logits, route: str) -> None:
    outputs = [{"name": "margin"}, {"name": "entropy"}]
    found = infer(client, route, outputs=outputs).raise_for_status().json()["outputs"]
    assert [(each["name"], each["datatype"], each["shape"]) for each in found] == [
        ("margin", "FP32", [1]),
        ("entropy", "FP32", [1]),
    ]
    values = {each["name"]: each["data"][0] for each in found}
    assert values == expected(logits, "sigmoid")
    described = client.get("/v2/models/sigmoid").json()["outputs"]
    assert {"name": "margin", "datatype": "FP32", "shape": [-1]} in described
    assert not {"margin", "entropy"} & {
        each["name"] for each in infer(client, route).json()["outputs"]
    }


def test_what_has_no_place_for_it_says_where_there_is_one(client: TestClient) -> None:
    refused = infer(client, parameters={"uncertainty": True})
    assert refused.status_code == 400
    assert "`margin` and `entropy`; name them" in refused.json()["error"]
    refused = client.post("/predictions/softmax?uncertainty=true", content=PNG)
    assert refused.status_code == 400
    assert "POST /predict" in refused.json()["message"]
    refused = client.post(
        "/explain?uncertainty=true", content=PNG, headers=RAW | {"accept": "image/jpeg"}
    )
    assert refused.status_code == 406
    assert "uncertainty" in refused.json()["detail"]
