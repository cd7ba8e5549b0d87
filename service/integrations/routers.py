"""The routes of other programs' protocols, in the order in which they are listed."""

from __future__ import annotations

from service.integrations import (
    kserve,
    label_studio,
    label_studio_overlay,
    open_inference,
    repository,
    torchserve,
    x_anylabeling,
)

ROUTERS = (
    repository.router,
    open_inference.router,
    kserve.router,
    torchserve.router,
    x_anylabeling.router,
    label_studio.router,
    label_studio_overlay.router,
)
