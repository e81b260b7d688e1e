"""Builds the CPU extensions: one per instruction set, from the same sources, none of them required.

Everything declarative is in pyproject.toml. What could not be built, and why, is written to
`lora_kernels/_build_info.json`, which `lora_kernels.spec.native` reads: on a machine without a
compiler the package installs all the same, and the reference answers.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

# The build may run in an environment that is not activated, and ninja is one of its scripts.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    NO_TORCH = None
except Exception as error:  # a torch that is there but broken raises anything
    torch = None
    NO_TORCH = f"torch could not be imported while lora_kernels was installed ({error})"

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISA_FLAGS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS.update(avx2=AVX2, avx512=AVX512)

COMMON_FLAGS = ["-O3", "-g0", "-ffp-contract=fast", "-Wall", "-Wextra", "-fvisibility=hidden"]
# Torch adds its own standard where none is given, and before 2.13 that is C++17.
COMMON_FLAGS.append("-std=c++20")
# at::parallel_for is inlined from a header and silently serial without this flag. Apple's clang
# does not know it, and a second OpenMP runtime beside torch's would be worse than one thread.
OPENMP_FLAGS = ["-fopenmp"] if sys.platform == "linux" else []

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))


def sources_hash() -> str:
    """Of what the extensions are built from: a table of measurements holds for the same alone."""
    digest = hashlib.sha256(repr((COMMON_FLAGS, OPENMP_FLAGS, ISA_FLAGS)).encode())
    for source in SOURCES + HEADERS:
        digest.update(Path(source).name.encode() + b"\0" + Path(source).read_bytes())
    return digest.hexdigest()[:16]


def isa_of(extension: Extension) -> str:
    return extension.name.removeprefix("lora_kernels._C_")


def make_extension(isa: str) -> Extension:
    name = f"lora_kernels._C_{isa}"
    if torch is None:  # never compiled; it only carries its files into a source distribution
        return Extension(name, SOURCES, depends=HEADERS)
    extension = CppExtension(
        name,
        SOURCES,
        depends=HEADERS,
        extra_compile_args=[
            *COMMON_FLAGS,
            *OPENMP_FLAGS,
            *ISA_FLAGS[isa],
            f"-DLORA_KERNELS_ISA={isa}",
        ],
        extra_link_args=OPENMP_FLAGS,
        # No Python in it at all (torch.ops.load_library opens it): torch_python stays out.
        py_limited_api=True,
    )
    # Warnings are for our code, not for torch's headers.
    for directory in extension.include_dirs:
        extension.extra_compile_args += ["-isystem", directory]
    extension.include_dirs = []
    return extension


def find_compiler() -> "str | None":
    """CXX if it is set, else the first compiler on PATH: Python's own may be another machine's."""
    for command in [os.environ.get("CXX"), "c++", "g++", "clang++"]:
        if command and shutil.which(shlex.split(command)[0]):
            return command
    return None


def compiler_version(compiler: str) -> str:
    command = [*shlex.split(compiler), "--version"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


def first_error(build_temp: str, error: Exception) -> str:
    """The compiler's own first complaint: torch's exception only says that ninja failed."""
    if Path(build_temp, "build.ninja").exists() and shutil.which("ninja"):
        again = subprocess.run(["ninja", "-C", build_temp], capture_output=True, text=True)
        complaint = re.search(r"^.*\berror\b:.*$", again.stdout, re.MULTILINE)
        if complaint:
            return complaint.group().strip()
    return " ".join(str(error).split()) or type(error).__name__


class BuildNative(BuildExtension if torch else build_ext):
    """Builds what it can, leaves out what it cannot and writes down which is which."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # Not by torch's with_options: setuptools 77.0.3, which vLLM 0.31.0 pins, takes no options.
        self.no_python_abi_suffix = True

    def run(self) -> None:
        self.failed: dict[str, str] = {}
        compiler = find_compiler()
        if torch is None:
            self.leave_out_all(NO_TORCH)
        elif compiler is None:
            self.leave_out_all(
                f"no C++ compiler was found while lora_kernels was installed (CXX="
                f"{os.environ.get('CXX')!r}; c++, g++ and clang++ are not on PATH): "
                f"install one, then install lora_kernels again"
            )
        else:
            os.environ["CXX"] = compiler
            if self.inplace:
                # Objects that outlive this call: an edited source costs one file, not all of them.
                self.build_temp = os.path.abspath(f"build/torch-{torch.__version__}")
        super().run()

        info = {
            "built": [isa_of(extension) for extension in self.extensions],
            "failed": self.failed,
            "compiler": compiler and compiler_version(compiler),
            "torch": torch and torch.__version__,
            "sources": sources_hash(),
        }
        package = Path("." if self.inplace else self.build_lib, "lora_kernels")
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        for reason in dict.fromkeys(self.failed.values()):
            names = ", ".join(isa for isa in self.failed if self.failed[isa] == reason)
            print(f"lora_kernels: CPU extension not built ({names}): {reason}", file=sys.stderr)

    def leave_out_all(self, reason: str) -> None:
        self.failed = dict.fromkeys(ISA_FLAGS, reason)
        self.extensions = []

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:  # torch's own checks of the compiler raise several types
            self.leave_out_all(first_error(self.build_temp, error))
        self.extensions = [ext for ext in self.extensions if isa_of(ext) not in self.failed]

    def build_extension(self, ext: Extension) -> None:
        # The extensions share their sources: objects of one must not pass for those of another.
        shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, isa_of(ext))
        try:
            super().build_extension(ext)
        except Exception as error:  # recorded, and the other instruction sets are still built
            self.failed[isa_of(ext)] = first_error(self.build_temp, error)
        finally:
            self.build_temp = shared


class Sanitize(Command):
    """Builds csrc/tests with the address and the undefined-behaviour sanitizer for each instruction
    set, under build/sanitize, and runs them for those that this machine has."""

    description = "build and run the C++ tests under sanitizers"
    user_options = []

    FLAGS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    # Torch never frees its registries, which is not for these tests to report. Fresh memory is NaN,
    # so that what nobody wrote shows.
    OPTIONS = "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000"

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        compiler = find_compiler()
        if torch is None or compiler is None:
            raise SystemExit(NO_TORCH or "no C++ compiler was found")
        build = Path("build/sanitize")
        build.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(self.ninja(compiler))
        subprocess.run(["ninja", "-f", build / "build.ninja"], check=True)
        capability = torch.backends.cpu.get_cpu_capability()
        lacking = {"AVX512": [], "AVX2": ["avx512"]}.get(capability, ["avx2", "avx512"])
        for isa in ISA_FLAGS:
            if isa in lacking:
                print(f"{isa}: not run, this CPU has {capability}")
                continue
            print(f"{isa}:", flush=True)
            subprocess.run(
                [build / isa], env={**os.environ, "ASAN_OPTIONS": self.OPTIONS}, check=True
            )

    def ninja(self, compiler: str) -> str:
        from torch.utils.cpp_extension import include_paths, library_paths

        includes = [f"-isystem {path}" for path in include_paths()]
        libraries = [f"-L{path} -Wl,-rpath,{path}" for path in library_paths()]
        flags = [*COMMON_FLAGS, *OPENMP_FLAGS, *self.FLAGS, *includes]
        link = [*OPENMP_FLAGS, *self.FLAGS, *libraries, "-ltorch_cpu", "-lc10"]
        lines = [
            "builddir = build/sanitize",
            "rule compile",
            f"  command = {compiler} -MMD -MF $out.d {' '.join(flags)} $isa -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} $in -o $out {' '.join(link)}",
        ]
        # The bindings hold no kernel, and tensors are not what these tests are about.
        sources = [source for source in SOURCES if not Path(source).name.startswith("bindings")]
        sources += sorted(str(path) for path in Path("csrc/tests").glob("*.cpp"))
        for isa, isa_flags in ISA_FLAGS.items():
            objects = [f"build/sanitize/{isa}.{Path(source).stem}.o" for source in sources]
            for source, target in zip(sources, objects, strict=True):
                lines += [f"build {target}: compile {source}", f"  isa = {' '.join(isa_flags)}"]
            lines.append(f"build build/sanitize/{isa}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


setup(
    license="Apache-2.0",
    ext_modules=[make_extension(isa) for isa in ISA_FLAGS],
    cmdclass={"build_ext": BuildNative, "sanitize": Sanitize},
)
