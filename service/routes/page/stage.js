/** An image with its map over it, its caption, and the progress of the request. */

import { SIGNED, coloured, palette, regionBoxes } from "./heat.js";
import { method } from "./methods.js";
import { isOf, placeOf } from "./question.js";
import { verdictOf } from "./verdict.js";

const SVG = "http://www.w3.org/2000/svg";

const FLAGS = {
  all_zero: "The map is zero everywhere: there is no evidence for this class.",
  target_not_predicted: "This is not the predicted class.",
  saturated: "The score is so close to 1 that it hardly changes.",
  low_resolution: "The layer has few cells; an earlier layer has a finer grid.",
  random_weights: "The model has random weights: the results are meaningless.",
  module_called_n_times: "The layer runs several times; the map is of its last call.",
  not_deterministic: "The model draws random numbers: the same image gives other results next time.",
  activation_in_model: "The model returns probabilities; the map explains log p − log(1 − p).",
  weights_hardly_matter: "With random weights the map would be much the same: it shows the image more than what the model has learned.",
  experimental: "This correction is experimental.",
  class_blind: "The map is the same for every class.",
  layer_not_used: "The output does not depend on this layer.",
  edge_clipped: "This edge of the box is at the border of the image: nothing in the image moves it.",
  not_per_box: "This method averages over the map: it shows other objects as well as this one.",
  places_unclear: "The cells of this layer could not be matched to places: the map may be at the wrong place.",
};

export const percent = (score) => {
  const value = 100 * score;
  if (value > 0 && value < 0.1) return "< 0.1 %";
  if (value < 100 && value > 99.9) return "> 99.9 %";
  return `${value.toFixed(1)} %`;
};

/** A number with its sign, as text. */
export function signed(value, digits) {
  const size = Math.abs(value).toFixed(digits);
  return Number(size) === 0 ? size : `${value < 0 ? "−" : "+"}${size}`;
}

export const shapeWords = (shape) => shape.join(" × ");

/** What a map explains, in a line: the class and its score, or two classes and their difference. */
export function captionOf({ explanation, contrastLabel }) {
  if (!contrastLabel) return `${explanation.label}, ${percent(explanation.score)}`;
  const difference = signed(explanation.logit_difference, 2);
  return `${explanation.label} rather than ${contrastLabel}, logit difference ${difference}`;
}

const isSigned = ({ explanation }) => method(explanation.method).signed;

export function factsOf({ explanation, answer, layerShape }) {
  const layers = [explanation.layer ?? []].flat().join(" + ");
  const at = layers ? ` at ${layers}${layerShape ? ` (${shapeWords(layerShape)})` : ""}` : "";
  const passes = explanation.cost.forwards;
  return [
    `${method(explanation.method).title}${at}`,
    `${passes.toLocaleString("en")} forward ${passes === 1 ? "pass" : "passes"}`,
    `${Math.round(answer.timing_ms.total).toLocaleString("en")} ms`,
  ].join(" · ");
}

/** Whether a wait is as long as was estimated, so that a bar can show its share. */
const isEstimated = (elapsed, seconds) => seconds > 1 && elapsed <= seconds;

function elapsedOf(elapsed, seconds) {
  if (seconds <= 1) return `${elapsed.toFixed(1)} s`;
  const about = `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  return isEstimated(elapsed, seconds) ? `${elapsed.toFixed(1)} of about ${about}` : `${elapsed.toFixed(1)} s, estimated ${about}`;
}

export class Pane {
  /** Puts an empty figure into `parent`. */
  constructor(parent) {
    const template = document.getElementById("pane");
    this.element = template.content.firstElementChild.cloneNode(true);
    this.image = null;
    this.shown = null;
    parent.append(this.element);
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  /** The image alone, until its map is there. */
  showImage(image) {
    this.drawImage(image);
    this.shown = null;
    this.element.dataset.request = "";
    this.find(".stage").setAttribute("aria-label", image.name);
    this.find(".heat").width = 0;
    this.find(".marks").replaceChildren();
    this.find(".caption").textContent = image.name;
    this.find(".facts").textContent = "";
    this.find(".of").textContent = "";
    this.find(".colors").hidden = true;
    for (const name of [".flags", ".verdict", ".failure"]) this.find(name).replaceChildren();
  }

  drawImage(image) {
    if (this.image === image && this.drawn === image.bitmap) return;
    this.image = image;
    this.drawn = image.bitmap;
    const canvas = this.find(".photo");
    const { width, height } = image.bitmap ?? { width: 4, height: 3 };
    canvas.width = width;
    canvas.height = height;
    if (image.bitmap) canvas.getContext("2d").drawImage(image.bitmap, 0, 0);
    this.find(".stage").style.setProperty("--ratio", width / height);
  }

  /** A line under the image, until there is a map. */
  say(words) {
    this.find(".facts").textContent = words;
  }

  /** The map of an answer over its image, and its verdict; `put` changes the question. */
  showMap(shown, view, put) {
    this.showImage(shown.image);
    this.shown = shown;
    this.put = put;
    this.element.dataset.request = shown.answer.id;
    this.painted = null;
    this.find(".caption").textContent = captionOf(shown);
    this.find(".of").textContent = `${shown.image.name} · ${shown.model.name}`;
    this.find(".facts").textContent = factsOf(shown);
    this.find(".flags").replaceChildren(
      ...this.flags().map((flag) => Object.assign(document.createElement("li"), { textContent: flag })),
    );
    this.find(".verdict").replaceChildren(...verdictOf(shown, put));
    const words = `${shown.image.name} with the heatmap for ${captionOf(shown)}. ${factsOf(shown)}.`;
    this.find(".stage").setAttribute("aria-label", words);
    this.draw(view);
  }

  /** Draws the same map in another way: no request, and opacity changes no pixel. */
  draw(view) {
    if (!this.shown) return;
    const heat = this.find(".heat");
    heat.style.opacity = view.opacity;
    const painted = JSON.stringify([view.colormap, view.threshold, view.regions]);
    if (this.painted === painted) return;
    this.painted = painted;
    const { map, seen, source } = this.shown;
    heat.width = map.width;
    heat.height = map.height;
    const colours = palette(isSigned(this.shown) ? SIGNED : view.colormap);
    heat.getContext("2d").putImageData(coloured(map, seen, source, colours, view.threshold), 0, 0);
    this.label(colours);
    this.mark(view);
  }

  /** The bar of the colours, with what its ends mean. */
  label(colours) {
    const [least, most] = isSigned(this.shown) ? ["against", "for"] : ["none", "most"];
    const bar = new ImageData(256, 1);
    new Uint32Array(bar.data.buffer).set(colours);
    this.find(".scale").getContext("2d").putImageData(bar, 0, 0);
    this.find(".scale").setAttribute("aria-label", `Evidence, from ${least} to ${most}`);
    this.find(".least").textContent = least;
    this.find(".most").textContent = most;
    this.find(".colors").hidden = false;
  }

  /** What the pane shows, in lines of text. */
  words() {
    const { image, model } = this.shown;
    const colours = isSigned(this.shown) ? ["Blue: evidence against; red: evidence for"] : [];
    return [captionOf(this.shown), `${image.name} · ${model.name}`, factsOf(this.shown), ...colours];
  }

  /** The part that the model saw, and, if requested, the regions and the peak. */
  mark(view) {
    const { map, seen, source, explanation } = this.shown;
    const marks = this.find(".marks");
    marks.setAttribute("viewBox", `0 0 ${source.width} ${source.height}`);
    const shapes = isWhole(seen, source) ? [] : [rectangle("seen", seen)];
    shapes.push(...this.detections());
    this.boxes = view.regions ? regionBoxes(map, source, view.threshold) : [];
    for (const box of this.boxes) shapes.push(rectangle("box under", box), rectangle("box", box));
    const { peak } = explanation.regions;
    if (view.regions && peak) {
      const radius = 0.008 * Math.max(source.width, source.height);
      shapes.push(shape("circle", { class: "peak", cx: peak[0], cy: peak[1], r: radius }));
    }
    marks.replaceChildren(...shapes);
  }

  /** The boxes that a detector found, the smallest on top; a click explains one. */
  detections() {
    const { predictions, explanation } = this.shown;
    const area = ({ box: [, , width, height] }) => width * height;
    const found = predictions.filter(({ box }) => box !== undefined).sort((a, b) => area(b) - area(a));
    return found.flatMap((entry) => {
      const name = isOf(entry, explanation) ? "detection explained" : "detection";
      const box = rectangle(name, entry.box);
      box.addEventListener("click", () => this.put(placeOf(entry)));
      box.append(Object.assign(shape("title", {}), { textContent: `${entry.label}, ${percent(entry.score)}` }));
      return [rectangle("under", entry.box), box];
    });
  }

  /** The flags of the map in words. */
  flags() {
    return this.shown.explanation.flags.map((flag) => FLAGS[flag] ?? flag);
  }

  /** The bar of the colours as an image, and what its ends mean. */
  bar() {
    const text = (selector) => this.find(selector).textContent;
    return { image: this.find(".scale").toDataURL(), least: text(".least"), most: text(".most") };
  }

  /** Image, colours and marks as one image file, at the size of the map, no side over `side`. */
  overlay(view, side = Infinity) {
    const { map, source } = this.shown;
    const scale = Math.min(1, side / Math.max(map.width, map.height));
    const [width, height] = [map.width, map.height].map((length) => Math.max(1, Math.round(length * scale)));
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d");
    context.drawImage(this.find(".photo"), 0, 0, width, height);
    context.globalAlpha = view.opacity;
    context.drawImage(this.find(".heat"), 0, 0, width, height);
    context.globalAlpha = 1;
    context.scale(width / source.width, height / source.height);
    const line = Math.max(source.width, source.height) / 400;
    for (const [colour, width] of [["#17181a", 2.5 * line], ["#fff", line]]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      for (const box of this.boxes) context.strokeRect(...box);
    }
    return canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
  }

  /**
   * Shows the progress of a request; returns a function that ends that.
   *
   * @param {string} words  what is being done
   * @param {number} seconds  how long it takes by what was measured before, or 0
   * @param {() => void} cancel
   */
  wait(words, seconds, cancel) {
    const started = performance.now();
    const progress = this.find(".progress");
    const bar = this.find(".progress-bar");
    const tick = () => {
      const elapsed = (performance.now() - started) / 1000;
      this.find(".progress-words").textContent = `${words} · ${elapsedOf(elapsed, seconds)}`;
      bar.classList.toggle("fills", isEstimated(elapsed, seconds));
      bar.style.setProperty("--done", Math.min(1, elapsed / seconds));
    };
    tick();
    const timer = setInterval(tick, 100);
    progress.hidden = false;
    this.find(".mat").setAttribute("aria-busy", "true");
    this.find(".cancel").onclick = cancel;
    this.waiting = timer;
    return () => {
      clearInterval(timer);
      if (this.waiting !== timer) return; // another request is pending by now
      progress.hidden = true;
      this.find(".mat").removeAttribute("aria-busy");
    };
  }
}

const isWhole = ([x, y, w, h], { width, height }) => x <= 0.5 && y <= 0.5 && x + w >= width - 0.5 && y + h >= height - 0.5;

export const rectangle = (name, [x, y, width, height]) => shape("rect", { class: name, x, y, width, height });

/** An SVG element. */
export function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
