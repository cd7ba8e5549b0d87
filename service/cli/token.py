"""`camserve overlay-token`: create a key for live overlays in a Label Studio project."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from service.cli.flags import ERR, explain_options, with_settings
from service.errors import ConfigurationError
from service.security.overlay_tokens import Grant, sign
from service.settings import Settings


@with_settings(("overlay_secret",))
def overlay_token(  # noqa: PLR0917 - a command's parameters are its flags
    settings: Settings,
    prefix: Annotated[
        list[str],
        typer.Option(help="Prefix of the images' URLs: /data/upload/1/ is project 1."),
    ],
    origin: Annotated[
        str, typer.Option(help="Origin of Label Studio's pages, as the browser sees it.")
    ] = "http://localhost:8080",
    url: Annotated[
        str, typer.Option(help="URL of this service, as the browser reaches it.")
    ] = "http://localhost:8000",
    model: Annotated[
        str | None, typer.Option(help="Model. [default: the default model of the service]")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Method. [default: gradcam]")] = None,
    days: Annotated[
        float | None, typer.Option(help="Days until the key expires. [default: no expiry]")
    ] = None,
) -> None:
    """Create a key for live overlays, and the Image tag for a labeling configuration."""
    if not settings.overlay_secret:
        raise ConfigurationError(
            "--overlay-secret is not set; give the secret of the service, such as the output of "
            "`openssl rand -hex 32`."
        )
    options = {"method": method} if method else {}
    explain_options(**options)  # raises for an unknown method
    expires = None if days is None else round(time.time() + days * 86_400)
    grant = Grant(tuple(prefix), origin.rstrip("/"), model, method, expires)
    token = sign(grant, settings.overlay_secret.get_secret_value())
    overlay_url = f"{url.rstrip('/')}/integrations/label-studio/overlay.png"
    tag = f'<Image name="heat" value="{overlay_url}?key={token}&amp;src=$image"/>'
    ERR.print(
        "Add this to the labeling configuration; anyone who can read it can see these overlays:"
    )
    typer.echo(tag)
