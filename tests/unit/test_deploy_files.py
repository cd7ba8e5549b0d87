"""Dockerfile, docker-compose.yml and deploy/ agree with the service and with each other."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployment import (
    DEPLOY,
    FROM_GPU_EXPORTER,
    KUSTOMIZATIONS,
    ROOT,
    alerts,
    compose,
    dashboard,
    metric_names,
    queries,
)
from kustomizing import containers, kustomized
from packaging.requirements import Requirement

import service
from service import resources
from service.app import GRACE_SECONDS, build_service
from service.routes.access import OPEN
from service.routes.hosts import host_rule
from service.settings import Settings

DOCKERFILE = (ROOT / "Dockerfile").read_text()
USER = 10001
NAME = {"app.kubernetes.io/name": "camserve"}


def image_environment() -> dict[str, str]:
    (said,) = re.findall(r"^ENV (PATH=.*?[^\\])$", DOCKERFILE, re.DOTALL | re.MULTILINE)
    return dict(pair.split("=", 1) for pair in said.replace("\\\n", " ").split())


def inference_service() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "kserve" / "inferenceservice.yaml").read_text()))


def kserve_containers() -> list[dict[str, Any]]:
    spec = inference_service()["spec"]
    return [container for part in spec.values() for container in part["containers"]]


def environments() -> Iterator[tuple[str, dict[str, str | None]]]:
    """Every environment that one of our containers is given, and where."""
    yield "Dockerfile", image_environment()
    for path in (ROOT / "docker-compose.yml", *(DEPLOY / "compose").glob("*.yml")):
        for name, each in compose(path)["services"].items():
            if name.startswith("camserve"):
                yield f"{path.name}: {name}", each["environment"]
    for folder in KUSTOMIZATIONS:
        for container in containers(kustomized(folder)):
            yield str(folder), {each["name"]: each["value"] for each in container["env"]}
    for container in kserve_containers():
        yield "kserve", {each["name"]: each["value"] for each in container["env"]}


@pytest.mark.parametrize(("where", "environment"), list(environments()))
def test_settings_that_containers_are_given_exist_and_are_taken(
    monkeypatch: pytest.MonkeyPatch, where: str, environment: dict[str, str | None]
) -> None:
    ours = {name: value for name, value in environment.items() if name.startswith("CAMSERVE_")}
    for name, value in ours.items():
        assert name.removeprefix("CAMSERVE_").lower() in Settings.model_fields, f"{where}: {name}"
        if value is not None:
            monkeypatch.setenv(name, value)
    Settings()


def test_the_image_says_which_version_it_is() -> None:
    versions = re.findall(r"^ARG VERSION=(.*)$", DOCKERFILE, re.MULTILINE)
    assert versions == [service.__version__] * 2, "in its label and in its SBOM"


def test_the_image_keeps_the_rules_that_its_readers_count_on() -> None:
    assert "# syntax=" not in DOCKERFILE, "a frontend would be fetched from another host"
    assert f"\nUSER {USER}:{USER}\n" in DOCKERFILE
    for instruction in ("ENTRYPOINT", "CMD"):
        assert re.search(rf"^{instruction} \[", DOCKERFILE, re.MULTILINE), "not in exec form"
    environment = image_environment()
    allocator = {name: value for name, value in environment.items() if name.startswith("MALLOC_")}
    assert allocator == {name: str(value) for name, (_, value) in resources._MALLOPT.items()}
    assert re.search(r"\bPYTHONSAFEPATH=1\b", DOCKERFILE)
    kept = ("CAMSERVE_CACHE_DIR", "TORCH_HOME", "HF_HOME")
    assert all(environment[name].startswith("/cache/") for name in kept)


def test_what_the_image_is_made_of_is_in_the_build_context() -> None:
    """.dockerignore lets in what it names and nothing else."""
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert {name for names in copied for name in names.split()} == allowed
    assert all((ROOT / name).exists() for name in allowed)


# What the images are made of


IMAGE = DEPLOY / "image"
HASHED = [IMAGE / "packages.txt", IMAGE / "tools.txt", DEPLOY / "load" / "requirements.txt"]
PICK = runpy.run_path(str(IMAGE / "pick.py"))


def pins(path: Path) -> dict[str, str]:
    """Versions by name."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\]+)", path.read_text(), re.MULTILINE)
    return {PICK["normalised"](name): version for name, version in found}


def versions_of_the_tests() -> dict[str, str]:
    """The versions that the tests run with."""
    return pins(ROOT / "constraints.txt")


@pytest.mark.parametrize("path", HASHED, ids=lambda path: path.name)
def test_every_distribution_of_an_image_is_pinned_with_hashes_and_no_index_is_named(
    path: Path,
) -> None:
    text = path.read_text()
    assert set(PICK["entries"](text)) == set(pins(path))
    assert "://" not in text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(
        re.fullmatch(r"\S+==\S+ \\| {4}--hash=sha256:[0-9a-f]{64}(?: \\)?", x) for x in lines
    )


@pytest.mark.parametrize("path", [HASHED[0], HASHED[2]], ids=lambda path: path.name)
def test_images_have_the_versions_that_the_tests_have(path: Path) -> None:
    """`make lock` writes them; setuptools, which torch asks for, pip freeze leaves out."""
    versions = pins(path)
    versions.pop("setuptools", None)
    assert versions.items() <= versions_of_the_tests().items()


def test_what_builds_camserve_is_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (wanted,) = map(Requirement, project["build-system"]["requires"])
    assert wanted.specifier.contains(pins(IMAGE / "tools.txt")[wanted.name])


def test_every_requirement_of_the_service_and_its_extras_has_hashes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lists = [extras[name] for name in ("bulk", "int8", "otel", "ray", "tensorboard", "timm")]
    for text in [*project["dependencies"], *itertools.chain.from_iterable(lists)]:
        wanted = Requirement(text)
        if wanted.name != "camserve":
            assert wanted.specifier.contains(pins(IMAGE / "packages.txt")[wanted.name]), text


def installations(text: str) -> list[str]:
    """Every command of a Dockerfile that installs from an index or a folder."""
    commands = re.split(r"&&|;|\n(?= *[A-Z]+ )", text.replace("\\\n", " "))
    return [" ".join(each.split()) for each in commands if re.search(r"\bpip\b.* install\b", each)]


def test_nothing_is_installed_in_an_image_before_its_hash_is_checked() -> None:
    """But the wheel that was just built, and what UNHASHED names."""
    load = compose()["services"]["load"]["build"]["dockerfile_inline"]
    found = [*installations(DOCKERFILE), *installations(load)]
    unchecked = [
        each
        for each in found
        if "--require-hashes" not in each
        and "--dry-run" not in each
        and "/wheels/*.whl" not in each
        and "-r unhashed.txt" not in each
    ]
    assert len(found) == 6
    assert unchecked == []
    assert all("--no-deps" in each or "--dry-run" in each for each in found)
    for each in (*found, *re.findall(r"pip download[^&]*", DOCKERFILE)):
        assert "--only-binary :all:" in each.replace("\\\n", " ") or "/wheels/*.whl" in each


def test_the_base_image_is_an_argument_so_that_a_release_can_name_its_digest() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    names = {name for _, name in stages}
    assert [image for image, _ in stages if image not in names] == ["${PYTHON_IMAGE}"]
    assert "\nARG PYTHON_IMAGE=python:3.11-slim-bookworm\n" in DOCKERFILE
    services = compose()["services"]
    assert "FROM $${PYTHON_IMAGE}" in services["load"]["build"]["dockerfile_inline"]
    for name in ("camserve", "load"):
        argument = services[name]["build"]["args"]["PYTHON_IMAGE"]
        assert argument == "${PYTHON_IMAGE:-python:3.11-slim-bookworm}"


def test_what_pip_resolved_is_picked_with_its_hashes(tmp_path: Path) -> None:
    (tmp_path / "packages.txt").write_text(
        "# by make\n"
        "a-b==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n"
        "c==2 \\\n    --hash=sha256:cc\n"
        "d==3 \\\n    --hash=sha256:dd\n"
    )
    found = [
        {"metadata": {"name": name, "version": v}} for name, v in (("A_b", "1.0"), ("d", "3+x"))
    ]
    (tmp_path / "resolved.json").write_text(json.dumps({"install": found}))
    command = [sys.executable, IMAGE / "pick.py", "resolved.json", "packages.txt"]
    done = subprocess.run([*command, "x, D"], cwd=tmp_path, check=False)
    assert done.returncode == 0
    hashed = (tmp_path / "hashed.txt").read_text()
    assert hashed == "a-b==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n"
    assert (tmp_path / "unhashed.txt").read_text() == "d==3+x\n"
    failed = subprocess.run(
        [*command, ""], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert "no hashes of d==3+x: run `make lock`" in failed.stderr


def test_the_port_is_the_same_everywhere() -> None:
    port = image_environment()["CAMSERVE_PORT"]
    assert f"\nEXPOSE {port}\n" in DOCKERFILE
    for name, each in compose()["services"].items():
        if name.startswith("camserve"):
            assert [mapping.rsplit(":", 1)[1] for mapping in each["ports"]] == [port]
    (scraped,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())[
        "scrape_configs"
    ]
    (names,) = scraped["dns_sd_configs"]
    assert names["port"] == int(port)
    assert set(names["names"]) <= set(compose()["services"])
    for folder in KUSTOMIZATIONS:
        (container,) = containers(kustomized(folder))
        assert container["ports"] == [{"name": "http", "containerPort": int(port)}]


def test_compose_binds_to_this_machine_alone_and_gives_no_more_rights_than_needed() -> None:
    for name, each in compose()["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in each["ports"]), name
        assert each["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in each["security_opt"], name
        assert set(each["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
        if name != "label-studio":
            assert each["read_only"], name


def test_names_that_our_files_reach_the_service_by_are_accepted_hosts() -> None:
    """Without a setting, as in the container without keys; KServe's gateway has its own names."""
    texts = [path.read_text() for path in (ROOT / "docker-compose.yml", *DEPLOY.rglob("*.py"))]
    hosts = {host for text in texts for host in re.findall(r"http://(camserve[\w.:-]*)", text)}
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    for job in scraped["scrape_configs"]:
        hosts |= {f"{name}:8000" for names in job["dns_sd_configs"] for name in names["names"]}
    assert {"camserve:8000", "camserve-gpu:8000"} <= hosts
    rule = host_rule(image_environment()["CAMSERVE_HOST"], (), keys=False)
    assert rule is not None
    assert [host for host in hosts if not rule.accepts(host)] == []
    for container in kserve_containers():
        environment = {each["name"]: each["value"] for each in container["env"]}
        assert environment["CAMSERVE_ALLOWED_HOSTS"] == "*"


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()
    return float(number) * {"s": 1, "m": 60}[unit]


def longest_stop(environment: dict[str, Any]) -> float:
    """The drain, then uvicorn's wait for what is left, then the end of the workers."""
    drain = float(environment["CAMSERVE_DRAIN_TIMEOUT"])
    return 2 * drain + GRACE_SECONDS


def test_nobody_kills_the_service_before_it_has_drained() -> None:
    for name, each in compose()["services"].items():
        if name.startswith("camserve"):
            assert seconds(each["stop_grace_period"]) > longest_stop(each["environment"])
    for folder in KUSTOMIZATIONS:
        (deployment,) = of_kind(kustomized(folder), "Deployment")
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        _, sleep = container["lifecycle"]["preStop"]["exec"]["command"]
        environment = {each["name"]: each["value"] for each in container["env"]}
        assert pod["terminationGracePeriodSeconds"] > float(sleep) + longest_stop(environment)
    for part in inference_service()["spec"].values():
        environment = {each["name"]: each["value"] for each in part["containers"][0]["env"]}
        assert part["terminationGracePeriodSeconds"] > longest_stop(environment)


# Kubernetes


def of_kind(manifests: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in manifests if each["kind"] == kind]


@pytest.fixture(params=KUSTOMIZATIONS, ids=lambda folder: folder.name)
def manifests(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return kustomized(request.param)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda folder: folder.name)
def test_kustomize_itself_makes_the_same_of_our_folders(folder: Path) -> None:
    """So that what the other tests look at is what a cluster is given."""
    command = next(
        (
            [found, *rest]
            for name, *rest in (["kustomize", "build"], ["kubectl", "kustomize"])
            if (found := shutil.which(name))
        ),
        None,
    )
    if command is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    made = subprocess.run([*command, folder], capture_output=True, text=True, check=True)
    theirs = {
        (each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(made.stdout)
    }
    assert theirs == {(each["kind"], each["metadata"]["name"]): each for each in kustomized(folder)}


def test_every_file_of_the_manifests_is_used(manifests: list[dict[str, Any]]) -> None:
    kinds = {each["kind"] for each in manifests}
    assert kinds == {
        "Deployment",
        "HorizontalPodAutoscaler",
        "Namespace",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Service",
        "ServiceAccount",
        "ServiceMonitor",
    }
    assert {each["metadata"].get("namespace", "camserve") for each in manifests} == {"camserve"}


def test_everything_selects_the_pods_and_nothing_else(manifests: list[dict[str, Any]]) -> None:
    (deployment,) = of_kind(manifests, "Deployment")
    spec = deployment["spec"]
    assert spec["template"]["metadata"]["labels"] == NAME
    assert spec["selector"]["matchLabels"] == NAME
    (service_,) = of_kind(manifests, "Service")
    assert service_["spec"]["selector"] == NAME
    (budget,) = of_kind(manifests, "PodDisruptionBudget")
    assert budget["spec"]["selector"]["matchLabels"] == NAME
    (policy,) = of_kind(manifests, "NetworkPolicy")
    assert policy["spec"]["podSelector"]["matchLabels"] == NAME
    (spread,) = spec["template"]["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == NAME
    (monitor,) = of_kind(manifests, "ServiceMonitor")
    assert monitor["spec"]["selector"]["matchLabels"] == service_["metadata"]["labels"] == NAME


def test_names_that_manifests_refer_to_exist(manifests: list[dict[str, Any]]) -> None:
    (deployment,) = of_kind(manifests, "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (account,) = of_kind(manifests, "ServiceAccount")
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    (scaler,) = of_kind(manifests, "HorizontalPodAutoscaler")
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    volumes = {each["name"] for each in pod["volumes"]}
    assert {each["name"] for each in container["volumeMounts"]} == volumes
    ports = {each["name"] for each in container["ports"]}
    probes = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    (service_,) = of_kind(manifests, "Service")
    (policy,) = of_kind(manifests, "NetworkPolicy")
    used = {probe["port"] for probe in probes}
    used |= {each["targetPort"] for each in service_["spec"]["ports"]}
    used |= {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    assert used == ports
    (monitor,) = of_kind(manifests, "ServiceMonitor")
    served = {each["name"] for each in service_["spec"]["ports"]}
    assert {each["port"] for each in monitor["spec"]["endpoints"]} <= served


def test_pods_have_no_more_rights_than_the_restricted_standard_gives(
    manifests: list[dict[str, Any]],
) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards, and a read-only root."""
    (deployment,) = of_kind(manifests, "Deployment")
    pods = [deployment["spec"]["template"]["spec"], *inference_service()["spec"].values()]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == USER
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])


def test_a_service_named_camserve_does_not_become_a_setting(
    manifests: list[dict[str, Any]],
) -> None:
    """Kubernetes would set CAMSERVE_PORT=tcp://10.0.0.1:80 in every pod of its namespace."""
    (deployment,) = of_kind(manifests, "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["enableServiceLinks"] is False
    assert {"name": "CAMSERVE_PORT", "value": "8000"} in pod["containers"][0]["env"]


def test_probes_ask_paths_that_need_no_key(manifests: list[dict[str, Any]]) -> None:
    (container,) = containers(manifests)
    for name in ("startup", "readiness", "liveness"):
        assert container[f"{name}Probe"]["httpGet"]["path"] in OPEN


def test_who_is_not_alive_for_a_minute_is_restarted(manifests: list[dict[str, Any]]) -> None:
    """A minute: a thread that hangs may come back, and then nothing needs a restart."""
    for container in [*containers(manifests), *kserve_containers()]:
        probe = container["livenessProbe"]
        assert probe["httpGet"]["path"] == "/health/live"
        assert probe["periodSeconds"] * probe["failureThreshold"] == 60


def test_the_scaler_reads_a_metric_that_the_adapter_makes_of_ours(
    manifests: list[dict[str, Any]], our_metrics: set[str]
) -> None:
    (scaler,) = of_kind(manifests, "HorizontalPodAutoscaler")
    (metric,) = scaler["spec"]["metrics"]
    values = yaml.safe_load(
        (DEPLOY / "kubernetes" / "monitoring" / "prometheus-adapter.yaml").read_text()
    )
    (rule,) = values["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert re.fullmatch(rule["name"]["matches"], rule["seriesQuery"].partition("{")[0])
    assert rule["name"]["as"] in our_metrics


def test_kserve_finds_the_model_under_the_name_of_its_service() -> None:
    described = inference_service()
    name = described["metadata"]["name"]
    for container in kserve_containers():
        environment = {each["name"]: each["value"] for each in container["env"]}
        assert environment["CAMSERVE_MODELS"].partition("=")[0] == name
        assert container["ports"][0]["containerPort"] == int(environment["CAMSERVE_PORT"])
        assert container["readinessProbe"]["httpGet"]["path"] == f"/v1/models/{name}"
    (explainer,) = described["spec"]["explainer"]["containers"]
    # KServe appends arguments of its own, which `sh -c SCRIPT NAME` hands to SCRIPT as $1, $2, …
    assert explainer["command"][:2] == ["sh", "-c"]
    assert len(explainer["command"]) == 4
    assert "$" not in explainer["command"][2]


# Prometheus and Grafana


@pytest.fixture(scope="module")
def our_metrics() -> set[str]:
    """The names of what /metrics shows."""
    registry = build_service(Settings(models=("tiny:small",), workers=1)).metrics.registry
    return {metric.name for metric in registry.collect()}


def test_every_metric_of_the_dashboard_and_the_alerts_is_one_of_ours(our_metrics: set[str]) -> None:
    asked = {each.expression for each in queries()} | {each["expr"] for each in alerts()}
    for expression in asked:
        known = metric_names(expression) & our_metrics
        assert metric_names(expression) == known, expression
        assert known or FROM_GPU_EXPORTER.search(expression) or expression.startswith("up{")


def test_the_dashboard_shows_every_metric_of_ours(our_metrics: set[str]) -> None:
    shown = {name for each in queries() for name in metric_names(each.expression)}
    assert {name for name in our_metrics if name.startswith("camserve_")} <= shown


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) < 24


def test_grafana_finds_its_datasource_and_its_dashboard() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    variables = {each["name"]: each for each in dashboard()["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "camserve.yml").read_text())[
        "providers"
    ]
    grafana = compose()["services"]["grafana"]
    mounted = {each.split(":")[1]: ROOT / each.split(":")[0] for each in grafana["volumes"]}
    folder = mounted[provider["options"]["path"]]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (folder / home.name).exists()
    assert mounted["/etc/grafana/provisioning"] == provisioning


def test_every_alert_has_a_paragraph_that_says_what_to_do() -> None:
    page = (ROOT / "docs" / "how-to" / "operate.md").read_text()
    headings = re.findall(r"^### (\w+)$", page, re.MULTILINE)
    assert headings == [each["alert"] for each in alerts()]
    for each in alerts():
        expected = f"docs/how-to/operate.md#{each['alert'].lower()}"
        assert each["annotations"]["runbook_url"] == expected
        assert each["labels"]["severity"] in ("critical", "warning")
