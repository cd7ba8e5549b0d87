// The page is whole without this; it adds a slider, an order, a choice of classes and a large view.
"use strict";

const root = document.documentElement;
const main = document.querySelector("main");
const dialog = document.querySelector("dialog");
const cards = [...main.querySelectorAll("article")];
const buttons = [...document.querySelectorAll(".classes button")];

document.querySelector(".controls").hidden = false;

document.getElementById("opacity").addEventListener("input", (event) => {
  root.style.setProperty("--opacity", event.target.value);
});

document.getElementById("order").addEventListener("change", (event) => {
  const sign = { low: 1, high: -1 }[event.target.value];
  const sorted = [...cards];
  if (sign) sorted.sort((a, b) => sign * (a.dataset.score - b.dataset.score));
  main.append(...sorted);
});

for (const button of buttons) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", on);
    const chosen = buttons.filter((each) => each.getAttribute("aria-pressed") === "true");
    const labels = new Set(chosen.map((each) => each.value));
    for (const card of cards) card.hidden = labels.size > 0 && !labels.has(card.dataset.label);
  });
}

main.addEventListener("click", (event) => {
  const image = event.target.closest("figure button")?.querySelector("svg");
  if (!image) return;
  dialog.replaceChildren(image.cloneNode(true));
  dialog.showModal();
});

dialog.addEventListener("click", () => dialog.close());
dialog.addEventListener("close", () => dialog.replaceChildren());
