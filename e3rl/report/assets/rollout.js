// One group of siblings: the problem, its responses segment by segment, and above each segment its erased attempts.

// A square or a part of a bar in the colour of U's i-th term; the page names them in TERMS.
function termMark(tag, i) {
  const mark = el(tag, { class: "term" });
  mark.style.background = `var(--term-${i % 6})`;
  return mark;
}

// Only tokens that the model drew: an environment's answers have no values.
function candidatesOf(group) {
  return group.rollouts.flatMap((r) => [...r.segments.filter((s) => !s.observation), ...r.erasures]);
}

function finalAnswer(text) {
  const boxed = text.lastIndexOf("\\boxed{");
  if (boxed >= 0) {
    let depth = 0;
    for (let i = boxed + 6; i < text.length; i++) {
      depth += text[i] === "{" ? 1 : text[i] === "}" ? -1 : 0;
      if (depth === 0) return text.slice(boxed + 7, i);
    }
  }
  const lines = text.trimEnd().split("\n");
  const last = lines[lines.length - 1].trim();
  return last.length > 90 ? "…" + last.slice(-90) : last;
}

// U as its weighted terms end to end, Theta as a mark across them.
function judgeBar(candidate, scale) {
  const [total, ...terms] = candidate.u, theta = candidate.theta[0];
  const width = (value) => Math.max(0, Math.min(100, (100 * value) / scale)).toFixed(1) + "%";
  const parts = TERMS.map((_, i) => {
    const part = termMark("span", i);
    part.style.width = width(terms[i]);
    return part;
  });
  const mark = el("span", { class: "mark" });
  mark.style.left = width(theta);
  const words = TERMS.map((name, i) => `${name} ${number(terms[i])}`).join(", ");
  return el("div", { class: "judge-bar", role: "img", title: `U: ${words}`, "aria-label": `U ${number(total)}: ${words}; threshold ${number(theta)}` }, parts, mark);
}

function judgeText(candidate) {
  const [theta, baseline, penalty, modulation] = candidate.theta;
  const above = candidate.u[0] > theta;
  return el("span", { class: "judge-text", title: `Θ = B ${number(baseline)} × Γ ${number(penalty)} × φ ${number(modulation)}` },
    `U ${number(candidate.u[0])} ${above ? ">" : "≤"} Θ ${number(theta)}`);
}

function why(candidate) {
  const [total, ...terms] = candidate.u;
  const largest = terms.indexOf(Math.max(...terms));
  return `Erased because U ${number(total)} was above Θ ${number(candidate.theta[0])}; the largest term is ${TERMS[largest]} (${percent(terms[largest] / (total || 1))}).`;
}

// Whether drawing again helped, according to the judge.
function replacement(erased, next) {
  const change = next.u[0] - erased.u[0], words = change < 0 ? "less uncertain" : change > 0 ? "more uncertain" : "no more certain";
  const same = erased.pieces.join("") === next.pieces.join("") ? "; it reads the same" : "";
  return `What was drawn instead is ${words}: U ${number(next.u[0])}${same}.`;
}

function verdict(segment, erased) {
  if (segment.verdict === null) return null;
  if (segment.verdict === "forced") return el("span", { class: "badge forced" }, "forced: erasures used up");
  if (segment.verdict === "spared") return el("span", { class: "badge forced" }, "spared: above its threshold, committed by chance");
  return el("span", { class: "badge" }, erased ? `accepted after ${plural(erased, "erasure")}` : "accepted at once");
}

class Response {
  constructor(rollout, group, scale, reading) {
    this.texts = [];
    this.node = el("section", { class: "response", "aria-label": `Sibling ${rollout.sibling}` },
      this.heading(rollout, group), this.strip(rollout), reading ? this.read(rollout) : rollout.segments.map((s) => this.segment(s, rollout, scale)));
  }

  read(rollout) {
    const text = new Reading(rollout);
    this.texts = text.texts;
    return text.node;
  }

  heading(rollout, group) {
    const text = rollout.segments.flatMap((s) => s.pieces).join("");
    const parts = Object.entries(rollout.parts).map(([name, value]) => `${name} ${number(value)}`);
    return el("header", {},
      el("h3", {}, `Sibling ${rollout.sibling} `, badgeOf(rollout)),
      rollout.error && el("p", { class: "error" }, "Reward missing: " + rollout.error),
      parts.length > 1 && el("p", { class: "muted" }, parts.join(" · ")),
      el("dl", { class: "answers" }, el("dt", {}, "Ends with"), el("dd", { class: "answer" }, finalAnswer(text) || "(nothing)"),
        group.answer !== null && [el("dt", {}, "Reference"), el("dd", { class: "gold" }, group.answer)]),
      rollout.finish !== "stop" && el("p", { class: "muted" }, "Cut at the length limit."));
  }

  // Where the reward was attributed along the response: widths are tokens, filled areas shares of the final attention;
  // half a cell is the share of a segment of its length under uniform attention.
  strip(rollout) {
    const shares = rollout.segments.map(segmentShare);
    if (shares.every((s) => s === null) || rollout.segments.length < 2) return null;
    const length = rollout.segments.reduce((n, s) => n + s.pieces.length, 0);
    const cells = rollout.segments.map((segment, i) => {
      const level = el("span", { class: "level" });
      level.style.height = Math.min(100, (50 * (shares[i] ?? 0) * length) / segment.pieces.length) + "%";
      const cell = el("span", { class: "cell", title: `segment ${segment.index + 1}: ${percent(shares[i])} of the final attention` }, level);
      cell.style.flexGrow = segment.pieces.length;
      return cell;
    });
    const words = shares.map((s, i) => `segment ${i + 1} ${percent(s)}`).join(", ");
    return [el("p", { class: "caption" }, "Attribution along the response; half height is uniform attention"),
      el("div", { class: "strip", role: "img", "aria-label": "Attribution: " + words }, cells)];
  }

  segment(segment, rollout, scale) {
    const { attempts: erased, turns } = erasedAt(rollout, segment.index);
    if (segment.observation) return observed(segment);
    const share = segmentShare(segment);
    const advantage = mean(segment.pieces.map((_, t) => each(segment.advantage, t)));
    return el("section", { class: "segment" },
      el("header", {}, el("h4", {}, `Segment ${segment.index + 1}`), el("span", { class: "muted" }, plural(segment.pieces.length, "token")),
        verdict(segment, erased.length), segment.u && judgeBar(segment, scale), segment.u && judgeText(segment),
        advantage !== null && el("span", { class: "muted" }, "advantage " + signed(advantage)),
        share !== null && el("span", { class: "muted" }, "attribution " + percent(share))),
      turns.map((turn, i) => this.turn(turn, i, rollout, scale)),
      erased.length > 0 && el("details", { class: "erased" }, el("summary", {}, plural(erased.length, "erased attempt")),
        erased.map((e, i) => this.attempt(e, erased[i + 1] ?? segment, scale))),
      this.tokens(segment, `Segment ${segment.index + 1}`));
  }

  attempt(erasure, next, scale) {
    const contrast = erasure.advantage ?? null;
    return el("div", { class: "attempt" },
      el("header", {}, el("h5", {}, `Attempt ${erasure.attempt + 1}`), judgeBar(erasure, scale), judgeText(erasure),
        contrast !== null && el("span", { class: "muted" }, "advantage as contrast " + signed(contrast))),
      el("del", {}, this.tokens(erasure, `Erased attempt ${erasure.attempt + 1}`)), el("p", { class: "muted why" }, why(erasure) + (next ? " " + replacement(erasure, next) : "")));
  }

  // A turn that was erased with its results, and its replacement.
  turn(turn, i, rollout, scale) {
    const later = rollout.erasures.slice(rollout.erasures.findIndex((e) => e.observation && e.attempt === turn.attempt && e.index === turn.index) + 1);
    const next = later.find((e) => e.observation && e.index === turn.index)?.observation ?? answerTo(rollout, turn.index)?.observation ?? null;
    return el("details", { class: "erased turn", open: true },
      el("summary", {}, `Erased turn ${i + 1}: ${callNames(turn.observation)}`),
      el("div", { class: "attempt" },
        el("p", { class: "muted why" }, `Taken back after its call: the evidence against it, ${number(turn.observation.evidence)}, was above ${number(turn.theta[0])}.`),
        turn.attempts.length > 0 && el("details", { class: "erased" }, el("summary", {}, plural(turn.attempts.length, "erased attempt") + " within it"),
          turn.attempts.map((e, n) => this.attempt(e, turn.attempts[n + 1] ?? null, scale))),
        el("del", {}, this.tokens(turn, `Erased turn ${i + 1}`), callList(turn.observation)),
        el("p", { class: "instead" }, "Instead: ", next ? callList(next) : "an answer without a call")));
  }

  tokens(candidate, label) {
    const text = new Tokens(candidate, label);
    this.texts.push(text);
    return text.node;
  }
}

function segmentShare(segment) {
  return segment.share ? segment.share.reduce((a, b) => a + (b ?? 0), 0) : null;
}

// Decoded responses have no reward and no reason why it is missing.
function badgeOf(rollout) {
  return rollout.reward === null && !rollout.error ? null : rewardBadge(rollout.reward);
}

function rewardBadge(reward) {
  if (reward === null) return el("span", { class: "badge missing" }, "no reward");
  const kind = reward >= 1 ? "right" : reward <= 0 ? "wrong" : "partial";
  return el("span", { class: "badge " + kind }, "reward " + number(reward, 2));
}

// A group's view. ``state`` holds what the reader chose: sibling, side (by side), mode and reading; ``onchange`` is called on each choice.
// Colours and bars have the scale of ``pool``: all candidates that are shown together.
class GroupView {
  constructor(group, heading, state, onchange, pool = candidatesOf(group)) {
    Object.assign(this, { group, state, onchange, pool });
    const judged = pool.filter((c) => c.u && !c.observation);
    this.scale = 1.05 * Math.max(1e-6, ...judged.flatMap((c) => [c.u[0], c.theta[0]]));
    this.judged = judged.length > 0;
    this.body = el("div", {});
    this.legend = el("div", { class: "legend" });
    this.tabs = el("div", { class: "siblings", role: "group", "aria-label": "Siblings" });
    this.chosen = el("div", { class: "tools" });
    this.node = el("article", { class: "group" }, el("h2", {}, heading), this.problem(), this.tabs, this.chosen, this.body);
    this.draw();
  }

  problem() {
    return el("details", { class: "prompt", open: this.group.prompt.length < 600 }, el("summary", {}, "Prompt"), el("pre", {}, this.group.prompt));
  }

  modes() {
    const has = (mode) => this.pool.some((c) => c.pieces.some((_, t) => MODES[mode].value(c, t) !== null));
    return Object.keys(MODES).filter(has);
  }

  tools() {
    const options = this.modes().map((m) => [m, MODES[m].label]);
    const choose = (change) => { Object.assign(this.state, change); this.draw(); this.onchange(); };
    return [select("Show", [["segments", "segments and verdicts"], ["text", "one text"]], this.state.reading ? "text" : "segments", (view) => choose({ reading: view === "text" })),
      select("Colour by", options, this.state.mode, (mode) => choose({ mode })),
      this.legend, this.judged && !this.state.reading && el("p", { class: "legend terms" },
        TERMS.map((name, i) => el("span", {}, termMark("i", i), name)), el("span", {}, el("i", { class: "mark" }), "Θ"))];
  }

  draw() {
    const { rollouts } = this.group;
    const chosen = rollouts.find((r) => r.sibling === this.state.sibling) ?? rollouts[0];
    const choose = (change) => { Object.assign(this.state, change); this.draw(); this.onchange(); };
    fill(this.chosen, this.tools());
    fill(this.tabs,
      rollouts.map((r) => el("button", { type: "button", class: "sibling", "aria-pressed": String(!this.state.side && r === chosen),
        onclick: () => choose({ sibling: r.sibling, side: false }) }, "#" + r.sibling + " ", badgeOf(r),
        r.erasures.length > 0 && el("span", { class: "muted" }, r.erasures.length + " erased"))),
      rollouts.length > 1 && el("button", { type: "button", class: "sibling", id: "side-by-side", "aria-pressed": String(this.state.side),
        onclick: () => choose({ side: !this.state.side }) }, "Side by side"));
    this.responses = (this.state.side ? rollouts : [chosen]).map((r) => new Response(r, this.group, this.scale, this.state.reading));
    fill(this.body, el("div", { class: this.state.side ? "side" : "single" }, this.responses.map((r) => r.node)));
    this.paint();
  }

  paint() {
    const mode = this.modes().includes(this.state.mode) ? this.state.mode : "entropy";
    const scale = scaleOf(mode, this.pool);
    this.responses.forEach((r) => r.texts.forEach((t) => t.paint(mode, scale)));
    const { diverging, unit } = MODES[mode];
    const top = mode === "share" ? percent(scale) : number(scale, 2);
    fill(this.legend, el("span", {}, diverging ? MINUS + top : "0"), el("i", { class: "ramp" + (diverging ? " diverging" : "") }), el("span", {}, `${top} ${unit}`));
  }
}
