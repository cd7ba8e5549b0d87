"""The service that the routes use: `create_app` puts it on the app."""

from __future__ import annotations

from fastapi import Request

from service.pipeline.service import Service


def service_of(request: Request) -> Service:
    """The service of the app that handles this request."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
