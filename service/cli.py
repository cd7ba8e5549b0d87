"""The command `camserve`."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torchvision
import typer
import uvicorn
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service import logs
from service.app import build_service, create_app, load_models
from service.cam.heatmap import COLORMAPS, Style
from service.errors import CamserveError
from service.explain_files import Wish, explain_files
from service.images import Fit
from service.models.catalog import BUILTIN, parse_model
from service.models.loading import load_model
from service.settings import Settings

app = typer.Typer(
    name="camserve",
    help="Image classification with the evidence for it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True)

_FLAGS = {"models": "--model"}
_OF_MODELS = ("models", "weights", "app_dir", "allow_random_weights", "device", "workers")


def with_settings(names: Sequence[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each named setting; what is not given comes from the environment.

    The command receives the `Settings` as its first argument in place of those flags.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            with told_plainly():
                settings = Settings(**{k: v for k, v in given.items() if v not in (None, [])})
                command(settings, **values)

        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
            + [_flag(name) for name in names]
        )
        run.__annotations__ = {
            name: parameter.annotation
            for name, parameter in inspect.signature(run).parameters.items()
        }
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def _flag(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    default = field.get_default()
    kind: Any = {bool: bool, int: int, float: float}.get(type(default), str)
    flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
    text = f"{field.description} [env: CAMSERVE_{name.upper()}; default: {default or 'none'}]"
    if default == 0 and kind is int:
        text = text.replace("default: none", "default: 0")
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            list[str] | None if name == "models" else kind | None,
            typer.Option(flag, help=escape(text), show_default=False),
        ],
    )


@contextmanager
def told_plainly() -> Iterator[None]:
    """Turn what the user can mend into one sentence and exit code 2."""
    try:
        yield
    except CamserveError as error:
        _err.print(f"[red]error:[/] {escape(error.detail)}", soft_wrap=True)
        raise typer.Exit(2) from None
    except pydantic.ValidationError as error:
        for issue in error.errors():
            setting = "_".join(map(str, issue["loc"])).upper()
            _err.print(f"[red]error:[/] CAMSERVE_{setting}: {escape(issue['msg'])}")
        raise typer.Exit(2) from None


@app.command()
@with_settings(tuple(Settings.model_fields))
def serve(settings: Settings) -> None:
    """Serve models over HTTP."""
    logs.configure(settings.log_format)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings),
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=30,
        )
    )
    _announce_when_started(server)
    # uvicorn raises the signal again when it has shut down; a service that was told to end, and
    # answered all it had accepted, ended well.
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    server.run()
    if not server.started:
        raise typer.Exit(1)


def _announce_when_started(server: uvicorn.Server) -> None:
    start = server.startup

    async def startup(sockets: Any = None) -> None:
        await start(sockets)
        if server.started:
            port = server.servers[0].sockets[0].getsockname()[1]
            _announce(server.config.host, port)

    server.startup = startup  # type: ignore[method-assign]


def _announce(host: str, port: int) -> None:
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - only compared
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    sample = _sample()
    _err.print(f"\n[bold]camserve[/] serves on [bold]{url}[/]\n", highlight=False)
    _err.print("  explain a picture, see why:")
    _err.print(
        f"    curl -F image=@{sample} '{url}/explain?include=overlay'",
        soft_wrap=True,
        highlight=False,
    )
    _err.print(
        f"    curl -F image=@{sample} {url}/explain -H 'accept: image/jpeg' -o why.jpg",
        soft_wrap=True,
        highlight=False,
    )
    _err.print(f"  every route, to try out:  {url}/docs", highlight=False)
    _err.print("  how-to and reference:     README.md and docs/\n", highlight=False)


def _sample() -> str:
    """The sample image as a path from here, where this is a checkout."""
    sample = Path(__file__).parent.parent / "examples" / "sunflower.jpg"
    return os.path.relpath(sample) if sample.exists() else "YOUR.jpg"


@app.command()
@with_settings(_OF_MODELS)
def explain(  # noqa: PLR0917 - a command's parameters are its flags
    settings: Settings,
    images: Annotated[list[Path], typer.Argument(help="Image files or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("explained"),
    target: Annotated[
        list[str] | None, typer.Option(help="Class to explain, by id or label; default: the best.")
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="Target layer; several are fused.")
    ] = None,
    fit: Annotated[str, typer.Option(help="crop, squash or pad.")] = "crop",
    colormap: Annotated[str, typer.Option(help="turbo, jet, viridis, inferno, gray …")] = "turbo",
    opacity: Annotated[float, typer.Option(min=0, max=1, help="Share of the colours.")] = 0.5,
) -> None:
    """Explain images without a server: an overlay, a heatmap and a JSON file for each.

    One bad file does not stop the rest; the exit code is 1 where any failed.
    """
    logs.configure("text", level=40)
    if fit not in ("crop", "squash", "pad"):
        raise typer.BadParameter(f"--fit takes crop, squash or pad, not {fit!r}")
    if colormap not in COLORMAPS:
        raise typer.BadParameter(f"--colormap takes one of {', '.join(COLORMAPS)}")
    fitted: Fit = fit  # type: ignore[assignment]
    wish = Wish(
        targets=tuple(target or ()),
        layers=tuple(layer or ()),
        fit=fitted,
        style=Style(colormap=colormap, opacity=opacity),
    )
    report = explain_files(build_service(settings), images, out, wish, _err)
    table = Table("image", "prediction", "score", box=None)
    for line in report.explained:
        table.add_row(escape(str(line.path)), escape(line.label), f"{line.score:.1%}")
    _out.print(table)
    for failure in report.failed:
        _err.print(f"[red]failed:[/] {escape(str(failure.path))}: {escape(failure.detail)}")
    _err.print(
        f"{len(report.explained)} explained, {len(report.failed)} failed → {escape(str(out))}"
    )
    if report.failed:
        raise typer.Exit(1)


@app.command()
@with_settings(_OF_MODELS)
def models(
    settings: Settings,
    available: Annotated[
        bool, typer.Option("--available", help="List every builder that can be served instead.")
    ] = False,
) -> None:
    """Show the models that would be served, or those that could be."""
    if available:
        for name in (BUILTIN, *_torchvision_builders(), "package.module:function"):
            _out.print(name, markup=False, highlight=False)
        return
    table = Table("name", "builder", "classes", "input", "target layer", "version", box=None)
    for model in load_models(settings):
        height, width = model.preprocessing.crop
        table.add_row(
            model.name,
            model.spec.builder,
            str(len(model.labels)),
            f"{width}×{height}",
            model.target_layer or "none",
            model.version,
        )
    _out.print(table)


def _torchvision_builders() -> list[str]:
    return [f"torchvision/{name}" for name in torchvision.models.list_models(torchvision.models)]


@app.command()
def layers(
    model: Annotated[str, typer.Argument(help="[NAME=]BUILDER[@WEIGHTS], as of serve --model.")],
    targets: Annotated[
        bool, typer.Option("--targets", help="Only layers that a map can be drawn from.")
    ] = False,
) -> None:
    """List a model's layers: path, type, output shape, parameters; * marks the default target."""
    with told_plainly():
        # Shapes do not depend on the weights, so none are fetched for a list of them.
        loaded = load_model(parse_model(model), allow_random_weights=True)
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
    _out.print(table)


def main() -> None:
    """The entry point; Ctrl-C ends quietly."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
