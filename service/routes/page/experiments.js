/** Experiments: an image, a region, an edit; what the page draws of them; their report. */

import { percent, rectangle, shape, signed } from "./stage.js";

const SIDE = 360; // longer side of the drawn images, in pixels
const BLURRED = 8; // shorter side that an image is reduced to for a strong blur

/** The edits of the lab: `needs` another image, or none. */
export const EDITS = {
  hide: { title: "hide the region", needs: false, wire: () => ({ edit: "hide", fill: "mean" }) },
  blur: { title: "blur the region", needs: false, wire: () => ({ edit: "hide", fill: "blur" }) },
  keep: { title: "keep only the region", needs: false, wire: () => ({ edit: "keep", fill: "mean" }) },
  fill: { title: "fill the region from another image", needs: true, wire: () => ({ edit: "hide", fill: { image: 1 } }) },
  background: { title: "take the background from another image", needs: true, wire: () => ({ edit: "background", image: 1 }) },
};

/** Draws an image, at most SIDE long. */
function drawn(bitmap) {
  const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}

/** An image of one color or detail: reduced to a shorter side of `side` pixels, and enlarged again. */
function coarse(photo, side) {
  const scale = side / Math.min(photo.width, photo.height);
  const width = side === 1 ? 1 : Math.round(photo.width * scale);
  const height = side === 1 ? 1 : Math.round(photo.height * scale);
  const small = new OffscreenCanvas(width, height);
  const context = small.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(photo, 0, 0, width, height);
  return small;
}

/**
 * The image before and after an edit, as the page draws them; the server makes the edit itself.
 *
 * @param {ImageBitmap} bitmap  of the image
 * @param {(context, width, height) => void} paint  draws the region, opaque
 * @param {string} edit  of EDITS
 * @param {ImageBitmap | null} donor  the other image
 */
export function beforeAndAfter(bitmap, paint, edit, donor) {
  const before = drawn(bitmap);
  const after = drawn(bitmap);
  const { width, height } = before;
  const patch = new OffscreenCanvas(width, height);
  const context = patch.getContext("2d");
  paint(context, width, height);
  context.globalCompositeOperation = ["keep", "background"].includes(edit) ? "source-out" : "source-in";
  context.drawImage(donor ?? coarse(before, edit === "blur" ? BLURRED : 1), 0, 0, width, height);
  after.getContext("2d").drawImage(patch, 0, 0);
  return [before, after];
}

/** The first place of a list of predictions in words. */
const top = ([best]) => (best ? `${best.label}, ${percent(best.score)}` : "nothing found");

const element = (name, className, ...children) => {
  const made = Object.assign(document.createElement(name), { className });
  made.append(...children);
  return made;
};

/**
 * An experiment as a card: before and after side by side, the change, and the control as a strip.
 *
 * @param {{title, image, model, result, edit, request, canvases}} experiment
 */
export function cardOf({ title, image, model, result, edit, request, canvases }) {
  const [change] = edit.changes;
  const [before, after] = canvases;
  const figure = (canvas, words) => {
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", words);
    return element("figure", "", canvas, element("figcaption", "", words));
  };
  const card = element(
    "li",
    "experiment",
    element("h3", "", title),
    element("p", "facts", `${image.name} · ${model.name} · ${result.forwards} forward passes`),
    element(
      "div",
      "pair",
      figure(before, `Before: ${top(result.predictions)}`),
      figure(after, `After: ${top(edit.predictions)}`),
    ),
    element("p", "change", element("strong", "", change.label), ` ${changeWords(change)}`),
  );
  const control = change.control ?? edit.control;
  if (change.overlap !== undefined) card.append(element("p", "change", stayWords(change)));
  const own = control?.score_changes ? change.score_change : change.logit_change;
  if (control?.n) card.append(stripOf(own, control), element("p", "control-words", controlWords(control)));
  else card.append(element("p", "control-words", "There is no other place for a control."));
  card.dataset.request = request;
  return card;
}

function changeWords({ score, score_change: change, logit_change: logit }) {
  return `${percent(score - change)} → ${percent(score)}: ${signed(100 * change, 1)} points, logit ${signed(logit, 2)}`;
}

/** What is left of a box or a region, in a sentence. */
function stayWords({ box, overlap, stays }) {
  if (!box) return `${percent(overlap)} of the region keep the class.`;
  if (!stays) return "The box is gone.";
  return `The box stays, with an overlap of ${percent(overlap)}.`;
}

/** What the controls say, in a sentence. */
export function controlWords({ n, smaller, mean, low, high, score_changes: isScore }) {
  return `${smaller} of ${n} controls changed it less. ${isScore ? "Score" : "Logit"} of the controls: ${signed(low, 2)} to ${signed(high, 2)}, mean ${signed(mean, 2)}.`;
}

/** A line of changes of the logit: a dot for each control, a bar for their mean, a diamond for the edit itself. */
function stripOf(own, control) {
  const least = Math.min(0, own, control.low);
  const most = Math.max(0, own, control.high);
  const at = (value) => 4 + (92 * (value - least)) / (most - least || 1);
  const strip = shape("svg", { class: "strip-line", viewBox: "0 0 100 12", role: "img" });
  strip.setAttribute("aria-label", `The edit: ${signed(own, 2)}. ${controlWords(control)}`);
  strip.append(
    rectangle("axis", [2, 5.8, 96, 0.4]),
    rectangle("zero", [at(0) - 0.2, 2, 0.4, 8]),
    rectangle("range", [at(control.low), 5.2, at(control.high) - at(control.low), 1.6]),
    ...(control.score_changes ?? control.logit_changes).map((value) => shape("circle", { class: "dot", cx: at(value), cy: 6, r: 1.3 })),
    rectangle("mean", [at(control.mean) - 0.3, 3.5, 0.6, 5]),
    shape("path", { class: "own", d: `M${at(own)} 3.2l2.8 2.8l-2.8 2.8l-2.8-2.8z` }),
  );
  const ends = element("p", "legend", signed(least, 2), element("span", "", signed(most, 2)));
  const key = element("p", "legend", "◆ this edit ● controls, and their mean │ no change");
  return element("div", "control-strip", strip, ends, key);
}

/** The card as HTML, with its images inside. */
export function cardHtml({ canvases, card }) {
  const copy = card.cloneNode(true);
  copy.querySelector("button").remove();
  copy.querySelectorAll("canvas").forEach((canvas, index) => {
    const picture = document.createElement("img");
    picture.src = canvases[index].toDataURL("image/jpeg", 0.85);
    picture.alt = canvas.getAttribute("aria-label");
    canvas.replaceWith(picture);
  });
  return copy.outerHTML;
}
