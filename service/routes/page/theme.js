// Runs before the page is drawn, so that a chosen theme never flashes in the other one.
"use strict";

try {
  const chosen = localStorage.getItem("camserve-theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch {
  // Storage may be forbidden; then the system's theme applies.
}
