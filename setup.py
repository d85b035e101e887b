"""Builds the extension with CMake; everything else is in pyproject.toml and CMakeLists.txt."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        source = Path(__file__).resolve().parent
        configure = [
            "cmake", "-G", "Ninja", "-S", str(source), "-B", str(build), "--fresh",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DFASTDIFF_OUTPUT_DIR={target}",
            f"-DFASTDIFF_CUDA={os.environ.get('FASTDIFF_CUDA', 'AUTO')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("fastdiff._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
