"""Changing a term, coefficient or function of any equation changes a rollout or a loss.

`python -m tests.equations.test_mutations` prints what each mutant changes.
"""

from __future__ import annotations

import inspect
from types import FunctionType

import pytest

from tests.equations.mutations import MODULES, Mutant, changed_run, mutants

EQUIVALENT = {
    "token_attribution: weights_SQ / heads (operator)": "shares are divided by their sum",
    "token_attribution: weights_SQ / heads (left alone)": "shares are divided by their sum",
    "attention_shares: attribution_ST + torch.finfo(attribution_ST.dtype).tiny (operator)": "only where attention is all 0",
    "attention_shares: attribution_ST + torch.finfo(attribution_ST.dtype).tiny (left alone)": "only where it is all 0",
    "progress_buckets: 1 (number)": "only a response of length 0 is divided by it",
    "calibrated_progress: gate_GT * advantages_G.sign()[:, None] (operator)": "a sign is its own inverse",
    "segment_sums: 1 (number)": "one more column that is cut off",
}
"""Mutants that compute the same, and why."""

MUTANTS = {module.__name__.rpartition(".")[2]: mutants(module) for module in MODULES}


@pytest.mark.parametrize("name", MUTANTS)
def test_no_mutant_of_the_equations_goes_unnoticed(name: str) -> None:
    unnoticed = {m.name for m in MUTANTS[name] if changed_run(m) is None}
    assert unnoticed == {m.name for m in MUTANTS[name]} & EQUIVALENT.keys()


def test_there_are_mutants_of_every_function() -> None:
    everything = [m for found in MUTANTS.values() for m in found]
    assert len(everything) > 350
    functions = {(m.module.__name__, m.function) for m in everything}
    named = [(m.__name__, n, inspect.unwrap(f)) for m in MODULES for n, f in vars(m).items() if callable(f)]
    defined = {(m, n) for m, n, f in named if isinstance(f, FunctionType) and f.__module__ == m}
    assert functions == defined


def _line(mutant: Mutant) -> str:
    return f"{mutant.module.__name__.rpartition('.')[2]}.{mutant.name}  ->  {changed_run(mutant) or 'nothing'}"


if __name__ == "__main__":
    for found in MUTANTS.values():
        print(*map(_line, found), sep="\n")
    print(sum(map(len, MUTANTS.values())), "mutants")
