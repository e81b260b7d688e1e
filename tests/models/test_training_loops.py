"""Training loops that people write themselves: GradScaler, accelerate, clipping, saving, flips."""

import copy
import io

import accelerate
import pytest
import small
import torch
from accelerate.state import AcceleratorState
from training import HOWS, STOCK, assert_answered, assert_close, gradients, rows, tiny, trainable

import lora_kernels as lk

# Deprecations inside transformers are not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:None of the inputs")


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


class Loop:
    """Steps of two micro-batches each, with everything that a training has to keep."""

    def __init__(self, model, *, autocast=None, scaler=None, set_to_none=True, evaluate=False):
        self.model = model.train()
        self.autocast, self.set_to_none, self.evaluate = autocast, set_to_none, evaluate
        self.scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        # The fused one leaves no trace in the parameters' version.
        self.optimizer = torch.optim.AdamW(trainable(model).values(), lr=5e-3, fused=True)
        self.losses, self.norms, self.gradients, self.scales = [], [], None, []

    def steps(self, first, last):
        for ids in rows(64)[4 * first : 4 * last].split(4):
            losses = []
            for micro in ids.split(2):
                with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
                    loss = self.model(input_ids=micro, labels=micro).loss
                self.scaler.scale(loss / 2).backward()
                losses.append(loss.item())
            self.scaler.unscale_(self.optimizer)
            if self.gradients is None:
                self.gradients = gradients(self.model)
            self.norms.append(
                torch.nn.utils.clip_grad_norm_(trainable(self.model).values(), 0.5).item()
            )
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scales.append(self.scaler.get_scale())
            self.optimizer.zero_grad(set_to_none=self.set_to_none)
            self.losses.append(losses)
            if self.evaluate:
                self.evaluation(rows(3, seed=8))
        return self

    def evaluation(self, ids):
        """What the trained model computes, which is what a copy of it computes that has no past."""
        fresh = copy.deepcopy(self.model.eval())
        with torch.no_grad():
            assert torch.equal(self.model(input_ids=ids).logits, fresh(input_ids=ids).logits)
        self.model.train()

    def state(self):
        """Everything, through a file."""
        file = io.BytesIO()
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generator": torch.get_rng_state(),
            },
            file,
        )
        file.seek(0)
        return torch.load(file)

    def restore(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generator"])
        return self


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("how", HOWS)
def test_float16_with_a_grad_scaler(how):
    """Trainer's fp16 is for GPUs: on a CPU accelerate leaves autocast off without a word, so the
    loop is written out here. The first scale overflows: a step that finds an infinity is skipped,
    with ours and with PEFT's."""

    def run(who, dtype):
        half = dtype == torch.float32
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**40, backoff_factor=2.0**-32, growth_interval=2, enabled=half
        )
        loop = Loop(tiny(who, dtype), autocast=torch.float16 if half else None, scaler=scaler)
        before = {name: p.detach().clone() for name, p in trainable(loop.model).items()}
        if half:
            loop.steps(0, 1)
            assert not torch.tensor(loop.norms).isfinite().any()
            assert_same_bits(trainable(loop.model), before)
            loop.losses.clear()
            loop.norms.clear()
            loop.gradients = None
        return loop.steps(1, 6)

    with lk.record_plans() as answers:
        ours = run(how, torch.float32)
    eager, exact = run(STOCK, torch.float32), run(STOCK, torch.float64)
    assert_answered(answers, forwards=12, backwards=12)
    assert ours.scales == eager.scales == [2.0**8] * 2 + [2.0**9] * 2 + [2.0**10] * 2
    for name, gradient in ours.gradients.items():
        assert_close(name, gradient, eager.gradients[name], exact.gradients[name])
    for what in ("losses", "norms"):
        assert_close(what, *(torch.tensor(getattr(loop, what)) for loop in (ours, eager, exact)))


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_gradients_under_dropout_are_those_of_the_loss_that_was_masked(use_reentrant):
    """In float64 against differences of the loss under the same masks; in float32 against that."""

    def model_of(dtype):
        model = tiny("apply_lora", dtype, lora_dropout=0.3).train()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        return model

    def loss(model):
        torch.manual_seed(5)
        ids = rows(3)
        logits = model(input_ids=ids).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def gradients_of(model):
        loss(model).backward()
        return gradients(model)

    double = model_of(torch.float64)
    exact = gradients_of(double)
    # transformers' norms and softmax are float32's: smaller steps would be lost in their rounding.
    step = 1e-3
    for name, parameter in trainable(double).items():
        length = exact[name].norm()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(exact[name] / length, alpha=sign * step)
                losses.append(loss(double).item())
                parameter.sub_(exact[name] / length, alpha=sign * step)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(length.item(), rel=2e-3), name
    with lk.force_plan("vendor"):
        eager = gradients_of(model_of(torch.float32))
    with lk.record_plans() as answers:
        ours = gradients_of(model_of(torch.float32))
    passes = {"forwards": 1 if use_reentrant is None else 2, "backwards": 1}
    assert_answered(answers, entered=use_reentrant is not None, **passes)
    for name, gradient in ours.items():
        assert_close(name, gradient, eager[name], exact[name])


@pytest.mark.parametrize("how", HOWS)
def test_flips_and_ways_to_clear_gradients_change_nothing(how):
    """Evaluating between steps draws no random number and leaves no packed copy that goes stale."""

    def run(**options):
        torch.manual_seed(5)
        return Loop(tiny(how, lora_dropout=0.3), **options).steps(0, 4)

    plain = run()
    assert all(norm > 0.5 for norm in plain.norms), "nothing was clipped"
    for other in (run(evaluate=True), run(set_to_none=False)):
        assert other.losses == plain.losses
        assert_same_bits(trainable(other.model), trainable(plain.model))


@pytest.mark.parametrize("how", HOWS)
def test_clipped_norms_are_those_of_peft(how):
    ours, eager = (Loop(tiny(who)).steps(0, 4) for who in (how, STOCK))
    exact = Loop(tiny(STOCK, torch.float64)).steps(0, 4)
    for what in ("losses", "norms"):
        assert_close(what, *(torch.tensor(getattr(loop, what)) for loop in (ours, eager, exact)))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_saved_and_resumed_with_the_same_bits(how, autocast):
    torch.manual_seed(5)
    whole = Loop(tiny(how, lora_dropout=0.3), autocast=autocast).steps(0, 6)
    torch.manual_seed(5)
    half = Loop(tiny(how, lora_dropout=0.3), autocast=autocast).steps(0, 3)
    state = half.state()
    torch.manual_seed(99)
    resumed = Loop(tiny(how, lora_dropout=0.3), autocast=autocast).restore(state).steps(3, 6)
    assert half.losses + resumed.losses == whole.losses
    assert_same_bits(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("how", HOWS)
def test_accelerate(how, tmp_path):
    """prepare, accumulate, clip and save_state: the bits of a loop written out."""
    steps, ids = 4, rows(64)

    def run(first, last, resume=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2
        )
        torch.manual_seed(5)
        model = tiny(how, lora_dropout=0.3).train()
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=5e-3, fused=True)
        data = torch.utils.data.DataLoader(ids[4 * first : 4 * last], batch_size=2)
        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        losses = []
        for micro in data:
            if not losses:
                # The loader has drawn its own seed; from here on only the layers draw.
                _ = accelerator.load_state(resume) if resume else torch.manual_seed(5)
            with accelerator.accumulate(model):
                loss = model(input_ids=micro, labels=micro).loss
                losses.append(loss.item())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(tmp_path / str(last))
        model = accelerator.unwrap_model(model)
        AcceleratorState._reset_state(reset_partial_state=True)
        return model, losses

    with lk.record_plans() as answers:
        model, losses = run(0, steps)
    assert_answered(answers, forwards=2 * steps, backwards=2 * steps)
    plain = tiny(how, lora_dropout=0.3)
    torch.manual_seed(5)
    plain = Loop(plain, autocast=torch.bfloat16).steps(0, steps)
    assert losses == [loss for step in plain.losses for loss in step]
    assert_same_bits(trainable(model), trainable(plain.model))
    run(0, 2)
    resumed, rest = run(2, steps, resume=tmp_path / "2")
    assert rest == losses[4:]
    assert_same_bits(trainable(resumed), trainable(model))
