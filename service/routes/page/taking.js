/** What can be taken along: the picture, the JSON, and the code that gives the same. */

import { hasKey, query } from "./api.js";
import { curl, python } from "./code.js";
import { announce } from "./notices.js";
import { optionsOf, viewOptions } from "./question.js";
import { $, state } from "./state.js";

/** `pane` shows the map to take. */
export function wireTaking(pane) {
  $("save-overlay").addEventListener("click", async () => {
    if (state.shown) save(await pane.overlay(state.view), fileName(state.shown, "jpg"));
  });
  $("save-json").addEventListener("click", () => {
    if (!state.shown) return;
    const text = JSON.stringify(state.shown.answer, null, 2);
    save(new Blob([text], { type: "application/json" }), fileName(state.shown, "json"));
  });
  $("show-code").addEventListener("click", showCode);
  for (const each of document.querySelectorAll("[data-copy]")) {
    each.addEventListener("click", async () => {
      each.textContent = (await copied($(each.dataset.copy))) ? "Copied" : "Press Ctrl C";
    });
  }
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function fileName({ photo, explanation }, end) {
  const parts = [photo.name.replace(/\.[^.]*$/, ""), explanation.label, explanation.method];
  return `${parts.join("-").replaceAll(/[^\p{L}\p{N}.-]+/gu, "_")}.${end}`;
}

function showCode() {
  if (!state.shown) return;
  const { photo, question, model } = state.shown;
  const base = new URL(".", document.baseURI).href;
  const options = [...optionsOf({ question, model }), ...viewOptions(state.view)];
  const all = [...options, ["include", "heatmap"], ["include", "regions"]];
  const key = hasKey();
  $("code-curl").textContent = curl(base, photo.name, query(all), { key });
  $("code-picture").textContent = curl(base, photo.name, query(options), { key, accept: "image/jpeg", out: "why.jpg" });
  $("code-python").textContent = python(base, photo.name, all, { key });
  $("code-key").hidden = !key;
  for (const each of document.querySelectorAll("[data-copy]")) each.textContent = "Copy";
  $("code").showModal();
}

/** Puts a text on the clipboard; where that is forbidden, selects it. */
async function copied(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    announce("Copied.");
    return true;
  } catch {
    getSelection().selectAllChildren(element);
    return false;
  }
}
