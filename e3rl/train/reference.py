"""The reference statistics that a run begins with."""

from __future__ import annotations

from e3rl.config import Config
from e3rl.errors import UserError
from e3rl.evaluate.evaluation import evaluation_settings
from e3rl.models import resolve_model_path
from e3rl.rollout.companions import find_companions
from e3rl.rollout.judge import needs_reference, require_reference
from e3rl.rollout.statistics import ReferenceStatistics, measured_by


def first_reference(config: Config, *, trains: bool, evaluates: bool) -> ReferenceStatistics:
    """Those saved beside the model where thresholds of this run come from them, else none yet.

    ``trains``: it learns from rollouts; ``evaluates``: it has held-out problems. UserError where statistics are missing, or
    were measured with other settings.
    """
    mine = ReferenceStatistics(measured_by(config.rollout, config.erasure))
    judged = {"training": config} if trains and config.rollout.erase else {}
    if evaluates and config.eval.erasable:
        name = f"eval.erasable with eval.num_samples = {config.eval.num_samples}"
        judged[name] = evaluation_settings(config, erase=True)
    needing = {n: c for n, c in judged.items() if needs_reference(c.rollout.num_generations, c.erasure)}
    if not needing:
        return mine
    saved = find_companions(resolve_model_path(config.model.path)).reference
    for name, settings in needing.items():
        try:
            require_reference(settings.rollout.num_generations, settings.erasure, saved)
            assert saved is not None
            saved.check(measured_by(settings.rollout, settings.erasure))
            if "training" in judged:  # adds what it sees to them
                saved.check(mine.settings)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    assert saved is not None
    return saved
