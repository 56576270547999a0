// Decoded responses: the group view without a run.

const group = embedded("group");
const view = new GroupView(group, plural(group.rollouts.length, "response"), { sibling: group.rollouts[0].sibling, side: false, mode: "entropy", reading: false }, () => {});
fill(document.getElementById("page"),
  el("header", { class: "bar" }, el("span", { class: "brand" }, "E³RL"), el("span", { class: "gap" }), theme.button()),
  el("main", { id: "main", class: "narrow", tabindex: "-1" }, view.node));
document.body.append(tooltip.node);
