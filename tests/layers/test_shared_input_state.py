"""Modules that share the input of their projections: errors, threads, copies, and their end."""

import copy
import io
import pickle
import threading

import pytest
import torch
from shared_inputs import TOGETHER, Attention, draw, pair, plain, run, straight
from torch import nn

import lora_kernels as lk
from lora_kernels.layers import shared_input


def test_a_forward_that_raises_and_what_follows():
    def called(self, x):
        straight(self, x)
        raise RuntimeError("inside")

    shared, apart = pair()
    x = draw()
    shared.called = called
    with pytest.raises(RuntimeError, match="inside"):
        shared(x)
    assert not shared_input._local.calls
    # Outside a call of its module a layer is by itself, though x is the same.
    expected = apart.k_proj(x)
    with lk.record_plans() as answers:
        assert torch.equal(shared.k_proj(x), expected)
    assert [a.op for a in answers] == ["lora_linear_fwd"]
    shared.called = straight
    assert run(shared, x)[0] == TOGETHER


def test_an_interrupt_leaves_nothing_that_counts():
    """Torch calls no hook after what is no Exception."""

    def called(self, x):
        self.q_proj(x)
        raise KeyboardInterrupt

    outer = nn.Sequential(Attention(), nn.Linear(72, 24), Attention()).train()
    assert lk.share_inputs(outer) == ["0", "2"]
    outer[2].called = called
    x = draw()
    with pytest.raises(KeyboardInterrupt):
        outer(x)
    assert [call.parent for call in shared_input._local.calls] == [outer[2]]
    outer[2].called = straight
    expected = outer(x)
    assert torch.equal(outer(x), expected)
    shared_input._local.calls.clear()


def test_modules_inside_each_other():
    """A call of the same module, and of another, between two of its projections."""
    shared, apart = pair()
    inner = copy.deepcopy(shared)

    def called(self, x):
        q = self.q_proj(x)
        if x.shape[0] > 1:
            q = q + self(x[:1])[..., :40] + inner(x)[..., :40]
        return [q, self.k_proj(x), self.v_proj(x)]

    shared.called = apart.called = called
    x = draw()
    (answered, ours), (_, theirs) = run(shared, x), run(apart, x)
    assert answered.count("lora_linears_fwd") == 3 and "lora_linear_fwd" not in answered
    assert torch.equal(ours["y"], theirs["y"])


def test_threads_do_not_take_each_others_results():
    """Both are inside the same module at once, each with an x of its own."""
    shared, apart = pair()
    barrier = threading.Barrier(2, timeout=60)

    def called(self, x):
        found = []
        for layer in self.layers:
            barrier.wait()
            found.append(layer(x))
        return found

    shared.called = called
    inputs = [draw(), draw()]
    inputs.append(inputs[0])
    for one, other in (inputs[:2], inputs[::2]):
        found = {}

        def work(i, x, found=found):
            with lk.record_plans():
                found[i] = shared(x)

        threads = [threading.Thread(target=work, args=each) for each in ((0, one), (1, other))]
        with lk.record_plans() as answers:
            for t in threads:
                t.start()
            for t in threads:
                t.join()
        assert [a.op for a in answers] == ["lora_linears_fwd"] * 2
        assert torch.equal(found[0], apart(one)) and torch.equal(found[1], apart(other))


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, pickled, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_share_too_and_among_themselves(copied):
    shared, apart = pair()
    other = copied(shared)
    with torch.no_grad():
        for t in other.parameters():
            t.mul_(0.5)
    x = draw()
    assert run(other, x)[0] == TOGETHER
    answered, ours = run(shared, x)
    assert answered == TOGETHER and torch.equal(ours["y"], apart(x))
    assert not torch.equal(other(x), ours["y"])


def state(model):
    return {
        name: (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }


def test_it_is_undone():
    model = Attention().train()
    before = state(model)
    assert lk.share_inputs(model) == lk.share_inputs(model) == [""]
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    assert lk.share_inputs(model, enabled=False) == []
    assert state(model) == before and not model._forward_hooks_always_called
    assert not set(run(model, draw())[0]) & set(TOGETHER)


def test_unload_takes_the_hooks_off():
    model = nn.Sequential(plain())
    before = state(model)
    lk.share_inputs(lk.apply_lora(model, r=2))
    lk.unload(model)
    assert state(model).keys() == before.keys()
    assert all(found[1:] == before[name][1:] for name, found in state(model).items())


def second_input(self, x, key_value_states=None):
    return Attention.forward(self, x)


def test_modules_with_a_second_input_are_left_alone():
    model = type("Cross", (Attention,), {"forward": second_input})()
    assert lk.share_inputs(model) == []
    model = Attention()
    model.is_kv_shared_layer = True
    assert lk.share_inputs(model) == []


@pytest.mark.slow
def test_compiled_calls_are_separate_and_whole():
    shared, apart = pair()
    x = draw()
    compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
    with lk.record_plans() as answers:
        y = compiled(x)
    assert {a.op for a in answers} == {"lora_linear_fwd"}
    assert torch.equal(y, apart(x))
    assert run(shared, x)[0] == TOGETHER


def test_a_wrong_projection_is_reported_by_its_own_call():
    shared, _ = pair()
    shared.k_proj = lk.FusedLoRALinear(25, 16, r=2)
    lk.share_inputs(shared)
    reached = []

    def called(self, x):
        reached.append(self.q_proj(x))
        return [self.k_proj(x)]

    shared.called = called
    with pytest.raises(ValueError, match="x"):
        shared(draw())
    assert len(reached) == 1
