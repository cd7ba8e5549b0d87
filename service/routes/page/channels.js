/** The channels of a layer: a sheet of tiles, of which one can be opened. */

import { bitmapOf } from "./heat.js";

const GAP = 2; // pixels between tiles, as the server draws them

/**
 * Where the tiles are on a sheet.
 *
 * The sheet tells only its size, the layer only its shape: the enlargement is the one with which
 * whole rows and columns come out and the last row is not empty.
 * @returns {{count, columns, tile: {width, height}} | null} null where the layer is one table
 */
export function layout(shape, image) {
  for (const [count, height, width] of readings(shape)) {
    const shown = count - image.channels_left_out;
    for (let factor = Math.floor((image.width - 2 * GAP) / width); factor >= 1; factor--) {
      const tile = { width: width * factor, height: height * factor };
      const columns = (image.width - GAP) / (tile.width + GAP);
      const rows = (image.height - GAP) / (tile.height + GAP);
      const whole = Number.isInteger(columns) && Number.isInteger(rows);
      if (whole && shown <= columns * rows && shown > columns * (rows - 1)) return { count: shown, columns, tile };
    }
  }
  return null;
}

/** What a shape may mean: channels first, last, a vector, or tokens with or without a class token. */
function readings(shape) {
  if (shape.length === 1) return [[shape[0], 1, 1]];
  if (shape.length === 3) return [shape, [shape[2], shape[0], shape[1]]];
  if (shape.length !== 2) return [];
  return [shape[0], shape[0] - 1]
    .map((tokens) => Math.sqrt(tokens))
    .filter(Number.isInteger)
    .map((side) => [shape[1], side, side]);
}

export class Sheet {
  /** @param {HTMLElement} parent  scrolls. @param {(channel: number) => void} onOpen */
  constructor(parent, onOpen) {
    this.parent = parent;
    this.canvas = document.createElement("canvas");
    this.mark = document.createElement("span");
    this.mark.className = "tile-mark";
    const frame = document.createElement("div");
    frame.className = "sheet-frame";
    frame.append(this.canvas, this.mark);
    parent.replaceChildren(frame);
    this.canvas.addEventListener("click", (event) => {
      const channel = this.at(event);
      if (channel !== null) onOpen(channel);
    });
  }

  async show(activation) {
    this.bitmap = await bitmapOf(activation.image);
    this.layout = layout(activation.shape, activation.image);
    const { width, height } = this.bitmap;
    Object.assign(this.canvas, { width, height });
    this.canvas.classList.toggle("opens", this.layout !== null);
    this.arrange(Array.from({ length: this.layout?.count ?? 0 }, (_, channel) => channel));
  }

  /** Draws the tiles in another order; `order` has the channels, each once. */
  arrange(order) {
    this.order = order;
    this.mark.hidden = true;
    const context = this.canvas.getContext("2d");
    context.drawImage(this.bitmap, 0, 0);
    if (!this.layout) return;
    const { width, height } = this.layout.tile;
    order.forEach((channel, place) => {
      context.drawImage(this.bitmap, ...this.corner(channel), width, height, ...this.corner(place), width, height);
    });
  }

  /** Left and top corner of a place on the sheet, in its pixels. */
  corner(place) {
    const { columns, tile } = this.layout;
    return [GAP + (place % columns) * (tile.width + GAP), GAP + Math.floor(place / columns) * (tile.height + GAP)];
  }

  /** The channel `steps` places before or behind another one, or undefined. */
  beside(channel, steps) {
    return this.order[this.order.indexOf(channel) + steps];
  }

  at(event) {
    if (!this.layout) return null;
    const scale = this.canvas.width / this.canvas.clientWidth;
    const { count, columns, tile } = this.layout;
    const column = Math.floor((event.offsetX * scale - GAP / 2) / (tile.width + GAP));
    const row = Math.floor((event.offsetY * scale - GAP / 2) / (tile.height + GAP));
    const place = Math.max(0, row) * columns + Math.min(columns - 1, Math.max(0, column));
    return place < count ? this.order[place] : null;
  }

  /** Frames a tile. */
  point(channel) {
    const [left, top] = this.corner(this.order.indexOf(channel));
    const { tile } = this.layout;
    const share = (value, whole) => `${(100 * value) / whole}%`;
    const { style } = this.mark;
    style.left = share(left, this.bitmap.width);
    style.top = share(top, this.bitmap.height);
    style.width = share(tile.width, this.bitmap.width);
    style.height = share(tile.height, this.bitmap.height);
    this.mark.hidden = false;
  }

  /** Draws a tile, a pixel a cell, for the style sheet to enlarge. */
  draw(channel, canvas) {
    const [left, top] = this.corner(channel);
    const { width, height } = this.layout.tile;
    Object.assign(canvas, { width, height });
    canvas.getContext("2d").drawImage(this.bitmap, left, top, width, height, 0, 0, width, height);
  }
}
