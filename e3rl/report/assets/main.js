// The page: a bar to switch views, the view itself, and an address that identifies what is shown.

const data = embedded("run");
const source = data.live ? new LiveSource(data) : new EmbeddedSource(data);
const place = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
let runs = [];
let current = Number(place.run ?? 0);
const wanted = place.problem === undefined ? null
  : { step: Number(place.step), problem: place.problem, sibling: Number(place.sibling), side: place.side === "1", reading: place.text === "1" };

function remember(change) {
  Object.assign(place, change);
  const kept = Object.entries(place).filter(([, v]) => v !== null && v !== undefined);
  history.replaceState(null, "", "#" + new URLSearchParams(kept));
}

const views = {
  overview: ["Overview", new OverviewView()],
  segments: ["Segments", new SegmentsView()],
  rollouts: ["Rollouts", new RolloutsView(source, remember, wanted)],
  compare: ["Compare", new CompareView(source)],
};
const main = el("main", { id: "main", tabindex: "-1" }, el("p", { class: "empty" }, "Loading…"));
const tabs = el("nav", { "aria-label": "Views" });
const chooser = el("div", { class: "chooser" });
const state = el("span", { class: "state muted", role: "status" });

function go(view) {
  remember({ view });
  show();
  scrollTo(0, 0);
}

// Compares runs, or one run with itself if it trained on a problem twice.
function comparable() {
  return runs.length > 1 || placesByProblem(runs).size > 0;
}

function drawTabs() {
  fill(tabs, Object.entries(views).filter(([name]) => name !== "compare" || comparable()).map(([name, [title]]) =>
    el("button", { type: "button", "aria-current": name === place.view ? "page" : null, onclick: () => go(name) }, title)));
}

function drawChooser() {
  const several = runs.length > 1 && place.view !== "compare";
  fill(chooser, several && select("Run", runs.map((run, i) => [String(i), run.label]), String(current), (value) => {
    current = Number(value);
    remember({ run: current, step: null, problem: null, sibling: null });
    show();
  }));
}

function show() {
  const first = runs.length > 1 && place.run === undefined ? "compare" : "overview"; // several runs were named to compare them
  if (!(place.view in views) || (place.view === "compare" && !comparable())) place.view = first;
  const view = views[place.view][1];
  drawTabs();
  drawChooser();
  if (main.firstChild !== view.node) fill(main, view.node);
  if (place.view === "compare") view.update(runs);
  else view.update(runs[current], current);
}

function changed(news) {
  const first = runs.length === 0;
  const labels = (list) => list.map((run) => run.label).join("\n");
  const same = labels(runs) === labels(news);
  runs = news;
  current = Math.min(Math.max(0, current), runs.length - 1);
  document.title = (runs.length === 1 ? runs[0].name : `${runs.length} runs`) + " · E³RL";
  if (first || !same) show();
  if (first || !same) return;
  const view = views[place.view][1];
  if (place.view === "compare") view.update(runs);
  else view.update(runs[current], current);
}

fill(document.getElementById("page"),
  el("header", { class: "bar" }, el("span", { class: "brand" }, "E³RL"), tabs, chooser, el("span", { class: "gap" }), state, theme.button()), main);
document.body.append(tooltip.node);
source.start(changed, (reached) => fill(state, reached ? "live" : "no answer from the server"));
