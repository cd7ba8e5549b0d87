/** The page: one photograph, one question, one map; everything else hangs on these. */

import { Problem, query, request } from "./api.js";
import { listModel, listPhotos, listPredictions, syncQuestion, wireQuestion } from "./controls.js";
import { Inside } from "./inside.js";
import { method } from "./methods.js";
import { announce, complain, failed, settle } from "./notices.js";
import { photograph, sample, take, watch } from "./photos.js";
import { answered, priceOf } from "./question.js";
import { Pane, captionOf } from "./stage.js";
import { $, state } from "./state.js";
import { wireTaking } from "./taking.js";
import { wireTheme, wireView } from "./view.js";

const POLL_MS = 1000;
const SLOW = 5; // forward passes from which on the wait is announced

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
  const preset = state.models.find((each) => each.default) ?? state.models[0];
  const model = state.models.find((each) => each.name === chosen) ?? preset;
  const named = ({ name, state: is }) => (is === "ready" ? name : `${name} (${is})`);
  $("model").replaceChildren(...state.models.map((each) => new Option(named(each), each.name)));
  $("model").disabled = state.models.length === 0;
  if (!model) return;
  $("model").value = model.name;
  if (state.model?.name !== model.name) await useModel(model.name);
  if (state.models.some((each) => each.state === "loading")) setTimeout(loadModels, POLL_MS);
}

async function useModel(name) {
  settle();
  const known = state.models.find((each) => each.name === name);
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

// ---- photographs ------------------------------------------------------------------------------

function add(files) {
  settle();
  const photos = files.map((file) => photograph(file));
  state.photos.push(...photos);
  choose(photos[0]);
  classify(photos.slice(1));
}

function choose(photo) {
  if (state.photo !== photo) Object.assign(state.question, { target: null, contrast: null });
  state.photo = photo;
  $("welcome").hidden = true;
  $("work").hidden = false;
  listPhotos(choose);
  live.showPhoto(photo);
  photo.ready.then(() => {
    if (state.photo === photo && live.shown?.photo !== photo) live.showPhoto(photo);
    listPhotos(choose);
  });
  inside.clear();
  ask();
}

/** Asks what is on the photographs that are not looked at, one after the other. */
async function classify(photos) {
  for (const photo of photos) {
    if (!state.model || photo.label) continue;
    try {
      const options = query([["model", state.model.name], ["top_k", 1]]);
      const answer = await request(`predict?${options}`, { body: photo.file });
      photo.label = answer.results[0].predictions[0].label;
      listPhotos(choose);
    } catch (error) {
      refuse(photo, error);
    }
  }
}

/** A file that is no photograph leaves the list, with the reason; false where it is another error. */
function refuse(photo, error) {
  if (!(error instanceof Problem) || ![400, 413, 415].includes(error.status)) return false;
  state.photos = state.photos.filter((each) => each !== photo);
  if (state.photo === photo) leave();
  listPhotos(choose);
  failed(error, null, photo.name);
  return true;
}

/** Back to the photograph that was looked at before, or to the beginning. */
function leave() {
  const before = state.shown?.photo;
  state.photo = null;
  if (state.photos.includes(before)) return choose(before);
  if (state.photos.length) return choose(state.photos[0]);
  $("work").hidden = true;
  $("welcome").hidden = false;
}

// ---- the question and its answer --------------------------------------------------------------

/** Another question about the same photograph. */
function put(change) {
  settle();
  Object.assign(state.question, change);
  ask();
}

async function ask() {
  const { photo, model, question } = state;
  state.asking?.abort();
  if (photo && !model) live.say("Waiting for the model …");
  if (!photo || !model) return;
  syncQuestion();
  const asking = new AbortController();
  state.asking = asking;
  const { passes, seconds } = priceOf(question, model);
  const { title } = method(question.method);
  const words = passes > SLOW ? `${title} · up to ${Math.round(passes).toLocaleString("en")} forward passes` : title;
  if (passes > SLOW) announce(`${words}. Cancel stops it.`);
  const done = live.wait(words, seconds, () => asking.abort());
  try {
    const shown = await answered(photo, model, { ...question }, asking.signal);
    if (state.asking === asking) show(shown);
  } catch (error) {
    if (state.asking === asking) refused(error, photo);
  } finally {
    done();
  }
}

function show(shown) {
  state.shown = shown;
  shown.photo.label = shown.predictions[0].label;
  live.showMap(shown, state.view);
  listPhotos(choose);
  listPredictions(shown, put);
  syncQuestion();
  announce(`${shown.photo.name}: ${captionOf(shown)}, by ${method(shown.explanation.method).title}.`);
}

/** What was not answered leaves the page as it was, with the question of the map it shows. */
function refused(error, photo) {
  if (error.name === "AbortError") announce("Cancelled.");
  else if (refuse(photo, error)) return;
  else failed(error, ask);
  if (state.shown?.photo === photo && error.status !== 401) {
    Object.assign(state.question, state.shown.question);
    syncQuestion();
  }
}

// ---- two maps side by side --------------------------------------------------------------------

/** Keeps the present map at the left; from now on the right one changes. */
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
wireTaking(live);
watch({ input: $("file"), drop: $("drop"), onFiles: add });
loadModels();
