/** How maps are drawn, live: opacity, threshold, colours, regions; and the theme of the page. */

import { COLORMAPS } from "./heat.js";
import { $, state } from "./state.js";

/**
 * Fills the controls of the view.
 *
 * Calls `redraw` at most once a frame, however fast they move, and `settled` when a control has been let go.
 */
export function wireView(redraw, settled) {
  let frame = 0;
  const look = (change) => {
    Object.assign(state.view, change);
    syncView();
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(redraw);
  };
  $("colormap").replaceChildren(...COLORMAPS.map((name) => new Option(name)));
  $("opacity").addEventListener("input", () => look({ opacity: $("opacity").valueAsNumber / 100 }));
  $("threshold").addEventListener("input", () => look({ threshold: $("threshold").valueAsNumber / 100 }));
  $("colormap").addEventListener("change", () => look({ colormap: $("colormap").value }));
  $("regions").addEventListener("change", () => {
    const regions = $("regions").checked;
    // A region of everything is useless: start at the server's default.
    look({ regions, threshold: regions ? state.view.threshold || 0.5 : state.view.threshold });
  });
  for (const name of ["opacity", "threshold", "colormap", "regions"]) $(name).addEventListener("change", settled);
  syncView();
}

/** Sets the controls to the current view. */
export function syncView() {
  const { opacity, threshold, colormap, regions } = state.view;
  for (const [name, value] of [["opacity", opacity], ["threshold", threshold]]) {
    const percents = Math.round(100 * value);
    $(name).value = percents;
    $(name).setAttribute("aria-valuetext", `${percents} per cent`);
    $(`${name}-value`).textContent = `${percents} %`;
  }
  $("colormap").value = colormap;
  $("regions").checked = regions;
}

/** On a narrow screen the predictions come right after the image, also for the keyboard and screen readers. */
export function wireOrder() {
  const narrow = matchMedia("(max-width: 800px)");
  const order = () => (narrow.matches ? $("answer") : $("panes")).after($("view"), $("strip"));
  narrow.addEventListener("change", order);
  order();
}

/** The button that turns the page dark or light; until it is pressed the system decides. */
export function wireTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const sync = () => $("theme").setAttribute("aria-pressed", isDark());
  $("theme").addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    try {
      localStorage.setItem("camserve-theme", theme);
    } catch {
      // If storage is forbidden, the choice applies to this page only.
    }
    sync();
  });
  system.addEventListener("change", sync);
  sync();
}
