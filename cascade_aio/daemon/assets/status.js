// The status page: draws each snapshot that the service sends. Texts are set, never parsed as HTML.
"use strict";

const DEAD_AFTER_MS = 5000;
const CHARTS = [
  ["hit_rate", "hit rate (blocks)", (v) => (v < 0 ? "nobody asked" : (100 * v).toFixed(1) + " %")],
  ["shm_hits", "hits in shared memory", (v) => v.toFixed(0) + " /s"],
  ["disk_hits", "hits on disk", (v) => v.toFixed(0) + " /s"],
  ["read_bytes", "read from disk", (v) => size(v) + "/s"],
  ["put_bytes", "put", (v) => size(v) + "/s"],
  ["requests", "messages", (v) => v.toFixed(0) + " /s"],
];

const byId = (id) => document.getElementById(id);

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let at = 0;
  while (bytes >= 1024 && at < units.length - 1) { bytes /= 1024; at += 1; }
  return (at && bytes < 100 ? bytes.toFixed(1) : bytes.toFixed(0)) + " " + units[at];
}

function seconds(value) {
  return value < 0.001 ? (1e6 * value).toFixed(0) + " µs" : value < 1 ? (1e3 * value).toFixed(0) + " ms" : value + " s";
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function row(cells) {
  const made = element("tr");
  for (const [content, className] of cells) {
    const cell = element("td", content instanceof Node ? undefined : content, className);
    if (content instanceof Node) cell.append(content);
    made.append(cell);
  }
  return made;
}

function bar(share) {
  const made = element("div", undefined, "bar");
  const fill = element("i");
  fill.style.width = (100 * Math.min(1, share)).toFixed(1) + "%";
  made.title = (100 * share).toFixed(1) + " %";
  made.append(fill);
  return made;
}

function chart(history, [key, title, format]) {
  const made = element("div");
  const values = history.map((sample) => sample[key]);
  const last = values.length ? values[values.length - 1] : 0;
  made.append(element("div", title + ": " + (values.length ? format(last) : "no sample yet"), "quiet"));
  const top = key === "hit_rate" ? 1 : Math.max(1, ...values);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 299 100");
  svg.setAttribute("preserveAspectRatio", "none");
  let line = [];
  const draw = () => {
    if (line.length > 1) {
      const drawn = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
      drawn.setAttribute("points", line.join(" "));
      svg.append(drawn);
    }
    line = [];
  };
  values.forEach((value, at) => {
    if (value < 0) { draw(); return; }
    line.push((299 - values.length + 1 + at) + "," + (98 - 96 * value / top).toFixed(1));
  });
  draw();
  made.append(svg);
  return made;
}

function tree(node) {
  const label = node.block.slice(0, 12) + (node.run > 1 ? " and " + (node.run - 1) + " after it" : "") +
    ": " + node.blocks + " blocks, " + size(node.bytes);
  if (!node.children.length) return element("div", label, "leaf");
  const made = element("details");
  made.append(element("summary", label), ...node.children.map(tree));
  return made;
}

function show(snapshot) {
  const statistics = snapshot.statistics;
  const service = statistics.service;
  byId("root").textContent = statistics.root;
  byId("summary").textContent = statistics.blocks + " blocks, " + service.clients + " clients, " +
    statistics.shm.leases + " leases, " + size(statistics.store.deduplicated_bytes) + " not stored twice, loop lag p99 " +
    seconds(snapshot.lag.p99_seconds) + ", up " + Math.round(service.uptime_seconds) + " s";
  byId("tiers").replaceChildren(...snapshot.tiers.map((tier) => row([
    [tier.tier], [tier.capacity_bytes ? bar(tier.used_bytes / tier.capacity_bytes) : "no limit"],
    [size(tier.used_bytes), "n"], [tier.capacity_bytes ? size(tier.capacity_bytes) : "", "n"], [tier.blocks, "n"],
  ])));
  byId("charts").replaceChildren(...CHARTS.map((kind) => chart(snapshot.history, kind)));
  byId("latency").replaceChildren(...Object.entries(snapshot.latency).map(([name, times]) => row([
    [name], [times.counts.reduce((sum, count) => sum + count, 0), "n"],
    ["≤ " + seconds(times.p50_seconds), "n"], ["≤ " + seconds(times.p99_seconds), "n"],
  ])));
  const roots = snapshot.prefixes.roots.map(tree);
  const open = byId("prefixes").querySelector("details[open]");
  if (!open) byId("prefixes").replaceChildren(...(roots.length ? roots : [element("div", "no blocks yet", "quiet")]));
  byId("errors").className = snapshot.errors.length ? "bad" : "quiet";
  byId("errors").textContent = snapshot.errors.length ? snapshot.errors.join("\n") : "none";
}

function state(text, dead) {
  byId("state").textContent = text;
  byId("state").className = dead ? "dead" : "";
}

function follow() {
  let heard = Date.now();
  const source = new EventSource("events");
  source.onmessage = (event) => {
    heard = Date.now();
    show(JSON.parse(event.data));
    state("live", false);
  };
  source.onerror = () => state("connection lost, trying again", true);
  setInterval(() => {
    if (Date.now() - heard > DEAD_AFTER_MS) state("connection lost, trying again", true);
  }, 1000);
}

// "?once" is one look that ends, for printing and for tests.
if (location.search === "?once") {
  fetch("status.json")
    .then((response) => response.json())
    .then((snapshot) => { show(snapshot); state("one look", false); })
    .catch(() => state("connection lost", true));
} else {
  follow();
}
