"""What is written for the node exporter as root, into a folder that the exporter's account may put anything in."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import random
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import BUNDLE

FILES = BUNDLE / "roles/prepare/files"
UNIT = "celery-worker@default-1.service"
SECONDS = 10


def load(name: str) -> types.ModuleType:
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_"), str(FILES / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


textfile = load("hothouse_textfile.py")
sys.modules["hothouse_textfile"] = textfile
watchdog = load("count-watchdog")
upkeep = load("upkeep")


def copied(tmp_path: Path) -> Path:
    """The scripts as on a host, with the exporter's folder in `tmp_path`."""
    folder = tmp_path / "lib"
    folder.mkdir(exist_ok=True)
    (tmp_path / "prometheus").mkdir(exist_ok=True)
    for name in ("hothouse_textfile.py", "count-watchdog"):
        text = (FILES / name).read_text().replace("/var/lib/prometheus", str(tmp_path / "prometheus"))
        (folder / name).write_text(text)
    return folder


def count(tmp_path: Path, unit: str = UNIT, result: str = "watchdog") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", copied(tmp_path) / "count-watchdog", unit],
        env={"SERVICE_RESULT": result}, capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip


def exporter(tmp_path: Path) -> Path:
    folder = tmp_path / "prometheus/node-exporter"
    folder.mkdir(parents=True)
    return folder


def figure(folder: Path, unit: str = UNIT) -> str:
    return (folder / f"watchdog_{unit}.prom").read_text().splitlines()[-1]


def test_only_what_the_watchdog_ended_is_counted(tmp_path: Path) -> None:
    folder = exporter(tmp_path)
    for result in ("watchdog", "success", "watchdog", "exit-code"):
        assert count(tmp_path, result=result).returncode == 0
    assert figure(folder) == f'hothouse_watchdog_restarts_total{{name="{UNIT}"}} 2'
    assert (folder / f"watchdog_{UNIT}.prom").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in folder.iterdir()] == [f"watchdog_{UNIT}.prom"]


def test_without_an_exporter_nothing_is_done(tmp_path: Path) -> None:
    assert count(tmp_path).returncode == 0
    assert not (tmp_path / "prometheus/node-exporter").exists()


HOSTILE = [
    "x[$(touch owned)]", "$(touch owned)", "`touch owned`", "a[0$(touch owned>&2)]+1", "; touch owned", "1e9", "-1",
    "0x10", "010", "9" * 5000, "\u0661", "1 2", "", " ", "\0", "PATH", "1\ntouch owned",
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE)
def test_what_stands_in_the_file_is_a_number_or_nothing(tmp_path: Path, value: str) -> None:
    """A shell's arithmetic would run some of these."""
    folder = exporter(tmp_path)
    text = f'hothouse_watchdog_restarts_total{{name="{UNIT}"}} {value}\n'
    (folder / f"watchdog_{UNIT}.prom").write_text(text)
    assert count(tmp_path).returncode == 0
    assert figure(folder).endswith(
        (" 1", " 2", " 11")
    )  # 010 is a number, and so is 1 before a line of its own
    assert not list(tmp_path.rglob("owned"))


def test_any_bytes_in_the_file_are_survived() -> None:
    letters = random.Random(10)
    start = f'hothouse_watchdog_restarts_total{{name="{UNIT}"}} '.encode()
    for _ in range(2000):
        data = (
            letters.choice((b"", start))
            + letters.randbytes(letters.randrange(40))
            + letters.choice((b"", b"\n"))
        )
        assert 0 <= watchdog.count(data.decode("utf-8", "replace")) < 10**9


def places(folder: Path, victim: Path) -> list[Path]:
    """Where a link of the exporter's account could lead what is written as root astray."""
    file = folder / f"watchdog_{UNIT}.prom"
    return [file, folder / f".{file.name}.new", folder / f"{file.name}.new"]


@pytest.mark.parametrize("number", range(3))
def test_no_link_is_followed(tmp_path: Path, number: int) -> None:
    folder, victim = exporter(tmp_path), tmp_path / "victim"
    victim.write_text("mine")
    places(folder, victim)[number].symlink_to(victim)
    assert count(tmp_path).returncode == 0
    assert victim.read_text() == "mine"
    assert figure(folder).endswith(" 1")


def test_the_folder_itself_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "prometheus").mkdir()
    (tmp_path / "prometheus/node-exporter").symlink_to(tmp_path / "elsewhere")
    done = count(tmp_path)
    assert done.returncode == 1 and "node-exporter" in done.stderr
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_nothing_is_waited_for(tmp_path: Path) -> None:
    folder = exporter(tmp_path)
    os.mkfifo(folder / f"watchdog_{UNIT}.prom")
    assert count(tmp_path).returncode == 0
    assert figure(folder).endswith(" 1")


def test_a_file_without_an_end_is_not_read_to_the_end(tmp_path: Path) -> None:
    folder = exporter(tmp_path)
    with (folder / f"watchdog_{UNIT}.prom").open("wb") as file:
        file.truncate(1 << 40)
    assert count(tmp_path).returncode == 0
    assert figure(folder).endswith(" 1")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_what_is_done_in_the_folder_is_done_as_its_owner(tmp_path: Path) -> None:
    """So nobody gets at more than the owner of the folder could anyway, whatever changes in between."""
    folder = exporter(tmp_path)
    for path in (tmp_path, folder.parent, *tmp_path.parents):
        if path.stat().st_mode & 0o001 == 0 and "pytest" in str(path):
            path.chmod(0o711)
    os.chown(folder, 12345, 12345)
    with textfile.folder(str(folder.parent)) as at:
        textfile.write(at, "x.prom", "x 1\n")
        with pytest.raises(PermissionError):
            (tmp_path / "root").write_text("")
    assert (folder / "x.prom").stat().st_uid == 12345
    (tmp_path / "root").write_text("")


@pytest.mark.parametrize("unit", ["../x", "a/b", "", "x y", "a\nb", "$(x)", "x" * 300])
def test_other_names_than_those_of_units_are_refused(tmp_path: Path, unit: str) -> None:
    exporter(tmp_path)
    assert count(tmp_path, unit).returncode == 1


def test_a_label_is_escaped() -> None:
    assert textfile.label('a"b\\x2d\nc') == r'"a\"b\\x2d\nc"'


def test_a_reboot_is_waited_for_since_the_first_package_wanted_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reboot, since = tmp_path / "reboot-required", tmp_path / "run/reboot"
    monkeypatch.setattr(upkeep, "REBOOT", reboot)
    monkeypatch.setattr(upkeep, "SINCE", since)
    assert upkeep.reboot_since() == 0
    reboot.touch()
    os.utime(reboot, (1000, 1000))
    assert upkeep.reboot_since() == 1000
    os.utime(reboot, (2000, 2000))
    assert upkeep.reboot_since() == 1000
    reboot.unlink()
    assert upkeep.reboot_since() == 0 and not since.exists()
    reboot.touch()
    os.utime(reboot, (3000, 3000))
    assert upkeep.reboot_since() == 3000
