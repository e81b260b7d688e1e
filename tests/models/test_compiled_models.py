"""torch.compile of whole models: one graph, and nothing that a training or a server changes between
calls compiles it again."""

import contextlib
import copy
import itertools

import pytest
import small
import torch
from torch._dynamo.utils import counters
from training import HOWS, assert_answered, assert_close, tiny, trainable

import lora_kernels as lk
from lora_kernels.models.apply import lora_layers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

BATCH_SIZES = range(2, 12)


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


@contextlib.contextmanager
def one_graph():
    """Everything inside runs from one graph: a second compilation is an error."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert counters["stats"]["unique_graphs"] == 1, dict(counters["stats"])
    assert not counters["graph_break"], dict(counters["graph_break"])
    torch._dynamo.reset()


def run(model, called, rows):
    """Logits, and the gradients in training; dropout draws the same for the same call."""
    torch.manual_seed(rows)
    dtype = next(model.parameters()).dtype
    batch = small.batch_for(model, rows=rows, seed=rows)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    if not model.training:
        with torch.no_grad():
            return [called(**batch).logits]
    logits = called(**batch).logits
    return [
        logits.detach(),
        *torch.autograd.grad(logits.square().mean(), trainable(model).values()),
    ]


def assert_computes_what_eager_does(model, compiled, rows, name, *, blocks=2, same_bits=True):
    """The logits bit for bit, unless the compiler fuses; gradients are added up in another order
    and keep the budget."""
    with lk.record_plans() as answers:
        found = run(model, compiled, rows)
    # Our operators are in the graph, all of them.
    passes = {"forwards": 1, "backwards": int(model.training)}
    assert_answered(answers, name=name, blocks=blocks, **passes)
    eager = run(model, model, rows)
    if same_bits:
        assert torch.equal(found[0], eager[0])
    exact = copy.deepcopy(model).double()
    for triple in zip(found, eager, run(exact, exact, rows), strict=True):
        assert_close("logits, then gradients", *triple)
    return eager[0]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_one_graph_for_batch_sizes_scales_and_adapters(name, training, tmp_path):
    model = tiny("apply_lora", name=name, lora_dropout=0.2).train(training)
    other = small.draw_adapter(tiny("apply_lora", name=name), seed=8)
    lk.save_adapter(other, tmp_path)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")

    def check(rows):
        return assert_computes_what_eager_does(model, compiled, rows, name)

    with one_graph():
        seen = [check(rows) for rows in BATCH_SIZES][-1:]
        for scale in (0.5, 1.75, 3.0):
            for layer in lora_layers(model).values():
                layer.scaling = scale
            seen.append(check(BATCH_SIZES[-1]))
        for layer in lora_layers(model).values():
            layer.set_lora(-layer.lora_A.detach(), layer.lora_B.detach(), lora_alpha=6)
        seen.append(check(BATCH_SIZES[-1]))
        # The compiled model is a wrapper, which load_adapter knows.
        lk.load_adapter(compiled, tmp_path)
        seen.append(check(BATCH_SIZES[-1]))
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))
    if not training:
        assert torch.equal(seen[-1], run(other.eval(), other, BATCH_SIZES[-1])[0])


@pytest.mark.parametrize("how", HOWS[1:])
def test_one_graph_for_batch_sizes_in_a_model_of_peft(how):
    """The scales are PEFT's own floats, and no promise is made of them."""
    model = tiny(how, lora_dropout=0.2).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with one_graph():
        for rows in BATCH_SIZES:
            assert_computes_what_eager_does(model, compiled, rows, "llama")


def test_inductor():
    """The default backend. It draws other random numbers, so there is no dropout; and
    it takes long."""
    model = tiny("apply_lora", num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with one_graph():
        for rows in (2, 5):
            assert_computes_what_eager_does(
                model, compiled, rows, "llama", blocks=1, same_bits=False
            )
