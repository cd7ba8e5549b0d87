/** The session as one HTML file: every map that was shown, every experiment, the classes of all images. */

import { cardHtml } from "./experiments.js";
import { percent } from "./stage.js";
import { state } from "./state.js";
import { verdictWords } from "./verdict.js";

const SIDE = 720; // longer side of the maps, in pixels
const KEPT = 200; // maps; the oldest are left out

const STYLE = `:root{color-scheme:light dark;--line:light-dark(#d9d6cf,#3a3d42);--soft:light-dark(#5b5d62,#a4a7ad)}
body{font:15px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;overflow-wrap:anywhere}
h1{margin-bottom:0}h2{margin-top:2.5rem;padding-top:1.5rem;border-top:1px solid var(--line)}h3,figure,p{margin:0}ol{list-style:none;padding:0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:1.25rem;margin:1rem 0}
.card,li{display:grid;gap:.5rem;align-content:start;padding:1rem;border:1px solid var(--line);border-radius:8px}
.facts,.legend,.flags,figcaption,.control-words{color:var(--soft);font-size:.87rem}img{display:block;width:100%;height:auto;border-radius:4px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.1rem 1rem .1rem 0;text-align:left}:is(td,th):nth-child(n+2){text-align:right}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}.legend{display:flex;justify-content:space-between}.colors{display:flex;gap:.5rem;align-items:center}
.colors img{width:8rem;height:.6rem}svg{width:100%}.axis,.range{fill:var(--line)}.zero,.dot,.mean{fill:var(--soft)}.dot{fill-opacity:.6}.own{fill:#b0380b}`;

/**
 * Notes the map of a pane for the report, as it is drawn now; a map that was noted before is replaced.
 *
 * @param {Pane} pane  shows a map. @param {object} view
 */
export function note(pane, view) {
  const { shown } = pane;
  const entry = { shown: outline(shown), lines: pane.words().slice(0, 3), flags: pane.flags(), bar: pane.bar(), picture: pane.overlay(view, SIDE).then(dataOf) };
  const at = state.maps.findIndex((other) => other.shown.id === entry.shown.id);
  if (at === -1) state.maps.push(entry);
  else state.maps[at] = entry;
  if (state.maps.length > KEPT) state.maps.shift();
}

/** What the report needs of an answer: all but the pixels of its map. */
function outline({ image, model, question, answer, explanation, predictions, ...shown }) {
  const { heatmap: _pixels, ...rest } = explanation;
  const response = { ...answer, results: answer.results.map((result) => ({ ...result, explanations: [rest] })) };
  const verdict = explanation.verify ? verdictWords({ explanation, ...shown }) : "";
  return { id: answer.id, image, model: model.name, version: model.version, question, predictions, response, verdict };
}

const dataOf = (blob) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });

const escaped = (text) => String(text).replaceAll(/[&<>"']/g, (sign) => `&#${sign.codePointAt(0)};`);

/** The report as text: this page's policy forbids styles in documents that it creates. */
export async function sessionReport(address) {
  const maps = await Promise.all(state.maps.map(async (entry) => ({ ...entry, data: await entry.picture })));
  const images = [...new Set([...state.images, ...maps.map(({ shown }) => shown.image), ...state.experiments.map(({ image }) => image)])];
  const data = {
    maps: maps.map(({ shown: { image, model, version, question, response } }) => ({ image: image.name, model, version, question, response })),
    experiments: state.experiments.map(({ title, image, sent, answer }) => ({ title, image: image.name, edits: sent, answer })),
  };
  const when = new Date().toISOString().slice(0, 16).replace("T", " ");
  return [
    "<!doctype html>",
    '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">',
    `<title>camserve: report of a session</title><style>${STYLE}</style></head><body>`,
    `<h1>Report of a session</h1><p class="facts">${escaped(address)} · ${when} UTC · ${counted(images, "image")}, ${counted(maps, "map")}, ${counted(state.experiments, "experiment")}</p>`,
    ...images.map((image) => sectionOf(image, maps)),
    `<script type="application/json">${JSON.stringify(data, null, 1).replaceAll("<", "\\u003c")}</script>`,
    "</body></html>",
    "",
  ].join("\n");
}

const counted = ({ length }, word) => `${length} ${word}${length === 1 ? "" : "s"}`;

function sectionOf(image, maps) {
  const cards = maps.filter(({ shown }) => shown.image === image).map(mapHtml);
  const experiments = state.experiments.filter((experiment) => experiment.image === image).map(cardHtml);
  const labels = [...image.labels].map(([model, label]) => `${label} (${model})`).join(", ");
  return [
    `<section><h2>${escaped(image.name)}</h2><p class="facts">${escaped(labels || image.failure || "not classified")}</p>`,
    cards.length ? `<div class="cards">${cards.join("\n")}</div>` : "",
    experiments.length ? `<h3>Experiments</h3><ol class="cards">${experiments.join("\n")}</ol>` : "",
    "</section>",
  ].join("\n");
}

function mapHtml({ shown, lines: [caption, ...facts], flags, bar, data }) {
  const rows = shown.predictions.map(({ label, score, logit }) => `<tr><td>${escaped(label)}</td><td>${percent(score)}</td><td>${logit.toFixed(2)}</td></tr>`);
  return [
    `<article class="card"><img src="${data}" alt="${escaped(`${shown.image.name} with the heatmap for ${caption}`)}"><h3>${escaped(caption)}</h3>`,
    ...facts.map((line) => `<p class="facts">${escaped(line)}</p>`),
    `<p class="colors facts">${bar.least} <img src="${bar.image}" alt="to"> ${bar.most}</p>`,
    ...flags.map((flag) => `<p class="flags">${escaped(flag)}</p>`),
    shown.verdict ? `<p>${escaped(shown.verdict)}</p>` : "",
    `<table><tr><th>class</th><th>score</th><th>logit</th></tr>${rows.join("")}</table></article>`,
  ].join("\n");
}
