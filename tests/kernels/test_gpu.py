"""What only a GPU shows: captured graphs, offsets beyond 2^31, other devices, every plan on every
op."""

import itertools
from dataclasses import replace

import pytest
import torch

import lora_kernels as lk
from lora_kernels.functional import ops
from lora_kernels.planning.config import MIXED_LINEAR_OPS
from lora_kernels.planning.device import facts
from lora_kernels.planning.validity import candidates
from lora_kernels.spec.problem import PROBLEM_OF
from lora_kernels.spec.segments import SegmentTable
from lora_kernels.testing.experts import ExpertCase, check_experts
from lora_kernels.testing.experts import naive as naive_experts
from lora_kernels.testing.linear import Case, assert_within_budget, check, naive
from lora_kernels.testing.segmented import SegmentedCase, check_segmented
from lora_kernels.testing.segmented import naive as naive_segmented

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CASE = Case(300, 530, 200, 40, device="cuda")
MIXED = SegmentedCase(150, 520, (530, 64, 200), (33, 0, 1, 8, 64, 16), device="cuda")


def tried_candidates(op, case):
    """The planner's candidates for ``case``, each of which has kept the budget."""
    problem = PROBLEM_OF[op](**case.draw().arguments(op))
    tried = list(candidates(problem, facts("cuda")))
    for config in tried:
        backend = "reference" if config.plan == "reference" else "cuda"
        with lk.force_plan(config):
            check(op, getattr(ops, op), case, backend=backend)
    return tried


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("sizes", [(300, 530, 200, 40), (5, 512, 1024, 16), (260, 512, 640, 8)])
@pytest.mark.parametrize("op", ops.OPERATORS)
def test_every_candidate_of_the_planner(op, sizes, dropout_p, dtype):
    case = Case(*sizes, dtype=dtype, dropout_p=dropout_p, device="cuda")
    tried = {config.plan for config in tried_candidates(op, case)}
    assert tried & {"tail", "skinny"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant", [("nf4", 64, True), ("fp4", 256, False)])
@pytest.mark.parametrize("sizes", [(300, 530, 201, 40), (5, 512, 1024, 16), (260, 514, 640, 8)])
@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_dx"])
def test_every_candidate_of_the_planner_for_four_bits(op, sizes, quant, dtype):
    case = Case(*sizes, dtype=dtype, quant=quant, device="cuda")
    tried = {(config.plan, config.decodes) for config in tried_candidates(op, case)}
    assert ("tail", False) in tried
    assert (("tail", True) in tried) == (sizes[2] % 32 == 0)


def leaves_of(inputs):
    return [t.requires_grad_() for t in (inputs.x, inputs.lora_a, inputs.lora_b)]


@pytest.mark.parametrize("plan", [None, "tail", "producer", "persistent", "preload", "vendor"])
@pytest.mark.parametrize("m", [5, 300])
def test_graph_replay_takes_new_inputs_scales_and_masks(plan, m):
    case = Case(m, 512, 256, 16, torch.bfloat16, bias=False, dropout_p=0.0, device="cuda")
    inputs = case.draw()
    leaves = leaves_of(inputs)

    def step():
        y = lk.lora_linear(inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, inputs.scale)
        return y, torch.autograd.grad(y, leaves, inputs.dy)

    def run():
        if plan is None:
            return step()
        # The skinny operators keep their own choice.
        with lk.force_plan(plan):
            y = lk.lora_linear(
                inputs.x.detach(),
                inputs.weight,
                inputs.lora_a.detach(),
                inputs.lora_b.detach(),
                inputs.scale,
            )
        return y, ()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradients = run()
    for seed, scale in ((1, 0.75), (2, 0.25)):
        other = Case(
            m, 512, 256, 16, torch.bfloat16, bias=False, scale=scale, device="cuda", seed=seed
        )
        fresh = other.draw()
        with torch.no_grad():
            for name in ("x", "dy", "weight", "lora_a", "lora_b", "scale"):
                getattr(inputs, name).copy_(getattr(fresh, name))
        graph.replay()
        exact, eager = naive(fresh, torch.float64), naive(fresh, torch.bfloat16)
        assert_within_budget("y", y, eager["y"], exact["y"])
        for name, gradient in zip(("dx", "da", "db"), gradients, strict=False):
            assert_within_budget(name, gradient, eager[name], exact[name])


def test_graph_replay_advances_dropout():
    layer = lk.FusedLoRALinear(256, 512, r=8, lora_dropout=0.5, init_lora_weights=False).cuda()
    x = torch.randn(64, 256, device="cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                layer(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        results = []
        for _ in range(3):
            graph.replay()
            results.append(y.clone())
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(results, 2))


@pytest.mark.parametrize("plan", ["in_loop", "tail", "producer", "persistent", "preload", "vendor"])
def test_rows_beyond_two_to_the_31(plan):
    """x, Y and the gradients have more than 2^31 elements; the last rows are compared."""
    k, n, r = 4096, 64, 16
    m = 2**31 // k + 300
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    small = Case(512, n, k, r, torch.bfloat16, device="cuda", bias=False)
    inputs = small.draw()
    x = torch.zeros(m, k, dtype=torch.bfloat16, device="cuda")
    x[-512:] = inputs.x
    with lk.force_plan(plan):
        y, _ = ops.lora_linear_fwd(x, inputs.weight, inputs.lora_a, inputs.lora_b, inputs.scale)
    exact, eager = naive(inputs, torch.float64), naive(inputs, torch.bfloat16)
    assert_within_budget("y", y[-512:], eager["y"], exact["y"])
    dy = torch.zeros(m, n, dtype=torch.bfloat16, device="cuda")
    dy[-512:] = inputs.dy
    with lk.force_plan(plan):
        dx, _ = ops.lora_linear_dx(dy, inputs.weight, inputs.lora_a, inputs.lora_b, inputs.scale)
    assert_within_budget("dx", dx[-512:], eager["dx"], exact["dx"])


def test_producers_wait_for_no_program_that_is_not_resident():
    """Two streams at once, each with its own counters, and also with a program per tile: more than
    are resident together."""
    case = Case(4000, 4096, 512, 16, torch.bfloat16, device="cuda")
    arguments = case.draw().arguments("lora_linear_fwd")
    problem = PROBLEM_OF["lora_linear_fwd"](**arguments)
    configs = [c for c in candidates(problem, facts("cuda")) if c.plan == "producer"]
    assert configs
    streams = [torch.cuda.Stream() for _ in range(2)]
    for config in configs:
        with lk.force_plan(config):
            check("lora_linear_fwd", ops.lora_linear_fwd, case, backend="cuda")
            expected = ops.lora_linear_fwd(**arguments)
        torch.cuda.synchronize()
        results = []
        for programs, stream in itertools.product([config.programs, 0] * 10, streams):
            with torch.cuda.stream(stream), lk.force_plan(replace(config, programs=programs)):
                results.append(ops.lora_linear_fwd(**arguments))
        torch.cuda.synchronize()
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_a_tensor_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    for op in ops.OPERATORS:
        check(op, getattr(ops, op), Case(40, 64, 48, 8, device="cuda:1"), backend="cuda")


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_training_step_keeps_x_and_s_and_nothing_else(dropout_p):
    m, n, k, r = 4096, 2048, 2048, 16
    inputs = Case(m, n, k, r, torch.bfloat16, bias=False, dropout_p=dropout_p, device="cuda").draw()
    leaves_of(inputs)

    def forward():
        return lk.lora_linear(
            inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, inputs.scale,
            dropout_p=dropout_p, training=True, rng=inputs.rng,
        )  # fmt: skip

    forward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = forward()
    held = torch.cuda.memory_allocated() - before - y.numel() * 2
    assert held <= m * r * 2 + 64 * 1024


def test_compiled_layer_runs_the_kernels():
    layer = lk.FusedLoRALinear(256, 512, r=8, init_lora_weights=False, dtype=torch.bfloat16).cuda()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (5, 64, 300):
        x = torch.randn(rows, 256, dtype=torch.bfloat16, device="cuda")
        with lk.record_plans() as answers:
            y = compiled(x)
        assert {a.backend for a in answers} == {"cuda"}
        assert torch.equal(y, layer(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("m", [0, 1, 33, 150, 1000])
@pytest.mark.parametrize("op", ops.SEGMENTED_OPERATORS)
def test_every_candidate_of_the_planner_for_a_mixed_batch(op, m, dropout_p, dtype):
    whole = {"k": 512, "widths": (256, 64), "ranks": (16, 0, 256, 8, 32), "packed": True}
    single = {"adapter_dtype": torch.float32, "layout": "strided"}
    for changes in ({}, whole, single):
        case = replace(MIXED, m=m, dtype=dtype, dropout_p=dropout_p, **changes)
        problem = PROBLEM_OF[op](**case.draw().arguments(op))
        tried = set()
        for config in candidates(problem, facts("cuda")):
            backend = "reference" if config.plan == "reference" else "cuda"
            with lk.force_plan(config):
                check_segmented(op, getattr(ops, op), case, backend=backend)
            tried.add(config.plan)
        if op in MIXED_LINEAR_OPS:
            assert "vendor" in tried and ("tail" in tried or dtype == torch.float32)
            assert ("preload" in tried) == (dtype != torch.float16)
        else:
            assert "grouped" in tried


@pytest.mark.parametrize(
    ("op", "plan"),
    [
        *itertools.product(["segmented_lora", "segmented_lora_"], ["grouped", "decode"]),
        *itertools.product(MIXED_LINEAR_OPS, ["tail", "preload", "vendor"]),
    ],
)
def test_graph_replay_takes_another_mapping(op, plan):
    """The table is refilled in place between replays, with other slots, ranks and scales."""
    case = replace(MIXED, m=64, dtype=torch.bfloat16, ranks=(16, 0, 32, 8, 64, 16), r_max=64)
    inputs = case.draw()
    arguments = inputs.arguments(op)

    def run():
        with lk.force_plan(plan):
            return getattr(ops, op)(**arguments)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for seed, ranks in ((1, (8, 64, 0, 33, 16, 1)), (2, (1, 1, 2, 0, 3, 5))):
        fresh = replace(case, seed=seed, ranks=ranks).draw()
        for name in ("x", "y", "dy", "weight"):
            getattr(inputs, name).copy_(getattr(fresh, name))
        if "y" in arguments:
            arguments["y"].copy_(fresh.y)
        for mine, other in zip(
            inputs.lora_a + inputs.lora_b, fresh.lora_a + fresh.lora_b, strict=True
        ):
            mine.copy_(other)
        seg = fresh.seg
        inputs.seg.update_(seg.slot_of_row, seg.rank_of_slot, seg.scale_of_slot, validate=False)
        graph.replay()
        ours = [arguments["y"]] if results is None else results
        exact = naive_segmented(fresh, op, torch.float64)
        eager = naive_segmented(fresh, op, torch.bfloat16)
        for number, result in enumerate(ours):
            assert_within_budget(f"{op} {number}", result, eager[number], exact[number])
        if op in MIXED_LINEAR_OPS:
            continue
        bare = fresh.bare()
        assert torch.equal(ours[0][bare], fresh.y[bare] if results is None else 0 * fresh.y[bare])


def test_a_schedule_built_inside_a_graph():
    slots = torch.tensor([0, -1, 1, 1], device="cuda")
    ranks = torch.tensor([4, 8], device="cuda")
    seg = SegmentTable.from_rows(slots, ranks, torch.ones(2, device="cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seg.update_(slots, ranks, validate=False)
    slots.copy_(torch.tensor([1, 0, -1, 1]))
    graph.replay()
    assert seg.order.tolist() == [1, 0, 3, 2]
    assert seg.start_of_slot.tolist() == [0, 1, 3]


@pytest.mark.parametrize("plan", ["grouped", "decode"])
def test_a_row_has_the_same_bits_in_every_batch(plan):
    inputs = replace(MIXED, dtype=torch.bfloat16).draw()

    def delta(rows):
        table = inputs.seg
        seg = SegmentTable.from_rows(
            table.slot_of_row[rows], table.rank_of_slot, table.scale_of_slot
        )
        return ops.segmented_lora(inputs.x[rows], inputs.lora_a, inputs.lora_b, seg.tensors())[0]

    with lk.force_plan(plan):
        whole = delta(torch.arange(150, device="cuda"))
        for rows in ([149], [3, 77], list(range(149, -1, -2))):
            rows = torch.tensor(rows, device="cuda")
            assert torch.equal(delta(rows), whole[rows])
    with lk.batch_invariant(True):
        whole = delta(torch.arange(150, device="cuda"))
        assert torch.equal(delta(torch.tensor([7], device="cuda")), whole[7:8])


@pytest.mark.parametrize("op", MIXED_LINEAR_OPS)
def test_a_row_has_the_same_bits_under_a_base_of_ours(op):
    """The tail plan's base is ours as well, so that the whole row depends on no other."""
    inputs = replace(MIXED, dtype=torch.bfloat16).draw()
    given, name = inputs.arguments(op), "x" if op == "segmented_linear_fwd" else "dy"

    def result(rows):
        table = inputs.seg
        seg = SegmentTable.from_rows(
            table.slot_of_row[rows], table.rank_of_slot, table.scale_of_slot
        )
        arguments = given | {name: given[name][rows], "table": seg.tensors()}
        return getattr(ops, op)(**arguments)[0]

    problem = PROBLEM_OF[op](**given)
    config = next(c for c in candidates(problem, facts("cuda")) if c.plan == "tail")
    with lk.force_plan(config):
        whole = result(torch.arange(150, device="cuda"))
        for rows in ([149], [3, 77], list(range(149, -1, -2))):
            rows = torch.tensor(rows, device="cuda")
            assert torch.equal(result(rows), whole[rows])


@pytest.mark.parametrize("plan", ["tail", "preload", "vendor"])
def test_rows_of_a_mixed_batch_beyond_two_to_the_31(plan):
    """x and y have more than 2^31 elements; the last rows, of several slots, are compared."""
    k, n, r = 4096, 4096, 16
    m = 2**31 // k + 300
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    small = SegmentedCase(512, k, (n,), (r, 8, r), torch.bfloat16, device="cuda").draw()
    x = torch.zeros(m, k, dtype=torch.bfloat16, device="cuda")
    x[-512:] = small.x
    slots = torch.full((m,), -1, device="cuda")
    slots[-512:] = small.seg.slot_of_row
    seg = SegmentTable.from_rows(slots, small.seg.rank_of_slot, small.seg.scale_of_slot)
    given = small.arguments("segmented_linear_fwd") | {"x": x, "table": seg.tensors()}
    with lk.force_plan(plan):
        y, _ = ops.segmented_linear_fwd(**given)
    exact = naive_segmented(small, "segmented_linear_fwd", torch.float64)
    eager = naive_segmented(small, "segmented_linear_fwd", torch.bfloat16)
    assert_within_budget("the last rows", y[-512:], eager[0], exact[0])


@pytest.mark.parametrize("plan", ["grouped", "decode", "tail"])
def test_stacks_of_more_than_two_to_the_31_elements(plan):
    k, n, r, slots = 8192, 8192, 64, 2**31 // (8192 * 64) + 8
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    small = SegmentedCase(33, k, (n,), (r, r), torch.bfloat16, device="cuda").draw()
    a = torch.full((slots, r, k), float("nan"), dtype=torch.bfloat16, device="cuda")
    b = torch.full((slots, n, r), float("nan"), dtype=torch.bfloat16, device="cuda")
    a[-1], b[-1] = small.lora_a[0][0], small.lora_b[0][0]
    ranks = torch.full((slots,), r)
    scales = small.seg.scale_of_slot[:1].expand(slots)
    rows = small.seg.slot_of_row
    seg = SegmentTable.from_rows(
        torch.where(rows == 0, slots - 1, -1), ranks, scales, device="cuda"
    )
    with lk.force_plan(plan):
        if plan == "tail":
            weight = torch.zeros(n, k, dtype=torch.bfloat16, device="cuda")
            y, _ = ops.segmented_linear_fwd(small.x, weight, [a], [b], seg.tensors())
        else:
            y, _ = ops.segmented_lora(small.x, [a], [b], seg.tensors())
    exact = naive_segmented(small, "segmented_lora", torch.float64)
    eager = naive_segmented(small, "segmented_lora", torch.bfloat16)
    assert_within_budget("the last slot", y, eager[0], exact[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("changes", [{}, {"n": 512, "k": 640, "r": 16, "fan_in_fan_out": True}])
@pytest.mark.parametrize("op", ops.EXPERT_OPERATORS)
def test_every_candidate_for_experts(op, changes, dtype):
    case = ExpertCase((3, 290, 0, 64), 530, 200, 40, 5, dtype, bias=True, device="cuda")
    for odd in (replace(case, **changes), replace(case, spare=0, counts=(357,), **changes)):
        problem, tried = PROBLEM_OF[op](**odd.draw().arguments(op)), set()
        for config in candidates(problem, facts("cuda")):
            backend = "reference" if config.plan == "reference" else "cuda"
            with lk.force_plan(config):
                check_experts(op, getattr(ops, op), odd, backend=backend)
            tried.add(config.plan)
        assert tried >= {"vendor", "reference"} and tried & {"tail", "skinny"}


def test_graph_replay_takes_other_rows_of_experts():
    """Nothing waits for the device: how many rows each expert has may change from replay to
    replay."""
    case = ExpertCase((8, 0, 30, 2), 512, 256, 16, 4, torch.bfloat16, device="cuda")
    inputs = case.draw()
    arguments = inputs.arguments("expert_linear_fwd")

    def run():
        with lk.force_plan("tail"):
            return ops.expert_linear_fwd(**arguments)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for counts, spare in (((0, 44, 0, 0), 0), ((10, 10, 10, 10), 4)):
        fresh = replace(case, counts=counts, spare=spare, seed=1).draw()
        inputs.x.copy_(fresh.x)
        inputs.offs.copy_(fresh.offs)
        graph.replay()
        fresh = replace(fresh, **{n: getattr(inputs, n) for n in ("weight", "lora_a", "lora_b")})
        dtypes = torch.float64, torch.bfloat16
        exact, eager = (naive_experts(fresh, "expert_linear_fwd", t)[0] for t in dtypes)
        assert_within_budget("y", y, eager, exact)
