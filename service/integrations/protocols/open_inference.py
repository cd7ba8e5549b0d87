"""The Open Inference Protocol V2, as KServe's, Triton's and MLServer's clients speak it.

https://github.com/kserve/open-inference-protocol, with the binary tensor data extension, Triton's
classification extension, and `explain`, which takes and gives the same bodies as `infer`. The one
input of a model is a batch of images: BYTES are files, numbers are pixels; any name is accepted.
The model repository extension is in `service.integrations.protocols.repository`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from api_schemas.options import CommonOptions, ExplainOptions, PredictOptions
from api_schemas.protocols import InferInput, InferRequest, RequestedOutput
from service.errors import InvalidOption, MalformedRequest, ModelNotReady
from service.images.upload import Sent
from service.integrations.protocol_requests import (
    ImageRequest,
    Plan,
    Reply,
    answer,
    named,
    options,
    parsed,
)
from service.integrations.protocols import outputs
from service.integrations.protocols.kserve import error_body
from service.integrations.protocols.pixels import images_of
from service.integrations.protocols.tensors import Output, files, numbers, raw_parts
from service.models.loaded import LoadedModel
from service.routes import docs, health
from service.routes.examples import JPEG, VERSION
from service.routes.integration import Integration
from service.routes.state import service_of

router = APIRouter(
    prefix="/v2", tags=["Open Inference Protocol V2"], responses=docs.protocol_errors(error_body)
)

INTEGRATION = Integration(
    routers=(router,),
    description="For clients of KServe, Triton and MLServer.",
    schemas=(InferRequest,),
    prefixes=("/v2/",),
    error_body=error_body,
    open_paths=frozenset({"/v2/health/live", "/v2/health/ready"}),
)

HEADER = "Inference-Header-Content-Length"
"""How many bytes of a body are JSON; 0: the body is an image file."""

_DIGITS = 15
"""Digits of a header's number at most: Python refuses to parse thousands of digits."""

_SERVER = {
    "name": "camserve",
    "version": "0.1.0",
    "extensions": ["binary_tensor_data", "classification", "model_repository"],
}
_LIVE = docs.example({"live": True, "ready": True})
_METADATA = docs.example(
    {
        "name": "builtin",
        "versions": [VERSION],
        "platform": "pytorch",
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 102]}],
    }
)
_READY = docs.example({"name": "builtin", "ready": True})
_TENSORS = [
    {"name": "class_ids", "datatype": "INT64", "shape": [1, 2], "data": [53, 16]},
    {"name": "labels", "datatype": "BYTES", "shape": [1, 2], "data": ["sunflower", "dandelion"]},
]
_MAP = {"name": "grid", "datatype": "FP32", "shape": [1, 1, 2, 2], "data": [0.0, 0.4, 1.0, 0.2]}


def _described(tensors: list[dict[str, Any]], **parameters: Any) -> dict[str, Any]:
    """Keyword arguments of a route that answers images, with examples."""
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [JPEG]}
    request = {"inputs": [tensor], "parameters": parameters}
    response = {"model_name": "builtin", "model_version": VERSION, "outputs": tensors}
    return {
        "responses": docs.example(response),
        "openapi_extra": docs.json_body(InferRequest, request),
    }


_INFER = _described(_TENSORS, top_k=2)
_EXPLAIN = _described([_MAP, *_TENSORS], targets=["sunflower"])


@router.get("", responses=docs.example(_SERVER))
async def server(request: Request) -> dict[str, Any]:
    """Name, version and extensions."""
    return _SERVER | {"version": request.app.version}


@router.get("/health/live", responses=_LIVE)
async def live(request: Request) -> dict[str, bool]:
    """The process responds; 503 if too many of its threads hang."""
    await health.live(request)
    return {"live": True, "ready": True}


@router.get("/health/ready", responses=_LIVE)
async def ready(request: Request) -> dict[str, bool]:
    """Models are loaded and requests are accepted; 503 if not."""
    await health.ready(request)
    return {"live": True, "ready": True}


@router.get("/models", responses=docs.example({"models": ["builtin"]}))
async def models(request: Request) -> dict[str, list[str]]:
    """The names of all models."""
    return {"models": list(service_of(request).library.entries)}


@router.get("/models/{name}/versions/{version}", responses=_METADATA)
@router.get("/models/{name}", responses=_METADATA)
async def metadata(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """Inputs and outputs of a model; -1 is any number."""
    service = service_of(request)
    model_name = named(service, name, version)
    entry = service.library.entry(model_name)
    model = service.pool.models.get(model_name)
    if model is None:
        raise ModelNotReady(f"Model {model_name!r} is {entry.state}.", retry_after=5)
    return {
        "name": name,
        "versions": [version or model.version],
        "platform": "pytorch",
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
        "outputs": outputs.described(model),
    }


@router.get("/models/{name}/versions/{version}/ready", responses=_READY)
@router.get("/models/{name}/ready", responses=_READY)
async def model_ready(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
    """Whether a model is ready; 503 if not."""
    service = service_of(request)
    entry = service.library.entry(named(service, name, version))
    if entry.state != "ready" and not entry.on_demand:
        raise ModelNotReady(f"Model {name!r} is {entry.state}.", retry_after=5)
    return {"name": name, "ready": True}


@router.post("/models/{name}/versions/{version}/infer", **_INFER)
@router.post("/models/{name}/infer", **_INFER)
async def infer(request: Request, name: str, version: str | None = None) -> Response:
    """Classify a batch of images; outputs that explain are computed only on request."""
    return await _answer(request, name, version, outputs.OF_INFER)


@router.post("/models/{name}/versions/{version}/explain", **_EXPLAIN)
@router.post("/models/{name}/explain", **_EXPLAIN)
async def explain(request: Request, name: str, version: str | None = None) -> Response:
    """Classify and explain a batch of images."""
    return await _answer(request, name, version, outputs.OF_EXPLAIN)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The requested outputs: each with Triton's `class_count`, and whether in binary."""

    id: str | None
    outputs: Sequence[tuple[str, int, bool]]


async def _answer(
    request: Request, name: str, version: str | None, default: Sequence[str]
) -> Response:
    length = request.headers.get(HEADER)
    most = service_of(request).limits.images

    def read(model: LoadedModel, body: bytes) -> Plan:
        sent: Sequence[Sent] = [body]
        if length == "0":
            infer_request = InferRequest(inputs=[_FILE])
        else:
            infer_request, tail = _parts(body, length)
            sent = _sent(model, infer_request, tail, most)
        wanted = _wanted(infer_request, outputs.defaults(model, default), outputs.makers(model))
        chosen = _options(infer_request, wanted, default)
        return Plan(
            [ImageRequest(image, chosen) for image in sent],
            lambda replies: _respond(model, name, wanted, replies),
            every_class=True,
            price=lambda sizes: outputs.price(wanted.outputs, sizes),
        )

    return await answer(request, named(service_of(request), name, version), read)


_FILE = InferInput(name="image", shape=[1], datatype="BYTES")


def _parts(body: bytes, length: str | None) -> tuple[InferRequest, bytes]:
    """The JSON, and the binary data behind it."""
    if length is None:
        return parsed(InferRequest, body), b""
    if not (length.isdecimal() and len(length) <= _DIGITS) or int(length) > len(body):
        raise MalformedRequest(f"{HEADER} is the number of bytes of the body that are JSON.")
    return parsed(InferRequest, body[: int(length)]), body[int(length) :]


def _sent(
    model: LoadedModel, infer_request: InferRequest, tail: bytes, most: int
) -> Sequence[Sent]:
    parts = raw_parts(infer_request.inputs, tail)
    if len(parts) != 1:
        raise MalformedRequest(f"A model has one input, a batch of images, not {len(parts)}.")
    (tensor,), (raw,) = infer_request.inputs, parts
    if tensor.datatype == "BYTES":
        return files(tensor, raw, most)
    parameters = {**(infer_request.parameters or {}), **(tensor.parameters or {})}
    return images_of(
        numbers(tensor, raw, most),
        model.preprocessing,
        parameters.get("values"),
        parameters.get("layout"),
    )


def _wanted(infer_request: InferRequest, default: Sequence[str], names: Collection[str]) -> _Wanted:
    binary = bool((infer_request.parameters or {}).get("binary_data_output", False))
    named_outputs = infer_request.outputs or [RequestedOutput(name=name) for name in default]
    wanted: list[tuple[str, int, bool]] = []
    for output in named_outputs:
        if any(output.name == name for name, _, _ in wanted):
            raise InvalidOption(f"The output {output.name!r} is named twice; name it once.")
        parameters = output.parameters or {}
        if output.name not in names:
            raise InvalidOption(
                f"There is no output {output.name!r}; the outputs are {', '.join(names)}."
            )
        classes = parameters.get("classification", 0)
        if not isinstance(classes, int) or classes < 0:
            raise InvalidOption("`classification` is the number of classes to list, such as 3.")
        wanted.append((output.name, classes, bool(parameters.get("binary_data", binary))))
    return _Wanted(infer_request.id, wanted)


def _options(infer_request: InferRequest, wanted: _Wanted, default: Sequence[str]) -> CommonOptions:
    """The options in a request's parameters; those of `/explain` if an output needs it."""
    names = {name for name, _, _ in wanted.outputs}
    protocols = ("binary_data_output", "values", "layout")
    given = {k: v for k, v in (infer_request.parameters or {}).items() if k not in protocols}
    if "uncertainty" in given:
        raise InvalidOption("Here `uncertainty` is the outputs `margin` and `entropy`; name them.")
    if default is outputs.OF_INFER and not names & outputs.EXPLAINING:
        return options(PredictOptions, given)
    # Other parts of `include` are for `explain`, which has the heatmap if both are requested.
    drawn = [name for name in ("overlay", "heatmap") if name in names]
    drawn = [name for name in drawn if name == "overlay" or "explain" not in names]
    if drawn:
        also = given.get("include", [])
        also = also if isinstance(also, list) else [also]
        given["include"] = [*drawn, *(part for part in also if part != "none")]
    given.setdefault("include", ["none"])
    chosen = options(ExplainOptions, given)
    if chosen.verify != "false" and "explain" not in names:
        raise InvalidOption("`verify` needs the output `explain`, which has the verdict; name it.")
    return chosen


def _respond(model: LoadedModel, name: str, wanted: _Wanted, replies: Sequence[Reply]) -> Response:
    described: list[dict[str, Any]] = []
    tails: list[bytes] = []
    for output, classes, binary in wanted.outputs:
        tensor: Output = outputs.makers(model)[output](replies)
        if classes:
            tensor = outputs.classification(tensor, model, classes)
        if binary:
            entry, raw = tensor.in_binary()
            tails += raw
        else:
            entry = tensor.in_json()
        described.append(entry)
    content: dict[str, Any] = {"model_name": name, "model_version": model.version}
    if wanted.id is not None:
        content["id"] = wanted.id
    head = orjson.dumps(content | {"outputs": described}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not tails:
        return Response(head, media_type="application/json")
    return Response(
        b"".join([head, *tails]),
        media_type="application/octet-stream",
        headers={HEADER: str(len(head))},
    )
