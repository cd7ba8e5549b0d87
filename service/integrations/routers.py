"""The routes of other programs' protocols, in the order in which they are listed."""

from __future__ import annotations

from service.integrations import x_anylabeling
from service.integrations.label_studio import backend, overlay
from service.integrations.protocols import kserve, open_inference, repository, torchserve

ROUTERS = (
    repository.router,
    open_inference.router,
    kserve.router,
    torchserve.router,
    x_anylabeling.router,
    backend.router,
    overlay.router,
)
