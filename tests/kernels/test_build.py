"""A kept library that is not what was kept is built anew, whatever lies there; and whatever CC, the
cache folder and the home folder are, there is a library or one readable message."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_builders.kernels import NF4Format, nf4_cpu
from qlora_builders.kernels.build import BuildError, Library, cache_folder

CC = os.environ.get("CC", "cc")
pytestmark = pytest.mark.skipif(shutil.which(CC) is None, reason="needs a C compiler")
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setenv("CC", CC)
    monkeypatch.setenv("QLORA_BUILDERS_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "tiny.c"
    source.write_text("int answer(void) { return 42; }\n")
    return Library("tiny", [source], ("-O1", "-fPIC", "-shared"), ("answer",))


def load(tiny: Library) -> list[str]:
    """The warnings of a load that gives the right library."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tiny.load().answer() == 42
    return [str(warning.message) for warning in caught]


# ---- kept libraries -----------------------------------------------------------------------------


def keep(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(change(file.read_bytes()))


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.rename(file.parent.parent / "good.so")
        make(file)

    return change


def foreign(content: bytes) -> bytes:
    """e_machine of another architecture."""
    return content[:18] + b"\xf3\x7a" + content[20:]


def linked(file: Path) -> None:
    file.symlink_to(file.parent.parent / "good.so")


def renamed(file: Path) -> None:
    file.rename(file.with_name(file.name.rpartition("_")[0] + ".so"))


# what is done to a kept library; whether a whole one has its name after the next load, and what
# the warnings say then
DAMAGES: dict[str, tuple[Callable[[Path], object], bool, str]] = {
    "nothing": (lambda file: None, True, ""),
    "half": (keep(lambda content: content[: len(content) // 2]), True, ""),
    "zero tail": (keep(lambda content: content[:4000].ljust(len(content), b"\0")), True, ""),
    "empty": (keep(lambda content: b""), True, ""),
    "one bit": (keep(lambda content: content[:-1] + bytes([content[-1] ^ 1])), True, ""),
    "longer": (keep(lambda content: content + b"\0"), True, ""),
    "foreign": (keep(foreign), True, ""),
    "text": (keep(lambda content: b"not a library\n"), True, ""),
    "no hash": (renamed, True, ""),
    "link": (replaced(linked), True, ""),
    "broken link": (replaced(lambda file: file.symlink_to("nowhere")), True, ""),
    "pipe": (replaced(os.mkfifo), True, ""),
    "folder": (replaced(Path.mkdir), False, "cannot be kept"),
    "writable": (lambda file: file.chmod(0o722), True, ""),
    "unreadable": (lambda file: file.chmod(0), True, ""),
    "group writes": (lambda file: file.parent.chmod(0o770), True, "others can write in"),
    "all write": (lambda file: file.parent.chmod(0o1777), True, "others can write in"),
}
CHILD = """
import json, os, sys, warnings
from pathlib import Path
from qlora_builders.kernels.build import Library

tiny = Library("tiny", [Path(sys.argv[1])], ("-O1", "-fPIC", "-shared"), ("answer",))
for folder in sys.argv[2:]:
    os.environ["QLORA_BUILDERS_CACHE"] = folder
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = tiny.load().answer()
    print(json.dumps([folder, answer, [str(w.message) for w in caught]]), flush=True)
"""


def test_a_damaged_library_is_built_anew(tiny: Library, tmp_path: Path) -> None:
    """All damages in one process of its own: a library that is loaded wrongly ends it."""
    load(tiny)
    (good,) = (tmp_path / "cache").iterdir()
    content = good.read_bytes()
    files = {}
    for name, (damage, _, _) in DAMAGES.items():
        files[name] = tmp_path / name / "cache" / good.name
        files[name].parent.mkdir(parents=True, mode=0o700)
        shutil.copy(good, files[name])
        damage(files[name])
    command = [sys.executable, "-c", CHILD, str(tiny.files[0])]
    done = subprocess.run(
        [*command, *(str(file.parent) for file in files.values())],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.returncode, len(results), done.stderr)
    for (name, file), (folder, answer, messages) in zip(files.items(), results, strict=True):
        _, mended, warning = DAMAGES[name]
        assert (folder, answer) == (str(file.parent), 42), name
        assert len(messages) == bool(warning), (name, messages)
        assert all(warning in message and folder in message for message in messages), name
        if mended:
            assert not file.is_symlink(), name
            assert file.read_bytes() == content, name
            assert file.stat().st_mode & 0o022 == 0, name
        assert [p for p in file.parent.iterdir() if "qlora_builders" in p.name] == [], name


@ROOT
def test_what_belongs_to_another_is_not_loaded(tiny: Library, tmp_path: Path) -> None:
    load(tiny)
    (kept,) = (tmp_path / "cache").iterdir()
    os.chown(kept, 1234, -1)
    assert load(tiny) == []
    assert kept.stat().st_uid == 0
    os.chown(tmp_path / "cache", 1234, -1)
    (message,) = load(tiny)
    assert "cache belongs to user 1234; you are user 0; set QLORA_BUILDERS_CACHE" in message


def test_it_is_compiled_once_and_by_two_at_a_time(tiny: Library, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tiny.files[0]), str(tmp_path / "cache")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=300)
        assert json.loads(output)[1:] == [42, []]
    (kept,) = (tmp_path / "cache").iterdir()
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    made = kept.stat().st_mtime_ns
    assert load(tiny) == []
    assert [kept.stat().st_mtime_ns, list((tmp_path / "cache").iterdir())] == [made, [kept]]


# ---- folders ------------------------------------------------------------------------------------


def no_entry(uid: int) -> None:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


# the environment, with {0} for an empty folder, {0}/file for a file, and {0}/link for a link to the
# folder; and what the warning says
FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "no home": ({}, "there is no home folder"),
    "home is a file": ({"HOME": "{0}/file"}, "is not there"),
    "home is nowhere": ({"HOME": "{0}/nowhere"}, "is not there"),
    "home is relative": ({"HOME": "tests"}, "is not there"),
    "relative XDG, no home": ({"XDG_CACHE_HOME": "relative"}, "there is no home folder"),
    "relative XDG": ({"XDG_CACHE_HOME": "relative", "HOME": "{0}"}, ""),
    "XDG in a file": ({"XDG_CACHE_HOME": "{0}/file"}, "Not a directory"),
    "unwritable XDG": ({"XDG_CACHE_HOME": "/proc/none"}, "No such file"),
    "a file": ({"QLORA_BUILDERS_CACHE": "{0}/file"}, "is not a folder"),
    "a link": ({"QLORA_BUILDERS_CACHE": "{0}/link"}, "is a link"),
    "in a link": ({"QLORA_BUILDERS_CACHE": "{0}/link/cache"}, ""),
    "unwritable": ({"QLORA_BUILDERS_CACHE": "/proc/none"}, "No such file"),
    "too long": ({"QLORA_BUILDERS_CACHE": "{0}/" + 300 * "n"}, "File name too long"),
    "not UTF-8": ({"QLORA_BUILDERS_CACHE": "{0}/\udcff"}, ""),
    "relative": ({"QLORA_BUILDERS_CACHE": "."}, ""),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_cannot_be_used_is_named_once(
    name: str, tiny: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir(mode=0o700)
    (place / "file").touch()
    (place / "link").symlink_to(place)
    environment, warning = FOLDERS[name]
    for variable in ("HOME", "XDG_CACHE_HOME", "QLORA_BUILDERS_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value.format(place))
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    monkeypatch.chdir(place)
    messages = load(tiny)
    assert len(messages) == bool(warning), messages
    for message in messages:
        assert warning in message
        assert message.endswith("set QLORA_BUILDERS_CACHE to a folder that only you can write")
    assert load(tiny) == messages
    assert len(list(place.rglob("tiny_*.so"))) == (not warning)


def test_a_disk_that_is_full(
    tiny: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (message,) = load(tiny)
    assert f"each start compiles them again: {tmp_path / 'cache'}: No space left" in message
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="Linux tells")
def test_a_file_system_without_programs(tiny: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    with pytest.raises(BuildError, match="is mounted noexec"):
        cache_folder()
    (message,) = load(tiny)
    assert "is mounted noexec" in message


def test_no_place_for_temporary_files(
    tiny: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_BUILDERS_CACHE", str(tmp_path / "tiny.c"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(BuildError, match=r"temporary files: No such .*tiny.c is not a folder"):
        tiny.load()


# ---- compilers ----------------------------------------------------------------------------------

QUICK = (0.5, 5.0)  # seconds
# the script that CC names ({0}), or CC itself; and what the message says
FOR_LIBRARY = 'for o; do :; done; [ "$o" = "${o%.so}" ] || '
COMPILERS: dict[str, tuple[str | None, str, str]] = {
    "unfinished quote": (None, 'cc "', "cannot be split into words: No closing quotation"),
    "empty": (None, "", "CC='' is empty"),
    "blank": (None, "  ", "is empty"),
    "empty word": (None, "''", "cannot be run"),
    "absent": (None, "no-such-compiler", "cannot be run: No such file or directory"),
    "folder": (None, "/", "cannot be run: Permission denied"),
    "not executable": (None, "/dev/null", "cannot be run: Permission denied"),
    "not UTF-8": (None, "\udcff", "CC='\\udcff' cannot be run"),
    "no program": ("\0\1\2", "{0}", "cannot be run: Exec format error"),
    "does nothing": ("#!/bin/sh\n", "{0}", "ended with exit code 0, but wrote no library"),
    "fails": ("#!/bin/sh\necho no such flag >&2; exit 3", "{0}", "with exit code 3: no such flag"),
    "fails silently": ("#!/bin/sh\nexit 3", "{0}", "with exit code 3 and printed nothing"),
    "dies": ("#!/bin/sh\nkill -9 $$", "{0}", "was ended by signal 9"),
    "writes text": (f"#!/bin/sh\n{FOR_LIBRARY}echo text > $o", "{0}", "cannot be loaded"),
    "writes a pipe": (
        f"#!/bin/sh\n{FOR_LIBRARY}mkfifo -m 600 $o; exit 0",
        "{0}",
        "wrote no library",
    ),
    "writes a link": (f"#!/bin/sh\n{FOR_LIBRARY}ln -sf $0 $o", "{0}", "wrote no library"),
    "prints binary": ("#!/bin/sh\nprintf 'a\\033[2J\\377b'; exit 1", "{0}", ": a?[2J\ufffdb"),
    "hangs": ("#!/bin/sh\nsleep 100 & wait", "{0}", "not end within 0.5 seconds and was stopped"),
    "prints for ever": ("#!/bin/sh\nyes", "{0}", "did not end within"),
    "reads": ("#!/bin/sh\ncat; exit 4", "{0}", "exit code 4"),
    "leaves a child": ("#!/bin/sh\nsleep 100 & exit 5", "{0}", "exit code 5"),
    "lacks the function": (None, CC + " -Danswer=other", "lacks answer"),
}


@pytest.mark.parametrize("name", COMPILERS)
def test_a_bad_compiler_is_one_message(
    name: str, tiny: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, value, text = COMPILERS[name]
    if script is not None:
        (tmp_path / "script").write_text(script)
        (tmp_path / "script").chmod(0o700)
    value = value.format(tmp_path / "script")
    monkeypatch.setenv("CC", value)
    with pytest.raises(BuildError) as caught:
        (replace(tiny, seconds=QUICK) if script else tiny).load()
    assert f"CC={value!r}" in str(caught.value)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert [c for c in str(caught.value) if not (c.isprintable() or c == "\n")] == []
    cache = tmp_path / "cache"
    assert not cache.exists() or list(cache.iterdir()) == []  # no file was half written or kept


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What CC names."""
    (tmp_path / "script").touch(mode=0o700)
    monkeypatch.setenv("CC", str(tmp_path / "script"))
    return tmp_path / "script"


def test_children_of_a_compiler_end_with_it(tiny: Library, script: Path) -> None:
    alive = script.with_name("alive")
    script.write_text(f"#!/bin/sh\n(sleep 2; touch {alive}) & wait")
    with pytest.raises(BuildError, match="was stopped"):
        replace(tiny, seconds=QUICK).load()
    time.sleep(2)
    assert not alive.exists()


def test_the_commands_share_a_limit(tiny: Library, script: Path) -> None:
    script.write_text("#!/bin/sh\nsleep 0.3")
    with pytest.raises(BuildError, match=r"did not end within|took more than 0\.5 seconds"):
        replace(tiny, seconds=(100, 0.5)).load()


def test_the_kernels_warn_once_of_what_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", 'cc "')
    nf4_cpu._library.cache_clear()
    format = NF4Format(scale_format="none")
    try:
        with pytest.warns(UserWarning, match="set CC. CC='cc \"' cannot be split") as caught:
            assert [nf4_cpu.supports(format) for _ in range(2)] == [False, False]
    finally:
        nf4_cpu._library.cache_clear()
    assert len(caught) == 1
