// Turns with tools: calls, results, and whole turns that were erased after their results.

// For each index in ``erasures``: the later erasure of the whole turn that it was part of, or null.
function turnsOfErasures(erasures) {
  return erasures.map((erased, i) => {
    const later = erasures.findIndex((turn, j) => j > i && turn.observation && turn.start <= erased.start);
    return later < 0 ? null : later;
  });
}

// What was erased above the segment at ``index``: its own attempts, and whole turns that began with it, each with the attempts
// that were erased inside it.
function erasedAt(rollout, index) {
  const inside = turnsOfErasures(rollout.erasures);
  const free = rollout.erasures.map((erased, i) => [erased, i]).filter(([e, i]) => inside[i] === null && e.index === index);
  return {
    attempts: free.filter(([e]) => !e.observation).map(([e]) => e),
    turns: free.filter(([e]) => e.observation).map(([e, i]) => ({ ...e, attempts: rollout.erasures.filter((_, j) => inside[j] === i) })),
  };
}

// The answer to the assistant turn that begins at ``index``; null if it called nothing.
function answerTo(rollout, index) {
  return rollout.segments.find((s) => s.index >= index && s.observation) ?? null;
}

function callLine(call) {
  return el("li", {}, el("code", { class: "call" }, `${call.name}(${call.arguments})`), el("span", { class: "arrow" }, " → "),
    el("code", { class: call.failed ? "result failed" : "result" }, call.result));
}

function callList(observation) {
  return el("ul", { class: "calls" }, observation.calls.map(callLine));
}

// An erased turn's calls in words, for a heading.
function callNames(observation) {
  return observation.calls.map((c) => c.name + (c.failed ? " failed" : "")).join(", ") || "no call";
}

// The environment's tokens, as the model saw them.
function observed(segment) {
  const shown = el("pre", { class: "observed" }, segment.pieces.join(""));
  return el("section", { class: "segment answer-of-tools", "aria-label": "Answer of the environment" },
    el("header", {}, el("h4", {}, "Environment"), el("span", { class: "muted" }, plural(segment.pieces.length, "token")),
      segment.observation.forced && el("span", { class: "badge forced" }, "evidence against the turn, erasures used up")),
    callList(segment.observation), el("details", {}, el("summary", { class: "muted" }, "As the model saw it"), shown));
}

// A response as one text: erased parts struck through at their places, with the answers of environments between.
class Reading {
  constructor(rollout) {
    this.texts = [];
    const parts = rollout.segments.flatMap((segment) => {
      const { attempts, turns } = erasedAt(rollout, segment.index);
      return [...turns.flatMap((turn) => [...turn.attempts.map((a) => this.gone(a)), this.gone(turn)]), ...attempts.map((a) => this.gone(a)),
        segment.observation ? el("div", { class: "between" }, callList(segment.observation)) : this.kept(segment)];
    });
    this.node = el("div", { class: "reading" }, parts);
  }

  kept(segment) {
    const node = this.text(segment, `Segment ${segment.index + 1}`);
    node.classList.add("kept");
    return node;
  }

  gone(erased) {
    const label = erased.observation ? `Erased turn, ${callNames(erased.observation)}` : `Erased attempt ${erased.attempt + 1}`;
    return el("del", { class: erased.observation ? "turn" : null, title: label }, this.text(erased, label), erased.observation && callList(erased.observation));
  }

  text(candidate, label) {
    const text = new Tokens(candidate, label);
    this.texts.push(text);
    return text.node;
  }
}
