"""Tiles on disk: any einsum within a budget, peak memory measured, wrong files, nothing left behind."""

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan import relations
from capstan.errors import DoesNotFit, InputError, UsageError
from capstan.relations.memory_plan import plan_memory
from capstan.relations.program import lower
from capstan.relations.stored_tensor import create_npy, open_npy
from capstan.relations.tiling import choose_tiling, describe_tiling, smallest_tiling

from .arbitrary import einsums


def saved(folder, name, array):
    path = folder / f"{name}.npy"
    np.save(path, array)
    return relations.open_tensor(path)


@settings(max_examples=60, deadline=None)
@given(case=einsums(most_operands=4), fortran=st.booleans(), threads=st.integers(1, 2), to_file=st.booleans())
def test_any_einsum_from_disk_within_its_smallest_budget_equals_numpys(
    tmp_path_factory, case, fortran, threads, to_file
):
    folder = tmp_path_factory.mktemp("einsum")
    arrays = [np.asfortranarray(array) if fortran and array.ndim else array for array in case.arrays]
    operands = [saved(folder, str(at), array) for at, array in enumerate(arrays)]
    expression = relations.einsum(case.text, *operands)
    program = lower(expression)
    with_most = plan_memory(program, budget_bytes=None, is_output_on_disk=to_file).peak_bytes
    output = folder / "out.npy" if to_file else None
    done = (
        relations.compute_with_accounts(
            expression, memory=max(with_most - 1, 0), threads=threads, output=output
        )
        if _fits(program, with_most - 1, to_file)
        else relations.compute_with_accounts(expression, memory=with_most, output=output)
    )
    found = np.load(output) if output else done.result
    assert np.array_equal(found, np.einsum(case.text, *case.arrays))
    assert done.trace.traffic == done.plan.traffic
    assert done.trace.peak_bytes["host"] <= done.plan.peak_bytes["host"] <= done.plan.budget_bytes["host"]
    assert sorted(each.name for each in folder.iterdir() if each.name.startswith(".")) == []


def _fits(program, budget, to_file):
    try:
        plan_memory(program, budget_bytes=max(budget, 0), is_output_on_disk=to_file)
    except DoesNotFit:
        return False
    return True


CASES = {
    "matrices": ("ij,jk->ik", [(800, 700), (700, 900)]),
    "batched": ("bij,bjk->bik", [(9, 200, 300), (9, 300, 150)]),
    "transposed": ("ji,kj->ki", [(700, 800), (900, 700)]),
    "chain": ("ij,jk,kl->il", [(600, 500), (500, 700), (700, 500)]),
    "a sum beside": ("ijq,jk->ik", [(90, 100, 120), (100, 120)]),
    "outer": ("i,j->ij", [(1000,), (1100,)]),
    "full sum": ("ij,ij->", [(900, 1000), (900, 1000)]),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_peak_memory_that_numpy_really_allocates_keeps_the_budget(tmp_path, name, threads):
    text, shapes = CASES[name]
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-3, 4, shape).astype(np.float64) for shape in shapes]
    operands = [saved(tmp_path, str(at), array) for at, array in enumerate(arrays)]
    wanted = np.einsum(text, *arrays, optimize=True)
    expression = relations.einsum(text, *operands)
    budget = 2 * 2**20
    tracemalloc.start()
    try:
        done = relations.compute_with_accounts(
            expression, memory=budget, threads=threads, output=tmp_path / "out.npy"
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(np.load(tmp_path / "out.npy"), wanted)
    assert "tiles" in done.plan.choices[0].value
    assert done.trace.traffic == done.plan.traffic
    assert done.trace.peak_bytes["host"] <= done.plan.peak_bytes["host"] <= budget
    # Beside arrays, tracemalloc counts plans, offsets of reads and threads: a quarter of the budget here.
    assert peak <= budget + 512 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_resident_memory_of_a_process_stays_within_budget_and_slack(tmp_path):
    script = """
import sys
import numpy as np
from capstan import relations
from numpy.random import default_rng
np.ones((64, 64)) @ np.ones((64, 64))
folder, memory = sys.argv[1:]
a, b = (relations.open_tensor(f"{folder}/{name}.npy") for name in "ab")
small = relations.open_tensor(f"{folder}/small.npy")
relations.einsum("ij,jk->ik", small, small).compute(memory="100KiB", output=f"{folder}/first.npy")
def resident(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again from what is resident now
before = resident("VmRSS")
relations.einsum("ij,jk->ik", a, b).compute(memory=memory, output=f"{folder}/c.npy", threads=2)
print(resident("VmHWM") - before)
"""
    rng = np.random.default_rng(0)
    for name, shape in (("a", (1500, 2000)), ("b", (2000, 1500)), ("small", (90, 90))):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal(shape).astype(np.float32))
    budget = 8 * 2**20  # operands 24 MB, result 9 MB
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(budget)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    # BLAS packs into buffers of its own and the allocator keeps freed blocks: 6 MiB of slack, where the
    # operands and the result would take 33 MB.
    assert budget / 4 <= int(done.stdout) <= budget + 6 * 2**20
    a, b = (np.load(tmp_path / f"{name}.npy") for name in "ab")
    # Sums of 2000 float32 products of normals: error about sqrt(2000) * 45 * 6e-8, far below 1e-2.
    assert np.allclose(np.load(tmp_path / "c.npy"), a @ b, rtol=0, atol=1e-2)


def test_with_room_for_everything_each_contraction_is_one_call(tmp_path):
    x = np.arange(12.0).reshape(3, 4)
    expression = relations.einsum("ij,kj->ik", saved(tmp_path, "x", x), x)
    prepared = relations.prepare(expression, memory="1MiB")
    assert prepared.memory_plan.is_direct
    assert np.array_equal(expression.compute(memory="1MiB"), x @ x.T)


def test_torch_tensors_stay_torch_under_a_budget(tmp_path):
    x = torch.arange(9000.0).reshape(90, 100) % 7
    expression = relations.apply("relu", relations.einsum("ij,kj->ik", x, x))
    found = expression.compute(memory="70KiB", scratch=tmp_path)
    assert torch.equal(found, torch.relu(x @ x.T))


def test_an_expression_with_maps_and_a_shared_value_runs_in_tiles(tmp_path):
    x = np.arange(120.0 * 110).reshape(120, 110) % 5 - 2
    product = relations.einsum("ij,kj->ik", saved(tmp_path, "x", x), x)
    expression = relations.einsum("ij,jk->ik", product, relations.apply("relu", product))
    done = relations.compute_with_accounts(expression, memory="60KiB", output=tmp_path / "y.npy")
    square = x @ x.T
    assert np.array_equal(np.load(tmp_path / "y.npy"), square @ np.maximum(square, 0))
    assert done.trace.peak_bytes["host"] <= 60 * 1024
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.npy", "y.npy"]


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 130), min_size=3, max_size=3), share=st.floats(0.05, 1))
def test_no_other_halving_of_the_labels_that_fits_costs_less(tmp_path_factory, sizes, share):
    i, j, k = sizes
    program = lower(relations.einsum("ij,jk->ik", np.ones((i, j)), np.ones((j, k))))
    (operation,) = program.operations
    stored = [True, True]
    least = smallest_tiling(operation, stored).working_bytes
    whole = describe_tiling(operation, {"i": i, "j": j, "k": k}, stored).working_bytes
    budget = int(least + share * (whole - least))
    chosen = choose_tiling(operation, budget, stored)
    assert chosen is not None
    assert chosen.working_bytes <= budget
    for divide in ((a, b, c) for a in (1, 2, 4) for b in (1, 2, 4) for c in (1, 2, 4)):
        tiles = {label: -(-size // part) for label, size, part in zip("ikj", (i, k, j), divide, strict=True)}
        other = describe_tiling(operation, tiles, stored)
        if other.working_bytes <= budget and min(tiles.values()) >= 16:
            assert chosen.cost <= other.cost


def test_a_budget_below_the_smallest_tile_is_refused_with_the_bytes_that_are_needed(tmp_path):
    x = saved(tmp_path, "x", np.ones((200, 200)))
    expression = relations.einsum("ij,jk->ik", x, x)
    with pytest.raises(DoesNotFit) as caught:
        relations.prepare(expression, memory="1KiB", is_output_on_disk=True)
    needed = int(str(caught.value).rpartition("at least ")[2].split()[0])
    assert (
        relations.prepare(expression, memory=needed, is_output_on_disk=True).plan.peak_bytes["host"] <= needed
    )
    with pytest.raises(DoesNotFit, match="output="):
        relations.prepare(expression, memory="100KiB")


def test_files_that_are_wrong_are_refused_when_they_are_opened(tmp_path):
    np.save(tmp_path / "whole.npy", np.ones((20, 20)))
    whole = (tmp_path / "whole.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(whole[:-8])
    (tmp_path / "text.npy").write_text("not an array")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "big.npy", np.ones(3, ">f8"))
    np.save(tmp_path / "words.npy", np.array(["a"]))
    np.save(tmp_path / "none.npy", np.ones((0, 2)))
    for name, says in {
        "missing": "no file",
        "short": "cut short.*3328 bytes.*3320",
        "text": "is no .npy",
        "empty": r"is no .npy file: .*\w\. Write it",
        "big": "byte order",
        "words": "numbers",
        "none": "empty",
    }.items():
        with pytest.raises(InputError, match=says):
            open_npy(tmp_path / f"{name}.npy")


def test_a_file_cut_short_after_it_was_opened_is_found_and_leaves_no_output(tmp_path):
    x = saved(tmp_path, "x", np.ones((100, 100)))
    os.truncate(tmp_path / "x.npy", 5000)
    with pytest.raises(InputError, match="was cut short"):
        relations.einsum("ij,jk->ik", x, x).compute(memory="60KiB", output=tmp_path / "y.npy")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.npy"]


def test_outputs_that_cannot_be_are_refused_before_anything_runs(tmp_path):
    x = saved(tmp_path, "x", np.ones((4, 4)))
    product = relations.einsum("ij,jk->ik", x, x)
    with pytest.raises(InputError, match="also an operand"):
        product.compute(output=tmp_path / "x.npy")
    with pytest.raises(InputError, match="no folder"):
        product.compute(output=tmp_path / "nowhere" / "y.npy")
    with pytest.raises(UsageError, match="end in .npy"):
        product.compute(output=tmp_path / "y.txt")


@settings(max_examples=40, deadline=None)
@given(data=st.data(), fortran=st.booleans())
def test_every_box_of_a_file_is_read_as_numpy_slices_it(tmp_path_factory, data, fortran):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    box = tuple(
        data.draw(
            st.tuples(st.integers(0, size - 1), st.integers(1, size)).filter(lambda pair: pair[0] < pair[1])
        )
        for size in shape
    )
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    path = tmp_path_factory.mktemp("box") / "x.npy"
    np.save(path, np.asfortranarray(array) if fortran and array.ndim else array)
    part = array[tuple(slice(*pair) for pair in box)]
    assert np.array_equal(open_npy(path).read(box), part)
    fresh = create_npy(path.with_name("y.npy"), shape, array.dtype)
    fresh.write(box, part)
    wanted = np.zeros_like(array)
    wanted[tuple(slice(*pair) for pair in box)] = part
    assert np.array_equal(np.load(fresh.path), wanted)
