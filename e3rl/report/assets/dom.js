// Creates and fills elements. Text enters the page only as text nodes, never as markup.

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  fill(node, ...children);
  return node;
}

function fill(node, ...children) {
  node.replaceChildren(...children.flat(2).filter((c) => c !== null && c !== undefined && c !== false));
  return node;
}

// A sentence in which what stands between backticks is code.
function prose(text) {
  return text.split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));
}

function select(label, options, value, onchange) {
  const choices = options.map(([key, text]) => el("option", { value: key, selected: key === value }, text));
  const control = el("select", { "aria-label": label, onchange: () => onchange(control.value) }, choices);
  return el("label", { class: "control" }, el("span", {}, label), control);
}

const MINUS = "−";

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e4) return String(value).replace("-", MINUS);
  if (size >= 1e4 || (size > 0 && size < 1e-3)) return compact(value);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : digits).replace("-", MINUS);
}

function compact(value) {
  const steps = [[1e9, "G"], [1e6, "M"], [1e3, "k"]];
  const step = steps.find(([size]) => Math.abs(value) >= size);
  if (step) return (value / step[0]).toFixed(1).replace(/\.0$/, "").replace("-", MINUS) + " " + step[1];
  return (Number.isInteger(value) ? String(value) : value.toExponential(1)).replaceAll("-", MINUS);
}

function signed(value) {
  if (value === null || value === undefined) return "–";
  return (value > 0 ? "+" : "") + number(value, 2);
}

function percent(value) {
  return value === null || value === undefined ? "–" : (100 * value).toFixed(value < 0.1 ? 1 : 0) + " %";
}

function plural(count, word) {
  return count + " " + word + (count === 1 ? "" : "s");
}

function mean(values) {
  const found = values.filter((v) => v !== null && v !== undefined);
  return found.length ? found.reduce((a, b) => a + b, 0) / found.length : null;
}

// The theme follows the system until a reader chooses one; the choice is stored if the browser allows it.
const theme = {
  listeners: [],
  chosen() {
    try { return localStorage.getItem("e3rl-theme"); } catch { return null; }
  },
  dark() {
    const set = document.documentElement.dataset.theme;
    return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  },
  set(name) {
    document.documentElement.dataset.theme = name;
    try { localStorage.setItem("e3rl-theme", name); } catch { /* private windows keep nothing */ }
    this.listeners.forEach((listen) => listen());
  },
  button() {
    const button = el("button", { class: "quiet", type: "button", id: "theme", onclick: () => this.set(this.dark() ? "light" : "dark") });
    const label = () => fill(button, this.dark() ? "Light" : "Dark");
    this.listeners.push(label);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.listeners.forEach((listen) => listen()));
    label();
    return button;
  },
};
if (theme.chosen()) document.documentElement.dataset.theme = theme.chosen();

// A box that scrolls sideways if its content is too wide; a fading edge with an arrow shows that there is more.
class ScrollBox {
  constructor(label) {
    const cue = () => this.node.classList.toggle("more", this.box.scrollLeft + this.box.clientWidth < this.box.scrollWidth - 1);
    this.box = el("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": label, onscroll: cue });
    this.node = el("div", { class: "scroll-frame" }, this.box);
    this.sizes = new ResizeObserver(cue);
    this.sizes.observe(this.box);
  }

  fill(content) {
    fill(this.box, content);
    this.sizes.observe(content);
  }
}

function embedded(name) {
  const block = document.getElementById(name);
  return block ? JSON.parse(block.textContent) : null;
}
