/** The state of the page, and two functions that every module uses. */

export const DEFAULTS = { target: null, at: null, contrast: null, method: "gradcam", layer: null, fit: "", samples: null, steps: 50, verify: "" };

export const VIEW = { opacity: 0.5, threshold: 0, colormap: "turbo", regions: false };

export const state = {
  models: [],
  model: null, // from GET models/{name}, with its `layers`, `labels`, and the labels that are `shared`
  images: [],
  maps: [], // that were shown in this session, for its report; see report.js
  experiments: [], // of this session, the newest first; see lab.js
  image: null,
  question: { ...DEFAULTS },
  view: { ...VIEW },
  shown: null, // the answer whose map is visible
  pending: null, // the AbortController of the pending question
};

export const $ = (id) => document.getElementById(id);

export function button(text, onClick) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = text;
  element.addEventListener("click", onClick);
  return element;
}
