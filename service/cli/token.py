"""`camserve overlay-token`: what opens live overlays to a Label Studio project."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from api_schemas.options import ExplainOptions
from service.cli.flags import ERR, with_settings
from service.errors import ConfigurationError
from service.security.overlay_tokens import Grant, sign
from service.settings import Settings


@with_settings(("overlay_secret",))
def overlay_token(  # noqa: PLR0917 - a command's parameters are its flags
    settings: Settings,
    prefix: Annotated[
        list[str],
        typer.Option(help="Prefix of the images' addresses: /data/upload/1/ is project 1."),
    ],
    origin: Annotated[
        str, typer.Option(help="Origin of Label Studio's pages, as the browser sees it.")
    ] = "http://localhost:8080",
    url: Annotated[
        str, typer.Option(help="Address of this service, as the browser reaches it.")
    ] = "http://localhost:8000",
    model: Annotated[str | None, typer.Option(help="Model; default: the service's.")] = None,
    method: Annotated[str | None, typer.Option(help="Method; default: gradcam.")] = None,
    days: Annotated[
        float | None, typer.Option(help="Days until it expires; default: no expiry.")
    ] = None,
) -> None:
    """Create a key for live overlays, and the Image tag for a labeling configuration."""
    if not settings.overlay_secret:
        raise ConfigurationError(
            "--overlay-secret is not set; give the one that the service has, such as what "
            "`openssl rand -hex 32` makes."
        )
    given = {"method": method} if method else {}
    ExplainOptions.model_validate(given)  # raises for a method that there is not
    expires = None if days is None else round(time.time() + days * 86_400)
    grant = Grant(tuple(prefix), origin.rstrip("/"), model, method, expires)
    token = sign(grant, settings.overlay_secret.get_secret_value())
    where = f"{url.rstrip('/')}/integrations/label-studio/overlay.png"
    tag = f'<Image name="heat" value="{where}?key={token}&amp;src=$image"/>'
    ERR.print(
        "Put this into the labeling configuration; anyone who can read it can see these overlays:"
    )
    typer.echo(tag)
