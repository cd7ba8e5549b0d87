/** Images: picked, dropped, pasted, from the camera, or the sample. */

import { download } from "./api.js";
import { newId } from "./session.js";

const MAX_SIDE = 2048; // of the drawn bitmap; the server gets the original file
const SMALL_SIDE = 512; // of the bitmaps of images that were not shown lately
const LARGE_KEPT = 8; // large bitmaps: 100 would take more than 1 GB

const large = []; // the images with large bitmaps, the one shown last at the end

let unnamed = 0;

/**
 * A file with its bitmap.
 *
 * @returns {{id: string, name: string, file: Blob, bitmap: ImageBitmap | null, labels: Map, failure: string, ready: Promise}}
 *   `labels` has its class by the name of each model; `failure` says why there is none for the
 *   current model. `bitmap` is upright and at most SMALL_SIDE long, or MAX_SIDE after `enlarge`; null until
 *   `ready`, and for files that browsers cannot read, such as TIFF.
 */
export function newImage(file, name = file.name, id = newId()) {
  const image = { id, name: name || `image-${(unnamed += 1)}.png`, file, bitmap: null, labels: new Map(), failure: "" };
  image.ready = redraw(image, SMALL_SIDE);
  return image;
}

/** Gives an image its large bitmap, and takes one from the image that was not shown for the longest time. */
export function enlarge(image) {
  const place = large.indexOf(image);
  if (place >= 0) large.splice(place, 1);
  else image.ready = redraw(image, MAX_SIDE);
  large.push(image);
  if (large.length > LARGE_KEPT) redraw(large.shift(), SMALL_SIDE);
}

/** Decodes the bitmap of an image again; a later call wins. */
async function redraw(image, side) {
  image.side = side;
  const bitmap = await bitmapOf(image.file, side);
  if (image.side !== side) return bitmap?.close();
  if (!bitmap && image.bitmap) return; // the server's drawing of a file that browsers cannot read
  image.bitmap?.close();
  image.bitmap = bitmap;
}

/** The bitmap of an image file; null if the browser cannot read it. */
export async function bitmapOf(blob, side = MAX_SIDE) {
  let whole;
  try {
    whole = await createImageBitmap(blob);
  } catch {
    return null;
  }
  const scale = Math.min(1, side / Math.max(whole.width, whole.height));
  if (scale === 1) return whole;
  const size = {
    resizeWidth: Math.max(1, Math.round(whole.width * scale)),
    resizeHeight: Math.max(1, Math.round(whole.height * scale)),
    resizeQuality: "medium",
  };
  const small = await createImageBitmap(whole, size);
  whole.close();
  return small;
}

/**
 * Passes on the files that are picked, dropped on the page or pasted into it.
 *
 * @param {(files: File[], others: string[]) => void} onFiles  `others` says why the rest is not used
 */
export function watch({ input, drop, onFiles }) {
  input.addEventListener("change", () => {
    if (input.files.length) onFiles([...input.files], []);
    input.value = "";
  });
  const take = (transfer, way) => {
    const folders = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter((entry) => entry?.isDirectory);
    const files = [...transfer.files].filter(({ name }) => !folders.some((folder) => folder.name === name));
    const others = folders.map(({ name }) => `${name} is a folder. ${way} the images in it.`);
    onFiles(files, files.length || others.length ? others : [otherThanFiles(transfer, way)]);
  };
  document.addEventListener("paste", (event) => {
    if (!isField(event.target)) take(event.clipboardData, "Paste");
  });
  watchDrops(drop, take);
}

const isField = (element) => element instanceof HTMLInputElement && element.type !== "file";

function watchDrops(drop, take) {
  let depth = 0; // `dragenter` and `dragleave` come for every element on the way
  const show = (change) => {
    depth = change === 0 ? 0 : Math.max(0, depth + change);
    drop.hidden = depth === 0;
  };
  const isText = ({ target, dataTransfer }) => isField(target) && !dataTransfer?.types.includes("Files");
  document.addEventListener("dragenter", (event) => {
    if (event.dataTransfer?.types.includes("Files")) show(1);
  });
  document.addEventListener("dragleave", () => show(-1));
  document.addEventListener("dragover", (event) => isText(event) || event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (isText(event)) return;
    event.preventDefault();
    show(0);
    take(event.dataTransfer, "Drop");
  });
}

/** Why a drop or a paste without a file is not used. */
function otherThanFiles(transfer, way) {
  const text = transfer.getData("text/uri-list") || transfer.getData("text/plain").trim();
  if (!text) return `There is no image in this. ${way} an image file.`;
  if (!/^(https?|data|file|blob|ftp):\S+$/i.test(text)) return `This is text, not an image. ${way} an image file.`;
  return `This is a link, and this page opens no links. Save the image, then ${way.toLowerCase()} its file.`;
}

const OTHER_KINDS = { text: "text", audio: "a sound", video: "a video", font: "a font", application: "a document or program" };

/** Why a file cannot be an image, from its type and size; "" if it may be one. */
export function notAnImage({ name, type, size }) {
  const kind = type === "application/octet-stream" ? undefined : OTHER_KINDS[type.split("/")[0]];
  if (kind) return `${name} is ${type === "application/pdf" ? "a PDF document" : kind}, not an image. Choose an image, such as a JPEG or PNG file.`;
  return size === 0 ? `${name} is empty. Choose another file.` : "";
}

/** The sunflower that the server provides. Throws Problem. */
export async function sample() {
  return new File([await download("page/sunflower.jpg")], "sunflower.jpg", { type: "image/jpeg" });
}

/** Shows the camera in a dialog; resolves to the captured image, or null. */
export async function take(dialog) {
  const video = dialog.querySelector("video");
  const words = dialog.querySelector("#camera-words");
  const shutter = dialog.querySelector("#shutter");
  shutter.disabled = true;
  words.textContent = "Waiting for the camera …";
  dialog.showModal();
  const closed = new Promise((resolve) => dialog.addEventListener("close", () => resolve(null), { once: true }));
  const stream = await Promise.race([opened(words), closed]);
  if (!stream) return closed;
  if (!dialog.open) {
    stop(stream);
    return null;
  }
  video.srcObject = stream;
  await video.play();
  words.textContent = "The camera is on.";
  shutter.disabled = false;
  shutter.focus();
  const taken = new Promise((resolve) => {
    shutter.onclick = () => resolve(snapshot(video));
  });
  const file = await Promise.race([taken, closed]);
  stop(stream);
  video.srcObject = null;
  dialog.close();
  return file;
}

async function opened(words) {
  try {
    // `mediaDevices` is missing if the page comes over plain HTTP from another machine.
    return await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    words.textContent =
      error.name === "NotAllowedError"
        ? "Access to the camera was denied. Allow it in the browser, or choose a file."
        : "No camera is available. Choose a file instead.";
    return null;
  }
}

const stop = (stream) => stream.getTracks().forEach((track) => track.stop());

async function snapshot(video) {
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
  return new File([blob], "camera.jpg", { type: "image/jpeg" });
}
