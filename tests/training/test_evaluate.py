"""Accuracy on labelled images, and the answers for image files, of trained and packed networks."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import bonn_qat
from bonn_qat.errors import InvalidData, InvalidModel
from bonn_qat.files.preprocessing import Preprocessing
from bonn_qat.training.data import TensorData
from bonn_qat.training.evaluate import evaluate, predict
from bonn_qat.training.network import build


@pytest.fixture(scope="module")
def data():
    return bonn_qat.load_data("digits", train_images=200, test_images=100)


@pytest.fixture(scope="module")
def run(data):
    """A network, after an epoch, and the result of its training."""
    recipe = bonn_qat.Recipe.default("digits")
    recipe = replace(recipe, epochs=1, train_images=200, test_images=100)
    model = build(recipe, data)
    return model, bonn_qat.train(model, recipe, data)


def test_the_accuracy_is_that_of_the_training_run(run, data):
    model, result = run
    model.train()
    found = evaluate(model, data)
    assert model.training
    last = result.epochs[-1]
    assert (found.top1, found.top5) == (last["test/top1"], last["test/top5"])
    assert found.loss == pytest.approx(last["test/loss"], rel=1e-6)  # the layout of memory decides the order of sums
    assert found.images == 100


def test_a_packed_network_has_the_accuracy_of_the_trained_one(run, data):
    model, _ = run
    assert evaluate(bonn_qat.pack(model), data).top1 == evaluate(model, data).top1


def test_images_are_standardized_as_in_the_networks_training(run, data):
    model, _ = run
    known = data.preprocessing
    other = TensorData("other", data._train, data._test, classes=10, pad=1, flip=False)
    other._mean, other._std = data._mean + 20, data._std * 3  # as if it had other training images
    mean, std = (tuple((x.flatten() / 255).tolist()) for x in (other._mean, other._std))
    other.preprocessing = Preprocessing(mean=mean, std=std, labels=known.labels)
    expected, found = evaluate(model, data), evaluate(model, other)
    assert found.top1 == expected.top1
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    other.preprocessing = None  # nobody knows
    assert evaluate(model, other).loss != pytest.approx(expected.loss, rel=1e-2)


def test_a_network_that_is_trained_on_other_data_knows_these(run, data, tmp_path):
    model, recipe = copy.deepcopy(run[0]), replace(run[0].recipe, epochs=1)
    model.preprocessing = Preprocessing(mean=(0.9,), std=(0.01,), labels=("a", "b"))
    result = bonn_qat.train(model, recipe, data)
    bonn_qat.save(model, tmp_path / "again.safetensors")
    for network in (model, bonn_qat.load(tmp_path / "again.safetensors")):
        assert network.preprocessing == data.preprocessing
        assert evaluate(network, data).top1 == result.top1


def test_up_to_five_classes_have_no_top5(data):
    model = bonn_qat.binarize(timm.create_model("wrn10_16", num_classes=2, in_chans=1), input_size=(1, 8, 8))
    batch = data._test[0][:8], torch.arange(8) % 2
    assert evaluate(model, TensorData("two", batch, batch, classes=2, pad=0, flip=False)).top5 is None


def test_other_names_of_the_classes_are_told(run, data):
    model, _ = run
    names = [*"0123456798"]
    other = TensorData("swapped", data._train, data._test, classes=10, pad=1, flip=False, labels=names)
    with pytest.warns(UserWarning, match="class 8 is '8' for the network and '9' in swapped"):
        evaluate(model, other)


def test_data_of_another_kind_are_refused(run, data):
    model, _ = run
    images, targets = data._test
    wide = images.expand(-1, 3, -1, -1), targets
    with pytest.raises(InvalidData, match=r"takes images with 1 channel\(s\); those of the data have 3"):
        evaluate(model, TensorData("colour", wide, wide, classes=10, pad=0, flip=False))
    with pytest.raises(InvalidData, match=r"the data have 12 classes; the network returns \(100, 10\) for 100 images"):
        evaluate(model, TensorData("more", data._test, data._test, classes=12, pad=0, flip=False))
    with pytest.raises(InvalidModel, match=r"this takes a model; got 'wrn10_16'"):
        evaluate("wrn10_16", data)


def test_a_file_is_answered_as_its_pixels(run, data, tmp_path):
    model, _ = run
    images, _ = data._test
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, image in zip(paths, images, strict=False):
        Image.fromarray(image[0].numpy()).save(path)
    batch, _ = next(data.test_batches(3))
    with torch.no_grad():
        chances = model.eval()(batch).softmax(1)
    for network in (model, bonn_qat.pack(model)):
        for guesses, chance in zip(predict(network, paths, top=10), chances, strict=True):
            order = chance.argsort(descending=True).tolist()
            assert [guess.label for guess in guesses] == [str(index) for index in order]
            found = torch.tensor([guess.probability for guess in guesses])
            torch.testing.assert_close(found, chance[order], rtol=1e-3, atol=1e-5)


def test_an_image_of_another_shape_is_scaled_and_cut(run, tmp_path):
    model, _ = run
    square = np.repeat(np.arange(32, dtype=np.uint8)[:, None] * 8, 32, axis=1)
    # Black at a distance that the filter does not reach.
    beside = np.pad(np.pad(square, ((0, 0), (8, 8)), mode="edge"), ((0, 0), (16, 16)))
    for name, pixels in (("square", square), ("wide", beside)):
        Image.fromarray(pixels).convert("RGB").save(tmp_path / f"{name}.png")
    one, other = predict(model, [tmp_path / "square.png", tmp_path / "wide.png"])
    assert one == other


@pytest.mark.parametrize(("crop", "edge"), [(1.0, 28), (0.875, 32)])
def test_an_image_of_a_folder_is_answered_as_in_its_evaluation(crop, edge, tmp_path):
    """Images whose part in the middle has the network's size, so that no pixel is interpolated."""
    source = np.random.default_rng(0)
    for place in range(4):
        (tmp_path / f"class {place % 2}").mkdir(exist_ok=True)
        pixels = source.integers(0, 256, (edge, edge + 6, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"class {place % 2}" / f"{place}.png")
    folder = bonn_qat.load_data(tmp_path, size=28, crop=crop)
    recipe = bonn_qat.Recipe(data=str(tmp_path), model="wrn10_16", epochs=1, batch_size=2)
    model = build(recipe, folder).eval()
    assert model.preprocessing.crop == crop
    batch, _ = next(folder.measure_batches(4))
    with torch.no_grad():
        expected = model(batch).softmax(1)
    for guesses, chances in zip(predict(model, [path for path, *_ in folder._measure.samples]), expected, strict=True):
        for name, probability in guesses:
            assert probability == pytest.approx(chances[folder.preprocessing.labels.index(name)].item(), abs=1e-5)


def test_what_cannot_be_answered(run, tmp_path):
    model, _ = run
    for path, reason in ((tmp_path / "none.png", "no such file or directory"), (tmp_path, "is a directory")):
        with pytest.raises(InvalidData, match=re.escape(f"cannot read {path}: {reason}")):
            list(predict(model, [path]))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InvalidData, match=r"text.png cannot be read as an image"):
        list(predict(model, [tmp_path / "text.png"]))
    stranger = bonn_qat.binarize(timm.create_model("wrn10_16"), input_size=(3, 8, 8))
    with pytest.raises(InvalidModel, match="does not say which images it takes"):
        list(predict(stranger, []))
