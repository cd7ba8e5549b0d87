"""`camserve models`, `layers`, `check` and `calibrate`: inspect models before they are served.

Functions import the modules that load torch, as in `cli.main`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from service import logs
from service.cli.flags import ERR, OF_MODELS, OUT, with_settings
from service.errors import CamserveError, ConfigurationError
from service.images.image_files import find_images, text_of
from service.models.catalog import BUILTIN, ModelSpec, parse_model
from service.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from service.cli.check import CheckResult
    from service.models.loaded import LoadedModel


@with_settings(OF_MODELS)
def models(
    settings: Settings,
    available: Annotated[
        bool, typer.Option("--available", help="List all available builders instead.")
    ] = False,
) -> None:
    """Show the models that would be served, or all available builders."""
    from service.app import build_service

    logs.configure_command()
    if available:
        others = ("timm/NAME", "hf/ORG/NAME", "hf/FOLDER", "package.module:function")
        for name in (BUILTIN, *_torchvision_builders(), *others):
            OUT.print(name, markup=False, highlight=False)
        return
    table = Table("name", "builder", "classes", "input", "target layer", "version", box=None)
    for model in build_service(settings.uncompiled()).pool.models.values():
        height, width = model.preprocessing.crop
        table.add_row(
            model.name,
            model.spec.builder,
            str(len(model.labels)),
            f"{width}×{height}",
            model.target_layer or "none",
            model.version,
        )
    OUT.print(table)


def _torchvision_builders() -> list[str]:
    import torchvision

    return [f"torchvision/{name}" for name in torchvision.models.list_models(torchvision.models)]


@with_settings(("config", "app_dir", "allow_random_weights", "device"))
def layers(
    settings: Settings,
    model: Annotated[
        str,
        typer.Argument(
            help="[NAME=]BUILDER[@WEIGHTS], as for serve --model; or a name in --config."
        ),
    ],
    targets: Annotated[
        bool, typer.Option("--targets", help="Only layers that a map can be drawn from.")
    ] = False,
    measure: Annotated[
        Path | None,
        typer.Option(help="Folder of images: rank layers by the faithfulness of their maps."),
    ] = None,
) -> None:
    """List a model's layers: path, type, output shape, parameters; * marks the default target."""
    from service.app import model_loader

    logs.configure_command()
    # Shapes do not depend on the weights, so a list of layers does not download them.
    without_weights = settings.model_copy(update={"allow_random_weights": True}).uncompiled()
    loaded = model_loader(settings if measure else without_weights)(_named(settings, model))
    if measure is not None:
        _print_ranking(loaded, measure, settings)
        return
    table = Table("", "layer", "type", "output", "parameters", "target", box=None)
    for layer in loaded.layers:
        if targets and not layer.target:
            continue
        table.add_row(
            "*" if layer.path == loaded.target_layer else "",
            layer.path,
            layer.type,
            "×".join(map(str, layer.shape)) if layer.shape else "-",
            f"{layer.parameters:,}",
            "yes" if layer.target else "no",
        )
    OUT.print(table)


def _named(settings: Settings, model: str) -> ModelSpec:
    """Return the model of that name in --config, or else parse it like --model."""
    from service.app import model_specs

    specs = model_specs(settings)
    configured = [spec for spec in specs if spec.name == model] if settings.config else []
    return configured[0] if configured else parse_model(model)


def _read_images(model: LoadedModel, folder: Path, settings: Settings) -> list[Tensor]:
    """Return every image of a folder at the model's input size, uint8 (C, h, w).

    Raises ConfigurationError for the first one that cannot be read.
    """
    from service.images.budget import DecodeBudget
    from service.images.upload import open_upload

    budget = DecodeBudget(settings.max_decode_bytes)
    pixels: list[Tensor] = []
    for path, _ in find_images([folder]):
        try:
            upload = open_upload(
                path.read_bytes(),
                model.preprocessing,
                "crop",
                max_pixels=settings.max_pixels,
                preview_side=None,
                budget=budget,
            )
        except CamserveError as error:
            raise ConfigurationError(f"{text_of(path)}: {error.detail}") from error
        pixels.append(upload.model_input.pixels)
    return pixels


def _print_ranking(model: LoadedModel, folder: Path, settings: Settings) -> None:
    from service.evaluation.faithfulness import candidates, rank

    if model.no_layers or model.no_gradients:
        raise ConfigurationError(
            f"no layer of model {model.name!r} can be measured: "
            f"{model.no_layers or model.no_gradients}."
        )
    images = _read_images(model, folder, settings)
    table = Table(
        *("", "layer", "output", "faithfulness", "insertion", "deletion"),
        *("ms per image", "per ms"),
        box=None,
    )
    for measured in rank(model, images, candidates(model)):
        shape = model.layer(measured.layer).shape
        table.add_row(
            "*" if measured.layer == model.target_layer else "",
            measured.layer,
            "×".join(map(str, shape or ())),
            f"{measured.faithfulness:+.3f}",
            f"{measured.insertion:.3f}",
            f"{measured.deletion:.3f}",
            f"{measured.milliseconds:.1f}",
            f"{measured.per_millisecond:+.5f}",
        )
    OUT.print(table)
    ERR.print(f"{len(images)} images; the best layer first, * is the default target.")


def _lanes(model: LoadedModel) -> str:
    if model.no_layers or model.no_gradients:
        return "predict only"
    if model.compiled is None:
        return "hooked"
    precision = model.compiled.precision
    return "hooked, compiled" + ("" if precision == "float32" else f" ({precision})")


def _probes(model: LoadedModel) -> str:
    """Return the names of the probes that the model failed, or `passed`."""
    return ", ".join(finding.name for finding in model.findings if not finding.passed) or "passed"


def _notes(result: CheckResult, model: LoadedModel, settings: Settings) -> Iterator[str]:
    """Yield notes on a model: its transform, failed probes, methods, and lanes that are off."""
    yield f"transform: {model.transform}"
    alike = [one.method for one in result.sensitivity if one.weights_hardly_matter]
    if alike:
        yield (
            f"the maps of {', '.join(alike)} hardly change when weights are randomised: they show "
            "the image, not what the model has learned (flag weights_hardly_matter)."
        )
    for finding in model.findings:
        if not finding.passed:
            yield f"{finding.result} {finding.follows or ''}".rstrip()
    off = model.no_layers or model.no_gradients
    if off is None and model.not_compiled and settings.compile:
        off = f"no compiled lane: {model.not_compiled}"
    if off is None and model.compiled:
        off = model.compiled.instead
    if off:
        yield off


def _sensitivity_table(result: CheckResult) -> Table:
    table = Table(f"{result.spec.name}: method", box=None)
    for heading in ("head", "half", "all weights"):
        table.add_column(heading, justify="right")
    table.add_column("")
    if not result.sensitivity:
        table.add_row("not measured: its copies or maps vary, or it cannot be copied")
    for one in result.sensitivity:
        values = (
            "-" if value is None else f"{value:+.2f}" for value in (one.head, one.half, one.all)
        )
        table.add_row(one.method, *values, "hardly" if one.weights_hardly_matter else "")
    return table


@with_settings((*OF_MODELS, "precision"))
def check(
    settings: Settings,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Compare the maps of every method with those of randomised weights (minutes).",
        ),
    ] = False,
) -> None:
    """Load every model, explain one image with each, and report what fails; for CI.

    The exit code is 1 if any model failed; the others are still checked.
    """
    from service.app import model_loader, model_specs
    from service.cli.check import check_models

    logs.configure_command()
    table = Table("name", "classes", "parameters", "target layer", "lanes", "probes", box=None)
    for heading in ("ms per image", "MiB"):
        table.add_column(heading, justify="right")
    failed: list[CheckResult] = []
    notes: list[str] = []
    checked = 0
    tables = [table]
    loader = model_loader(settings)
    for result in check_models(model_specs(settings), loader, all_methods=sensitivity):
        checked += 1
        if result.model is None:
            failed.append(result)
            table.add_row(result.spec.name, *("-",) * 3, "failed", *("-",) * 3, style="red")
            continue
        table.add_row(
            result.model.name,
            str(len(result.model.labels)),
            f"{result.parameters:,}",
            result.model.target_layer or "none",
            _lanes(result.model),
            _probes(result.model),
            f"{result.milliseconds:.1f}",
            f"{result.mebibytes:.1f}",
        )
        notes += [f"{result.model.name}: {note}" for note in _notes(result, result.model, settings)]
        tables += [_sensitivity_table(result)] if sensitivity else []
    OUT.print(*tables, sep="\n")
    for note in notes:
        ERR.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    for result in failed:
        name, problem = escape(result.spec.name), escape(result.problem or "")
        ERR.print(f"[red]failed:[/] {name}: {problem}", soft_wrap=True)
    ERR.print(f"{checked - len(failed)} of {checked} models can be served.")
    if failed:
        raise typer.Exit(1)


@with_settings(("config", "app_dir", "allow_random_weights", "cache_dir"))
def calibrate(
    settings: Settings,
    model: Annotated[
        str,
        typer.Argument(help="A model of the configuration, or [NAME=]BUILDER[@WEIGHTS]."),
    ],
    folder: Annotated[
        Path, typer.Argument(help="Folder of images like those that the model will receive.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the result. [default: NAME.int8]")
    ] = None,
) -> None:
    """Make an int8 front of a model, and measure its accuracy on held-out images.

    It is written only if its maps agree with float32, and served only on request: the command is
    printed.
    """
    from service.app import model_loader
    from service.evaluation.calibration import calibrate as calibrate_front

    logs.configure_command()
    spec = replace(_named(settings, model), int8=None, precision="float32")
    loaded = model_loader(settings)(spec)
    target = out or Path(f"{spec.name}.int8")
    measured = calibrate_front(loaded, _read_images(loaded, folder, settings), target)
    OUT.print(
        f"On {measured.images} held-out images: {measured.same_class:.1%} of the "
        f"predictions and {measured.same_peak:.1%} of the peaks are the same; rank correlation of "
        f"the maps {measured.median:.3f} in the median, {measured.tenth:.3f} in the worst tenth.",
        highlight=False,
    )
    ERR.print(f"camserve serve --model {escape(model)} --int8 {spec.name}={escape(str(target))}")
