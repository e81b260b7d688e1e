"""DDP and FSDP2 in two processes: gradients, checkpoints, and errors for what cannot work."""

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import small
import torch
import torch.distributed as dist
from training import FAMILIES, HOWS, STOCK, assert_answered, assert_close, gradients, tiny

import lora_kernels as lk

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
    ),
]

# family, dropout
DDP = [("llama", worker.DROPOUT), ("gpt2", 0.0)]
FSDP = [(family, precision) for family in ("llama", "gpt2") for precision in worker.PRECISIONS]


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Starts the processes once, with every scenario, since starting them is what takes long;
    ``started(scenario)``: where its results are, and those by rank."""
    directory = tmp_path_factory.mktemp("distributed")
    scenarios = [f"ddp {how} {family} {dropout}" for how in HOWS for family, dropout in DDP]
    scenarios += [f"fsdp {how} {family} {precision}" for how in HOWS for family, precision in FSDP]
    scenarios += ["dtensors"]
    # It finds a free port by itself.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(worker.PROCESSES), worker.__file__]
    places = [str(Path(lk.__file__).parents[1]), str(Path(small.__file__).parent)]
    path = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
    answer = subprocess.run(
        [*command, str(directory), *scenarios],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )

    def results(scenario):
        place = directory / scenario.replace(" ", "-")
        files = [place / f"{rank}.pt" for rank in range(worker.PROCESSES)]
        if not all(file.exists() for file in files):
            pytest.fail(f"{scenario} did not come to its end:\n{answer.stdout[-6000:]}")
        return place, [torch.load(file, weights_only=False) for file in files]

    return results


def parts(how, family, *, dropout=0.0, dtype=torch.float32):
    """The mean gradients over what every rank does, in one process, rank after rank."""
    by_rank = []
    for rank in range(worker.PROCESSES):
        model = tiny(how, name=family, lora_dropout=dropout).train()
        if dtype == torch.float64:
            model.double()
        # Parameters alone, as the policy does; and it adds in float32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        torch.manual_seed(worker.seed_of(rank))
        total = {}
        for ids in worker.micro_batches(rank):
            model.zero_grad()
            (worker.loss(model, ids) / 2).backward()
            for name, gradient in gradients(model).items():
                wide = gradient.to(torch.promote_types(dtype, torch.float32))
                total[name] = total.get(name, 0) + wide
        by_rank.append(total)
    first, second = by_rank
    return {name: (first[name] + second[name]) / 2 for name in first}


def assert_equal_on_all_ranks(results, key):
    first, *others = (result[key] for result in results)
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first), key


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("family", "dropout"), DDP)
def test_ddp(started, how, family, dropout):
    place, results = started(f"ddp {how} {family} {dropout}")
    # GPT-2 ran with checkpointing.
    again = 2 if family == "gpt2" else 1
    for result in results:
        assert_answered(
            result["answers"], forwards=2 * again, backwards=2, entered=again == 2, name=family
        )
    assert_equal_on_all_ranks(results, "gradients")
    assert_equal_on_all_ranks(results, "state")
    expected = parts(how, family, dropout=dropout)
    found = results[0]["gradients"]
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name
    if not dropout:
        assert_keeps_the_budget(found, family)
    trained = tiny(how, name=family).eval()
    untrained = small.logits(trained)
    trained.load_state_dict(results[0]["state"])
    assert small.relative_difference(small.logits(trained), untrained) > 1e-3
    if how == "apply_lora":
        size = FAMILIES[family][0]
        loaded = lk.load_adapter(small.build(family, **size), place)
        assert torch.equal(small.logits(loaded), small.logits(trained))


def assert_keeps_the_budget(found, family, dtype=torch.float32):
    eager, exact = parts(STOCK, family, dtype=dtype), parts(STOCK, family, dtype=torch.float64)
    for name, gradient in found.items():
        assert_close(name, gradient, eager[name], exact[name])


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("family", "precision"), FSDP)
def test_fsdp2(started, how, family, precision, tmp_path):
    _, results = started(f"fsdp {how} {family} {precision}")
    dtype = worker.PRECISIONS[precision] or torch.float32
    again = 2 if precision == "bfloat16" else 1
    for result in results:
        assert_answered(
            result["answers"], forwards=2 * again, backwards=2, entered=again == 2, name=family
        )
        assert result["resumed"] == result["went on"]
        assert result["packed"] == 0
    assert_equal_on_all_ranks(results, "gradients")
    expected = parts(how, family, dropout=worker.DROPOUT, dtype=dtype)
    found = results[0]["gradients"]
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected[name]), name

    state = results[0]["state"]
    whole = tiny(how, name=family).eval()
    whole.load_state_dict(state)
    for key, scale in (("logits", 1.0), ("other logits", 1.25)):
        model = tiny(how, name=family).eval()
        model.load_state_dict({name: tensor * scale for name, tensor in state.items()})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
            expected = model(input_ids=worker.rows(3, seed=8)).logits
        assert torch.equal(results[0][key], expected), key
    if how == "apply_lora":
        lk.save_adapter(whole, tmp_path)
        base = small.build(family, **FAMILIES[family][0])
        assert torch.equal(small.logits(lk.load_adapter(base, tmp_path)), small.logits(whole))


def test_what_is_trained_in_parts_keeps_the_budget():
    """The expectation of the tests above, held to PEFT: without dropout, in one process."""
    for family in ("llama", "gpt2"):
        for dtype in (torch.float32, torch.bfloat16):
            assert_keeps_the_budget(parts("apply_lora", family, dtype=dtype), family, dtype)


def test_dtensors_are_refused_by_name(started):
    _, results = started("dtensors")
    for messages in results:
        for name in ("x", "weight", "lora_a", "lora_b", "bias"):
            assert messages[name].startswith(f"{name} is a DTensor"), messages
            assert messages[f"mixed {name}"].startswith(f"{name} is a DTensor"), messages
        for style in ("ColwiseParallel", "RowwiseParallel", "outside forward"):
            assert "is a DTensor, and LoRA is computed on local tensors" in messages[style]
        assert "the model is sharded" in messages["save_adapter"]
        assert "full_state_dict=True" in messages["save_adapter"]
