// A run of tokens: each coloured by one of its numbers, all of them shown on hover or focus.

const MODES = {
  entropy: { label: "Entropy", unit: "nats", value: (c, t) => c.entropy[t] },
  improbability: { label: "Improbability", unit: "1 − p", value: (c, t) => 1 - Math.exp(c.logprob[t]) },
  perturbation: { label: "Perturbation ε", unit: "nats", value: (c, t) => c.perturbation[t] },
  advantage: { label: "Advantage", unit: "", diverging: true, value: (c, t) => each(c.advantage, t) },
  share: { label: "Attribution", unit: "share of the final attention", value: (c, t) => each(c.share, t) },
};

function each(values, t) {
  if (values === null || values === undefined) return null;
  return Array.isArray(values) ? values[t] ?? null : values;
}

function shownText(piece) {
  if (piece === "") return "◌";
  return piece.replaceAll("\r", "␍").replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");
}

// The largest value of a mode over some candidates, the most extreme fiftieth left out, so that one token can't make the others pale.
function scaleOf(mode, candidates) {
  const sizes = candidates.flatMap((c) => c.pieces.map((_, t) => Math.abs(MODES[mode].value(c, t) ?? 0))).sort((a, b) => a - b);
  return sizes[Math.floor(0.98 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1;
}

function tint(mode, value, scale) {
  if (value === null || !value) return "";
  const strength = Math.min(1, Math.abs(value) / scale) ** 0.8 * 0.72;
  const hue = MODES[mode].diverging ? (value > 0 ? "--positive" : "--negative") : "--heat";
  return `rgb(var(${hue}) / ${strength.toFixed(3)})`;
}

const tooltip = {
  node: el("div", { class: "tooltip", role: "tooltip", id: "token-tooltip", hidden: true }),
  show(token, candidate, t) {
    const rows = [
      ["probability", candidate.logprob[t] === null ? "–" : number(Math.exp(candidate.logprob[t]))],
      ["rank", candidate.rank[t] ? String(candidate.rank[t]) : "–"],
      ["entropy", number(candidate.entropy[t]) + " nats"],
      ["perturbation", number(candidate.perturbation[t]) + " nats"],
      ["advantage", signed(each(candidate.advantage, t))],
      ["attribution", percent(each(candidate.share, t))],
    ].filter(([, value]) => value !== "–");
    const piece = candidate.pieces[t] === "" ? "(part of a character)" : JSON.stringify(candidate.pieces[t]);
    fill(this.node, el("code", {}, piece), el("dl", {}, rows.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
    this.node.hidden = false;
    const at = token.getBoundingClientRect(), own = this.node.getBoundingClientRect();
    const below = at.bottom + 8; // above it stands what was erased
    this.node.style.left = Math.max(8, Math.min(at.left, innerWidth - own.width - 8)) + "px";
    this.node.style.top = (below + own.height > innerHeight - 8 ? at.top - own.height - 8 : below) + "px";
  },
  hide() { this.node.hidden = true; },
};
document.addEventListener("scroll", () => tooltip.hide(), true);

class Tokens {
  constructor(candidate, label) {
    this.candidate = candidate;
    this.tokens = candidate.pieces.map((piece) => el("span", { class: "token", tabindex: "-1", "aria-describedby": "token-tooltip" }, shownText(piece)));
    if (this.tokens.length) this.tokens[0].tabIndex = 0;
    this.node = el("div", { class: "tokens", role: "group", "aria-label": label + ", arrow keys go from token to token",
      onmouseover: (e) => this.tell(e.target), onmouseleave: () => tooltip.hide(), onfocusin: (e) => this.tell(e.target),
      onfocusout: () => tooltip.hide(), onkeydown: (e) => this.move(e) }, this.tokens);
  }

  tell(target) {
    const t = this.tokens.indexOf(target);
    if (t >= 0) tooltip.show(target, this.candidate, t);
  }

  move(event) {
    const t = this.tokens.indexOf(document.activeElement), last = this.tokens.length - 1;
    const target = { ArrowRight: Math.min(t + 1, last), ArrowLeft: Math.max(t - 1, 0), Home: 0, End: last }[event.key];
    if (event.key === "Escape") tooltip.hide();
    if (t < 0 || target === undefined) return;
    event.preventDefault();
    this.tokens[t].tabIndex = -1;
    this.tokens[target].tabIndex = 0;
    this.tokens[target].focus();
  }

  paint(mode, scale) {
    this.tokens.forEach((token, t) => { token.style.backgroundColor = tint(mode, MODES[mode].value(this.candidate, t), scale); });
  }
}
