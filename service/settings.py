"""`Settings`: the source of flags, environment variables and the reference page."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import structlog
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.errors import nearest

MEBIBYTE = 1 << 20
Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]


def available_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The number of cores of this process: those of its affinity, within a container's quota.

    A fraction of a core counts only if there is no whole one.

    cgroup: where the control groups are mounted, version 2 or 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, _quota(cgroup)))


def _quota(cgroup: Path) -> int:
    """The whole cores of the quota; a very large number without a quota."""
    unbounded = 1 << 30
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / file).read_text() for file in files).split()
            return int(quota) // int(period) if int(quota) > 0 else unbounded
        except (OSError, ValueError):  # another version, or "max"
            continue
    return unbounded


PREFIX = "CAMSERVE_"
OTHER_VARIABLES = frozenset(
    {
        *("ADDRESS", "ADMIN_KEYS", "API_KEYS", "CPUS", "EXTRAS", "GPU_CPUS", "GPU_MEMORY"),
        *("GPU_PORT", "MEMORY"),  # of docker-compose.yml and deploy/compose
        *("API_KEY", "KEY", "URL"),  # of clients
        "FUZZ_CASES",
    }
)
"""Variables with the prefix that are no settings: other programs of this project read them."""

_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")
_SERVICE_LINK = re.compile(
    r"(.+_)?(SERVICE_(HOST|PORT)(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
"""Variables that Kubernetes sets in every pod for a Service whose name begins with `camserve`."""


def unknown_variables(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each `CAMSERVE_` variable that no setting has, and a sentence with the nearest one."""
    known = [name.upper() for name in Settings.model_fields]
    for variable, value in sorted(environment.items()):
        prefix, name = variable[: len(PREFIX)].upper(), variable[len(PREFIX) :].upper()
        if prefix != PREFIX or name in OTHER_VARIABLES or name.startswith("TEST_"):
            continue
        if name in known or _SERVICE_LINK.fullmatch(name) or _LINK_VALUE.match(value):
            continue
        close = nearest(name, known, 1).replace("'", f"'{PREFIX}", 1)
        yield variable, f"{variable} is not a setting, and has no effect.{close}"


def warn_of_unknown_variables() -> None:
    """Log each `CAMSERVE_` variable of this process that no setting has."""
    for variable, detail in unknown_variables(os.environ):
        structlog.get_logger(__name__).warning("unknown_variable", variable=variable, detail=detail)


class Settings(BaseSettings):
    """Every setting; each is also the flag `--name-with-dashes` of `camserve serve`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: a free one.")
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Models to serve, each [NAME=]BUILDER[@WEIGHTS], or the name of a model in "
        "--config, which selects it; comma-separated in the environment. Unset: those of --config, "
        "else the built-in model.",
    )
    config: Path | None = Field(
        None, description="models.toml: the models to serve, with their configuration."
    )
    weights: Path | None = Field(None, description="Weights file, if there is only one model.")
    app_dir: Path = Field(
        Path(), description="Folder from which package.module:function builders are imported."
    )
    allow_random_weights: bool = Field(
        False,
        description="Download nothing: seeded random weights for models without a weights file. "
        "Every result then has the flag random_weights.",
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1 …; auto: a GPU if there is one.")
    processes: str = Field(
        "1",
        pattern=r"^(auto|[1-9][0-9]?)$",
        description="Server processes on the port, 1 to 99; auto: one per 8 cores, rounded up, and "
        "on a GPU 2. Workers, queues and the limits of keys are divided among them.",
    )
    workers: int = Field(
        0,
        ge=0,
        le=256,
        description="Batches that run concurrently, each on its own replica; 0: one per core, at "
        "most 16; on a GPU 2.",
    )
    threads_per_worker: int = Field(
        0,
        ge=0,
        le=256,
        description="Torch threads per worker; 0: the cores divided by the workers.",
    )
    single_request_threads: int = Field(
        0,
        ge=0,
        le=256,
        description="Threads of the compiled lane for a single request while no other runs; 0: one "
        "per core. 1 saves the memory of a second set of packed weights.",
    )
    sensitivity: bool = Field(
        True,
        description="Whether to measure at load how much the maps of each method depend on the "
        "weights; it takes about 42 forward passes.",
    )
    compile: bool = Field(
        True,
        description="Whether models get a compiled lane, if it gives the same numbers.",
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32",
        description="Precision of the compiled lane: float32, or bf16, which is faster on devices "
        "that support it; every result then says so. If it changes the numbers of a model too "
        "much, or the processor does not support it, the model runs in float32, and /models "
        "gives the reason.",
    )
    int8: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="int8 fronts made by `camserve calibrate`, each NAME=FOLDER, comma-separated: "
        "these models are served from them. Unset: float32.",
    )
    cache_dir: Path | None = Field(
        None,
        description="Folder that keeps compiled models for the next start. Unset: camserve in "
        "the user's cache folder.",
    )
    max_batch: int = Field(
        0,
        ge=0,
        le=256,
        description="Maximum number of images in one forward pass; 0: 4, on a GPU 64.",
    )
    batch_delay: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Seconds that an incomplete batch waits for more images.",
    )
    hang_timeout: float = Field(
        120.0,
        gt=0,
        description="Seconds after which a batch that does not end is abandoned; its worker and "
        "replica are replaced.",
    )
    max_queue: int = Field(
        0,
        ge=0,
        description="Images admitted at once, waiting or running; more are refused with 429. 0: "
        "64, on a GPU 256.",
    )
    max_queue_bytes: int = Field(
        256 * MEBIBYTE, ge=1, description="Bytes of bodies held at once; more are refused."
    )
    max_uploads: int = Field(
        512,
        ge=1,
        description="Partially received requests at once. Above it, the slowest one is "
        "closed; if none is slow, a new one is refused with 429.",
    )
    max_uploads_per_client: int = Field(
        256,
        ge=1,
        description="The same per client address (for IPv6, per /64 network). All clients behind "
        "a load balancer that does not send X-Forwarded-For have its address.",
    )
    min_transfer_rate: int = Field(
        16384,
        ge=1,
        description="Bytes per second at which a client must send a body and read a response; a "
        "slower upload gets 408, a slower reader is disconnected.",
    )
    transfer_grace: float = Field(
        20.0,
        gt=0,
        description="Seconds that a client may pause, or stay below that rate. It is disconnected "
        "earlier if other requests need its slot.",
    )
    max_images: int = Field(32, ge=1, description="Images in one request.")
    max_body_bytes: int = Field(32 * MEBIBYTE, ge=1, description="Bytes in one request's body.")
    image_formats: Annotated[tuple[Format, ...], NoDecode] = Field(
        ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"),
        min_length=1,
        description="Accepted image formats, comma-separated; the decoders of other formats are "
        "never run.",
    )
    max_pixels: int = Field(64_000_000, ge=1, description="Pixels in one image.")
    max_decode_bytes: int = Field(
        0,
        ge=0,
        description="Bytes of memory for decoding images, in total; other images wait. "
        "An image that needs more alone gets 413. 0: a quarter of the container's limit.",
    )
    max_render_side: int = Field(
        2048, ge=16, description="Longer side of rendered images, in pixels."
    )
    max_activation_bytes: int = Field(
        64 * MEBIBYTE, ge=1, description="Bytes of float32 activations in one request."
    )
    max_answer_bytes: int = Field(
        64 * MEBIBYTE,
        ge=1,
        description="Bytes of one response, estimated before any work; larger ones are refused "
        "with 422.",
    )
    max_held_answer_bytes: int = Field(
        0,
        ge=0,
        description="Bytes of all responses being built or sent; more are refused with 429. "
        "0: an eighth of the memory, at least 256 MiB.",
    )
    max_cost: float = Field(
        2000.0, gt=0, description="Maximum cost of one explanation of one image, in forward passes."
    )
    request_timeout: float = Field(60.0, gt=0, description="Seconds until a request gets 504.")
    drain_timeout: float = Field(
        30.0, ge=0, description="Seconds that admitted requests may take after SIGTERM."
    )
    drain_delay: float = Field(
        0.0,
        ge=0,
        description="Minimum number of seconds that the service keeps listening after SIGTERM, not "
        "ready, so that a load balancer notices.",
    )
    max_model_bytes: int = Field(
        0,
        ge=0,
        description="Bytes of all loaded models; above it, the least recently used one is evicted, "
        "and reloaded on demand. 0: no limit.",
    )
    api_keys_file: Path | None = Field(
        None,
        description="API keys, one per line: name:sha256, optionally followed by rate=N, "
        "concurrency=N, cost=N for its own limits. Unset: no authentication.",
    )
    admin_keys_file: Path | None = Field(
        None, description="Keys that may load and unload models, one per line: name:sha256."
    )
    key_rate: int = Field(0, ge=0, description="Requests per minute of one API key; 0: no limit.")
    key_concurrency: int = Field(
        0, ge=0, description="Concurrent requests of one API key; 0: no limit."
    )
    key_cost: float = Field(
        0,
        ge=0,
        description="Total cost of the concurrent requests of one API key, in forward passes; 0: "
        "no limit.",
    )
    baseline: Path | None = Field(
        None,
        description="File of `camserve baseline`: the last 500 answers of its model are compared "
        "with it, and the distances are metrics.",
    )
    open_metrics: bool = Field(
        True, description="Whether /metrics is open without an API key if there are keys."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Accepted names in the Host header, comma-separated: NAME, *.NAME for "
        "all names under it, an IP address, or * for every host. localhost and loopback addresses "
        "are always accepted, and every IP address if the service listens beyond loopback. Unset: "
        "with API keys every host; without keys no name that a public DNS zone can have.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins whose pages may send requests, such as https://label.example.org; "
        "comma-separated. Unset: only this service's own pages.",
    )
    allowed_image_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Hosts that images may be fetched from by `url`, each [private:]HOST[:PORT]; "
        "comma-separated. *.name is every name under it, * every public host, "
        "`private:` allows private and loopback addresses. Unset: no image is fetched.",
    )
    image_url_timeout: float = Field(
        10.0, gt=0, description="Timeout for fetching one image by its URL, in seconds."
    )
    label_studio_url: str | None = Field(
        None,
        description="The Label Studio that images of tasks are fetched from, such as "
        "http://localhost:8080; the token is sent to it only. Unset: no such images.",
    )
    label_studio_token: SecretStr | None = Field(
        None,
        description="Token of Label Studio: a personal access token, or a legacy one of 40 digits.",
    )
    label_studio_score: Literal["probability", "margin", "entropy"] = Field(
        "probability",
        description="The score of a prediction in Label Studio, by which it orders tasks, the "
        "least certain first: probability of the class, margin of the two best classes, or "
        "entropy, as 1 - entropy.",
    )
    overlay_secret: SecretStr | None = Field(
        None,
        description="Signs the keys of live overlays (`camserve overlay-token`); changing it "
        "invalidates all keys. Unset: no overlays.",
    )
    root_path: str = Field("", description="Path prefix under which a proxy serves this service.")
    log_format: Literal["text", "json"] = Field("text", description="Format of the log lines.")

    @field_validator(
        "models", "int8", "allowed_hosts", "allowed_image_hosts", "cors_origins", mode="before"
    )
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("cors_origins", mode="after")
    @classmethod
    def _as_browsers_send_them(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        """Origins as the header `Origin` has them (RFC 6454): any other would match no page."""
        for origin in origins:
            parts = urlsplit(origin)
            bare = f"{parts.scheme}://{parts.netloc}"
            if origin == "*" or (parts.netloc and origin == bare.lower()):
                continue
            meant = bare.lower() if parts.netloc else f"https://{origin.lower()}"
            raise ValueError(
                f"{origin!r} is no origin (SCHEME://HOST[:PORT] in lower case, without a path, "
                f"or *); write {meant}"
            )
        return origins

    @field_validator("port", mode="before")
    @classmethod
    def _without_service_link(cls, value: object) -> object:
        return 8000 if isinstance(value, str) and _LINK_VALUE.match(value) else value

    @field_validator("label_studio_token", "overlay_secret", mode="after")
    @classmethod
    def _unset_where_blank(cls, value: SecretStr | None) -> SecretStr | None:
        return value if value is not None and value.get_secret_value().strip() else None

    @field_validator("api_keys_file", "admin_keys_file", mode="before")
    @classmethod
    def _refuse_blank(cls, value: object) -> object:
        # Unset would disable authentication; "" would be the current folder.
        if isinstance(value, str) and not value.strip():
            raise ValueError("is empty; name a file, or unset it if no key is needed")
        return value

    @field_validator("image_formats", mode="before")
    @classmethod
    def _split_formats(cls, value: object) -> object:
        return cls._split(value.upper()) if isinstance(value, str) else value

    @property
    def uses_gpu(self) -> bool:
        """Whether models run on a GPU by default."""
        if self.device != "auto":
            return self.device.startswith("cuda")
        import torch  # noqa: PLC0415 - takes seconds, which `camserve --help` need not wait for

        return torch.cuda.is_available()

    @property
    def process_count(self) -> int:
        """`processes`, with `auto` resolved."""
        if self.processes != "auto":
            return int(self.processes)
        return max(math.ceil(available_cores() / 8), 2 if self.uses_gpu else 1)

    def share_of(self, processes: int) -> Settings:
        """The settings of each of several processes: what bounds all of them is divided.

        Rounded up, so that each has at least one of each; 0 stays "no limit".
        """

        def part(whole: int) -> int:
            return math.ceil(whole / processes)

        cores = max(1, available_cores() // processes)
        own = 2 if self.uses_gpu else min(16, cores)
        workers = part(self.workers) or own
        return self.model_copy(
            update={
                "workers": workers,
                "threads_per_worker": self.threads_per_worker or max(1, cores // workers),
                "single_request_threads": self.single_request_threads or cores,
                "max_queue": part(self.queue_limit),
                "max_queue_bytes": part(self.max_queue_bytes),
                "max_uploads": part(self.max_uploads),
                "max_uploads_per_client": part(self.max_uploads_per_client),
                "max_held_answer_bytes": part(self.max_held_answer_bytes),
                "max_decode_bytes": part(self.max_decode_bytes),
                "max_model_bytes": part(self.max_model_bytes),
                "key_rate": part(self.key_rate),
                "key_concurrency": part(self.key_concurrency),
                "key_cost": self.key_cost / processes,
            }
        )

    @property
    def worker_count(self) -> int:
        """`workers`, with 0 resolved.

        More than 16 concurrent batches are limited by memory bandwidth. On a GPU a second one is
        prepared while the first runs; more would be smaller, and share the GPU.
        """
        return self.workers or (2 if self.uses_gpu else min(16, available_cores()))

    @property
    def helper_count(self) -> int:
        """Threads that decode and render beside the batches: on a GPU one per core."""
        return available_cores() if self.uses_gpu else 1

    @property
    def batch_size(self) -> int:
        """`max_batch`, with 0 resolved."""
        return self.max_batch or (64 if self.uses_gpu else 4)

    @property
    def queue_limit(self) -> int:
        """`max_queue`, with 0 resolved."""
        return self.max_queue or (256 if self.uses_gpu else 64)

    def uncompiled(self) -> Settings:
        """The same for commands that end soon: without compiled lanes, sensitivity and baseline."""
        return self.model_copy(update={"compile": False, "sensitivity": False, "baseline": None})

    @property
    def torch_threads(self) -> int:
        """`threads_per_worker`, with 0 resolved."""
        fair = 1 if self.uses_gpu else max(1, available_cores() // self.worker_count)
        return self.threads_per_worker or fair

    @property
    def single_request_thread_count(self) -> int:
        """`single_request_threads`, with 0 resolved."""
        return self.single_request_threads or available_cores()

    @property
    def cache_folder(self) -> Path:
        """`cache_dir`, with None resolved as the XDG base directory specification says."""
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return self.cache_dir or Path(folder) / "camserve"
