"""What a user installs: the wheel and the source archive hold the settings, and the command runs from anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", folder, cwd=REPOSITORY)
    return folder


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_package_settings_and_licence_and_nothing_else(dist: Path) -> None:
    found = names(next(dist.glob("*.whl")))
    assert {name.split("/")[0].split("-")[0] for name in found} == {"fsdpsft"}
    settings = {f"fsdpsft/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "conf").rglob("*.yaml")}
    assert settings <= found and "fsdpsft/config/other_trainers.yaml" in found
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "fsdpsft").rglob("*.py")}
    assert {name for name in found if name.endswith(".py")} == modules
    assert {"fsdpsft/tools/page.html.j2", "fsdpsft/tools/style.css"} <= found
    assert any(name.endswith("licenses/LICENSE") for name in found)


def test_source_archive_builds_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "again", cwd=source)
    assert names(next((tmp_path / "again").glob("*.whl"))) == names(next(dist.glob("*.whl")))


def test_command_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    where = run(
        sys.executable, "-c", "import fsdpsft; print(fsdpsft.__file__)", cwd=tmp_path, PYTHONPATH=str(installed)
    )
    assert Path(where.strip()).is_relative_to(installed)
    assert "fsdpsft = fsdpsft.__main__:main" in next(installed.glob("*.dist-info/entry_points.txt")).read_text()
    hint = run(sys.executable, "-m", "fsdpsft", "convert", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "world_size" in hint
    text = run(sys.executable, "-m", "fsdpsft.train", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "train_batch_size" in text
    job = run(
        sys.executable, "-m", "fsdpsft.train", "--cfg", "job", "preset=lora", "data.train_files=chats.parquet",
        "model.partial_pretrain=somewhere", cwd=tmp_path, PYTHONPATH=str(installed),
    )  # fmt: skip
    assert "lora_rank: 32" in job
    assert list(tmp_path.iterdir()) == []  # no outputs/ folder is left behind
