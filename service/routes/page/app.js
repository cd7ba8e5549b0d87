/** The page: one image, one question, one map; all else depends on them. */

import { Problem, query, request } from "./api.js";
import { listModel, listImages, listPredictions, syncQuestion, wireQuestion } from "./controls.js";
import { Inside } from "./inside.js";
import { method } from "./methods.js";
import { announce, complain, failed, settle } from "./notices.js";
import { newImage, sample, take, watch } from "./images.js";
import { answerTo, priceOf } from "./question.js";
import { Pane, captionOf } from "./stage.js";
import { $, state } from "./state.js";
import { wireExport } from "./export.js";
import { wireTheme, wireView } from "./view.js";

const POLL_MS = 1000;
const SLOW = 5; // forward passes; longer waits are announced

const live = new Pane($("panes"));
let kept = null; // the pane at the left of a comparison

const inside = new Inside();

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
  const known = state.models.find((entry) => entry.name === name);
  if (known.state === "failed") return complain(`The model ${name} could not be loaded: ${known.reason}`);
  if (known.state === "loading") return announce(`The model ${name} is loading: ${known.progress ?? "one moment"}.`);
  const path = `models/${encodeURIComponent(name)}`;
  try {
    const [details, { layers }] = await Promise.all([request(path), request(`${path}/layers`)]);
    const labels = details.labels ?? [];
    const shared = new Set(labels.filter((label, id) => labels.indexOf(label) !== id));
    state.model = { ...details, layers, labels, shared };
  } catch (error) {
    return failed(error, () => useModel(name));
  }
  Object.assign(state.question, { target: null, contrast: null, layer: null });
  listModel(state.model);
  inside.use(state.model);
  return ask();
}

// ---- images ------------------------------------------------------------------------------

function add(files) {
  settle();
  const images = files.map((file) => newImage(file));
  state.images.push(...images);
  choose(images[0]);
  classify(images.slice(1));
}

function choose(image) {
  if (state.image !== image) Object.assign(state.question, { target: null, contrast: null });
  state.image = image;
  $("welcome").hidden = true;
  $("work").hidden = false;
  listImages(choose);
  live.showImage(image);
  image.ready.then(() => {
    if (state.image === image && live.shown?.image !== image) live.showImage(image);
    listImages(choose);
  });
  inside.clear();
  ask();
}

/** Classifies the images that are not shown, one after the other. */
async function classify(images) {
  for (const image of images) {
    if (!state.model || image.label) continue;
    try {
      const options = query([["model", state.model.name], ["top_k", 1]]);
      const answer = await request(`predict?${options}`, { body: image.file });
      image.label = answer.results[0].predictions[0].label;
      listImages(choose);
    } catch (error) {
      refuse(image, error);
    }
  }
}

/** Removes a file that is not a readable image, with the reason; false for any other error. */
function refuse(image, error) {
  if (!(error instanceof Problem) || ![400, 413, 415].includes(error.status)) return false;
  state.images = state.images.filter((other) => other !== image);
  if (state.image === image) leave();
  listImages(choose);
  failed(error, null, image.name);
  return true;
}

/** Returns to the image that was shown before, or to the start. */
function leave() {
  const before = state.shown?.image;
  state.image = null;
  if (state.images.includes(before)) return choose(before);
  if (state.images.length) return choose(state.images[0]);
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
  const { image, model, question } = state;
  state.pending?.abort();
  if (image && !model) live.say("Waiting for the model …");
  if (!image || !model) return;
  syncQuestion();
  const pending = new AbortController();
  state.pending = pending;
  const { passes, seconds } = priceOf(question, model);
  const { title } = method(question.method);
  const words = passes > SLOW ? `${title} · up to ${Math.round(passes).toLocaleString("en")} forward passes` : title;
  if (passes > SLOW) announce(`${words}. Cancel stops it.`);
  const done = live.wait(words, seconds, () => pending.abort());
  try {
    const shown = await answerTo(image, model, { ...question }, pending.signal);
    if (state.pending === pending) show(shown);
  } catch (error) {
    if (state.pending === pending) refused(error, image);
  } finally {
    done();
  }
}

function show(shown) {
  state.shown = shown;
  shown.image.label = shown.predictions[0].label;
  live.showMap(shown, state.view);
  listImages(choose);
  listPredictions(shown, put);
  syncQuestion();
  announce(`${shown.image.name}: ${captionOf(shown)}, by ${method(shown.explanation.method).title}.`);
}

/** After an error the page stays as it is, with the question of the shown map. */
function refused(error, image) {
  if (error.name === "AbortError") announce("Cancelled.");
  else if (refuse(image, error)) return;
  else failed(error, ask);
  if (state.shown?.image === image && error.status !== 401) {
    Object.assign(state.question, state.shown.question);
    syncQuestion();
  }
}

// ---- two maps side by side --------------------------------------------------------------------

/** Keeps the current map at the left; only the right one changes from now on. */
function compare() {
  if (!state.shown) return;
  endComparison();
  kept = new Pane($("panes"));
  $("panes").prepend(kept.element);
  $("panes").classList.add("two");
  kept.showMap(state.shown, state.view);
  const close = kept.find(".close");
  close.hidden = false;
  close.addEventListener("click", () => {
    endComparison();
    $("compare").focus();
  });
  announce(`${captionOf(state.shown)} stays at the left. Choose another class, method, layer or image.`);
}

function endComparison() {
  kept?.element.remove();
  kept = null;
  $("panes").classList.remove("two");
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
$("compare").addEventListener("click", compare);
wireTheme();
wireQuestion(put);
wireView(() => {
  live.draw(state.view);
  kept?.draw(state.view);
});
wireExport(live);
watch({ input: $("file"), drop: $("drop"), onFiles: add });
loadModels();
