"use strict";

const find = (id) => document.getElementById(id);
const model = find("model"), status = find("status"), preview = find("preview");
let key = "";
let picture = null;
let asked = 0;

async function call(path, options = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch(path, { ...options, headers: { ...headers, ...options.headers } });
  const body = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (answer.status === 401) find("key-form").hidden = false;
  if (!answer.ok) throw new Error(body.error);
  return body;
}

function say(text, wrong = false) {
  status.textContent = text;
  status.classList.toggle("wrong", wrong);
}

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

async function listModels() {
  try {
    const models = await call("v2/repository/index", { method: "POST", body: '{"ready": true}' });
    const names = [...new Set(models.map((entry) => entry.name))];
    model.replaceChildren(...names.map((name) => new Option(name)));
    model.disabled = names.length === 0;
    find("key-form").hidden = true;
    if (names.length === 0) {
      say("The models are still loading …");
      setTimeout(listModels, 1000);
    } else {
      say("Nothing classified yet.");
      await preselect(names);
      await showCard();
    }
  } catch (error) {
    say(error.message, true);
  }
}

async function preselect(names) {
  for (const name of names.slice(0, 50)) {
    const found = await call(`v2/models/${encodeURIComponent(name)}/card`);
    if (found.classifies_images) {
      model.value = name;
      return;
    }
  }
}

function facts(found) {
  const card = found.card || {}, weights = card.weights || {}, treatment = card.preprocessing || {};
  const size = treatment.size ? treatment.size.join(" × ") : "as it comes";
  return {
    Name: card.name,
    Labels: card.labels ? card.labels.length : "none",
    "Input size": size,
    Preprocessing: treatment.mode,
    Weights: weights.source || "unknown",
    Data: weights.dataset,
    Accuracy: weights.accuracy,
    Licence: weights.licence,
    Device: found.device,
    SHA256: found.sha256,
  };
}

async function showCard() {
  const name = model.value;
  const found = await call(`v2/models/${encodeURIComponent(name)}/card`);
  if (name !== model.value) return;
  const rows = Object.entries(facts(found)).filter(([, value]) => value !== undefined && value !== null);
  find("facts").replaceChildren(
    ...rows.flatMap(([title, value]) => [
      element("dt", title),
      element("dd", typeof value === "object" ? JSON.stringify(value) : String(value)),
    ]),
  );
}

async function classify() {
  if (!picture || !model.value) return;
  const mine = ++asked;
  say("Classifying …");
  const started = performance.now();
  try {
    const found = await call(`v2/models/${encodeURIComponent(model.value)}/classify?top=5`, { method: "POST", body: picture });
    // A later question makes this answer stale.
    if (mine !== asked) return;
    const there = Math.round(performance.now() - started);
    show(found.predictions);
    const note = found.output_kind === "multilabel" ? " Every class has a probability of its own; they do not add up to 100 %." : "";
    say(`${found.model_name}: ${found.milliseconds.toFixed(1)} ms in the server, ${there} ms there and back.${note}`);
  } catch (error) {
    if (mine !== asked) return;
    find("answer").replaceChildren();
    say(error.message, true);
  }
}

function show(predictions) {
  find("answer").replaceChildren(
    ...predictions.map((entry) => {
      const row = document.createElement("li");
      const name = entry.label === null ? `class ${entry.class}` : entry.label;
      const share = `${(100 * entry.probability).toFixed(1)} %`;
      const meter = document.createElement("meter");
      meter.value = entry.probability;
      meter.setAttribute("aria-label", `${name}: ${share}`);
      row.append(element("span", name, "label"), element("span", share, "share"), meter);
      return row;
    }),
  );
}

function take(blob, name) {
  picture = blob;
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(blob);
  preview.alt = `The picture to be classified: ${name}`;
  preview.hidden = false;
  classify();
}

function takeFrom(items) {
  const file = [...items].find((item) => item.type.startsWith("image/"));
  if (file) take(file, file.name);
  else say("This file is not a picture.", true);
}

// The sample is drawn here, so that the page carries no picture of anyone's.
function drawSample() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 256;
  const pen = canvas.getContext("2d");
  const fill = (colour, draw) => { pen.fillStyle = colour; pen.beginPath(); draw(); pen.fill(); };
  const shape = (...points) => () => points.forEach(([x, y]) => pen.lineTo(x, y));
  fill("#9fd0ef", () => pen.rect(0, 0, 256, 160));
  fill("#1f5f8b", () => pen.rect(0, 160, 256, 96));
  fill("#f6e27f", () => pen.arc(205, 45, 20, 0, 7));
  fill("#5b3a29", shape([48, 160], [208, 160], [184, 200], [76, 200]));
  fill("#3d2a20", () => pen.rect(124, 40, 6, 120));
  fill("#f7f3e8", shape([134, 44], [134, 148], [198, 148]));
  fill("#e6dfcc", shape([120, 56], [120, 148], [66, 148]));
  canvas.toBlob((blob) => take(blob, "sample, a sailing boat"), "image/png");
}

find("file").addEventListener("change", (event) => takeFrom(event.target.files));
find("sample").addEventListener("click", drawSample);
model.addEventListener("change", () => { classify(); showCard().catch((error) => say(error.message, true)); });
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = find("key").value;
  listModels();
});
document.addEventListener("paste", (event) => event.clipboardData.files.length && takeFrom(event.clipboardData.files));
document.addEventListener("dragover", (event) => { event.preventDefault(); find("drop").classList.add("over"); });
document.addEventListener("dragleave", () => find("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  find("drop").classList.remove("over");
  takeFrom(event.dataTransfer.files);
});
listModels();
