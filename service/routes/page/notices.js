/** Messages: announcements for screen readers, and visible errors. */

import { Problem, useKey } from "./api.js";
import { $, button } from "./state.js";

const PASSING = [0, 429, 503, 504]; // statuses after which the same request may succeed

/** Announces a text in the live region, without showing it. */
export function announce(text) {
  $("status").textContent = text;
}

/** Shows a sentence in `box` until it is dismissed; `again` is offered as "Try again". */
export function complain(text, again, box = $("alert")) {
  const notice = document.createElement("div");
  notice.className = "notice";
  const words = document.createElement("p");
  words.textContent = text;
  const choices = document.createElement("p");
  choices.className = "choices";
  const retry = () => {
    settle();
    again();
  };
  if (again) choices.append(button("Try again", retry));
  choices.append(button("Dismiss", settle));
  notice.append(words, choices);
  box.replaceChildren(notice);
}

/** Removes every message. */
export function settle() {
  for (const box of document.querySelectorAll('[role="alert"]')) box.replaceChildren();
}

/** Shows an error in `box`; if the key is missing, prompts for it and continues with `again`. */
export function failed(error, again, box = $("alert")) {
  if (!(error instanceof Problem)) throw error; // a bug of this page goes to the console
  if (error.status === 401) askForKey(error.message, again);
  else complain(error.message, PASSING.includes(error.status) ? again : null, box);
}

function askForKey(detail, again) {
  $("key-detail").textContent = detail;
  $("key").hidden = false;
  $("key-field").focus();
  $("key").onsubmit = (event) => {
    event.preventDefault();
    useKey($("key-field").value.trim());
    $("key-field").value = "";
    $("key").hidden = true;
    again?.();
  };
}
