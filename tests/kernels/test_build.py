"""Compiling and loading the kernels, and what is said where that cannot be done."""

import errno
import io
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from gptk import kernels
from gptk.errors import DeviceError
from gptk.kernels import build, compiler
from gptk.kernels.instructions import INSTRUCTION_SETS
from gptk.system import notices, processor

NEEDS_KERNELS = pytest.mark.skipif(
    not kernels.available(), reason=f"gptk's kernels do not run here: {kernels.why_not()}"
)
LIBRARY = Path(build.load().library._name if kernels.available() else "")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernels need Linux")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache folder, and no loaded kernels."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("GPTK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(notices, "_told", set())
    monkeypatch.setattr(build, "_loaded", None)
    monkeypatch.delenv("GPTK_KERNELS", raising=False)
    # As on a machine that could run them.
    has = processor.features() | {name for found in INSTRUCTION_SETS for name in found.needs}
    monkeypatch.setattr(processor, "features", lambda: has)
    return tmp_path / "cache"


@pytest.fixture
def compiled(fresh):
    """The path of the kernels' library in a cache folder of its own, which is not loaded."""
    (fresh / "code").mkdir(mode=0o700, parents=True)
    key = LIBRARY.stem.rpartition("-")[0]
    for path in LIBRARY.parent.glob(f"{key}*"):
        shutil.copy2(path, fresh / "code")
    return fresh / "code" / LIBRARY.name


def program(body, cache, **environment):
    """Run a Python program with that cache folder. Returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)],
        env={**os.environ, "GPTK_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fake_compiler(folder, script):
    """The path of a compiler that is a shell script, and keeps its options of outputs in $out."""
    path = folder / "c++"
    find_output = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done\n'
    path.write_text(f"#!/bin/sh\n{find_output}{script}\n")
    path.chmod(0o755)
    return path


@NEEDS_KERNELS
def test_kernels_are_compiled_once(fresh, monkeypatch, caplog):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert kernels.available()
    (told,) = [record.getMessage() for record in caplog.records]
    assert "compiling gptk's kernels for this machine, once" in told
    (library,) = fresh.glob("code/*.so")
    before = library.stat().st_mtime_ns
    monkeypatch.setattr(build, "_loaded", None)
    assert kernels.available()
    assert [path.stat().st_mtime_ns for path in fresh.glob("code/*.so")] == [before]
    assert len(caplog.records) == 1


@NEEDS_KERNELS
@pytest.mark.slow
def test_a_library_that_is_cut_short_is_compiled_again(compiled):
    """Loaded as it is, it ends the process with SIGBUS."""
    whole = compiled.read_bytes()
    compiled.write_bytes(whole[: len(whole) // 2])
    out = program(
        """
        import torch
        from gptk import kernels
        assert kernels.why_not() is None
        print(kernels.rms_norm(torch.full((1, 16), 3.0), torch.ones(16), 0.0)[0, 0].item())
        """,
        compiled.parents[1],
    )
    assert out == "1.0\n"
    (library,) = compiled.parent.glob("*.so")
    assert library.stat().st_size == len(whole)


@NEEDS_KERNELS
def test_a_library_without_a_symbol_is_refused(fresh, tmp_path):
    source = tmp_path / "empty.cpp"
    source.write_text('extern "C" int gptk_linear() { return 0; }')
    library = tmp_path / "empty.so"
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library], check=True)
    with pytest.raises(AttributeError, match="undefined symbol: gptk_rms_norm"):
        build._open(library)


@NEEDS_KERNELS
def test_threads_may_use_them_for_the_first_time_at_once(compiled):
    body = """
        import threading, torch
        from gptk import kernels
        together, results = threading.Barrier(16), []
        def use():
            together.wait()
            assert kernels.why_not() is None
            with torch.enable_grad():
                results.append(kernels.gelu(torch.ones(40, requires_grad=True)).sum().item())
        threads = [threading.Thread(target=use) for _ in range(16)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        assert len(results) == 16 and len(set(results)) == 1, results
    """
    program(body, compiled.parents[1])


@NEEDS_KERNELS
@pytest.mark.slow
def test_processes_may_use_them_for_the_first_time_at_once(fresh):
    body = "from gptk import kernels; assert kernels.why_not() is None, kernels.why_not()"
    environment = {**os.environ, "GPTK_CACHE": str(fresh)}
    processes = [subprocess.Popen([sys.executable, "-c", body], env=environment) for _ in range(8)]
    assert [process.wait(300) for process in processes] == [0] * 8
    assert len(list(fresh.glob("code/*.so"))) == 1


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("false", "{false} cannot compile them: it ends with 1 and says nothing"),
        ("/no/such/compiler", "$CXX names a C++ compiler that is not there: /no/such/compiler"),
        ('g++ "', "$CXX is g++ \", which is no command: No closing quotation"),
        (".", "$CXX names a C++ compiler that is not there: ."),
        ("''", "$CXX names a C++ compiler that is not there: "),
    ],
)  # fmt: skip
def test_without_a_compiler_kernels_are_not_available(named, reason, fresh, monkeypatch):
    monkeypatch.setenv("CXX", named)
    assert kernels.why_not() == reason.format(false=shutil.which("false"))
    assert not kernels.available()
    assert not list(fresh.glob("code/*.so"))


@pytest.mark.parametrize("named", ["", " "])
def test_an_empty_cxx_is_none(named, fresh, monkeypatch):
    monkeypatch.setenv("CXX", named)
    monkeypatch.setenv("PATH", str(fresh))
    assert kernels.why_not() == "there is no C++ compiler; install g++, or name another one in $CXX"


SAYS = "it is an error: bad"
COMPILERS = {
    "fails": (f"echo 'In a file:' >&2; echo '{SAYS}' >&2; echo '1 error' >&2; exit 1", SAYS),
    "is not UTF-8": (r"printf 'error: \377\001x\n' >&2; exit 1", "error: \ufffd x"),
    "is killed": ("kill -9 $$", "it ends with -9 and says nothing"),
    "fills the disk": ("echo 'No space left on device' >&2; exit 4", "No space left on device"),
}  # fmt: skip


@pytest.mark.parametrize("kind", COMPILERS)
def test_a_compiler_that_fails_is_the_reason(kind, fresh, monkeypatch, tmp_path):
    script, says = COMPILERS[kind]
    path = fake_compiler(tmp_path, script)
    monkeypatch.setenv("CXX", str(path))
    assert kernels.why_not() == f"{path} cannot compile them: {says}"
    assert not list(fresh.glob("code/*.so"))


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("true", "writes no file"),
        ("echo garbage > $out", "file too short"),
        ("head -c 100000 /dev/zero > $out", "invalid ELF header"),
        ("sleep 1000 & wait", "was not done in time"),
    ],
)
def test_a_compiler_that_makes_no_library_is_the_reason(script, says, fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "_PATIENCE", 1.0)
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, script)))
    assert says in kernels.why_not()
    assert not list(fresh.glob("code/*.so"))
    assert not list(fresh.glob("code/.*"))


def test_without_a_folder_for_them_it_says_so(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPTK_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    reason = kernels.why_not()
    assert reason.startswith("compiled code cannot be kept: ")
    assert reason.endswith("; name a folder of your own in $GPTK_CACHE")


def test_a_full_disk_is_the_reason(fresh, monkeypatch):
    def run(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compiler, "_run", run)
    monkeypatch.setenv("CXX", "true")
    assert kernels.why_not() == "[Errno 28] No space left on device"


@NEEDS_KERNELS
@pytest.mark.slow
def test_without_a_home_and_a_directory_for_temporary_files_they_run(compiled):
    body = "from gptk import kernels; assert kernels.why_not() is None, kernels.why_not()"
    program(body, compiled.parents[1], HOME="", TMPDIR="/no/such/folder", LC_ALL="C")


def test_without_the_instructions_kernels_are_not_available(fresh, monkeypatch):
    monkeypatch.setattr(processor, "machine", lambda: "x86_64")
    monkeypatch.setattr(processor, "features", lambda: frozenset({"sse4_2"}))
    assert kernels.why_not() == "this processor lacks AVX2 with FMA and F16C"
    assert not kernels.available()
    monkeypatch.setattr(build, "_loaded", None)
    monkeypatch.setattr(processor, "machine", lambda: "riscv64")
    assert kernels.why_not() == "there are none for riscv64 processors"


@pytest.mark.parametrize(
    ("features", "name"),
    [
        (("avx512_bf16", "avx512_vnni"), "avx512-bf16"),
        (("avx512_vnni", "avx_vnni"), "avx512"),
        (("avx_vnni",), "avx2-vnni"),
        ((), "avx2"),
    ],
)
def test_the_best_instructions_of_the_processor_are_chosen(features, name, fresh, monkeypatch):
    found = {"avx2", "fma", "f16c", *features}
    if "avx512_vnni" in features:
        found |= {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    monkeypatch.setattr(processor, "machine", lambda: "x86_64")
    monkeypatch.setattr(processor, "features", lambda: frozenset(found))
    assert build._allowed("")[0].name == name
    assert [found.name for found in build._allowed("avx2")] == ["avx2"]
    assert [found.name for found in build._allowed("plain")] == ["plain"]
    with pytest.raises(DeviceError) as raised:
        build._allowed("neon")
    assert str(raised.value).startswith(
        "GPTK_KERNELS is 'neon', which this processor does not run; here it may be "
    )
    with pytest.raises(DeviceError, match="'avx3', which is no instruction set; here it may be "):
        build._allowed("avx3")


def test_on_arm_neon_is_chosen(fresh, monkeypatch):
    monkeypatch.setattr(processor, "machine", lambda: "aarch64")
    for features, name in (({"asimddp"}, "neon"), ({"asimddp", "i8mm"}, "neon-i8mm")):
        monkeypatch.setattr(processor, "features", lambda features=features: features)
        assert build._allowed("")[0].name == name
    monkeypatch.setattr(processor, "features", frozenset)
    assert build._allowed("") == "this processor lacks NEON with dot products"


def test_all_processors_of_a_machine_must_have_a_feature():
    text = "processor: 0\nflags\t\t: fma avx2\nprocessor: 1\nflags\t: fma\n"
    assert processor._of_cpuinfo(text) == {"fma"}
    assert processor._of_cpuinfo("Features : asimd asimddp\n") == {"asimd", "asimddp"}
    assert processor._of_cpuinfo("") == frozenset()


def test_kernels_can_be_switched_off(fresh, monkeypatch):
    monkeypatch.setenv("GPTK_KERNELS", "none")
    assert kernels.why_not() == "they are switched off by GPTK_KERNELS=none"
    assert not kernels.available()


def test_a_wrong_name_of_instructions_is_a_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "gptk", "generate", "x"],
        env={**os.environ, "GPTK_KERNELS": "avx3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("gptk: GPTK_KERNELS is 'avx3', which is no instruction set; ")
    assert done.stderr.count("\n") == 1


def dynamic_symbols(path, *options):
    out = subprocess.run(["nm", "-D", *options, path], capture_output=True, text=True, check=True)
    return {line.split()[-1].partition("@")[0] for line in out.stdout.splitlines()}


@NEEDS_KERNELS
def test_the_library_links_neither_pytorch_nor_openmp():
    """So that one library goes with every PyTorch, and uses its threads."""
    needed = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True)
    libraries = [line for line in needed.stdout.splitlines() if "(NEEDED)" in line]
    assert libraries
    assert not [line for line in libraries if "torch" in line or "omp" in line or "c10" in line]
    wanted = dynamic_symbols(LIBRARY, "--undefined-only")
    assert not {name for name in wanted if "torch" in name or "c10" in name or "kmpc" in name}
    assert "GOMP_parallel" in wanted
    exported = dynamic_symbols(LIBRARY, "--defined-only")
    assert "gptk_linear" in exported
    assert all(name.startswith("gptk_") for name in exported)


@NEEDS_KERNELS
def test_kernels_share_the_threads_of_pytorch(compiled):
    body = """
        import os, torch
        from gptk import kernels
        torch.set_num_threads(3)
        x = torch.randn(600, 600)
        x @ x, torch.relu(x)
        alone = len(os.listdir("/proc/self/task"))
        with torch.no_grad():
            kernels.gelu(x), kernels.softmax_sums(x)
        maps = open("/proc/self/maps").read().split()
        print(len(os.listdir("/proc/self/task")) - alone, len({m for m in maps if "omp" in m}))
    """
    assert program(body, compiled.parents[1], OMP_NUM_THREADS="3") == "0 1\n"


def test_openmp_is_found_whatever_its_file_is_called(tmp_path):
    """PyTorch's wheels have had libgomp-24e2ab19.so.1.0.0 and others. Compared with a library of
    another name that is linked as PyTorch's is."""
    sources = {"renamed": "void GOMP_parallel() {}", "user": "void use() { GOMP_parallel(); }"}
    for name, source in sources.items():
        path = tmp_path / f"{name}.cpp"
        path.write_text(f'extern "C" void GOMP_parallel(); extern "C" {source}')
        others = [tmp_path / "renamed-1a2b.so"] if name == "user" else []
        library = tmp_path / ("user.so" if name == "user" else "renamed-1a2b.so")
        command = ["g++", "-shared", "-fPIC", path, *others, "-o", library]
        subprocess.run([*command, f"-Wl,-rpath,{tmp_path}"], check=True)
    program = f"""
        from gptk.system.threads import openmp_of
        print(openmp_of({str(tmp_path / "user.so")!r}, "GOMP_parallel"))
        print(openmp_of({str(tmp_path / "user.so")!r}, "__kmpc_fork_call"))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{tmp_path / 'renamed-1a2b.so'}\nNone\n"


@NEEDS_KERNELS
def test_too_little_memory_is_an_exception(compiled):
    """Each kernel that needs memory of its own: with enough for its result, and with less."""
    body = """
        import resource, torch
        from gptk import kernels
        from gptk.system.memory import is_out_of_memory
        from gptk.kernels import attention

        torch.set_num_threads(2)
        torch.set_grad_enabled(False)
        assert kernels.available()
        bfloat16 = torch.bfloat16
        x, logits = torch.ones(9, 32 * 32768), torch.ones(1, 5_000_000)
        q4_1 = kernels.FORMATS["Q4_1"]
        weights = torch.zeros(kernels.packed_bytes(q4_1.number, 16, 32 * 32768), dtype=torch.uint8)
        a, b = torch.ones(30_000, 1600).to(bfloat16), torch.ones(1600, 96)
        y = torch.empty(30_000, 96, dtype=bfloat16)
        q, long = (torch.ones(*shape, 4, 64, dtype=bfloat16) for shape in ((400, 64), (1, 6000)))
        keys = torch.ones(8, 1, 20_000, 32)
        few = torch.ones(1, 128, 32)
        forward = attention.causal_attention(long, long, long)
        calls = {
            "permutation": (1, lambda: kernels.permutation(2**24, 1, 5)),
            "last_key": (1, lambda: kernels.last_key(logits, logits, 0.5)),
            "few rows": (1, lambda: kernels.quantized_linear(x[:8], weights, None, q4_1, 16)),
            "rows": (1, lambda: kernels.quantized_linear(x, weights, None, q4_1, 16)),
            "product": (1, lambda: kernels.product(a, b, y)),
            "attend": (1, lambda: kernels.attend(few, keys, keys, None, 1)),
            "causal": (17, lambda: kernels.attend_causally(q, q, q)),
            "backward": (
                11, lambda: attention.causal_attention_backward(long, long, long, *forward, long)
            ),
        }
        for name, (megabytes, call) in calls.items():
            used = 4096 * int(open("/proc/self/statm").read().split()[0])
            for left in (-256, 0, megabytes):
                resource.setrlimit(resource.RLIMIT_AS, (used + left * 2**20, -1))
                try:
                    call()
                    last = None
                except (MemoryError, RuntimeError) as error:
                    last = error
                resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
                assert last and is_out_of_memory(last), (name, left, last)
            assert isinstance(last, MemoryError), (name, last)
        for _, call in calls.values():
            call()
        print("done")
    """
    # With a heap that keeps no memory for later.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    assert program(body, compiled.parents[1], **settings) == "done\n"


def test_threads_that_do_not_start_are_not_used():
    """OpenMP would end the process with the first operation on a large tensor."""
    body = """
        import logging, resource, torch
        from gptk.system.threads import use_threads_that_start
        logging.basicConfig(format="%(message)s", stream=__import__("sys").stdout)
        torch.set_num_threads(4)
        used = 4096 * int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (used + 6 * 2**20, -1))
        use_threads_that_start()
        assert torch.get_num_threads() == 1
        assert torch.ones(500, 500).sum() == 250_000
    """
    out = program(body, os.environ["GPTK_CACHE"], OMP_STACKSIZE="8M")
    assert out == "of 4 threads the system starts 1; these are used\n"
