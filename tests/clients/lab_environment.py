"""An environment for verifiers: sums of the lab, one turn each, scored by the last line."""

from __future__ import annotations

from collections.abc import Iterable

import openai
import verifiers.v1 as vf

from e3rl.lab.problems import generate

__all__ = ["LabHarness", "LabTaskset"]


class LabData(vf.TaskData):
    """A sum and what it comes to."""

    answer: str


class LabTask(vf.Task[LabData]):
    """Scored 1 where the answer's last line is right."""

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(f"A:{self.data.answer}" in str(trace.assistant_messages[-1].content))


class LabTaskset(vf.Taskset[LabTask, vf.TasksetConfig]):
    """Held-out sums of three steps."""

    def load(self) -> Iterable[LabTask]:
        for problem in generate("chain", 3, "heldout", 8):
            yield LabTask(LabData(prompt=str(problem.prompt), answer=str(problem.answer)), self.config.task)


class LabHarness(vf.Harness[vf.HarnessConfig]):
    """Asks once, in this process."""

    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, **_):
        client = openai.AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0)
        async with client:
            messages = [{"role": "user", "content": data.prompt}]
            answer = await client.chat.completions.create(model=ctx.model, messages=messages)
        return vf.ProgramResult(0, answer.choices[0].message.content, "")
