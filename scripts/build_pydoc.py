"""Build the bundled text `bundled/pydoc` from the documentation that every CPython carries with it.

usage: python3.11 scripts/build_pydoc.py [TARGET]        (TARGET: quantry/bundled/pydoc)

Two sources, both files of the running interpreter's standard library: the reference topics behind
`help("for")` (pydoc_data/topics.py), and the docstrings of its modules, classes and functions, each under
its signature. Sources are parsed with `ast`, never imported, so nothing is executed and the result does
not depend on the platform. The committed text was made by CPython 3.11.7; other versions differ.

A document is one topic or one module. Whole documents go to train or test by a hash of their name, and
each paragraph is kept once only, so that no paragraph stands in both; on top of that a test paragraph that
shares twelve words in a row with train is dropped. Written are train.txt.xz, test.txt.xz and LICENSE.txt.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import lzma
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

STDLIB = Path(sysconfig.get_path("stdlib"))
TARGET = Path(__file__).parent.parent / "quantry" / "bundled" / "pydoc"
SKIPPED = {"site-packages", "test", "tests", "idle_test", "_bundled", "pydoc_data", "turtledemo", "encodings"}
TEST_SHARE = 13  # per cent of the documents
TEST_LENGTH_MAX = (
    20_000  # characters; a longer document would dominate the held-out text, so it goes to train
)
SHINGLE = 12  # words in a row that a test paragraph must not share with train
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def topics() -> Iterator[tuple[str, list[str]]]:
    """Each reference topic: its name and its one passage."""
    tree = ast.parse((STDLIB / "pydoc_data" / "topics.py").read_bytes())
    for node in tree.body:
        if isinstance(node, ast.Assign):
            for name, text in sorted(ast.literal_eval(node.value).items()):
                yield f"topic {name}", [text]


def modules() -> Iterator[tuple[str, list[str]]]:
    """Each module: its dotted name and a passage for every docstring in it, in source order."""
    for path in sorted(STDLIB.rglob("*.py")):
        parts = path.relative_to(STDLIB).with_suffix("").parts
        if SKIPPED.isdisjoint(parts):
            name = ".".join(parts).removesuffix(".__init__")
            yield f"module {name}", list(docstrings(ast.parse(path.read_bytes()), name))


def docstrings(node: Documented, name: str) -> Iterator[str]:
    """The docstrings of `node` and of what it defines; the first line of each is the signature."""
    text = ast.get_docstring(node)
    if text:
        yield f"{signature(node, name)}\n\n{text}"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings(child, f"{name}.{child.name}")


def signature(node: Documented, name: str) -> str:
    """`json.dumps(obj, *, indent=None)` of a function, the dotted name of all else."""
    if isinstance(node, ast.Module | ast.ClassDef):
        return name
    bare = ast.unparse(node.args)
    return f"{name}({bare})" if len(bare) < 200 else f"{name}(...)"


def paragraphs(text: str) -> list[str]:
    """Split at blank lines; tabs become spaces and line ends lose theirs. Drops what holds no word."""
    lines = [line.rstrip() for line in inspect.cleandoc(text).expandtabs().splitlines()]
    parts = re.split(r"\n{2,}", "\n".join(lines))
    return [
        part for part in parts if re.search(r"[A-Za-z]{2}", part) and part.replace("\n", "").isprintable()
    ]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def key(paragraph: str) -> bytes:
    """The same for paragraphs that differ in spacing, case and punctuation only."""
    return hashlib.sha256(" ".join(words(paragraph)).encode()).digest()


def in_test(name: str, passages: list[str]) -> bool:
    chosen = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < TEST_SHARE
    return chosen and sum(map(len, passages)) <= TEST_LENGTH_MAX


def clean(passages: list[str], seen: set[bytes], *, titled: bool) -> list[str]:
    """The passages with only the paragraphs that no document had before; empty ones are left out.

    A titled passage starts with a signature, which stays with the text under it and is no paragraph
    of its own.
    """
    kept = []
    for passage in passages:
        title, _, body = passage.partition("\n\n") if titled else ("", "", passage)
        fresh = []
        for paragraph in paragraphs(body):
            if key(paragraph) not in seen:
                seen.add(key(paragraph))
                fresh.append(paragraph)
        if fresh:
            kept.append("\n".join(filter(None, (title, "\n\n".join(fresh)))))
    return kept


def shingles(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + SHINGLE]) for i in range(len(found) - SHINGLE + 1)}


def without_leaks(document: str, train: set[tuple[str, ...]]) -> str:
    """The document less the paragraphs that share a shingle with train."""
    return "\n\n".join(part for part in document.split("\n\n") if train.isdisjoint(shingles(part)))


def build() -> tuple[str, str]:
    """The train text and the test text, their documents separated by a blank line."""
    seen: set[bytes] = set()
    documents: dict[bool, list[str]] = {False: [], True: []}
    sources = [
        *((name, parts, False) for name, parts in topics()),
        *((name, parts, True) for name, parts in modules()),
    ]
    for name, passages, titled in sorted(sources, key=lambda source: in_test(*source[:2])):  # train first
        kept = clean(passages, seen, titled=titled)
        if kept:
            documents[in_test(name, passages)].append("\n\n".join(kept))
    train = "\n\n".join(documents[False])
    known = shingles(train)
    tests = [without_leaks(document, known) for document in documents[True]]
    return train + "\n", "\n\n".join(filter(None, tests)) + "\n"


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    target.mkdir(parents=True, exist_ok=True)
    for split, text in zip(("train", "test"), build(), strict=True):
        data = text.encode()
        (target / f"{split}.txt.xz").write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
        digest = hashlib.sha256(data).hexdigest()
        print(f"{split}: {len(data):,} bytes, {len(words(text)):,} words, sha256 {digest}")
    (target / "LICENSE.txt").write_text((STDLIB / "LICENSE.txt").read_text())
    print(f"written to {target} from CPython {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
