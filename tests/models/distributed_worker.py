"""What each process of ``torchrun`` does for test_distributed.py; the answers go into files.

``torchrun --nproc-per-node 2 distributed_worker.py DIRECTORY SCENARIO ...``
"""

import datetime
import pathlib
import sys
import warnings

import small
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from training import rows, tiny, trainable

import lora_kernels as lk

PROCESSES = 2
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
DROPOUT = 0.3


def micro_batches(rank):
    """Two of two rows each; the whole batch is that of all ranks."""
    return rows(8).chunk(PROCESSES)[rank].chunk(2)


def loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


def seed_of(rank):
    return 40 + rank


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def full_gradients(model):
    return {name: full(parameter.grad) for name, parameter in trainable(model).items()}


def optimizer_of(model):
    return torch.optim.AdamW(trainable(model).values(), lr=5e-3)


def train(model, optimizer, steps):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(model, micro_batches(dist.get_rank())[step % 2])
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def ddp(directory, how, family, dropout):
    rank = dist.get_rank()
    model = tiny(how, name=family, lora_dropout=float(dropout)).train()
    if family == "gpt2":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = DistributedDataParallel(model)
    torch.manual_seed(seed_of(rank))
    first, second = micro_batches(rank)
    with lk.record_plans() as answers:
        with wrapped.no_sync():
            (loss(wrapped, first) / 2).backward()
        (loss(wrapped, second) / 2).backward()
    result = {"gradients": full_gradients(model), "answers": answers}
    train(wrapped, optimizer_of(model), 2)
    result["state"] = model.state_dict()
    if how == "apply_lora" and rank == 0:
        lk.save_adapter(wrapped, directory)
    return result


def sharded(how, family, precision, dropout=0.0):
    model = tiny(how, name=family, lora_dropout=dropout).train()
    options = {"mesh": init_device_mesh("cpu", (PROCESSES,))}
    if PRECISIONS[precision] is not None:
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=PRECISIONS[precision], reduce_dtype=torch.float32
        )
        # As people combine them: a block's parameters are gathered again for its recomputation.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inner = model if how == "apply_lora" else model.base_model.model
    for block in inner.model.layers if family == "llama" else inner.transformer.h:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def fsdp(directory, how, family, precision):
    rank = dist.get_rank()
    model = sharded(how, family, precision, DROPOUT)
    base = [p for p in model.parameters() if not p.requires_grad]
    assert all(isinstance(p, DTensor) for p in model.parameters()) and base
    torch.manual_seed(seed_of(rank))
    first, second = micro_batches(rank)
    with lk.record_plans() as answers:
        model.set_requires_gradient_sync(False)
        (loss(model, first) / 2).backward()
        model.set_requires_gradient_sync(True)
        (loss(model, second) / 2).backward()
    assert all(isinstance(p.grad, DTensor) for p in trainable(model).values())
    assert all(p.grad is None for p in base)
    result = {"gradients": full_gradients(model), "answers": answers}

    # Saved in shards and loaded into fresh ones, the optimizer with the model.
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=directory / "shards")
    again = sharded(how, family, precision, DROPOUT)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again_optimizer = optimizer_of(again)
    state = dict(zip(("model", "optimizer"), get_state_dict(again, again_optimizer), strict=True))
    dcp.load(state, checkpoint_id=directory / "shards")
    set_state_dict(
        again,
        again_optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    generator = torch.get_rng_state()
    result["went on"] = train(model, optimizer, 2)
    torch.set_rng_state(generator)
    result["resumed"] = train(again, again_optimizer, 2)

    # Gathered, for one process.
    whole = StateDictOptions(full_state_dict=True)
    result["state"] = get_model_state_dict(model, options=whole)
    result["logits"] = evaluated(model)

    # Packed copies would be of whole weights, and of those that are freed after the call.
    result["packed"] = sum(len(m._packed) for m in model.modules() if hasattr(m, "_packed"))
    # Loading others must reach the next evaluation.
    other = {name: tensor * 1.25 for name, tensor in result["state"].items()}
    set_model_state_dict(model, other, options=whole)
    result["other logits"] = evaluated(model)
    return result


@torch.no_grad()
def evaluated(model):
    logits = model.eval()(input_ids=rows(3, seed=8)).logits
    # Without a backward the root's own parameters stay gathered, and would refuse to be loaded.
    model.reshard()
    return logits


def dtensors(directory):
    """Every way in for a DTensor is an error that says so; nothing is written before it."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    local = {
        "x": torch.ones(4, 8),
        "weight": torch.ones(6, 8),
        "lora_a": torch.ones(2, 8),
        "lora_b": torch.ones(6, 2),
        "bias": torch.ones(6),
    }
    messages = {}

    def attempt(name, call):
        with lk.record_plans() as answers:
            try:
                call()
            except TypeError as error:
                messages[name] = str(error)
        assert not answers, name

    for name, tensor in local.items():
        arguments = local | {name: distribute_tensor(tensor, mesh, [Replicate()])}
        attempt(name, lambda arguments=arguments: lk.lora_linear(**arguments))
    seg = lk.SegmentTable.from_rows([0, -1, 0, 0], rank_of_slot=[2], scale_of_slot=[1.0])
    mixed = local | {"lora_a": local["lora_a"][None], "lora_b": local["lora_b"][None], "seg": seg}
    for name in local:
        arguments = mixed | {name: distribute_tensor(mixed[name], mesh, [Replicate()])}
        attempt(f"mixed {name}", lambda arguments=arguments: lk.segmented_linear(**arguments))
    for style in (ColwiseParallel(), RowwiseParallel()):
        block = torch.nn.Sequential(lk.FusedLoRALinear(8, 6))
        parallelize_module(block, mesh, {"0": style})
        attempt(type(style).__name__, lambda block=block: block(local["x"]))
    model = sharded("apply_lora", "llama", "float32")
    layer = model.model.layers[1].mlp.up_proj
    attempt("outside forward", lambda: layer(torch.ones(4, layer.in_features)))
    attempt("save_adapter", lambda: lk.save_adapter(model, directory / "adapter"))
    assert not (directory / "adapter").exists()
    return messages


SCENARIOS = {"ddp": ddp, "fsdp": fsdp, "dtensors": dtensors}


def main():
    directory, *scenarios = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for scenario in scenarios:
        kind, *arguments = scenario.split()
        place = pathlib.Path(directory) / scenario.replace(" ", "-")
        place.mkdir(exist_ok=True)
        dist.barrier()
        result = SCENARIOS[kind](place, *arguments)
        torch.save(result, place / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    small.transformers.logging.set_verbosity_error()
    main()
