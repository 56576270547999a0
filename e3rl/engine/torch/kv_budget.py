"""How many rows a bound on the KV cache's memory leaves."""

from __future__ import annotations

from e3rl.engine.torch.storage import physical_slots
from e3rl.errors import UserError

MIB = 2**20


def rows_within(budget: int, row_bytes: int, wanted: int, group: int, positions: int) -> int:
    """The most rows, up to ``wanted``, whose slots take at most ``budget`` bytes; 0 sets no bound.

    Raises UserError where a group of ``group`` rows could never be held: it would wait for ever.
    """
    if not budget:
        return wanted
    rows = max((n for n in range(1, wanted + 1) if physical_slots(n) * row_bytes <= budget), default=0)
    if rows < min(group, wanted):
        needed = -(-physical_slots(group) * row_bytes // MIB)
        raise UserError(
            f"rollout.kv_budget = {budget // MIB} MiB holds {rows} rows of {positions} tokens "
            f"({row_bytes / MIB:.3g} MiB each), and a group of {group} siblings needs {needed} MiB: raise it to that, or "
            "lower rollout.num_generations, segment_length, max_segments or max_completion_length"
        )
    return rows
