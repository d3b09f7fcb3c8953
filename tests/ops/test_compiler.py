"""The compiler and the flags that each system has; what it makes is tested with the kernels."""

import pytest

from finetune.ops.compiler import _find, flags_for


def test_on_linux_the_flags_are_those_that_earlier_results_were_computed_with():
    to_compile, to_link = flags_for("linux", "x86_64")
    optimized = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp"]
    assert to_compile == [*optimized, "-fno-math-errno", "-fno-trapping-math"]
    assert to_link == ["-shared"]


@pytest.mark.parametrize(("machine", "native"), [("arm64", "-mcpu=native"), ("x86_64", "-march=native")])
def test_on_a_mac_the_driver_is_passed_over_and_torchs_threads_are_found_when_loaded(machine, native):
    to_compile, to_link = flags_for("darwin", machine)
    assert native in to_compile
    assert to_compile[to_compile.index("-fopenmp") - 1] == "-Xclang"
    assert to_link == ["-shared", "-undefined", "dynamic_lookup"]


def test_on_windows_torchs_threads_are_found_when_linked():
    to_compile, to_link = flags_for("win32", "AMD64")
    assert "-fPIC" not in to_compile
    assert to_link[-1].endswith("libiomp5md.lib")


@pytest.mark.parametrize(
    ("system", "there", "said"),
    [
        ("win32", [], r"no C\+\+ compiler: install clang"),
        ("win32", ["cl"], "MSVC lacks the vector types of the kernels: install clang"),
        ("darwin", [], r"no C\+\+ compiler: run xcode-select"),
        ("linux", [], r"no C\+\+ compiler: install g\+\+"),
    ],
)
def test_without_a_compiler_each_system_says_what_to_install(monkeypatch, system, there, said):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if name in there else None)
    with pytest.raises(OSError, match=said):
        _find(system)


def test_on_windows_clang_serves(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if name in ("clang++", "cl") else None)
    assert _find("win32") == ["/bin/clang++"]
