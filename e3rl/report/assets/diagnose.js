// A diagnosis of a model: findings, how well each signal separates wrong from right, the gain of a retry, accuracy by tokens.

const LEVELS = { bad: "Problem", warn: "Look at this", good: "Good", note: "Note" };
const diagnosis = embedded("diagnosis");

function interval(estimate, show = number) {
  if (!estimate || estimate.value === null) return "–";
  const bounds = estimate.low === null ? "" : ` (${show(estimate.low)} to ${show(estimate.high)})`;
  return show(estimate.value) + bounds;
}

function points(value) {
  return signed(100 * value);
}

// Estimates as points with error bars along one axis; the other axis holds names or numbers.
function estimates(name, paint, at, values, { across = false, symbol = "circle", labels = null } = {}) {
  const known = values.map((e, i) => [e, at[i], labels && labels[i]]).filter(([e]) => e && e.value !== null);
  const error = { type: "data", symmetric: false, thickness: 1.4, width: 3,
    array: known.map(([e]) => (e.high === null ? 0 : e.high - e.value)), arrayminus: known.map(([e]) => (e.low === null ? 0 : e.value - e.low)) };
  const [value, place] = across ? ["x", "y"] : ["y", "x"];
  return { name, mode: "markers", type: "scatter", marker: { color: paint(), size: 9, symbol }, text: known.map(([, , label]) => plain(label || "")),
    [value]: known.map(([e]) => e.value), [place]: known.map(([, spot]) => spot), [`error_${value}`]: { ...error, color: paint() },
    hovertemplate: labels ? "%{text}<br>%{y:.3f}, %{x:.0f} tokens<extra></extra>" : `%{${value}:.3f}<extra>${plain(name)}</extra>` };
}

// Drawn when seen, like the charts of a run, and once more when the theme changes.
class Picture {
  constructor(title, help, height, describe, traces, axes, table) {
    Object.assign(this, { height, traces, axes, shown: false });
    this.plot = el("div", { class: "plot", role: "img", "aria-label": describe });
    this.plot.chart = this;
    const values = new ScrollBox(`${title}: values`);
    values.fill(table);
    this.node = el("figure", { class: "chart" }, el("figcaption", {}, el("h3", {}, title), el("p", { class: "help" }, help)), this.plot,
      el("details", { class: "as-table" }, el("summary", {}, "Table"), values.node));
    visible.observe(this.plot);
    theme.listeners.push(() => this.draw());
  }

  show() {
    this.shown = true;
    visible.unobserve(this.plot);
    this.draw();
  }

  draw() {
    if (!this.shown) return;
    const base = layout({ plot: this.plot, series: [], percent: false });
    const own = this.axes();
    const merged = { ...base, height: this.height, hovermode: "closest", showlegend: true, margin: { l: 52, r: 14, t: 30, b: 42 },
      xaxis: { ...base.xaxis, dtick: null, ...own.xaxis }, yaxis: { ...base.yaxis, ...own.yaxis }, shapes: own.shapes || [] };
    plotly.then((library) => library.react(this.plot, this.traces(), merged, { displayModeBar: false, responsive: true }));
  }
}

function dotted(at) {
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--muted").trim();
  return { type: "line", line: { color: colour, width: 1, dash: "dot" }, ...at };
}

function tableOf(head, rows) {
  return el("table", {}, el("thead", {}, el("tr", {}, head.map((h) => el("th", { scope: "col" }, h)))),
    el("tbody", {}, rows.map(([first, ...rest]) => el("tr", {}, el("th", { scope: "row" }, first), rest.map((c) => el("td", {}, c))))));
}

function aurocPicture(title, help, signals, overall, within) {
  const shown = [...signals].reverse();
  const names = shown.map((s) => s.name);
  return new Picture(title, `AUROC: the chance that a wrong one scores above a right one. 0.5 is chance. ${help}`,
    110 + 34 * names.length, signals.map((s) => `${s.name}: ${interval(s.overall)} ${overall}, ${interval(s.within)} ${within}. `).join(""),
    () => [estimates(overall, () => colour(7), names, shown.map((s) => s.overall), { across: true, symbol: "circle-open" }),
      estimates(within, () => colour(0), names, shown.map((s) => s.within), { across: true })],
    () => ({ xaxis: { range: [0, 1.02], title: { text: "AUROC", standoff: 6 } }, yaxis: { type: "category", categoryarray: names, categoryorder: "array", nticks: 0, dtick: 1 },
      shapes: [dotted({ x0: 0.5, x1: 0.5, y0: 0, y1: 1, yref: "paper" })] }),
    tableOf(["signal", "what it is", overall, within, "pairs"],
      signals.map((s) => [s.name, s.meaning, interval(s.overall), interval(s.within), number(s.within.count)])));
}

const wrongSegment = diagnosis.by_steps ? "its first wrong step lies in it" : "its response ends in a wrong answer";

function signalPicture() {
  return aurocPicture("Which signal finds a wrong segment?",
    `A segment is wrong if ${wrongSegment}. Only the second kind of point helps a retry, which starts from the same prefix.`,
    diagnosis.signals, "among all segments", "among draws from the same prefix");
}

function responsePicture() {
  return aurocPicture("Does a mistake show in what follows?",
    "Whole responses against their final answers. If entropy is above 0.5 among answers to one problem, it does: judge longer segments.",
    diagnosis.responses, "among all responses", "among answers to one problem");
}

function retryPicture() {
  const gains = diagnosis.gains;
  const quarters = ["calmest quarter", "second", "third", "most suspicious"];
  return new Picture("What is a retry worth?",
    `P(right | segment drawn again) − P(right | as first drawn), in points, for each quarter of the signal's values. Above 0, erasing there helps.`, 330,
    gains.map((g) => `${g.signal}: ${g.gains.map((e) => interval(e, points)).join("; ")}. `).join(""),
    () => gains.map((g, i) => estimates(g.signal, () => colour(i), quarters.map((_, q) => q + 0.16 * (i - 1)),
      g.gains.map((e) => ({ value: e.value === null ? null : 100 * e.value, low: e.low === null ? null : 100 * e.low, high: e.high === null ? null : 100 * e.high })))),
    () => ({ xaxis: { range: [-0.5, 3.5], tickvals: [0, 1, 2, 3], ticktext: quarters.map((q) => q.replace(" ", "<br>")) }, yaxis: { title: { text: "points", standoff: 6 } },
      shapes: [dotted({ x0: 0, x1: 1, xref: "paper", y0: 0, y1: 0 })] }),
    tableOf(["signal", ...quarters], gains.map((g) => [g.signal, ...g.gains.map((e) => interval(e, points))])));
}

const TICKS = [0, 1, 2, 3, 4].flatMap((power) => [1, 2, 3, 5, 7].map((digit) => digit * 10 ** power));
const KINDS = [["plain", "plain, by temperature", 7, "circle-open"], ["majority", "majority vote", 4, "diamond"], ["rerank", "calmer half of the samples", 2, "square"], ["erasable", "erasable", 0, "circle"]];

function decodingPicture(title, help, figure) {
  const of = (kind) => diagnosis.decodings.filter((d) => d.kind === kind && d[figure]);
  return new Picture(title, help, 360, diagnosis.decodings.filter((d) => d[figure]).map((d) => `${d.name}: ${interval(d[figure])} at ${number(d.tokens)} tokens. `).join(""),
    () => KINDS.filter(([kind]) => of(kind).length).map(([kind, name, paint, symbol]) =>
      estimates(name, () => colour(paint), of(kind).map((d) => d.tokens), of(kind).map((d) => d[figure]), { symbol, labels: of(kind).map((d) => d.name) })),
    () => ({ xaxis: { type: "log", tickvals: TICKS, ticktext: TICKS.map(String), title: { text: "tokens for an answer", standoff: 6 } }, yaxis: { rangemode: "tozero" } }),
    tableOf(["decoding", "tokens", "value"], diagnosis.decodings.filter((d) => d[figure]).map((d) => [d.name, number(d.tokens), interval(d[figure])])));
}

function decodingTable() {
  const values = new ScrollBox("All ways to decode");
  values.fill(tableOf(["decoding", `Avg@${diagnosis.samples}`, `Pass@${diagnosis.samples}`, "tokens for an answer"],
    diagnosis.decodings.map((d) => [d.name, interval(d.avg), interval(d.passed), number(d.tokens, 1)])));
  return values.node;
}

const facts = `${plural(diagnosis.problems, "problem")} × ${diagnosis.samples} samples, segments of ${diagnosis.segment_length} tokens, ` +
  `${diagnosis.retries} retries at a random segment of each sample, ${Math.round(diagnosis.seconds)} s. Intervals: 95 %, bootstrap over problems.`;
fill(document.getElementById("page"),
  el("header", { class: "bar" }, el("span", { class: "brand" }, "E³RL"), el("span", { class: "gap" }), theme.button()),
  el("main", { id: "main", class: "narrow", tabindex: "-1" },
    el("h1", {}, "Does erasing help ", el("code", {}, diagnosis.model), " on ", el("code", {}, diagnosis.data), "?"), el("p", { class: "lede" }, facts),
    el("section", {}, el("ul", { class: "health" }, diagnosis.findings.map((f) => el("li", { class: f.level }, el("strong", {}, LEVELS[f.level]), el("span", {}, prose(f.text)))))),
    el("div", { style: "display: grid; gap: 20px; margin: 24px 0" }, signalPicture().node, responsePicture().node, retryPicture().node,
    decodingPicture(`Avg@${diagnosis.samples} against tokens`, "Up and to the left is better. Erased tokens and all votes are counted.", "avg").node,
    decodingPicture(`Pass@${diagnosis.samples} against tokens`, "The share of problems with at least one right answer: what a lower temperature loses first.", "passed").node),
    el("section", {}, el("h2", {}, "All ways to decode"), decodingTable())));
