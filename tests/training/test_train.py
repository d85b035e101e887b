"""fastdiff.train: one's own network on one's own data, resumed to the bit, and arguments refused before any work."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fastdiff
from fastdiff.models import UNet

SMALL = {"steps": 6, "batch_size": 3, "warmup": 2, "progress": False}


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    monkeypatch.setattr("fastdiff.training.keep.GRID_STEPS", 2)


class Net(nn.Module):
    """With dropout, whose draws a resumed run must repeat, and a buffer."""

    def __init__(self, classes=None):
        super().__init__()
        self.inner = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.outer = nn.Conv2d(8, 1, 3, padding=1)
        self.labels = None if classes is None else nn.Embedding(classes, 8)
        self.seen = []

    def forward(self, x, t, class_labels=None):
        assert (x.dtype, t.dtype, t.shape) == (torch.float32, torch.int64, (len(x),))
        h = self.drop(torch.relu(self.norm(self.inner(x))))
        if class_labels is not None:
            self.seen.append(class_labels)
            h = h + self.labels(class_labels)[:, :, None, None]
        return self.outer(h)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, t):
        return (self.linear(x), "more")  # a tuple that starts with a tensor


@pytest.fixture
def images(seed):
    return (torch.randn(20, 1, 8, 8) / 3).clamp(-1, 1)


def state(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_network_is_trained_in_place_and_its_average_is_returned(tmp_path, images):
    net = Net()
    before = copy.deepcopy(net.state_dict())
    averaged = fastdiff.train(net, images, tmp_path, **SMALL)
    assert type(averaged) is Net
    assert averaged is not net
    assert not averaged.training
    assert net.training  # as it was
    assert all(p.requires_grad for p in averaged.parameters())
    assert not same(net.state_dict(), before)
    assert not same(net.state_dict(), averaged.state_dict())
    assert same(dict(averaged.state_dict()), torch.load(tmp_path / "weights.pt", weights_only=True))
    assert same(dict(averaged.state_dict()), state(tmp_path)["ema"])
    record = json.loads((tmp_path / "training.json").read_text())
    assert (record["settings"]["steps"], record["images"]) == (6, 20)
    assert (tmp_path / "samples" / "step-000006.png").exists()
    drawn = fastdiff.sample(averaged, (2, 1, 8, 8), sampler="ddim", steps=3)
    assert drawn.isfinite().all()


def test_a_resumed_run_has_the_bits_of_a_straight_one(tmp_path, images):
    """With dropout and a batch norm, and whatever the process draws in between, which stays the process's own."""
    first, second = Net(), Net()
    second.load_state_dict(first.state_dict())
    straight = fastdiff.train(first, images, tmp_path / "a", **SMALL)
    fastdiff.train(second, images, tmp_path / "b", **{**SMALL, "steps": 2})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    resumed = fastdiff.train(Net(), images, tmp_path / "b", resume=True, **SMALL)
    assert same(resumed.state_dict(), straight.state_dict())
    assert same(state(tmp_path / "a")["model"], state(tmp_path / "b")["model"])
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_folder_nothing_is_kept(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fastdiff.train(Net(), images, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_labels_reach_the_network_and_are_dropped_for_the_null_class(images):
    labels = torch.arange(20) % 3
    for data in ((images, labels), TensorDataset(images, labels)):
        net = Net(4)
        fastdiff.train(net, data, null_class=3, label_dropout=0.5, **{**SMALL, "steps": 20})
        counts = torch.bincount(torch.cat(net.seen), minlength=4)
        assert 10 <= counts[3] <= 50  # of 60, seed 0
        assert all(counts[:3] > 0)
    net = Net(4)
    fastdiff.train(net, (images, labels), **SMALL)  # no null class: none is dropped
    assert int(torch.cat(net.seen).max()) <= 2
    net = Net()
    fastdiff.train(net, (images, labels), labels=None, **SMALL)
    assert net.seen == []


def test_any_shape_and_any_output_form(tmp_path, seed):
    tokens = torch.randn(7, 3, 4) * 4
    fastdiff.train(Tokens(), tokens, tmp_path, schedule=fastdiff.NoiseSchedule.cosine(50), prediction="sample", **SMALL)
    assert not list((tmp_path / "samples").iterdir())  # what is no image is not drawn
    assert json.loads((tmp_path / "training.json").read_text())["sampling"]["clip"] is None
    with pytest.raises(ValueError, match="its alphas_cumprod are others"):
        fastdiff.train(Tokens(), tokens, tmp_path, resume=True, prediction="sample", **SMALL)


def test_a_unet_of_ours_leaves_a_folder_that_sample_reads(tmp_path, images):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    net = UNet(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, **blocks
    )  # fmt: skip
    schedule = fastdiff.NoiseSchedule.sigmoid(40)
    averaged = fastdiff.train(net, images, tmp_path, schedule=schedule, prediction="v_prediction", **SMALL)
    trained = fastdiff.models.load(tmp_path)
    assert same(trained.unet.state_dict(), averaged.state_dict())
    assert trained.sampling["prediction"] == "v_prediction"
    torch.testing.assert_close(
        trained.sampling["schedule"].alphas_cumprod, schedule.alphas_cumprod, rtol=1e-12, atol=1e-15
    )
    fastdiff.sample(trained.unet, (1, *trained.image_shape), **trained.arguments())


def test_weights_without_a_checkpoint_are_started_from(tmp_path, images):
    fastdiff.train(Net(), images, tmp_path, **SMALL)
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(FileExistsError, match=r"weights\.pt, but no checkpoint"):
        fastdiff.train(Net(), images, tmp_path, **SMALL)
    with (
        pytest.warns(UserWarning, match="from its weights"),
        pytest.raises(ValueError, match="does not fit this model"),
    ):
        fastdiff.train(Net(4), images, tmp_path, resume=True, **SMALL)
    kept = torch.load(tmp_path / "weights.pt", weights_only=True)
    net = Net()
    with pytest.warns(UserWarning, match="from its weights"):
        fastdiff.train(net, images, tmp_path, resume=True, **{**SMALL, "steps": 1, "lr": 1e-12})
    for name in ("inner.weight", "outer.bias"):
        torch.testing.assert_close(net.state_dict()[name], kept[name], rtol=1e-6, atol=1e-8)
    fastdiff.train(Net(), images, tmp_path, overwrite=True, **SMALL)


def test_the_process_s_default_dtype_changes_nothing(tmp_path, images):
    torch.manual_seed(3)
    a = fastdiff.train(Net(), images, **SMALL)
    torch.manual_seed(3)
    net = Net()
    torch.set_default_dtype(torch.float64)
    try:
        b = fastdiff.train(net, images, **SMALL)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(a.state_dict(), b.state_dict())


def test_images_in_0_to_1_are_warned_of(images):
    with pytest.warns(UserWarning, match=r"lie in \[0, 1\].*2 \* x - 1"):
        fastdiff.train(Net(), images.abs(), **{**SMALL, "steps": 1})


class Wrong(Net):
    def forward(self, x, t):
        return torch.cat([x * next(self.parameters()).sum()] * 2, 1)


class Detached(Net):
    def forward(self, x, t):
        return super().forward(x, t).detach()


class Ragged(torch.utils.data.Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, i):
        return torch.zeros(1, 8, 8 + int(i) % 3)


def test_a_process_without_gradients_trains(images):
    with torch.no_grad():
        fastdiff.train(Net(), images, **{**SMALL, "steps": 1})


def test_bytes_as_floats_are_warned_of(images):
    with pytest.warns(UserWarning, match="as bytes do"):
        fastdiff.train(Net(), (images + 1) * 127, **{**SMALL, "steps": 1})


def frozen():
    return Net().requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "arguments", "error", "told"),
    [
        (lambda: Net, {}, TypeError, r"the class Net: make one, Net\(…\)"),
        (lambda: lambda x, t: x, {}, TypeError, "got function"),
        (frozen, {}, ValueError, "nothing to train"),
        (lambda: Net().double(), {}, ValueError, "float32 parameters.*float64"),
        (lambda: Net().half(), {}, ValueError, "float32 parameters.*float16"),
        (Net, {"schedule": "edm"}, ValueError, "schedule"),
        (Net, {"schedule": 3}, TypeError, "schedule"),
        (Net, {"steps": 0}, ValueError, "steps"),
        (Net, {"prediction": "score"}, ValueError, "prediction.*must be one of 'epsilon', 'v_prediction', 'sample'"),
        (Net, {"learning_rate": 1}, TypeError, "learning_rate"),
        (Net, {"resume": True}, ValueError, "give out"),
        (Net, {"size": 8}, ValueError, "size"),
        (Net, {"data": "nowhere"}, FileNotFoundError, "nowhere"),
        (Net, {"data": torch.full((3, 1, 8, 8), float("nan"))}, ValueError, "NaN"),
        (Tokens, {"data": (torch.zeros(4, 3, 4), torch.zeros(4))}, ValueError, r"labels, which Tokens\.forward"),
        (Tokens, {"data": (torch.zeros(4, 3, 4), torch.zeros(4)), "labels": 3}, TypeError, "labels must be the name"),
        (Detached, {}, ValueError, "has no gradient"),
        (Net, {"data": Ragged()}, ValueError, r"one shape; item 0 has \[1, 8, 8\]"),
        (Wrong, {}, ValueError, r"model must return \[3, 1, 8, 8\].*\[3, 2, 8, 8\]"),
    ],
)
def test_bad_arguments_are_named(model, arguments, error, told, images):
    arguments = {"data": images, **SMALL, **arguments}
    with pytest.raises(error, match=told):
        fastdiff.train(model(), arguments.pop("data"), **arguments)


def test_an_accelerated_network_is_refused(images):
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)).eval()
    fastdiff.accelerate(net, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"fastdiff\.restore\(model\) first"):
        fastdiff.train(net, images, **SMALL)
