"""A folder's arguments of ``fastdiff.sample``."""

import pytest
import torch

import fastdiff
from fastdiff.samplers.resolve import resolve_plan


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
@pytest.mark.parametrize(
    "config",
    [
        '{"_class_name": "DDPMScheduler", "beta_schedule": "linear", "variance_type": "learned_range"}',
        '{"_class_name": "DPMSolverMultistepScheduler", "variance_type": null}',
        '{"_class_name": "DDIMScheduler", "clip_sample": false}',
    ],
)
def test_a_folder_of_a_learned_variance(tmp_path, seed, sampler, config):
    """Its variance goes along to every sampler: those without use for it take the mean."""
    unet = fastdiff.models.UNet(
        sample_size=8, in_channels=1, out_channels=2, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    unet.save_pretrained(tmp_path)
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


def test_a_folder_s_offset_goes_with_its_spacing(tmp_path, seed):
    """Stable Diffusion's steps_offset=1 is of "leading": another spacing, or a sampler's own, has none."""
    unet = fastdiff.models.UNet(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    unet.save_pretrained(tmp_path)
    config = """{"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1,
        "set_alpha_to_one": false}"""
    (tmp_path / "scheduler_config.json").write_text(config)
    trained = fastdiff.models.load(tmp_path)
    for changes in ({"sampler": "euler"}, {"sampler": "euler", "spacing": "leading"}, {"eta": 0.0, "sampler": "ddim"}):
        told = trained.arguments(steps=3, **changes)
        assert told["sampler_options"] == {"steps_offset": 1, "final": "sigma_min"}
        assert [row.t for row in resolve_plan(**told)] == [667, 334, 1]
    for changes in (
        {"sampler": "euler", "spacing": "karras"}, {"sampler": "DPM++ 2M Karras"}, {"sampler": "lcm"},
        {"sampler": "tcd"}, {"sampler": "heun", "spacing": "trailing"},
    ):  # fmt: skip
        told = {"seed": seed, **trained.arguments(steps=3, **changes)}
        trailing = {"final": "sigma_min"} if changes.get("spacing") == "trailing" else None
        assert told.get("sampler_options") == trailing
        assert bool(fastdiff.sample(trained.unet, (1, 1, 8, 8), **told).isfinite().all())
    assert trained.sampling["sampler_options"] == {"steps_offset": 1, "final": "sigma_min"}
    told = trained.arguments(steps=4, sampler="euler", spacing="linspace")  # whose last timestep is σ_min's own
    assert [row.t for row in resolve_plan(**told)] == [999, 666, 333, 0]
