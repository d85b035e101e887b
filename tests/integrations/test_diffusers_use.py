"""Our schedulers in use: dtypes and layouts, no waiting, configs, copies, results, errors."""

import copy
import inspect
import pickle

import pytest
import torch
from helpers import assert_same_bits
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers")
import diffusers
from schedulers import APART, SHAPE, difference, pair

import fastdiff
import fastdiff.integrations.diffusers as ours

diffusers.utils.logging.disable_progress_bar()
NAMES = [name for name in ours.SCHEDULERS if name not in APART]


def stepped(scheduler, xs, outputs, **options):
    """The results of the list's first steps, noise from one generator."""
    generator = torch.Generator().manual_seed(3)
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    done = []
    for t, x, output in zip(scheduler.timesteps, xs, outputs, strict=False):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        done.append(scheduler.step(output, t, x, **options))
    return done


# ---- dtypes, layouts, gradients


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded_once(seed, name, dtype):
    """The dtypes are diffusers'; the numbers are those of float32 steps from the same x, rounded."""
    xs, outputs = ([torch.randn(SHAPE).to(dtype) for _ in range(4)] for _ in range(2))
    theirs, mine = pair(name, widen=False)
    wide = pair(name)[1]
    wide._draw = lambda generator, like, _: ours.DDPMScheduler._draw(wide, generator, like, dtypes[0])
    dtypes = [torch.float32 if name in ("DPMSolverMultistepScheduler", "FlowMatchLCMScheduler") else dtype]
    expected = stepped(theirs, xs, outputs)
    exact = stepped(wide, [x.float() for x in xs], [m.float() for m in outputs])
    for a, b, c in zip(expected, stepped(mine, xs, outputs), exact, strict=True):
        for key in a:
            assert a[key].dtype == b[key].dtype, key
            assert_same_bits(b[key], c[key].to(b[key].dtype))


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_a_sample_and_an_output_of_different_dtypes(seed, name, dtypes):
    x, output = torch.randn(SHAPE).to(dtypes[0]), torch.randn(SHAPE).to(dtypes[1])
    a, b = (stepped(s, [x], [output])[0] for s in pair(name, widen=False))
    assert {k: v.dtype for k, v in a.items()} == {k: v.dtype for k, v in b.items()}
    largest = max(1.0, float(a.prev_sample.abs().max()))
    assert float((a.prev_sample - b.prev_sample).abs().max()) <= 4 * torch.finfo(torch.float16).eps * largest


@pytest.mark.parametrize("name", NAMES)
def test_layouts(seed, name):
    """channels_last and permuted tensors give the contiguous ones' numbers, in the sample's memory format."""
    xs, outputs = ([torch.randn(SHAPE) for _ in range(5)] for _ in range(2))
    exact = stepped(pair(name)[1], xs, outputs)
    last = [t.contiguous(memory_format=torch.channels_last) for t in xs]
    permuted = [t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in outputs]
    for a, b in zip(exact, stepped(pair(name)[1], last, permuted), strict=True):
        assert b.prev_sample.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a.prev_sample, b.prev_sample)


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler"])
def test_float64_and_gradients(seed, name):
    results = []
    for scheduler in pair(name):
        torch.manual_seed(seed)
        weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        x = torch.randn(SHAPE, dtype=torch.float64) * float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps[:5]:
            shown = scheduler.scale_model_input(x, t)
            x = scheduler.step(torch.tanh(shown * weight), t, x).prev_sample
        x.square().mean().backward()
        results.append((x.detach(), weight.grad))
    (a, da), (b, db) = results
    assert b.dtype == torch.float64
    assert float((a - b).abs().max()) <= 1e-10 * float(a.abs().max())
    assert float((da - db).abs()) <= 1e-10 * float(da.abs())


# ---- no waiting


class Counting(TorchDispatchMode):
    """Counts operations, and refuses the one that reads a tensor on the host."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a tensor was read on the host"
        self.names.append(function.__name__)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_allocates_its_results_and_nothing_else(seed, name):
    mine = pair(name)[1]
    mine.use_fastdiff_noise(seed)
    results = 2 if len(stepped(mine, [torch.zeros(SHAPE)], [torch.zeros(SHAPE)])[0]) == 2 else 1
    mine.set_timesteps(10)
    x, output = torch.randn(SHAPE), torch.randn(SHAPE)
    times = list(mine.timesteps)  # tensors: entries of the list
    stepped(mine, [x], [output])  # makes the plan from diffusers' tables, which lie on the host
    for t in times[1:]:
        with Counting() as counted:
            if hasattr(mine, "scale_model_input"):
                mine.scale_model_input(x, t)
        assert len(counted.names) <= 1
        with Counting() as counted:
            mine.step(output, t, x)
        assert counted.names == ["empty_like.default"] * results


def test_a_copied_timestep_is_read(seed):
    """A timestep that is no entry of the list is read, whatever its form."""
    mine = pair("DDIMScheduler")[1]
    x, output = torch.randn(SHAPE), torch.randn(SHAPE)
    t = mine.timesteps[4]
    forms = [t, int(t), t.clone(), t.view(1), t.clone().expand(len(x)), t.float()]
    results = [mine.step(output, form, x).prev_sample for form in forms]
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_no_sync_on_a_gpu(seed, name):
    mine = getattr(ours, name)()
    mine.set_timesteps(10, device="cuda")
    mine.use_fastdiff_noise(seed)
    x, output = torch.randn(SHAPE, device="cuda"), torch.randn(SHAPE, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in mine.timesteps:
            if hasattr(mine, "scale_model_input"):
                mine.scale_model_input(x, t)
            mine.step(output, t, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- configs, copies, results


@pytest.mark.parametrize("name", NAMES)
def test_configs_go_both_ways(tmp_path, name):
    theirs, mine = getattr(diffusers, name), getattr(ours, name)
    assert inspect.signature(theirs.__init__).parameters.keys() == inspect.signature(mine.__init__).parameters.keys()
    for method in ("step", "set_timesteps"):
        parameters = (inspect.signature(getattr(cls, method)).parameters.values() for cls in (theirs, mine))
        assert len({tuple((p.name, p.default) for p in ps) for ps in parameters}) == 1
    made = mine.from_config(theirs(num_train_timesteps=500).config)
    assert isinstance(made, theirs)
    assert made.config["num_train_timesteps"] == 500
    made.save_pretrained(tmp_path)
    for cls in (theirs, mine):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is cls
        assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
            k: v for k, v in made.config.items() if k[0] != "_"
        }
    assert made.order == theirs.order
    assert getattr(made, "init_noise_sigma", None) == getattr(theirs(num_train_timesteps=500), "init_noise_sigma", None)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "DDPMScheduler"])
def test_copies_go_on_by_themselves(seed, name):
    mine = pair(name)[1]
    x, xs = torch.randn(SHAPE), [torch.randn(SHAPE) for _ in range(30)]
    for t, output in zip(mine.timesteps[:4], xs, strict=False):
        x = mine.step(output, t, x, **({"generator": torch.manual_seed(1)} if name[:4] == "DDPM" else {})).prev_sample

    def rest(scheduler):
        y = x
        for t, output in zip(scheduler.timesteps[4:], xs[4:], strict=False):
            more = {"generator": torch.manual_seed(1)} if name[:4] == "DDPM" else {}
            y = scheduler.step(output, t, y, **more).prev_sample
        return y

    copies = [copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))]
    assert all(torch.equal(rest(scheduler), rest(copy.deepcopy(mine))) for scheduler in copies)
    status = copy.deepcopy(mine.__dict__)  # as MultiDiffusion keeps its views'
    expected = rest(mine)
    mine.__dict__.update(status)
    assert torch.equal(rest(mine), expected)


def test_results_are_what_their_constructors_make(seed):
    for name in NAMES:
        mine = pair(name)[1]
        done = stepped(mine, [torch.randn(SHAPE)], [torch.randn(SHAPE)])[0]
        same = type(done)(**dict(done.items()))
        assert list(same) == list(done)
        assert same.__dict__.keys() == done.__dict__.keys()
        assert all(a is b is getattr(done, key) for (key, a), b in zip(done.items(), same.to_tuple(), strict=True))
        assert len(done.to_tuple()) == len(stepped(mine, [], []) or done)
        mine.set_timesteps(10)
        assert isinstance(stepped(mine, [torch.zeros(SHAPE)], [torch.zeros(SHAPE)], return_dict=False)[0], tuple)


def test_a_replaced_list_is_taken(seed):
    theirs, mine = pair("EulerDiscreteScheduler")
    for scheduler in (theirs, mine):
        scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[3:], scheduler.sigmas[3:]
    assert difference(theirs, mine, seed=seed) <= 1e-5


# ---- bad input


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type='learned' of DDPMScheduler"),
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, "is the square root of a logarithm"),
        ("DDPMScheduler", {"prediction_type": "score"}, "prediction_type='score'"),
        ("PNDMScheduler", {"prediction_type": "sample"}, "prediction_type='sample'"),
        ("EDMEulerScheduler", {"prediction_type": "sample"}, "prediction_type='sample'"),
        ("UniPCMultistepScheduler", {"solver_p": object()}, "solver_p="),
        ("UniPCMultistepScheduler", {"solver_order": 4}, "solver_order=4"),
        *(
            (name, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", option: True}, f"{option}=True")
            for name, options in (
                ("DPMSolverMultistepScheduler", ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")),
                ("DPMSolverSinglestepScheduler", ("karras_sigmas", "exponential_sigmas", "beta_sigmas")),
                ("DEISMultistepScheduler", ("karras_sigmas", "exponential_sigmas", "beta_sigmas")),
                ("UniPCMultistepScheduler", ("exponential_sigmas", "beta_sigmas")),
            )
            for option in (f"use_{option}" for option in options)
        ),
        ("DEISMultistepScheduler", {"prediction_type": "flow_prediction"}, "needs use_flow_sigmas=True"),
        (
            "DPMSolverMultistepScheduler",
            {"prediction_type": "v_prediction", "use_flow_sigmas": True},
            "does not go with",
        ),
    ],
)
def test_options_that_are_not_served_are_refused_by_name(name, config, message):
    with pytest.raises(ValueError, match=message):
        getattr(ours, name)(**config)


def test_steps_refuse(seed):
    x = torch.zeros(SHAPE)

    def refused(error, match, name, *arguments, config=None, **options):
        with pytest.raises(error, match=match):
            pair(name, config)[1].step(*arguments, **options)

    t = pair("DDPMScheduler")[1].timesteps[0]
    refused(ValueError, "model_output must have shape", "DDPMScheduler", x[:1], t, x)
    refused(ValueError, "timestep 5 is not one of", "DDPMScheduler", x, 5, x)
    refused(ValueError, "one number for the whole batch", "DDPMScheduler", x, torch.tensor([1, 2]), x)
    refused(ValueError, r"eta must be in \[0, 1\]", "DDIMScheduler", x, int(t), x, eta=1.5)
    refused(
        ValueError, "not both", "DDIMScheduler", x, int(t), x, eta=0.5, variance_noise=x, generator=torch.manual_seed(0)
    )
    refused(ValueError, "floating point; got the integer 3", "EulerDiscreteScheduler", x, 3, x)
    for t in (torch.tensor([3.0, 7.0]), torch.tensor([3, 7]).bfloat16(), torch.tensor([True, False])):
        for method in ("add_noise", "get_velocity"):
            with pytest.raises(TypeError, match="must be integers"):
                getattr(pair("DDPMScheduler")[1], method)(x, x, t)
    t = pair("DDPMScheduler")[1].timesteps[0]
    refused(ValueError, "must have 6 channels", "DDPMScheduler", x, t, x, config={"variance_type": "learned_range"})
    refused(TypeError, "floating point", "DDIMScheduler", x.long(), int(t), x)
    with pytest.raises(ValueError, match="call set_timesteps"):
        ours.DDIMScheduler().step(x, 10, x)
    mine = pair("LMSDiscreteScheduler")[1]
    stepped(mine, [x] * 3, [x] * 3)
    with pytest.raises(ValueError, match="options of a step must stay the same"):
        mine.step(x, mine.timesteps[3], x, order=2)
    stepped(mine, [x] * 7, [x] * 7)
    with pytest.raises(IndexError, match="there is no step 10"):
        mine.step(x, mine.timesteps[3], x)
    mine = pair("UniPCMultistepScheduler")[1]
    stepped(mine, [x] * 3, [x] * 3)
    with pytest.raises(ValueError, match="sample must stay"):
        mine.step(x[:1], mine.timesteps[3], x[:1])
    mine = pair("DDIMInverseScheduler", {"prediction_type": "sample"})[1]
    with pytest.raises(ValueError, match=r"cannot leave the clean image, .*; set_alpha_to_one=False can"):
        mine.step(x, mine.timesteps[0], x)
    rising = {"use_karras_sigmas": True, "sigma_min": 0.002, "final_sigmas_type": "sigma_min"}
    mine = pair("EulerDiscreteScheduler", rising)[1]
    with pytest.raises(ValueError, match=r"of its 10 steps number 9 has 0.002 and the next 0.0100"):
        mine.step(x, mine.timesteps[0], x)
    mine = pair("DPMSolverMultistepScheduler", steps=1000)[1]
    with pytest.raises(ValueError, match=r"of its 1000 steps number .*; take fewer steps"):
        mine.step(x, mine.timesteps[0], x)
    mine = pair("HeunDiscreteScheduler")[1]
    mine.set_begin_index(3)
    with pytest.raises(ValueError, match="an even number; got step 3"):
        mine.step(x, mine.timesteps[3], x)
    mine = pair("PNDMScheduler")[1]
    with pytest.raises(ValueError, match="must begin at the first timestep"):
        mine.step(x, mine.timesteps[3], x)
    with pytest.raises(ValueError, match="seed must be in"):
        mine.use_fastdiff_noise(-1)


def test_singlestep_sizes_refuse():
    """``sizes`` of samplers.dpm_singlestep, by which a run begins within a step of several calls."""
    for sizes, message in (
        ([2, 2], "must add up to the spacing's 5 calls"),
        ([2, 3], "makes one call"),
        ([4, 1], "sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            fastdiff.samplers.dpm_singlestep(fastdiff.NoiseSchedule.linear(), 5, sizes=sizes)
    with pytest.raises(ValueError, match="goes with stages='listed'"):
        fastdiff.samplers.dpm_singlestep(fastdiff.NoiseSchedule.linear(), 5, sizes=[5], stages="inserted")
