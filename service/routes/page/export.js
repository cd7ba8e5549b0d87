/** Export: the image with its map, the JSON, and code for the same request. */

import { hasKey, query } from "./api.js";
import { curl, python } from "./code.js";
import { announce } from "./notices.js";
import { optionsOf, viewOptions } from "./question.js";
import { sessionReport } from "./report.js";
import { $, state } from "./state.js";

/** `comparison` shows the maps to export. */
export function wireExport(comparison) {
  $("save-overlay").addEventListener("click", async () => {
    if (state.shown) save(await comparison.overlay(state.view), fileName(state.shown, "jpg"));
  });
  $("save-json").addEventListener("click", () => {
    if (!state.shown) return;
    const text = JSON.stringify(state.shown.answer, null, 2);
    save(new Blob([text], { type: "application/json" }), fileName(state.shown, "json"));
  });
  $("show-code").addEventListener("click", showCode);
  $("copy-link").addEventListener("click", async () => {
    $("code-link").textContent = location.href;
    if (!(await copied($("code-link")))) showCode(); // where the clipboard is forbidden
  });
  $("save-report").addEventListener("click", async () => {
    const report = await sessionReport(new URL(".", document.baseURI).href);
    save(new Blob([report], { type: "text/html" }), "camserve-report.html");
  });
  for (const copy of document.querySelectorAll("[data-copy]")) {
    copy.addEventListener("click", async () => {
      copy.textContent = (await copied($(copy.dataset.copy))) ? "Copied" : "Press Ctrl C";
    });
  }
}

/** The buttons of the shown map and of the session's experiments work where there are some. */
export function syncExport() {
  $("export").dataset.request = state.shown?.answer.id ?? "";
  for (const name of ["save-overlay", "save-json", "show-code", "copy-link"]) $(name).disabled = !state.shown;
  if (!state.shown) $("code").close();
  $("save-report").disabled = state.maps.length + state.experiments.length === 0;
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function fileName({ image, explanation }, end) {
  const parts = [image.name.replace(/\.[^.]*$/, ""), explanation.label, explanation.method];
  return `${parts.join("-").replaceAll(/[^\p{L}\p{N}.-]+/gu, "_")}.${end}`;
}

function showCode() {
  if (!state.shown) return;
  const { image, question, model } = state.shown;
  const base = new URL(".", document.baseURI).href;
  const options = [...optionsOf({ question, model }), ...viewOptions(state.view, question.method)];
  const all = [...options, ["include", "heatmap"], ["include", "regions"]];
  const key = hasKey();
  $("code-curl").textContent = curl(base, image.name, query(all), { key });
  $("code-picture").textContent = curl(base, image.name, query(options), { key, accept: "image/jpeg", out: "why.jpg" });
  $("code-python").textContent = python(base, image.name, all, { key });
  $("code-link").textContent = location.href;
  $("code-key").hidden = !key;
  for (const copy of document.querySelectorAll("[data-copy]")) copy.textContent = "Copy";
  $("code").showModal();
}

/** Puts a text on the clipboard; if that is forbidden, selects it. */
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
