"""A study of a tiny model in a folder of the session: each question is measured once, when a test
first looks at it."""

import json

import pytest

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from examples.study import __main__ as study
from examples.study import settings

TINY = settings.Budget(
    seconds=1.0,
    steps=2,
    seeds=(0, 1),
    rounds=1,
    quick=True,
    layers=1,
    width=32,
    pretrain_seconds=0.3,
    batch=2,
    context=32,
    evaluation_blocks=4,
)


class Tiny:
    """The command line on a tiny model, and what it has left in ``out``."""

    def __init__(self, folder):
        self.out, self.data = folder / "out", folder / "text"
        self.data.write_text("".join(f"line {i} of {i * i}\n" for i in range(800)))

    def __call__(self, *arguments):
        where = ["--data", str(self.data), "--out", str(self.out)]
        return study.main([*arguments, "--quick", *where])

    def content(self, name):
        """A copy of what the question ``name`` has measured, to be edited."""
        result = self.out / f"{name}.json"
        if not result.exists():
            assert self(name) == 0
        return json.loads(result.read_text())["content"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(settings, "QUICK", TINY)
        yield Tiny(tmp_path_factory.mktemp("study"))
