"""Content negotiation: when an `Accept` header asks for a picture."""

from __future__ import annotations

import pytest

from service.routes.negotiation import preferred_image


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", None),
        ("*/*", None),
        ("application/json", None),
        ("text/html", None),
        ("image/jpeg", "jpeg"),
        ("image/png", "png"),
        ("image/webp", "webp"),
        ("Image/PNG", "png"),
        (" image/png ; q=0.5 ", "png"),
        ("image/*", "the default"),
        ("image/gif", None),
        ("image/avif, image/*;q=0.5", "the default"),
        ("image/jpg", None),
        ("image", None),
    ],
)
def test_one_type_is_taken_if_it_can_be_made(accept: str, expected: str | None) -> None:
    assert preferred_image(accept, "the default") == expected


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("image/png;q=0.4, image/webp;q=0.5", "webp"),
        ("application/json;q=0.5, image/png;q=0.4", None),
        ("application/json;q=0.4, image/png;q=0.5", "png"),
        ("*/*;q=0.1, image/png;q=0.2", "png"),
        ("application/json, image/png", None),
        ("image/png, application/json", "png"),
        ("image/png, */*", "png"),
        ("image/png;q=0, */*", None),
        ("image/png;q=0", None),
        ("image/png;q=1.0;level=1", "png"),
        ("image/png;level=1;q=0.1, application/json;q=0.2", None),
    ],
)
def test_the_most_preferred_type_counts_and_the_first_of_equals(
    accept: str, expected: str | None
) -> None:
    assert preferred_image(accept, "the default") == expected


@pytest.mark.parametrize(
    "accept",
    ["image/png;q=", "image/png;q=high", "image/png;q=nan", "image/png;q=-1", ",,;;,", ";q"],
)
def test_what_cannot_be_understood_asks_for_nothing(accept: str) -> None:
    assert preferred_image(accept, "the default") is None


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", None),  # curl, fetch, requests
        ("application/json, text/plain, */*", None),  # axios
        ("image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8", "webp"),  # <img>
        ("image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5", "webp"),
    ],
)
def test_what_clients_send_by_themselves(accept: str, expected: str | None) -> None:
    assert preferred_image(accept, "the default") == expected
