"""A folder's arguments of ``fastdiff.sample``."""

import pytest
import torch

import fastdiff


def test_a_samplers_name_as_others_spell_it(seed):
    """The folder's spacing gives way to one that the name says."""
    trained, shape = fastdiff.models.digits(), (2, 1, 8, 8)
    labels = torch.tensor([1, 2])
    got = fastdiff.sample(trained.unet, shape, **trained.arguments(labels, sampler="DPM++ 2M Karras", steps=4))
    same = trained.arguments(labels, sampler="dpmpp_2m", steps=4, spacing="karras")
    torch.testing.assert_close(got, fastdiff.sample(trained.unet, shape, **same), rtol=0, atol=0)
    assert "variance" not in trained.arguments(labels, sampler="DDIM")
    with pytest.raises(ValueError, match="did you mean 'ddim'"):
        trained.arguments(labels, sampler="ddin")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_a_folder_of_a_learned_variance(tmp_path, seed, sampler):
    """Its variance goes along to every sampler: those without use for it take the mean."""
    unet = fastdiff.models.UNet(
        sample_size=8, in_channels=1, out_channels=2, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    unet.save_pretrained(tmp_path)
    config = '{"_class_name": "DDPMScheduler", "beta_schedule": "linear", "variance_type": "learned_range"}'
    (tmp_path / "scheduler_config.json").write_text(config)
    trained = fastdiff.models.load(tmp_path)
    options = {"seed": seed, **trained.arguments(sampler=sampler, steps=4)}
    assert options["variance"] == "learned_range"
    got = fastdiff.sample(trained.unet, (2, 1, 8, 8), **options)
    assert bool(got.isfinite().all())
    if sampler != "ddpm":
        del options["variance"]
        mean = fastdiff.sample(lambda x, t: trained.unet(x, t)[:, :1], (2, 1, 8, 8), **options)
        torch.testing.assert_close(got, mean, rtol=0, atol=0)
