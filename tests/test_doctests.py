import doctest
import importlib
import pkgutil

import pytest

import samlib

MODULES = [i.name for i in pkgutil.walk_packages(samlib.__path__, "samlib.") if not i.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
