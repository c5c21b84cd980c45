"use strict";

// values under the pointer, in every chart at the same update
const charts = [...document.querySelectorAll(".plot")].map((plot) => {
  const make = (name, parent) => {
    const element = document.createElement("div");
    element.className = name;
    element.hidden = true;
    parent.append(element);
    return element;
  };
  const curves = JSON.parse(plot.querySelector("script").textContent);
  const values = [...plot.parentElement.querySelectorAll(".legend b")];
  return {
    plot, curves, values,
    last: values.map((value) => value.textContent),
    total: Math.max(1, Number(plot.dataset.total)),
    cursor: make("cursor", plot), tip: make("tip", plot),
    dots: curves.map((_, index) => make(`dot c${index}`, plot)),
  };
});

const number = (value) => {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e7 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
};

// index of the point that is nearest to an update
const nearest = (updates, wanted) => {
  let low = 0, high = updates.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (updates[middle] < wanted) low = middle + 1; else high = middle;
  }
  return low > 0 && wanted - updates[low - 1] < updates[low] - wanted ? low - 1 : low;
};

const text = (parent, kind, words, name) => {
  const element = document.createElement(kind);
  if (words !== undefined) element.textContent = words;
  if (name) element.className = name;
  parent.append(element);
  return element;
};

function show(wanted, where) {
  for (const chart of charts) {
    const { plot, curves, values, tip, cursor, dots, total } = chart;
    const found = curves.map((curve) => (curve.updates.length ? nearest(curve.updates, wanted) : -1));
    const first = found.findIndex((index) => index >= 0);
    if (first < 0) continue;
    const update = curves[first].updates[found[first]];
    cursor.hidden = false;
    cursor.style.left = `${(100 * update) / total}%`;
    tip.hidden = chart !== where;
    tip.replaceChildren();
    text(tip, "div", `update ${update}`);
    curves.forEach((curve, index) => {
      const at = found[index];
      dots[index].hidden = at < 0;
      if (at < 0) return;
      const value = (curve.average || curve.values)[at];
      values[index].textContent = number(value);
      dots[index].style.left = `${(100 * curve.updates[at]) / total}%`;
      dots[index].style.bottom = `${100 * Math.min(1, Math.max(0, curve.heights[at]))}%`;
      const line = text(tip, "div", undefined, `c${index}`);
      text(line, "i");
      line.append(`${curve.name} `);
      text(line, "b", number(value));
      if (curve.average) text(line, "em", ` here ${number(curve.values[at])}`);
    });
    if (chart === where) {
      const right = update / total > 0.55;
      tip.style.left = right ? "auto" : `calc(${(100 * update) / total}% + .8rem)`;
      tip.style.right = right ? `calc(${100 - (100 * update) / total}% + .8rem)` : "auto";
    }
  }
}

function hide() {
  for (const { values, last, tip, cursor, dots } of charts) {
    tip.hidden = cursor.hidden = true;
    dots.forEach((dot) => { dot.hidden = true; });
    values.forEach((value, index) => { value.textContent = last[index]; });
  }
}

for (const chart of charts) {
  let at = chart.total;
  chart.plot.addEventListener("pointermove", (event) => {
    const box = chart.plot.getBoundingClientRect();
    at = (chart.total * (event.clientX - box.left)) / box.width;
    show(at, chart);
  });
  chart.plot.addEventListener("pointerleave", hide);
  chart.plot.addEventListener("blur", hide);
  chart.plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    at = Math.min(chart.total, Math.max(0, at + (step * chart.total) / 100));
    show(at, chart);
  });
}

// one row of previews at a time, drawn from the rows below
const sliders = [];
for (const scene of document.querySelectorAll(".scene")) {
  const rows = [...scene.parentElement.querySelectorAll(`[data-prompt="${scene.dataset.of}"] .time:not(.subject) .row`)];
  const labels = rows.map((row) => row.previousElementSibling.textContent);
  const shown = scene.querySelector(".row"), slider = scene.querySelector("input"), label = scene.querySelector("output");
  slider.addEventListener("input", () => {
    shown.replaceChildren(...[...rows[slider.value].children].map((image) => image.cloneNode()));
    label.textContent = labels[slider.value];
  });
  scene.querySelector(".scrub").hidden = rows.length < 2;
  sliders.push({ slider, labels });
}

// a picture by itself
const dialog = document.querySelector("dialog");
document.addEventListener("click", (event) => {
  if (dialog.open) return dialog.close();
  if (event.target.tagName !== "IMG") return;
  const large = dialog.querySelector("img");
  large.src = event.target.src;
  large.className = event.target.className;
  large.alt = dialog.querySelector("p").textContent = event.target.alt;
  dialog.showModal();
});

// The page of a running run loads itself again. Its place and its sliders are kept in the state of the history entry:
// a reload preserves it, and a page that is opened as a file may not have storage.
const banner = document.querySelector(".state"), log = document.querySelector(".log");
const PATIENCE = 300;

function remember() {
  const above = [...document.querySelectorAll("section")].filter((one) => one.getBoundingClientRect().top <= 0).pop();
  history.replaceState({
    id: above ? above.id : "", offset: (above || document.body).getBoundingClientRect().top, log: log ? log.scrollTop : 0,
    rows: sliders.map(({ slider, labels }) => (slider.value === slider.max ? null : labels[slider.value])),
  }, "");
}

function restore({ id, offset, log: scrolled, rows }) {
  sliders.forEach(({ slider, labels }, index) => {
    const found = labels.indexOf(rows[index]);
    if (found < 0) return;  // it showed the last row, and does so again
    slider.value = found;
    slider.dispatchEvent(new Event("input"));
  });
  if (log) log.scrollTop = scrolled;
  const top = (document.getElementById(id) || document.body).getBoundingClientRect().top - offset;
  scrollBy({ top, behavior: "instant" });
}

const kept = history.state;
if (kept) {
  history.replaceState(null, "");
  restore(kept);
  addEventListener("load", () => restore(kept));  // the browser may have scrolled to an anchor
}
let again = false;
addEventListener("beforeunload", () => { history.scrollRestoration = again ? "manual" : "auto"; });
if (banner.dataset.written) {
  const { written, expected } = banner.dataset, opened = Date.now();
  let held = false;
  addEventListener("pointerdown", () => { held = true; });
  for (const name of ["pointerup", "pointercancel"]) addEventListener(name, () => { held = false; });
  const tick = () => {
    const lost = Date.now() / 1000 - written > Math.max(PATIENCE, 3 * expected);
    if (lost && banner.classList.contains("running")) {
      banner.className = "state stopped";
      banner.querySelector("b").textContent = "no news";
      banner.querySelector("span").prepend("the run may have ended; it was running ");
    }
    if (Date.now() - opened < 1000 * (lost ? PATIENCE : expected)) return;
    if (document.hidden || dialog.open || held || !getSelection().isCollapsed) return;
    again = true;
    remember();
    location.reload();
  };
  tick();
  setInterval(tick, 1000);
}
