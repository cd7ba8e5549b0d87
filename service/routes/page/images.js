/** Images: picked, dropped, pasted, from the camera, or the sample. */

import { download } from "./api.js";

const MAX_SIDE = 2048; // of the drawn bitmap; the server gets the original file

let count = 0;

/**
 * A file with its bitmap.
 *
 * @returns {{id: number, name: string, file: Blob, bitmap: ImageBitmap | null, labels: Map, failure: string, ready: Promise}}
 *   `labels` has its class by the name of each model; `failure` says why there is none for the
 *   current model. `bitmap` is upright and at most MAX_SIDE long; null until `ready`, and for files that
 *   browsers cannot read, such as TIFF.
 */
export function newImage(file, name = file.name) {
  const image = { id: (count += 1), name: name || `photo-${count}.png`, file, bitmap: null, labels: new Map(), failure: "" };
  image.ready = bitmapOf(file).then((bitmap) => {
    image.bitmap = bitmap;
  });
  return image;
}

/** The bitmap of an image file; null if the browser cannot read it. */
export async function bitmapOf(blob) {
  let whole;
  try {
    whole = await createImageBitmap(blob);
  } catch {
    return null;
  }
  const scale = Math.min(1, MAX_SIDE / Math.max(whole.width, whole.height));
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

/** Passes on files that are picked, dropped on the page or pasted into it. */
export function watch({ input, drop, onFiles }) {
  const take = (files) => {
    if (files?.length) onFiles([...files]);
  };
  input.addEventListener("change", () => {
    take(input.files);
    input.value = "";
  });
  document.addEventListener("paste", (event) => take(event.clipboardData?.files));
  let depth = 0; // `dragenter` and `dragleave` come for every element on the way
  const show = (change) => {
    depth = change === 0 ? 0 : Math.max(0, depth + change);
    drop.hidden = depth === 0;
  };
  document.addEventListener("dragenter", (event) => {
    if (event.dataTransfer?.types.includes("Files")) show(1);
  });
  document.addEventListener("dragleave", () => show(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    show(0);
    take(event.dataTransfer?.files);
  });
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
