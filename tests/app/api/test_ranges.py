"""Range headers against the plain meaning of RFC 9110, and the tar that can be resumed."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.content import FilePart, Source, etag_matches, tar_source
from app.api.ranges import MAX_RANGES, NotSatisfiable, Span, parse

SPECS = st.one_of(
    st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda p: f"{min(p)}-{max(p)}"),
    st.integers(0, 30).map(lambda start: f"{start}-"),
    st.integers(0, 30).map(lambda count: f"-{count}"),
)


def wanted(spec: str, length: int) -> set[int]:
    """The positions that one range names, as the RFC says in words."""
    first, _, last = spec.partition("-")
    if not first:
        return set(range(max(length - int(last), 0), length)) if int(last) else set()
    return set(range(int(first), min(int(last), length - 1) + 1 if last else length))


@given(st.lists(SPECS, min_size=1, max_size=MAX_RANGES), st.integers(0, 25))
def test_spans_cover_exactly_what_was_asked(specs: list[str], length: int) -> None:
    expected = set().union(*(wanted(spec, length) for spec in specs))
    try:
        spans = parse("bytes=" + ", ".join(specs), length)
    except NotSatisfiable:
        assert not expected
        return
    covered = [position for span in spans for position in range(span.start, span.stop)]
    assert set(covered) == expected
    assert len(covered) == len(expected)  # merged: no byte twice
    assert all(span.start < span.stop for span in spans)


@given(st.text(max_size=40), st.integers(0, 100))
def test_any_text_is_ignored_or_parsed(header: str, length: int) -> None:
    try:
        spans = parse(header, length)
    except NotSatisfiable:
        return
    assert all(0 <= span.start < span.stop <= length for span in spans)


@pytest.mark.parametrize(
    "header",
    [None, "", "bytes", "bytes=", "items=0-1", "bytes=1", "bytes=a-b",
     "bytes=5-2", "bytes=0-1,x", "bytes=1-2-3",
     "bytes=٣-٤", "bytes=" + ",".join(f"{2 * i}-{2 * i}" for i in range(MAX_RANGES + 1))],
)  # fmt: skip
def test_what_is_no_range_is_ignored(header: str | None) -> None:
    assert parse(header, 100) == []


def test_a_number_of_any_length_is_a_number() -> None:
    with pytest.raises(NotSatisfiable):
        parse("bytes=" + "9" * 25 + "-", 100)


def test_units_and_spaces_are_read_loosely() -> None:
    assert parse("Bytes = 0-1 ,\t5-", 8) == [Span(0, 2), Span(5, 8)]


@given(st.lists(st.binary(max_size=1500), min_size=1, max_size=5), st.data())
def test_any_part_of_a_source_is_that_part(contents: list[bytes], data: st.DataObject) -> None:
    source = Source(tuple(contents))
    whole = b"".join(contents)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    slices = source.slices(Span(start, stop))
    assert b"".join(part[a:b] for part, a, b in slices if isinstance(part, bytes)) == whole[start:stop]


def test_a_tar_is_the_same_every_time_and_tarfile_reads_it(tmp_path: Path) -> None:
    names = ["a.txt", "folder/" + "long" * 40 + ".bin", "\u00fcmlaut.json", "empty"]
    members = []
    for index, name in enumerate(names):
        path = tmp_path / str(index)
        path.write_bytes(b"x" * (index * 700 if name != "empty" else 0))
        members.append((name, path, path.stat().st_size))

    def render() -> bytes:
        source = tar_source(members)
        content = b"".join(p.path.read_bytes() if isinstance(p, FilePart) else p for p in source.parts)
        assert len(content) == source.length
        return content

    first = render()
    (tmp_path / "0").touch()
    assert render() == first
    with tarfile.open(fileobj=io.BytesIO(first), mode="r:") as archive:
        assert [member.name for member in archive] == names
        assert [member.size for member in archive] == [size for _, _, size in members]
        assert {member.mtime for member in archive} == {0}


def test_a_file_above_the_old_limit_of_tar_gets_a_header_that_says_so(tmp_path: Path) -> None:
    size = 9 << 30
    source = tar_source([("big", tmp_path / "big", size)])
    head = source.parts[0]
    assert isinstance(head, bytes)
    member = tarfile.TarFile(fileobj=io.BytesIO(head + bytes(1024)), mode="r").next()
    assert member is not None
    assert member.size == size


@pytest.mark.parametrize(
    ("header", "matches"),
    [
        (None, False),
        ('"a"', True),
        ('W/"a"', True),
        ('"b", "a"', True),
        ("*", True),
        ('"b"', False),
        ("a", False),
    ],
)
def test_if_none_match_compares_weakly(header: str | None, matches: bool) -> None:
    assert etag_matches(header, '"a"') is matches
