"""Builds the kernels with CMake; everything else about the package stands in pyproject.toml.

Environment: REGULARIZERS_NO_EXTENSION=1 leaves the kernels out, REGULARIZERS_REQUIRE_EXTENSION=1
    makes a failed build
an error, REGULARIZERS_CUDA=auto|on|off, REGULARIZERS_SANITIZE=address,undefined,
TORCH_CUDA_ARCH_LIST.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARIES = ("regularizers_cpu", "regularizers_cuda", "_C")


class CMakeExtension(Extension):
    """The one extension; CMakeLists.txt knows its sources."""

    def __init__(self) -> None:
        super().__init__("regularizers._C", sources=[], py_limited_api=False)


class BuildWithCMake(build_ext):
    """Configures and builds CMakeLists.txt with ninja, then puts the libraries into the package."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception as error:  # whatever stops a compiler, the references still work
            if os.environ.get("REGULARIZERS_REQUIRE_EXTENSION") == "1":
                raise
            bar = "!" * 100
            print(
                f"{bar}\nregularizers: the compiled kernels could not be built ({error}).\n"
                "Everything works, but on the slow reference implementations. Install a C++17 "
                "compiler\nand reinstall; "
                f"REGULARIZERS_REQUIRE_EXTENSION=1 turns this warning into an error.\n{bar}",
                file=sys.stderr,
            )

    def _build(self, ext: Extension) -> None:
        import cmake
        import ninja
        import pybind11
        import torch

        build = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            str(Path(cmake.CMAKE_BIN_DIR) / "cmake"),
            "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DTorch_ROOT={Path(torch.__file__).parent}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DREGULARIZERS_VERSION={self.distribution.get_version()}",
            f"-DREGULARIZERS_CUDA={os.environ.get('REGULARIZERS_CUDA', 'auto')}",
            f"-DREGULARIZERS_SANITIZE={os.environ.get('REGULARIZERS_SANITIZE', '')}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run([configure[0], "--build", str(build)], check=True)
        targets = [target]
        if (
            self.editable_mode
        ):  # setuptools takes only the extension itself from the build folder to the sources
            targets.append(ROOT / "python" / "regularizers")
        for folder in targets:
            folder.mkdir(parents=True, exist_ok=True)
            for name in LIBRARIES:
                for stale in [*folder.glob(f"lib{name}.so"), *folder.glob(f"{name}.*.so")]:
                    stale.unlink()
                for built in [*build.glob(f"lib{name}.so"), *build.glob(f"{name}.*.so")]:
                    self.copy_file(str(built), str(folder / built.name))


class BinaryDistribution(Distribution):
    """Marks the wheel as platform-specific also when the kernels were left out."""

    def has_ext_modules(self) -> bool:
        return True


without_extension = os.environ.get("REGULARIZERS_NO_EXTENSION") == "1"
setup(
    packages=[*find_packages("python"), "regularizers.benchmarks"],
    ext_modules=[] if without_extension else [CMakeExtension()],
    cmdclass={} if without_extension else {"build_ext": BuildWithCMake},
    distclass=BinaryDistribution,
)
