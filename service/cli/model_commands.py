"""`camserve models`, `check` and `calibrate`: inspect models before they are served.

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
from service.cli.flags import ERR, OF_MODELS, OUT, print_tables, table, with_settings
from service.errors import CamserveError, ConfigurationError
from service.images.image_files import find_images, text_of
from service.models.catalog import BUILTIN, ModelSpec
from service.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from service.cli.check import CheckResult
    from service.models.loaded import LoadedModel


@with_settings(OF_MODELS)
def models(
    settings: Settings,
    available: Annotated[
        bool,
        typer.Option("--available/--no-available", help="List all available builders instead."),
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
    rows = table("name", "builder", "classes", "input", "target layer", "version")
    for model in build_service(settings.uncompiled()).pool.models.values():
        height, width = model.preprocessing.crop
        rows.add_row(
            model.name,
            model.spec.builder,
            str(len(model.labels)),
            f"{width}×{height}",
            model.target_layer or "none",
            model.version,
        )
    print_tables(rows)


def _torchvision_builders() -> list[str]:
    import torchvision

    return [f"torchvision/{name}" for name in torchvision.models.list_models(torchvision.models)]


def one_model(settings: Settings, name: str | None) -> ModelSpec:
    """Return the model of a command for one: its argument, else --model, else the only one.

    Raises ConfigurationError if there are several, or as `model_specs`.
    """
    from service.app import model_specs

    wanted = (name,) if name else settings.models
    specs = model_specs(settings.model_copy(update={"models": wanted}))
    if len(wanted) == 1:
        return specs[-1]  # behind those of the file, if it is not one of them
    if len(specs) != 1:
        names = ", ".join(spec.name for spec in specs)
        raise ConfigurationError(
            f"this command takes one model, and there are {len(specs)} ({names}); name one: "
            f"--model {specs[0].name}."
        )
    return specs[0]


def read_images(model: LoadedModel, folder: Path, settings: Settings) -> list[Tensor]:
    """Return every image of a folder at the model's input size, uint8 (C, h, w).

    Raises ConfigurationError for the first one that cannot be read, InvalidOption for a model that
    does not classify.
    """
    from service.images.budget import DecodeBudget
    from service.images.upload import open_upload

    model.check_classifies("A measurement on a folder of images")
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


def _lanes(model: LoadedModel) -> str:
    if model.no_layers or model.no_gradients:
        return "predict only"
    if not model.is_compiled:
        return "hooked"
    precision = model.compiled.precision if model.compiled else "float32"
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
    if off is None and model.is_compiled:
        off = model.slower
    elif off is None and model.slower and settings.compile:
        off = f"no compiled lane: {model.slower}"
    if off:
        yield off


def _sensitivity_table(result: CheckResult) -> Table:
    weights = ("head", "half", "all weights")
    rows = table(f"{result.spec.name}: method", *weights, "", right=weights)
    if not result.sensitivity:
        rows.add_row("not measured: its copies or maps vary, or it cannot be copied")
    for one in result.sensitivity:
        values = (
            "-" if value is None else f"{value:+.2f}" for value in (one.head, one.half, one.all)
        )
        rows.add_row(one.method, *values, "hardly" if one.weights_hardly_matter else "")
    return rows


@with_settings((*OF_MODELS, "precision"))
def check(
    settings: Settings,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity/--no-sensitivity",
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
    numbers = ("ms per image (median)", "MiB")
    rows = table(
        *("name", "classes", "parameters", "target layer", "lanes", "probes"),
        *numbers,
        right=numbers,
    )
    failed: list[CheckResult] = []
    notes: list[str] = []
    checked = 0
    tables = [rows]
    loader = model_loader(settings)
    for result in check_models(model_specs(settings), loader, all_methods=sensitivity):
        checked += 1
        if result.model is None:
            failed.append(result)
            rows.add_row(result.spec.name, *("-",) * 3, "failed", *("-",) * 3, style="red")
            continue
        rows.add_row(
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
    print_tables(*tables)
    for note in notes:
        ERR.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    for result in failed:
        name, problem = escape(result.spec.name), escape(result.problem or "")
        ERR.print(f"[red]failed:[/] {name}: {problem}", soft_wrap=True)
    ERR.print(f"{checked - len(failed)} of {checked} models can be served.")
    if failed:
        raise typer.Exit(1)


@with_settings(("config", "models", "app_dir", "allow_random_weights", "cache_dir"))
def calibrate(
    settings: Settings,
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] FOLDER",
            help="A model of the configuration, or [NAME=]BUILDER[@WEIGHTS], unless --model gives "
            "it; and a folder of images like those that the model will receive.",
        ),
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
    *names, folder = given
    if len(names) > 1:
        raise ConfigurationError(f"calibrate takes [MODEL] FOLDER, not {' '.join(given)}.")
    named = one_model(settings, names[0] if names else None)
    spec = replace(named, int8=None, precision="float32")
    loaded = model_loader(settings)(spec)
    target = out or Path(f"{spec.name}.int8")
    measured = calibrate_front(loaded, read_images(loaded, Path(folder), settings), target)
    OUT.print(
        f"On {measured.images} held-out images: {measured.same_class:.1%} of the "
        f"predictions and {measured.same_peak:.1%} of the peaks are the same; rank correlation of "
        f"the maps {measured.median:.3f} in the median, {measured.tenth:.3f} in the worst tenth.",
        highlight=False,
    )
    model = escape(" ".join(names) or spec.name)
    ERR.print(f"camserve serve --model {model} --int8 {spec.name}={escape(str(target))}")
