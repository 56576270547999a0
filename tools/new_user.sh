#!/usr/bin/env bash
# The path of a new user, each step timed: clone, demo, own data, own reward, starter recipe, LoRA, stop, resume, export, serve.
# usage: tools/new_user.sh [BIN]    without BIN: a fresh clone of this repository, set up by make; BIN: the directory of e3rl and
# python of an environment that is there. vLLM loads the model too where E3RL_VLLM names a python that has it.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
bin=${1:+$(cd "$1" && pwd)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
small=(eval.limit=4 eval.num_samples=2 rollout.num_generations=4 train.prompts_per_step=4)
began=0

step() { # NAME COMMAND…: runs it, says how long it took; a failure ends the script with what it printed
    local name=$1 start=$SECONDS
    shift
    "$@" >"log" 2>&1 || { echo "FAILED: $name: $*"; tail -20 log; exit 1; }
    printf '%-34s %4d s\n' "$name" $((SECONDS - start))
}
expect() { grep -q -- "$1" log || { echo "FAILED: the step before does not say '$1'"; tail -20 log; exit 1; }; }

if [ -z "$bin" ]; then
    step "clone" git clone -q "$here" clone
    step "make setup" make -C clone setup
    step "the extra for LoRA" clone/.venv/bin/python -m pip install -q --disable-pip-version-check "./clone[lora,test]"
    bin=$work/clone/.venv/bin
fi

for n in $(seq 1 24); do # some of which the embedded model gets right
    chain=$((40 + 2 * n))-7+3+1-$((n % 8 + 1))-8
    printf '{"prompt": "%s:", "answer": "%d"}\n' "$chain" $((chain))
done >problems.jsonl
cat >my_rewards.py <<'PY'
import re


def right(completions, answer, **columns):
    found = [re.findall(r"\d+", c if isinstance(c, str) else c[-1]["content"]) for c in completions]
    return [float(bool(n) and int(n[-1]) == int(a)) for n, a in zip(found, answer)]
PY

step "train the demo, 2 steps" "$bin/e3rl" train demo train.steps=2 "${small[@]}"
expect "run     runs/demo"
step "decode with erasing" "$bin/e3rl" decode lab "81-7+3+1-6-8:"
expect "A:64"
expect "2 segments erased"
step "a starter recipe" "$bin/e3rl" init lab problems.jsonl --output my.toml --reward my_rewards.py:right --length 60
expect "written: my.toml"
step "what the model will see" "$bin/e3rl" data my.toml
expect "24 with an answer"
step "own data and reward, LoRA, 2 steps" "$bin/e3rl" train my.toml "${small[@]}" train.steps=2 model.lora_r=4 erasure.rho=0
expect "model   runs/my/model"
step "the adapters in PEFT" "$bin/python" -c "
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained('runs/my/adapter')
assert model.peft_config['default'].r == 4
assert any(bool(p.any()) for n, p in model.named_parameters() if 'lora_B' in n), 'adapters that learnt nothing'"
run=("$bin/e3rl" train my.toml "${small[@]}" run.name=stopped train.steps=6 erasure.rho=0)
"${run[@]}" >log 2>&1 &
pid=$!
for _ in $(seq 1500); do [ -s runs/stopped/metrics.jsonl ] && break; sleep 0.2; done
kill -INT $pid
began=$SECONDS
code=0
wait $pid || code=$?
printf '%-34s %4d s\n' "stop" $((SECONDS - began))
[ "$code" = 130 ] || { echo "FAILED: a stopped run ended with code $code"; tail log; exit 1; }
expect "stopping as soon as the state is whole"
expect "--resume"
step "resume to the end" "${run[@]}" --resume
expect ", 6 steps in"
[ "$(wc -l <runs/stopped/metrics.jsonl)" = 6 ] || { echo "FAILED: a resumed run has other steps than 1 to 6"; exit 1; }
step "the model in transformers" "$bin/python" -c "
import json
from transformers import AutoModelForCausalLM, AutoTokenizer
m, t = (k.from_pretrained('runs/my/model') for k in (AutoModelForCausalLM, AutoTokenizer))
ids = t.apply_chat_template([{'role': 'user', 'content': '3+4:'}], add_generation_prompt=True, return_tensors='pt', return_dict=True)
prompt = ids['input_ids'][0].tolist()
made = m.generate(**ids, max_new_tokens=24, do_sample=False)[0].tolist()[len(prompt):]
json.dump({'prompt': prompt, 'made': made, 'text': t.decode(made, skip_special_tokens=True)}, open('greedy.json', 'w'))"
if [ -n "${E3RL_VLLM:-}" ]; then # the same model gives the same tokens
    step "the model in vLLM" env VLLM_CPU_KVCACHE_SPACE=1 "$E3RL_VLLM" -c "
import json
from vllm import LLM, SamplingParams
greedy = json.load(open('greedy.json'))
model = LLM('runs/my/model', max_model_len=64, enforce_eager=True)
[made] = model.generate([{'prompt_token_ids': greedy['prompt']}], SamplingParams(max_tokens=24, temperature=0))
assert list(made.outputs[0].token_ids) == greedy['made'], (made.outputs[0], greedy)"
fi
"$bin/e3rl" serve runs/my/model --port 18437 >serve.log 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true; rm -rf "$work"' EXIT
for _ in $(seq 900); do grep -q "/v1" serve.log && break; sleep 0.2; done
step "an OpenAI client" "$bin/python" -c "
import json
from openai import OpenAI
client = OpenAI(base_url='http://127.0.0.1:18437/v1', api_key='none')
made = client.chat.completions.create(model=client.models.list().data[0].id, messages=[{'role': 'user', 'content': '3+4:'}],
                                      max_tokens=24, temperature=0, extra_body={'e3rl': {'erase': False}})
assert made.choices[0].message.content == json.load(open('greedy.json'))['text'], made"
kill $server
wait $server || true
echo "all steps: $SECONDS s"
