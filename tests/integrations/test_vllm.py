"""The vLLM plug-in: its wrapper in vLLM's layouts against float64."""

import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from vllm_stand_ins import (
    LoRAMapping,
    Manager,
    Model,
    StandInWrapper,
    make_wrapper,
    served,
    wrapper_of_source,
)

import lora_kernels as lk
from lora_kernels.testing.linear import assert_within_budget, poisoned_memory

NAN = float("nan")
IDS = [7, None, 3, 9, 12]
RANKS = {7: 8, 3: 16, 9: 3, 12: 5}
MAX_RANK, TOKENS = 16, 96
# ids of 13 prompts, of which the last slot's is one
PROMPTS = [7, 0, 3, 12, 9, 9, 0, 7, 12, 3, 3, 0, 12]
LENGTHS = [1, 3, 17, 2, 1, 9, 4, 1, 1, 11, 2, 6, 5]


@pytest.fixture(params=["stand-in", "source"])
def base(request, monkeypatch):
    """What stands below our wrapper: vLLM's own class, or a stand-in where its source is not."""
    return StandInWrapper if request.param == "stand-in" else wrapper_of_source(monkeypatch)


def batch(phase):
    prompts = tuple(PROMPTS)
    if phase == "decode":
        return LoRAMapping(prompts, prompts)
    rows = tuple(i for i, n in zip(PROMPTS, LENGTHS, strict=True) for _ in range(n))
    return LoRAMapping(rows, prompts, is_prefill=True)


class Stacks:
    """A and B in vLLM's layout, and what they should compute. Nothing but live values is finite:
    slots without an adapter, and the padding beyond a rank."""

    def __init__(self, k, widths, dtype, padding=NAN):
        self.a = [torch.full((len(IDS), 1, MAX_RANK, k), NAN) for _ in widths]
        self.b = [torch.full((len(IDS), 1, n, MAX_RANK), NAN) for n in widths]
        for slot, lora_id in enumerate(IDS):
            if lora_id is None:
                continue
            rank = RANKS[lora_id]
            for a, b in zip(self.a, self.b, strict=True):
                a[slot, 0], b[slot, 0] = padding, padding
                a[slot, 0, :rank] = torch.randn(rank, k) / k**0.5
                b[slot, 0, :, :rank] = torch.randn(b.shape[2], rank) / rank**0.5
        self.a = tuple(t.to(dtype) for t in self.a)
        self.b = tuple(t.to(dtype) for t in self.b)

    def naive(self, x, y, ids, dtype, scale=1.0, first=0, write=False):
        x, y = x.to(dtype), y.to(dtype).clone()
        for lora_id in set(ids) - {0}:
            rows = torch.tensor([row for row, other in enumerate(ids) if other == lora_id])
            slot, rank, column = IDS.index(lora_id), RANKS[lora_id], first
            for a, b in zip(self.a, self.b, strict=True):
                columns = slice(column, column + b.shape[2])
                tail = scale * (x[rows] @ a[slot, 0, :rank].to(dtype).t())
                delta = tail @ b[slot, 0, :, :rank].to(dtype).t()
                y[rows, columns] = delta if write else y[rows, columns] + delta
                column = columns.stop
        return y

    def check(self, name, result, x, y, ids, **options):
        eager = self.naive(x, y, ids, x.dtype, **options)
        exact = self.naive(x, y, ids, torch.float64, **options)
        assert_within_budget(name, result, eager, exact)
        assert not torch.equal(result, y)
        bare = [row for row in range(len(y)) if row >= len(ids) or ids[row] == 0]
        assert torch.equal(result[bare], y[bare]), "a row without an adapter was written"


def managed(base, **changes):
    wrapper = make_wrapper(
        base, max_tokens=TOKENS, max_loras=len(IDS), max_rank=changes.pop("max_rank", MAX_RANK)
    )
    return wrapper, Manager(wrapper, list(IDS), RANKS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("add_inputs", [True, False])
@pytest.mark.parametrize("widths", [(70,), (40, 24, 24), (33, 33)])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_linear(phase, widths, add_inputs, dtype, base):
    wrapper, manager = managed(base)
    stacks = Stacks(65, widths, dtype)
    mapping = batch(phase)
    manager._set_adapter_mapping(mapping)
    # More rows than the batch has: what a captured graph of the next size computes.
    rows = len(mapping.index_mapping) + 3
    x, y = torch.randn(rows, 65).to(dtype), torch.randn(rows, sum(widths)).to(dtype)
    result = y.clone()
    with poisoned_memory(), lk.record_plans() as answers:
        wrapper.add_lora_linear(result, x, stacks.a, stacks.b, 1.0, widths, add_inputs=add_inputs)
    served(answers, "segmented_lora_")
    stacks.check("linear", result, x, y, mapping.index_mapping, write=not add_inputs)


def test_a_scale_that_is_not_merged(base):
    wrapper, manager = managed(base)
    stacks, mapping = Stacks(40, (30,), torch.bfloat16), batch("decode")
    manager._set_adapter_mapping(mapping)
    x, y = torch.randn(13, 40).bfloat16(), torch.randn(13, 30).bfloat16()
    result = y.clone()
    wrapper.add_lora_linear(result, x, stacks.a, stacks.b, 0.25, (30,))
    stacks.check("scaled", result, x, y, mapping.index_mapping, scale=0.25)


def test_one_wrapper_for_changing_batches(base):
    """As captured graphs replay it: the addresses stay, what they hold follows each batch."""
    wrapper, manager = managed(base)
    stacks, x = Stacks(40, (30, 20), torch.bfloat16), torch.randn(13, 40).bfloat16()
    y = torch.randn(13, 50).bfloat16()
    tables = [t for seg in (wrapper._tokens, wrapper._prompts) for t in seg.tensors()]
    addresses = [t.data_ptr() for t in tables]
    # What a graph has captured: these operators on these tensors.
    table, idle = wrapper._tokens.tensors(), wrapper._tokens_idle
    for ids in (PROMPTS, PROMPTS[::-1], [12] * 13, [0] * 12 + [12], [3] * 4, PROMPTS):
        manager._set_adapter_mapping(LoRAMapping(tuple(ids), tuple(ids)))
        result = y.clone()
        torch.ops.lora_kernels.vllm_lora_(result, x, stacks.a, stacks.b, table, idle, 1.0, True)
        stacks.check(f"{ids}", result, x, y, ids)
    tables = [t for seg in (wrapper._tokens, wrapper._prompts) for t in seg.tensors()]
    assert addresses == [t.data_ptr() for t in tables]


def test_a_slot_gets_another_adapter(base):
    wrapper, manager = managed(base)
    mapping = batch("decode")
    manager._set_adapter_mapping(mapping)
    assert wrapper._tokens.rank_of_slot.tolist() == [8, 16, 16, 3, 5]
    manager.models[9], manager.lora_index_to_id[1] = Model(11), 44
    manager.models[44] = Model(2)
    manager._set_adapter_mapping(mapping)
    assert wrapper._tokens.rank_of_slot.tolist() == [8, 2, 16, 11, 5]
    assert wrapper._prompts.rank_of_slot.tolist() == [8, 2, 16, 11, 5]


def test_experts_may_have_a_larger_rank(base):
    wrapper, manager = managed(base)
    manager.models[9] = Model(3, experts=13)
    manager._set_adapter_mapping(batch("decode"))
    assert wrapper._tokens.rank_of_slot.tolist() == [8, 16, 16, 13, 5]


def test_what_vllm_leaves_out_of_an_adapter_is_logged_once(base, caplog):
    caplog.set_level(logging.INFO, "vllm.lora_kernels")
    _, manager = managed(base)
    manager.activate_adapter(9)
    assert not caplog.records
    for lora_id in (7, 3, 3):
        manager.models[lora_id].loras |= {"mlp.experts": None, "z": None} if lora_id == 3 else {}
        manager.activate_adapter(lora_id)
    (record,) = caplog.records
    assert "adapter 3 has 2 layers" in record.getMessage() and "mlp.experts" in record.getMessage()


def test_without_an_adapter_of_the_head_logits_cost_nothing(base):
    wrapper, manager = managed(base)
    stacks = Stacks(40, (30,), torch.bfloat16)
    manager.models |= {9: Model(3, head=0), 7: Model(8, head=0)}
    x, y = torch.randn(13, 40).bfloat16(), torch.randn(13, 30).bfloat16()
    manager._set_adapter_mapping(batch("decode"))
    assert wrapper._tokens.rank_of_slot.tolist() == [8, 16, 16, 3, 5]
    assert wrapper._prompts.rank_of_slot.tolist() == [0, 16, 16, 0, 5]
    result = y.clone()
    wrapper.add_lora_logits(result, x, stacks.a[0], stacks.b[0], 1.0)
    stacks.check("some", result, x, y, [0 if i in (7, 9) else i for i in PROMPTS])
    manager._set_adapter_mapping(LoRAMapping((7, 9, 0) * 4, (7, 9, 0) * 4))
    with lk.record_plans() as answers:
        wrapper.add_lora_logits(result, x, stacks.a[0], stacks.b[0], 1.0)
    assert answers == []


def test_an_adapter_replaced_in_place_has_its_own_rank_in_the_same_batch(base):
    """vLLM tells its wrapper of a batch that it has told of before only if slots have changed."""
    wrapper, manager = managed(base)
    mapping = batch("decode")
    manager.set_adapter_mapping(mapping)
    manager.models[9] = Model(11)
    manager.activate_adapter(9)
    manager.set_adapter_mapping(mapping)
    assert wrapper._tokens.rank_of_slot.tolist() == [8, 16, 16, 11, 5]


def test_without_a_manager_every_rank_is_the_largest(base):
    wrapper, _ = managed(base)
    stacks, mapping = Stacks(40, (30,), torch.bfloat16, padding=0.0), batch("decode")
    wrapper.update_metadata(mapping, IDS, len(IDS) + 1, 32000)
    assert wrapper._tokens.rank_of_slot.tolist() == [MAX_RANK] * len(IDS)
    x, y = torch.randn(13, 40).bfloat16(), torch.randn(13, 30).bfloat16()
    result = y.clone()
    wrapper.add_lora_linear(result, x, stacks.a, stacks.b, 1.0, (30,))
    stacks.check("no manager", result, x, y, mapping.index_mapping)


def test_a_default_device_moves_nothing():
    """vLLM makes a model's parts under its device."""
    with torch.device("meta"):
        wrapper, manager = managed(StandInWrapper)
        manager._set_adapter_mapping(batch("decode"))
    assert wrapper._tokens_idle.tolist() == wrapper._prompts_idle.tolist() == [False]
    assert wrapper._tokens.rank_of_slot.tolist() == [8, 16, 16, 3, 5]
    assert wrapper._tokens.slot_of_row[:3].tolist() == [0, -1, 2]


@pytest.mark.parametrize("kind", ["dense", "experts", "classifier", "unknown"])
def test_vllms_own_metadata_only_where_its_kernels_run(kind):
    wrapper, manager = managed(StandInWrapper)
    manager._is_moe = kind == "experts"
    manager._classification_head = ("score", None) if kind == "classifier" else None
    if kind == "unknown":
        wrapper.update_metadata(batch("decode"), IDS, len(IDS) + 1, 32000)
    else:
        manager._set_adapter_mapping(batch("decode"))
    assert wrapper.inherited == (kind != "dense")


def test_metadata_of_vllms_own_experts(monkeypatch):
    wrapper, manager = managed(wrapper_of_source(monkeypatch))
    manager._is_moe = True
    manager._set_adapter_mapping(batch("decode"))
    slots = [IDS.index(i) if i else -1 for i in PROMPTS]
    assert wrapper.token_mapping_meta.token_lora_mapping[:13].tolist() == slots
    assert wrapper.token_mapping_meta.active_lora_ids.tolist() == [-1, 0, 2, 3, 4, -1]


def test_a_batch_without_adapters_costs_no_launch(base):
    wrapper, manager = managed(base)
    stacks = Stacks(40, (30,), torch.bfloat16)
    manager._set_adapter_mapping(LoRAMapping((0,) * 9, (0,) * 9))
    x, y = torch.randn(9, 40).bfloat16(), torch.randn(9, 30).bfloat16()
    result, s = y.clone(), torch.ones(1, 9, MAX_RANK)
    with lk.record_plans() as answers:
        wrapper.add_lora_linear(result, x, stacks.a, stacks.b, 1.0, (30,))
        wrapper.add_shrink(s, x, stacks.a, 1.0)
        wrapper.add_expand(result, s, stacks.b, (30,))
        wrapper.add_lora_logits(result, x, stacks.a[0], stacks.b[0], 1.0)
        wrapper.add_lora_embedding(result, s[0], stacks.b[0])
    assert answers == [] and torch.equal(result, y)


@pytest.mark.parametrize("shards", [1, 4])
def test_ranks_and_columns_sharded_over_devices(shards, base):
    """Fully sharded: each device shrinks by its part of the rank (column-parallel), or expands into
    its part of the columns (row-parallel)."""
    wrapper, manager = managed(base)
    stacks, mapping = Stacks(65, (40, 24), torch.bfloat16, padding=0.0), batch("prefill")
    manager._set_adapter_mapping(mapping)
    rows = len(mapping.index_mapping)
    x, y = torch.randn(rows, 65).bfloat16(), torch.randn(rows, 70).bfloat16()
    parts = []
    for shard in range(shards):
        own = [a.chunk(shards, dim=2)[shard].contiguous() for a in stacks.a]
        parts.append(torch.full((2, rows, MAX_RANK // shards), NAN))
        with lk.record_plans() as answers:
            wrapper.add_shrink(parts[-1], x, tuple(own), 1.0)
        served(answers, "segmented_shrink")
    result, s = y.clone(), torch.cat(parts, dim=2)
    bare = [row for row, i in enumerate(mapping.index_mapping) if i == 0]
    assert not s[:, bare].any()
    with lk.record_plans() as answers:
        wrapper.add_expand(result, s, stacks.b, (40, 24), offset_start=6, add_input=True)
    served(answers, "segmented_expand_")
    assert torch.equal(result[:, :6], y[:, :6])
    stacks.check("sharded", result, x, y, mapping.index_mapping, first=6)


def test_a_full_head_is_shrunk_by_whatever_the_ranks_are(base):
    """As vLLM's token classification: weights of 20 labels in the place of A."""
    wrapper, manager = managed(base)
    mapping = batch("prefill")
    manager._set_adapter_mapping(mapping)
    rows = len(mapping.index_mapping)
    heads, x = torch.randn(len(IDS), 1, 20, 65).bfloat16(), torch.randn(rows, 65).bfloat16()
    result = torch.full((1, rows, 20), NAN)
    wrapper.add_shrink(result, x, (heads,), 1.0)
    for row, lora_id in enumerate(mapping.index_mapping):
        expected = torch.zeros(20, dtype=torch.float64)
        if lora_id:
            expected = heads[IDS.index(lora_id), 0].double() @ x[row].double()
        torch.testing.assert_close(result[0, row].double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_follow_the_prompts(dtype, base):
    """Wider than B by the vocabulary's padding, and float32 over a bfloat16 model."""
    wrapper, manager = managed(base)
    stacks = Stacks(65, (100,), torch.bfloat16)
    manager._set_adapter_mapping(batch("prefill"))
    x, y = torch.randn(13, 65).bfloat16(), torch.randn(13, 112).to(dtype)
    result = y.clone()
    with lk.record_plans() as answers:
        wrapper.add_lora_logits(result, x, stacks.a[0], stacks.b[0], 1.0)
    served(answers, "segmented_lora_")
    stacks.check("logits", result, x.to(dtype), y, PROMPTS)
    assert torch.equal(result[:, 100:], y[:, 100:])


def test_embeddings(base):
    wrapper, manager = managed(base)
    mapping = batch("prefill")
    manager._set_adapter_mapping(mapping)
    stacks, rows = Stacks(50, (48,), torch.bfloat16), len(mapping.index_mapping)
    ids = torch.randint(50, (rows,))
    one_hot = torch.nn.functional.one_hot(ids, 50).bfloat16()
    slots = torch.tensor([IDS.index(i) if i else 0 for i in mapping.index_mapping])
    found = stacks.a[0][slots, 0, :, ids]
    y = torch.randn(rows, 48).bfloat16()
    result = y.clone()
    with lk.record_plans() as answers:
        wrapper.add_lora_embedding(result, found, stacks.b[0], add_input=True)
    served(answers, "segmented_expand_")
    stacks.check("embedding", result, one_hot, y, mapping.index_mapping)


def test_operators_are_opaque_and_declare_what_they_write(base):
    wrapper, manager = managed(base)
    manager._set_adapter_mapping(batch("decode"))
    stacks = Stacks(40, (30, 20), torch.float32, padding=0.0)
    x, y, s = torch.randn(13, 40), torch.randn(13, 50), torch.randn(2, 13, MAX_RANK)
    table, idle, library = wrapper._tokens.tensors(), wrapper._tokens_idle, torch.ops.lora_kernels
    for op, arguments in (
        (library.vllm_lora_, (y, x, stacks.a, stacks.b, table, idle, 1.0, True)),
        (library.vllm_shrink_, (s, x, stacks.a, table, idle, 1.0, MAX_RANK)),
        (library.vllm_expand_, (y, s, stacks.b, table, idle, 0, False)),
    ):
        torch.library.opcheck(op.default, arguments)


def test_compiled_once_for_all_batches():
    """vLLM traces a model once, whatever the wrapper holds then."""
    torch.compiler.reset()
    wrapper, manager = managed(StandInWrapper)
    stacks = Stacks(40, (30, 20), torch.float32)
    counter = CompileCounter()

    def step(x, y):
        wrapper.add_lora_linear(y, x, stacks.a, stacks.b, 1.0, (30, 20))
        return y * 1

    manager._set_adapter_mapping(LoRAMapping((0,) * 9, (0,) * 9))
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for ids in ([0] * 9, PROMPTS, [3] * 40):
        manager._set_adapter_mapping(LoRAMapping(tuple(ids), tuple(ids)))
        x, y = torch.randn(len(ids), 40), torch.randn(len(ids), 50)
        result = compiled(x, y.clone())
        if any(ids):
            stacks.check("compiled", result, x, y, ids)
        else:
            assert torch.equal(result, y)
    assert counter.frame_count == 1
