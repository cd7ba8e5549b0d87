"""`GET /models…`: the served models, and the layers that requests may name."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from api_schemas import models as wire
from api_schemas.methods import METHODS
from service.inference.method_table import why_not
from service.models.library import Entry
from service.models.loaded import LoadedModel
from service.models.probes.condition import ATTRIBUTE
from service.pipeline.service import Service
from service.routes.access import may_see_reasons
from service.routes.docs import example, problems
from service.routes.examples import VERSION
from service.routes.state import service_of

router = APIRouter(tags=["models"])

HIDDEN = "The log of the service has the reason; it may name files."
"""Replaces a reason if the client is not authorized to see file names."""

_MODEL = {
    "name": "builtin",
    "builder": "builtin",
    "state": "ready",
    "default": True,
    "version": VERSION,
    "classes": 102,
    "input": {
        "width": 224,
        "height": 224,
        "resize": 256,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear",
        "channels": 3,
    },
    "target_layer": "features.7",
    "lanes": [{"name": "hooked", "ready": True}, {"name": "compiled", "ready": True}],
    "random_weights": False,
    "replicas": 2,
}
_LAYER = {
    "path": "features.7",
    "type": "Sequential",
    "shape": [96, 14, 14],
    "parameters": 31392,
    "target": True,
    "kernels": False,
}


@router.get(
    "/models",
    responses=example({"models": [_MODEL]}) | problems(401),
    response_model_exclude_unset=True,
)
async def models(request: Request) -> wire.Models:
    """Every served model; the first is the default."""
    service = service_of(request)
    return wire.Models(
        models=[wire.Model(**_fields(request, entry)) for entry in service.library.entries.values()]
    )


@router.get(
    "/models/{name}",
    responses=example(
        _MODEL | {"knows": "102 classes", "labels": ["alpine sea holly", "anthurium"]}
    )
    | problems(401, 404),
    response_model_exclude_unset=True,
)
async def model(request: Request, name: str) -> wire.ModelDetails:
    """One model with its state and, once loaded, its labels and the results of its probes."""
    service = service_of(request)
    fields = _fields(request, service.library.entry(name))
    loaded = service.pool.models.get(name)
    if loaded is not None:
        fields["knows"] = loaded.knows
        fields["labels"] = list(loaded.labels)
        fields["methods"] = [
            wire.ModelMethod(name=name, reason=why_not(loaded, name)) for name in METHODS
        ]
        fields["probes"] = [
            wire.Probe(
                name=finding.name,
                passed=finding.passed,
                result=finding.result,
                follows=finding.follows,
            )
            for finding in loaded.findings
        ]
        fields["sensitivity"] = _sensitivity(loaded)
    return wire.ModelDetails(**fields)


@router.get(
    "/models/{name}/layers",
    responses=example({"layers": [_LAYER]}) | problems(401, 404, 503),
)
async def layers(request: Request, name: str) -> wire.Layers:
    """Every module of a model: its path, type, output shape, and whether it can be a target."""
    loaded = service_of(request).pool.model(name)
    with_kernels = loaded.with_kernels
    return wire.Layers(
        layers=[
            wire.Layer(
                path=layer.path,
                type=layer.type,
                shape=None if layer.shape is None else list(layer.shape),
                parameters=layer.parameters,
                target=layer.target,
                kernels=layer.path in with_kernels,
            )
            for layer in loaded.layers
        ]
    )


def _fields(request: Request, entry: Entry) -> dict[str, Any]:
    service = service_of(request)
    shown = may_see_reasons(request)
    model = service.pool.models.get(entry.spec.name)
    fields: dict[str, Any] = {
        "name": entry.spec.name,
        "builder": entry.spec.builder,
        "state": entry.state,
        "default": entry.spec.name == service.library.default,
    }
    if entry.reason:
        # The reason why a model is unloaded names no file.
        fields["reason"] = entry.reason if shown or entry.state == "unloaded" else HIDDEN
    if entry.progress:
        fields["progress"] = entry.progress
    return fields if model is None else fields | _loaded(service, model, shown=shown)


def _loaded(service: Service, model: LoadedModel, *, shown: bool) -> dict[str, Any]:
    preprocessing = model.preprocessing
    off = model.no_layers or model.no_gradients
    slower = model.slower
    return {
        "version": model.version,
        "classes": len(model.labels),
        "input": wire.InputSize(
            width=preprocessing.crop[1],
            height=preprocessing.crop[0],
            resize=_resize(preprocessing.resize),
            fit=preprocessing.fit,
            mean=list(preprocessing.mean),
            std=list(preprocessing.std),
            interpolation=preprocessing.interpolation,
            channels=preprocessing.channels,
        ),
        "transform": model.transform,
        "task": model.task,
        "target_layer": model.target_layer,
        "lanes": [
            wire.Lane(name="hooked", ready=off is None, reason=off if shown else off and HIDDEN),
            wire.Lane(
                name="compiled",
                ready=model.is_compiled,
                reason=slower if shown else slower and HIDDEN,
                precision=model.compiled.precision if model.compiled else None,
            ),
        ],
        "random_weights": model.random_weights,
        "replicas": service.pool.size(model.name),
        **({"stateful": _changes(model)} if model.stateful else {}),
    }


def _sensitivity(model: LoadedModel) -> list[wire.Sensitivity]:
    measured = {one.method: one for one in model.sensitivity}
    return [
        wire.Sensitivity(
            method=method,
            head=one.head if one else None,
            half=one.half if one else None,
            all=one.all if one else None,
            weights_hardly_matter=one.weights_hardly_matter if one else None,
        )
        for method, one in ((name, measured.get(name)) for name in METHODS)
    ]


def _changes(model: LoadedModel) -> list[str]:
    """Paths of the attributes that change, and descriptions of other changes."""
    return [fault.removeprefix(ATTRIBUTE) for fault in model.stateful]


def _resize(resize: int | tuple[int, int]) -> int | list[int]:
    return list(resize) if isinstance(resize, tuple) else resize
