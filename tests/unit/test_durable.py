"""Files that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from disks import playing

from service.durable import make_folder, sync_folder, whole, write_synced, write_whole


def test_a_file_has_its_name_once_its_bytes_are_on_the_disk(tmp_path: Path, monkeypatch) -> None:
    with playing(tmp_path, monkeypatch) as disk:
        named: list[Path] = []
        disk.when_named.append(named.append)
        disk.when_named.append(lambda path: _check(path.stat().st_ino in disk.synced))
        write_whole(tmp_path / "a.json", b"{}")
        assert named == [tmp_path / "a.json"]
        assert disk.is_kept(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_bytes() == b"{}"


def test_folders_are_on_the_disk_with_those_above_them(tmp_path: Path, monkeypatch) -> None:
    with playing(tmp_path, monkeypatch) as disk:
        make_folder(tmp_path / "a" / "b")
        write_synced(tmp_path / "a" / "b" / "c.png", b"c")
        assert not disk.is_kept(tmp_path / "a" / "b" / "c.png"), "its name is not synced"
        sync_folder(tmp_path / "a" / "b")
        assert disk.is_kept(tmp_path / "a" / "b" / "c.png")


def test_what_fails_leaves_the_file_that_was_there_and_no_draft(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(b"before")

    def half() -> None:
        with whole(tmp_path / "a.html") as draft:
            draft.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert (tmp_path / "a.html").read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [tmp_path / "a.html"]


def test_a_draft_has_the_suffix_and_room_for_the_longest_name(tmp_path: Path) -> None:
    path = tmp_path / f"{'n' * 250}.webp"
    with whole(path) as draft:
        assert draft.suffix == ".webp"
        draft.write_bytes(b"w")
    assert path.read_bytes() == b"w"


def test_the_target_of_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "there" / "a.json")
    write_whole(tmp_path / "link.json", b"{}")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "there" / "a.json").read_bytes() == b"{}"


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path: Path, monkeypatch) -> None:
    """FUSE and network file systems refuse to."""

    def refuse(_descriptor: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    sync_folder(tmp_path)


def _check(is_so: bool) -> None:
    assert is_so
