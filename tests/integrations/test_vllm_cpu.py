"""Base and adapters of vLLM's linear layers on a CPU in one operator, over stand-ins for what packs
and computes in vLLM; ``tests/engines`` runs the same in vLLM."""

import itertools
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from test_vllm import IDS, RANKS, Stacks, StandInWrapper, batch, managed
from vllm_stand_ins import Model, served

import lora_kernels as lk
from lora_kernels.integrations import vllm as plugin
from lora_kernels.integrations import vllm_cpu
from lora_kernels.testing.linear import assert_within_budget, poisoned_memory

pytestmark = pytest.mark.native
MODULES = (
    "vllm",
    "vllm.config",
    "vllm.forward_context",
    "vllm.model_executor",
    "vllm.model_executor.layers",
    "vllm.model_executor.layers.utils",
    "vllm.lora",
    "vllm.lora.layers",
    "vllm.lora.layers.base_linear",
)


class Engine:
    """What vLLM has at the two seams: a config, a function that packs, a layer with adapters."""

    def __init__(self, monkeypatch):
        self.layers, self.left, self.runs = {}, [], False
        compilation = SimpleNamespace(static_forward_context=self.layers)
        self.config = SimpleNamespace(lora_config=object(), compilation_config=compilation)
        modules = {name: type(sys)(name) for name in MODULES}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        self.utils = modules["vllm.model_executor.layers.utils"]
        modules["vllm.model_executor.layers"].utils = self.utils
        modules["vllm.config"].get_current_vllm_config_or_none = lambda: self.config
        self.utils.dispatch_cpu_unquantized_gemm = lambda layer, remove: self.left.append(layer)

        context = modules["vllm.forward_context"]
        context.is_forward_context_available = lambda: self.runs
        context.get_forward_context = lambda: SimpleNamespace(no_compile_layers=self.layers)

        class BaseLinearLayerWithLoRA:
            def set_mapping(self, punica_wrapper):
                self.punica_wrapper = punica_wrapper

            def _apply_sync(self, x, bias=None):
                return "vLLM's"

            def reset_lora(self, index):
                for stack in (*self.lora_a_stacked, *self.lora_b_stacked):
                    stack[index] = 0

        class ColumnParallelLinearWithLoRA(BaseLinearLayerWithLoRA):
            def set_lora(self, index, lora_a, lora_b):
                self.reset_lora(index)
                for stack, a in zip(self.lora_a_stacked, lora_a, strict=True):
                    stack[index, 0, : len(a)] = a
                for stack, b in zip(self.lora_b_stacked, lora_b, strict=True):
                    stack[index, 0, :, : b.shape[1]] = b

        self.layer_class = ColumnParallelLinearWithLoRA
        modules["vllm.lora.layers.base_linear"].BaseLinearLayerWithLoRA = BaseLinearLayerWithLoRA
        vllm_cpu._log_once.cache_clear()
        for _ in range(2):
            vllm_cpu.pack_weights()
            vllm_cpu.join_layers(plugin.SegmentedPunicaWrapper)

    def base(self, weight, remove=True):
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        self.utils.dispatch_cpu_unquantized_gemm(layer, remove)
        return layer

    def layer(self, base, stacks, wrapper):
        layer = self.layer_class()
        layer.base_layer, base.prefix = base, f"layer.{len(self.layers)}"
        layer.lora_a_stacked, layer.lora_b_stacked = stacks.a, stacks.b
        layer.set_mapping(wrapper)
        return layer


@pytest.fixture
def engine(monkeypatch):
    return Engine(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("widths", [(70,), (40, 24, 24), (33, 33)])
@pytest.mark.parametrize("phase", ["prefill", "decode", "idle"])
def test_a_layer_is_one_operator(phase, widths, biased, dtype, engine):
    wrapper, manager = managed(StandInWrapper)
    stacks, n = Stacks(65, widths, dtype), sum(widths)
    weight = torch.randn(n, 65).to(dtype) / 8
    bias = torch.randn(n).to(dtype) if biased else None
    base = engine.base(weight)
    assert base.weight.numel() == 0 and not engine.left
    layer, mapping = (
        engine.layer(base, stacks, wrapper),
        batch("decode" if phase == "idle" else phase),
    )
    ids = [0] * len(mapping.index_mapping) if phase == "idle" else mapping.index_mapping
    manager._set_adapter_mapping(mapping if any(ids) else type(mapping)(tuple(ids), tuple(ids)))
    x = torch.randn(len(ids) + 3, 65).to(dtype)
    with poisoned_memory(), lk.record_plans() as answers:
        result = layer._apply_sync(x, bias)
        engine.runs = True  # by its name
        whole = layer._apply_sync(x[None], bias)
    served(answers, "segmented_linear_fwd", "segmented_linear_fwd")
    assert torch.equal(whole, result[None]) and list(engine.layers.values()) == [layer]

    def plain(dtype):
        y = x.to(dtype) @ weight.to(dtype).t()
        return stacks.naive(x, y if bias is None else y + bias.to(dtype), ids, dtype)

    assert_within_budget("layer", result, plain(dtype), plain(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_packed_when_a_slot_is_filled(dtype, engine):
    wrapper, manager = managed(StandInWrapper)
    stacks, widths = Stacks(65, (64, 40), dtype, padding=0.0), (64, 40)
    layer = engine.layer(engine.base(torch.randn(104, 65).to(dtype)), stacks, wrapper)
    mapping = batch("decode")
    slot = next(i for i, other in enumerate(IDS) if other == mapping.index_mapping[0])
    x = torch.randn(len(mapping.index_mapping), 65).to(dtype)

    def both():
        manager._set_adapter_mapping(mapping)
        engine.runs = False
        plain = layer._apply_sync(x)
        engine.runs = True
        assert torch.equal(layer._apply_sync(x), plain)
        return plain

    results = [both()]
    held = vllm_cpu._stacks_of(layer)
    _, *panels = held.panels(wrapper.ranks_of_layers, layer.base_layer._lora_kernels_base.panels)
    for panel in panels:  # They are what is read, where a slice begins a panel of the weight.
        panel.mul_(2)
    changed = layer._apply_sync(x)
    assert not torch.equal(changed, results[0])
    held.changed.update(range(len(IDS)))
    assert torch.equal(both(), results[0])

    for rank in (RANKS[IDS[slot]], RANKS[IDS[slot]] + 3):
        a = [torch.randn(rank, 65) for _ in widths]
        layer.set_lora(slot, a, [torch.randn(n, rank) for n in widths])
        manager.models[IDS[slot]] = Model(rank)
        results.append(both())
    # Another rank of the same values, as another layer of the adapter may give it.
    manager.models[IDS[slot]] = Model(16)
    assert torch.equal(both(), results[-1])
    assert held._panels[0].tolist() == wrapper.ranks_of_layers
    layer.reset_lora(slot)
    results.append(both())
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(results))


def test_the_base_alone(engine):
    """What vLLM computes without our layer: adapters sharded over devices, custom layers."""
    weight, x = torch.randn(70, 65), torch.randn(9, 65)
    base = engine.base(weight)
    with lk.record_plans() as answers:
        y = base.cpu_linear(x, base.weight, None)
    served(answers, "lora_linear_fwd")
    torch.testing.assert_close(y, x @ weight.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["no adapters", "no config", "output head", "float16", "3-D"])
def test_what_stays_vllms(kind, engine, caplog):
    weight, remove = torch.randn(70, 65), kind != "output head"
    if kind == "no adapters":
        engine.config.lora_config = None
    if kind == "no config":
        engine.config = None
    weight = weight.half() if kind == "float16" else weight
    weight = weight[None] if kind == "3-D" else weight
    caplog.set_level(logging.INFO, "vllm.lora_kernels")
    layers = [engine.base(weight, remove) for _ in range(2)]
    assert engine.left == layers
    assert all(torch.equal(layer.weight, weight) for layer in layers)
    wrapper, _ = managed(StandInWrapper)
    assert (
        engine.layer(layers[0], Stacks(65, (70,), torch.float32), wrapper)._apply_sync(
            torch.randn(3, 65)
        )
        == "vLLM's"
    )
    reasons = [record.getMessage() for record in caplog.records]
    assert len(reasons) == (kind == "float16") and all("torch.float16" in r for r in reasons)


def test_layers_that_do_not_fit_stay_vllms(engine, caplog):
    caplog.set_level(logging.INFO, "vllm.lora_kernels")
    wrapper, _ = managed(StandInWrapper)
    base = engine.base(torch.randn(70, 65))
    fitting, narrow = (Stacks(65, (n,), torch.float32) for n in (70, 60))
    x = torch.randn(3, 65)
    assert engine.layer(base, fitting, SimpleNamespace())._apply_sync(x) == "vLLM's"
    assert engine.layer(base, narrow, wrapper)._apply_sync(x) == "vLLM's"
    assert engine.layer(base, narrow, wrapper)._apply_sync(x) == "vLLM's"
    (record,) = caplog.records
    assert "do not fit" in record.getMessage()


def test_the_operator_is_opaque(engine):
    wrapper, manager = managed(StandInWrapper)
    manager._set_adapter_mapping(batch("decode"))
    stacks, base = (
        Stacks(40, (30, 20), torch.float32, padding=0.0),
        engine.base(torch.randn(50, 40)),
    )
    arguments = (torch.randn(13, 40), *getattr(base, vllm_cpu.ATTRIBUTE))
    arguments += vllm_cpu.stacks(stacks.a), vllm_cpu.stacks(stacks.b)
    table = wrapper.table_of_tokens()
    # Its kernel reads no weight but the panels, and one NaN seen as the whole is not compared.
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.lora_kernels.vllm_linear.default, (*arguments, table, None), test_utils=tests
    )


def test_the_shape_is_never_read(engine):
    """A plan that read it would answer NaN, not something plausible."""
    shape, _ = getattr(engine.base(torch.randn(70, 65)), vllm_cpu.ATTRIBUTE)
    assert shape.shape == (70, 65) and shape.isnan().all()
    assert shape.untyped_storage().nbytes() == 4
