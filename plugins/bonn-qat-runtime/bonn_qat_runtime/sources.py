"""Sources: a packed network as C, or as WebAssembly, that computes what ``Network`` does to the last bit."""

import functools
import json
import math
import operator
import re
import string
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from bonn_qat_runtime import library
from bonn_qat_runtime.errors import InvalidFile, LibraryMissing, UnsupportedOperator
from bonn_qat_runtime.files import PackedFile, Preprocessing, name_of, read_packed
from bonn_qat_runtime.fuse import fuse
from bonn_qat_runtime.lower import lower
from bonn_qat_runtime.plan import FIELDS, Plan, plan
from bonn_qat_runtime.weights import WORDS

_ENGINE, _TEMPLATES = (Path(__file__).parent / name for name in ("engine", "templates"))
_PLAIN = (string.ascii_letters + string.digits + " ,.-_").encode()  # in a string of C
# What kernels.c includes for plans of words.
_KERNELS = ("kernels.c", *sorted(path.name for path in _ENGINE.glob("*.h") if path.name != "nibbles.h"))
_WASM = ("-target", "wasm32-freestanding", "-msimd128", "-mbulk-memory", "-O3", "-std=c11", "-ffp-contract=off",
         "-nostdlib", "-s", "-Wl,--no-entry")  # fmt: skip


def c_files(path: str | Path, name: str) -> dict[str, bytes]:
    """A packed file as C: the names and contents of the files of a folder, which its README explains.

    ``name`` begins all identifiers: small letters, digits and _, with a letter first.

    Raises InvalidFile for another name, and what ``Network`` raises.
    """
    return _c_files(_Network(path, name))


def wasm_files(path: str | Path, name: str) -> dict[str, bytes]:
    """A packed file as a module of WebAssembly with SIMD, and one of JavaScript that loads it, compiled by zig.

    Raises LibraryMissing without the package ziglang, else as :func:`c_files`.
    """
    network = _Network(path, name)
    with tempfile.TemporaryDirectory() as folder:
        for file, content in (_c_files(network) | {"wasm.c": network.filled("wasm.c")}).items():
            Path(folder, file).write_bytes(content)
        command = [sys.executable, "-m", "ziglang", "cc", *_WASM, "-o", f"{name}.wasm", "wasm.c", f"{name}.c"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = " ".join(done.stderr.split())[-500:]
            raise LibraryMissing(f"WebAssembly needs zig's C compiler, pip install ziglang: {reason}")
        module = Path(folder, f"{name}.wasm").read_bytes()
    return {f"{name}.wasm": module, f"{name}.js": network.filled("network.js")}


class _Network:
    def __init__(self, path: str | Path, name: str) -> None:
        taken = {file.partition(".")[0] for file in (*_KERNELS, "main.c", "wasm.c")}
        if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in taken or name.startswith("bonn_qat"):
            raise InvalidFile(
                f"{name!r} cannot name a network in C: give small letters, digits and _, with a letter first; "
                f"{', '.join(sorted(taken))} and names with bonn_qat in front are taken"
            )
        self.file, self.name = read_packed(path), name
        lowered = lower(self.file)
        if not lowered.is_single:
            raise UnsupportedOperator(f"{name_of(path)}: it returns a tuple; a network in C has one result")
        self.plan = plan(fuse(lowered), self.file.input_size, WORDS)
        library.Program(self.plan, library.cpus()[-1])  # which verifies it, because C does not

    def filled(self, template: str) -> bytes:
        """A template with the network's own values."""
        known = self.file.preprocessing
        values = {
            "TITLE": _title(self.file), "DEFINES": _defines(self.file, self.plan), "ROWS": _rows(self.plan),
            "CONSTANTS": _constants(self.plan) if template == "network.c" else "", "NEEDS": _needs(self.plan),
            "SIZE": json.dumps(self.file.input_size), "OUTPUTS": str(math.prod(self.plan.results[0])),
            "KNOWN": "null" if known is None else json.dumps(known.__dict__),
            "PREPROCESSING": "" if known is None else _preprocessing(known),
        }  # fmt: skip
        text = (_TEMPLATES / template).read_text(encoding="utf-8")
        text = re.sub(rf"\b(?<!_)({'|'.join(values)})\b", lambda found: values[found[0]], text)
        return text.replace("NET_NAME", self.name.upper()).replace("net_name", self.name).encode()


def _c_files(network: _Network) -> dict[str, bytes]:
    files = {file: (_ENGINE / file).read_bytes() for file in _KERNELS}
    files |= {file: network.filled(file) for file in ("main.c", "Makefile", "README.md")}
    return files | {f"{network.name}.{suffix}": network.filled(f"network.{suffix}") for suffix in ("c", "h")}


def _title(file: PackedFile) -> str:
    scheme = f", scheme {file.scheme}" if file.scheme else ""
    text = f"{file.name}{scheme}: a 1-bit network for images of {' x '.join(map(str, file.input_size))}"
    return re.sub(r"[^\w .,:()+=-]", "_", f"{text}, written by bonn-qat", flags=re.ASCII)


def _defines(file: PackedFile, made: Plan) -> str:
    channels, height, width = file.input_size
    sizes = {
        "CHANNELS": channels, "HEIGHT": height, "WIDTH": width, "INPUTS": made.inputs,
        "OUTPUTS": math.prod(made.results[0]), "ARENA_BYTES": made.arena_bytes,
    }  # fmt: skip
    lines = [f"#define NET_NAME_{key} {number}" for key, number in sizes.items()]
    if known := file.preprocessing:
        lines.append("\n/* An image is (x - mean) / std of each channel of pixels from 0 to 1. */")
        for key, numbers in (("MEAN", known.mean), ("STD", known.std)):
            lines.append(f"#define NET_NAME_{key} {{{', '.join(f'{float(number)!r}f' for number in numbers)}}}")
        if len(known.labels) == math.prod(made.results[0]):
            lines.append(f"#define NET_NAME_LABELS {{{', '.join(map(_literal, known.labels))}}}")
    return "\n".join(lines)


def _literal(text: str) -> str:
    """A string of C in UTF-8; octal numbers keep \", \\ and trigraphs out of it."""
    plain = "".join(chr(n) if n in _PLAIN else f"\\{n:03o}" for n in text.encode())
    return f'"{plain}"'


def _rows(made: Plan) -> str:
    """The rows as initializers; the members are those of the header, in their order."""
    header = re.sub(r"/\*.*?\*/", "", (_ENGINE / "bonn_qat_runtime.h").read_text(encoding="utf-8"), flags=re.DOTALL)
    (body,) = re.findall(r"typedef struct \{([^}]*)\} bonn_qat_row;", header)
    members = [(name, int(size or 1)) for name, size in re.findall(r"(\w+)(?:\[(\d+)\])?[,;]", body)]
    assert sum(size for _, size in members) == len(FIELDS)
    return "\n".join(f"    {{{', '.join(_initializers(row.tolist(), members))}}}," for row in made.rows)


def _initializers(row: list[int], members: list[tuple[str, int]]) -> list[str]:
    parts, at = [], 0
    for name, size in members:
        numbers, at = row[at : at + size], at + size
        if any(numbers):
            parts.append(f".{name} = " + (str(numbers[0]) if size == 1 else f"{{{', '.join(map(str, numbers))}}}"))
    return parts


def _needs(made: Plan) -> str:
    """The operations of the rows and the steps of their epilogues, a bit for each."""
    operation, program, steps = (FIELDS.index(name) for name in ("operation", "program", "steps"))
    codes = [
        code
        for row in made.rows.tolist()
        if row[steps]
        for code in made.constants[row[program] :][: 16 * row[steps]].view(np.int64)[::2].tolist()
    ]
    needed = {"OPERATIONS": made.rows[:, operation].tolist(), "STEPS": codes}
    return "\n".join(
        f"#define {name} UINT64_C({functools.reduce(operator.or_, (1 << code for code in found), 0):#x})"
        for name, found in needed.items()
    )


def _constants(made: Plan) -> str:
    words = [f"{word:#x}" if word > 9 else str(word) for word in made.constants.view("<u4").tolist()]
    return "\n".join("    " + ", ".join(words[i : i + 12]) + "," for i in range(0, len(words), 12))


def _preprocessing(known: Preprocessing) -> str:
    numbers = " and ".join(
        f"{what} {', '.join(f'{n:g}' for n in row)}" for what, row in (("mean", known.mean), ("std", known.std))
    )
    part = "" if known.crop == 1 else f" The network saw the middle {known.crop:.1%} of an image's height and width."
    return f"\nAn image is `(x - mean) / std` of pixels from 0 to 1, with {numbers}, for each channel.{part}"
