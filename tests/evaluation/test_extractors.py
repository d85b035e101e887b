"""Features of any network: by name, from a module, a file, a model's folder; and what is refused."""

import sys

import pytest
import torch
from torch import nn

from fastdiff.evaluation.extractors import features_of
from fastdiff.models import digits

CPU = torch.device("cpu")
SOURCE = """
import torch
from torch import nn

class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.dropout = nn.Conv2d(3, 5, 3), nn.Dropout(0.5)
    def forward(self, x):
        return self.dropout(self.conv(x).mean((2, 3), keepdim=True))

class Wrong(nn.Module):
    def forward(self, x):
        return {"rows": x[:1].flatten(1), "four": x, "nan": x.mean((2, 3)) / 0, "bytes": x.byte().flatten(1),
                "dict": {}}[kind]

kind = "rows"
trunk, wrong = Trunk(), Wrong()
function = lambda: 5
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "trunks.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("trunks", None)


def test_a_module_by_its_name(module, seed):
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    made, named = features_of("trunks:Trunk", CPU), features_of("trunks:trunk", CPU)
    trunk = sys.modules["trunks"].trunk
    expected = trunk.conv(images).mean((2, 3))  # in eval mode: no dropout
    assert torch.equal(made(images), expected)
    assert torch.equal(named(images), expected)
    assert made.identity.sha256 == named.identity.sha256
    with torch.no_grad():
        trunk.conv.weight.add_(1)
    assert features_of("trunks:trunk", CPU).identity.sha256 != made.identity.sha256


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_a_file(tmp_path, seed, suffix):
    images = torch.rand(5, 3, 8, 8)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)).eval()
    path = tmp_path / f"trunk{suffix}"
    if suffix == ".pt2":
        batch = torch.export.Dim("batch", min=1, max=512)
        torch.export.save(torch.export.export(network, (images,), dynamic_shapes=({0: batch},)), path)
    else:
        torch.jit.trace(network, images).save(path)
    features = features_of(str(path), CPU)
    for n in (5, 3):
        torch.testing.assert_close(features(images[:n]), network(images[:n]).flatten(1).detach())
    assert features.identity.name.startswith(path.name)


def test_a_model_s_own_network(seed):
    features = features_of("digits", CPU)
    unet = digits().unet
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    found = features(images)
    kept = []
    unet.mid_block.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():  # the last of ten levels of a thousand, without noise
        unet(images * digits().sampling["schedule"].alphas_cumprod[99].sqrt().item(), 99)
    torch.testing.assert_close(found, kept[0].mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert features.channels == 1
    assert torch.equal(found, features_of("digits", CPU)(images))


def test_the_wheel_s_network(seed):
    pytest.importorskip("efficientnet_lite_pytorch")
    features = features_of("efficientnet", CPU)
    assert features(torch.rand(1, 3, 16, 16)).shape == (1, 1280)
    assert str(features.identity).startswith("EfficientNet-Lite0 at 224 (")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("rows", r"must return \[2, D\]; got \[1, 48\]"),
        ("four", r"must return \[2, D\]; got \[2, 3, 4, 4\]"),
        ("nan", "returned NaN or infinity"),
        ("bytes", r"must return a floating-point tensor; got torch\.uint8"),
        ("dict", "must return a floating-point tensor; got dict"),
        ("raises", r"does not take images \[2, 3, 4, 4\]: KeyError"),
    ],
)
def test_what_a_network_returns(module, kind, message):
    features = features_of("trunks:wrong", CPU)
    sys.modules["trunks"].kind = kind
    with pytest.raises((TypeError, ValueError), match=message):
        features(torch.ones(2, 3, 4, 4))


def test_what_is_no_network_is_refused(module, tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    (tmp_path / "text.pt2").write_text("no program")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("inception", "they must be efficientnet, digits, module:attribute"),
        ("nowhere:trunk", "No module named 'nowhere'"),
        ("trunks:missing", "no attribute 'missing'"),
        ("trunks:function", r"must be a torch\.nn\.Module, or make one.*got int"),
        (str(tmp_path / "none.pt"), "no file"),
        (str(tmp_path / "weights.pt"), "is no file of TorchScript"),
        (str(tmp_path / "text.pt2"), r"is no file of torch\.export"),
        (str(tmp_path / "folder"), "folder"),
    ):
        with pytest.raises((ValueError, TypeError, ImportError, OSError), match=message):
            features_of(name, CPU)
