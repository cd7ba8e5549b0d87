"""Fetches the image of a task from the address in the task."""

from __future__ import annotations

import re
from collections.abc import Callable

from fastapi import Request

from service.errors import ImageUrlRefused
from service.integrations.label_studio.host import label_studio_of
from service.integrations.protocol_requests import file_in
from service.pipeline.process import result_of
from service.routes import bodies
from service.routes.state import service_of

_WEB = re.compile(r"https?://", re.IGNORECASE)


async def fetch_image(
    request: Request, source: str, task: object, take: Callable[[int], None]
) -> bytes:
    """The file behind the value of an Image tag.

    A data: URI is the file itself. Paths, and addresses in storages of Label Studio (`s3://…`), are
    fetched from the configured Label Studio, with its token; other URLs from the hosts that images
    may be fetched from, without it.

    take: called with the size of each chunk. Raises ImageError, and whatever `take` raises.
    """
    service = service_of(request)
    if source[:5].lower() == "data:":
        return await result_of(service.scheduler.call(file_in, source))
    host = label_studio_of(request).host
    if _WEB.match(source) and (host is None or not host.is_its(source)):
        return await bodies.image_bytes(source, service.fetcher, take)
    if host is None:
        raise ImageUrlRefused(
            "The image of the task is in Label Studio, whose address is not configured; set "
            "CAMSERVE_LABEL_STUDIO_URL and CAMSERVE_LABEL_STUDIO_TOKEN."
        )
    return await host.fetch(source, task, take)
