/** What the current model knows, and which methods cannot run on it. */

import { METHODS } from "./tables.js";
import { $, button } from "./state.js";

const READ = "camserve-limits-read"; // in the tab's storage: the models whose warning was dismissed
const LISTED = 200; // labels of a model that are shown on hover

/** Why a method cannot run on a model, as its server measured it; "" if it can. */
export const reasonAgainst = (model, name) => model.methods?.find((entry) => entry.name === name)?.reason ?? "";

/** The first method that runs on a model, `wanted` before all others. */
export const methodFor = (model, wanted) =>
  [wanted, ...METHODS.map(({ name }) => name)].find((name) => !reasonAgainst(model, name)) ?? wanted;

/** Shows the model's classes under its name, and offers only the methods that it can run; null: no model. */
export function syncModel(model) {
  $("knows").textContent = model?.knows ?? "";
  document.body.dataset.task = model?.task ?? "classification";
  $("knows").title = model ? model.labels.slice(0, LISTED).join(", ") : "";
  for (const option of $("method").options) {
    option.title = model ? reasonAgainst(model, option.value) : "";
    option.disabled = Boolean(option.title);
  }
  const missing = METHODS.filter(({ name }) => model && reasonAgainst(model, name));
  $("missing-methods").hidden = missing.length === 0;
  $("missing-count").textContent = `${missing.length} ${missing.length === 1 ? "method" : "methods"} cannot run on this model`;
  $("missing-reasons").replaceChildren(
    ...missing.flatMap(({ name, title }) => [part("dt", title), part("dd", reasonAgainst(model, name))]),
  );
}

const part = (name, text) => Object.assign(document.createElement(name), { textContent: text });

/** Warns at the first answers of the built-in model, until the warning is dismissed. */
export function warnOfLimits(model) {
  const isRead = () => readModels().includes(model.name);
  if (model.builder !== "builtin" || isRead()) return $("limits").replaceChildren();
  const few = `${model.name} is a small demonstration model. It knows only ${model.knows}. It calls any other image one of them, too.`;
  const dismiss = button("Dismiss", () => {
    remember(model.name);
    $("limits").replaceChildren();
  });
  $("limits").replaceChildren(part("p", few), dismiss);
}

let kept = []; // where storage is forbidden

function readModels() {
  try {
    return JSON.parse(sessionStorage.getItem(READ)) ?? kept;
  } catch {
    return kept;
  }
}

function remember(name) {
  kept = [...readModels(), name];
  try {
    sessionStorage.setItem(READ, JSON.stringify(kept));
  } catch {
    // If storage is forbidden, the warning stays away until the page is loaded again.
  }
}

/** The choices of the model input; the model's own comes first and is no option of the request. */
export function fitOptions(model) {
  const preset = model.input.fit ?? "crop";
  const words = { crop: "center crop", pad: "whole image, padded", squash: "whole image, stretched" };
  const names = [preset, ...Object.keys(words).filter((name) => name !== preset)];
  return names.map((name) => (name === preset ? new Option(`${words[name]}, as in training`, "") : new Option(words[name], name)));
}
