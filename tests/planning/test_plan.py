"""Plans, tables, tuning and device facts, on any machine."""

import dataclasses
import itertools
import json
import threading

import pytest
import torch

import lora_kernels as lk
from lora_kernels.backends import tune
from lora_kernels.functional import ops
from lora_kernels.planning import config, device, plan, tables
from lora_kernels.planning.config import Config
from lora_kernels.planning.device import DeviceFacts
from lora_kernels.planning.validity import candidates, invalid_reason, is_valid
from lora_kernels.spec.problem import Problem, suits_descriptor
from lora_kernels.testing.linear import Case

CPU = DeviceFacts("cpu", "some cpu", "avx2", processors=8)
HOPPER = DeviceFacts(
    "cuda",
    "NVIDIA H200",
    "sm_90",
    processors=132,
    shared_memory=232448,
    half_flops=989e12,
    bandwidth=4.8e12,
)
AMPERE = DeviceFacts("cuda", "NVIDIA A100", "sm_80", processors=108, shared_memory=166912)
INSTINCT = DeviceFacts("cuda", "AMD MI300X", "gfx942", processors=304, shared_memory=65536)
TOMORROW = DeviceFacts("cuda", "a GPU of tomorrow", "sm_130")
VOLTA = DeviceFacts("cuda", "NVIDIA V100", "sm_70", processors=80, shared_memory=98304)
NO_TRITON = DeviceFacts("cuda", "NVIDIA H200", "sm_90", triton=False)
GPUS = [HOPPER, AMPERE, INSTINCT, TOMORROW, VOLTA, NO_TRITON]
UNKNOWN = DeviceFacts("xpu", "an accelerator of tomorrow", "unknown")


def write_table(path, facts, measured):
    """Write it, and let the next call read it."""
    tables.write_table(path, facts, measured)
    plan.forget_tables()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    plan.forget_tables()
    yield
    plan.forget_tables()


def problem(**changes):
    usual = {"op": "lora_linear_fwd", "m": 300, "n": 4096, "k": 1024, "r": 16}
    usual |= {"dtype": "bfloat16", "adapter_dtype": "float32"}
    return Problem(**(usual | changes))


DTYPES = ["float32", "bfloat16", "float16", "float64"]
FLAGS = [*itertools.product([False, True], repeat=2)]


def assert_valid(asked, facts):
    chosen = plan.plan(asked, facts)
    assert invalid_reason(chosen, asked, facts) is None, (asked, facts)
    assert chosen in set(candidates(asked, facts)), (asked, facts)
    return chosen


def test_the_heuristic_is_always_valid():
    sizes = (0, 1, 1, 1), (1, 4096, 4096, 16), (8191, 57344, 8192, 256)
    every = itertools.product(sizes, ops.OPERATORS, DTYPES, FLAGS, [CPU, *GPUS, UNKNOWN])
    for (m, n, k, r), op, dtype, (dropout, aligned), facts in every:
        for out_scale in (False, True):
            asked = Problem(op, m, n, k, r, dtype, dtype, dropout, False, out_scale, aligned)
            assert_valid(asked, facts)
            if op in ("lora_linear_fwd", "lora_linear_dx"):
                assert_valid(asked._replace(four_bit=True), facts)


def test_an_unknown_device_gets_the_reference():
    assert plan.plan(problem(), UNKNOWN).plan == "reference"
    assert device.facts("meta").kind == "meta"


INVALID = [
    (Config("in_loop"), {}, CPU, "run on GPUs"),
    (Config("in_loop"), {}, VOLTA, "sm_80 and later, not for sm_70"),
    (Config("in_loop"), {}, NO_TRITON, "Triton is not installed"),
    (Config("producer", 128, 128, 64, split_k=2), {}, HOPPER, "waits for its owner"),
    (Config("producer"), {"r": 65}, HOPPER, "registers"),
    (Config("producer"), {"op": "lora_linear_dx"}, AMPERE, "registers"),
    (Config("producer", 128, 256, 64, descriptors=True), {"dropout": True}, HOPPER, "registers"),
    (Config("producer"), {"op": "segmented_linear_fwd", "slots": 2}, HOPPER, "comes from a shrink"),
    (Config("vnedor"), {}, HOPPER, "no plan is called 'vnedor'"),
    (Config("vendor"), {"dtype": "float64"}, HOPPER, "float64 is computed by the reference"),
    (Config("tail"), {"dtype": "float64"}, HOPPER, "float64 is computed by the reference"),
    (Config("in_loop"), {"dropout": True}, HOPPER, "drawn again for every tile"),
    (Config("tail"), {"op": "lora_linear_dx", "out_scale": True}, HOPPER, "out_scale"),
    (Config("in_loop", 128, 256, 64), {"r": 33}, HOPPER, "registers"),
    (Config("skinny"), {}, HOPPER, "a tail to place"),
    (Config("tail"), {"op": "lora_shrink"}, HOPPER, "no tail to place"),
    (Config("preload"), {"op": "lora_shrink"}, HOPPER, "no tail to place"),
    (Config("preload"), {"dtype": "float16"}, HOPPER, "might not fit float16"),
    (Config("preload"), {"r": 1000}, HOPPER, "registers"),
    (Config("preload"), {"op": "lora_linear_dx", "out_scale": True}, HOPPER, "out_scale"),
    (Config("preload"), {}, CPU, "run on GPUs"),
    (Config("tail", decodes=True), {}, HOPPER, "no four-bit weight"),
    (Config("tail", decodes=True), {"four_bit": True, "k": 1000}, HOPPER, "whole numbers of 16"),
    (Config("preload", decodes=True), {"four_bit": True}, HOPPER, "from memory"),
    (Config("in_loop", decodes=True), {"four_bit": True, "r": 64}, HOPPER, "registers"),
    (Config("in_loop", decodes=True), {"four_bit": True, "dropout": True}, HOPPER, "drawn again"),
    (Config("tail", 128, 128, 64, num_stages=8), {}, HOPPER, "bytes of shared memory"),
    (Config("tail", 128, 128, 64, descriptors=True), {}, AMPERE, "tensor descriptors need sm_90"),
    (Config("tail", 128, 128, 64, descriptors=True), {}, INSTINCT, "tensor descriptors need"),
    (Config("tail", 128, 128, 64, descriptors=True), {"aligned": False}, HOPPER, "16-byte strides"),
]


@pytest.mark.parametrize(("chosen", "changes", "facts", "reason"), INVALID)
def test_what_is_not_valid_says_why(chosen, changes, facts, reason):
    assert reason in invalid_reason(chosen, problem(**changes), facts)
    assert not is_valid(chosen, problem(**changes), facts)


@pytest.mark.parametrize("facts", [HOPPER, AMPERE, INSTINCT], ids=lambda f: f.name)
def test_few_rows_of_a_four_bit_weight_are_decoded_in_the_loop_and_many_to_memory(facts):
    for m, decodes in ((1, True), (16, True), (64, True), (1024, False), (8192, False)):
        asked = problem(m=m, k=4096, four_bit=True)
        chosen = assert_valid(asked, facts)
        assert chosen.decodes == decodes
    assert not assert_valid(problem(m=1, k=4095, four_bit=True), facts).decodes


@pytest.mark.parametrize("facts", [HOPPER, AMPERE, INSTINCT, TOMORROW], ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("r", [1, 16, 100, 256, 1000])
def test_every_gpu_has_kernels_for_every_operator(facts, dtype, r):
    for op in ops.OPERATORS:
        for m in (1, 17, 4096):
            asked = problem(op=op, m=m, r=r, dtype=dtype, adapter_dtype=dtype)
            plans = {c.plan for c in candidates(asked, facts)}
            assert plans >= {"vendor", "reference"}
            assert plans & set(config.TILED_PLANS), (op, m)


def test_the_heuristic_on_a_hopper():
    def chosen(**changes):
        return plan.heuristic(problem(**({"n": 4096, "k": 4096} | changes)), HOPPER)

    for m in (1, 16, 32, 64):
        few = chosen(m=m)
        assert few.plan == "in_loop", "few rows: one launch, the weight streamed once"
        assert few.split_k > 1
        assert few.block_m * 4 >= m, "and by few rows of tiles"
    assert chosen(m=16, dropout=True).plan == "tail"
    for m, dropout in ((2048, False), (8192, False), (8192, True)):
        assert chosen(m=m, dropout=dropout).plan == "preload", "the library's loop, y read once"
    assert chosen(m=16, dropout=True).descriptors
    assert not chosen(m=16, dropout=True, aligned=False).descriptors


@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_dx"])
def test_producers_are_for_tuners_and_users(op):
    """Never chosen unmeasured, and still a candidate, cheaper than a tail by its launch and its
    second look at x, and than in_loop by most of the rank's products."""
    for m, dropout in itertools.product((16, 300, 8192), (False, True)):
        asked = problem(op=op, m=m, n=4096, k=4096, dropout=dropout)
        assert "producer" in {c.plan for c in candidates(asked, HOPPER)}
        assert plan.heuristic(asked, HOPPER).plan != "producer"
    asked = problem(op=op, m=8192, n=4096, k=4096)
    tile = Config("producer", 128, 128, 64, 8, 1, 8, 4, 132, True)
    producer, in_loop, tail = (
        plan.estimate_us(dataclasses.replace(tile, plan=name), asked, HOPPER)
        for name in ("producer", "in_loop", "tail")
    )
    assert producer < min(in_loop, tail)
    with lk.force_plan("producer"):
        assert plan.plan(asked, HOPPER) == Config("producer")


def test_estimates_grow_with_the_work():
    for name in ("vendor", "tail", "producer"):
        times = []
        for m in (256, 1024, 8192):
            asked = problem(m=m)
            times.append(
                min(
                    plan.estimate_us(c, asked, HOPPER)
                    for c in candidates(asked, HOPPER)
                    if c.plan == name
                )
            )
        assert times == sorted(times)
        assert times[-1] > 4 * times[0]


def test_keys_round_m_and_r_and_keep_the_rest():
    bucketed = problem(m=300, r=17).bucketed()
    assert (bucketed.m, bucketed.r, bucketed.n, bucketed.k) == (512, 32, 4096, 1024)
    assert [problem(m=m).bucketed().m for m in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    different = {"dtype": "float16", "adapter_dtype": "float16", "dropout": True}
    different |= {
        "out_scale": True,
        "aligned": False,
        "fan_in_fan_out": True,
        "n": 4097,
        "k": 1025,
        "m": 600,
        "r": 33,
    }
    keys = {problem(**{name: value}).bucketed().key() for name, value in different.items()}
    assert len(keys | {problem().bucketed().key()}) == len(different) + 1


def test_a_measured_table_decides():
    path = tables.cache_directory() / tables.table_name(CPU)
    key = problem().bucketed().key()
    write_table(path, CPU, {key: {"config": Config("reference"), "median_us": 1.0}})
    assert plan.plan(problem(), CPU).plan == "reference"
    assert plan.plan(problem(m=400), CPU).plan == "reference", "the same bucket"
    assert plan.plan(problem(m=600), CPU).plan == "vendor"
    write_table(path, CPU, {"another": {"config": Config("vendor"), "median_us": 1.0}})
    assert plan.plan(problem(), CPU).plan == "reference", "writing keeps the other keys"


def test_a_table_cannot_make_an_invalid_plan_answer():
    path = tables.cache_directory() / tables.table_name(CPU)
    key = problem().bucketed().key()
    write_table(path, CPU, {key: {"config": Config("in_loop", block_m=128), "median_us": 1.0}})
    assert plan.plan(problem(), CPU).plan == "vendor"


@pytest.mark.parametrize(
    ("field", "value"), [("versions", {"torch": "1.0"}), ("kernels", "0" * 16)]
)
def test_a_table_of_other_versions_or_kernels_is_ignored(field, value, recwarn):
    path = tables.cache_directory() / tables.table_name(CPU)
    write_table(path, CPU, {problem().bucketed().key(): {"config": Config("reference")}})
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {field: value}))
    plan.forget_tables()
    assert plan.plan(problem(), CPU).plan == "vendor"
    assert not recwarn.list


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "\x00\x01", '{"plans": {}}', "unknown field", "truncated"]
)
def test_a_broken_table_warns_and_is_ignored(text):
    path = tables.cache_directory() / tables.table_name(CPU)
    key = problem().bucketed().key()
    write_table(path, CPU, {key: {"config": Config("reference")}})
    whole = path.read_text()
    if text == "unknown field":
        text = whole.replace("block_m", "block_q")
    if text == "truncated":
        text = whole[: len(whole) // 2]
    path.write_text(text)
    plan.forget_tables()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert plan.plan(problem(), CPU).plan == "vendor"
    with pytest.warns(UserWarning, match="cannot be read"):
        write_table(path, CPU, {key: {"config": Config("reference")}})
    assert plan.plan(problem(), CPU).plan == "reference"


def test_writing_a_table_leaves_no_other_file():
    path = tables.cache_directory() / tables.table_name(CPU)
    write_table(path, CPU, {})
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_forced_plans():
    inputs = Case(3, 4, 5, 2).draw()
    arguments = (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)
    with lk.force_plan("reference"):
        lk.lora_linear(*arguments)
        assert lk.last_plan().backend == "reference"
        with lk.force_plan(Config("vendor")):
            lk.lora_linear(*arguments)
            assert lk.last_plan().plan == "vendor"
        lk.lora_linear(*arguments)
        assert lk.last_plan().plan == "reference"
    with lk.force_plan("in_loop"), pytest.raises(ValueError, match="run on GPUs"):
        lk.lora_linear(*arguments)
    with pytest.raises(ValueError, match="'venodr'"), lk.force_plan("venodr"):
        pass
    lk.lora_linear(*arguments)
    assert lk.last_plan().plan == plan.heuristic(lk.last_plan().problem, device.facts("cpu")).plan


def mixed(**changes):
    usual = {"op": "segmented_lora", "m": 32, "slots": 8, "slices": 3, "n": 10240, "k": 4096}
    return problem(**(usual | {"r": 32, "adapter_dtype": "bfloat16"} | changes))


def test_mixed_batches_get_a_valid_plan():
    sizes = [*itertools.product((0, 1, 64, 65, 5000), (1, 32, 256))]
    every = itertools.product(sizes, ops.SEGMENTED_OPERATORS, DTYPES, FLAGS, [CPU, *GPUS, UNKNOWN])
    for (m, r), op, dtype, (dropout, aligned), facts in every:
        asked = mixed(op=op, m=m, dropout=dropout, aligned=aligned, r=r, dtype=dtype)
        asked = asked._replace(adapter_dtype=dtype if dtype == "float64" else "float32")
        chosen = assert_valid(asked, facts)
        kernels = facts in (HOPPER, AMPERE, INSTINCT, TOMORROW) and dtype != "float64"
        few = op in config.DECODE_OPS and m <= config.SMALL_M and not dropout
        expected = {"decode" if few else "grouped"} if kernels else {"reference"}
        if kernels and op in config.MIXED_LINEAR_OPS:
            expected = {"tail", "vendor"}
            if dtype != "float16":
                expected.add("preload")
            assert invalid_reason(Config("vendor"), asked, facts) is None
        assert chosen.plan in expected, (asked, facts)


@pytest.mark.parametrize(
    ("chosen", "changes", "reason"),
    [
        ("decode", {"op": "segmented_lora_dx"}, "no shrink followed by an expand"),
        ("decode", {"dropout": True}, "no dropout"),
        ("decode", {"m": 257}, "grow with the rows"),
        ("vendor", {}, "no call that mixes adapters"),
        ("vendor", {"op": "segmented_linear_fwd", "dtype": "float64"}, "by the reference"),
        ("grouped", {"op": "segmented_linear_fwd"}, "its tail comes from a shrink"),
        (
            Config("tail", 128, 256, 64, num_warps=8, descriptors=True),
            {"op": "segmented_linear_fwd"},
            "registers",
        ),
        ("tail", {}, "mixes adapters"),
        ("grouped", {"slots": 0, "op": "lora_linear_fwd"}, "mixes no adapters"),
        (
            Config("decode", 32, 128, 64, split_k=16, block_r=64, chunk=512),
            {"m": 256, "slots": 256, "r": 256},
            "bytes",
        ),
        (Config("grouped", 16, 64, 64), {}, "blocks of 32 rows"),
        (Config("grouped", 32, 128, 64, num_stages=40), {}, "bytes of shared memory"),
    ],
)
def test_what_a_mixed_batch_cannot_be_answered_by(chosen, changes, reason):
    chosen = Config(chosen) if isinstance(chosen, str) else chosen
    assert reason in invalid_reason(chosen, mixed(**changes), HOPPER)


def test_the_split_of_a_mixed_batch_does_not_depend_on_the_rows():
    for name in ("grouped", "decode"):
        found = {
            frozenset(c for c in candidates(mixed(m=m), HOPPER) if c.plan == name)
            for m in (1, 17, 64, 200)
        }
        assert len(found) == 1


def test_the_base_of_a_mixed_batch_is_the_librarys_only_with_our_kernels_on_it():
    asked = mixed(op="segmented_linear_fwd")
    assert invalid_reason(Config("vendor"), asked, HOPPER) is None
    assert "sm_80 and later" in invalid_reason(Config("vendor"), asked, VOLTA)
    assert "Triton is not installed" in invalid_reason(Config("vendor"), asked, NO_TRITON)
    assert "no call that mixes" in invalid_reason(Config("vendor"), asked, CPU)
    for op, alone in (("fwd", "segmented_lora_"), ("dx", "segmented_lora_dx")):
        part = asked._replace(op=f"segmented_linear_{op}", fan_in_fan_out=True).adapters()
        assert part == asked._replace(op=alone)
        with lk.force_plan("vendor"):
            assert plan.plan_ignoring_force(part, HOPPER).plan in config.SEGMENTED_PLANS


def test_a_tail_is_dearer_the_more_slots_a_tile_holds():
    def estimate(**changes):
        asked = mixed(op="segmented_linear_fwd", m=4096, **changes)
        tails = [c for c in candidates(asked, HOPPER) if c.plan == "tail" and c.block_m == 128]
        return min(plan.estimate_us(c, asked, HOPPER) for c in tails)

    assert estimate(slots=1) < estimate(slots=64) < estimate(slots=64, r=256)


def test_batch_invariance_pins_one_plan_for_the_base_as_well():
    def chosen():
        found = [mixed(op="segmented_linear_fwd", m=m) for m in (1, 16, 64, 65, 300, 8192)]
        return {
            (plan.plan(p, HOPPER), plan.plan_ignoring_force(p.adapters(), HOPPER)) for p in found
        }

    assert len(chosen()) > 1
    with lk.batch_invariant(True):
        ((pinned, adapters),) = chosen()
        assert adapters.plan == "grouped"
        assert pinned.split_k in (0, 1)


def test_batch_invariance_pins_one_plan():
    def chosen():
        return {plan.plan(mixed(m=m), HOPPER) for m in (1, 16, 64, 65, 300, 8192)}

    path = tables.cache_directory() / tables.table_name(HOPPER)
    measured = Config("decode", 32, 128, 64, split_k=2, num_warps=4, num_stages=3, chunk=512)
    write_table(path, HOPPER, {mixed(m=16).bucketed().key(): {"config": measured}})
    assert measured in chosen()
    assert {c.plan for c in chosen()} == {"decode", "grouped"}
    with lk.batch_invariant(True):
        (pinned,) = chosen()
        assert pinned.plan == "grouped"
        with lk.batch_invariant(False):
            assert len(chosen()) > 1
        assert chosen() == {pinned}
        with lk.force_plan("decode"):
            assert plan.plan(mixed(), HOPPER).plan == "decode"
        assert plan.plan(mixed(), CPU).plan == "reference"
        assert plan.plan(problem(), HOPPER) == plan.heuristic(problem(), HOPPER)
    assert len(chosen()) > 1
    lk.batch_invariant(True)
    assert chosen() == {pinned}
    lk.batch_invariant(False)
    assert len(chosen()) > 1


def test_recorders_nest_and_see_all_threads():
    inputs = Case(3, 4, 5, 2).draw()

    def call():
        lk.lora_linear(inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)

    with lk.record_plans() as outer:
        call()
        with lk.record_plans() as inner:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        call()
    call()
    assert (len(outer), len(inner)) == (3, 1)
    assert outer[0].op == "lora_linear_fwd"
    assert outer[0].problem == Problem("lora_linear_fwd", 3, 4, 5, 2, "float32", "float32")


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("op", ops.OPERATORS)
def test_tuning_measures_every_candidate_and_writes_the_best(op, dropout_p):
    (measurement,) = tune.tune(
        [(9, 24, 16)], [op], r=4, dtype=torch.float32, dropout_p=dropout_p, seconds=0.01
    )
    facts = device.facts("cpu")
    assert set(measurement.medians_us) == set(candidates(measurement.problem, facts))
    assert measurement.best.plan in ("native", "vendor", "reference")
    assert measurement.problem.dropout == (dropout_p > 0)
    assert plan.plan(measurement.problem, facts) == measurement.best
    assert tables.read_table(tune.table_path("cpu"))[measurement.problem.bucketed().key()]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("op", ops.SEGMENTED_OPERATORS)
def test_tuning_a_mixed_batch(op, dropout_p):
    (measurement,) = tune.tune(
        [(9, 24, (16, 5))],
        [op],
        r=4,
        slots=3,
        dtype=torch.float32,
        dropout_p=dropout_p,
        seconds=0.01,
    )
    asked, facts = measurement.problem, device.facts("cpu")
    assert (asked.op, asked.m, asked.r, asked.slots, asked.slices) == (op, 9, 4, 3, 2)
    draws = "rng" in str(getattr(torch.ops.lora_kernels, op).default._schema)
    assert asked.dropout == (dropout_p > 0 and draws)
    assert set(measurement.medians_us) == set(candidates(asked, facts))
    assert plan.plan(asked, facts) == measurement.best
    assert tables.read_table(tune.table_path("cpu"))[asked.bucketed().key()]


def test_what_a_tensor_descriptor_can_read():
    t = torch.empty(24, 40, dtype=torch.bfloat16)
    suits = suits_descriptor
    assert suits(t, transposed=False)
    assert suits(t[:, :37], transposed=False)
    assert suits(t[::3], transposed=False)
    assert suits(t.t(), transposed=True)
    assert not suits(t.t(), transposed=False), "x is read by rows"
    assert not suits(t[:, 1:], transposed=True), "a base between two 16-byte units"
    assert not suits(t[:, ::2], transposed=True)
    assert not suits(t[:1].expand(24, 40), transposed=True), "rows that do not step"
    assert not suits(torch.empty(24, 37, dtype=torch.bfloat16), transposed=False)
    assert suits(torch.empty(24, 36, dtype=torch.float32), transposed=False)


def test_a_gpus_table_holds_whatever_torch_was_built_and_not_with_another_triton(monkeypatch):
    path = tables.cache_directory() / tables.table_name(HOPPER)
    asked = problem(m=8192)
    entry = {"config": Config("tail", 128, 128, 64, 8, 1, 8, 4, 132, True), "median_us": 1.0}
    write_table(path, HOPPER, {asked.bucketed().key(): entry})
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu999")
    assert plan.plan(asked, HOPPER) == entry["config"]
    monkeypatch.setattr(tables.importlib.metadata, "version", lambda package: "0.1")
    plan.forget_tables()
    assert plan.plan(asked, HOPPER).plan == "preload"
