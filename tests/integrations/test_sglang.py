"""The SGLang plug-in: its backend in SGLang's layouts against float64, the signatures and the calls
of SGLang's source, and its registration."""

import ast
import inspect
import sys
from types import ModuleType, SimpleNamespace

import engine_sources
import pytest
import torch
from sglang_stand_ins import (
    UTILS,
    Kind,
    StandInBackend,
    backend_of_source,
    forward_batch,
    make_backend,
    stand_in_backend,
)

import lora_kernels as lk
from lora_kernels.integrations import sglang as plugin
from lora_kernels.planning.device import facts
from lora_kernels.testing.linear import assert_within_budget, poisoned_memory

NAN = float("nan")
# Slot 1 is that of the base model, slot 4 is loaded and in no batch but those that name it.
RANKS, SCALES, MAX_RANK = [8, 0, 16, 5, 32], [2.0, 0.0, 0.5, 1.5, 0.75], 32
SLOTS = [0, 1, 2, 4, 3, 3, 1, 0, 4, 2]
LENGTHS = [3, 17, 1, 2, 33, 1, 4, 9, 6, 1]


@pytest.fixture(params=["stand-in", "source"])
def base(request, monkeypatch):
    """What stands below our backend: SGLang's own class, or a stand-in where its source is not."""
    own = backend_of_source if request.param == "source" else stand_in_backend
    return own(monkeypatch)


def served(answers, *operators):
    """Our kernels answered, each of these operators once."""
    backend = "cpu" if facts("cpu").native not in ("", "baseline") else "reference"
    assert [(a.op, a.backend) for a in answers] == [(op, backend) for op in operators]


class Stacks:
    """A and B in SGLang's layout, and what they should compute. Only live values are finite: what
    lies beyond them belonged to an adapter that is gone."""

    def __init__(self, k, widths, dtype=torch.bfloat16):
        self.widths, n = widths, len(widths)
        self.offsets = tuple(sum(widths[:j]) for j in range(n + 1))
        self.a = torch.full((len(RANKS), n * MAX_RANK, k), NAN)
        self.b = torch.full((len(RANKS), sum(widths), MAX_RANK), NAN)
        for slot, rank in enumerate(RANKS):
            self.a[slot, : n * rank] = torch.randn(n * rank, k) / k**0.5
            if rank:
                self.b[slot, :, :rank] = torch.randn(sum(widths), rank) / rank**0.5
        self.a, self.b = self.a.to(dtype), self.b.to(dtype)

    def naive(self, x, y, slots, dtype):
        x, y = x.to(dtype), y.to(dtype).clone()
        for slot in {s for s in slots if RANKS[s]}:
            rows = torch.tensor([row for row, other in enumerate(slots) if other == slot])
            rank = RANKS[slot]
            for j, first in enumerate(self.offsets[:-1]):
                a = self.a[slot, j * rank : (j + 1) * rank].to(dtype)
                columns = slice(first, self.offsets[j + 1])
                s = SCALES[slot] * (x[rows] @ a.t())
                y[rows, columns] += s @ self.b[slot, columns, :rank].to(dtype).t()
        return y

    def check(self, name, result, x, y, slots):
        eager, exact = (self.naive(x, y, slots, d) for d in (x.dtype, torch.float64))
        assert_within_budget(name, result, eager, exact)
        assert not torch.equal(result, y)
        bare = [row for row in range(len(y)) if row >= len(slots) or not RANKS[slots[row]]]
        assert torch.equal(result[bare], y[bare]), "a row of the base model was written"


def rows_of(slots, lengths):
    return [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]


def prepared(base, phase="extend", slots=SLOTS, lengths=LENGTHS, graph=False):
    """A backend with a batch, and the slot of each of its rows."""
    backend = make_backend(base, len(RANKS))
    if phase != "extend":
        lengths = [4 if phase == "verify" else 1] * len(slots)
    if graph and phase == "extend":
        backend.init_prefill_cuda_graph_batch_info(128, 16)
    elif graph:
        backend.init_decode_cuda_graph_batch_info(16, lengths[0])
    batch = forward_batch(phase, lengths)
    prefill = graph and phase == "extend"
    backend.prepare_lora_batch(
        batch, slots, RANKS, SCALES, graph and not prefill, use_prefill_cuda_graph=prefill
    )
    return backend, rows_of(slots, lengths)


def run(backend, stacks, x, y, **options):
    layer = SimpleNamespace(vocab_size=0, apply_lora=None)
    offset = torch.tensor(stacks.offsets)
    return backend.forward_with_base(
        layer, x, lambda: y, stacks.a, stacks.b, offset, stacks.offsets, **options
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(70,), (40, 24, 24), (33, 33)])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("phase", ["extend", "decode", "verify"])
def test_base_and_adapter(phase, graph, widths, dtype, base):
    backend, slots = prepared(base, phase, graph=graph)
    # More rows than the batch has, as in a captured graph; more columns than the adapter, as of a
    # projection that is adapted in part.
    rows, stacks = len(slots) + 3 * graph, Stacks(65, widths, dtype)
    x, y = torch.randn(rows, 65).to(dtype), torch.randn(rows, sum(widths) + 7).to(dtype)
    output = y.clone()
    with poisoned_memory(), lk.record_plans() as answers:
        result = run(backend, stacks, x, output)
    served(answers, "segmented_lora_")
    assert result is output, "added in place"
    stacks.check(phase, result, x, y, slots)


def test_one_sum_over_devices(base):
    """Row-parallel: each device holds a part of K, and base and adapter are summed together."""
    backend, slots = prepared(base)
    stacks, x = Stacks(64, (48,), torch.float32), torch.randn(len(slots), 64)
    y, sums = torch.randn(len(slots), 48), []
    for half in (slice(0, 32), slice(32, 64)):
        part = Stacks(64, (48,), torch.float32)
        part.a, part.b = stacks.a[:, :, half].contiguous(), stacks.b
        run(backend, part, x[:, half], y.clone(), all_reduce=lambda t: sums.append(t) or t)
    stacks.check("row-parallel", sums[0] + sums[1] - y, x, y, slots)


def test_one_backend_for_changing_batches(base):
    """As captured graphs replay it: the addresses stay, what they hold follows each batch."""
    stacks = Stacks(40, (30, 20))
    backend = make_backend(base, len(RANKS))
    backend.init_decode_cuda_graph_batch_info(16, 1)
    captured = backend.decode_cuda_graph_batch_info
    table = captured.table.tensors()
    held = [*table, captured.seg_indptr, captured.weight_indices]
    addresses = [t.data_ptr() for t in held]
    x, y = torch.randn(16, 40).bfloat16(), torch.randn(16, 50).bfloat16()
    for slots in (SLOTS, [4] * 16, [1] * 15 + [4], [3], [2, 1, 0], SLOTS[::-1]):
        batch = forward_batch("decode", [1] * len(slots))
        backend.prepare_lora_batch(batch, slots, RANKS, SCALES, True)
        assert backend.batch_info is captured
        result = y.clone()
        torch.ops.lora_kernels.segmented_lora_(
            result, x, [stacks.a], list(stacks.b.split([30, 20], 1)), table, 2
        )
        stacks.check(f"{slots}", result, x, y, slots)
    held = [*captured.table.tensors(), captured.seg_indptr, captured.weight_indices]
    assert addresses == [t.data_ptr() for t in held]


def test_eager_batches_of_any_size_share_a_table(base):
    stacks, backend = Stacks(40, (30,)), make_backend(base, len(RANKS))
    for lengths in ([1, 2], [40, 1, 3, 50], [1], [5, 5, 5], [200]):
        slots = [(4, 1, 2, 0)[i % 4] for i in range(len(lengths))]
        batch = forward_batch("extend", lengths)
        backend.prepare_lora_batch(batch, slots, RANKS, SCALES, False)
        rows = rows_of(slots, lengths)
        x, y = torch.randn(len(rows), 40).bfloat16(), torch.randn(len(rows), 30).bfloat16()
        stacks.check(f"{lengths}", run(backend, stacks, x, y.clone()), x, y, rows)
        info = backend.batch_info
        assert (info.bs, info.num_segments, info.max_len) == (len(slots), len(slots), max(lengths))
        assert info.has_active_lora and info.expected_tokens == len(rows)


def test_a_default_device_moves_nothing():
    with torch.device("meta"):
        backend = make_backend(StandInBackend, len(RANKS))
        batch = forward_batch("extend", [2, 1])
        backend.prepare_lora_batch(batch, [4, 0], RANKS, SCALES, False)
    assert backend.batch_info.table.slot_of_row[:3].tolist() == [4, 4, 0]
    assert backend.batch_info.lora_ranks.tolist() == RANKS


def test_a_batch_of_the_base_model(base):
    backend, slots = prepared(base, "decode", slots=[1] * 5)
    assert not backend.batch_info.has_active_lora
    y = torch.randn(5, 30).bfloat16()
    result = run(backend, Stacks(40, (30,)), torch.randn(5, 40).bfloat16(), y.clone())
    assert torch.equal(result, y)


def test_halves(base):
    """Shrink without the scale, expand with it; n slices packed by live rank stay packed."""
    backend, slots = prepared(base)
    stacks, x = Stacks(65, (48,)), torch.randn(len(slots), 65).bfloat16()
    y = torch.randn(len(slots), 48).bfloat16()
    with lk.record_plans() as answers:
        s = backend.run_lora_a_sgemm(x, stacks.a)
        result = backend.run_lora_b_sgemm(s, stacks.b, base_output=y.clone())
        alone = backend.run_lora_b_sgemm(s, stacks.b)
    served(answers, "segmented_shrink", "segmented_expand_", "segmented_expand_")
    stacks.check("halves", result, x, y, slots)
    stacks.check("alone", alone, x, torch.zeros_like(y), slots)
    three = Stacks(65, (16, 16, 16))
    s = backend.run_lora_a_sgemm(x, three.a, stack_num=3)
    assert s.shape == (len(slots), 3 * MAX_RANK)
    for row, slot in enumerate(slots):
        live = 3 * RANKS[slot]
        exact = x[row].double() @ three.a[slot, :live].double().t()
        torch.testing.assert_close(s[row, :live].double(), exact, rtol=1e-2, atol=1e-2)
        assert not s[row, live:].any()


def test_slices_that_are_run_alone(base):
    backend, slots = prepared(base)
    for widths in ((40, 24, 24), (33, 33)):
        stacks, x = Stacks(65, widths), torch.randn(len(slots), 65).bfloat16()
        y = torch.randn(len(slots), sum(widths)).bfloat16()
        offset = torch.tensor(stacks.offsets, dtype=torch.int32)
        with lk.record_plans() as answers:
            result = backend.run_qkv_lora(
                x=x,
                qkv_lora_a=stacks.a,
                qkv_lora_b=stacks.b,
                output_offset=offset.to("meta"),
                output_offset_cpu=offset,
                max_qkv_out_dim=max(widths),
                base_output=y.clone(),
                n_slices=len(widths),
            )
        served(answers, "segmented_lora_")
        stacks.check("qkv", result, x, y, slots)
    result = backend.run_gate_up_lora(x=x, gate_up_lora_a=stacks.a, gate_up_lora_b=stacks.b)
    stacks.check("gate and up", result, x, torch.zeros_like(y), slots)


@pytest.mark.parametrize("extra", [0, 3])
def test_embeddings(extra, base):
    backend, slots = prepared(base)
    vocab, rows = 50, len(slots)
    stacks = Stacks(vocab + extra, (48,))
    ids = torch.randint(vocab + extra, (rows,))
    ids[:4] = torch.tensor([0, vocab - 1, vocab + extra - 1, vocab + extra - 1])
    one_hot = torch.nn.functional.one_hot(ids, vocab + extra).bfloat16()
    added = None
    if extra:
        added = stacks.a[:, :, vocab:].transpose(1, 2).contiguous()
    layer = SimpleNamespace(vocab_size=vocab, new_embeddings_buffer=added)
    y = torch.randn(rows, 48).bfloat16()
    a = stacks.a[:, :, :vocab].contiguous()
    with lk.record_plans() as answers:
        result = backend.forward_with_base(
            layer, ids, y.clone, a, stacks.b, None, (0, 48), kind=Kind.EMBEDDING
        )
    served(answers, "segmented_expand_")
    stacks.check("embedding", result, one_hot, y, slots)
    s = backend.run_lora_a_embedding(ids, a, vocab, added)
    for row, slot in enumerate(slots):
        assert s[row, : RANKS[slot]].any() == (RANKS[slot] > 0)
        assert not s[row, RANKS[slot] :].any()
    if not extra:
        beyond = backend.run_lora_a_embedding(torch.full((rows,), vocab), a, vocab)
        assert not beyond.any()


def test_the_heads_rows_are_fewer(base):
    backend = make_backend(base, len(RANKS))
    backend.validate_lora_targets(None, {"lm_head", "qkv_proj"})
    backend.prepare_lora_batch(forward_batch("extend", LENGTHS), SLOTS, RANKS, SCALES, False)
    info = backend.lm_head_batch_info
    assert info.expected_tokens == len(SLOTS) and not info.use_cuda_graph
    stacks, x = Stacks(65, (90,)), torch.randn(len(SLOTS), 65).bfloat16()
    y = torch.randn(len(SLOTS), 90).bfloat16()
    result = run(backend, stacks, x, y.clone(), kind=Kind.LM_HEAD, pruned_batch_info=info)
    stacks.check("lm_head", result, x, y, SLOTS)
    backend.prepare_lora_batch(forward_batch("decode", [1] * 3), [0, 1, 4], RANKS, SCALES, False)
    assert backend.lm_head_batch_info is None


def test_log_probabilities_in_passes(monkeypatch):
    """Of SGLang's own segments: 4 rows a pass."""
    backend = make_backend(backend_of_source(monkeypatch, chunk=4), len(RANKS))
    backend.validate_lora_targets(None, {"lm_head"})
    batch = forward_batch("extend", LENGTHS, starts=[max(n - 2, 0) for n in LENGTHS])
    backend.prepare_lora_batch(batch, SLOTS, RANKS, SCALES, False)
    kept = [min(n, 2) for n in LENGTHS]
    slots, stacks = rows_of(SLOTS, kept), Stacks(65, (30,))
    passes = backend.lm_head_pass_batch_infos
    assert backend.lm_head_batch_info.expected_tokens == len(slots)
    assert [p.expected_tokens for p in passes] == [4] * (len(slots) // 4) + [len(slots) % 4] * (
        len(slots) % 4 > 0
    )
    for number, info in enumerate(passes):
        own = slots[4 * number : 4 * number + 4]
        x, y = torch.randn(len(own), 65).bfloat16(), torch.randn(len(own), 30).bfloat16()
        result = run(backend, stacks, x, y.clone(), kind=Kind.LM_HEAD, pruned_batch_info=info)
        if any(RANKS[slot] for slot in own):
            stacks.check(f"pass {number}", result, x, y, own)


def test_explicit_segments(base):
    backend = make_backend(base, len(RANKS))
    backend.prepare_lora_token_segments(
        segment_lens=LENGTHS, weight_indices=SLOTS, lora_ranks=RANKS, scalings=SCALES
    )
    slots, stacks = rows_of(SLOTS, LENGTHS), Stacks(65, (30,))
    x, y = torch.randn(len(slots), 65).bfloat16(), torch.randn(len(slots), 30).bfloat16()
    stacks.check("segments", run(backend, stacks, x, y.clone()), x, y, slots)


def test_wrong_calls(base):
    backend = make_backend(base, len(RANKS))
    decode = forward_batch("decode", [1] * 4)
    with pytest.raises(RuntimeError, match="decode graph was not allocated"):
        backend.prepare_lora_batch(decode, [0] * 4, RANKS, SCALES, True)
    backend.init_decode_cuda_graph_batch_info(3, 1)
    backend.init_prefill_cuda_graph_batch_info(8, 4)
    for message, arguments in (
        ("3 slots for 4 requests", (decode, [0] * 3, RANKS, SCALES, True)),
        ("4 requests of 4 rows", (decode, [0] * 4, RANKS, SCALES, True)),
        ("in a graph of 1 each", (forward_batch("verify", [2]), [0], RANKS, SCALES, True)),
        ("1 requests of 9 rows", (forward_batch("extend", [9]), [0], RANKS, SCALES, False, True)),
    ):
        with pytest.raises(ValueError, match=message):
            backend.prepare_lora_batch(*arguments)
    with pytest.raises(ValueError, match="kv_b_proj"):
        backend.validate_lora_targets(None, {"kv_b_proj", "q_b_proj"})
    backend, slots = prepared(base)
    x, y = torch.randn(len(slots), 40).bfloat16(), torch.randn(len(slots), 30).bfloat16()
    with pytest.raises(NotImplementedError, match="sink_down'"):
        run(backend, Stacks(40, (30,)), x, y, kind=Kind.SINK_DOWN)


def test_idle_forwards_have_no_batch(base):
    backend, _ = prepared(base)
    backend.reset_batch_state()
    assert backend.batch_info is None
    backend.prepare_lora_batch(forward_batch("idle", []), [], RANKS, SCALES, False)
    assert backend.batch_info.expected_tokens == 0


# The signatures of SGLang 0.5.23, where its source is not at hand.
BASE = "sglang/srt/lora/backend/base_backend.py"
SIGNATURES = {
    "validate_lora_targets": "self, base_model, target_modules",
    "init_decode_cuda_graph_batch_info": "self, max_bs_in_cuda_graph, num_tokens_per_req",
    "init_prefill_cuda_graph_batch_info": "self, max_num_tokens, max_num_requests=None",
    "prepare_lora_batch": (
        "self, forward_batch, weight_indices, lora_ranks, scalings, use_decode_cuda_graph, "
        "use_prefill_cuda_graph=False"
    ),
    "prepare_lora_token_segments": ("self, *, segment_lens, weight_indices, lora_ranks, scalings"),
    "forward_with_base": (
        "self, layer, x, base_fn, lora_a, lora_b, output_offset, offsets, *, all_reduce=None, "
        "kind='linear', pruned_batch_info=None"
    ),
    "run_lora_a_embedding": (
        "self, input_ids, weights, vocab_size, extra_embeddings=None, *args, **kwargs"
    ),
}
# Of these SGLang's backends extend the base's (x, weights, *args, **kwargs), each its own way.
EXTENDED = {
    "run_lora_a_sgemm": ("self, x, weights, pruned_batch_info=None, stack_num=1, *args, **kwargs"),
    "run_lora_b_sgemm": (
        "self, x, weights, base_output=None, pruned_batch_info=None, *args, **kwargs"
    ),
    "run_qkv_lora": (
        "self, x, qkv_lora_a, qkv_lora_b, output_offset, max_qkv_out_dim, base_output=None, "
        "n_slices=3, *args, **kwargs"
    ),
    "run_gate_up_lora": (
        "self, x, gate_up_lora_a, gate_up_lora_b, base_output=None, *args, **kwargs"
    ),
}


@pytest.mark.parametrize("name", [*SIGNATURES, *EXTENDED])
def test_our_signatures(name):
    ours = engine_sources.our_parameters(getattr(plugin.SegmentedBackend, name))
    expected = (SIGNATURES | EXTENDED)[name]
    # One argument that the layers pass by name is one of ours by name.
    assert ours.replace("output_offset_cpu=None, ", "") == expected


@pytest.mark.parametrize("name", SIGNATURES)
def test_their_signatures(name):
    theirs = engine_sources.parameters("sglang", BASE, f"BaseLoRABackend.{name}")
    assert theirs == SIGNATURES[name]


@pytest.mark.parametrize("name", EXTENDED)
def test_the_signatures_of_their_triton_backend(name):
    path = "sglang/srt/lora/backend/triton_backend.py"
    theirs = engine_sources.parameters("sglang", path, f"TritonLoRABackend.{name}")
    assert theirs == EXTENDED[name]


def test_every_method_of_the_base_is_ours_or_inherited():
    """Methods that a later release adds are noticed."""
    node = engine_sources.definition("sglang", BASE, "BaseLoRABackend")
    theirs = {f.name for f in node.body if isinstance(f, ast.FunctionDef)}
    inherited = {
        "reset_batch_state",
        "get_batch_info",
        "reset_routing_cache",
        "run_extra_token_embedding",
        "is_moe_lora",
        "init_cuda_graph_moe_buffers",
        "resize_cuda_graph_moe_buffers",
        "_add_moe_lora_info",
        # data parallel attention, which we do not claim to support
        "prepare_global_lora_batch",
        "init_dp_attention_cuda_graph_batch_info",
    }
    assert theirs == inherited | set(SIGNATURES) | set(EXTENDED) | {"__init__"}


def test_every_call_of_sglangs_layers_fits():
    seen = set()
    for where, method, count, keywords in engine_sources.calls(
        "sglang", "sglang/srt/lora", "lora_backend"
    ):
        function = vars(plugin.SegmentedBackend).get(method)
        if inspect.isfunction(function):
            engine_sources.assert_binds(function, count, keywords, where)
            seen.add(method)
    assert seen == set(SIGNATURES) | set(EXTENDED)


def test_what_sglang_reads_of_a_batch(monkeypatch):
    """Every field of its ``LoRABatchInfo`` is one of ours, but those that only its kernels read."""
    backend_of_source(monkeypatch)
    theirs = set(sys.modules[UTILS].LoRABatchInfo.__dataclass_fields__)
    ours = set(plugin.Batch.__dataclass_fields__) | {"lora_ranks", "scalings"}
    assert theirs - ours == {"seg_lens"}


def test_metadata_of_sglangs_own_experts(monkeypatch):
    base = backend_of_source(monkeypatch)
    backend = make_backend(base, len(RANKS))
    backend.is_moe_lora = True
    batch = forward_batch("extend", LENGTHS)
    backend.prepare_lora_batch(batch, SLOTS, RANKS, SCALES, False)
    slots = [slot if RANKS[slot] else -1 for slot in rows_of(SLOTS, LENGTHS)]
    assert backend.batch_info.moe_lora_info.token_lora_mapping.tolist() == slots


def test_registration(monkeypatch):
    """The registry of SGLang's source, or one like it, gets a name; nothing else changes."""
    name = "sglang.srt.lora.backend.lora_registry"
    registry = ModuleType(name)
    registry.LORA_SUPPORTED_BACKENDS = {"csgmv": None}

    def register_lora_backend(name):
        return lambda create: registry.LORA_SUPPORTED_BACKENDS.setdefault(name, create)

    registry.register_lora_backend = register_lora_backend
    base = ModuleType("sglang.srt.lora.backend.base_backend")
    base.BaseLoRABackend = StandInBackend
    for module in ("sglang", "sglang.srt", "sglang.srt.lora", "sglang.srt.lora.backend"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setitem(sys.modules, name, registry)
    monkeypatch.setitem(sys.modules, base.__name__, base)
    plugin.register()
    assert list(registry.LORA_SUPPORTED_BACKENDS) == ["csgmv", "lora_kernels"]
    cls = registry.LORA_SUPPORTED_BACKENDS["lora_kernels"]()
    assert issubclass(cls, StandInBackend) and cls.name == "lora_kernels"


def test_registration_at_sglangs_own_registry(monkeypatch):
    base = backend_of_source(monkeypatch)
    registry = engine_sources.load(
        monkeypatch, "sglang", "sglang.srt.lora.backend.lora_registry", {}
    )
    before = set(registry.LORA_SUPPORTED_BACKENDS)
    plugin.register()
    assert set(registry.LORA_SUPPORTED_BACKENDS) == before | {"lora_kernels"}
    assert issubclass(registry.get_backend_from_name("lora_kernels"), base)
