"""Weights that change in whatever way between two calls: the next result is of the new ones."""

import copy

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

pytest.importorskip("diffusers")
from matrix import MAIN, assert_equal, cross, difference, each_of, history, lora, ours, pixels, usual

import fastdiff

pytestmark = pytest.mark.networks

NETWORKS = pytest.mark.parametrize("make", MAIN.values(), ids=MAIN)


def parameters(network):
    return [p for p in network.parameters() if p.is_floating_point()]


def each(write):
    def change(network):
        for p in parameters(network):
            write(p)

    return change


# ---- every way to write


def with_numpy(p):
    array = p.detach().numpy()
    array[...] *= 1.1


def with_storage(p):
    torch.empty(0).set_(p.untyped_storage(), p.storage_offset(), p.shape, p.stride()).mul_(1.1)


def with_dlpack(p):
    torch.from_dlpack(p.detach()).mul_(1.1)


def in_inference_mode(p):
    with torch.inference_mode():
        p.mul_(1.1)


def data_in_inference_mode(p):
    with torch.inference_mode():
        p.data.mul_(1.1)


def exchanged_data(p):
    p.data = p.data * 1.1


def at_the_same_address(p):
    """Freed and allocated again: the memory may be the old one."""
    new = (p.data * 1.1).clone()
    p.data = torch.empty(0)
    p.data = new.clone()


def set_in_place(p):
    p.set_((p.detach() * 1.1).clone())


def swap(p):
    other = nn.Parameter(p.detach() * 1.1, requires_grad=False)
    torch.utils.swap_tensors(p, other)


WRITES = {
    "mul_": lambda p: p.mul_(1.1),
    "detach().mul_": lambda p: p.detach().mul_(1.1),
    "data.mul_": lambda p: p.data.mul_(1.1),
    "data +=": lambda p: p.data.__iadd__(0.05),
    "data.copy_": lambda p: p.data.copy_(p.data * 1.1),
    "data.lerp_": lambda p: p.data.lerp_(p.data * 1.5, 0.3),
    "data.sub_ of noise": lambda p: p.data.sub_(0.05 * torch.randn_like(p)),
    "data[...] =": lambda p: p.data.__setitem__(..., p.data * 1.1),
    "data.flatten().mul_": lambda p: p.data.view(-1).mul_(1.1),
    "data.zero_().add_": lambda p: p.data.copy_(p.data.clone()).mul_(1.1),
    "data.clamp_": lambda p: p.data.clamp_(-0.1, 0.1),
    "data.half of it": lambda p: p.data.view(-1)[::2].mul_(1.3),
    "_foreach on data": lambda p: torch._foreach_mul_([p.data], 1.1),
    "data =": exchanged_data,
    "data = at the old address": at_the_same_address,
    "set_": set_in_place,
    "swap_tensors": swap,
    "numpy": with_numpy,
    "storage": with_storage,
    "dlpack": with_dlpack,
    "in inference mode": in_inference_mode,
    "data in inference mode": data_in_inference_mode,
    "init": lambda p: nn.init.normal_(p, 0.0, p[0].numel() ** -0.5) if p.ndim > 1 else None,
    "init of data": lambda p: nn.init.normal_(p.data, 0.0, p[0].numel() ** -0.5) if p.ndim > 1 else None,
}


@NETWORKS
def test_writes(seed, make):
    """After the network was accelerated and called, each of them on the weights that the one before it left."""
    case = make()
    state = copy.deepcopy(case.network.state_dict())

    def back(network):
        with torch.no_grad():
            for name, p in network.named_parameters():
                p.copy_(state[name])

    each_of(case, {name: (each(write), back) for name, write in WRITES.items()}, before=False)


@pytest.mark.parametrize("write", ["data.mul_", "numpy", "in inference mode", "swap_tensors"])
@NETWORKS
def test_writes_twice_and_restored(seed, make, write):
    """The restored network has the new weights, too."""
    change = each(WRITES[write])
    history(make(), [change, change], 0)


@pytest.mark.parametrize("write", ["data.mul_", "data.copy_", "numpy", "in inference mode"])
@NETWORKS
def test_writes_before_the_first_call(seed, make, write):
    history(make(), [each(WRITES[write])], 0, called=False)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("make", [cross, pixels, ours], ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_write_to_any_one_weight(seed, make, exact):
    """One parameter after another, as an optimiser of a part of the network or a partial merge writes them."""
    case = make()
    plain, fast = case.network, copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.float32, exact_convolutions=exact)
    case.call(fast)
    wrong = []
    names = [name for name, _ in plain.named_parameters()]
    for name in names:
        for network in (plain, fast):
            p = network.get_parameter(name)
            p.data.mul_(1.2).add_(0.02)
        error = difference(case.call(fast), case.call(plain))
        if error > 1e-5:
            wrong.append((name, error))
            fastdiff.restore(fast)
            fastdiff.accelerate(fast, dtype=torch.float32, exact_convolutions=exact)
    assert wrong == [], f"{len(wrong)} of {len(names)} weights: {wrong[:3]}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("write", ["data.mul_", "numpy", "in inference mode"])
def test_writes_under_another_dtype(seed, dtype, write):
    """The weights that are cast are made anew."""
    history(pixels(), [each(WRITES[write])], 0, dtype=dtype, tolerance=0.05, effect=0.2, bits=True)


@torch.no_grad()
def test_a_network_made_in_inference_mode(seed):
    """Its weights have no version."""
    with torch.inference_mode():
        case = pixels()
        plain, fast = case.network, copy.deepcopy(case.network)
        fastdiff.accelerate(fast, dtype=torch.float32)
        for _ in range(3):
            assert_equal(case.call(fast), case.call(plain))
            for network in (plain, fast):
                for p in parameters(network):
                    p.mul_(1.1)


def transposed(network):
    """The same address, shape and dtype; other strides, so other numbers."""
    for name, p in network.named_parameters():
        if p.ndim >= 2 and p.shape[0] == p.shape[1] and "class" not in name:
            p.data = p.data.transpose(0, 1)


def expanded(network):
    for p in parameters(network):
        if p.ndim > 1:
            p.data = p.data[:1].expand_as(p)


def reversed_view(network):
    """A view of the same memory, which begins elsewhere or runs otherwise."""
    for p in parameters(network):
        if p.ndim == 4 and p.shape[2:] == (3, 3):
            p.data = p.data.transpose(2, 3)


def channels_last(network):
    network.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("change", [transposed, expanded, reversed_view], ids=lambda f: f.__name__)
@NETWORKS
@pytest.mark.parametrize("at", [0, 1])
def test_the_same_memory_seen_otherwise(seed, make, change, at):
    # eager's own kernels round otherwise for other strides, so the restored one's bits are compared in ``history``
    history(make(), [change], at)


@pytest.mark.parametrize("at", [0, 1])
@NETWORKS
def test_channels_last_weights(seed, make, at):
    history(make(), [channels_last, each(WRITES["data.mul_"])], at, effect=None)


# ---- states that are loaded


def state_of(network, factor):
    return {k: v.detach().clone() * factor if v.is_floating_point() else v for k, v in network.state_dict().items()}


LOADS = {
    "load_state_dict": lambda m: m.load_state_dict(state_of(m, 1.1)),
    "load_state_dict, assign": lambda m: m.load_state_dict(state_of(m, 1.1), assign=True),
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(m.parameters()) * 1.1, m.parameters()
    ),
    "new Parameters": lambda m: [
        setattr(k, n, nn.Parameter(p.detach() * 1.1, requires_grad=False))
        for k in m.modules()
        for n, p in list(k.named_parameters(recurse=False))
    ],
    "double and float": lambda m: [p.data.mul_(1.1) for p in m.double().float().parameters()],
    "to_empty": lambda m: (lambda state: (m.to_empty(device="cpu"), m.load_state_dict(state)))(state_of(m, 1.1)),
    "share_memory": lambda m: [p.data.mul_(1.1) for p in m.share_memory().parameters()],
    "_apply": lambda m: m._apply(lambda t: t * 1.1 if t.is_floating_point() else t),
}


@pytest.mark.parametrize("load", LOADS)
@NETWORKS
def test_loaded(seed, make, load):
    history(make(), [LOADS[load], LOADS[load]], 0)


@NETWORKS
@torch.no_grad()
def test_functional_call(seed, make):
    """Two sets of weights in turn, and the network's own between them."""
    case = make()
    plain, fast = case.network, copy.deepcopy(case.network)
    if case.method:
        pytest.skip("functional_call calls the module")
    fastdiff.accelerate(fast, dtype=torch.float32)
    sets = [{k: v.detach() * f for k, v in plain.named_parameters()} for f in (1.1, 0.8)]
    for weights in (*sets, None, *sets, None):
        results = []
        for network in (plain, fast):
            if weights is None:
                results.append(case.call(network))
            else:
                results.append(case.pick(torch.func.functional_call(network, weights, (), case.inputs)))
        assert_equal(results[1], results[0])


# ---- averages of weights


def trained(network, seed):
    """A later state of the same network: each weight a tenth further."""
    torch.manual_seed(seed)
    for p in parameters(network):
        p.data.add_(0.1 * p.detach().abs().mean() * torch.randn_like(p))


@NETWORKS
def test_ema_of_diffusers(seed, make):
    """store, copy_to, restore: a validation with averaged weights."""
    ema_model = pytest.importorskip("diffusers.training_utils").EMAModel

    def store_and_copy(network):
        ema = ema_model(network.parameters())
        ema.shadow_params = [1.3 * p for p in ema.shadow_params]
        ema.store(network.parameters())
        ema.copy_to(network.parameters())
        network.__dict__["ema"] = ema

    def back(network):
        network.__dict__.pop("ema").restore(network.parameters())

    history(make(), [store_and_copy, back, store_and_copy, back], 0)


@NETWORKS
def test_torch_ema(seed, make):
    torch_ema = pytest.importorskip("torch_ema")

    def store_and_copy(network):
        network.requires_grad_(True)  # it averages what is trained
        ema = torch_ema.ExponentialMovingAverage(network.parameters(), decay=0.9)
        trained(network, 1)
        ema.update()
        ema.store()
        ema.copy_to()
        network.__dict__["ema"] = ema

    def back(network):
        network.__dict__.pop("ema").restore()

    history(make(), [store_and_copy, back, store_and_copy, back], 0, effect=None)


@pytest.mark.parametrize("kind", ["EMA", "KarrasEMA", "PostHocEMA"])
@NETWORKS
@torch.no_grad()
def test_ema_pytorch(seed, make, kind, tmp_path):
    """The averaged network is the one that samples, as in lucidrains' Trainer."""
    ema_pytorch = pytest.importorskip("ema_pytorch")
    case = make()
    online = case.network
    if kind == "EMA":
        ema = ema_pytorch.EMA(online, beta=0.5, update_every=1, update_after_step=0, include_online_model=False)
    elif kind == "KarrasEMA":
        ema = ema_pytorch.post_hoc_ema.KarrasEMA(online, gamma=3.0, update_every=1)
    else:
        post = ema_pytorch.PostHocEMA(online, sigma_rels=(0.05, 0.3), update_every=1, checkpoint_every_num_steps=100,
                                      checkpoint_folder=str(tmp_path))  # fmt: skip
        ema = post.ema_models[0]
    ema.eval()
    fastdiff.accelerate(ema.ema_model, dtype=torch.float32)
    before = case.call(ema.ema_model)
    for i in range(3):
        trained(online, i)
        ema.update()
        twin = copy.deepcopy(online)
        twin.load_state_dict(ema.ema_model.state_dict())
        assert_equal(case.call(ema.ema_model), case.call(twin), f"update {i}")
    assert difference(case.call(ema.ema_model), before) > 1e-3
    if kind == "EMA":
        ema.update_model_with_ema()
        ema.copy_params_from_model_to_ema()
        assert_equal(case.call(ema.ema_model), case.call(online))


@pytest.mark.parametrize("multi", [False, True])
@NETWORKS
@torch.no_grad()
def test_averaged_model_of_torch(seed, make, multi):
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

    case = make()
    options = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)} if multi else {"avg_fn": get_ema_avg_fn(0.5)}
    average = AveragedModel(case.network, **options).eval()
    fastdiff.accelerate(average.module, dtype=torch.float32)
    before = case.call(average.module)
    for i in range(3):
        trained(case.network, i)
        average.update_parameters(case.network)
        twin = copy.deepcopy(case.network)
        twin.load_state_dict(average.module.state_dict())
        assert_equal(case.call(average.module), case.call(twin), f"update {i}")
    assert difference(case.call(average.module), before) > 1e-3


@NETWORKS
def test_a_hand_written_ema(seed, make):
    """OpenAI's, CompVis' and k-diffusion's: mul_ and add_ under no_grad, on .data or on detached tensors."""
    forms = [
        lambda p, q: p.detach().mul_(0.7).add_(q, alpha=0.3),
        lambda p, q: p.data.mul_(0.7).add_(q.data, alpha=0.3),
        lambda p, q: p.sub_(0.3 * (p - q)),
        lambda p, q: p.data.copy_(q.data * 0.3 + p.data * 0.7),
        lambda p, q: torch.lerp(p.data, q.data, 0.3, out=p.data),
    ]

    def update(form):
        def change(network):
            for p in parameters(network):
                form(p, torch.randn_like(p) * p.detach().abs().mean())

        return change

    history(make(), [update(f) for f in forms], 0)


# ---- training


def optimiser(name, **options):
    return lambda network: getattr(torch.optim, name)(network.parameters(), **({"lr": 0.02} | options))


OPTIMISERS = {
    "SGD": optimiser("SGD"),
    "SGD fused": optimiser("SGD", fused=True),
    "SGD foreach": optimiser("SGD", foreach=True, momentum=0.9),
    "Adam": optimiser("Adam"),
    "Adam fused": optimiser("Adam", fused=True),
    "AdamW": optimiser("AdamW"),
    "AdamW fused": optimiser("AdamW", fused=True),
    "AdamW foreach": optimiser("AdamW", foreach=True),
    "Adagrad fused": optimiser("Adagrad", fused=True),
    "Adafactor": optimiser("Adafactor"),
    "RMSprop": optimiser("RMSprop"),
    "LBFGS": optimiser("LBFGS", lr=0.5, max_iter=1),
}


def train_step(make_optimiser, case, mode=True):
    def step(network):
        with torch.enable_grad():
            network.requires_grad_(True)
            if "optimiser" not in network.__dict__:
                network.__dict__["optimiser"] = make_optimiser(network)
            opt = network.__dict__["optimiser"]
            if mode:
                network.train()

            def closure():
                opt.zero_grad()
                loss = case.call(network).square().mean()
                loss.backward()
                return loss

            opt.step(closure) if isinstance(opt, torch.optim.LBFGS) else (closure(), opt.step())
            network.eval()

    return step


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("make", [cross, ours, usual], ids=lambda f: f.__name__)
def test_training_between_two_samplings(seed, make, name):
    case = make()
    step = train_step(OPTIMISERS[name], case)
    history(case, [step, step], 0, effect=1e-4)


@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "SGD fused"])
def test_training_in_eval_mode(seed, name):
    """Fine-tuning that leaves dropout off, and a step without a call of the network before it."""
    case = pixels()
    step = train_step(OPTIMISERS[name], case, mode=False)

    def again(network):
        network.__dict__["optimiser"].step()

    history(case, [step, again, again], 0, effect=1e-4)


@pytest.mark.parametrize("name", ["AdamW fused", "SGD fused"])
def test_training_of_a_lora(seed, name):
    """Only the adapter's weights are trained, by a fused optimiser, in an accelerated network."""
    pytest.importorskip("peft")
    case = cross()

    def step(network):
        with torch.enable_grad():
            mine = [p for n, p in network.named_parameters() if "lora_" in n]
            opt = getattr(torch.optim, name.split()[0])(mine, lr=0.1, fused=True)
            case.call(network).square().mean().backward()
            opt.step()

    history(case, [lora("to_q", "conv1", "time_emb_proj"), step, step], 0)


@torch.no_grad()
def test_gradients_are_those_of_the_networks_own_code(seed):
    case = pixels()
    plain, fast = case.network, copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.float32)
    case.call(fast)
    with torch.enable_grad():
        for network in (plain, fast):
            network.requires_grad_(True)
            case.call(network).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert_same_bits(q.grad, p.grad, name)


# ---- said outright, and by sampling


@NETWORKS
@torch.no_grad()
def test_refresh(seed, make):
    """One element of each weight, which no sample of a weight's elements need hold."""
    case = make()
    plain, fast = case.network, copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.float32)
    case.call(fast)
    for network in (plain, fast):
        for p in parameters(network):
            p.data.view(-1)[p.numel() // 3].add_(2.0)
    fastdiff.refresh(fast)
    assert_equal(case.call(fast), case.call(plain))
    fastdiff.refresh(fast)
    assert_equal(case.call(fast), case.call(plain))


def test_what_refresh_takes():
    with pytest.raises(TypeError, match="refresh"):
        fastdiff.refresh(3)


@pytest.mark.parametrize("write", ["data.mul_", "numpy", "in inference mode", "data = at the old address"])
@torch.no_grad()
def test_sampling_sees_what_was_written(seed, write):
    """Before its first step."""
    case = ours()
    plain, fast = case.network, copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.float32)
    labels = {"class_labels": torch.tensor([1, 4])}

    def run(network):
        return fastdiff.sample(network, (2, 3, 16, 16), sampler="ddim", steps=2, seed=seed, model_kwargs=labels)

    run(fast)
    for _ in range(2):
        for network in (plain, fast):
            each(WRITES[write])(network)
        assert_equal(run(fast), run(plain), tolerance=1e-4)


@torch.no_grad()
def test_a_prompt_that_is_written_to(seed):
    """Its keys and values are of the numbers that it holds now, however they came there."""
    case = cross()
    plain, fast = case.network, copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.float32)
    prompt = case.inputs["encoder_hidden_states"]
    for write in WRITES:
        if write.startswith(("init", "swap")):
            continue
        assert_equal(case.call(fast), case.call(plain))
        before = prompt.clone()
        WRITES[write](prompt)
        assert not torch.equal(before, prompt)
        assert_equal(case.call(fast), case.call(plain), f"after {write}")


@torch.no_grad()
def test_a_time_embedding_that_is_written_to(seed):
    """A block called by itself, with the same tensor of other numbers."""
    case = pixels()
    block, twin = case.network.mid_block.resnets[0], copy.deepcopy(case.network.mid_block.resnets[0])
    x, temb = torch.randn(2, 64, 8, 8), torch.randn(2, 128)
    fastdiff.accelerate(case.network, dtype=torch.float32)
    for write in (lambda: None, lambda: temb.mul_(2.0), lambda: temb.data.mul_(0.3)):
        write()
        for _ in range(2):
            assert_equal(block(x, temb), twin(x, temb))
    for m in (block, twin):
        m.time_emb_proj.weight.data.mul_(1.5)
    assert_equal(block(x, temb), twin(x, temb))
