import doctest
from pathlib import Path

import rgfast.ops.cka


def test_the_examples_of_the_readme_run():
    path = Path(rgfast.ops.cka.__file__).with_name("README.md")
    found = doctest.testfile(str(path), module_relative=False)
    assert found.attempted > 5
    assert found.failed == 0
