"""The builder of the bundled text: what it keeps of a document, and what never reaches the test split."""

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_pydoc.py"


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_pydoc", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docstrings_stand_under_their_signatures(builder: ModuleType) -> None:
    source = 'class A:\n    def f(self, x: int = 1):\n        """Add one."""\n    def g(self): ...\n'
    assert list(builder.docstrings(ast.parse(source), "m")) == ["m.A.f(self, x: int=1)\n\nAdd one."]


def test_paragraphs_are_kept_once(builder: ModuleType) -> None:
    seen: set[bytes] = set()
    first = builder.clean(["m.f()\n\nReturn the name.\n\nMore of it."], seen, titled=True)
    again = builder.clean(["m.g()\n\nreturn  the name!", "m.h()\n\nSomething new."], seen, titled=True)
    assert first == ["m.f()\nReturn the name.\n\nMore of it."]
    assert again == ["m.h()\nSomething new."]


def test_paragraphs_without_words_are_dropped(builder: ModuleType) -> None:
    assert builder.paragraphs("====\n\nA word.  \n\n\n1 2 3\n\nbell \x07 rings") == ["A word."]


def test_twelve_words_in_a_row_are_a_leak(builder: ModuleType) -> None:
    train = "one two three four five six seven eight nine ten eleven twelve thirteen"
    known = builder.shingles(train)
    leak = "zero " + train.replace(" thirteen", "").upper()
    near = train.replace("six", "sixth")
    assert builder.without_leaks(f"{leak}\n\n{near}", known) == near


def test_long_documents_are_not_held_out(builder: ModuleType) -> None:
    names = [f"module m{i}" for i in range(400)]
    chosen = [name for name in names if builder.in_test(name, ["short"])]
    assert 0.08 < len(chosen) / len(names) < 0.18  # the share is 13 %
    assert not any(builder.in_test(name, ["x" * 20_001]) for name in chosen)
