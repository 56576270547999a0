// Several runs in the same charts. Runs that differ only in the seed may be one line with a band from lowest to highest.

// The name without its seed: demo-seed3, demo_s3 and demo-3 (for seed 3) are all demo.
function family(run) {
  const name = run.name.replace(new RegExp(`[-_ .]*(seed|s)?[-_ ]?${run.seed}$`), "") || run.name;
  return `${name} (${run.method})`;
}

// Each group keeps its index, and so its colour and line style, whatever is hidden.
function groupsOf(runs, bands, shown) {
  const groups = new Map();
  for (const run of runs) {
    const name = bands ? family(run) : run.label;
    if (!groups.has(name)) groups.set(name, { place: groups.size, runs: [], family: name });
    if (shown(run)) groups.get(name).runs.push(run);
  }
  return [...groups.values()].filter((g) => g.runs.length).map((g) => ({ ...g, name: g.runs.length > 1 ? `${g.family}, ${g.runs.length} seeds` : g.runs[0].label }));
}

// Overlapping lines stay visible: those drawn later are thinner and dashed, so that the others show through.
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];

function lineOf(place) {
  return { colour: () => colour(place), dash: DASHES[place % DASHES.length], width: place ? 2 : 3 };
}

// One line over the steps that all runs of the group have, since a mean over changing runs would jump where one stops.
function merged(lines) {
  const at = new Map();
  lines.forEach(({ x, y }) => x.forEach((step, i) => {
    if (y[i] === null || y[i] === undefined) return;
    if (!at.has(step)) at.set(step, []);
    at.get(step).push(y[i]);
  }));
  const points = [...at.entries()].filter(([, values]) => values.length === lines.length).sort((a, b) => a[0] - b[0]);
  const over = (reduce) => points.map(([, values]) => reduce(values));
  return { x: points.map(([step]) => step), y: over(mean), band: { low: over((v) => Math.min(...v)), high: over((v) => Math.max(...v)) } };
}

function comparedCurve(group, name, axis) {
  const line = lineOf(group.place), lines = group.runs.map((run) => curve(run, name, axis));
  if (lines.length === 1) return [{ name: group.name, ...line, ...lines[0] }];
  // Seeds differ in the tokens used by a step, so over tokens each keeps its own line.
  if (axis === "tokens") return lines.map((found, i) => ({ name: group.name, legend: i === 0, ...line, ...found }));
  return [{ name: group.name, ...line, ...merged(lines) }];
}

function comparedEvaluation(group, figure, axis) {
  const line = lineOf(group.place);
  if (group.runs.length === 1) return evaluationSeries(group.runs[0], figure, axis, group.name, line);
  if (axis === "tokens") return group.runs.flatMap((run) => evaluationSeries(run, figure, axis, run.label, line));
  const modes = [...new Set(group.runs.flatMap((run) => run.evaluations.map((e) => e.mode)))];
  return modes.map((mode, i) => ({ name: `${group.name}, ${mode}`, ...line, symbol: SYMBOLS[i % SYMBOLS.length],
    ...merged(group.runs.map((run) => { const points = run.evaluations.filter((e) => e.mode === mode); return { x: points.map((e) => e.step), y: points.map((e) => e[figure]) }; })) }));
}

class CompareView {
  constructor(source) {
    Object.assign(this, { axis: "step", smoothing: "auto", bands: true, hidden: new Set() });
    this.charts = {};
    const chart = (name, options) => (this.charts[name] = new Chart(options)).node;
    const box = el("input", { type: "checkbox", checked: true, onchange: () => { this.bands = box.checked; this.drawChips(); this.draw(); } });
    this.tools = el("div", { class: "tools" }, curveControls((change) => { Object.assign(this, change); this.draw(); }),
      el("label", { class: "control row-control" }, box, el("span", {}, "Seeds as bands")));
    this.chips = el("fieldset", { class: "chips" });
    this.table = new ScrollBox("Runs");
    this.same = new SameProblem(source);
    this.curves = el("div", {}, el("p", { class: "lede" }, "The same curves of several runs. Over tokens, all generated tokens count, including erased ones."),
      this.chips, this.table.node, this.tools);
    this.charted = el("div", {}, section("Held-out evaluation", null, el("div", { class: "charts two" }, chart("avg", { title: "Avg@k", percent: true, id: "compare-avg" }), chart("pass", { title: "Pass@k", percent: true }))),
      (this.sections = CURVES.map(([title, curves]) => section(title, null, el("div", { class: "charts" }, curves.filter(([name]) => name !== "seconds").map(([name, label, options]) =>
        chart(name, { title: label, id: "compare-" + name, ...options })))))));
    this.node = el("div", {}, el("h1", {}, "Compare"), this.curves, this.charted, this.same.node);
    theme.listeners.push(() => this.runs && this.drawChips());
  }

  update(runs) {
    this.runs = runs.map((run, number) => ({ ...run, number }));
    this.curves.hidden = this.charted.hidden = runs.length < 2;
    this.drawChips();
    this.draw();
  }

  groups() {
    return groupsOf(this.runs, this.bands, (run) => !this.hidden.has(run.label));
  }

  // A box for each run, with its line style in the charts.
  drawChips() {
    const all = groupsOf(this.runs, this.bands, () => true);
    const known = this.runs.map((run) => run.label).join("\n") + this.bands + theme.dark();
    if (known === this.known) return;
    this.known = known;
    fill(this.chips, el("legend", { class: "sr-only" }, "Runs shown"), this.runs.map((run) => {
      const line = lineOf(all.find((g) => g.runs.includes(run)).place), swatch = el("i", { class: "swatch" });
      swatch.style.borderTop = `3px ${{ solid: "solid", dot: "dotted" }[line.dash] ?? "dashed"} ${line.colour()}`;
      const box = el("input", { type: "checkbox", checked: !this.hidden.has(run.label), onchange: () => { if (box.checked) this.hidden.delete(run.label); else this.hidden.add(run.label); this.draw(); } });
      return el("label", { class: "chip" }, box, swatch, el("span", {}, run.label));
    }));
  }

  draw() {
    const runs = this.runs.filter((run) => !this.hidden.has(run.label)), groups = this.groups(), xTitle = AXES[this.axis][1];
    for (const figure of ["avg", "pass"]) this.charts[figure].update(groups.flatMap((g) => comparedEvaluation(g, figure, this.axis)), xTitle);
    for (const name of Object.keys(this.charts)) {
      if (name !== "avg" && name !== "pass") this.charts[name].update(groups.flatMap((g) => comparedCurve(g, name, this.axis)), xTitle, this.smoothing);
    }
    CURVES.forEach(([, curves], i) => (this.sections[i].hidden = curves.every(([name]) => this.charts[name]?.node.hidden ?? true)));
    this.table.fill(this.summary(runs));
    this.same.update(runs);
  }

  summary(runs) {
    const evaluated = (run, mode) => run.evaluations.filter((e) => e.mode === mode).slice(-1)[0];
    const shown = (e) => (e ? `${percent(e.avg)} (${percent(e.avg_interval[0])} to ${percent(e.avg_interval[1])})` : "–");
    const last = (run, name) => (run.metrics[name] ?? []).slice(-1)[0] ?? null;
    const rows = runs.map((run) => [run.label, run.method, run.seed, run.step, shown(evaluated(run, "plain")), shown(evaluated(run, "erasable")),
      percent(mean((run.metrics.r ?? []).slice(-10))), last(run, "tokens_total") === null ? "–" : compact(last(run, "tokens_total"))]);
    return el("table", { class: "summary" },
      el("thead", {}, el("tr", {}, ["Run", "Method", "Seed", "Step", "Held-out Avg@k, plain", "erasable", "r, last 10 steps", "Tokens"].map((t) => el("th", { scope: "col" }, t)))),
      el("tbody", {}, rows.map(([name, ...cells]) => el("tr", {}, el("th", { scope: "row" }, name), cells.map((c) => el("td", {}, String(c)))))));
  }
}
