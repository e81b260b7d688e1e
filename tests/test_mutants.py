"""Every planted mistake still has its place in the sources; ``make mutants`` plants them."""

from tests import mutants


def test_every_mistake_has_its_place():
    for mutant in mutants.read():
        mutant.planted((mutants.ROOT / mutant.file).read_text(), mutant.new)
