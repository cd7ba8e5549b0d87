/** Comparing: up to three maps that stay beside the live one. */

import { announce } from "./notices.js";
import { Pane, captionOf } from "./stage.js";
import { $ } from "./state.js";

const MOST = 4; // panes, with the live one
const TEXT = 15; // pixels of the captions in a saved image
const GAP = 16;

export class Comparison {
  /** @param {Pane} live  the pane that changes with the question. @param {(change) => void} put */
  constructor(live, put) {
    this.live = live;
    this.put = put;
    this.panes = [];
  }

  /** All panes in the order in which they are shown; the live one is the last. */
  get all() {
    return [...this.panes, this.live];
  }

  /** Keeps the live map; only the live pane changes from now on. */
  keep(view) {
    const { shown } = this.live;
    if (!shown || this.all.length === MOST) return;
    const pane = new Pane($("panes"));
    this.panes.push(pane);
    this.live.element.before(pane.element);
    pane.showMap(shown, view, this.put);
    const close = pane.find(".close");
    close.hidden = false;
    close.setAttribute("aria-label", `Remove ${captionOf(shown)} from the comparison`);
    close.addEventListener("click", () => this.remove(pane));
    this.sync();
    announce(`${captionOf(shown)} is kept. Choose another class, method, layer, model or image.`);
  }

  remove(pane) {
    pane.element.remove();
    this.panes = this.panes.filter((other) => other !== pane);
    this.sync();
    $("compare").focus();
  }

  /** Removes the maps of images that are gone. */
  follow(images) {
    for (const pane of this.panes.filter(({ shown }) => !images.includes(shown.image))) pane.element.remove();
    this.panes = this.panes.filter(({ shown }) => images.includes(shown.image));
    this.sync();
  }

  sync() {
    const count = this.all.length;
    $("panes").classList.toggle("several", count > 1);
    $("compare").textContent = count > 1 ? `Compare (${count} of ${MOST})` : "Compare";
    $("compare").disabled = count === MOST || !this.live.shown;
    $("compare").title = count === MOST ? `A comparison has at most ${MOST} maps. Remove one to add another.` : "";
  }

  draw(view) {
    for (const pane of this.all) pane.draw(view);
  }

  /** What is shown as one image file; several panes side by side, with their captions. */
  async overlay(view) {
    const panes = this.all.filter(({ shown }) => shown);
    if (panes.length === 1) return panes[0].overlay(view);
    const images = await Promise.all(panes.map(async (pane) => createImageBitmap(await pane.overlay(view))));
    return sheetOf(images, panes.map((pane) => pane.words())).convertToBlob({ type: "image/jpeg", quality: 0.92 });
  }
}

/** Images of one width in two columns, each with its lines of text below. */
function sheetOf(images, captions) {
  const width = Math.min(800, Math.max(...images.map((image) => image.width)));
  const heights = images.map((image) => Math.round((image.height * width) / image.width));
  const text = 1.5 * TEXT * Math.max(...captions.map((lines) => lines.length)) + TEXT;
  const tops = [GAP]; // of each row, and the end of the last one
  for (let index = 0; index < images.length; index += 2) {
    tops.push(tops.at(-1) + Math.max(...heights.slice(index, index + 2)) + text);
  }
  const canvas = new OffscreenCanvas(2 * width + 3 * GAP, tops.at(-1) + GAP);
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = "#1a1b1d";
  images.forEach((image, index) => {
    const [left, top] = [GAP + (index % 2) * (width + GAP), tops[Math.floor(index / 2)]];
    context.drawImage(image, left, top, width, heights[index]);
    captions[index].forEach((line, row) => {
      context.font = `${row ? "" : "600 "}${TEXT}px system-ui, sans-serif`;
      context.fillText(line, left, top + heights[index] + 1.5 * TEXT * (row + 1), width);
    });
  });
  return canvas;
}
