"use strict";
// Sends what is chosen or dropped to /predict, a file a request, and shows what comes back.
(() => {
  const form = document.getElementById("form");
  const input = document.getElementById("files");
  const drop = document.getElementById("drop");
  const status = document.getElementById("status");
  const answers = document.getElementById("answers");
  const template = document.getElementById("answer");
  const limits = document.body.dataset;
  const SVG = "http://www.w3.org/2000/svg";

  const percent = (share) => (100 * share).toFixed(1) + " %";
  const add = (parent, tag, text, kind) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    parent.append(made);
    return made;
  };

  const ask = async (path, file) => {
    const body = new FormData();
    body.append("file", file, file.name);
    const response = await fetch(path, { method: "POST", body });
    const answer = await response.json();
    if (answer.error) {
      const { what, expected, found, hint } = answer.error;
      const reason = answer.failures ? answer.failures[0].reason
        : `${what}: expected ${expected}, found ${found}. ${hint}`;
      throw new Error(reason);
    }
    return answer;
  };

  const showPicture = (article, file) => {
    const place = article.querySelector(".picture");
    const image = place.querySelector("img");
    const url = URL.createObjectURL(file);
    image.addEventListener("load", () => URL.revokeObjectURL(url));
    image.addEventListener("error", () => {
      URL.revokeObjectURL(url);
      place.className = "picture none";
      place.textContent = "No preview: this browser does not show this kind of file.";
    });
    image.src = url;
  };

  const showRow = (body, name, prob, calibrated, isChosen) => {
    const row = add(body, "tr", undefined, isChosen ? "chosen" : "");
    add(row, "th", name + (isChosen ? " (chosen)" : "")).scope = "row";
    add(row, "td", percent(prob), "number");
    if (calibrated) add(row, "td", name in calibrated ? percent(calibrated[name]) : "", "number");
    const svg = document.createElementNS(SVG, "svg");
    const bar = document.createElementNS(SVG, "rect");
    svg.setAttribute("viewBox", "0 0 100 1");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    bar.setAttribute("width", String(100 * prob));
    bar.setAttribute("height", "1");
    svg.append(bar);
    add(row, "td", undefined, "bar").append(svg);
  };

  const showAnswer = (article, answer) => {
    const said = answer.predictions[0];
    const hasLabels = answer.task === "multilabel";
    const decided = said.decision !== undefined;
    const chosen = decided ? said.decision : hasLabels ? said.preds : said.pred;
    const words = hasLabels ? chosen.join(", ") || "none of these" : chosen;
    article.querySelector(".kind").textContent =
      decided ? "decision" : hasLabels ? "labels above 50 %" : "most probable class";
    article.querySelector(".decision strong").textContent = words;
    article.querySelector(".refer").hidden = !(decided && !hasLabels && chosen === "refer");
    article.querySelector(".unlike").hidden = !said.unlike_training;
    const rules = Object.entries(answer.thresholds || {}).map(([name, rule]) =>
      rule.refer_below === null ? `${name} from ${percent(rule.threshold)} on`
        : `${name} from ${percent(rule.refer_below)} on, refer from ${percent(rule.threshold)} on`);
    article.querySelector(".rules").hidden = !rules.length;
    article.querySelector(".rules").textContent = `By the threshold of this run: ${rules.join("; ")}.`;
    const calibrated = said.calibrated;
    article.querySelector(".calibrated").hidden = !calibrated;
    const body = article.querySelector("tbody");
    const order = answer.classes.map((_, i) => i);
    if (!hasLabels) order.sort((a, b) => said.probs[b] - said.probs[a]);
    for (const i of order.slice(0, 20)) {
      const name = answer.classes[i];
      const isChosen = hasLabels ? chosen.includes(name) : chosen === name;
      showRow(body, name, said.probs[i], calibrated, isChosen);
    }
    if (order.length > 20) {
      add(article.querySelector(".said"), "p", `and ${order.length - 20} less probable`, "small");
    }
    return words + (said.unlike_training ? ", unlike any training image" : "");
  };

  const explain = (article, file) => {
    const button = article.querySelector(".why");
    const place = article.querySelector(".explanation");
    button.addEventListener("click", async () => {
      button.disabled = true;
      status.textContent = `Explaining ${file.name} ...`;
      try {
        const { explanation, picture } = await ask("/explain", file);
        const against = explanation.against ? ` against ${explanation.against}` : "";
        place.replaceChildren();
        const scroll = add(place, "div", undefined, "scroll");
        scroll.tabIndex = 0;
        const image = add(scroll, "img");
        image.src = picture;
        image.alt = `Map of what spoke for and against ${explanation.positive}${against}`;
        add(place, "p", `Log-odds of ${explanation.positive}${against}: ` +
          `${explanation.log_odds.toFixed(2)}. What the network used, not where disease is.`);
        for (const map of explanation.maps) {
          if (map.disagree) {
            add(place, "p", "Map and occlusion disagree: do not rely on the map.", "failed");
          }
        }
        if (explanation.nearest.length) {
          add(place, "p", "Nearest training images (distance: 1 less the cosine):");
          const list = add(place, "ol");
          for (const row of explanation.nearest) {
            const kind = row.classes.join(", ") || "no label";
            add(list, "li", `${kind}, distance ${row.distance.toPrecision(2)}` +
              (row.same ? " (this very image)" : ""));
          }
        }
        button.hidden = true;
        status.textContent = `Explained ${file.name}.`;
      } catch (error) {
        place.replaceChildren();
        add(place, "p", error.message, "failed");
        status.textContent = `No explanation of ${file.name}.`;
        button.disabled = false;
      }
      place.hidden = false;
    });
  };

  const classify = async (file) => {
    const article = template.content.firstElementChild.cloneNode(true);
    article.querySelector(".name").textContent = file.name;
    showPicture(article, file);
    let words;
    try {
      if (file.size > Number(limits.fileBytes)) throw new Error("The file is too large.");
      words = showAnswer(article, await ask("/predict", file));
      explain(article, file);
    } catch (error) {
      words = "not classified";
      const place = article.querySelector(".said");
      for (const part of [...place.children].slice(1)) part.remove();
      add(place, "p", `Not classified: ${error.message}`, "failed");
    }
    answers.prepend(article);
    return `${file.name}: ${words}.`;
  };

  const classifyAll = async (files) => {
    if (!files.length) return;
    const said = [];
    for (const [number, file] of files.entries()) {
      status.textContent = `Classifying ${number + 1} of ${files.length} ...`;
      said.push(await classify(file));
    }
    status.textContent = said.join(" ");
  };

  let turn = Promise.resolve();
  const enqueue = (files) => { turn = turn.then(() => classifyAll([...files])); };

  document.getElementById("origin").textContent = location.origin;
  input.addEventListener("change", () => { enqueue([...input.files]); input.value = ""; });
  form.addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  document.addEventListener("dragleave", () => drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    enqueue(event.dataTransfer.files);
  });
})();
