"""The flags of `camserve export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from api_schemas.options import ExplainOptions
from service.cli.flags import OF_MODELS, with_options, with_settings
from service.errors import ConfigurationError
from service.settings import Settings

Form = Literal["coco", "labelbox"]

KINDS = ("classification", "bbox", "polygon", "mask", "point")
"""The kinds of `api_schemas.adapters.labelbox`, which the command imports when it runs."""


@with_settings(OF_MODELS)
@with_options
def export(  # noqa: PLR0913, PLR0917 - a command's parameters are its flags
    options: ExplainOptions,
    settings: Settings,
    form: Annotated[Form, typer.Argument(metavar="FORM", help="coco or labelbox.")],
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE…",
            help="Image files, folders of them, or patterns such as 'photos/**/*.jpg'.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write. [default: coco.json or labelbox.ndjson]"),
    ] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=NAME",
            help="Labelbox: what to export, and its name in the ontology; KIND is one of "
            f"{', '.join(KINDS)}. [default: classification=class and mask=evidence]",
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Use this running service instead of loading a model.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="CAMSERVE_API_KEY", help="Key for --url.")
    ] = None,
    served: Annotated[
        str | None, typer.Option(help="Model of --url. [default: its first model]")
    ] = None,
) -> None:
    """Explain images, and write a file for import into a labeling tool.

    coco: one JSON file with masks, boxes, scores and peaks as annotations. labelbox: the rows of a
    label import, with file names as global keys. A bad file does not stop the others; the exit
    code is 1 if any failed.
    """
    if feature and form == "coco":
        raise ConfigurationError(
            "--feature is only for labelbox; remove it: coco exports everything."
        )
    features = _features(feature or [])
    from service.cli.export.export_files import RemoteService, as_coco, as_labelbox, run  # noqa: PLC0415 - slow

    answers = RemoteService(url, api_key, served) if url else settings
    if form == "coco":
        run(images, options, out or Path("coco.json"), as_coco, answers)
    else:
        run(images, options, out or Path("labelbox.ndjson"), as_labelbox(features), answers)


def _features(given: Sequence[str]) -> dict[str, str]:
    features = dict(feature.partition("=")[::2] for feature in given)
    for kind, name in features.items():
        if kind not in KINDS or not name:
            raise ConfigurationError(
                f"--feature {kind}={name}: write KIND=NAME, where KIND is one of "
                f"{', '.join(KINDS)}."
            )
    return features
