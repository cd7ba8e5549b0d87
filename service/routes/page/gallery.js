/** The strip of images: thumbnails with their classes; what a removal takes out, and how it comes back. */

import { $, button, state } from "./state.js";

const SIDE = 112; // of a thumbnail's canvas, in pixels

const items = new WeakMap(); // the <li> of each image
let revealed = null; // the image that was last scrolled into view

/** Lists the images, if there are several; `choose` is called with the one that is pressed. */
export function listImages(choose) {
  const wanted = state.images.map((image) => itemOf(image, choose));
  const list = $("photos");
  $("strip").hidden = state.images.length === 0;
  $("photos-count").textContent = state.images.length;
  list.hidden = state.images.length < 2;
  for (const image of state.images) update(image);
  if (wanted.length !== list.children.length || wanted.some((item, place) => item !== list.children[place])) replace(list, wanted);
  if (revealed !== state.image) reveal(list, state.image);
}

function replace(list, wanted) {
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  list.replaceChildren(...wanted);
  if (focused) (focused.isConnected ? focused : list.querySelector("[aria-pressed=true]"))?.focus({ preventScroll: true });
}

function itemOf(image, choose) {
  if (items.has(image)) return items.get(image);
  const item = document.createElement("li");
  const element = button("", () => choose(image));
  element.dataset.photo = image.id;
  const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
  element.append(canvas, document.createElement("span"));
  item.append(element);
  items.set(image, item);
  return item;
}

function update(image) {
  const element = items.get(image).firstChild;
  const [canvas, name] = element.children;
  element.setAttribute("aria-pressed", image === state.image);
  element.title = image.failure ? `${image.name}: ${image.failure}` : image.name;
  name.textContent = image.labels.get(state.model?.name) ?? (image.failure ? "⚠ failed" : image.name);
  if (!image.bitmap || canvas.dataset.drawn) return;
  const { width, height } = image.bitmap;
  const side = Math.min(width, height);
  canvas.getContext("2d").drawImage(image.bitmap, (width - side) / 2, (height - side) / 2, side, side, 0, 0, SIDE, SIDE);
  canvas.dataset.drawn = true;
}

/** Scrolls the strip, never the page. */
function reveal(list, image) {
  revealed = image;
  const item = items.get(image);
  if (!item || list.hidden) return;
  list.scrollTo({ left: item.offsetLeft - (list.clientWidth - item.offsetWidth) / 2, top: item.offsetTop - (list.clientHeight - item.offsetHeight) / 2 });
}

/** Calls `remove` with the image of a thumbnail where Delete is pressed. */
export function wireGallery(remove) {
  $("photos").addEventListener("keydown", (event) => {
    const image = state.images.find(({ id }) => id === event.target.dataset.photo);
    if (image && ["Delete", "Backspace"].includes(event.key)) remove(image);
  });
}

/** Takes images, their maps and their experiments out of the session; returns a function that puts them back. */
export function takeOut(images) {
  const experiments = state.experiments.filter(({ image }) => images.includes(image));
  const maps = state.maps.filter(({ shown }) => images.includes(shown.image));
  state.maps = state.maps.filter((map) => !maps.includes(map));
  state.images = state.images.filter((image) => !images.includes(image));
  state.experiments = state.experiments.filter(({ image }) => !images.includes(image));
  return () => {
    state.images = [...state.images, ...images].sort((one, other) => (one.id < other.id ? -1 : 1));
    state.experiments.push(...experiments);
    state.maps.push(...maps);
  };
}

/** Says whether the images are there after a reload. */
export function sayKept(isKept) {
  $("kept").textContent = isKept
    ? "This browser keeps the images for a reload of this tab. Clear all deletes them."
    : "This browser does not store the images: they are gone after a reload.";
}
