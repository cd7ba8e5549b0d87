/** The controls beside the image: predictions, method, layer and model input. */

import { fitOptions, syncModel, warnOfLimits } from "./knows.js";
import { hasLayer, methodOptions, method } from "./methods.js";
import { classOf, isOf, nameOf, placeOf } from "./question.js";
import { percent, shapeWords } from "./stage.js";
import { $, button, state } from "./state.js";

/** Fills the controls that do not change, and calls `put` with each change of the question. */
export function wireQuestion(put) {
  $("method").replaceChildren(...methodOptions());
  $("method").addEventListener("change", () => put({ method: $("method").value }));
  $("layer").addEventListener("change", () => {
    const layer = $("layer").value;
    put({ layer: layer === state.model.target_layer ? null : layer });
  });
  $("fit").addEventListener("change", () => put({ fit: $("fit").value }));
  $("verify").addEventListener("change", () => put({ verify: $("verify").value }));
  for (const name of ["samples", "steps"]) {
    $(name).addEventListener("change", () => {
      if ($(name).reportValidity()) put({ [name]: $(name).valueAsNumber });
    });
  }
  $("target").addEventListener("change", () => put({ target: classOf(state.model, $("target").value), at: null }));
  $("contrast").addEventListener("change", () => {
    const contrast = classOf(state.model, $("contrast").value);
    put(contrast === null ? { contrast } : { contrast, target: explained() });
  });
}

const explained = () => state.question.target ?? state.shown?.explanation.class_id ?? null;

/** The layers and classes of another model. */
export function listModel(model) {
  const named = (layer) => `${layer.path} · ${shapeWords(layer.shape)}${layer.path === model.target_layer ? " · default" : ""}`;
  const targets = model.layers.filter((layer) => layer.target && layer.shape);
  $("layer").replaceChildren(...targets.map((layer) => new Option(named(layer), layer.path)));
  $("fit").replaceChildren(...fitOptions(model));
  if (state.question.fit === model.input.fit) state.question.fit = "";
  syncModel(model);
  $("labels").replaceChildren(...model.labels.map((_label, id) => new Option(nameOf(model, id))));
}

/** Sets the controls to the current question. */
export function syncQuestion() {
  const { question, model, shown } = state;
  const { shows, times, samples } = method(question.method);
  $("method").value = question.method;
  $("method-words").textContent = shows;
  $("layer").value = question.layer ?? model.target_layer;
  $("layer").disabled = !hasLayer(question.method);
  $("fit").value = question.fit;
  $("verify").value = question.verify;
  $("samples-field").hidden = times !== "samples";
  $("steps-field").hidden = times !== "steps";
  $("amounts").hidden = $("samples-field").hidden && $("steps-field").hidden;
  $("samples").value = question.samples ?? samples;
  $("steps").value = question.steps;
  const listed = shown?.predictions.some((entry) => entry.class_id === question.target);
  const text = (wanted) => (typeof wanted === "number" ? nameOf(model, wanted) : (wanted ?? ""));
  $("target").value = listed ? "" : text(question.target);
  $("contrast").value = text(question.contrast);
}

/**
 * The predictions as bars; a click explains one, or contrasts it with the shown class.
 *
 * `shown` is an answer, with or without a map, or null for no predictions.
 */
export function listPredictions(shown, put) {
  $("predictions").dataset.request = shown?.answer.id ?? "";
  if (!shown) return $("predictions").replaceChildren();
  warnOfLimits(shown.model);
  const focused = document.activeElement?.dataset?.row;
  $("predictions").replaceChildren(...shown.predictions.map((entry) => prediction(entry, shown, put)));
  if (focused) $("predictions").querySelector(`[data-row="${focused}"]`)?.focus();
}

function prediction(entry, { explanation }, put) {
  const item = document.createElement("li");
  item.append(why(entry, explanation, put));
  if (entry.box === undefined) item.append(versus(entry.class_id, entry.label, explanation, put));
  return item;
}

function why(entry, explanation, put) {
  const { class_id: id, label, score, detection } = entry;
  const { contrast } = state.question;
  const element = button("", () => put({ ...placeOf(entry), contrast: contrast === id ? null : contrast }));
  element.className = "why";
  element.dataset.row = `why-${detection ?? id}`;
  element.setAttribute("aria-pressed", isOf(entry, explanation));
  const part = (name, text) => Object.assign(document.createElement("span"), { className: name, textContent: text });
  element.append(part("label", label), part("score", percent(score)), part("bar", ""));
  element.lastChild.style.setProperty("--score", score);
  return element;
}

function versus(id, label, explanation, put) {
  const contrast = explanation?.contrast === id ? null : id;
  const element = button("vs", () => put({ target: explanation.class_id, contrast }));
  element.className = "versus";
  element.dataset.row = `versus-${id}`;
  element.disabled = !explanation || id === explanation.class_id;
  element.setAttribute("aria-pressed", id === explanation?.contrast);
  element.setAttribute("aria-label", `vs: explain ${explanation?.label ?? "the class"} rather than ${label}`);
  return element;
}
