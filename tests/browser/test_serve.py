"""The live page of a server in a browser: what a client gets, and what was erased before."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.request import Request, urlopen

from e3rl.config import ModelConfig
from e3rl.models import load_policy, resolve_model_path
from e3rl.rollout.companions import find_companions
from e3rl.serve.service import Service
from tests.serve.conftest import serving
from tests.serve.test_server import CHAT, post


def test_the_live_page_shows_what_is_kept_and_what_is_struck_out(page: Any) -> None:
    path = resolve_model_path("lab")
    found = find_companions(str(path))
    policy = load_policy(ModelConfig(path=str(path), device="cpu"))
    service = Service(policy, found.config(), found.calibration, name="lab", max_length=256, queue_limit=4, live=True)
    with serving(service) as url:
        page.goto(f"{url}/")
        erased = 0
        for seed in range(3):
            asked = {"model": "lab", "messages": [{"role": "user", "content": "27+35-18="}], "n": 4, "seed": seed}
            status, answer = post(url, CHAT, {**asked, "e3rl": {"erase": True}})
            assert status == 200
            erased += sum(c["e3rl"]["erasures"] for c in answer["choices"])
        kept = sum(c["e3rl"]["segments"] for c in answer["choices"])
        last = page.locator("article", has_text="request 3,")
        last.locator(".kept").nth(kept - 1).wait_for()
        texts = ["".join(a.locator("span:not(.erased)").all_text_contents()) for a in reversed(last.all())]
        assert sorted(texts) == sorted(c["message"]["content"] for c in answer["choices"])
        assert page.locator("main .erased").count() == erased > 0
        assert f", {erased} erased" in page.locator("#counts").text_content()
        page.get_by_label("hide what was erased").check()
        assert page.locator("main .erased:visible").count() == 0
        last.first.locator(".kept").first.click()
        assert re.fullmatch(r"segment 0: U [\d.]+, threshold [\d.]+", page.locator("#facts").text_content())
        before = page.locator("#counts").text_content()
        plain = {**asked, "n": 1, "stream": True, "max_tokens": 12, "e3rl": {"erase": False, "segment_length": 12}}
        with urlopen(
            Request(f"{url}{CHAT}", json.dumps(plain).encode(), {"Content-Type": "application/json"})
        ) as stream:
            stream.read()
        page.locator("article", has_text="request 4,").locator(".plain").nth(2).wait_for()
        more = int(before.split()[0]) + 1
        assert page.locator("#counts").text_content() == before.replace(before.split()[0], str(more), 1)
        page.goto("about:blank")
    service.close()
