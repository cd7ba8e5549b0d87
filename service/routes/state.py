"""What the routes work with: put on the app once, by `create_app`."""

from __future__ import annotations

from fastapi import Request

from service.pipeline.service import Service


def service_of(request: Request) -> Service:
    """The parts of the app that this request came to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
