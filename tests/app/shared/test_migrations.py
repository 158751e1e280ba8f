"""The migrations make the tables of the code, go down again, and may run several times at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sqlalchemy import Engine, inspect

import migrations
from app.shared.database import make_engine


def test_head_is_what_the_code_says(engine: Engine) -> None:
    assert migrations.is_current(engine)
    assert migrations.difference(engine) == []


def test_down_and_up_again(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path}/a.db")
    assert not migrations.is_current(engine)
    migrations.upgrade(engine)
    migrations.downgrade(engine, "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    migrations.upgrade(engine)
    assert migrations.difference(engine) == []
    engine.dispose()


def test_many_processes_may_migrate_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "QUANTRY_DATABASE_URL": f"sqlite:///{tmp_path}/b.db"}
    command = [sys.executable, "-m", "app", "migrate"]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    outputs = [process.communicate()[0].decode() for process in started]

    assert [process.returncode for process in started] == [0, 0], outputs
    assert sum("Running upgrade" in output for output in outputs) == 1
    engine = make_engine(f"sqlite:///{tmp_path}/b.db")
    assert migrations.difference(engine) == []
    engine.dispose()
