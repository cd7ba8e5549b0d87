"""Keys in files, and what each may use."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pydantic
import pytest

from service.errors import ConfigurationError, InvalidOption, KeyLimit
from service.security import keys as module
from service.security.keys import Key, KeyFile, read_keys
from service.security.quotas import Bounds, Quotas
from service.settings import Settings


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


@pytest.mark.parametrize(
    "wrong", ["ops", line("o p s", "b"), line("ops", "b", "rate=-1"), line("first", "b")]
)
def test_a_line_that_is_wrong_is_named_by_its_number(path: Path, wrong: str) -> None:
    path.write_text("# who may\n" + line("first", "a") + "\n" + wrong)
    with pytest.raises(ConfigurationError, match=r"keys, line 4: a key is written as name:sha256"):
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


BLANK = {
    "nothing": b"",
    "a line feed, as of echo": b"\n",
    "Windows' line end": b"\r\n",
    "a space": b" ",
    "spaces and a tab": b"  \t",
    "a NUL": b"\0",
    "a no-break space": "\N{NO-BREAK SPACE}".encode(),
    "a byte order mark": b"\xff\xfe",
    "a line end of PowerShell": "\r\n".encode("utf-16-le"),
}


@pytest.mark.parametrize("key", BLANK.values(), ids=BLANK)
def test_the_hash_of_an_empty_or_blank_key_is_refused_with_file_and_line(
    path: Path, key: bytes
) -> None:
    path.write_text(line("one", "secret") + f"two:{hashlib.sha256(key).hexdigest()}\n")
    with pytest.raises(ConfigurationError, match=r"keys, line 2: .*hash of an empty key.*'two'"):
        KeyFile(path)


@pytest.mark.parametrize("key", ["", " ", "\t \t", " " * 70, "\0", "\xa0", "\xe2\x80\x8b" * 9])
def test_a_key_without_a_visible_character_has_no_owner(path: Path, key: str) -> None:
    """Also where the file's own check does not know its hash."""
    path.write_text(line("one", "secret"))
    keys = KeyFile(path)
    blank = Key("two", hashlib.sha256(key.encode("latin-1")).hexdigest())
    keys._keys = {"two": blank}
    assert keys.owner(key) is None


@pytest.mark.usefixtures("_always_look")
def test_a_file_that_becomes_one_with_an_empty_key_leaves_the_keys_as_they_were(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(line("one", "old"))
    keys = KeyFile(path)
    path.write_text(line("one", ""))
    assert keys.owner("") is None
    assert keys.owner("old").name == "one"
    assert "hash of an empty key" in caplog.text


def test_one_key_under_two_names_is_refused_with_both(path: Path) -> None:
    """The bounds of the second name would never hold, and removing one name would not end it."""
    path.write_text(line("one", "a", "rate=1") + line("two", "b") + line("three", "a"))
    with pytest.raises(ConfigurationError, match="line 3: 'three' has the same key as 'one'"):
        KeyFile(path)


# ---- other secrets


@pytest.mark.parametrize("text", ["", " ", "\n", " " * 40])
@pytest.mark.parametrize("name", ["label_studio_token", "overlay_secret"])
def test_a_blank_secret_counts_as_unset(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(f"CAMSERVE_{name.upper()}", text)
    assert getattr(Settings(), name) is None


@pytest.mark.parametrize("text", ["", " "])
@pytest.mark.parametrize("name", ["api_keys_file", "admin_keys_file"])
def test_an_empty_name_of_a_keys_file_is_refused_and_never_opens_the_service(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(f"CAMSERVE_{name.upper()}", text)
    with pytest.raises(pydantic.ValidationError, match="is empty; name a file"):
        Settings()


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
    with pytest.raises(KeyLimit, match="6 requests per minute") as refused:
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
        with pytest.raises(KeyLimit, match="2 open requests"):
            visit(quotas, key)
        visit(quotas, Key("two", ""))
    for _ in range(5):
        with pytest.raises(ZeroDivisionError), quotas.visit(key):
            raise ZeroDivisionError
    visit(quotas, key)


def test_several_processes_divide_a_keys_own_limits_as_the_settings_are() -> None:
    share = Settings(key_rate=5, device="cpu").share_of(2)
    quotas = Quotas(Bounds(share.key_rate), processes=2)
    bounds = {}
    for key in (Key("own", "", 9, 3, 5), Key("default", ""), Key("none", "", 0, 0, 0)):
        with quotas.visit(key) as first:
            bounds[key.name] = first.bounds
    assert bounds == {"own": Bounds(5, 2, 2.5), "default": Bounds(3), "none": Bounds()}


def test_the_cost_at_once_is_bounded_and_given_back() -> None:
    quotas = Quotas(Bounds(cost=100))
    key = Key("one", "")
    with quotas.visit(key) as first, quotas.visit(key) as second:
        first.reserve(35)
        first.reserve(25)  # of one request the sum counts
        second.reserve(40)
        with pytest.raises(KeyLimit, match="cost 100 forward passes"):
            second.reserve(41)
    with quotas.visit(key) as third:
        with pytest.raises(InvalidOption, match="is 100 at once"):
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
