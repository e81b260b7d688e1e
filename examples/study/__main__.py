"""The study's command line: measures what has not been measured, and writes the report."""

from __future__ import annotations

import json
import sys
import time
import traceback
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from ..demo.__main__ import prepare_environment
from ..demo.settings import UserError
from . import QUESTIONS
from .settings import Study, parse

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Run the study; returns the exit status: 1 if a question failed, 2 for a wrong argument."""
    try:
        study = parse(arguments)
        prepare_environment(study.settings)
        return run(study)
    except UserError as error:
        # Other libraries' messages go on over several lines; their first says what is wrong.
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was measured is kept for the next time", file=sys.stderr)
        return 130


def run(study: Study) -> int:
    from bench.tables import origin

    from . import report
    from .lab import Lab, Unanswered

    out = study.settings.out
    lab = Lab(study.settings, study.budget)
    here = origin(lab.device, ["torch", "transformers", "peft"])
    print(lab.told)
    failed = []
    reasons = {}
    for name in study.questions:
        made_from = _made_from(name, study, lab.digest, here)
        if not study.again and _result(out, name, made_from):
            print(f"{name}: measured before, see --again")
            continue
        (out / f"{name}.json").unlink(missing_ok=True)
        began = time.perf_counter()
        try:
            content = _question(name).measure(lab)
        except Unanswered as reason:
            reasons[name] = str(reason)
            continue
        except Exception as error:
            # The others' answers are wanted nevertheless.
            traceback.print_exc()
            failed.append(name)
            reasons[name] = f"it failed: {type(error).__name__}: {str(error)[:200]}"
            continue
        seconds = time.perf_counter() - began
        result = {"made_from": made_from, "origin": here, "seconds": seconds, "content": content}
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    answers, missing = [], []
    for number, name in enumerate(QUESTIONS, 1):
        if found := _result(out, name, _made_from(name, study, lab.digest, here)):
            what = (found[key] for key in ("content", "origin", "seconds"))
            answers.append(report.Answer(name, number, _question(name), *what))
        elif name in reasons:
            missing.append(f"No answer to {number}, {name}: {reasons[name]}")
    pages = report.write(answers, [lab.told, *missing], out)
    for answer in answers:
        if answer.name in study.questions:
            print(f"\n{answer.heading}\n  {answer.module.finding(answer.content)}")
    print("\n".join(["", *missing, f"wrote {', '.join(map(str, pages))}"]))
    return 1 if failed else 0


def _question(name: str) -> Any:
    return import_module(f"{__package__}.{name}")


def _made_from(name: str, study: Study, base: str, origin: dict[str, Any]) -> dict[str, Any]:
    """What a result depends on; with any other it is measured anew."""
    from .lab import sources

    own = (ROOT / "examples/study" / file for file in (f"{name}.py", "lab.py", "houlsby.py"))
    made_from = {
        "budget": asdict(study.budget),
        "model": study.settings.model,
        "data": study.settings.data,
        "base_and_rows": base,
        "sources": sources(*own, ROOT / "examples/demo/training.py", ROOT / "lora_kernels"),
        "device_name": origin["device_name"],
        "versions": origin["versions"],
    }
    return json.loads(json.dumps(made_from))


def _result(out: Path, name: str, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The question's result in ``out``, if it was made from the same."""
    try:
        found = json.loads((out / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    return found if found["made_from"] == made_from else None


if __name__ == "__main__":
    sys.exit(main())
