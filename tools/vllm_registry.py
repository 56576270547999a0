"""Writes tools/vllm_registry.json: which classes the installed vLLM generates with, and how. Needs vLLM and nothing of e3rl.

own: an implementation of vLLM's; transformers: listed, and run through transformers' code; dropped: an earlier version had it.
"""

from __future__ import annotations

import json
from pathlib import Path

DATA = Path(__file__).with_name("vllm_registry.json")


def registry() -> dict[str, object]:
    """The version, and how each class is run."""
    import vllm
    from vllm.model_executor.models import registry as known

    ways = dict.fromkeys(known._PREVIOUSLY_SUPPORTED_MODELS, "dropped")
    ways |= dict.fromkeys(known._TRANSFORMERS_SUPPORTED_MODELS, "transformers")
    ways |= dict.fromkeys(known._TEXT_GENERATION_MODELS, "own")
    ways |= dict.fromkeys(known._MULTIMODAL_MODELS, "own")
    causal = {name: ways[name] for name in sorted(ways) if name.endswith(("ForCausalLM", "LMHeadModel"))}
    return {"vllm": vllm.__version__, "classes": causal}


if __name__ == "__main__":
    DATA.write_text(json.dumps(registry(), indent=1) + "\n", encoding="utf-8")
