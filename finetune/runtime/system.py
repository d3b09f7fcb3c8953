"""What the operating system offers. No other module asks for what Linux, macOS and Windows do not share.

Each function looks for the call that it needs and takes another where that is missing, rather than concluding
from the system's name: what a test hides is missing there too.
"""

import errno
import getpass
import importlib
import io
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

CUDA_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
LIBRARY_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")

# Windows refuses to replace or remove what another program has open, such as a virus scanner or TensorBoard.
IN_USE = (5, 32)  # ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION
PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between attempts
NO_FOLDER_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # what a file system answers that has none


def user() -> str:
    """What tells this user from the others of the machine."""
    if hasattr(os, "getuid"):
        return str(os.getuid())
    return getpass.getuser()


def computer() -> str:
    """Where the numbers of processes mean the same: since this boot, and on Linux in this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()} {round(psutil.boot_time() / 60)}"


def start_of_process(pid: int) -> str | None:
    """When a process was started, which tells it from others that had its number; None without one.

    One that has ended is none, also while nobody has asked for its exit code (a zombie): the first process of
    a container may never do so for those of a killed launcher. On Linux the start is in clock ticks since
    the boot (proc_pid_stat(5), field 22), which setting the clock leaves alone; field 3 is the state.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.Error:
        return None


def file_locks() -> Any:
    """The module whose `flock` locks files in the kernel; None on Windows."""
    try:
        return importlib.import_module("fcntl")
    except ModuleNotFoundError:
        return None


def available_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # not on macOS
        return len(process.cpu_affinity() or [])
    return os.cpu_count() or 1


def processor() -> str:
    """The model of the processor, or as much as the system says of it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_set() -> str:
    """What a compiler's "native" means on this machine."""
    return _cpuinfo("flags", "Features") or platform.machine() + platform.processor()


def _cpuinfo(*keys: str) -> str:
    """The first value of these keys that Linux gives; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in keys:
                    return value.strip()
    except OSError:
        pass
    return ""


def peak_resident_bytes() -> int:
    """The peak of this process's resident memory (RSS); what it is now, where the system keeps no peak."""
    try:
        resource: Any = importlib.import_module("resource")
    except ModuleNotFoundError:  # Windows
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024  # elsewhere in KiB


def reset_peak_resident() -> None:
    """Reset the peak to the memory held now; elsewhere than on Linux it stays."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")  # proc(5): the high-water mark of the resident memory


def signals_named(*names: str) -> tuple[signal.Signals, ...]:
    """Those of these signals that exist here: Windows has no SIGHUP, and only Windows has SIGBREAK."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


def start_apart(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a program out of reach of the terminal's Ctrl-C."""
    flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", None)  # Windows
    if flags is not None:
        return subprocess.Popen(command, env=environment, creationflags=flags)
    return subprocess.Popen(command, env=environment, process_group=0)


def ask_to_stop(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a program of `start_apart`; on Windows Ctrl-Break, since all others end it at once."""
    process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", number))


def is_orphan_of(parent: int) -> bool:
    """Whether the process `parent`, which started this one, has ended. Windows keeps its number."""
    return os.getppid() != parent or not psutil.pid_exists(parent)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 with the line ends of `text`: Windows would write others."""
    path.write_text(text, encoding="utf-8", newline="")


def flush_to_disk(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk, so that they survive a power cut. Of a folder
    nothing is flushed where the system or the file system cannot."""
    if path.is_dir():
        _flush_folder(path)
        return
    with path.open("r+b") as file:  # Windows flushes only what may be written
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if getattr(error, "winerror", None) not in IN_USE:  # Windows opens no folder
            raise
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_FLUSH:
            raise
    finally:
        os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Rename a file over `target`, or a folder to it, where an empty folder gives way. While another program
    has one of them open, Windows refuses: it is tried again for three seconds.

    Raises:
        OSError: the system refuses.
    """
    if source.is_dir():
        with suppress(OSError):
            target.rmdir()  # Windows replaces no folder
    for pause in PAUSES:
        try:
            os.replace(source, target)
            return
        except OSError as error:
            if getattr(error, "winerror", None) not in IN_USE:
                raise
        time.sleep(pause)
    os.replace(source, target)


def remove_folder(path: Path) -> None:
    """Remove a folder; while another program has a file of it open, Windows leaves that.

    Raises:
        OSError: the system refuses for another reason.
    """
    for pause in PAUSES:
        try:
            shutil.rmtree(path)
            return
        except OSError as error:
            if getattr(error, "winerror", None) not in IN_USE:
                raise
        time.sleep(pause)


def check_path_length(folder: Path, longest_name: int) -> None:
    """Raise ValueError if the path of a file in `folder`, whose name below it has at most `longest_name`
    characters, would be longer than the system lets programs use."""
    limit, length = _path_limit(), len(str(folder.absolute())) + 1 + longest_name
    if limit is not None and length > limit:
        raise ValueError(
            f"{folder}: its files would have paths of up to {length} characters, and Windows takes {limit}; "
            "choose a shorter one, or turn on long paths (LongPathsEnabled) in Windows"
        )


def _path_limit() -> int | None:
    """The longest path in characters; None where that is thousands."""
    try:
        registry: Any = importlib.import_module("winreg")
    except ModuleNotFoundError:
        return None
    with suppress(OSError):
        key = r"SYSTEM\CurrentControlSet\Control\FileSystem"
        with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, key) as file_system:
            if registry.QueryValueEx(file_system, "LongPathsEnabled")[0]:
                return None
    return 259


def let_streams_take_any_text() -> None:
    """Have characters that the encoding of stdout or stderr lacks written as escapes, instead of failing: a
    pipe on Windows takes those of one language (cp1252)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="backslashreplace")
