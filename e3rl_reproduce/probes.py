"""Views of ERPO's figures: the entropy histogram, the perturbation study, conciseness."""

from __future__ import annotations

from typing import Any

from e3rl_reproduce.cells import Measure
from e3rl_reproduce.exam import score
from e3rl_reproduce.output import Line, Panel, Plot, Table
from e3rl_reproduce.perturb import KINDS, NAME, WHERE
from e3rl_reproduce.results import Results
from e3rl_reproduce.scales import Scale
from e3rl_reproduce.statistics import estimate
from e3rl_reproduce.study import plain_exams
from e3rl_reproduce.views import NOTHING, text


def perturbation_measures(scale: Scale) -> tuple[Measure, ...]:
    """The perturbation study on the untrained model: every right response has a dozen continuations, so few of them."""
    options = {"benchmarks": dict(scale.benchmarks), "problems": scale.problems, "samples": 2}
    return (Measure(NAME, "start", options),)


def _first(results: Results) -> tuple[str, Measure]:
    return results.rows[0].label, perturbation_measures(results.scale)[0]


def entropy_histogram(results: Results) -> list[Table | Plot]:
    """How often each entropy occurs, over the tokens of plain responses; one seed."""
    row, measure = _first(results)
    found = results.measurement(row, results.scale.seeds[0], measure)
    if found is None:
        return []
    histogram = found["values"]["histogram"]
    middles = tuple((a + b) / 2 for a, b in zip(histogram["edges"], histogram["edges"][1:], strict=False))
    share = tuple(count / sum(histogram["counts"]) for count in histogram["counts"])
    certain = histogram["below_0.01"]
    note = f"{100 * certain:.1f} % of the tokens have an entropy below 0.01 nats."
    panel = Panel("tokens", "entropy, nats", "share", (Line(row, middles, share),), "steps", log_y=True)
    return [Plot("Entropy of tokens", (panel,), note)]


def _perturbed(results: Results, kind: str, key: str, where: str | None = None) -> list[float]:
    """A value of the perturbation study, by seed."""
    row, measure = _first(results)

    def value(item: dict[str, Any]) -> float:
        found = item["values"]["perturbed"][kind][key]
        return float(found[where] if where else found)

    return list(results.by_seed(row, measure, value).values())


def perturbation_table(results: Results) -> list[Table | Plot]:
    """Accuracy of right responses after a change, by place; mean over seeds, each with its own test."""
    rows = []
    for kind in KINDS:
        means = [text(estimate(_perturbed(results, kind, "accuracy", where))) for where in WHERE]
        p_values = ", ".join(f"{p:.4f}" for p in _perturbed(results, kind, "p_value")) or NOTHING
        problems = ", ".join(f"{n:.0f}" for n in _perturbed(results, kind, "problems")) or NOTHING
        rows.append((kind, *means, p_values, problems))
    columns = ("replacement", *WHERE, "p, most against least, by seed", "problems")
    note = (
        "Right responses of the untrained model, cut at one of 5 % of their tokens; that token kept ('none'), replaced by any "
        "other ('uniform') or by the model's own draw among all others ('model'); the model goes on from there. Sign-flip "
        "test, paired by problem. The paper: perturbing the most uncertain tokens costs 35.2 % accuracy, p < 0.001."
    )
    return [Table("Accuracy of right responses after a change", columns, tuple(rows), note)]


def conciseness(results: Results) -> list[Table | Plot]:
    """Accuracy beside response length, by benchmark."""
    measure = plain_exams(results.scale)[0]
    rows = []
    for row in results.rows:
        for name in results.scale.benchmarks:
            length = results.estimate(row.label, measure, lambda x, n=name: x["values"][n]["length"])  # type: ignore[misc]
            right = results.estimate(row.label, measure, lambda x, n=name: score(x["values"][n], "avg", 1))  # type: ignore[misc]
            rows.append((row.label, name, text(right), text(length, 1)))
    return [Table("Accuracy and length", ("row", "benchmark", "accuracy", "tokens"), tuple(rows))]
