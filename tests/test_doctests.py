import doctest
import importlib
import pkgutil

import pytest

import samlib

MODULES = [info.name for info in pkgutil.iter_modules(samlib.__path__) if info.name != "__main__"]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(f"samlib.{name}")).failed == 0
