"""The table of hostile requests: bounds, cells, markers; and what its client reads."""

from __future__ import annotations

import io
import socket
import struct
import threading
import zlib
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent.parent

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    import hostile_client
    import hostile_images
    import hostile_table
    from hostile_table import BEGIN, END, MEBIBYTE, Row

BUDGET = 100 * MEBIBYTE


def row(**values: object) -> Row:
    fields = {"item": "A1", "name": "stars", "size": 29, "sent": 29, "late": 0.01, "machine": 0.0}
    return Row(**{**fields, "memory": 0, "answer": "422 invalid_option", **values})


def test_what_holds_breaks_nothing():
    assert row().broken(BUDGET) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"late": 0.1}, "100 ms, of 100 allowed"),
        ({"late": 0.5, "size": 1_000_000}, "500 ms, of 500 allowed"),
        ({"memory": BUDGET + MEBIBYTE}, "101 MiB, of 100 allowed"),
        ({"killed": True}, "the server ended"),
        ({"answer": "3 × 500 internal_error"}, "500"),
        ({"answer": "500 internal_error"}, "500"),
        ({"answer": "200, 500 internal_error in 0.1 s"}, "500"),
        ({"answer": "no answer; beside it 429 in 0.0 s"}, "a good request was not answered"),
    ],
)
def test_each_bound_is_checked(values, said):
    assert row(**values).broken(BUDGET) == [said]


@pytest.mark.parametrize(
    "values",
    [
        {"late": 0.099},
        {"late": 0.499, "size": 1_000_000},
        {"memory": BUDGET},
        {"answer": "422 1500 names"},
        {"answer": "500 × 200"},
        {"answer": "no answer; beside it 200 in 0.0 s"},
    ],
)
def test_what_is_just_within_a_bound_holds(values):
    assert row(**values).broken(BUDGET) == []


def test_of_two_runs_the_least_of_each_figure_counts():
    one, other = row(late=0.3, memory=5), row(late=0.1, memory=9, answer="200")
    assert one.better(other) == row(late=0.1, memory=5, answer="200")
    assert other.better(one) == one.better(other)


def test_the_table_marks_what_is_broken_and_shows_what_was_before():
    rows = [row(), row(name="a|b", sent=2_500_000, size=2_500_000, late=0.6, busy=True)]
    before = {rows[0].key: row(late=22.9)}
    lines = hostile_table.table(rows, BUDGET, before).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == 8
    assert lines[2] == (
        "| A1 | stars | 29 B | 10 ms | 0 MiB | 422 invalid_option | "
        "**22900 ms**, 0 MiB, 422 invalid_option |"
    )
    assert lines[3] == (
        "| A1 | a\\|b | 2.5 MB | **600 ms** | 0 MiB | 422 invalid_option; works on |  |"
    )


def test_the_table_has_no_column_for_what_was_before_where_nothing_was():
    assert "before" not in hostile_table.table([row()], BUDGET, {})


def test_a_page_without_markers_gets_a_section_and_keeps_its_text():
    page = "# Robustness\n\ntext\n"
    made = hostile_table.put(page, "table")
    assert made.startswith("# Robustness\n\ntext\n\n## Hostile requests\n")
    assert made.endswith(f"{BEGIN}\n\ntable\n\n{END}\n")


def test_between_the_markers_alone_a_page_is_changed():
    page = hostile_table.put("# Robustness\n", "old") + "\n## Last\n\nend\n"
    again = hostile_table.put(page, "new")
    assert again == page.replace("old", "new")
    assert hostile_table.put(again, "new") == again


def test_rows_are_kept_and_read_again(tmp_path: Path):
    rows = [row(), row(name="ünïcode", killed=True)]
    hostile_table.save(rows, tmp_path / "rows.json")
    assert hostile_table.load(tmp_path / "rows.json") == {each.key: each for each in rows}
    assert hostile_table.load(tmp_path / "none.json") == {}


# ---- the client


def talk(answer: bytes, tmp_path: Path, request: bytes = b"GET / HTTP/1.1\r\n\r\n", **plan: object):
    """What a client says of a server that answers that, and closes."""
    file = tmp_path / "request"
    file.write_bytes(request)

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(len(request), socket.MSG_WAITALL)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        port = listening.getsockname()[1]
        found = hostile_client.run(
            hostile_client.Plan(port, str(file), [len(request)], **{"patience": 5.0, **plan})
        )
        thread.join()
    return found


def answered(status: str, body: str) -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (answered("200 OK", "{}"), "200"),
        (answered("422 No", '{"code": "invalid_option"}'), "422 invalid_option"),
        (answered("400 No", '{"error": "No such | <b>"}'), "400 No such    b"),
        (answered("400 No", '{"code": 400, "type": "BadRequest"}'), "400 BadRequest"),
        (answered("500 No", '{"success": false, "error": {"code": "x"}}'), "500 x"),
        (answered("400 No", "Invalid HTTP request received."), "400"),
        (b"", "closed without an answer"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nab", "cut off"),
    ],
)
def test_an_answer_is_read_to_its_end_and_named_by_status_and_code(answer, said, tmp_path):
    assert talk(answer, tmp_path).answers == {said: 1}


def test_several_answers_are_read_from_one_connection(tmp_path: Path):
    both = answered("200 OK", "{}") + answered("413 No", '{"code": "body_too_large"}')
    found = talk(both, tmp_path, answers=3)
    assert found.answers == {"200": 1, "413 body_too_large": 1}
    assert str(found) == "200, 413 body_too_large"


def test_the_answer_to_head_has_no_body(tmp_path: Path):
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n"
    assert talk(head, tmp_path, b"HEAD / HTTP/1.1\r\n\r\n").answers == {"200": 1}


# ---- the images


@pytest.mark.parametrize(
    ("made", "mode"),
    [
        (hostile_images.tiff(16, side=64), "I;16"),
        (hostile_images.tiff(32, 1, 3, side=64), "F"),
        (hostile_images.tiff(16, 4, 1, 2, 2, side=64), "RGBA"),
        (hostile_images.tiff(8, 4, 1, 5, side=64), "CMYK"),
        (hostile_images.png(16, 0, 64, 48), "I;16"),
        (hostile_images.png(16, 6, 61, 47, interlaced=True), "RGBA"),
        (hostile_images.png(8, 3, 64, 48), "P"),
        (hostile_images.run_length_bmp(64), "P"),
        (hostile_images.scanned_jpeg(5, 64), "L"),
    ],
)
def test_an_image_that_is_written_by_hand_is_one_that_pillow_decodes(made, mode):
    with Image.open(io.BytesIO(made)) as image:
        image.load()
        assert image.mode == mode


@pytest.mark.parametrize(
    "made",
    [
        hostile_images.marked_jpeg(0xE1, hostile_images.exif(3), 9),
        hostile_images.filled_jpeg(99),
        hostile_images.chunked_png(b"tEXt", b"a\0b", 9),
        hostile_images.commented_gif(9),
        hostile_images.extended_gif(0xF9, b"\4\0\0\0\0\0", 9),
        hostile_images.framed_gif(9),
        hostile_images.chunked_webp(b"ABCD", b"xx", 9),
        hostile_images.tagged_tiff(9),
        hostile_images.tiff(8, side=160, pages=3),
    ],
)
def test_an_image_with_much_beside_its_pixels_can_be_decoded(made):
    with Image.open(io.BytesIO(made)) as image:
        image.load()


def test_a_bomb_is_as_large_as_it_says():
    assert zlib.decompress(hostile_images.bomb(3 << 20)) == bytes(3 << 20)


def test_a_chunk_of_a_png_has_its_length_and_its_check():
    made = hostile_images.chunk(b"abCd", b"xy")
    assert made == struct.pack(">I", 2) + b"abCdxy" + struct.pack(">I", zlib.crc32(b"abCdxy"))
