"""The command line in its first minutes: flags, variables, models by name, layers, port."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pictures
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import camserve
import service
from api_schemas.client import Client, errors
from service.cli import flags, layers_command
from service.cli.listening import listening
from service.cli.main import app
from service.errors import ConfigurationError
from service.settings import OTHER_VARIABLES, Settings, unknown_variables

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(120)

run = CliRunner(env={"COLUMNS": "200"})

TWO = """
[[model]]
name = "first"
builder = "tiny:small"

[[model]]
name = "second"
builder = "tiny:other"
"""


@pytest.fixture
def config(tmp_path: Path) -> list[str]:
    (tmp_path / "models.toml").write_text(TWO)
    return ["--config", str(tmp_path / "models.toml")]


def said(result: Any) -> str:
    return " ".join(result.output.split())


def tracked(*paths: str) -> list[str]:
    """The files of the repository."""
    command = [shutil.which("git") or "git", "ls-files", *paths]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no clone, so its files are not listed")
    return listed.stdout.split()


# ---- Version, help, flags


def test_the_version_is_that_of_the_package() -> None:
    assert run.invoke(app, ["--version"]).output == f"camserve {service.__version__}\n"


def commands() -> Iterator[tuple[str, Any]]:
    group = typer.main.get_command(app)
    yield from group.commands.items()  # type: ignore[attr-defined]


def test_every_command_has_a_short_flag_for_its_help() -> None:
    for name in ("", *(name for name, _ in commands())):
        result = run.invoke(app, [*name.split(), "-h"])
        assert (result.exit_code, "Usage" in result.output) == (0, True), name


def test_every_boolean_flag_can_be_turned_off_too() -> None:
    """Also one that the environment turns on."""
    flags_seen = 0
    for name, command in commands():
        for flag in command.params:
            if getattr(flag, "is_flag", False) and flag.name != "help":
                flags_seen += 1
                (on,) = flag.opts
                assert flag.secondary_opts == [f"--no-{on.removeprefix('--')}"], f"{name} {on}"
    assert flags_seen > 12


# ---- Variables


@pytest.mark.parametrize(
    ("variable", "suggested"),
    [
        ("CAMSERVE_PROT", "'CAMSERVE_PORT'"),
        ("CAMSERVE_MODEL", "'CAMSERVE_MODELS'"),
        ("camserve_max_imgaes", "'CAMSERVE_MAX_IMAGES'"),
        ("CAMSERVE_QQQQQ", ""),
    ],
)
def test_an_unknown_variable_is_named_with_the_nearest_setting(
    variable: str, suggested: str
) -> None:
    ((found, sentence),) = unknown_variables({variable: "1", "PATH": "/bin", "CAMSERVE_PORT": "8"})
    assert found == variable
    assert sentence.startswith(f"{variable} is not a setting")
    assert suggested in sentence


def test_what_kubernetes_sets_for_services_of_this_name_is_no_unknown_variable() -> None:
    """Every form, for `camserve`, for `camserve-gpu`, and with named ports."""
    address = "10.0.0.1"
    for name in ("CAMSERVE", "CAMSERVE_GPU"):
        links = {
            f"{name}_SERVICE_HOST": address,
            f"{name}_SERVICE_PORT": "80",
            f"{name}_SERVICE_PORT_HTTP": "80",
            f"{name}_PORT": f"tcp://{address}:80",
            f"{name}_PORT_80_TCP": f"tcp://{address}:80",
            f"{name}_PORT_80_TCP_PROTO": "tcp",
            f"{name}_PORT_80_TCP_PORT": "80",
            f"{name}_PORT_80_TCP_ADDR": address,
        }
        assert list(unknown_variables(links)) == []


def test_the_port_of_a_service_link_is_not_the_port_to_listen_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CAMSERVE_PORT", "tcp://10.0.0.1:80")
    assert Settings().port == 8000


def test_every_variable_of_this_repository_is_known() -> None:
    """Those of compose, of the tests and of the documentation; made-up ones apart."""
    names = {
        name
        for file in tracked("deploy", "docs", "docker-compose.yml", "Dockerfile", "README.md")
        if (ROOT / file).suffix in {".md", ".yml", ".yaml", ".sh", ""}
        for name in re.findall(r"CAMSERVE_[A-Z0-9_]*[A-Z0-9]", (ROOT / file).read_text("utf-8"))
    }
    assert len(names) > 40
    renamed = {"CAMSERVE_INT", "CAMSERVE_COMPLETE"}
    assert {name for name, _ in unknown_variables(dict.fromkeys(names, "1"))} <= renamed
    assert not {name.upper() for name in Settings.model_fields} & OTHER_VARIABLES


def test_a_command_warns_of_an_unknown_variable() -> None:
    result = run.invoke(app, ["models", "--available"], env={"CAMSERVE_PROT": "80"})
    assert result.exit_code == 0
    assert "Did you mean 'CAMSERVE_PORT'?" in said(result)


# ---- Models by name, and where builders are imported from


@pytest.mark.parametrize("command", [("models",), ("check",), ("layers",)])
def test_a_model_of_the_file_is_selected_by_its_name(
    command: tuple[str, ...], config: list[str]
) -> None:
    result = run.invoke(app, [*command, *config, "--model", "second"])
    assert result.exit_code == 0, result.output
    if command == ("layers",):
        assert re.search(r"head +Linear +5 ", result.output), "five classes are the second's"
    else:
        assert "second" in result.output
        assert "first" not in result.output


def test_models_of_the_file_and_others_are_selected_together(config: list[str]) -> None:
    both = ["--model", "second", "--model", "mine=tiny:small"]
    rows = run.invoke(app, ["models", *config, *both]).output.splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["second", "mine"]
    without = run.invoke(app, ["models", *config, "--model", "mine=tiny:small"]).output
    assert [row.split()[0] for row in without.splitlines()[1:]] == ["first", "second", "mine"]


@pytest.mark.parametrize("command", ["explain", "export", "bulk"])
def test_a_model_is_selected_where_images_are_explained(
    command: str, config: list[str], tmp_path: Path
) -> None:
    image = tmp_path / "photos" / "a.png"
    image.parent.mkdir()
    image.write_bytes(pictures.png())
    more = {
        "explain": ["explain", str(image), "--json"],
        "export": ["export", "coco", str(image), "--out", str(tmp_path / "coco.json")],
        "bulk": ["bulk", str(image.parent), str(tmp_path / "rows"), "--no-images"],
    }[command]
    result = run.invoke(app, [*more, *config, "--model", "second", "--target", "class 4"])
    assert result.exit_code == 0, result.output
    wrong = run.invoke(app, [*more, *config, "--model", "second", "--target", "class 6"])
    assert wrong.exit_code == 2, "only the first model has seven classes"


def test_builders_are_imported_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("of_this_folder.py").write_text("from tiny import small as build\n")
    result = run.invoke(app, ["models", "--model", "of_this_folder:build"])
    assert result.exit_code == 0, result.output
    assert "of_this_folder:build" in result.output


def test_the_current_folder_is_not_searched_where_no_builder_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = [*sys.path]
    assert run.invoke(app, ["models"]).exit_code == 0
    assert sys.path == before


# ---- Layers


def test_layers_are_lines_of_json_with_the_names_of_the_service(client: Any) -> None:
    result = run.invoke(app, ["layers", "tiny:small", "--json"])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    served = client.get("/models/small/layers").json()["layers"]
    assert [{key: row[key] for key in served[0]} for row in rows] == served
    assert [row["path"] for row in rows if row["default"]] == ["features"]


@pytest.mark.parametrize("width", [24, 40, 80])
def test_a_path_is_folded_on_a_narrow_terminal_and_never_cut_off(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the spaces of the table, every path is there."""
    screen = io.StringIO()
    narrow = Console(file=screen, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(flags, "OUT", narrow)
    path = "backbone.stages.3.blocks.12.attention.projection.of.the.query"
    shown = flags.table("", "layer", "type")
    shown.add_row("*", path, "Linear")
    flags.print_tables(shown)
    lines = screen.getvalue().splitlines()[1:]
    assert max(map(len, lines)) <= width
    letters = re.sub(r"[\s*]", "", "".join(lines))
    assert "…" not in letters
    assert sorted(letters) == sorted(f"{path}Linear")


def test_a_table_in_a_pipe_has_a_row_in_each_line() -> None:
    result = CliRunner(env={"COLUMNS": "30"}).invoke(app, ["layers", "tiny:small"])
    assert len(result.output.splitlines()) == 8


@pytest.mark.parametrize("terminal", [True, False])
def test_measuring_shows_its_progress_and_the_time_left(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=100, force_terminal=terminal, color_system=None)
    monkeypatch.setattr(layers_command, "ERR", console)
    with layers_command._progress(2, 3) as advance:
        for _ in range(6):
            advance()
    text = screen.getvalue()
    assert "measuring 2 layers on 3 images" in text
    if terminal:
        assert "100%" in text
        assert re.search(r"\d:\d\d:\d\d", text)
    else:
        assert re.fullmatch(r"measuring 2 layers on 3 images: about \d+ s\n", text)


# ---- The port, and logs as JSON


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_in_use_is_one_sentence_and_exit_code_2(host: str) -> None:
    """Before anything is loaded: the model that is named does not exist."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        arguments = ["serve", "--host", host, "--port", port, "--model", "no/model"]
        result = run.invoke(app, arguments)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert f"port {port} of {host} is in use" in result.output
    assert f"--port {int(port) + 1}" in result.output


def test_a_port_in_use_is_one_event_where_logs_are_json() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        result = run.invoke(app, ["serve", "--port", port, "--log-format", "json"])
    assert result.exit_code == 2
    event = json.loads(result.output)
    assert event["event"] == "not_started"
    assert f"port {port}" in event["detail"]


def test_sockets_listen_on_every_address_and_are_closed_at_the_end() -> None:
    with listening("localhost", 0) as sockets:
        port = sockets[0].getsockname()[1]
        address = sockets[0].getsockname()[0]
        with pytest.raises(ConfigurationError, match="in use"), listening(address, port):
            pass
    with listening(address, port):
        pass


def test_every_line_of_a_service_with_json_logs_is_json(tmp_path: Path) -> None:
    """Also the announcement, the warning of a variable, and the error that ends it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CAMSERVE_PROT": "1"}
    command = [sys.executable, "-m", "camserve", "serve", "--port", "0", "--log-format", "json"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        events = []
        assert process.stderr is not None
        for line in process.stderr:
            events.append(json.loads(line))
            if events[-1]["event"] == "serving":
                process.terminate()
        assert process.wait(60) == 0
    by_name = {event["event"]: event for event in events}
    assert by_name["serving"]["url"].startswith("http://127.0.0.1:")
    assert "'CAMSERVE_PORT'" in by_name["unknown_variable"]["detail"]
    failing = subprocess.run(
        [*command, "--model", "no/model"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert failing.returncode == 2
    ends = [json.loads(line) for line in failing.stderr.splitlines()]
    assert ends[-1]["event"] == "not_started"
    assert "'no/model'" in ends[-1]["detail"]


# ---- `camserve` as a package


def test_the_client_has_a_name_for_people() -> None:
    assert (camserve.Client, camserve.errors) == (Client, errors)
    with pytest.raises(AttributeError, match="no attribute 'Clinet'"):
        _ = camserve.Clinet


def test_the_client_is_imported_beside_a_folder_called_service(tmp_path: Path) -> None:
    """Without it, without torch; and the command says which module is in its way."""
    (tmp_path / "service.py").write_text("raise SystemExit('the user's own')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    code = "import sys; from camserve import Client; print('torch' in sys.modules)"

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    assert python("-c", code).stdout == "False\n"
    ran = python("-m", "camserve", "--version")
    assert ran.returncode == 2
    assert f"the module 'service' in {tmp_path} hides camserve's package" in ran.stderr
    assert "Rename it" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_no_hint_installs_camserve_from_an_index() -> None:
    """Anyone could register the name there: hints name the checkout or the wheel."""
    hint = re.compile(r"\binstall\b[^\n`]*(?<![\w./-])camserve(?![\w./-])")
    assert hint.search("pip install 'camserve[timm]'")
    assert not hint.search("pip install ./camserve")
    texts = {".py", ".md", ".sh", ".toml", ".txt", ".yml", ".yaml", ".js", ".html", ""}
    found = [
        f"{file}: {line}"
        for file in tracked()
        if Path(file).suffix in texts and file != Path(__file__).relative_to(ROOT).as_posix()
        for line in (ROOT / file).read_text("utf-8", "replace").splitlines()
        if hint.search(line)
    ]
    assert found == []
