"""`GET /models/{name}/kernels/{layer}`: the weights of a layer as an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from service.cam.file_sizes import image_bytes
from service.cam.tiles import KernelGrid, draw_kernels, has_rgb_input
from service.errors import InvalidOption
from service.models.loaded import LoadedModel
from service.pipeline.process import result_of
from service.routes import lifecycle
from service.routes.docs import problems
from service.routes.state import service_of
from service.scheduling.admission import Bill, Permit

router = APIRouter(tags=["models"])

NAMED = 12
"""How many layers with kernels an error names at most."""

_IMAGE_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The kernels side by side, each from its least value to its greatest.",
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        "headers": {
            "X-Kernels": {
                "description": "How many kernels the layer has.",
                "schema": {"type": "integer"},
            },
            "X-Kernels-Left-Out": {
                "description": "How many kernels, the last ones, do not fit into the image.",
                "schema": {"type": "integer"},
            },
        },
    }
}


@router.get(
    "/models/{name}/kernels/{layer:path}",
    response_class=Response,
    responses=_IMAGE_RESPONSE | problems(400, 401, 404, 422, 429, 500, 503, 504),
)
async def kernels(request: Request, name: str, layer: str) -> Response:
    """The weights of one layer as a PNG: a first convolution in color, others in gray.

    A convolution has one tile per pair of output and input channel (in color, per output channel),
    arranged in a square; a linear layer is one image with one row per output.
    """
    service = service_of(request)
    model = service.pool.model(name)
    side = service.limits.render_side

    async def work(permit: Permit) -> Response:
        most = service.limits.answer_bytes
        bill = Bill(permit, most, lambda: "Name a layer with fewer kernels.")
        bill.add(min(most, image_bytes((side, side), "png")))
        grid = await result_of(service.scheduler.call(_draw, model, layer, side))
        bill.add(max(0, len(grid.image.data) - permit.answer_bytes))
        bill.settle(len(grid.image.data))
        headers = {"X-Kernels": str(grid.kernels), "X-Kernels-Left-Out": str(grid.left_out)}
        return Response(grid.image.data, media_type=grid.image.media_type, headers=headers)

    return await lifecycle.in_time_without_body(request, work)


def _draw(model: LoadedModel, path: str, max_side: int) -> KernelGrid:
    """Draw from the master, which is never run, so it can be read at any time.

    Raises UnknownLayer, and InvalidOption for a layer without kernels.
    """
    weight = model.with_kernels.get(model.layer(path).path)
    if weight is None:
        raise InvalidOption(_refusal(model, path))
    module = dict(model.module.named_modules(remove_duplicate=False))[path]
    return draw_kernels(weight, colour=has_rgb_input(module), max_side=max_side)


def _refusal(model: LoadedModel, path: str) -> str:
    having = list(model.with_kernels)
    inside = [other for other in having if other.startswith(f"{path}.")]
    if inside:
        return f"Layer {path!r} has no kernels; inside it {_listed(inside)}."
    if not having:
        return f"No layer of model {model.name!r} has kernels to draw."
    return f"Layer {path!r} has no kernels; of model {model.name!r} {_listed(having)}."


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return f"{', '.join(paths[:NAMED])}{more} {'has' if len(paths) == 1 else 'have'} them"
