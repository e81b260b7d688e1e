"""What only a GPU shows: captured graphs, offsets beyond 2^31, other devices, every plan on every
op."""

import itertools

import pytest
import torch

import lora_kernels as lk
from lora_kernels import ops
from lora_kernels.config import candidates
from lora_kernels.device import facts
from lora_kernels.problem import PROBLEM_OF
from lora_kernels.testing import Case, assert_within_budget, check, naive

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CASE = Case(300, 530, 200, 40, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("sizes", [(300, 530, 200, 40), (5, 512, 1024, 16), (260, 512, 640, 8)])
@pytest.mark.parametrize("op", ops.OPERATORS)
def test_every_candidate_of_the_planner(op, sizes, dropout_p, dtype):
    case = Case(*sizes, dtype=dtype, dropout_p=dropout_p, device="cuda")
    problem = PROBLEM_OF[op](**case.draw().arguments(op))
    tried = set()
    for config in candidates(problem, facts("cuda")):
        backend = "reference" if config.plan == "reference" else "cuda"
        with lk.force_plan(config):
            check(op, getattr(ops, op), case, backend=backend)
        tried.add(config.plan)
    assert tried & {"tail", "skinny"}


def leaves_of(inputs):
    return [t.requires_grad_() for t in (inputs.x, inputs.lora_a, inputs.lora_b)]


@pytest.mark.parametrize("plan", [None, "tail", "vendor"])
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


@pytest.mark.parametrize("plan", ["in_loop", "tail", "vendor"])
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
