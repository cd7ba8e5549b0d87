"""`from camserve import Client`: the Python client of a running service, without torch.

The client is that of `api_schemas.client`. `python -m camserve` is the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from api_schemas.client import AsyncClient, Client, errors

__all__ = ["AsyncClient", "Client", "errors"]


def __getattr__(name: str) -> Any:  # the command line does not wait for the client's libraries
    if name not in __all__:
        raise AttributeError(f"module 'camserve' has no attribute {name!r}")
    return getattr(import_module("api_schemas.client"), name)
