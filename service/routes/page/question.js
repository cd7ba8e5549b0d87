/** A question: its options, its price, the class it names, and its answer. */

import { query, request } from "./api.js";
import { SIGNED, bytes, levelsOf } from "./heat.js";
import { forwards, hasLayer, method, presetMethod } from "./methods.js";
import { bitmapOf } from "./images.js";
import { DEFAULTS } from "./state.js";

const KEPT_ANSWERS = 24;
const HIDINGS = 40; // forward passes of a verdict

export const SLOW = 5; // forward passes; of longer questions the predictions come first

const answers = new Map();
const paces = new Map(); // measured milliseconds of a forward pass, by model, and by model, method and layer

/** The options of a question as pairs, without the server's defaults. */
export function optionsOf({ question, model }) {
  const pairs = [];
  const put = (name, value, preset) => {
    if (value !== preset) pairs.push([name, value]);
  };
  if (!model.default) put("model", model.name);
  put("targets", targetOption(model, question.target), null);
  put("contrast", targetOption(model, question.contrast), null);
  put("at", question.at, null);
  put("method", question.method, presetMethod(model));
  if (hasLayer(question.method)) put("layer", question.layer, null);
  put("fit", question.fit, DEFAULTS.fit);
  const { times } = method(question.method);
  if (times in question) put(times, question[times], DEFAULTS[times]);
  put("verify", question.verify, DEFAULTS.verify);
  return pairs;
}

/** A class for the server: an id that is also the label of another class gets the prefix `id:`. */
export function targetOption(model, target) {
  const isOther = (label, id) => label === String(target) && id !== target;
  return typeof target === "number" && model.labels.some(isOther) ? `id:${target}` : target;
}

/** How the map of a method is drawn, as options; a threshold of 0 is no region's. */
export function viewOptions({ opacity, threshold, colormap }, name) {
  const pairs = [["colormap", method(name).signed ? SIGNED : colormap], ["opacity", opacity], ["threshold", threshold || 0.5]];
  return pairs.filter(([, value]) => value !== "turbo" && value !== 0.5);
}

const layerOf = (model, path) => model.layers.find((layer) => layer.path === path);

const paceKey = (model, { method, layer }) => JSON.stringify([model.name, model.version, method, layer]);

/**
 * The cost of a question: forward passes at most, and seconds as the service has measured them.
 *
 * The seconds are from the last answer of this method at this layer, else from the last prediction of this
 * model; 0 where there is neither.
 */
export function priceOf(question, model) {
  const map = forwards(question, model.input, layerOf(model, question.layer ?? model.target_layer)?.shape);
  const passes = map + (question.verify ? HIDINGS : 0);
  const pace = paces.get(paceKey(model, question)) ?? paces.get(model.name) ?? 0;
  return { passes, seconds: (passes * pace) / 1000 };
}

/** Keeps what an answer took for the next estimate, by the passes that the page counts itself. */
function notePace(question, model, milliseconds) {
  const { passes } = priceOf(question, model);
  paces.set(paceKey(model, question), milliseconds / passes);
  if (passes <= SLOW) paces.set(model.name, milliseconds / passes);
}

/** The name of a class: its label, with the id if two classes share the label. */
export function nameOf(model, id) {
  const label = model.labels[id];
  return model.shared.has(label) ? `${label} (${id})` : (label ?? String(id));
}

/** The class for a text: its id, or the text itself, which the server then checks. */
export function classOf(model, text) {
  const typed = text.trim().toLowerCase();
  if (!typed) return null;
  const id = model.labels.findIndex((_label, index) => nameOf(model, index).toLowerCase() === typed);
  return id === -1 ? text.trim() : id;
}

/** Whether a text is a contrast with the classes of the nearest logits, as `nearest:3`, that this model has. */
export function isNearest(model, text) {
  const [, count = "0"] = /^nearest:(\d{1,6})$/.exec(text) ?? [];
  return Number(count) > 0 && Number(count) < model.classes;
}

/** The classes that an explanation contrasts its class with. */
export const contrastsOf = ({ contrast = null, contrasts = null }) =>
  contrasts?.map(({ class_id: id }) => id) ?? (contrast === null ? [] : [contrast]);

/** What a question names of a prediction: its class, or the class and the place of its box. */
export const placeOf = ({ class_id: target, box }) => ({ target, at: box?.join(",") ?? null });

/** Whether an explanation is of a prediction. */
export const isOf = (entry, explanation) =>
  entry.class_id === explanation?.class_id && (entry.detection ?? null) === (explanation?.detection ?? null);

const keyOf = (image, model, question) => JSON.stringify([image.id, model.name, model.version, question]);

/** Whether a question was answered before. */
export const isKnown = (image, model, question) => answers.has(keyOf(image, model, question));

/** The predictions alone, for while a slow map is computed. Throws Problem, or AbortError. */
export async function predictionsOf(image, model, { fit }, signal) {
  const options = query([["model", model.name], ...(fit ? [["fit", fit]] : [])]);
  const answer = await request(`predict?${options}`, { body: image.file, signal });
  paces.set(model.name, answer.timing_ms.inference);
  return { image, model, answer, predictions: answer.results[0].predictions, explanation: null };
}

/**
 * The answer to a question, with its map as levels; from memory if it was requested before. Where a detector
 * finds nothing, `explanation` is null and there is no map.
 *
 * Throws Problem, or AbortError.
 */
export async function answerTo(image, model, question, signal) {
  const key = keyOf(image, model, question);
  await image.ready;
  if (!answers.has(key)) answers.set(key, await fetchAnswer(image, model, question, signal));
  if (answers.size > KEPT_ANSWERS) answers.delete(answers.keys().next().value);
  return answers.get(key);
}

async function fetchAnswer(image, model, question, signal) {
  // In grey a pixel of the heatmap is its level, in SIGNED its sign, too; the colours are put on here.
  const { signed } = method(question.method);
  const drawing = [["include", "heatmap"], ["include", "regions"], ["colormap", signed ? SIGNED : "gray"]];
  // If the browser cannot read the image, the server sends it, without colours.
  if (!image.bitmap) drawing.push(["include", "overlay"], ["opacity", 0]);
  const options = query([...optionsOf({ question, model }), ...drawing]);
  const answer = await request(`explain?${options}`, { body: image.file, signal });
  const [result] = answer.results;
  const [explanation = null] = result.explanations;
  notePace(question, model, answer.timing_ms.inference);
  if (!explanation) return { image, model, question, answer, explanation, predictions: result.predictions };
  if (explanation.overlay) {
    image.bitmap ??= await bitmapOf(new Blob([bytes(explanation.overlay.data)]));
    delete explanation.overlay;
  }
  return {
    image,
    model,
    question,
    answer,
    explanation,
    predictions: result.predictions,
    seen: result.seen,
    source: { width: result.image.width, height: result.image.height },
    map: await levelsOf(explanation.heatmap, signed),
    contrastLabel: contrastsOf(explanation).map((id) => model.labels[id]).join(", "),
    layerShape: typeof explanation.layer === "string" ? layerOf(model, explanation.layer)?.shape : null,
  };
}

