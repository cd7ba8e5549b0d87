/** A map as numbers and as colours: levels 0..255, palettes, thresholds, regions. */

import { PALETTES } from "./tables.js";

const MIN_AREA = 4; // source pixels that a region needs to be listed, as on the server

/** The colormap of maps with a sign: blue is against the class, white no evidence, red for it. */
export const SIGNED = "bwr";

export const COLORMAPS = Object.keys(PALETTES).filter((name) => name !== SIGNED);

/** The 256 colours of a colormap as opaque pixels of an ImageData. */
export function palette(name) {
  const rgb = bytes(PALETTES[name]);
  const colours = new Uint32Array(256);
  const view = new DataView(colours.buffer);
  for (let level = 0; level < 256; level++) {
    for (let part = 0; part < 3; part++) view.setUint8(4 * level + part, rgb[3 * level + part]);
    view.setUint8(4 * level + 3, 255);
  }
  return colours;
}

/** Standard base64 to bytes; a `fetch` of a data: URI would violate the Content-Security-Policy. */
export function bytes(base64) {
  const text = atob(base64);
  const out = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index++) out[index] = text.charCodeAt(index);
  return out;
}

/** An encoded image as a bitmap, without colour management. */
export function bitmapOf(encoded) {
  const blob = new Blob([bytes(encoded.data)], { type: encoded.media_type });
  return createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
}

/**
 * The levels of a heatmap requested in grey, where a pixel's red is its level, or in SIGNED.
 *
 * @returns {Promise<{width: number, height: number, levels: Uint8Array, colours: Uint8Array}>}
 *   `levels` are 255 times the absolute value, `colours` the places in the palette
 */
export async function levelsOf(heatmap, isSigned) {
  const bitmap = await bitmapOf(heatmap);
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height);
  const levels = new Uint8Array(width * height);
  if (!isSigned) {
    for (let index = 0; index < levels.length; index++) levels[index] = data[4 * index];
    return { width, height, levels, colours: levels };
  }
  const colours = new Uint8Array(width * height);
  for (let index = 0; index < levels.length; index++) {
    const [red, green] = [data[4 * index], data[4 * index + 1]];
    colours[index] = red < 255 ? red / 2 : 255 - green / 2;
    levels[index] = Math.max(0, Math.abs(2 * colours[index] - 255) - (colours[index] === 128));
  }
  return { width, height, levels, colours };
}

/** The least level that reaches a threshold of 0..1; 0 lets everything through. */
const reached = (threshold) => (threshold > 0 ? Math.max(1, Math.ceil(255 * threshold - 0.5)) : 0);

/**
 * The map in colours: clear below the threshold and where the model saw nothing.
 *
 * @param {{width: number, height: number, levels: Uint8Array, colours: Uint8Array}} map
 * @param {number[]} seen  x, y, w, h in source pixels
 * @param {{width: number, height: number}} source
 * @returns {ImageData}
 */
export function coloured(map, seen, source, colours, threshold) {
  const image = new ImageData(map.width, map.height);
  const pixels = new Uint32Array(image.data.buffer);
  const least = reached(threshold);
  const [left, right] = inside(map.width, seen[0], seen[2], source.width);
  const [top, bottom] = inside(map.height, seen[1], seen[3], source.height);
  for (let row = top; row < bottom; row++) {
    const end = row * map.width + right;
    for (let index = row * map.width + left; index < end; index++) {
      if (map.levels[index] >= least) pixels[index] = colours[map.colours[index]];
    }
  }
  return image;
}

/** First and end of the pixels of an axis whose middles lie in the part that was seen. */
function inside(length, start, extent, whole) {
  const scale = length / whole;
  const first = Math.ceil(start * scale - 0.5 - 1e-6);
  const end = Math.floor((start + extent) * scale - 0.5 + 1e-6) + 1;
  return [Math.max(0, first), Math.min(length, end)];
}

/**
 * The boxes of the 8-connected regions that reach a threshold, the largest region first.
 *
 * Rows are taken apart into runs, and runs that touch are joined.
 * @returns {number[][]} x, y, w, h in source pixels
 */
export function regionBoxes({ width, height, levels }, source, threshold) {
  const least = Math.max(1, reached(threshold));
  const regions = joined(runs(levels, width, height, least));
  const scaleX = source.width / width;
  const scaleY = source.height / height;
  return regions
    .filter(({ area }) => area * scaleX * scaleY >= MIN_AREA)
    .sort((one, other) => other.area - one.area)
    .map(({ left, top, right, bottom }) => {
      const [x, y] = [firstPixel(left * scaleX), firstPixel(top * scaleY)];
      return [x, y, firstPixel(right * scaleX) - x, firstPixel(bottom * scaleY) - y];
    });
}

/**
 * The part that reaches a threshold, as plain COCO run lengths in source pixels, column by column.
 *
 * @returns {{size: number[], counts: number[]}}
 */
export function runLengths({ width, height, levels }, source, threshold) {
  const least = Math.max(1, reached(threshold));
  const counts = [0];
  let reaches = false; // the first run is of pixels that do not
  for (let x = 0; x < source.width; x++) {
    const column = Math.floor(((x + 0.5) * width) / source.width);
    for (let y = 0; y < source.height; y++) {
      const row = Math.floor(((y + 0.5) * height) / source.height);
      if ((levels[row * width + column] >= least) !== reaches) {
        reaches = !reaches;
        counts.push(0);
      }
      counts[counts.length - 1] += 1;
    }
  }
  return { size: [source.height, source.width], counts };
}

/** The part that reaches a threshold as an opaque image of the map's size, clear elsewhere. */
export function maskOf({ width, height, levels }, threshold) {
  const least = Math.max(1, reached(threshold));
  const canvas = new OffscreenCanvas(width, height);
  const image = new ImageData(width, height);
  for (let index = 0; index < levels.length; index++) image.data[4 * index + 3] = levels[index] >= least ? 255 : 0;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** The first source pixel whose middle lies at or after an edge. */
const firstPixel = (edge) => Math.ceil(edge - 0.5);

function runs(levels, width, height, least) {
  const rows = [];
  for (let row = 0; row < height; row++) {
    const ranges = [];
    const offset = row * width;
    for (let x = 0; x < width; x++) {
      if (levels[offset + x] < least) continue;
      const left = x;
      while (x < width && levels[offset + x] >= least) x++;
      ranges.push({ left, right: x, top: row, bottom: row + 1, area: x - left, parent: null });
    }
    rows.push(ranges);
  }
  return rows;
}

function joined(rows) {
  for (let row = 1; row < rows.length; row++) {
    let above = 0;
    for (const run of rows[row]) {
      while (above < rows[row - 1].length && rows[row - 1][above].right < run.left) above++;
      for (let index = above; index < rows[row - 1].length && rows[row - 1][index].left <= run.right; index++) {
        join(root(rows[row - 1][index]), root(run));
      }
    }
  }
  return rows.flat().filter((run) => run.parent === null);
}

function root(run) {
  let top = run;
  while (top.parent) top = top.parent;
  if (run !== top) run.parent = top;
  return top;
}

function join(one, other) {
  if (one === other) return;
  one.left = Math.min(one.left, other.left);
  one.right = Math.max(one.right, other.right);
  one.top = Math.min(one.top, other.top);
  one.bottom = Math.max(one.bottom, other.bottom);
  one.area += other.area;
  other.parent = one;
}
