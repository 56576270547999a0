// Where runs come from: blocks inside this page, or the server that sent it.

// Distinct names of the runs: their own, or their directory's if names repeat.
function withLabels(runs) {
  const names = runs.map((run) => run.name);
  const labels = runs.map((run, i) => (names.indexOf(run.name) === names.lastIndexOf(run.name) ? run.name : `${run.name} (${run.directory}, seed ${run.seed})`));
  return runs.map((run, i) => ({ ...run, label: labels.indexOf(labels[i]) === i ? labels[i] : `${labels[i]} [${i + 1}]` }));
}

// A block of gzip in base64.
async function unpacked(name) {
  const block = document.getElementById(name);
  if (!block) return null;
  const bytes = Uint8Array.from(atob(block.textContent), (c) => c.charCodeAt(0));
  return new window.Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

class EmbeddedSource {
  constructor(data) {
    this.runs = withLabels(data.runs);
    this.steps = new Map();
  }

  async start(onchange) { onchange(this.runs); }

  async step(run, step) {
    const name = `rollouts-${run}-${step}`;
    if (!this.steps.has(name)) this.steps.set(name, await unpacked(name));
    return this.steps.get(name);
  }
}

class LiveSource {
  constructor(data) {
    Object.assign(this, { every: data.every, version: "", steps: new Map() });
  }

  async start(onchange, onstate) {
    for (;;) {
      try {
        const answer = await fetch("api/runs?since=" + this.version, { cache: "no-store" });
        if (answer.status === 200) {
          const news = await answer.json();
          this.version = news.version;
          onchange(withLabels(news.runs));
        } else if (!answer.ok) throw new Error(answer.status);
        onstate(true);
      } catch (error) {
        onstate(false);
      }
      await new Promise((resolve) => setTimeout(resolve, this.every));
    }
  }

  // A step's ledger is written once; only the last few that were shown are kept.
  async step(run, step) {
    const name = `${run}/steps/${step}`;
    if (!this.steps.has(name)) {
      const answer = await fetch("api/runs/" + name, { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.status);
      if (this.steps.size >= 8) this.steps.delete(this.steps.keys().next().value);
      this.steps.set(name, await answer.json());
    }
    return this.steps.get(name);
  }
}
