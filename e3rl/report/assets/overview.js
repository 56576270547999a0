// Overview of a run: its settings, health, held-out figures, and curves over training.

const SHARE = { percent: true }, FROM_ZERO = { fromZero: true };
const CURVES = [
  ["Learning", [["reward", "Reward"], ["accuracy", "Training accuracy", SHARE], ["degenerate_groups", "Groups without signal", SHARE]]],
  ["Erasing", [["erase_rate", "Erase rate", SHARE], ["r", "Regeneration ratio r", SHARE], ["forced_rate", "Forced accepts", SHARE]]],
  ["Responses", [["length", "Length, tokens"], ["segments", "Segments"], ["finish_ratio", "Finish ratio", SHARE]]],
  ["Tools", [["calls", "Calls of a response"], ["call_errors", "Calls that failed", SHARE], ["erased_turns", "Erased calls", FROM_ZERO], ["seconds_tools", "Seconds in tools", FROM_ZERO]]],
  ["Policy", [["entropy", "Entropy, nats"], ["kl", "KL to the reference", FROM_ZERO], ["clip_fraction", "Clip fraction", SHARE],
    ["grad_norm", "Gradient norm", FROM_ZERO], ["sign_flips", "Sign flips", SHARE], ["mismatch_mean", "Engine against trainer", FROM_ZERO]]],
  ["Cost", [["tokens_per_second", "Tokens per second", FROM_ZERO], ["seconds", "Seconds of a step", FROM_ZERO], ["memory_mb", "Peak memory, MiB", FROM_ZERO]]],
];
const SYMBOLS = ["circle", "diamond-open", "square-open", "cross"];
const MODE_NAMES = { plain: "plain", erasable: "erasable" };
const AXES = { step: ["step", "step"], tokens: ["tokens_total", "tokens generated"] };

// If nothing decides whether a response is right, the run has no accuracy.
function curve(run, name, axis) {
  if (name === "accuracy" && !run.graded) return { x: [], y: [] };
  return { x: run.metrics[AXES[axis][0]] ?? [], y: run.metrics[name] ?? [] };
}

const PARTS = [["rollout", "rollout", "tokens"], ["reward", "reward", "committed_tokens"], ["train", "training", "committed_tokens"]];

// Tokens that a part of the step handles, over the seconds that it takes; null if it takes none.
function rate(run, tokens, part) {
  const seconds = run.metrics["seconds_" + part] ?? [];
  return (run.metrics[tokens] ?? []).map((count, i) => (seconds[i] ? count / seconds[i] : null));
}

function curvesOf(run, name, axis) {
  const alone = { name: "", colour: () => colour(0), legend: false, ...curve(run, name, axis) };
  const x = run.metrics[AXES[axis][0]] ?? [];
  if (name === "seconds") return PARTS.map(([part, title], i) => ({ name: title, colour: () => colour(i), stack: true, ...curve(run, "seconds_" + part, axis) }));
  if (name !== "tokens_per_second") return [alone];
  const parts = PARTS.filter(([part]) => part !== "reward").map(([part, title, tokens], i) => ({ name: title + " alone", colour: () => colour(i + 1), x, y: rate(run, tokens, part) }));
  return [{ ...alone, name: "whole step", legend: true }, ...parts];
}

// Held-out figures with their 95 % intervals; ``figure`` is "avg" or "pass".
// ``line`` is how a run is drawn in a comparison, where kinds of decoding differ in their symbol; else they differ in colour.
function evaluationSeries(run, figure, axis, name, line) {
  const modes = [...new Set(run.evaluations.map((e) => e.mode))];
  return modes.map((mode, i) => {
    const points = run.evaluations.filter((e) => e.mode === mode);
    const y = points.map((e) => e[figure]), interval = points.map((e) => e[figure + "_interval"]);
    return { name: [name, MODE_NAMES[mode] ?? mode].filter(Boolean).join(", "), colour: () => colour(i), ...line, symbol: SYMBOLS[i % SYMBOLS.length],
      x: points.map((e) => e[AXES[axis][0]]), y, error: { low: y.map((v, j) => v - interval[j][0]), high: y.map((v, j) => interval[j][1] - v) } };
  });
}

function evaluationK(run) {
  return run.evaluations.length ? run.evaluations[run.evaluations.length - 1].k : "k";
}

function tile(value, label, note) {
  return el("div", { class: "tile" }, el("div", { class: "value" }, value), el("div", { class: "label" }, label), note && el("div", { class: "muted" }, note));
}

function tiles(run) {
  const plain = run.evaluations.filter((e) => e.mode === "plain"), [first, last] = [plain[0], plain[plain.length - 1]];
  const recent = (name) => mean((run.metrics[name] ?? []).slice(-10));
  const seconds = ["rollout", "reward", "train"].flatMap((part) => run.metrics["seconds_" + part] ?? []).reduce((a, b) => a + (b ?? 0), 0);
  const total = (run.metrics.tokens_total ?? []).slice(-1)[0] ?? null;
  const rewards = (run.metrics.reward ?? []).filter((v) => v !== null), began = mean(rewards.slice(0, 10));
  return [
    rewards.length > 0 && tile(number(recent("reward"), 2), "reward", "mean of the last 10 steps" + (rewards.length > 10 ? `, ${number(began, 2)} in the first` : "")),
    last && tile(percent(last.avg), `held-out Avg@${last.k}`, `${percent(last.avg_interval[0])} to ${percent(last.avg_interval[1])}`
      + (first !== last ? `, ${percent(first.avg)} at step ${first.step}` : "")),
    run.graded && recent("accuracy") !== null && recent("accuracy") !== recent("reward") && tile(percent(recent("accuracy")), "training accuracy", "mean of the last 10 steps"),
    recent("r") !== null && tile(percent(recent("r")), "tokens drawn again, r", `erase rate ${percent(recent("erase_rate"))}`),
    total !== null && tile(compact(total), "tokens generated", seconds ? duration(seconds) + " of training" : null),
  ];
}

function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 60) return s + " s";
  return s < 3600 ? `${Math.floor(s / 60)} min ${s % 60} s` : `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

const LEVELS = { bad: "Problem", warn: "Look at", good: "Good", note: "Note" };

function lede(run) {
  const where = run.finished ? `finished after ${run.step} steps` : run.steps ? `step ${run.step} of ${run.steps}` : `step ${run.step}`;
  return `${run.method} · ${where} · as of ${new Date(run.written).toLocaleString()}`;
}

function section(title, help, ...content) {
  return el("section", { class: "block" }, el("h2", {}, title), help && el("p", { class: "help" }, help), content);
}

// Over what curves are drawn, and how much they are smoothed.
function curveControls(onchange) {
  return [select("Curves over", [["step", "steps"], ["tokens", "tokens generated"]], "step", (axis) => onchange({ axis })),
    select("Smoothing", SMOOTHING, "auto", (smoothing) => onchange({ smoothing }))];
}

class OverviewView {
  constructor() {
    Object.assign(this, { axis: "step", smoothing: "auto", charts: {} });
    this.head = el("div", { class: "head" });
    const chart = (name, options) => (this.charts[name] = new Chart(options)).node;
    this.first = el("div", { class: "charts first" }, chart("reward", { title: "Reward", id: "chart-reward", help: "Mean of a step's responses." }),
      chart("avg", { title: "Held-out Avg@k", percent: true, id: "chart-avg", help: "Mean and 95 % interval over problems." }),
      chart("pass", { title: "Held-out Pass@k", percent: true, help: "Erasable and plain decoding are separate lines." }));
    this.control = el("div", { class: "tools over" }, curveControls((change) => { Object.assign(this, change); this.draw(); }));
    this.about = el("div", {});
    this.curves = CURVES.map(([title, curves]) => section(title, null, el("div", { class: "charts" }, curves.filter(([name]) => name !== "reward").map(([name, label, options]) =>
      chart(name, { title: label, id: "chart-" + name, ...options })))));
    this.settings = el("div", {});
    this.node = el("div", {}, this.head, this.first, this.control, this.about, this.curves, this.settings);
  }

  update(run) {
    this.run = run;
    fill(this.head, el("h1", {}, run.name), el("p", { class: "lede" }, lede(run)), el("div", { class: "tiles" }, tiles(run)));
    const shown = this.about.querySelector("details")?.open;
    fill(this.about,
      el("section", { class: "block" }, el("h2", {}, "Health"), el("ul", { class: "health" }, run.health.map((f) => el("li", { class: f.level }, el("strong", {}, LEVELS[f.level]), el("span", {}, prose(f.text)))))),
      el("details", { class: "what", open: shown }, el("summary", {}, "What was run"), el("dl", { class: "facts" }, run.facts.map(([k, v]) => [el("dt", {}, k), el("dd", {}, v)]))));
    const open = this.settings.firstChild?.open;
    fill(this.settings, el("details", { class: "settings", open }, el("summary", {}, "All settings"), el("div", { class: "setting-tables" },
      Object.entries(run.settings).map(([name, table]) => el("section", {}, el("h3", {}, name), el("dl", { class: "facts" },
        Object.entries(table).map(([k, v]) => [el("dt", {}, k), el("dd", {}, JSON.stringify(v))])))))));
    this.draw();
  }

  draw() {
    const [, xTitle] = AXES[this.axis];
    for (const figure of ["avg", "pass"]) this.charts[figure].update(evaluationSeries(this.run, figure, this.axis, ""), xTitle);
    CURVES.forEach(([, curves], i) => {
      curves.forEach(([name]) => this.charts[name].update(curvesOf(this.run, name, this.axis), xTitle, this.smoothing));
      this.curves[i].hidden = curves.filter(([name]) => name !== "reward").every(([name]) => this.charts[name].node.hidden);
    });
  }
}

const BY_SEGMENT = [
  ["uncertainty", "Uncertainty U", "Mean U of committed segments."],
  ["threshold", "Threshold Θ", "Mean threshold that committed segments were judged by."],
  ["baseline", "Baseline B", "Θ is baseline × penalty × modulation; this is the first."],
  ["penalty", "Penalty Γ", "Rises with every erasure of the segment."],
  ["modulation", "Modulation φ", "Above 1 where the response's earlier segments were less certain than usual."],
  ["acceptance", "Acceptance", "Share of first candidates that were accepted.", true],
  ["advantage", "Advantage", "Mean advantage of the segment's tokens."],
  ["clip_fraction", "Clip fraction", "Share of the segments' ratios outside the clip range where that cuts the gradient.", true],
];

// A metric's column for each segment index: from one list per step, or from metrics named name/segment_0, name/segment_1, …
function bySegment(metrics, name) {
  const rows = metrics[name] ?? [];
  const lists = Math.max(0, ...rows.map((row) => (Array.isArray(row) ? row.length : 0)));
  if (lists) return Array.from({ length: lists }, (_, n) => rows.map((row) => row?.[n] ?? null));
  const columns = [];
  while (metrics[`${name}/segment_${columns.length}`]) columns.push(metrics[`${name}/segment_${columns.length}`]);
  return columns;
}

class SegmentsView {
  constructor() {
    this.charts = BY_SEGMENT.map(([, title, help, asPercent]) => new Chart({ title, help, percent: Boolean(asPercent) }));
    this.empty = el("p", { class: "empty" }, "Nothing is recorded by segment yet.");
    this.node = el("div", {}, el("h1", {}, "Segments"), el("p", { class: "lede" }, "How each position in a response is judged and rewarded during training, one line for each segment index."),
      this.empty, el("div", { class: "charts two" }, this.charts.map((c) => c.node)));
  }

  update(run) {
    BY_SEGMENT.forEach(([name], i) => {
      const columns = bySegment(run.metrics, name);
      this.charts[i].update(columns.map((y, n) => ({ name: `segment ${n + 1}`, colour: () => orderedColour(n, columns.length), x: run.metrics.step, y })));
    });
    this.empty.hidden = this.charts.some((c) => !c.node.hidden);
  }
}
