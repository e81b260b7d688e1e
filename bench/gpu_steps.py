"""The steps of ``bench.gpu``, each by a process: ``python -m bench.gpu_steps STEP``."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.planning import plan, tables
from lora_kernels.planning.config import Config
from lora_kernels.planning.device import DeviceFacts
from lora_kernels.spec import four_bit, reference
from lora_kernels.testing.experts import ExpertCase, check_experts
from lora_kernels.testing.linear import Case, assert_within_budget, check, poisoned_memory
from lora_kernels.testing.segmented import SegmentedCase, check_segmented

from .baselines import version
from .bench_lora_linear import prepare
from .cases import Setting
from .gpu import FAMILIES, ROWS
from .gpu_work import (
    LINEAR_OPS,
    AnyCase,
    Far,
    Layer,
    Machine,
    Work,
    checks_of,
    compiling,
    configs,
    counting,
    drawn,
    label_of,
    name_of,
    operator,
    problem_of,
    rows,
    works_of,
)
from .measure import Rounds, quartiles, roofline

# Rounds of all candidates of a row, and the seconds after which none begins; in "plans" fewer.
_ROUNDS, _ROW_S, _FEW_ROUNDS = 40, 1.5, 15


def device(machine: Machine) -> None:
    packages = ("lora_kernels", "torch", "triton", "peft", "transformers", "numpy")
    versions = {package: version(package) for package in packages}
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    known = asdict(machine.known)
    machine.note("device", date=date, facts=known, versions=versions, smi=_smi())
    print(f"{machine.known}\n{versions}\n{_smi()}", flush=True)
    dtypes = [] if machine.rehearse else ["bfloat16"]
    floors = roofline(machine.clock, machine.device, dtypes)
    machine.note("floors", **floors)
    print(floors, flush=True)


def _smi() -> str:
    fields = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip()
    return "no nvidia-smi"


def compile_share(machine: Machine, what: str, share: str) -> None:
    """Compile this process's share of the binaries that a command needs; launch nothing."""
    number, of = map(int, share.split("/"))
    # One of very many of what a rehearsal would never use.
    step = 40 if machine.rehearse else of
    end = time.monotonic() + 30
    while time.monotonic() < end:
        lines = [json.loads(line) for line in (machine.out / ROWS).read_text().splitlines()]
        known = [line["facts"] for line in lines if line["kind"] == "device"]
        if known:
            break
        time.sleep(0.2)
    elsewhere = Machine(machine.out, machine.rehearse, machine.skip)
    elsewhere.device, elsewhere.known = "cpu", DeviceFacts(**known[0])
    elsewhere.dtype = torch.bfloat16
    begin, failed = time.monotonic(), 0
    with compiling(elsewhere.known.arch) as counts:
        for op, config, arguments in list(_compiled(elsewhere, what))[number::step]:
            try:
                operator(elsewhere, op, config)(**arguments())
            except Exception as error:
                failed += 1
                print(f"does not compile: {error!r}"[:300], flush=True)
    counted = counts | {"failed": failed, "seconds": round(time.monotonic() - begin, 1)}
    machine.note("compiled", of=what, share=share, **counted)
    print(f"share {share}: {counted}", flush=True)


def _compiled(
    machine: Machine, what: str
) -> Iterator[tuple[str, Config, Callable[[], dict[str, Any]]]]:
    """Operators, their plans, and what makes the arguments."""
    for work in works_of(what, machine.rehearse):
        # Only their addresses are used, and those of the library cost nothing.
        arguments = functools.partial(work.arguments, machine.dtype, "meta")
        problem = problem_of(work.op, arguments())
        for config in configs(machine, problem):
            yield work.op, config, arguments
    if what == "smoke":
        for family in FAMILIES:
            for op, case, config in checks_of(machine, family):
                yield op, config, functools.partial(_drawn_arguments, case, op)


def _drawn_arguments(case: AnyCase, op: str) -> dict[str, Any]:
    return drawn(case).arguments(op)


def families(machine: Machine, *names: str) -> None:
    """Hold families against float64."""
    red = [name for name in names if not _is_right(machine, name)]
    if red:
        sys.exit(1)


def _is_right(machine: Machine, name: str) -> bool:
    right, wrong, begin = 0, 0, time.monotonic()
    with counting() as counts:
        for op, case, config in checks_of(machine, name):
            run, holds = operator(machine, op, config), check
            if isinstance(case, SegmentedCase):
                holds = check_segmented  # type: ignore[assignment]
            elif isinstance(case, ExpertCase):
                holds = check_experts  # type: ignore[assignment]
            error = None
            try:
                holds(op, run, case)  # type: ignore[arg-type]
                right += 1
            except Exception as found:
                error = f"{type(found).__name__}: {found}"[:300]
                wrong += 1
                print(f"{name}: WRONG {op} {case} {label_of(config)}: {error}", flush=True)
            told = {"op": op, "case": str(case), "config": label_of(config), "error": error}
            machine.note("check", family=name, **told)
            # What an illegal access leaves raises here, and ends this process alone.
            machine.synchronize()
    seconds = time.monotonic() - begin
    machine.note("family", family=name, right=right, wrong=wrong, seconds=seconds, **counts)
    print(f"{name}: {right} right, {wrong} wrong, {seconds:.1f} s, {counts}", flush=True)
    return right > 0 and not wrong


def replay(machine: Machine) -> None:
    """Captured graphs take new inputs, and give the bits that the calls give."""
    case = Case(300, 520, 200, 16, machine.dtype, bias=False, device=machine.device)
    if machine.rehearse:
        case = replace(case, m=20, n=40, k=72)
    for name in ("vendor", "preload", "tail", "in_loop", "persistent"):
        for op in LINEAR_OPS if machine.admits(Config(name)) else ():
            arguments = case.draw().arguments(op)
            step = functools.partial(operator(machine, op, Config(name)), **arguments)
            graph = machine.captured(step)
            for _ in range(2):
                for key in ("x", "dy", "weight", "lora_a", "lora_b"):
                    if key in arguments:
                        arguments[key].normal_()
                first, again = ([t.clone() for t in graph()] for _ in range(2))
                for one, other, called in zip(first, again, step(), strict=True):
                    assert torch.equal(one, other), f"{name} {op}: other bits in a second replay"
                    assert torch.equal(one, called), f"{name} {op}: other bits than the call's"
                    assert one.isfinite().all() and one.any()
    setting = Setting(case.m, case.k, case.n, 16, 16, 0.1, name_of(machine.dtype), "training")
    prepare(setting, machine.device, machine.clock, ["fused"])
    print("replay: the same bits, with new inputs", flush=True)
    machine.note("replay", right=True)


def plans(machine: Machine) -> None:
    """One shape by every plan."""
    with counting() as counts:
        for work in works_of("smoke", machine.rehearse):
            measured(machine, work, _FEW_ROUNDS)
    print(counts, flush=True)


def run_rows(machine: Machine, first: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    with counting() as counts:
        for number, row in enumerate(rows(machine.rehearse)):
            if number < first:
                continue
            if time.monotonic() > end:
                print(f"no time left for row {number} and those after it", flush=True)
                break
            try:
                if isinstance(row, Work):
                    measured(machine, row, _ROUNDS, row=number)
                elif isinstance(row, Far):
                    far(machine, row.plan, number)
                else:
                    layer(machine, row, number)
            except Exception as error:
                told = f"{type(error).__name__}: {error}"[:300]
                machine.note("failed", row=number, what=str(row), error=told)
                print(f"FAILED {row}: {told}", flush=True)
                machine.synchronize()
    machine.note("cache", **counts)
    print(f"Triton's cache: {counts}", flush=True)


def measured(machine: Machine, work: Work, rounds: int, **more: Any) -> None:
    """Time every candidate of an operator, those that are right, beside the plain product; the
    fastest goes into the table."""
    torch.manual_seed(0)
    arguments = work.arguments(machine.dtype, machine.device)
    problem = problem_of(work.op, arguments)
    rows_ = arguments["x"] if "x" in arguments else arguments["dy"]
    exact, eager = (_reference(work.op, arguments, dtype) for dtype in (torch.float64, None))
    steps: dict[str, list[Callable[[], Any]]] = {}
    wrong: dict[str, str] = {}
    config_of = {label_of(config): config for config in configs(machine, problem)}
    for label, config in config_of.items():
        step = functools.partial(operator(machine, work.op, config), **arguments)
        try:
            with poisoned_memory():
                _hold(label, work.op, arguments, step, eager, exact)
            steps[label] = [machine.captured(step)]
        except Exception as error:
            wrong[label] = f"{type(error).__name__}: {error}"[:300]
            print(f"WRONG {work} {label}: {wrong[label]}", flush=True)
            machine.synchronize()
    others = {"plain": _plain(work, arguments), "bitsandbytes": _bitsandbytes(work, arguments)}
    steps |= {name: [machine.captured(step)] for name, step in others.items() if step}
    del exact, eager
    smi = _watched()
    found = _timed(machine, steps, next(iter(steps), ""), [rows_], rounds)
    us = {label: _us(samples["median_s"]) for label, samples in found.items()}
    expected = {
        label: round(plan.estimate_us(config, problem, machine.known), 2)
        for label, config in config_of.items()
    }
    called = {
        label: _called_us(machine, work.op, config_of[label], arguments)
        for label in steps
        if work.m <= 16 and label not in others
    }
    machine.note(
        "operator",
        work=work._asdict(),
        dtype=name_of(machine.dtype),
        us=us,
        quartiles={label: [_us(q["q1_s"]), _us(q["q3_s"])] for label, q in found.items()},
        rounds=min((q["rounds"] for q in found.values()), default=0),
        predicted_us=expected,
        called_us=called,
        wrong=wrong,
        smi=smi.communicate()[0],
        **more,
    )
    best: dict[str, str] = {}
    for label in sorted(us, key=us.__getitem__):
        best.setdefault(label.split()[0], f"{us[label]:.1f} ({expected.get(label, 0):.0f})")
    print(f"{work}: " + ", ".join(f"{name} {text}" for name, text in best.items()), flush=True)
    ours = [label for label in steps if label not in others]
    if ours:
        label = min(ours, key=us.__getitem__)
        entry = {"config": config_of[label], "median_us": us[label]}
        path = machine.out / tables.table_name(machine.known)
        tables.write_table(path, machine.known, {problem.bucketed().key(): entry})
        plan.forget_tables()


def _timed(
    machine: Machine,
    steps: dict[str, list[Callable[[], Any]]],
    lead: str,
    drawn_anew: list[Tensor],
    rounds: int,
) -> dict[str, dict[str, float]]:
    """Quartiles of every step, in turns."""
    if not steps:
        return {}
    timed = Rounds(machine.clock, steps, lead, drawn_anew)
    timed.warm_up(3 if machine.rehearse else 10, _ROW_S / 3)
    end = time.perf_counter() + _ROW_S
    for number in range(rounds):
        if number >= 5 and time.perf_counter() > end:
            break
        timed.before()
        timed.lead()
    return {label: quartiles(samples) for label, samples in timed.samples.items()}


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 2)


def _hold(
    label: str,
    op: str,
    arguments: dict[str, Any],
    step: Callable[[], Any],
    eager: list[Tensor],
    exact: list[Tensor],
) -> None:
    """Fail unless a call keeps the budget; what it writes in place is put back."""
    before = arguments["y"].clone() if "y" in arguments else None
    results = _flat(op, step(), arguments)
    for number, (ours, one, other) in enumerate(zip(results, eager, exact, strict=True)):
        assert_within_budget(f"{label} result {number}", ours, one, other)
    if before is not None:
        arguments["y"].copy_(before)


def _reference(op: str, arguments: dict[str, Any], dtype: torch.dtype | None) -> list[Tensor]:
    """The operator's own formula, in ``dtype`` or as the operands are."""

    def cast(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [cast(v) for v in value]
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(dtype) if dtype else value.clone()
        return value

    # What four-bit bytes mean is decoded exactly by itself.
    given = {name: value if name == "quant" else cast(value) for name, value in arguments.items()}
    if dtype:
        given |= {name: dtype for name in ("da_dtype", "db_dtype") if name in given}
    with torch.no_grad():
        found = _flat(op, getattr(reference, op)(**given), given)
    # Of float16 rows S is float32, and judged as the rows are.
    rows_ = given["x"] if "x" in given else given["dy"]
    return [t.to(rows_.dtype) for t in found]


def _flat(op: str, results: Any, arguments: dict[str, Any]) -> list[Tensor]:
    if results is None:
        return [arguments["y"]]
    if isinstance(results, Tensor):
        return [results]
    flat: list[Tensor] = []
    for result in results:
        flat += [result] if isinstance(result, Tensor) else result
    return flat


def _plain(work: Work, arguments: dict[str, Any]) -> Callable[[], Any] | None:
    """The base product alone; of a four-bit weight that of the plain one."""
    if "weight" not in arguments:
        return None
    weight, rows_ = arguments["weight"], arguments["x" if "x" in arguments else "dy"]
    if work.four_bit:
        quant, shape = arguments["quant"], (sum(work.n), work.k)
        weight = four_bit.decode(weight, quant, arguments["quant_block"], shape, rows_.dtype)
    if work.experts:
        weight = weight.transpose(1, 2) if "x" in arguments else weight
        return functools.partial(F.grouped_mm, rows_, weight, offs=arguments["offs"])
    if "x" in arguments:
        return functools.partial(F.linear, arguments["x"], weight)
    return functools.partial(torch.mm, arguments["dy"], weight)


def _bitsandbytes(work: Work, arguments: dict[str, Any]) -> Callable[[], Any] | None:
    """The product with a four-bit base by its kernels, without an adapter."""
    if not work.four_bit or "x" not in arguments:
        return None
    try:
        from bitsandbytes import matmul_4bit
        from bitsandbytes.functional import QuantState
    except ImportError:
        return None
    x, (code, absmax, code8, outer, offset) = arguments["x"], arguments["quant"]
    state = QuantState(
        absmax=absmax,
        shape=torch.Size((sum(work.n), work.k)),
        dtype=x.dtype,
        blocksize=arguments["quant_block"],
        code=code,
        quant_type="nf4",
        offset=offset,
        state2=QuantState(absmax=outer, blocksize=256, code=code8, dtype=torch.float32),
    )
    return functools.partial(matmul_4bit, x, arguments["weight"].t(), state)


def _called_us(machine: Machine, op: str, config: Config, arguments: dict[str, Any]) -> float:
    """Of one call without a graph, the host's part included."""
    run = operator(machine, op, config)
    calls = 3 if machine.rehearse else 30
    machine.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        run(**arguments)
    machine.synchronize()
    return round((time.perf_counter() - begin) / calls * 1e6, 1)


def _watched() -> subprocess.Popen[str]:
    """Clocks, power and heat while a row is timed; nothing where no tool reads them."""
    asked = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu"]
    if shutil.which(asked[0]) is None:
        asked = ["true"]
    asked += ["--format=csv,noheader"] * (len(asked) > 1)
    return subprocess.Popen(asked, stdout=subprocess.PIPE, text=True)


def layer(machine: Machine, row: Layer, number: int) -> None:
    """A step of whole layers: the plain one, eager code at its best, PEFT's and ours."""
    dtype = "float32" if machine.rehearse else name_of(machine.dtype)
    setting = Setting(row.m, row.k, row.n, 16, 16, row.p, dtype, row.mode)
    wanted = ["plain", "addmm", "peft", "fused"]
    found = prepare(setting, machine.device, machine.clock, wanted)
    measured_ = _timed(machine, found.steps, "fused", found.drawn, _ROUNDS)
    machine.note(
        "layer",
        row=number,
        setting=asdict(setting),
        variants=measured_,
        missing=found.missing,
        plans=found.plans,
    )
    times = ", ".join(f"{k} {1e6 * q['median_s']:.1f}" for k, q in measured_.items())
    print(f"layer {setting}: {times}, by {found.plans.get('fused')}", flush=True)


def far(machine: Machine, name: str, number: int) -> None:
    """Rows whose offsets do not fit 32 bits."""
    k, n, r = 4096, 64, 16
    small = Case(512, n, k, r, machine.dtype, device=machine.device, bias=False)
    if machine.rehearse:
        small, k = replace(small, m=40, k=64), 64
    inputs = small.draw()
    arguments = inputs.arguments("lora_linear_fwd")
    m = small.m + 8 if machine.rehearse else 2**31 // k + 300
    x = torch.zeros(m, k, dtype=machine.dtype, device=machine.device)
    x[-small.m :] = inputs.x
    y, _ = operator(machine, "lora_linear_fwd", Config(name))(**arguments | {"x": x})
    exact, eager = (_reference("lora_linear_fwd", arguments, d) for d in (torch.float64, None))
    assert_within_budget(f"{name} far", y[-small.m :], eager[0], exact[0])
    machine.note("far", row=number, plan=name, right=True)
    print(f"2^31 elements, {name}: right", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("step", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--skip", default="")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--of")
    parser.add_argument("--share")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    chosen = parser.parse_args()
    machine = Machine(chosen.out, chosen.rehearse, [s for s in chosen.skip.split(",") if s])
    if chosen.rehearse:
        # The dropout kernel asks facts of its tensors' device, not of the stand-in.
        torch.set_num_threads(1)
    step, *names = chosen.step
    {
        "device": lambda: device(machine),
        "compile": lambda: compile_share(machine, chosen.of, chosen.share),
        "family": lambda: families(machine, *names),
        "replay": lambda: replay(machine),
        "plans": lambda: plans(machine),
        "rows": lambda: run_rows(machine, chosen.first, chosen.seconds),
    }[step]()


if __name__ == "__main__":
    main()
