/** The state of the page in its address: model, question and view; the image is only in the history. */

import { COLORMAPS } from "./heat.js";
import { presetMethod } from "./methods.js";
import { METHODS } from "./tables.js";
import { DEFAULTS, VIEW, state } from "./state.js";

const one = (...values) => (text) => (values.includes(text) ? text : undefined);
const within = (least, most) => (text) => (text.trim() && Number(text) >= least && Number(text) <= most ? Number(text) : undefined);
const count = (most) => (text) => (/^\d{1,6}$/.test(text) ? within(1, most)(text) : undefined);
const label = (text) => (/^\d{1,9}$/.test(text) ? Number(text) : text.slice(0, 200));

// What an address may name, and how it is read; undefined for a value that is not accepted.
const QUESTION = {
  method: one(...METHODS.map(({ name }) => name)),
  layer: (text) => text,
  target: label,
  contrast: label,
  fit: one("crop", "pad", "squash"),
  samples: count(100_000),
  steps: count(1000),
  verify: one("true", "search"),
};
const LOOK = {
  opacity: within(0, 1),
  threshold: within(0, 1),
  colormap: one(...COLORMAPS),
  regions: (text) => (text === "true" ? true : undefined),
};

/**
 * An address's query, read.
 *
 * @returns {{model: string | null, question: object, view: object, refused: string[]}} `question` and `view`
 *   are whole, with the defaults of what is not named; `refused` has what is not accepted, as `name=value`;
 *   the method is null where none is named: the default depends on the model
 */
export function readAddress(search) {
  const given = new URLSearchParams(search);
  const refused = [];
  const read = (readers, defaults) => {
    const values = { ...defaults };
    for (const [name, reader] of Object.entries(readers)) {
      if (!given.get(name)) continue;
      const value = reader(given.get(name));
      if (value === undefined) refused.push(`${name} ${given.get(name).slice(0, 80)}`);
      else values[name] = value;
    }
    return values;
  };
  return { model: given.get("model"), question: read(QUESTION, { ...DEFAULTS, method: null }), view: read(LOOK, VIEW), refused };
}

/** The query of the current state, without defaults. */
function queryOf({ model, question, view }) {
  const named = new URLSearchParams();
  if (model) named.set("model", model.name);
  const preset = { ...DEFAULTS, method: presetMethod(model ?? {}) };
  for (const [values, readers, defaults] of [[question, QUESTION, preset], [view, LOOK, VIEW]]) {
    for (const name of Object.keys(readers)) {
      if (values[name] !== defaults[name]) named.set(name, values[name]);
    }
  }
  return named.toString();
}

/** Writes the state into the address, as a step that Back undoes, or in place of the current one. */
export function writeAddress(isStep) {
  if (!state.model) return; // the address keeps what it names until that can be shown
  const url = new URL(location.href);
  const entry = { image: state.image?.id ?? null };
  url.search = queryOf(state);
  if (url.search === location.search && entry.image === (history.state?.image ?? null)) return;
  if (isStep) history.pushState(entry, "", url);
  else history.replaceState(entry, "", url);
}

/** Calls `travel` with the address and the id of the image of each step back or forward. */
export function onTravel(travel) {
  addEventListener("popstate", (event) => travel(readAddress(location.search), event.state?.image ?? null));
}
