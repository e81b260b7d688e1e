"""What the vLLM plug-in holds to vLLM's source: signatures, calls, seams; and that nothing happens
unasked."""

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import engine_sources
import pytest
from vllm_stand_ins import (
    Manager,
    make_wrapper,
    wrapper_of_source,
)

from lora_kernels.integrations import vllm as plugin

# The signatures of vLLM 0.33.0, where its source is not at hand.
WRAPPER = "vllm/lora/punica_wrapper/punica_gpu.py"
SIGNATURES = {
    (WRAPPER, "PunicaWrapperGPU.__init__"): (
        "self, max_num_batched_tokens, max_batches, device, **kwargs"
    ),
    (WRAPPER, "PunicaWrapperGPU.update_metadata"): (
        "self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs"
    ),
    (WRAPPER, "PunicaWrapperGPU.add_shrink"): "self, y, x, lora_a_stacked, scale, **kwargs",
    (WRAPPER, "PunicaWrapperGPU.add_expand"): (
        "self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs"
    ),
    (WRAPPER, "PunicaWrapperGPU.add_lora_embedding"): (
        "self, y, x, lora_b_stacked, add_inputs=True, **kwargs"
    ),
    (WRAPPER, "PunicaWrapperGPU.add_lora_linear"): (
        "self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, *, buffer=None, **kwargs"
    ),
    (WRAPPER, "PunicaWrapperGPU.add_lora_logits"): (
        "self, y, x, lora_a_stacked, lora_b_stacked, scale, *, buffer=None, **kwargs"
    ),
    ("vllm/lora/ops/triton_ops/lora_shrink_op.py", "_lora_shrink"): (
        "inputs, lora_a_weights, output_tensor, token_lora_mapping, "
        "token_indices_sorted_by_lora_ids, num_tokens_per_lora, lora_token_start_loc, lora_ids, "
        "no_lora_flag_cpu, num_active_loras, scaling"
    ),
    ("vllm/lora/ops/triton_ops/lora_expand_op.py", "_lora_expand"): (
        "inputs, lora_b_weights, output_tensor, token_lora_mapping, "
        "token_indices_sorted_by_lora_ids, num_tokens_per_lora, lora_token_start_loc, lora_ids, "
        "no_lora_flag_cpu, num_active_loras, offset_start=0, add_inputs=False"
    ),
}


def ours(name):
    owner = plugin.SegmentedPunicaWrapper if "." in name else plugin
    return getattr(owner, name.split(".")[-1].removeprefix("_" if "." not in name else ""))


@pytest.mark.parametrize(("path", "name"), SIGNATURES)
def test_our_signatures(path, name):
    assert engine_sources.our_parameters(ours(name)) == SIGNATURES[path, name]


@pytest.mark.parametrize(("path", "name"), SIGNATURES)
def test_their_signatures(path, name):
    assert engine_sources.parameters("vllm", path, name) == SIGNATURES[path, name]


def test_everything_that_vllm_computes_by_the_wrapper_is_ours_or_inherited():
    """Public methods that a later release adds are noticed."""
    node = engine_sources.definition("vllm", WRAPPER, "PunicaWrapperGPU")
    theirs = {f.name for f in node.body if isinstance(f, ast.FunctionDef)}
    inherited = {
        "apply_lora_full_linear",
        "moe_lora_align_block_size",
        "add_lora_fused_moe",
        "add_lora_w13",
        "add_lora_w2",
    }
    overridden = {name.split(".")[1] for path, name in SIGNATURES if path == WRAPPER}
    assert theirs == inherited | overridden


def test_every_call_of_vllms_layers_fits():
    seen = set()
    for where, method, count, keywords in engine_sources.calls(
        "vllm", "vllm/lora", "punica_wrapper"
    ):
        function = getattr(plugin.SegmentedPunicaWrapper, method, None)
        if function is not None:
            engine_sources.assert_binds(function, count, keywords, where)
            seen.add(method)
    assert seen == {
        "update_metadata",
        "add_shrink",
        "add_expand",
        "add_lora_embedding",
        "add_lora_linear",
        "add_lora_logits",
    }


def test_what_we_read_of_vllms_manager():
    path = "vllm/lora/model_manager.py"
    name = "LoRAModelManager._set_adapter_mapping"
    assert engine_sources.parameters("vllm", path, name) == "self, mapping"
    assert engine_sources.parameters("vllm", path, "LoRAModelManager.list_adapters") == "self"
    source = ast.unparse(engine_sources.definition("vllm", path, "LoRAModelManager"))
    activate = "LoRAModelManager.activate_adapter"
    assert engine_sources.parameters("vllm", path, activate) == "self, lora_id"
    read = ("_is_moe", "_classification_head", "punica_wrapper_mapping", "_last_mapping")
    read += "is_pooling_model", "modules"
    for attribute in read:
        assert f"self.{attribute}" in source
    assert (
        "current_platform.get_punica_wrapper()"
        in (engine_sources.root("vllm") / "vllm/lora/punica_wrapper/punica_selector.py").read_text()
    )
    platform = "CudaPlatformBase.get_punica_wrapper"
    assert engine_sources.parameters("vllm", "vllm/platforms/cuda.py", platform) == "cls"


@pytest.fixture(params=["cuda", "cpu"])
def platform(request, monkeypatch):
    """A stand-in for one of vLLM's platforms, at its address."""

    class Platform:
        @classmethod
        def get_punica_wrapper(cls):
            return "vllm.its.own"

        @classmethod
        def is_cpu(cls):
            return request.param == "cpu"

        @classmethod
        def check_and_update_config(cls, config):
            config.compiles = config.lora_config is None

    def pack(*arguments, **named):
        raise AssertionError("vLLM packs and chooses nothing in these tests")

    name = "CpuPlatform" if request.param == "cpu" else "CudaPlatformBase"
    experts = "vllm.model_executor.layers.fused_moe"
    for module, contents in {
        "vllm": {},
        "vllm.platforms": {"current_platform": Platform},
        f"vllm.platforms.{request.param}": {name: Platform},
        "vllm.config": {"get_current_vllm_config_or_none": lambda: None},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.utils": {"dispatch_cpu_unquantized_gemm": pack},
        experts: {},
        f"{experts}.unquantized_fused_moe_method": {"select_unquantized_moe_backend": pack},
        f"{experts}.oracle": {},
        f"{experts}.oracle.unquantized": {"UnquantizedMoeBackend": None},
    }.items():
        monkeypatch.setitem(sys.modules, module, type(sys)(module))
        vars(sys.modules[module]).update(contents)
    packing = sys.modules["vllm.model_executor.layers.utils"]
    sys.modules["vllm.model_executor.layers"].utils = packing
    method = "unquantized_fused_moe_method"
    setattr(sys.modules[experts], method, sys.modules[f"{experts}.{method}"])
    return Platform


def wrapped_on_a_cpu():
    layers = sys.modules["vllm.model_executor.layers"]
    method = sys.modules[f"{layers.__name__}.fused_moe"].unquantized_fused_moe_method
    return layers.utils.dispatch_cpu_unquantized_gemm, method.select_unquantized_moe_backend


@pytest.mark.parametrize("plugins", [None, "", "other", "lora_kernels_2,other"])
def test_installed_it_does_nothing(plugins, platform, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    plugin.register()
    assert platform.get_punica_wrapper() == "vllm.its.own"
    assert not any(hasattr(function, "__wrapped__") for function in wrapped_on_a_cpu())


@pytest.mark.parametrize("plugins", ["lora_kernels", "other,lora_kernels"])
def test_asked_for_by_name_it_is_used(plugins, platform, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    plugin.register()
    plugin.register()
    assert platform.get_punica_wrapper() == "lora_kernels.integrations.vllm.PunicaWrapper"
    assert {hasattr(f, "__wrapped__") for f in wrapped_on_a_cpu()} == {platform.is_cpu()}
    config = SimpleNamespace(lora_config="adapters")
    platform.check_and_update_config(config)
    assert config.compiles == platform.is_cpu() and config.lora_config == "adapters"


def test_the_name_leads_to_our_class_on_vllms(monkeypatch):
    real = wrapper_of_source(monkeypatch)

    class LoRAModelManager(Manager):
        def _set_adapter_mapping(self, mapping):
            pass

    monkeypatch.setattr(plugin, "_on_cpu", lambda: False)
    module = type(sys)("vllm.lora.model_manager")
    module.LoRAModelManager = LoRAModelManager
    monkeypatch.setitem(sys.modules, module.__name__, module)
    cls = plugin.PunicaWrapper
    assert issubclass(cls, real) and issubclass(cls, plugin.SegmentedPunicaWrapper)
    assert f"{cls.__module__}.{cls.__name__}" == plugin.WRAPPER
    wrapper = make_wrapper(real, max_tokens=4, max_loras=1, max_rank=8)
    manager = LoRAModelManager(wrapper, [1], {1: 2})
    manager._set_adapter_mapping(None)
    assert wrapper.manager() is manager


def test_entry_points():
    tomllib = pytest.importorskip("tomllib")
    path = Path(__file__).parents[2] / "pyproject.toml"
    declared = tomllib.loads(path.read_text())["project"]["entry-points"]
    for group in ("vllm.general_plugins", "sglang.srt.plugins"):
        ((name, value),) = declared[group].items()
        assert name == "lora_kernels"
        entry = importlib.metadata.EntryPoint(name, value, group)
        assert inspect.isfunction(entry.load())


def test_neither_engine_is_imported_by_the_package():
    code = (
        "import sys, lora_kernels, lora_kernels.integrations.vllm as v, "
        "lora_kernels.integrations.sglang; v.register(); "
        "assert not {'vllm', 'sglang'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
