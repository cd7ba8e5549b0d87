"""KServe's V1 protocol, which is TensorFlow Serving's and Vertex AI's too.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v1-protocol defines it.
`predictions` has for each instance the `predictions` of `/predict`, best first; `explanations` the
`explanations` of `/explain`. Options go into `parameters`, or into the query; with `uncertainty`
there is the margin and the entropy of each instance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from api_schemas.options import CommonOptions, ExplainOptions, PredictOptions
from api_schemas.protocols import Instances
from service.errors import InvalidImageData, MalformedRequest, ModelNotReady
from service.images.upload import Sent
from service.integrations.protocol_requests import (
    MAX_NUMBERS,
    ImageRequest,
    Plan,
    Reply,
    answer,
    check_count,
    file_in,
    json_response,
    options,
    parsed,
    query,
)
from service.integrations.protocols.nested import array_of
from service.integrations.protocols.pixels import images_of
from service.models.loaded import LoadedModel
from service.pipeline.response import image_result
from service.routes import docs
from service.routes.examples import DANDELION, EXPLANATION, JPEG, SUNFLOWER
from service.routes.integration import Integration
from service.routes.state import service_of


def error_body(_status: int, _code: str, detail: str) -> dict[str, Any]:
    """An error as KServe has it in both versions of its protocol."""
    return {"error": detail}


router = APIRouter(
    prefix="/v1/models", tags=["KServe V1"], responses=docs.protocol_errors(error_body)
)

INTEGRATION = Integration(
    routers=(router,),
    description="For clients of KServe's first protocol and of TensorFlow Serving.",
    schemas=(Instances,),
    prefixes=("/v1/",),
    error_body=error_body,
)

_NAMES = ("b64", "data", "image", "image_bytes", "content")
"""Names under which clients send an image: KServe, TorchServe, TensorFlow Serving, Vertex AI."""


@router.get("", responses=docs.example({"models": ["builtin"]}))
async def models(request: Request) -> dict[str, list[str]]:
    """The names of all models."""
    return {"models": list(service_of(request).library.entries)}


@router.get("/{name}", responses=docs.example({"name": "builtin", "ready": True}))
async def model(request: Request, name: str) -> dict[str, Any]:
    """Whether a model is ready; 503 if not."""
    entry = service_of(request).library.entry(name)
    if entry.state != "ready" and not entry.on_demand:
        raise ModelNotReady(f"Model with name {name} is not ready.", retry_after=5)
    return {"name": name, "ready": True}


@router.post(
    "/{name}:predict",
    responses=docs.example({"predictions": [[SUNFLOWER, DANDELION]]}),
    openapi_extra=docs.json_body(
        Instances, {"instances": [{"b64": JPEG}], "parameters": {"top_k": 2}}
    ),
)
async def predict(request: Request, name: str) -> Response:
    """Classify each instance."""
    return await _answer(request, name, PredictOptions)


@router.post(
    "/{name}:explain",
    responses=docs.example(
        {"predictions": [[SUNFLOWER, DANDELION]], "explanations": [[EXPLANATION]]}
    ),
    openapi_extra=docs.json_body(
        Instances, {"instances": [{"image": {"b64": JPEG}, "target": "sunflower"}]}
    ),
)
async def explain(request: Request, name: str) -> Response:
    """Classify and explain each instance; its own `target` overrides a common one."""
    return await _answer(request, name, ExplainOptions)


async def _answer(request: Request, name: str, form: type[CommonOptions]) -> Response:
    given, most = query(request), service_of(request).limits.images

    def read(model: LoadedModel, body: bytes) -> Plan:
        sent = parsed(Instances, body)
        instances = sent.instances if sent.instances is not None else sent.inputs
        if instances is None:
            raise MalformedRequest('The body has no "instances"; send a list of images there.')
        check_count(len(instances), most)
        parameters = given | sent.parameters
        return Plan(
            [_image_request(model, form, instance, parameters) for instance in instances], _respond
        )

    return await answer(request, name, read)


def _image_request(
    model: LoadedModel, form: type[CommonOptions], instance: Any, parameters: Mapping[str, Any]
) -> ImageRequest:
    given = dict(parameters)
    tensor: dict[str, Any] = {
        name: given.pop(name) for name in ("values", "layout") if name in given
    }
    if isinstance(instance, dict) and "target" in instance:
        if form is ExplainOptions:
            given["target"] = instance["target"]
        instance = {key: value for key, value in instance.items() if key != "target"}
    return ImageRequest(image_of(model, instance, tensor), options(form, given))


def image_of(model: LoadedModel, value: Any, tensor: Mapping[str, Any]) -> Sent:
    """The image of an instance, however it is wrapped. Raises InvalidImageData.

    tensor: `values` and `layout` of `service.integrations.protocols.pixels`.
    """
    while isinstance(value, dict):
        if len(value) != 1 or next(iter(value)) not in _NAMES:
            raise InvalidImageData(
                'An instance is {"b64": …}, {"image": {"b64": …}} or nested numbers, not an object '
                f"with the fields {', '.join(map(repr, value)) or 'of none'}."
            )
        (value,) = value.values()
    if isinstance(value, str):
        return file_in(value)
    return images_of(array_of(value, MAX_NUMBERS)[None], model.preprocessing, **tensor)[0]


def _respond(replies: Sequence[Reply]) -> Response:
    results = [
        image_result(reply.model, reply.options, reply.render_side, reply.answered)
        for reply in replies
    ]
    dumped = [image.model_dump(exclude_unset=True) for image in results]
    content = {"predictions": [image["predictions"] for image in dumped]}
    if replies[0].options.uncertainty:
        content["uncertainty"] = [image["uncertainty"] for image in dumped]
    if isinstance(replies[0].options, ExplainOptions):
        content["explanations"] = [image["explanations"] for image in dumped]
    return json_response(content)
