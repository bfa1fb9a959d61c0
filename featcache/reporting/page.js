"use strict";
// The numbers are looked up in a table that featcache.metrics made; nothing is measured here.
(function () {
  const byId = (id) => document.getElementById(id);
  const test = byId("test");
  const look = () => { if (test.open) document.body.classList.add("has-looked"); };
  if (test) {
    test.addEventListener("toggle", look);
    document.querySelectorAll('a[href="#test"]').forEach((link) =>
      link.addEventListener("click", () => { test.open = true; }));
  }
  const press = (buttons, chosen) => buttons.forEach((button) =>
    button.setAttribute("aria-pressed", String(button === chosen)));
  const show = () => document.querySelectorAll(".live").forEach((part) => { part.hidden = false; });

  const table = byId("mistakes"), all = byId("all-mistakes");
  const pairs = [...document.querySelectorAll("#how-good button[data-pair]")];
  if (table && pairs.length && !byId("slider")) {
    const caption = byId("mistakes-caption").textContent;
    const choose = (chosen) => {
      press(pairs, chosen);
      for (const row of table.tBodies[0].rows) {
        row.hidden = chosen ? row.dataset.pair !== chosen.dataset.pair : "more" in row.dataset;
      }
      const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden).length;
      byId("mistakes-caption").textContent = chosen
        ? rows + " of " + chosen.textContent + " of this cell; the worst first" : caption;
    };
    pairs.forEach((button) => {
      button.disabled = false;
      button.addEventListener("click", () =>
        choose(button.getAttribute("aria-pressed") === "true" ? null : button));
    });
    all.addEventListener("click", () => choose(null));
    show();
  }

  const source = byId("data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const slider = byId("slider"), numTotal = data.num_yes + data.num_no;
  const cells = [...document.querySelectorAll("button[data-cell]")];
  let chosenCell = null;

  function decimal(value) {
    const text = value.toFixed(3);
    if (value < 1 && Number(text) >= 1) return ">0.999";
    if (value > 0 && Number(text) <= 0) return "<0.001";
    return text;
  }
  const percent = (value) => value === null ? "undefined" : decimal(value);

  function setRate(key, hits, total, interval) {
    const row = document.querySelector('[data-rate="' + key + '"]');
    const [value, range, images] = row.querySelectorAll("td");
    value.textContent = total ? decimal(hits / total) : "undefined";
    value.dataset.value = total ? hits / total : "";
    range.textContent = interval ? interval.map(decimal).join(" to ") : "";
    range.dataset.low = interval ? interval[0] : "";
    range.dataset.high = interval ? interval[1] : "";
    images.textContent = hits.toLocaleString("en-US") + " of " + total.toLocaleString("en-US");
  }

  function move(name, x, y) {
    const mark = document.querySelector('[data-mark="' + name + '"]');
    if (!mark) return;
    const plot = mark.ownerSVGElement;
    const [left, top, width, height] = plot.dataset.frame.split(",").map(Number);
    const [x0, x1, y0, y1] = plot.dataset.ends.split(",").map(Number);
    const share = (value, low, high) => Math.min(Math.max((value - low) / (high - low), 0), 1);
    const right = left + share(x, x0, x1) * width;
    const down = top + (1 - share(y, y0, y1)) * height;
    mark.setAttribute("transform", "translate(" + right + "," + down + ")");
  }

  function cellOf(row, threshold) {
    const called = row[2] >= threshold;
    return row[1] ? (called ? "tp" : "fn") : (called ? "fp" : "tn");
  }

  // Pictures stand in the page once: they are taken from where they were.
  const pictures = new Map();
  document.querySelectorAll("#errors .pictures").forEach((shown) =>
    pictures.set(Number(shown.dataset.row), shown));
  const decisions = { tp: "found", fn: "missed", fp: "false alarm", tn: "left alone" };
  const words = { tp: "found", fn: "missed", fp: "false alarms", tn: "left alone" };
  function list(threshold) {
    const wanted = chosenCell ? [chosenCell] : ["fn", "fp"];
    const found = [];
    for (const cell of wanted) {
      const rows = data.rows.filter((row) => cellOf(row, threshold) === cell);
      // The worst first: those farthest on the wrong side, or nearest to it.
      rows.sort((a, b) => (a[1] ? a[2] - b[2] : b[2] - a[2]));
      rows.forEach((row) => found.push([row, cell]));
    }
    const body = table.tBodies[0];
    body.replaceChildren(...found.slice(0, data.most).map(([row, cell]) => {
      const line = document.createElement("tr"), name = document.createElement("th");
      name.scope = "row";
      if (pictures.has(row[5])) name.append(pictures.get(row[5]).cloneNode(true));
      name.append(row[0]);
      line.append(name);
      for (const text of [decisions[cell], data.classes[row[3]], data.classes[row[4]], row[2].toFixed(4)]) {
        if (text === undefined) continue;
        const cellElement = document.createElement("td");
        cellElement.textContent = text;
        line.append(cellElement);
      }
      return line;
    }));
    const what = wanted.map((cell) =>
      words[cell] + " " + document.querySelector('[data-count="' + cell + '"]').textContent);
    byId("mistakes-caption").textContent = what.join(", ") +
      (found.length > data.most ? "; the worst " + data.most + " are listed" : "; the worst first");
  }

  function bayes() {
    const [, tp, fp, , , , , ofPpv, ofNpv] = data.steps[slider.value];
    // Untouched it is the share in valid, which the field shows rounded; the table has its intervals.
    const field = byId("prevalence"), isOfValid = field.value === field.defaultValue;
    const share = isOfValid ? data.num_yes / numTotal : Number(field.value) / 100;
    const recall = tp / data.num_yes, specificity = 1 - fp / data.num_no;
    let ppv = null, npv = null;
    if (share > 0 && share < 1 && data.num_yes && data.num_no) {
      const called = share * recall + (1 - share) * (1 - specificity);
      const cleared = share * (1 - recall) + (1 - share) * specificity;
      if (called > 0) ppv = share * recall / called;
      if (cleared > 0) npv = (1 - share) * specificity / cleared;
    }
    // The table has the intervals where half of all are positive: the odds of their ends grow.
    const range = (interval, odds) => isOfValid || interval === null ? "" : " (" + interval.map((end) =>
      decimal(end === 1 ? 1 : 1 / (1 + (1 - end) / (end * odds)))).join(" to ") + ")";
    const odds = share / (1 - share);
    byId("ppv").textContent = percent(ppv) + (ppv === null ? "" : range(ofPpv, odds));
    byId("npv").textContent = percent(npv) + (npv === null ? "" : range(ofNpv, 1 / odds));
  }

  function update() {
    const [threshold, tp, fp, recall, specificity, ppv, npv] = data.steps[slider.value];
    const fn = data.num_yes - tp, tn = data.num_no - fp;
    const text = threshold > 1 ? "above 1" : String(Number(threshold.toPrecision(6)));
    byId("threshold-value").textContent = text;
    byId("threshold-value").dataset.value = threshold;
    slider.setAttribute("aria-valuetext", text);
    byId("command").textContent = byId("command").dataset.start + Math.min(threshold, 1);
    for (const [name, number] of Object.entries({ tp, fn, fp, tn })) {
      document.querySelector('[data-count="' + name + '"]').textContent =
        number.toLocaleString("en-US");
    }
    setRate("recall", tp, data.num_yes, recall);
    setRate("specificity", tn, data.num_no, specificity);
    setRate("ppv", tp, tp + fp, ppv);
    setRate("npv", tn, tn + fn, npv);
    byId("slider-says").textContent = "At " + text + ": " + tp + " of " + data.num_yes +
      " found, " + fp + " of " + data.num_no + " false alarms.";
    move("valid-roc", fp / data.num_no, tp / data.num_yes);
    if (tp + fp) move("valid-pr", tp / data.num_yes, tp / (tp + fp));
    if (threshold < 1) {
      move("valid-benefit", threshold, (tp - threshold / (1 - threshold) * fp) / numTotal);
    }
    bayes();
    list(threshold);
  }

  function seek(wanted) {
    let nearest = 0;
    data.steps.forEach((step, i) => {
      if (Math.abs(step[0] - wanted) < Math.abs(data.steps[nearest][0] - wanted)) nearest = i;
    });
    slider.value = nearest;
  }

  function choose(cell) {
    chosenCell = chosenCell === cell ? null : cell;
    press(cells, cells.find((button) => button.dataset.cell === chosenCell));
    update();
  }
  cells.forEach((button) => {
    button.disabled = false;
    button.addEventListener("click", () => choose(button.dataset.cell));
  });
  all.addEventListener("click", () => choose(null));
  slider.addEventListener("input", update);
  byId("prevalence").addEventListener("input", bayes);
  byId("back").addEventListener("click", () => { slider.value = data.chosen; update(); });
  // report.html#threshold=0.3&cell=fp opens at that threshold with that cell.
  const asked = new URLSearchParams(location.hash.slice(1));
  if (asked.has("threshold")) seek(Number(asked.get("threshold")));
  if (Object.hasOwn(words, asked.get("cell") || "")) {
    chosenCell = asked.get("cell");
    press(cells, cells.find((button) => button.dataset.cell === chosenCell));
  }
  show();
  update();
})();
