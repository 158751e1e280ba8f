"""Settings come from the environment, are checked, and pass to child processes unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.shared.settings import Settings, without_settings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("QUANTRY_")]:
        monkeypatch.delenv(name)


def test_everything_lies_in_the_data_folder_by_default(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    assert settings.database == f"sqlite:///{tmp_path}/quantry.db"
    assert settings.storage == tmp_path / "storage"
    assert settings.cache == tmp_path / "cache"


def test_children_read_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        data=tmp_path,
        model_roots=(tmp_path, tmp_path / "b"),
        offline=True,
        threads=2,
        redis_url="unix:///s",
        lease_s=90,
    )
    for name, value in settings.as_environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


def test_roots_are_separated_by_colons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTRY_MODEL_ROOTS", "/a:/b:")
    assert Settings().model_roots == (Path("/a"), Path("/b"))


@pytest.mark.parametrize(("url", "folder"), [("/x/y", "/x/y"), ("file:///x/y", "/x/y")])
def test_storage_is_a_folder(url: str, folder: str) -> None:
    assert Settings(storage_url=url).storage == Path(folder)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("REDIS_URL", "amqp://host", "redis://"),
        ("STORAGE_URL", "s3://bucket", "folder"),
        ("PORT", "70000", "65535"),
        ("DEVICE", "tpu", "cuda"),
        ("LEASE_S", "15", "heartbeat"),
        ("MAX_ATTEMPTS", "0", "greater"),
    ],
)
def test_a_wrong_value_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    monkeypatch.setenv(f"QUANTRY_{name}", value)
    with pytest.raises(ValidationError, match=said):
        Settings()


def test_jobs_get_no_setting() -> None:
    assert without_settings({"QUANTRY_DATABASE_URL": "x", "PATH": "y"}) == {"PATH": "y"}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_operations_page_lists_every_setting(name: str) -> None:
    field = Settings.model_fields[name]
    default = "" if field.default in (None, "", ()) else f"`{field.default}`"
    page = (Path(__file__).parents[3] / "docs" / "operations.md").read_text(encoding="utf-8")
    assert field.description
    assert f"| `QUANTRY_{name.upper()}` | {default} | {field.description} |" in page
