"""The Triton kernels compile for the GPUs that the project names, on a machine without one, and need what the table says."""

import pytest
import triton

import triton_resources as resources

# Other versions of Triton and ptxas allocate other registers and order instructions otherwise.
SLACK = 1.15

# One recipe for each thing that kernels do differently; all of them take two minutes: `--write` compiles those.
CHOSEN = [recipe for recipe in resources.RECIPES if recipe.name in (
    "K 4ac64 V 4at64, head_dim 128",
    "K 16 V 4at64, head_dim 128, sinks 4",
    "K 4at48 V 4at96, head_dim 96, rotated",
)]  # fmt: skip


def check(recipe, kernel, target, usage):
    assert usage.spills == 0, (recipe, kernel, target)
    bound = resources.documented()[recipe, kernel, target]
    for name in ("registers", "shared", "instructions"):
        found, most = getattr(usage, name), getattr(bound, name)
        assert found <= most * SLACK, f"{kernel} of {recipe} on sm_{target}: {name} {found}, the table has {most}"


@pytest.fixture(autouse=True)
def compiled():
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=1 makes kernels that cannot be compiled")


@pytest.mark.parametrize("target", resources.TARGETS)
@pytest.mark.parametrize("recipe", CHOSEN, ids=lambda recipe: recipe.name.replace(" ", ""))
def test_kernels_of_a_layer(recipe, target):
    for name, kernel, constants, options in resources.kernels(recipe):
        usage = resources.compile_kernel(kernel, constants, options, recipe.dtype, target)
        check(recipe.name, name, target, usage)


@pytest.mark.parametrize("target", resources.TARGETS)
def test_kernels_without_formats(target):
    for name, kernel, constants, options in resources.plain_kernels(128):
        check("head_dim 128", name, target, resources.compile_kernel(kernel, constants, options, "bf16", target))


def test_the_table_names_every_recipe_and_kernel():
    expected = {(recipe.name, name) for recipe in resources.RECIPES for name, *_ in resources.kernels(recipe)}
    expected |= {(f"head_dim {dim}", name) for dim in (128, 256) for name, *_ in resources.plain_kernels(dim)}
    assert {key[:2] for key in resources.documented()} == expected
