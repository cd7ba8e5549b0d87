"""The service that the routes use: `create_app` puts it on the app."""

from __future__ import annotations

from fastapi import FastAPI, Request

from service.pipeline.service import Service


def service_of(request: Request) -> Service:
    """The service of the app that handles this request."""
    return service_in(request.app)


def service_in(app: FastAPI) -> Service:
    """The service of an app that `create_app` returned."""
    service = app.state.service
    assert isinstance(service, Service)
    return service
