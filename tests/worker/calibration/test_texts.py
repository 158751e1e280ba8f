"""Reading, splitting and cutting texts; the refusals name the file and what to do."""

import json
from pathlib import Path

import factories
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from quantry.contract import DatasetRef
from worker.calibration.texts import Text, calibration_windows, cut_windows, load_text, overlap, tokenize
from worker.errors import DatasetError, ModelError, ModelNotFound
from worker.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "roots").mkdir()
    return Workspace(
        artifact=tmp_path / "a",
        checkpoints=tmp_path / "c",
        cache=tmp_path / "h",
        model_roots=(tmp_path / "roots",),
        uploads={"ds_1": tmp_path / "roots" / "upload.jsonl"},
        offline=True,
    )


def local(name: str, **fields: object) -> DatasetRef:
    return DatasetRef.model_validate({"source": "local", "id": name, **fields})


def write(workspace: Workspace, name: str, content: str | bytes) -> None:
    data = content.encode() if isinstance(content, str) else content
    (workspace.model_roots[0] / name).write_bytes(data)


def test_one_document_is_split_at_a_line(workspace: Workspace) -> None:
    lines = [f"line {i}\n" for i in range(100)]
    write(workspace, "t.txt", "".join(lines))
    train = load_text(local("t.txt"), "calibration", workspace)
    test = load_text(local("t.txt"), "evaluation", workspace)
    assert train.documents[0] + test.documents[0] == "".join(lines)
    assert test.documents[0].startswith("line 9")
    assert load_text(local("t.txt", split="all"), "evaluation", workspace).documents == ("".join(lines),)


def test_separated_documents_are_split_by_document(workspace: Workspace) -> None:
    write(workspace, "t.txt", "<end>".join(f" story {i} " for i in range(20)) + "<end> ")
    train = load_text(local("t.txt", separator="<end>"), "calibration", workspace)
    test = load_text(local("t.txt", separator="<end>"), "evaluation", workspace)
    assert train.documents == tuple(f"story {i}" for i in range(18))
    assert test.documents == ("story 18", "story 19")
    assert train.separate


def test_json_lines_end_at_line_feeds_alone(workspace: Workspace) -> None:
    documents = ["one\u2028two\x85three", "four"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in documents]
    write(workspace, "t.jsonl", "\r\n".join(lines) + "\r\n")
    assert load_text(local("t.jsonl", split="all"), "calibration", workspace).documents == tuple(documents)


@pytest.mark.parametrize(("name", "content"), [("t.txt", "a text"), ("t.jsonl", '{"text": "a text"}')])
def test_a_byte_order_mark_is_no_part_of_a_text(workspace: Workspace, name: str, content: str) -> None:
    write(workspace, name, content.encode("utf-8-sig"))
    assert load_text(local(name, split="all"), "calibration", workspace).documents == ("a text",)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_documents(kind: str, workspace: Workspace) -> None:
    rows = [f"row {i}" for i in range(10)]
    path = workspace.model_roots[0] / f"t.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"body": row, "n": 1}) for row in rows))
    else:
        pq.write_table(pa.table({"body": rows, "n": list(range(10))}), path)
    assert load_text(
        local(path.name, field="body", split="all"), "calibration", workspace
    ).documents == tuple(rows)
    with pytest.raises(
        DatasetError, match=r"t\.(jsonl, line 1: no JSON object with a field|parquet cannot be read)"
    ):
        load_text(local(path.name, field="absent"), "calibration", workspace)


def test_uploads_are_found_by_id(workspace: Workspace) -> None:
    write(workspace, "upload.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    ref = DatasetRef(source="upload", id="ds_1", split="all")
    found = load_text(ref, "calibration", workspace)
    assert (found.name, found.documents) == ("ds_1 (all)", ("one", "two"))
    with pytest.raises(DatasetError, match="there is no upload ds_2"):
        load_text(DatasetRef(source="upload", id="ds_2"), "calibration", workspace)
    with pytest.raises(DatasetError, match="ds_1, line 1: no JSON object with a field 'body'"):
        load_text(DatasetRef(source="upload", id="ds_1", field="body"), "calibration", workspace)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"ok \xff\xfe", r"bad.txt is not UTF-8 text \(byte 3\)"),
        ("bad.jsonl", '{"text": "a"}\n{"text": 7}\n', "bad.jsonl, line 2: field 'text' is not a string"),
        ("bad.jsonl", "{no json\n", "bad.jsonl, line 1: no JSON object"),
        ("bad.parquet", b"PAR1garbage", "bad.parquet cannot be read"),
    ],
)
def test_malformed_files_are_named(
    name: str, content: str | bytes, message: str, workspace: Workspace
) -> None:
    write(workspace, name, content)
    with pytest.raises(DatasetError, match=message):
        load_text(local(name), "calibration", workspace)


def test_files_outside_the_roots_are_not_there(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (workspace.model_roots[0] / "link.txt").symlink_to(tmp_path / "secret.txt")
    for name in ("../secret.txt", "link.txt", str(tmp_path / "secret.txt"), "absent.txt"):
        with pytest.raises(ModelNotFound, match="not below any"):
            load_text(local(name), "calibration", workspace)
    closed = workspace.model_copy(update={"model_roots": ()})
    with pytest.raises(ModelError, match="local source is off"):
        load_text(local("t.txt"), "calibration", closed)


def test_separate_documents_start_with_the_start_token(tmp_path: Path) -> None:
    factories.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    apart = tokenize(Text("t", ("ab", "c"), separate=True), tokenizer, 2)
    together = tokenize(Text("t", ("ab", "c")), tokenizer, 2)
    a, b, c, newline = tokenizer("abc\n")["input_ids"]
    assert apart.tolist() == [2, a, b, 2, c]
    assert together.tolist() == [a, b, newline, newline, c]


def test_windows_do_not_overlap_and_drop_the_tail() -> None:
    assert cut_windows(np.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_calibration_draws_without_replacement_by_seed() -> None:
    tokens = np.arange(400)
    one = calibration_windows(tokens, samples=10, length=20, seed=1, name="t")
    again = calibration_windows(tokens, samples=10, length=20, seed=1, name="t")
    other = calibration_windows(tokens, samples=10, length=20, seed=2, name="t")
    assert (one == again).all()
    assert (one != other).any()
    assert len({int(w[0]) for w in one}) == 10
    assert all(int(w[0]) % 20 == 0 for w in one)


def test_too_short_a_text_says_what_there_is() -> None:
    with pytest.raises(DatasetError, match=r"t has 99 tokens, 4 windows of 20; 5 were asked for"):
        calibration_windows(np.arange(99), samples=5, length=20, seed=0, name="t")


def test_overlap_is_found_at_any_offset() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 1000, 4000)
    calibration = cut_windows(tokens, 100)
    shifted = cut_windows(tokens[37:], 64)
    fresh = cut_windows(rng.integers(0, 1000, 4000), 64)
    half = cut_windows(np.concatenate([tokens[:2000], rng.integers(0, 1000, 2000)]), 100)
    assert overlap(calibration, calibration) == 1
    assert overlap(calibration, shifted) > 0.5
    assert overlap(calibration, fresh) == 0
    assert overlap(calibration, half) == pytest.approx(0.5, abs=0.02)
