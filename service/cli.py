"""The command `camserve`."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI
from rich.markup import escape
from rich.table import Table

from service import logs
from service.app import build_service, create_app
from service.errors import ConfigurationError
from service.explain_files import explain_files, explain_options
from service.flags import ERR, OF_MODELS, OUT, with_settings
from service.memory import keep_freed_memory
from service.model_commands import calibrate, check, layers, models
from service.serving import SWITCH_SECONDS, DrainingServer
from service.settings import Settings
from service.tensorboard import open_board

app = typer.Typer(
    name="camserve",
    help="Image classification with the evidence for it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
@with_settings(tuple(Settings.model_fields))
def serve(settings: Settings) -> None:
    """Serve models over HTTP."""
    logs.configure(settings.log_format)
    keep_freed_memory()
    sys.setswitchinterval(SWITCH_SECONDS)
    served = create_app(settings, background=True)
    server = DrainingServer(
        served,
        grace=settings.drain_timeout,
        delay=settings.drain_delay,
        host=settings.host,
        port=settings.port,
    )
    _announce_when_ready(server, served)
    server.run()
    entries = served.state.service.library.entries.values()
    if all(entry.state == "failed" for entry in entries):
        raise ConfigurationError(" ".join(entry.reason or "" for entry in entries))
    if not server.started:
        raise typer.Exit(1)


def _announce_when_ready(server: uvicorn.Server, served: FastAPI) -> None:
    """Say where the service is once its models are loaded; end it where none could be."""
    start = server.startup

    async def announce() -> None:
        loading = [asyncio.wrap_future(future) for future in served.state.loading]
        await asyncio.gather(*loading, return_exceptions=True)
        if served.state.service.pool.models:
            _announce(server.config.host, server.servers[0].sockets[0].getsockname()[1])
        else:
            server.should_exit = True

    async def startup(sockets: Any = None) -> None:
        await start(sockets)
        if server.started:
            served.state.announcing = asyncio.create_task(announce())

    server.startup = startup  # type: ignore[method-assign]


def _announce(host: str, port: int) -> None:
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - only compared
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    sample = _sample()
    ERR.print(f"\n[bold]camserve[/] serves on [bold]{url}[/]\n", highlight=False)
    ERR.print("  explain a picture, see why:")
    ERR.print(
        f"    curl -F image=@{sample} '{url}/explain?include=overlay'",
        soft_wrap=True,
        highlight=False,
    )
    ERR.print(
        f"    curl -F image=@{sample} {url}/explain -H 'accept: image/jpeg' -o why.jpg",
        soft_wrap=True,
        highlight=False,
    )
    ERR.print(f"  every route, to try out:  {url}/docs", highlight=False)
    ERR.print("  how-to and reference:     README.md and docs/\n", highlight=False)


def _sample() -> str:
    """The sample image as a path from here, where this is a checkout."""
    sample = Path(__file__).parent.parent / "examples" / "sunflower.jpg"
    return os.path.relpath(sample) if sample.exists() else "YOUR.jpg"


@app.command()
@with_settings(OF_MODELS)
def explain(  # noqa: PLR0913, PLR0917 - a command's parameters are its flags
    settings: Settings,
    images: Annotated[list[Path], typer.Argument(help="Image files or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("explained"),
    target: Annotated[
        list[str] | None, typer.Option(help="Class to explain, by id or label; default: the best.")
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="Target layer; several are fused.")
    ] = None,
    method: Annotated[str, typer.Option(help="How the map is computed.")] = "gradcam",
    contrast: Annotated[
        str | None, typer.Option(help="Explain each target minus this class.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Masks of rise.")] = 1000,
    steps: Annotated[int, typer.Option(help="Points of integrated_gradients.")] = 50,
    seed: Annotated[int, typer.Option(help="Of what is random: same seed, same map.")] = 0,
    fit: Annotated[str, typer.Option(help="crop, squash or pad.")] = "crop",
    colormap: Annotated[str, typer.Option(help="turbo, jet, viridis, inferno, gray …")] = "turbo",
    opacity: Annotated[float, typer.Option(min=0, max=1, help="Share of the colours.")] = 0.5,
    regions: Annotated[
        bool, typer.Option("--regions", help="Mask, boxes, polygons and peak, too.")
    ] = False,
    activations: Annotated[
        list[str] | None,
        typer.Option(help="Layers to capture, by path or glob (features.*, type:Conv2d)."),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(help="Folder for overlays and feature maps as TensorBoard images."),
    ] = None,
) -> None:
    """Explain images without a server: an overlay, a heatmap and a JSON file for each.

    One bad file does not stop the rest; the exit code is 1 where any failed.
    """
    logs.configure("text", level=40)
    options = explain_options(
        targets=target or [],
        layer=layer or [],
        method=method,
        contrast=contrast,
        samples=samples,
        steps=steps,
        seed=seed,
        fit=fit,
        colormap=colormap,
        opacity=opacity,
        include=["grid", "regions"] if regions else ["grid"],
        activations=activations or [],
    )
    with nullcontext() if tensorboard is None else open_board(tensorboard) as board:
        report = explain_files(
            build_service(settings.uncompiled()), images, out, options, ERR, board
        )
    table = Table("image", "prediction", "score", box=None)
    for line in report.explained:
        table.add_row(escape(str(line.path)), escape(line.label), f"{line.score:.1%}")
    OUT.print(table)
    for failure in report.failed:
        sentence = f"[red]failed:[/] {escape(str(failure.path))}: {escape(failure.detail)}"
        ERR.print(sentence, soft_wrap=True)
    ERR.print(
        f"{len(report.explained)} explained, {len(report.failed)} failed → {escape(str(out))}"
    )
    if report.failed:
        raise typer.Exit(1)


for command in (models, layers, check, calibrate):
    app.command()(command)


def main() -> None:
    """The entry point; Ctrl-C ends quietly."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
