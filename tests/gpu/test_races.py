"""The same bits every time: repeats, and several streams at once."""

from __future__ import annotations

import contextlib

import pytest

from .problems import SOME, Problem, Tensors, assert_same, bits, on, problems


class NoKernelError(Exception):
    """The backend leaves this op to the others."""


def run(problem: Problem, inputs: Tensors) -> Tensors:
    try:
        return problem.run(inputs)
    except RuntimeError as error:
        if "has no kernel for" in str(error):
            raise NoKernelError from error
        raise


@pytest.mark.parametrize("name", SOME)
def test_the_same_bits_every_time(gpu, small, repeats, name):
    problem = problems(small)[name]
    inputs = on(gpu.device, problem.make(5))
    first = {key: bits(x) for key, x in problem.run(inputs).items()}
    different = sum(
        (bits(x) != first[key]).any().int()  # stays on the GPU: nothing waits between the repeats
        for _ in range(repeats(250))
        for key, x in problem.run(inputs).items()
    )
    assert int(different) == 0


def test_streams_do_not_mix(gpu, small, repeats):
    """All ops, each on a stream of its own, again and again, behind work that keeps the GPU busy."""
    found, inputs, wanted = {}, {}, {}
    for name in SOME:
        problem = problems(small)[name]
        inputs[name] = on(gpu.device, problem.make(6))
        with contextlib.suppress(NoKernelError):
            wanted[name] = run(problem, inputs[name])
            found[name] = problem
    assert found
    gpu.synchronize()
    streams = {name: gpu.cuda.Stream() for name in found}
    results = []
    for _ in range(repeats(20)):
        for name, problem in found.items():
            with gpu.cuda.stream(streams[name]):
                results.append((name, problem.run(inputs[name])))
        results = results[-3 * len(found) :]
    gpu.synchronize()
    for name, result in results:
        assert_same(result, wanted[name])
