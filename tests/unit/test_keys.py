"""Keys in files, and what each may use."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from service import keys as module
from service.errors import ConfigurationError, InvalidOption, KeyLimit
from service.keys import Key, KeyFile, read_keys
from service.quotas import Bounds, Quotas


def line(name: str, key: str, limits: str = "") -> str:
    return f"{name}:{hashlib.sha256(key.encode()).hexdigest()} {limits}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def _always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_SECONDS", 0)


def test_a_file_has_a_key_a_line_with_its_limits_and_comments(path: Path) -> None:
    path.write_text(
        "# who may\n\n"
        + line("ops", "a", "# the night shift")
        + line("ls", "b", "rate=60 concurrency=0 cost=500")
    )
    ops, labeling = read_keys(path).values()
    assert (ops.name, ops.rate, ops.concurrency, ops.cost) == ("ops", None, None, None)
    assert (labeling.name, labeling.rate, labeling.concurrency, labeling.cost) == ("ls", 60, 0, 500)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nobody yet\n",
        "ops",
        "ops:secret",
        line("ops", "a").upper(),
        line("o p s", "a"),
        line("ops", "a", "rate"),
        line("ops", "a", "rate=-1"),
        line("ops", "a", "speed=3"),
        line("ops", "a") + line("ops", "b"),
    ],
)
def test_a_file_that_is_wrong_stops_the_start_and_is_named(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigurationError, match="keys"):
        KeyFile(path)


def test_a_file_that_is_not_there_stops_the_start(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        KeyFile(path)


def test_a_key_has_an_owner_and_other_texts_have_none(path: Path) -> None:
    path.write_text(line("one", "secret") + line("two", "grüße"))
    keys = KeyFile(path)
    assert keys.owner("secret").name == "one"
    assert keys.owner("grüße".encode().decode("latin-1")).name == "two"
    for wrong in ("", "Secret", "secret ", hashlib.sha256(b"secret").hexdigest(), "→"):
        assert keys.owner(wrong) is None


@pytest.mark.usefixtures("_always_look")
def test_a_file_that_changes_is_read_again(path: Path) -> None:
    path.write_text(line("one", "old"))
    keys = KeyFile(path)
    path.write_text(line("one", "new") + line("two", "other"))
    assert keys.owner("old") is None
    assert keys.owner("new").name == "one"
    assert keys.owner("other").name == "two"


@pytest.mark.usefixtures("_always_look")
@pytest.mark.parametrize("text", [None, "", "one:nothing", "\udcff"])
def test_a_file_that_goes_wrong_leaves_the_keys_as_they_were(
    path: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(line("one", "old"))
    keys = KeyFile(path)
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode(errors="surrogateescape"))
    assert keys.owner("old").name == "one"
    assert caplog.text.count("keys_not_reread") == 1
    assert keys.owner("old").name == "one"
    assert caplog.text.count("keys_not_reread") == 1, "it is said once"
    path.write_text(line("one", "new"))
    assert keys.owner("new").name == "one"


def test_a_file_is_looked_at_once_a_second_at_most(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text(line("one", "old"))
    keys = KeyFile(path)
    looked: list[Path] = []
    monkeypatch.setattr(module, "_stamp", looked.append)
    now = module.time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now + 0.5)
    for _ in range(1000):
        keys.owner("old")
    assert not looked


# ---- quotas


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def visit(quotas: Quotas, key: Key) -> None:
    with quotas.visit(key):
        pass


def test_a_rate_lets_a_minutes_worth_through_and_then_one_by_one() -> None:
    clock = Clock()
    quotas = Quotas(Bounds(rate=6), clock)
    key, other = Key("one", ""), Key("two", "")
    for _ in range(6):
        visit(quotas, key)
    with pytest.raises(KeyLimit, match="6 requests a minute") as refused:
        visit(quotas, key)
    assert refused.value.retry_after == 10
    visit(quotas, other)
    clock.now += 9.9
    with pytest.raises(KeyLimit):
        visit(quotas, key)
    clock.now += 0.2
    visit(quotas, key)
    with pytest.raises(KeyLimit):
        visit(quotas, key)
    clock.now += 3600
    for _ in range(6):
        visit(quotas, key)
    with pytest.raises(KeyLimit):
        visit(quotas, key)


def test_requests_at_once_are_counted_until_they_end_however_they_end() -> None:
    quotas = Quotas(Bounds(concurrency=2))
    key = Key("one", "")
    with quotas.visit(key), quotas.visit(key):
        with pytest.raises(KeyLimit, match="2 requests open"):
            visit(quotas, key)
        visit(quotas, Key("two", ""))
    for _ in range(5):
        with pytest.raises(ZeroDivisionError), quotas.visit(key):
            raise ZeroDivisionError
    visit(quotas, key)


def test_the_cost_at_once_is_bounded_and_given_back() -> None:
    quotas = Quotas(Bounds(cost=100))
    key = Key("one", "")
    with quotas.visit(key) as first, quotas.visit(key) as second:
        first.reserve(60)
        first.reserve(50)  # of one request the largest counts
        second.reserve(40)
        with pytest.raises(KeyLimit, match="cost 100 forward passes already"):
            second.reserve(41)
    with quotas.visit(key) as third:
        with pytest.raises(InvalidOption, match="may use 100 at once"):
            third.reserve(101)
        third.reserve(100)


def test_a_keys_own_bounds_come_before_the_default_and_zero_is_none() -> None:
    quotas = Quotas(Bounds(rate=1, concurrency=1, cost=1))
    free = Key("free", "", rate=0, concurrency=0, cost=0)
    with quotas.visit(free) as one, quotas.visit(free):
        one.reserve(1e9)
    tight = Key("tight", "", rate=0, concurrency=0, cost=5)
    with quotas.visit(tight) as one, pytest.raises(InvalidOption):
        one.reserve(6)
