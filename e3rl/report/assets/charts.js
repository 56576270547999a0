// Line charts over training, drawn by Plotly when they come into view, each with a description and a table of its values.

const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f"];
const DARK_COLOURS = ["#5aa9e6", "#ff9152", "#3fc79a", "#e6a0c8", "#f2b84b", "#8fd0f5", "#b79be0", "#a8a8a8"];
const SEQUENCE = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#e2c90b"];
const DARK_SEQUENCE = ["#b08cf0", "#8f9cf5", "#6fb0f0", "#55c3dd", "#52d3b6", "#7bdf8d", "#b9e761", "#fde725"];

function colour(index) {
  return (theme.dark() ? DARK_COLOURS : COLOURS)[index % COLOURS.length];
}

// Segment indices are ordered, so their colours are too.
function orderedColour(index, count) {
  const steps = theme.dark() ? DARK_SEQUENCE : SEQUENCE;
  return steps[count < 2 ? 2 : Math.round((index / (count - 1)) * (steps.length - 1))];
}

// Plotly reads a little markup in names; these are data.
function plain(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

function faded(hex, alpha) {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  return `rgba(${r},${g},${b},${alpha})`;
}

// The mean of what is known in a window around each value.
function smoothed(values, window) {
  const half = (window - 1) / 2;
  return values.map((v, i) => (v === null || v === undefined ? null : mean(values.slice(Math.max(0, i - half), i + half + 1))));
}

const SMOOTHING = [["auto", "automatic"], ["1", "none"], ["5", "5 steps"], ["15", "15 steps"], ["51", "51 steps"]];

function windowOf(choice, steps) {
  return choice === "auto" ? (steps < 40 ? 1 : steps < 150 ? 5 : steps < 600 ? 15 : 51) : Number(choice);
}

function trace(series, chart) {
  const asPercent = chart.percent, paint = series.colour();
  const smooth = series.error || series.stack ? 1 : windowOf(chart.smoothing, series.y.length), over = (values) => (smooth > 1 ? smoothed(values, smooth) : values);
  const line = { x: series.x, y: over(series.y), name: plain(series.name), mode: series.y.length < 3 || series.error ? "lines+markers" : "lines",
    line: { color: paint, width: series.stack ? 0.5 : series.width ?? 2, dash: series.dash || "solid" }, marker: { size: 6, symbol: series.symbol || "circle" },
    hovertemplate: asPercent ? "%{y:.3~%}" : "%{y:.4~g}", showlegend: series.legend !== false };
  const raw = { x: series.x, y: series.y, mode: "lines", line: { color: faded(paint, 0.3), width: 1 }, hoverinfo: "skip", showlegend: false };
  if (smooth > 1 && !series.band) return chart.series.length > 3 ? [line] : [raw, line];
  if (series.stack) Object.assign(line, { stackgroup: "all", fillcolor: faded(paint, 0.75) });
  if (series.error) line.error_y = { type: "data", symmetric: false, array: series.error.high, arrayminus: series.error.low,
    thickness: 1.2, width: 4, color: paint };
  if (!series.band) return [line];
  const edge = { x: series.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
  return [{ ...edge, y: over(series.band.low) }, { ...edge, y: over(series.band.high), fill: "tonexty", fillcolor: faded(paint, 0.18) }, line];
}

// Legend columns are as wide as the longest name.
function legendRows(chart) {
  const names = chart.series.filter((s) => s.legend !== false).map((s) => s.name.length);
  const inOneRow = Math.max(1, Math.floor((chart.plot.clientWidth - 60) / (6.5 * Math.max(...names, 1) + 50)));
  return Math.ceil(names.length / inOneRow);
}

// The range of the values' axis: wide enough that a small change looks small. Null if Plotly may choose.
function extent(chart) {
  if (chart.series.some((s) => s.stack)) return null;
  const values = chart.series.flatMap((s) => s.y.flatMap((y, i) => (y === null || y === undefined ? [] : [y + (s.error?.high[i] ?? 0), y - (s.error?.low[i] ?? 0)])).concat(s.band ? [...s.band.low, ...s.band.high] : []));
  if (!values.length) return null;
  let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  const positive = low >= 0, least = chart.percent ? 0.1 : 0.25 * Math.max(Math.abs(low), Math.abs(high)) || 1;
  if (chart.fromZero) low = Math.min(0, low);
  const more = Math.max(0, least - (high - low)) / 2;
  [low, high] = positive && low < more ? [0, Math.max(high, least)] : [low - more, high + more];
  const edge = 0.04 * (high - low);
  return [low - (low === 0 ? 0 : edge), high + edge];
}

function layout(chart) {
  const range = extent(chart);
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--muted").trim();
  const axis = { gridcolor: style.getPropertyValue("--line").trim(), zeroline: false, linecolor: "transparent", automargin: true,
    tickfont: { size: 11 }, nticks: 6, exponentformat: "e" };
  return {
    height: 210 + 20 * Math.max(0, legendRows(chart) - 1), margin: { l: 44, r: 12, t: 8, b: 34 }, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink }, hovermode: "x unified", showlegend: chart.series.filter((s) => s.legend !== false).length > 1,
    legend: { orientation: "h", traceorder: "normal", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
    hoverlabel: { bgcolor: style.getPropertyValue("--panel").trim(), bordercolor: style.getPropertyValue("--line").trim(),
      font: { color: style.getPropertyValue("--ink").trim() } },
    xaxis: { ...axis, showgrid: false, dtick: Math.max(...chart.series.map((s) => s.x[s.x.length - 1])) < 6 ? 1 : null, title: { text: chart.xTitle, standoff: 6, font: { size: 11 } } },
    yaxis: { ...axis, ...(range ? { range } : {}), tickformat: chart.percent ? ".2~%" : "", rangemode: chart.fromZero ? "tozero" : "normal" },
  };
}

function describe(series, asPercent) {
  const show = asPercent ? percent : number;
  const known = series.y.map((y, i) => [series.x[i], y]).filter(([, y]) => y !== null && y !== undefined);
  if (!known.length) return "";
  const [first, last] = [known[0], known[known.length - 1]];
  const name = series.name ? series.name + ": " : "";
  if (known.length === 1) return `${name}${show(last[1])} at ${number(last[0])}. `;
  return `${name}${show(first[1])} at ${number(first[0])}, ${show(last[1])} at ${number(last[0])}. `;
}

// Plotly is loaded only after the first view is painted.
const plotly = new Promise((resolve) => {
  requestAnimationFrame(() => setTimeout(() => {
    document.body.append(el("script", {}, document.getElementById("plotly").textContent));
    resolve(Plotly);
  }));
});

const visible = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) entry.target.chart.show();
}, { rootMargin: "200px" });

class Chart {
  constructor({ title, help = "", percent: asPercent = false, fromZero = asPercent, id = null }) {
    Object.assign(this, { title, percent: asPercent, fromZero, series: [], xTitle: "step", smoothing: "auto", shown: false });
    this.plot = el("div", { class: "plot" });
    this.words = el("p", { class: "sr-only" });
    this.table = new ScrollBox(`${title}: values`);
    this.details = el("details", { class: "as-table", ontoggle: () => this.fillTable() }, el("summary", {}, "Table"), this.table.node);
    this.node = el("figure", { class: "chart", id, hidden: true },
      el("figcaption", {}, el("h3", {}, title), help && el("p", { class: "help" }, help)), this.plot, this.words, this.details);
    this.plot.chart = this;
    visible.observe(this.plot);
    theme.listeners.push(() => this.draw());
  }

  update(series, xTitle = "step", smoothing = "auto") {
    Object.assign(this, { series: series.filter((s) => s.y.some((y) => y !== null && y !== undefined)), xTitle, smoothing });
    this.node.hidden = this.series.length === 0;
    const text = `${this.title} by ${xTitle}. ` + this.series.map((s) => describe(s, this.percent)).join("");
    this.plot.setAttribute("role", "img");
    this.plot.setAttribute("aria-label", text);
    fill(this.words, text);
    this.draw();
    this.fillTable();
  }

  show() {
    this.shown = true;
    visible.unobserve(this.plot);
    this.draw();
  }

  draw() {
    if (!this.shown || this.node.hidden) return;
    plotly.then((library) => library.react(this.plot, this.series.flatMap((s) => trace(s, this)), layout(this), { displayModeBar: false, responsive: true }));
  }

  fillTable() {
    if (!this.details.open) return;
    const rows = new Map();
    this.series.forEach((s, i) => s.x.forEach((x, j) => {
      if (!rows.has(x)) rows.set(x, Array(this.series.length).fill(null));
      rows.get(x)[i] = s.y[j];
    }));
    const sorted = [...rows.entries()].sort((a, b) => a[0] - b[0]);
    this.table.fill(el("table", {},
      el("thead", {}, el("tr", {}, [this.xTitle, ...this.series.map((s) => s.name || this.title)].map((t) => el("th", { scope: "col" }, t)))),
      el("tbody", {}, sorted.map(([x, values]) => el("tr", {}, el("th", { scope: "row" }, number(x)), values.map((v) => el("td", {}, number(v)))))),
    ));
  }
}
