"""Images by URL: from allowed hosts, at checked addresses, within bounds; and from nowhere else."""

from __future__ import annotations

import gzip
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pictures
import pytest
from starlette.testclient import TestClient
from webhosts import Forbidden, Names, Web, forbidden, names, web

__all__ = ["names"]  # a fixture

PNG = pictures.png()
IMAGE = {"content-type": "image/png"}


@pytest.fixture(scope="module")
def good() -> Iterator[Web]:
    """The host that images may come from."""
    with web() as server:
        server.pages["/cat.png"] = (200, IMAGE, PNG)
        yield server


@pytest.fixture(scope="module")
def inside() -> Iterator[Forbidden]:
    """What listens on loopback and must not hear anything."""
    with forbidden() as listener:
        yield listener


@pytest.fixture(scope="module")
def client(serve, good: Web, inside: Forbidden) -> Iterator[TestClient]:
    """Every public host is allowed, at the forbidden port too, and one private host."""
    hosts = ("*", f"*:{inside.port}", f"private:good.test:{good.port}")
    with serve(allowed_image_hosts=hosts, max_body_bytes=100_000, image_url_timeout=3) as client:
        yield client


@pytest.fixture(autouse=True)
def _known_names(names: Names) -> None:
    names.add("good.test", ["127.0.0.1"])


def ask(client: TestClient, *urls: str) -> Any:
    return client.post("/predict", json={"images": [{"url": url} for url in urls]})


def failed(response: Any) -> str:
    """The code of an image that could not be had."""
    body = response.json()
    assert response.status_code == {"image_url_refused": 400, "image_url_failed": 424}[body["code"]]
    return str(body["code"])


# ---- what is refused

HOSTILE = {
    "loopback": "http://127.0.0.1:{port}/",
    "another loopback": "http://127.0.0.2:{port}/",
    "localhost": "http://localhost:{port}/",
    "localhost in capitals": "http://LOCALHOST:{port}/",
    "localhost with a dot": "http://localhost.:{port}/",
    "loopback with a dot": "http://127.0.0.1.:{port}/",
    "decimal": "http://2130706433:{port}/",
    "octal": "http://0177.0.0.1:{port}/",
    "one octal number": "http://017700000001:{port}/",
    "hexadecimal": "http://0x7f.0x0.0x0.0x1:{port}/",
    "one hexadecimal number": "http://0x7f000001:{port}/",
    "mixed bases": "http://0x7f.0.0.01:{port}/",
    "two parts": "http://127.1:{port}/",
    "three parts": "http://127.0.1:{port}/",
    "an overflow": "http://127.0.0.257:{port}/",
    "zero": "http://0:{port}/",
    "all zeros": "http://0.0.0.0:{port}/",
    "other digits": "http://①②⑦.⓪.⓪.①:{port}/",
    "other dots": "http://127。0。0。1:{port}/",
    "IPv6 loopback": "http://[::1]:{port}/",
    "IPv6 written out": "http://[0:0:0:0:0:0:0:1]:{port}/",
    "IPv6 unspecified": "http://[::]:{port}/",
    "IPv4 mapped": "http://[::ffff:127.0.0.1]:{port}/",
    "IPv4 mapped in hexadecimal": "http://[::ffff:7f00:1]:{port}/",
    "IPv4 compatible": "http://[::127.0.0.1]:{port}/",
    "6to4": "http://[2002:7f00:1::]:{port}/",
    "NAT64": "http://[64:ff9b::7f00:1]:{port}/",
    "NAT64 of a local prefix": "http://[64:ff9b:1::7f00:1]:{port}/",
    "an IPv6 zone": "http://[fe80::1%25lo]:{port}/",
    "a zone of loopback": "http://[::1%25lo]:{port}/",
    "cloud metadata": "http://169.254.169.254/latest/meta-data/",
    "cloud metadata over IPv6": "http://[fd00:ec2::254]/latest/meta-data/",
    "a private address": "http://10.0.0.1:{port}/",
    "a private name": "http://inside.test:{port}/",
    "a name with an IPv4 mapped address": "http://mapped.test:{port}/",
    "a name with one good and one bad address": "http://both.test:{port}/",
    "a name that rebinds": "http://rebinds.test:{port}/",
    "a user that looks like the host": "http://good.test@127.0.0.1:{port}/",
    "a password, too": "http://good.test:80@127.0.0.1:{port}/",
    "an encoded @": "http://good.test%40127.0.0.1:{port}/",
    "a fragment that looks like the host": "http://127.0.0.1:{port}#@good.test/",
    "a backslash": "http://good.test\\@127.0.0.1:{port}/",
    "backslashes for slashes": "http:\\\\127.0.0.1:{port}\\",
    "a third slash": "http:///127.0.0.1:{port}/",
    "no slashes": "http:127.0.0.1:{port}/",
    "no scheme": "//127.0.0.1:{port}/",
    "a tab in the scheme": "ht\ttp://127.0.0.1:{port}/",
    "a newline in the host": "http://127.0.0.1\n:{port}/",
    "a header in the path": "http://127.0.0.1:{port}/ HTTP/1.1\r\nHost: good.test\r\n\r\n",
    "a header in the host": "http://good.test\r\nX: y:{port}/",
    "a null byte": "http://127.0.0.1\0.good.test:{port}/",
    "a space before": " http://127.0.0.1:{port}/",
    "an encoded dot": "http://127%2e0.0.1:{port}/",
    "punycode of nothing": "http://xn--:{port}/",
    "letters beyond ASCII": "http://l\N{CYRILLIC SMALL LETTER O}calhost:{port}/",
    "a wide letter": "http://\N{FULLWIDTH LATIN SMALL LETTER L}ocalhost:{port}/",
    "no host": "http://:{port}/",
    "no port": "http://127.0.0.1:/",
    "a port beyond": "http://127.0.0.1:99999/",
    "a negative port": "http://127.0.0.1:-{port}/",
    "two ports": "http://127.0.0.1:80:{port}/",
    "another port of the good host": "http://good.test:{port}/",
    "file": "file:///etc/passwd",
    "file on the host": "file://127.0.0.1:{port}/etc/passwd",
    "gopher": "gopher://127.0.0.1:{port}/_GET%20/",
    "ftp": "ftp://127.0.0.1:{port}/cat.png",
    "dict": "dict://127.0.0.1:{port}/info",
    "ws": "ws://127.0.0.1:{port}/",
    "data": "data:image/png;base64,iVBORw0KGgo=",
    "javascript": "javascript:alert(1)",
    "a scheme within": "url:http://127.0.0.1:{port}/",
    "a redirect to loopback": "{good}/to-loopback",
    "a redirect to a private name": "{good}/to-private-name",
    "a redirect without a scheme": "{good}/to-no-scheme",
    "a chain of redirects": "{good}/chain",
    "a redirect to a file": "{good}/to-file",
    "a redirect with a user": "{good}/to-user",
    "a redirect with a backslash": "{good}/to-backslash",
    "nothing": "",
    "a very long URL": "http://127.0.0.1:{port}/" + "x" * 10_000,
}


@pytest.fixture
def traps(names: Names, good: Web, inside: Forbidden) -> None:
    """Names and pages that lead to the forbidden port."""
    bad = f"127.0.0.1:{inside.port}"
    names.add("localhost", ["127.0.0.1", "::1"])
    names.add("inside.test", ["127.0.0.1"])
    names.add("mapped.test", ["::ffff:127.0.0.1"])
    names.add("both.test", ["93.184.215.14", "127.0.0.1"])
    names.add("rebinds.test", ["127.0.0.1"], ["93.184.215.14"])
    for number in ("2130706433", "017700000001", "0x7f000001", "127.1", "xn--"):
        names.add(number, ["127.0.0.1"])
    targets = {
        "/to-loopback": f"http://{bad}/",
        "/to-private-name": f"http://inside.test:{inside.port}/",
        "/to-no-scheme": f"//{bad}/",
        "/chain": "/chain-2",
        "/chain-2": f"http://good.test:{good.port}/to-loopback",
        "/to-file": "file:///etc/passwd",
        "/to-user": f"http://good.test:{good.port}@{bad}/",
        "/to-backslash": f"\\\\{bad}\\",
    }
    for path, target in targets.items():
        good.pages[path] = (302, {"location": target}, b"")


@pytest.mark.usefixtures("traps")
@pytest.mark.parametrize("url", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_url_is_refused_and_nothing_forbidden_is_connected_to(
    client: TestClient, good: Web, inside: Forbidden, url: str
) -> None:
    sent = url.format(port=inside.port, good=f"http://good.test:{good.port}")
    response = ask(client, sent)
    assert failed(response)
    assert not inside.was_asked()
    for secret in ("127.0.0", "::1", "good.test", "inside", "redirect", "resolve"):
        assert secret not in response.json()["detail"]


def test_the_listener_would_have_heard_a_connection(inside: Forbidden) -> None:
    """The proof above is one only if this is so."""
    socket.create_connection(("127.0.0.1", inside.port), timeout=5).close()
    assert inside.was_asked()
    assert not inside.was_asked()


def test_a_name_that_changes_its_address_is_asked_for_at_the_checked_one(
    serve, names: Names, good: Web
) -> None:
    """It is resolved once for a request; the second answer would be another host of its network."""
    with web("127.0.0.2") as other:
        names.add("turns.test", ["127.0.0.1"], ["127.0.0.2"])
        with serve(allowed_image_hosts=(f"private:turns.test:{good.port}",)) as client:
            assert ask(client, f"http://turns.test:{good.port}/cat.png").status_code == 200
        assert names.asked.count("turns.test") == 1
        assert not other.asked


def test_what_fails_on_the_way_is_told_in_one_sentence(
    client: TestClient, good: Web, names
) -> None:
    """A name that is not there, a port that is closed, an inside address: nobody can tell them."""
    names.add("gone.test", [])
    names.add("inside.test", ["10.0.0.1"])
    good.pages["/404"] = (404, {}, b"")
    good.pages["/away"] = (302, {"location": "http://10.0.0.1/"}, b"")
    base = f"http://good.test:{good.port}"
    urls = ["http://gone.test/", "http://inside.test/", f"{base}/404", f"{base}/away"]
    answers = [ask(client, url).json() for url in urls]
    assert len({(body["code"], body["detail"]) for body in answers}) == 1


# ---- what is fetched


def test_an_image_by_url_is_answered_like_its_bytes(client: TestClient, good: Web) -> None:
    fetched = ask(client, f"http://good.test:{good.port}/cat.png").json()["results"]
    sent = client.post("/predict", content=PNG, headers=IMAGE).json()["results"]
    assert fetched == sent
    assert good.asked[-1] == ("/cat.png", f"good.test:{good.port}")


def test_a_url_that_fails_is_an_error_in_its_place(client: TestClient, good: Web) -> None:
    base = f"http://good.test:{good.port}"
    good.pages["/404"] = (404, {}, b"")
    good.pages["/text"] = (200, IMAGE, b"not a picture")
    urls = [f"{base}/cat.png", f"{base}/404", "file:///etc/passwd", f"{base}/text"]
    results = ask(client, *urls, f"{base}/cat.png").json()["results"]
    codes = [each.get("error", {}).get("code") for each in results]
    assert codes == [None, "image_url_failed", "image_url_refused", "unsupported_image", None]


@pytest.mark.parametrize(("hops", "status"), [(1, 200), (3, 200), (4, 424)])
def test_at_most_three_redirects_are_followed(
    client: TestClient, good: Web, hops: int, status: int
) -> None:
    for hop in range(1, hops + 1):
        there = "/cat.png" if hop == 1 else f"/hop-{hop - 1}"
        good.pages[f"/hop-{hop}"] = (302, {"location": there}, b"")
    assert ask(client, f"http://good.test:{good.port}/hop-{hops}").status_code == status


def stall(request: Any) -> None:
    """Begin an answer and never end it, as long as the client is there."""
    request.send_response(200)
    request.send_header("content-type", "image/png")
    request.end_headers()
    request.wfile.flush()
    request.connection.settimeout(5)
    request.connection.recv(1)


def flood(request: Any) -> None:
    """More bytes than anybody asked for, and no word of how many."""
    request.send_response(200)
    request.send_header("content-type", "image/png")
    request.end_headers()
    try:
        for _ in range(1000):
            request.wfile.write(b"x" * 100_000)
    except OSError:
        return  # the service has hung up


BAD_ANSWERS = {
    "a page": (200, {"content-type": "text/html"}, PNG),
    "an error": (500, IMAGE, PNG),
    "a redirect to nowhere": (302, {}, b""),
    "too many bytes, declared": (200, {**IMAGE, "content-length": "9999999999"}, b"x"),
    "too many bytes": flood,
    "fewer bytes than declared": (200, {**IMAGE, "content-length": str(len(PNG) + 1)}, PNG),
    "compressed": (200, {**IMAGE, "content-encoding": "gzip"}, gzip.compress(PNG)),
    "endless": stall,
}


@pytest.mark.parametrize("page", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_an_answer_that_is_no_image_within_the_bounds_fails(serve, good: Web, page: Any) -> None:
    good.pages["/bad"] = page
    hosts = (f"private:good.test:{good.port}",)
    with serve(allowed_image_hosts=hosts, max_body_bytes=100_000, image_url_timeout=0.5) as client:
        response = ask(client, f"http://good.test:{good.port}/bad")
        assert failed(response) == "image_url_failed"
        assert client.app.state.service.admission.images == 0
        assert ask(client, f"http://good.test:{good.port}/cat.png").status_code == 200


def test_the_images_of_one_request_are_bounded_together(serve, good: Web) -> None:
    good.pages["/big.png"] = (200, IMAGE, pictures.png(100, 100))
    url = f"http://good.test:{good.port}/big.png"
    hosts = (f"private:good.test:{good.port}",)
    with serve(allowed_image_hosts=hosts, max_body_bytes=50_000) as client:
        assert ask(client, url).status_code == 200
        codes = [
            each.get("error", {}).get("code") for each in ask(client, url, url).json()["results"]
        ]
        assert sorted(codes, key=str) == [None, "body_too_large"]


def test_probes_answer_while_a_host_keeps_an_image_back(serve, good: Web) -> None:
    """Fetching never stands in the way of the event loop."""
    began, go_on = threading.Event(), threading.Event()

    def late(request: Any) -> None:
        began.set()
        assert go_on.wait(5)
        request.send_response(200)
        request.end_headers()
        request.wfile.write(PNG)

    good.pages["/late.png"] = late
    with serve(allowed_image_hosts=(f"private:good.test:{good.port}",)) as client:
        answers: list[Any] = []
        url = f"http://good.test:{good.port}/late.png"
        asking = threading.Thread(target=lambda: answers.append(ask(client, url)))
        asking.start()
        assert began.wait(5)
        assert client.get("/health/live").status_code == 200
        assert client.post("/predict", content=PNG, headers=IMAGE).status_code == 200
        go_on.set()
        asking.join(5)
        assert answers[0].status_code == 200


def test_the_environments_proxy_is_not_used(
    serve, good: Web, inside: Forbidden, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{inside.port}")
    with serve(allowed_image_hosts=(f"private:good.test:{good.port}",)) as client:
        assert ask(client, f"http://good.test:{good.port}/cat.png").status_code == 200
    assert not inside.was_asked()


def test_cookies_and_connections_are_not_kept(client: TestClient, good: Web) -> None:
    seen: list[str | None] = []

    def bake(request: Any) -> None:
        seen.append(request.headers["cookie"])
        assert request.headers["connection"] == "close"
        request.send_response(200)
        request.send_header("set-cookie", "who=me; Path=/")
        request.end_headers()
        request.wfile.write(PNG)

    good.pages["/cookie.png"] = bake
    for _ in range(2):
        assert ask(client, f"http://good.test:{good.port}/cookie.png").status_code == 200
    assert seen == [None, None]


def test_urls_are_off_until_a_host_is_allowed(serve) -> None:
    with serve() as client:
        response = ask(client, "http://127.0.0.1/cat.png")
        assert (response.status_code, response.json()["code"]) == (400, "invalid_image_data")


def test_an_image_with_data_and_a_url_is_refused(client: TestClient) -> None:
    images = [{"data": "iVBORw0KGgo=", "url": "http://good.test/"}]
    response = client.post("/predict", json={"images": images})
    assert (response.status_code, response.json()["code"]) == (400, "invalid_image_data")


# ---- TLS


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of good.test that signs itself, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    path = tmp_path / "good.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    command += f" -subj /CN=good.test -addext subjectAltName=DNS:good.test -keyout {path} -out -"
    made = subprocess.run(command.split(), capture_output=True, check=True, timeout=30)
    path.write_bytes(path.read_bytes() + made.stdout)
    return path


def test_over_tls_the_certificate_is_that_of_the_name(
    serve, names: Names, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the connection goes to a number; SSL_CERT_FILE adds an authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    asked: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with web(context=context) as secure:
        names.add("other.test", ["127.0.0.1"])
        secure.pages["/cat.png"] = (200, IMAGE, PNG)
        secure.pages["/plain"] = (302, {"location": f"http://good.test:{secure.port}/"}, b"")
        hosts = tuple(f"private:{name}.test:{secure.port}" for name in ("good", "other"))
        with serve(allowed_image_hosts=hosts) as client:
            assert ask(client, f"https://good.test:{secure.port}/cat.png").status_code == 200
            assert failed(ask(client, f"https://other.test:{secure.port}/cat.png"))
            assert failed(ask(client, f"https://good.test:{secure.port}/plain"))
        assert asked == ["good.test", "other.test", "good.test"]
        monkeypatch.delenv("SSL_CERT_FILE")
        with serve(allowed_image_hosts=hosts) as client:
            assert failed(ask(client, f"https://good.test:{secure.port}/cat.png"))
