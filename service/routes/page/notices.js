/** What is said: to those who listen to the page, and to all when something fails. */

import { Problem, useKey } from "./api.js";
import { $, button } from "./state.js";

const PASSING = [0, 429, 503, 504]; // statuses after which the same request may succeed

/** Says something through the live region; nothing is seen. */
export function announce(text) {
  $("status").textContent = text;
}

/** Shows a sentence until it is dismissed; `again` is offered as "Try again". */
export function complain(text, again) {
  const box = document.createElement("div");
  box.className = "notice";
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
  box.append(words, choices);
  $("alert").replaceChildren(box);
}

export const settle = () => $("alert").replaceChildren();

/** Shows why something failed; where a key is missing, asks for it and goes on with `again`. */
export function failed(error, again, about = "") {
  if (!(error instanceof Problem)) throw error; // a fault of this page belongs in the console
  if (error.status === 401) askForKey(error.message, again);
  else complain(about ? `${about}: ${error.message}` : error.message, PASSING.includes(error.status) ? again : null);
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
