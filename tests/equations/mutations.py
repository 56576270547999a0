"""Mutants of the equations, and small runs of what calls them: a mutant that changes no run stands for nothing."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import inspect
import math
import pkgutil
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import e3rl.equations
from e3rl.config import Config, ErasureConfig, TrainConfig
from e3rl.engine.protocol import Sampling
from e3rl.engine.sampling import SamplingRows, sample
from e3rl.objectives.base import Objective
from e3rl.rollout import judge
from e3rl.rollout.metric import toy_candidate
from e3rl.rollout.statistics import CalibrationStatistics
from e3rl.rollout.stats import summarise
from e3rl.rollout.value import PRIOR
from e3rl.testing.scripted import Scripted
from e3rl.train.attribution import AttributionSettings
from e3rl.train.lessons import with_selection
from e3rl.train.packing import TrainSequence, trajectory_sequence
from e3rl.train.scoring import head_scores, score_sequences
from e3rl.types import Draw, Group, Judgement
from tests.engine.models import build
from tests.objectives.support import batch_of, make, random_group, signals_of
from tests.rollout.worlds import roll, rollout

MODULES: list[ModuleType] = [
    importlib.import_module(f"e3rl.equations.{m.name}") for m in pkgutil.iter_modules(e3rl.equations.__path__)
]

# ---- Mutants ----
_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
    ast.Gt: ast.Lt, ast.Lt: ast.Gt, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
}  # fmt: skip
_METHODS = {
    "mean": "sum", "sum": "mean", "amax": "amin", "std": "var", "exp": "expm1", "expm1": "exp", "minimum": "maximum",
    "tanh": "sigmoid", "sigmoid": "tanh", "log": "log1p", "softmax": "log_softmax", "log_softmax": "softmax",
    "abs": "square", "square": "abs", "sign": "abs", "sqrt": "square", "all": "any", "mul_": "div_", "div_": "mul_",
    "sub_": "add_", "exp_": "expm1_", "zeros_like": "ones_like", "ones_like": "zeros_like",
}  # fmt: skip


def _rewrites(node: ast.AST, parent: ast.AST | None) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in the node's place: another operator, one operand alone, another number, another function."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in _OPERATORS:
        yield "operator", _with(node, op=_OPERATORS[type(node.op)]())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow):
        yield "left alone", node.left
        if isinstance(node.op, ast.Add | ast.Mult):
            yield "right alone", node.right
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _OPERATORS:
        yield "comparison", _with(node, ops=[_OPERATORS[type(node.ops[0])]()])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert | ast.Not) and not _is_place(parent):
        yield "without its sign", node.operand
    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and not _is_place(parent):
        yield "number", ast.Constant(node.value * 2 if node.value else 1)
    if (
        isinstance(node, ast.Attribute)
        and node.attr in _METHODS
        and isinstance(parent, ast.Call)
        and parent.func is node
    ):
        yield f"{_METHODS[node.attr]} for {node.attr}", _with(node, attr=_METHODS[node.attr])
    if isinstance(node, ast.Name) and node.id in ("min", "max"):
        yield "the other extremum", ast.Name({"min": "max", "max": "min"}[node.id], ast.Load())
    if isinstance(node, ast.Return) and not isinstance(
        node.value, ast.Tuple | ast.Compare | ast.Attribute | ast.BoolOp
    ):
        yield "a tenth added", ast.Return(ast.BinOp(ast.Constant(0.1), ast.Add(), node.value))
    if isinstance(node, ast.If | ast.IfExp):
        yield "condition", _with(node, test=ast.UnaryOp(ast.Not(), node.test))


def _is_place(parent: ast.AST | None) -> bool:
    """Whether a number there is a dimension or an index, where another one is an error or the same thing."""
    return isinstance(parent, ast.Subscript | ast.Slice | ast.Tuple | ast.Call | ast.UnaryOp)


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


@dataclass(frozen=True)
class Mutant:
    """One change of one function. ``name`` says which: line and column in the file, what, and what for."""

    module: ModuleType
    function: str
    name: str
    tree: ast.Module

    def compiled(self) -> FunctionType:
        """The changed function, among its module's names."""
        names = dict(vars(self.module))
        exec(compile(ast.fix_missing_locations(self.tree), "<mutant>", "exec"), names)
        return inspect.unwrap(names[self.function])


def mutants(module: ModuleType) -> list[Mutant]:
    """Every mutant of the module's functions."""
    tree = ast.parse(inspect.getsource(module))
    return [m for node in tree.body if isinstance(node, ast.FunctionDef) for m in _of_function(module, node)]


def _of_function(module: ModuleType, function: ast.FunctionDef) -> Iterator[Mutant]:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    bare = _with(function, body=body, decorator_list=[])
    for parts in (*body, *function.args.defaults):
        for node, parent in _walk(parts, None):
            for what, other in _rewrites(node, parent):
                name = f"{function.name}: {ast.unparse(node).splitlines()[0]} ({what})"
                yield Mutant(module, function.name, name, ast.Module([_replaced(bare, node, other)], []))


def _walk(node: ast.AST, parent: ast.AST | None) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    yield node, parent
    for child in ast.iter_child_nodes(node):
        if not isinstance(node, ast.Raise):  # the words of an error
            yield from _walk(child, node)


def _replaced(tree: Any, old: ast.AST, new: ast.AST) -> Any:
    """A copy of the tree in which ``new`` stands in ``old``'s place."""
    if tree is old:
        return copy.deepcopy(new)
    if isinstance(tree, list):
        return [_replaced(item, old, new) for item in tree]
    if not isinstance(tree, ast.AST):
        return tree
    return _with(tree, **{name: _replaced(value, old, new) for name, value in ast.iter_fields(tree)})


# ---- Runs ----
def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().tolist()
    if isinstance(value, dict):
        return sorted((key, _plain(item)) for key, item in value.items())
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def draw_tokens() -> Any:
    """A step of sampling: plain, truncated, measured after truncation, measured at another temperature."""
    rows = [Sampling(), Sampling(0.7, 0.9, 5), Sampling(1.3, 0.8, 0, "truncated"), Sampling(0.6, measured_at=1.5)]
    generator = torch.Generator().manual_seed(1)
    logits, uniforms = 2 * torch.randn(16, 12, generator=generator), torch.rand(16, generator=generator)
    return list(sample(logits, SamplingRows.of(rows * 4, "cpu"), uniforms.double()))


def score_tokens() -> Any:
    """Log-probabilities and entropies of the output matrix, and the gradients of a loss on them."""
    generator = torch.Generator().manual_seed(2)
    head = nn.Linear(4, 9, bias=False)
    head.weight.data = torch.randn(9, 4, generator=generator)
    hidden = torch.randn(5, 4, generator=generator).requires_grad_()
    logprobs, entropies = head_scores(head, hidden, torch.tensor([1, 0, 8, 3, 3]), 0.7)
    (logprobs * torch.arange(1.0, 6.0)).sum().backward()
    return [logprobs, entropies, hidden.grad, head.weight.grad]


@functools.cache
def _model() -> Any:
    return build("Llama")


def score_responses() -> Any:
    """Attention shares of two packed responses, one shorter than L'."""
    ids, zeros = [(5, 6, 7, 8, 9, 10), (5, 11)], torch.zeros(6)
    sequences = [
        TrainSequence((2, 3), r, zeros[: len(r)].long(), zeros[: len(r)] == 0, zeros[: len(r)], 0, i, False)
        for i, r in enumerate(ids)
    ]
    scores = score_sequences(
        _model(), sequences, temperature=1.0, token_budget=64, attribution=AttributionSettings(3, frozenset({0, 1}))
    )
    return [s.shares_T for s in scores]


ERASURE = ErasureConfig(
    base_weight=0.9,
    extremum_weight=0.4,
    perturbation_weight=0.3,
    length_exponent=0.5,
    smoothing_window=2,
    kappa0=0.2,
    kappa1=0.3,
    rho=0.4,
    eta=0.1,
    delta=1.3,
    max_erasures=3,
)
NOTHING_PASSES = replace(ERASURE, length_exponent=0.0, kappa0=-1.5)


def _scripted(draw: Draw, tokens: int) -> Scripted:
    rng = random.Random(f"{draw.sibling}|{draw.segment}|{draw.attempt}")
    scale = rng.choice((0.4, 1.0, 2.5))
    return Scripted(
        tuple(scale * rng.random() for _ in range(tokens)),
        tuple(rng.random() for _ in range(tokens)),
        ended=draw.segment > 0 and rng.random() < 0.15,
    )


def _judged(judgement: Judgement | None) -> Any:
    assert judgement is not None
    u, theta = judgement.uncertainty, judgement.threshold
    terms = (u.total, u.base, u.gradient, u.extremum, u.perturbation, u.smoothed)
    return [*terms, theta.total, theta.baseline, theta.penalty, theta.modulation, judgement.attempt, judgement.verdict]


def _group_of_four(erasure: ErasureConfig) -> Group:
    """Some of its candidates are accepted, some erased, some forced."""
    config = rollout(num_generations=4, segment_length=3, max_segments=5, max_completion_length=13)
    drawn = count()

    def script(draw: Draw, tokens: int) -> Scripted:
        if next(drawn) > 200:
            raise RuntimeError("it never ends")
        return _scripted(draw, tokens)

    (group,) = roll(script, erasure, config)[0].values()
    return group


def roll_out(erasure: ErasureConfig) -> Any:
    """Every judgement and token of a group."""
    group = _group_of_four(erasure)
    records = [[*t.segments, *t.erasures] for t in group.trajectories]
    judged = [[(r.index, list(r.candidate.ids), _judged(r.judgement)) for r in rows] for rows in records]
    return [judged, summarise([group]).r]


def judge_nothing() -> Any:
    """What a candidate without an uncertainty comes to."""
    with pytest.raises(ValueError, match="can't be judged") as refused:
        roll(lambda draw, tokens: Scripted((math.nan,) * tokens), replace(ERASURE, baseline="static"))
    return str(refused.value)


def weigh() -> Any:
    """What makes up for erasing: where some candidates pass, where none does, with and without others committed anyway."""
    found = []
    for erasure in (ERASURE, NOTHING_PASSES):
        group = _group_of_four(erasure)
        for spared in (0.0, 0.15):
            given = replace(erasure, commit_anyway=spared)
            config = Config(erasure=given, train=TrainConfig(selection_cap=1e6))
            sequences = [trajectory_sequence(t, 0) for t in group.trajectories]
            found += [s.selection_T for s in with_selection(sequences, group, config)]
    return found


def reserve() -> Any:
    """Baselines by what a retry is worth: to siblings that differ, are alike, sure or hopeless; at several costs."""
    found = []
    for usual, levels, cost in (
        (1.0, (0.5, 1.1, 3.0), 1.0),
        (1.0, (0.5, 0.6), 1.0),
        (45.0, (1.0, 2.0), 0.0),
        (1.0, (6.0, 9.0), 1.0),
        (1.0, (0.5, 3.0), 3.0),
    ):
        config = ErasureConfig(metric="value", baseline="reservation", retry_cost=cost)
        head = replace(PRIOR, centre=(usual, *PRIOR.centre[1:]), responses=10.0, right=2.0, tokens=80.0)
        group = judge.GroupJudge(len(levels), config, CalibrationStatistics({}, head=head))
        candidates = [toy_candidate((level,) * 3) for level in levels]
        for sibling, candidate in enumerate(candidates):
            group.deliver(sibling, candidate)
        found += [_judged(group.judge(sibling, candidate, 0)) for sibling, candidate in enumerate(candidates)]
    return found


OBJECTIVES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("e3rl", {}),
    ("e3rl", {"allocation": "sequence", "ratio": "segment_mean", "clip_high": 0.05, "clip_low": 0.05}),
    ("e3rl", {"allocation": "anchored", "erased": "contrast"}),
    ("e3rl", {"allocation": "value"}),
    ("e3rl", {"allocation": "sequence", "credit_weight": 0.7}),
    ("erpo", {"eta": 0.7, "gamma": 1.5, "beta_progress": 2.0, "sigma_target": 0.8, "buckets": 20}),
    ("grpo", {}),
    ("gspo", {"kl_coef": 0.1, "clip_low": 0.05, "clip_high": 0.05}),
    ("disco", {"score": "likelihood_ratio"}),
    ("disco", {}),
)


def learn(objective: Objective) -> Any:
    """Advantages of ragged groups with mixed and with equal rewards; loss, gradient and metrics far from the old policy."""
    rng = random.Random(11)
    found: list[Any] = []
    for rewards in ([1.0, 0.0, 0.3, 0.0], [2.0, -1.0, 0.5], [0.3] * 7, [0.7], [1.0, 0.0], [0.0, 1.0]):
        group = random_group(rng, siblings=len(rewards))
        signals = signals_of(group, rewards)
        alone_GT = torch.full(signals.mask_GT.shape, -1.0)  # a single token's U is known
        alone_GT[0, 0] = 0.5
        found += [objective.advantages(s) for s in (signals, replace(signals, uncertainties_GT=alone_GT))]
    sequences = [*random_group(rng, siblings=5), *random_group(rng, siblings=4)]
    sequences[-1]["erased"] = True
    batch = batch_of(sequences, groups=2)
    loss = objective.loss(batch)
    loss.value.backward()
    return [found, loss.value, batch.logprobs_ST.grad, dict(loss.metrics)]


RUNS: dict[str, Callable[[], Any]] = {
    "draw": draw_tokens,
    "score": score_tokens,
    **{f"learn by {name} {options}": functools.partial(learn, make(name, **options)) for name, options in OBJECTIVES},
    "attribute": score_responses,
    "judge nothing": judge_nothing,
    "reserve": reserve,
    "weigh": weigh,
    "roll out": functools.partial(roll_out, ERASURE),
    "roll out, low": functools.partial(roll_out, NOTHING_PASSES),
    "roll out, quantile": functools.partial(
        roll_out, replace(ERASURE, baseline="quantile", quantile=0.4, on_exhausted="least_uncertain")
    ),
}


_FIRST = {"tokens": ("draw", "score"), "attribution": ("attribute",)} | dict.fromkeys(
    ("erasure", "threshold", "uncertainty"),
    ("roll out", "roll out, low", "roll out, quantile", "judge nothing", "reserve", "weigh"),
)
"""Runs to try first, by module, to find a change soon."""


def _outcome(run: Callable[[], Any]) -> str:
    for module in (*MODULES, judge):  # what was cached under other equations
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    try:
        with warnings.catch_warnings(action="ignore"):
            return repr(_plain(run()))
    except Exception as error:
        return f"fails with {type(error).__name__}"


@functools.cache
def undisturbed(name: str) -> str:
    """What a run gives without a mutant."""
    outcome = _outcome(RUNS[name])
    assert not outcome.startswith("fails"), (name, outcome)
    return outcome


def changed_run(mutant: Mutant) -> str | None:
    """The first run that the mutant changes, to the last digit; None where there is none."""
    expected = {name: undisturbed(name) for name in RUNS}
    order = dict.fromkeys((*_FIRST.get(mutant.module.__name__.rpartition(".")[2], ()), *RUNS))
    original: FunctionType = inspect.unwrap(getattr(mutant.module, mutant.function))
    kept = original.__code__, original.__defaults__
    changed = mutant.compiled()
    original.__code__, original.__defaults__ = changed.__code__, changed.__defaults__
    try:
        return next((name for name in order if _outcome(RUNS[name]) != expected[name]), None)
    finally:
        original.__code__, original.__defaults__ = kept
