"""The one `Settings`: flags, environment variables and the reference page are made from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MEBIBYTE = 1 << 20


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Settings(BaseSettings):
    """Every setting; each is also the flag `--name-with-dashes` of `camserve serve`."""

    model_config = SettingsConfigDict(env_prefix="CAMSERVE_", extra="ignore")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Models to serve, each [NAME=]BUILDER[@WEIGHTS]; several are separated by "
        "commas in the environment. None: the built-in model.",
    )
    config: Path | None = Field(
        None, description="models.toml: models to serve with all that is known of each."
    )
    weights: Path | None = Field(None, description="Weights file, where there is one model.")
    app_dir: Path | None = Field(
        None, description="Folder from which package.module:function builders are imported."
    )
    allow_random_weights: bool = Field(
        False,
        description="Fetch nothing: seeded random weights where a model has no weights file. "
        "Every answer then carries the flag random_weights.",
    )
    device: str = Field(
        "auto", description="cpu, cuda, cuda:1 …; auto takes a GPU where there is one."
    )
    workers: int = Field(
        0, ge=0, le=256, description="Worker threads, each with its own replica; 0: one a core."
    )
    max_batch: int = Field(4, ge=1, le=256, description="Images in one forward pass at most.")
    max_queue: int = Field(
        64, ge=1, description="Images held at once, waiting or running; more are refused with 429."
    )
    max_queue_bytes: int = Field(
        256 * MEBIBYTE, ge=1, description="Declared body bytes held at once; more are refused."
    )
    max_images: int = Field(32, ge=1, description="Images in one request.")
    max_body_bytes: int = Field(32 * MEBIBYTE, ge=1, description="Bytes in one request's body.")
    max_pixels: int = Field(64_000_000, ge=1, description="Pixels in one image.")
    max_render_side: int = Field(
        2048, ge=16, description="Longer side of rendered pictures, in pixels."
    )
    max_activation_bytes: int = Field(
        64 * MEBIBYTE, ge=1, description="Bytes of float32 activations of one request."
    )
    max_cost: float = Field(
        2000.0, gt=0, description="Forward passes that one explanation of one image may cost."
    )
    request_timeout: float = Field(60.0, gt=0, description="Seconds until a request gets 504.")
    max_model_bytes: int = Field(
        0,
        ge=0,
        description="Bytes of all loaded models; over it the one not asked for the longest is put "
        "aside, and loaded again on demand. 0: no bound.",
    )
    admin_keys_file: Path | None = Field(
        None, description="Keys that may load and unload models, a line each: name:sha256."
    )
    root_path: str = Field("", description="Path prefix under which a proxy serves this.")
    log_format: Literal["text", "json"] = Field("text", description="Form of the log lines.")

    @field_validator("models", mode="before")
    @classmethod
    def _split_models(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @property
    def worker_count(self) -> int:
        """`workers`, with 0 resolved to the cores of this machine."""
        return self.workers or available_cores()
