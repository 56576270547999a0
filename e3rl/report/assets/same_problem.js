// One problem under two policies: in two runs, or early and late in one run.

const MOST_PROBLEMS = 200;

// By problem, each group that the page holds: which run, at which step, and its mean reward.
function placesByProblem(runs) {
  const found = new Map();
  for (const run of runs) {
    const { problem = [], step, reward } = run.index;
    problem.forEach((name, i) => {
      if (!found.has(name)) found.set(name, new Map());
      const places = found.get(name), key = `${run.number}/${step[i]}`;
      if (!places.has(key)) places.set(key, { key, run: run.number, label: run.label, step: step[i], rewards: [] });
      places.get(key).rewards.push(reward[i]);
    });
  }
  return new Map([...found].filter(([, places]) => places.size > 1).map(([name, places]) => [name, [...places.values()].map((p) => ({ ...p, reward: mean(p.rewards) }))]));
}

// The last groups of the first two runs that have the problem, or the first and the last group of the only one.
function usualPair(places) {
  const runs = [...new Set(places.map((p) => p.run))];
  if (runs.length === 1) return [places[0], places[places.length - 1]];
  return runs.slice(0, 2).map((run) => places.filter((p) => p.run === run).slice(-1)[0]);
}

function gap(places) {
  const [a, b] = usualPair(places);
  return a.reward === null || b.reward === null ? -1 : Math.abs(a.reward - b.reward);
}

class SameProblem {
  constructor(source) {
    Object.assign(this, { source, problem: null, chosen: [null, null], states: [0, 1].map(() => ({ sibling: 0, side: false, mode: "entropy", reading: false })) });
    this.controls = el("div", { class: "tools" });
    this.pair = el("div", { class: "pair" });
    this.node = section("The same problem", "Its responses under two policies, coloured on one scale. Problems whose mean reward differs most come first.", this.controls, this.pair);
  }

  update(runs) {
    this.places = placesByProblem(runs);
    this.node.hidden = this.places.size === 0;
    this.names = [...this.places.keys()].map((name) => [name, gap(this.places.get(name))]).sort((a, b) => b[1] - a[1]).slice(0, MOST_PROBLEMS).map(([name]) => name);
    if (!this.names.length) return;
    if (!this.names.includes(this.problem)) this.choose(this.names[0]);
    else this.draw();
  }

  choose(problem) {
    this.problem = problem;
    this.chosen = usualPair(this.places.get(problem)).map((p) => p.key);
    this.draw();
  }

  draw() {
    const places = this.places.get(this.problem);
    this.chosen = this.chosen.map((key, i) => (places.some((p) => p.key === key) ? key : usualPair(places)[i].key));
    const names = places.map((p) => [p.key, `${p.label}, step ${p.step}: mean reward ${number(p.reward, 2)}`]);
    const place = (i, title) => select(title, names, this.chosen[i], (key) => { this.chosen[i] = key; this.drawPair(); });
    fill(this.controls, select("Problem to compare", this.names.map((n) => [n, n]), this.problem, (name) => this.choose(name)), place(0, "Left"), place(1, "Right"));
    this.drawPair();
  }

  async drawPair() {
    const drawn = [this.problem, ...this.chosen].join("\n");
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    const places = this.places.get(this.problem);
    const chosen = this.chosen.map((key) => places.find((p) => p.key === key));
    const groups = await Promise.all(chosen.map((place) => this.group(place)));
    if (drawn !== this.drawn) return;
    const pool = groups.flatMap((group) => (group ? candidatesOf(group) : []));
    this.views = groups.map((group, i) => group && new GroupView(group, `${chosen[i].label}, step ${chosen[i].step}`, this.states[i], () => this.follow(i), pool));
    fill(this.pair, this.views.map((view) => view?.node ?? el("p", { class: "empty" }, "These rollouts can't be loaded.")));
  }

  // A choice on one side also applies to the other.
  follow(i) {
    const { mode, reading } = this.states[i], other = this.states[1 - i];
    if (other.mode === mode && other.reading === reading) return;
    Object.assign(other, { mode, reading });
    this.views[1 - i]?.draw();
  }

  async group(place) {
    const content = await this.source.step(place.run, place.step).catch(() => null);
    return content?.groups.find((g) => g.problem === this.problem) ?? null;
  }
}
