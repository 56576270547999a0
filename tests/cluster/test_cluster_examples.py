"""The cluster examples parse, and every e3rl command in them does."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from e3rl.cli.main import _OVERRIDE, _parser
from e3rl.cli.recipes import find_recipe
from e3rl.config import load_config

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"
SCRIPTS = sorted(CLUSTER.glob("*.sh"))


def check_command(words: list[str]) -> None:
    """A command line of e3rl, whose overrides name settings that there are."""
    overrides = [word for word in words if _OVERRIDE.match(word)]
    _parser(words[0]).parse_args([word for word in words if word not in overrides])
    load_config(None, (), overrides)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_scripts_parse_and_so_do_their_commands(script: Path):
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text().replace("\\\n", " ")
    assert re.search(r"^#SBATCH --nodes=\d+$", text, re.MULTILINE)
    commands = re.findall(r"\be3rl ((?:train|rollout-server) .*)", text)
    assert commands
    for command in commands:
        plain = (
            command.replace('"$@"', "")
            .replace("$recipe", "demo")
            .replace("$topology", "topologies/32xh100")
            .replace("$gpu)", "0)")
            .rstrip("& ")
        )
        plain = re.sub(r"\$\(\(.*?\)\)", "8", plain).replace("[$servers]", '[\\"http://node:8100\\"]')
        check_command(shlex.split(re.sub(r"\$\w+", "name", plain)))


def test_the_kuberay_job_has_what_the_operator_asks_for():
    job: dict[str, Any] = yaml.safe_load((CLUSTER / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    head, [workers] = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for group, gpus in ((head, None), (workers, "1")):
        [container] = group["template"]["spec"]["containers"]
        assert container["image"]
        assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in group["template"]["spec"].get("volumes", [])}
    words = shlex.split(job["spec"]["entrypoint"])
    assert workers["replicas"] == _gpus(words[words.index("--overlay") + 1])
    check_command([word.replace("/recipe/recipe.toml", "demo") for word in words[1:]])


def _gpus(topology: str) -> int:
    """How many an overlay's processes take."""
    config = load_config(find_recipe("qwen3-4b"), [find_recipe(topology)])
    train, rollout = config.train, config.rollout
    return int(train.workers * train.worker_gpus + rollout.workers * rollout.worker_gpus)


def test_the_slurm_job_starts_the_topologies_on_as_many_gpus_as_they_take():
    text = (CLUSTER / "slurm_ray.sh").read_text()
    uses = re.findall(r"^#   sbatch --nodes=(\d+) \S+ (\S+) (\S+)$", text, re.MULTILINE)
    assert {topology for _, _, topology in uses} == {"topologies/8xh100", "topologies/32xh100"}
    [each] = re.findall(r"^#SBATCH --gpus-per-node=(\d+)$", text, re.MULTILINE)
    assert set(re.findall(r"--num-gpus=(\d+)", text)) == {each}
    for nodes, recipe, topology in uses:
        assert int(nodes) * int(each) == _gpus(topology)
        load_config(find_recipe(recipe), [find_recipe(topology)])
    assert '--overlay "$topology"' in text
    assert "rollout.workers" not in text
    assert "train.workers" not in text
