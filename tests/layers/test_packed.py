"""The packed copies of a frozen weight: when they are made and dropped, and that none is stale."""

import copy
import gc
import inspect
import io
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels.backends import cpu
from lora_kernels.layers.packed import PackedWeight
from lora_kernels.spec.problem import PROBLEM_OF
from lora_kernels.testing.linear import Case, assert_within_budget, naive

pytestmark = pytest.mark.skipif(
    not cpu.packs(torch.ones(1)),
    reason="no native kernels that read packed weights",
)
DTYPES = [torch.float32, torch.bfloat16]
PACKED_ARGUMENT = {
    op: [*inspect.signature(PROBLEM_OF[op]).parameters].index("packed")
    for op in ("lora_linear_fwd", "lora_linear_dx")
}


@pytest.fixture
def packs(monkeypatch):
    """How often a weight was packed so far."""
    count = []
    sound = torch.ops.lora_kernels_cpu.pack
    monkeypatch.setattr(
        torch.ops.lora_kernels_cpu, "pack", lambda b: count.append(1) or sound(b), raising=True
    )
    return count


@pytest.fixture
def used(monkeypatch):
    """The packed operands that the operators were given."""
    given = []
    sound = cpu.kernel

    def kernel(op):
        def call(*args, **kwargs):
            if op == "lora_linear":
                # The node has both for its operators.
                given.extend(zip(("lora_linear_fwd", "lora_linear_dx"), args[-2:], strict=True))
                return sound(op)(*args, **kwargs)
            place = PACKED_ARGUMENT.get(op, len(args))
            given.append((op, args[place] if len(args) > place else kwargs.get("packed")))
            return sound(op)(*args, **kwargs)

        return call

    monkeypatch.setattr(cpu, "kernel", kernel)
    return given


def adapted(kind="linear", dtype=torch.float32, k=70, n=100, **arguments):
    module = nn.Linear(k, n) if kind == "linear" else Conv1D(n, k)
    nn.init.normal_(module.bias)
    arguments = {"r": 5, "init_lora_weights": False} | arguments
    return lk.FusedLoRALinear.from_linear(module.to(dtype), **arguments)


def expected(layer, x):
    """The layer's output by plain torch in float64."""
    weight = layer.weight.double()
    weight = weight.t() if layer.fan_in_fan_out else weight
    y = x.double() @ weight.t() + layer.bias.double()
    if not layer.merged:
        y += layer.scaling * (x.double() @ layer.lora_A.double().t()) @ layer.lora_B.double().t()
    return y


def is_right(layer, x=None):
    x = torch.randn(9, layer.in_features).to(layer.weight.dtype) if x is None else x
    with torch.no_grad():
        y, truth = layer(x), expected(layer, x)
    bound = 1e-5 if y.dtype == torch.float32 else 2e-2
    return (y.double() - truth).abs().max() / truth.abs().max() < bound


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(70, 100), (96, 96), (1, 3)])
def test_packed_once_in_eval_and_read(kind, dtype, k, n, packs, used):
    layer = adapted(kind, dtype, k, n).eval()
    assert is_right(layer) and is_right(layer) and is_right(layer, torch.randn(2, 3, k).to(dtype))
    assert len(packs) == 1 and len(layer._packed) == 1
    assert [op for op, _ in used] == ["lora_linear_fwd"] * 3
    assert all(packed is used[0][1] and packed is not None for _, packed in used)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_packed_or_not(dtype):
    layer = adapted(dtype=dtype).eval()
    x = torch.randn(9, 70).to(dtype)
    packed = layer(x)
    layer.pack_weight = "never"
    assert torch.equal(layer(x), packed) and len(layer._packed) == 0


def test_training_packs_only_when_asked(packs, used):
    layer = adapted()
    x = torch.randn(9, 70, requires_grad=True)
    layer(x).sum().backward()
    assert not packs and all(packed is None for _, packed in used)
    layer.pack_weight = "always"
    del used[:]
    for _ in range(2):
        layer(x).sum().backward()
    assert len(packs) == 2, "one copy for the forward and one for dX"
    taken = {op: packed for op, packed in used if packed is not None}
    assert set(taken) == {"lora_linear_fwd", "lora_linear_dx"}
    layer.eval()(x)
    layer.train()(x)
    assert len(packs) == 2, "modes change nothing for always"


def test_eval_with_a_graph_packs_the_forward_alone(used):
    layer = adapted().eval()
    x = torch.randn(9, 70, requires_grad=True)
    layer(x).sum().backward()
    given = dict(used)
    assert given["lora_linear_fwd"] is not None and given["lora_linear_dx"] is None


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_through_packed_weights(kind, dtype):
    case = Case(37, 100, 70, 5, dtype=dtype, fan_in_fan_out=kind == "conv1d", bias=True)
    inputs = case.draw()
    layer = adapted(kind, dtype, pack_weight="always", autocast_adapter_dtype=False)
    with torch.no_grad():
        layer.weight.copy_(inputs.weight)
        layer.bias.copy_(inputs.bias)
        layer.lora_A.copy_(inputs.lora_a)
        layer.lora_B.copy_(inputs.lora_b)
    layer.scaling = inputs.scale.item()
    exact, eager = naive(inputs, torch.float64), naive(inputs, dtype)
    for recompute in (False, True):
        x = inputs.x.detach().clone().requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        results = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), inputs.dy)
        for name, result in zip(("y", "dx", "da", "db"), (y, *results), strict=True):
            assert_within_budget(name, result.detach(), eager[name], exact[name])
    assert len(layer._packed) == 2


def load_other_values(layer):
    state = {name: torch.randn_like(tensor) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state)


def assign_other_values(layer):
    state = {name: torch.randn_like(tensor) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    layer.requires_grad_(False)


def in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(2.0)


def one_value_in_place(layer):
    """Not one of those that are compared with the copy."""
    with torch.no_grad():
        layer.weight[1, 1] += 9.0


def new_parameter(layer):
    layer.weight = nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)


def train_the_base(layer):
    layer.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([layer.weight], lr=0.1, fused=True)
    layer(torch.randn(3, 70).to(layer.weight.dtype)).square().sum().backward()
    optimizer.step()
    layer.weight.requires_grad_(False)


def merge_as_peft_does(layer):
    layer.weight.data += layer.delta_weight().to(layer.weight.dtype)


CHANGES = {
    "merge": lambda layer: layer.merge(),
    "merge and unmerge": lambda layer: (layer.merge(), layer.unmerge()),
    "merge for good": lambda layer: layer.merge(keep_base=False),
    "load_state_dict": load_other_values,
    "load_state_dict assign": assign_other_values,
    "to another dtype and back": lambda layer: layer.to(torch.float64).float(),
    "half and back": lambda layer: layer.half().float(),
    "to_empty": lambda layer: layer.to_empty(device="cpu").reset_parameters(),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "in place": in_place,
    "one value in place": one_value_in_place,
    "another Parameter": new_parameter,
    "another .data": lambda layer: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
    ".data in place": lambda layer: layer.weight.data.copy_(torch.randn_like(layer.weight)),
    "PEFT's merge": merge_as_peft_does,
    "an optimizer that bumps no version": train_the_base,
    "scaling": lambda layer: setattr(layer, "scaling", 3.0),
    "set_lora": lambda layer: layer.set_lora(
        torch.randn_like(layer.lora_A), torch.randn_like(layer.lora_B), lora_alpha=3
    ),
    "an adapter in place": lambda layer: layer.lora_A.data.mul_(3.0),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("pack_weight", ["eval", "always"])
@pytest.mark.parametrize("merged", [False, True])
def test_nothing_is_stale_after(change, pack_weight, merged):
    layer = adapted(pack_weight=pack_weight).eval()
    if merged:
        layer.merge()
    assert is_right(layer) and len(layer._packed) == 1
    CHANGES[change](layer)
    layer.eval()
    assert is_right(layer) and len(layer._packed) == 1


@pytest.mark.parametrize(
    "change",
    [
        "merge",
        "merge and unmerge",
        "load_state_dict",
        "half and back",
        "reset_parameters",
        "to_empty",
    ],
)
def test_what_the_module_does_drops_the_copies(change):
    layer = adapted().eval()
    assert is_right(layer) and len(layer._packed) == 1
    CHANGES[change](layer)
    assert len(layer._packed) == 0


def test_train_drops_what_eval_made():
    layer = adapted().eval()
    assert is_right(layer) and len(layer._packed) == 1
    layer.train()
    assert len(layer._packed) == 0
    layer.eval()
    assert len(layer._packed) == 0 and is_right(layer) and len(layer._packed) == 1
    layer.drop_packed()
    assert len(layer._packed) == 0


def test_wrapped_by_peft_and_merged_by_it():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(70, 100))
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    ).eval()
    layer = wrapped.base_model.model[0]
    layer.base_layer = lk.FusedLoRALinear.from_linear(layer.base_layer, r=3).eval()
    x = torch.randn(9, 70)
    with torch.no_grad():
        before = wrapped(x)
        assert len(layer.base_layer._packed) == 1
        wrapped.merge_adapter()
        torch.testing.assert_close(wrapped(x), before, rtol=1e-4, atol=1e-4)
        wrapped.unmerge_adapter()
        torch.testing.assert_close(wrapped(x), before, rtol=1e-4, atol=1e-4)


def test_a_merged_layer_reads_its_own_copy(used):
    layer = adapted().eval()
    assert is_right(layer)
    layer.merge()
    assert is_right(layer) and len(layer._packed) == 1
    assert [op for op, packed in used if packed is not None] == ["lora_linear_fwd"] * 2
    x = torch.randn(3, 70, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    layer.unmerge()
    assert is_right(layer)


def test_float16_float64_and_autocast_are_not_packed(packs):
    for dtype in (torch.float16, torch.float64):
        layer = adapted(dtype=dtype).eval()
        assert is_right(layer, torch.randn(4, 70).to(dtype) / 8)
    layer = adapted().eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 70)).dtype == torch.bfloat16
    assert not packs
    layer = adapted(dtype=torch.bfloat16).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        layer(torch.randn(4, 70))
        layer.merge()
        layer(torch.randn(4, 70))
    assert len(packs) == 2, "what autocast computes in is the weight's dtype"


def test_a_weight_that_trains_is_never_packed(packs):
    layer = adapted(pack_weight="always").eval()
    layer.weight.requires_grad_(True)
    assert is_right(layer) and not packs


def test_a_weight_that_is_unfrozen_drops_its_copies():
    layer = adapted().eval()
    assert is_right(layer) and len(layer._packed) == 1
    layer.weight.requires_grad_(True)
    assert is_right(layer) and len(layer._packed) == 0


def test_copies_are_no_part_of_the_state():
    layer = adapted().eval()
    names = set(layer.state_dict())
    assert is_right(layer)
    assert set(layer.state_dict()) == names
    assert {name for name, _ in layer.named_buffers()} == {"_scale"}
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert len(twin._packed) == 0 and twin.pack_weight == "eval"
        assert is_right(twin) and len(twin._packed) == 1
    assert len(layer._packed) == 1


def test_the_copies_keep_no_weight_alive():
    layer = adapted().eval()
    assert is_right(layer)
    old = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(torch.randn(100, 70), requires_grad=False)
    gc.collect()
    assert old() is None and is_right(layer)


def test_inference_mode_and_back():
    layer = adapted(pack_weight="always")
    x = torch.randn(9, 70)
    with torch.inference_mode():
        layer.eval()(x)
    x.requires_grad_()
    layer.train()(x).sum().backward()
    assert x.grad is not None and is_right(layer)
    with torch.inference_mode():
        made_inside = adapted().eval()
        made_inside(x.detach())
        assert len(made_inside._packed) == 0


def test_compiled_calls_take_no_copy():
    layer = adapted().eval()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(9, 70)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
        layer.weight.data.mul_(2.0)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("merged", [False, True])
def test_traced_calls_take_no_copy(merged):
    layer = adapted().eval().requires_grad_(False)
    if merged:
        layer.merge()
    x = torch.randn(9, 70)
    y = layer(x)
    assert len(layer._packed) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(layer, x)
    assert not any("lora_kernels_cpu" in node.kind() for node in traced.inlined_graph.nodes())
    torch.testing.assert_close(traced(x), y, rtol=1e-5, atol=1e-5)


def test_threads_share_a_layer():
    layer = adapted().eval()
    wrong = []

    def call():
        for _ in range(20):
            if not is_right(layer):
                wrong.append(1)
            layer.drop_packed()

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_wrong_options():
    with pytest.raises(ValueError, match="pack_weight must be one of eval, always, never"):
        lk.FusedLoRALinear(4, 4, pack_weight="sometimes")
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'evla'"):
        lk.apply_lora(model, pack_weight="evla")
    assert type(model[0]) is nn.Linear
    model = lk.apply_lora(model, pack_weight="never")
    assert model[0].pack_weight == "never"


def test_few_values_changed_through_data_are_for_drop_packed():
    layer = adapted(k=512, n=512).eval()
    assert is_right(layer)
    layer.weight.data[100, 100] += 100.0
    layer.drop_packed()
    assert is_right(layer)


def test_samples_see_small_changes_everywhere():
    weight = torch.randn(300, 200)
    packed = PackedWeight()
    first = packed.get(weight, False)
    assert packed.get(weight, False) is first
    weight.data.mul_(1.0 + 1e-6)
    assert packed.get(weight, False) is not first
