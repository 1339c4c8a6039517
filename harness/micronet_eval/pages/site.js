"use strict";

// Tables: a click on a column's head sorts by it, a second one the other way; empty cells stay last.
const valueOf = (row, column) => {
  const cell = row.cells[column];  // none where the one before spans the rest
  const text = (cell?.dataset.value ?? cell?.textContent ?? "").trim();
  const number = Number(text.replace(/[,%\s]/g, ""));
  return text === "" ? null : Number.isNaN(number) ? text : number;
};
const compare = (a, b) =>
  typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    const keyed = [...table.tBodies[0].rows].map((row) => [valueOf(row, column), row]);
    keyed.sort(([a], [b]) => (a === null) - (b === null) || (a === null ? 0 : sign * compare(a, b)));
    table.tBodies[0].append(...keyed.map(([, row]) => row));
  }));
}

// Only what belongs to the chosen task; of a comparison also only what was asked for by name, or none beats.
const task = document.getElementById("task"), named = document.getElementById("named"), best = document.getElementById("best");
if (task || named) {
  const filter = () => {
    const wanted = (part) => !task?.value || part.dataset.task === task.value;
    document.querySelectorAll("[data-task]").forEach((part) => { part.hidden = !wanted(part); });
    const rows = [...document.querySelectorAll("tr[data-row]")];
    for (const row of rows) {
      const fits = row.cells[0].textContent.toLowerCase().includes(named.value.trim().toLowerCase());
      row.hidden = !wanted(row) || !fits || (best.checked && !("best" in row.dataset));
      document.querySelectorAll(`path[data-row="${row.dataset.row}"]`).forEach((way) => { way.style.display = row.hidden ? "none" : ""; });
    }
    if (named) document.getElementById("left").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };
  for (const choice of [task, named, best]) choice?.addEventListener("input", filter);
  document.getElementById("choice")?.addEventListener("submit", (event) => event.preventDefault());
  filter();
}

// A comparison: its lines and rows light up together, while they are pointed at, or for as long as one is pressed.
for (const part of document.querySelectorAll("[data-row]")) {
  const both = [...document.querySelectorAll(`[data-row="${part.dataset.row}"]`)];
  const button = both.map((one) => one.querySelector("button")).find(Boolean);
  const light = (lit) => both.forEach((one) => one.classList.toggle("lit", lit || button?.getAttribute("aria-pressed") === "true"));
  for (const [event, lit] of [["pointerenter", true], ["pointerleave", false], ["focusin", true], ["focusout", false]])
    part.addEventListener(event, () => light(lit));
  const press = () => {
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    light(true);
  };
  if (part.tagName === "TR") button?.addEventListener("click", press);
  else if (button) part.addEventListener("click", press);
}

// Treemap: squarified rows (Bruls, Huizing, van Wijk 2000) of buttons, so that the keyboard reaches each of them.
// Places items, largest first, each { area }, into a rectangle of the same total area.
function squarify(items, box) {
  let { x, y, w, h } = box;
  let start = 0;
  while (start < items.length) {
    const side = Math.min(w, h);
    let end = start, sum = 0, worst = Infinity;
    while (end < items.length) {
      const total = sum + items[end].area;
      const ratio = Math.max(side ** 2 * items[start].area / total ** 2, total ** 2 / (side ** 2 * items[end].area));
      if (ratio > worst) break;
      [sum, worst, end] = [total, ratio, end + 1];
    }
    const thick = sum / side;
    let along = 0;
    for (const item of items.slice(start, end)) {
      const length = item.area / thick;
      item.box = w < h ? { x: x + along, y, w: length, h: thick } : { x, y: y + along, w: thick, h: length };
      along += length;
    }
    if (w < h) [y, h] = [y + thick, h - thick]; else [x, w] = [x + thick, w - thick];
    start = end;
  }
}

const shown = (number) => number.toLocaleString("en", { maximumFractionDigits: 0 });

for (const map of document.querySelectorAll(".treemap")) {
  const whole = JSON.parse(document.getElementById(map.dataset.tree).textContent);
  const boxes = map.querySelector(".boxes"), crumbs = map.querySelector(".crumbs"), told = map.querySelector(".told");
  const units = { 1: "bits stored", 2: "operations of 32 bits" };
  let path = [whole], measure = 1;

  const says = (node) => `${node[0]}: ${shown(node[measure])} ${units[measure]}, `
    + `${(100 * node[measure] / (whole[measure] || 1)).toFixed(1)} % of all`;
  const go = (next) => { path = next; draw(); (boxes.querySelector("button") ?? crumbs.lastChild).focus(); };

  function draw() {
    const node = path[path.length - 1];
    crumbs.replaceChildren(...path.map((step, depth) => {
      const crumb = document.createElement("button");
      crumb.type = "button";
      crumb.textContent = step[0];
      if (depth === path.length - 1) crumb.setAttribute("aria-current", "true");
      crumb.addEventListener("click", () => go(path.slice(0, depth + 1)));
      return crumb;
    }));
    told.textContent = says(node);
    const w = boxes.clientWidth || 600, h = boxes.clientHeight || 400;
    const items = node[3].filter((child) => child[measure] > 0)
      .sort((a, b) => b[measure] - a[measure])
      .map((child) => ({ child, area: child[measure] }));
    const sum = items.reduce((total, item) => total + item.area, 0);
    items.forEach((item) => { item.area *= w * h / sum; });
    squarify(items, { x: 0, y: 0, w, h });
    boxes.replaceChildren(...items.map(({ child, box }, place) => {
      const button = document.createElement("button"), name = document.createElement("span");
      button.type = "button";
      button.title = says(child);
      button.setAttribute("aria-label", says(child) + (child[3].length ? "; opens" : ""));
      Object.assign(button.style, {
        left: `${100 * box.x / w}%`, top: `${100 * box.y / h}%`,
        width: `${100 * box.w / w}%`, height: `${100 * box.h / h}%`,
        background: `hsl(${(205 + 47 * place) % 360} 45% var(--box))`,
      });
      if (box.w > 34 && box.h > 20) {
        name.textContent = child[0];
        button.append(name);
        if (box.w > 60 && box.h > 42) button.append(`${(100 * child[measure] / whole[measure]).toFixed(1)} %`);
      } else button.style.padding = 0;
      if (child[3].length) {
        button.classList.add("more");
        button.addEventListener("click", () => go([...path, child]));
      }
      for (const event of ["focus", "pointerenter"]) button.addEventListener(event, () => { told.textContent = says(child); });
      return button;
    }));
  }

  for (const choice of map.querySelectorAll("[data-measure]")) {
    choice.addEventListener("click", () => {
      measure = Number(choice.dataset.measure);
      map.querySelectorAll("[data-measure]").forEach((b) => b.setAttribute("aria-pressed", String(b === choice)));
      draw();
    });
  }
  draw();
}
