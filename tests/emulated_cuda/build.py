"""Build the stand-ins for CUDA's libraries with the system's C and C++ compilers: build.py TARGET INCLUDE.

INCLUDE has cuda.h and cuda_runtime_api.h. Two kinds of libraries come out: those written here (runtime and driver, cuBLAS,
cublasLt, NVML), completed by a stub for every other function that torch or bitsandbytes asks of them; and, for all other NVIDIA
libraries that torch is linked with, libraries of stubs alone, so that none of them has to be installed.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-O1", "-fPIC", "-fvisibility=hidden", "-w")
#: Library -> its source, and the functions that it exports.
WRITTEN = {
    "libcudart.so.13": ("runtime", "libcudart.so.13 { global: cuda*; __cuda*; };\nEMU { global: emu_*; cu[A-Z]*; };\n"),
    "libcublasLt.so.13": ("cublaslt", "libcublasLt.so.13 { global: cublas*; local: *; };\n"),
    "libcublas.so.13": ("cublas", "libcublas.so.13 { global: cublas*; local: *; };\n"),
}
#: Libraries by the beginning of their functions' names, for functions without a version.
BY_PREFIX = {
    "nccl": "libnccl.so.2", "cuFile": "libcufile.so.0", "cusparseLt": "libcusparseLt.so.0", "nvrtc": "libnvrtc.so.13",
    "nvshmem": "libnvshmem_host.so.3", "cupti": "libcupti.so.13", "cudnn": "libcudnn.so.9", "curand": "libcurand.so.10",
    "nvJitLink": "libnvJitLink.so.13",
}  # fmt: skip
OURS = ("libcudart.so", "libcublas.so", "libcublasLt.so", "libcuda.so", "libnvidia-ml.so")
#: Preloaded where a process forks after its first call of CUDA: CUDA's libraries would refuse to work in its children.
FORK = "int __register_atfork(void (*a)(void), void (*b)(void), void (*c)(void), void *d) { return 0; }\n"


def run(*command: object) -> str:
    """The output of a program; SystemExit with its errors where it fails."""
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise SystemExit(f"{command[0]} is missing: install a C and C++ compiler with binutils.") from error
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return done.stdout


def symbols(path: Path, *flags: str) -> list[tuple[str, str]]:
    """Name and version of the symbols that `nm` lists."""
    names = [line.split()[-1] for line in run("nm", *flags, path).splitlines() if line.strip()]
    return [(name, version.lstrip("@")) for name, _, version in (each.partition("@") for each in names)]


def write_stubs(path: Path, names: list[str], *, counted: bool) -> None:
    """C functions of these names that return 0; counted by name where the census is linked."""
    body = 'return emu_stub("{0}")' if counted else "return 0"
    line = f'__attribute__((visibility("default"))) long {{0}}(void) {{{{ {body}; }}}}\n'
    text = "extern long emu_stub(const char *);\n" if counted else ""
    path.write_text(text + "".join(line.format(name) for name in names), encoding="utf-8")


def build(target: Path, include: Path, users: list[Path]) -> None:
    """Build everything; `users` are the libraries of torch and bitsandbytes."""
    scratch = target / "build"
    scratch.mkdir(parents=True, exist_ok=True)
    wanted = [symbol for user in users for symbol in symbols(user, "-D", "--undefined-only")]
    origin = "-Wl,-rpath,$ORIGIN"
    for library, (source, exports) in WRITTEN.items():
        objects = [scratch / f"{source}.o", scratch / f"{source}.stubs.o"]
        run("g++", "-std=c++17", *FLAGS, f"-I{include}", "-c", HERE / f"{source}.cpp", "-o", objects[0])
        here = {name for name, _ in symbols(objects[0], "--defined-only")}
        names = {name for name, version in wanted if version == library or (not version and name.startswith("cu"))}
        write_stubs(scratch / f"{source}.stubs.c", sorted(names - here), counted=True)
        run("gcc", *FLAGS, "-c", scratch / f"{source}.stubs.c", "-o", objects[1])
        script = scratch / f"{source}.map"
        script.write_text(exports, encoding="utf-8")
        others = ["-ldl"] if source == "runtime" else [f"-L{target}", "-l:libcudart.so.13", origin]
        link = ["g++", "-shared", f"-Wl,-soname,{library}", f"-Wl,--version-script={script}"]
        run(*link, *objects, *others, "-o", target / library)
    run("g++", "-std=c++17", *FLAGS, "-c", HERE / "nvml.cpp", "-o", scratch / "nvml.o")
    runtime = [f"-L{target}", "-l:libcudart.so.13", origin]
    nvml = ["-Wl,-soname,libnvidia-ml.so.1", scratch / "nvml.o", *runtime]
    run("g++", "-shared", *nvml, "-o", target / "libnvidia-ml.so.1")
    (scratch / "driver.c").write_text("void emu_nothing(void) {}\n", encoding="utf-8")
    driver = ["-Wl,--no-as-needed", "-Wl,-soname,libcuda.so.1", scratch / "driver.c", *runtime]
    run("gcc", "-shared", "-fPIC", *driver, "-o", target / "libcuda.so.1")
    (scratch / "fork.c").write_text(FORK, encoding="utf-8")
    run("gcc", "-shared", "-fPIC", "-w", scratch / "fork.c", "-o", target / "fork.so")
    build_empty(target, users)


def build_empty(target: Path, users: list[Path]) -> None:
    """The other NVIDIA libraries that torch is linked with. They are loaded, and nothing calls them."""
    functions: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for user in users:
        needed = re.findall(r"\[(lib(?:cu|nv|nccl)[^\]]*)\]", run("readelf", "-d", user))
        for name, version in symbols(user, "-D", "--undefined-only"):
            by_prefix = next((library for prefix, library in BY_PREFIX.items() if name.startswith(prefix)), "")
            needed.append(library := version if ".so" in version else by_prefix)
            functions[library].add((name, version))
        for library in needed:
            functions[library] |= set()
    for library in sorted(functions):
        if not library.startswith(("libcu", "libnv", "libnccl")) or library.startswith(OURS):
            continue
        source, script = target / "build" / f"{library}.c", target / "build" / f"{library}.map"
        write_stubs(source, sorted({name for name, _ in functions[library]} | {"emu_empty"}), counted=False)
        versions = sorted({version for _, version in functions[library]} - {""})
        script.write_text(f"{versions[0]} {{ global: *; }};\n" if versions else "", encoding="utf-8")
        option = [f"-Wl,--version-script={script}"] if versions else []
        run("gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library}", source, *option, "-o", target / library)


def main() -> None:
    """Build for the torch and the bitsandbytes of this environment."""
    import importlib.util

    target, include = Path(sys.argv[1]), Path(sys.argv[2])
    torch, bitsandbytes = (Path(importlib.util.find_spec(name).origin).parent for name in ("torch", "bitsandbytes"))
    users = [*sorted((torch / "lib").glob("*.so*")), *sorted(bitsandbytes.glob("libbitsandbytes_cuda13*.so"))]
    build(target, include, users)


if __name__ == "__main__":
    main()
