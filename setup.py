"""Builds the extension with CMake, and the description from README.md; everything else is in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("FASTDIFF_NATIVE", "AUTO")  # the C++ kernels: if they build, or fail, or not at all
CUDA = os.environ.get("FASTDIFF_CUDA", "AUTO")
if NATIVE not in ("AUTO", "ON", "OFF"):
    raise SystemExit(f"FASTDIFF_NATIVE is {NATIVE!r}; it must be AUTO, ON or OFF")
WANTED = NATIVE == "ON" or CUDA == "ON"  # CUDA kernels are a part of the extension


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            self.build(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            if WANTED:
                raise
            compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
            reason = f"{compiler} could not build them" if compiler else "there is no C++17 compiler here"
            # setuptools prints the error of an optional extension as a warning, and goes on.
            raise CompileError(
                f"fastdiff is installed without its C++ kernels, since {reason}; it runs on PyTorch alone, slower. To "
                "have them, install a compiler (such as the package g++) and fastdiff once more; FASTDIFF_NATIVE=ON "
                "shows what fails"
            ) from error

    def build(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), "--fresh",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DFASTDIFF_OUTPUT_DIR={target}",
            f"-DFASTDIFF_CUDA={CUDA}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


def description() -> str:
    """README without its pictures and links into the repository, which lead nowhere on a page of its own."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^\]]*\]\([^)]*\)\n\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\((?!https?://)[^)]*\)", r"\1", text)


setup(
    ext_modules=[] if NATIVE == "OFF" and not WANTED else [Extension("fastdiff._C", sources=[], optional=not WANTED)],
    cmdclass={"build_ext": CMakeBuild},
    long_description=description(),
    long_description_content_type="text/markdown",
)
