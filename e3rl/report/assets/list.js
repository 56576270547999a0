// The rollouts of a run: filters, sorting, and a list that holds only the visible rows.

const ROW = 74;
const ORDERS = {
  newest: ["Newest first", (r, i) => [-r.step[i]]],
  erased: ["Most erased", (r, i) => [-r.erased[i]]],
  forced: ["Most forced accepts", (r, i) => [-r.forced[i]]],
  flips: ["Most sign flips", (r, i) => [-r.flips[i]]],
  best: ["Highest reward", (r, i) => [-(r.reward[i] ?? -Infinity)]],
  worst: ["Lowest reward", (r, i) => [r.reward[i] ?? Infinity]],
  longest: ["Longest", (r, i) => [-r.tokens[i]]],
};
const REWARDS = {
  any: ["any", () => true],
  right: ["1 or more", (v) => v !== null && v >= 1],
  partial: ["between 0 and 1", (v) => v !== null && v > 0 && v < 1],
  wrong: ["0 or less", (v) => v !== null && v <= 0],
  missing: ["missing", (v) => v === null],
};
const HAVING = {
  any: ["anything", () => true],
  erased: ["an erasure", (r, i) => r.erased[i] > 0],
  forced: ["a forced accept", (r, i) => r.forced[i] > 0],
  flips: ["a sign flip", (r, i) => r.flips[i] > 0],
  cut: ["a cut at the limit", (r, i) => !r.finished[i]],
};

function chosenRows(index, filter) {
  const rows = [];
  const wanted = filter.problem.toLowerCase(), reward = REWARDS[filter.reward][1], having = HAVING[filter.having][1];
  for (let i = 0; i < (index.step ?? []).length; i++) {
    if (filter.step !== "all" && index.step[i] !== Number(filter.step)) continue;
    if (wanted && !index.problem[i].toLowerCase().includes(wanted)) continue;
    if (reward(index.reward[i]) && having(index, i)) rows.push(i);
  }
  const key = ORDERS[filter.order][1];
  const keys = new Map(rows.map((i) => [i, key(index, i)[0]]));
  return rows.sort((a, b) => keys.get(a) - keys.get(b) || index.step[b] - index.step[a] || a - b);
}

class RolloutList {
  constructor(onopen) {
    Object.assign(this, { onopen, index: {}, rows: [], active: -1, filter: { step: "all", problem: "", reward: "any", having: "any", order: "erased" } });
    this.controls = el("div", { class: "filters" });
    this.count = el("p", { class: "muted", role: "status" });
    this.space = el("div", { class: "space" });
    this.scroller = el("div", { class: "rows", role: "listbox", tabindex: "0", "aria-label": "Rollouts", onscroll: () => this.draw(), onkeydown: (e) => this.move(e) }, this.space);
    this.node = el("aside", { class: "list" }, this.controls, this.count, this.scroller);
    new ResizeObserver(() => this.draw()).observe(this.scroller);
  }

  update(index) {
    this.index = index;
    const steps = [...new Set(index.step ?? [])].reverse();
    if (this.steps !== steps.join()) {
      this.steps = steps.join();
      this.drawControls(steps);
    }
    this.apply();
  }

  drawControls(steps) {
    const choose = (key) => (value) => { this.filter[key] = value; this.scroller.scrollTop = 0; this.apply(); };
    const named = (table) => Object.entries(table).map(([key, [name]]) => [key, name]);
    const search = el("input", { type: "search", placeholder: "any", value: this.filter.problem, oninput: () => choose("problem")(search.value) });
    fill(this.controls,
      select("Step", [["all", "all"], ...steps.map((s) => [String(s), String(s)])], this.filter.step, choose("step")),
      el("label", { class: "control" }, el("span", {}, "Problem"), search),
      select("Reward", named(REWARDS), this.filter.reward, choose("reward")),
      select("With", named(HAVING), this.filter.having, choose("having")),
      select("Order", named(ORDERS), this.filter.order, choose("order")));
  }

  apply() {
    const open = this.rows[this.active];
    this.rows = chosenRows(this.index, this.filter);
    this.active = this.rows.indexOf(open);
    fill(this.count, plural(this.rows.length, "rollout"));
    this.space.style.height = this.rows.length * ROW + "px";
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.scroller.scrollTop / ROW) - 4);
    const last = Math.min(this.rows.length, first + Math.ceil(this.scroller.clientHeight / ROW) + 8);
    fill(this.space, this.rows.slice(first, last).map((row, k) => this.row(row, first + k)));
    const active = this.active >= first && this.active < last ? "row-" + this.active : null;
    if (active) this.scroller.setAttribute("aria-activedescendant", active);
    else this.scroller.removeAttribute("aria-activedescendant");
  }

  row(i, at) {
    const r = this.index;
    const notes = [`step ${r.step[i]}`, plural(r.tokens[i], "token"), r.erased[i] && `${r.erased[i]} erased`, r.forced[i] && `${r.forced[i]} forced`,
      r.flips[i] && plural(r.flips[i], "flip")].filter(Boolean);
    const node = el("div", { class: "row", role: "option", id: "row-" + at, "aria-selected": String(at === this.active), "aria-setsize": this.rows.length,
      "aria-posinset": at + 1, onclick: () => this.open(at) },
      el("div", { class: "line" }, el("span", { class: "name" }, `${r.problem[i]} #${r.sibling[i]}`), rewardBadge(r.reward[i])), el("div", { class: "snippet" }, r.snippet[i]), el("div", { class: "muted" }, notes.join(" · ")));
    node.style.top = at * ROW + "px";
    return node;
  }

  open(at, asked = true) {
    this.active = at;
    this.draw();
    const i = this.rows[at];
    this.onopen({ step: this.index.step[i], problem: this.index.problem[i], sibling: this.index.sibling[i] }, asked);
  }

  // Marks the row of the open rollout and scrolls to it; filters that hide it are not changed.
  mark({ step, problem, sibling }) {
    const r = this.index;
    this.active = this.rows.findIndex((i) => r.step[i] === step && r.problem[i] === problem && r.sibling[i] === sibling);
    if (this.active >= 0) this.reveal(this.active);
    this.draw();
  }

  reveal(at) {
    const top = at * ROW;
    if (top < this.scroller.scrollTop) this.scroller.scrollTop = top;
    if (top + ROW > this.scroller.scrollTop + this.scroller.clientHeight) this.scroller.scrollTop = top + ROW - this.scroller.clientHeight;
  }

  move(event) {
    const page = Math.floor(this.scroller.clientHeight / ROW), last = this.rows.length - 1;
    const target = { ArrowDown: this.active + 1, ArrowUp: this.active - 1, PageDown: this.active + page, PageUp: this.active - page, Home: 0, End: last }[event.key];
    if (target === undefined || last < 0) return;
    event.preventDefault();
    const at = Math.max(0, Math.min(last, target));
    this.reveal(at);
    this.open(at);
  }
}

class RolloutsView {
  // ``wanted`` is the rollout that the page's address names; without one the first of the list is shown.
  constructor(source, remember, wanted) {
    Object.assign(this, { source, remember, wanted, begun: false, state: { sibling: 0, side: wanted?.side ?? false, mode: "entropy", reading: wanted?.reading ?? false } });
    this.list = new RolloutList((place, asked) => this.open(place, asked));
    this.note = el("p", { class: "muted" });
    this.detail = el("div", { class: "detail", tabindex: "-1" }, el("p", { class: "empty" }, "Choose a rollout from the list."));
    this.node = el("div", {}, this.note, el("div", { class: "rollouts" }, this.list.node, this.detail));
  }

  update(run, number) {
    if (this.number !== number && this.number !== undefined) Object.assign(this, { begun: false, wanted: null });
    if (this.number !== number) this.list.filter.step = "all";
    this.number = number;
    const { shown, total, first_step: first } = run.rollouts;
    this.note.hidden = total > 0 && shown === total;
    fill(this.note, total === 0 ? "No rollouts are written yet." : shown < total
      && `${total - shown} of ${total} rollouts are left out of this page to keep it small (it starts at step ${first}); all are in the run's rollouts/*.parquet.`);
    this.list.update(run.index);
    if (this.begun || !this.list.rows.length) return;
    this.begun = true;
    if (this.wanted) this.open(this.wanted);
    else this.list.open(0, false);
  }

  async open({ step, problem, sibling }, asked = true) {
    Object.assign(this.state, { sibling });
    const request = (this.request = {});
    let content;
    try {
      content = await this.source.step(this.number, step);
    } catch (error) {
      content = null;
    }
    if (request !== this.request) return;
    const group = content?.groups.find((g) => g.problem === problem);
    if (!group) return fill(this.detail, el("p", { class: "empty" }, "This rollout can't be loaded."));
    const told = () => {
      this.remember({ step, problem, sibling: this.state.sibling, side: this.state.side ? 1 : null, text: this.state.reading ? 1 : null });
      this.list.mark({ step, problem, sibling: this.state.sibling });
    };
    fill(this.detail, new GroupView(group, `${problem}, step ${step}`, this.state, told).node);
    told();
    if (asked && matchMedia("(max-width: 1000px)").matches) this.detail.scrollIntoView();
  }
}
