"""The planted mistakes as data; ``make mutants`` plants them."""

import re

from tests import mutants


def test_every_mistake_has_its_place():
    for mutant in mutants.read():
        mutant.planted((mutants.ROOT / mutant.file).read_text(), mutant.new)


def test_those_of_csrc_are_expressions():
    """Each becomes one side of a ?: of the same build."""
    for mutant in filter(lambda mutant: mutant.is_native, mutants.read()):
        for code in (mutant.old, mutant.new):
            while code != (without := re.sub(r"[(\[{][^()\[\]{}]*[)\]}]", "x", code)):
                code = without
            assert not re.search("[,;]", code), mutant.name
