import copy
import pickle
import subprocess
import sys

import bonn_qat_runtime
import numpy as np
import pytest
import torch
from bonn_qat_runtime import library, plan

import bonn_qat

NETWORKS = [
    *(("wrn10_16", scheme, 16) for scheme in ("bonn", "xnor", "bireal", "pcnn", "reactnet")),
    *(("wrn10_16", scheme, 16) for scheme in ("bwn", "mcn", "dorefa", "tbn", "adabin", "abcnet-5-5")),
    ("wrn22_16", "bonn", 32),
    ("mobilenetv3_small_050", "bonn", 32),  # squeeze and excite, depthwise convolutions
    ("convnext_atto", "bonn", 32),  # layer norms
    ("mobilevit_xxs", "bonn", 64),  # attention
    ("birealnet18", "bireal", 64),
    ("resnet18", "bonn", 64),
    ("mobilenetv2_100", "bonn", 64),
]


def images_for(network, count):
    return np.random.default_rng(0).standard_normal((count, *network.input_size)).astype(np.float32)


def assert_close(own, other):
    np.testing.assert_allclose(own, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(("name", "scheme", "pixels"), NETWORKS)
def test_logits_are_those_of_the_packed_model(packed, name, scheme, pixels):
    path = packed(name, scheme, pixels)
    network, model = bonn_qat_runtime.Network(path), bonn_qat.PackedModel.load(path)
    images = images_for(network, 3)
    logits = network(images)
    assert logits.dtype == np.float32
    assert logits.std() > 1e-3
    assert_close(logits, model(torch.from_numpy(images)).numpy())


@pytest.mark.parametrize(
    ("name", "scheme", "pixels"),
    [
        ("wrn10_16", "reactnet", 16), ("resnet18", "bonn", 64), ("mobilenetv2_100", "bonn", 64),
        ("mobilevit_xxs", "bonn", 64),
    ],
)  # fmt: skip
def test_every_instruction_set_gives_the_same_bits(packed, monkeypatch, name, scheme, pixels):
    path, found = packed(name, scheme, pixels), []
    for cpu in library.cpus():
        monkeypatch.setenv("BONN_QAT_RUNTIME_CPU", cpu)
        network = bonn_qat_runtime.Network(path)
        assert network.cpu == cpu
        found.append(network(images_for(network, 2)))
    for logits in found:
        np.testing.assert_array_equal(logits, found[0])


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "mobilevit_xxs"])
def test_turns_change_no_result(packed, monkeypatch, name):
    path, found, arenas = packed(name, "bonn", 64), [], []
    for cpu in library.cpus():
        monkeypatch.setenv("BONN_QAT_RUNTIME_CPU", cpu)
        for large in (1, 2**40):  # bytes of the maps that take turns: all that can, or none
            monkeypatch.setattr(plan, "_LARGE", large)
            network = bonn_qat_runtime.Network(path)
            found.append(network(images_for(network, 2)))
            arenas.append(network._program._plan.arena_bytes)
    for logits in found:
        np.testing.assert_array_equal(logits, found[0])
    assert arenas[0] < arenas[1]


def test_the_result_for_an_image_depends_on_no_other(packed):
    network = bonn_qat_runtime.Network(packed("wrn10_16", "bonn", 16))
    images = images_for(network, 4)
    together = network(images)
    np.testing.assert_array_equal(together, np.concatenate([network(image[None]) for image in images]))
    np.testing.assert_array_equal(together, network(np.asfortranarray(images)))
    assert network(images[:0]).shape == (0, 10)


@pytest.mark.parametrize("count", [0, 1, 2, 19])
def test_threads_change_no_result(packed, count):
    path = packed("wrn10_16", "bonn", 16)
    alone, together = bonn_qat_runtime.Network(path), bonn_qat_runtime.Network(path, threads=3)
    images = images_for(alone, count)
    np.testing.assert_array_equal(together(images), alone(images))
    assert together.threads == 3


def test_a_copy_is_the_same_network(packed):
    path = packed("wrn10_16", "bonn", 16)
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16), np.float32)
    for source in (path, path.read_bytes()):
        network = bonn_qat_runtime.Network(source, threads=2)
        for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert copied.threads == 2
            assert np.array_equal(copied(x), network(x))


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, None])
def test_less_than_one_thread_is_refused(packed, threads):
    with pytest.raises(bonn_qat_runtime.InvalidThreads, match="at least 1"):
        bonn_qat_runtime.Network(packed("wrn10_16", "bonn", 16), threads=threads)


@pytest.mark.parametrize(("name", "pixels"), [("wrn10_16", 16), ("mobilenetv3_small_050", 32)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_as_in_the_packed_model(packed, name, pixels, value):
    path = packed(name, "bonn", pixels)
    network, model = bonn_qat_runtime.Network(path), bonn_qat.PackedModel.load(path)
    images = images_for(network, 1)
    images[0, 1, 5, 7] = value
    own, other = network(images), model(torch.from_numpy(images)).numpy()
    np.testing.assert_array_equal(np.isfinite(own), np.isfinite(other))
    finite = np.isfinite(other)
    np.testing.assert_allclose(own[finite], other[finite], rtol=1e-4, atol=1e-5)


def test_images_of_another_size_or_type_are_refused(packed):
    network = bonn_qat_runtime.Network(packed("wrn10_16", "bonn", 16))
    for images in (np.zeros((1, 3, 8, 8), np.float32), np.zeros((1, 3, 16, 16)), np.zeros((3, 16, 16), np.float32), 1):
        with pytest.raises(bonn_qat_runtime.InvalidFile, match=r"float32 images \(B, 3, 16, 16\)"):
            network(images)


def test_an_operator_that_is_missing_is_named(tmp_path):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 16, 3), torch.nn.LogSoftmax(1), torch.nn.Conv2d(16, 4, 1)
    )
    path = bonn_qat.pack(bonn_qat.binarize(model, "bireal").eval(), input_size=(3, 8, 8)).save(tmp_path / "net")
    with pytest.raises(
        bonn_qat_runtime.UnsupportedOperator, match=r"the node 'log_softmax', aten\.log_softmax.*PackedModel"
    ):
        bonn_qat_runtime.Network(path)


def test_torch_and_bonn_qat_stay_unloaded():
    script = "import sys, bonn_qat_runtime; sys.exit(any(m in sys.modules for m in ('torch', 'bonn_qat', 'PIL')))"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_another_instruction_set_is_refused(packed, monkeypatch):
    monkeypatch.setenv("BONN_QAT_RUNTIME_CPU", "z80")
    with pytest.raises(bonn_qat_runtime.LibraryMissing, match="this machine runs"):
        bonn_qat_runtime.Network(packed("wrn10_16", "bonn", 16))


def test_without_a_library_the_error_says_what_to_do(packed, monkeypatch, tmp_path):
    library.load.cache_clear()
    monkeypatch.setattr(library, "_FILE", tmp_path / "runtime.so")
    try:
        with pytest.raises(bonn_qat_runtime.LibraryMissing, match="pip install -e plugins/bonn-qat-runtime"):
            bonn_qat_runtime.Network(packed("wrn10_16", "bonn", 16))
    finally:
        library.load.cache_clear()
