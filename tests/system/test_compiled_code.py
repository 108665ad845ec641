"""Where compiled code is kept, and that no code but gptk's own is loaded."""

import errno
import grp
import json
import multiprocessing
import os
import pwd
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from gptk.system import notices, private_files
from gptk.system.compiled_code import Code, load_or_make, use_private_inductor_folder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs modes and owners of files")
CODE = b"machine code"


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A cache folder and a directory for temporary files, as they are on a system."""
    for name in ("cache", "temporary"):
        (tmp_path / name).mkdir()
    (tmp_path / "temporary").chmod(0o1777)
    monkeypatch.setenv("GPTK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(notices, "_told", set())
    return tmp_path


class Maker:
    """Makes code, and counts how often; `load` gives its path, and refuses other code."""

    def __init__(self):
        self.made = []

    def __call__(self, path):
        path.write_bytes(CODE)
        self.made.append(path)

    def load(self, path):
        if path.read_bytes() != CODE:
            raise OSError("invalid ELF header")
        return path

    def get(self, origin="1"):
        return load_or_make(Code("test", {"compiler": origin}, self), self.load)


@pytest.fixture
def kept():
    """The path of code that has been made."""
    return Maker().get()


def made_anew(reason, caplog, instead=None):
    """Code is made again, and a line in the log names the reason. Returns its path."""
    maker = Maker()
    path = maker.get()
    assert len(maker.made) == 1
    assert path.read_bytes() == CODE
    assert path.parent == (Path(instead) if instead else Path(os.environ["GPTK_CACHE"]) / "code")
    assert reason in caplog.text
    caplog.clear()
    again = Maker()
    assert again.get() == path  # from then on it is loaded
    assert not again.made
    assert "is not loaded" not in caplog.text
    return path


def test_code_is_made_once_and_other_code_is_made_for_another_origin(kept, caplog):
    again, other = Maker(), Maker()
    assert again.get() == kept
    assert not again.made
    assert other.get("2") != kept
    assert other.made
    assert not caplog.text
    assert not list(kept.parent.glob(".test*"))


def test_only_the_user_can_read_or_write_it(places):
    before = os.umask(0)
    try:
        kept = Maker().get()
    finally:
        os.umask(before)
    for path in (kept, kept.parent, *kept.parent.iterdir()):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077


def change(path, data):
    path.write_bytes(data)


DAMAGE = {
    "cut short": lambda path: change(path, CODE[:5]),
    "empty": lambda path: change(path, b""),
    "a bit": lambda path: change(path, b"Machine code"),
    "foreign": lambda path: change(path, b"other code, and more"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_code_that_has_changed_is_made_again(damage, kept, caplog):
    DAMAGE[damage](kept)
    made_anew("it has changed since it was compiled", caplog)


def test_code_that_is_missing_is_made_again(kept, caplog):
    kept.unlink()
    made_anew("No such file", caplog)


def test_a_link_is_not_followed(kept, caplog, places):
    kept.rename(places / "elsewhere")
    kept.symlink_to(places / "elsewhere")
    made_anew("it is a link", caplog)
    assert (places / "elsewhere").read_bytes() == CODE


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_not_a_file_is_replaced(make, kept, caplog):
    kept.unlink()
    make(kept)
    made_anew("", caplog)


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write_is_made_again(mode, kept, caplog):
    os.chown(kept, -1, another_group())
    kept.chmod(mode)
    made_anew("others can write to", caplog)


def test_a_file_of_another_user_is_made_again(kept, caplog, monkeypatch):
    fstat = os.fstat
    theirs = kept.stat()

    def patched(descriptor):
        status = fstat(descriptor)
        if status.st_ino == theirs.st_ino:
            return os.stat_result([*status[:4], os.geteuid() + 12345, *status[5:]])
        return status

    monkeypatch.setattr(os, "fstat", patched)
    made_anew("belongs to another user", caplog)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, "\x00", "null", "[]", "{}", '{"origin": {"compiler": "1"}}', "\udcff",
     '{"origin": {"compiler": "1"}, "file": 3}', '{"origin": {"compiler": "1"}, "file": "../x.so"}',
     '{"origin": {"compiler": "2"}, "file": "test.so"}', "1" * 5000],
)  # fmt: skip
def test_a_damaged_record_is_made_again(text, kept, caplog):
    (record,) = kept.parent.glob("*.json")
    record.write_bytes(text.encode(errors="surrogateescape"))
    made_anew(f"{record} is not loaded", caplog)


def test_a_record_cannot_name_code_elsewhere(kept, caplog):
    (record,) = kept.parent.glob("*.json")
    digest = kept.stem.rpartition("-")[2]
    (kept.parent.parent / f"{record.stem}-{digest}.so").write_bytes(b"foreign")
    fields = json.loads(record.read_text())
    record.write_text(json.dumps({**fields, "file": f"{record.stem}-/../../{kept.name}"}))
    made_anew("it names no file", caplog)


def test_code_that_does_not_load_is_made_again_once(kept, caplog):
    maker = Maker()
    maker.load = lambda path: maker.made or (_ for _ in ()).throw(AttributeError("no gptk_linear"))
    maker.get()
    assert len(maker.made) == 1
    assert "no gptk_linear" in caplog.text


def test_code_that_never_loads_is_not_kept(places):
    maker = Maker()

    def load(path):
        raise OSError("invalid ELF header")

    maker.load = load
    with pytest.raises(OSError, match="invalid ELF header"):
        maker.get()
    assert [path.name for path in (places / "cache" / "code").iterdir()] == ["test.lock"]


def test_code_that_cannot_be_made_leaves_nothing(places):
    def make(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        load_or_make(Code("test", {}, make), lambda path: path)
    assert [path.name for path in (places / "cache" / "code").iterdir()] == ["test.lock"]


def test_what_a_killed_process_left_is_deleted(places):
    left = places / "cache" / "code" / ".test-left"
    left.mkdir(parents=True, mode=0o700)
    (places / "cache" / "code").chmod(0o700)
    (left / "new.so").write_bytes(b"half")
    Maker().get()
    assert not left.exists()


def test_a_folder_that_others_can_write_is_not_used(kept, caplog, places):
    kept.parent.chmod(0o777)
    change(kept, b"planted")
    instead = places / "temporary" / f"gptk-{os.geteuid()}"
    made_anew(f"kept in {instead}: others can write to {kept.parent} (mode 777)", caplog, instead)
    assert kept.read_bytes() == b"planted"


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_folder_that_others_can_exchange_is_not_used(mode, kept, caplog, places):
    (places / "cache").chmod(mode)
    os.chown(places / "cache", -1, another_group())
    instead = places / "temporary" / f"gptk-{os.geteuid()}"
    made_anew(f"others can write to {places / 'cache'}", caplog, instead)


def another_group():
    """A group that is not the user's private one, and that the user may give files to."""
    mine = pwd.getpwuid(os.geteuid()).pw_gid
    others = {g.gr_gid for g in grp.getgrall()} if os.geteuid() == 0 else set(os.getgroups())
    return next(iter(sorted(others - {mine})), mine)


def test_in_a_directory_with_the_sticky_bit_it_is_safe(kept, caplog, places):
    (places / "cache").chmod(0o1777)
    assert Maker().get() == kept
    assert not caplog.text


def test_the_users_private_group_may_write(kept, caplog, monkeypatch):
    user = pwd.getpwuid(os.geteuid())
    for members, is_private in (([], True), ([user.pw_name], True), (["another"], False)):
        theirs = grp.struct_group((user.pw_name, "x", user.pw_gid, members))
        monkeypatch.setattr(grp, "getgrgid", lambda group, theirs=theirs: theirs)
        assert private_files._is_private_group(user.pw_gid) is is_private
        assert not private_files._is_private_group(user.pw_gid + 1)


def test_a_folder_of_another_user_is_not_used(kept, caplog, places, monkeypatch):
    lstat = Path.lstat

    def patched(path):
        status = lstat(path)
        if path == places / "cache":
            return os.stat_result([*status[:4], os.geteuid() + 12345, *status[5:]])
        return status

    monkeypatch.setattr(Path, "lstat", patched)
    instead = places / "temporary" / f"gptk-{os.geteuid()}"
    made_anew(f"{places / 'cache'} belongs to another user", caplog, instead)


def test_a_linked_folder_is_not_used(caplog, places):
    (places / "elsewhere").mkdir(mode=0o700)
    (places / "cache" / "code").symlink_to(places / "elsewhere")
    made_anew("is not a folder", caplog, places / "temporary" / f"gptk-{os.geteuid()}")


def test_a_linked_cache_folder_is_followed(kept, places, monkeypatch):
    (places / "linked").symlink_to(places / "cache")
    monkeypatch.setenv("GPTK_CACHE", str(places / "linked"))
    again = Maker()
    assert again.get() == kept
    assert not again.made


def test_code_in_a_folder_that_cannot_be_written_is_loaded(kept, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    again = Maker()
    assert again.get() == kept
    assert not again.made
    with pytest.raises(PermissionError, match=r"cannot be kept: .*code cannot be written; "):
        again.get("2")


@pytest.mark.parametrize("cache", ["file/cache", "file", "circle", "n" * 300])
def test_a_folder_that_cannot_be_made(cache, caplog, places, monkeypatch):
    (places / "file").touch()
    (places / "circle").symlink_to(places / "circle")
    monkeypatch.setenv("GPTK_CACHE", str(places / cache))
    made_anew("cannot be made", caplog, places / "temporary" / f"gptk-{os.geteuid()}")


def test_without_any_folder_it_says_why(places, monkeypatch):
    (places / "file").touch()
    monkeypatch.setenv("GPTK_CACHE", str(places / "file"))
    squatted = places / "temporary" / f"gptk-{os.geteuid()}"
    squatted.mkdir(mode=0o777)
    squatted.chmod(0o777)
    with pytest.raises(
        PermissionError, match=rf"cannot be kept: .* cannot be made.*; .*{squatted}"
    ):
        Maker().get()
    no_directory = FileNotFoundError("No usable temporary directory found")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: (_ for _ in ()).throw(no_directory))
    with pytest.raises(PermissionError, match="there is no directory for temporary files"):
        Maker().get()


def test_threads_wait_for_the_first_to_make_it(places):
    maker, paths = Maker(), []
    threads = [threading.Thread(target=lambda: paths.append(maker.get())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 8
    assert len(maker.made) == 1


def _get(made, ready):
    ready.wait()

    def make(path):
        with made.get_lock():
            made.value += 1
        path.write_bytes(CODE)

    load_or_make(Code("test", {}, make), Maker().load)


def test_processes_wait_for_the_first_to_make_it(places):
    context = multiprocessing.get_context("fork")
    made, ready = context.Value("i"), context.Event()
    processes = [context.Process(target=_get, args=(made, ready)) for _ in range(4)]
    for process in processes:
        process.start()
    ready.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert made.value == 1


@pytest.fixture
def no_inductor_folder(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


def test_inductors_folder_is_made_private(no_inductor_folder, places, caplog):
    use_private_inductor_folder()
    (folder,) = (places / "temporary").iterdir()
    assert folder.name.startswith("torchinductor_")
    assert not stat.S_IMODE(folder.stat().st_mode) & 0o022
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(folder)) == str(folder)
    assert not caplog.text


def test_inductors_folder_that_others_can_write_is_not_used(no_inductor_folder, places, caplog):
    use_private_inductor_folder()
    (folder,) = (places / "temporary").iterdir()
    folder.chmod(0o777)
    use_private_inductor_folder()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(places / "cache" / "code" / "inductor")
    assert f"others can write to {folder}" in caplog.text


def test_an_inductor_folder_that_the_user_chose_stays(places, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/their/choice")
    use_private_inductor_folder()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/their/choice"
    assert not list((places / "temporary").iterdir())
