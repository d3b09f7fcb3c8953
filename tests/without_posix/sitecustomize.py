"""What Windows lacks, taken away from this program. Python imports this file if its folder is on PYTHONPATH.

The libraries keep all of it: they look at `sys.platform`, which is as it was. For the program, POSIX names
are not there, no folder is flushed, and nothing that this process has open or memory-mapped is replaced or
removed.
"""

import builtins
import fcntl
import importlib
import io
import os
import pathlib
import shutil
import signal
import stat
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OWN = (f"{ROOT / 'finetune'}{os.sep}", str(ROOT / "train.py"))
STANDARD = (os.path.dirname(os.__file__) + os.sep, "<frozen ")
MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
NAMES = {
    os: {
        *(
            "chown",
            "chroot",
            "fork",
            "forkpty",
            "getegid",
            "geteuid",
            "getgid",
            "getgroups",
            "getloadavg",
            "getpgid",
        ),
        *(
            "getpgrp",
            "getpriority",
            "getresuid",
            "getsid",
            "getuid",
            "initgroups",
            "killpg",
            "lchown",
            "lockf",
        ),
        *(
            "mkfifo",
            "mknod",
            "nice",
            "openpty",
            "posix_fadvise",
            "posix_fallocate",
            "posix_spawn",
            "pread",
            "pwrite",
        ),
        *(
            "sched_getaffinity",
            "sched_setaffinity",
            "sendfile",
            "setpgid",
            "setpriority",
            "setsid",
            "statvfs",
        ),
        *(
            "sync",
            "sysconf",
            "tcgetpgrp",
            "ttyname",
            "uname",
            "wait3",
            "wait4",
            "waitid",
            "O_DIRECTORY",
            "O_CLOEXEC",
        ),
    },
    signal: {
        *(
            "SIGALRM",
            "SIGCHLD",
            "SIGCONT",
            "SIGHUP",
            "SIGKILL",
            "SIGPIPE",
            "SIGQUIT",
            "SIGSTOP",
            "SIGTSTP",
            "SIGUSR1",
        ),
        *(
            "SIGUSR2",
            "SIGWINCH",
            "alarm",
            "getitimer",
            "pause",
            "pthread_kill",
            "pthread_sigmask",
            "setitimer",
        ),
        *("siginterrupt", "sigwait"),
    },
}
ACCESS_DENIED, SHARING_VIOLATION = 5, 32


def is_own(frame: types.FrameType | None) -> bool:
    return frame is not None and frame.f_code.co_filename.startswith(OWN)


def is_for_own(frame: types.FrameType | None) -> bool:
    """Whether this program asks, be it by way of the standard library."""
    while frame is not None and frame.f_code.co_filename.startswith(STANDARD):
        if "site-packages" in frame.f_code.co_filename:
            return False
        frame = frame.f_back
    return is_own(frame)


def hide(module: types.ModuleType, names: set[str]) -> None:
    class Hiding(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            if name in names and is_own(sys._getframe(1)):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return super().__getattribute__(name)

    module.__class__ = Hiding


def refusing_import(real: Callable[..., Any]) -> Callable[..., Any]:
    def import_(name: str, *arguments: Any, **named: Any) -> Any:
        if name in MODULES and is_own(sys._getframe(1)):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *arguments, **named)

    return import_


def refused(path: Any, number: int) -> PermissionError:
    error = PermissionError(13, "refused as Windows does", str(path))
    error.winerror = number  # type: ignore[attr-defined]
    return error


def files_in_use() -> set[str]:
    """The files that this process has open or memory-mapped."""
    used = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            used.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # the one that listed the folder
            continue
    with real_open("/proc/self/maps", encoding="utf-8") as maps:
        used.update(line.split(maxsplit=5)[5].strip() for line in maps if line.count("/"))
    return {path for path in used if os.path.isfile(path)}


def check_unused(*paths: str) -> None:
    for used in files_in_use():
        for path in paths:
            if used == path or used.startswith(path + os.sep):
                raise refused(used, SHARING_VIOLATION)


def absolute(path: Any, dir_fd: int | None = None) -> str:
    folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    return os.path.join(os.path.realpath(folder), os.fspath(path))


def renaming(real: Callable[..., None]) -> Callable[..., None]:
    def rename(source: Any, target: Any, **named: Any) -> None:
        if is_for_own(sys._getframe(1)):
            if os.path.isdir(target):
                raise refused(target, ACCESS_DENIED)
            check_unused(absolute(source), absolute(target))
        real(source, target, **named)

    return rename


def removing(real: Callable[..., None]) -> Callable[..., None]:
    def remove(path: Any, *, dir_fd: int | None = None) -> None:
        if is_for_own(sys._getframe(1)):
            check_unused(absolute(path, dir_fd))
        real(path, dir_fd=dir_fd)

    return remove


def open_descriptor(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
    if is_own(sys._getframe(1)) and os.path.isdir(path):
        raise refused(path, ACCESS_DENIED)
    return real_os_open(path, flags, *arguments, **named)


def fsync(descriptor: Any) -> None:
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    is_writable = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    if is_for_own(sys._getframe(1)) and (stat.S_ISDIR(os.fstat(number).st_mode) or not is_writable):
        raise OSError(9, "Bad file descriptor")
    real_fsync(descriptor)


def open_file(file: Any, *arguments: Any, **named: Any) -> Any:
    if is_own(sys._getframe(1)) and str(file).startswith(("/proc/", "/dev/")):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return real_open(file, *arguments, **named)


def named_temporary_file(*arguments: Any, **named: Any) -> Any:
    if is_own(sys._getframe(1)):
        raise refused("a temporary file that is open", SHARING_VIOLATION)
    return real_named_temporary_file(*arguments, **named)


real_open, real_os_open, real_fsync = io.open, os.open, os.fsync
real_named_temporary_file = tempfile.NamedTemporaryFile
assert shutil.rmtree.avoids_symlink_attacks  # it has chosen its functions
assert pathlib.Path("/").exists()
builtins.__import__ = refusing_import(builtins.__import__)
importlib.import_module = refusing_import(importlib.import_module)
builtins.open = open_file
tempfile.NamedTemporaryFile = named_temporary_file  # type: ignore[misc, assignment]
os.open, os.fsync = open_descriptor, fsync  # type: ignore[assignment]
os.replace, os.rename = renaming(os.replace), renaming(os.rename)
os.unlink, os.remove, os.rmdir = removing(os.unlink), removing(os.remove), removing(os.rmdir)
os.linesep = "\r\n"
for module, names in NAMES.items():
    hide(module, names)
