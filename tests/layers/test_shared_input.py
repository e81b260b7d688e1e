"""When the projections of one input are computed together, and when they are not."""

import contextlib

import pytest
import torch
from shared_inputs import NAMES, TOGETHER, assert_equal, draw, pair, plain, run
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk


def assert_apart(shared, apart, x=None, **options):
    """Both compute alike, bit for bit, and nothing together."""
    x = draw() if x is None else x
    seeds = [torch.manual_seed(5), torch.get_rng_state()]
    answered, ours = run(shared, x, **options)
    torch.set_rng_state(seeds[1])
    expected, theirs = run(apart, x, **options)
    assert answered == expected and not set(answered) & set(TOGETHER)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"pack_weight": "always"}], ids=str)
def test_together(order, options):
    def called(self, x):
        found = {j: self.layers[j](x) for j in order}
        return [found[j] for j in range(3)]

    shared, apart = pair(called, dtype=torch.float64, **options)
    x = draw(torch.float64)
    (answered, ours), (expected, theirs) = run(shared, x), run(apart, x)
    assert answered == TOGETHER and not set(expected) & set(TOGETHER)
    assert_equal(ours, theirs, exactly=False)
    assert all(ours[f"{n}.lora_{m}"].abs().max() > 0 for n in NAMES for m in "AB")


def test_the_forward_has_the_bits_of_separate_layers():
    shared, apart = pair()
    x = draw()
    (answered, ours), (_, theirs) = run(shared, x), run(apart, x)
    assert answered == TOGETHER and torch.equal(ours["y"], theirs["y"])


def test_every_projection_has_its_own_mask():
    shared = pair(lora_dropout=0.5)[0]
    x = draw()
    torch.manual_seed(3)
    answered, ours = run(shared, x)
    assert answered == TOGETHER
    layers = shared.layers
    torch.manual_seed(3)
    y = lk.lora_linears(
        x,
        [t.weight for t in layers],
        [t.lora_A for t in layers],
        [t.lora_B for t in layers],
        [t.scaling for t in layers],
        [t.bias for t in layers],
        dropout_p=0.5,
        training=True,
    )
    assert torch.equal(ours["y"], torch.cat(y, dim=-1).sin())
    shared.eval()
    assert not torch.equal(shared(x), ours["y"])


def test_some_of_the_projections():
    """LoRA on q and v, as most adapters have it; and on q alone, which shares with none."""
    shared, apart = pair()
    shared.k_proj = apart.k_proj = nn.Linear(24, 16).requires_grad_(False)
    lk.share_inputs(shared)
    (answered, ours), (_, theirs) = run(shared, x := draw()), run(apart, x)
    assert answered == TOGETHER and torch.equal(ours["y"], theirs["y"])
    shared.v_proj = nn.Linear(24, 16)
    assert lk.share_inputs(shared) == []


def hooked(register, hook):
    return lambda model: getattr(model.k_proj, register)(hook)


def set_forward(model):
    model.k_proj.forward = type(model.k_proj).forward.__get__(model.k_proj)


def with_dropout(model):
    model.k_proj.lora_dropout = 0.5


def disable(model):
    model.k_proj._disabled = True


def freeze(model):
    model.k_proj.weight.requires_grad_(True)


def replace(model):
    torch.manual_seed(8)
    model.k_proj = lk.FusedLoRALinear(24, 16, r=2, use_dora=True)


def as_subclass(model):
    model.k_proj.__class__ = type("Own", (lk.FusedLoRALinear,), {})


def as_fsdp(model):
    model.k_proj._is_fsdp_managed_module = True


CHANGES = {
    "forward hook": hooked("register_forward_hook", lambda module, args, y: y * 2),
    "forward pre-hook": hooked("register_forward_pre_hook", lambda module, args: (args[0] * 2,)),
    "backward hook": hooked("register_full_backward_hook", lambda module, given, got: None),
    "backward pre-hook": hooked("register_full_backward_pre_hook", lambda module, given: None),
    "a forward on the object": set_forward,
    "a subclass": as_subclass,
    "another dropout": with_dropout,
    "merged": lambda model: model.k_proj.merge(),
    "disabled": disable,
    "a base that trains": freeze,
    "DoRA, put there later": replace,
    "sharded": as_fsdp,
    "compiled by itself": lambda model: model.k_proj.compile(backend="eager"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_apart_where_one_is_special(change):
    shared, apart = pair()
    assert run(shared, draw())[0] == TOGETHER
    for model in shared, apart:
        CHANGES[change](model)
        model.zero_grad()
    assert_apart(shared, apart)


def test_apart_with_dora():
    assert_apart(*pair(use_dora=True))


def test_apart_under_a_global_hook():
    shared, apart = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(handle.remove)
        assert_apart(shared, apart)
    assert shared.k_proj in seen


def test_apart_with_four_bits():
    shared, apart = (
        lk.apply_lora(lk.quantize_base(nn.Sequential(plain())), r=2).train() for _ in range(2)
    )
    apart.load_state_dict(shared.state_dict())
    assert lk.share_inputs(shared) == ["0"]
    assert_apart(shared, apart, torch.randn(3, 64))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_apart_without_gradients(mode):
    shared, apart = pair()
    with mode():
        assert_apart(shared, apart, backward=False)


def test_apart_where_nothing_trains():
    shared, apart = pair()
    for model in shared, apart:
        model.requires_grad_(False)
    assert_apart(shared, apart, backward=False)


def test_an_x_made_in_inference_mode():
    shared, apart = pair()
    with torch.inference_mode():
        x = draw()
    for model in shared, apart:
        # What a backward needs of such an x cannot be saved.
        for layer in model.layers:
            layer.lora_A.requires_grad_(False)
    y, expected = shared(x), apart(x)
    assert torch.equal(y, expected) and y.requires_grad


def other_x(self, x):
    return [self.q_proj(x), self.k_proj(x.clone()), self.v_proj(x)]


def changed_x(self, x):
    x = x * 1
    q = self.q_proj(x).detach()
    x.add_(1)
    return [q, self.k_proj(x), self.v_proj(x)]


def changed_adapter(self, x):
    q = self.q_proj(x).detach()
    with torch.no_grad():
        self.k_proj.lora_B.mul_(0.5)
        self.v_proj.scaling = 3.0
    return [q, self.k_proj(x), self.v_proj(x)]


def replaced_adapter(self, x):
    q = self.q_proj(x)
    self.k_proj.lora_A = nn.Parameter(torch.ones_like(self.k_proj.lora_A))
    return [q, self.k_proj(x), self.v_proj(x)]


def hooked_later(self, x):
    q = self.q_proj(x)
    handle = self.k_proj.register_forward_hook(lambda module, args, y: y + 1)
    k = self.k_proj(x)
    handle.remove()
    return [q, k, self.v_proj(x)]


def twice(self, x):
    return [self.q_proj(x) + self.q_proj(x), self.k_proj(x), self.v_proj(x)]


def another_twice(self, x):
    return [self.q_proj(x), self.k_proj(x) + self.k_proj(x), self.v_proj(x)]


def without_graph(self, x):
    q = self.q_proj(x)
    with torch.no_grad():
        k = self.k_proj(x)
    return [q, k, self.v_proj(x)]


def under_autocast(self, x):
    q = self.q_proj(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        k = self.k_proj(x)
    return [q, k.float(), self.v_proj(x)]


def checkpointed_inside(use_reentrant, first):
    def called(self, x):
        layers = [
            lambda x, layer=layer, wrapped=wrapped: (
                checkpoint(layer, x, use_reentrant=use_reentrant) if wrapped else layer(x)
            )
            for layer, wrapped in zip(self.layers, (first, True, False), strict=True)
        ]
        return [layer(x) for layer in layers]

    return called


# What a call does in between, and which projections then compute by themselves.
CALLS = {
    "another x": (other_x, 1),
    "x changed": (changed_x, 2),
    "adapters changed": (changed_adapter, 2),
    "an adapter replaced": (replaced_adapter, 1),
    "a hook in between": (hooked_later, 1),
    "called twice": (twice, 1),
    "another called twice": (another_twice, 1),
    "no graph for one": (without_graph, 1),
    "autocast for one": (under_autocast, 1),
    "checkpointed": (checkpointed_inside(False, True), 3),
    "the second checkpointed": (checkpointed_inside(False, False), 1),
    "the second checkpointed, reentrant": (checkpointed_inside(True, False), 1),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_does_not_fit_is_computed_by_itself(call):
    called, alone = CALLS[call]
    shared, apart = pair(called)
    x = draw()
    (answered, ours), (_, theirs) = run(shared, x), run(apart, x)
    forwards = [op for op in answered if op == "lora_linear_fwd"]
    # Checkpointed ones are computed again by the backward.
    again = {"checkpointed": 2}.get(call, "checkpointed" in call)
    assert len(forwards) == alone + again, answered
    assert torch.equal(ours["y"], theirs["y"])
    for name, gradient in theirs.items():
        if gradient is None:
            assert ours[name] is None, name
        else:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_as_a_whole(use_reentrant, dropout):
    shared = pair(lora_dropout=dropout)[0]
    x = draw()
    torch.manual_seed(4)
    _, expected = run(shared, x)
    shared.zero_grad()
    again = nn.Module()
    again.inner = shared
    again.forward = lambda x: checkpoint(shared, x, use_reentrant=use_reentrant)
    torch.manual_seed(4)
    answered, found = run(again, x)
    # The reentrant one records nothing in its first forward.
    first = ["lora_linear_fwd"] * 3 if use_reentrant else TOGETHER[:1]
    assert answered == first + TOGETHER
    found = {name.removeprefix("inner."): t for name, t in found.items()}
    if use_reentrant and dropout:
        # Other masks in the forward, whose y is not the one that is differentiated.
        return
    assert_equal(found, expected)
