/** What the page knows, and two words that every module uses. */

export const DEFAULTS = { target: null, contrast: null, method: "gradcam", layer: null, fit: "", samples: 1000, steps: 50 };

export const state = {
  models: [],
  model: null, // of GET models/{name}, with its `layers`, `labels` and the labels that are `shared`
  photos: [],
  photo: null,
  question: { ...DEFAULTS },
  view: { opacity: 0.5, threshold: 0, colormap: "turbo", regions: false },
  shown: null, // the answer whose map is seen
  asking: null, // the AbortController of the question on its way
};

export const $ = (id) => document.getElementById(id);

export function button(text, onClick) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = text;
  element.addEventListener("click", onClick);
  return element;
}
