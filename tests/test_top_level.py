"""What `import lowrank_ref` gives, and what it costs."""

import subprocess
import sys

import pytest

import lowrank_ref


def test_every_name_is_there_and_stands_in_dir():
    assert len(lowrank_ref.__all__) == 10 and set(lowrank_ref.__all__) <= set(dir(lowrank_ref))
    namespace = {}
    exec("from lowrank_ref import *", namespace)
    for name in lowrank_ref.__all__:
        assert namespace[name] is getattr(sys.modules[namespace[name].__module__], name)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LoRA'"):
        lowrank_ref.LoRA  # noqa: B018


def test_the_import_alone_loads_nothing_heavy():
    code = "import lowrank_ref, sys; assert not {'torch', 'numpy', 'safetensors'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
