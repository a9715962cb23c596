"""C and WebAssembly that is written from a packed file: each compiler and machine gives the bits that Python gives."""

import shutil
import subprocess
import sys
from pathlib import Path

import bonn_qat_runtime
import numpy as np
import pytest
import torch
from bonn_qat_runtime.sources import c_files, wasm_files
from torch import nn

import bonn_qat
from bonn_qat.files.preprocessing import Preprocessing

ZIG = [sys.executable, "-m", "ziglang", "cc"]
FLAGS = ["-std=c11", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
LABELS = ("null", 'a "b" \\n', "??/ \u00e9 %d")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A packed network with classes whose names are hard to write in C."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20), nn.PReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 40, 3, 1, 1, groups=2), nn.BatchNorm2d(40), nn.PReLU(), nn.Conv2d(40, 24, 3), nn.BatchNorm2d(24),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip
    model = bonn_qat.binarize(net, "bonn", input_size=(3, 12, 10)).eval()
    model.preprocessing = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), labels=LABELS)
    return bonn_qat.pack(model).save(tmp_path_factory.mktemp("small") / "net.safetensors")


def written(files, folder):
    for name, content in files.items():
        Path(folder, name).write_bytes(content)
    return folder


def images_and_bits(path):
    """Images, one with NaN and infinities, and the bits of what Python makes of them."""
    network = bonn_qat_runtime.Network(path)
    images = np.random.default_rng(0).standard_normal((20, *network.input_size)).astype(np.float32)
    images[1, :, 3, 4:7] = np.nan, np.inf, -np.inf
    return images, bits_of(network(images).reshape(20, -1))


def bits_of(floats):
    """A NaN may have any bits."""
    return np.where(np.isnan(floats), np.float32(np.nan), floats.astype(np.float32)).view(np.uint32)


def run(command, images):
    """The bits of the numbers that a program prints for each image."""
    done = subprocess.run(command, input=images.tobytes(), capture_output=True, check=True)
    return bits_of(np.array(done.stdout.split(), np.float32).reshape(len(images), -1))


@pytest.mark.parametrize("compiler", ["gcc", "clang", "zig"])
def test_the_folder_of_c_gives_the_bits_of_python(compiler, small, tmp_path):
    if compiler != "zig" and shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    folder = written(c_files(small, "net"), tmp_path)
    command = ZIG if compiler == "zig" else [compiler]
    subprocess.run([*command, *FLAGS, "-O1", "main.c", "net.c", "-o", "net"], cwd=folder, check=True)
    images, bits = images_and_bits(small)
    np.testing.assert_array_equal(run([folder / "net", "--logits"], images), bits)
    (folder / "raw").write_bytes(images.tobytes())
    shown = subprocess.run([folder / "net", folder / "raw"], capture_output=True, check=True).stdout.decode()
    classes = bits.view(np.float32)
    expected = [LABELS[int(np.argmax(row))] for row in classes if not np.isnan(row).any()]
    assert [line for line, row in zip(shown.splitlines(), classes, strict=True) if not np.isnan(row).any()] == expected
    (folder / "raw").write_bytes(images.tobytes()[:-1])
    assert subprocess.run([folder / "net", folder / "raw"], capture_output=True, check=False).returncode == 1


BOTH = """
#include "a.h"
#include "b.h"
static float image[A_INPUTS], one[A_OUTPUTS], other[B_OUTPUTS];
static _Alignas(64) unsigned char arena[A_ARENA_BYTES + 1];
int main(void) {
    int refused = a_run(image, one, arena + 1);
    a_run(image, one, arena), b_run(image, other, arena);
    for (int i = 0; i < A_OUTPUTS; i++) refused += one[i] != other[i];
    return refused;
}
"""


def test_two_networks_are_in_one_program_and_an_arena_elsewhere_is_refused(small, tmp_path):
    for name in ("a", "b"):
        written(c_files(small, name), tmp_path)
    (tmp_path / "main.c").write_text(BOTH)
    subprocess.run([*ZIG, *FLAGS, "-O1", "main.c", "a.c", "b.c", "-o", "both"], cwd=tmp_path, check=True)
    assert subprocess.run([tmp_path / "both"], check=False).returncode == 6


SCRIPT = """
import { readFileSync, writeFileSync } from "node:fs";
const { load, size, outputs, preprocessing } = await import(process.argv[1]);
const bytes = readFileSync(0);
const images = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
const net = await load();
try { net(images.subarray(1)); process.exit(1); } catch (error) { if (!(error instanceof TypeError)) throw error; }
if (JSON.stringify([size, outputs, preprocessing.labels]) !== process.argv[2]) process.exit(2);
writeFileSync(1, Array.from(net(images)).join(" "));
"""


def test_webassembly_gives_the_bits_of_python_in_node(small, tmp_path):
    if shutil.which("node") is None:
        pytest.skip("no Node")
    folder = written(wasm_files(small, "net"), tmp_path)
    facts = '[[3,12,10],3,["null","a \\"b\\" \\\\n","??/ \u00e9 %d"]]'
    images, bits = images_and_bits(small)
    command = ["node", "--input-type=module", "-e", SCRIPT, (folder / "net.js").as_uri(), facts]
    np.testing.assert_array_equal(run(command, images), bits)


# Linux on ARM without a C library: a program that needs nothing but the network, and that takes no time to build.
BARE = """
#include "net.h"
static float images[20 * NET_INPUTS], results[20 * NET_OUTPUTS];
static _Alignas(64) unsigned char arena[NET_ARENA_BYTES];

void *memcpy(void *to, const void *from, __SIZE_TYPE__ size) {
    for (__SIZE_TYPE__ i = 0; i < size; i++) ((volatile char *)to)[i] = ((const char *)from)[i];
    return to;
}
void *memset(void *to, int value, __SIZE_TYPE__ size) {
    for (__SIZE_TYPE__ i = 0; i < size; i++) ((volatile char *)to)[i] = (char)value;
    return to;
}
static long call(long number, long a, void *b, long c) {
    register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = (long)b, x2 __asm__("x2") = c;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
    return x0;
}
void _start(void) {
    char *to = (char *)images;
    for (long got; (got = call(63, 0, to, (long)sizeof images)) > 0;) to += got;
    for (int i = 0; i < 20; i++) net_run(images + i * NET_INPUTS, results + i * NET_OUTPUTS, arena);
    call(64, 1, results, sizeof results);
    call(93, 0, 0, 0);
}
"""


def test_arm_gives_the_bits_of_python_without_a_c_library(small, tmp_path):
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("no qemu-aarch64")
    folder = written(c_files(small, "net"), tmp_path)
    (folder / "bare.c").write_text(BARE)
    bare = ["-target", "aarch64-linux-none", "-ffreestanding", "-nostdlib", "-static", "-O1"]
    subprocess.run([*ZIG, *FLAGS, *bare, "bare.c", "net.c", "-o", "net"], cwd=folder, check=True)
    images, bits = images_and_bits(small)
    done = subprocess.run(["qemu-aarch64", folder / "net"], input=images.tobytes(), capture_output=True, check=True)
    np.testing.assert_array_equal(bits_of(np.frombuffer(done.stdout, np.float32)).reshape(20, -1), bits)


@pytest.mark.parametrize("name", ["", "Net", "1net", "my net", "kernels", "main", "bonn_qat_net", "netz\u00e9"])
def test_a_name_that_c_does_not_take_is_refused(small, name):
    with pytest.raises(bonn_qat_runtime.InvalidFile, match="cannot name a network in C"):
        c_files(small, name)


def test_a_network_with_several_results_is_refused(tmp_path):
    class Both(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y, y.mean((2, 3))

    model = bonn_qat.binarize(Both(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1)), "bonn")
    path = bonn_qat.pack(model.eval(), input_size=(3, 8, 8)).save(tmp_path / "both.safetensors")
    assert len(bonn_qat_runtime.Network(path)(np.zeros((2, 3, 8, 8), np.float32))) == 2
    with pytest.raises(bonn_qat_runtime.UnsupportedOperator, match="it returns a tuple"):
        c_files(path, "net")
