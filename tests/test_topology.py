"""TPU slices by name, and a compile for one that is not attached."""

import pytest

from sdzero_jax import topology
from sdzero_jax.errors import UserError

COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sdzero_jax import topology
chips = topology.devices(topology.parse(sys.argv[1]))
place = NamedSharding(Mesh(np.array(chips), ("x",)), PartitionSpec("x"))
square = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=place)
stats = jax.jit(lambda a: a + 1, out_shardings=place).lower(square).compile().memory_analysis()
print(json.dumps([len(chips), chips[0].platform, stats.argument_size_in_bytes]))
"""


@pytest.mark.parametrize(
    ("name", "chips", "accelerator"),
    [("v5e:4x4", 16, "v5litepod-16"), ("v5p:2x2x4", 16, "v5p-32"), ("v6e:2x2", 4, "v6e-4")],
)
def test_names_give_chips_and_the_accelerator_type_of_the_cloud(name, chips, accelerator):
    parsed = topology.parse(name)
    assert (parsed.chips, parsed.accelerator_type) == (chips, accelerator)


@pytest.mark.parametrize("name", ["v7:2x2", "v5p:2x2", "v6e", "v6e:2x", "v6e:0x4", "v5e:2x2x2", ""])
def test_a_name_that_is_no_slice_is_refused_with_an_example(name):
    with pytest.raises(UserError, match=r"v5p:2x2x4|v6e:4x4|v5e:4x4"):
        topology.parse(name)


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/nowhere/libtpu.so")
    with pytest.raises(UserError, match="make tpu-compiler"):
        topology.child_environment(topology.parse("v6e:2x2"))


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_program_compiles_for_chips_that_are_not_there(name):
    if topology.libtpu_path() is None:
        pytest.skip("no libtpu: make tpu-compiler")
    chips, platform, arguments = topology.run_for(topology.parse(name), ["-c", COMPILE, name], timeout=300)
    assert (chips, platform) == (4, "tpu")
    assert arguments == 1024 * 1024 * 2 // 4  # bytes per chip, an equal share


@pytest.mark.oracle
def test_the_childs_own_words_come_back():
    if topology.libtpu_path() is None:
        pytest.skip("no libtpu: make tpu-compiler")
    with pytest.raises(UserError, match="too large for a chip"):
        topology.run_for(topology.parse("v6e:2x2"), ["-c", "raise SystemExit('too large for a chip')"])
