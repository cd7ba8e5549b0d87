/** The page: one image, one question, one map; all else depends on them. */

import { onTravel, readAddress, writeAddress } from "./address.js";
import { Problem, query, request } from "./api.js";
import { Comparison } from "./comparison.js";
import { listModel, listPredictions, syncQuestion, wireQuestion } from "./controls.js";
import { listImages, sayKept, takeOut, wireGallery } from "./gallery.js";
import { Inside } from "./inside.js";
import { methodFor, reasonAgainst } from "./knows.js";
import { Lab } from "./lab.js";
import { method, presetMethod } from "./methods.js";
import { announce, complain, complainOfFiles, failed, offerUndo, settle, showWork } from "./notices.js";
import { enlarge, newImage, notAnImage, sample, take, watch } from "./images.js";
import { sentenceOf } from "./problems.js";
import { SLOW, answerTo, classOf, isKnown, isNearest, predictionsOf, priceOf } from "./question.js";
import { note } from "./report.js";
import { forget, keep, kept as keptImages } from "./session.js";
import { Pane, captionOf } from "./stage.js";
import { $, state } from "./state.js";
import { syncExport, wireExport } from "./export.js";
import { verdictWords } from "./verdict.js";
import { syncView, wireOrder, wireTheme, wireView } from "./view.js";

const POLL_MS = 1000;
const NOTE_MS = 300; // without a change of the view until the map is drawn for the report
const MOST_IMAGES = 100; // of a session

const live = new Pane($("panes"));
const comparison = new Comparison(live, (change) => put(change));
let loading = null; // the newest load of a model
let opened = null; // the address that the page was opened with, until its model is there

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
  const chosen = opened?.model ?? $("model").value;
  const preset = state.models.find((candidate) => candidate.default) ?? state.models[0];
  const model = state.models.find((candidate) => candidate.name === chosen) ?? preset;
  const named = ({ name, state: is }) => (is === "ready" ? name : `${name} (${is})`);
  $("model").replaceChildren(...state.models.map((entry) => new Option(named(entry), entry.name)));
  $("model").disabled = state.models.length === 0;
  if (!model) return;
  $("model").value = model.name;
  if (state.model?.name !== model.name) await useModel(model.name, opened?.question, false);
  if (state.models.some((entry) => entry.state === "loading")) setTimeout(loadModels, POLL_MS);
}

/** Loads what is known of a model; the question goes on with what `question` changes. */
async function useModel(name, question = { target: null, contrast: null, layer: null }, isStep = true) {
  settle();
  const isPreset = state.model && state.question.method === presetMethod(state.model);
  const own = {};
  loading = own;
  state.model = null;
  for (const image of state.images) image.failure = "";
  allow(false);
  clear();
  const entry = state.models.find((candidate) => candidate.name === name);
  if (entry.state === "failed") return complain(`The model ${name} could not be loaded: ${entry.reason}`);
  if (entry.state === "loading") return announce(`The model ${name} is loading: ${entry.progress ?? "one moment"}.`);
  const path = `models/${encodeURIComponent(name)}`;
  try {
    const [details, { layers }] = await Promise.all([request(path), request(`${path}/layers`)]);
    if (loading !== own) return; // another one was chosen meanwhile
    const labels = details.labels ?? [];
    const shared = new Set(labels.filter((label, id) => labels.indexOf(label) !== id));
    state.model = { ...details, layers, labels, shared };
  } catch (error) {
    return loading === own && failed(error, () => useModel(name, question, isStep));
  }
  if (isPreset) state.question.method = null;
  Object.assign(state.question, question, { at: null });
  fitQuestion(opened);
  opened = null;
  allow(true);
  listModel(state.model);
  inside.use(state.model);
  if (isStep || state.image) writeAddress(isStep);
  ask();
  return classify();
}

/** Whether the model can be asked; images can be chosen and removed at any time. */
function allow(isAllowed) {
  for (const id of ["answer", "question", "export"]) $(id).inert = !isAllowed;
}

/** Leaves out of the question what this model does not have, and says so with what the address `link` names in vain. */
function fitQuestion(link) {
  const { model, question } = state;
  const refused = [...(link?.refused ?? [])];
  if (link?.model && link.model !== model.name) refused.push(`model ${link.model}`);
  if (question.layer !== null && !model.layers.some(({ path, target }) => target && path === question.layer)) {
    refused.push(`layer ${question.layer}`);
    question.layer = null;
  }
  if (model.task !== "classification") Object.assign(question, { fit: "", verify: question.verify && "true" });
  question.method ??= presetMethod(model);
  const against = reasonAgainst(model, question.method);
  if (against && link) refused.push(`method ${question.method} (${against})`);
  question.method = methodFor(model, question.method);
  for (const name of ["target", "contrast"]) {
    if (name === "contrast" && isNearest(model, question.contrast)) continue;
    const wanted = typeof question[name] === "string" ? classOf(model, question[name]) : question[name];
    const isKnown = wanted === null || typeof wanted === "string" ? wanted === null : wanted < model.classes;
    if (!isKnown) refused.push(`${name === "target" ? "class" : name} ${question[name]}`);
    question[name] = isKnown ? wanted : null;
  }
  if (refused.length) complain(`This link names what is not available here: ${refused.join(", ")}. The defaults are shown instead.`);
}

// ---- images ------------------------------------------------------------------------------

/** Adds the files that may be images, and says why the others are not used. */
function add(files, others = []) {
  settle();
  $("files-failure").replaceChildren();
  const usable = files.filter((file) => !notAnImage(file));
  const images = usable.slice(0, Math.max(0, MOST_IMAGES - state.images.length)).map((file) => newImage(file));
  const refused = [...others, ...files.map(notAnImage).filter(Boolean)];
  if (images.length < usable.length) refused.push(`${usable.length - images.length} images are not added: this page holds ${MOST_IMAGES}. Remove some first.`);
  if (images.length) {
    state.images.push(...images);
    choose(images[0]);
    classify();
    keep(images).then(sayKept);
  }
  if (refused.length) complainOfFiles(refused);
}

/** Another image, by the visitor. */
function choose(image) {
  const isStep = state.image !== null && state.image !== image;
  settle();
  look(image, state.image === image || state.image === null ? {} : { target: null, at: null, contrast: null });
  writeAddress(isStep);
}

/** Shows an image, and asks the question with what is changed in it. */
function look(image, question) {
  showWork(true);
  Object.assign(state.question, question);
  if (state.image !== image) {
    state.image = image;
    clear();
    enlarge(image);
  }
  image.ready.then(() => {
    if (state.image === image) live.drawImage(image);
    listImages(choose);
  });
  ask();
}

/** Removes images at the visitor's wish, and offers to take that back. */
function remove(images) {
  const { image } = state;
  const next = state.images.slice(state.images.indexOf(image)).find((other) => !images.includes(other));
  const putBack = takeOut(images);
  forget(images);
  comparison.follow(state.images);
  if (images.includes(image)) leave(next);
  else lab.sync();
  listImages(choose);
  offerUndo(images.length === 1 ? `${images[0].name} is removed.` : `${images.length} images are removed.`, () => {
    putBack();
    keep(images);
    choose(images.includes(image) ? image : state.image);
    classify();
    document.querySelector("[data-do=remove]").focus({ preventScroll: true });
  });
  if (!state.images.length) $("undo").querySelector("button").focus();
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
      if (state.model === model && !refuse(image, error)) image.failure = sentenceOf(error);
    }
    if (classifying !== loop) return; // a newer loop goes through all of them
    listImages(choose);
  }
}

function name(image, model, predictions) {
  image.labels.set(model.name, predictions[0]?.label ?? "nothing found");
  image.failure = "";
}

/** Removes a file that is not a readable image, with the reason; false for any other error. */
function refuse(image, error) {
  const isFault = [400, 413, 415].includes(error.status) || error.code === "unreadable_file";
  if (!isFault || !(error instanceof Problem)) return false;
  const next = state.images[state.images.indexOf(image) + 1];
  takeOut([image]);
  forget([image]);
  comparison.follow(state.images);
  if (state.image === image) leave(next);
  listImages(choose);
  complainOfFiles([`${image.name}: ${sentenceOf(error)}`]);
  return true;
}

/** Goes on to another image, or to the start if there is none. */
function leave(next = state.images.at(-1)) {
  state.image = null;
  Object.assign(state.question, { target: null, at: null, contrast: null });
  if (next) return choose(next);
  clear();
  writeAddress(false);
  showWork(false);
}

// ---- the question and its answer --------------------------------------------------------------

/** Another question about the same image. */
function put(change) {
  settle();
  Object.assign(state.question, change);
  writeAddress(true);
  ask(boxOf(change));
}

/** Where a refusal of a change is said: beside its control. */
const boxOf = (change) => $("target" in change || "contrast" in change ? "class-failure" : "method-failure");

/** Asks the question; `box` is where it says that the service refuses it. */
async function ask(box) {
  const { image, model } = state;
  const question = { ...state.question };
  state.pending?.abort();
  if (image && !model) live.say("Waiting for the model …");
  if (!image || !model) return;
  syncQuestion();
  const pending = new AbortController();
  state.pending = pending;
  try {
    if (isSlow(question, model) && !state.shown && !isKnown(image, model, question)) await predictFirst(image, model, question, pending);
    if (state.pending !== pending) return;
    const shown = await during(waitFor(question, model), pending, () => answerTo(image, model, question, pending.signal));
    if (state.pending === pending) (shown.explanation ? show : showNothing)(shown);
  } catch (error) {
    if (state.pending === pending) refused(error, image, box);
  }
}

/** Shows the progress of some work, which Cancel ends. */
async function during([words, seconds], pending, work) {
  const done = live.wait(words, seconds, () => pending.abort());
  try {
    return await work();
  } finally {
    done();
  }
}

const isSlow = (question, model) => priceOf(question, model).passes > SLOW;

/** What to say while a question is pending, and how many seconds it may take. */
function waitFor(question, model) {
  const { passes, seconds } = priceOf(question, model);
  const work = `${method(question.method).title}${question.verify ? " and its verdict" : ""}`;
  if (!isSlow(question, model)) return [work, seconds];
  const words = `${work} · up to ${Math.round(passes).toLocaleString("en")} forward passes`;
  announce(`${words}. Cancel stops it.`);
  return [words, seconds];
}

/** While a slow map is computed, the predictions are already there. */
async function predictFirst(image, model, question, pending) {
  const found = await during(["Predictions", 0], pending, () => predictionsOf(image, model, question, pending.signal));
  if (state.pending !== pending) return;
  name(image, model, found.predictions);
  listImages(choose);
  listPredictions(found, put);
}

function show(shown) {
  state.shown = shown;
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

/** The answer of a detector that finds no box. */
function showNothing({ image, model, predictions }) {
  clear();
  name(image, model, predictions);
  listImages(choose);
  const words = `${model.name} finds nothing in this image.`;
  live.say(words);
  announce(`${image.name}: ${words}`);
}

/** After an error the map of this image stays, if there is one, with its question; the error is beside it. */
function refused(error, image, box) {
  const isOfChoice = box && [404, 422].includes(error.status);
  if (error.name === "AbortError") announce("Cancelled.");
  else if (refuse(image, error)) return;
  else failed(error, ask, isOfChoice ? box : live.find(".failure"));
  if (state.shown && error.status !== 401) {
    Object.assign(state.question, state.shown.question);
    syncQuestion();
    writeAddress(false);
  } else if (error.status !== undefined) {
    image.failure = sentenceOf(error);
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
  remove: () => remove([state.image]),
  clear: () => remove(state.images),
};

/** A step back or forward in the history. */
function travel({ model, question, view }, id) {
  settle();
  Object.assign(state.view, view);
  syncView();
  redraw();
  const image = state.images.find((other) => other.id === id) ?? state.image;
  const name = model ?? state.models.find((entry) => entry.default)?.name;
  if (name === state.model?.name) question.method ??= presetMethod(state.model);
  if (state.models.some((entry) => entry.name === name) && name !== state.model?.name) {
    state.image = image;
    $("model").value = name;
    $("method").value = question.method ?? ""; // as the address says, while the model is awaited
    useModel(name, question, false);
  } else if (image) look(image, question);
  else Object.assign(state.question, question);
}

function redraw() {
  comparison.draw(state.view);
  noteSoon();
  lab.follow();
}

/** The images that this tab had before a reload, and the address that it was opened with. */
async function restore() {
  opened = readAddress(location.search);
  Object.assign(state.view, opened.view);
  Object.assign(state.question, opened.question);
  syncView();
  const images = (await keptImages()).map(({ file, name, id }) => newImage(file, name, id));
  if (!images.length) return;
  const { image: id } = history.state ?? {};
  state.images.unshift(...images);
  sayKept(true);
  if (!state.image) choose(images.find((image) => image.id === id) ?? images[0]);
  else listImages(choose);
}

document.addEventListener("click", (event) => {
  const element = event.target.closest("[data-do], [data-close]");
  if (element?.dataset.do) DO[element.dataset.do]();
  else element?.closest("dialog").close();
});
$("model").addEventListener("change", () => {
  opened = null;
  useModel($("model").value);
});
$("compare").addEventListener("click", () => comparison.keep(state.view));
wireTheme();
wireOrder();
wireQuestion(put);
wireView(redraw, () => writeAddress(true));
wireExport(comparison);
wireGallery((image) => remove([image]));
watch({ input: $("file"), drop: $("drop"), onFiles: add });
onTravel(travel);
restore();
loadModels();
