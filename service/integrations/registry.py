"""Every integration, in the order in which their routes are matched and documented."""

from __future__ import annotations

from service.integrations import x_anylabeling
from service.integrations.label_studio import backend
from service.integrations.protocols import kserve, open_inference, repository, torchserve

INTEGRATIONS = (
    repository.INTEGRATION,
    open_inference.INTEGRATION,
    kserve.INTEGRATION,
    torchserve.INTEGRATION,
    x_anylabeling.INTEGRATION,
    backend.INTEGRATION,
)
