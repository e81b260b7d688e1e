"""Experts of mixtures with the adapters of many slots, as vLLM calls them on a CPU, over stand-ins
for its classes; ``tests/engines`` runs the same in vLLM."""

import ast
import sys
from types import SimpleNamespace

import engine_sources
import pytest
import torch
import torch.nn.functional as F
from test_vllm import IDS, MAX_RANK, RANKS, batch, managed
from vllm_stand_ins import StandInWrapper, served

import lora_kernels as lk
from lora_kernels.integrations import vllm_experts
from lora_kernels.testing.linear import assert_within_budget, poisoned_memory

E, H, N, K = 5, 40, 24, 2
LAYER = "model.layers.0.mlp.experts"
FUSED_MOE = "vllm.model_executor.layers.fused_moe"


class Mixin:
    @staticmethod
    def supports_lora():
        return True


class CPUExperts:
    def __init__(self, moe_config, biases):
        self.moe_config, (self.w1_bias, self.w2_bias) = moe_config, biases


class Mixture:
    """A layer of experts and its adapters in vLLM's layout. What lies beyond a rank is zero, as
    vLLM leaves it; slots without an adapter are NaN."""

    def __init__(self, activation, slices, dtype=torch.float32, biased=False):
        def draw(*shape):
            return torch.randn(*shape).div_(shape[-1] ** 0.5).to(dtype)

        self.activation, self.slices = activation, slices
        self.w13, self.w2 = draw(E, 2 * N, H), draw(E, H, N)
        self.biases = (draw(E, 2 * N), draw(E, H)) if biased else (None, None)
        shapes = {"w13": (H, 2 * N // slices, slices), "w2": (N, H, 1)}
        self.stacks = {}
        for name, (k, n, count) in shapes.items():
            a = [torch.full((len(IDS), E, MAX_RANK, k), float("nan")) for _ in range(count)]
            b = [torch.full((len(IDS), E, n, MAX_RANK), float("nan")) for _ in range(count)]
            for slot, lora_id in enumerate(IDS):
                for t, side in ((t, side) for side, both in (("a", a), ("b", b)) for t in both):
                    r = RANKS.get(lora_id)
                    if r is not None:
                        t[slot] = 0
                        own = t[slot, :, :r] if side == "a" else t[slot, :, :, :r]
                        own.normal_().div_((k if side == "a" else r) ** 0.5)
            self.stacks[f"{name}_lora_a_stacked"] = tuple(t.to(dtype) for t in a)
            self.stacks[f"{name}_lora_b_stacked"] = tuple(t.to(dtype) for t in b)
        self.enabled = torch.tensor([i in RANKS for i in IDS] + [False]).int()

    def experts(self, wrapper=None, **changes):
        kind = vllm_experts._class_on(Mixin, CPUExperts)
        config = SimpleNamespace(activation=SimpleNamespace(value=self.activation))
        experts = kind(config, self.biases)
        experts.process_weights_after_loading(SimpleNamespace(layer_name=LAYER))
        if wrapper is not None:
            options = {"fully_sharded": False, "enable_moe_shared_loras": False}
            options |= {"local_token_lora_mapping": None, "adapter_enabled": self.enabled}
            options |= {"punica_wrapper": wrapper} | self.stacks | changes
            experts.set_lora_context(SimpleNamespace(**options))
        return experts

    def weights_of(self, lora_id, dtype):
        w13, w2 = self.w13.to(dtype), self.w2.to(dtype)
        if lora_id not in RANKS or not self.enabled[IDS.index(lora_id)]:
            return w13, w2
        found = []
        for name in ("w13", "w2"):
            stacks = (self.stacks[f"{name}_lora_{side}_stacked"] for side in "ba")
            parts = [
                b[IDS.index(lora_id)].to(dtype) @ a[IDS.index(lora_id)].to(dtype)
                for b, a in zip(*stacks, strict=True)
            ]
            delta = torch.cat(parts, 1)
            if len(parts) == 2 and self.activation == "swigluoai":
                delta = torch.stack(parts, 2).flatten(1, 2)
            found.append(delta)
        return w13 + found[0], w2 + found[1]

    def naive(self, x, ids, weights, index, dtype):
        y = torch.zeros(x.shape, dtype=dtype)
        for row, (lora_id, experts) in enumerate(zip(ids, index.tolist(), strict=True)):
            w13, w2 = self.weights_of(lora_id, dtype)
            for weight, e in zip(weights[row].to(dtype), experts, strict=True):
                if 0 <= e < E:
                    b13, b2 = (0 if b is None else b[e].to(dtype) for b in self.biases)
                    h = self.gated(x[row].to(dtype) @ w13[e].t() + b13)
                    y[row] += weight * (h @ w2[e].t() + b2)
        return y.to(dtype)

    def gated(self, h):
        if self.activation == "swigluoai":
            gate, up = h[::2].clamp(max=7), h[1::2].clamp(-7, 7)
            return (up + 1) * gate * torch.sigmoid(gate * 1.702)
        gate, up = h.chunk(2)
        if self.activation == "silu":
            return F.silu(gate) * up
        return F.gelu(gate, approximate="tanh" if "tanh" in self.activation else "none") * up


@pytest.fixture
def in_forward(monkeypatch):
    """``in_forward(experts)``: they are the ones of vLLM's forward context."""
    module = type(sys)("vllm.forward_context")
    monkeypatch.setitem(sys.modules, "vllm", type(sys)("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.forward_context", module)

    def enter(experts):
        kernel = SimpleNamespace(fused_experts=experts)
        method = SimpleNamespace(moe_kernel=kernel)
        runner = SimpleNamespace(routed_experts=SimpleNamespace(quant_method=method))
        context = SimpleNamespace(no_compile_layers={LAYER: runner})
        module.get_forward_context = lambda: context
        return experts

    return enter


def apply(experts, mixture, x, weights, index, expert_map=None, on_input=False):
    y = torch.full_like(x, float("nan"))
    none = torch.empty(0)
    result = experts.apply(
        y, x, mixture.w13, mixture.w2, weights, index, experts.moe_config.activation, E, expert_map,
        None, None, none, none, None, on_input,
    )  # fmt: skip
    assert result is None
    return y


def routed(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, E, generator=generator)
    weights, index = scores.topk(K)
    return weights, index.int()


@pytest.mark.parametrize(
    "activation, slices, biased, dtype",
    [
        ("silu", 2, False, torch.float32),
        ("silu", 1, False, torch.bfloat16),
        ("gelu", 2, True, torch.float32),
        ("gelu_tanh", 1, False, torch.float32),
        ("swigluoai", 1, True, torch.float32),
        ("swigluoai", 2, True, torch.float32),
    ],
)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.native
def test_each_token_has_its_adapters_experts(phase, activation, slices, biased, dtype, in_forward):
    wrapper, manager = managed(StandInWrapper)
    mixture, mapping = Mixture(activation, slices, dtype, biased), batch(phase)
    mixture.enabled[IDS.index(9)] = 0  # an adapter that leaves these experts alone
    manager._set_adapter_mapping(mapping)
    ids = mapping.index_mapping
    x, (weights, index) = torch.randn(len(ids), H).to(dtype), routed(len(ids))
    experts = in_forward(mixture.experts(wrapper))
    with poisoned_memory(), lk.record_plans() as answers:
        y = apply(experts, mixture, x, weights, index)
    first = "segmented_lora" if activation == "swigluoai" and slices == 2 else "segmented_lora_"
    served(answers, "expert_linear_fwd", first, "expert_linear_fwd", "segmented_lora_")
    eager, exact = (mixture.naive(x, ids, weights, index, d) for d in (dtype, torch.float64))
    assert_within_budget("experts", y, eager, exact)
    bare = torch.tensor([i in (0, 9) for i in ids])
    base = apply(in_forward(mixture.experts()), mixture, x, weights, index)
    assert torch.equal(y[bare], base[bare]) and not (y[~bare] == base[~bare]).all(1).any()


@pytest.mark.parametrize("kind", ["no adapter enabled", "experts of other devices", "on input"])
def test_routing(kind, in_forward):
    wrapper, manager = managed(StandInWrapper)
    mixture, mapping = Mixture("silu", 2), batch("decode")
    manager._set_adapter_mapping(mapping)
    ids, (weights, index) = mapping.index_mapping, routed(len(mapping.index_mapping))
    x, expert_map, on_input = torch.randn(len(ids), H), None, kind == "on input"
    if kind == "no adapter enabled":
        mixture.enabled.zero_()
    if kind == "experts of other devices":
        expert_map = torch.tensor([3, -1, 0, 4, -1], dtype=torch.int32)
    local = index if expert_map is None else expert_map[index.long()]
    given = torch.ones_like(weights) if on_input else weights
    with lk.record_plans() as answers:
        y = apply(
            in_forward(mixture.experts(wrapper)), mixture, x, weights, index, expert_map, on_input
        )
    assert ("segmented_lora_" in {a.op for a in answers}) == (kind != "no adapter enabled")
    eager, exact = (mixture.naive(x, ids, given, local, d) for d in (x.dtype, torch.float64))
    assert_within_budget("experts", y, eager, exact)


@pytest.mark.parametrize("option", ["fully_sharded", "enable_moe_shared_loras"])
def test_layouts_that_are_not_served(option):
    with pytest.raises(ValueError, match=option):
        Mixture("silu", 2).experts(managed(StandInWrapper)[0], **{option: True})


@pytest.fixture
def vllm(monkeypatch):
    """Stand-ins at the addresses where vLLM chooses experts."""
    modules = {name: type(sys)(name) for name in (
        "vllm", "vllm.model_executor", "vllm.model_executor.layers", FUSED_MOE,
        f"{FUSED_MOE}.unquantized_fused_moe_method", f"{FUSED_MOE}.oracle",
        f"{FUSED_MOE}.oracle.unquantized", f"{FUSED_MOE}.experts", f"{FUSED_MOE}.experts.cpu_moe",
        f"{FUSED_MOE}.experts.lora_experts_mixin", "vllm.lora", "vllm.lora.layers",
        "vllm.lora.layers.fused_moe",
    )}  # fmt: skip
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    method = modules[f"{FUSED_MOE}.unquantized_fused_moe_method"]
    modules[FUSED_MOE].unquantized_fused_moe_method = method
    method.select_unquantized_moe_backend = lambda moe_config: ("vLLM's", None)
    backend = modules[f"{FUSED_MOE}.oracle.unquantized"]
    backend.UnquantizedMoeBackend = SimpleNamespace(CPU="CPU")
    modules[f"{FUSED_MOE}.experts.cpu_moe"].CPUUnquantizedExperts = CPUExperts
    modules[f"{FUSED_MOE}.experts.lora_experts_mixin"].LoRAExpertsMixin = Mixin

    class FusedMoEWithLoRA(torch.nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

    modules["vllm.lora.layers.fused_moe"].FusedMoEWithLoRA = FusedMoEWithLoRA
    for _ in range(2):
        vllm_experts.serve_experts()
        vllm_experts.rewire_routers()
    return SimpleNamespace(select=method.select_unquantized_moe_backend, layer=FusedMoEWithLoRA)


def test_what_vllm_chooses(vllm):
    def config(lora, activation="silu"):
        value = SimpleNamespace(value=activation)
        return SimpleNamespace(is_lora_enabled=lora, activation=value)

    assert vllm.select(config(False)) == vllm.select(config(False, "relu2")) == ("vLLM's", None)
    backend, kind = vllm.select(moe_config=config(True))
    assert backend == "CPU" and kind.supports_lora()
    assert issubclass(kind, CPUExperts) and kind.apply is vllm_experts.SegmentedExperts.apply
    with pytest.raises(NotImplementedError, match="relu2"):
        vllm.select(config(True, "relu2"))


def test_a_routers_adapters_reach_the_runner(vllm):
    runner = torch.nn.Module()
    runner.gate, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    layer = vllm.layer(runner)
    layer.gate = other
    layer.rest = torch.nn.Linear(2, 2)
    assert runner.gate is other and not hasattr(runner, "rest")


def test_the_operator_is_opaque(in_forward):
    mixture = Mixture("silu", 2)
    in_forward(mixture.experts())
    weights, index = routed(7)
    arguments = torch.empty(7, H), torch.randn(7, H), mixture.w13, mixture.w2, weights, index
    torch.library.opcheck(torch.ops.lora_kernels.vllm_experts_.default, (*arguments, None, LAYER))


def test_the_contract():
    """vLLM's source has what this relies on."""
    folder = "vllm/model_executor/layers/fused_moe"
    apply = "FusedMoEExpertsModular.apply"
    names = "self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation"
    names += ", global_num_experts, expert_map, a1q_scale, a2_scale, workspace13, workspace2"
    names += ", expert_tokens_meta, apply_router_weight_on_input"
    assert engine_sources.parameters("vllm", f"{folder}/modular_kernel.py", apply) == names
    root = engine_sources.root("vllm")
    context = (root / folder / "experts/lora_context.py").read_text()
    for field in ("adapter_enabled", "fully_sharded", "enable_moe_shared_loras", "punica_wrapper"):
        assert f"    {field}: " in context
    for field in (*(f"{w}_lora_{s}_stacked" for w in ("w13", "w2") for s in "ab"),):
        assert f"    {field}: tuple[torch.Tensor, ...]" in context
    assert "    local_token_lora_mapping: " in context
    select = f"{folder}/oracle/unquantized.py", "select_unquantized_moe_backend"
    assert engine_sources.parameters("vllm", *select) == "moe_config"
    supported = engine_sources.definition(
        "vllm", f"{folder}/experts/cpu_moe.py", "CPUUnquantizedExperts._supports_activation"
    )
    assert {f"MoEActivation.{name.upper()}" for name in vllm_experts.GATES} == {
        ast.unparse(node) for node in ast.walk(supported) if isinstance(node, ast.Attribute)
    }
