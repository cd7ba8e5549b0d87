"""`camserve layers`: the layers of a model, and how faithful their maps are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.progress import Progress

from service import logs
from service.cli.flags import ERR, print_tables, table, with_settings
from service.cli.model_commands import one_model, read_images
from service.errors import ConfigurationError
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.evaluation.faithfulness import LayerScore
    from service.models.loaded import LoadedModel


@with_settings(("config", "models", "app_dir", "allow_random_weights", "device"))
def layers(
    settings: Settings,
    model: Annotated[
        str | None,
        typer.Argument(
            help="[NAME=]BUILDER[@WEIGHTS] or a name in --config, as for --model. [default: the "
            "only model there is]",
            show_default=False,
        ),
    ] = None,
    targets: Annotated[
        bool,
        typer.Option("--targets/--no-targets", help="Only layers that a map can be drawn from."),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json/--no-json", help="One line of JSON per layer on standard output."),
    ] = False,
    measure: Annotated[
        Path | None,
        typer.Option(help="Folder of images: rank layers by the faithfulness of their maps."),
    ] = None,
) -> None:
    """List a model's layers: path, type, output shape, parameters; * marks the default target."""
    from service.app import model_loader

    logs.configure_command()
    if measure is not None and not measure.is_dir():
        raise ConfigurationError(f"--measure {measure}: there is no folder of that name.")
    # Shapes do not depend on the weights, so a list of layers does not download them.
    without_weights = settings.model_copy(update={"allow_random_weights": True}).uncompiled()
    loaded = model_loader(settings if measure else without_weights)(one_model(settings, model))
    show = _print_json if as_json else _print_table
    if measure is not None:
        show(loaded, [_score_row(loaded, score) for score in _ranked(loaded, measure, settings)])
        return
    with_kernels = loaded.with_kernels
    show(
        loaded,
        [
            {
                "path": layer.path,
                "type": layer.type,
                "shape": layer.shape,
                "parameters": layer.parameters,
                "target": layer.target,
                "kernels": layer.path in with_kernels,
            }
            for layer in loaded.layers
            if layer.target or not targets
        ],
    )


def _print_json(model: LoadedModel, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        line = row | {"default": row["path"] == model.target_layer}
        typer.echo(orjson.dumps(line).decode())


def _print_table(model: LoadedModel, rows: Sequence[dict[str, Any]]) -> None:
    shown = table("", *(_HEADINGS.get(key, key) for key in (rows[0] if rows else ())))
    for row in rows:
        star = "*" if row["path"] == model.target_layer else ""
        shown.add_row(star, *(_cell(key, value) for key, value in row.items()))
    print_tables(shown)


def _cell(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:{_FORMATS[key]}}"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else "×".join(map(str, value or ())) or "-"


_HEADINGS = {
    "path": "layer",
    "shape": "output",
    "ms_per_image": "ms per image",
    "per_ms": "per ms",
}
"""Headings of the table, where they are not the keys of the JSON."""

_FORMATS = {
    "faithfulness": "+.3f",
    "insertion": ".3f",
    "deletion": ".3f",
    "ms_per_image": ".1f",
    "per_ms": "+.5f",
}


def _score_row(model: LoadedModel, score: LayerScore) -> dict[str, Any]:
    return {
        "path": score.layer,
        "shape": model.layer(score.layer).shape,
        "faithfulness": score.faithfulness,
        "insertion": score.insertion,
        "deletion": score.deletion,
        "ms_per_image": score.milliseconds,
        "per_ms": score.per_millisecond,
    }


def _ranked(model: LoadedModel, folder: Path, settings: Settings) -> list[LayerScore]:
    """Return the scores of the layers, the best first, with progress on standard error."""
    from service.evaluation.faithfulness import candidates, rank

    if model.no_layers or model.no_gradients:
        raise ConfigurationError(
            f"no layer of model {model.name!r} can be measured: "
            f"{model.no_layers or model.no_gradients}."
        )
    images = read_images(model, folder, settings)
    paths = candidates(model)
    with _progress(len(paths), len(images)) as advance:
        scores = rank(model, images, paths, on_image=advance)
    ERR.print(f"{len(images)} images; the best layer first, * is the default target.")
    return scores


@contextmanager
def _progress(layers: int, images: int) -> Iterator[Callable[[], None]]:
    """Yield what is called after each image of each layer.

    It shows a bar with the time left on a terminal, elsewhere one line with an estimate.
    """
    total = layers * images
    began, done = perf_counter(), 0
    with Progress(console=ERR, disable=not ERR.is_terminal) as bars:
        bar = bars.add_task(f"measuring {layers} layers on {images} images", total=total)

        def advance() -> None:
            nonlocal done
            done += 1
            bars.advance(bar)
            if done == 1 and not ERR.is_terminal:
                seconds = (perf_counter() - began) * (total - 1)
                ERR.print(f"measuring {layers} layers on {images} images: about {seconds:.0f} s")

        yield advance
