"""The wheel: it carries the SQL files and runs from any directory."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from support import environment

ROOT = Path(__file__).parents[2]


def test_an_installed_wheel_has_the_sql_files_and_runs_anywhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    shipped = {path.relative_to(installed / "incidentd" / "sql") for path in (installed / "incidentd" / "sql").rglob("*.sql")}
    assert shipped == {path.relative_to(ROOT / "sql") for path in (ROOT / "sql").rglob("*.sql")}
    assert (installed / "incidentd" / "postgresql.conf").is_file(), "the embedded server's settings"
    where = "import incidentd, sys; from incidentd import cli; print(incidentd.__file__); sys.exit(cli.main(['list']))"
    done = subprocess.run(
        [sys.executable, "-c", where],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(installed)),
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout.startswith(str(installed)) and "lock_contention" in done.stdout
