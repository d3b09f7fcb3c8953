"""The C++ compiler of this machine, and the shared library that it makes of a source file."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from finetune.runtime import system
from finetune.runtime.files import cache_dir

COMPILE_TIMEOUT = 120  # seconds
HOW_TO_INSTALL = {
    "win32": "install clang (winget install LLVM.LLVM)",
    "darwin": "run xcode-select --install",
}


class Flags(NamedTuple):
    """What a compiler is called with, to compile and to link."""

    to_compile: list[str]
    to_link: list[str]


def build(source: Path) -> Path:
    """The shared library of a source file: kept in the user's cache, and made if it is not there.

    Raises:
        OSError: there is no compiler, it failed, or torch has nothing to link with; the message says which.
    """
    compiler, flags = _find(sys.platform), flags_for(sys.platform, platform.machine())
    version, text = _run([*compiler, "--version"]), source.read_text(encoding="utf-8")
    key = "\n".join([text, *flags.to_compile, version, system.instruction_set()])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    library = cache_dir() / f"{source.stem}-{digest}{system.LIBRARY_SUFFIX}"
    if not library.exists():
        _compile(compiler, flags, source, library)
    return library


def flags_for(platform_name: str, machine: str) -> Flags:
    """The flags for GCC or clang on a system (as `sys.platform`) and a processor (as `platform.machine`).

    The linker gets no OpenMP flag, so that the library uses torch's threads. With a second thread pool, one
    would busy-wait while the other computes.
    """
    native = "-mcpu=native" if (platform_name, machine) == ("darwin", "arm64") else "-march=native"
    common = ["-O3", native, "-std=c++17"]
    exact = ["-fno-math-errno", "-fno-trapping-math"]
    if platform_name == "win32":  # position-independent in any case; a symbol must be found when it is linked
        threads = Path(torch.__file__).parent / "lib" / "libiomp5md.lib"
        return Flags([*common, "-fopenmp", *exact], ["-shared", str(threads)])
    if platform_name == "darwin":  # Apple's driver refuses -fopenmp, its compiler does not
        threads_flag, link = ["-Xclang", "-fopenmp"], ["-shared", "-undefined", "dynamic_lookup"]
        return Flags([*common, "-fPIC", *threads_flag, *exact], link)
    return Flags([*common, "-fPIC", "-fopenmp", *exact], ["-shared"])


def _find(platform_name: str) -> list[str]:
    """The compiler that CXX names, with its arguments, or one on the PATH."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return named
    # On Windows, only clang speaks with torch's OpenMP library and has the kernels' vector types.
    names = ("clang++",) if platform_name == "win32" else ("g++", "c++")
    if found := next(filter(None, map(shutil.which, names)), None):
        return [found]
    advice = HOW_TO_INSTALL.get(platform_name, "install g++")
    if platform_name == "win32" and shutil.which("cl"):
        raise OSError(f"MSVC lacks the vector types of the kernels: {advice}")
    raise OSError(f"there is no C++ compiler: {advice}")


def _run(command: list[str]) -> str:
    """The standard output of a program.

    Raises:
        OSError: the program cannot be started, fails, or exceeds the time limit.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=True, timeout=COMPILE_TIMEOUT
        )
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or [
            f"exit {error.returncode}"
        ]
        raise OSError(f"{Path(command[0]).name} failed: {lines[0].strip()}") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{Path(command[0]).name} took over {COMPILE_TIMEOUT} s") from error
    return done.stdout


def _compile(compiler: list[str], flags: Flags, source: Path, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = Path(folder) / "compiled.o", Path(folder) / library.name
        _run([*compiler, *flags.to_compile, "-c", str(source), "-o", str(compiled)])
        _run([*compiler, str(compiled), *flags.to_link, "-o", str(linked)])
        system.flush_to_disk(linked)  # a power cut must not leave a truncated file
        system.replace(linked, library)
