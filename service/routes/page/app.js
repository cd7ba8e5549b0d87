/** The page: one image, one question, one map; all else depends on them. */

import { Problem, query, request } from "./api.js";
import { Comparison } from "./comparison.js";
import { listModel, listImages, listPredictions, syncQuestion, wireQuestion } from "./controls.js";
import { Inside } from "./inside.js";
import { Lab } from "./lab.js";
import { method } from "./methods.js";
import { announce, complain, failed, settle } from "./notices.js";
import { newImage, sample, take, watch } from "./images.js";
import { answerTo, isKnown, predictionsOf, priceOf } from "./question.js";
import { Pane, captionOf } from "./stage.js";
import { note } from "./report.js";
import { $, state } from "./state.js";
import { syncExport, wireExport } from "./export.js";
import { verdictWords } from "./verdict.js";
import { wireTheme, wireView } from "./view.js";

const POLL_MS = 1000;
const NOTE_MS = 300; // without a change of the view until the map is drawn for the report
const SLOW = 5; // forward passes; longer waits are announced

const live = new Pane($("panes"));
const comparison = new Comparison(live, (change) => put(change));
let last = null; // the image whose map was shown last

const inside = new Inside();
const lab = new Lab();

// ---- models -----------------------------------------------------------------------------------

async function loadModels() {
  try {
    ({ models: state.models } = await request("models"));
  } catch (error) {
    failed(error, loadModels);
    return;
  }
  const chosen = $("model").value;
  const preset = state.models.find((candidate) => candidate.default) ?? state.models[0];
  const model = state.models.find((candidate) => candidate.name === chosen) ?? preset;
  const named = ({ name, state: is }) => (is === "ready" ? name : `${name} (${is})`);
  $("model").replaceChildren(...state.models.map((entry) => new Option(named(entry), entry.name)));
  $("model").disabled = state.models.length === 0;
  if (!model) return;
  $("model").value = model.name;
  if (state.model?.name !== model.name) await useModel(model.name);
  if (state.models.some((entry) => entry.state === "loading")) setTimeout(loadModels, POLL_MS);
}

async function useModel(name) {
  settle();
  state.model = null;
  document.querySelector(".ask").inert = true;
  clear();
  const known = state.models.find((entry) => entry.name === name);
  if (known.state === "failed") return complain(`The model ${name} could not be loaded: ${known.reason}`);
  if (known.state === "loading") return announce(`The model ${name} is loading: ${known.progress ?? "one moment"}.`);
  const path = `models/${encodeURIComponent(name)}`;
  try {
    const [details, { layers }] = await Promise.all([request(path), request(`${path}/layers`)]);
    if ($("model").value !== name) return; // another one was chosen meanwhile
    const labels = details.labels ?? [];
    const shared = new Set(labels.filter((label, id) => labels.indexOf(label) !== id));
    state.model = { ...details, layers, labels, shared };
  } catch (error) {
    return $("model").value === name && failed(error, () => useModel(name));
  }
  Object.assign(state.question, { target: null, contrast: null, layer: null });
  document.querySelector(".ask").inert = false;
  listModel(state.model);
  inside.use(state.model);
  for (const image of state.images) image.failure = "";
  ask();
  return classify();
}

// ---- images ------------------------------------------------------------------------------

function add(files) {
  settle();
  const images = files.map((file) => newImage(file));
  state.images.push(...images);
  choose(images[0]);
  classify();
}

function choose(image) {
  settle();
  $("welcome").hidden = true;
  $("work").hidden = false;
  if (state.image !== image) {
    Object.assign(state.question, { target: null, contrast: null });
    state.image = image;
    clear();
  }
  image.ready.then(() => {
    if (state.image === image && live.shown?.image !== image) live.drawImage(image);
    listImages(choose);
  });
  ask();
}

/** Nothing of another image or model stays beside the chosen ones: all is empty until their answer. */
function clear() {
  state.pending?.abort();
  state.pending = null;
  state.shown = null;
  if (state.image) live.showImage(state.image);
  listPredictions(null);
  listImages(choose);
  syncExport();
  comparison.sync();
  inside.clear();
  lab.clear();
}

let classifying = null; // the loop that is running

/** Classifies the images that are not shown, one after the other. */
async function classify() {
  const { model } = state;
  const loop = {};
  classifying = loop;
  for (const image of [...state.images]) {
    if (!model || image === state.image || image.labels.has(model.name)) continue;
    try {
      const options = query([["model", model.name], ["top_k", 1]]);
      const answer = await request(`predict?${options}`, { body: image.file });
      name(image, model, answer.results[0].predictions);
    } catch (error) {
      if (state.model === model && !refuse(image, error)) image.failure = error.message;
    }
    if (classifying !== loop) return; // a newer loop goes through all of them
    listImages(choose);
  }
}

function name(image, model, predictions) {
  image.labels.set(model.name, predictions[0].label);
  image.failure = "";
}

/** Removes a file that is not a readable image, with the reason; false for any other error. */
function refuse(image, error) {
  if (!(error instanceof Problem) || ![400, 413, 415].includes(error.status)) return false;
  state.images = state.images.filter((other) => other !== image);
  comparison.follow(state.images);
  if (state.image === image) leave();
  listImages(choose);
  complain(`${image.name}: ${error.message}`);
  return true;
}

/** Returns to the image that was shown before, or to the start. */
function leave() {
  state.image = null;
  if (state.images.length) return choose(state.images.includes(last) ? last : state.images[0]);
  clear();
  $("work").hidden = true;
  $("welcome").hidden = false;
}

// ---- the question and its answer --------------------------------------------------------------

/** Another question about the same image. */
function put(change) {
  settle();
  Object.assign(state.question, change);
  ask();
}

async function ask() {
  const { image, model } = state;
  const question = { ...state.question };
  state.pending?.abort();
  if (image && !model) live.say("Waiting for the model …");
  if (!image || !model) return;
  syncQuestion();
  const pending = new AbortController();
  state.pending = pending;
  const done = live.wait(...waitFor(question, model), () => pending.abort());
  try {
    if (!state.shown && !isKnown(image, model, question)) await predictFirst(image, model, question, pending);
    const shown = await answerTo(image, model, question, pending.signal);
    if (state.pending === pending) show(shown);
  } catch (error) {
    if (state.pending === pending) refused(error, image);
  } finally {
    done();
  }
}

/** What to say while a question is pending, and how many seconds it may take. */
function waitFor(question, model) {
  const { passes, seconds } = priceOf(question, model);
  const work = `${method(question.method).title}${question.verify ? " and its verdict" : ""}`;
  if (passes <= SLOW) return [work, seconds];
  const words = `${work} · up to ${Math.round(passes).toLocaleString("en")} forward passes`;
  announce(`${words}. Cancel stops it.`);
  return [words, seconds];
}

/** While a slow map is computed, the predictions are already there. */
async function predictFirst(image, model, question, pending) {
  if (priceOf(question, model).passes <= SLOW) return;
  const found = await predictionsOf(image, model, question, pending.signal);
  if (state.pending !== pending) return;
  name(image, model, found.predictions);
  listImages(choose);
  listPredictions(found, put);
}

function show(shown) {
  state.shown = shown;
  last = shown.image;
  name(shown.image, shown.model, shown.predictions);
  live.showMap(shown, state.view, put);
  listImages(choose);
  listPredictions(shown, put);
  syncQuestion();
  note(live, state.view);
  syncExport();
  comparison.sync();
  lab.use(shown);
  const verdict = shown.explanation.verify ? ` ${verdictWords(shown)}` : "";
  announce(`${shown.image.name}: ${captionOf(shown)}, by ${method(shown.explanation.method).title}.${verdict}`);
}

/** After an error the map of this image stays, if there is one, with its question; the error is beside it. */
function refused(error, image) {
  if (error.name === "AbortError") announce("Cancelled.");
  else if (refuse(image, error)) return;
  else failed(error, ask, live.find(".failure"));
  if (state.shown && error.status !== 401) {
    Object.assign(state.question, state.shown.question);
    syncQuestion();
  } else if (error.status !== undefined) {
    image.failure = error.message;
    listImages(choose);
  }
}

let noting = 0;

/** The report has the map as it was drawn last. */
function noteSoon() {
  clearTimeout(noting);
  noting = setTimeout(() => live.shown && note(live, state.view), NOTE_MS);
}

// ---- start ------------------------------------------------------------------------------------

const DO = {
  pick: () => $("file").click(),
  camera: async () => {
    const file = await take($("camera"));
    if (file) add([file]);
  },
  sample: async () => {
    try {
      add([await sample()]);
    } catch (error) {
      failed(error, DO.sample);
    }
  },
};

document.addEventListener("click", (event) => {
  const element = event.target.closest("[data-do], [data-close]");
  if (element?.dataset.do) DO[element.dataset.do]();
  else element?.closest("dialog").close();
});
$("model").addEventListener("change", () => useModel($("model").value));
$("compare").addEventListener("click", () => comparison.keep(state.view));
wireTheme();
wireQuestion(put);
wireView(() => {
  comparison.draw(state.view);
  noteSoon();
  lab.follow();
});
wireExport(comparison);
watch({ input: $("file"), drop: $("drop"), onFiles: add });
loadModels();
