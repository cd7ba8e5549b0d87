"""The body of every error: RFC 9457."""

from __future__ import annotations

from pydantic import BaseModel, Field


class Problem(BaseModel):
    """An `application/problem+json` body."""

    type: str = "about:blank"
    title: str
    status: int
    code: str = Field(description="Stable, snake_case; switch on this.")
    detail: str = Field(description="What is wrong and what to do.")
    request_id: str
