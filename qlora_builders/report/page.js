"use strict";
// Reads values off the charts: with a pointer, or with the arrow keys once a chart has the focus.
// All text is set by textContent; the page is complete without this script.

function readSeries(path) {
  const numbers = (text) => (text ? text.split(" ").map(Number) : []);
  return {
    name: path.dataset.name,
    color: [...path.classList].find((name) => /^c\d$/.test(name)),
    x: numbers(path.dataset.x),
    y: numbers(path.dataset.y),
  };
}

// Index of the value nearest to `wanted` in the ascending `values`.
function nearest(values, wanted) {
  let low = 0;
  let high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] <= wanted) low = middle;
    else high = middle;
  }
  return wanted - values[low] <= values[high] - wanted ? low : high;
}

function spell(value) {
  if (Number.isNaN(value)) return "not finite";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return value.toLocaleString("en");
  return String(Number(value.toPrecision(5)));
}

function line(tag, text, color) {
  const row = document.createElement("div");
  if (color) {
    const dot = document.createElement("span");
    dot.className = color;
    dot.textContent = "● ";
    row.append(dot);
  }
  const content = document.createElement(tag);
  content.textContent = text;
  row.append(content);
  return row;
}

function makeReadable(plot) {
  const series = [...plot.querySelectorAll("path[data-x]")].map(readSeries).filter((s) => s.x.length);
  if (!series.length) return;
  const min = Number(plot.dataset.xMin);
  const max = Number(plot.dataset.xMax);
  const steps = [...new Set(series.flatMap((s) => s.x))].sort((a, b) => a - b);
  const cursor = document.createElement("div");
  const readout = document.createElement("div");
  cursor.className = "cursor";
  readout.className = "readout";
  readout.setAttribute("role", "status");
  let at = -1;

  function show(index) {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const fraction = (steps[at] - min) / (max - min);
    const near = (max - min) / 50;
    const rows = series.map((s) => [s, nearest(s.x, steps[at])]);
    readout.replaceChildren(
      line("b", `${plot.dataset.xLabel} ${spell(steps[at])}`),
      ...rows
        .filter(([s, i]) => Math.abs(s.x[i] - steps[at]) <= near)
        .map(([s, i]) => {
          const name = series.length > 1 ? `${s.name}: ` : "";
          const place = s.x[i] === steps[at] ? "" : ` (at ${spell(s.x[i])})`;
          const value = `${name}${spell(s.y[i])}${place}`;
          return line("span", value, s.color);
        }),
    );
    cursor.style.left = `${100 * fraction}%`;
    readout.style.left = fraction < 0.5 ? `calc(${100 * fraction}% + 10px)` : "auto";
    readout.style.right = fraction < 0.5 ? "auto" : `calc(${100 * (1 - fraction)}% + 10px)`;
    plot.append(cursor, readout);
  }

  function hide() {
    at = -1;
    cursor.remove();
    readout.remove();
  }

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(nearest(steps, min + ((event.clientX - box.left) / box.width) * (max - min)));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
}

document.querySelectorAll(".plot").forEach(makeReadable);
