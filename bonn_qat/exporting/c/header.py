"""C header: a packed network as C99 for firmware, its tensors as arrays and its binary layers as structs.

It also lists the nodes, that is, what to compute in which order, and has a small reference implementation of the binary
layers whose values equal those of the packed network to the last bit. Float layers are left to the firmware.
``network.h.jinja`` is the header; ``declarations.h`` and ``reference.c`` are the parts that all headers share.
"""

import math
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

import jinja2
import torch
from torch import Tensor

from bonn_qat.errors import InvalidModel
from bonn_qat.exporting.c.listing import listing
from bonn_qat.exporting.c.literals import TYPES, braces, columns, comment, numbers, words
from bonn_qat.exporting.c.network import Network
from bonn_qat.runtime.packed import PackedModel

FORMAT = 2  # of the structs in declarations.h


def c_header(packed: PackedModel, name: str = "network") -> str:
    """The text of a header for C99 and C++11; its identifiers begin with ``name``, or with ``bonn_qat``.

    Bits are ``uint64_t`` words: element i of torch's ``(O, I / groups, kh, kw)`` is bit i % 64 of word i / 64, 1 for
    +1. Floats are exact. Equal networks have equal texts.

    Raises InvalidModel for a ``name`` that does not begin identifiers of C in small letters, for a tensor without
    elements or of a type that C does not have, for inputs other than images, and for a network, read from a file, with
    a convolution of something other than signs.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or name.startswith("bonn_qat"):
        raise InvalidModel(
            f"{name!r} cannot begin the names of a C header: give small letters, digits and _, with a letter first; "
            "bonn_qat is reserved for what all headers share"
        )
    if len(packed.input_size) != 3:
        raise InvalidModel(f"a C header takes images (C, H, W); {packed.name} was packed for {packed.input_size}")
    network, tensors = Network(packed, name), packed.tensors()
    channels, height, width = packed.input_size
    scheme = f", scheme {packed.scheme}" if packed.scheme else ""
    structs = [network.structs[node] for node in network.convolutions]
    return _template().render(
        title=f"{packed.name}{scheme}: a packed 1-bit network for images of {channels} x {height} x {width}",
        version=_version(), format=FORMAT, macro=name.upper(), example=next(iter(structs), f"{name}_layer"),
        nodes=listing(network), declarations=_read("declarations.h"), reference=_read("reference.c"),
        sizes=_sizes(packed, network), tensors=[_tensor(network, key, tensors[key]) for key in network.arrays],
        elementwise=network.elementwise.values(), convolutions=list(network.convolutions.values()),
        table=network.table, pointers=[f"&{struct}" for struct in structs],
    )  # fmt: skip


def _sizes(packed: PackedModel, network: Network) -> dict[str, int]:
    convolutions = network.convolutions.values()
    sizes = dict(zip(("CHANNELS", "HEIGHT", "WIDTH"), packed.input_size, strict=True))
    sizes["CONVOLUTIONS"] = len(convolutions)
    if convolutions:
        windows = (math.prod(each.geometry.weight_shape[1:]) for each in convolutions)
        sizes["SIGN_WORDS"] = max(math.ceil(math.prod(each.input) / 64) for each in convolutions)
        sizes["WINDOW_WORDS"] = max(2 * math.ceil(bits / 64) for bits in windows)
    return sizes


def _tensor(network: Network, name: str, tensor: Tensor) -> dict[str, Any]:
    bits, kind, shape = network.bits.get(name), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    allowed = list(TYPES) if bits is None else [torch.int64]
    if not tensor.numel() or tensor.dtype not in allowed:
        types = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise InvalidModel(f"{name} is {kind} {shape}; a C header takes {types} there, and at least one element")
    own = {"name": name, "identifier": network.arrays[name]}
    if bits is None:
        return {**own, "what": f"{kind} {shape}", "kind": TYPES[tensor.dtype], "elements": numbers(tensor)}
    return {**own, "what": f"bits {bits}", "kind": "uint64_t", "elements": words(tensor)}


def _read(file: str) -> str:
    return files(__package__).joinpath(file).read_text(encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"braces": braces, "columns": columns, "comment": comment}
    return environment.from_string(_read("network.h.jinja"))


def _version() -> str:
    try:
        return version("bonn-qat")
    except PackageNotFoundError:
        return "of no version"
